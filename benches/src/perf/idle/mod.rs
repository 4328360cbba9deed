//! `stoq perf idle`: many connections that do next to nothing, and what each of them costs.
//!
//! N handshakes at a bounded rate; then the connections are held with keep-alives while a random
//! part of them exchanges a request. Any connection that is lost, and any request that is not
//! answered, fails the run.

mod app;
mod server;

use std::net::SocketAddrV6;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use serde_json::{Value, json};
use stoq::engine::Engine;
use stoq_measure::cpu::{CpuTime, rss_bytes};
use stoq_measure::idle::BYTES_PER_CONNECTION;
use stoq_measure::outcome::{Counts, EndUse, Meter, Outcome};

use self::app::{IdleApp, Order, Shared};
use self::server::Server;
use crate::client::TrustArgs;
use crate::engine::{TransportArgs, datapath_words, turns_json};
use crate::{output, tls};

/// Time allowed for the handshakes beyond what their rate needs, in all and as a factor.
const CONNECT_SLACK: Duration = Duration::from_secs(30);
const CONNECT_SLACK_FACTOR: f64 = 4.0;
/// Time for the last requests' answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections end unasked after so many missed keep-alives.
const KEEP_ALIVES_PER_IDLE_TIMEOUT: u64 = 4;

/// Application bytes of a request, 8, and its answer.
const REQUEST_AND_ANSWER_BYTES: u64 = 8 + app::ANSWER_BYTES;
/// Largest UDP payload, as on a network: on the loopback each connection would else send a path
/// MTU probe of 65 kB, and a few dozen of these fill a socket's receive buffer.
const UDP_PAYLOAD_BYTES: u16 = 1452;

/// Flags of the idle workload.
#[derive(ClapArgs)]
pub struct Args {
    /// The server; without it one is started on the loopback, and measured, too.
    #[arg(long)]
    connect: Option<SocketAddrV6>,
    /// Process of the server given by --connect, to measure its memory.
    #[arg(long, requires = "connect")]
    server_pid: Option<u32>,
    /// Connections.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Handshakes started per second.
    #[arg(long, default_value_t = 1000.0, value_parser = rate)]
    rate: f64,
    /// How long to hold the connections, seconds.
    #[arg(long, default_value_t = 60.0, value_parser = rate)]
    seconds: f64,
    /// Interval of keep-alive packets, ms.
    #[arg(long, default_value_t = 15_000)]
    keep_alive_ms: u64,
    /// Part of the connections that exchange a request while held, per cent.
    #[arg(long, default_value_t = 1.0)]
    requests_percent: f64,
    /// Chooses the connections that carry a request.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    transport: TransportArgs,
}

impl Args {
    fn udp_payload(&self) -> u16 {
        self.transport.udp_payload.filter(|&bytes| bytes != 0).unwrap_or(UDP_PAYLOAD_BYTES)
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err(format!("`{text}` is not a number above zero")),
    }
}

/// Memory of one end, before the connections, with them, and at the end.
struct Memory {
    before: u64,
    connected: u64,
    held: u64,
}

impl Memory {
    fn json(&self, connections: usize) -> Value {
        json!({
            "rss_bytes_before": self.before, "rss_bytes_connected": self.connected,
            "rss_bytes": self.held, "rss_bytes_per_connection": self.per_connection(connections),
        })
    }

    fn per_connection(&self, connections: usize) -> u64 {
        self.held.saturating_sub(self.before) / connections.max(1) as u64
    }
}

