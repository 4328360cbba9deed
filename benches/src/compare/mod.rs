//! `stoq compare`: STOQ over each datapath and other stacks, on this machine, under the same
//! conditions.
//!
//! Each end of each run is a process of its own, pinned to the same core as everybody's. Rounds
//! are interleaved: every stack runs once before any runs twice, so that what drifts, drifts for
//! all. A core-to-core probe brackets each run (see [`probe`]), and runs whose cores were taken away
//! are set aside (see [`steal`]).

mod field;
mod html;
mod machine;
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
use std::time::Duration;

use anyhow::Context;
use clap::Args as ClapArgs;
use serde::Serialize;
use serde_json::{Value, json};

use self::field::{Field, LinkKind};
use self::machine::Machine;
use self::program::Program;
use self::stack::{LEFT_OUT, PEERS, Place, Stack};
use self::steal::Watch;
use self::summary::{Ending, Record, Row};
use self::workload::Task;
use crate::{interrupt, netns, output, proc};

/// How long a server may take to listen.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a client may take beyond its measurement.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of IPv6 and UDP headers in a packet.
const HEADER_BYTES: u32 = 48;
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
    /// Workloads, comma-separated.
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
    /// The client's core and the server's. Default: the two highest.
    #[arg(long, value_delimiter = ',', num_args = 1..=2)]
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
    /// The client's core and the server's.
    cores: [usize; 2],
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
        format!(
            "Link {}, {mtu}{wire}; {} rounds of {} s, interleaved; client on core {}, server on core {}; \
             near: below {} ns from core to core; stolen: the hypervisor took a core away. \
             `STOQ is`: the best STOQ datapath's median over this one's.",
            self.link, self.rounds, self.seconds, self.cores[0], self.cores[1], self.near_ns
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
    cores: [usize; 2],
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
        let tasks = args.workloads.iter().map(|name| Task::named(name, seconds, warm_up));
        let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cores = match args.cores[..] {
            [client, server] => [client, server],
            [both] => [both, both],
            _ => [count - 1, count.saturating_sub(2)],
        };
        Ok(Self {
            machine: Machine::look(),
            link,
            stacks,
            absent,
            tasks: tasks.collect::<anyhow::Result<_>>()?,
            cores,
            seconds,
            settings: BTreeMap::new(),
        })
    }

    fn measure(&mut self, args: &Args) -> anyhow::Result<Vec<Record>> {
        let mut records = Vec::new();
        let total = args.rounds as usize * self.tasks.len() * self.stacks.len();
        for round in 1..=args.rounds {
            for task in self.tasks.clone() {
                for stack in self.stacks.clone() {
                    let record = self.record(args, round, &task, &stack)?;
                    if args.json {
                        output::json_line(&json!({"event": "run", "run": record}))?;
                    }
                    records.push(record);
                    let last = records.last().expect("just pushed");
                    tell(last, records.len(), total);
                }
            }
        }
        Ok(records)
    }

    /// One run between two probes. Its failure is a finding, a signal ends everything.
    fn record(
        &mut self,
        args: &Args,
        round: u32,
        task: &Task,
        stack: &Stack,
    ) -> anyhow::Result<Record> {
        interrupt::check()?;
        let before = probe::core_to_core_ns(self.cores)?;
        let watch = Watch::start(self.cores);
        let ending = match self.once(args, task, stack) {
            Ok(ending) => ending,
            Err(error) => {
                interrupt::check()?;
                Ending::Failed(format!("{error:#}"))
            }
        };
        let stolen_share = watch.stolen_share();
        let after = probe::core_to_core_ns(self.cores)?;
        Ok(Record {
            workload: task.name.to_owned(),
            unit: task.unit(),
            stack: stack.name.clone(),
            is_stoq: stack.is_stoq(),
            round,
            probe_ns: [before, after],
            near: [before, after].iter().all(|ns| ns.is_some_and(|ns| ns < args.near_ns)),
            stolen_share,
            ending,
        })
    }

    fn once(&mut self, args: &Args, task: &Task, stack: &Stack) -> anyhow::Result<Ending> {
        let field = Field::open(&self.link, args.mtu, stack.is_af_xdp(), args.wire)?;
        let [client_interface, server_interface] = field.interfaces();
        let udp_payload = u16::try_from(args.mtu.saturating_sub(HEADER_BYTES)).unwrap_or(0);
        let place = |core, interface| Place { core, interface, udp_payload };
        let server = match self.link {
            LinkKind::Nic { .. } => None,
            _ => {
                let place = place(self.cores[1], server_interface);
                let command = field.server_side(stack.server(field.server_addr(), &place)?);
                Some(self.listening(command, stack)?)
            }
        };
        let place = place(self.cores[0], client_interface);
        let pid = server.as_ref().map(Program::id);
        let command = field.client_side(stack.client(task, field.server_addr(), pid, &place)?);
        let mut client = Program::start(command, format!("{} client", stack.name))?;
        let limit = CLIENT_TIMEOUT + Duration::from_secs_f64(task.seconds + task.warm_up);
        let told = client.event(&["done", "unsupported"], limit)?;
        client.stop()?;
        if let Some(mut server) = server {
            server.stop()?;
        }
        if told["event"] == "unsupported" {
            return Ok(Ending::Unsupported(told["why"].as_str().unwrap_or("").to_owned()));
        }
        let outcome = serde_json::from_value(told).context("the client's report")?;
        Ok(Ending::Done(Box::new(outcome)))
    }

    /// Starts a server, waits until it listens, keeps what it says about itself.
    fn listening(
        &mut self,
        command: std::process::Command,
        stack: &Stack,
    ) -> anyhow::Result<Program> {
        let mut server = Program::start(command, format!("{} server", stack.name))?;
        let told = server.event(&["listening"], LISTEN_TIMEOUT)?;
        let settings = told["settings"].as_str().map_or_else(
            || {
                let word = |key: &str| told[key].as_str().unwrap_or("").to_owned();
                format!(
                    "defaults (BBRv2, windows of 16 MiB); {} ({})",
                    word("datapath"),
                    word("mode")
                )
            },
            str::to_owned,
        );
        self.settings.insert(stack.name.clone(), settings);
        Ok(server)
    }

    fn report(&self, args: &Args, records: &[Record]) -> Report {
        let doctor = match &self.link {
            LinkKind::Nic { interface, .. } => {
                serde_json::to_value(stoq::doctor::examine_with(Some(interface), |_| None)).ok()
            }
            _ => None,
        };
        Report {
            event: "summary",
            machine: self.machine.clone(),
            link: self.link.name().to_owned(),
            mtu: args.mtu,
            wire: args.wire,
            rounds: args.rounds,
            seconds: self.seconds,
            cores: self.cores,
            near_ns: args.near_ns,
            command: command_line(),
            settings: self.settings.clone(),
            absent: self.absent.clone(),
            doctor,
            rows: summary::rows(records),
        }
    }
}

/// How this was started, the program by its bare name.
fn command_line() -> String {
    let words = std::env::args().skip(1);
    let mut command = std::process::Command::new("stoq");
    proc::describe(command.args(words))
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
        [] => PEERS.iter().map(|peer| peer.0).chain(LEFT_OUT.iter().map(|peer| peer.0)).collect(),
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
            let value = match record.unit {
                workload::Unit::GoodputBps => outcome.goodput_bps,
                workload::Unit::OpsPerS => outcome.ops_per_s,
            };
            table::rate(record.unit, value)
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
        "[{number}/{total}] round {} {:<12} {:<14} {result}  ({near}: {before}, {after}{stolen})",
        record.round, record.workload, record.stack
    );
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn report(rows: Vec<Row>) -> Report {
        Report {
            event: "summary",
            machine: Machine::look(),
            link: "lo".into(),
            mtu: 1500,
            wire: false,
            rounds: 1,
            seconds: 1.0,
            cores: [3, 2],
            near_ns: 100.0,
            command: "stoq compare".into(),
            settings: BTreeMap::from([("quinn".into(), "GSO".into())]),
            absent: vec!["quiche: not built".into()],
            doctor: None,
            rows,
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
