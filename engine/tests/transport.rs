//! The facade over `lo`: two transports of one process, as a program uses them.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddrV6, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{Either, join, join_all, select};
use pollster::block_on;
use stoq::VarInt;
use stoq::config::{PoolConfig, TransportConfig};
use stoq::error::ConnectionError;
use stoq::pool::{CheckoutError, PeerEndpoint, PoolEventKind};
use stoq::transport::{DeliveryError, ReceiveError, Sent, StoqTransport, TransportConnection};

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("stoq-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: what is left over in the temporary directory harms nobody.
        let _left_over = fs::remove_dir_all(&self.0);
    }
}

const BASE: &str = "bind = '[::1]:0'\ndatapath = 'socket'\nspin_us = 0\n";

fn server_config(extra: &str) -> TransportConfig {
    let tls = "[tls]\nalpn = ['test']\nself_signed = ['server.test']\n";
    TransportConfig::from_toml(&format!("{BASE}{extra}\n{tls}")).expect("valid")
}

/// A client that trusts the server's root, from a PEM file as a program would.
fn client_config(server: &StoqTransport, scratch: &Scratch, extra: &str) -> TransportConfig {
    use std::fmt::Write;
    let roots = scratch.0.join("roots.pem");
    let mut pem = String::new();
    for root in server.identity().expect("self-signed").roots() {
        let text = base64(root);
        write!(pem, "-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n")
            .expect("text");
    }
    fs::write(&roots, pem).expect("writable");
    let tls = format!("[tls]\nalpn = ['test']\nroots = '{}'\n", roots.display());
    TransportConfig::from_toml(&format!("{BASE}{extra}\n{tls}")).expect("valid")
}

fn base64(data: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for (count, part) in data.chunks(3).enumerate() {
        let bits = part.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - part.len()));
        for index in 0..4 {
            let six = (bits >> (18 - 6 * index)) & 63;
            text.push(if index <= part.len() { char::from(ALPHABET[six as usize]) } else { '=' });
        }
        if count % 16 == 15 {
            text.push('\n');
        }
    }
    text + "\n"
}

struct Both {
    server: StoqTransport,
    client: StoqTransport,
    endpoint: PeerEndpoint,
    _scratch: Scratch,
}

impl Both {
    fn new(name: &str, server_extra: &str, client_extra: &str) -> Self {
        let scratch = Scratch::new(name);
        let server = StoqTransport::new(server_config(server_extra)).expect("server");
        let client = client_config(&server, &scratch, client_extra);
        let client = StoqTransport::new(client).expect("client");
        let endpoint = PeerEndpoint::new(server.engine().local_addr(), "server.test");
        Self { server, client, endpoint, _scratch: scratch }
    }

    /// One connection, from both ends.
    fn connect(&self) -> (TransportConnection, TransportConnection) {
        let (here, there) = wait(join(self.client.connect(&self.endpoint), self.server.accept()));
        (here.expect("connected"), there.expect("accepted"))
    }
}

/// Runs a future for at most twenty seconds.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let test = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let watchdog = std::thread::spawn(move || {
        if watch
            .recv_timeout(Duration::from_secs(20))
            .is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            // Past the capture, which an abort would take along.
            let _ = writeln!(std::io::stderr(), "a future did not end within 20 s: {test}");
            std::process::abort();
        }
    });
    let result = block_on(future);
    drop(done);
    watchdog.join().expect("watchdog");
    result
}

/// Waits until a condition holds that another thread brings about.
fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn messages_of_every_size_go_both_ways() {
    let both = Both::new("sizes", "", "");
    let (here, there) = both.connect();
    for len in [0, 1, 1000, 70_000, 3_000_000] {
        let data = Bytes::from((0..len).map(|at| (at % 251) as u8).collect::<Vec<_>>());
        let sent = wait(both.client.send(&here, &data)).expect("sent");
        let Sent::Stream(receipt) = sent else { panic!("datagrams were not chosen") };
        let received = wait(both.server.receive(&there)).expect("received");
        assert!(received == data, "{len} bytes");
        wait(receipt.acknowledged()).expect("acknowledged");
        assert!(receipt.is_acknowledged());
        wait(both.server.send(&there, &received)).expect("sent back");
        assert!(wait(both.client.receive(&here)).expect("back") == data);
    }
    // A turn publishes its counts when it ends, after it has woken whoever waits for its data.
    until("the last turn's counts", || {
        let stats = both.client.stats();
        stats.bytes_sent > 3_000_000 && stats.bytes_received > 3_000_000
    });
    let stats = both.client.stats();
    assert_eq!((stats.connections_active, stats.connections_total), (1, 1));
    assert!(stats.latency.samples > 10 && stats.latency.p50 > Duration::ZERO);
    assert!(stats.latency.p50 <= stats.latency.p99 && stats.latency.p99 <= stats.latency.p999);
    assert!(stats.copies.per_byte > 0.0 && stats.copies.per_byte < 4.0, "{:?}", stats.copies);
    let shard = &stats.shards[0];
    assert!(shard.rx_batch_average >= 1.0 && shard.tx_batch_average >= 1.0);
    assert!(shard.mailbox_wait.samples > 0);
    until("publication", || here.stats().delivery_rate_bps > 0);
    until("the last acknowledgement is published", || here.stats().inflight_bytes == 0);
    assert!(here.stats().latest_rtt > Duration::ZERO);
}

