//! Memory stays within what the configuration says: resident size against the computed bound.
//!
//! A tenth of the full scale by default; `STOQ_MEMORY_FULL=1` measures 10 000 idle connections and
//! 1000 with a stalled reader. Both ends live in this process, so both are in what is measured.
//! Each measurement has a process of its own: the resident size is the process's.

#[path = "common/sim.rs"]
mod sim;

use std::any::Any;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use sim::{CLIENT, CLIENT_HOST, Plan, SERVER, SERVER_HOST, TestApp};
use stoq::app::{ConnId, ShardApp, ShardCx, WriteOutcome};
use stoq::clock::SimClock;
use stoq::config::TransportConfig;
use stoq::datapath::sim::{LinkConfig, Prefix, SimNetwork, run_while};
use stoq::sim::{SimHost, SimHostConfig};
use stoq::{Dir, StreamId};

/// Set in the process that measures.
const ROLE: &str = "STOQ_MEMORY_ROLE";

/// Writes to one stream of each connection until it is blocked, and never again.
struct Writer {
    data: Option<Bytes>,
}

impl Writer {
    fn write(&self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        let Some(data) = &self.data else { return };
        while let WriteOutcome::Written(_) = cx.write(conn, stream, &mut [data.clone()]) {}
    }
}

impl ShardApp for Writer {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        for _ in 0..*message.downcast::<usize>().expect("a number") {
            cx.connect(SERVER, "stoq.test").expect("within the limits");
        }
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        if self.data.is_some() {
            let stream = cx.open(conn, Dir::Uni).expect("stream credit");
            self.write(cx, conn, stream);
        }
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.write(cx, conn, stream);
    }
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages: u64 = statm.split(' ').nth(1).expect("a field").parse().expect("a number");
    pages * rustix::param::page_size() as u64
}

/// Bytes that so many connections, both ends, added; after `seconds` of virtual time.
fn measure(connections: usize, config: &TransportConfig, data: Option<Bytes>, seconds: u64) -> u64 {
    let plan = Plan { stall: true, ..Plan::default() };
    measure_over(10_000_000_000, plan, connections, config, data, seconds)
}

/// As [`measure`], with a server that does as `plan` says, over a link of `rate_bps`.
fn measure_over(
    rate_bps: u64,
    plan: Plan,
    connections: usize,
    config: &TransportConfig,
    data: Option<Bytes>,
    seconds: u64,
) -> u64 {
    let clock = SimClock::new();
    let network = SimNetwork::new(clock.clone(), 7);
    let link = LinkConfig { rate_bps, delay_us: 100, ..LinkConfig::default() };
    let (near, far) = (Prefix::new(CLIENT_HOST, 32), Prefix::new(SERVER_HOST, 32));
    network.add_link(near, far, link.clone(), link).expect("a valid link");
    let (server_tls, client_tls) = sim::tls();
    let (app, log) = TestApp::new(plan);
    let setup =
        |server, client, seed| SimHostConfig { config: config.clone(), server, client, seed };
    let server = setup(Some(server_tls as _), None, 1);
    let client = setup(None, Some(client_tls as _), 2);
    let mut server = SimHost::new(&clock, network.open(SERVER), server, app).expect("server");
    let writer = Writer { data };
    let mut client = SimHost::new(&clock, network.open(CLIENT), client, writer).expect("client");
    let mut run = |wanted: u64, limit: Duration, client: &mut SimHost| {
        let until = clock.elapsed() + limit;
        run_while(&mut [client, &mut server], &network, &clock, until, &mut || {
            log.lock().expect("log").connected < wanted
        });
    };
    let before = resident_bytes();
    let mut done = 0;
    while done < connections {
        let part = (connections - done).min(100);
        client.send_to_app(Box::new(part));
        done += part;
        run(done as u64, Duration::from_secs(10), &mut client);
    }
    run(u64::MAX, Duration::from_secs(seconds), &mut client);
    let after = resident_bytes();
    let log = log.lock().expect("log");
    assert_eq!((log.connected, log.closed.len()), (connections as u64, 0));
    assert_eq!(client.counters().connections, connections as u64);
    after.saturating_sub(before)
}

fn config() -> TransportConfig {
    TransportConfig {
        idle_timeout_ms: 0,
        receive_buffer_size: 256 << 10,
        stream_receive_buffer_size: 256 << 10,
        // Filled by reference to one piece of memory: as small as quinn-proto's window needs.
        send_buffer_size: 256 << 10,
        max_datagram_size: 0,
        datagram_send_buffer_size: 0,
        ..TransportConfig::default()
    }
}

