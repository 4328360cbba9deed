//! The interfaces of this network namespace, and which of them an AF_XDP
//! datapath can be attached to.

use std::net::{Ipv6Addr, SocketAddrV6};

use super::netlink::{Attributes, Message, NetlinkError, NetlinkSocket, Request};
use super::routes;
use crate::wire::MacAddr;

/// `RTEXT_FILTER_SKIP_STATS`: an answer without counters.
const SKIP_STATISTICS: u32 = 1 << 3;
/// Hardware types (`if_arp.h`) whose frames begin with an Ethernet header.
const HARDWARE_TYPES_ETHERNET: [u16; 2] = [libc::ARPHRD_ETHER, libc::ARPHRD_LOOPBACK];

/// What the kernel says about an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceInfo {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    /// Whether it is set up and has carrier.
    pub up: bool,
    /// Its link-layer address; zeros on loopback.
    pub mac: MacAddr,
    /// What kind it is, as in `ip -d link`: `"veth"`, `"vlan"`, `"bond"` …;
    /// `"loopback"`, and `"physical"` for a device driver's own.
    pub kind: String,
    /// Receive queues that it was made with (not all need to be active).
    pub rx_queues: u32,
    /// Transmit queues that it was made with (not all need to be active).
    pub tx_queues: u32,
    /// Index of the bond, bridge, team or VRF that it is a member of.
    pub master: Option<u32>,
    /// Index of the interface beneath it (VLAN, macvlan) or at its other end
    /// (veth; then it may be an index of another namespace).
    pub link: Option<u32>,
    /// Whether its frames begin with an Ethernet header.
    pub ethernet: bool,
}

impl InterfaceInfo {
    /// Whether an AF_XDP datapath can own packets of this interface, `all` being
    /// every interface of the namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Unsuitable`] with the reason and the interface to use instead.
    pub fn check_attachable(&self, all: &[Self]) -> Result<(), NetlinkError> {
        let name_of = |index: Option<u32>| {
            all.iter().find(|other| Some(other.index) == index).map_or("?", |other| &other.name)
        };
        let reason = if !self.ethernet {
            format!(
                "it is of kind {} and carries no Ethernet frames; use the socket datapath",
                self.kind
            )
        } else if let "bond" | "team" | "bridge" | "openvswitch" = self.kind.as_str() {
            self.reason_against_master(all)
        } else if let "vlan" | "macvlan" | "macvtap" | "ipvlan" | "ipvtap" = self.kind.as_str() {
            format!(
                "it is a {} sub-interface and has no device queues of its own; attach to the \
                 member interface {} instead (for its untagged traffic), or use the socket datapath",
                self.kind,
                name_of(self.link)
            )
        } else {
            let master = all.iter().find(|other| Some(other.index) == self.master);
            match master.map(|master| master.kind.as_str()) {
                // A VRF only chooses the routing table, which the kernel answers from.
                None | Some("vrf") => return Ok(()),
                Some(kind) => format!(
                    "it is a member of the {kind} {}, which owns its addresses and routes; take \
                     it out of the {kind}, or use the socket datapath",
                    name_of(self.master)
                ),
            }
        };
        Err(NetlinkError::Unsuitable { name: self.name.clone(), reason })
    }

    fn reason_against_master(&self, all: &[Self]) -> String {
        let members: Vec<_> = all
            .iter()
            .filter(|other| other.master == Some(self.index))
            .map(|member| member.name.as_str())
            .collect();
        let advice = if members.is_empty() {
            "it has no members".to_owned()
        } else {
            format!(
                "take a member out of it and attach to that member interface instead ({})",
                members.join(", ")
            )
        };
        format!(
            "it is a {} and has no device queues of its own; {advice}, or use the socket datapath",
            self.kind
        )
    }

    pub(super) fn parse(message: &Message<'_>) -> Option<Self> {
        if message.kind != libc::RTM_NEWLINK {
            return None;
        }
        let (header, attributes) = message.split::<16>()?;
        let header = LinkHeader::parse(header)?;
        let info = attributes.find(libc::IFLA_LINKINFO).map(Attributes::nested);
        let kind = match info.and_then(|info| info.find_text(libc::IFLA_INFO_KIND)) {
            Some(kind) => kind,
            None if header.hardware_type == libc::ARPHRD_LOOPBACK => "loopback".to_owned(),
            None => "physical".to_owned(),
        };
        Some(Self {
            index: header.index,
            name: attributes.find_text(libc::IFLA_IFNAME)?,
            mtu: attributes.find_u32(libc::IFLA_MTU)?,
            up: header.up,
            mac: mac(attributes.find(libc::IFLA_ADDRESS)).unwrap_or_default(),
            kind,
            rx_queues: attributes.find_u32(libc::IFLA_NUM_RX_QUEUES).unwrap_or(1),
            tx_queues: attributes.find_u32(libc::IFLA_NUM_TX_QUEUES).unwrap_or(1),
            master: attributes.find_u32(libc::IFLA_MASTER).filter(|&index| index != 0),
            link: attributes.find_u32(libc::IFLA_LINK).filter(|&index| index != 0),
            ethernet: HARDWARE_TYPES_ETHERNET.contains(&header.hardware_type),
        })
    }
}