#[test]
fn datagrams_are_used_when_chosen_and_only_where_they_fit() {
    let both = Both::new("datagrams", "", "send_datagrams = true");
    let (here, there) = both.connect();
    until("datagrams are agreed on", || here.max_datagram_size().is_some());
    let small = Bytes::from_static(b"small");
    assert!(matches!(wait(both.client.send(&here, &small)), Ok(Sent::Datagram)));
    assert_eq!(wait(both.server.receive(&there)).expect("received"), small);
    let large = Bytes::from(vec![7; 100_000]);
    assert!(matches!(wait(both.client.send(&here, &large)), Ok(Sent::Stream(_))));
    assert_eq!(wait(both.server.receive(&there)).expect("received"), large);
    // The server did not choose them.
    assert!(matches!(wait(both.server.send(&there, &small)), Ok(Sent::Stream(_))));
}

#[test]
fn concurrent_callers_share_one_connection() {
    let both = Both::new("share", "shards = 2", "shards = 2");
    let accept = async { both.server.accept().await.expect("accepted") };
    let connect = join_all((0..64).map(|_| both.client.connect(&both.endpoint)));
    let (there, here) = wait(join(accept, connect));
    let here: Vec<_> = here.into_iter().map(|conn| conn.expect("connected")).collect();
    until("64 leases are published", || both.client.stats().pool.leases == 64);
    let stats = both.client.stats();
    assert_eq!((stats.pool.handshakes, stats.connections_total), (1, 1));
    assert_eq!(stats.pool_utilization, 1.0);
    // Each is the same connection: what any sends, the one peer receives.
    for conn in &here {
        wait(both.client.send(conn, &Bytes::from_static(b"x"))).expect("sent");
        wait(both.server.receive(&there)).expect("received");
    }
    drop(here);
    until("the leases are back", || {
        let pool = both.client.stats().pool;
        (pool.leases, pool.idle) == (0, 1)
    });
    wait(both.client.connect(&both.endpoint)).expect("from the pool");
    until("the hit is published", || both.client.stats().pool.hits == 1);
}

#[test]
fn a_dropped_caller_gives_its_connection_back() {
    let both = Both::new("dropped", "", "");
    {
        let connect = std::pin::pin!(both.client.connect(&both.endpoint));
        // Asked for and given up at once.
        let Either::Right(_) = wait(select(connect, std::future::ready(()))) else {
            panic!("no handshake is that fast")
        };
    }
    let _there = wait(both.server.accept()).expect("the handshake goes on for the pool");
    until("the connection is idle in the pool", || {
        let pool = both.client.stats().pool;
        (pool.idle, pool.leases, pool.waiters) == (1, 0, 0)
    });
}

#[test]
fn a_cancelled_receive_loses_nothing() {
    let both = Both::new("cancelled", "", "");
    let (here, there) = both.connect();
    let mut stream = wait(here.open_uni()).expect("a stream");
    wait(stream.write_all(b"first half, ")).expect("written");
    for _ in 0..20 {
        let receive = std::pin::pin!(both.server.receive(&there));
        let pause = std::pin::pin!(async { std::thread::sleep(Duration::from_millis(5)) });
        assert!(matches!(wait(select(receive, pause)), Either::Right(_)), "only half is there");
    }
    wait(stream.write_all(b"second half")).expect("written");
    stream.finish().expect("open");
    let message = wait(both.server.receive(&there)).expect("received");
    assert_eq!(message, "first half, second half");
}

