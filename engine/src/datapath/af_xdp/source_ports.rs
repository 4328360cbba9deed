//! Source ports that bring a client's replies to the queue of the shard that asked.
//!
//! A card with RSS picks the queue of a received packet by a hash of addresses and ports. Where the
//! hash is known (function, key, indirection table), a client's engine opens one port per shard,
//! such that whatever the peer's address and port, the ports' replies meet different queues; each
//! shard sends to a peer from the port whose replies come to its own queue. The hash is linear, so
//! that takes no more than ports whose own parts of the hash differ in the low bits alone:
//!
//! ```text
//! entry = (hash(peer, our address) ^ hash(port)) mod length of the table     → queue
//!          any, the same for all ports    base ^ 0, base ^ 1, base ^ 2 …
//! ```
//!
//! With a table that deals its entries out in turn, and a power of two of shards, each shard has its
//! port for each peer; otherwise some have none and send from their own. All shards receive on
//! all ports, and what lands elsewhere is handed over by its connection ID as ever: a wrong guess
//! costs speed only. A change of the table while the engine runs is such a wrong guess.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;

use crate::sys::ethtool::{self, RssState};
use crate::wire::toeplitz::{
    KEY_BYTES_MIN, hash_destination_port, hash_udp, hash_without_destination_port,
};

/// `ETH_RSS_HASH_TOP`.
const TOEPLITZ: u8 = 1;
/// `RXH_IP_SRC | RXH_IP_DST | RXH_L4_B_0_1 | RXH_L4_B_2_3`: both addresses and ports.
const ADDRESSES_AND_PORTS: u64 = 0xf0;
/// Peers whose port is remembered, so that a packet costs a comparison, not a hash.
const PEERS_REMEMBERED: usize = 64;
/// Ports that are searched: the dynamic ones (RFC 6335 §6).
const PORTS: std::ops::RangeInclusive<u16> = 49152..=65535;

#[cfg(feature = "privileged-tests")]
thread_local! {
    /// What [`ReceiveHash::assume_on_this_thread`] said.
    static ASSUMED: std::cell::RefCell<Option<ReceiveHash>> = const { std::cell::RefCell::new(None) };
}

/// How a card chooses the queue of a UDP packet over IPv6: Toeplitz over both addresses and ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveHash {
    key: [u8; KEY_BYTES_MIN],
    /// A power of two of entries.
    table: Arc<[u32]>,
}

impl ReceiveHash {
    /// From a key of at least 40 bytes and an indirection table of a power of two of entries.
    ///
    /// # Errors
    /// Why replies cannot be told by them.
    pub fn new(key: &[u8], table: &[u32]) -> Result<Self, String> {
        let Some(key) = key.first_chunk() else {
            return Err(format!(
                "its hash key has {} bytes, {KEY_BYTES_MIN} are needed",
                key.len()
            ));
        };
        if !table.len().is_power_of_two() {
            return Err(format!("its indirection table has {} entries", table.len()));
        }
        Ok(Self { key: *key, table: table.into() })
    }

    /// Asks the driver of `interface` (`ETHTOOL_GRSSH`, Linux 3.16).
    ///
    /// # Errors
    /// Why the queue of a packet cannot be foretold there.
    pub fn of_interface(interface: &str) -> Result<Self, String> {
        #[cfg(feature = "privileged-tests")]
        if let Some(hash) = ASSUMED.with_borrow(Clone::clone) {
            return Ok(hash);
        }
        match ethtool::rss(interface) {
            Ok(state) => Self::of_state(interface, &state),
            Err(error) => Err(format!("{interface} does not tell how it spreads packets: {error}")),
        }
    }

    /// From now on every interface that this thread asks about hashes so: for tests on veth pairs,
    /// which hash nothing. Compiled with the feature `privileged-tests` alone.
    #[cfg(feature = "privileged-tests")]
    pub fn assume_on_this_thread(self) {
        ASSUMED.set(Some(self));
    }

