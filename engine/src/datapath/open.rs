//! From a configuration to open datapaths, one per shard.
//!
//! A datapath that was demanded is opened or refused with the fix; `Auto` takes
//! the best that this machine gives and remembers why.

use std::net::SocketAddrV6;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use stoq_ebpf::steer::SteerTable;

use super::af_xdp::{AfXdp, AfXdpConfig, InterfaceHandle, ReceiveHash, ZeroCopy, open_interface};
use super::choice::{DatapathChoice, choose};
use super::io_uring::IoUringDatapath;
use super::socket::SocketDatapath;
use super::steering::SteeringHandle;
use super::udp_socket::{SocketConfig, SocketError};
use super::{Datapath, DatapathKind};
use crate::config::TransportConfig;
use crate::doctor::interface_facts;
use crate::error::StartError;

/// Open datapaths of one kind, in shard order.
pub enum Datapaths {
    /// AF_XDP rings, one device queue each.
    AfXdp(Vec<AfXdp>),
    /// io_uring over kernel sockets that share the port.
    IoUring(Vec<IoUringDatapath>),
    /// Plain kernel sockets that share the port.
    Socket(Vec<SocketDatapath>),
}

/// The XDP program's counters, readable from any thread while the engine lives.
#[derive(Debug, Clone)]
pub struct XdpHandle(Arc<Mutex<InterfaceHandle>>);

impl XdpHandle {
    fn new(interface: InterfaceHandle) -> Self {
        Self(Arc::new(Mutex::new(interface)))
    }

    /// The program that runs now.
    pub(crate) fn interface(&self) -> InterfaceHandle {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Names the program that runs from now on.
    pub(crate) fn set_interface(&self, interface: InterfaceHandle) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = interface;
    }

    /// Every counter with its name. They begin anew when a program had to be attached again.
    ///
    /// # Errors
    /// When the kernel does not answer, or the interface's program is gone.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, String> {
        match self.interface().xdp_counters() {
            None => Err("the XDP program is gone".into()),
            Some(Err(error)) => Err(error.to_string()),
            Some(Ok(counters)) => Ok(counters.iter().collect()),
        }
    }
}

/// What was opened and why.
pub struct Opened {
    /// The datapaths.
    pub datapaths: Datapaths,
    /// Why this kind, and why not a better one; one sentence each.
    pub reasons: Vec<String>,
    /// The XDP program, where one runs.
    pub xdp: Option<XdpHandle>,
    /// With what AF_XDP was opened, to do it again.
    pub(crate) af_xdp: Option<AfXdpConfig>,
    /// The `SO_REUSEPORT` program, where one runs.
    pub steering: Option<SteeringHandle>,
}

impl Opened {
    /// The address that all of them are bound to.
    ///
    /// # Panics
    /// Never: at least one datapath was opened.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddrV6 {
        match &self.datapaths {
            Datapaths::AfXdp(paths) => paths.first().map(Datapath::local_addr),
            Datapaths::IoUring(paths) => paths.first().map(Datapath::local_addr),
            Datapaths::Socket(paths) => paths.first().map(Datapath::local_addr),
        }
        .expect("a configuration has at least one shard")
    }

    fn because(mut self, reason: &str) -> Self {
        self.reasons.push(reason.to_owned());
        self
    }
}

/// What an engine knows of its packets beyond its configuration.
#[derive(Default)]
pub(crate) struct Use<'a> {
    /// Says which shard owns a packet.
    pub(crate) table: Option<&'a SteerTable>,
    /// No peer connects to it, so that its shards need not share a port.
    pub(crate) client_only: bool,
}

/// Opens the datapaths that `config` asks for, without steering in the kernel.
///
/// # Errors
/// What was demanded cannot be had: the text names it and the fix. `Auto` fails
/// only when not even plain sockets can be opened.
pub fn open(config: &TransportConfig) -> Result<Opened, StartError> {
    open_for(config, &Use::default())
}

