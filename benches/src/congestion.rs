//! `stoq congestion`: the figures of `docs/congestion.md`, all from the simulator.
//!
//! Three sweeps over a link of 50 Mbit/s with 15 ms each way: throughput against random loss,
//! the share that a flow gets beside Cubic against the buffer, and the round trip that a flow
//! alone makes against the buffer. Every run is a scenario like those of `benches/scenarios`.
//!
//! With `--scenarios FOLDER`, the files of that folder over many seeds instead: see [`table`].

mod table;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use stoq::datapath::sim::Scenario;
use stoq::sim::{ScenarioRun, run_scenario};

const CONTROLS: [&str; 4] = ["bbr2", "bbr3", "cubic", "newreno"];
const RATE_BPS: f64 = 50e6;
const LOSSES_PERCENT: [f64; 8] = [0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0];
const BUFFERS_BDP: [f64; 8] = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0];
/// 30 ms of round trip: a buffer of one BDP holds this long.
const BDP_US: f64 = 30_000.0;
/// Runs last this long, and what counts begins after this.
const RUN_S: u64 = 40;
const COUNTS_FROM_S: u64 = 10;
const BEGIN: &str = "<!-- figures: `stoq congestion` writes what stands between here -->";
const END: &str = "<!-- and here -->";
const TABLE_BEGIN: &str =
    "<!-- scenarios: `stoq congestion --scenarios FOLDER` writes what stands between here -->";
const TABLE_END: &str = "<!-- and the end of the scenarios -->";

#[derive(clap::Args)]
pub struct Args {
    /// The document whose figures are written anew; the plots go beside it.
    #[arg(long, default_value = "docs/congestion.md")]
    document: PathBuf,
    /// Seed of every run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the table of this folder's scenarios instead of the figures.
    #[arg(long, value_name = "FOLDER")]
    scenarios: Option<PathBuf>,
    /// With --scenarios: run each with the seeds from 1 to this.
    #[arg(long, default_value_t = 20)]
    seeds: u64,
}

/// One table: a row of values for each point of the sweep, a column for each control.
struct Figure {
    file: &'static str,
    title: &'static str,
    axis: &'static str,
    points: Vec<String>,
    columns: Vec<&'static str>,
    /// By column, then point.
    values: Vec<Vec<f64>>,
    decimals: usize,
}

/// A run to be made: its scenario, and what of it is the figure.
struct Job {
    text: String,
    measure: fn(&ScenarioRun) -> f64,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let path = &args.document;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let text = if let Some(folder) = &args.scenarios {
        let place = Place::find(&text, TABLE_BEGIN, TABLE_END)?;
        place.filled(&table::markdown(folder, args.seeds)?)
    } else {
        let place = Place::find(&text, BEGIN, END)?;
        let folder = path.parent().context("the document has no folder")?;
        let mut figures = String::new();
        for figure in [loss(args.seed)?, sharing(args.seed)?, round_trip(args.seed)?] {
            let path = folder.join(figure.file);
            std::fs::write(&path, figure.to_svg())
                .with_context(|| format!("writing {}", path.display()))?;
            figures.push_str(&figure.to_markdown());
        }
        place.filled(&figures)
    };
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// What stands before and after generated text in a document, both with its mark.
struct Place<'a> {
    head: &'a str,
    tail: &'a str,
}

impl<'a> Place<'a> {
    fn find(text: &'a str, begin: &str, end: &str) -> anyhow::Result<Self> {
        let from = text.find(begin).with_context(|| format!("the document has no {begin}"))?;
        let from = from + begin.len();
        let to = text[from..].find(end).with_context(|| format!("the document has no {end}"))?;
        Ok(Self { head: &text[..from], tail: &text[from + to..] })
    }

    fn filled(&self, generated: &str) -> String {
        format!("{}\n\n{generated}{}", self.head, self.tail)
    }
}

