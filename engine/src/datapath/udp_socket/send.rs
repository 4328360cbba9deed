//! Packing datagrams into messages, and what to do when the kernel refuses one.
//!
//! Consecutive datagrams with equal addressing and equal size (the last may be
//! shorter) share one send slot and leave as one GSO message. A batch goes
//! through three states: open (may grow), sealed (its header is written), and,
//! after the kernel refused it as a whole, plain (it leaves datagram by
//! datagram, from an offset that survives back-pressure).

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::BorrowedFd;

use super::UDP_PAYLOAD_BYTES_MAX;
use crate::datapath::{DatapathCounters, Ecn, TxDrop, TxMeta};
use crate::sys::udp::{MessageAddressing, SendSlots};

/// Datagrams in one GSO message (`UDP_MAX_SEGMENTS` of kernels before 6.10).
const SEGMENTS_MAX: usize = 64;
/// Payload bytes of one GSO message: it must fit one IPv6 packet with its headers.
const GSO_BYTES_MAX: usize = 65_535 - 48;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Sealed,
    /// `suspect`: the refusal may mean that segmentation itself does not work.
    Plain {
        offset: usize,
        suspect: bool,
    },
}

#[derive(Debug, Clone, Copy)]
struct Batch {
    meta: TxMeta,
    segment_bytes: usize,
    segments: usize,
    bytes: usize,
    state: State,
}

/// What became of a batch that leaves datagram by datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlainOutcome {
    /// Every datagram left or was dropped and counted.
    Done,
    /// The socket buffer is full; the rest stays in the slot.
    WouldBlock,
}

/// The batches of all slots of one datapath.
#[derive(Debug)]
pub(crate) struct Batcher {
    batches: Box<[Batch]>,
    gso: bool,
    too_large_to: Option<SocketAddrV6>,
}

/// Refuses what no socket could send, before it is taken.
pub(crate) fn transmit_verdict_for(meta: &TxMeta, payload: &[u8]) -> Option<TxDrop> {
    if payload.len() > UDP_PAYLOAD_BYTES_MAX {
        Some(TxDrop::TooLarge)
    } else if meta.remote.ip().to_ipv4_mapped().is_some() {
        Some(TxDrop::NoRoute)
    } else {
        None
    }
}

/// Adds a drop to its counter.
pub(crate) fn count_drop(counters: &mut DatapathCounters, drop: TxDrop) {
    match drop {
        TxDrop::TooLarge => counters.tx_drop_too_large += 1,
        TxDrop::NoRoute => counters.tx_drop_no_route += 1,
        TxDrop::NeighborQueueFull => counters.tx_drop_neighbor += 1,
        TxDrop::LinkDown => counters.tx_drop_link_down += 1,
        TxDrop::Io => counters.tx_drop_io += 1,
    }
}

fn drop_reason(error: &io::Error) -> TxDrop {
    match error.raw_os_error() {
        Some(libc::EMSGSIZE) => TxDrop::TooLarge,
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EADDRNOTAVAIL) => TxDrop::NoRoute,
        Some(libc::ENETDOWN | libc::ENODEV | libc::ENXIO) => TxDrop::LinkDown,
        // ENOBUFS: the queue below the socket is full, as on any congested link;
        // EPERM: a firewall rule; EINVAL: the source address is not ours.
        _ => TxDrop::Io,
    }
}

