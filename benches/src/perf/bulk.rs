//! Bulk upload and download, on the shards themselves.

use std::any::Any;
use std::net::SocketAddrV6;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;
use serde_json::json;
use stoq::app::{ConnId, ReadOutcome, ShardApp, ShardCx};
use stoq::engine::Engine;
use stoq::error::ConnectionError;
use stoq::{Dir, StreamId, VarInt};

use super::server::{READ_BYTES_MAX, write_filler};
use crate::client::{Progress, Reading, RttSamples, SAMPLE_INTERVAL, TrustArgs};
use crate::cpu::{CpuTime, rss_bytes};
use crate::engine::{TransportArgs, busy_shares, datapath_words, stats_json, xdp_json};
use crate::{output, tls};

/// How long the handshakes may take before the clock starts.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How often the shard publishes its connections' statistics.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(5);

/// Flags of bulk workloads.
#[derive(ClapArgs)]
pub struct Args {
    /// The server.
    #[arg(long)]
    connect: SocketAddrV6,
    /// How long to measure, seconds.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Connections.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Streams of each connection.
    #[arg(long, default_value_t = 1)]
    streams: usize,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    transport: TransportArgs,
}

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From here.
    Upload,
    /// To here.
    Download,
}

/// What the shards tell the measuring thread.
#[derive(Default)]
struct Shared {
    connected: AtomicU64,
    /// Bytes received (download) or given to the transport (upload).
    bytes: AtomicU64,
    rtt_us: AtomicU64,
    packets_lost: AtomicU64,
    udp_payload: AtomicU64,
    stopping: AtomicBool,
    failure: Mutex<Option<String>>,
}

/// Tells a shard to start its share of the connections.
struct Start {
    connections: usize,
}

struct Bulk {
    direction: Direction,
    peer: SocketAddrV6,
    name: String,
    streams: usize,
    conns: Vec<ConnId>,
    shared: Arc<Shared>,
}

impl Bulk {
    fn fail(&self, text: String) {
        let mut failure = self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(text);
    }

    fn upload(&self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        if self.shared.stopping.load(Relaxed) {
            return;
        }
        let quota = 1u64 << 40;
        if let Some(left) = write_filler(cx, conn, stream, quota) {
            self.shared.bytes.fetch_add(quota - left, Relaxed);
        }
    }
}

impl ShardApp for Bulk {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        let Ok(start) = message.downcast::<Start>() else { return };
        for _ in 0..start.connections {
            match cx.connect(self.peer, &self.name) {
                Ok(conn) => self.conns.push(conn),
                Err(error) => self.fail(error.to_string()),
            }
        }
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.shared.connected.fetch_add(1, Relaxed);
        for _ in 0..self.streams {
            let Some(stream) = cx.open(conn, Dir::Bi) else {
                self.fail("the server allows fewer streams".into());
                return;
            };
            let count: u64 = match self.direction {
                Direction::Upload => 0,
                Direction::Download => u64::MAX >> 2,
            };
            cx.write(conn, stream, &mut [bytes::Bytes::copy_from_slice(&count.to_be_bytes())]);
            match self.direction {
                Direction::Upload => self.upload(cx, conn, stream),
                Direction::Download => {
                    cx.finish(conn, stream);
                }
            }
        }
        self.handle_timer(cx, 0);
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        loop {
            let mut bytes = 0;
            let outcome = cx.read(conn, stream, READ_BYTES_MAX, |data| bytes += data.len() as u64);
            self.shared.bytes.fetch_add(bytes, Relaxed);
            if outcome != ReadOutcome::MayHaveMore {
                return;
            }
        }
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.upload(cx, conn, stream);
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, _token: u64) {
        let mut lost = 0;
        for conn in &self.conns {
            let Some(stats) = cx.stats(*conn) else { continue };
            lost += stats.packets_lost;
            self.shared.rtt_us.store(stats.rtt.as_micros() as u64, Relaxed);
            self.shared.udp_payload.store(u64::from(stats.mtu_bytes), Relaxed);
        }
        self.shared.packets_lost.fetch_max(lost, Relaxed);
        if !self.shared.stopping.load(Relaxed) {
            cx.set_timer(cx.now() + PUBLISH_INTERVAL, 0);
        }
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId, reason: &ConnectionError) {
        self.conns.retain(|other| *other != conn);
        if !self.shared.stopping.load(Relaxed) {
            self.fail(format!("connection to {}: {reason}", self.peer));
        }
    }
}

