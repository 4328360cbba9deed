//! The kernel UDP socket beneath the socket datapaths: set up once, IPv6 only.
//!
//! Invariants: an IPv4-mapped peer can neither send to it nor be sent to; the
//! kernel never fragments what leaves (`IPV6_PMTUDISC_PROBE`, `IPV6_DONTFRAG`);
//! every message arrives with its destination address, its traffic class and
//! the socket's overrun count; GRO hands over several datagrams at once.

mod mtu;
mod receive;
mod send;

pub(crate) use mtu::MtuProbe;
pub(crate) use receive::{MessageCursor, MessageInfo, OverrunCounter, UNCOPIED_BYTES_MIN};
pub(crate) use send::{Batcher, PlainOutcome, count_drop, transmit_verdict_for};

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{self, AddressFamily, SocketAddrAny, SocketFlags, SocketType};

use crate::sys::udp::{SO_RXQ_OVFL, option, set_option};

/// Largest UDP payload over IPv6 without jumbograms, in bytes (RFC 8200 §3: 65535 less the UDP header).
pub const UDP_PAYLOAD_BYTES_MAX: usize = 65_527;

/// Everything that opening a socket datapath needs.
///
/// ```
/// # use std::net::{Ipv6Addr, SocketAddrV6};
/// use stoq::datapath::udp_socket::SocketConfig;
/// let config = SocketConfig::new(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0));
/// assert!(!config.reuse_port);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SocketConfig {
    /// Address to bind to; port 0 lets the kernel choose.
    pub local: SocketAddrV6,
    /// Share the port with the sockets of other shards (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// Kernel receive buffer wanted, in bytes of the kernel's accounting.
    pub receive_buffer_bytes: usize,
    /// Kernel send buffer wanted, in bytes of the kernel's accounting. It is the
    /// back-pressure of a slow link: more is not better.
    pub send_buffer_bytes: usize,
    /// Receive buffers of 64 KiB each, 1 to 1024.
    pub rx_buffers: usize,
    /// Send slots of 64 KiB each (one datagram or one GSO batch), 1 to 1024.
    pub tx_batches: usize,
    /// Use UDP segmentation offload (kernel 4.18) where the path allows it.
    pub gso: bool,
    /// Use UDP receive coalescing (kernel 5.0).
    pub gro: bool,
}

/// Limit of [`SocketConfig::rx_buffers`] and [`SocketConfig::tx_batches`].
const BUFFERS_MAX: usize = 1024;

impl SocketConfig {
    /// The defaults for a shard bound to `local`.
    #[must_use]
    pub const fn new(local: SocketAddrV6) -> Self {
        Self {
            local,
            reuse_port: false,
            receive_buffer_bytes: 8 * 1024 * 1024,
            send_buffer_bytes: 2 * 1024 * 1024,
            rx_buffers: 32,
            tx_batches: 128,
            gso: true,
            gro: true,
        }
    }
}

