//! Packet protection by ipsec-mb in rustls's terms (RFC 9001 §5.3 and §5.4).

use std::sync::OnceLock;

use rustls::crypto::cipher::{AeadKey, Iv};
use rustls::quic::{Algorithm, HeaderProtectionKey, PacketKey, Tag};
use rustls::{Error, SupportedCipherSuite};
use zeroize::Zeroize;

use crate::sys::ipsec_mb::{BlockKey, GcmKey, IpsecMb, NONCE_BYTES, TAG_BYTES};

/// Packets that one AES-GCM key may seal (RFC 9001 §6.6).
pub(super) const CONFIDENTIALITY_PACKETS_MAX: u64 = 1 << 23;
/// Packets that one AES-GCM key may fail to open (RFC 9001 §6.6).
pub(super) const INTEGRITY_PACKETS_MAX: u64 = 1 << 52;
/// Bytes of ciphertext that header protection samples (RFC 9001 §5.4.2).
const SAMPLE_BYTES: usize = 16;
/// Marks a long header (RFC 9000 §17.2).
const LONG_HEADER: u8 = 0x80;

/// Makes keys of ipsec-mb for one cipher suite.
pub(super) struct IpsecMbAlgorithm {
    library: &'static IpsecMb,
    /// What the suite had; makes the header keys of AES-256, for which the library exports nothing.
    aws_lc_rs: &'static dyn Algorithm,
}

impl IpsecMbAlgorithm {
    /// # Panics
    /// The library cannot be used, or the suite has no QUIC.
    pub(super) fn new(suite: SupportedCipherSuite) -> Self {
        Self {
            library: IpsecMb::load().expect("chosen only where ipsec-mb was found and tested"),
            aws_lc_rs: suite
                .tls13()
                .and_then(|suite| suite.quic)
                .expect("aws-lc-rs has the suite for QUIC"),
        }
    }
}

impl Algorithm for IpsecMbAlgorithm {
    fn packet_key(&self, key: AeadKey, iv: Iv) -> Box<dyn PacketKey> {
        Box::new(IpsecMbPacketKey::new(self.library, key, &iv))
    }

    fn header_protection_key(&self, key: AeadKey) -> Box<dyn HeaderProtectionKey> {
        match key.as_ref().try_into() {
            Ok(key) => Box::new(IpsecMbHeaderKey(BlockKey::new(self.library, key))),
            Err(_aes_256) => self.aws_lc_rs.header_protection_key(key),
        }
    }

    fn aead_key_len(&self) -> usize {
        self.aws_lc_rs.aead_key_len()
    }
}

/// One direction's key of one generation.
struct IpsecMbPacketKey {
    /// Made with the first packet: a connection holds the keys of its next generation from the
    /// handshake on, and few live long enough to use them.
    expanded: OnceLock<Box<GcmKey>>,
    library: &'static IpsecMb,
    key: AeadKey,
    iv: [u8; NONCE_BYTES],
}

impl IpsecMbPacketKey {
    fn new(library: &'static IpsecMb, key: AeadKey, iv: &Iv) -> Self {
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(iv.as_ref());
        Self { expanded: OnceLock::new(), library, key, iv: nonce }
    }

    #[inline]
    fn expanded(&self) -> &GcmKey {
        self.expanded.get_or_init(|| Box::new(GcmKey::new(self.library, self.key.as_ref())))
    }

    /// The packet number, big-endian, over the IV's end (RFC 9001 §5.3).
    #[inline]
    fn nonce(&self, packet_number: u64) -> [u8; NONCE_BYTES] {
        let mut nonce = self.iv;
        let (_, end) = nonce.split_at_mut(NONCE_BYTES - 8);
        for (byte, number) in end.iter_mut().zip(packet_number.to_be_bytes()) {
            *byte ^= number;
        }
        nonce
    }
}

impl PacketKey for IpsecMbPacketKey {
    fn encrypt_in_place(
        &self,
        packet_number: u64,
        header: &[u8],
        payload: &mut [u8],
    ) -> Result<Tag, Error> {
        let tag = self.expanded().seal_in_place(&self.nonce(packet_number), header, payload);
        Ok(Tag::from(tag.as_slice()))
    }

