//! The header decoder: Ethernet II → IPv6 → UDP, for the XDP program and for
//! userspace alike.
//!
//! It only says what a packet is; whether the packet is ours is
//! [`judge`](mod@crate::judge)'s business. Every offset is a constant, because an IPv6
//! packet with any extension header is passed to the kernel: the verifier then
//! sees fixed bounds, and an attacker finds no chain to walk.

/// `EtherType` of IPv6 (RFC 2464 §3).
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// `EtherType`s of a VLAN tag: 802.1Q, 802.1ad, and the older 0x9100 for the outer tag.
pub const ETHERTYPES_VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

/// Where the IPv6 header begins: after an untagged Ethernet II header.
pub const IPV6_OFFSET_BYTES: usize = 14;
/// Where the UDP header begins: after an IPv6 header without extension headers (RFC 8200 §3).
pub const UDP_OFFSET_BYTES: usize = IPV6_OFFSET_BYTES + 40;
/// Where the UDP payload begins.
pub const UDP_PAYLOAD_OFFSET_BYTES: usize = UDP_OFFSET_BYTES + UDP_HEADER_BYTES as usize;
/// Size of a UDP header (RFC 768).
pub const UDP_HEADER_BYTES: u16 = 8;

const NEXT_HEADER_UDP: u8 = 17;
const NEXT_HEADER_FRAGMENT: u8 = 44;
const NEXT_HEADER_ICMPV6: u8 = 58;

/// Bounds-checked access to a packet, with or without a slice behind it.
pub trait Packet {
    /// The `N` bytes at `offset_bytes`, or `None` where they are not (all)
    /// readable. Inlined into eBPF this is the comparison with `data_end` that
    /// the verifier asks for; [`decode`] asks only for even offsets and sizes,
    /// which such an implementation may use.
    fn read<const N: usize>(&self, offset_bytes: usize) -> Option<[u8; N]>;

    /// Length of the whole packet in bytes, including what [`read`](Self::read)
    /// cannot reach (the further buffers of a multi-buffer packet).
    fn len_bytes(&self) -> usize;
}

impl Packet for [u8] {
    #[inline]
    fn read<const N: usize>(&self, offset_bytes: usize) -> Option<[u8; N]> {
        self.get(offset_bytes..)?.first_chunk().copied()
    }

    #[inline]
    fn len_bytes(&self) -> usize {
        self.len()
    }
}

/// An IPv6 address in network byte order, held as two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Address {
    first: u64,
    last: u64,
}

impl Address {
    /// `::`, which stands for any address in the port map.
    pub const UNSPECIFIED: Self = Self { first: 0, last: 0 };

    /// The address with these octets (those of `Ipv6Addr::octets`).
    #[inline(always)]
    #[must_use]
    pub const fn from_octets(octets: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
        Self {
            first: u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            last: u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
        }
    }

    /// Its octets.
    #[must_use]
    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d, e, f, g, h] = self.first.to_ne_bytes();
        let [i, j, k, l, m, n, o, p] = self.last.to_ne_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    /// Whether it is a multicast address (RFC 4291 §2.7).
    #[inline(always)]
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.first.to_ne_bytes()[0] == 0xff
    }

    #[inline(always)]
    fn read<P: Packet + ?Sized>(packet: &P, offset_bytes: usize) -> Option<Self> {
        let first = u64::from_ne_bytes(packet.read(offset_bytes)?);
        let last = u64::from_ne_bytes(packet.read(offset_bytes + 8)?);
        Some(Self { first, last })
    }
}

/// What a packet turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded {
    /// Ends (or its first buffer ends) within one of the three headers.
    Truncated,
    /// Another `EtherType`: ARP, IPv4, LLDP …; or the version field is not 6.
    NotIpv6,
    /// Carries a VLAN tag in the packet (one that the NIC stripped is invisible here).
    Vlan,
    /// Carries an IPv6 extension header other than the fragment header:
    /// hop-by-hop, routing, destination options, AH, ESP, mobility, HIP, Shim6
    /// or an experimental one (RFC 7045 §4).
    ExtensionHeader,
    /// A fragment, first or later (RFC 8200 §4.5).
    Fragment,
    /// `ICMPv6`: neighbour discovery, packet-too-big, echo (RFC 4443).
    Icmpv6,
    /// TCP and every other upper-layer protocol.
    OtherProtocol,
    /// UDP directly after the IPv6 header.
    Udp(UdpDatagram),
}

