//! Connection IDs that carry the shard which owns them.
//!
//! ```text
//! | rotation (3 bits), length or random (5) | server ID, nonce | shard ^ mask | check |
//!                                             ◄── AES-128 ───►
//! ```
//!
//! First octet, server ID and nonce are laid out and encrypted as
//! draft-ietf-quic-load-balancers has it, so a balancer that holds the key finds this machine. The
//! last two octets, which the draft leaves to the server, carry the shard under a keyed hash of all
//! the rest ([`stoq_ebpf::steer`]): a packet's shard is found without AES, in the kernel and here,
//! and observers can neither steer packets to a shard of their choice nor tell whether two IDs
//! belong to one connection.
//!
//! Two configurations are alive at most: new IDs are made with the younger one, IDs of the elder
//! are still read. The packet path reads one immutable [`CidTable`]; a rotation swaps it.

mod quic_lb;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use aws_lc_rs::hkdf;
use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use stoq_ebpf::siphash::SipKey;
use stoq_ebpf::steer::{
    CID_TAG_BYTES, CidWords, ROTATIONS, SteerConfiguration, SteerTable, cid_tag, first_bytes,
    shard_of, steer,
};

use super::balance::Aim;
use crate::config::{CID_BYTES_MAX, CID_SHARD_BYTES, CidConfig, CidKey, ConfigError};
use quic_lb::QuicLb;

const _: () = assert!(CID_TAG_BYTES == CID_SHARD_BYTES);

/// What IDs are made and read with; immutable.
#[derive(Debug)]
pub(crate) struct CidTable {
    steer: SteerTable,
    config: CidConfig,
    /// Of IDs made by `config`, which names a server.
    quic_lb: Option<QuicLb>,
}

impl CidTable {
    /// The first table of an engine with `shards` shards. A key that is not set is random.
    pub(crate) fn new(config: &CidConfig, shards: usize) -> Self {
        let key = config.key.clone().unwrap_or_else(CidKey::random);
        let steer = SteerTable {
            hash_key: sip_key(&key, "stoq initial steering"),
            cid_len_bytes: config.length_bytes as u32,
            shards: shards as u32,
            configurations: [SteerConfiguration::DEAD; ROTATIONS],
        };
        Self::with(steer, config, &key)
    }

    /// The table after `config` has become the current configuration; only the one before it stays
    /// alive beside it.
    fn rotated(&self, config: &CidConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let refuse = |key, value: String, allowed: String| Err(ConfigError { key, value, allowed });
        if config.length_bytes != self.config.length_bytes {
            let allowed = format!("{}: the length is fixed at start", self.config.length_bytes);
            return refuse("cid.length_bytes", config.length_bytes.to_string(), allowed);
        }
        if config.rotation == self.config.rotation {
            let allowed = format!("0 to 6, but not the current {}", self.config.rotation);
            return refuse("cid.rotation", config.rotation.to_string(), allowed);
        }
        let key = config.key.clone().unwrap_or_else(CidKey::random);
        let mut steer = self.steer;
        for (rotation, configuration) in steer.configurations.iter_mut().enumerate() {
            if rotation != usize::from(self.config.rotation) {
                *configuration = SteerConfiguration::DEAD;
            }
        }
        Ok(Self::with(steer, config, &key))
    }

    fn with(mut steer: SteerTable, config: &CidConfig, key: &CidKey) -> Self {
        steer.configurations[usize::from(config.rotation)] =
            SteerConfiguration { key: sip_key(key, "stoq shard in connection id"), is_alive: 1 };
        // Without a server ID the block is all nonce: random bytes need no cipher.
        let quic_lb = (!config.server_id.bytes().is_empty()).then(|| QuicLb::new(key));
        Self { steer, config: config.clone(), quic_lb }
    }

    /// What decides about packets, for the kernel's program.
    pub(crate) fn steer_table(&self) -> &SteerTable {
        &self.steer
    }

    fn make(&self, shard: u8, rng: &mut StdRng) -> ConnectionId {
        let mut cid = [0; CID_BYTES_MAX];
        let cid = &mut cid[..self.config.length_bytes];
        let (prefix, tag) = cid.split_at_mut(self.config.length_bytes - CID_TAG_BYTES);
        let low_bits = match self.config.encode_length {
            true => (self.config.length_bytes - 1) as u8,
            false => rng.random::<u8>() & 0b0001_1111,
        };
        prefix[0] = self.config.rotation << 5 | low_bits;
        let (server_id, nonce) = prefix[1..].split_at_mut(self.config.server_id.bytes().len());
        server_id.copy_from_slice(self.config.server_id.bytes());
        rng.fill_bytes(nonce);
        if let Some(quic_lb) = &self.quic_lb {
            quic_lb.encrypt(&mut prefix[1..]);
        }
        let key = &self.steer.configurations[usize::from(self.config.rotation)].key;
        tag.copy_from_slice(&cid_tag(key, prefix, shard));
        ConnectionId::new(cid)
    }

