//! The providers against each other and RFC 9001's examples (appendix A).

use std::io::Write as _;

use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rustls::Side;
use rustls::quic::{HeaderProtectionKey, Keys, Version};

use super::*;
use crate::config::unhex;

/// Client's Destination Connection ID of RFC 9001's examples.
const EXAMPLE_CID: [u8; 8] = [0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];
/// Random packets of either suite.
const TRIALS: usize = 4_000;

/// Both providers, or aws-lc-rs alone after saying so where the test harness cannot hide it.
fn providers() -> Vec<CryptoProvider> {
    let mut providers = vec![CryptoProvider::AwsLcRs];
    match ipsec_mb_version() {
        Ok(_) => providers.push(CryptoProvider::IpsecMb),
        Err(reason) => writeln!(
            std::io::stderr(),
            "NOT TESTED, ipsec-mb cannot be used here: {reason}; {IPSEC_MB_ADVICE}"
        )
        .expect("stderr"),
    }
    providers
}

/// Initial keys, which depend on nothing but a connection ID, of the provider's suite.
fn keys(provider: CryptoProvider, suite: usize, cid: &[u8], side: Side) -> Keys {
    let suites = provider.cipher_suites();
    let suite = suites[suite].tls13().expect("TLS 1.3");
    Keys::initial(Version::V1, suite, suite.quic.expect("QUIC"), cid, side)
}

fn hex(text: &str) -> Vec<u8> {
    unhex(text).expect("hexadecimal")
}

/// Seals a packet as RFC 9001 §5 says; the packet number starts at `number_at` and ends the header.
fn protect(keys: &Keys, number: u64, header: &[u8], number_at: usize, payload: &[u8]) -> Vec<u8> {
    let mut packet = [header, payload].concat();
    let (head, body) = packet.split_at_mut(header.len());
    let tag = keys.local.packet.encrypt_in_place(number, head, body).expect("sealed");
    packet.extend_from_slice(tag.as_ref());
    let (head, sample) = packet.split_at_mut(number_at + 4);
    let (first, rest) = head.split_at_mut(1);
    let number_bytes = header.len() - number_at;
    let number = &mut rest[number_at - 1..number_at - 1 + number_bytes];
    keys.local.header.encrypt_in_place(&sample[..16], &mut first[0], number).expect("masked");
    packet
}

#[test]
fn the_clients_initial_of_rfc_9001_a_2() {
    let crypto =
        hex("060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e86804fe3a47f06a2b69484c\
         00000413011302010000c000000010000e00000b6578616d706c652e636f6dff01000100000a00080006\
         001d0017001800100007000504616c706e000500050100000000003300260024001d00209370b2c9caa4\
         7fbabaf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b0003020304000d0010000e040305\
         0306030203080408050806002d00020101001c00024001003900320408ffffffffffffffff05048000ff\
         ff07048000ffff0801100104800075300901100f088394c8f03e51570806048000ffff");
    let mut payload = crypto;
    payload.resize(1162, 0);
    let header = hex("c300000001088394c8f03e5157080000449e00000002");
    for provider in providers() {
        let keys = keys(provider, 0, &EXAMPLE_CID, Side::Client);
        let packet = protect(&keys, 2, &header, 18, &payload);
        assert_eq!(packet.len(), 1200, "{provider}");
        let start =
            hex("c000000001088394c8f03e5157080000449e7b9aec34d1b1c98dd7689fb8ec11d242b123dc9b");
        assert_eq!(packet[..start.len()], start, "{provider}");
        assert_eq!(packet[1184..], hex("e221af44860018ab0856972e194cd934"), "{provider}");
    }
}

#[test]
fn the_servers_initial_of_rfc_9001_a_3() {
    let payload =
        hex("02000000000600405a020000560303eefce7f7b37ba1d1632e96677825ddf73988cfc79825df566dc543\
         0b9a045a1200130100002e00330024001d00209d3c940d89690b84d08a60993c144eca684d1081287c83\
         4d5311bcf32bb9da1a002b00020304");
    let header = hex("c1000000010008f067a5502a4262b50040750001");
    let expected =
        hex("cf000000010008f067a5502a4262b5004075c0d95a482cd0991cd25b0aac406a5816b6394100f37a1c69\
         797554780bb38cc5a99f5ede4cf73c3ec2493a1839b3dbcba3f6ea46c5b7684df3548e7ddeb9c3bf9c73\
         cc3f3bded74b562bfb19fb84022f8ef4cdd93795d77d06edbb7aaf2f58891850abbdca3d20398c276456\
         cbc42158407dd074ee");
    for provider in providers() {
        let keys = keys(provider, 0, &EXAMPLE_CID, Side::Server);
        assert_eq!(protect(&keys, 1, &header, 18, &payload), expected, "{provider}");
    }
}

