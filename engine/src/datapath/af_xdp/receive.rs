//! From the RX ring to the turn's batch: fragments put together, headers and
//! checksum checked, one copy, and the frames back to the fill ring at once.
//!
//! Every packet ends in exactly one counter: delivered, or dropped for a named
//! reason. Its frames return to the fill ring either way.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;

use super::limits::FRAMES_PER_PACKET_MAX;
use super::rings::{Rings, RxFragment};
use crate::datapath::{DatapathCounters, Ecn, RxBatch};
use crate::umem::Umem;
use crate::wire::checksum::{Accumulator, fold, is_partial, pseudo_header};
use crate::wire::{ParseError, UdpPacket, parse_udp, udp};

/// Most fragments of a received packet that are kept; a longer packet is dropped and counted.
/// One more than we send: the kernel may leave the first frame nearly empty.
const FRAGMENTS_MAX: usize = FRAMES_PER_PACKET_MAX + 1;

/// What a packet turned out to be.
enum Judgement {
    Ours(UdpPacket),
    Malformed,
    WrongChecksum,
    NotOurs,
}

/// The receive side of one socket.
#[derive(Debug)]
pub(super) struct Receiver {
    local: SocketAddrV6,
    /// The ports of all shards: what arrives for another one is handed over by its shard.
    ports: Arc<[u16]>,
    ifindex: u32,
    /// Fragments of the packet being put together; they may arrive over several turns.
    fragments: Vec<RxFragment>,
    /// The packet at hand has too many fragments: the rest of it is thrown away too.
    overlong: bool,
    /// Packets accepted with only the pseudo-header summed.
    partial_checksums: u64,
}

impl Receiver {
    /// Receives what is sent to the address of `local` and one of `ports`; an unspecified address
    /// means each of the interface's.
    pub(super) fn new(local: SocketAddrV6, ports: Arc<[u16]>, ifindex: u32) -> Self {
        let fragments = Vec::with_capacity(FRAGMENTS_MAX);
        Self { local, ports, ifindex, fragments, overlong: false, partial_checksums: 0 }
    }

    /// Datagrams whose UDP checksum was the bare pseudo-header sum: sent by a
    /// local peer that leaves the sum to a device which does not exist (veth).
    pub(super) fn partial_checksums(&self) -> u64 {
        self.partial_checksums
    }

    /// Fragments held of a packet that is not complete yet.
    #[cfg(any(test, debug_assertions))]
    pub(super) fn held_fragments(&self) -> u32 {
        self.fragments.len() as u32
    }

    /// Moves packets into `batch` until it is full or the ring is empty.
    /// Returns whether the kernel must be woken to see the returned frames.
    pub(super) fn receive(
        &mut self,
        rings: &mut Rings,
        umem: &mut Umem,
        addresses: &[Ipv6Addr],
        batch: &mut RxBatch,
        counters: &mut DatapathCounters,
    ) -> bool {
        while !batch.is_full() {
            let Some(fragment) = rings.pop_rx(umem) else { break };
            let continues = fragment.continues;
            if self.fragments.len() == FRAGMENTS_MAX {
                self.overlong = true;
            }
            if self.overlong {
                rings.push_fill(umem, fragment.frame);
            } else {
                self.fragments.push(fragment);
            }
            if continues {
                continue;
            }
            if std::mem::take(&mut self.overlong) {
                counters.rx_drop_too_long += 1;
            } else {
                self.deliver(umem, addresses, batch, counters);
            }
            for fragment in self.fragments.drain(..) {
                rings.push_fill(umem, fragment.frame);
            }
        }
        rings.release_rx();
        rings.commit_fill()
    }