    /// Decides which shard a datagram belongs to; every shard, and the kernel's program, decides
    /// alike.
    ///
    /// Our own IDs name their shard. Everything else (a client's first Initials and 0-RTT packets)
    /// goes by a hash of its DCID. `None`: no QUIC packet at all, or a short header with an ID that
    /// we never issued.
    pub(crate) fn owner(&self, datagram: &[u8]) -> Option<usize> {
        let is_long_header = datagram.first()? & 0x80 != 0;
        let (at, len) = match is_long_header {
            true => (6, usize::from(*datagram.get(5)?)),
            false => (1, self.config.length_bytes),
        };
        let dcid = datagram.get(at..at + len)?;
        let bytes = match datagram.get(at..at + 24) {
            Some(bytes) => bytes.try_into().expect("24 bytes"),
            None => first_bytes(dcid),
        };
        let steered = steer(&self.steer, CidWords::new(&bytes, len as u32), is_long_header);
        steered.shard().map(|shard| shard as usize)
    }
}

fn sip_key(key: &CidKey, label: &'static str) -> SipKey {
    struct Sixteen;
    impl hkdf::KeyType for Sixteen {
        fn len(&self) -> usize {
            16
        }
    }
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"stoq connection ids").extract(key.secret());
    let mut secret = [0; 16];
    prk.expand(&[label.as_bytes()], Sixteen)
        .and_then(|okm| okm.fill(&mut secret))
        .expect("HKDF gives 16 bytes");
    SipKey::new(&secret)
}

/// The current table, shared by all shards of an engine.
#[derive(Debug, Clone)]
pub(crate) struct Cids(Arc<SharedTable>);

#[derive(Debug)]
struct SharedTable {
    current: ArcSwap<CidTable>,
    /// Held while a table is replaced; readers never look at it.
    rotating: Mutex<()>,
}

impl Cids {
    pub(crate) fn new(table: CidTable) -> Self {
        let current = ArcSwap::from_pointee(table);
        Self(Arc::new(SharedTable { current, rotating: Mutex::new(()) }))
    }

    /// The table at this moment: no lock, and no contention with other shards.
    pub(crate) fn table(&self) -> Guard<Arc<CidTable>> {
        self.0.current.load()
    }

    /// Makes `config` the current configuration. `publish` gets the new decision first, so that
    /// the kernel knows IDs before the first is made.
    pub(crate) fn rotate(
        &self,
        config: &CidConfig,
        publish: impl FnOnce(&SteerTable),
    ) -> Result<(), ConfigError> {
        let _rotating = self.0.rotating.lock().unwrap_or_else(PoisonError::into_inner);
        let table = self.0.current.load().rotated(config)?;
        publish(&table.steer);
        self.0.current.store(Arc::new(table));
        Ok(())
    }
}

/// Issues IDs for one shard, and for another where a Retry is aimed at it.
pub(crate) struct ShardCidGenerator {
    cids: Cids,
    shard: u8,
    aim: Aim,
    rng: StdRng,
    /// For the life of the endpoint: quinn-proto asks once.
    length_bytes: usize,
    lifetime: Option<Duration>,
}

impl ShardCidGenerator {
    pub(crate) fn new(cids: Cids, shard: u8, aim: Aim, seed: [u8; 32]) -> Self {
        let (length_bytes, lifetime_s) = {
            let config = &cids.table().config;
            (config.length_bytes, config.lifetime_s)
        };
        let lifetime = (lifetime_s != 0).then(|| Duration::from_secs(lifetime_s));
        Self { cids, shard, aim, rng: StdRng::from_seed(seed), length_bytes, lifetime }
    }
}

