//! What sealing one packet costs, ns: `cargo bench -p stoq --bench sealing`.
//!
//! AES-128-GCM on one core, payloads of 64, 1412 and 8912 bytes under a short header of 13:
//! aws-lc-rs through rustls's QUIC keys (what quinn-proto calls), aws-lc-rs directly, ipsec-mb
//! through this engine's keys, ipsec-mb from one buffer into another, and the copy that sealing in
//! place needs besides where the packet must end up elsewhere. Then opening, and header masks.
//! Each figure is the fastest of 200 rounds of 256 packets in 64 buffers, the ways taking turns, so
//! that other load on the machine does not count. Lines of a provider that is missing say so.

use std::hint::black_box;
use std::time::Instant;

use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::Side;
use rustls::quic::{HeaderProtectionKey, Keys, PacketKey, Version};
use stoq::proto::crypto::{CryptoProvider, IpsecMbOutOfPlace, ipsec_mb_version};

const PAYLOAD_BYTES: [usize; 3] = [64, 1412, 8912];
const HEADER: [u8; 13] = [0x43, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
const NONCE: [u8; 12] = [7; 12];
const KEY: [u8; 16] = [3; 16];
const TAG_BYTES: usize = 16;
const BUFFERS: usize = 64;
const PACKETS: usize = 256;
const ROUNDS: usize = 200;

/// Packet number, packet, another buffer as long.
type Work<'a> = dyn FnMut(u64, &mut [u8], &mut [u8]) + 'a;

/// A way to do something to a packet: its name, and the work.
struct Way<'a> {
    name: &'static str,
    run: Box<Work<'a>>,
    best_ns: f64,
}

fn way<'a>(name: &'static str, run: impl FnMut(u64, &mut [u8], &mut [u8]) + 'a) -> Way<'a> {
    Way { name, run: Box::new(run), best_ns: f64::INFINITY }
}

/// Runs the ways in turns and prints the fastest round of each.
fn measure(title: &str, bytes: usize, mut ways: Vec<Way<'_>>) {
    let mut sources = vec![vec![0x55; bytes]; BUFFERS];
    let mut targets = vec![vec![0; bytes]; BUFFERS];
    let mut number = 0;
    for _ in 0..ROUNDS {
        for way in &mut ways {
            let start = Instant::now();
            for packet in 0..PACKETS {
                number += 1;
                let buffer = packet % BUFFERS;
                (way.run)(number, &mut sources[buffer], &mut targets[buffer]);
            }
            let ns = start.elapsed().as_secs_f64() * 1e9 / PACKETS as f64;
            way.best_ns = way.best_ns.min(ns);
        }
    }
    for way in ways {
        println!("{title:<8} {bytes:>5} B  {:<28} {:>7.1} ns", way.name, way.best_ns);
    }
}

fn keys(provider: CryptoProvider) -> Keys {
    let suites = provider.cipher_suites();
    let suite = suites[0].tls13().expect("TLS 1.3");
    let quic = suite.quic.expect("QUIC");
    Keys::initial(Version::V1, suite, quic, &[1, 2, 3, 4, 5, 6, 7, 8], Side::Client)
}

fn seal(key: &dyn PacketKey, number: u64, packet: &mut [u8]) {
    let tag = key.encrypt_in_place(number, &HEADER, packet).expect("sealed");
    black_box(tag.as_ref());
}

fn mask(key: &dyn HeaderProtectionKey, packet: &mut [u8]) {
    let (header, sample) = packet.split_at_mut(32);
    let (first, rest) = header.split_at_mut(1);
    key.encrypt_in_place(&sample[..16], &mut first[0], &mut rest[..4]).expect("masked");
}

/// Opens what `sealer`, the same key, sealed before each round.
fn opening(title: &str, bytes: usize, key: &dyn PacketKey, sealer: &dyn PacketKey) {
    let mut best = f64::INFINITY;
    let mut packets = vec![vec![0; bytes + TAG_BYTES]; BUFFERS];
    for _ in 0..ROUNDS {
        for (number, packet) in packets.iter_mut().enumerate() {
            let (payload, tag) = packet.split_at_mut(bytes);
            let sealed = sealer.encrypt_in_place(number as u64, &HEADER, payload).expect("sealed");
            tag.copy_from_slice(sealed.as_ref());
        }
        let start = Instant::now();
        for (number, packet) in packets.iter_mut().enumerate() {
            black_box(key.decrypt_in_place(number as u64, &HEADER, packet).expect("opened"));
        }
        best = f64::min(best, start.elapsed().as_secs_f64() * 1e9 / BUFFERS as f64);
    }
    println!("{:<8} {bytes:>5} B  {title:<28} {best:>7.1} ns", "open");
}

fn main() {
    let aws = keys(CryptoProvider::AwsLcRs);
    let ipsec = ipsec_mb_version().map(|version| (version, keys(CryptoProvider::IpsecMb)));
    match &ipsec {
        Ok((version, _)) => println!("ipsec-mb {version}"),
        Err(reason) => println!("ipsec-mb IS MISSING, its lines are left out: {reason}"),
    }
    let direct = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &KEY).expect("16 bytes"));
    for bytes in PAYLOAD_BYTES {
        let mut ways = vec![
            way("aws-lc-rs through rustls", |number, packet, _| {
                seal(&*aws.local.packet, number, packet);
            }),
            way("aws-lc-rs directly", |_, packet, _| {
                let nonce = Nonce::assume_unique_for_key(NONCE);
                let aad = Aad::from(&HEADER);
                let tag = direct.seal_in_place_separate_tag(nonce, aad, packet).expect("sealed");
                black_box(tag.as_ref());
            }),
            way("copy alone", |_, packet, target| {
                target.copy_from_slice(black_box(packet));
                black_box(target);
            }),
        ];
        if let (Ok((_, keys)), Some(apart)) = (&ipsec, IpsecMbOutOfPlace::new(&KEY)) {
            ways.push(way("ipsec-mb in place", |number, packet, _| {
                seal(&*keys.local.packet, number, packet);
            }));
            ways.push(way("ipsec-mb in place, then copy", |number, packet, target| {
                seal(&*keys.local.packet, number, packet);
                target.copy_from_slice(packet);
                black_box(target);
            }));
            ways.push(way("ipsec-mb out of place", move |_, packet, target| {
                black_box(apart.seal(&NONCE, &HEADER, packet, target));
            }));
        }
        measure("seal", bytes, ways);
        opening("aws-lc-rs through rustls", bytes, &*aws.local.packet, &*aws.local.packet);
        if let Ok((_, keys)) = &ipsec {
            opening("ipsec-mb", bytes, &*keys.local.packet, &*aws.local.packet);
        }
    }
    let mut ways = vec![way("aws-lc-rs through rustls", |_, packet: &mut [u8], _: &mut [u8]| {
        mask(&*aws.local.header, packet);
    })];
    if let Ok((_, keys)) = &ipsec {
        ways.push(way("ipsec-mb", |_, packet, _| mask(&*keys.local.header, packet)));
    }
    measure("mask", 64, ways);
}
