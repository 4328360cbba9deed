//! Packets find their connection's shard: over rebindings, rotations and forgeries, on `::1`.

#[path = "common/balance.rs"]
#[allow(dead_code, unreachable_pub)]
mod balance;
#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;
#[path = "common/relay.rs"]
#[allow(dead_code, unreachable_pub)]
mod relay;

use std::net::Ipv6Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pair::{NAME, Pair, Watchdog, config, counters, wait_for};
use pollster::block_on;
use quinn_proto::TokenStore;
use relay::Relay;
use stoq::certs::SharedKeys;
use stoq::config::{CidConfig, CidKey, RetryPolicy, ServerId, TransportConfig};
use stoq::connection::Connection;
use stoq::engine::Engine;
use stoq::error::ConnectionError;

const SHARDS: usize = 4;

fn sharded() -> TransportConfig {
    TransportConfig { shards: SHARDS, ..config() }
}

/// A connection through a relay: the client's end, the server's, and the relay.
async fn connect_through(pair: &Pair) -> (Connection, Connection, Relay) {
    connect_with_ids_of(pair, CidConfig::default().length_bytes).await
}

/// The same where the server's IDs have so many bytes.
async fn connect_with_ids_of(pair: &Pair, cid_bytes: usize) -> (Connection, Connection, Relay) {
    let server = pair.server.local_addr();
    let relay = Relay::start(Ipv6Addr::LOCALHOST, server, vec![Ipv6Addr::LOCALHOST], cid_bytes);
    let connecting = pair.client.connect(relay.addr, NAME);
    let incoming = pair.server.accept().await.expect("a client knocks");
    let (client, server) = futures_util::future::join(connecting, incoming.accept()).await;
    (client.expect("connected"), server.expect("accepted"), relay)
}

/// A request and its echo on a stream of its own.
async fn exchange(client: &Connection, server: &Connection, bytes: usize) {
    let data: Vec<u8> = (0..bytes).map(|index| (index * 31 + bytes) as u8).collect();
    let there = async {
        let (mut send, mut recv) = client.open_bi().await.expect("a stream");
        send.write_all(&data).await.expect("written");
        send.finish().expect("finished");
        recv.read_to_end(bytes + 1).await.expect("echoed")
    };
    let back = async {
        let (mut send, mut recv) = server.accept_bi().await.expect("a stream");
        let data = recv.read_to_end(bytes + 1).await.expect("received");
        send.write_all(&data).await.expect("written");
        send.finish().expect("finished");
    };
    let (echo, ()) = futures_util::future::join(there, back).await;
    assert!(echo == data, "{} bytes came back changed", echo.len());
}

#[test]
fn a_connection_survives_many_rebindings() {
    let _watchdog = Watchdog::new("a_connection_survives_many_rebindings");
    let pair = Pair::with(sharded(), config());
    block_on(async {
        let (client, server, relay) = connect_through(&pair).await;
        for _ in 0..40 {
            relay.rebind();
            exchange(&client, &server, 20_000).await;
        }
        assert_eq!(relay.rebindings(), 40, "each exchange left by a port of its own");
        let counters = counters(&pair.server);
        assert_eq!(counters.rx_drop_no_owner, 0);
        assert_eq!(counters.rx_drop_unknown_connection, 0);
        wait_for("every hand-over has ended", || {
            let now = pair::counters(&pair.server);
            now.rx_handed_over == now.rx_taken_over
        });
    });
}