    fn decrypt_in_place<'a>(
        &self,
        packet_number: u64,
        header: &[u8],
        payload: &'a mut [u8],
    ) -> Result<&'a [u8], Error> {
        let Some((data, received)) = payload.split_last_chunk_mut::<TAG_BYTES>() else {
            return Err(Error::DecryptError);
        };
        let tag = self.expanded().open_in_place(&self.nonce(packet_number), header, data);
        // One comparison of the whole: its time does not tell how much is right.
        if u128::from_ne_bytes(tag) == u128::from_ne_bytes(*received) {
            return Ok(data);
        }
        // Nobody may read what was not authenticated.
        data.fill(0);
        Err(Error::DecryptError)
    }

    fn tag_len(&self) -> usize {
        TAG_BYTES
    }

    fn confidentiality_limit(&self) -> u64 {
        CONFIDENTIALITY_PACKETS_MAX
    }

    fn integrity_limit(&self) -> u64 {
        INTEGRITY_PACKETS_MAX
    }
}

impl Drop for IpsecMbPacketKey {
    fn drop(&mut self) {
        self.iv.zeroize();
    }
}

/// Header protection with AES-128 (RFC 9001 §5.4.3).
struct IpsecMbHeaderKey(BlockKey);

impl IpsecMbHeaderKey {
    /// Masks `first` and as many bytes of `packet_number` as its two low bits say; they are read
    /// before masking, or after it when `is_protected` (RFC 9001 §5.4.1).
    #[inline]
    fn mask(
        &self,
        sample: &[u8],
        first: &mut u8,
        packet_number: &mut [u8],
        is_protected: bool,
    ) -> Result<(), Error> {
        let sample: &[u8; SAMPLE_BYTES] = sample
            .try_into()
            .map_err(|_| Error::General("a header protection sample has 16 bytes".into()))?;
        if packet_number.len() > 4 {
            return Err(Error::General("a packet number has at most 4 bytes".into()));
        }
        let [first_mask, number_mask @ ..] = self.0.encrypt(sample);
        let bits = if *first & LONG_HEADER == 0 { 0x1f } else { 0x0f };
        let masked = *first ^ (first_mask & bits);
        let plain = if is_protected { masked } else { *first };
        *first = masked;
        let number_bytes = usize::from(plain & 0x03) + 1;
        for (byte, mask) in packet_number.iter_mut().zip(number_mask).take(number_bytes) {
            *byte ^= mask;
        }
        Ok(())
    }
}

impl HeaderProtectionKey for IpsecMbHeaderKey {
    fn encrypt_in_place(
        &self,
        sample: &[u8],
        first: &mut u8,
        packet_number: &mut [u8],
    ) -> Result<(), Error> {
        self.mask(sample, first, packet_number, false)
    }

    fn decrypt_in_place(
        &self,
        sample: &[u8],
        first: &mut u8,
        packet_number: &mut [u8],
    ) -> Result<(), Error> {
        self.mask(sample, first, packet_number, true)
    }

    fn sample_len(&self) -> usize {
        SAMPLE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::crypto::ipsec_mb_version;

    #[test]
    fn a_key_is_expanded_with_its_first_packet() {
        if ipsec_mb_version().is_err() {
            // The tests of both providers say so.
            return;
        }
        let library = IpsecMb::load().expect("found");
        let key = IpsecMbPacketKey::new(library, AeadKey::from([7; 32]), &Iv::from([1; 12]));
        assert!(key.expanded.get().is_none());
        let mut payload = *b"payload";
        let tag = key.encrypt_in_place(1, b"header", &mut payload).expect("sealed");
        let first: *const GcmKey = &raw const **key.expanded.get().expect("expanded");
        let mut sealed = [payload.as_slice(), tag.as_ref()].concat();
        assert_eq!(key.decrypt_in_place(1, b"header", &mut sealed).expect("opened"), b"payload");
        assert_eq!(&raw const **key.expanded.get().expect("kept"), first);
    }
}
