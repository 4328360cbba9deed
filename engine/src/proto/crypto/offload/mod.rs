//! Sealing elsewhere: a NIC, a DPU or a thread pool seals packets and says later that it is done.
//!
//! ```text
//! quinn-proto ─ poll_transmit ─► datagrams, unsealed ─┐
//!               keys that record instead of sealing ──┴► SealJob ─► SealQueue::submit, flush
//! datapath ◄─ in the order of submission ── shard ◄─ SealedJob ◄─── SealQueue::poll_sealed
//! ```
//!
//! A job owns its buffer until it comes back, so a device may read and write it at any time; and it
//! holds its keys, so a key update or the connection's end in between changes nothing for it. A
//! packet leaves only after its job came back; jobs may come back in any order. Where a job fails,
//! or takes longer than [`SEAL_JOB_TIMEOUT_US`](crate::config::SEAL_JOB_TIMEOUT_US), its datagrams
//! are dropped and its connection ends with
//! [`CryptoProviderFailed`](crate::error::ConnectionError::CryptoProviderFailed).
//!
//! Opening stays with aws-lc-rs, and so does sealing with these keys on a thread that is not a shard
//! with this provider: nothing can leave unsealed by a wrong set-up. Synchronous providers
//! ([`super::CryptoProvider`]) do not pass through here.

mod deferred;

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

pub use deferred::cipher_suites;
pub(crate) use deferred::{Recorded, record};

/// Bytes of ciphertext behind the place of a four-byte packet number that header protection samples
/// (RFC 9001 §5.4.2).
pub const SAMPLE_BYTES: usize = 16;
/// Bytes of a tag.
pub const TAG_BYTES: usize = 16;

/// The cipher of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SealAlgorithm {
    /// AES-128-GCM; header protection with AES-128.
    Aes128Gcm,
    /// AES-256-GCM; header protection with AES-256.
    Aes256Gcm,
}

/// A key as the provider gave it to the engine; dropping the last reference removes it.
pub type KeyHandle = Arc<dyn Any + Send + Sync>;

/// Seals packets of an engine's shards. Shared by them.
pub trait SealProvider: Send + Sync + 'static {
    /// What errors and logs call it.
    fn name(&self) -> &str;

    /// Takes a key for payloads: 16 or 32 bytes, and the IV that packet numbers are combined with
    /// (RFC 9001 §5.3). Called when a key first seals, never for keys that only open.
    ///
    /// # Errors
    /// Why not; the connection ends with these words.
    fn packet_key(
        &self,
        algorithm: SealAlgorithm,
        key: &[u8],
        iv: &[u8; 12],
    ) -> Result<KeyHandle, String>;

    /// Takes a key for header protection, of 16 or 32 bytes.
    ///
    /// # Errors
    /// As [`Self::packet_key`].
    fn header_key(&self, algorithm: SealAlgorithm, key: &[u8]) -> Result<KeyHandle, String>;

    /// A queue for one shard's thread.
    fn queue(&self, shard: usize) -> Box<dyn SealQueue>;
}

/// One shard's jobs.
pub trait SealQueue: Send {
    /// Takes a job. Never more than
    /// [`SEAL_JOBS_IN_FLIGHT_MAX`](crate::config::SEAL_JOBS_IN_FLIGHT_MAX) are under way.
    fn submit(&mut self, job: SealJob);

    /// Rings the doorbell, once a turn, after the turn's jobs.
    fn flush(&mut self);

    /// A job that is done, in any order. Must not block; asked every turn, and every
    /// [`SEAL_POLL_INTERVAL_US`](crate::config::SEAL_POLL_INTERVAL_US) while jobs are under way.
    fn poll_sealed(&mut self) -> Option<SealedJob>;
}

/// Datagrams to seal.
pub struct SealJob {
    /// Comes back with [`SealedJob::id`].
    pub id: u64,
    /// The datagrams of one batch, one behind the other; tags are zero.
    pub datagrams: Vec<u8>,
    /// What to seal in them, in this order; what belongs to none of these packets is complete.
    pub packets: Vec<SealPacket>,
}

/// One QUIC packet in a job's buffer.
pub struct SealPacket {
    /// From [`SealProvider::packet_key`].
    pub key: KeyHandle,
    /// From [`SealProvider::header_key`].
    pub header_key: KeyHandle,
    /// For the nonce (RFC 9001 §5.3).
    pub packet_number: u64,
    /// The header: associated data, as it stands before its protection.
    pub header: Range<usize>,
    /// What to encrypt; [`TAG_BYTES`] for the tag follow.
    pub payload: Range<usize>,
    /// The packet number within the header, 1 to 4 bytes at its end. The first byte and this are
    /// masked after encryption; the sample starts four bytes behind its start (RFC 9001 §5.4).
    pub number: Range<usize>,
}

/// A job that is over.
pub struct SealedJob {
    /// The job's number.
    pub id: u64,
    /// The sealed datagrams, in the job's own buffer or one of the provider's as long; or why
    /// they are not sealed.
    pub datagrams: Result<Vec<u8>, String>,
}
