//! SipHash-2-4 over messages of one length: the keyed hash that an eBPF program
//! can compute (no AES there, no loops over packets).
//!
//! A pseudorandom function of a 128-bit key: without the key nobody can tell its
//! output from noise, predict it, or find inputs that share an output faster
//! than by trying (Aumasson and Bernstein, "SipHash: a fast short-input PRF").

/// Length of the messages that [`hash`] takes: two words and seven bytes.
pub const MESSAGE_BYTES: usize = 23;

/// A SipHash key.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SipKey {
    k0: u64,
    k1: u64,
}

impl SipKey {
    /// A key that is not in use.
    pub const UNUSED: Self = Self { k0: 0, k1: 0 };

    /// A key of 16 secret bytes.
    #[must_use]
    pub const fn new(secret: &[u8; 16]) -> Self {
        let secret = u128::from_le_bytes(*secret);
        Self { k0: secret as u64, k1: (secret >> 64) as u64 }
    }

    pub(crate) const fn words(&self) -> [u64; 2] {
        [self.k0, self.k1]
    }
}

impl core::fmt::Debug for SipKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("SipKey(..)")
    }
}

struct State {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl State {
    #[inline(always)]
    fn round(&mut self) {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.rotate_left(32);
    }

    #[inline(always)]
    fn absorb(&mut self, word: u64) {
        self.v3 ^= word;
        self.round();
        self.round();
        self.v0 ^= word;
    }
}

/// SipHash-2-4 of the [`MESSAGE_BYTES`] bytes in `words`, which are in
/// little-endian order; the last byte of the third word is not part of them.
#[inline(always)]
#[must_use]
pub fn hash(key: &SipKey, words: [u64; 3]) -> u64 {
    const LENGTH: u64 = (MESSAGE_BYTES as u64) << 56;
    const BYTES: u64 = u64::MAX >> 8;
    let mut state = State {
        v0: key.k0 ^ 0x736f_6d65_7073_6575,
        v1: key.k1 ^ 0x646f_7261_6e64_6f6d,
        v2: key.k0 ^ 0x6c79_6765_6e65_7261,
        v3: key.k1 ^ 0x7465_6462_7974_6573,
    };
    state.absorb(words[0]);
    state.absorb(words[1]);
    state.absorb((words[2] & BYTES) | LENGTH);
    state.v2 ^= 0xff;
    state.round();
    state.round();
    state.round();
    state.round();
    state.v0 ^ state.v1 ^ state.v2 ^ state.v3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_behind_the_message_does_not_count() {
        let key = SipKey::new(&[5; 16]);
        let words = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908, 0x0016_1514_1312_1110];
        assert_eq!(hash(&key, [words[0], words[1], words[2] | 0xab << 56]), hash(&key, words));
    }

    #[test]
    #[allow(deprecated)] // the standard library's SipHash-2-4 has no other name
    fn agrees_with_the_standard_library() {
        let mut seed = 1_u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed
        };
        for _ in 0..1000 {
            let (k0, k1) = (next(), next());
            let mut key = [0; 16];
            key[..8].copy_from_slice(&k0.to_le_bytes());
            key[8..].copy_from_slice(&k1.to_le_bytes());
            let words = [next(), next(), next()];
            assert_eq!(hash(&SipKey::new(&key), words), expected(&key, words));
        }
    }

    #[allow(deprecated)]
    fn expected(key: &[u8; 16], words: [u64; 3]) -> u64 {
        use core::hash::{Hasher, SipHasher};
        let half = |range: core::ops::Range<usize>| {
            u64::from_le_bytes(key[range].try_into().expect("eight bytes"))
        };
        let mut hasher = SipHasher::new_with_keys(half(0..8), half(8..16));
        let mut message = [0; 24];
        for (chunk, word) in message.chunks_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        hasher.write(&message[..MESSAGE_BYTES]);
        hasher.finish()
    }
}
