//! `cargo xtask profile`: where both ends of a bulk transfer spend their time, by datapath and
//! packet size. docs/performance.md holds what it printed.

mod category;
mod samples;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::demo::session::{self, Session, ThreadedNapi};
use crate::machine::Machine;
use crate::netns::{self, MTU_MAX, MTU_MIN, PairOptions, VethPair};
use crate::proc::{self, Group};
use crate::stoq_cli::{self, Datapath, Progress, Side};
use crate::terminal::{Terminal, bit_rate};
use crate::workspace::Workspace;
use crate::{interrupt, packages};
use category::Category;
use samples::{Samples, Spent};

/// Samples a second and core.
const FREQUENCY_HZ: u32 = 1999;
/// Length of the transfer beside the samples, for its start and its end.
const MARGIN_S: u32 = 3;
/// IPv6 and UDP header.
const HEADERS_BYTES: u32 = 48;
/// How long `perf` may take to write its file once it was to end.
const PERF_LIMIT: Duration = Duration::from_secs(60);

/// Options of `cargo xtask profile`.
#[derive(Debug, clap::Args)]
pub(crate) struct ProfileArgs {
    /// Datapaths to profile.
    #[arg(long, num_args = 1.., default_values = ["af_xdp", "io_uring", "socket"])]
    datapath: Vec<Datapath>,
    /// MTUs of the veth pair, in bytes.
    #[arg(long, num_args = 1.., default_values = ["1500", "9000"], value_parser = clap::value_parser!(u32).range(i64::from(MTU_MIN)..=i64::from(MTU_MAX)))]
    mtu: Vec<u32>,
    /// How long samples are taken.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Also print the functions that took most, so many of each end.
    #[arg(long, default_value_t = 0)]
    symbols: usize,
    /// Print one JSON object per profile on standard output.
    #[arg(long)]
    json: bool,
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
}

/// One transfer and what its ends did.
#[derive(Debug)]
struct Profile {
    datapath: String,
    mode: String,
    mtu: u32,
    goodput_bps: f64,
    packets: f64,
    samples: Samples,
}

impl Profile {
    fn ns_per_packet(&self, ns: u64) -> f64 {
        ns as f64 / self.packets
    }

    fn to_json(&self, symbols: usize) -> Value {
        let end = |spent: &Spent| {
            let rows: serde_json::Map<String, Value> = spent
                .by_category
                .iter()
                .map(|(category, ns)| {
                    let key = serde_json::to_value(category).unwrap_or_default();
                    (key.as_str().unwrap_or_default().to_owned(), self.ns_per_packet(*ns).into())
                })
                .collect();
            let top: Vec<Value> = spent
                .top(symbols)
                .into_iter()
                .map(|(name, ns)| json!({"symbol": name, "ns_per_packet": self.ns_per_packet(ns)}))
                .collect();
            json!({
                "ns_per_packet": self.ns_per_packet(spent.total_ns()),
                "ns_per_packet_by_category": rows,
                "symbols": top,
            })
        };
        json!({
            "datapath": self.datapath,
            "mode": self.mode,
            "mtu": self.mtu,
            "goodput_bps": self.goodput_bps,
            "sender": end(&self.samples.sender),
            "receiver": end(&self.samples.receiver),
            "kernel_threads": end(&self.samples.kernel_threads),
            "unread_samples": self.samples.unread,
        })
    }
}

/// Profiles.
pub(crate) fn run(args: &ProfileArgs) -> Result<()> {
    interrupt::install()?;
    let mut terminal = Terminal::new(args.json);
    let workspace = Workspace::load()?;
    let machine = Machine::inspect()?;
    if !machine.is_root {
        bail!("veth pairs need root: run `sudo env \"PATH=$PATH\" cargo xtask profile`");
    }
    packages::install_missing(&mut terminal, &machine, &packages::profile_needs(), args.yes)?;
    netns::remove_stale()?;
    let stoq = stoq_cli::build(&workspace)?;
    let directory = workspace.logs().join("profile");
    fs::create_dir_all(&directory).context("cannot create the directory of the logs")?;
    for &mtu in &args.mtu {
        let mut profiles = Vec::new();
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
            let label = format!("{} MTU {mtu}", datapath.name());
            let profile = take(&mut terminal, &machine, &session, args.seconds, mtu, &label)
                .with_context(|| format!("{label} failed"))?;
            if args.json {
                println!("{}", profile.to_json(args.symbols));
            }
            profiles.push(profile);
        }
        for line in table(mtu, &profiles).into_iter().chain(top(&profiles, args.symbols)) {
            terminal.line(&line);
        }
    }
    Ok(())
}