    fn deliver(
        &mut self,
        umem: &Umem,
        addresses: &[Ipv6Addr],
        batch: &mut RxBatch,
        counters: &mut DatapathCounters,
    ) {
        let mut parts = [&[][..]; FRAGMENTS_MAX];
        let mut total_len = 0;
        for (part, fragment) in parts.iter_mut().zip(&self.fragments) {
            let start = fragment.offset as usize;
            *part = &umem.bytes(&fragment.frame)[start..start + fragment.len as usize];
            total_len += part.len();
        }
        let parts = &mut parts[..self.fragments.len()];
        match self.judge(parts, total_len, addresses) {
            Judgement::Ours(packet) => {
                let remote = self.remote(&packet);
                let ecn = Ecn::from_traffic_class(packet.traffic_class);
                batch.push(remote, packet.dst, ecn, parts);
                counters.rx_datagrams += 1;
                counters.rx_bytes += packet.payload_len as u64;
                counters.copied_bytes += packet.payload_len as u64;
            }
            Judgement::Malformed => counters.rx_drop_malformed += 1,
            Judgement::WrongChecksum => counters.rx_drop_checksum += 1,
            Judgement::NotOurs => counters.rx_drop_not_ours += 1,
        }
    }

    fn judge(
        &mut self,
        parts: &mut [&[u8]],
        total_len: usize,
        addresses: &[Ipv6Addr],
    ) -> Judgement {
        let packet = match parse_udp(parts[0], total_len) {
            Ok(packet) => packet,
            Err(ParseError::ZeroChecksum) => return Judgement::WrongChecksum,
            Err(_) => return Judgement::Malformed,
        };
        if !self.is_ours(&packet, addresses) {
            return Judgement::NotOurs;
        }
        let datagram = packet.datagram_range();
        cut(parts, datagram.start, datagram.len());
        let pseudo = pseudo_header(&packet.src, &packet.dst, datagram.len() as u16);
        // The partial form first: it needs no pass over the payload.
        if is_partial(packet.checksum, pseudo) {
            self.partial_checksums += 1;
        } else {
            let mut sum = Accumulator::new(pseudo);
            for part in &*parts {
                sum.add(part);
            }
            // With the field in place the sum of a good datagram is all ones (RFC 1071 §1).
            if fold(sum.sum()) != 0xffff {
                return Judgement::WrongChecksum;
            }
        }
        cut(parts, udp::HEADER_BYTES, packet.payload_len);
        Judgement::Ours(packet)
    }

    fn is_ours(&self, packet: &UdpPacket, addresses: &[Ipv6Addr]) -> bool {
        let address_is_ours = if self.local.ip().is_unspecified() {
            addresses.contains(&packet.dst)
        } else {
            packet.dst == *self.local.ip()
        };
        let port = packet.dst_port;
        address_is_ours && (port == self.local.port() || self.ports.contains(&port))
    }

    /// The sender; a link-local one is known by the interface that it was heard on (RFC 4007 §6).
    fn remote(&self, packet: &UdpPacket) -> SocketAddrV6 {
        let scope = if packet.src.is_unicast_link_local() { self.ifindex } else { 0 };
        SocketAddrV6::new(packet.src, packet.src_port, 0, scope)
    }
}

/// Shortens `parts` to `len` bytes from `start` of what they hold together.
/// Parts before and after become empty.
fn cut(parts: &mut [&[u8]], start: usize, len: usize) {
    let (mut skip, mut take) = (start, len);
    for part in parts {
        let from = skip.min(part.len());
        let to = (from + take).min(part.len());
        *part = &part[from..to];
        skip -= from;
        take -= to - from;
    }
    debug_assert_eq!(take, 0, "the headers were checked against the packet's length");
}

#[cfg(all(test, not(stoq_loom)))]
mod tests {
    use super::*;
    use crate::datapath::af_xdp::rings::kernel_end::{KernelEnd, rings};
    use crate::sys::xsk::RingSizes;
    use crate::wire::{HEADERS_BYTES, HeaderFields, write_headers};

    const SRC: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const DST: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
    const PORT: u16 = 4433;

    struct Fixture {
        umem: Umem,
        rings: Rings,
        kernel: KernelEnd,
        receiver: Receiver,
        batch: RxBatch,
        counters: DatapathCounters,
    }