    fn of_state(interface: &str, state: &RssState) -> Result<Self, String> {
        if state.functions != TOEPLITZ {
            return Err(format!("{interface} hashes by another function than Toeplitz"));
        }
        if state.input_changes != 0 {
            return Err(format!(
                "{interface} hashes symmetrically (ethtool -X {interface} xfrm none)"
            ));
        }
        if state.udp_ipv6_fields != ADDRESSES_AND_PORTS {
            return Err(format!(
                "{interface} does not hash the ports of UDP over IPv6 \
                 (ethtool -N {interface} rx-flow-hash udp6 sdfn)"
            ));
        }
        // A key that was never set makes one queue of all.
        if state.key.iter().all(|byte| *byte == 0) {
            return Err(format!("{interface} keeps its hash key to itself"));
        }
        Self::new(&state.key, &state.table).map_err(|why| format!("{interface}: {why}"))
    }

    /// The queue at which a packet from `source` to `destination` arrives.
    #[must_use]
    pub fn queue(&self, source: &SocketAddrV6, destination: &SocketAddrV6) -> u32 {
        self.entry(hash_udp(&self.key, source, destination))
    }

    fn entry(&self, hash: u32) -> u32 {
        self.table[hash as usize & (self.table.len() - 1)]
    }

    /// Ports, in the order to try, that serve as the `index`-th beside `first`; the search starts at
    /// `first`, so that engines seldom want the same.
    pub(super) fn candidates(&self, first: u16, index: usize) -> impl Iterator<Item = u16> + '_ {
        let mask = self.table.len() - 1;
        let low = move |port| hash_destination_port(&self.key, port) as usize & mask;
        let wanted = low(first) ^ index;
        let later = first.max(*PORTS.start())..=*PORTS.end();
        later
            .chain(*PORTS.start()..first)
            .filter(move |port| low(*port) == wanted && *port != first)
    }

    /// Whether the table is long enough to tell so many ports apart.
    pub(super) fn can_tell(&self, shards: usize) -> bool {
        shards <= self.table.len()
    }
}

/// From which port a shard sends to a peer.
#[derive(Debug)]
pub(super) struct SourcePort {
    own: u16,
    choice: Option<Box<Choice>>,
}

#[derive(Debug)]
struct Choice {
    hash: ReceiveHash,
    ports: Arc<[u16]>,
    queue: u32,
    /// By the low bits of the peer's address and port.
    remembered: [Option<(Ipv6Addr, SocketAddrV6, u16)>; PEERS_REMEMBERED],
}

impl SourcePort {
    /// Always `port`.
    pub(super) const fn fixed(port: u16) -> Self {
        Self { own: port, choice: None }
    }

    /// That one of `ports` whose replies arrive at `queue`; `own` where there is none.
    pub(super) fn chosen(own: u16, hash: ReceiveHash, ports: Arc<[u16]>, queue: u32) -> Self {
        let remembered = [None; PEERS_REMEMBERED];
        Self { own, choice: Some(Box::new(Choice { hash, ports, queue, remembered })) }
    }

    /// The port to send from, from the address `local` to `remote`: always the same for the same two.
    pub(super) fn towards(&mut self, local: Ipv6Addr, remote: &SocketAddrV6) -> u16 {
        let Some(choice) = &mut self.choice else { return self.own };
        let place = usize::from(remote.ip().octets()[15]) ^ usize::from(remote.port());
        let place = place % PEERS_REMEMBERED;
        match choice.remembered[place] {
            Some((from, to, port)) if from == local && to == *remote => port,
            _ => {
                let port = choice.find(local, remote).unwrap_or(self.own);
                choice.remembered[place] = Some((local, *remote, port));
                port
            }
        }
    }
}

