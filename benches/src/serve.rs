//! `stoq serve`: files by hq-interop and the perf protocol, on the shards themselves.

use std::any::Any;
use std::net::SocketAddrV6;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use clap::Args as ClapArgs;
use rustc_hash::FxHashMap;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use stoq::app::{ConnId, ShardApp, ShardCx};
use stoq::certs::ServerTls;
use stoq::config::TransportConfig;
use stoq::engine::Engine;
use stoq::error::ConnectionError;
use stoq::{Dir, StreamId, VarInt};
use stoq_measure::cpu::rss_bytes;
use stoq_measure::wire::{self, DatagramSink};

use crate::ca::EnrolArgs;
use crate::engine::{
    TransportArgs, datapath_words, faults_json, rotation_json, stats_json, turns_json, xdp_json,
};
use crate::hq::{FileChunk, FileReaders, HqStream};
use crate::output;
use crate::perf::handles::HandleServer;
use crate::perf::server::PerfStream;
use crate::tls;

/// How long open streams may go on after SIGTERM.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Flags of `stoq serve`.
#[derive(ClapArgs)]
pub struct Args {
    /// Address and port.
    #[arg(long, default_value = "[::]:4433")]
    listen: SocketAddrV6,
    /// Directory whose files are served by hq-interop.
    #[arg(long)]
    www: Option<PathBuf>,
    /// Application protocols, comma-separated.
    #[arg(long, default_value = "hq-interop,perf", value_delimiter = ',')]
    alpn: Vec<String>,
    /// Write the certificate that clients shall trust into this PEM file.
    #[arg(long)]
    cert_out: Option<PathBuf>,
    /// Certificate chain to use instead of a self-made one (PEM); needs --key.
    #[arg(long, requires = "key", conflicts_with = "ca_connect")]
    cert: Option<PathBuf>,
    /// Private key of --cert (PEM).
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,
    /// Names for the self-made certificate; the listen address is always in it.
    #[arg(long, value_delimiter = ',')]
    names: Vec<String>,
    /// Silence after which a connection is given up, ms; 0: never.
    #[arg(long)]
    idle_timeout_ms: Option<u64>,
    /// Age at which connections are closed, s, so that revocations and expired certificates bite; each
    /// ends within the last tenth of it. 0: never.
    #[arg(long, alias = "max-connection-age")]
    max_connection_age_s: Option<u64>,
    /// Serve Prometheus text over HTTP (`/metrics`) at this address.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddrV6>,
    /// Connections that each shard holds at most; further ones are refused.
    #[arg(long)]
    connections_max: Option<usize>,
    /// Serve the perf protocol's streams with the async handles instead of code on the shards.
    #[arg(long, conflicts_with = "www")]
    handles: bool,
    #[command(flatten)]
    clients: tls::ClientAuthArgs,
    #[command(flatten)]
    enrol: EnrolArgs,
    #[command(flatten)]
    transport: TransportArgs,
}

impl Args {
    fn transport(&self) -> anyhow::Result<TransportConfig> {
        let mut config = self.transport.transport(self.listen)?;
        config.idle_timeout_ms = self.idle_timeout_ms.unwrap_or(config.idle_timeout_ms);
        if let Some(age_s) = self.max_connection_age_s {
            config.connection_age_ms_max =
                age_s.checked_mul(1000).context("--max-connection-age-s is too large")?;
        }
        config.metrics_address = self.metrics.or(config.metrics_address);
        config.connections_per_shard_max =
            self.connections_max.unwrap_or(config.connections_per_shard_max);
        Ok(config)
    }
}

/// Serves until SIGINT or SIGTERM; SIGUSR1 prints statistics.
pub fn run(args: &Args) -> anyhow::Result<()> {
    args.transport.tie_to_parent()?;
    let signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGUSR1])
        .context("installing signal handlers")?;
    let readers = args.www.as_deref().map(FileReaders::start).transpose()?;
    let perf_only = [String::from_utf8_lossy(wire::ALPN).into_owned()];
    let config = args.transport()?;
    let tls::Server { tls: server, trust } = tls::server(&tls::ServerOptions {
        listen: args.listen,
        names: &args.names,
        alpn: if args.handles { &perf_only } else { &args.alpn },
        cert: args.cert.as_deref(),
        key: args.key.as_deref(),
        packet_crypto: config.crypto_provider,
        cert_out: args.cert_out.as_deref(),
        enrol: &args.enrol,
        clients: &args.clients,
    })?;
    // Renews the certificate for as long as we serve.
    let _maintenance = server.spawn_maintenance().context("starting certificate renewal")?;
    let mut builder = Engine::builder()
        .config(config)
        .server(server.crypto())
        .rotation(server.identity().clone())
        .faults("server", server.faults().clone());
    if let Some(trust) = &trust {
        builder = builder.faults("trust", trust.faults().clone());
    }
    if !args.handles {
        builder =
            builder.app(move |_shard| Service { readers: readers.clone(), ..Service::default() });
    }
    let engine = Arc::new(builder.start()?);
    let handles = args.handles.then(|| HandleServer::start(engine.clone())).transpose();
    let handles = handles.context("starting the thread that accepts")?;
    announce(args, &engine)?;
    wait_for_end(args, signals, &engine, &server)?;
    drop(handles);
    let engine = Arc::into_inner(engine).expect("the accepting thread, which shared it, has ended");
    let xdp = xdp_json(&engine)?;
    let stats = engine.stats();
    let report = engine.shutdown_blocking(SHUTDOWN_GRACE, VarInt::from_u32(0), b"server stops");
    if args.transport.json {
        let mut stats = stats_json(&stats);
        stats["xdp"] = xdp;
        stats["connections_at_shutdown"] = report.connections_at_order.into();
        output::json_line(&json!({ "event": "stopped", "stats": stats }))?;
    }
    Ok(())
}

