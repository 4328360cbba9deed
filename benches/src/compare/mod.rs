//! `stoq compare`: STOQ over each datapath and other stacks, on this machine, under the same
//! conditions.
//!
//! Each end of each run is a process of its own, pinned to the same core as everybody's. Rounds
//! are interleaved: every stack runs once before any runs twice, so that what drifts, drifts for
//! all. A core-to-core probe brackets each run (see [`probe`]), and runs whose cores were taken away
//! are set aside (see [`steal`]).

mod field;
mod goals;
mod html;
mod machine;
mod measure;
mod probe;
mod program;
mod stack;
mod steal;
mod summary;
mod table;
mod workload;

use std::collections::BTreeMap;
use std::net::SocketAddrV6;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args as ClapArgs;
use serde::Serialize;
use serde_json::Value;

use self::field::LinkKind;
use self::goals::Goal;
use self::machine::Machine;
use self::stack::{LEFT_OUT, PEERS, Stack};
use self::summary::{Ending, Record, Row};
use self::workload::Task;
use crate::{interrupt, netns, output, proc};

/// Length of a run with `--quick`, seconds.
const QUICK_SECONDS: f64 = 1.0;

/// Flags of `stoq compare`.
#[derive(ClapArgs)]
pub struct Args {
    /// Peers, comma-separated; `none`: STOQ alone. Default: every one that is built.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// STOQ's datapaths, comma-separated. Default: io_uring and socket, and af_xdp on veth and NICs.
    #[arg(long, value_delimiter = ',')]
    datapaths: Vec<String>,
    /// Workloads, comma-separated; `all`: every one that the cores allow.
    #[arg(long, value_delimiter = ',', default_value = workload::DEFAULT)]
    workloads: Vec<String>,
    /// Link: lo, veth (root), or an interface towards `--connect`.
    #[arg(long, default_value = "lo")]
    link: String,
    /// `stoq serve` on another machine, for a link that is an interface; STOQ alone is measured.
    #[arg(long)]
    connect: Option<SocketAddrV6>,
    /// MTU: of the veth pair; on `lo` and interfaces it bounds the UDP payload (not TCP).
    /// 0: whatever the link has and each stack makes of it.
    #[arg(long, default_value_t = 1500)]
    mtu: u32,
    /// Switch segmentation offload and GRO of the veth pair off: packets cross one by one.
    #[arg(long)]
    wire: bool,
    /// How often each stack runs each workload.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of each measurement, seconds.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Short runs of 1 s.
    #[arg(long)]
    quick: bool,
    /// The client's core and the server's; for workloads on two cores a side, the second client core
    /// and the second server core, too. Default: from the highest down.
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
    /// Cores closer than this are near, ns one way.
    #[arg(long, default_value_t = 100.0)]
    near_ns: f64,
    /// Where the peers' programs are. Default: beside this one.
    #[arg(long)]
    peer_dir: Option<PathBuf>,
    /// One JSON object a run on stdout, and a summary at the end.
    #[arg(long)]
    json: bool,
    /// Write a report with plots into this file.
    #[arg(long)]
    html: Option<PathBuf>,
}

/// Everything that a report says.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Always `summary`.
    event: &'static str,
    /// Who measured.
    machine: Machine,
    /// The link's name.
    link: String,
    /// Its MTU; 0: each stack's own way.
    mtu: u32,
    /// Whether packets crossed one by one.
    wire: bool,
    /// Rounds.
    rounds: u32,
    /// Length of each measurement.
    seconds: f64,
    /// The client's core and the server's; then those of two cores a side, where there are some.
    cores: Vec<[usize; 2]>,
    /// Below this core-to-core latency a run is near.
    near_ns: f64,
    /// How it was started.
    command: String,
    /// What each stack says about its settings.
    settings: BTreeMap<String, String>,
    /// Stacks that are not there, and why.
    absent: Vec<String>,
    /// The doctor's findings on the interface.
    doctor: Option<Value>,
    /// The rows.
    rows: Vec<Row>,
    /// What is to be reached, and whether this run shows that it is.
    goals: Vec<Goal>,
}

impl Report {
    /// The conditions, in a sentence.
    #[must_use]
    pub fn conditions(&self) -> String {
        let mtu = match self.mtu {
            0 => "each stack's own packet size".to_owned(),
            mtu => format!("MTU {mtu}"),
        };
        let wire = if self.wire { ", packets one by one" } else { "" };
        let second = match self.cores[..] {
            [_, [client, server], ..] => format!(" (two a side: {client} and {server}, too)"),
            _ => String::new(),
        };
        format!(
            "Link {}, {mtu}{wire}; {} rounds of {} s, interleaved; client on core {}, server on core {}{}; \
             near: below {} ns from core to core; stolen: the hypervisor took a core away. \
             `STOQ is`: the best STOQ datapath's median over this one's.",
            self.link,
            self.rounds,
            self.seconds,
            self.cores[0][0],
            self.cores[0][1],
            second,
            self.near_ns
        )
    }
}

