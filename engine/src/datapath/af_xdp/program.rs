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
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, MapData, MapError, PerCpuArray, XskMap};
use aya::programs::links::FdLink;
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfError, EbpfLoader};
use stoq_ebpf::{
    Address, Counter, PORT_KEY_BYTES, PortKey, PortValue, QUEUES_MAX, XDP_OBJECT, maps,
};
use tracing::{info, warn};

use self::error::errno;
pub use self::error::{ProgramError, Step};

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
    // Dropped first, and with it the program leaves the interface.
    _link: FdLink,
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
        let (link, mode) = match (attach_link(program, ifindex, ifname, mode), mode) {
            (Err(ProgramError::NoDriverSupport { source, .. }), None) if allow_skb => {
                warn!(interface = ifname, %source, "no XDP in the driver: attaching in SKB mode");
                let mode = AttachMode::Skb;
                (attach_link(program, ifindex, ifname, Some(mode))?, mode)
            }
            (link, mode) => (link?, mode.unwrap_or(AttachMode::Driver)),
        };
        info!(interface = ifname, mode = mode.name(), "XDP program attached");
        // The program's own descriptor goes with `ebpf`: the link keeps it loaded.
        Ok(Self { _link: link, ports, sockets, counters, mode, interface: ifname.to_owned() })
    }

    /// How the program is attached.
    #[must_use]
    pub fn mode(&self) -> AttachMode {
        self.mode
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
    program: &mut Xdp,
    ifindex: u32,
    ifname: &str,
    mode: Option<AttachMode>,
) -> Result<FdLink, ProgramError> {
    let mode = match mode {
        None | Some(AttachMode::Driver) => XdpMode::Driver,
        Some(AttachMode::Skb) => XdpMode::Skb,
    };
    let deadline = Instant::now() + BUSY_WAIT_MAX;
    let link_id = loop {
        match program.attach_to_if_index(ifindex, mode) {
            Ok(link_id) => break link_id,
            Err(error) => match ProgramError::new(ifname, Step::Attach, &error) {
                ProgramError::Busy { .. } if Instant::now() < deadline => {
                    std::thread::sleep(BUSY_PAUSE);
                }
                error => return Err(error),
            },
        }
    };
    let link = program.take_link(link_id).expect("the link that was just attached");
    // aya falls back to netlink where the kernel refuses a link (EINVAL). Such
    // an attachment would outlive a killed process: give it back.
    FdLink::try_from(link).map_err(|_| {
        let source = io::Error::from_raw_os_error(libc::EINVAL);
        ProgramError::Refused { interface: ifname.to_owned(), source }
    })
}

fn port_key(port: u16, addr: Option<Ipv6Addr>) -> [u8; PORT_KEY_BYTES] {
    let addr = addr.unwrap_or(Ipv6Addr::UNSPECIFIED);
    PortKey::new(Address::from_octets(addr.octets()), port).to_bytes()
}