#[test]
fn what_one_provider_protects_the_other_opens() {
    let providers = providers();
    let seed = 0x71_c0;
    println!("seed {seed:#x}");
    let mut random = StdRng::seed_from_u64(seed);
    for suite in 0..2 {
        let mut cid = [0; 20];
        random.fill_bytes(&mut cid);
        let client: Vec<Keys> =
            providers.iter().map(|provider| keys(*provider, suite, &cid, Side::Client)).collect();
        let server: Vec<Keys> =
            providers.iter().map(|provider| keys(*provider, suite, &cid, Side::Server)).collect();
        for trial in 0..TRIALS {
            let number_bytes = random.random_range(1..=4);
            let mut header = vec![0; random.random_range(2..60) + number_bytes];
            random.fill_bytes(&mut header);
            header[0] = (header[0] & !3) | (number_bytes as u8 - 1);
            let bytes = if trial % 50 == 0 { 60_000 } else { random.random_range(4..3_000) };
            let mut payload = vec![0; bytes];
            random.fill_bytes(&mut payload);
            let number = random.next_u64() >> 2;
            let number_at = header.len() - number_bytes;
            let packets: Vec<Vec<u8>> = client
                .iter()
                .map(|keys| protect(keys, number, &header, number_at, &payload))
                .collect();
            assert!(packets.iter().all(|packet| *packet == packets[0]), "trial {trial}");
            for keys in &server {
                open_and_forge(keys, &packets[0], number, &header, number_at, &payload);
            }
        }
    }
}

/// Opens `packet`, then finds each of three forgeries out.
fn open_and_forge(
    keys: &Keys,
    packet: &[u8],
    number: u64,
    header: &[u8],
    number_at: usize,
    payload: &[u8],
) {
    let mut packet = packet.to_vec();
    let (head, sample) = packet.split_at_mut(number_at + 4);
    let (first, rest) = head.split_at_mut(1);
    let number_field = &mut rest[number_at - 1..number_at + 3];
    keys.remote
        .header
        .decrypt_in_place(&sample[..16], &mut first[0], number_field)
        .expect("sample");
    assert_eq!(packet[..header.len()], *header);
    let body = packet.split_off(header.len());
    let open = |header: &[u8], number: u64, mut body: Vec<u8>| {
        let opened = keys.remote.packet.decrypt_in_place(number, header, &mut body);
        opened.map(<[u8]>::to_vec).map_err(|_| body)
    };
    assert_eq!(open(header, number, body.clone()).expect("authentic"), payload);
    let mut forged = body.clone();
    let at = (number % forged.len() as u64) as usize;
    forged[at] ^= 0x10;
    let left = open(header, number, forged).expect_err("a changed byte");
    assert!(!left.windows(4).any(|some| payload.starts_with(some)), "unauthentic data stays");
    let mut header = header.to_vec();
    header[1] ^= 1;
    open(&header, number, body.clone()).expect_err("a changed header");
    header[1] ^= 1;
    open(&header, number + 1, body.clone()).expect_err("another packet number");
    open(&header, number, body[..15].to_vec()).expect_err("shorter than a tag");
}

#[test]
fn the_limits_of_a_key_are_rfc_9001s() {
    for provider in providers() {
        for suite in 0..2 {
            let keys = keys(provider, suite, &EXAMPLE_CID, Side::Client);
            assert_eq!(keys.local.packet.confidentiality_limit(), 1 << 23, "{provider}");
            assert_eq!(keys.local.packet.integrity_limit(), 1 << 52, "{provider}");
            assert_eq!(keys.local.packet.tag_len(), 16, "{provider}");
            assert_eq!(keys.local.header.sample_len(), 16, "{provider}");
        }
    }
}

#[test]
fn a_bad_sample_or_number_changes_nothing() {
    for provider in providers() {
        let keys = keys(provider, 0, &EXAMPLE_CID, Side::Client);
        let key: &dyn HeaderProtectionKey = &*keys.local.header;
        let (mut first, mut number) = (0x43, [1, 2, 3, 4, 5]);
        key.encrypt_in_place(&[0; 15], &mut first, &mut number[..4]).expect_err("short sample");
        key.encrypt_in_place(&[0; 16], &mut first, &mut number).expect_err("long number");
        assert_eq!((first, number), (0x43, [1, 2, 3, 4, 5]), "{provider}");
    }
}

#[test]
fn the_choice_is_kept_or_refused_in_words() {
    assert_eq!(CryptoProvider::choose(CryptoProviderChoice::AwsLcRs), Ok(CryptoProvider::AwsLcRs));
    let auto = CryptoProvider::choose(CryptoProviderChoice::Auto).expect("always something");
    match CryptoProvider::choose(CryptoProviderChoice::IpsecMb) {
        Ok(provider) => assert_eq!((provider, auto), (CryptoProvider::IpsecMb, provider)),
        Err(error) => {
            assert_eq!(auto, CryptoProvider::AwsLcRs);
            assert!(error.to_string().contains("libipsec-mb1"), "{error}");
        }
    }
}

#[test]
fn suites_keep_name_and_order() {
    let names = |provider: CryptoProvider| -> Vec<_> {
        provider.cipher_suites().iter().map(SupportedCipherSuite::suite).collect()
    };
    for provider in providers() {
        assert_eq!(names(provider), names(CryptoProvider::AwsLcRs));
    }
}

/// A library that computes wrongly must not pass: the reference with another key stands in for it.
#[test]
fn the_self_test_fails_what_differs() {
    let Ok(library) = sys::ipsec_mb::IpsecMb::load() else {
        providers();
        return;
    };
    self_test::run(library, TRIALS / 8).expect("a good library passes");
    self_test::tests::a_wrong_key_is_found(library);
}
