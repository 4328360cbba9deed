//! Opening: from names in a configuration to datapaths that run.
//!
//! Nothing of the interface changes before everything that can be checked was
//! checked: the port is taken first, then the queues are bound, and only then is
//! the program attached; packets are redirected from the moment that the port is
//! registered with the program, which is last.

use std::collections::VecDeque;
use std::fs;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::error::AfXdpError;
use super::limits::AfXdpLimits;
use super::neighbors::Neighbors;
use super::pending::PendingQueue;
use super::program::{AttachMode, XdpProgram};
use super::receive::Receiver;
use super::slow_path::{self, is_ipv4};
use super::socket::{Binding, XskSocket, ZeroCopy};
use super::source_ports::{ReceiveHash, SourcePort};
use super::transmit::Transmitter;
use super::{AfXdp, Interface, InterfaceHandle, payload_max};
use crate::datapath::socket::SocketDatapath;
use crate::datapath::{Capabilities, Datapath, DatapathCounters, DatapathKind};
use crate::sys::ethtool;
use crate::sys::xsk::Statistics;

/// Events that fit the queue before it grows; more than a shard leaves unread.
const EVENTS: usize = 16;

/// What to open.
#[derive(Debug, Clone)]
pub struct AfXdpConfig {
    /// Name of the interface, in the network namespace of the calling thread.
    pub interface: String,
    /// Local address and port. The unspecified address `::` means every address
    /// of the interface; port 0 lets the kernel choose.
    pub local: SocketAddrV6,
    /// Device queues, one datapath each.
    pub queues: Vec<u32>,
    /// Whether the device must work on our memory directly.
    pub zero_copy: ZeroCopy,
    /// How to attach the XDP program; `None`: natively if the driver can.
    pub attach_mode: Option<AttachMode>,
    /// Whether generic (SKB) mode may be used when the driver cannot attach natively.
    pub allow_skb_mode: bool,
    /// Whether UDP checksums of sent packets may be left to the device (or, in
    /// copy mode, to the kernel) where that is reliable; the engine sums otherwise.
    pub checksum_offload: bool,
    /// How the device spreads replies over its queues. With it, and port 0, each queue's datapath
    /// gets a port of its own and sends to a peer from that one of all ports whose replies arrive
    /// at its queue; `None`: one port for all. For clients: a server has one port.
    pub receive_hash: Option<ReceiveHash>,
    /// Sizes and bounds.
    pub limits: AfXdpLimits,
}

impl AfXdpConfig {
    /// Queue 0 of an interface with defaults: zero-copy where possible, native mode.
    #[must_use]
    pub fn new(interface: impl Into<String>, local: SocketAddrV6) -> Self {
        Self {
            interface: interface.into(),
            local,
            queues: vec![0],
            zero_copy: ZeroCopy::Prefer,
            attach_mode: None,
            allow_skb_mode: false,
            checksum_offload: true,
            receive_hash: None,
            limits: AfXdpLimits::default(),
        }
    }
}

/// Opens one datapath per queue of an interface, all on the same UDP port unless
/// [`receive_hash`](AfXdpConfig::receive_hash) tells better ones.
///
/// Needs `CAP_NET_ADMIN`, `CAP_NET_RAW` and `CAP_BPF`. Each datapath may then be
/// moved to the thread of its shard. May block for some milliseconds, and up to
/// `bind_retries` × 10 ms per queue while a queue is busy.
///
/// # Errors
/// See [`AfXdpError`]; nothing stays open or attached.
pub fn open_interface(config: &AfXdpConfig) -> Result<Vec<AfXdp>, AfXdpError> {
    config.limits.validate()?;
    let ifindex = check_request(config)?;
    let neighbors = config
        .queues
        .iter()
        .map(|_| open_neighbors(config, ifindex))
        .collect::<Result<Vec<_>, _>>()?;
    let (mtu_bytes, local) = {
        let first = neighbors.first().expect("at least one queue, checked above");
        (first.mtu(), check_address(config, first.addresses(), ifindex)?)
    };
    let slow_paths = open_slow_paths(config, local)?;
    let sockets = config
        .queues
        .iter()
        .map(|&queue| bind(config, ifindex, queue, mtu_bytes))
        .collect::<Result<Vec<_>, _>>()?;
    let ports: Arc<[u16]> = slow_paths.iter().map(|path| path.local_addr().port()).collect();
    let bound: Vec<_> = config.queues.iter().copied().zip(&sockets).collect();
    let interface = attach(config, ifindex, &ports, &bound)?;
    let opened = neighbors.into_iter().zip(slow_paths).zip(sockets).zip(&config.queues);
    let opened: Vec<_> = opened
        .map(|(((neighbors, slow_path), socket), &queue)| {
            let local = slow_path.local_addr();
            let ports = Arc::clone(&ports);
            let parts =
                Parts { neighbors, slow_path: Some(slow_path), local, ports, socket, queue };
            assemble(config, ifindex, &interface, parts)
        })
        .collect();
    for datapath in &opened {
        tracing::info!(
            interface = config.interface,
            queue = datapath.queue,
            port = datapath.local.port(),
            mtu_bytes,
            mode = datapath.capabilities.mode,
            "AF_XDP datapath opened"
        );
    }
    Ok(opened)
}

