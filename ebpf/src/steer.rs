//! Which shard a QUIC packet belongs to, by its destination connection ID: the
//! one decision that the shards and the `SO_REUSEPORT` program make alike.
//!
//! ```text
//! | rotation (3 bits), length or random (5) | block | shard ^ m0 | check |
//!   ◄──────────── n − 2 bytes: the prefix ─────────►
//!   m = SipHash-2-4(key of the rotation, prefix)      check = h(m, shard)
//! ```
//!
//! The block is for whoever balances over machines (server ID and nonce under
//! AES, draft-ietf-quic-load-balancers) and is never repeated. An eBPF program
//! has no AES; therefore the shard stands behind the block, in octets that the
//! draft leaves to the server, masked by a pseudorandom function of the block:
//! to whoever lacks the key they are noise, so two IDs cannot be linked by
//! them. The check is a one-time authenticator of the shard under the same
//! output: a changed or invented ID passes once in 256 times, and then only
//! reaches a shard that does not know it. Nothing is remembered per connection.
//!
//! IDs that are not ours (a client's first Initials and its 0-RTT packets) go by
//! a keyed hash, so that a client cannot choose IDs that meet at one shard.

use crate::siphash::{self, SipKey};

/// Longest connection ID of QUIC version 1 (RFC 9000 §17.2); what follows in a longer one does not
/// count.
pub const CID_BYTES_MAX: usize = 20;
/// Bytes behind the block: the masked shard and the check.
pub const CID_TAG_BYTES: usize = 2;
/// Rotation bits have so many values.
pub const ROTATIONS: usize = 8;

/// What decides: the keys of the configurations that are alive, shared by every shard and, byte
/// for byte, the value of the program's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SteerTable {
    /// For IDs that are not ours.
    pub hash_key: SipKey,
    /// Length of our IDs, all configurations alike: 8 to 20.
    pub cid_len_bytes: u32,
    /// Number of shards, 1 to 256.
    pub shards: u32,
    /// By rotation bits.
    pub configurations: [SteerConfiguration; ROTATIONS],
}

/// One configuration's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SteerConfiguration {
    /// Masks the shard.
    pub key: SipKey,
    /// Not zero while IDs of this configuration are valid.
    pub is_alive: u64,
}

impl SteerConfiguration {
    /// No IDs have these rotation bits.
    pub const DEAD: Self = Self { key: SipKey::UNUSED, is_alive: 0 };
}

/// Size of a [`SteerTable`].
pub const STEER_TABLE_BYTES: usize = size_of::<SteerTable>();
const _: () = assert!(STEER_TABLE_BYTES == 24 + 24 * ROTATIONS);

impl SteerTable {
    /// The table as the program's map holds it.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; STEER_TABLE_BYTES] {
        let mut bytes = [0; STEER_TABLE_BYTES];
        let mut words = bytes.chunks_exact_mut(8);
        let mut put = |word: [u8; 8]| {
            words.next().expect("the table has this many words").copy_from_slice(&word);
        };
        let [k0, k1] = self.hash_key.words();
        put(k0.to_ne_bytes());
        put(k1.to_ne_bytes());
        let [a, b, c, d] = self.cid_len_bytes.to_ne_bytes();
        let [e, f, g, h] = self.shards.to_ne_bytes();
        put([a, b, c, d, e, f, g, h]);
        for configuration in &self.configurations {
            let [k0, k1] = configuration.key.words();
            put(k0.to_ne_bytes());
            put(k1.to_ne_bytes());
            put(configuration.is_alive.to_ne_bytes());
        }
        bytes
    }
}

/// Why a packet belongs where it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Steered {
    /// To this shard, by our own connection ID.
    ById(u32),
    /// To this shard, by the hash of an ID that a client chose.
    ByHash(u32),
    /// A short header with an ID that we never gave out.
    Foreign,
}

impl Steered {
    /// The shard, if there is one.
    #[inline(always)]
    #[must_use]
    pub const fn shard(self) -> Option<u32> {
        match self {
            Self::ById(shard) | Self::ByHash(shard) => Some(shard),
            Self::Foreign => None,
        }
    }
}

/// A connection ID in registers: its bytes in little-endian words, zeros behind its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CidWords {
    words: [u64; 3],
    len_bytes: u32,
}

impl CidWords {
    /// The first `len_bytes` (at most [`CID_BYTES_MAX`] count) of these bytes.
    #[inline(always)]
    #[must_use]
    pub fn new(bytes: &[u8; 24], len_bytes: u32) -> Self {
        // SipHash reads little-endian words; the indices are constants.
        macro_rules! word {
            ($at:literal) => {
                u64::from_le_bytes([
                    bytes[$at],
                    bytes[$at + 1],
                    bytes[$at + 2],
                    bytes[$at + 3],
                    bytes[$at + 4],
                    bytes[$at + 5],
                    bytes[$at + 6],
                    bytes[$at + 7],
                ])
            };
        }
        Self { words: [word!(0), word!(8), word!(16)], len_bytes }.truncated(len_bytes)
    }