fn loss(seed: u64) -> anyhow::Result<Figure> {
    let jobs = CONTROLS.iter().flat_map(|cc| {
        LOSSES_PERCENT.map(|percent| Job {
            text: scenario(BDP_US, percent / 100.0, &[cc]),
            measure: |run| 100.0 * goodput(run, 0) / RATE_BPS,
        })
    });
    Ok(Figure {
        file: "congestion-loss.svg",
        title: "Goodput against random loss, % of the link (headers take 5.5 %)",
        axis: "random loss, %",
        points: LOSSES_PERCENT.map(|percent| percent.to_string()).to_vec(),
        columns: CONTROLS.to_vec(),
        values: sweep(jobs.collect(), LOSSES_PERCENT.len(), seed)?,
        decimals: 1,
    })
}

fn sharing(seed: u64) -> anyhow::Result<Figure> {
    let columns = ["bbr2", "bbr3", "newreno"];
    let jobs = columns.iter().flat_map(|cc| {
        BUFFERS_BDP.map(|bdp| Job {
            text: scenario(bdp * BDP_US, 0.0, &[cc, "cubic"]),
            measure: |run| {
                let (flow, cubic) = (goodput(run, 0), goodput(run, 1));
                100.0 * flow / (flow + cubic)
            },
        })
    });
    Ok(Figure {
        file: "congestion-sharing.svg",
        title: "Share of a flow beside one of Cubic, % (50 is even)",
        axis: "buffer, BDP",
        points: BUFFERS_BDP.map(|bdp| bdp.to_string()).to_vec(),
        columns: columns.to_vec(),
        values: sweep(jobs.collect(), BUFFERS_BDP.len(), seed)?,
        decimals: 0,
    })
}

fn round_trip(seed: u64) -> anyhow::Result<Figure> {
    let jobs = CONTROLS.iter().flat_map(|cc| {
        BUFFERS_BDP.map(|bdp| Job {
            text: scenario(bdp * BDP_US, 0.0, &[cc]),
            measure: |run| {
                let late = run.samples[0].iter().filter(|s| s.at >= seconds(COUNTS_FROM_S));
                let mut rtts: Vec<_> = late.map(|s| s.stats.rtt).collect();
                rtts.sort_unstable();
                rtts.get(rtts.len() / 2).map_or(f64::NAN, |rtt| rtt.as_secs_f64() * 1e3)
            },
        })
    });
    Ok(Figure {
        file: "congestion-rtt.svg",
        title: "Median round trip of a flow alone, ms (the path has 30)",
        axis: "buffer, BDP",
        points: BUFFERS_BDP.map(|bdp| bdp.to_string()).to_vec(),
        columns: CONTROLS.to_vec(),
        values: sweep(jobs.collect(), BUFFERS_BDP.len(), seed)?,
        decimals: 0,
    })
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn scenario(queue_us: f64, loss: f64, flows: &[&str]) -> String {
    // Less than two packets would be no queue but a broken link.
    let queue_us = queue_us.max(2.0 * 1500.0 * 8e6 / RATE_BPS);
    let mut text = format!(
        "name = \"sweep\"\ntime_limit_ms = {}\n[link]\nrate_bps = {RATE_BPS:.0}\n\
         delay_us = 15_000\nqueue_us = {queue_us:.0}\nloss = {loss:.8}\n[link.reverse]\nloss = 0.0\n",
        RUN_S * 1000,
    );
    for cc in flows {
        writeln!(text, "[[flow]]\ncc = \"{cc}\"\nbytes = 1_000_000_000_000")
            .expect("a string takes everything");
    }
    text
}

/// Bits a second of stream data, without the beginning.
fn goodput(run: &ScenarioRun, flow: usize) -> f64 {
    let samples = &run.samples[flow];
    let first = samples.partition_point(|sample| sample.at < seconds(COUNTS_FROM_S));
    let (Some(first), Some(last)) = (samples.get(first), samples.last()) else { return 0.0 };
    let bytes = last.received_bytes - first.received_bytes;
    bytes as f64 * 8.0 / (last.at - first.at).as_secs_f64()
}

/// Makes all runs, on all cores, and gives the figures by column.
fn sweep(jobs: Vec<Job>, points: usize, seed: u64) -> anyhow::Result<Vec<Vec<f64>>> {
    let values = on_all_cores(&jobs, |job| {
        Ok((job.measure)(&run_scenario(&Scenario::parse(&job.text)?, seed)?))
    })?;
    ensure!(values.iter().all(|value| value.is_finite()), "a run had no samples");
    Ok(values.chunks(points).map(<[f64]>::to_vec).collect())
}

/// The results of `work` on every job, in their order.
fn on_all_cores<J: Sync, R: Send>(
    jobs: &[J],
    work: impl Fn(&J) -> anyhow::Result<R> + Sync,
) -> anyhow::Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(jobs.iter().map(|_| None).collect::<Vec<_>>());
    let worker = || -> anyhow::Result<()> {
        // Relaxed: the number only has to be another for each thread.
        while let Some((index, job)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, jobs.get(i)?)))
        {
            let result = work(job)?;
            results.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(result);
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a run panicked"))
    })?;
    let results: Option<Vec<R>> =
        results.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect();
    results.context("a run gave no result")
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 96.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;
/// Told apart also without colour vision (Okabe and Ito).
const COLORS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];
const GRID_LINES: u32 = 5;