/// Compares.
pub fn run(args: &Args) -> anyhow::Result<()> {
    interrupt::install()?;
    let mut comparison = Comparison::plan(args)?;
    if comparison.link == LinkKind::Veth {
        netns::remove_stale()?;
    }
    let records = comparison.measure(args)?;
    let report = comparison.report(args, &records);
    if args.json {
        output::json_line(&report)?;
    } else {
        println!("{}.\n{}", report.machine, report.conditions());
        println!("{}", table::markdown(&report.rows));
        for (stack, settings) in &report.settings {
            println!("* {stack}: {settings}");
        }
        for absent in &report.absent {
            println!("* {absent}");
        }
        println!("{}", goals::markdown(&report.goals));
    }
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&report))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    let measured = records.iter().any(|record| matches!(record.ending, Ending::Done(_)));
    anyhow::ensure!(measured, "no run could be measured: see above");
    Ok(())
}

/// What will be run, where.
struct Comparison {
    machine: Machine,
    link: LinkKind,
    stacks: Vec<Stack>,
    absent: Vec<String>,
    tasks: Vec<Task>,
    /// The client's core and the server's, pair by pair.
    cores: Vec<[usize; 2]>,
    seconds: f64,
    settings: BTreeMap<String, String>,
}

impl Comparison {
    fn plan(args: &Args) -> anyhow::Result<Self> {
        let link = link(args)?;
        let is_root = rustix::process::geteuid().is_root();
        anyhow::ensure!(
            link != LinkKind::Veth || is_root,
            "--link veth makes network namespaces, which needs root; --link lo does not"
        );
        anyhow::ensure!(!args.wire || link == LinkKind::Veth, "--wire is for --link veth");
        let (stacks, absent) = stacks(args, &link)?;
        anyhow::ensure!(!stacks.is_empty(), "nothing to compare: {}", absent.join("; "));
        let seconds = if args.quick { QUICK_SECONDS } else { args.seconds };
        let warm_up = if args.quick { 0.3 } else { 0.5 };
        let cores = core_pairs(&args.cores)?;
        let tasks = Task::list(&args.workloads, cores.len(), seconds, warm_up)?;
        Ok(Self {
            machine: Machine::look(),
            link,
            stacks,
            absent,
            tasks,
            cores,
            seconds,
            settings: BTreeMap::new(),
        })
    }

    fn report(&self, args: &Args, records: &[Record]) -> Report {
        let doctor = match &self.link {
            LinkKind::Nic { interface, .. } => {
                serde_json::to_value(stoq::doctor::examine_with(Some(interface), |_| None)).ok()
            }
            _ => None,
        };
        let rows = summary::rows(records);
        let link = self.link.name();
        let goals = goals::judge(&goals::Run { rows: &rows, link, mtu: args.mtu, wire: args.wire });
        Report {
            event: "summary",
            machine: self.machine.clone(),
            link: self.link.name().to_owned(),
            mtu: args.mtu,
            wire: args.wire,
            rounds: args.rounds,
            seconds: self.seconds,
            cores: self.cores.clone(),
            near_ns: args.near_ns,
            command: command_line(),
            settings: self.settings.clone(),
            absent: self.absent.clone(),
            doctor,
            rows,
            goals,
        }
    }
}

/// How this was started, the program by its bare name.
fn command_line() -> String {
    let words = std::env::args().skip(1);
    let mut command = std::process::Command::new("stoq");
    proc::describe(command.args(words))
}

/// The client's core and the server's, once or twice; one core alone is both.
fn core_pairs(cores: &[usize]) -> anyhow::Result<Vec<[usize; 2]>> {
    match *cores {
        [] => {
            let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            let pairs = vec![[count - 1, count.saturating_sub(2)]];
            let second = (count >= 4).then(|| [count - 3, count - 4]);
            Ok(pairs.into_iter().chain(second).collect())
        }
        [both] => Ok(vec![[both, both]]),
        [client, server] => Ok(vec![[client, server]]),
        [client, server, second_client, second_server] => {
            Ok(vec![[client, server], [second_client, second_server]])
        }
        _ => anyhow::bail!("--cores: one, two (client, server) or four, not {}", cores.len()),
    }
}

fn link(args: &Args) -> anyhow::Result<LinkKind> {
    match (args.link.as_str(), args.connect) {
        ("lo", None) => Ok(LinkKind::Lo),
        ("veth", None) => Ok(LinkKind::Veth),
        ("lo" | "veth", Some(_)) => anyhow::bail!("--connect is for a --link that is an interface"),
        (interface, Some(connect)) => {
            let known = std::path::Path::new("/sys/class/net").join(interface).exists();
            anyhow::ensure!(known, "--link: there is no interface `{interface}`");
            Ok(LinkKind::Nic { interface: interface.to_owned(), connect })
        }
        (interface, None) => anyhow::bail!(
            "--link {interface} leads to another machine: start `stoq serve` there and give --connect"
        ),
    }
}

