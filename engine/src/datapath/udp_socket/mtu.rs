//! The largest payload towards a peer, asked from the kernel's route and cached.

use std::cell::{Cell, RefCell};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType};

use super::{SocketError, UDP_PAYLOAD_BYTES_MAX, system_call};
use crate::sys::udp::option;

/// How long an answer is trusted.
const FRESH: Duration = Duration::from_secs(5);
/// How many peers are remembered; with more, the cache starts anew.
const PEERS_MAX: usize = 4096;
/// IPv6 and UDP headers, in bytes.
const HEADERS_BYTES: u32 = 48;
/// Every IPv6 link carries 1280 bytes (RFC 8200 §5).
const PAYLOAD_BYTES_MIN: u16 = 1280 - HEADERS_BYTES as u16;

/// An answer, and the period in which it was given.
#[derive(Debug, Clone, Copy)]
struct Answer {
    payload_bytes: u16,
    epoch: u32,
}

fn key(remote: &SocketAddrV6) -> (Ipv6Addr, u32) {
    (*remote.ip(), remote.scope_id())
}

/// Asks for path MTUs with a connected socket that never sends.
#[derive(Debug)]
pub(crate) struct MtuProbe {
    socket: OwnedFd,
    answers: RefCell<FxHashMap<(Ipv6Addr, u32), Answer>>,
    epoch: Cell<u32>,
    stale_after: Cell<Option<Instant>>,
    system_calls: Cell<u64>,
}

impl MtuProbe {
    /// A probe for datagrams that leave from `local`'s address. It is opened at
    /// once, so that it looks at the same network namespace as its socket.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub(crate) fn open(local: SocketAddrV6) -> Result<Self, SocketError> {
        let advice = "raise the limit of open files (ulimit -n)";
        let socket = net::socket_with(
            AddressFamily::INET6,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            Some(net::ipproto::UDP),
        )
        .map_err(system_call("socket (for path MTUs)", local, advice))?;
        let source = SocketAddrV6::new(*local.ip(), 0, 0, local.scope_id());
        net::bind(&socket, &source).map_err(system_call(
            "bind (for path MTUs)",
            local,
            "check `ip -6 address`",
        ))?;
        Ok(Self {
            socket,
            answers: RefCell::new(FxHashMap::default()),
            epoch: Cell::new(0),
            stale_after: Cell::new(None),
            system_calls: Cell::new(0),
        })
    }

    /// The largest UDP payload towards `remote`, in bytes: 1232 where the kernel
    /// knows no route, and for an IPv4-mapped address.
    pub(crate) fn max_udp_payload(&self, remote: &SocketAddrV6) -> u16 {
        match self.answers.borrow().get(&key(remote)) {
            Some(known) if known.epoch == self.epoch.get() => return known.payload_bytes,
            _ => {}
        }
        let payload_bytes = self.ask(remote).unwrap_or(PAYLOAD_BYTES_MIN);
        let mut answers = self.answers.borrow_mut();
        if answers.len() >= PEERS_MAX {
            answers.clear();
        }
        answers.insert(key(remote), Answer { payload_bytes, epoch: self.epoch.get() });
        payload_bytes
    }

    /// Lets answers that are too old be asked anew; called once per turn.
    pub(crate) fn expire(&self, now: Instant) {
        match self.stale_after.get() {
            Some(at) if now < at => {}
            _ => {
                self.epoch.set(self.epoch.get().wrapping_add(1));
                self.stale_after.set(Some(now + FRESH));
            }
        }
    }

    /// Asks again after a datagram turned out too large: the new answer, unless it
    /// is what was believed (then the datagram was a probe beyond the link).
    pub(crate) fn refresh(&self, remote: &SocketAddrV6) -> Option<u16> {
        let believed = self.answers.borrow_mut().remove(&key(remote));
        let answer = self.max_udp_payload(remote);
        believed.is_none_or(|old| old.payload_bytes != answer).then_some(answer)
    }

    /// System calls made so far.
    pub(crate) const fn system_calls(&self) -> u64 {
        self.system_calls.get()
    }

    fn ask(&self, remote: &SocketAddrV6) -> Option<u16> {
        if remote.ip().to_ipv4_mapped().is_some() {
            return None;
        }
        // Port 9 (discard): connecting a UDP socket looks the route up and sends nothing.
        let target = SocketAddrV6::new(*remote.ip(), 9, 0, remote.scope_id());
        self.system_calls.set(self.system_calls.get() + 2);
        net::connect(&self.socket, &target).ok()?;
        let mtu = option(self.socket.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_MTU).ok()?;
        let payload = u32::try_from(mtu).ok()?.checked_sub(HEADERS_BYTES)?;
        Some(u16::try_from(payload.min(UDP_PAYLOAD_BYTES_MAX as u32)).expect("capped below 65536"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback(port: u16) -> SocketAddrV6 {
        SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0)
    }

    #[test]
    fn loopback_answers_once_and_is_cached() {
        let probe = MtuProbe::open(loopback(0)).expect("::1 can be bound");
        let first = probe.max_udp_payload(&loopback(4433));
        let calls = probe.system_calls();
        assert!(first > 1232, "lo has a large MTU: {first}");
        assert_eq!(probe.max_udp_payload(&loopback(4434)), first);
        assert_eq!(probe.system_calls(), calls, "the second answer is cached");

        let start = Instant::now();
        probe.expire(start);
        assert_eq!(probe.max_udp_payload(&loopback(1)), first);
        let asked = probe.system_calls();
        probe.expire(start + FRESH / 2);
        let _ = probe.max_udp_payload(&loopback(1));
        assert_eq!(probe.system_calls(), asked, "still fresh");
        probe.expire(start + FRESH);
        let _ = probe.max_udp_payload(&loopback(1));
        assert!(probe.system_calls() > asked, "stale answers are asked anew");
    }

    #[test]
    fn no_route_and_ipv4_mapped_give_the_minimum() {
        let probe = MtuProbe::open(loopback(0)).expect("::1 can be bound");
        let mapped = SocketAddrV6::new("::ffff:127.0.0.1".parse().expect("address"), 1, 0, 0);
        assert_eq!(probe.max_udp_payload(&mapped), PAYLOAD_BYTES_MIN);
    }

    #[test]
    fn the_cache_is_bounded() {
        let probe = MtuProbe::open(loopback(0)).expect("::1 can be bound");
        for index in 0..PEERS_MAX as u32 + 10 {
            let mut octets = Ipv6Addr::LOCALHOST.octets();
            octets[0] = 0xff;
            octets[12..].copy_from_slice(&index.to_be_bytes());
            let _ = probe.max_udp_payload(&SocketAddrV6::new(octets.into(), 1, 0, 0));
        }
        assert!(probe.answers.borrow().len() <= PEERS_MAX);
    }
}