    #[inline(always)]
    fn truncated(self, len_bytes: u32) -> Self {
        let len_bytes =
            if len_bytes > CID_BYTES_MAX as u32 { CID_BYTES_MAX as u32 } else { len_bytes };
        let [first, second, third] = self.words;
        let words = [
            first & mask(len_bytes),
            second & mask(len_bytes.saturating_sub(8)),
            third & mask(len_bytes.saturating_sub(16)),
        ];
        Self { words, len_bytes }
    }

    /// The byte at `index`, below 24.
    #[inline(always)]
    fn byte(self, index: u32) -> u8 {
        let [first, second, third] = self.words;
        let word = if index < 8 {
            first
        } else if index < 16 {
            second
        } else {
            third
        };
        (word >> ((index & 7) * 8)) as u8
    }

    /// Under `key`, with the length as the last byte of the message.
    #[inline(always)]
    fn hash(self, key: &SipKey) -> u64 {
        let [first, second, third] = self.words;
        siphash::hash(key, [first, second, third | (self.len_bytes as u64) << 48])
    }
}

/// The lowest `bytes` bytes of a word.
#[inline(always)]
fn mask(bytes: u32) -> u64 {
    if bytes >= 8 { u64::MAX } else { (1 << (bytes * 8)) - 1 }
}

/// Mask of the shard's octet and the one-time authenticator of the shard, from the prefix's hash.
#[inline(always)]
fn tag(hash: u64, shard: u8) -> [u8; CID_TAG_BYTES] {
    // Multiply-shift is strongly universal for a fresh 16-bit a and b, eight bits in and out:
    // knowing the tag of one shard tells nothing about another's.
    let a = (hash >> 8) as u16;
    let b = (hash >> 24) as u16;
    let check = a.wrapping_mul(shard as u16).wrapping_add(b) >> 8;
    [shard ^ hash as u8, check as u8]
}

/// The octets behind the prefix of an ID of `shard`. `prefix` has all but the last
/// [`CID_TAG_BYTES`] bytes of it.
#[must_use]
pub fn cid_tag(key: &SipKey, prefix: &[u8], shard: u8) -> [u8; CID_TAG_BYTES] {
    tag(CidWords::new(&first_bytes(prefix), prefix.len() as u32).hash(key), shard)
}

/// The shard in one of our own IDs; `None`: it is not ours.
#[inline(always)]
#[must_use]
pub fn shard_of(table: &SteerTable, cid: CidWords) -> Option<u32> {
    if cid.len_bytes != table.cid_len_bytes || cid.len_bytes < 8 {
        return None;
    }
    let configuration = &table.configurations[(cid.byte(0) >> 5) as usize];
    if configuration.is_alive == 0 {
        return None;
    }
    let prefix_bytes = cid.len_bytes - CID_TAG_BYTES as u32;
    let hash = cid.truncated(prefix_bytes).hash(&configuration.key);
    let shard = cid.byte(prefix_bytes) ^ hash as u8;
    let [_, check] = tag(hash, shard);
    if cid.byte(prefix_bytes + 1) != check || shard as u32 >= table.shards {
        return None;
    }
    Some(shard as u32)
}

/// Decides by the destination connection ID and the form of the header that it stands in.
#[inline(always)]
#[must_use]
pub fn steer(table: &SteerTable, cid: CidWords, is_long_header: bool) -> Steered {
    if let Some(shard) = shard_of(table, cid) {
        return Steered::ById(shard);
    }
    if !is_long_header {
        return Steered::Foreign;
    }
    // The upper half times the number of shards: no division, and no bias worth naming.
    let hash = cid.hash(&table.hash_key) >> 32;
    Steered::ByHash(((hash * table.shards as u64) >> 32) as u32)
}