/// One download with samples of the whole machine, taken once it is under way.
fn take(
    terminal: &mut Terminal,
    machine: &Machine,
    session: &Session,
    seconds: u32,
    mtu: u32,
    label: &str,
) -> Result<Profile> {
    let data = session.directory.join("perf.data");
    let log = session.directory.join("perf.log");
    let mut server = session.start_server(&session.directory)?;
    let mut napi = ThreadedNapi::new(machine, session);
    let mut client = session.start_download(&server, seconds + MARGIN_S)?;
    let ends = (server.id(), client.id());
    let mut recording: Option<Result<Group>> = None;
    let mut first: Option<Progress> = None;
    let done = session::follow(&mut client, &mut server, &mut napi, |view| {
        terminal.live(&format!("{label}: {}", bit_rate(view.progress.goodput_bps)));
        // The first report is a second old: speed and window are found, kernel threads started.
        if recording.is_none() {
            first = Some(view.progress);
            recording = Some(record(&data, seconds, &log));
        }
    })?;
    server.stop()?;
    let mut recording = recording.context("the transfer was over before samples were taken")??;
    match recording.wait_until(std::time::Instant::now() + PERF_LIMIT)? {
        Some(status) if status.success() => {}
        Some(status) => {
            bail!("perf {}:\n{}", proc::explain(status), proc::tail(&log, 10)?)
        }
        None => bail!("perf did not end within {} s", PERF_LIMIT.as_secs()),
    }
    let samples = read(&data, ends, &log)?;
    fs::remove_file(&data).with_context(|| format!("cannot remove {}", data.display()))?;
    if samples.sender.total_ns() == 0 || samples.receiver.total_ns() == 0 {
        bail!("perf took no sample of an end; its log: {}", log.display());
    }
    if samples.unread > 0 {
        terminal.warn(&format!("{label}: {} lines of perf could not be read", samples.unread));
    }
    let first = first.unwrap_or_default();
    let bytes = done.bytes.saturating_sub(first.bytes) as f64;
    let bytes_per_s = bytes / (done.seconds - first.seconds).max(f64::EPSILON);
    Ok(Profile {
        datapath: done.datapath,
        mode: done.mode,
        mtu,
        goodput_bps: bytes_per_s * 8.0,
        packets: bytes_per_s * f64::from(seconds) / f64::from(mtu - HEADERS_BYTES),
        samples,
    })
}

fn record(data: &Path, seconds: u32, log: &Path) -> Result<Group> {
    let mut command = Command::new("perf");
    // No call graph: each sample counts for the function that it fell into.
    command.args(["record", "--all-cpus", "--event", "cpu-clock", "--freq"]);
    command.args([&FREQUENCY_HZ.to_string(), "--output"]).arg(data);
    command.args(["--", "sleep", &seconds.to_string()]);
    Group::spawn(command.stdout(proc::append(log)?).stderr(proc::append(log)?))
        .context("cannot start perf")
}

fn read(data: &Path, (sender, receiver): (u32, u32), log: &Path) -> Result<Samples> {
    let text = data.with_extension("txt");
    let mut command = Command::new("perf");
    command.args(["script", "--fields", samples::FIELDS, "--input"]).arg(data);
    let finished = proc::run_to_files(&mut command, &text, log, 5 * PERF_LIMIT)?;
    if !finished.success() {
        bail!("perf script {}; its log: {}", finished.explain(5 * PERF_LIMIT), log.display());
    }
    let read = fs::read_to_string(&text);
    let read = read.with_context(|| format!("cannot read {}", text.display()))?;
    fs::remove_file(&text).with_context(|| format!("cannot remove {}", text.display()))?;
    let mut known = HashMap::new();
    Ok(Samples::parse(&read, sender, receiver, |pid| {
        *known.entry(pid).or_insert_with(|| is_network_thread(pid))
    }))
}

/// Whether a process is a kernel thread that receives packets: NAPI's or a softirq's.
fn is_network_thread(pid: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.starts_with("napi/") || name.starts_with("ksoftirqd/")
}