/// Opens one queue of an interface again, which may be another one of the same name, for a shard
/// that holds its one of `ports` (in the order of `config.queues`) already; the datapath lacks its
/// slow path, which the shard gives to it. `shared` is the program that the interface's other queues use, if any does: it is
/// joined where it is still on this interface, and replaced by a new one otherwise.
///
/// Blocks for some milliseconds, and up to a second while the queue or the interface is busy.
///
/// # Errors
/// See [`AfXdpError`]; nothing stays open or attached.
pub(crate) fn reopen(
    config: &AfXdpConfig,
    shard: usize,
    ports: &Arc<[u16]>,
    shared: &InterfaceHandle,
) -> Result<AfXdp, AfXdpError> {
    let queue = config.queues[shard];
    let config = &AfXdpConfig { queues: vec![queue], ..config.clone() };
    let ifindex = check_request(config)?;
    let neighbors = open_neighbors(config, ifindex)?;
    if !neighbors.link_up() {
        return Err(AfXdpError::LinkDown { interface: config.interface.clone() });
    }
    let mut local = check_address(config, neighbors.addresses(), ifindex)?;
    local.set_port(ports[shard]);
    let socket = bind(config, ifindex, queue, neighbors.mtu())?;
    let interface = match shared.0.upgrade().filter(|shared| shared.can_be_joined(ifindex)) {
        Some(shared) => {
            shared.program().set_socket(queue, socket.as_fd()).map_err(|source| {
                AfXdpError::Program { interface: config.interface.clone(), source }
            })?;
            shared
        }
        None => attach(config, ifindex, ports, &[(queue, &socket)])?,
    };
    let ports = Arc::clone(ports);
    let parts = Parts { neighbors, slow_path: None, local, ports, socket, queue };
    Ok(assemble(config, ifindex, &interface, parts))
}

/// The kernel's sockets that hold the ports: one port for all shards, or one each.
fn open_slow_paths(
    config: &AfXdpConfig,
    local: SocketAddrV6,
) -> Result<Vec<SocketDatapath>, AfXdpError> {
    let (shards, rx_buffers) = (config.queues.len(), config.limits.slow_path_batch);
    if let Some(hash) = config.receive_hash.as_ref().filter(|_| shards > 1 && local.port() == 0)
        && let Some(opened) = slow_path::open_apart(local, shards, rx_buffers, hash)?
    {
        return Ok(opened);
    }
    slow_path::open(local, shards, rx_buffers)
}

impl Interface {
    /// Whether the program is still on the interface with this index.
    fn can_be_joined(&self, ifindex: u32) -> bool {
        self.ifindex == ifindex && matches!(self.program().is_attached(), Ok(true))
    }
}

fn bind(
    config: &AfXdpConfig,
    ifindex: u32,
    queue: u32,
    mtu_bytes: u32,
) -> Result<XskSocket, AfXdpError> {
    XskSocket::bind(&Binding {
        interface: &config.interface,
        ifindex,
        queue,
        mtu_bytes,
        zero_copy: config.zero_copy,
        limits: &config.limits,
    })
}

/// Checks what the configuration says against itself and the machine; the interface's index.
fn check_request(config: &AfXdpConfig) -> Result<u32, AfXdpError> {
    if is_ipv4(*config.local.ip()) {
        return Err(AfXdpError::Ipv4(*config.local.ip()));
    }
    let mut sorted = config.queues.clone();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.is_empty() || sorted.len() != config.queues.len() {
        return Err(AfXdpError::Queues {
            interface: config.interface.clone(),
            queues: config.queues.clone(),
        });
    }
    let Some(ifindex) = interface_index(&config.interface) else {
        return Err(AfXdpError::NoInterface {
            interface: config.interface.clone(),
            existing: interface_names(),
        });
    };
    // A driver that does not tell its queues leaves the check to bind().
    if let Ok(available) = ethtool::queue_count(&config.interface)
        && let Some(&queue) = sorted.iter().find(|&&queue| queue >= available)
    {
        return Err(AfXdpError::NoQueue { interface: config.interface.clone(), queue, available });
    }
    Ok(ifindex)
}

fn interface_index(name: &str) -> Option<u32> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET6,
        rustix::net::SocketType::DGRAM,
        None,
    )
    .ok()?;
    rustix::net::netdevice::name_to_index(&socket, name).ok()
}

/// The interfaces of the calling thread's network namespace, for an error text.
fn interface_names() -> String {
    match fs::read_to_string("/proc/thread-self/net/dev") {
        Ok(table) => {
            let names = table.lines().filter_map(|line| line.split_once(':'));
            let names: Vec<_> = names.map(|(name, _)| name.trim()).collect();
            names.join(", ")
        }
        Err(error) => format!("(cannot read /proc/thread-self/net/dev: {error})"),
    }
}

