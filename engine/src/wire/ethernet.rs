//! Ethernet II framing (RFC 2464 for IPv6 over it).

/// A link-layer address (EUI-48), in transmission order.
pub type MacAddr = [u8; 6];

/// Size of an untagged Ethernet II header.
pub const HEADER_BYTES: usize = 14;
/// `EtherType` of IPv6 (RFC 2464 §3).
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// `EtherType`s of a VLAN tag: 802.1Q, 802.1ad, and the older 0x9100 of an outer tag.
pub const ETHERTYPES_VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];

/// The `EtherType` of a frame, or `None` if it ends before it.
#[inline]
#[must_use]
pub fn ethertype(frame: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*frame.get(12..)?.first_chunk()?))
}

/// Whether an `EtherType` announces a VLAN tag.
#[inline]
#[must_use]
pub fn is_vlan(ethertype: u16) -> bool {
    ETHERTYPES_VLAN.contains(&ethertype)
}

/// The header of an untagged IPv6 frame.
#[inline]
#[must_use]
pub fn header(source: MacAddr, destination: MacAddr) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0..6].copy_from_slice(&destination);
    header[6..12].copy_from_slice(&source);
    header[12..14].copy_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destination_comes_first() {
        let header = header([1; 6], [2; 6]);
        assert_eq!(header, [2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 0x86, 0xdd]);
        assert_eq!(ethertype(&header), Some(ETHERTYPE_IPV6));
        assert_eq!(ethertype(&header[..13]), None);
        assert_eq!(ethertype(&[]), None);
    }

    #[test]
    fn vlan_tags() {
        assert!(is_vlan(0x8100) && is_vlan(0x88a8) && is_vlan(0x9100));
        assert!(!is_vlan(ETHERTYPE_IPV6) && !is_vlan(0x0800));
    }
}
