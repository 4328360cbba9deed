//! Session tickets (RFC 8446, section 4.6.1): one key ring for all shards, keys short-lived.
//!
//! A key encrypts for one period and decrypts for one more, then it is gone: with the default of
//! three hours no key lives longer than six. Handshakes read the ring without a lock.
//!
//! ```text
//! ticket: key name (16) │ nonce (12) │ AES-256-GCM(session state) with the name as AAD │ tag (16)
//! ```
//!
//! Without a shared secret keys are random and die with the process. With one, they are derived
//! from it, the period and the trust, so that a fleet behind one name resumes each other's
//! sessions; then the secret's secrecy is the forward secrecy of all tickets.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::hkdf;
use rustls::server::ProducesTickets;

use super::error::CertsError;
use super::maintenance::Periodic;
use super::trust::TrustStore;
use super::wall_clock::{WallClock, unix_seconds};

const NAME_SIZE_BYTES: usize = 16;
const KEY_SIZE_BYTES: usize = 32;
/// For how long a key encrypts.
pub(super) const TICKET_KEY_PERIOD: Duration = Duration::from_secs(3 * 60 * 60);

/// The ticket keys of one service.
pub struct TicketKeys {
    clock: Arc<dyn WallClock>,
    period: Duration,
    shared: Option<hkdf::Prk>,
    trust: Option<Arc<TrustStore>>,
    ring: ArcSwap<Ring>,
    /// Held by the one thread that makes the next ring; the others go on with the present one.
    rotating: Mutex<()>,
}

/// Keys of one period; the first encrypts, all decrypt.
struct Ring {
    epoch: u64,
    trust_fingerprint: [u8; 32],
    keys: Vec<Arc<TicketKey>>,
}

struct TicketKey {
    name: [u8; NAME_SIZE_BYTES],
    key: RandomizedNonceKey,
}

impl std::fmt::Debug for TicketKeys {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("TicketKeys")
            .field("period", &self.period)
            .field("shared", &self.shared.is_some())
            .finish_non_exhaustive()
    }
}

impl TicketKeys {
    /// Random keys, bound to `trust` if clients are verified against it.
    ///
    /// # Errors
    /// The cryptography library has no entropy.
    pub fn random(
        clock: Arc<dyn WallClock>,
        trust: Option<Arc<TrustStore>>,
    ) -> Result<Self, CertsError> {
        Self::new(clock, trust, None, TICKET_KEY_PERIOD)
    }

    /// Keys derived from `secret`, the same on every machine that has it and the same trust.
    ///
    /// # Errors
    /// The secret is shorter than 32 bytes, or key derivation failed.
    pub fn shared(
        clock: Arc<dyn WallClock>,
        trust: Option<Arc<TrustStore>>,
        secret: &[u8],
    ) -> Result<Self, CertsError> {
        if secret.len() < 32 {
            return Err(CertsError::Configuration(format!(
                "the ticket secret has {} bytes; it needs at least 32",
                secret.len()
            )));
        }
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"stoq tickets").extract(secret);
        Self::new(clock, trust, Some(prk), TICKET_KEY_PERIOD)
    }

    fn new(
        clock: Arc<dyn WallClock>,
        trust: Option<Arc<TrustStore>>,
        shared: Option<hkdf::Prk>,
        period: Duration,
    ) -> Result<Self, CertsError> {
        let epoch = unix_seconds(clock.now()) / period.as_secs();
        let fingerprint = trust.as_ref().map_or([0; 32], |trust| trust.loaded().fingerprint);
        let ring = Ring::next(None, epoch, fingerprint, shared.as_ref())?;
        Ok(Self {
            clock,
            period,
            shared,
            trust,
            ring: ArcSwap::from_pointee(ring),
            rotating: Mutex::new(()),
        })
    }

    fn epoch(&self, now: SystemTime) -> u64 {
        unix_seconds(now) / self.period.as_secs()
    }

    /// The ring for now, made first if the period or the trust has changed.
    fn current(&self) -> Option<Arc<Ring>> {
        let epoch = self.epoch(self.clock.now());
        let fingerprint = self.trust.as_ref().map_or([0; 32], |trust| trust.loaded().fingerprint);
        let fits = |ring: &Ring| ring.epoch == epoch && ring.trust_fingerprint == fingerprint;
        let ring = self.ring.load_full();
        if fits(&ring) {
            return Some(ring);
        }
        let _turn = self.rotating.lock().expect("no panic while locked");
        let ring = self.ring.load_full();
        if fits(&ring) {
            return Some(ring);
        }
        match Ring::next(Some(&ring), epoch, fingerprint, self.shared.as_ref()) {
            Ok(next) => {
                let next = Arc::new(next);
                self.ring.store(Arc::clone(&next));
                Some(next)
            }
            Err(error) => {
                // No ticket is better than one under a key that should be dead.
                tracing::error!(%error, "cannot make ticket keys; sessions will not resume");
                None
            }
        }
    }
}

