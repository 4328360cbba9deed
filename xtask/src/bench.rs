//! `cargo xtask bench`: bulk transfer over a veth pair, for each datapath and MTU.

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use crate::demo::session::{self, Session, ThreadedNapi};
use crate::machine::Machine;
use crate::netns::{self, MTU_MAX, MTU_MIN, PairOptions, VethPair};
use crate::stoq_cli::{self, Datapath, Side};
use crate::terminal::{Terminal, bit_rate};
use crate::workspace::Workspace;
use crate::{interrupt, packages};

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// Datapaths to measure.
    #[arg(long, num_args = 1.., default_values = ["af_xdp", "io_uring", "socket"])]
    datapath: Vec<Datapath>,
    /// MTUs to measure, in bytes.
    #[arg(long, num_args = 1.., default_values = ["1500", "9000"], value_parser = clap::value_parser!(u32).range(i64::from(MTU_MIN)..=i64::from(MTU_MAX)))]
    mtu: Vec<u32>,
    /// Length of each transfer.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// How often each is measured; they take turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Print one JSON object per transfer on standard output.
    #[arg(long)]
    json: bool,
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
}

/// One transfer.
#[derive(Debug, Clone, Serialize)]
struct Sample {
    datapath: String,
    mode: String,
    mtu: u32,
    round: u32,
    goodput_bps: f64,
    rtt_us_p50: f64,
    packets_lost: u64,
}

/// Measures.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    interrupt::install()?;
    let mut terminal = Terminal::new(args.json);
    let workspace = Workspace::load()?;
    let machine = Machine::inspect()?;
    if !machine.is_root {
        bail!("veth pairs need root: run `sudo env \"PATH=$PATH\" cargo xtask bench`");
    }
    packages::install_missing(&mut terminal, &machine, &packages::demo_needs(), args.yes)?;
    netns::remove_stale()?;
    let stoq = stoq_cli::build(&workspace)?;
    let directory = workspace.logs().join("bench");
    std::fs::create_dir_all(&directory).context("cannot create the directory of the logs")?;
    let mut samples = Vec::new();
    for round in 1..=args.rounds {
        for &mtu in &args.mtu {
            for &datapath in &args.datapath {
                let name = std::process::id().to_string();
                let tx_checksum_offload = datapath != Datapath::AfXdp;
                let pair =
                    VethPair::create(&name, PairOptions { mtu, queues: 1, tx_checksum_offload })?;
                let session = Session {
                    stoq: stoq.clone(),
                    client: Side::Netns(pair.client.clone()),
                    server: Side::Netns(pair.server.clone()),
                    datapath,
                    queues: 1,
                    directory: directory.clone(),
                };
                let label = format!("{} MTU {mtu} round {round}", datapath.name());
                let sample = measure(&mut terminal, &machine, &session, args.seconds, &label)
                    .with_context(|| format!("{label} failed"))?;
                let sample = Sample { mtu, round, ..sample };
                if args.json {
                    println!("{}", serde_json::to_string(&sample).context("cannot write JSON")?);
                }
                terminal.line(&format!("{label}: {}", bit_rate(sample.goodput_bps)));
                samples.push(sample);
            }
        }
    }
    summarize(&mut terminal, &samples);
    Ok(())
}

fn measure(
    terminal: &mut Terminal,
    machine: &Machine,
    session: &Session,
    seconds: u32,
    label: &str,
) -> Result<Sample> {
    let mut server = session.start_server(&session.directory)?;
    let mut napi = ThreadedNapi::new(machine, session);
    let mut client = session.start_download(&server, seconds)?;
    let done = session::follow(&mut client, &mut server, &mut napi, |view| {
        terminal.live(&format!("{label}: {}", bit_rate(view.progress.goodput_bps)));
    })?;
    server.stop()?;
    Ok(Sample {
        datapath: done.datapath,
        mode: done.mode,
        mtu: 0,
        round: 0,
        goodput_bps: done.goodput_bps,
        rtt_us_p50: done.rtt_us_p50,
        packets_lost: done.packets_lost,
    })
}

/// Best, median and worst of each datapath and MTU.
fn summarize(terminal: &mut Terminal, samples: &[Sample]) {
    terminal.heading("datapath    MTU    best           median         worst          mode");
    let mut seen: Vec<(&str, u32)> = Vec::new();
    for sample in samples {
        let key = (sample.datapath.as_str(), sample.mtu);
        if seen.contains(&key) {
            continue;
        }
        seen.push(key);
        let mut rates: Vec<f64> = samples
            .iter()
            .filter(|other| (other.datapath.as_str(), other.mtu) == key)
            .map(|other| other.goodput_bps)
            .collect();
        let (worst, median, best) = spread(&mut rates);
        terminal.line(&format!(
            "{:<11} {:<6} {:<14} {:<14} {:<14} {}",
            key.0,
            key.1,
            bit_rate(best),
            bit_rate(median),
            bit_rate(worst),
            sample.mode
        ));
    }
}

/// Smallest, middle and largest of at least one rate.
fn spread(rates: &mut [f64]) -> (f64, f64, f64) {
    rates.sort_by(f64::total_cmp);
    (rates[0], rates[rates.len() / 2], rates[rates.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_median_worst() {
        assert_eq!(spread(&mut [3.0, 1.0, 2.0]), (1.0, 2.0, 3.0));
        assert_eq!(spread(&mut [5.0]), (5.0, 5.0, 5.0));
    }
}
