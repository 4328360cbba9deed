//! ipsec-mb against aws-lc-rs and a published vector, before the first packet is trusted to it.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use crate::sys::ipsec_mb::{BlockKey, GcmKey, IpsecMb};

/// Random packets that the start tries for each key length.
pub(super) const TRIALS_AT_START: usize = 256;
/// Every payload up to this size is tried; larger ones are drawn.
const SMALL_BYTES_MAX: usize = 288;
/// Largest payload that is drawn: a QUIC packet over IPv6.
const LARGE_BYTES_MAX: usize = 65_527;
/// One in so many is that large; the others have at most [`MEDIUM_BYTES_MAX`].
const LARGE_ONE_IN: usize = 32;
const MEDIUM_BYTES_MAX: usize = 9_216;
/// Longest header: long, with both connection IDs and a token.
const AAD_BYTES_MAX: usize = 128;

/// Compares `trials` random packets of either key length, beyond every small size.
///
/// # Errors
/// What differs, with its size.
pub(super) fn run(library: &'static IpsecMb, trials: usize) -> Result<(), String> {
    known_answers(library)?;
    // Fixed: a library that passes once passes always.
    let mut random = StdRng::seed_from_u64(0x5e_a1);
    for algorithm in [&AES_128_GCM, &AES_256_GCM] {
        let mut key = [0; 32];
        random.fill_bytes(&mut key);
        let key = &key[..algorithm.key_len()];
        let unbound = UnboundKey::new(algorithm, key).expect("the key has the algorithm's length");
        let reference = LessSafeKey::new(unbound);
        let tested = GcmKey::new(library, key);
        for trial in 0..SMALL_BYTES_MAX + trials {
            let bytes = match trial {
                small if small < SMALL_BYTES_MAX => small,
                large if large % LARGE_ONE_IN == 0 => random.random_range(0..=LARGE_BYTES_MAX),
                _ => random.random_range(0..=MEDIUM_BYTES_MAX),
            };
            let mut aad = vec![0; random.random_range(0..=AAD_BYTES_MAX)];
            random.fill_bytes(&mut aad);
            let mut plain = vec![0; bytes];
            random.fill_bytes(&mut plain);
            let mut nonce = [0; NONCE_LEN];
            random.fill_bytes(&mut nonce);
            compare(&reference, &tested, nonce, &aad, &plain)
                .map_err(|what| format!("{what}, {bytes} bytes under {} of header", aad.len()))?;
        }
    }
    Ok(())
}

fn compare(
    reference: &LessSafeKey,
    tested: &GcmKey,
    nonce: [u8; NONCE_LEN],
    aad: &[u8],
    plain: &[u8],
) -> Result<(), &'static str> {
    let mut expected = plain.to_vec();
    let unique = Nonce::assume_unique_for_key(nonce);
    let expected_tag = reference
        .seal_in_place_separate_tag(unique, Aad::from(aad), &mut expected)
        .map_err(|_| "aws-lc-rs does not seal")?;
    let mut buffer = plain.to_vec();
    let tag = tested.seal_in_place(&nonce, aad, &mut buffer);
    if buffer != expected || tag != expected_tag.as_ref() {
        return Err("sealing in place differs");
    }
    let mut apart = vec![0; plain.len()];
    let tag = tested.seal(&nonce, aad, plain, &mut apart);
    if apart != expected || tag != expected_tag.as_ref() {
        return Err("sealing out of place differs");
    }
    let tag = tested.open_in_place(&nonce, aad, &mut buffer);
    if buffer != plain || tag != expected_tag.as_ref() {
        return Err("opening differs");
    }
    if let Some(byte) = apart.first_mut() {
        *byte ^= 1;
        if tested.open_in_place(&nonce, aad, &mut apart) == expected_tag.as_ref() {
            return Err("a forged packet keeps its tag");
        }
    }
    Ok(())
}

/// The GCM specification's second test case, and FIPS 197's block (appendix C.1).
fn known_answers(library: &'static IpsecMb) -> Result<(), String> {
    let zeroes = GcmKey::new(library, &[0; 16]);
    let mut block = [0; 16];
    let tag = zeroes.seal_in_place(&[0; NONCE_LEN], &[], &mut block);
    if u128::from_be_bytes(block) != 0x0388_dace_60b6_a392_f328_c2b9_71b2_fe78
        || u128::from_be_bytes(tag) != 0xab6e_47d4_2cec_13bd_f53a_67b2_1257_bddf
    {
        return Err("the GCM specification's test case 2 differs".into());
    }
    let key: [u8; 16] = std::array::from_fn(|index| index as u8);
    let block = 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff_u128.to_be_bytes();
    let sealed = BlockKey::new(library, &key).encrypt(&block);
    if u128::from_be_bytes(sealed) != 0x69c4_e0d8_6a7b_0430_d8cd_b780_70b4_c55a {
        return Err("FIPS 197's example block differs".into());
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn a_wrong_key_is_found(library: &'static IpsecMb) {
        let unbound = UnboundKey::new(&AES_128_GCM, &[1; 16]).expect("16 bytes");
        let reference = LessSafeKey::new(unbound);
        let (right, wrong) = (GcmKey::new(library, &[1; 16]), GcmKey::new(library, &[2; 16]));
        assert_eq!(compare(&reference, &right, [0; NONCE_LEN], b"header", b"payload"), Ok(()));
        let failure = compare(&reference, &wrong, [0; NONCE_LEN], b"header", b"payload");
        assert_eq!(failure, Err("sealing in place differs"));
    }
}
