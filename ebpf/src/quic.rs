//! Where the destination connection ID lies in a QUIC packet: the only part of
//! QUIC that a steering program may read (RFC 8999 §5: invariant over versions).

use crate::decode::Packet;

/// Offset of the DCID length in a long header: after the first byte and the version.
const LONG_DCID_LEN_OFFSET_BYTES: usize = 5;

/// A destination connection ID within a packet; all its bytes are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DcidSpan {
    /// Offset of its first byte, counted as the packet's offsets are.
    pub offset_bytes: usize,
    /// Its length: 0 to 255. Version 1 allows 20 at most (RFC 9000 §17.2), the
    /// invariants more; it is for the caller to refuse what it does not speak.
    pub len_bytes: u8,
    /// Whether it stands in a long header, so may have been chosen by the client.
    pub is_long_header: bool,
}

/// Finds the DCID of the QUIC packet that begins at `payload_offset_bytes`.
/// Short headers do not say how long it is: `short_dcid_bytes` is the length
/// of the connection IDs that we give out. `None`: empty or cut short.
#[inline(always)]
#[must_use]
pub fn locate_dcid<P: Packet + ?Sized>(
    packet: &P,
    payload_offset_bytes: usize,
    short_dcid_bytes: u8,
) -> Option<DcidSpan> {
    let [first] = packet.read::<1>(payload_offset_bytes)?;
    let is_long_header = first & 0x80 != 0;
    let (offset_bytes, len_bytes) = if is_long_header {
        let len_offset_bytes = payload_offset_bytes + LONG_DCID_LEN_OFFSET_BYTES;
        let [len_bytes] = packet.read::<1>(len_offset_bytes)?;
        (len_offset_bytes + 1, len_bytes)
    } else {
        (payload_offset_bytes + 1, short_dcid_bytes)
    };
    if offset_bytes + len_bytes as usize > packet.len_bytes() {
        return None;
    }
    Some(DcidSpan { offset_bytes, len_bytes, is_long_header })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: [u8; 14] = [0xc0, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8];

    #[test]
    fn long_header() {
        let span = DcidSpan { offset_bytes: 6, len_bytes: 8, is_long_header: true };
        assert_eq!(locate_dcid(&LONG[..], 0, 20), Some(span));
        for len in 0..LONG.len() {
            assert_eq!(locate_dcid(&LONG[..len], 0, 20), None, "{len} bytes");
        }
        let mut longest = [0xff; 261];
        assert_eq!(locate_dcid(&longest[..260], 0, 20), None);
        assert_eq!(locate_dcid(&longest[..], 0, 20).map(|span| span.len_bytes), Some(255));
        longest[5] = 0;
        assert_eq!(locate_dcid(&longest[..6], 0, 20).map(|span| span.len_bytes), Some(0));
    }

    #[test]
    fn short_header() {
        let packet = [0xaa, 0xaa, 0x40, 1, 2, 3, 4];
        let span = DcidSpan { offset_bytes: 3, len_bytes: 4, is_long_header: false };
        assert_eq!(locate_dcid(&packet[..], 2, 4), Some(span));
        assert_eq!(locate_dcid(&packet[..], 2, 5), None);
        assert_eq!(locate_dcid(&packet[..], 6, 0).map(|span| span.offset_bytes), Some(7));
        assert_eq!(locate_dcid(&packet[..], 7, 0), None);
    }
}
