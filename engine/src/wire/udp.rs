//! Whole packets: Ethernet II, IPv6 and UDP headers read and written as one (RFC 768, RFC 8200).
//!
//! Reading is built on [`stoq_ebpf::decode`](mod@stoq_ebpf::decode), which the XDP
//! program is compiled from too: both always agree on what a packet is.

use std::net::Ipv6Addr;

use stoq_ebpf::{Decoded, UdpDatagram, decode};

use super::ethernet::{self, MacAddr};
use super::ipv6::{self, Ipv6Header, NEXT_HEADER_UDP};
use super::{HEADERS_BYTES, UDP_PAYLOAD_BYTES_MAX, checksum};
use crate::datapath::Ecn;

/// Size of a UDP header.
pub const HEADER_BYTES: usize = 8;
/// Where the IPv6 header begins.
pub const IPV6_OFFSET_BYTES: usize = ethernet::HEADER_BYTES;
/// Where the UDP header begins.
pub const UDP_OFFSET_BYTES: usize = IPV6_OFFSET_BYTES + ipv6::HEADER_BYTES;

const CHECKSUM_OFFSET_BYTES: usize = UDP_OFFSET_BYTES + 6;

/// A received UDP packet: its headers' fields, and where its payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpPacket {
    /// Source address.
    pub src: Ipv6Addr,
    /// Destination address.
    pub dst: Ipv6Addr,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Traffic class: DSCP and [`ecn`](Self::ecn).
    pub traffic_class: u8,
    /// Hop limit as it arrived.
    pub hop_limit: u8,
    /// Offset of the payload in the frame, in bytes.
    pub payload_offset: usize,
    /// Length of the payload in bytes, link-layer padding not counted.
    pub payload_len: usize,
    /// Checksum field, not verified and never zero.
    pub checksum: u16,
}

impl UdpPacket {
    /// The congestion mark (RFC 3168 §5).
    #[inline]
    #[must_use]
    pub const fn ecn(&self) -> Ecn {
        Ecn::from_traffic_class(self.traffic_class)
    }

    /// Where the UDP datagram is in the frame: what its checksum covers.
    #[inline]
    #[must_use]
    pub const fn datagram_range(&self) -> std::ops::Range<usize> {
        UDP_OFFSET_BYTES..self.payload_offset + self.payload_len
    }
}

/// Why a frame is not a UDP packet that the engine takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// Ends (or its first buffer ends) within the headers.
    #[error("the frame ends within its headers")]
    Truncated,
    /// Another `EtherType`, or a version field other than 6.
    #[error("not an IPv6 packet")]
    NotIpv6,
    /// Carries a VLAN tag that the NIC has not stripped.
    #[error("the frame carries a VLAN tag")]
    Vlan,
    /// An IPv6 extension header stands before the payload.
    #[error("the packet carries an IPv6 extension header")]
    ExtensionHeader,
    /// A fragment, first or later (RFC 8200 §4.5).
    #[error("the packet is a fragment")]
    Fragment,
    /// ICMPv6, TCP or another protocol.
    #[error("not a UDP packet")]
    NotUdp,
    /// The UDP length is below the size of its own header.
    #[error("the UDP length is shorter than the UDP header")]
    UdpLengthTooShort,
    /// The UDP length is above the IPv6 payload length.
    #[error("the UDP length is longer than the IPv6 payload")]
    UdpLengthTooLong,
    /// The IPv6 payload goes on behind the UDP datagram (the surplus area of RFC
    /// 9868): QUIC peers do not send that, and the XDP program leaves it to the kernel.
    #[error("the IPv6 payload is longer than the UDP datagram")]
    UdpSurplus,
    /// The IPv6 payload length points behind the end of the frame.
    #[error("the IPv6 payload is longer than the frame")]
    PayloadTooLong,
    /// No checksum, which IPv6 does not allow (RFC 8200 §8.1).
    #[error("the UDP checksum is zero")]
    ZeroChecksum,
}

