//! The kernel's answer to "how would you send to this address?", so that
//! routing policy stays the kernel's: tables, rules, metrics, nexthop groups.

use std::fmt;
use std::io;
use std::net::Ipv6Addr;

use super::netlink::{Message, NetlinkError, NetlinkSocket, Request};

/// Why the datapath cannot send to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoRouteReason {
    /// The peer's address is multicast, unspecified or IPv4-mapped.
    NotUnicast,
    /// A link-local peer whose scope is not our interface: the scope given.
    WrongScope(u32),
    /// The kernel has no route, or one that rejects: its error number.
    Kernel(i32),
    /// The route leaves by another interface: its index.
    OtherInterface(u32),
    /// The peer is this machine itself.
    Local,
    /// The route encapsulates packets (segment routing, MPLS …).
    Encapsulated,
    /// The source address asked for is not one of this machine's usable addresses.
    ForeignSource,
    /// The interface has no address that could be the source.
    NoSource,
    /// The next hop does not answer neighbour solicitations.
    NeighborFailed(Ipv6Addr),
    /// The kernel could not be asked; the log has the reason.
    Unknown,
}

impl fmt::Display for NoRouteReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotUnicast => write!(f, "the address is not a unicast IPv6 address"),
            Self::WrongScope(0) => {
                write!(f, "a link-local address needs its scope: write address%interface")
            }
            Self::WrongScope(scope) => {
                write!(f, "the link-local address is on interface {scope}, not on ours")
            }
            Self::Kernel(errno) => {
                write!(f, "the kernel says: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::OtherInterface(index) => {
                write!(f, "the kernel's route leaves by interface {index}, not by ours")
            }
            Self::Local => write!(f, "the address is this machine's own: use the socket datapath"),
            Self::Encapsulated => {
                write!(f, "the kernel's route encapsulates packets: use the socket datapath")
            }
            Self::ForeignSource => {
                write!(f, "the source address is not a usable address of this machine")
            }
            Self::NoSource => write!(f, "the interface has no usable source address"),
            Self::NeighborFailed(next_hop) => {
                write!(f, "next hop {next_hop} does not answer neighbour solicitations")
            }
            Self::Unknown => write!(f, "the kernel could not be asked (see the log)"),
        }
    }
}

/// The kernel's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RouteAnswer {
    pub(super) oif: u32,
    pub(super) gateway: Option<Ipv6Addr>,
    /// Chosen by route or by source address selection (RFC 6724).
    pub(super) preferred_source: Option<Ipv6Addr>,
    pub(super) kind: u8,
    pub(super) encapsulated: bool,
}

impl RouteAnswer {
    fn parse(message: &Message<'_>) -> Option<Self> {
        if message.kind != libc::RTM_NEWROUTE {
            return None;
        }
        let (header, attributes) = message.split::<12>()?;
        Some(Self {
            oif: attributes.find_u32(libc::RTA_OIF)?,
            gateway: attributes.find_ipv6(libc::RTA_GATEWAY),
            preferred_source: attributes.find_ipv6(libc::RTA_PREFSRC),
            kind: header[7],
            encapsulated: attributes.find(libc::RTA_ENCAP).is_some(),
        })
    }

    /// Whether and through which neighbour a frame can be sent by interface `ifindex`.
    pub(super) fn next_hop(
        &self,
        destination: Ipv6Addr,
        ifindex: u32,
    ) -> Result<Ipv6Addr, NoRouteReason> {
        if self.oif != ifindex {
            Err(match self.kind {
                libc::RTN_LOCAL => NoRouteReason::Local,
                _ => NoRouteReason::OtherInterface(self.oif),
            })
        } else if self.encapsulated {
            Err(NoRouteReason::Encapsulated)
        } else {
            Ok(self.gateway.unwrap_or(destination))
        }
    }
}