/// Runs the workload and reports; fails when a connection or a request did.
pub fn run(args: &Args) -> anyhow::Result<()> {
    args.transport.tie_to_parent()?;
    let mut server = start_server(args)?;
    let shared = Arc::new(Shared::new());
    let engine = start_client(args, &server, &shared)?;
    let (ours_before, theirs_before) = (rss_bytes(None)?, server.rss_bytes()?);
    let (start, cpu) = (Instant::now(), CpuTime::of(None)?);

    order(&engine, args.connections, |connections| Order::Connect {
        connections,
        rate: args.rate / engine.shards() as f64,
    })?;
    let limit = CONNECT_SLACK
        + Duration::from_secs_f64(args.connections as f64 / args.rate * CONNECT_SLACK_FACTOR);
    wait_connected(&shared, args.connections as u64, limit)?;
    let handshakes_s = start.elapsed().as_secs_f64();
    let turns = (turns_json(&engine.transport_stats()), server.stats()?);
    let (ours_connected, theirs_connected) = (rss_bytes(None)?, server.rss_bytes()?);

    let requests = (args.connections as f64 * args.requests_percent / 100.0).ceil() as usize;
    let over = Duration::from_secs_f64(args.seconds);
    let meter = Meter::start(server.pid())?;
    order(&engine, requests, |requests| Order::Request { requests, over })?;
    std::thread::sleep(over);
    wait_answered(&shared, requests as u64);

    let cpu = CpuTime::of(None)?.since(cpu);
    let ours = Memory { before: ours_before, connected: ours_connected, held: rss_bytes(None)? };
    let theirs = match (theirs_before, theirs_connected, server.rss_bytes()?) {
        (Some(before), Some(connected), Some(held)) => Some(Memory { before, connected, held }),
        _ => None,
    };
    let counts = Counts {
        ops: shared.answers.load(Relaxed),
        bytes: shared.answers.load(Relaxed) * REQUEST_AND_ANSWER_BYTES,
        udp_payload: Some(args.udp_payload().into()),
        ..Counts::default()
    };
    let outcome = meter.finish("stoq", "idle", Some(server.addr()), counts)?;
    let report = Report { handshakes_s, requests, ours, theirs, turns, cpu, outcome };
    report.print(args, &engine, &shared)?;
    shared.stopping.store(true, Relaxed);
    drop(server);
    drop(engine);
    let failed = shared.failed.load(Relaxed);
    let unanswered = requests as u64 - shared.answers.load(Relaxed).min(requests as u64);
    anyhow::ensure!(
        failed == 0 && unanswered == 0,
        "{failed} connections failed, {unanswered} of {requests} requests were not answered: {}",
        shared.reasons()
    );
    Ok(())
}

fn start_server(args: &Args) -> anyhow::Result<Server> {
    if let Some(addr) = args.connect {
        return Ok(Server::Other { addr, pid: args.server_pid });
    }
    let transport = &args.transport;
    let mut flags: Vec<String> = ["--listen", "[::1]:0", "--alpn", "perf"].map(Into::into).into();
    let mut flag = |name: &str, value: String| flags.extend([name.to_owned(), value]);
    if let Some(queues) = transport.queues {
        flag("--queues", queues.to_string());
    }
    if let Some(cc) = transport.cc {
        flag("--cc", cc.name().to_owned());
    }
    if let Some(datapath) = transport.datapath {
        flag("--datapath", datapath.to_string());
    }
    flag("--udp-payload", args.udp_payload().to_string());
    flag("--idle-timeout-ms", (args.keep_alive_ms * KEEP_ALIVES_PER_IDLE_TIMEOUT).to_string());
    flag("--connections-max", args.connections.to_string());
    if let Some(spin_us) = transport.spin_us {
        flag("--spin-us", spin_us.to_string());
    }
    if let Some(config) = &transport.config {
        flag("--config", config.display().to_string());
    }
    Server::start(&flags)
}

fn start_client(args: &Args, server: &Server, shared: &Arc<Shared>) -> anyhow::Result<Engine> {
    let mut trust = args.trust.clone();
    // Our own server's certificate is as new as its process; both ends are ours.
    trust.danger_insecure |= args.connect.is_none();
    let (peer, name) = (server.addr(), trust.name_of(&server.addr()));
    let mut config = args.transport.transport(trust.bind_addr(peer.scope_id()))?;
    config.mtu_upper_bound_bytes = args.udp_payload();
    config.keep_alive_interval_ms = args.keep_alive_ms;
    config.idle_timeout_ms = args.keep_alive_ms * KEEP_ALIVES_PER_IDLE_TIMEOUT;
    config.connections_per_shard_max =
        config.connections_per_shard_max.max(args.connections.div_ceil(config.shards.max(1)));
    let (shared, seed) = (shared.clone(), args.seed);
    let tls = tls::client(&trust, "perf", config.crypto_provider)?;
    let engine = Engine::builder()
        .config(config)
        .client(tls.crypto())
        .app(move |shard| IdleApp::new(peer, name.clone(), shared.clone(), seed, shard))
        .start()?;
    Ok(engine)
}

/// Gives each shard its share of `total`.
fn order(engine: &Engine, total: usize, make: impl Fn(usize) -> Order) -> anyhow::Result<()> {
    let shards = engine.shards();
    for shard in 0..shards {
        let share = total / shards + usize::from(shard < total % shards);
        let sent = engine.send_to_app(shard, Box::new(make(share)));
        anyhow::ensure!(sent.is_ok(), "shard {shard} has ended");
    }
    Ok(())
}

