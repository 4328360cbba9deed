//! Padding is read in one go.
//!
//! quinn-proto reads every byte of padding as a frame of its own (RFC 9000 §19.1), about 9 ns
//! each: a path MTU probe of 1452 bytes costs its receiver 13 µs, one of 65 kB 0.6 ms, and a
//! search sends up to a dozen. PADDING means nothing, so a probe — PING, perhaps IMMEDIATE_ACK,
//! and zeros to the end — loses it here, right behind decryption.

use bytes::BytesMut;
use quinn_proto::crypto::{CryptoError, PacketKey};

/// RFC 9000 §19.2.
const PING: u8 = 0x01;
/// draft-ietf-quic-ack-frequency §5, as quinn-proto numbers it.
const IMMEDIATE_ACK: u8 = 0x1f;

/// A key for received packets that drops the padding of path MTU probes.
pub(super) struct WithoutPadding(pub(super) Box<dyn PacketKey>);

impl PacketKey for WithoutPadding {
    fn encrypt(&self, packet: u64, buf: &mut [u8], header_len: usize) {
        self.0.encrypt(packet, buf, header_len);
    }

    fn decrypt(
        &self,
        packet: u64,
        header: &[u8],
        payload: &mut BytesMut,
    ) -> Result<(), CryptoError> {
        self.0.decrypt(packet, header, payload)?;
        if payload.first() == Some(&PING) {
            payload.truncate(without_padding(payload));
        }
        Ok(())
    }

    fn tag_len(&self) -> usize {
        self.0.tag_len()
    }

    fn confidentiality_limit(&self) -> u64 {
        self.0.confidentiality_limit()
    }

    fn integrity_limit(&self) -> u64 {
        self.0.integrity_limit()
    }
}

/// Bytes of a payload that begins with PING, less its padding where nothing else follows.
fn without_padding(payload: &[u8]) -> usize {
    let frames = 1 + usize::from(payload.get(1) == Some(&IMMEDIATE_ACK));
    // Frames of other kinds may end in zeros that are their own.
    let padded = payload[frames..].iter().all(|byte| *byte == 0);
    if padded { frames } else { payload.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_padding_is_dropped() {
        for (payload, kept) in [
            (&[PING][..], 1),
            (&[PING, 0, 0, 0], 1),
            (&[PING, IMMEDIATE_ACK, 0, 0], 2),
            (&[PING, IMMEDIATE_ACK], 2),
            // A STREAM frame without length, whose data are zeros.
            (&[PING, 0x08, 0, 0, 0], 5),
            (&[PING, 0, 0, 0x08, 0, 0, 0], 7),
            (&[PING, IMMEDIATE_ACK, 0, PING], 4),
            (&[PING, PING, 0, 0], 4),
        ] {
            assert_eq!(without_padding(payload), kept, "{payload:?}");
        }
    }
}