/// What a link message says about its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkHeader {
    pub(super) index: u32,
    pub(super) up: bool,
    hardware_type: u16,
}

impl LinkHeader {
    /// Reads an `ifinfomsg`, or `None` if it is about a bridge's port (`AF_BRIDGE`)
    /// and not about the interface as such.
    pub(super) fn parse(header: &[u8; 16]) -> Option<Self> {
        let [family, _, t0, t1, i0, i1, i2, i3, f0, f1, f2, f3, ..] = *header;
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        let up = (libc::IFF_UP | libc::IFF_LOWER_UP) as u32;
        (i32::from(family) == libc::AF_UNSPEC).then_some(Self {
            index: u32::from_ne_bytes([i0, i1, i2, i3]),
            up: flags & up == up,
            hardware_type: u16::from_ne_bytes([t0, t1]),
        })
    }
}

pub(super) fn mac(value: Option<&[u8]>) -> Option<MacAddr> {
    value?.try_into().ok()
}

/// All interfaces of the calling thread's network namespace.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn interfaces() -> Result<Vec<InterfaceInfo>, NetlinkError> {
    dump_links(&mut NetlinkSocket::for_requests()?)
}

pub(super) fn dump_links(socket: &mut NetlinkSocket) -> Result<Vec<InterfaceInfo>, NetlinkError> {
    let request = Request::new("the list of interfaces", libc::RTM_GETLINK, &[0; 16])
        .attribute(libc::IFLA_EXT_MASK, &SKIP_STATISTICS.to_ne_bytes());
    socket.dump(request, InterfaceInfo::parse)
}

