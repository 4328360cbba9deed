//! What all QUIC workloads share: connections on the shards, the clock, the report.
//!
//! A [`Work`] runs on the shards, wrapped in a [`Runner`]; the calling thread only sleeps,
//! tells progress and reads counters.

use std::any::Any;
use std::net::SocketAddrV6;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use serde_json::json;
use stoq::app::{ConnId, ShardApp, ShardCx};
use stoq::engine::Engine;
use stoq::error::ConnectionError;
use stoq::{StreamId, VarInt};
use stoq_measure::latency::Latencies;
use stoq_measure::outcome::{Counts, Meter, Outcome};

use crate::client::{Progress, Reading, RttSamples, SAMPLE_INTERVAL, TrustArgs};
use crate::engine::{TransportArgs, busy_shares, datapath_words, stats_json, xdp_json};
use crate::{output, tls};

/// How long the handshakes may take before the clock starts.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the shards may take to hand over their latencies.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the shard publishes its connections' statistics: for up to so many of them, and more
/// rarely in proportion for more, as each is a cache miss or three.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(5);
const PUBLISHED_CONNECTIONS: usize = 64;
/// The timer token of the runner itself; a [`Work`] uses others.
const PUBLISH: u64 = 0;

/// A rate-driven workload looks for due operations this often at most.
pub const TIMER_MIN: Duration = Duration::from_micros(20);

/// Flags of every QUIC workload.
#[derive(ClapArgs, Clone, Debug)]
pub struct RunArgs {
    /// The server.
    #[arg(long)]
    pub connect: SocketAddrV6,
    /// How long to measure, seconds.
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Traffic before the clock starts, seconds: slow start, path MTU discovery.
    #[arg(long, default_value_t = 0.5)]
    pub warm_up: f64,
    /// The server's process on this machine: its CPU time and memory are reported, too.
    #[arg(long)]
    pub server_pid: Option<u32>,
    #[command(flatten)]
    pub trust: TrustArgs,
    #[command(flatten)]
    pub transport: TransportArgs,
}

/// What the shards tell the measuring thread.
#[derive(Default)]
struct Shared {
    connected: AtomicU64,
    bytes: AtomicU64,
    ops: AtomicU64,
    rtt_us: AtomicU64,
    packets_lost: AtomicU64,
    udp_payload: AtomicU64,
    stopping: AtomicBool,
    failure: Mutex<Option<String>>,
}

/// Orders to a shard.
enum Order {
    /// Open so many connections.
    Connect(usize),
    /// The clock starts: what was counted before does not count.
    Begin,
    /// The clock has stopped: hand over.
    Collect(mpsc::Sender<Collected>),
}

/// What a shard counted by itself.
#[derive(Default)]
struct Collected {
    latencies: Latencies,
}

/// What a [`Work`] sees of its runner.
pub struct Base {
    peer: SocketAddrV6,
    name: String,
    shared: Arc<Shared>,
    conns: Vec<ConnId>,
    latencies: Latencies,
}

impl Base {
    /// Connects once more.
    pub fn connect(&mut self, cx: &mut ShardCx<'_>) -> Option<ConnId> {
        match cx.connect(self.peer, &self.name) {
            Ok(conn) => {
                self.conns.push(conn);
                Some(conn)
            }
            Err(error) => {
                self.fail(error.to_string());
                None
            }
        }
    }

    /// Ends the run with an error.
    pub fn fail(&self, text: String) {
        if !self.is_stopping() {
            let mut failure = self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert(text);
        }
    }

    /// Adds application bytes.
    pub fn add_bytes(&self, bytes: u64) {
        self.shared.bytes.fetch_add(bytes, Relaxed);
    }

    /// Adds operations that have no latency of their own.
    pub fn add_ops(&self, ops: u64) {
        self.shared.ops.fetch_add(ops, Relaxed);
    }

    /// Adds a latency, not an operation.
    pub fn add_latency(&mut self, latency: Duration) {
        self.latencies.record(latency);
    }

    /// Adds an operation that took `latency`.
    pub fn add_op(&mut self, latency: Duration) {
        self.add_ops(1);
        self.latencies.record(latency);
    }

