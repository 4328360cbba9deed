//! Keys that all shards (and, with a file, all machines of a service) must agree on: stateless
//! resets, address validation tokens, connection IDs, session tickets.
//!
//! One 64-byte secret; each key is derived from it under its own label (HKDF-SHA256, RFC 5869),
//! so none tells anything about another.

use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::{hkdf, hmac};
use quinn_proto::crypto::{HandshakeTokenKey, HmacKey};

use super::error::CertsError;
use super::fault::{CertificateFault, count_start};
use super::storage::{Access, create_file_if_missing};
use super::{names, pem};

/// Size of the secret.
pub const SHARED_SECRET_SIZE_BYTES: usize = 64;

/// The keys of one service.
pub struct SharedKeys {
    prk: hkdf::Prk,
    reset_key: Arc<hmac::Key>,
    token_key: Arc<hkdf::Prk>,
}

impl std::fmt::Debug for SharedKeys {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SharedKeys").finish_non_exhaustive()
    }
}

impl SharedKeys {
    /// New random keys: tokens and resets end with the process.
    ///
    /// # Errors
    /// The cryptography library has no entropy.
    pub fn generate() -> Result<Self, CertsError> {
        Self::from_secret(&random_secret()?)
    }

    /// Keys of the secret in `path` (128 hexadecimal digits, mode 0600), which is made first if it
    /// is missing. After a restart old connections can then be reset (RFC 9000, section 10.3).
    ///
    /// # Errors
    /// The file is readable by others, has another content, or a system call failed.
    pub fn load_or_create(path: &Path) -> Result<Self, CertsError> {
        count_start(Self::open(path))
    }

    fn open(path: &Path) -> Result<Self, CertsError> {
        let fresh = || {
            let secret = random_secret()?;
            let text: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
            Ok(format!("{text}\n").into_bytes())
        };
        create_file_if_missing(path, fresh, Access::Owner)?;
        let bytes = pem::read_private(path)?;
        let secret = parse_secret(&bytes).ok_or_else(|| CertsError::Parse {
            fault: CertificateFault::Malformed,
            what: path.display().to_string(),
            reason: format!("must be {} hexadecimal digits", 2 * SHARED_SECRET_SIZE_BYTES),
        })?;
        Self::from_secret(&secret)
    }

    /// Keys of a secret from elsewhere.
    ///
    /// # Errors
    /// Key derivation failed inside the cryptography library.
    pub fn from_secret(secret: &[u8; SHARED_SECRET_SIZE_BYTES]) -> Result<Self, CertsError> {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"stoq shared keys").extract(secret);
        let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &expand::<64>(&prk, "reset")?);
        let token_key = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &expand::<32>(&prk, "token")?);
        Ok(Self { prk, reset_key: Arc::new(reset_key), token_key: Arc::new(token_key) })
    }

    /// For `quinn_proto::EndpointConfig::new`: signs stateless reset tokens.
    #[must_use]
    pub fn reset_key(&self) -> Arc<dyn HmacKey> {
        Arc::clone(&self.reset_key) as _
    }

    /// For `quinn_proto::ServerConfig::new`: seals Retry and NEW_TOKEN tokens.
    #[must_use]
    pub fn token_key(&self) -> Arc<dyn HandshakeTokenKey> {
        Arc::clone(&self.token_key) as _
    }

    /// For the connection ID cipher: an AES-128 key.
    ///
    /// # Errors
    /// Key derivation failed inside the cryptography library.
    pub fn connection_id_key(&self) -> Result<[u8; 16], CertsError> {
        expand(&self.prk, "connection id")
    }

    /// The secret of those machines whose certificates carry exactly these DNS names: a CA hands it to
    /// a fleet behind one name, and no other fleet learns it.
    ///
    /// # Errors
    /// Key derivation failed inside the cryptography library.
    pub fn secret_of(
        &self,
        dns_names: &[String],
    ) -> Result<[u8; SHARED_SECRET_SIZE_BYTES], CertsError> {
        let mut names = dns_names.to_vec();
        names.sort_unstable();
        names.dedup();
        // A DNS name holds no space, so no two lists give one label.
        expand(&self.prk, &format!("fleet {}", names.join(" ")))
    }

    /// For [`ServerTlsBuilder::ticket_secret`](super::ServerTlsBuilder::ticket_secret).
    ///
    /// # Errors
    /// Key derivation failed inside the cryptography library.
    pub fn ticket_secret(&self) -> Result<[u8; 32], CertsError> {
        expand(&self.prk, "tickets")
    }
}