/// Up to 24 bytes, zeros behind them.
#[must_use]
pub fn first_bytes(bytes: &[u8]) -> [u8; 24] {
    let mut first = [0; 24];
    for (to, from) in first.iter_mut().zip(bytes) {
        *to = *from;
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(shards: u32, cid_len_bytes: u32) -> SteerTable {
        let mut configurations = [SteerConfiguration::DEAD; ROTATIONS];
        configurations[2] = SteerConfiguration { key: SipKey::new(&[7; 16]), is_alive: 1 };
        SteerTable { hash_key: SipKey::new(&[9; 16]), cid_len_bytes, shards, configurations }
    }

    /// Deterministic noise.
    struct Noise(u64);

    impl Noise {
        fn byte(&mut self) -> u8 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(97);
            (self.0 >> 56) as u8
        }
    }

    /// An ID of `shard` with rotation bits 2.
    fn cid(table: &SteerTable, noise: &mut Noise, shard: u8) -> [u8; CID_BYTES_MAX] {
        let len = table.cid_len_bytes as usize;
        let mut cid = [0; CID_BYTES_MAX];
        cid[0] = 2 << 5 | noise.byte() & 31;
        for byte in &mut cid[1..len - CID_TAG_BYTES] {
            *byte = noise.byte();
        }
        let tag = cid_tag(&table.configurations[2].key, &cid[..len - CID_TAG_BYTES], shard);
        cid[len - CID_TAG_BYTES..len].copy_from_slice(&tag);
        cid
    }

    fn words(cid: &[u8]) -> CidWords {
        CidWords::new(&first_bytes(cid), cid.len() as u32)
    }

    #[test]
    fn every_length_and_shard_is_read_back() {
        let mut noise = Noise(1);
        for len in 8..=CID_BYTES_MAX {
            let table = table(256, len as u32);
            for shard in 0..=255 {
                let cid = cid(&table, &mut noise, shard);
                for is_long_header in [false, true] {
                    let steered = steer(&table, words(&cid[..len]), is_long_header);
                    assert_eq!(steered, Steered::ById(u32::from(shard)), "{len} bytes");
                }
            }
        }
    }

    #[test]
    fn the_map_holds_every_field_at_its_offset() {
        let bytes = table(7, 12).to_bytes();
        assert_eq!(bytes[..16], [9; 16]);
        assert_eq!(bytes[16..20], 12_u32.to_ne_bytes());
        assert_eq!(bytes[20..24], 7_u32.to_ne_bytes());
        let third = core::mem::offset_of!(SteerTable, configurations) + 2 * 24;
        assert_eq!(bytes[third..third + 16], [7; 16]);
        assert_eq!(bytes[third + 16..third + 24], 1_u64.to_ne_bytes());
        assert_eq!(core::mem::offset_of!(SteerTable, shards), 20);
        assert!(bytes[third + 24..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn other_keys_lengths_and_rotations_are_foreign() {
        let table = table(4, 10);
        let mut noise = Noise(2);
        let ours = cid(&table, &mut noise, 3);
        for len in (0..=CID_BYTES_MAX).filter(|len| *len != 10) {
            assert_eq!(steer(&table, words(&ours[..len]), false), Steered::Foreign, "{len}");
        }
        let mut other = ours;
        other[0] ^= 1 << 5;
        assert_eq!(steer(&table, words(&other[..10]), false), Steered::Foreign);
    }

    #[test]
    fn changed_and_invented_ids_pass_once_in_256_times() {
        let table = table(256, 10);
        let mut noise = Noise(3);
        let (mut steered, mut invented) = (0, 0);
        for _ in 0..20_000 {
            // The attacker aims an ID that it saw at another shard and guesses the check.
            let mut cid = cid(&table, &mut noise, 1);
            cid[8] ^= 1 + noise.byte() % 255;
            cid[9] = noise.byte();
            steered += u32::from(shard_of(&table, words(&cid[..10])).is_some());
            let mut cid = [0; 10];
            cid.fill_with(|| noise.byte());
            cid[0] = 2 << 5;
            invented += u32::from(shard_of(&table, words(&cid)).is_some());
        }
        for passed in [steered, invented] {
            assert!((30..150).contains(&passed), "{passed} of 20000 passed; 78 are expected");
        }
    }

    #[test]
    fn the_tag_of_one_id_is_noise_to_others() {
        let table = table(256, 10);
        let mut noise = Noise(4);
        let mut seen = [[0_u32; 256]; 2];
        for _ in 0..25_600 {
            let cid = cid(&table, &mut noise, 1);
            seen[0][usize::from(cid[8])] += 1;
            seen[1][usize::from(cid[9])] += 1;
        }
        for count in seen.into_iter().flatten() {
            assert!((50..160).contains(&count), "{count} of 25600 had one value, not about 100");
        }
    }

    #[test]
    fn initials_go_to_one_shard_whatever_its_number() {
        let mut noise = Noise(5);
        for shards in [1, 2, 3, 7, 256] {
            let table = table(shards, 10);
            let mut counts = [0_u32; 256];
            for _ in 0..1000 * shards {
                let mut dcid = [0; 20];
                dcid.fill_with(|| noise.byte());
                let shard = steer(&table, words(&dcid), true).shard().expect("always one");
                assert_eq!(steer(&table, words(&dcid), true).shard(), Some(shard));
                counts[shard as usize] += 1;
            }
            for count in &counts[..shards as usize] {
                assert!((800..1200).contains(count), "{count} of 1000 at one of {shards} shards");
            }
            assert!(counts[shards as usize..].iter().all(|count| *count == 0));
        }
    }

    #[test]
    fn short_and_long_client_ids_are_hashed_whole() {
        let table = table(256, 10);
        let mut shards = [false; 256];
        for len in 0..=CID_BYTES_MAX {
            let shard = steer(&table, words(&[0; 24][..len]), true).shard().expect("one");
            shards[shard as usize] = true;
        }
        assert!(shards.iter().filter(|seen| **seen).count() > 15, "the length must count");
        // Other versions may have longer IDs (RFC 8999 §5.3): their first 20 bytes count.
        let long = CidWords::new(&[1; 24], 255);
        assert_eq!(long, CidWords::new(&[1; 24], 20));
    }
}