/// The fields of an IPv6/UDP packet; nothing about them has been checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpDatagram {
    /// IPv6 source address.
    pub source: Address,
    /// IPv6 destination address.
    pub destination: Address,
    /// UDP source port.
    pub source_port: u16,
    /// UDP destination port.
    pub destination_port: u16,
    /// ECN codepoint: the two low bits of the traffic class (RFC 3168 §5).
    pub ecn: u8,
    /// Payload length field of the IPv6 header, in bytes.
    pub ipv6_payload_bytes: u16,
    /// Length field of the UDP header (header included), in bytes.
    pub udp_bytes: u16,
    /// UDP checksum field.
    pub checksum: u16,
}

impl UdpDatagram {
    /// Offset of the UDP payload from the start of the Ethernet header.
    pub const PAYLOAD_OFFSET_BYTES: usize = UDP_PAYLOAD_OFFSET_BYTES;

    /// Whether the length fields agree with each other and fit into a packet of
    /// `packet_bytes` (link-layer padding behind the datagram is allowed). The
    /// value zero that jumbograms use (RFC 2675 §4) does not: they carry an
    /// extension header and never get here.
    #[inline(always)]
    #[must_use]
    pub const fn lengths_agree(&self, packet_bytes: usize) -> bool {
        self.udp_bytes >= UDP_HEADER_BYTES
            && self.udp_bytes == self.ipv6_payload_bytes
            && UDP_OFFSET_BYTES + self.ipv6_payload_bytes as usize <= packet_bytes
    }

    /// Whether the checksum field is set; zero is not allowed over IPv6 (RFC 8200 §8.1).
    #[inline(always)]
    #[must_use]
    pub const fn has_checksum(&self) -> bool {
        self.checksum != 0
    }
}

/// Says what `packet` is. Takes any bytes whatsoever.
#[inline(always)]
#[must_use]
pub fn decode<P: Packet + ?Sized>(packet: &P) -> Decoded {
    let Some(ethertype) = packet.read::<2>(12) else { return Decoded::Truncated };
    let ethertype = u16::from_be_bytes(ethertype);
    if ethertype != ETHERTYPE_IPV6 {
        let [a, b, c] = ETHERTYPES_VLAN;
        return if ethertype == a || ethertype == b || ethertype == c {
            Decoded::Vlan
        } else {
            Decoded::NotIpv6
        };
    }
    decode_ipv6(packet)
}

#[inline(always)]
fn decode_ipv6<P: Packet + ?Sized>(packet: &P) -> Decoded {
    if packet.read::<2>(UDP_OFFSET_BYTES - 2).is_none() {
        return Decoded::Truncated;
    }
    let Some([version_class, class_flow, _, _, length_high, length_low, next_header, _]) =
        packet.read::<8>(IPV6_OFFSET_BYTES)
    else {
        return Decoded::Truncated;
    };
    if version_class >> 4 != 6 {
        return Decoded::NotIpv6;
    }
    match next_header {
        NEXT_HEADER_UDP => {}
        NEXT_HEADER_FRAGMENT => return Decoded::Fragment,
        NEXT_HEADER_ICMPV6 => return Decoded::Icmpv6,
        other if is_extension_header(other) => return Decoded::ExtensionHeader,
        _ => return Decoded::OtherProtocol,
    }
    let Some(destination) = Address::read(packet, IPV6_OFFSET_BYTES + 24) else {
        return Decoded::Truncated;
    };
    let Some(source) = Address::read(packet, IPV6_OFFSET_BYTES + 8) else {
        return Decoded::Truncated;
    };
    let Some([s0, s1, d0, d1, l0, l1, c0, c1]) = packet.read::<8>(UDP_OFFSET_BYTES) else {
        return Decoded::Truncated;
    };
    Decoded::Udp(UdpDatagram {
        source,
        destination,
        source_port: u16::from_be_bytes([s0, s1]),
        destination_port: u16::from_be_bytes([d0, d1]),
        ecn: (class_flow >> 4) & 0b11,
        ipv6_payload_bytes: u16::from_be_bytes([length_high, length_low]),
        udp_bytes: u16::from_be_bytes([l0, l1]),
        checksum: u16::from_be_bytes([c0, c1]),
    })
}