fn random_secret() -> Result<[u8; SHARED_SECRET_SIZE_BYTES], CertsError> {
    let mut secret = [0; SHARED_SECRET_SIZE_BYTES];
    aws_lc_rs::rand::fill(&mut secret)
        .map_err(|_| CertsError::crypto("random bytes", "no entropy"))?;
    Ok(secret)
}

fn parse_secret(bytes: &[u8]) -> Option<[u8; SHARED_SECRET_SIZE_BYTES]> {
    let text = std::str::from_utf8(bytes).ok()?.trim();
    names::unhex(text)?.try_into().ok()
}

fn expand<const SIZE_BYTES: usize>(
    prk: &hkdf::Prk,
    label: &str,
) -> Result<[u8; SIZE_BYTES], CertsError> {
    struct Length(usize);
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let mut key = [0; SIZE_BYTES];
    prk.expand(&[label.as_bytes()], Length(SIZE_BYTES))
        .and_then(|okm| okm.fill(&mut key))
        .map_err(|_| CertsError::crypto("key derivation", "HKDF refused"))?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::test_dir::TestDir;
    use super::*;

    fn signature(keys: &SharedKeys) -> Vec<u8> {
        let key = keys.reset_key();
        let mut out = vec![0; key.signature_len()];
        key.sign(b"connection", &mut out);
        out
    }

    fn seal(keys: &SharedKeys) -> Vec<u8> {
        let mut data = b"token".to_vec();
        keys.token_key().aead_from_hkdf(b"random").seal(&mut data, b"aad").unwrap();
        data
    }

    #[test]
    fn one_secret_gives_the_same_keys_everywhere() {
        let a = SharedKeys::from_secret(&[3; 64]).unwrap();
        let b = SharedKeys::from_secret(&[3; 64]).unwrap();
        let stranger = SharedKeys::generate().unwrap();
        assert_eq!(signature(&a), signature(&b));
        assert_ne!(signature(&a), signature(&stranger));
        a.reset_key().verify(b"connection", &signature(&b)).unwrap();
        assert!(a.reset_key().verify(b"connection", &signature(&stranger)).is_err());
        let aead = b.token_key().aead_from_hkdf(b"random");
        assert_eq!(aead.open(&mut seal(&a), b"aad").unwrap(), b"token");
        assert!(aead.open(&mut seal(&stranger), b"aad").is_err());
        assert_eq!(a.connection_id_key().unwrap(), b.connection_id_key().unwrap());
        assert_ne!(a.ticket_secret().unwrap(), stranger.ticket_secret().unwrap());
        assert_ne!(a.ticket_secret().unwrap()[..16], a.connection_id_key().unwrap());
    }

    /// A service whose processes all start on a new machine at once.
    #[test]
    fn of_many_that_start_at_once_one_makes_the_secret() {
        for _ in 0..10 {
            let dir = TestDir::new();
            let path = dir.path().join("shared.key");
            let barrier = std::sync::Barrier::new(6);
            let secrets: Vec<_> = std::thread::scope(|scope| {
                let start = || {
                    barrier.wait();
                    SharedKeys::load_or_create(&path).unwrap().ticket_secret().unwrap()
                };
                let starting: Vec<_> = (0..6).map(|_| scope.spawn(start)).collect();
                starting.into_iter().map(|one| one.join().unwrap()).collect()
            });
            assert!(secrets.iter().all(|secret| *secret == secrets[0]), "a fleet of strangers");
        }
    }

    #[test]
    fn the_file_is_made_once_and_guarded() {
        let dir = TestDir::new();
        let path = dir.path().join("shared.key");
        let first = signature(&SharedKeys::load_or_create(&path).unwrap());
        assert_eq!(signature(&SharedKeys::load_or_create(&path).unwrap()), first);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = SharedKeys::load_or_create(&path).unwrap_err();
        assert_eq!(error.fault(), CertificateFault::KeyReadableByOthers);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        for content in ["", "abcd", &"0g".repeat(64), &"00".repeat(65)] {
            std::fs::write(&path, content).unwrap();
            let error = SharedKeys::load_or_create(&path).unwrap_err();
            assert_eq!(error.fault(), CertificateFault::Malformed, "{content:?}");
        }
    }
}