fn open_neighbors(config: &AfXdpConfig, ifindex: u32) -> Result<Neighbors, AfXdpError> {
    Neighbors::open(ifindex, &config.interface)
        .map_err(|source| AfXdpError::Netlink { interface: config.interface.clone(), source })
}

/// Checks that the local address is one of the interface's, and gives a link-local one its scope.
fn check_address(
    config: &AfXdpConfig,
    addresses: &[Ipv6Addr],
    ifindex: u32,
) -> Result<SocketAddrV6, AfXdpError> {
    let mut local = config.local;
    if addresses.is_empty() {
        return Err(AfXdpError::NoAddress { interface: config.interface.clone() });
    }
    if !local.ip().is_unspecified() && !addresses.contains(local.ip()) {
        let names: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        return Err(AfXdpError::ForeignAddress {
            interface: config.interface.clone(),
            address: *local.ip(),
            existing: names.join(", "),
        });
    }
    if local.ip().is_unicast_link_local() {
        local.set_scope_id(ifindex);
    }
    Ok(local)
}

/// Attaches the program, gives it the sockets, and then the ports, which may be all the same.
fn attach(
    config: &AfXdpConfig,
    ifindex: u32,
    ports: &[u16],
    sockets: &[(u32, &XskSocket)],
) -> Result<Arc<Interface>, AfXdpError> {
    let failed = |source| AfXdpError::Program { interface: config.interface.clone(), source };
    let mut program =
        XdpProgram::attach(ifindex, &config.interface, config.attach_mode, config.allow_skb_mode)
            .map_err(failed)?;
    for &(queue, socket) in sockets {
        program.set_socket(queue, socket.as_fd()).map_err(failed)?;
    }
    let address = Some(*config.local.ip()).filter(|address| !address.is_unspecified());
    for &port in ports {
        program.register_port(port, address).map_err(failed)?;
    }
    Ok(Arc::new(Interface {
        name: config.interface.clone(),
        ifindex,
        detached: AtomicBool::new(false),
        program: Mutex::new(program),
    }))
}

/// Whether the interface computes UDP checksums of sent packets when asked to by TX metadata.
///
/// In copy mode the packet is an skb, and the kernel computes what the device
/// cannot. In zero-copy mode the driver must know TX metadata, and one that does
/// not ignores it silently: then the engine sums.
fn checksum_offload(socket: &XskSocket) -> bool {
    socket.tx_metadata && !socket.zero_copy
}

struct Parts {
    neighbors: Neighbors,
    slow_path: Option<SocketDatapath>,
    local: SocketAddrV6,
    /// Those of all shards.
    ports: Arc<[u16]>,
    socket: XskSocket,
    queue: u32,
}

/// The port to send from, where replies arrive at queues of their own and where they do not.
fn source_port(config: &AfXdpConfig, parts: &Parts) -> SourcePort {
    let own = parts.local.port();
    let apart = parts.ports.iter().any(|port| *port != own);
    match config.receive_hash.clone().filter(|_| apart) {
        Some(hash) => SourcePort::chosen(own, hash, Arc::clone(&parts.ports), parts.queue),
        None => SourcePort::fixed(own),
    }
}

fn assemble(config: &AfXdpConfig, ifindex: u32, interface: &Arc<Interface>, parts: Parts) -> AfXdp {
    let source_port = source_port(config, &parts);
    let Parts { neighbors, slow_path, local, ports, socket, queue } = parts;
    let limits = &config.limits;
    let now = Instant::now();
    let offload = config.checksum_offload && checksum_offload(&socket);
    let transmitter = Transmitter::new(
        source_port,
        limits.frame_size_bytes,
        socket.multi_buffer,
        socket.zero_copy,
        offload,
        now,
    );
    let mut mode = String::from(if socket.zero_copy { "zero-copy" } else { "copy" });
    if socket.multi_buffer {
        mode.push_str(", multi-buffer");
    }
    if offload {
        mode.push_str(", checksum offload");
    }
    let patience = Duration::from_millis(limits.pending_ms_max);
    AfXdp {
        receiver: Receiver::new(local, ports, ifindex),
        payload_max: payload_max(neighbors.mtu(), &transmitter),
        link_up: neighbors.link_up(),
        pending_generation: neighbors.generation(),
        pending: PendingQueue::new(limits.pending_datagrams, patience),
        interface: Arc::clone(interface),
        queue,
        capabilities: Capabilities {
            kind: DatapathKind::AfXdp,
            mode,
            interface: Some(config.interface.clone()),
            queue: Some(queue),
            standby_reason: None,
        },
        counters: DatapathCounters::default(),
        statistics: Statistics::default(),
        events: VecDeque::with_capacity(EVENTS),
        now,
        next_upkeep: now,
        turns_since_slow_path: 0,
        slow_path_ready: true,
        netlink_ready: true,
        failed: false,
        socket,
        transmitter,
        neighbors,
        slow_path,
        local,
    }
}