/// Whether IANA lists `next_header` as an IPv6 extension header type (the
/// fragment header, 44, has its own answer).
#[inline(always)]
const fn is_extension_header(next_header: u8) -> bool {
    matches!(next_header, 0 | 43 | 50 | 51 | 60 | 135 | 139 | 140 | 253 | 254)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet() -> [u8; 70] {
        let mut packet = [0_u8; 70];
        packet[12..14].copy_from_slice(&[0x86, 0xdd]);
        packet[14..18].copy_from_slice(&[0x60, 0x2f, 0xff, 0xff]); // traffic class 0x02: ECT(0)
        packet[18..22].copy_from_slice(&[0, 16, 17, 64]);
        packet[22..38].copy_from_slice(&[0x11; 16]);
        packet[38..54].copy_from_slice(&[0x22; 16]);
        packet[54..62].copy_from_slice(&[0x12, 0x34, 0x01, 0xbb, 0, 16, 0xbe, 0xef]);
        packet
    }

    #[test]
    fn reads_every_field() {
        assert_eq!(
            decode(&packet()[..]),
            Decoded::Udp(UdpDatagram {
                source: Address::from_octets([0x11; 16]),
                destination: Address::from_octets([0x22; 16]),
                source_port: 0x1234,
                destination_port: 443,
                ecn: 0b10,
                ipv6_payload_bytes: 16,
                udp_bytes: 16,
                checksum: 0xbeef,
            })
        );
    }

    #[test]
    fn every_ecn_codepoint() {
        for ecn in 0..4 {
            let mut packet = packet();
            packet[15] = 0xc0 | (ecn << 4) | 0x0f;
            let Decoded::Udp(udp) = decode(&packet[..]) else { panic!("not UDP") };
            assert_eq!(udp.ecn, ecn);
        }
    }

    #[test]
    fn truncated_at_every_length() {
        let packet = packet();
        for len in 0..UDP_PAYLOAD_OFFSET_BYTES {
            assert_eq!(decode(&packet[..len]), Decoded::Truncated, "{len} bytes");
        }
        assert!(matches!(decode(&packet[..UDP_PAYLOAD_OFFSET_BYTES]), Decoded::Udp(_)));
    }

    #[test]
    fn lengths() {
        let Decoded::Udp(udp) = decode(&packet()[..]) else { panic!("not UDP") };
        assert!(udp.lengths_agree(70));
        assert!(udp.lengths_agree(71), "padding");
        assert!(!udp.lengths_agree(69), "cut short");
        assert!(!UdpDatagram { udp_bytes: 15, ..udp }.lengths_agree(70));
        assert!(!UdpDatagram { udp_bytes: 17, ..udp }.lengths_agree(71));
        assert!(
            !UdpDatagram { udp_bytes: 7, ipv6_payload_bytes: 7, ..udp }.lengths_agree(70),
            "shorter than its header"
        );
        assert!(!UdpDatagram { udp_bytes: 0, ipv6_payload_bytes: 0, ..udp }.lengths_agree(70));
        assert!(UdpDatagram { udp_bytes: 8, ipv6_payload_bytes: 8, ..udp }.lengths_agree(62));
        let full = UdpDatagram { udp_bytes: 65535, ipv6_payload_bytes: 65535, ..udp };
        assert!(full.lengths_agree(54 + 65535));
        assert!(!full.lengths_agree(54 + 65534));
    }
}
