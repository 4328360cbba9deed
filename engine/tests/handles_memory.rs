//! Memory stays within what the configuration says: idle connections, and connections whose
//! reader stalls with a full window. A tenth of the full scale unless `STOQ_MEMORY_FULL` is set.
//! One test, because it looks at the whole process.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::join;
use pair::{NAME, Pair, Watchdog, config};
use pollster::block_on;
use stoq::config::TransportConfig;
use stoq::connection::Connection;

/// Handshakes under way at once: the shard is not the thing that is measured.
const HANDSHAKES_AT_ONCE: usize = 50;
/// One end's handles, besides what the configuration computes.
const HANDLES_BYTES: usize = 4 << 10;
/// The allocator's own share.
const ALLOCATOR_PERCENT: usize = 125;

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn connections(pair: &Pair, count: usize) -> Vec<(Connection, Connection)> {
    let mut connections = Vec::new();
    while connections.len() < count {
        let batch = HANDSHAKES_AT_ONCE.min(count - connections.len());
        let connecting: Vec<_> =
            (0..batch).map(|_| pair.client.connect(pair.server.local_addr(), NAME)).collect();
        let accepting: Vec<_> =
            (0..batch).map(|_| block_on(pair.server.accept()).unwrap().accept()).collect();
        for (client, server) in connecting.into_iter().zip(accepting) {
            let (client, server) = block_on(join(client, server));
            connections.push((client.unwrap(), server.unwrap()));
        }
    }
    connections
}

fn report(what: &str, count: usize, used: usize, bound: usize) {
    println!(
        "{what}: {count} connections, resident {} KiB, {} a connection, bound {} KiB",
        used >> 10,
        used / count,
        bound >> 10,
    );
    assert!(used <= bound, "{what}: {used} bytes resident exceed the bound of {bound}");
}

#[test]
fn memory_is_bounded_by_the_configuration() {
    let full = std::env::var_os("STOQ_MEMORY_FULL").is_some();
    let scale = if full { 10 } else { 1 };
    let _watchdog = Watchdog::with_limit("memory", Duration::from_secs(300 * scale as u64));
    let config = TransportConfig {
        receive_buffer_size: 1 << 20,
        stream_receive_buffer_size: 1 << 20,
        send_buffer_size: 64 << 10,
        stream_send_queue_bytes: 64 << 10,
        idle_timeout_ms: 0,
        handshake_timeout_ms: 60_000,
        ..config()
    };
    let pair = Pair::with(config.clone(), config.clone());
    // Whatever is allocated once is allocated now.
    drop(connections(&pair, HANDSHAKES_AT_ONCE));
    pair.wait_idle();
    let idle_bytes = 2 * (config.idle_connection_bytes_max() as usize + HANDLES_BYTES);

    let before = resident_bytes();
    let count = 1000 * scale;
    let idle = connections(&pair, count);
    let used = resident_bytes().saturating_sub(before);
    report("idle", count, used, count * idle_bytes / 100 * ALLOCATOR_PERCENT);
    close(&pair, idle);

    let before = resident_bytes();
    let count = 100 * scale;
    let mut stalled = Vec::new();
    for (client, server) in connections(&pair, count) {
        let mut sends = Vec::new();
        // More streams than the handles' share of the window has room for.
        for _ in 0..10 {
            sends.push(block_on(client.open_uni()).unwrap());
        }
        stalled.push((client, server, sends));
    }
    fill(&mut stalled);
    let used = resident_bytes().saturating_sub(before);
    let window = config.receive_buffer_size + config.send_buffer_size;
    let queues = 10 * config.stream_send_queue_bytes;
    let bound = count * (idle_bytes + window as usize + queues) / 100 * ALLOCATOR_PERCENT;
    report("stalled readers", count, used, bound);
    close(&pair, stalled);
}

/// Drops connections a few at a time: nothing times out here, so no packet that closes one may
/// drown in the others.
fn close<T>(pair: &Pair, mut connections: Vec<T>) {
    while !connections.is_empty() {
        let left = connections.len().saturating_sub(HANDSHAKES_AT_ONCE);
        connections.truncate(left);
        pair::wait_for("the dropped connections end", || {
            pair::counters(&pair.server).connections <= left as u64
        });
    }
    pair.wait_idle();
}

/// Writes on every stream until nothing is taken for a while.
fn fill(stalled: &mut [(Connection, Connection, Vec<stoq::stream::SendStream>)]) {
    let mut quiet = 0;
    while quiet < 10 {
        let mut written = 0;
        for (.., sends) in stalled.iter_mut() {
            for send in sends {
                let mut write = pin!(send.write(&[7; 16 << 10]));
                let mut cx = Context::from_waker(Waker::noop());
                if let Poll::Ready(bytes) = write.as_mut().poll(&mut cx) {
                    written += bytes.unwrap();
                }
            }
        }
        quiet = if written == 0 { quiet + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(20));
    }
}
