//! The kernel UDP socket beside the rings.
//!
//! It holds the port, so that no other program can take it and so that the
//! kernel does not answer with ICMPv6 "port unreachable", and it receives what
//! the XDP program passed: packets with VLAN tags or extension headers, packets
//! that came in by another interface or queue, fragments put together by the
//! kernel. Those are rare, so it is read rarely: when `poll` says so, and every
//! few turns of a shard that never sleeps. Nothing is ever sent through it.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, getsockname, ipproto, socket_with, sockopt,
};

use super::error::AfXdpError;
use crate::datapath::{DatapathCounters, Ecn, RxBatch};
use crate::sys::udp_receive::{UdpReceiver, set_ipv6_options};

/// The socket of one shard, and its buffers.
#[derive(Debug)]
pub(super) struct SlowPath {
    socket: OwnedFd,
    local: SocketAddrV6,
    receiver: UdpReceiver,
}

impl SlowPath {
    /// Opens one socket per shard, all on the same port: `local`'s, or a free
    /// one that the kernel chooses if that is zero.
    ///
    /// The first socket is bound alone, which fails if anybody else has the
    /// port; only then may the port be shared (`SO_REUSEPORT`), and the others join.
    pub(super) fn open(
        local: SocketAddrV6,
        shards: usize,
        batch: usize,
    ) -> Result<Vec<Self>, AfXdpError> {
        let mut opened: Vec<Self> = Vec::with_capacity(shards);
        for _ in 0..shards {
            let address = opened.first().map_or(local, |first| first.local);
            let fail = |call| {
                move |source: rustix::io::Errno| AfXdpError::SlowPath {
                    call,
                    address: *address.ip(),
                    port: address.port(),
                    source: source.into(),
                }
            };
            let joins = !opened.is_empty();
            let socket = socket_with(
                AddressFamily::INET6,
                SocketType::DGRAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                Some(ipproto::UDP),
            )
            .map_err(fail("socket"))?;
            sockopt::set_ipv6_v6only(&socket, true).map_err(fail("setsockopt(IPV6_V6ONLY)"))?;
            if joins {
                sockopt::set_socket_reuseport(&socket, true)
                    .map_err(fail("setsockopt(SO_REUSEPORT)"))?;
            }
            bind(&socket, &address).map_err(|error| match error {
                rustix::io::Errno::ADDRINUSE => AfXdpError::PortInUse { port: address.port() },
                other => fail("bind")(other),
            })?;
            if !joins && shards > 1 {
                sockopt::set_socket_reuseport(&socket, true)
                    .map_err(fail("setsockopt(SO_REUSEPORT)"))?;
            }
            set_ipv6_options(socket.as_fd()).map_err(|source| AfXdpError::SlowPath {
                call: "setsockopt(IPV6_RECVPKTINFO, IPV6_RECVTCLASS, IPV6_DONTFRAG)",
                address: *address.ip(),
                port: address.port(),
                source,
            })?;
            let bound = getsockname(&socket).map_err(fail("getsockname"))?;
            let bound = SocketAddrV6::try_from(bound).map_err(fail("getsockname"))?;
            opened.push(Self { socket, local: bound, receiver: UdpReceiver::new(batch) });
        }
        Ok(opened)
    }

    /// The address that the socket is bound to; its port is never zero.
    pub(super) fn local_addr(&self) -> SocketAddrV6 {
        self.local
    }

    /// Moves what has arrived into `batch`, one system call's worth. Returns
    /// whether there may be more.
    pub(super) fn receive(
        &mut self,
        batch: &mut RxBatch,
        counters: &mut DatapathCounters,
    ) -> io::Result<bool> {
        let wanted = batch.room();
        if wanted == 0 {
            return Ok(true);
        }
        counters.system_calls += 1;
        let count = self.receiver.receive(self.socket.as_fd(), wanted)?;
        for datagram in self.receiver.datagrams() {
            if datagram.truncated {
                counters.rx_drop_too_long += 1;
                continue;
            }
            let local = datagram.local.unwrap_or(*self.local.ip());
            let ecn = Ecn::from_traffic_class(datagram.traffic_class);
            batch.push(datagram.remote, local, ecn, &[datagram.payload]);
            counters.rx_datagrams += 1;
            counters.rx_slow_path += 1;
            counters.rx_bytes += datagram.payload.len() as u64;
            counters.copied_bytes += datagram.payload.len() as u64;
        }
        Ok(count > 0)
    }
}

impl AsFd for SlowPath {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether `address` is an IPv4 address in IPv6 clothes (`::ffff:0:0/96`, RFC 4291 §2.5.5.2).
pub(super) fn is_ipv4(address: Ipv6Addr) -> bool {
    address.to_ipv4_mapped().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::time::{Duration, Instant};

    fn loopback(port: u16) -> SocketAddrV6 {
        SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0)
    }

    #[test]
    fn all_shards_share_one_port_and_strangers_are_refused() {
        let shards = SlowPath::open(loopback(0), 3, 4).expect("three sockets");
        let port = shards[0].local_addr().port();
        assert_ne!(port, 0);
        assert!(shards.iter().all(|shard| shard.local_addr().port() == port));
        match SlowPath::open(loopback(port), 2, 4) {
            Err(AfXdpError::PortInUse { port: named }) => assert_eq!(named, port),
            other => panic!("a second set of sockets on the port: {other:?}"),
        }
    }

    #[test]
    fn datagrams_reach_the_batch_and_are_counted() {
        let mut shards = SlowPath::open(loopback(0), 2, 4).expect("two sockets");
        let sender = UdpSocket::bind("[::1]:0").expect("loopback");
        sender.send_to(b"slow", shards[0].local_addr()).expect("sent");
        let mut batch = RxBatch::new(4, 4096);
        let mut counters = DatapathCounters::default();
        let deadline = Instant::now() + Duration::from_secs(5);
        while batch.is_empty() && Instant::now() < deadline {
            for shard in &mut shards {
                shard.receive(&mut batch, &mut counters).expect("no error");
            }
        }
        let datagram = batch.drain().next().expect("the datagram");
        assert_eq!(&datagram.data[..], b"slow");
        assert_eq!(datagram.local, Ipv6Addr::LOCALHOST);
        assert_eq!((counters.rx_slow_path, counters.rx_datagrams, counters.rx_bytes), (1, 1, 4));
    }

    #[test]
    fn a_full_batch_takes_nothing_more() {
        let mut shards = SlowPath::open(loopback(0), 1, 4).expect("a socket");
        let sender = UdpSocket::bind("[::1]:0").expect("loopback");
        for _ in 0..3 {
            sender.send_to(b"x", shards[0].local_addr()).expect("sent");
        }
        let mut batch = RxBatch::new(2, 4096);
        let mut counters = DatapathCounters::default();
        while !batch.is_full() {
            shards[0].receive(&mut batch, &mut counters).expect("no error");
        }
        assert!(shards[0].receive(&mut batch, &mut counters).expect("no error"), "more may wait");
        assert_eq!(batch.len(), 2);
    }

    #[test]
    fn mapped_ipv4_is_recognised() {
        assert!(is_ipv4("::ffff:10.0.0.1".parse().expect("an address")));
        assert!(!is_ipv4(Ipv6Addr::LOCALHOST));
    }
}