/// Nanoseconds a packet, as a table in Markdown.
fn table(mtu: u32, profiles: &[Profile]) -> Vec<String> {
    let payload = mtu - HEADERS_BYTES;
    let mut lines = vec![format!("ns a packet of {payload} bytes"), String::new()];
    let mut row = |name: &str, cells: Vec<String>| {
        lines.push(format!("| {name} | {} |", cells.join(" | ")));
    };
    let ends = |profile: &Profile, f: &dyn Fn(&Spent) -> String| {
        [f(&profile.samples.sender), f(&profile.samples.receiver)]
    };
    let heading = |profile: &Profile| {
        [format!("{}: sender", profile.datapath), format!("{}: receiver", profile.datapath)]
    };
    row("", profiles.iter().flat_map(heading).collect());
    row("---", profiles.iter().flat_map(|_| ["---".to_owned(), "---".to_owned()]).collect());
    for category in Category::ALL {
        let cell = |profile: &Profile, spent: &Spent| {
            let ns = spent.by_category.get(&category).copied().unwrap_or(0);
            format!("{:.0}", profile.ns_per_packet(ns))
        };
        let cells =
            profiles.iter().flat_map(|profile| ends(profile, &|spent| cell(profile, spent)));
        row(category.name(), cells.collect());
    }
    let total = |profile: &Profile, spent: &Spent| {
        format!("**{:.0}**", profile.ns_per_packet(spent.total_ns()))
    };
    let cells = profiles.iter().flat_map(|profile| ends(profile, &|spent| total(profile, spent)));
    row("**all of the process**", cells.collect());
    let threads = |profile: &Profile| {
        let ns = profile.samples.kernel_threads.total_ns();
        [format!("{:.0} for both", profile.ns_per_packet(ns)), String::new()]
    };
    row("the kernel's receive threads", profiles.iter().flat_map(threads).collect());
    let rate = |profile: &Profile| [bit_rate(profile.goodput_bps), profile.mode.clone()];
    row("goodput; mode", profiles.iter().flat_map(rate).collect());
    lines
}

/// The functions that took most.
fn top(profiles: &[Profile], count: usize) -> Vec<String> {
    let mut lines = Vec::new();
    if count == 0 {
        return lines;
    }
    for profile in profiles {
        let samples = &profile.samples;
        for (end, spent) in [
            ("sender", &samples.sender),
            ("receiver", &samples.receiver),
            ("kernel threads", &samples.kernel_threads),
        ] {
            lines.push(String::new());
            lines.push(format!("{}, {end}:", profile.datapath));
            for (name, ns) in spent.top(count) {
                lines.push(format!("{:8.1} ns  {name}", profile.ns_per_packet(ns)));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Profile {
        let text =
            "7 1000: 55d0c0ffee00 _int_free (/c)\n8 3000: ffffffff81000000 udp_recvmsg (k)\n";
        Profile {
            datapath: "socket".into(),
            mode: "gso+gro".into(),
            mtu: 1500,
            goodput_bps: 8e9,
            packets: 10.0,
            samples: Samples::parse(text, 7, 8, |_| false),
        }
    }

    #[test]
    fn the_table_has_a_row_for_each_category_and_a_column_for_each_end() {
        let lines = table(1500, &[profile(), profile()]);
        let rows: Vec<&String> = lines.iter().filter(|line| line.starts_with('|')).collect();
        assert_eq!(rows.len(), Category::ALL.len() + 5);
        assert!(rows.iter().all(|row| row.matches('|').count() == 6), "{lines:?}");
        assert!(lines.contains(&"| malloc, free | 100 | 0 | 100 | 0 |".to_owned()), "{lines:?}");
        assert!(lines.iter().any(|line| line.contains("| **100** | **300** |")), "{lines:?}");
    }

    #[test]
    fn the_json_has_both_ends() {
        let json = profile().to_json(1);
        assert_eq!(json["sender"]["ns_per_packet_by_category"]["allocator"], 100.0);
        assert_eq!(json["receiver"]["symbols"][0]["symbol"], "udp_recvmsg");
        assert_eq!(json["receiver"]["ns_per_packet"], 300.0);
    }

    #[test]
    fn functions_only_when_asked_for() {
        assert!(top(&[profile()], 0).is_empty());
        assert!(top(&[profile()], 3).contains(&"   100.0 ns  _int_free".to_owned()));
    }
}
