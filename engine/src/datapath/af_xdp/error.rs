//! Why an AF_XDP datapath could not be opened: what failed, on what, and what to do.

use std::io;
use std::net::Ipv6Addr;

use super::limits::LimitsError;
use super::neighbors::NetlinkError;
use super::program::ProgramError;
use crate::datapath::udp_socket::SocketError;

/// A step of opening an AF_XDP datapath failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AfXdpError {
    /// A limit is invalid.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// The interface does not exist in this network namespace.
    #[error("interface {interface} does not exist in this network namespace; it has: {existing}")]
    NoInterface {
        /// The name asked for.
        interface: String,
        /// The names that exist, comma-separated.
        existing: String,
    },
    /// The interface has no IPv6 address.
    #[error(
        "interface {interface} has no IPv6 address; add one: ip -6 addr add <address>/64 dev {interface}"
    )]
    NoAddress {
        /// Interface.
        interface: String,
    },
    /// The local address asked for is not on the interface.
    #[error("address {address} is not on interface {interface}; it has: {existing}")]
    ForeignAddress {
        /// Interface.
        interface: String,
        /// The address asked for.
        address: Ipv6Addr,
        /// The addresses on the interface, comma-separated.
        existing: String,
    },
    /// An IPv4 address in IPv6 clothes.
    #[error("address {0} is IPv4-mapped: STOQ speaks IPv6 only, use an IPv6 address")]
    Ipv4(Ipv6Addr),
    /// No queue was asked for, or one twice.
    #[error("queues {queues:?} of interface {interface}: name each queue once, and at least one")]
    Queues {
        /// Interface.
        interface: String,
        /// What was asked for.
        queues: Vec<u32>,
    },
    /// The interface has fewer queues.
    #[error(
        "queue {queue} of interface {interface} does not exist: it has {available}; see: ethtool -l {interface}"
    )]
    NoQueue {
        /// Interface.
        interface: String,
        /// The queue asked for.
        queue: u32,
        /// Number of queues.
        available: u32,
    },
    /// Packets of that MTU do not fit a frame, and the kernel cannot spread them.
    #[error(
        "MTU {mtu} of interface {interface} needs packets over several frames of {frame_size_bytes} bytes, which bind(XDP_USE_SG) refused ({source}): Linux ≥ 6.6 and a driver with multi-buffer support are needed, or: ip link set {interface} mtu {mtu_max}"
    )]
    MtuTooLarge {
        /// Interface.
        interface: String,
        /// Its MTU in bytes.
        mtu: u32,
        /// Frame size in bytes.
        frame_size_bytes: u32,
        /// Largest MTU that fits one frame, in bytes.
        mtu_max: u32,
        /// What the system call answered.
        source: io::Error,
    },
    /// The UDP port is taken.
    #[error(
        "UDP port {port} is in use by another socket; choose another port, or see who holds it: ss -ulpn 'sport = :{port}'"
    )]
    PortInUse {
        /// The port.
        port: u16,
    },
    /// The queue belongs to another socket.
    #[error(
        "queue {queue} of interface {interface} is already bound by another AF_XDP socket, of this or another process (bind: EBUSY); close that, or choose another queue"
    )]
    QueueInUse {
        /// Interface.
        interface: String,
        /// Queue.
        queue: u32,
    },
    /// Zero-copy was required and is not there.
    #[error(
        "zero-copy on queue {queue} of interface {interface} was required, but bind(XDP_ZEROCOPY) answered: {source}; the driver or its settings do not allow it: use ZeroCopy::Prefer or ZeroCopy::Never, or a driver with AF_XDP zero-copy"
    )]
    NoZeroCopy {
        /// Interface.
        interface: String,
        /// Queue.
        queue: u32,
        /// What the system call answered.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{call} for queue {queue} of interface {interface}: {source}; {advice}")]
    Socket {
        /// The system call, with its option.
        call: &'static str,
        /// Interface.
        interface: String,
        /// Queue.
        queue: u32,
        /// What it answered.
        source: io::Error,
        /// What to do.
        advice: String,
    },
    /// The kernel UDP socket that holds the port could not be set up.
    #[error("slow-path UDP socket: {source}")]
    SlowPath {
        /// The reason.
        source: SocketError,
    },
    /// The interface is down, or has no carrier.
    #[error("interface {interface} is down: ip link set {interface} up, and check its other end")]
    LinkDown {
        /// Interface.
        interface: String,
    },
    /// The XDP program could not be attached or configured.
    #[error("XDP program on interface {interface}: {source}")]
    Program {
        /// Interface.
        interface: String,
        /// The reason.
        source: ProgramError,
    },
    /// The kernel's routes and neighbours could not be read.
    #[error("routes and neighbours of interface {interface}: {source}")]
    Netlink {
        /// Interface.
        interface: String,
        /// The reason.
        source: NetlinkError,
    },
}

/// What to do about an error of an AF_XDP system call.
pub(super) fn advice(error: &io::Error, interface: &str, mtu: u32, frames: u32) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF are needed: run as root or grant them: setcap cap_net_admin,cap_net_raw,cap_bpf+ep /path/to/the/program".into()
        }
        Some(libc::ENOMEM | libc::ENOBUFS) => format!(
            "{frames} frames do not fit the memory that may be locked: raise `ulimit -l`, grant CAP_IPC_LOCK, or use fewer frames"
        ),
        Some(libc::EOPNOTSUPP) => {
            format!("the driver of {interface} does not support this mode")
        }
        Some(libc::EAFNOSUPPORT) => "this kernel was built without CONFIG_XDP_SOCKETS".into(),
        Some(libc::ENODEV | libc::ENXIO) => format!("interface {interface} is gone"),
        Some(libc::ENETDOWN) => {
            format!("interface {interface} is down: ip link set {interface} up")
        }
        Some(libc::EINVAL) => format!(
            "the kernel refused the combination: check that the queue exists (ethtool -l {interface}), MTU {mtu}, {frames} frames"
        ),
        _ => "see the system call's manual page and dmesg".into(),
    }
}