#[test]
fn what_is_too_large_is_refused_and_the_rest_goes_on() {
    let both = Both::new("too-large", "message_size_max = 1000", "");
    let (here, there) = both.connect();
    let sent = wait(both.client.send(&here, &Bytes::from(vec![0; 5000]))).expect("sent");
    let Sent::Stream(receipt) = sent else { panic!("a stream") };
    let refused = wait(both.server.receive(&there));
    assert_eq!(refused, Err(ReceiveError::TooLarge { limit_bytes: 1000 }));
    wait(both.client.send(&here, &Bytes::from_static(b"fits"))).expect("sent");
    assert_eq!(wait(both.server.receive(&there)).expect("received"), "fits");
    // It came in one flight: acknowledged as packets, or stopped before.
    let told = wait(receipt.acknowledged());
    assert!(matches!(told, Ok(()) | Err(DeliveryError::Stopped(_))), "{told:?}");
}

#[test]
fn a_lost_connection_tells_what_was_acknowledged() {
    let both = Both::new("lost", "", "");
    let (here, there) = both.connect();
    let sent = wait(both.client.send(&here, &Bytes::from_static(b"arrives"))).expect("sent");
    let Sent::Stream(first) = sent else { panic!("a stream") };
    wait(both.server.receive(&there)).expect("received");
    wait(first.acknowledged()).expect("acknowledged");
    // More than the peer's window takes, and nobody reads: it cannot all arrive.
    let sent = wait(both.client.send(&here, &Bytes::from(vec![1; 40 << 20]))).expect("sent");
    let Sent::Stream(second) = sent else { panic!("a stream") };
    there.close(VarInt::from_u32(9), b"enough");
    let lost = wait(second.acknowledged());
    let Err(DeliveryError::ConnectionLost(ConnectionError::ClosedByPeer { code, .. })) = lost
    else {
        panic!("{lost:?}")
    };
    assert_eq!(code, VarInt::from_u32(9));
    assert!(!second.is_acknowledged());
    assert!(first.is_acknowledged(), "what was acknowledged before stays so");
    wait(first.acknowledged()).expect("and is told so");
    assert!(wait(both.client.send(&here, &Bytes::from_static(b"x"))).is_err());
}

#[test]
fn a_peer_that_comes_back_is_connected_again_and_told_as_events() {
    let pool = "[pool]\nreconnect_base_ms = 20\nreconnect_cap_ms = 200\n";
    let both = Both::new("back", "", pool);
    let (here, there) = both.connect();
    let event = || wait(both.client.pool_event()).expect("running").kind;
    assert_eq!(event(), PoolEventKind::Connected { after_failures: 0 });
    there.close(VarInt::from_u32(1), b"go away");
    assert!(matches!(event(), PoolEventKind::Lost { leases: 1, .. }));
    assert!(matches!(event(), PoolEventKind::ReconnectScheduled { .. }));
    let (kind, again) = wait(join(both.client.pool_event(), both.server.accept()));
    let kind = kind.expect("running").kind;
    assert_eq!(kind, PoolEventKind::Connected { after_failures: 0 });
    again.expect("by itself");
    assert!(here.close_reason().is_some(), "the old handle stays what it was");
}

#[test]
fn peers_that_do_not_answer_open_the_circuit() {
    // Long enough for the handshake at the end on a machine that stalls.
    let pool = "handshake_timeout_ms = 1000\n[pool]\nreconnect_base_ms = 1\ncircuit_failures = 2\n";
    let both = Both::new("circuit", "", pool);
    // Bound and deaf.
    let deaf = std::net::UdpSocket::bind("[::1]:0").expect("a socket");
    let port = deaf.local_addr().expect("bound").port();
    let remote = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
    let nobody = PeerEndpoint::new(remote, "server.test");
    for _ in 0..2 {
        let error = wait(both.client.connect(&nobody)).expect_err("nobody answers");
        let timed_out = ConnectionError::HandshakeTimedOut { remote, timeout_ms: 1000 };
        assert_eq!(error, CheckoutError::Connect(timed_out));
    }
    let error = wait(both.client.connect(&nobody)).expect_err("refused");
    assert!(matches!(error, CheckoutError::CircuitOpen { failures: 2, .. }), "{error}");
    until("two attempts, no third", || both.client.stats().connections_total == 2);
    both.connect();
}

