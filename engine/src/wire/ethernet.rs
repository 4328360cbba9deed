//! Ethernet II framing (RFC 2464 for IPv6 over it).

use stoq_ebpf::decode::ETHERTYPE_IPV6;

/// A link-layer address (EUI-48), in transmission order.
pub type MacAddr = [u8; 6];

/// Size of an untagged Ethernet II header.
pub const HEADER_BYTES: usize = 14;

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
    }
}
