//! Keys that record what is to be sealed, while a shard polls a connection; anywhere else they
//! seal and open with aws-lc-rs.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use rustls::crypto::cipher::{AeadKey, Iv};
use rustls::quic::{Algorithm, HeaderProtectionKey, PacketKey, Tag};
use rustls::{Error, SupportedCipherSuite, Tls13CipherSuite};
use zeroize::Zeroizing;

use super::super::CryptoProvider;
use super::{KeyHandle, SAMPLE_BYTES, SealAlgorithm, SealPacket, SealProvider, TAG_BYTES};

thread_local! {
    /// What was recorded; `None` where no shard is recording.
    static RECORDING: RefCell<Option<Vec<Recorded>>> = const { RefCell::new(None) };
}

/// TLS 1.3 cipher suites whose AES packets `provider` seals, in order of preference, for
/// [`ServerTlsBuilder::cipher_suites`](crate::certs::ServerTlsBuilder::cipher_suites) and its
/// client's like. They live as long as the process: call it once.
#[must_use]
pub fn cipher_suites(provider: &Arc<dyn SealProvider>) -> Vec<SupportedCipherSuite> {
    let defer = |suite: SupportedCipherSuite| {
        let Some(tls13) = suite.tls13().filter(|tls13| tls13.quic.is_some()) else { return suite };
        let aws_lc_rs = tls13.quic.expect("filtered");
        let algorithm = match aws_lc_rs.aead_key_len() {
            16 => SealAlgorithm::Aes128Gcm,
            _ if suite.suite() == rustls::CipherSuite::TLS13_AES_256_GCM_SHA384 => {
                SealAlgorithm::Aes256Gcm
            }
            // ChaCha20-Poly1305 is sealed where it is built.
            _ => return suite,
        };
        let provider = Arc::clone(provider);
        let quic = Box::leak(Box::new(DeferredAlgorithm { provider, algorithm, aws_lc_rs }));
        SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
            common: rustls::crypto::CipherSuiteCommon { ..tls13.common },
            hkdf_provider: tls13.hkdf_provider,
            aead_alg: tls13.aead_alg,
            quic: Some(quic),
        })))
    };
    CryptoProvider::AwsLcRs.cipher_suites().into_iter().map(defer).collect()
}

/// Calls `poll`; what deferring keys would have sealed in it is added to `recorded`.
pub(crate) fn record<R>(recorded: &mut Vec<Recorded>, poll: impl FnOnce() -> R) -> R {
    /// Ends the recording even when `poll` panics: nothing may be deferred that nobody seals.
    struct End<'a>(&'a mut Vec<Recorded>);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            *self.0 = RECORDING.take().unwrap_or_default();
        }
    }
    RECORDING.set(Some(std::mem::take(recorded)));
    let _end = End(recorded);
    poll()
}

/// A packet that was built and not sealed. Places are addresses in the buffer that the shard owns
/// and that does not move in between; they are only ever subtracted.
pub(crate) struct Recorded {
    key: Result<KeyHandle, String>,
    header_key: Option<Result<KeyHandle, String>>,
    packet_number: u64,
    header_at: usize,
    header_bytes: usize,
    payload_bytes: usize,
    number_at: usize,
}

impl Recorded {
    /// The packet's place in `datagrams`.
    ///
    /// # Errors
    /// The provider refused one of its keys.
    ///
    /// # Panics
    /// The packet is not in `datagrams`, or quinn-proto did not protect its header.
    pub(crate) fn into_packet(self, datagrams: &[u8]) -> Result<SealPacket, String> {
        let start = self.header_at - datagrams.as_ptr().addr();
        let payload_at = start + self.header_bytes;
        let number = self.number_at - datagrams.as_ptr().addr();
        let end = payload_at + self.payload_bytes;
        assert!(end + TAG_BYTES <= datagrams.len(), "a packet beyond its buffer");
        Ok(SealPacket {
            key: self.key?,
            header_key: self.header_key.expect("quinn-proto protects every header")?,
            packet_number: self.packet_number,
            header: start..payload_at,
            payload: payload_at..end,
            number: number..payload_at,
        })
    }
}

/// Makes keys that can defer, for one cipher suite.
struct DeferredAlgorithm {
    provider: Arc<dyn SealProvider>,
    algorithm: SealAlgorithm,
    aws_lc_rs: &'static dyn Algorithm,
}