#[test]
fn a_warm_up_is_there_before_it_is_asked_for() {
    let pool = "shards = 2\n[pool]\nconnections_per_peer_max = 4\n";
    let both = Both::new("warm", "shards = 2", pool);
    wait(both.client.warm_up(&both.endpoint, 4)).expect("within the limits");
    let _there: Vec<_> = (0..4).map(|_| wait(both.server.accept()).expect("accepted")).collect();
    until("four connections", || both.client.stats().pool.idle == 4);
    let shares: Vec<u64> =
        both.client.stats().shards.iter().map(|shard| shard.pool.connections).collect();
    assert_eq!(shares, [2, 2], "spread over the shards");
    let error = wait(both.client.warm_up(&both.endpoint, 5)).expect_err("over the limit");
    assert!(matches!(error, CheckoutError::WarmUpTooLarge { .. }), "{error}");
    wait(both.client.connect(&both.endpoint)).expect("from the pool");
    assert_eq!(both.client.stats().pool.misses, 0);
}

#[test]
fn early_requests_are_taken_by_whichever_shard_they_reach() {
    let client = "zero_rtt = true\n[pool]\nidle_timeout_ms = 50\n";
    let both = Both::new("early-shards", "shards = 4\nzero_rtt = true", client);
    let data = Bytes::from_static(b"read me anywhere");
    let (here, there) = both.connect();
    wait(both.client.send(&here, &data)).expect("sent");
    wait(both.server.receive(&there)).expect("received");
    std::thread::sleep(Duration::from_millis(50));
    drop((here, there));
    for round in 0..10 {
        until("the idle connection is closed", || both.client.stats().pool.connections == 0);
        let early = wait(both.client.connect_replay_safe(&both.endpoint)).expect("a lease");
        assert!(early.is_early(), "round {round}: no ticket, or another shard's cannot be used");
        // Refused early data would fail here.
        let Sent::Stream(receipt) = wait(both.client.send(&early, &data)).expect("sent") else {
            panic!("a stream")
        };
        let there = wait(both.server.accept()).expect("accepted");
        assert_eq!(wait(both.server.receive(&there)).expect("received"), data);
        wait(receipt.acknowledged()).expect("acknowledged");
        std::thread::sleep(Duration::from_millis(50));
        drop((early, there, receipt));
    }
    let shares = || -> Vec<u64> {
        both.server.stats().shards.iter().map(|shard| shard.shard.accepted).collect()
    };
    until("the last turn's count", || shares().iter().sum::<u64>() == 11);
    let accepted = shares();
    assert!(accepted.iter().filter(|accepted| **accepted > 0).count() > 1, "{accepted:?}");
}

#[test]
fn early_requests_arrive_and_refused_ones_say_so() {
    let zero_rtt = "zero_rtt = true\n[pool]\nidle_timeout_ms = 50\n";
    let both = Both::new("early", "zero_rtt = true", zero_rtt);
    let data = Bytes::from_static(b"read me twice");
    let (here, there) = both.connect();
    // A ticket comes with the first round trip.
    wait(both.client.send(&here, &data)).expect("sent");
    wait(both.server.receive(&there)).expect("received");
    std::thread::sleep(Duration::from_millis(50));
    drop((here, there));
    until("the idle connection is closed", || both.client.stats().pool.connections == 0);

    let early = wait(both.client.connect_replay_safe(&both.endpoint)).expect("a lease");
    assert!(early.is_early());
    let Sent::Stream(receipt) = wait(both.client.send(&early, &data)).expect("sent") else {
        panic!("a stream")
    };
    let there = wait(both.server.accept()).expect("accepted");
    assert_eq!(wait(both.server.receive(&there)).expect("received"), data);
    wait(receipt.acknowledged()).expect("acknowledged");
    std::thread::sleep(Duration::from_millis(50));
    drop((early, there, receipt));
    until("the idle connection is closed", || both.client.stats().pool.connections == 0);

    // The same identity at the same address, but its sessions are forgotten.
    let Both { server, client, endpoint, _scratch } = both;
    let mut config = server_config("zero_rtt = true");
    config.bind = server.engine().local_addr();
    config.tls = None;
    let identity = server.identity().expect("self-signed").clone();
    wait(server.shutdown());
    let tls = stoq::certs::ServerTls::builder()
        .alpn(["test"])
        .identity(identity)
        .early_data(true)
        .build()
        .expect("server TLS");
    let server = StoqTransport::with_tls(config, Some(tls.crypto()), None).expect("server again");
    let early = wait(client.connect_replay_safe(&endpoint)).expect("a lease");
    assert!(early.is_early());
    let Sent::Stream(receipt) = wait(client.send(&early, &data)).expect("sent") else {
        panic!("a stream")
    };
    let there = wait(server.accept()).expect("accepted");
    assert_eq!(wait(receipt.acknowledged()), Err(DeliveryError::EarlyDataRejected));
    // The connection stands; what the application repeats arrives, once.
    let again = Bytes::from_static(b"again");
    wait(client.send(&early, &again)).expect("sent");
    assert_eq!(wait(server.receive(&there)).expect("received"), again);
}

