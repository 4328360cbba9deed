//! The same numbers in every output: per-shard counters, `TransportStats`, Prometheus text and the
//! statistics of a connection, after a transfer over loopback sockets.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::collections::HashMap;

use futures_util::future::join;
use pair::{Pair, Watchdog, config, wait_for};
use pollster::block_on;
use stoq::config::TransportConfig;
use stoq::engine::{Engine, ShardStats};
use stoq::metrics::TransportStats;

const BYTES: usize = 3_000_000;

/// What an engine says in each of its ways at one moment: between them no counter changed.
struct Said {
    shards: Vec<ShardStats>,
    transport: TransportStats,
    prometheus: HashMap<String, f64>,
}

fn said(engine: &Engine) -> Said {
    let mut said = None;
    let numbers = |stats: &[ShardStats]| {
        stats.iter().map(|stats| (stats.shard, stats.datapath)).collect::<Vec<_>>()
    };
    wait_for("the counters stand still", || {
        let shards = engine.stats();
        let (transport, text) = (engine.transport_stats(), engine.prometheus());
        let unchanged = numbers(&shards) == numbers(&engine.stats());
        said = Some(Said { shards, transport, prometheus: samples(&text) });
        unchanged
    });
    said.unwrap()
}

fn samples(text: &str) -> HashMap<String, f64> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// The sample's name and value that stand for a counter, by Prometheus's conventions.
fn expected(subsystem: &str, shard: usize, name: &str, value: u64) -> (String, f64) {
    let now = [
        "connections",
        "tx_queue_connections",
        "streams",
        "frames_free",
        "frames_fill",
        "frames_tx",
        "peers",
        "idle",
        "leases",
        "connecting",
        "waiters",
    ];
    let label = format!("shard=\"{shard}\"");
    if now.contains(&name) {
        return (format!("stoq_{subsystem}_{name}{{{label}}}"), value as f64);
    }
    if let Some((direction, reason)) = name.split_once("_drop_") {
        let labels = format!("{label},direction=\"{direction}\",reason=\"{reason}\"");
        return (format!("stoq_{subsystem}_drops_total{{{labels}}}"), value as f64);
    }
    if let Some(name) = name.strip_suffix("_ns") {
        return (format!("stoq_{subsystem}_{name}_seconds_total{{{label}}}"), value as f64 / 1e9);
    }
    (format!("stoq_{subsystem}_{name}_total{{{label}}}"), value as f64)
}

fn assert_same(said: &Said) {
    let mut compared = 0;
    for (number, (stats, report)) in said.shards.iter().zip(&said.transport.shards).enumerate() {
        assert_eq!((stats.shard, stats.datapath), (report.shard, report.datapath));
        let counters = stats.shard.iter().map(|counter| ("shard", counter));
        let counters = counters.chain(stats.datapath.iter().map(|counter| ("datapath", counter)));
        let counters = counters.chain(report.pool.iter().map(|counter| ("pool", counter)));
        for (subsystem, (name, value)) in counters {
            let (sample, value) = expected(subsystem, number, name, value);
            let found = said.prometheus.get(&sample);
            assert_eq!(found, Some(&value), "{sample}");
            compared += 1;
        }
    }
    assert!(compared > 100, "{compared} counters compared");

    let sum = |of: fn(&ShardStats) -> u64| said.shards.iter().map(of).sum::<u64>();
    let transport = &said.transport;
    assert_eq!(transport.bytes_sent, sum(|stats| stats.datapath.tx_bytes));
    assert_eq!(transport.bytes_received, sum(|stats| stats.datapath.rx_bytes));
    assert_eq!(transport.connections_active, sum(|stats| stats.shard.connections));
    let total = sum(|stats| stats.shard.accepted + stats.shard.connects);
    assert_eq!(transport.connections_total, total);
    let copies = transport.copies;
    assert_eq!(copies.datapath_bytes, sum(|stats| stats.datapath.copied_bytes));
    assert_eq!(copies.handle_bytes, sum(|stats| stats.shard.handle_copied_bytes));
    assert_eq!(copies.payload_bytes, transport.bytes_sent + transport.bytes_received);
    let rtt_samples: f64 = (0..said.shards.len())
        .map(|shard| said.prometheus[&format!("stoq_rtt_seconds_count{{shard=\"{shard}\"}}")])
        .sum();
    assert_eq!(transport.latency.samples as f64, rtt_samples);
}

#[test]
fn every_output_tells_the_same() {
    let _watchdog = Watchdog::new("statistics");
    let config = TransportConfig { shards: 2, ..config() };
    let pair = Pair::with(config.clone(), config);
    let (client, server) = block_on(pair.connect());
    block_on(join(
        async {
            let mut send = client.open_uni().await.unwrap();
            send.write_all(&vec![4; BYTES]).await.unwrap();
            send.finish().unwrap();
            assert_eq!(send.stopped().await, Ok(None));
        },
        async {
            let mut recv = server.accept_uni().await.unwrap();
            assert_eq!(recv.read_to_end(BYTES).await.unwrap().len(), BYTES);
        },
    ));
    // One connection a side, so what it says is what the datapath says, once all that was sent has been
    // published. A server's connection begins behind the datagram that the client knocked with.
    const FIRST_DATAGRAM_BYTES: u64 = 1200;
    for (engine, connection, knock) in
        [(&pair.client, &client, 0), (&pair.server, &server, FIRST_DATAGRAM_BYTES)]
    {
        wait_for("the connection's statistics agree with the engine's", || {
            let (stats, transport) = (connection.stats(), engine.transport_stats());
            (stats.udp_tx_bytes, stats.udp_rx_bytes + knock)
                == (transport.bytes_sent, transport.bytes_received)
        });
        let said = said(engine);
        assert_same(&said);
        assert_eq!(said.transport.connections_active, 1);
        assert_eq!(said.transport.connections_total, 1);
    }
    let sent = client.stats().udp_tx_bytes;
    assert!(sent > BYTES as u64 && sent < BYTES as u64 * 5 / 4, "{sent}");
    drop((client, server));
    pair.wait_idle();
    for engine in [&pair.client, &pair.server] {
        let said = said(engine);
        assert_same(&said);
        assert_eq!(said.transport.connections_active, 0);
    }
}