/// The same, for the shards of an engine.
pub(crate) fn open_for(config: &TransportConfig, using: &Use<'_>) -> Result<Opened, StartError> {
    let table = using.table;
    match config.datapath {
        DatapathChoice::AfXdp => {
            open_af_xdp(config, using).map(|opened| opened.because("asked for"))
        }
        DatapathChoice::IoUring => {
            open_io_uring(config, table).map(|opened| opened.because("asked for"))
        }
        DatapathChoice::Socket => {
            open_sockets(config, table).map(|opened| opened.because("asked for"))
        }
        DatapathChoice::Auto => open_best(config, using),
    }
}

/// The best by capability; what cannot be opened after all is left for the next.
fn open_best(config: &TransportConfig, using: &Use<'_>) -> Result<Opened, StartError> {
    let interface = interface_name(config);
    let facts = interface.as_deref().and_then(interface_facts);
    let mut reasons = Vec::new();
    let kind = match &facts {
        Some(facts) => {
            let choice = choose(DatapathChoice::Auto, facts);
            for (kind, why) in &choice.refused {
                reasons.push(format!("not {}: {why}", kind.name()));
            }
            reasons.push(format!("{}: {}", choice.kind.name(), choice.reason));
            choice.kind
        }
        None => {
            reasons.push(match &interface {
                None => "not af_xdp: no interface is named, and AF_XDP binds to one".to_owned(),
                Some(name) => format!(
                    "not af_xdp: {name} is not under /sys/class/net; is the name right, and is \
                     /sys mounted in this network namespace?"
                ),
            });
            DatapathKind::IoUring
        }
    };
    let mut attempts = vec![DatapathKind::IoUring, DatapathKind::Socket];
    if kind == DatapathKind::AfXdp {
        attempts.insert(0, kind);
    } else if kind == DatapathKind::Socket {
        attempts.remove(0);
    }
    let mut failure = None;
    for kind in attempts {
        let opened = match kind {
            DatapathKind::AfXdp => {
                let mut config = config.clone();
                config.interface = interface.clone();
                open_af_xdp(&config, using)
            }
            DatapathKind::IoUring => open_io_uring(config, using.table),
            _ => open_sockets(config, using.table),
        };
        match opened {
            Ok(mut opened) => {
                reasons.push(format!("{}: opened by `auto`", kind.name()));
                reasons.append(&mut opened.reasons);
                opened.reasons = reasons;
                for reason in &opened.reasons {
                    tracing::info!(reason, "datapath choice");
                }
                return Ok(opened);
            }
            Err(error) => {
                tracing::warn!(%error, "falling back");
                reasons.push(format!("not {}: {error}", kind.name()));
                failure = Some(error);
            }
        }
    }
    Err(failure.expect("at least plain sockets were tried"))
}

/// The interface that carries the packets, where one is named or can be told from the address.
pub(crate) fn interface_name(config: &TransportConfig) -> Option<String> {
    config.interface.clone().or_else(|| interface_of(config))
}

/// The interface that owns the bound address, where a single one is bound.
fn interface_of(config: &TransportConfig) -> Option<String> {
    let wanted = format!("{:032x}", config.bind.ip().to_bits());
    let text = std::fs::read_to_string("/proc/thread-self/net/if_inet6").ok()?;
    let line = text.lines().find(|line| line.starts_with(&wanted))?;
    line.split_whitespace().nth(5).map(str::to_owned)
}