#[test]
fn metrics_are_served_over_http() {
    let both = Both::new("metrics", "metrics_address = '[::1]:0'", "");
    let (here, there) = both.connect();
    wait(both.client.send(&here, &Bytes::from_static(b"count me"))).expect("sent");
    wait(both.server.receive(&there)).expect("received");
    let address = both.server.engine().metrics_addr().expect("asked for");
    let mut scraper = TcpStream::connect(address).expect("listening");
    scraper.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("written");
    let mut text = String::new();
    scraper.read_to_string(&mut text).expect("read");
    assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
    for line in
        ["stoq_shard_accepted_total{shard=\"0\"} 1", "stoq_shard_connections{shard=\"0\"} 1"]
    {
        assert!(text.lines().any(|found| found == line), "missing {line}:\n{text}");
    }
    assert!(text.contains("datapath=\"socket\""), "{text}");
    assert!(both.client.prometheus().contains("stoq_pool_handshakes_total{shard=\"0\"} 1"));
    assert!(both.client.engine().metrics_addr().is_none());
}

#[test]
fn each_connection_writes_its_qlog() {
    let scratch = Scratch::new("qlog-files");
    let directory = scratch.0.join("made/when/needed");
    let key = format!("qlog_dir = '{}'", directory.display());
    let both = Both::new("qlog", &key, &key);
    let (here, there) = both.connect();
    wait(both.client.send(&here, &Bytes::from_static(b"log me"))).expect("sent");
    wait(both.server.receive(&there)).expect("received");
    drop((here, there));
    wait(both.client.shutdown());
    wait(both.server.shutdown());
    let mut sides = Vec::new();
    for file in fs::read_dir(&directory).expect("made") {
        let path = file.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(name.ends_with(".sqlog"), "{name}");
        let text = fs::read_to_string(&path).expect("text");
        let mut records = text.split('\u{1e}').filter(|record| !record.trim().is_empty());
        let head: serde_json::Value =
            serde_json::from_str(records.next().expect("a header")).expect("JSON");
        assert!(head.get("qlog_version").is_some(), "{head}");
        let events: Vec<serde_json::Value> =
            records.map(|record| serde_json::from_str(record).expect("a whole record")).collect();
        assert!(events.len() > 5, "{name}: {}", events.len());
        sides.push(if name.contains("-server") { "server" } else { "client" });
    }
    sides.sort_unstable();
    assert_eq!(sides, ["client", "server"]);
}

#[test]
fn a_transport_without_tls_or_with_a_bad_key_does_not_start() {
    let Err(error) = StoqTransport::new(TransportConfig::default()) else { panic!("started") };
    assert!(error.to_string().contains("`tls`"), "{error}");
    let missing = TransportConfig::from_toml("[tls]\nalpn = ['x']\nroots = '/nonexistent.pem'");
    let Err(error) = StoqTransport::new(missing.expect("valid keys")) else { panic!("started") };
    assert!(error.to_string().contains("/nonexistent.pem"), "{error}");
    let pool = PoolConfig { peers_max: 0, ..PoolConfig::default() };
    let config = TransportConfig { pool, ..server_config("") };
    let Err(error) = StoqTransport::new(config) else { panic!("started") };
    assert!(error.to_string().contains("`pool.peers_max` is 0; allowed: 1 to"), "{error}");
}

#[test]
fn a_shutdown_is_told_on_both_sides() {
    let both = Both::new("shutdown", "", "shutdown_grace_ms = 100");
    let (here, there) = both.connect();
    wait(both.client.shutdown());
    assert_eq!(here.close_reason(), Some(ConnectionError::EngineStopped));
    let lost = wait(both.server.receive(&there));
    assert!(matches!(lost, Err(ReceiveError::ConnectionLost(_))), "{lost:?}");
}

#[test]
fn a_shutdown_with_grace_does_not_wait_for_idle_connections() {
    let both = Both::new("grace", "", "shutdown_grace_ms = 15000");
    let (here, _there) = both.connect();
    drop(here);
    until("the lease is back", || both.client.stats().pool.idle == 1);
    let start = Instant::now();
    wait(both.client.shutdown());
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}