/// Why a socket datapath could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The kernel has IPv6 compiled out or disabled.
    #[error(
        "cannot open a UDP socket for {local}: this kernel has no IPv6; enable it (remove \
         ipv6.disable=1 from the kernel command line, `sysctl -w net.ipv6.conf.all.disable_ipv6=0`)"
    )]
    NoIpv6 {
        /// Address that was asked for.
        local: SocketAddrV6,
    },
    /// An IPv4-mapped address.
    #[error("{address} is an IPv4-mapped address; STOQ speaks IPv6 only: use an IPv6 address")]
    NotIpv6 {
        /// The offending address.
        address: Ipv6Addr,
    },
    /// The address is on none of this machine's interfaces.
    #[error(
        "cannot bind {local}: the address belongs to no interface of this machine (or is still \
         tentative); see `ip -6 address`, or bind [::]"
    )]
    AddressNotLocal {
        /// Address that was asked for.
        local: SocketAddrV6,
    },
    /// Another socket has the port.
    #[error(
        "cannot bind {local}: UDP port {} is in use; see `ss -lunp sport = :{}`, choose another \
         port, or stop its owner", .local.port(), .local.port()
    )]
    PortInUse {
        /// Address that was asked for.
        local: SocketAddrV6,
    },
    /// The port is reserved for privileged processes.
    #[error(
        "cannot bind {local}: port {} is privileged; use a port from \
         net.ipv4.ip_unprivileged_port_start upwards, or grant CAP_NET_BIND_SERVICE", .local.port()
    )]
    PrivilegedPort {
        /// Address that was asked for.
        local: SocketAddrV6,
    },
    /// A limit in the configuration is out of range.
    #[error("{name} = {value} is out of range: allowed are {min} to {max}")]
    Limit {
        /// Field of [`SocketConfig`].
        name: &'static str,
        /// Its value.
        value: usize,
        /// Smallest allowed.
        min: usize,
        /// Largest allowed.
        max: usize,
    },
    /// io_uring cannot be used here.
    #[error("io_uring is unavailable: {0}; use the socket datapath, or Auto")]
    IoUring(#[from] super::io_uring::Unavailable),
    /// Another system call failed.
    #[error("{call} failed for the UDP socket {local}: {source}; {advice}")]
    SystemCall {
        /// The call, with its option.
        call: &'static str,
        /// Address that was asked for.
        local: SocketAddrV6,
        /// What to do next.
        advice: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A kernel limit that kept a socket buffer smaller than configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferShortfall {
    /// The limit that was met, as a `sysctl` name.
    pub sysctl: &'static str,
    /// Buffer size wanted, in bytes.
    pub wanted_bytes: usize,
    /// Buffer size granted, in bytes.
    pub granted_bytes: usize,
}

impl std::fmt::Display for BufferShortfall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the socket buffer is {} bytes instead of {}: bursts will be lost; run \
             `sysctl -w {}={}`, or grant CAP_NET_ADMIN",
            self.granted_bytes, self.wanted_bytes, self.sysctl, self.wanted_bytes
        )
    }
}

/// A bound UDP socket.
#[derive(Debug)]
pub(crate) struct UdpSocket {
    fd: OwnedFd,
    local: SocketAddrV6,
    gro: bool,
    gso: bool,
    shortfalls: Vec<BufferShortfall>,
}

impl UdpSocket {
    /// Opens and binds a non-blocking socket as `config` says.
    pub(crate) fn open(config: &SocketConfig) -> Result<Self, SocketError> {
        Self::open_with(config, SocketFlags::NONBLOCK)
    }

    /// The same, blocking: io_uring fails an operation on a non-blocking file
    /// with `EAGAIN` instead of waiting for it in the background.
    pub(crate) fn open_blocking(config: &SocketConfig) -> Result<Self, SocketError> {
        Self::open_with(config, SocketFlags::empty())
    }

    fn open_with(config: &SocketConfig, flags: SocketFlags) -> Result<Self, SocketError> {
        config.validate()?;
        let local = config.local;
        let fd = net::socket_with(
            AddressFamily::INET6,
            SocketType::DGRAM,
            flags | SocketFlags::CLOEXEC,
            Some(net::ipproto::UDP),
        )
        .map_err(|errno| match errno {
            rustix::io::Errno::AFNOSUPPORT => SocketError::NoIpv6 { local },
            _ => system_call("socket", local, "raise the limit of open files (ulimit -n)")(errno),
        })?;
        configure(fd.as_fd(), config)?;
        let gro = config.gro && set_option(fd.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1).is_ok();
        // Reading the option tells whether the kernel knows segmentation offload.
        let gso = config.gso && option(fd.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT).is_ok();
        let shortfalls = grow_buffers(fd.as_fd(), config)?;
        for shortfall in &shortfalls {
            tracing::warn!(%local, "{shortfall}");
        }
        net::bind(&fd, &local).map_err(|errno| bind_error(errno, local))?;
        let bound = net::getsockname(&fd).map_err(system_call(
            "getsockname",
            local,
            "report this as a bug",
        ))?;
        let local = bound_address(bound, local)?;
        Ok(Self { fd, local, gro, gso, shortfalls })
    }

    /// The bound address, with its port.
    pub(crate) const fn local(&self) -> SocketAddrV6 {
        self.local
    }

    /// Whether the kernel coalesces what arrives.
    pub(crate) const fn gro(&self) -> bool {
        self.gro
    }

