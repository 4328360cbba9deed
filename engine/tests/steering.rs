//! Packets find their connection's shard: over rebindings, rotations and forgeries, on `::1`.

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;
#[path = "common/relay.rs"]
#[allow(dead_code, unreachable_pub)]
mod relay;

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use pair::{NAME, Pair, Watchdog, config, counters};
use pollster::block_on;
use relay::Relay;
use stoq::config::{CidConfig, CidKey, TransportConfig};
use stoq::connection::Connection;

const SHARDS: usize = 4;

fn sharded() -> TransportConfig {
    TransportConfig { shards: SHARDS, ..config() }
}

/// A connection through a relay: the client's end, the server's, and the relay.
async fn connect_through(pair: &Pair) -> (Connection, Connection, Relay) {
    let server = pair.server.local_addr();
    let relay = Relay::start(Ipv6Addr::LOCALHOST, server, vec![Ipv6Addr::LOCALHOST], 10);
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
        assert_eq!(counters.rx_handed_over, counters.rx_taken_over);
    });
}

#[test]
fn ids_are_rotated_under_a_live_connection() {
    let _watchdog = Watchdog::new("ids_are_rotated_under_a_live_connection");
    let with_rotation = |rotation, key: u8| CidConfig {
        rotation,
        key: Some(CidKey::new(&[key; 16])),
        lifetime_s: 1,
        ..CidConfig::default()
    };
    let server = TransportConfig { cid: with_rotation(0, 1), ..sharded() };
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