impl Algorithm for DeferredAlgorithm {
    fn packet_key(&self, key: AeadKey, iv: Iv) -> Box<dyn PacketKey> {
        let mut nonce = Zeroizing::new([0; 12]);
        nonce.copy_from_slice(iv.as_ref());
        Box::new(DeferredPacketKey {
            material: Material::new(self, &key),
            iv: nonce,
            handle: OnceLock::new(),
            inner: self.aws_lc_rs.packet_key(key, iv),
        })
    }

    fn header_protection_key(&self, key: AeadKey) -> Box<dyn HeaderProtectionKey> {
        Box::new(DeferredHeaderKey {
            material: Material::new(self, &key),
            handle: OnceLock::new(),
            inner: self.aws_lc_rs.header_protection_key(key),
        })
    }

    fn aead_key_len(&self) -> usize {
        self.aws_lc_rs.aead_key_len()
    }
}

/// A key that the provider may be given later.
struct Material {
    provider: Arc<dyn SealProvider>,
    algorithm: SealAlgorithm,
    key: Zeroizing<Vec<u8>>,
}

impl Material {
    fn new(algorithm: &DeferredAlgorithm, key: &AeadKey) -> Self {
        Self {
            provider: Arc::clone(&algorithm.provider),
            algorithm: algorithm.algorithm,
            key: Zeroizing::new(key.as_ref().to_vec()),
        }
    }
}

/// One direction's key of one generation.
struct DeferredPacketKey {
    material: Material,
    iv: Zeroizing<[u8; 12]>,
    handle: OnceLock<Result<KeyHandle, String>>,
    inner: Box<dyn PacketKey>,
}

impl DeferredPacketKey {
    fn handle(&self) -> Result<KeyHandle, String> {
        let Material { provider, algorithm, key } = &self.material;
        self.handle.get_or_init(|| provider.packet_key(*algorithm, key, &self.iv)).clone()
    }
}

impl PacketKey for DeferredPacketKey {
    fn encrypt_in_place(
        &self,
        packet_number: u64,
        header: &[u8],
        payload: &mut [u8],
    ) -> Result<Tag, Error> {
        // Taken out meanwhile: what the provider seals in between is not ours.
        let Some(mut recorded) = RECORDING.take() else {
            return self.inner.encrypt_in_place(packet_number, header, payload);
        };
        recorded.push(Recorded {
            key: self.handle(),
            header_key: None,
            packet_number,
            header_at: header.as_ptr().addr(),
            header_bytes: header.len(),
            payload_bytes: payload.len(),
            number_at: 0,
        });
        RECORDING.set(Some(recorded));
        Ok(Tag::from([0; TAG_BYTES].as_slice()))
    }

    fn decrypt_in_place<'a>(
        &self,
        packet_number: u64,
        header: &[u8],
        payload: &'a mut [u8],
    ) -> Result<&'a [u8], Error> {
        self.inner.decrypt_in_place(packet_number, header, payload)
    }

    fn tag_len(&self) -> usize {
        self.inner.tag_len()
    }

    fn confidentiality_limit(&self) -> u64 {
        self.inner.confidentiality_limit()
    }

    fn integrity_limit(&self) -> u64 {
        self.inner.integrity_limit()
    }
}

/// Header protection, which samples the ciphertext and so waits with it.
struct DeferredHeaderKey {
    material: Material,
    handle: OnceLock<Result<KeyHandle, String>>,
    inner: Box<dyn HeaderProtectionKey>,
}

impl HeaderProtectionKey for DeferredHeaderKey {
    fn encrypt_in_place(
        &self,
        sample: &[u8],
        first: &mut u8,
        packet_number: &mut [u8],
    ) -> Result<(), Error> {
        let Some(mut recorded) = RECORDING.take() else {
            return self.inner.encrypt_in_place(sample, first, packet_number);
        };
        let packet = recorded
            .last_mut()
            .filter(|packet| packet.header_at == std::ptr::from_ref(first).addr());
        let masked = match packet {
            Some(packet) => {
                let Material { provider, algorithm, key } = &self.material;
                let handle = self.handle.get_or_init(|| provider.header_key(*algorithm, key));
                packet.header_key = Some(handle.clone());
                packet.number_at = packet_number.as_ptr().addr();
                Ok(())
            }
            None => Err(Error::General("a header without its packet".into())),
        };
        RECORDING.set(Some(recorded));
        masked
    }

    fn decrypt_in_place(
        &self,
        sample: &[u8],
        first: &mut u8,
        packet_number: &mut [u8],
    ) -> Result<(), Error> {
        self.inner.decrypt_in_place(sample, first, packet_number)
    }

    fn sample_len(&self) -> usize {
        SAMPLE_BYTES
    }
}