impl Choice {
    fn find(&self, local: Ipv6Addr, remote: &SocketAddrV6) -> Option<u16> {
        let base = hash_without_destination_port(&self.hash.key, remote, local);
        let reaches = |port: &&u16| {
            self.hash.entry(base ^ hash_destination_port(&self.hash.key, **port)) == self.queue
        };
        self.ports.iter().find(reaches).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

    fn key() -> Vec<u8> {
        (0..52_u32).map(|index| (index * 151 + 77) as u8 ^ (index * index) as u8).collect()
    }

    fn dealt(entries: u32, queues: u32) -> Vec<u32> {
        (0..entries).map(|entry| entry % queues).collect()
    }

    fn state() -> RssState {
        RssState {
            functions: TOEPLITZ,
            input_changes: 0,
            key: key(),
            table: dealt(128, 4),
            udp_ipv6_fields: ADDRESSES_AND_PORTS,
        }
    }

    fn peers() -> impl Iterator<Item = SocketAddrV6> {
        (0..500_u16).map(|peer| {
            let ip = Ipv6Addr::new(0x2001, 0xdb8, peer, 0, 7, 0, 0, peer.wrapping_mul(31));
            SocketAddrV6::new(ip, 443 + peer % 3, 0, 0)
        })
    }

    /// How many of all peers and shards have a port whose replies come to the shard's queue.
    fn served(queues: u32) -> (usize, usize) {
        let hash = ReceiveHash::new(&key(), &dealt(128, queues)).expect("a usable table");
        let mut ports = vec![50_000_u16];
        for index in 1..queues as usize {
            ports.push(hash.candidates(50_000, index).next().expect("a port"));
        }
        let ports: Arc<[u16]> = ports.into();
        let (mut served, mut all) = (0, 0);
        for (queue, own) in (0..queues).zip(ports.iter()) {
            let mut source = SourcePort::chosen(*own, hash.clone(), ports.clone(), queue);
            for peer in peers() {
                let port = source.towards(LOCAL, &peer);
                assert_eq!(port, source.towards(LOCAL, &peer), "it is remembered");
                let us = SocketAddrV6::new(LOCAL, port, 0, 0);
                served += usize::from(hash.queue(&peer, &us) == queue);
                all += 1;
            }
        }
        (served, all)
    }

    #[test]
    fn replies_arrive_at_their_shards_queue_whoever_the_peer_is() {
        for queues in [2, 4, 8, 64] {
            let (served, all) = served(queues);
            assert_eq!(served, all, "{queues} queues");
        }
    }

    #[test]
    fn other_numbers_of_shards_are_served_mostly() {
        let (served, all) = served(3);
        assert!(served * 10 > all * 6 && served < all, "{served} of {all}");
    }

    #[test]
    fn a_queue_that_the_table_lacks_sends_from_its_own_port() {
        let hash = ReceiveHash::new(&key(), &dealt(128, 2)).expect("a usable table");
        let ports: Arc<[u16]> = [50_000, 50_001].into();
        let mut source = SourcePort::chosen(50_001, hash, ports, 9);
        assert!(peers().all(|peer| source.towards(LOCAL, &peer) == 50_001));
        let mut fixed = SourcePort::fixed(7);
        assert!(peers().all(|peer| fixed.towards(LOCAL, &peer) == 7));
    }

    #[test]
    fn what_cannot_be_foretold_is_refused_with_its_reason() {
        assert!(ReceiveHash::of_state("eth9", &state()).is_ok());
        let refused = |change: fn(&mut RssState), word: &str| {
            let mut state = state();
            change(&mut state);
            let why = ReceiveHash::of_state("eth9", &state).expect_err(word);
            assert!(why.contains("eth9") && why.contains(word), "{why}");
        };
        refused(|state| state.functions = 2, "Toeplitz");
        refused(|state| state.input_changes = 1, "symmetrically");
        refused(|state| state.udp_ipv6_fields = 0x30, "rx-flow-hash udp6 sdfn");
        refused(|state| state.key.fill(0), "keeps its hash key");
        refused(|state| state.key.truncate(39), "39 bytes");
        refused(|state| state.table.truncate(100), "100 entries");
        refused(|state| state.table.clear(), "0 entries");
        let why = ReceiveHash::of_interface("lo").expect_err("no RSS");
        assert!(why.contains("lo does not tell"), "{why}");
    }
}
