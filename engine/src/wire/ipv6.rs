//! The IPv6 header (RFC 8200 §3), without extension headers.

use std::net::Ipv6Addr;

/// Size of the fixed header.
pub const HEADER_BYTES: usize = 40;
/// Next header value of UDP.
pub const NEXT_HEADER_UDP: u8 = 17;
/// Largest flow label: 20 bits (RFC 6437 §2).
pub const FLOW_LABEL_MAX: u32 = 0xf_ffff;

/// The fields of an IPv6 header to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Header {
    /// DSCP (6 bits) and ECN (2 bits).
    pub traffic_class: u8,
    /// 20 bits; zero if the sender doesn't label flows.
    pub flow_label: u32,
    /// Bytes behind this header.
    pub payload_len: u16,
    /// Protocol of the payload.
    pub next_header: u8,
    /// Decremented by every router.
    pub hop_limit: u8,
    /// Source address.
    pub src: Ipv6Addr,
    /// Destination address.
    pub dst: Ipv6Addr,
}

impl Ipv6Header {
    /// The header's bytes. Bits of the flow label above 20 are left out.
    #[inline]
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let first =
            6 << 28 | u32::from(self.traffic_class) << 20 | (self.flow_label & FLOW_LABEL_MAX);
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&first.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.payload_len.to_be_bytes());
        bytes[6] = self.next_header;
        bytes[7] = self.hop_limit;
        bytes[8..24].copy_from_slice(&self.src.octets());
        bytes[24..40].copy_from_slice(&self.dst.octets());
        bytes
    }
}

/// The traffic class of a header: DSCP and ECN.
#[inline]
#[must_use]
pub const fn traffic_class(header: &[u8; HEADER_BYTES]) -> u8 {
    header[0] << 4 | header[1] >> 4
}

/// The hop limit of a header.
#[inline]
#[must_use]
pub const fn hop_limit(header: &[u8; HEADER_BYTES]) -> u8 {
    header[7]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Ipv6Header {
        Ipv6Header {
            traffic_class: 0b1010_1110,
            flow_label: 0xb_eef5,
            payload_len: 0x1234,
            next_header: NEXT_HEADER_UDP,
            hop_limit: 63,
            src: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
            dst: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2),
        }
    }

    #[test]
    fn fields_are_where_rfc_8200_puts_them() {
        let bytes = example().to_bytes();
        assert_eq!(bytes[..8], [0x6a, 0xeb, 0xee, 0xf5, 0x12, 0x34, 17, 63]);
        assert_eq!(bytes[8..12], [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!((bytes[23], bytes[39]), (1, 2));
        assert_eq!((traffic_class(&bytes), hop_limit(&bytes)), (0b1010_1110, 63));
    }

    #[test]
    fn flow_label_cannot_reach_the_traffic_class() {
        let bytes = Ipv6Header { flow_label: u32::MAX, traffic_class: 0, ..example() }.to_bytes();
        assert_eq!(bytes[..4], [0x60, 0x0f, 0xff, 0xff]);
    }
}
