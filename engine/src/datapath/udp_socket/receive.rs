//! From a kernel message (one datagram, or many by GRO) to the turn's batch.

use std::net::{Ipv6Addr, SocketAddrV6};

use bytes::BytesMut;

use crate::datapath::{DatapathCounters, Ecn, RxBatch, RxDatagram};
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

/// A message from this size on is handed out where the kernel wrote it, bytes; a smaller one is
/// copied, so that what the application keeps of it does not hold a receive buffer of 64 kB.
pub(crate) const UNCOPIED_BYTES_MIN: usize = 48 * 1024;

/// A message on its way into batches; survives a full batch.
#[derive(Debug)]
pub(crate) struct MessageCursor {
    info: MessageInfo,
    rest: Rest,
}

/// What of a message is not in a batch yet.
#[derive(Debug)]
enum Rest {
    /// From this offset on, in the buffer that it was received into.
    InPlace(usize),
    /// The message's own memory.
    Owned(BytesMut),
}

impl MessageCursor {
    /// A message whose payload is copied into the batch.
    pub(crate) const fn copying(info: MessageInfo) -> Self {
        Self { info, rest: Rest::InPlace(0) }
    }

    /// A message that owns its payload, which is not empty.
    pub(crate) const fn owning(info: MessageInfo, payload: BytesMut) -> Self {
        Self { info, rest: Rest::Owned(payload) }
    }

    /// Moves datagrams into `batch`; true when all of them are there, false when the batch became
    /// full first. `payload` is the message's, for one that is copied.
    pub(crate) fn deliver(
        &mut self,
        payload: &[u8],
        batch: &mut RxBatch,
        counters: &mut DatapathCounters,
    ) -> bool {
        if batch.is_full() {
            return false;
        }
        let MessageInfo { remote, local, ecn, segment_bytes } = self.info;
        let held = batch.len();
        let (taken, ended) = match &mut self.rest {
            Rest::InPlace(offset) => {
                let rest = &payload[*offset..];
                let taken = batch.push_segments(remote, local, ecn, rest, segment_bytes);
                *offset += taken;
                counters.copied_bytes += taken as u64;
                (taken, *offset == payload.len())
            }
            Rest::Owned(rest) => {
                let before = rest.len();
                while !rest.is_empty() && !batch.is_full() {
                    let last = rest.len() <= segment_bytes;
                    let data =
                        if last { std::mem::take(rest) } else { rest.split_to(segment_bytes) };
                    batch.push_owned(RxDatagram { remote, local, ecn, data });
                }
                (before - rest.len(), rest.is_empty())
            }
        };
        counters.rx_datagrams += (batch.len() - held) as u64;
        counters.rx_bytes += taken as u64;
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(segment_bytes: usize) -> MessageCursor {
        MessageCursor::copying(info(segment_bytes))
    }

    fn info(segment_bytes: usize) -> MessageInfo {
        MessageInfo {
            remote: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 7, 0, 0),
            local: Ipv6Addr::LOCALHOST,
            ecn: Ecn::Ce,
            segment_bytes,
        }
    }

    #[test]
    fn a_full_batch_keeps_the_rest_for_the_next_turn() {
        let payload: Vec<u8> = (0..25).collect();
        let owned = MessageCursor::owning(info(10), BytesMut::from(payload.as_slice()));
        for (mut cursor, copied_bytes) in [(cursor(10), 25), (owned, 0)] {
            let mut counters = DatapathCounters::default();
            let mut batch = RxBatch::new(2, 4096);
            assert!(!cursor.deliver(&payload, &mut batch, &mut counters));
            let first: Vec<_> = batch.drain().map(|datagram| datagram.data.to_vec()).collect();
            assert_eq!(first, [payload[..10].to_vec(), payload[10..20].to_vec()]);
            assert!(cursor.deliver(&payload, &mut batch, &mut counters));
            let second: Vec<_> = batch.drain().map(|datagram| datagram.data.to_vec()).collect();
            assert_eq!(second, [payload[20..].to_vec()]);
            assert_eq!((counters.rx_datagrams, counters.rx_bytes), (3, 25));
            assert_eq!(counters.copied_bytes, copied_bytes);
        }
    }

    #[test]
    fn segments_over_several_slabs() {
        let payload: Vec<u8> = (0..=255).cycle().take(1000).collect();
        // Slabs of two and a half segments, of less than one, and of all of them.
        for slab_bytes in [250, 7, 5000] {
            let mut counters = DatapathCounters::default();
            let mut batch = RxBatch::new(64, slab_bytes);
            assert!(cursor(100).deliver(&payload, &mut batch, &mut counters));
            assert!(cursor(100).deliver(&payload[..130], &mut batch, &mut counters));
            let expected = payload.chunks(100).chain(payload[..130].chunks(100));
            assert!(batch.drain().map(|datagram| datagram.data).eq(expected), "{slab_bytes}");
            assert_eq!((counters.rx_datagrams, counters.rx_bytes), (12, 1130));
        }
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