impl Ring {
    fn next(
        old: Option<&Self>,
        epoch: u64,
        trust_fingerprint: [u8; 32],
        shared: Option<&hkdf::Prk>,
    ) -> Result<Self, CertsError> {
        let keys = match shared {
            Some(prk) => {
                // One period either way, for machines whose clocks differ.
                let mut keys = vec![derive(prk, epoch, &trust_fingerprint)?];
                keys.push(derive(prk, epoch.saturating_sub(1), &trust_fingerprint)?);
                keys.push(derive(prk, epoch.saturating_add(1), &trust_fingerprint)?);
                keys
            }
            None => {
                let mut keys = vec![generate()?];
                let previous = old.filter(|old| {
                    old.trust_fingerprint == trust_fingerprint
                        && old.epoch.checked_add(1) == Some(epoch)
                });
                keys.extend(previous.and_then(|old| old.keys.first().cloned()));
                keys
            }
        };
        Ok(Self { epoch, trust_fingerprint, keys })
    }
}

fn generate() -> Result<Arc<TicketKey>, CertsError> {
    let mut bytes = [0; NAME_SIZE_BYTES + KEY_SIZE_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| CertsError::crypto("ticket key generation", "no entropy"))?;
    ticket_key(&bytes)
}

fn derive(
    prk: &hkdf::Prk,
    epoch: u64,
    trust_fingerprint: &[u8; 32],
) -> Result<Arc<TicketKey>, CertsError> {
    struct Length;
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            NAME_SIZE_BYTES + KEY_SIZE_BYTES
        }
    }
    let mut bytes = [0; NAME_SIZE_BYTES + KEY_SIZE_BYTES];
    let epoch = epoch.to_be_bytes();
    let info: [&[u8]; 3] = [b"ticket", &epoch, trust_fingerprint];
    prk.expand(&info, Length)
        .and_then(|okm| okm.fill(&mut bytes))
        .map_err(|_| CertsError::crypto("ticket key derivation", "HKDF refused"))?;
    ticket_key(&bytes)
}

fn ticket_key(
    bytes: &[u8; NAME_SIZE_BYTES + KEY_SIZE_BYTES],
) -> Result<Arc<TicketKey>, CertsError> {
    let (name, key) = bytes.split_at(NAME_SIZE_BYTES);
    let key = RandomizedNonceKey::new(&AES_256_GCM, key)
        .map_err(|_| CertsError::crypto("ticket key", "AES-256-GCM refused it"))?;
    Ok(Arc::new(TicketKey { name: name.try_into().expect("the name was split off"), key }))
}

impl ProducesTickets for TicketKeys {
    fn enabled(&self) -> bool {
        true
    }

    /// What is guaranteed: a ticket from the end of a period opens for one more.
    fn lifetime(&self) -> u32 {
        u32::try_from(self.period.as_secs()).expect("a period of hours fits 32 bits of seconds")
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let ring = self.current()?;
        let key = ring.keys.first()?;
        let mut sealed = plain.to_vec();
        let nonce = key.key.seal_in_place_append_tag(Aad::from(&key.name), &mut sealed).ok()?;
        let mut ticket = Vec::with_capacity(NAME_SIZE_BYTES + NONCE_LEN + sealed.len());
        ticket.extend_from_slice(&key.name);
        ticket.extend_from_slice(nonce.as_ref());
        ticket.extend_from_slice(&sealed);
        Some(ticket)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        let ring = self.current()?;
        let (name, rest) = cipher.split_at_checked(NAME_SIZE_BYTES)?;
        let (nonce, sealed) = rest.split_at_checked(NONCE_LEN)?;
        // Names are public: comparing them in variable time tells nothing.
        let key = ring.keys.iter().find(|key| key.name == name)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut plain = sealed.to_vec();
        let length = key.key.open_in_place(nonce, Aad::from(&key.name), &mut plain).ok()?.len();
        plain.truncate(length);
        Some(plain)
    }
}