fn announce(args: &Args, engine: &Engine) -> anyhow::Result<()> {
    let (datapath, mode) = datapath_words(engine);
    if args.transport.json {
        return output::json_line(&json!({
            "event": "listening",
            "addr": engine.local_addr().to_string(),
            "datapath": datapath,
            "mode": mode,
            "metrics": engine.metrics_addr().map(|addr| addr.to_string()),
            "queues": engine.shards(),
        }));
    }
    eprintln!(
        "listening on {} over {datapath} ({mode}), {} shard(s)",
        engine.local_addr(),
        engine.shards()
    );
    for reason in engine.datapath_reasons() {
        eprintln!("  {reason}");
    }
    Ok(())
}

/// Returns at a signal, or with an error when every shard has ended by itself.
fn wait_for_end(
    args: &Args,
    mut signals: signal_hook::iterator::Signals,
    engine: &Engine,
    tls: &ServerTls,
) -> anyhow::Result<()> {
    loop {
        for signal in signals.pending() {
            if signal != SIGUSR1 {
                return Ok(());
            }
            print_stats(args, engine, tls)?;
        }
        anyhow::ensure!(engine.is_running(), "the engine ended by itself; see the log above");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn print_stats(args: &Args, engine: &Engine, tls: &ServerTls) -> anyhow::Result<()> {
    let (transport, rss_bytes) = (engine.transport_stats(), rss_bytes(None)?);
    let turns = turns_json(&transport);
    if args.transport.json {
        return output::json_line(&json!({
            "event": "stats", "connections": transport.connections_active,
            "rss_bytes": rss_bytes, "turn_us": turns, "stats": stats_json(&engine.stats()),
            "certificate": transport.rotation.as_ref().map(rotation_json),
            "faults": {
                "identity": faults_json(tls.identity().faults()),
                "server": faults_json(tls.faults()),
            },
        }));
    }
    eprintln!(
        "{} connections, {} resident, turns: p50 {} µs, p99 {} µs, p99.9 {} µs",
        transport.connections_active,
        output::size(rss_bytes),
        turns["p50"],
        turns["p99"],
        turns["p999"],
    );
    if let Some(rotation) = &transport.rotation {
        eprintln!("certificate: {}", rotation_json(rotation));
    }
    Ok(())
}

enum Stream {
    Perf(PerfStream),
    Hq(HqStream),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Perf,
    Hq,
}

/// Both protocols on one shard.
#[derive(Default)]
struct Service {
    readers: Option<FileReaders>,
    protocols: FxHashMap<ConnId, Protocol>,
    streams: FxHashMap<(ConnId, StreamId), Stream>,
    datagrams: FxHashMap<ConnId, DatagramSink>,
}

impl Service {
    fn with_stream(
        &mut self,
        conn: ConnId,
        stream: StreamId,
        f: impl FnOnce(&mut Stream, Option<&FileReaders>) -> bool,
    ) {
        let Some(entry) = self.streams.get_mut(&(conn, stream)) else { return };
        if !f(entry, self.readers.as_ref()) {
            self.streams.remove(&(conn, stream));
        }
    }
}

impl ShardApp for Service {
    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        let protocol = match cx.alpn(conn).as_deref() {
            Some(b"hq-interop") => Protocol::Hq,
            _ => Protocol::Perf,
        };
        self.protocols.insert(conn, protocol);
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        while let Some(stream) = cx.accept_stream(conn, dir) {
            let entry = match self.protocols.get(&conn) {
                Some(Protocol::Hq) if dir == Dir::Bi => Stream::Hq(HqStream::default()),
                _ => Stream::Perf(PerfStream::default()),
            };
            self.streams.insert((conn, stream), entry);
            self.handle_readable(cx, conn, stream);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.with_stream(conn, stream, |entry, readers| match (entry, readers) {
            (Stream::Perf(perf), _) => perf.handle_readable(cx, conn, stream),
            (Stream::Hq(hq), Some(readers)) => hq.handle_readable(cx, conn, stream, readers),
            (Stream::Hq(_), None) => {
                cx.reset(conn, stream, crate::hq::NOT_FOUND.into());
                false
            }
        });
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.with_stream(conn, stream, |entry, readers| match (entry, readers) {
            (Stream::Perf(perf), _) => perf.handle_writable(cx, conn, stream),
            (Stream::Hq(hq), Some(readers)) => hq.handle_writable(cx, conn, stream, readers),
            (Stream::Hq(_), None) => false,
        });
    }

    fn handle_stopped(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
        code: VarInt,
    ) {
        cx.reset(conn, stream, code);
        self.streams.remove(&(conn, stream));
    }

    fn handle_datagrams(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        let sink = self.datagrams.entry(conn).or_default();
        while let Some(datagram) = cx.recv_datagram(conn) {
            if let Some(echo) = sink.handle(&datagram) {
                // Echoes are datagrams themselves: one that finds no room is lost like one.
                let _may_be_lost = cx.send_datagram(conn, Bytes::copy_from_slice(&echo));
            }
        }
    }

    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        let Ok(chunk) = message.downcast::<FileChunk>() else { return };
        let (conn, stream) = chunk.stream();
        self.with_stream(conn, stream, |entry, readers| match (entry, readers) {
            (Stream::Hq(hq), Some(readers)) => hq.handle_chunk(cx, *chunk, readers),
            _ => true,
        });
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId, _reason: &ConnectionError) {
        self.protocols.remove(&conn);
        self.datagrams.remove(&conn);
        self.streams.retain(|(owner, _), _| *owner != conn);
    }
}