impl Batcher {
    /// Batches for `slots` slots; `gso` says whether to try segmentation offload.
    pub(crate) fn new(slots: usize, gso: bool) -> Self {
        let remote = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0);
        let empty = Batch {
            meta: TxMeta { remote, local: None, ecn: Ecn::NotEct },
            segment_bytes: 0,
            segments: 0,
            bytes: 0,
            state: State::Sealed,
        };
        Self { batches: vec![empty; slots].into_boxed_slice(), gso, too_large_to: None }
    }

    /// Whether segmentation offload is (still) in use.
    pub(crate) const fn gso(&self) -> bool {
        self.gso
    }

    /// Appends to the open batch in `slot` if the datagram fits its GSO message.
    pub(crate) fn try_append(
        &mut self,
        slots: &mut SendSlots,
        slot: usize,
        meta: &TxMeta,
        payload: &[u8],
    ) -> bool {
        let batch = &mut self.batches[slot];
        let fits = self.gso
            && batch.state == State::Open
            && batch.segments < SEGMENTS_MAX
            && !payload.is_empty()
            && payload.len() <= batch.segment_bytes
            && batch.bytes == batch.segments * batch.segment_bytes
            && batch.bytes + payload.len() <= GSO_BYTES_MAX
            && batch.meta == *meta;
        if fits {
            slots.append(slot, payload);
            batch.bytes += payload.len();
            batch.segments += 1;
        }
        fits
    }

    /// Starts a batch in the free `slot` with its first datagram.
    pub(crate) fn begin(
        &mut self,
        slots: &mut SendSlots,
        slot: usize,
        meta: &TxMeta,
        payload: &[u8],
    ) {
        slots.clear(slot);
        slots.append(slot, payload);
        self.batches[slot] = Batch {
            meta: *meta,
            segment_bytes: payload.len(),
            segments: 1,
            bytes: payload.len(),
            state: State::Open,
        };
    }

    /// Starts a batch in the free `slot` with all of `buffer`, which comes back empty: datagrams
    /// of `segment_bytes`, the last may be shorter. Nothing is copied.
    pub(crate) fn begin_with(
        &mut self,
        slots: &mut SendSlots,
        slot: usize,
        meta: &TxMeta,
        segment_bytes: usize,
        buffer: &mut Vec<u8>,
    ) {
        let bytes = buffer.len();
        slots.swap(slot, buffer);
        let segments = bytes.div_ceil(segment_bytes);
        self.batches[slot] =
            Batch { meta: *meta, segment_bytes, segments, bytes, state: State::Open };
    }

    /// How many datagrams of `segment_bytes` one message may hold, 1 without the offload.
    pub(crate) fn datagrams_max(&self, segment_bytes: usize) -> usize {
        if self.gso { (GSO_BYTES_MAX / segment_bytes.max(1)).clamp(1, SEGMENTS_MAX) } else { 1 }
    }

    /// Writes the header of `slot` if that is still to be done.
    pub(crate) fn seal(&mut self, slots: &mut SendSlots, slot: usize) {
        let batch = &mut self.batches[slot];
        if batch.state != State::Open {
            return;
        }
        batch.state = State::Sealed;
        let segment_bytes = (batch.segments > 1).then(|| {
            u16::try_from(batch.segment_bytes).expect("a UDP payload is shorter than 65536")
        });
        let addressing = MessageAddressing {
            remote: batch.meta.remote,
            local: batch.meta.local,
            traffic_class: batch.meta.ecn as u8,
            segment_bytes,
        };
        slots.prepare(slot, &addressing);
    }

    /// Whether `slot` must leave datagram by datagram.
    pub(crate) fn is_plain(&self, slot: usize) -> bool {
        matches!(self.batches[slot].state, State::Plain { .. })
    }

    /// The kernel refused the sealed message in `slot` for good (not for want of
    /// room): sends what it holds datagram by datagram, or counts it as dropped.
    pub(crate) fn refused(
        &mut self,
        slots: &mut SendSlots,
        fd: BorrowedFd<'_>,
        slot: usize,
        error: &io::Error,
        counters: &mut DatapathCounters,
    ) -> PlainOutcome {
        let batch = &mut self.batches[slot];
        if batch.segments == 1 {
            let (meta, drop) = (batch.meta, drop_reason(error));
            self.dropped(&meta, drop, counters);
            return PlainOutcome::Done;
        }
        let suspect = matches!(
            error.raw_os_error(),
            Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP)
        );
        batch.state = State::Plain { offset: 0, suspect };
        self.send_rest(slots, fd, slot, counters)
    }

    /// Sends the rest of the plain batch in `slot`, one datagram per call.
    pub(crate) fn send_rest(
        &mut self,
        slots: &mut SendSlots,
        fd: BorrowedFd<'_>,
        slot: usize,
        counters: &mut DatapathCounters,
    ) -> PlainOutcome {
        let batch = self.batches[slot];
        let State::Plain { mut offset, suspect } = batch.state else { return PlainOutcome::Done };
        while offset < batch.bytes {
            let end = batch.bytes.min(offset + batch.segment_bytes);
            counters.system_calls += 1;
            match slots.send_plain(fd, slot, offset..end) {
                // The first one has the full segment size; a shorter last one that
                // leaves proves nothing after an MTU change.
                Ok(()) if suspect && offset == 0 => self.remember_refusal(&batch.meta),
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.batches[slot].state = State::Plain { offset, suspect };
                    return PlainOutcome::WouldBlock;
                }
                Err(error) => self.dropped(&batch.meta, drop_reason(&error), counters),
            }
            offset = end;
        }
        self.batches[slot].state = State::Sealed;
        PlainOutcome::Done
    }

    /// The peer towards which a datagram turned out too large, once.
    pub(crate) fn take_too_large(&mut self) -> Option<SocketAddrV6> {
        self.too_large_to.take()
    }

    fn dropped(&mut self, meta: &TxMeta, drop: TxDrop, counters: &mut DatapathCounters) {
        count_drop(counters, drop);
        if drop == TxDrop::TooLarge {
            self.too_large_to = Some(meta.remote);
        }
    }

    /// A GSO message failed whose datagrams can be sent singly: the path or the
    /// device cannot segment. (If they fail singly too, it was the MTU, the route
    /// or the source address, and segmentation stays on.)
    fn remember_refusal(&mut self, meta: &TxMeta) {
        if self.gso {
            self.gso = false;
            tracing::warn!(
                remote = %meta.remote,
                "UDP segmentation offload was refused: sending datagrams singly from now on; \
                 enable it with `ethtool -K <interface> tx-udp-segmentation on tx-checksum-ip-generic on`"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::datapath::udp_socket::{SocketConfig, UdpSocket};
    use crate::sys::udp::ReceiveArray;

    fn meta(port: u16) -> TxMeta {
        let remote = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
        TxMeta { remote, local: None, ecn: Ecn::Ect0 }
    }

    fn open(payload: &[u8], gso: bool) -> (SendSlots, Batcher) {
        let mut slots = SendSlots::new(1);
        let mut batcher = Batcher::new(1, gso);
        batcher.begin(&mut slots, 0, &meta(1), payload);
        (slots, batcher)
    }

    #[test]
    fn equal_datagrams_share_a_batch_and_a_shorter_one_ends_it() {
        let (mut slots, mut batcher) = open(&[1; 100], true);
        assert!(batcher.try_append(&mut slots, 0, &meta(1), &[2; 100]));
        assert!(!batcher.try_append(&mut slots, 0, &meta(1), &[2; 101]), "longer");
        assert!(!batcher.try_append(&mut slots, 0, &meta(2), &[2; 100]), "another peer");
        assert!(!batcher.try_append(&mut slots, 0, &meta(1), &[]), "empty");
        assert!(batcher.try_append(&mut slots, 0, &meta(1), &[3; 99]));
        assert!(!batcher.try_append(&mut slots, 0, &meta(1), &[3; 99]), "after the short one");
        assert_eq!(batcher.batches[0].bytes, 299);
    }

    #[test]
    fn batches_are_bound_by_count_and_by_bytes() {
        let (mut slots, mut batcher) = open(&[1; 10], true);
        let appended =
            (0..100).filter(|_| batcher.try_append(&mut slots, 0, &meta(1), &[1; 10])).count();
        assert_eq!(appended + 1, SEGMENTS_MAX);

        let (mut slots, mut batcher) = open(&[1; 8952], true);
        let appended =
            (0..100).filter(|_| batcher.try_append(&mut slots, 0, &meta(1), &[1; 8952])).count();
        assert_eq!(appended + 1, GSO_BYTES_MAX / 8952);

        // Two of these would fit the slot, but not one IPv6 packet.
        let (mut slots, mut batcher) = open(&[1; 32_767], true);
        assert!(!batcher.try_append(&mut slots, 0, &meta(1), &[1; 32_767]));
        assert!(batcher.try_append(&mut slots, 0, &meta(1), &[1; 32_720]));
    }

    #[test]
    fn without_gso_and_after_sealing_nothing_is_appended() {
        let (mut slots, mut batcher) = open(&[1; 10], false);
        assert!(!batcher.try_append(&mut slots, 0, &meta(1), &[1; 10]));
        let (mut slots, mut batcher) = open(&[1; 10], true);
        batcher.seal(&mut slots, 0);
        assert!(!batcher.try_append(&mut slots, 0, &meta(1), &[1; 10]));
    }

    #[test]
    fn impossible_datagrams_are_refused_at_once() {
        let mut to = meta(1);
        let oversized = vec![0; UDP_PAYLOAD_BYTES_MAX + 1];
        assert_eq!(transmit_verdict_for(&to, &oversized), Some(TxDrop::TooLarge));
        assert_eq!(transmit_verdict_for(&to, &oversized[1..]), None);
        to.remote.set_ip("::ffff:192.0.2.1".parse().expect("address"));
        assert_eq!(transmit_verdict_for(&to, &[1]), Some(TxDrop::NoRoute));
    }

    #[test]
    fn reasons_follow_the_error() {
        let of = |errno| drop_reason(&io::Error::from_raw_os_error(errno));
        assert_eq!(of(libc::EMSGSIZE), TxDrop::TooLarge);
        assert_eq!(of(libc::EHOSTUNREACH), TxDrop::NoRoute);
        assert_eq!(of(libc::ENETDOWN), TxDrop::LinkDown);
        assert_eq!(of(libc::ENOBUFS), TxDrop::Io);
    }

    fn loopback() -> UdpSocket {
        let local = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0);
        UdpSocket::open(&SocketConfig::new(local)).expect("::1 can be bound")
    }

    #[test]
    fn a_refused_batch_leaves_singly_and_the_refusal_is_remembered() {
        let (near, far) = (loopback(), loopback());
        let to = TxMeta { remote: far.local(), local: None, ecn: Ecn::Ce };
        let (mut slots, mut batcher) = (SendSlots::new(1), Batcher::new(1, true));
        batcher.begin(&mut slots, 0, &to, &[1; 100]);
        assert!(batcher.try_append(&mut slots, 0, &to, &[2; 100]));
        assert!(batcher.try_append(&mut slots, 0, &to, &[3; 40]));
        batcher.seal(&mut slots, 0);
        let mut counters = DatapathCounters::default();
        let error = io::Error::from_raw_os_error(libc::EIO);
        let outcome = batcher.refused(&mut slots, near.as_fd(), 0, &error, &mut counters);
        assert_eq!(outcome, PlainOutcome::Done);
        assert!(!batcher.gso(), "remembered");
        let mut received = ReceiveArray::new(8, 65_536);
        assert_eq!(received.receive(far.as_fd()).expect("three datagrams"), 3);
        for (index, expected) in [&[1_u8; 100][..], &[2; 100], &[3; 40]].iter().enumerate() {
            assert_eq!(received.message(index).payload, *expected);
        }
        assert_eq!(counters.tx_drop_io, 0);
    }

    #[test]
    fn a_passing_shortage_is_not_a_refusal() {
        let (near, far) = (loopback(), loopback());
        let to = TxMeta { remote: far.local(), local: None, ecn: Ecn::Ce };
        let (mut slots, mut batcher) = (SendSlots::new(1), Batcher::new(1, true));
        batcher.begin(&mut slots, 0, &to, &[1; 100]);
        assert!(batcher.try_append(&mut slots, 0, &to, &[2; 100]));
        batcher.seal(&mut slots, 0);
        let error = io::Error::from_raw_os_error(libc::ENOBUFS);
        let mut counters = DatapathCounters::default();
        let _ = batcher.refused(&mut slots, near.as_fd(), 0, &error, &mut counters);
        assert!(batcher.gso());
        assert_eq!(ReceiveArray::new(8, 65_536).receive(far.as_fd()).expect("both"), 2);
    }

    #[test]
    fn a_batch_that_cannot_leave_at_all_says_nothing_about_segmentation() {
        let near = loopback();
        let (mut slots, mut batcher) = (SendSlots::new(1), Batcher::new(1, true));
        let foreign = Some("2001:db8::1".parse().expect("address"));
        let to = TxMeta { remote: near.local(), local: foreign, ecn: Ecn::Ect0 };
        batcher.begin(&mut slots, 0, &to, &[1; 100]);
        assert!(batcher.try_append(&mut slots, 0, &to, &[2; 100]));
        batcher.seal(&mut slots, 0);
        let error = slots.send(near.as_fd(), 0..1).expect_err("the source is not ours");
        let mut counters = DatapathCounters::default();
        let outcome = batcher.refused(&mut slots, near.as_fd(), 0, &error, &mut counters);
        assert_eq!(outcome, PlainOutcome::Done);
        assert!(batcher.gso(), "still on");
        assert_eq!(counters.tx_drop_io, 2, "both counted");
    }
}
