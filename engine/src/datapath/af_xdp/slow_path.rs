//! The kernel UDP socket beside the rings.
//!
//! It holds the port, so that no other program can take it and so that the
//! kernel does not answer with ICMPv6 "port unreachable", and it receives what
//! the XDP program passed: packets with VLAN tags or extension headers, packets
//! that came in by another interface or queue, fragments put together by the
//! kernel. Those are rare, so it is read rarely: when `poll` says so, and every
//! few turns of a shard that never sleeps. It is a whole socket datapath, so that
//! the shard can go on with it alone when the device is gone
//! ([`failover`](crate::datapath::failover)); until then nothing is sent through it.

use std::net::{Ipv6Addr, SocketAddrV6};

use super::error::AfXdpError;
use crate::datapath::Datapath;
use crate::datapath::socket::SocketDatapath;
use crate::datapath::udp_socket::{SocketConfig, SocketError};
use crate::sys::udp::set_option;

/// Opens one socket per shard, all on the same port: `local`'s, or a free one that
/// the kernel chooses if that is zero; each has `rx_buffers` receive buffers.
///
/// The first socket is bound alone, which fails if anybody else has the port; only
/// then may the port be shared (`SO_REUSEPORT`), and the others join.
pub(super) fn open(
    local: SocketAddrV6,
    shards: usize,
    rx_buffers: usize,
) -> Result<Vec<SocketDatapath>, AfXdpError> {
    let mut opened: Vec<SocketDatapath> = Vec::with_capacity(shards);
    for _ in 0..shards {
        let mut config = SocketConfig::new(opened.first().map_or(local, Datapath::local_addr));
        config.rx_buffers = rx_buffers;
        config.reuse_port = !opened.is_empty();
        let socket = SocketDatapath::open(config).map_err(|error| match error {
            SocketError::PortInUse { local } => AfXdpError::PortInUse { port: local.port() },
            source => AfXdpError::SlowPath { source },
        })?;
        if opened.is_empty() && shards > 1 {
            let shared = set_option(socket.udp_socket(), libc::SOL_SOCKET, libc::SO_REUSEPORT, 1);
            shared.map_err(|source| AfXdpError::SlowPath {
                source: SocketError::SystemCall {
                    call: "setsockopt(SO_REUSEPORT)",
                    local: socket.local_addr(),
                    advice: "use one shard",
                    source,
                },
            })?;
        }
        opened.push(socket);
    }
    Ok(opened)
}

/// Whether `address` is an IPv4 address in IPv6 clothes (`::ffff:0:0/96`, RFC 4291 §2.5.5.2).
pub(super) fn is_ipv4(address: Ipv6Addr) -> bool {
    address.to_ipv4_mapped().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback(port: u16) -> SocketAddrV6 {
        SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0)
    }

    #[test]
    fn all_shards_share_one_port_and_strangers_are_refused() {
        let shards = open(loopback(0), 3, 4).expect("three sockets");
        let port = shards[0].local_addr().port();
        assert_ne!(port, 0);
        assert!(shards.iter().all(|shard| shard.local_addr().port() == port));
        match open(loopback(port), 2, 4) {
            Err(AfXdpError::PortInUse { port: named }) => assert_eq!(named, port),
            other => panic!("a second set of sockets on the port: {other:?}"),
        }
    }

    #[test]
    fn mapped_ipv4_is_recognised() {
        assert!(is_ipv4("::ffff:10.0.0.1".parse().expect("an address")));
        assert!(!is_ipv4(Ipv6Addr::LOCALHOST));
    }
}
