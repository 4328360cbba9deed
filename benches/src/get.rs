//! `stoq get`: files by hq-interop, hashed on the way.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddrV6;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use clap::Args as ClapArgs;
use serde_json::json;
use sha2::{Digest, Sha256};
use stoq::VarInt;
use stoq::connection::Connection;
use stoq::engine::Engine;
use stoq::error::ReadError;

use crate::client::{Progress, Reading, RttSamples, SAMPLE_INTERVAL, TrustArgs, parse_url};
use crate::engine::{TransportArgs, busy_shares, datapath_words, xdp_json};
use crate::hq::NOT_FOUND;
use crate::{output, tls};

/// Chunks between the connection and the disk.
const CHUNKS_QUEUED_MAX: usize = 4096;

/// Flags of `stoq get`.
#[derive(ClapArgs)]
pub struct Args {
    /// URLs: `https://[address]:port/path`, all on one server.
    #[arg(required = true)]
    urls: Vec<String>,
    /// Directory for the files; without it they are only hashed.
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    transport: TransportArgs,
}

struct Fetched {
    url: String,
    bytes: u64,
    sha256: String,
}

/// Fetches every URL over one connection.
pub fn run(args: &Args) -> anyhow::Result<()> {
    args.transport.tie_to_parent()?;
    let targets: Vec<(SocketAddrV6, String)> =
        args.urls.iter().map(|url| parse_url(url)).collect::<anyhow::Result<_>>()?;
    let peer = targets[0].0;
    anyhow::ensure!(
        targets.iter().all(|(other, _)| *other == peer),
        "all URLs must name the same server: one connection fetches them"
    );
    let config = args.transport.transport(args.trust.bind_addr(peer.scope_id()))?;
    let tls = tls::client(&args.trust, "hq-interop", config.crypto_provider)?;
    let engine = Engine::builder().config(config).client(tls.crypto()).start()?;
    let start = Instant::now();
    let connection = pollster::block_on(engine.connect(peer, &args.trust.name_of(&peer)))
        .with_context(|| format!("connecting to {peer}"))?;
    let received = Arc::new(AtomicU64::new(0));
    let mut rtt = RttSamples::new();
    let mut files = Vec::new();
    for (url, (_, path)) in args.urls.iter().zip(&targets) {
        files.push(fetch(args, &engine, &connection, url, path, &received, &mut rtt)?);
    }
    let seconds = start.elapsed().as_secs_f64();
    let stats = connection.stats();
    connection.close(VarInt::from_u32(0), b"done");
    let (datapath, mode) = datapath_words(&engine);
    let xdp = xdp_json(&engine)?;
    let bytes: u64 = files.iter().map(|file| file.bytes).sum();
    let bps = bytes as f64 * 8.0 / seconds;
    engine.shutdown_blocking(Duration::ZERO, VarInt::from_u32(0), b"done");
    if args.transport.json {
        let files: Vec<_> = files
            .iter()
            .map(|file| json!({ "url": file.url, "bytes": file.bytes, "sha256": file.sha256 }))
            .collect();
        return output::json_line(&json!({
            "event": "done", "files": files, "seconds": seconds, "bytes": bytes,
            "goodput_bps": bps, "rtt_us_p50": rtt.p50_us(),
            "packets_lost": stats.packets_lost, "udp_payload": stats.mtu_bytes,
            "datapath": datapath, "mode": mode, "xdp": xdp,
        }));
    }
    for file in &files {
        println!("{}  {}  {}", file.sha256, output::size(file.bytes), file.url);
    }
    eprintln!(
        "{} in {seconds:.2} s over {datapath} ({mode}): {}",
        output::size(bytes),
        output::rate(bps)
    );
    Ok(())
}

fn fetch(
    args: &Args,
    engine: &Engine,
    connection: &Connection,
    url: &str,
    path: &str,
    received: &Arc<AtomicU64>,
    rtt: &mut RttSamples,
) -> anyhow::Result<Fetched> {
    let target = args.out.as_deref().map(|dir| target(dir, path));
    let file = target.as_deref().map(create).transpose()?;
    let (chunks, queue) = sync_channel::<Bytes>(CHUNKS_QUEUED_MAX);
    let writer = std::thread::Builder::new()
        .name("stoq-get-write".into())
        .spawn(move || hash_and_write(&queue, file))
        .context("starting the writer")?;
    let reader = {
        let (connection, received) = (connection.clone(), received.clone());
        let request = format!("GET {path}\r\n");
        std::thread::Builder::new()
            .name("stoq-get-read".into())
            .spawn(move || -> anyhow::Result<()> {
                pollster::block_on(async {
                    let (mut send, mut recv) = connection.open_bi().await?;
                    send.write_all(request.as_bytes()).await?;
                    send.finish()?;
                    while let Some(chunk) = recv.read_chunk(usize::MAX).await.map_err(explain)? {
                        received.fetch_add(chunk.len() as u64, Relaxed);
                        if chunks.send(chunk).is_err() {
                            break; // the writer failed and says why
                        }
                    }
                    Ok(())
                })
            })
            .context("starting the reader")?
    };
    let mut progress = Progress::new(args.transport.json);
    let mut before = engine.stats();
    while !reader.is_finished() {
        std::thread::sleep(SAMPLE_INTERVAL);
        let stats = connection.stats();
        rtt.record(stats.rtt);
        if progress.due() {
            let now = engine.stats();
            let shards = busy_shares(&before, &now, progress.interval_s());
            before = now;
            let bytes = received.load(Relaxed);
            let packets_lost = stats.packets_lost;
            progress.report(&Reading { bytes, rtt: stats.rtt, packets_lost, shards })?;
        }
    }
    let read = reader.join().map_err(|_panic| anyhow::anyhow!("the reader panicked"))?;
    let written = writer.join().map_err(|_panic| anyhow::anyhow!("the writer panicked"))?;
    let (bytes, sha256) = written?;
    if read.is_err()
        && bytes == 0
        && let Some(target) = &target
    {
        std::fs::remove_file(target)
            .with_context(|| format!("removing the empty {}", target.display()))?;
    }
    read.with_context(|| format!("fetching {url}"))?;
    Ok(Fetched { url: url.to_owned(), bytes, sha256 })
}

/// What a failed read means to whoever fetches a file.
fn explain(error: ReadError) -> anyhow::Error {
    match error {
        ReadError::Reset(code) if code == NOT_FOUND.into() => {
            anyhow::anyhow!("the server has no such file (it reset the stream with code {code})")
        }
        other => other.into(),
    }
}

/// Where a file is written: its last part, in `dir`.
fn target(dir: &Path, path: &str) -> PathBuf {
    dir.join(path.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("index"))
}

fn create(target: &Path) -> anyhow::Result<File> {
    File::create(target).with_context(|| {
        format!("creating {} (the folder given with `--out` must exist)", target.display())
    })
}

fn hash_and_write(
    queue: &Receiver<Bytes>,
    mut file: Option<File>,
) -> anyhow::Result<(u64, String)> {
    let mut hash = Sha256::new();
    let mut bytes = 0;
    while let Ok(chunk) = queue.recv() {
        hash.update(&chunk);
        bytes += chunk.len() as u64;
        if let Some(file) = &mut file {
            file.write_all(&chunk).context("writing the file")?;
        }
    }
    let digest = hash.finalize();
    Ok((bytes, digest.iter().map(|byte| format!("{byte:02x}")).collect()))
}
