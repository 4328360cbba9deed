//! From a datagram to the TX ring, and the kicks that make it leave.
//!
//! A datagram is written once: headers and payload go straight into frames, the
//! checksum is summed while copying or left to the device. Frames come back
//! through the completion ring, which is drained every turn.
//!
//! Kicks. In zero-copy mode the driver polls the TX ring by itself until it says
//! otherwise (need-wakeup), and one kick starts it. In copy mode the kernel sends
//! inside the system call: a bounded number of frames a call (`EAGAIN` when more
//! are left) and never more than the socket's send buffer holds (`EAGAIN` again,
//! which is the back-pressure of the device), so a flush kicks again as long as
//! that moves something. What is left waits for completions, or 150 µs.

use std::io;
use std::time::{Duration, Instant};

use super::limits::FRAMES_PER_PACKET_MAX;
use super::neighbors::NextHop;
use super::rings::Rings;
use super::source_ports::SourcePort;
use crate::datapath::{DatapathCounters, TxMeta};
use crate::sys::xsk::{PACKET_CONTINUES, TX_METADATA, TxMetadata, Xsk};
use crate::umem::{Frame, Umem};
use crate::wire::checksum::{Accumulator, finish, fold, pseudo_header};
use crate::wire::{
    HEADERS_BYTES, HeaderFields, UDP_PAYLOAD_BYTES_MAX, udp, write_checksum, write_headers,
};

/// Offset of a packet in its first frame, and of its continuation in the others:
/// room for TX metadata, which the kernel demands in front of every descriptor,
/// rounded up to a cache line.
const FRAME_OFFSET_BYTES: usize = 64;

/// Without progress for that long, the kernel is kicked again: drivers may stall until polled.
const STALL_PATIENCE: Duration = Duration::from_micros(150);

/// After `ENETDOWN`, kicks pause that long.
const LINK_DOWN_PAUSE: Duration = Duration::from_millis(10);

/// Most kicks of one flush. With 32 frames a kick, the smallest budget, that is 2048 frames.
const KICKS_PER_FLUSH_MAX: u32 = 64;

/// Hop limit of what we send: the value recommended by IANA and used by the kernel.
const HOP_LIMIT: u8 = 64;

/// Where the checksum lies in the UDP header.
const CHECKSUM_OFFSET_BYTES: u16 = 6;

const _: () = assert!(TxMetadata::LEN <= FRAME_OFFSET_BYTES);

/// What a flush found out about the device.
#[derive(Debug)]
pub(super) enum Flushed {
    /// Nothing in particular.
    Fine,
    /// The kernel took frames, or had nothing to object to.
    Kicked,
    /// The interface is down (`ENETDOWN`): the frames stay, and kicks pause.
    LinkDown,
    /// The device, or the binding to it, is gone.
    Gone(io::Error),
}

/// The transmit side of one socket.
#[derive(Debug)]
pub(super) struct Transmitter {
    source_port: SourcePort,
    /// The device, or the kernel in its place, writes the UDP checksum.
    checksum_offload: bool,
    zero_copy: bool,
    /// Payload bytes that fit the frames of one packet.
    frames_payload_max: usize,
    /// Bytes of a frame that a packet can use.
    frame_room: usize,
    /// Frames of one packet at hand, kept to reuse the memory.
    frames: Vec<Frame>,
    /// When the kernel last took or completed a frame.
    progress: Instant,
    /// Completions were drained since the last kick, so the send buffer has room again.
    completed: bool,
    /// No frame was with the kernel after the last flush.
    idle: bool,
    /// No kicks before this.
    paused_until: Option<Instant>,
    kicks: u64,
}