    /// Whether the clock has stopped for good.
    pub fn is_stopping(&self) -> bool {
        self.shared.stopping.load(Relaxed)
    }
}

/// A workload's part on a shard.
pub trait Work: Send + 'static {
    /// A connection is ready.
    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId);
    /// Data on a stream.
    fn handle_readable(&mut self, _: &mut ShardCx<'_>, _: &mut Base, _: ConnId, _: StreamId) {}
    /// Room on a stream.
    fn handle_writable(&mut self, _: &mut ShardCx<'_>, _: &mut Base, _: ConnId, _: StreamId) {}
    /// Room for a stream.
    fn handle_streams_available(&mut self, _: &mut ShardCx<'_>, _: &mut Base, _: ConnId) {}
    /// Datagrams have arrived.
    fn handle_datagrams(&mut self, _: &mut ShardCx<'_>, _: &mut Base, _: ConnId) {}
    /// Room for datagrams.
    fn handle_datagrams_unblocked(&mut self, _: &mut ShardCx<'_>, _: &mut Base, _: ConnId) {}
    /// A timer of this workload; tokens above 0.
    fn handle_timer(&mut self, _: &mut ShardCx<'_>, _: &mut Base, _token: u64) {}
    /// The clock starts.
    fn handle_begin(&mut self, _: &mut ShardCx<'_>, _: &mut Base) {}
    /// A connection is over; whether that was expected.
    fn handle_closed(&mut self, _: &mut ShardCx<'_>, _: &mut Base, _: ConnId) -> bool {
        false
    }
}

/// A [`Work`] as the application of a shard.
struct Runner<W> {
    base: Base,
    work: W,
}

impl<W: Work> Runner<W> {
    fn publish(&self, cx: &ShardCx<'_>) {
        let shared = &self.base.shared;
        let mut lost = 0;
        for conn in &self.base.conns {
            let Some(stats) = cx.stats(*conn) else { continue };
            lost += stats.packets_lost;
            shared.rtt_us.store(stats.rtt.as_micros() as u64, Relaxed);
            shared.udp_payload.store(u64::from(stats.mtu_bytes), Relaxed);
        }
        shared.packets_lost.fetch_max(lost, Relaxed);
    }

    fn set_publish_timer(&self, cx: &mut ShardCx<'_>) {
        let shares = self.base.conns.len().div_ceil(PUBLISHED_CONNECTIONS).max(1);
        cx.set_timer(cx.now() + PUBLISH_INTERVAL * shares as u32, PUBLISH);
    }
}

impl<W: Work> ShardApp for Runner<W> {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        let Ok(order) = message.downcast::<Order>() else { return };
        match *order {
            Order::Connect(connections) => {
                for _ in 0..connections {
                    self.base.connect(cx);
                }
                self.set_publish_timer(cx);
            }
            Order::Begin => {
                self.base.latencies.clear();
                self.work.handle_begin(cx, &mut self.base);
            }
            Order::Collect(answer) => {
                self.publish(cx);
                let latencies = self.base.latencies.clone();
                // Nobody waits any more: the run has failed otherwise and says so.
                let _run_has_failed = answer.send(Collected { latencies });
            }
        }
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.base.shared.connected.fetch_add(1, Relaxed);
        self.work.handle_connected(cx, &mut self.base, conn);
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.work.handle_readable(cx, &mut self.base, conn, stream);
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.work.handle_writable(cx, &mut self.base, conn, stream);
    }

    fn handle_streams_available(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, _dir: stoq::Dir) {
        self.work.handle_streams_available(cx, &mut self.base, conn);
    }

    fn handle_datagrams(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.work.handle_datagrams(cx, &mut self.base, conn);
    }

    fn handle_datagrams_unblocked(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.work.handle_datagrams_unblocked(cx, &mut self.base, conn);
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, token: u64) {
        if token != PUBLISH {
            return self.work.handle_timer(cx, &mut self.base, token);
        }
        self.publish(cx);
        if !self.base.is_stopping() {
            self.set_publish_timer(cx);
        }
    }

    fn handle_closed(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, reason: &ConnectionError) {
        self.base.conns.retain(|other| *other != conn);
        if !self.work.handle_closed(cx, &mut self.base, conn) {
            self.base.fail(format!("connection to {}: {reason}", self.base.peer));
        }
    }
}

/// What the report needs to know of a workload.
pub struct Plan {
    /// Its name.
    pub workload: &'static str,
    /// Connections to open at the start.
    pub connections: usize,
    /// The client's TLS.
    pub crypto: Arc<dyn quinn_proto::crypto::ClientConfig>,
}

/// The TLS of a workload without wishes of its own.
pub fn plain_crypto(args: &RunArgs) -> anyhow::Result<Arc<dyn quinn_proto::crypto::ClientConfig>> {
    Ok(tls::client(&args.trust, "perf", args.transport.packet_crypto()?)?.crypto())
}

/// Runs a workload and reports; `more` adds what only this workload tells.
pub fn run<W: Work>(
    args: &RunArgs,
    plan: Plan,
    mut make: impl FnMut(usize) -> W + Send + 'static,
    more: impl FnOnce(&mut Counts),
) -> anyhow::Result<()> {
    args.transport.tie_to_parent()?;
    let shared = Arc::new(Shared::default());
    let app = {
        let (shared, name, peer) =
            (shared.clone(), args.trust.name_of(&args.connect), args.connect);
        move |shard| Runner {
            base: Base {
                peer,
                name: name.clone(),
                shared: shared.clone(),
                conns: Vec::new(),
                latencies: Latencies::default(),
            },
            work: make(shard),
        }
    };
    let engine = Engine::builder()
        .config(args.transport.transport(args.trust.bind_addr(args.connect.scope_id()))?)
        .client(plan.crypto)
        .app(app)
        .start()?;
    for shard in 0..engine.shards() {
        let share = plan.connections / engine.shards()
            + usize::from(shard < plan.connections % engine.shards());
        order(&engine, shard, Order::Connect(share))?;
    }
    wait_connected(&shared, plan.connections as u64)?;
    measure(args, plan.workload, &engine, &shared, more)?;
    shared.stopping.store(true, Relaxed);
    engine.shutdown_blocking(Duration::ZERO, VarInt::from_u32(0), b"done");
    Ok(())
}

fn order(engine: &Engine, shard: usize, order: Order) -> anyhow::Result<()> {
    let sent = engine.send_to_app(shard, Box::new(order));
    anyhow::ensure!(sent.is_ok(), "shard {shard} has ended");
    Ok(())
}

fn check(shared: &Shared) -> anyhow::Result<()> {
    let failure = shared.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
    failure.map_or(Ok(()), |text| Err(anyhow::anyhow!(text)))
}

fn wait_connected(shared: &Shared, connections: u64) -> anyhow::Result<()> {
    let start = Instant::now();
    while shared.connected.load(Relaxed) < connections {
        check(shared)?;
        anyhow::ensure!(start.elapsed() < CONNECT_TIMEOUT, "the handshakes took too long");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn measure(
    args: &RunArgs,
    workload: &str,
    engine: &Engine,
    shared: &Shared,
    more: impl FnOnce(&mut Counts),
) -> anyhow::Result<()> {
    let warm_up = Instant::now();
    while warm_up.elapsed().as_secs_f64() < args.warm_up {
        check(shared)?;
        std::thread::sleep(SAMPLE_INTERVAL);
    }
    for shard in 0..engine.shards() {
        order(engine, shard, Order::Begin)?;
    }
    let meter = Meter::start(args.server_pid)?;
    let read = || (shared.bytes.load(Relaxed), shared.ops.load(Relaxed));
    let first = read();
    let lost_before = shared.packets_lost.load(Relaxed);
    let first_stats = engine.stats();
    let rtt = follow(args, engine, shared, &meter)?;
    let (last, seconds) = (read(), meter.seconds());
    let mut counts = Counts {
        bytes: last.0 - first.0,
        ops: last.1 - first.1,
        latencies: collect(engine)?,
        packets_lost: Some(shared.packets_lost.load(Relaxed) - lost_before),
        udp_payload: Some(shared.udp_payload.load(Relaxed)),
        ..Counts::default()
    };
    let (datapath, mode) = datapath_words(engine);
    let stats = engine.stats();
    let told = json!({
        "rtt_us_p50": rtt.p50_us(), "shards": busy_shares(&first_stats, &stats, seconds),
        "datapath": datapath, "mode": mode, "xdp": xdp_json(engine)?, "stats": stats_json(&stats),
    });
    if let serde_json::Value::Object(told) = told {
        counts.more.extend(told);
    }
    more(&mut counts);
    let outcome = meter.finish("stoq", workload, Some(args.connect), counts)?;
    report(args.transport.json, &outcome)
}

/// Sleeps through the measurement and tells progress.
fn follow(
    args: &RunArgs,
    engine: &Engine,
    shared: &Shared,
    meter: &Meter,
) -> anyhow::Result<RttSamples> {
    let first = shared.bytes.load(Relaxed);
    let mut progress = Progress::new(args.transport.json);
    let mut before = engine.stats();
    let mut rtt = RttSamples::new();
    while meter.seconds() < args.seconds {
        let left = (args.seconds - meter.seconds()).max(0.0);
        std::thread::sleep(SAMPLE_INTERVAL.min(Duration::from_secs_f64(left)));
        check(shared)?;
        let now_rtt = Duration::from_micros(shared.rtt_us.load(Relaxed));
        rtt.record(now_rtt);
        if progress.due() {
            let now = engine.stats();
            let shards = busy_shares(&before, &now, progress.interval_s());
            before = now;
            progress.report(&Reading {
                bytes: shared.bytes.load(Relaxed) - first,
                rtt: now_rtt,
                packets_lost: shared.packets_lost.load(Relaxed),
                shards,
            })?;
        }
    }
    Ok(rtt)
}

/// The latencies of all shards.
fn collect(engine: &Engine) -> anyhow::Result<Latencies> {
    let (answer, answers) = mpsc::channel();
    for shard in 0..engine.shards() {
        order(engine, shard, Order::Collect(answer.clone()))?;
    }
    let mut latencies = Latencies::default();
    for _ in 0..engine.shards() {
        let collected = answers
            .recv_timeout(COLLECT_TIMEOUT)
            .map_err(|_timeout| anyhow::anyhow!("a shard did not hand over its latencies"))?;
        latencies.merge(&collected.latencies);
    }
    Ok(latencies)
}

/// The report, for people or programs.
pub fn report(json: bool, outcome: &Outcome) -> anyhow::Result<()> {
    if json {
        return output::json_line(outcome);
    }
    let text = |key: &str| outcome.more.get(key).map_or_else(String::new, |word| word.to_string());
    let (datapath, mode) = (text("datapath"), text("mode"));
    println!(
        "{} in {:.2} s over {} ({}), UDP payload {}: {}, RTT p50 {} µs, {} lost",
        output::size(outcome.bytes),
        outcome.seconds,
        datapath.trim_matches('"'),
        mode.trim_matches('"'),
        outcome.udp_payload.unwrap_or(0),
        output::rate(outcome.goodput_bps),
        text("rtt_us_p50"),
        outcome.packets_lost.unwrap_or(0),
    );
    if outcome.ops > 0 {
        println!("{} {}: {:.0} a second", outcome.ops, outcome.workload, outcome.ops_per_s);
    }
    if let Some(us) = outcome.latency_us {
        println!("latency p50 {:.1} µs, p99 {:.1} µs, p99.9 {:.1} µs", us.p50, us.p99, us.p999);
    }
    let ends = [("client", Some(outcome.client)), ("server", outcome.server)];
    for (name, used) in ends.iter().filter_map(|(name, used)| Some((name, used.as_ref()?))) {
        println!(
            "{name}: CPU {:.2} s user, {:.2} s system{}, {} resident",
            used.cpu_user_s,
            used.cpu_sys_s,
            used.cpu_s_per_gb.map_or_else(String::new, |per_gb| format!(" ({per_gb:.2} s/GB)")),
            output::size(used.rss_bytes),
        );
    }
    Ok(())
}