#[test]
fn ids_are_rotated_under_a_live_connection() {
    let _watchdog = Watchdog::new("ids_are_rotated_under_a_live_connection");
    let with_rotation = |rotation, key: u8| CidConfig {
        rotation,
        key: Some(CidKey::new(&[key; 16])),
        lifetime_s: 4,
        ..CidConfig::default()
    };
    let cid = with_rotation(0, 1);
    let server = TransportConfig { cid, idle_timeout_ms: 1_900, ..sharded() };
    let pair = Pair::with(server, config());
    block_on(async {
        let (client, server, relay) = connect_through(&pair).await;
        exchange(&client, &server, 5_000).await;
        assert!(relay.cids().iter().all(|cid| cid[0] >> 5 == 0));
        pair.server.rotate_cids(&with_rotation(3, 2)).expect("rotated");
        // The lifetime of the old IDs ends in mid-connection; the client moves to new ones.
        let start = Instant::now();
        while !relay.cids().iter().any(|cid| cid[0] >> 5 == 3) {
            exchange(&client, &server, 5_000).await;
            assert!(start.elapsed() < Duration::from_secs(30), "no ID of the new configuration");
            std::thread::sleep(Duration::from_millis(20));
        }
        // New connections have new IDs at once.
        let (client, server, relay) = connect_through(&pair).await;
        exchange(&client, &server, 5_000).await;
        assert!(relay.cids().iter().all(|cid| cid[0] >> 5 == 3));
        assert_eq!(counters(&pair.server).rx_drop_no_owner, 0);
        let same = pair.server.rotate_cids(&with_rotation(3, 4)).expect_err("in use");
        assert_eq!(same.key, "cid.rotation");
    });
}