impl Transmitter {
    /// A transmit side that sends from `source_port`.
    pub(super) fn new(
        source_port: SourcePort,
        frame_size_bytes: u32,
        multi_buffer: bool,
        zero_copy: bool,
        checksum_offload: bool,
        now: Instant,
    ) -> Self {
        let frame_room = frame_size_bytes as usize - FRAME_OFFSET_BYTES;
        let frames = if multi_buffer { FRAMES_PER_PACKET_MAX } else { 1 };
        Self {
            source_port,
            checksum_offload,
            zero_copy,
            frames_payload_max: (frames * frame_room - HEADERS_BYTES).min(UDP_PAYLOAD_BYTES_MAX),
            frame_room,
            frames: Vec::with_capacity(FRAMES_PER_PACKET_MAX),
            progress: now,
            completed: false,
            idle: true,
            paused_until: None,
            kicks: 0,
        }
    }

    /// The largest UDP payload that the frames of one packet hold, in bytes.
    pub(super) fn payload_max(&self) -> usize {
        self.frames_payload_max
    }

    /// Kicks so far.
    pub(super) fn kicks(&self) -> u64 {
        self.kicks
    }

    /// How many datagrams of `payload_max` bytes will certainly find room.
    pub(super) fn capacity(&self, rings: &Rings, umem: &Umem, payload_max: usize) -> usize {
        let frames = umem.free_count().min(rings.tx_room_known()) as usize;
        frames / self.frames_for(payload_max)
    }

    /// Writes one datagram into frames and onto the TX ring; false if there is no room.
    ///
    /// # Panics
    /// If the payload exceeds [`payload_max`](Self::payload_max).
    pub(super) fn place(
        &mut self,
        rings: &mut Rings,
        umem: &mut Umem,
        hop: &NextHop,
        meta: &TxMeta,
        payload: &[u8],
        counters: &mut DatapathCounters,
    ) -> bool {
        assert!(payload.len() <= self.frames_payload_max, "larger than the frames of a packet");
        let wanted = self.frames_for(payload.len());
        if (rings.tx_room(wanted as u32) as usize) < wanted {
            return false;
        }
        if (umem.free_count() as usize) < wanted {
            return false;
        }
        self.frames.extend((0..wanted).map_while(|_| umem.take()));
        debug_assert_eq!(self.frames.len(), wanted);
        self.write(umem, hop, meta, payload);
        let mut left = HEADERS_BYTES + payload.len();
        let mut options = if self.checksum_offload { TX_METADATA } else { 0 };
        for frame in self.frames.drain(..) {
            let len = left.min(self.frame_room);
            left -= len;
            if left > 0 {
                options |= PACKET_CONTINUES;
            }
            rings.push_tx(umem, frame, FRAME_OFFSET_BYTES as u32, len as u32, options);
            options = 0;
        }
        counters.tx_datagrams += 1;
        counters.tx_bytes += payload.len() as u64;
        counters.copied_bytes += payload.len() as u64;
        true
    }

    /// Takes back the frames of packets that have left.
    pub(super) fn drain_completions(&mut self, rings: &mut Rings, umem: &mut Umem, now: Instant) {
        if rings.drain_completions(umem) > 0 {
            self.completed = true;
            self.progress = now;
        }
    }

    /// Whether packets wait in the TX ring for a kick that is not due yet.
    pub(super) fn is_waiting(&self, rings: &mut Rings) -> bool {
        rings.tx_unconsumed() > 0
    }

    /// Publishes what was placed and kicks the kernel if that is needed and useful now.
    pub(super) fn flush(
        &mut self,
        xsk: &Xsk,
        rings: &mut Rings,
        umem: &mut Umem,
        counters: &mut DatapathCounters,
        now: Instant,
    ) -> Flushed {
        let fresh = rings.commit_tx();
        if fresh && std::mem::take(&mut self.idle) {
            self.progress = now;
        }
        let (unconsumed, outstanding) = (rings.tx_unconsumed(), umem.census().tx);
        self.idle = outstanding == 0;
        // In copy mode the kernel needs us for what it has not taken; a
        // zero-copy driver may also forget to complete.
        let waiting = unconsumed > 0 || (self.zero_copy && outstanding > 0);
        if !waiting || self.paused_until.is_some_and(|until| now < until) {
            return Flushed::Fine;
        }
        let stalled = now.saturating_duration_since(self.progress) >= STALL_PATIENCE;
        let useful = unconsumed > 0 && (fresh || self.completed) && rings.tx_needs_wakeup();
        if !stalled && !useful {
            return Flushed::Fine;
        }
        self.completed = false;
        self.kick(xsk, rings, umem, counters, now)
    }

