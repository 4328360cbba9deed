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
use super::source_ports::ReceiveHash;
use crate::datapath::Datapath;
use crate::datapath::socket::SocketDatapath;
use crate::datapath::udp_socket::{SocketConfig, SocketError};
use crate::sys::udp::set_option;

/// Ports that are tried for one shard until the others count as taken.
const PORT_ATTEMPTS_MAX: usize = 64;

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

/// Opens one socket per shard, each on a port of its own, so that the replies to these ports meet
/// different queues wherever they come from ([`source_ports`](super::source_ports)); `None` where
/// the device's table cannot tell so many ports apart, or they are not free.
pub(super) fn open_apart(
    local: SocketAddrV6,
    shards: usize,
    rx_buffers: usize,
    hash: &ReceiveHash,
) -> Result<Option<Vec<SocketDatapath>>, AfXdpError> {
    if !hash.can_tell(shards) {
        return Ok(None);
    }
    let mut opened = open(local, 1, rx_buffers)?;
    let first = opened[0].local_addr().port();
    for index in 1..shards {
        let mut found = None;
        for port in hash.candidates(first, index).take(PORT_ATTEMPTS_MAX) {
            let local = SocketAddrV6::new(*local.ip(), port, 0, local.scope_id());
            match open(local, 1, rx_buffers) {
                Ok(sockets) => {
                    found = Some(sockets);
                    break;
                }
                Err(AfXdpError::PortInUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let Some(sockets) = found else { return Ok(None) };
        opened.extend(sockets);
    }
    Ok(Some(opened))
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
    fn ports_apart_are_free_ones_whose_replies_meet_different_queues() {
        let key: Vec<u8> = (0..40).map(|index: u8| index.wrapping_mul(97) ^ 0x5a).collect();
        let table: Vec<u32> = (0..64).map(|entry| entry % 4).collect();
        let hash = ReceiveHash::new(&key, &table).expect("a usable table");
        let shards = open_apart(loopback(0), 4, 4, &hash).expect("opened").expect("ports are free");
        let again = open_apart(loopback(0), 4, 4, &hash).expect("opened").expect("ports are free");
        let peer = SocketAddrV6::new("2001:db8::7".parse().expect("an address"), 443, 0, 0);
        for sockets in [&shards, &again] {
            let mut queues: Vec<u32> =
                sockets.iter().map(|socket| hash.queue(&peer, &socket.local_addr())).collect();
            queues.sort_unstable();
            assert_eq!(queues, [0, 1, 2, 3]);
        }
        let short = ReceiveHash::new(&key, &[0, 1]).expect("a usable table");
        assert!(open_apart(loopback(0), 4, 4, &short).expect("no error").is_none());
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