/// Reads the headers of a frame and checks that their lengths agree.
///
/// `head` holds at least the headers: the whole frame, or the first fragment of
/// one in several buffers. `total_len` is the length of the whole frame, which
/// may end in link-layer padding. The checksum is for
/// [`checksum::verify`] to verify.
///
/// # Errors
/// The reason why the frame is not a well-formed UDP packet over plain IPv6.
#[inline]
pub fn parse_udp(head: &[u8], total_len: usize) -> Result<UdpPacket, ParseError> {
    let udp = match decode(head) {
        Decoded::Udp(udp) => udp,
        Decoded::Truncated => return Err(ParseError::Truncated),
        Decoded::NotIpv6 => return Err(ParseError::NotIpv6),
        Decoded::Vlan => return Err(ParseError::Vlan),
        Decoded::ExtensionHeader => return Err(ParseError::ExtensionHeader),
        Decoded::Fragment => return Err(ParseError::Fragment),
        Decoded::Icmpv6 | Decoded::OtherProtocol => return Err(ParseError::NotUdp),
    };
    check_lengths(&udp, total_len)?;
    if !udp.has_checksum() {
        return Err(ParseError::ZeroChecksum);
    }
    let ipv6: &[u8; ipv6::HEADER_BYTES] =
        head[IPV6_OFFSET_BYTES..].first_chunk().expect("decode has read the IPv6 header");
    Ok(UdpPacket {
        src: udp.source.octets().into(),
        dst: udp.destination.octets().into(),
        src_port: udp.source_port,
        dst_port: udp.destination_port,
        traffic_class: ipv6::traffic_class(ipv6),
        hop_limit: ipv6::hop_limit(ipv6),
        payload_offset: HEADERS_BYTES,
        payload_len: usize::from(udp.udp_bytes) - HEADER_BYTES,
        checksum: udp.checksum,
    })
}

/// [`UdpDatagram::lengths_agree`], with the reason if they do not.
#[inline]
fn check_lengths(udp: &UdpDatagram, total_len: usize) -> Result<(), ParseError> {
    if udp.lengths_agree(total_len) {
        Ok(())
    } else if usize::from(udp.udp_bytes) < HEADER_BYTES {
        Err(ParseError::UdpLengthTooShort)
    } else if udp.udp_bytes > udp.ipv6_payload_bytes {
        Err(ParseError::UdpLengthTooLong)
    } else if udp.udp_bytes < udp.ipv6_payload_bytes {
        Err(ParseError::UdpSurplus)
    } else {
        Err(ParseError::PayloadTooLong)
    }
}

/// What [`write_headers`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeaderFields {
    /// Our MAC address.
    pub src_mac: MacAddr,
    /// The next hop's MAC address.
    pub dst_mac: MacAddr,
    /// Source address.
    pub src: Ipv6Addr,
    /// Destination address.
    pub dst: Ipv6Addr,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// DSCP and ECN.
    pub traffic_class: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Flow label, 20 bits (RFC 6437); higher bits are left out.
    pub flow_label: u32,
}

/// Writes the [`HEADERS_BYTES`] of headers for a payload of `payload_len` bytes to
/// the start of `out`, the checksum field zero.
///
/// Returns the sum of the pseudo-header and the UDP header: add the payload's
/// ([`checksum::copy_and_sum`], at an even offset), [`checksum::finish`] it, and
/// [`write_checksum`] it.
///
/// # Panics
/// If `out` is shorter than the headers, or the payload longer than
/// [`UDP_PAYLOAD_BYTES_MAX`].
#[inline]
pub fn write_headers(out: &mut [u8], fields: &HeaderFields, payload_len: usize) -> u64 {
    assert!(payload_len <= UDP_PAYLOAD_BYTES_MAX, "UDP payload of {payload_len} bytes");
    let udp_len = (HEADER_BYTES + payload_len) as u16; // asserted above
    let out: &mut [u8; HEADERS_BYTES] =
        out.first_chunk_mut().expect("room for the headers: 62 bytes");
    let ipv6 = Ipv6Header {
        traffic_class: fields.traffic_class,
        flow_label: fields.flow_label,
        payload_len: udp_len,
        next_header: NEXT_HEADER_UDP,
        hop_limit: fields.hop_limit,
        src: fields.src,
        dst: fields.dst,
    };
    out[..IPV6_OFFSET_BYTES].copy_from_slice(&ethernet::header(fields.src_mac, fields.dst_mac));
    out[IPV6_OFFSET_BYTES..UDP_OFFSET_BYTES].copy_from_slice(&ipv6.to_bytes());
    let [s0, s1] = fields.src_port.to_be_bytes();
    let [d0, d1] = fields.dst_port.to_be_bytes();
    let [l0, l1] = udp_len.to_be_bytes();
    out[UDP_OFFSET_BYTES..].copy_from_slice(&[s0, s1, d0, d1, l0, l1, 0, 0]);
    checksum::pseudo_header(&fields.src, &fields.dst, udp_len)
        + checksum::word(fields.src_port)
        + checksum::word(fields.dst_port)
        + checksum::word(udp_len)
}