/// Runs the workload and reports.
pub fn run(args: &Args, direction: Direction) -> anyhow::Result<()> {
    args.transport.tie_to_parent()?;
    let shared = Arc::new(Shared::default());
    let app = {
        let (shared, name) = (shared.clone(), args.trust.name_of(&args.connect));
        let (peer, streams) = (args.connect, args.streams);
        move |_shard| Bulk {
            direction,
            peer,
            name: name.clone(),
            streams,
            conns: Vec::new(),
            shared: shared.clone(),
        }
    };
    let engine = Engine::builder()
        .config(args.transport.transport(args.trust.bind_addr(args.connect.scope_id()))?)
        .client(tls::client(&args.trust, "perf")?.crypto())
        .app(app)
        .start()?;
    for shard in 0..engine.shards() {
        let share = args.connections / engine.shards()
            + usize::from(shard < args.connections % engine.shards());
        if engine.send_to_app(shard, Box::new(Start { connections: share })).is_err() {
            anyhow::bail!("shard {shard} has ended");
        }
    }
    wait_connected(&shared, args.connections as u64)?;
    measure(args, direction, &engine, &shared)?;
    shared.stopping.store(true, Relaxed);
    engine.shutdown_blocking(Duration::ZERO, VarInt::from_u32(0), b"done");
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
    args: &Args,
    direction: Direction,
    engine: &Engine,
    shared: &Shared,
) -> anyhow::Result<()> {
    let (start, cpu) = (Instant::now(), CpuTime::now()?);
    let first = shared.bytes.load(Relaxed);
    let mut progress = Progress::new(args.transport.json);
    let mut before = engine.stats();
    let first_stats = before.clone();
    let mut rtt = RttSamples::new();
    while start.elapsed().as_secs_f64() < args.seconds {
        std::thread::sleep(SAMPLE_INTERVAL);
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
    let seconds = start.elapsed().as_secs_f64();
    let bytes = shared.bytes.load(Relaxed) - first;
    let cpu = CpuTime::now()?.since(cpu);
    let bps = bytes as f64 * 8.0 / seconds;
    let (datapath, mode) = datapath_words(engine);
    let shards = busy_shares(&first_stats, &engine.stats(), seconds);
    if args.transport.json {
        let workload = if direction == Direction::Upload { "upload" } else { "download" };
        return output::json_line(&json!({
            "event": "done", "workload": workload, "stack": "stoq", "seconds": seconds,
            "bytes": bytes, "goodput_bps": bps, "rtt_us_p50": rtt.p50_us(),
            "packets_lost": shared.packets_lost.load(Relaxed),
            "udp_payload": shared.udp_payload.load(Relaxed),
            "cpu_user_s": cpu.user_s, "cpu_sys_s": cpu.sys_s,
            "cpu_s_per_gb": (cpu.user_s + cpu.sys_s) / (bytes as f64 / 1e9).max(1e-9),
            "rss_bytes": rss_bytes()?, "shards": shards,
            "datapath": datapath, "mode": mode, "xdp": xdp_json(engine)?,
            "stats": stats_json(&engine.stats()),
        }));
    }
    println!(
        "{} in {seconds:.2} s over {datapath} ({mode}), UDP payload {}: {}, RTT p50 {} µs, {} lost, CPU {:.2} s/GB",
        output::size(bytes),
        shared.udp_payload.load(Relaxed),
        output::rate(bps),
        rtt.p50_us(),
        shared.packets_lost.load(Relaxed),
        (cpu.user_s + cpu.sys_s) / (bytes as f64 / 1e9).max(1e-9),
    );
    Ok(())
}