fn open_af_xdp(config: &TransportConfig, using: &Use<'_>) -> Result<Opened, StartError> {
    let interface = config.interface.clone().expect("validated: AF_XDP names an interface");
    let shards = u32::try_from(config.shards).expect("validated: at most 256");
    let mut af_xdp = AfXdpConfig::new(interface, config.bind);
    af_xdp.queues = (config.first_queue..config.first_queue + shards).collect();
    af_xdp.zero_copy = if config.require_zero_copy { ZeroCopy::Require } else { ZeroCopy::Prefer };
    af_xdp.allow_skb_mode = config.allow_skb_mode;
    let mut unknown = None;
    // The replies to a port that the user chose arrive where they arrive.
    if using.client_only && config.shards > 1 && config.bind.port() == 0 {
        match ReceiveHash::of_interface(&af_xdp.interface) {
            Ok(hash) => af_xdp.receive_hash = Some(hash),
            Err(why) => unknown = Some(why),
        }
    }
    let paths = open_interface(&af_xdp).map_err(|error| refused("af_xdp", &error))?;
    let mut reasons: Vec<String> = replies(&paths, unknown).into_iter().collect();
    let xdp = paths.first().map(|path| XdpHandle::new(path.interface()));
    // What the XDP program passes, and all packets while the sockets stand in for the device.
    let is_one_port = paths.iter().all(|path| path.local_addr() == paths[0].local_addr());
    let sockets = paths.iter().filter_map(AfXdp::slow_path_socket);
    let (steering, how) = steer(sockets, using.table.filter(|_| is_one_port));
    reasons.extend(how.into_iter().map(|how| format!("beside the rings: {how}")));
    Ok(Opened { datapaths: Datapaths::AfXdp(paths), reasons, xdp, af_xdp: Some(af_xdp), steering })
}

/// How the replies to a client come to their shards, where that is a question; `unknown` says why
/// the device's hash is not known.
fn replies(paths: &[AfXdp], unknown: Option<String>) -> Option<String> {
    if let Some(why) = unknown {
        return Some(format!("replies are handed over between shards: {why}"));
    }
    let mut ports: Vec<u16> = paths.iter().map(|path| path.local_addr().port()).collect();
    ports.dedup();
    (ports.len() > 1).then(|| {
        format!(
            "replies arrive at their shards' queues: source ports {ports:?} by the device's hash"
        )
    })
}

/// One socket per shard: the first chooses the port, the others join it.
fn open_each<D: Datapath>(
    config: &TransportConfig,
    datapath: &'static str,
    open: impl Fn(SocketConfig) -> Result<D, SocketError>,
) -> Result<Vec<D>, StartError> {
    let mut paths: Vec<D> = Vec::with_capacity(config.shards);
    for _ in 0..config.shards {
        let local = paths.first().map_or(config.bind, Datapath::local_addr);
        let mut socket = SocketConfig::new(local);
        socket.reuse_port = config.shards > 1;
        paths.push(open(socket).map_err(|error| refused(datapath, &error))?);
    }
    Ok(paths)
}

fn open_io_uring(
    config: &TransportConfig,
    table: Option<&SteerTable>,
) -> Result<Opened, StartError> {
    let paths = open_each(config, "io_uring", IoUringDatapath::open)?;
    let (steering, reasons) = steer(paths.iter().map(IoUringDatapath::udp_socket), table);
    Ok(Opened { datapaths: Datapaths::IoUring(paths), reasons, xdp: None, af_xdp: None, steering })
}

fn open_sockets(
    config: &TransportConfig,
    table: Option<&SteerTable>,
) -> Result<Opened, StartError> {
    let paths = open_each(config, "socket", SocketDatapath::open)?;
    let (steering, reasons) = steer(paths.iter().map(SocketDatapath::udp_socket), table);
    Ok(Opened { datapaths: Datapaths::Socket(paths), reasons, xdp: None, af_xdp: None, steering })
}

/// Lets the kernel give packets to the shards' sockets, if it can; says once if it cannot.
fn steer<'a>(
    sockets: impl Iterator<Item = BorrowedFd<'a>>,
    table: Option<&SteerTable>,
) -> (Option<SteeringHandle>, Vec<String>) {
    let sockets: Vec<BorrowedFd<'_>> = sockets.collect();
    let Some(table) = table.filter(|_| sockets.len() > 1) else { return (None, Vec::new()) };
    match SteeringHandle::attach(&sockets, table) {
        Ok(steering) => {
            tracing::info!(shards = sockets.len(), "the kernel steers packets to their shards");
            (Some(steering), vec!["packets are steered to their shards by the kernel".into()])
        }
        Err(error) => {
            tracing::warn!(%error, "no steering in the kernel");
            (None, vec![format!("no steering in the kernel: {error}")])
        }
    }
}

fn refused(datapath: &'static str, error: &dyn std::fmt::Display) -> StartError {
    StartError::Datapath { datapath, reason: error.to_string() }
}
