//! Datagrams through a datapath with no QUIC: what the path can carry at most.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args as ClapArgs;
use serde_json::json;
use stoq::datapath::open::{Datapaths, open};
use stoq::datapath::{Datapath, DatapathEvent, Ecn, RxBatch, TxMeta, TxVerdict};
use stoq_measure::outcome::{Counts, Meter, Outcome};

use crate::engine::TransportArgs;
use crate::output;

/// Datagrams given to the datapath before a flush.
const BATCH: usize = 64;
/// How long a receiver waits for the first datagram.
const FIRST_DATAGRAM_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence that ends a receiver's measurement.
const SILENCE: Duration = Duration::from_millis(500);
/// Silence after which its CPU time is read, so that the wait for the end costs nothing.
const LULL: Duration = Duration::from_millis(20);

/// Flags of the raw workload.
#[derive(ClapArgs)]
pub struct Args {
    /// The receiver: where to send.
    #[arg(long, required_unless_present = "receive")]
    peer: Option<SocketAddrV6>,
    /// Receive instead of sending.
    #[arg(long, conflicts_with = "peer")]
    receive: bool,
    /// Address and port to bind.
    #[arg(long)]
    listen: Option<SocketAddrV6>,
    /// How long to send, seconds.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// UDP payload, bytes.
    #[arg(long, default_value_t = 1452)]
    payload: u16,
    #[command(flatten)]
    transport: TransportArgs,
}

/// Sends or receives, and reports.
pub fn run(args: &Args) -> anyhow::Result<()> {
    args.transport.tie_to_parent()?;
    let bind = args.listen.unwrap_or(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0));
    let config = args.transport.transport(bind)?;
    config.validate()?;
    if let Some(core) = args.transport.cores.first() {
        anyhow::ensure!(
            stoq::pin_current_thread(*core),
            "core {core} is not available to this process"
        );
    }
    let opened = open(&config)?;
    match opened.datapaths {
        Datapaths::AfXdp(mut paths) => drive(args, &mut paths[0]),
        Datapaths::IoUring(mut paths) => drive(args, &mut paths[0]),
        Datapaths::Socket(mut paths) => drive(args, &mut paths[0]),
    }
}

fn drive(args: &Args, datapath: &mut impl Datapath) -> anyhow::Result<()> {
    if args.transport.json {
        output::json_line(&json!({
            "event": "listening", "addr": datapath.local_addr().to_string(),
            "datapath": datapath.capabilities().kind.name(), "mode": datapath.capabilities().mode,
        }))?;
    }
    let (packets, bytes, outcome) = match args.peer {
        Some(peer) => send(args, datapath, peer)?,
        None => receive(datapath)?,
    };
    if args.transport.json {
        return output::json_line(&outcome);
    }
    println!(
        "{packets} datagrams, {} in {:.2} s: {}",
        output::size(bytes),
        outcome.seconds,
        output::rate(outcome.goodput_bps)
    );
    Ok(())
}

/// The report of either side.
fn outcome(
    datapath: &impl Datapath,
    meter: Meter,
    peer: Option<SocketAddrV6>,
    packets: u64,
    bytes: u64,
) -> anyhow::Result<(u64, u64, Outcome)> {
    let mut counts = Counts { bytes, ops: packets, ..Counts::default() };
    counts.udp_payload = bytes.checked_div(packets);
    let stats: serde_json::Map<_, _> =
        datapath.counters().iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    let told = json!({
        "packets": packets, "datapath": datapath.capabilities().kind.name(),
        "mode": datapath.capabilities().mode, "stats": stats,
    });
    if let serde_json::Value::Object(told) = told {
        counts.more.extend(told);
    }
    Ok((packets, bytes, meter.finish("stoq", "raw", peer, counts)?))
}

fn check(datapath: &mut impl Datapath) -> anyhow::Result<()> {
    while let Some(event) = datapath.poll_event() {
        if let DatapathEvent::Failed(reason) = event {
            anyhow::bail!("datapath failed: {reason}");
        }
    }
    Ok(())
}

fn send(
    args: &Args,
    datapath: &mut impl Datapath,
    peer: SocketAddrV6,
) -> anyhow::Result<(u64, u64, Outcome)> {
    let payload = vec![0x40; usize::from(args.payload)];
    let meta = TxMeta { remote: peer, local: None, ecn: Ecn::NotEct };
    let mut batch = RxBatch::new(BATCH, 64 * 1024);
    let meter = Meter::start(None)?;
    let start = Instant::now();
    let mut now = start;
    let (mut packets, mut dropped) = (0u64, 0u64);
    while (now - start).as_secs_f64() < args.seconds {
        // Upkeep: completions, neighbours, notifications.
        datapath.receive(now, &mut batch);
        batch.drain();
        for _ in 0..datapath.transmit_capacity().min(BATCH) {
            match datapath.transmit(&meta, &payload) {
                TxVerdict::Accepted => packets += 1,
                TxVerdict::Dropped(_) => dropped += 1,
                TxVerdict::Full => break,
            }
        }
        datapath.flush(now);
        check(datapath)?;
        now = Instant::now();
    }
    anyhow::ensure!(packets > 0, "nothing could be sent to {peer} ({dropped} refused)");
    outcome(datapath, meter, Some(peer), packets, packets * u64::from(args.payload))
}

fn receive(datapath: &mut impl Datapath) -> anyhow::Result<(u64, u64, Outcome)> {
    let wake =
        rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).context("eventfd")?;
    let mut batch = RxBatch::new(256, 120 * 1024);
    let opened = Instant::now();
    let (mut meter, mut first, mut last) = (None, opened, opened);
    let (mut packets, mut bytes) = (0u64, 0u64);
    // What was measured until the last datagram; taken once in each lull.
    let mut told = None;
    loop {
        let now = Instant::now();
        datapath.receive(now, &mut batch);
        for datagram in batch.drain() {
            packets += 1;
            bytes += datagram.data.len() as u64;
            (last, told) = (now, None);
        }
        if packets > 0 && meter.is_none() {
            (meter, first) = (Some(Meter::start(None)?), now);
        }
        datapath.flush(now);
        check(datapath)?;
        match &meter {
            None if now - opened > FIRST_DATAGRAM_TIMEOUT => {
                anyhow::bail!("no datagram arrived within {FIRST_DATAGRAM_TIMEOUT:?}");
            }
            None => datapath.wait(wake.as_fd(), Some(Duration::from_millis(100)))?,
            Some(_) if now - last > SILENCE => break,
            Some(meter) if now - last > LULL && told.is_none() => {
                told = Some(outcome(datapath, meter.clone(), None, packets, bytes)?);
            }
            Some(_) => {}
        }
    }
    let (packets, bytes, mut outcome) = told.expect("a lull comes before the silence that ends it");
    // The silence that ends the measurement is not part of it.
    outcome.seconds = (last - first).as_secs_f64();
    let seconds = outcome.seconds.max(1e-9);
    outcome.goodput_bps = bytes as f64 * 8.0 / seconds;
    outcome.ops_per_s = packets as f64 / seconds;
    Ok((packets, bytes, outcome))
}