    /// Whether the kernel knows segmentation offload (the path may still refuse it).
    pub(crate) const fn gso(&self) -> bool {
        self.gso
    }

    /// Buffers that came out smaller than configured.
    pub(crate) fn shortfalls(&self) -> &[BufferShortfall] {
        &self.shortfalls
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl SocketConfig {
    fn validate(&self) -> Result<(), SocketError> {
        if self.local.ip().to_ipv4_mapped().is_some() {
            return Err(SocketError::NotIpv6 { address: *self.local.ip() });
        }
        let limits = [
            ("rx_buffers", self.rx_buffers, 1, BUFFERS_MAX),
            ("tx_batches", self.tx_batches, 1, BUFFERS_MAX),
            ("receive_buffer_bytes", self.receive_buffer_bytes, 64 * 1024, 1 << 30),
            ("send_buffer_bytes", self.send_buffer_bytes, 64 * 1024, 1 << 30),
        ];
        for (name, value, min, max) in limits {
            if !(min..=max).contains(&value) {
                return Err(SocketError::Limit { name, value, min, max });
            }
        }
        Ok(())
    }
}

/// How the mode string of [`Capabilities`](super::Capabilities) names the offloads in use.
pub(crate) const fn mode_name(gso: bool, gro: bool) -> &'static str {
    match (gso, gro) {
        (true, true) => "gso+gro",
        (true, false) => "gso",
        (false, true) => "gro",
        (false, false) => "plain",
    }
}

fn configure(fd: BorrowedFd<'_>, config: &SocketConfig) -> Result<(), SocketError> {
    const KERNEL: &str = "this kernel is too old or restricted for STOQ's sockets";
    let (socket, ipv6) = (libc::SOL_SOCKET, libc::IPPROTO_IPV6);
    let options = [
        (ipv6, libc::IPV6_V6ONLY, 1, "setsockopt(IPV6_V6ONLY)"),
        (ipv6, libc::IPV6_RECVTCLASS, 1, "setsockopt(IPV6_RECVTCLASS)"),
        (ipv6, libc::IPV6_RECVPKTINFO, 1, "setsockopt(IPV6_RECVPKTINFO)"),
        (ipv6, libc::IPV6_DONTFRAG, 1, "setsockopt(IPV6_DONTFRAG)"),
        (ipv6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE, "setsockopt(IPV6_MTU_DISCOVER)"),
        (socket, SO_RXQ_OVFL, 1, "setsockopt(SO_RXQ_OVFL)"),
        (socket, libc::SO_REUSEPORT, i32::from(config.reuse_port), "setsockopt(SO_REUSEPORT)"),
    ];
    for (level, name, value, call) in options {
        set_option(fd, level, name, value).map_err(system_call(call, config.local, KERNEL))?;
    }
    Ok(())
}

fn grow_buffers(
    fd: BorrowedFd<'_>,
    config: &SocketConfig,
) -> Result<Vec<BufferShortfall>, SocketError> {
    let buffers = [
        (
            libc::SO_RCVBUF,
            libc::SO_RCVBUFFORCE,
            config.receive_buffer_bytes,
            "net.core.rmem_max",
            "SO_RCVBUF",
        ),
        (
            libc::SO_SNDBUF,
            libc::SO_SNDBUFFORCE,
            config.send_buffer_bytes,
            "net.core.wmem_max",
            "SO_SNDBUF",
        ),
    ];
    let mut shortfalls = Vec::new();
    for (name, force_name, wanted_bytes, sysctl, call) in buffers {
        let advice = "this kernel is too old or restricted for STOQ's sockets";
        let failed = system_call(call, config.local, advice);
        let wanted = i32::try_from(wanted_bytes).expect("validated: at most 1 GiB");
        // The forced form passes the sysctl's limit but needs CAP_NET_ADMIN.
        if set_option(fd, libc::SOL_SOCKET, force_name, wanted).is_err() {
            set_option(fd, libc::SOL_SOCKET, name, wanted).map_err(&failed)?;
        }
        // The kernel doubles what it is given and reports the double (socket(7)).
        let granted = option(fd, libc::SOL_SOCKET, name).map_err(&failed)?;
        let granted_bytes = usize::try_from(granted).unwrap_or_default() / 2;
        if granted_bytes < wanted_bytes {
            shortfalls.push(BufferShortfall { sysctl, wanted_bytes, granted_bytes });
        }
    }
    Ok(shortfalls)
}

fn bind_error(errno: rustix::io::Errno, local: SocketAddrV6) -> SocketError {
    use rustix::io::Errno;
    match errno {
        Errno::ADDRINUSE => SocketError::PortInUse { local },
        Errno::ADDRNOTAVAIL => SocketError::AddressNotLocal { local },
        Errno::ACCESS | Errno::PERM if local.port() != 0 && local.port() < 1024 => {
            SocketError::PrivilegedPort { local }
        }
        Errno::INVAL if local.ip().is_unicast_link_local() && local.scope_id() == 0 => {
            let advice = "a link-local address needs its interface: fe80::1%eth0";
            system_call("bind", local, advice)(errno)
        }
        _ => system_call("bind", local, "check the address with `ip -6 address`")(errno),
    }
}

fn bound_address(bound: SocketAddrAny, local: SocketAddrV6) -> Result<SocketAddrV6, SocketError> {
    SocketAddrV6::try_from(bound).map_err(|errno| {
        system_call("getsockname", local, "the kernel answered with another address family")(errno)
    })
}

fn system_call<E: Into<io::Error>>(
    call: &'static str,
    local: SocketAddrV6,
    advice: &'static str,
) -> impl Fn(E) -> SocketError {
    move |error| SocketError::SystemCall { call, local, advice, source: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(ip: Ipv6Addr, port: u16) -> SocketConfig {
        SocketConfig::new(SocketAddrV6::new(ip, port, 0, 0))
    }

    #[test]
    fn port_zero_gets_a_port() {
        let socket = UdpSocket::open(&config(Ipv6Addr::LOCALHOST, 0)).expect("::1 can be bound");
        assert_ne!(socket.local().port(), 0);
        assert!(socket.gro() && socket.gso());
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let mapped = "::ffff:127.0.0.1".parse().expect("an address");
        let error = UdpSocket::open(&config(mapped, 0)).expect_err("IPv4-mapped");
        assert!(matches!(error, SocketError::NotIpv6 { .. }), "{error}");

        let first = UdpSocket::open(&config(Ipv6Addr::LOCALHOST, 0)).expect("::1 can be bound");
        let error = UdpSocket::open(&config(Ipv6Addr::LOCALHOST, first.local().port()))
            .expect_err("the port is taken");
        assert!(matches!(error, SocketError::PortInUse { .. }), "{error}");
        assert!(error.to_string().contains(&first.local().port().to_string()));

        let foreign = "2001:db8::1".parse().expect("an address");
        let error = UdpSocket::open(&config(foreign, 0)).expect_err("not ours");
        assert!(matches!(error, SocketError::AddressNotLocal { .. }), "{error}");
    }

    #[test]
    fn limits_are_checked() {
        let mut config = config(Ipv6Addr::LOCALHOST, 0);
        config.rx_buffers = 0;
        let error = UdpSocket::open(&config).expect_err("no buffer");
        assert!(matches!(error, SocketError::Limit { name: "rx_buffers", value: 0, .. }));
        config.rx_buffers = BUFFERS_MAX + 1;
        assert!(UdpSocket::open(&config).is_err());
    }

    #[test]
    fn shards_share_a_port() {
        let mut config = config(Ipv6Addr::LOCALHOST, 0);
        config.reuse_port = true;
        let first = UdpSocket::open(&config).expect("::1 can be bound");
        config.local = first.local();
        let second = UdpSocket::open(&config).expect("the port is shared");
        assert_eq!(first.local(), second.local());
    }

    #[test]
    fn a_small_buffer_is_reported_with_its_sysctl() {
        let shortfall = BufferShortfall {
            sysctl: "net.core.rmem_max",
            wanted_bytes: 8_388_608,
            granted_bytes: 212_992,
        };
        assert!(shortfall.to_string().contains("sysctl -w net.core.rmem_max=8388608"));
    }
}