fn scale() -> usize {
    if std::env::var_os("STOQ_MEMORY_FULL").is_some() { 10 } else { 1 }
}

/// Measures in a process of its own: what another measurement freed would be used again.
fn measured(test: &str) -> Option<()> {
    if std::env::var_os(ROLE).is_some() {
        return Some(());
    }
    let program = std::env::current_exe().expect("this program");
    let child = Command::new(program)
        .args(["--exact", test, "--nocapture"])
        .env(ROLE, test)
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&child.stdout);
    print!("{}", text.lines().filter(|line| line.contains("resident")).collect::<String>());
    println!();
    assert!(child.status.success(), "{text}{}", String::from_utf8_lossy(&child.stderr));
    assert!(text.contains("resident"), "nothing was measured: {text}");
    None
}

fn assert_within(what: &str, connections: usize, bytes: u64, bound: u64) {
    let each = bytes / connections as u64;
    println!("{connections} {what}: {bytes} bytes resident ({each} each), bound {bound}");
    assert!(bytes <= bound, "{what}: {bytes} bytes exceed the bound of {bound}");
}

#[test]
fn idle_connections_stay_within_the_bound() {
    let Some(()) = measured("idle_connections_stay_within_the_bound") else { return };
    let (config, idle) = (config(), 1000 * scale());
    // Both ends are here; nothing is buffered.
    assert!(config.idle_connection_bytes_max() <= 40_000, "an idle connection is small");
    let bound = 2 * config.idle_connection_bytes_max() * idle as u64;
    assert_within("idle connections", idle, measure(idle, &config, None, 10), bound);
}

#[test]
fn few_streams_make_small_connections() {
    let Some(()) = measured("few_streams_make_small_connections") else { return };
    let (config, idle) =
        (TransportConfig { max_concurrent_streams: 16, ..config() }, 1000 * scale());
    let bound = 2 * config.idle_connection_bytes_max() * idle as u64;
    assert!(bound < 140_000 * idle as u64);
    assert_within("idle connections of 16 streams", idle, measure(idle, &config, None, 10), bound);
}

#[test]
fn stalled_readers_stay_within_the_bound() {
    let Some(()) = measured("stalled_readers_stay_within_the_bound") else { return };
    let (config, stalled) = (config(), 100 * scale());
    let data = Bytes::from(vec![1; 64 << 10]);
    let bound =
        stalled as u64 * (config.idle_connection_bytes_max() + config.connection_bytes_max());
    let bytes = measure(stalled, &config, Some(data), 10);
    let window = stalled as u64 * config.receive_buffer_size;
    assert!(bytes >= window, "{bytes} bytes: the windows of {window} were not filled");
    assert_within("connections with a stalled reader", stalled, bytes, bound);
}

/// Windows are permissions, not memory: 1 GiB of each costs a connection that carries nothing no byte.
#[test]
fn fresh_connections_hold_no_reserved_buffer() {
    let Some(()) = measured("fresh_connections_hold_no_reserved_buffer") else { return };
    const WINDOW_BYTES: u64 = 1 << 30;
    let config = TransportConfig {
        receive_buffer_size: WINDOW_BYTES,
        stream_receive_buffer_size: WINDOW_BYTES,
        send_buffer_size: WINDOW_BYTES,
        stream_send_queue_bytes: WINDOW_BYTES as usize,
        stream_receive_queue_bytes: WINDOW_BYTES as usize,
        ..config()
    };
    let count = 1000 * scale();
    let bound = 2 * config.idle_connection_bytes_max() * count as u64;
    assert_within("connections with vast windows", count, measure(count, &config, None, 2), bound);
}

/// With the default windows of 16 MiB: what a reader takes at once is not held.
#[test]
fn readers_that_keep_up_cost_no_window() {
    let Some(()) = measured("readers_that_keep_up_cost_no_window") else { return };
    const BYTES_EACH: u64 = 512 << 10;
    let config = TransportConfig {
        receive_buffer_size: TransportConfig::default().receive_buffer_size,
        stream_receive_buffer_size: TransportConfig::default().stream_receive_buffer_size,
        send_buffer_size: TransportConfig::default().send_buffer_size,
        ..config()
    };
    let (count, data) = (100, Bytes::from(vec![1; 64 << 10]));
    let bytes = measure_over(1_000_000_000, Plan::default(), count, &config, Some(data), 1);
    let bound = count as u64 * (2 * config.idle_connection_bytes_max() + BYTES_EACH);
    assert!(bound < count as u64 * config.receive_buffer_size / 20);
    assert_within("connections with a busy reader", count, bytes, bound);
}