impl ConnectionIdGenerator for ShardCidGenerator {
    fn generate_cid(&mut self) -> ConnectionId {
        let shard = self.aim.shard().unwrap_or(self.shard);
        self.cids.table().make(shard, &mut self.rng)
    }

    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        let words = CidWords::new(&first_bytes(cid), cid.len() as u32);
        match shard_of(&self.cids.table().steer, words) {
            Some(shard) if shard == u32::from(self.shard) => Ok(()),
            _ => Err(InvalidCid),
        }
    }

    fn cid_len(&self) -> usize {
        self.length_bytes
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        self.lifetime
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ServerId;

    fn config(rotation: u8) -> CidConfig {
        CidConfig { rotation, key: Some(CidKey::new(&[7; 16])), ..CidConfig::default() }
    }

    fn generator(cids: &Cids, shard: u8) -> ShardCidGenerator {
        ShardCidGenerator::new(cids.clone(), shard, Aim::default(), [3; 32])
    }

    fn short_header(cid: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x40];
        packet.extend_from_slice(cid);
        packet.extend_from_slice(&[0; 30]);
        packet
    }

    fn long_header(cid: &[u8]) -> Vec<u8> {
        let mut packet = vec![0xc0, 0, 0, 0, 1, cid.len() as u8];
        packet.extend_from_slice(cid);
        packet
    }

    #[test]
    fn every_shard_reads_the_owner_from_the_id() {
        for length_bytes in [8, 10, 19, 20] {
            let cids = Cids::new(CidTable::new(&CidConfig { length_bytes, ..config(0) }, 256));
            for shard in [0u8, 1, 2, 255] {
                let mut generator = generator(&cids, shard);
                for _ in 0..100 {
                    let cid = generator.generate_cid();
                    assert_eq!(cid.len(), length_bytes);
                    assert!(generator.validate(&cid).is_ok());
                    let owner = Some(usize::from(shard));
                    assert_eq!(cids.table().owner(&short_header(&cid)), owner);
                    assert_eq!(cids.table().owner(&long_header(&cid)), owner);
                }
            }
        }
    }

    #[test]
    fn an_outside_balancer_finds_the_server() {
        let key = CidKey::new(&[9; 16]);
        for (length_bytes, server_id) in
            [(14, "abc"), (19, "eight by"), (20, "a"), (20, "twelve bytes")]
        {
            let config = CidConfig {
                length_bytes,
                rotation: 5,
                key: Some(key.clone()),
                server_id: ServerId::new(server_id.as_bytes()),
                encode_length: true,
                lifetime_s: 0,
            };
            config.validate().expect("valid");
            let cids = Cids::new(CidTable::new(&config, 4));
            let mut generator = generator(&cids, 3);
            for _ in 0..50 {
                let cid = generator.generate_cid();
                assert_eq!(cid[0], 5 << 5 | (length_bytes - 1) as u8);
                assert_eq!(cids.table().owner(&short_header(&cid)), Some(3));
                // The balancer knows the lengths of server ID and nonce, no more.
                let mut block = cid[1..1 + server_id.len() + config.nonce_bytes()].to_vec();
                quic_lb::tests::decrypt(&key, &mut block);
                assert_eq!(&block[..server_id.len()], server_id.as_bytes());
            }
        }
    }

    #[test]
    fn two_configurations_are_alive() {
        let cids = Cids::new(CidTable::new(&config(0), 4));
        let mut generator = generator(&cids, 2);
        let first = generator.generate_cid();
        let rotate = |rotation, key: u8| {
            let config = CidConfig { key: Some(CidKey::new(&[key; 16])), ..config(rotation) };
            let mut published = None;
            let result = cids.rotate(&config, |table| published = Some(*table));
            assert_eq!(result.is_ok(), published == Some(cids.table().steer));
            result
        };
        rotate(1, 8).expect("rotated");
        let second = generator.generate_cid();
        assert_eq!((first[0] >> 5, second[0] >> 5), (0, 1));
        for cid in [&first, &second] {
            assert_eq!(cids.table().owner(&short_header(cid)), Some(2));
            assert!(generator.validate(cid).is_ok());
        }
        rotate(2, 9).expect("rotated again");
        assert_eq!(cids.table().owner(&short_header(&first)), None, "the first one is dead");
        assert_eq!(cids.table().owner(&short_header(&second)), Some(2));
        // Clients' own IDs go where they went before.
        let initial = long_header(&[0x42; 12]);
        let before = CidTable::new(&config(0), 4).owner(&initial);
        assert_eq!(cids.table().owner(&initial), before);
        assert_eq!(rotate(2, 1).expect_err("in use").key, "cid.rotation");
        let longer = CidConfig { length_bytes: 11, ..config(3) };
        let error = cids.rotate(&longer, |_| ()).expect_err("another length");
        assert_eq!(error.key, "cid.length_bytes");
    }

    #[test]
    fn a_shard_that_does_not_exist_has_no_packets() {
        let many = Cids::new(CidTable::new(&config(0), 16));
        let cid = generator(&many, 9).generate_cid();
        assert_eq!(CidTable::new(&config(0), 4).owner(&short_header(&cid)), None);
    }

    #[test]
    fn ids_of_another_shard_are_not_valid_here() {
        let cids = Cids::new(CidTable::new(&config(0), 4));
        let cid = generator(&cids, 1).generate_cid();
        assert!(generator(&cids, 2).validate(&cid).is_err(), "no stateless reset for it");
    }

    #[test]
    fn forged_ids_are_mostly_refused_and_never_out_of_range() {
        let table = CidTable::new(&config(0), 4);
        let mut rng = StdRng::seed_from_u64(1);
        let accepted = (0..10_000)
            .filter(|_| {
                let mut cid = [0; 10];
                rng.fill_bytes(&mut cid);
                table.owner(&short_header(&cid)).is_some_and(|shard| {
                    assert!(shard < 4);
                    true
                })
            })
            .count();
        assert!(accepted < 10, "{accepted} of 10000 forged IDs accepted");
    }

    #[test]
    fn truncated_headers_have_no_owner() {
        let table = CidTable::new(&config(0), 4);
        let initial = long_header(&[9; 8]);
        assert!(table.owner(&initial).is_some());
        for len in 0..initial.len() {
            assert_eq!(table.owner(&initial[..len]), None, "{len} bytes");
        }
        assert_eq!(table.owner(&[0x40; 10]), None);
    }
}