/// The interface with this index, or `None` if it does not exist.
///
/// # Errors
/// If the kernel cannot be asked.
pub(super) fn link(
    socket: &mut NetlinkSocket,
    ifindex: u32,
) -> Result<Option<InterfaceInfo>, NetlinkError> {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    let request = Request::new("the interface", libc::RTM_GETLINK, &header)
        .attribute(libc::IFLA_EXT_MASK, &SKIP_STATISTICS.to_ne_bytes());
    let mut found = None;
    match socket.request(request, 0, |message| found = InterfaceInfo::parse(message)) {
        Ok(()) => Ok(found),
        Err(error) if error.refusal() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The interface with this name.
///
/// # Errors
/// [`NetlinkError::NoSuchInterface`] with the names that exist, or that the kernel cannot be asked.
pub fn interface_by_name(name: &str) -> Result<InterfaceInfo, NetlinkError> {
    let all = interfaces()?;
    if let Some(found) = all.iter().find(|interface| interface.name == name) {
        return Ok(found.clone());
    }
    let names: Vec<_> = all.iter().map(|interface| interface.name.as_str()).collect();
    Err(NetlinkError::NoSuchInterface { name: name.to_owned(), existing: names.join(", ") })
}

/// The interface that the kernel would send by to `remote`: for a link-local
/// address the one that its scope names, loopback for an address of our own.
///
/// # Errors
/// [`NetlinkError::NoRoute`], or that the kernel cannot be asked.
pub fn interface_for(remote: &SocketAddrV6) -> Result<InterfaceInfo, NetlinkError> {
    let mut socket = NetlinkSocket::for_requests()?;
    let scope = Some(remote.scope_id()).filter(|&scope| scope != 0);
    let oif = scope.filter(|_| remote.ip().is_unicast_link_local());
    let route =
        routes::query(&mut socket, *remote.ip(), None, oif).map_err(|error| match error {
            NetlinkError::Refused { source, .. } => {
                NetlinkError::NoRoute { remote: *remote.ip(), source }
            }
            other => other,
        })?;
    link(&mut socket, route.oif)?
        .ok_or_else(|| NetlinkError::Gone { name: "of the route".to_owned(), ifindex: route.oif })
}

/// An IPv6 address of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LocalAddress {
    pub(super) ifindex: u32,
    pub(super) address: Ipv6Addr,
    flags: u32,
}

impl LocalAddress {
    /// Whether duplicate address detection lets it be used (RFC 4862 §5.4; an
    /// optimistic address may be used before that ends, RFC 4429).
    pub(super) fn is_usable(&self) -> bool {
        let tentative = self.flags & libc::IFA_F_TENTATIVE != 0;
        let optimistic = self.flags & libc::IFA_F_OPTIMISTIC != 0;
        self.flags & libc::IFA_F_DADFAILED == 0 && (!tentative || optimistic)
    }

    /// Sorts the addresses to begin a connection from first: those still
    /// preferred (RFC 4862 §5.5.4), global before link-local.
    pub(super) fn rank(&self) -> (bool, bool) {
        (self.flags & libc::IFA_F_DEPRECATED != 0, self.address.is_unicast_link_local())
    }

    /// Reads an `RTM_NEWADDR` or `RTM_DELADDR`.
    pub(super) fn parse(message: &Message<'_>) -> Option<Self> {
        const IFA_FLAGS: u16 = 8;
        let (header, attributes) = message.split::<8>()?;
        let [family, _, flags, _, i0, i1, i2, i3] = *header;
        if i32::from(family) != libc::AF_INET6 {
            return None;
        }
        // On a link with a configured peer address, IFA_ADDRESS is the peer's.
        let address = attributes
            .find_ipv6(libc::IFA_LOCAL)
            .or_else(|| attributes.find_ipv6(libc::IFA_ADDRESS))?;
        Some(Self {
            ifindex: u32::from_ne_bytes([i0, i1, i2, i3]),
            address,
            flags: attributes.find_u32(IFA_FLAGS).unwrap_or(u32::from(flags)),
        })
    }
}

/// All IPv6 addresses of the namespace, whatever their state.
pub(super) fn dump_addresses(
    socket: &mut NetlinkSocket,
) -> Result<Vec<LocalAddress>, NetlinkError> {
    let mut header = [0; 8];
    header[0] = libc::AF_INET6 as u8;
    let request = Request::new("the list of IPv6 addresses", libc::RTM_GETADDR, &header);
    socket.dump(request, |message| {
        (message.kind == libc::RTM_NEWADDR).then(|| LocalAddress::parse(message)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, name: &str, kind: &str) -> InterfaceInfo {
        InterfaceInfo {
            index,
            name: name.to_owned(),
            mtu: 1500,
            up: true,
            mac: [2; 6],
            kind: kind.to_owned(),
            rx_queues: 1,
            tx_queues: 1,
            master: None,
            link: None,
            ethernet: true,
        }
    }

    fn refusal(info: &InterfaceInfo, all: &[InterfaceInfo]) -> String {
        info.check_attachable(all).expect_err("unsuitable").to_string()
    }

    #[test]
    fn what_can_be_attached_to() {
        let vrf = interface(9, "blue", "vrf");
        let in_vrf = InterfaceInfo { master: Some(9), ..interface(4, "eth0", "physical") };
        let all = [vrf, in_vrf.clone()];
        for info in [interface(2, "veth0", "veth"), interface(1, "lo", "loopback"), in_vrf] {
            assert!(info.check_attachable(&all).is_ok(), "{}", info.name);
        }
    }

    #[test]
    fn refusals_name_what_to_use_instead() {
        let eth0 = InterfaceInfo { master: Some(5), ..interface(2, "eth0", "physical") };
        let bond0 = interface(5, "bond0", "bond");
        let vlan = InterfaceInfo { link: Some(3), ..interface(6, "eth1.7", "vlan") };
        let eth1 = interface(3, "eth1", "physical");
        let tun = InterfaceInfo { ethernet: false, ..interface(7, "tun0", "tun") };
        let all = [eth0.clone(), bond0.clone(), vlan.clone(), eth1, tun.clone()];
        assert!(refusal(&eth0, &all).contains("member of the bond bond0"));
        assert!(refusal(&bond0, &all).contains("member interface instead (eth0)"));
        assert!(refusal(&vlan, &all).contains("member interface eth1 instead"));
        assert!(refusal(&tun, &all).contains("no Ethernet frames"));
        assert!(refusal(&interface(8, "br0", "bridge"), &all).contains("it has no members"));
    }

    #[test]
    fn loopback_is_there() {
        let lo = interface_by_name("lo").expect("every namespace has one");
        assert_eq!((lo.kind.as_str(), lo.mac, lo.ethernet), ("loopback", [0; 6], true));
        let error = interface_by_name("no-such-device").expect_err("does not exist");
        assert!(error.to_string().contains("those that exist: lo"), "{error}");
    }

    fn address(flags: i32) -> LocalAddress {
        LocalAddress { ifindex: 2, address: Ipv6Addr::LOCALHOST, flags: flags as u32 }
    }

    #[test]
    fn duplicate_address_detection_is_honoured() {
        assert!(address(0).is_usable());
        assert!(!address(libc::IFA_F_TENTATIVE as i32).is_usable());
        assert!(!address(libc::IFA_F_DADFAILED as i32).is_usable());
        let optimistic = libc::IFA_F_TENTATIVE | libc::IFA_F_OPTIMISTIC;
        assert!(address(optimistic as i32).is_usable());
        assert!(address(libc::IFA_F_DEPRECATED as i32).is_usable());
        assert!(address(libc::IFA_F_DEPRECATED as i32).rank() > address(0).rank());
    }
}