/// New keys and server IDs under live connections of several shards, twice: the IDs that they began
/// with are dead then, and each has moved on in time.
#[test]
fn key_and_server_id_change_twice_under_live_connections() {
    const CID_BYTES: usize = 20;
    const CONNECTIONS: usize = 6;
    let _watchdog = Watchdog::new("key_and_server_id_change_twice_under_live_connections");
    let with_rotation = |rotation: u8| CidConfig {
        length_bytes: CID_BYTES,
        rotation,
        key: Some(CidKey::new(&[rotation + 1; 16])),
        server_id: ServerId::new(&[0xa0 | rotation; 4]),
        lifetime_s: 4,
        ..CidConfig::default()
    };
    let server = TransportConfig { cid: with_rotation(0), idle_timeout_ms: 1_900, ..sharded() };
    let pair = Pair::with(server, config());
    block_on(async {
        let mut links = Vec::new();
        for _ in 0..CONNECTIONS {
            links.push(connect_with_ids_of(&pair, CID_BYTES).await);
        }
        assert!(shards_that_accepted(&pair.server) > 1, "one shard has all");
        for rotation in 1..=2_u8 {
            pair.server.rotate_cids(&with_rotation(rotation)).expect("rotated");
            let has_moved = |relay: &Relay| relay.cids().iter().any(|cid| cid[0] >> 5 == rotation);
            let start = Instant::now();
            while !links.iter().all(|(.., relay)| has_moved(relay)) {
                for (client, server, relay) in &links {
                    relay.rebind();
                    exchange(client, server, 1000).await;
                }
                assert!(start.elapsed() < Duration::from_secs(40), "rotation {rotation}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        for (client, server, _) in &links {
            exchange(client, server, 1000).await;
        }
        let counters = counters(&pair.server);
        assert_eq!(counters.rx_drop_unknown_connection, 0, "{counters:?}");
        assert_eq!(counters.handshakes_timed_out, 0, "{counters:?}");
    });
}

/// Keeps the first token that a server gives, and presents it for ever.
#[derive(Default)]
struct Replayer(Mutex<Option<Bytes>>);

impl TokenStore for Replayer {
    fn insert(&self, _server_name: &str, token: Bytes) {
        self.0.lock().expect("not poisoned").get_or_insert(token);
    }

    fn take(&self, _server_name: &str) -> Option<Bytes> {
        self.0.lock().expect("not poisoned").clone()
    }
}

/// How many Retries a new connection cost; it is closed again.
async fn retries_of_a_connection(pair: &Pair) -> u64 {
    let before = counters(&pair.server).retries;
    let (client, server) = pair.connect().await;
    exchange(&client, &server, 1000).await;
    counters(&pair.server).retries - before
}

/// A connection whose client is sent back for a token; the counter may come behind the packet.
async fn connect_with_a_retry(pair: &Pair) {
    let before = counters(&pair.server).retries;
    let (client, server) = pair.connect().await;
    exchange(&client, &server, 1000).await;
    wait_for("a Retry: no token was believed", || counters(&pair.server).retries > before);
}

fn shards_that_accepted(server: &Engine) -> usize {
    server.stats().iter().filter(|stats| stats.shard.accepted > 0).count()
}

#[test]
fn an_address_token_is_good_once_whichever_shard_sees_it() {
    let _watchdog = Watchdog::new("an_address_token_is_good_once_whichever_shard_sees_it");
    let server = TransportConfig { retry: RetryPolicy::Always, ..sharded() };
    let store = Arc::new(Replayer::default());
    let pair = Pair::build(
        Engine::builder().config(server),
        Engine::builder().config(config()).token_store(store.clone()),
    );
    block_on(async {
        connect_with_a_retry(&pair).await;
        let came = || store.0.lock().expect("not poisoned").is_some();
        wait_for("the server's token", came);
        assert_eq!(retries_of_a_connection(&pair).await, 0, "the token proves the address");
        for _replay in 0..12 {
            connect_with_a_retry(&pair).await;
        }
    });
    assert!(shards_that_accepted(&pair.server) > 1, "one shard saw every replay");
}

#[test]
fn each_connection_brings_tokens_for_the_next_on_any_shard() {
    let _watchdog = Watchdog::new("each_connection_brings_tokens_for_the_next_on_any_shard");
    let server = TransportConfig { retry: RetryPolicy::Always, ..sharded() };
    let pair = Pair::with(server, TransportConfig { shards: 2, ..config() });
    block_on(async {
        connect_with_a_retry(&pair).await;
        for _ in 0..12 {
            // Tokens come with the first data after the handshake.
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(retries_of_a_connection(&pair).await, 0);
        }
    });
    assert!(shards_that_accepted(&pair.server) > 1, "one shard saw every token");
}

#[test]
fn a_retry_token_is_good_once() {
    let _watchdog = Watchdog::new("a_retry_token_is_good_once");
    let server = TransportConfig { retry: RetryPolicy::Always, new_tokens: 0, ..sharded() };
    let pair = Pair::with(server, config());
    block_on(async {
        let (client, server, relay) = connect_through(&pair).await;
        exchange(&client, &server, 1000).await;
        drop((client, server));
        pair.wait_idle();
        let (before, replayed) = (counters(&pair.server), relay.replay_initials());
        wait_for("the replayed Initials arrived", || {
            counters(&pair.server).incoming > before.incoming
        });
        // Those with the token of the Retry and those before it: each is asked for its address.
        std::thread::sleep(Duration::from_millis(100));
        let after = counters(&pair.server);
        assert!(replayed >= 2, "an Initial without and one with a token");
        let (knocked, retried) = (after.incoming - before.incoming, after.retries - before.retries);
        assert_eq!(knocked, retried, "a replayed token was believed: {after:?}");
    });
}

/// The token of an Initial packet (RFC 9000 §17.2.2).
fn token_of(initial: &[u8]) -> &[u8] {
    let dcid_end = 6 + usize::from(initial[5]);
    let at = dcid_end + 1 + usize::from(initial[dcid_end]);
    // A variable-length integer of one or two bytes (RFC 9000 §16).
    let (len, at) = match initial[at] >> 6 {
        0 => (usize::from(initial[at]), at + 1),
        1 => (usize::from(initial[at] & 0x3f) << 8 | usize::from(initial[at + 1]), at + 2),
        _ => panic!("a token of more than 16383 bytes"),
    };
    &initial[at..at + len]
}

/// A thief behind the same address opens connections of its own, by other IDs and so at other
/// shards, with the token of somebody's Retry.
#[test]
fn a_retry_token_is_good_once_at_whichever_shard_it_is_presented() {
    let _watchdog = Watchdog::new("a_retry_token_is_good_once_at_whichever_shard_it_is_presented");
    let server = TransportConfig { retry: RetryPolicy::Always, new_tokens: 0, ..sharded() };
    let store = Arc::new(Replayer::default());
    let pair = Pair::build(
        Engine::builder().config(server),
        Engine::builder().config(config()).token_store(store.clone()),
    );
    block_on(async {
        let (client, server, relay) = connect_through(&pair).await;
        exchange(&client, &server, 1000).await;
        let tokens = relay.initials();
        let token = tokens.iter().map(|initial| token_of(initial)).find(|token| !token.is_empty());
        let token = Bytes::copy_from_slice(token.expect("a Retry was demanded"));
        *store.0.lock().expect("not poisoned") = Some(token);
        for _replay in 0..16 {
            let before = counters(&pair.server).retries;
            let connecting = pair.client.connect(relay.addr, NAME);
            let incoming = pair.server.accept().await.expect("the thief knocks");
            let (near, far) = futures_util::future::join(connecting, incoming.accept()).await;
            let (near, far) = (near.expect("connected"), far.expect("accepted"));
            // The counter may come behind the packet; a replay that is believed never counts.
            wait_for("no replay is believed", || counters(&pair.server).retries > before);
            exchange(&near, &far, 1000).await;
        }
    });
    // By the hash of 16 random IDs.
    let knocked = pair.server.stats().iter().filter(|stats| stats.shard.retries > 0).count();
    assert!(knocked > 1, "one shard saw every replay");
}

/// A server that has lost its state, with the keys that it had: each shard tells the connections that
/// were its own that they are over.
#[test]
fn a_server_without_memory_resets_the_connections_of_every_shard() {
    const CONNECTIONS: usize = 12;
    let _watchdog = Watchdog::new("a_server_without_memory_resets_the_connections_of_every_shard");
    let keys = SharedKeys::from_secret(&[5; 64]).expect("keys");
    let strangers_keys = SharedKeys::from_secret(&[6; 64]).expect("keys");
    let (server_tls, client_tls) = pair::identity();
    let start = |keys: &SharedKeys| {
        let builder = Engine::builder().config(sharded()).server(server_tls.clone());
        builder.shared_keys(keys).expect("derived").start().expect("the server starts")
    };
    let client = Engine::builder().config(config()).client(client_tls).start();
    let pair = Pair { server: start(&keys), client: client.expect("the client starts") };
    let (heir, stranger) = (start(&keys), start(&strangers_keys));
    block_on(async {
        let mut links = Vec::new();
        for _ in 0..CONNECTIONS {
            links.push(connect_through(&pair).await);
        }
        assert!(shards_that_accepted(&pair.server) > 1, "one shard has all");
        for (client, server, relay) in &links {
            exchange(client, server, 1000).await;
            relay.retarget(stranger.local_addr());
            client.send_datagram(Bytes::from_static(b"are you there?")).expect("sent");
        }
        wait_for("the stranger has heard them", || {
            counters(&stranger).rx_drop_no_owner >= CONNECTIONS as u64
        });
        for (client, _, relay) in &links {
            assert_eq!(client.close_reason(), None, "a stranger ended a connection");
            relay.retarget(heir.local_addr());
            // A packet sent before again may have met the heir already: the reason is looked at below.
            let _over_already = client.send_datagram(Bytes::from_static(b"are you there?"));
        }
        for (client, _, _) in &links {
            assert_eq!(client.closed().await, ConnectionError::Reset);
        }
    });
    let senders = heir.stats().iter().filter(|stats| stats.shard.tx_stateless > 0).count();
    assert!(senders > 1, "one shard sent all");
}

/// A round trip more for those who would come to a shard that has far more than the others.
#[test]
fn newcomers_avoid_the_one_busy_shard() {
    let _watchdog = Watchdog::new("newcomers_avoid_the_one_busy_shard");
    let (server_tls, client_tls) = pair::identity();
    let server = Engine::builder().config(balance::config(config())).server(server_tls);
    let server = server.app(|_| balance::Fickle::default()).start().expect("the server starts");
    let client = Engine::builder().config(config()).client(client_tls).start();
    balance::newcomers_avoid_the_one_busy_shard(&server, &client.expect("the client starts"));
}

#[test]
fn retries_send_clients_to_shards_with_room() {
    let _watchdog = Watchdog::new("retries_send_clients_to_shards_with_room");
    let server = TransportConfig { retry: RetryPolicy::Always, new_tokens: 0, ..sharded() };
    let pair = Pair::with(server, TransportConfig { shards: 2, ..config() });
    block_on(async {
        let mut connections = Vec::new();
        for _ in 0..80 {
            connections.push(pair.connect().await);
        }
        let accepted: Vec<u64> =
            pair.server.stats().iter().map(|stats| stats.shard.accepted).collect();
        let (least, most) = (accepted.iter().min(), accepted.iter().max());
        let range = most.expect("four shards") - least.expect("four shards");
        // By the hash alone the range is 8 in the middle, and 12 is nothing special.
        assert!(range <= 5, "{accepted:?}");
        assert!(counters(&pair.server).retries_moved > 20);
        for (client, server) in &connections {
            exchange(client, server, 1000).await;
        }
    });
}