impl Periodic for TicketKeys {
    /// Drops keys on time even where no handshake would.
    fn poll(&self, now: SystemTime) -> SystemTime {
        if self.current().is_none() {
            return now + Duration::from_secs(1);
        }
        let next_epoch_s = (self.epoch(now) + 1).saturating_mul(self.period.as_secs());
        UNIX_EPOCH + Duration::from_secs(next_epoch_s)
    }
}

#[cfg(test)]
mod tests {
    use super::super::wall_clock::SimWallClock;
    use super::*;

    fn start() -> SystemTime {
        // The start of a period.
        UNIX_EPOCH + Duration::from_secs(166_666 * TICKET_KEY_PERIOD.as_secs())
    }

    fn random() -> (Arc<SimWallClock>, TicketKeys) {
        let clock = Arc::new(SimWallClock::new(start()));
        let keys = TicketKeys::random(clock.clone(), None).unwrap();
        (clock, keys)
    }

    #[test]
    fn tickets_open_for_one_more_period_and_no_longer() {
        let (clock, keys) = random();
        clock.set(start() + TICKET_KEY_PERIOD - Duration::from_secs(1));
        let ticket = keys.encrypt(b"state").unwrap();
        assert_eq!(keys.decrypt(&ticket).unwrap(), b"state");
        clock.set(start() + 2 * TICKET_KEY_PERIOD - Duration::from_secs(1));
        assert_eq!(keys.decrypt(&ticket).unwrap(), b"state");
        clock.set(start() + 2 * TICKET_KEY_PERIOD);
        assert_eq!(keys.decrypt(&ticket), None);
        assert!(2 * TICKET_KEY_PERIOD <= Duration::from_secs(6 * 60 * 60));
    }

    #[test]
    fn a_slept_period_drops_all_keys() {
        let (clock, keys) = random();
        let ticket = keys.encrypt(b"state").unwrap();
        clock.set(start() + 5 * TICKET_KEY_PERIOD);
        assert_eq!(keys.decrypt(&ticket), None);
        assert!(keys.encrypt(b"state").is_some());
    }

    #[test]
    fn damaged_tickets_are_refused() {
        let (_clock, keys) = random();
        let ticket = keys.encrypt(b"state").unwrap();
        for length in 0..ticket.len() {
            assert_eq!(keys.decrypt(&ticket[..length]), None, "length {length}");
        }
        for index in 0..ticket.len() {
            let mut broken = ticket.clone();
            broken[index] ^= 1;
            assert_eq!(keys.decrypt(&broken), None, "byte {index}");
        }
        assert_eq!(keys.decrypt(&keys.encrypt(b"").unwrap()).unwrap(), b"");
    }

    #[test]
    fn a_shared_secret_opens_on_every_machine() {
        let clock = Arc::new(SimWallClock::new(start()));
        let late = Arc::new(SimWallClock::new(start() - Duration::from_secs(2)));
        let a = TicketKeys::shared(clock.clone(), None, &[7; 32]).unwrap();
        let b = TicketKeys::shared(late, None, &[7; 32]).unwrap();
        let stranger = TicketKeys::shared(clock.clone(), None, &[8; 32]).unwrap();
        let ticket = a.encrypt(b"state").unwrap();
        assert_eq!(b.decrypt(&ticket).unwrap(), b"state");
        assert_eq!(a.decrypt(&b.encrypt(b"x").unwrap()).unwrap(), b"x");
        assert_eq!(stranger.decrypt(&ticket), None);
        clock.set(start() + 2 * TICKET_KEY_PERIOD);
        assert_eq!(a.decrypt(&ticket), None);
        assert!(TicketKeys::shared(clock, None, &[7; 31]).is_err());
    }

    #[test]
    fn polling_names_the_next_period() {
        let (clock, keys) = random();
        clock.advance(Duration::from_secs(5));
        assert_eq!(keys.poll(clock.now()), start() + TICKET_KEY_PERIOD);
    }
}