/// Writes the UDP checksum field of a frame that begins with [`write_headers`]' headers.
///
/// # Panics
/// If `frame` is shorter than the headers.
#[inline]
pub fn write_checksum(frame: &mut [u8], checksum: u16) {
    frame[CHECKSUM_OFFSET_BYTES..][..2].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::checksum::{Verification, copy_and_sum, finish, verify};
    use super::*;

    fn fields() -> HeaderFields {
        HeaderFields {
            src_mac: [2, 0, 0, 0, 0, 1],
            dst_mac: [2, 0, 0, 0, 0, 2],
            src: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
            dst: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
            src_port: 50000,
            dst_port: 4433,
            traffic_class: Ecn::Ect0 as u8,
            hop_limit: 64,
            flow_label: 0,
        }
    }

    fn frame(fields: &HeaderFields, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xee; HEADERS_BYTES + payload.len()];
        let sum = write_headers(&mut frame, fields, payload.len());
        let sum = sum + copy_and_sum(&mut frame[HEADERS_BYTES..], payload);
        write_checksum(&mut frame, finish(sum));
        frame
    }

    fn parse(frame: &[u8]) -> Result<UdpPacket, ParseError> {
        parse_udp(frame, frame.len())
    }

    fn changed(at: usize, bytes: &[u8]) -> Result<UdpPacket, ParseError> {
        let mut frame = frame(&fields(), b"payload!");
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        parse(&frame)
    }

    #[test]
    fn every_reason_for_refusal() {
        use ParseError as E;
        assert_eq!(changed(12, &[0x08, 0x00]), Err(E::NotIpv6));
        assert_eq!(changed(14, &[0x40]), Err(E::NotIpv6));
        assert_eq!(changed(12, &[0x81, 0x00]), Err(E::Vlan));
        for header in [0, 43, 50, 51, 60, 135, 139, 140, 253, 254] {
            assert_eq!(changed(20, &[header]), Err(E::ExtensionHeader), "{header}");
        }
        assert_eq!(changed(20, &[44]), Err(E::Fragment));
        assert_eq!(changed(20, &[58]), Err(E::NotUdp));
        assert_eq!(changed(20, &[6]), Err(E::NotUdp));
        assert_eq!(changed(58, &[0, 7]), Err(E::UdpLengthTooShort));
        assert_eq!(changed(58, &[0, 0]), Err(E::UdpLengthTooShort));
        assert_eq!(changed(58, &[0, 17]), Err(E::UdpLengthTooLong));
        assert_eq!(changed(58, &[0, 15]), Err(E::UdpSurplus));
        assert_eq!(changed(60, &[0, 0]), Err(E::ZeroChecksum));
        let mut frame = frame(&fields(), b"payload!");
        frame[18..20].copy_from_slice(&[0, 17]);
        frame[58..60].copy_from_slice(&[0, 17]);
        assert_eq!(parse(&frame), Err(E::PayloadTooLong));
    }

    #[test]
    fn truncated_at_every_length() {
        let frame = frame(&fields(), b"payload!");
        for len in 0..HEADERS_BYTES {
            assert_eq!(parse(&frame[..len]), Err(ParseError::Truncated), "{len} bytes");
            assert_eq!(
                parse_udp(&frame[..len], frame.len()),
                Err(ParseError::Truncated),
                "first fragment of {len} bytes"
            );
        }
        for len in HEADERS_BYTES..frame.len() {
            assert_eq!(parse(&frame[..len]), Err(ParseError::PayloadTooLong), "{len} bytes");
        }
        assert!(parse(&frame).is_ok());
    }

    #[test]
    fn only_the_headers_are_needed() {
        let frame = frame(&fields(), &[7; 9000]);
        let packet = parse_udp(&frame[..HEADERS_BYTES], frame.len()).expect("well-formed");
        assert_eq!((packet.payload_offset, packet.payload_len), (HEADERS_BYTES, 9000));
        assert_eq!(packet.datagram_range(), 54..frame.len());
        assert_eq!(packet.ecn(), Ecn::Ect0);
    }

    #[test]
    fn empty_and_largest_payload() {
        for len in [0, UDP_PAYLOAD_BYTES_MAX] {
            let frame = frame(&fields(), &vec![3; len]);
            assert_eq!(parse(&frame).expect("well-formed").payload_len, len);
        }
    }

    #[test]
    #[should_panic(expected = "UDP payload of 65528 bytes")]
    fn too_large_a_payload_is_a_bug() {
        write_headers(&mut [0; 62], &fields(), UDP_PAYLOAD_BYTES_MAX + 1);
    }

    prop_compose! {
        fn any_fields()(
            src_mac in any::<MacAddr>(),
            dst_mac in any::<MacAddr>(),
            src in any::<u128>(),
            dst in any::<u128>(),
            ports in any::<(u16, u16)>(),
            traffic_class in any::<u8>(),
            hop_limit in any::<u8>(),
            flow_label in 0..=ipv6::FLOW_LABEL_MAX,
        ) -> HeaderFields {
            HeaderFields {
                src_mac,
                dst_mac,
                src: src.into(),
                dst: dst.into(),
                src_port: ports.0,
                dst_port: ports.1,
                traffic_class,
                hop_limit,
                flow_label,
            }
        }
    }

    proptest! {
        #[test]
        fn reads_what_was_written(
            fields in any_fields(),
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            padding in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut frame = frame(&fields, &payload);
            frame.extend_from_slice(&padding);
            let packet = parse(&frame).expect("well-formed");
            prop_assert_eq!(packet.src, fields.src);
            prop_assert_eq!(packet.dst, fields.dst);
            prop_assert_eq!(packet.src_port, fields.src_port);
            prop_assert_eq!(packet.dst_port, fields.dst_port);
            prop_assert_eq!(packet.traffic_class, fields.traffic_class);
            prop_assert_eq!(packet.hop_limit, fields.hop_limit);
            prop_assert_eq!(&frame[packet.payload_offset..][..packet.payload_len], &payload[..]);
            prop_assert_eq!(&frame[0..6], &fields.dst_mac[..]);
            prop_assert_eq!(&frame[6..12], &fields.src_mac[..]);
            let datagram = &frame[packet.datagram_range()];
            let verification = verify(&packet.src, &packet.dst, packet.checksum, &[datagram]);
            prop_assert_eq!(verification, Verification::Valid);
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200), total in 0_usize..70000) {
            let _ = parse_udp(&bytes, total);
        }

        /// Random bytes behind valid discriminators reach the length checks.
        #[test]
        fn what_is_taken_lies_within_the_frame(
            mut bytes in proptest::collection::vec(any::<u8>(), 62..200),
            lengths in any::<(u8, u8)>(),
        ) {
            bytes[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
            bytes[18..21].copy_from_slice(&[0, lengths.0, 17]);
            bytes[58..60].copy_from_slice(&[0, lengths.1]);
            if let Ok(packet) = parse(&bytes) {
                prop_assert!(packet.payload_offset + packet.payload_len <= bytes.len());
                prop_assert_ne!(packet.checksum, 0);
            }
        }
    }
}