/// Asks the kernel for its route (`ip -6 route get DESTINATION from SOURCE oif OIF`).
///
/// # Errors
/// [`NetlinkError::Refused`] with the route's error where there is none or it rejects.
pub(super) fn query(
    socket: &mut NetlinkSocket,
    destination: Ipv6Addr,
    source: Option<Ipv6Addr>,
    oif: Option<u32>,
) -> Result<RouteAnswer, NetlinkError> {
    const NAME: &str = "the route to a peer";
    let mut header = [0; 12];
    header[0] = libc::AF_INET6 as u8;
    header[1] = 128;
    header[2] = if source.is_some() { 128 } else { 0 };
    let mut request = Request::new(NAME, libc::RTM_GETROUTE, &header)
        .attribute(libc::RTA_DST, &destination.octets());
    if let Some(source) = source {
        request = request.attribute(libc::RTA_SRC, &source.octets());
    }
    if let Some(oif) = oif {
        request = request.attribute(libc::RTA_OIF, &oif.to_ne_bytes());
    }
    let mut answer = None;
    socket.request(request, 0, |message| answer = RouteAnswer::parse(message))?;
    answer.ok_or(NetlinkError::Malformed { request: NAME })
}

/// The destinations that a change of the routing table concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    address: u128,
    len: u8,
}

impl Prefix {
    /// Every destination.
    pub(super) const ALL: Self = Self { address: 0, len: 0 };

    /// Reads an `RTM_NEWROUTE` or `RTM_DELROUTE` notification; `None` if it is not about IPv6.
    pub(super) fn parse(message: &Message<'_>) -> Option<Self> {
        let (header, attributes) = message.split::<12>()?;
        if i32::from(header[0]) != libc::AF_INET6 {
            return None;
        }
        let address = attributes.find_ipv6(libc::RTA_DST).unwrap_or(Ipv6Addr::UNSPECIFIED);
        Some(Self { address: address.to_bits(), len: header[1].min(128) })
    }

    pub(super) fn contains(&self, address: Ipv6Addr) -> bool {
        let differing = self.address ^ address.to_bits();
        differing.leading_zeros() >= u32::from(self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        let address = |text: &str| text.parse::<Ipv6Addr>().expect("valid");
        let prefix = |text: &str, len| Prefix { address: address(text).to_bits(), len };
        assert!(Prefix::ALL.contains(address("2001:db8::1")));
        assert!(prefix("fd00::", 64).contains(address("fd00::ffff:1")));
        assert!(!prefix("fd00::", 64).contains(address("fd00:0:0:1::1")));
        assert!(prefix("fd00::1", 128).contains(address("fd00::1")));
        assert!(!prefix("fd00::1", 128).contains(address("fd00::2")));
        assert!(prefix("fd00:8000::", 17).contains(address("fd00:ffff::")));
        assert!(!prefix("fd00:8000::", 17).contains(address("fd00:7fff::")));
    }

    #[test]
    fn only_our_interface_is_a_way() {
        let destination = Ipv6Addr::LOCALHOST;
        let gateway = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        let route = RouteAnswer {
            oif: 2,
            gateway: None,
            preferred_source: None,
            kind: libc::RTN_UNICAST,
            encapsulated: false,
        };
        assert_eq!(route.next_hop(destination, 2), Ok(destination));
        assert_eq!(route.next_hop(destination, 3), Err(NoRouteReason::OtherInterface(2)));
        let local = RouteAnswer { kind: libc::RTN_LOCAL, ..route };
        assert_eq!(local.next_hop(destination, 3), Err(NoRouteReason::Local));
        let via = RouteAnswer { gateway: Some(gateway), ..route };
        assert_eq!(via.next_hop(destination, 2), Ok(gateway));
        let tunnel = RouteAnswer { encapsulated: true, ..via };
        assert_eq!(tunnel.next_hop(destination, 2), Err(NoRouteReason::Encapsulated));
    }

    #[test]
    fn the_kernel_answers_for_loopback() {
        let mut socket = NetlinkSocket::for_requests().expect("needs no privilege");
        let route = query(&mut socket, Ipv6Addr::LOCALHOST, None, None).expect("lo is up");
        assert_eq!((route.oif, route.kind), (1, libc::RTN_LOCAL));
        assert_eq!(route.preferred_source, Some(Ipv6Addr::LOCALHOST));
    }
}