    fn kick(
        &mut self,
        xsk: &Xsk,
        rings: &mut Rings,
        umem: &mut Umem,
        counters: &mut DatapathCounters,
        now: Instant,
    ) -> Flushed {
        self.progress = now;
        self.paused_until = None;
        let mut left = rings.tx_unconsumed();
        for _ in 0..KICKS_PER_FLUSH_MAX {
            counters.system_calls += 1;
            self.kicks += 1;
            let result = xsk.kick_tx();
            let left_before = std::mem::replace(&mut left, rings.tx_unconsumed());
            self.drain_completions(rings, umem, now);
            let Err(error) = result else { return Flushed::Kicked };
            match error.raw_os_error() {
                // More frames than one call takes, a full send buffer or device
                // queue, or a packet that the device's queue dropped (EBUSY,
                // ENOBUFS): normal. EINTR: a signal came first.
                Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR) => {}
                Some(libc::ENETDOWN) => {
                    self.paused_until = Some(now + LINK_DOWN_PAUSE);
                    return Flushed::LinkDown;
                }
                Some(libc::ENXIO | libc::ENODEV | libc::EBADF | libc::ENOTCONN) => {
                    return Flushed::Gone(error);
                }
                // One packet that the kernel could not take (no memory for the
                // skb, too many fragments): it is skipped or tried again; count it.
                _ => counters.tx_drop_io += 1,
            }
            if self.zero_copy || left == 0 || left >= left_before {
                break;
            }
        }
        Flushed::Kicked
    }

    fn frames_for(&self, payload_len: usize) -> usize {
        (HEADERS_BYTES + payload_len).div_ceil(self.frame_room)
    }

    /// Writes headers, payload and checksum into `self.frames`.
    fn write(&mut self, umem: &mut Umem, hop: &NextHop, meta: &TxMeta, payload: &[u8]) {
        let fields = self.header_fields(hop, meta);
        let mut headers = [0; HEADERS_BYTES];
        let headers_sum = write_headers(&mut headers, &fields, payload.len());
        let mut sum = Accumulator::new(headers_sum);
        let offload = self.checksum_offload;
        let mut copy = |target: &mut [u8], chunk: &[u8]| {
            if offload {
                target[..chunk.len()].copy_from_slice(chunk);
            } else {
                sum.copy(target, chunk);
            }
        };
        let (chunk, mut rest) =
            payload.split_at(payload.len().min(self.frame_room - HEADERS_BYTES));
        let (first, others) = self.frames.split_first_mut().expect("a packet has a frame");
        copy(&mut umem.bytes_mut(first)[FRAME_OFFSET_BYTES + HEADERS_BYTES..], chunk);
        for frame in others {
            let chunk;
            (chunk, rest) = rest.split_at(rest.len().min(self.frame_room));
            copy(&mut umem.bytes_mut(frame)[FRAME_OFFSET_BYTES..], chunk);
        }
        debug_assert!(rest.is_empty(), "the frames were counted to hold the payload");
        let (metadata, packet) = umem.bytes_mut(first).split_at_mut(FRAME_OFFSET_BYTES);
        let checksum = if offload {
            let request = TxMetadata {
                checksum_start: udp::UDP_OFFSET_BYTES as u16,
                checksum_offset: CHECKSUM_OFFSET_BYTES,
            };
            metadata[FRAME_OFFSET_BYTES - TxMetadata::LEN..].copy_from_slice(&request.to_bytes());
            // The device adds the rest to what stands in the field.
            let udp_len = (udp::HEADER_BYTES + payload.len()) as u16;
            fold(pseudo_header(&fields.src, &fields.dst, udp_len))
        } else {
            finish(sum.sum())
        };
        write_checksum(&mut headers, checksum);
        packet[..HEADERS_BYTES].copy_from_slice(&headers);
    }

    fn header_fields(&mut self, hop: &NextHop, meta: &TxMeta) -> HeaderFields {
        HeaderFields {
            src_mac: hop.src_mac,
            dst_mac: hop.dst_mac,
            src: hop.src,
            dst: *meta.remote.ip(),
            src_port: self.source_port.towards(hop.src, &meta.remote),
            dst_port: meta.remote.port(),
            traffic_class: meta.ecn as u8,
            hop_limit: HOP_LIMIT,
            flow_label: 0,
        }
    }
}

