//! Whole connections whose packets a mock device seals asynchronously, in the simulator.
//!
//! The device seals each job some polls after it was submitted, and hands jobs back in an order of
//! its own; it can fail, refuse keys and fall silent. What crosses the link is looked at: the
//! application's data, which repeat one text, must never be seen.
#![allow(clippy::unwrap_used)]

#[path = "common/sim.rs"]
mod sim;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::aead::quic::{self, HeaderProtectionKey};
use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use bytes::Bytes;
use quinn_proto::crypto;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sim::{Pair, PairConfig, Plan, Send, SharedLog};
use stoq::Dir;
use stoq::certs::{ClientTls, IdentityNames, RotatingIdentity, ServerTls};
use stoq::config::SEAL_JOBS_IN_FLIGHT_MAX;
use stoq::datapath::sim::LinkConfig;
use stoq::error::ConnectionError;
use stoq::proto::crypto::offload::{
    KeyHandle, SealAlgorithm, SealJob, SealProvider, SealQueue, SealedJob, cipher_suites,
};

const TEXT: &[u8; 16] = b"nobody sees this";

/// What the device does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Fails every job from this one on.
    FailsFrom(u64),
    /// Answers nothing from this job on.
    SilentFrom(u64),
    /// Takes so many keys.
    KeysMax(usize),
}

#[derive(Default)]
struct Seen {
    jobs: AtomicUsize,
    packets: AtomicUsize,
    /// Jobs handed back before one that was submitted earlier.
    overtaken: AtomicUsize,
    in_flight_max: AtomicUsize,
    keys_taken: AtomicUsize,
    keys_held: Arc<AtomicUsize>,
    refused: AtomicUsize,
}

struct Mock {
    fault: Fault,
    seed: u64,
    seen: Arc<Seen>,
}

/// Counts the keys that the engine holds.
struct Held(Arc<AtomicUsize>);