    impl Fixture {
        fn new(batch_limit: usize) -> Self {
            let mut umem = Umem::new(2048, 32).expect("memory");
            let sizes = RingSizes { fill: 32, completion: 32, rx: 32, tx: 32 };
            let (mut rings, kernel) = rings(sizes, u32::MAX - 7);
            while let Some(frame) = umem.take() {
                rings.push_fill(&mut umem, frame);
            }
            rings.commit_fill();
            Self {
                umem,
                rings,
                kernel,
                receiver: Receiver::new(SocketAddrV6::new(DST, PORT, 0, 0), [PORT].into(), 7),
                batch: RxBatch::new(batch_limit, 1 << 20),
                counters: DatapathCounters::default(),
            }
        }

        fn arrive(&mut self, parts: &[&[u8]]) {
            assert!(self.kernel.receive(&mut self.umem, parts), "the rings have room");
        }

        fn receive(&mut self) {
            let Self { umem, rings, receiver, batch, counters, .. } = self;
            receiver.receive(rings, umem, &[DST], batch, counters);
            umem.assert_conserved(receiver.held_fragments());
        }
    }

    fn packet(payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; HEADERS_BYTES + payload.len()];
        let fields = HeaderFields {
            src_mac: [2, 0, 0, 0, 0, 1],
            dst_mac: [2, 0, 0, 0, 0, 2],
            src: SRC,
            dst: DST,
            src_port: 999,
            dst_port: PORT,
            traffic_class: 0b11,
            hop_limit: 64,
            flow_label: 0,
        };
        write_headers(&mut packet, &fields, payload.len());
        packet[HEADERS_BYTES..].copy_from_slice(payload);
        set_checksum(&mut packet);
        packet
    }

    /// By the letter of RFC 768 and RFC 8200 §8.1, word by word.
    fn set_checksum(packet: &mut [u8]) {
        packet[60..62].fill(0);
        let mut sum = pseudo_sum(packet);
        for word in packet[54..].chunks(2) {
            sum += u64::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        packet[60..62].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }

    fn pseudo_sum(packet: &[u8]) -> u64 {
        let words = packet[22..54].chunks(2);
        let addresses: u64 = words.map(|w| u64::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        addresses + 17 + (packet.len() as u64 - 54)
    }

    #[test]
    fn a_whole_packet_is_delivered_with_its_mark() {
        let mut fixture = Fixture::new(8);
        fixture.arrive(&[&packet(b"hello")]);
        fixture.receive();
        let datagram = fixture.batch.drain().next().expect("delivered");
        assert_eq!(&datagram.data[..], b"hello");
        assert_eq!(datagram.remote, SocketAddrV6::new(SRC, 999, 0, 0));
        assert_eq!((datagram.local, datagram.ecn), (DST, Ecn::Ce));
        assert_eq!((fixture.counters.rx_datagrams, fixture.counters.rx_bytes), (1, 5));
        assert_eq!(fixture.umem.census().fill, 32);
    }

    #[test]
    fn fragments_of_any_length_are_put_together() {
        let payload: Vec<u8> = (0..5000_u32).map(|i| (i * 7) as u8).collect();
        let whole = packet(&payload);
        for first in [62, 63, 101, 1792] {
            for second in [1, 2, 1001, 1792] {
                let mut fixture = Fixture::new(8);
                let (a, rest) = whole.split_at(first);
                let (b, rest) = rest.split_at(second);
                let mut parts = vec![a, b];
                parts.extend(rest.chunks(1791));
                fixture.arrive(&parts);
                fixture.receive();
                let datagram = fixture.batch.drain().next().expect("delivered");
                assert_eq!(datagram.data[..], payload[..], "{first} {second}");
                assert_eq!(fixture.umem.census().fill, 32);
            }
        }
    }

    #[test]
    fn trailing_ethernet_padding_is_ignored() {
        let mut fixture = Fixture::new(8);
        let mut padded = packet(b"x");
        padded.extend([0xee; 9]);
        fixture.arrive(&[&padded]);
        fixture.receive();
        assert_eq!(&fixture.batch.drain().next().expect("delivered").data[..], b"x");
    }

    #[test]
    fn a_packet_may_arrive_over_two_turns() {
        let mut fixture = Fixture::new(8);
        let whole = packet(&[5; 3000]);
        let (first, second) = whole.split_at(1700);
        // The kernel has published only the first frame so far.
        fixture.arrive(&[first, second]);
        let Fixture { umem, rings, receiver, .. } = &mut fixture;
        let fragment = rings.pop_rx(umem).expect("the first frame");
        receiver.fragments.push(fragment);
        assert_eq!(receiver.held_fragments(), 1);
        fixture.receive();
        assert_eq!(fixture.batch.drain().next().expect("delivered").data[..], [5; 3000]);
    }

    #[test]
    fn bad_packets_are_counted_by_reason_and_their_frames_return() {
        let mut fixture = Fixture::new(8);
        let good = packet(b"payload");
        let mut corrupt = good.clone();
        corrupt[HEADERS_BYTES] ^= 1;
        let mut no_checksum = good.clone();
        no_checksum[60..62].fill(0);
        let mut other_port = good.clone();
        other_port[57] ^= 1;
        let mut other_address = good.clone();
        other_address[53] ^= 1;
        let mut too_long_udp = good.clone();
        too_long_udp[58] = 0xff;
        fixture.arrive(&[&corrupt]);
        fixture.arrive(&[&no_checksum]);
        fixture.arrive(&[&other_port]);
        fixture.arrive(&[&other_address]);
        fixture.arrive(&[&too_long_udp]);
        fixture.arrive(&[&good[..40]]);
        fixture.arrive(&[&good[..10], &good[10..]]);
        fixture.receive();
        let counters = &fixture.counters;
        assert_eq!(counters.rx_drop_checksum, 2);
        assert_eq!(counters.rx_drop_not_ours, 2);
        assert_eq!(counters.rx_drop_malformed, 3, "headers must lie in the first frame");
        assert_eq!(counters.rx_datagrams, 0);
        assert!(fixture.batch.is_empty());
        assert_eq!(fixture.umem.census().fill, 32);
    }

    #[test]
    fn a_partial_checksum_is_accepted_and_counted() {
        let mut fixture = Fixture::new(8);
        let mut partial = packet(b"from a local peer");
        let mut sum = pseudo_sum(&partial);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        partial[60..62].copy_from_slice(&(sum as u16).to_be_bytes());
        fixture.arrive(&[&partial]);
        fixture.receive();
        assert_eq!(fixture.batch.len(), 1);
        assert_eq!(fixture.receiver.partial_checksums(), 1);
    }

    #[test]
    fn a_packet_of_too_many_frames_is_dropped_whole() {
        let mut fixture = Fixture::new(8);
        let whole = packet(&[1; 1000]);
        let parts: Vec<_> = whole.chunks(1062_usize.div_ceil(20)).collect();
        assert!(parts.len() > FRAGMENTS_MAX);
        fixture.arrive(&parts);
        fixture.arrive(&[&packet(b"next")]);
        fixture.receive();
        assert_eq!(fixture.counters.rx_drop_too_long, 1);
        assert_eq!(&fixture.batch.drain().next().expect("delivered").data[..], b"next");
        assert_eq!(fixture.umem.census().fill, 32);
    }

    #[test]
    fn a_full_batch_leaves_the_rest_in_the_ring() {
        let mut fixture = Fixture::new(2);
        for _ in 0..5 {
            fixture.arrive(&[&packet(b"x")]);
        }
        let mut received = 0;
        for expected in [2, 2, 1, 0] {
            fixture.receive();
            assert_eq!(fixture.batch.len(), expected);
            received += fixture.batch.drain().count();
        }
        assert_eq!(received, 5);
    }

    #[test]
    fn a_link_local_sender_has_the_scope_of_the_interface() {
        let mut fixture = Fixture::new(2);
        let mut local = packet(b"x");
        local[22..24].copy_from_slice(&[0xfe, 0x80]);
        set_checksum(&mut local);
        fixture.arrive(&[&local]);
        fixture.receive();
        assert_eq!(fixture.batch.drain().next().expect("delivered").remote.scope_id(), 7);
    }
}