/// Who is there, and who is not.
fn stacks(args: &Args, link: &LinkKind) -> anyhow::Result<(Vec<Stack>, Vec<String>)> {
    let mut datapaths: Vec<&str> = args.datapaths.iter().map(String::as_str).collect();
    if datapaths.is_empty() {
        datapaths = vec!["io_uring", "socket"];
        datapaths.extend((*link != LinkKind::Lo).then_some("af_xdp"));
    }
    let mut stacks = datapaths.into_iter().map(Stack::stoq).collect::<anyhow::Result<Vec<_>>>()?;
    let mut absent = Vec::new();
    let is_remote = matches!(link, LinkKind::Nic { .. });
    if is_remote {
        anyhow::ensure!(
            args.peers.is_empty(),
            "--peers: only `stoq serve` runs on the other machine"
        );
        return Ok((stacks, absent));
    }
    let directory = match &args.peer_dir {
        Some(directory) => directory.clone(),
        None => {
            let own = std::env::current_exe().context("finding this program")?;
            own.parent().context("this program lies in no directory")?.to_owned()
        }
    };
    let wanted: Vec<&str> = match &args.peers[..] {
        [] => {
            PEERS.iter().map(|peer| peer.name).chain(LEFT_OUT.iter().map(|peer| peer.0)).collect()
        }
        [none] if none == "none" => Vec::new(),
        named => named.iter().map(String::as_str).collect(),
    };
    for name in wanted {
        match Stack::peer(name, &directory)? {
            Ok(stack) => stacks.push(stack),
            // Who is named must be there.
            Err(why) => {
                anyhow::ensure!(args.peers.is_empty(), "{why}");
                absent.push(why);
            }
        }
    }
    Ok((stacks, absent))
}

/// Tells a run on standard error.
fn tell(record: &Record, number: usize, total: usize) {
    let result = match &record.ending {
        Ending::Done(outcome) => {
            let value = record.unit.of(outcome);
            value.map_or_else(|| "no value".to_owned(), |value| table::rate(record.unit, value))
        }
        Ending::Unsupported(why) => format!("cannot: {why}"),
        Ending::Failed(why) => format!("failed: {why}"),
    };
    let [before, after] = record
        .probe_ns
        .map(|ns| ns.map_or_else(|| "no reading".to_owned(), |ns| format!("{ns:.0} ns")));
    let near = if record.near { "near" } else { "far" };
    let stolen = match record.stolen_share {
        Some(share) if record.is_disturbed() => {
            format!("; a core was away for {:.0} %", share * 100.0)
        }
        _ => String::new(),
    };
    eprintln!(
        "[{number}/{total}] round {} {:<18} {:<14} {result}  ({near}: {before}, {after}{stolen})",
        record.round, record.workload, record.stack
    );
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn report(rows: Vec<Row>) -> Report {
        let goals = goals::judge(&goals::Run { rows: &rows, link: "lo", mtu: 1500, wire: false });
        Report {
            event: "summary",
            machine: Machine::look(),
            link: "lo".into(),
            mtu: 1500,
            wire: false,
            rounds: 1,
            seconds: 1.0,
            cores: vec![[3, 2]],
            near_ns: 100.0,
            command: "stoq compare".into(),
            settings: BTreeMap::from([("quinn".into(), "GSO".into())]),
            absent: vec!["quiche: not built".into()],
            doctor: None,
            rows,
            goals,
        }
    }

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &str) -> Args {
        let words = std::iter::once("x").chain(words.split_whitespace());
        <Cli as clap::Parser>::parse_from(words).args
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let refused = |words: &str| {
            let plan = Comparison::plan(&parse(words));
            plan.err().expect("refused").to_string()
        };
        assert!(refused("--peers none --link lo --wire").contains("--wire"));
        assert!(refused("--peers none --link eth9").contains("--connect"));
        assert!(refused("--link nosuch0 --connect [::1]:1").contains("no interface"));
        assert!(refused("--link lo --connect [::1]:1").contains("--connect"));
        assert!(refused("--peers nosuch").contains("nosuch"));
        assert!(refused("--peers none --workloads nosuch").contains("nosuch"));
        assert!(refused("--peers none --cores 1,2,3").contains("--cores"));
        assert!(refused("--peers none --cores 0,1 --workloads bulk-2+2").contains("bulk-2+2"));
        assert!(refused("--peers tcp --peer-dir /nonexistent").contains("not built"));
    }

    #[test]
    fn absent_peers_are_told_unless_named() {
        let plan = Comparison::plan(&parse("--peer-dir /nonexistent")).expect("a plan");
        assert_eq!(plan.absent.len(), PEERS.len() + LEFT_OUT.len());
        assert!(plan.stacks.iter().all(Stack::is_stoq));
        assert_eq!(plan.tasks.len(), 6);
    }

    #[test]
    fn the_conditions_name_link_and_packets() {
        let text = report(Vec::new()).conditions();
        assert!(text.contains("Link lo, MTU 1500;") && text.contains("core 3"), "{text}");
    }
}