#[cfg(all(test, not(stoq_loom)))]
mod tests {
    use super::*;
    use crate::datapath::Ecn;
    use crate::datapath::af_xdp::rings::kernel_end::{KernelEnd, rings};
    use crate::sys::xsk::RingSizes;
    use crate::wire::parse_udp;
    use std::net::{Ipv6Addr, SocketAddrV6};

    const SRC: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const DST: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
    const HOP: NextHop = NextHop { src: SRC, src_mac: [2; 6], dst_mac: [4; 6] };

    struct Fixture {
        umem: Umem,
        rings: Rings,
        kernel: KernelEnd,
        transmitter: Transmitter,
        counters: DatapathCounters,
    }

    impl Fixture {
        fn new(multi_buffer: bool, offload: bool) -> Self {
            let sizes = RingSizes { fill: 4, completion: 32, rx: 4, tx: 32 };
            let (rings, kernel) = rings(sizes, u32::MAX - 20);
            Self {
                umem: Umem::new(2048, 32).expect("memory"),
                rings,
                kernel,
                transmitter: Transmitter::new(
                    SourcePort::fixed(4433),
                    2048,
                    multi_buffer,
                    false,
                    offload,
                    Instant::now(),
                ),
                counters: DatapathCounters::default(),
            }
        }

        fn place(&mut self, payload: &[u8]) -> bool {
            let meta =
                TxMeta { remote: SocketAddrV6::new(DST, 999, 0, 0), local: None, ecn: Ecn::Ect0 };
            let Self { umem, rings, transmitter, counters, .. } = self;
            let placed = transmitter.place(rings, umem, &HOP, &meta, payload, counters);
            umem.assert_conserved(0);
            placed
        }

        /// What the device sends: the whole packet, and the options of its descriptors.
        fn send(&mut self) -> (Vec<u8>, Vec<u32>) {
            self.rings.commit_tx();
            let sent = self.kernel.send(&self.umem, usize::MAX);
            let bytes = sent.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            self.transmitter.drain_completions(&mut self.rings, &mut self.umem, Instant::now());
            self.umem.assert_conserved(0);
            (bytes, sent.iter().map(|(_, options)| *options).collect())
        }

        fn capacity(&self, payload_max: usize) -> usize {
            self.transmitter.capacity(&self.rings, &self.umem, payload_max)
        }
    }

