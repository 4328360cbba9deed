//! Encryption of server ID and nonce as draft-ietf-quic-load-balancers has it: one AES-128-ECB
//! block where they fill it, a Feistel network of four rounds otherwise.
//!
//! Only whoever issues IDs and the balancer outside need this; which shard owns a packet is
//! decided without AES ([`stoq_ebpf::steer`]).

use aws_lc_rs::cipher::{AES_128, EncryptingKey, UnboundCipherKey};

use crate::config::CidKey;

const AES_BLOCK_BYTES: usize = 16;
/// Half of the longest plaintext of the four-pass algorithm (19 bytes), rounded up.
const HALF_BYTES_MAX: usize = 10;

/// The cipher of one configuration.
#[derive(Debug)]
pub(super) struct QuicLb {
    key: EncryptingKey,
}

impl QuicLb {
    pub(super) fn new(key: &CidKey) -> Self {
        let key = UnboundCipherKey::new(&AES_128, key.secret()).expect("AES-128 takes 16 bytes");
        Self { key: EncryptingKey::ecb(key).expect("AES-128 has an ECB mode") }
    }

    /// Encrypts server ID and nonce in place: 5 to 19 bytes.
    pub(super) fn encrypt(&self, block: &mut [u8]) {
        if let Ok(block) = <&mut [u8; AES_BLOCK_BYTES]>::try_from(&mut *block) {
            return self.aes(block);
        }
        let mut halves = Halves::split(block);
        for pass in 1..=4 {
            self.pass(&mut halves, pass);
        }
        halves.join(block);
    }

    /// One round: the half that this pass leaves alone is expanded, encrypted and added to the other.
    fn pass(&self, halves: &mut Halves, pass: u8) {
        let mut block = [0; AES_BLOCK_BYTES];
        let (from, to) = if pass % 2 == 1 {
            (&halves.left, &mut halves.right)
        } else {
            (&halves.right, &mut halves.left)
        };
        block[..HALF_BYTES_MAX].copy_from_slice(from);
        block[14] = halves.len_bytes;
        block[15] = pass;
        self.aes(&mut block);
        for (to, from) in to.iter_mut().zip(block) {
            *to ^= from;
        }
        halves.clear_beyond();
    }

    fn aes(&self, block: &mut [u8; AES_BLOCK_BYTES]) {
        self.key.encrypt(block).expect("one whole block");
    }
}

/// The plaintext in two halves of equal length; an odd length splits the middle octet into nibbles.
struct Halves {
    left: [u8; HALF_BYTES_MAX],
    right: [u8; HALF_BYTES_MAX],
    len_bytes: u8,
}

impl Halves {
    fn half_bytes(&self) -> usize {
        usize::from(self.len_bytes).div_ceil(2)
    }

    fn split(block: &[u8]) -> Self {
        let len_bytes = u8::try_from(block.len()).expect("a connection ID has 20 bytes at most");
        let mut halves = Self { left: [0; HALF_BYTES_MAX], right: [0; HALF_BYTES_MAX], len_bytes };
        let half_bytes = halves.half_bytes();
        halves.left[..half_bytes].copy_from_slice(&block[..half_bytes]);
        halves.right[..half_bytes].copy_from_slice(&block[block.len() - half_bytes..]);
        halves.clear_beyond();
        halves
    }

    /// Zeros what lies beyond the halves: the bytes behind them and, of an odd length, the nibble of
    /// the middle octet that belongs to the other half.
    fn clear_beyond(&mut self) {
        let half_bytes = self.half_bytes();
        self.left[half_bytes..].fill(0);
        self.right[half_bytes..].fill(0);
        if self.len_bytes % 2 == 1 {
            self.left[half_bytes - 1] &= 0xf0;
            self.right[0] &= 0x0f;
        }
    }

    fn join(&self, block: &mut [u8]) {
        let half_bytes = self.half_bytes();
        let right_at = block.len() - half_bytes;
        block[right_at..].copy_from_slice(&self.right[..half_bytes]);
        block[..right_at].copy_from_slice(&self.left[..right_at]);
        if right_at < half_bytes {
            block[right_at] |= self.left[right_at];
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use aws_lc_rs::cipher::{DecryptingKey, DecryptionContext};

    /// What a balancer does: the passes backwards.
    pub(in super::super) fn decrypt(key: &CidKey, block: &mut [u8]) {
        if block.len() == AES_BLOCK_BYTES {
            let key = UnboundCipherKey::new(&AES_128, key.secret()).expect("key");
            let key = DecryptingKey::ecb(key).expect("ECB");
            key.decrypt(block, DecryptionContext::None).expect("one block");
            return;
        }
        let cipher = QuicLb::new(key);
        let mut halves = Halves::split(block);
        for pass in (1..=4).rev() {
            cipher.pass(&mut halves, pass);
        }
        halves.join(block);
    }

    fn hex(text: &str) -> Vec<u8> {
        crate::config::unhex(text).expect("hexadecimal")
    }

    fn key(text: &str) -> CidKey {
        CidKey::new(&hex(text).try_into().expect("16 bytes"))
    }

    /// draft-ietf-quic-load-balancers, Appendix B.2: server ID, nonce, connection ID.
    const VECTORS: [(&str, &str, &str); 4] = [
        ("ed793a", "ee080dbf", "0720b1d07b359d3c"),
        ("ed793a51d49b8f5fab65", "ee080dbf48", "2fcc381bc74cb4fbad2823a3d1f8fed2"),
        ("ed793a51d49b8f5f", "ee080dbf48c0d1e5", "504dd2d05a7b0de9b2b9907afb5ecf8cc3"),
        ("ed793a51d49b8f5fab", "ee080dbf48c0d1e55d", "125779c9cc86beb3a3a4a3ca96fce4bfe0cdbc"),
    ];

    #[test]
    fn test_vectors_of_the_draft() {
        let key = key("8f95f09245765f80256934e50c66207f");
        for (server_id, nonce, cid) in VECTORS {
            let plain = hex(&format!("{server_id}{nonce}"));
            let mut block = plain.clone();
            QuicLb::new(&key).encrypt(&mut block);
            assert_eq!(block, hex(cid)[1..], "{server_id} {nonce}");
            decrypt(&key, &mut block);
            assert_eq!(block, plain, "{server_id} {nonce}");
        }
    }

    #[test]
    fn example_of_the_draft() {
        let mut block = hex("31441a9c69c275");
        QuicLb::new(&key("fdf726a9893ec05c0632d3956680baf0")).encrypt(&mut block);
        assert_eq!(block, hex("67947d29be054a"));
    }

    #[test]
    fn every_length_is_reversible() {
        let key = CidKey::new(&[3; 16]);
        for len in 5..=19_u8 {
            let plain: Vec<u8> = (0..len).collect();
            let mut block = plain.clone();
            QuicLb::new(&key).encrypt(&mut block);
            assert_ne!(block, plain);
            decrypt(&key, &mut block);
            assert_eq!(block, plain, "{len} bytes");
        }
    }
}
