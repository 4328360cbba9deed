//! The keys that identities and embedded CAs make: ECDSA, or post-quantum signatures.
//!
//! rcgen signs with ML-DSA but reads neither its private keys nor requests signed by it, so both are
//! read here.

use aws_lc_rs::signature::{KeyPair as _, ML_DSA_65_SIGNING, PqdsaKeyPair};
use rcgen::{KeyPair, PublicKeyData, SignatureAlgorithm, SigningKey};
use rustls_pki_types::PrivateKeyDer;

use super::error::CertsError;

/// Which kind of key signs certificates and handshakes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyAlgorithm {
    /// ECDSA on P-256 with SHA-256: every peer verifies it, and a chain takes about 1 kB.
    #[default]
    EcdsaP256,
    /// ML-DSA-65 (FIPS 204), post-quantum: a chain takes about 11 kB and the signature of a handshake
    /// 3.3 kB, which costs a round trip more, and peers must know it (`mldsa65`,
    /// draft-ietf-tls-mldsa).
    MlDsa65,
}

/// A private key with its PKCS#8 text.
pub(super) enum PrivateKey {
    Ecdsa(KeyPair),
    MlDsa { pair: PqdsaKeyPair, pkcs8: Vec<u8> },
}

impl PrivateKey {
    pub(super) fn generate(algorithm: KeyAlgorithm) -> Result<Self, CertsError> {
        match algorithm {
            KeyAlgorithm::EcdsaP256 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
                .map(Self::Ecdsa)
                .map_err(|error| CertsError::crypto("P-256 key generation", error)),
            KeyAlgorithm::MlDsa65 => {
                let failed = |error| CertsError::crypto("ML-DSA key generation", error);
                let pair = PqdsaKeyPair::generate(&ML_DSA_65_SIGNING).map_err(failed)?;
                let pkcs8 = pair.to_pkcs8v1().map_err(failed)?.as_ref().to_vec();
                Ok(Self::MlDsa { pair, pkcs8 })
            }
        }
    }

    pub(super) fn parse(key: &PrivateKeyDer<'_>) -> Result<Self, CertsError> {
        if let PrivateKeyDer::Pkcs8(pkcs8) = key {
            let pkcs8 = pkcs8.secret_pkcs8_der();
            if let Ok(pair) = PqdsaKeyPair::from_pkcs8(&ML_DSA_65_SIGNING, pkcs8) {
                return Ok(Self::MlDsa { pair, pkcs8: pkcs8.to_vec() });
            }
        }
        KeyPair::try_from(key)
            .map(Self::Ecdsa)
            .map_err(|error| CertsError::crypto("reading a private key", error))
    }

    /// PKCS#8, DER.
    pub(super) fn pkcs8(&self) -> &[u8] {
        match self {
            Self::Ecdsa(pair) => pair.serialized_der(),
            Self::MlDsa { pkcs8, .. } => pkcs8,
        }
    }
}

impl PublicKeyData for PrivateKey {
    fn der_bytes(&self) -> &[u8] {
        match self {
            Self::Ecdsa(pair) => pair.der_bytes(),
            Self::MlDsa { pair, .. } => pair.public_key().as_ref(),
        }
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        match self {
            Self::Ecdsa(pair) => pair.algorithm(),
            Self::MlDsa { .. } => &rcgen::PKCS_ML_DSA_65,
        }
    }
}

impl SigningKey for PrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        match self {
            Self::Ecdsa(pair) => SigningKey::sign(pair, message),
            Self::MlDsa { pair, .. } => {
                let mut signature = vec![0; pair.algorithm().signature_len()];
                pair.sign(message, &mut signature).map_err(|_| rcgen::Error::RingUnspecified)?;
                Ok(signature)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls_pki_types::PrivatePkcs8KeyDer;

    use super::*;

    #[test]
    fn keys_survive_their_text() {
        for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::MlDsa65] {
            let key = PrivateKey::generate(algorithm).unwrap();
            let der = PrivatePkcs8KeyDer::from(key.pkcs8().to_vec());
            let again = PrivateKey::parse(&der.into()).unwrap();
            assert_eq!(again.der_bytes(), key.der_bytes());
            assert_eq!(again.algorithm(), key.algorithm());
            assert_eq!(again.pkcs8(), key.pkcs8());
            assert!(!again.sign(b"message").unwrap().is_empty());
        }
        let garbage = PrivatePkcs8KeyDer::from(vec![1, 2, 3]);
        assert!(PrivateKey::parse(&garbage.into()).is_err());
    }
}