    /// RFC 1071 over pseudo-header and UDP packet: all ones when right.
    fn naive_sum(packet: &[u8]) -> u16 {
        let mut sum = 17 + (packet.len() as u32 - 54);
        for word in packet[22..54].chunks(2).chain(packet[54..].chunks(2)) {
            sum += u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn a_datagram_becomes_a_packet_with_a_right_checksum() {
        for len in [0, 1, 2, 3, 1199, 1200, 1452, 1922] {
            let mut fixture = Fixture::new(false, false);
            let payload: Vec<u8> = (0..len).map(|i| (i * 31) as u8).collect();
            assert!(fixture.place(&payload));
            let (packet, options) = fixture.send();
            assert_eq!(options, [0]);
            let parsed = parse_udp(&packet, packet.len()).expect("well-formed");
            assert_eq!((parsed.src, parsed.dst), (SRC, DST));
            assert_eq!((parsed.src_port, parsed.dst_port), (4433, 999));
            assert_eq!(parsed.traffic_class, Ecn::Ect0 as u8);
            assert_eq!(packet[parsed.payload_offset..], payload[..]);
            assert_eq!(naive_sum(&packet), 0xffff, "{len}");
        }
    }

    #[test]
    fn a_long_datagram_spans_frames() {
        for len in [1923, 1924, 5001, 17 * 1984 - 62] {
            let mut fixture = Fixture::new(true, false);
            let payload: Vec<u8> = (0..len).map(|i| (i * 13 + i / 256) as u8).collect();
            assert!(fixture.place(&payload));
            let (packet, options) = fixture.send();
            let frames = (len + HEADERS_BYTES).div_ceil(2048 - 64);
            let mut expected = vec![PACKET_CONTINUES; frames - 1];
            expected.push(0);
            assert_eq!(options, expected);
            assert_eq!(packet[HEADERS_BYTES..], payload[..]);
            assert_eq!(naive_sum(&packet), 0xffff, "{len}");
        }
    }

    #[test]
    fn a_sum_of_zero_is_sent_as_all_ones() {
        let mut fixture = Fixture::new(false, false);
        assert!(fixture.place(&[0, 0]));
        let (packet, _) = fixture.send();
        // Make the payload what the checksum was: then everything adds up to zero.
        let payload = [packet[60], packet[61]];
        assert!(fixture.place(&payload));
        let (packet, _) = fixture.send();
        assert_eq!(packet[60..62], [0xff, 0xff]);
        assert_eq!(naive_sum(&packet), 0xffff);
    }

    #[test]
    fn offload_leaves_the_pseudo_header_sum_and_a_request() {
        let mut fixture = Fixture::new(true, true);
        assert!(fixture.place(&[9; 4000]));
        fixture.rings.commit_tx();
        let Fixture { umem, kernel, .. } = &mut fixture;
        let sent = kernel.send(umem, usize::MAX);
        let options: Vec<_> = sent.iter().map(|(_, options)| *options).collect();
        assert_eq!(options, [TX_METADATA | PACKET_CONTINUES, PACKET_CONTINUES, 0]);
        let packet: Vec<u8> = sent.into_iter().flat_map(|(bytes, _)| bytes).collect();
        let mut with_zero = packet.clone();
        with_zero[60..62].fill(0);
        let covered = naive_sum(&with_zero);
        // What the device does: adds up from `checksum_start`, which includes the field.
        let mut sum = 0_u32;
        for word in packet[udp::UDP_OFFSET_BYTES..].chunks(2) {
            sum += u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        assert_eq!(sum as u16, covered, "field + rest = pseudo-header + rest");
    }

    #[test]
    fn metadata_lies_right_in_front_of_the_packet() {
        let mut fixture = Fixture::new(false, true);
        assert!(fixture.place(b"x"));
        fixture.rings.commit_tx();
        let descriptor = fixture.kernel.tx.pop().expect("one descriptor");
        let len = TxMetadata::LEN;
        let metadata = fixture.umem.read_as_kernel(descriptor.addr - len as u64, len);
        let expected = TxMetadata { checksum_start: 54, checksum_offset: 6 }.to_bytes();
        assert_eq!(metadata, expected);
    }

    #[test]
    fn capacity_counts_frames_and_place_keeps_the_promise() {
        let mut fixture = Fixture::new(true, false);
        assert_eq!(fixture.capacity(1452), 32);
        assert_eq!(fixture.capacity(5000), 10, "three frames each");
        for placed in 0..10 {
            assert!(fixture.capacity(5000) >= 10 - placed);
            assert!(fixture.place(&[0; 5000]), "{placed}");
        }
        assert_eq!(fixture.capacity(5000), 0);
        assert!(!fixture.place(&[0; 5000]), "two frames are left");
        assert!(fixture.place(&[0; 3000]));
        assert!(!fixture.place(&[]), "none is left");
        assert_eq!(fixture.counters.tx_datagrams, 11);
        fixture.send();
        assert_eq!(fixture.umem.free_count(), 32);
        assert!(fixture.place(&[0; 5000]));
    }
}