fn wait_connected(shared: &Shared, connections: u64, limit: Duration) -> anyhow::Result<()> {
    let start = Instant::now();
    while shared.connected.load(Relaxed) + shared.failed.load(Relaxed) < connections {
        anyhow::ensure!(
            start.elapsed() < limit,
            "only {} of {connections} handshakes succeeded in {limit:?}: {}",
            shared.connected.load(Relaxed),
            shared.reasons()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn wait_answered(shared: &Shared, requests: u64) {
    let start = Instant::now();
    while shared.answers.load(Relaxed) < requests && start.elapsed() < ANSWER_TIMEOUT {
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Report {
    handshakes_s: f64,
    requests: usize,
    ours: Memory,
    theirs: Option<Memory>,
    /// Turn times while handshakes arrived: ours, and what the server said then.
    turns: (Value, Option<Value>),
    /// Of this process, since before the first handshake.
    cpu: CpuTime,
    /// Of the time that the connections were held.
    outcome: Outcome,
}

impl Report {
    fn print(&self, args: &Args, engine: &Engine, shared: &Shared) -> anyhow::Result<()> {
        let connected = shared.connected.load(Relaxed);
        let connections = args.connections;
        let latency = shared.latency_us.lock().unwrap_or_else(PoisonError::into_inner);
        let quantile = |q| if latency.is_empty() { 0 } else { latency.value_at_quantile(q) };
        let server_turns = self.turns.1.as_ref().map_or(&Value::Null, |stats| &stats["turn_us"]);
        let handshakes_per_s = connected as f64 / self.handshakes_s;
        let (datapath, mode) = datapath_words(engine);
        if args.transport.json {
            let mut json = serde_json::to_value(&self.outcome)?;
            let mut client = self.ours.json(connections);
            client["turn_us"] = self.turns.0.clone();
            merge(&mut json["client"], client);
            if let Some(theirs) = &self.theirs {
                let mut server = theirs.json(connections);
                server["turn_us"] = server_turns.clone();
                merge(&mut json["server"], server);
                json[BYTES_PER_CONNECTION] = theirs.per_connection(connections).into();
            }
            merge(
                &mut json,
                json!({
                    "connections": connected, "failed": shared.failed.load(Relaxed),
                    "handshakes_s": self.handshakes_s, "handshakes_per_s": handshakes_per_s,
                    "keep_alive_ms": args.keep_alive_ms, "seed": args.seed,
                    "requests": self.requests, "answers": shared.answers.load(Relaxed),
                    "latency_us": (!latency.is_empty()).then(|| json!({
                        "p50": quantile(0.5), "p99": quantile(0.99), "p999": quantile(0.999),
                    })),
                    "cpu_user_s": self.cpu.user_s, "cpu_sys_s": self.cpu.sys_s,
                    "rss_bytes": self.ours.held, "datapath": datapath, "mode": mode,
                }),
            );
            return output::json_line(&json);
        }
        println!(
            "{connected} connections over {datapath} ({mode}), {handshakes_per_s:.0} handshakes/s, held {} s, {} failed",
            args.seconds,
            shared.failed.load(Relaxed),
        );
        let share = |end: EndUse| 100.0 * (end.cpu_user_s + end.cpu_sys_s) / self.outcome.seconds;
        let held = self
            .outcome
            .server
            .map_or_else(String::new, |server| format!(", of the server's {:.2} %", share(server)));
        println!("while held: {:.2} % of the client's core{held}", share(self.outcome.client));
        print_end("client", Some(&self.ours), &self.turns.0, connections);
        print_end("server", self.theirs.as_ref(), server_turns, connections);
        println!(
            "{} of {} requests answered, p50 {} µs, p99 {} µs",
            shared.answers.load(Relaxed),
            self.requests,
            quantile(0.5),
            quantile(0.99),
        );
        Ok(())
    }
}

/// Adds the keys of one object to another.
fn merge(into: &mut Value, more: Value) {
    if let (Value::Object(into), Value::Object(more)) = (into, more) {
        into.extend(more);
    }
}

fn print_end(what: &str, memory: Option<&Memory>, turns: &Value, connections: usize) {
    let Some(memory) = memory else {
        println!("{what}: memory unknown; --server-pid names its process");
        return;
    };
    print!(
        "{what}: {} bytes resident a connection ({} in all)",
        memory.per_connection(connections),
        output::size(memory.held),
    );
    if turns.is_null() {
        println!();
        return;
    }
    println!(
        "; turns while handshakes arrived: p50 {} µs, p99 {} µs, p99.9 {} µs, longest {} µs",
        turns["p50"], turns["p99"], turns["p999"], turns["max"]
    );
}
