//! The XDP program on an interface: loads it, attaches it, owns its maps.
//!
//! One [`XdpProgram`] per interface and process; its sockets, one per device
//! queue, belong to the shards.
//!
//! Invariants:
//! * The program is held by an unpinned bpf_link. It leaves the interface when
//!   the `XdpProgram` is dropped or the process dies, whatever kills it.
//! * What is not registered is passed to the kernel: between
//!   [`attach`](XdpProgram::attach) and the first
//!   [`register_port`](XdpProgram::register_port) nothing changes for anybody.
//!
//! Lowest kernel: 5.18 (multi-buffer XDP). All of this is set-up and upkeep;
//! none of it runs per packet.

mod error;

use std::fmt;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use aya::maps::{HashMap, MapData, MapError, PerCpuArray, XskMap};
use aya::programs::Xdp;
use aya::{Ebpf, EbpfError, EbpfLoader};
use rustix::io::Errno;
use rustix::net::netdevice::index_to_name;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use stoq_ebpf::{
    Address, Counter, PORT_KEY_BYTES, PortKey, PortValue, QUEUES_MAX, XDP_OBJECT, maps,
};
use tracing::{info, warn};

use self::error::errno;
pub use self::error::{ProgramError, Step};
use crate::sys::bpf::{self, XdpHook};

/// How long [`XdpProgram::attach`] waits for an interface that another program
/// holds: a link whose owner has just died is released asynchronously.
const BUSY_WAIT_MAX: Duration = Duration::from_millis(500);
/// Pause between two attempts.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Where in the receive path the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachMode {
    /// In the driver, before the kernel allocates anything for the packet.
    Driver,
    /// In the network stack ("generic"): any interface, but slower than a socket.
    Skb,
}

impl AttachMode {
    /// The name used in configurations, logs and `--json` outputs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::Skb => "skb",
        }
    }
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the program has counted since it was attached, summed over all CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct XdpCounters {
    values: [u64; Counter::COUNT],
}

impl XdpCounters {
    /// One counter: packets, or bytes where its name says so.
    #[must_use]
    pub fn value(&self, counter: Counter) -> u64 {
        self.values[counter.index() as usize]
    }

    /// Every counter with its stable `snake_case` name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Counter::ALL.iter().map(|&counter| (counter.name(), self.value(counter)))
    }
}

/// The program, attached to one interface. See the [module documentation](self).
pub struct XdpProgram {
    link: OwnedFd,
    ports: HashMap<MapData, [u8; PORT_KEY_BYTES], PortValue>,
    sockets: XskMap<MapData>,
    counters: PerCpuArray<MapData, u64>,
    mode: AttachMode,
    interface: String,
}

impl fmt::Debug for XdpProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("XdpProgram")
            .field("interface", &self.interface)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl Drop for XdpProgram {
    fn drop(&mut self) {
        // Closing the link would do, but only with its last copy: a child that
        // was forked just now still has one until it calls exec.
        if let Err(error) = bpf::detach_link(self.link.as_fd()) {
            warn!(interface = self.interface, %error, "XDP program not detached: closing the link");
        }
    }
}

