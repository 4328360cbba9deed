//! Which link leads to a peer, as the kernel routes it.

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};

use anyhow::Context;

/// A link and its MTU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The interface's name.
    pub name: String,
    /// Its MTU, bytes.
    pub mtu: u32,
}

impl Link {
    /// The link towards `peer`.
    ///
    /// # Errors
    /// There is no route, or `/proc` and `/sys` do not tell.
    pub fn towards(peer: SocketAddrV6) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).context("binding a UDP socket")?;
        socket.connect(peer).with_context(|| format!("routing to {peer}"))?;
        let std::net::SocketAddr::V6(local) = socket.local_addr()? else {
            anyhow::bail!("the route to {peer} has no IPv6 source");
        };
        let name = if local.ip() == peer.ip() {
            "lo".to_owned()
        } else {
            let text =
                std::fs::read_to_string("/proc/net/if_inet6").context("/proc/net/if_inet6")?;
            interface_of(&text, *local.ip())
                .with_context(|| format!("no interface has the address {}", local.ip()))?
        };
        let path = format!("/sys/class/net/{name}/mtu");
        let mtu = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        Ok(Self { mtu: mtu.trim().parse().context(path)?, name })
    }
}

/// The interface that has `address`, from the text of `/proc/net/if_inet6`.
fn interface_of(text: &str, address: Ipv6Addr) -> Option<String> {
    let wanted = format!("{:032x}", address.to_bits());
    let line = text.lines().find(|line| line.starts_with(&wanted))?;
    line.split_whitespace().next_back().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_by_address() {
        let text = "00000000000000000000000000000001 01 80 10 80       lo\n\
                    fd53746f0071000000000000000000 0a 02 40 00 80    bad\n\
                    fd53746f00710000000000000000000a 02 40 00 80    stoqa\n";
        let address = "fd53:746f:71::a".parse().expect("an address");
        assert_eq!(interface_of(text, address).as_deref(), Some("stoqa"));
        assert_eq!(interface_of(text, Ipv6Addr::LOCALHOST).as_deref(), Some("lo"));
        assert_eq!(interface_of(text, Ipv6Addr::UNSPECIFIED), None);
    }

    #[test]
    fn loopback() {
        let link = Link::towards("[::1]:9".parse().expect("an address")).expect("a route");
        assert_eq!(link.name, "lo");
        assert!(link.mtu >= 1280);
    }
}
