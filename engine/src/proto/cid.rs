//! Connection IDs that carry the shard which owns them.
//!
//! ```text
//! | config rotation (3 bits), random (5) | nonce, 7 bytes | shard ^ mask | check |
//! ```
//!
//! The layout follows the QUIC load-balancing draft: a first octet with
//! configuration rotation bits, then routing information that only the holder of
//! the key can read. The mask is AES over the nonce (QUIC's own header protection
//! primitive), so observers can neither steer packets to a shard of their choice
//! nor tell whether two IDs belong to one connection. The check octet lets a
//! shard drop most forged IDs before any look-up.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::aead::quic::{AES_128, HeaderProtectionKey};
use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};

/// Length of every connection ID that STOQ issues, in bytes.
pub const CID_LEN_BYTES: usize = 10;
const NONCE: std::ops::Range<usize> = 1..8;

/// The key that hides the shard in connection IDs; shared by all shards of an engine.
#[derive(Clone)]
pub struct CidKey(Arc<HeaderProtectionKey>);

impl CidKey {
    /// A key from 16 secret bytes.
    #[must_use]
    pub fn new(secret: &[u8; 16]) -> Self {
        let key = HeaderProtectionKey::new(&AES_128, secret).expect("AES-128 takes 16 bytes");
        Self(Arc::new(key))
    }

    /// A key from the system's randomness.
    #[must_use]
    pub fn random() -> Self {
        let mut secret = [0; 16];
        aws_lc_rs::rand::fill(&mut secret).expect("the system gives randomness");
        Self::new(&secret)
    }

    fn mask(&self, cid: &[u8]) -> [u8; 2] {
        let mut sample = [0; 16];
        sample[..8].copy_from_slice(&cid[..8]);
        let mask = self.0.new_mask(&sample).expect("a sample of 16 bytes fits AES-128");
        [mask[0], mask[1]]
    }

    /// The shard inside one of our own IDs, `None` when the ID is not ours.
    #[must_use]
    pub fn shard(&self, cid: &[u8]) -> Option<u8> {
        if cid.len() != CID_LEN_BYTES {
            return None;
        }
        let mask = self.mask(cid);
        (cid[9] == mask[1]).then_some(cid[8] ^ mask[0])
    }
}

impl std::fmt::Debug for CidKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CidKey(..)")
    }
}

/// Issues IDs for one shard.
pub(crate) struct ShardCidGenerator {
    key: CidKey,
    shard: u8,
    rng: StdRng,
}

impl ShardCidGenerator {
    pub(crate) fn new(key: CidKey, shard: u8, seed: [u8; 32]) -> Self {
        Self { key, shard, rng: StdRng::from_seed(seed) }
    }
}

impl ConnectionIdGenerator for ShardCidGenerator {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut cid = [0; CID_LEN_BYTES];
        cid[0] = self.rng.random::<u8>() & 0b0001_1111; // configuration 0
        self.rng.fill_bytes(&mut cid[NONCE]);
        let mask = self.key.mask(&cid);
        cid[8] = self.shard ^ mask[0];
        cid[9] = mask[1];
        ConnectionId::new(&cid)
    }

    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        self.key.shard(cid).map(|_| ()).ok_or(InvalidCid)
    }

    fn cid_len(&self) -> usize {
        CID_LEN_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Decides which shard of `shards` a datagram belongs to; every shard decides alike.
///
/// Our own IDs name their shard. Everything else (a client's first Initials and
/// 0-RTT packets) goes by a hash of its DCID. `None`: no QUIC packet at all, or a
/// short header with an ID that we never issued.
pub(crate) fn owner(key: &CidKey, shards: usize, datagram: &[u8]) -> Option<usize> {
    let first = *datagram.first()?;
    let long_header = first & 0x80 != 0;
    let dcid = if long_header {
        let len = usize::from(*datagram.get(5)?);
        datagram.get(6..6 + len)?
    } else {
        datagram.get(1..1 + CID_LEN_BYTES)?
    };
    match key.shard(dcid) {
        Some(shard) => Some(usize::from(shard)).filter(|shard| *shard < shards),
        None if long_header => Some((hash(dcid) % shards as u64) as usize),
        None => None,
    }
}

/// FNV-1a with a final mix: spreads IDs that clients choose at random. A client
/// that chooses them on purpose can only load one shard, which it could anyway
/// by repeating one ID.
fn hash(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short_header(cid: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x40];
        packet.extend_from_slice(cid);
        packet.extend_from_slice(&[0; 30]);
        packet
    }

    #[test]
    fn every_shard_reads_the_owner_from_the_id() {
        let key = CidKey::new(&[7; 16]);
        for shard in [0u8, 1, 2, 255] {
            let mut generator = ShardCidGenerator::new(key.clone(), shard, [3; 32]);
            for _ in 0..100 {
                let cid = generator.generate_cid();
                assert!(generator.validate(&cid).is_ok());
                assert_eq!(owner(&key, 256, &short_header(&cid)), Some(usize::from(shard)));
            }
        }
    }

    #[test]
    fn a_shard_that_does_not_exist_has_no_packets() {
        let key = CidKey::new(&[7; 16]);
        let cid = ShardCidGenerator::new(key.clone(), 9, [3; 32]).generate_cid();
        assert_eq!(owner(&key, 4, &short_header(&cid)), None);
    }

    #[test]
    fn ids_of_one_shard_do_not_show_it() {
        let mut generator = ShardCidGenerator::new(CidKey::new(&[7; 16]), 1, [3; 32]);
        let seen: std::collections::HashSet<u8> =
            (0..1000).map(|_| generator.generate_cid()[8]).collect();
        assert!(seen.len() > 200, "only {} values of the shard octet", seen.len());
    }

    #[test]
    fn forged_ids_are_mostly_refused_and_never_out_of_range() {
        let key = CidKey::new(&[7; 16]);
        let mut rng = StdRng::seed_from_u64(1);
        let accepted = (0..10_000)
            .filter(|_| {
                let mut cid = [0; CID_LEN_BYTES];
                rng.fill_bytes(&mut cid);
                owner(&key, 4, &short_header(&cid)).is_some_and(|shard| {
                    assert!(shard < 4);
                    true
                })
            })
            .count();
        assert!(accepted < 10, "{accepted} of 10000 forged IDs accepted");
    }

    #[test]
    fn truncated_headers_have_no_owner() {
        let key = CidKey::new(&[7; 16]);
        let mut initial = vec![0xc0, 0, 0, 0, 1, 8];
        initial.extend_from_slice(&[9; 8]);
        assert!(owner(&key, 4, &initial).is_some());
        for len in 0..initial.len() {
            assert_eq!(owner(&key, 4, &initial[..len]), None, "{len} bytes");
        }
        assert_eq!(owner(&key, 4, &[0x40; CID_LEN_BYTES]), None);
    }
}