impl XdpProgram {
    /// Loads the program and attaches it to the interface `ifindex` in the
    /// calling thread's network namespace. `ifname` is for messages.
    ///
    /// `mode` insists on a way to attach. With `None` it is the driver's, and
    /// where the driver has none, the generic one if `allow_skb` says so.
    ///
    /// An interface that is held by another program is waited for, at most half
    /// a second.
    ///
    /// # Errors
    /// See [`ProgramError`]: what failed, on which interface, and what to do.
    pub fn attach(
        ifindex: u32,
        ifname: &str,
        mode: Option<AttachMode>,
        allow_skb: bool,
    ) -> Result<Self, ProgramError> {
        let failed = |step| move |error: EbpfError| ProgramError::new(ifname, step, &error);
        let mut ebpf = EbpfLoader::new().load(XDP_OBJECT).map_err(failed(Step::CreateMaps))?;
        let (ports, sockets, counters) = take_maps(&mut ebpf).map_err(failed(Step::CreateMaps))?;
        let program = xdp_program(&mut ebpf);
        program.load().map_err(|error| ProgramError::new(ifname, Step::Load, &error))?;
        let mut attached_mode = mode.unwrap_or(AttachMode::Driver);
        let link = match attach_link(program, ifindex, ifname, attached_mode) {
            Err(ProgramError::NoDriverSupport { source, .. }) if mode.is_none() && allow_skb => {
                warn!(interface = ifname, %source, "no XDP in the driver: attaching in SKB mode");
                attached_mode = AttachMode::Skb;
                attach_link(program, ifindex, ifname, attached_mode)?
            }
            link => link?,
        };
        let mode = attached_mode;
        info!(interface = ifname, mode = mode.name(), "XDP program attached");
        // The program's own descriptor goes with `ebpf`: the link keeps it loaded.
        Ok(Self { link, ports, sockets, counters, mode, interface: ifname.to_owned() })
    }

    /// How the program is attached.
    #[must_use]
    pub fn mode(&self) -> AttachMode {
        self.mode
    }

    /// Whether the program is still on its interface: anybody with `CAP_NET_ADMIN` may detach it,
    /// and it goes with the interface.
    ///
    /// # Errors
    /// The system call's.
    pub fn is_attached(&self) -> io::Result<bool> {
        bpf::xdp_link_ifindex(self.link.as_fd()).map(|ifindex| ifindex.is_some())
    }

    /// Declares UDP packets to `port` ours: at `addr`, or with `None` (or `::`)
    /// at every unicast address. Those of a queue without a
    /// [socket](Self::set_socket) are passed to the kernel. Repeating it
    /// changes nothing.
    ///
    /// "Every address" includes packets that this machine would forward: on a
    /// router, register each address.
    ///
    /// # Errors
    /// [`ProgramError::PortZero`]; [`ProgramError::PortsFull`]; or the system call's.
    pub fn register_port(&mut self, port: u16, addr: Option<Ipv6Addr>) -> Result<(), ProgramError> {
        if port == 0 {
            return Err(ProgramError::PortZero { interface: self.interface.clone() });
        }
        self.ports.insert(port_key(port, addr), 0, 0).map_err(|error| {
            if errno(&error) == Some(libc::E2BIG) {
                ProgramError::PortsFull { interface: self.interface.clone(), port }
            } else {
                ProgramError::new(&self.interface, Step::UpdateMap(maps::PORTS_MAP), &error)
            }
        })
    }

    /// Takes back [`register_port`](Self::register_port), which must have had
    /// the same arguments.
    ///
    /// # Errors
    /// [`ProgramError::PortNotRegistered`]; or the system call's.
    pub fn unregister_port(
        &mut self,
        port: u16,
        addr: Option<Ipv6Addr>,
    ) -> Result<(), ProgramError> {
        self.ports.remove(&port_key(port, addr)).map_err(|error| {
            if matches!(error, MapError::KeyNotFound) || errno(&error) == Some(libc::ENOENT) {
                let addr = addr.unwrap_or(Ipv6Addr::UNSPECIFIED);
                ProgramError::PortNotRegistered { interface: self.interface.clone(), port, addr }
            } else {
                ProgramError::new(&self.interface, Step::UpdateMap(maps::PORTS_MAP), &error)
            }
        })
    }

    /// Hands the packets of receive queue `queue` to `socket`: an AF_XDP socket
    /// with a fill and a receive ring that is bound to this queue of this
    /// interface. It leaves the map when it is closed.
    ///
    /// # Errors
    /// [`ProgramError::QueueOutOfRange`]; or the system call's: EOPNOTSUPP or
    /// EINVAL for a descriptor that is no such socket.
    pub fn set_socket(&mut self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), ProgramError> {
        self.check_queue(queue)?;
        self.sockets.set(queue, socket, 0).map_err(|error| {
            ProgramError::new(&self.interface, Step::UpdateMap(maps::SOCKETS_MAP), &error)
        })
    }

