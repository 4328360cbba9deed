//! From a kernel message (one datagram, or many by GRO) to the turn's batch.

use std::net::{Ipv6Addr, SocketAddrV6};

use crate::datapath::{DatapathCounters, Ecn, RxBatch};
use crate::sys::udp::{ControlReader, Message, SO_RXQ_OVFL};

/// Turns the socket's cumulative 32-bit drop count into a total.
#[derive(Debug, Default)]
pub(crate) struct OverrunCounter {
    last: u32,
}

impl OverrunCounter {
    /// Drops since the previous report. The count wraps; the same report repeats,
    /// and with several receive queues an older one can follow a newer one.
    pub(crate) fn advance(&mut self, reported: u32) -> u64 {
        let delta = reported.wrapping_sub(self.last);
        if delta > u32::MAX / 2 {
            return 0;
        }
        self.last = reported;
        u64::from(delta)
    }
}

/// What the control messages and the address of a message say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MessageInfo {
    remote: SocketAddrV6,
    local: Ipv6Addr,
    ecn: Ecn,
    segment_bytes: usize,
}

impl MessageInfo {
    /// Reads `message`; `None` (counted) if it must be dropped. `bound` is the
    /// answer for a kernel that gave no destination address.
    pub(crate) fn read(
        message: &Message<'_>,
        bound: Ipv6Addr,
        overrun: &mut OverrunCounter,
        counters: &mut DatapathCounters,
    ) -> Option<Self> {
        let mut info = Self {
            remote: SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0),
            local: bound,
            ecn: Ecn::NotEct,
            segment_bytes: message.payload.len().max(1),
        };
        for (level, kind, data) in ControlReader::new(message.control) {
            match (level, kind) {
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    if let Some(value) = integer(data) {
                        info.ecn = Ecn::from_traffic_class((value & 0xff) as u8);
                    }
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    if let Some(octets) = data.first_chunk::<16>() {
                        info.local = Ipv6Addr::from(*octets);
                    }
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    if let Some(bytes @ 1..) = integer(data) {
                        info.segment_bytes = bytes as usize;
                    }
                }
                (libc::SOL_SOCKET, SO_RXQ_OVFL) => {
                    if let Some(total) = integer(data) {
                        counters.rx_drop_overrun += overrun.advance(total);
                    }
                }
                _ => {}
            }
        }
        if message.truncated {
            counters.rx_drop_too_long += 1;
            return None;
        }
        let Some(remote) = message.remote.filter(|peer| peer.ip().to_ipv4_mapped().is_none())
        else {
            counters.rx_drop_malformed += 1;
            return None;
        };
        info.remote = remote;
        Some(info)
    }
}

fn integer(data: &[u8]) -> Option<u32> {
    data.first_chunk::<4>().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A message on its way into batches; survives a full batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MessageCursor {
    info: MessageInfo,
    offset: usize,
}

impl MessageCursor {
    /// Starts at the first datagram.
    pub(crate) const fn new(info: MessageInfo) -> Self {
        Self { info, offset: 0 }
    }

    /// Moves datagrams of `payload` into `batch`; true when all of them are
    /// there, false when the batch became full first.
    pub(crate) fn deliver(
        &mut self,
        payload: &[u8],
        batch: &mut RxBatch,
        counters: &mut DatapathCounters,
    ) -> bool {
        let info = &self.info;
        loop {
            if batch.is_full() {
                return false;
            }
            let rest = &payload[self.offset..];
            let segment = &rest[..rest.len().min(info.segment_bytes)];
            batch.push(info.remote, info.local, info.ecn, &[segment]);
            self.offset += segment.len();
            counters.rx_datagrams += 1;
            counters.rx_bytes += segment.len() as u64;
            counters.copied_bytes += segment.len() as u64;
            if self.offset >= payload.len() {
                return true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(segment_bytes: usize) -> MessageCursor {
        MessageCursor::new(MessageInfo {
            remote: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 7, 0, 0),
            local: Ipv6Addr::LOCALHOST,
            ecn: Ecn::Ce,
            segment_bytes,
        })
    }

    #[test]
    fn a_full_batch_keeps_the_rest_for_the_next_turn() {
        let payload: Vec<u8> = (0..25).collect();
        let mut counters = DatapathCounters::default();
        let mut batch = RxBatch::new(2, 4096);
        let mut cursor = cursor(10);
        assert!(!cursor.deliver(&payload, &mut batch, &mut counters));
        let first: Vec<_> = batch.drain().map(|datagram| datagram.data.to_vec()).collect();
        assert_eq!(first, [payload[..10].to_vec(), payload[10..20].to_vec()]);
        assert!(cursor.deliver(&payload, &mut batch, &mut counters));
        let second: Vec<_> = batch.drain().map(|datagram| datagram.data.to_vec()).collect();
        assert_eq!(second, [payload[20..].to_vec()]);
        assert_eq!((counters.rx_datagrams, counters.rx_bytes), (3, 25));
    }

    #[test]
    fn exact_multiples_and_empty_payloads() {
        let mut counters = DatapathCounters::default();
        let mut batch = RxBatch::new(8, 4096);
        assert!(cursor(10).deliver(&[1; 20], &mut batch, &mut counters));
        assert_eq!(batch.len(), 2);
        assert!(cursor(1).deliver(&[], &mut batch, &mut counters));
        assert_eq!(batch.len(), 3, "an empty datagram is a datagram");
    }

    #[test]
    fn overruns_accumulate_over_a_wrap() {
        let mut overrun = OverrunCounter::default();
        assert_eq!(overrun.advance(5), 5);
        assert_eq!(overrun.advance(5), 0);
        assert_eq!(overrun.advance(3), 0, "an older report adds nothing");
        assert_eq!(overrun.advance(7), 2);
        overrun.last = u32::MAX;
        assert_eq!(overrun.advance(2), 3);
    }

    #[test]
    fn truncated_and_foreign_messages_are_counted() {
        let mut counters = DatapathCounters::default();
        let mut overrun = OverrunCounter::default();
        let remote = Some(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 7, 0, 0));
        let mut message = Message { remote, control: &[], payload: &[1], truncated: true };
        let bound = Ipv6Addr::LOCALHOST;
        assert!(MessageInfo::read(&message, bound, &mut overrun, &mut counters).is_none());
        message.truncated = false;
        assert!(MessageInfo::read(&message, bound, &mut overrun, &mut counters).is_some());
        message.remote = None;
        assert!(MessageInfo::read(&message, bound, &mut overrun, &mut counters).is_none());
        assert_eq!((counters.rx_drop_too_long, counters.rx_drop_malformed), (1, 1));
    }
}