impl Held {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct PacketKey(LessSafeKey, [u8; 12], #[allow(dead_code)] Held);
struct HeaderKey(HeaderProtectionKey, #[allow(dead_code)] Held);

impl Mock {
    fn take_key(&self) -> Result<Held, String> {
        let taken = self.seen.keys_taken.fetch_add(1, Ordering::Relaxed);
        if matches!(self.fault, Fault::KeysMax(max) if taken >= max) {
            self.seen.refused.fetch_add(1, Ordering::Relaxed);
            return Err("the key table is full".into());
        }
        Ok(Held::new(&self.seen.keys_held))
    }
}

impl SealProvider for Mock {
    fn name(&self) -> &str {
        "mock device"
    }

    fn packet_key(
        &self,
        algorithm: SealAlgorithm,
        key: &[u8],
        iv: &[u8; 12],
    ) -> Result<KeyHandle, String> {
        let algorithm = match algorithm {
            SealAlgorithm::Aes128Gcm => &AES_128_GCM,
            SealAlgorithm::Aes256Gcm => &AES_256_GCM,
        };
        let key = LessSafeKey::new(UnboundKey::new(algorithm, key).unwrap());
        Ok(Arc::new(PacketKey(key, *iv, self.take_key()?)))
    }

    fn header_key(&self, algorithm: SealAlgorithm, key: &[u8]) -> Result<KeyHandle, String> {
        let algorithm = match algorithm {
            SealAlgorithm::Aes128Gcm => &quic::AES_128,
            SealAlgorithm::Aes256Gcm => &quic::AES_256,
        };
        let key = HeaderProtectionKey::new(algorithm, key).unwrap();
        Ok(Arc::new(HeaderKey(key, self.take_key()?)))
    }

    fn queue(&self, shard: usize) -> Box<dyn SealQueue> {
        Box::new(MockQueue {
            fault: self.fault,
            random: StdRng::seed_from_u64(self.seed + shard as u64),
            seen: self.seen.clone(),
            round: 0,
            jobs: Vec::new(),
            flushed: 0,
        })
    }
}

struct MockQueue {
    fault: Fault,
    random: StdRng,
    seen: Arc<Seen>,
    /// Polls that found nothing: the device's clock.
    round: u64,
    /// Jobs, and the round in which each is done.
    jobs: Vec<(u64, SealJob)>,
    /// Jobs that the doorbell was rung for.
    flushed: usize,
}

impl SealQueue for MockQueue {
    fn submit(&mut self, job: SealJob) {
        self.seen.jobs.fetch_add(1, Ordering::Relaxed);
        self.seen.packets.fetch_add(job.packets.len(), Ordering::Relaxed);
        self.jobs.push((self.round + self.random.random_range(0..6), job));
        assert!(self.jobs.len() <= SEAL_JOBS_IN_FLIGHT_MAX);
        self.seen.in_flight_max.fetch_max(self.jobs.len(), Ordering::Relaxed);
    }

    fn flush(&mut self) {
        self.flushed = self.jobs.len();
    }

    fn poll_sealed(&mut self) -> Option<SealedJob> {
        let silent_from = match self.fault {
            Fault::SilentFrom(first) => first,
            _ => u64::MAX,
        };
        let done: Vec<usize> = (0..self.flushed)
            .filter(|index| self.jobs[*index].0 <= self.round)
            .filter(|index| self.jobs[*index].1.id < silent_from)
            .collect();
        if done.is_empty() {
            self.round += 1;
            return None;
        }
        let (_, job) = self.jobs.remove(done[self.random.random_range(0..done.len())]);
        self.flushed -= 1;
        if self.jobs.iter().any(|(_, other)| other.id < job.id) {
            self.seen.overtaken.fetch_add(1, Ordering::Relaxed);
        }
        let datagrams = match self.fault {
            Fault::FailsFrom(first) if job.id >= first => Err("the device was reset".into()),
            _ => Ok(seal(&job)),
        };
        Some(SealedJob { id: job.id, datagrams })
    }
}

/// Seals into memory of the device's own, as a device with registered memory would.
fn seal(job: &SealJob) -> Vec<u8> {
    let mut sealed = job.datagrams.clone();
    for packet in &job.packets {
        let PacketKey(key, iv, _) = packet.key.downcast_ref().unwrap();
        let HeaderKey(header_key, _) = packet.header_key.downcast_ref().unwrap();
        let mut nonce = *iv;
        for (byte, number) in nonce[4..].iter_mut().zip(packet.packet_number.to_be_bytes()) {
            *byte ^= number;
        }
        let nonce = Nonce::assume_unique_for_key(nonce);
        let header = sealed[packet.header.clone()].to_vec();
        let payload = &mut sealed[packet.payload.clone()];
        let tag = key.seal_in_place_separate_tag(nonce, Aad::from(&header), payload).unwrap();
        sealed[packet.payload.end..][..16].copy_from_slice(tag.as_ref());
        let sample_at = packet.number.start + 4;
        let mask = header_key.new_mask(&sealed[sample_at..sample_at + 16]).unwrap();
        let first = &mut sealed[packet.header.start];
        let number_bytes = usize::from(*first & 3) + 1;
        assert_eq!(number_bytes, packet.number.len());
        *first ^= mask[0] & if *first & 0x80 == 0 { 0x1f } else { 0x0f };
        for (byte, mask) in sealed[packet.number.clone()].iter_mut().zip(&mask[1..]) {
            *byte ^= mask;
        }
    }
    sealed
}

type Tls = (Arc<dyn crypto::ServerConfig>, Arc<dyn crypto::ClientConfig>);

fn tls(server: &Arc<dyn SealProvider>, client: &Arc<dyn SealProvider>) -> Tls {
    let names = IdentityNames::new().with_dns("stoq.test").unwrap();
    let identity = RotatingIdentity::self_signed(names).start().unwrap();
    let client = ClientTls::builder()
        .alpn(["test"])
        .roots(identity.roots().to_vec())
        .cipher_suites(cipher_suites(client))
        .build()
        .unwrap();
    let server = ServerTls::builder()
        .identity(identity)
        .alpn(["test"])
        .cipher_suites(cipher_suites(server))
        .build()
        .unwrap();
    (server.crypto(), client.crypto())
}

struct Run {
    pair: Pair,
    /// By the client's device, whose fault it is, and the server's.
    seen: [Arc<Seen>; 2],
    /// Packets on the link, and those that showed the text.
    crossed: Arc<Mutex<(usize, usize)>>,
}

/// An upload of the text over a lossy link with key updates, both ends with the device or, where
/// `attached` is false, with its keys alone.
fn start(fault: Fault, bytes: usize, attached: bool) -> Run {
    let seen: [Arc<Seen>; 2] = Default::default();
    let device = |fault, seen: &Arc<Seen>| -> Arc<dyn SealProvider> {
        Arc::new(Mock { fault, seed: 77, seen: seen.clone() })
    };
    let (client, server) = (device(fault, &seen[0]), device(Fault::None, &seen[1]));
    let link =
        LinkConfig { rate_bps: 200_000_000, delay_us: 2_000, loss: 0.003, ..LinkConfig::default() };
    let config =
        PairConfig { link, seed: 5, tls: Some(tls(&server, &client)), ..Default::default() };
    let data = Bytes::from(TEXT.repeat(bytes / TEXT.len()));
    let sends = vec![Send { dir: Dir::Uni, data, finish: true }];
    let client_plan = Plan { sends, ..Plan::default() };
    let server_plan = Plan { keep: true, update_keys_every: Some(200_000), ..Plan::default() };
    let mut pair = Pair::new(config, client_plan, server_plan);
    if attached {
        pair.client.set_seal_provider(&*client);
        pair.server.set_seal_provider(&*server);
    }
    let crossed = Arc::new(Mutex::new((0, 0)));
    let counts = crossed.clone();
    pair.network.set_filter(Some(Box::new(move |_, payload| {
        let mut counts = counts.lock().unwrap();
        counts.0 += 1;
        counts.1 += usize::from(payload.windows(TEXT.len()).any(|some| some == TEXT));
        true
    })));
    Run { pair, seen, crossed }
}

fn closed(log: &SharedLog) -> Vec<ConnectionError> {
    log.lock().unwrap().closed.clone()
}

#[test]
fn late_and_reordered_completions_carry_a_connection() {
    let bytes = 2_000_000;
    let mut run = start(Fault::None, bytes, true);
    let done = run.pair.run(Duration::from_secs(20), |client, _| client.acknowledged.len() == 1);
    let ends = (closed(&run.pair.client_log), closed(&run.pair.server_log));
    assert!(done, "closed: {ends:?}");
    {
        let log = run.pair.server_log.lock().unwrap();
        let received: Vec<&Vec<u8>> = log.received.values().collect();
        assert!(*received[0] == TEXT.repeat(bytes / TEXT.len()), "other bytes came");
        assert!(log.stats.unwrap().key_updates >= 2);
    }
    let load = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let seen = run.seen.clone();
    assert!(load(&seen[0].jobs) > 200, "{} jobs", load(&seen[0].jobs));
    assert!(load(&seen[0].packets) >= bytes / 1500, "{} packets", load(&seen[0].packets));
    assert!(load(&seen[0].overtaken) > 50, "{} overtaken", load(&seen[0].overtaken));
    assert!(load(&seen[0].in_flight_max) >= 2);
    let (packets, shown) = *run.crossed.lock().unwrap();
    assert!(packets > bytes / 1500 && shown == 0, "{shown} of {packets} packets show the text");
    drop(run);
    for seen in seen {
        // The handshake's and each generation's, not one a packet.
        assert!((4..60).contains(&load(&seen.keys_taken)), "{} keys", load(&seen.keys_taken));
        assert_eq!(load(&seen.keys_held), 0, "keys left behind");
    }
}

/// The client's device fails: the client's connection says so.
fn fails(fault: Fault, words: &str) {
    let mut run = start(fault, 4_000_000, true);
    let ended = run.pair.run(Duration::from_secs(60), |client, _| !client.closed.is_empty());
    assert!(ended, "{fault:?}: the connection goes on");
    let closed = closed(&run.pair.client_log);
    assert_eq!(closed.len(), 1, "{closed:?}");
    let ConnectionError::CryptoProviderFailed(reason) = &closed[0] else {
        panic!("{fault:?}: {closed:?}");
    };
    assert!(reason.contains("mock device") && reason.contains(words), "{reason}");
    run.pair.run(Duration::from_secs(5), |_, _| false);
    let (packets, shown) = *run.crossed.lock().unwrap();
    assert!(packets > 0 && shown == 0, "{shown} of {packets} packets show the text");
    assert!(run.pair.client_log.lock().unwrap().acknowledged.is_empty());
}

#[test]
fn a_failed_job_ends_its_connection_with_the_devices_name() {
    fails(Fault::FailsFrom(60), "reset");
}

#[test]
fn a_silent_device_ends_its_connection_in_bounded_time() {
    fails(Fault::SilentFrom(60), "no answer");
}

#[test]
fn a_refused_key_ends_its_connection() {
    fails(Fault::KeysMax(3), "the key table is full");
}

#[test]
fn without_the_device_its_keys_seal_at_once() {
    let mut run = start(Fault::FailsFrom(0), 300_000, false);
    assert!(run.pair.run(Duration::from_secs(20), |client, _| client.acknowledged.len() == 1));
    assert_eq!(run.seen[0].jobs.load(Ordering::Relaxed), 0);
    let (packets, shown) = *run.crossed.lock().unwrap();
    assert!(packets > 200 && shown == 0, "{shown} of {packets} packets show the text");
}
