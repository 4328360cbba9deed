//! Asks the kernel to find, or to confirm, a neighbour's link-layer address.
//!
//! With `CAP_NET_ADMIN` the request is a netlink message that marks the entry as
//! used (`NTF_USE`): the kernel then solicits an unknown neighbour and probes a
//! stale one, as if it had sent a packet itself. A process that has given up its
//! privileges sends an empty datagram to the next hop's discard port (RFC 863)
//! through the kernel instead, which has the same effect and costs the neighbour
//! one packet that it answers with an ICMPv6 error or not at all.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::time::{Duration, Instant};

use super::netlink::{NetlinkError, NetlinkSocket, Request};

/// How many neighbours may be asked for in a second, all together: a flood of
/// forged on-link senders must not become one of solicitations.
pub const REQUESTS_PER_SECOND_MAX: u32 = 512;

const WINDOW: Duration = Duration::from_secs(1);
const DISCARD_PORT: u16 = 9;

/// The asking side of one interface.
#[derive(Debug)]
pub(super) struct Solicitor {
    ifindex: u32,
    /// In place of netlink requests, once these were not permitted.
    datagrams: Option<UdpSocket>,
    window_start: Option<Instant>,
    requests_in_window: u32,
    /// The last request failed, and that was logged.
    failing: bool,
}

impl Solicitor {
    /// For one interface.
    pub(super) fn new(ifindex: u32) -> Self {
        let (window_start, requests_in_window) = (None, 0);
        Self { ifindex, datagrams: None, window_start, requests_in_window, failing: false }
    }

    /// Whether the rate limit allows a request now.
    pub(super) fn may_ask(&mut self, now: Instant) -> bool {
        let over = |start| now.saturating_duration_since(start) >= WINDOW;
        if self.window_start.is_none_or(over) {
            self.window_start = Some(now);
            self.requests_in_window = 0;
        }
        self.requests_in_window < REQUESTS_PER_SECOND_MAX
    }

    /// Asks for a neighbour. A failure is logged (once until the next success) and
    /// counts as a request that was not answered.
    pub(super) fn ask(&mut self, requests: &mut NetlinkSocket, next_hop: Ipv6Addr) {
        self.requests_in_window += 1;
        let asked = match &self.datagrams {
            Some(socket) => self.probe(socket, next_hop).map_err(|error| error.to_string()),
            None => self.ask_by_netlink(requests, next_hop),
        };
        if let Err(reason) = &asked
            && !self.failing
        {
            tracing::warn!(
                ifindex = self.ifindex, %next_hop, reason,
                "cannot ask the kernel for a neighbour; trying again"
            );
        }
        self.failing = asked.is_err();
    }

    fn ask_by_netlink(
        &mut self,
        requests: &mut NetlinkSocket,
        next_hop: Ipv6Addr,
    ) -> Result<(), String> {
        match self.mark_used(requests, next_hop) {
            Ok(()) => Ok(()),
            Err(error) if error.refusal() == Some(libc::EPERM) => {
                tracing::info!(
                    ifindex = self.ifindex,
                    "no CAP_NET_ADMIN: neighbours are asked for by datagrams to the discard port"
                );
                let socket = open_probe_socket().map_err(|error| error.to_string())?;
                let probed = self.probe(&socket, next_hop).map_err(|error| error.to_string());
                self.datagrams = Some(socket);
                probed
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn mark_used(
        &self,
        requests: &mut NetlinkSocket,
        next_hop: Ipv6Addr,
    ) -> Result<(), NetlinkError> {
        let mut header = neighbor_header(self.ifindex);
        header[10] = libc::NTF_USE;
        let request = Request::new("use of a neighbour", libc::RTM_NEWNEIGH, &header)
            .attribute(libc::NDA_DST, &next_hop.octets());
        requests.request(request, libc::NLM_F_CREATE, |_| ())
    }

    fn probe(&self, socket: &UdpSocket, next_hop: Ipv6Addr) -> io::Result<()> {
        let scope = if next_hop.is_unicast_link_local() { self.ifindex } else { 0 };
        let target = SocketAddrV6::new(next_hop, DISCARD_PORT, 0, scope);
        match socket.send_to(&[], target) {
            Ok(_) => Ok(()),
            // A full queue holds packets that ask for the neighbour already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn open_probe_socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// An `ndmsg` about an IPv6 neighbour on an interface.
pub(super) fn neighbor_header(ifindex: u32) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = libc::AF_INET6 as u8;
    header[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_limited_per_second() {
        let mut solicitor = Solicitor::new(1);
        let now = Instant::now();
        for _ in 0..REQUESTS_PER_SECOND_MAX {
            assert!(solicitor.may_ask(now));
            solicitor.requests_in_window += 1;
        }
        assert!(!solicitor.may_ask(now));
        assert!(!solicitor.may_ask(now + WINDOW / 2));
        assert!(solicitor.may_ask(now + WINDOW));
        assert_eq!(solicitor.requests_in_window, 0);
    }
}