impl Figure {
    fn to_markdown(&self) -> String {
        let mut text = format!("### {}\n\n![{}]({})\n\n", self.title, self.title, self.file);
        let write = |text: &mut String, cells: &mut dyn Iterator<Item = String>| {
            let cells: Vec<_> = cells.collect();
            text.push_str(&format!("| {} |\n", cells.join(" | ")));
        };
        let names = self.columns.iter().map(|name| (*name).to_owned());
        write(&mut text, &mut std::iter::once(self.axis.to_owned()).chain(names));
        write(&mut text, &mut (0..=self.columns.len()).map(|_| "---".to_owned()));
        for (index, point) in self.points.iter().enumerate() {
            let cells = self.values.iter().map(|v| format!("{:.*}", self.decimals, v[index]));
            write(&mut text, &mut std::iter::once(point.clone()).chain(cells));
        }
        text.push('\n');
        text
    }

    fn to_svg(&self) -> String {
        let most = self.values.iter().flatten().fold(1.0_f64, |most, &value| most.max(value));
        let step = nice_step(most / f64::from(GRID_LINES));
        let top = (most / step).ceil() * step;
        let gaps = (self.points.len() - 1).max(1) as f64;
        let x = |index: usize| LEFT + (WIDTH - LEFT - RIGHT) * index as f64 / gaps;
        let y = |value: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{}</text>\n",
            self.title
        );
        let mut put = |line: String| {
            svg.push_str(&line);
            svg.push('\n');
        };
        let mut value = 0.0;
        while value <= top + step / 2.0 {
            let at = y(value);
            put(format!(
                "<path d=\"M{LEFT} {at:.1}H{:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0,
            ));
            value += step;
        }
        for (index, point) in self.points.iter().enumerate() {
            put(format!(
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{point}</text>",
                x(index),
                HEIGHT - BOTTOM + 16.0,
            ));
        }
        put(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 8.0,
            self.axis,
        ));
        for (column, values) in self.values.iter().enumerate() {
            let color = COLORS[column % COLORS.len()];
            let points: Vec<_> = values
                .iter()
                .enumerate()
                .map(|(index, &value)| format!("{:.1},{:.1}", x(index), y(value)))
                .collect();
            put(format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>",
                points.join(" "),
            ));
            let row = TOP + 10.0 + 18.0 * column as f64;
            put(format!(
                "<path d=\"M{:.1} {row:.1}h16\" stroke=\"{color}\" stroke-width=\"2\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                WIDTH - RIGHT + 12.0,
                WIDTH - RIGHT + 34.0,
                row + 4.0,
                self.columns[column],
            ));
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// 1, 2 or 5 times a power of ten, not below `least`.
fn nice_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&s| s >= least).unwrap_or(least)
}