    /// Passes the packets of `queue` to the kernel again. Without a socket there,
    /// nothing happens.
    ///
    /// # Errors
    /// [`ProgramError::QueueOutOfRange`]; or the system call's.
    pub fn clear_socket(&mut self, queue: u32) -> Result<(), ProgramError> {
        self.check_queue(queue)?;
        match self.sockets.unset(queue) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
            Err(error) => {
                Err(ProgramError::new(&self.interface, Step::UpdateMap(maps::SOCKETS_MAP), &error))
            }
        }
    }

    /// Reads the counters: one system call each.
    ///
    /// # Errors
    /// The system call's.
    pub fn counters(&self) -> Result<XdpCounters, ProgramError> {
        let mut counters = XdpCounters::default();
        for (counter, value) in Counter::ALL.iter().zip(&mut counters.values) {
            let per_cpu = self.counters.get(&counter.index(), 0).map_err(|error| {
                ProgramError::new(&self.interface, Step::ReadMap(maps::COUNTERS_MAP), &error)
            })?;
            *value = per_cpu.iter().sum();
        }
        Ok(counters)
    }

    fn check_queue(&self, queue: u32) -> Result<(), ProgramError> {
        if (queue as usize) < QUEUES_MAX {
            Ok(())
        } else {
            Err(ProgramError::QueueOutOfRange { interface: self.interface.clone(), queue })
        }
    }
}

type Maps =
    (HashMap<MapData, [u8; PORT_KEY_BYTES], PortValue>, XskMap<MapData>, PerCpuArray<MapData, u64>);

fn take_maps(ebpf: &mut Ebpf) -> Result<Maps, EbpfError> {
    let mut take = |name| ebpf.take_map(name).expect("the object has the maps of stoq_ebpf::maps");
    Ok((
        take(maps::PORTS_MAP).try_into()?,
        take(maps::SOCKETS_MAP).try_into()?,
        take(maps::COUNTERS_MAP).try_into()?,
    ))
}

fn xdp_program(ebpf: &mut Ebpf) -> &mut Xdp {
    ebpf.program_mut(maps::XDP_PROGRAM)
        .and_then(|program| program.try_into().ok())
        .expect("the object has the program of stoq_ebpf::maps, in an XDP section")
}

/// Attaches by bpf_link, waiting a bounded time for an interface that is held.
fn attach_link(
    program: &Xdp,
    ifindex: u32,
    ifname: &str,
    mode: AttachMode,
) -> Result<OwnedFd, ProgramError> {
    let hook = match mode {
        AttachMode::Driver => XdpHook::Driver,
        AttachMode::Skb => XdpHook::Skb,
    };
    let program = program.fd().expect("the program is loaded");
    let deadline = Instant::now() + BUSY_WAIT_MAX;
    loop {
        let error = match bpf::create_xdp_link(program.as_fd(), ifindex, hook) {
            Ok(link) => return Ok(link),
            Err(error) => {
                let error = missing_interface(ifindex).unwrap_or(error);
                ProgramError::new(ifname, Step::Attach, &error)
            }
        };
        if !matches!(error, ProgramError::Busy { .. }) || Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(BUSY_PAUSE);
    }
}

/// ENODEV, if there is no such interface: the kernel answers `BPF_LINK_CREATE`
/// with EINVAL then, as drivers do for their own reasons.
fn missing_interface(ifindex: u32) -> Option<io::Error> {
    let socket = socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    match index_to_name(&socket.ok()?, ifindex) {
        Err(Errno::NODEV) => Some(Errno::NODEV.into()),
        // It exists, or nothing is known: the first error stands.
        _ => None,
    }
}

fn port_key(port: u16, addr: Option<Ipv6Addr>) -> [u8; PORT_KEY_BYTES] {
    let addr = addr.unwrap_or(Ipv6Addr::UNSPECIFIED);
    PortKey::new(Address::from_octets(addr.octets()), port).to_bytes()
}
