//! `stoq sim`: runs a scenario file in virtual time.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use stoq::datapath::sim::{Band, Panel, Plot, Scenario, ScenarioResult, Series};
use stoq::sim::{ScenarioRun, run_scenario};

use crate::output;

/// Exit code for a file that is not a scenario.
const WRONG_FILE: u8 = 2;

#[derive(clap::Args)]
pub struct Args {
    /// Scenario file.
    file: PathBuf,
    /// Seed; takes the place of the file's.
    #[arg(long)]
    seed: Option<u64>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Draw the run into this SVG file.
    #[arg(long)]
    plot: Option<PathBuf>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let file = args.file.display();
    let parsed = std::fs::read_to_string(&args.file)
        .map_err(|error| format!("{file}: {error}"))
        .and_then(|text| Scenario::parse(&text).map_err(|error| format!("{file}: {error}")));
    let scenario = match parsed {
        Ok(scenario) => scenario,
        Err(message) => {
            eprintln!("stoq sim: {message}");
            return Ok(ExitCode::from(WRONG_FILE));
        }
    };
    let started = std::time::Instant::now();
    let run = run_scenario(&scenario, args.seed.unwrap_or(scenario.seed))?;
    let speed = run.result.virtual_ms as f64 / 1e3 / started.elapsed().as_secs_f64();
    if args.json {
        output::json_line(&run.result)?;
    } else {
        print_table(&run.result, speed);
    }
    if let Some(path) = &args.plot {
        std::fs::write(path, plot(&run).to_svg())
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_table(result: &ScenarioResult, speed: f64) {
    println!("{}, seed {}, digest {}", result.name, result.seed, result.digest);
    for (index, flow) in result.flows.iter().enumerate() {
        let end = match (flow.completed_ms, &flow.failure) {
            (Some(at), _) => format!("complete at {:.3} s", at as f64 / 1e3),
            (None, Some(failure)) => format!("failed: {failure}"),
            (None, None) => "not complete".to_owned(),
        };
        println!(
            "  flow {index} {}: {}, {end}, {} of {} packets lost, RTT {} us (99 %: {}, least {})",
            flow.cc.name(),
            output::rate(flow.goodput_bps as f64),
            flow.packets_lost,
            flow.packets_sent,
            flow.srtt_us_p50,
            flow.srtt_us_p99,
            flow.min_rtt_us,
        );
    }
    let link = &result.link;
    println!(
        "  link: {} delivered, dropped {} by the queue, {} lost, {} by the policer; queue at most {}",
        link.delivered,
        link.dropped_queue,
        link.dropped_loss,
        link.dropped_policer,
        output::size(link.queue_bytes_max),
    );
    println!("  Jain's index {:.3}, {speed:.0} x real time", result.jain);
}

/// Rate, window and RTT of every flow over time; the first flow's states as bands.
fn plot(run: &ScenarioRun) -> Plot {
    let (mut rates, mut windows, mut rtts) = (Vec::new(), Vec::new(), Vec::new());
    for (index, samples) in run.samples.iter().enumerate() {
        let name = |what: &str| format!("{index} {what}");
        let line = |what: &str, value: &dyn Fn(&stoq::sim::Sample) -> f64| Series {
            name: name(what),
            points: samples.iter().map(|s| (s.at.as_secs_f64(), value(s))).collect(),
        };
        rates.push(Series { name: name("goodput"), points: goodput(samples) });
        rates.push(line("pacing", &|s| s.stats.pacing_rate_bps as f64 / 1e6));
        windows.push(line("cwnd", &|s| s.stats.cwnd_bytes as f64 / 1e3));
        windows.push(line("inflight", &|s| s.stats.inflight_bytes as f64 / 1e3));
        rtts.push(line("srtt", &|s| s.stats.rtt.as_secs_f64() * 1e3));
    }
    let end_s = run.result.virtual_ms as f64 / 1e3;
    let states = run.result.flows.first().map_or(&[][..], |flow| &flow.states[..]);
    let ends = states.iter().skip(1).map(|(at, _)| *at as f64 / 1e3).chain([end_s]);
    let bands = states.iter().zip(ends).map(|((at, label), to_s)| Band {
        from_s: *at as f64 / 1e3,
        to_s,
        label: label.clone(),
    });
    let panel = |label: &str, series| Panel { label: label.to_owned(), series };
    Plot {
        title: format!("{}, seed {}", run.result.name, run.result.seed),
        panels: vec![
            panel("rate, Mbit/s", rates),
            panel("window, kB", windows),
            panel("RTT, ms", rtts),
        ],
        bands: bands.collect(),
    }
}

/// Received rate in Mbit/s, over a hundredth of the samples at a time.
fn goodput(samples: &[stoq::sim::Sample]) -> Vec<(f64, f64)> {
    let step = (samples.len() / 100).max(1);
    let points: Vec<_> = samples.iter().step_by(step).collect();
    let rate = |pair: &[&stoq::sim::Sample]| {
        let bits = (pair[1].received_bytes - pair[0].received_bytes) as f64 * 8.0;
        (pair[1].at.as_secs_f64(), bits / (pair[1].at - pair[0].at).as_secs_f64() / 1e6)
    };
    points.windows(2).map(rate).collect()
}
