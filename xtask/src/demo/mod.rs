//! `cargo xtask demo`: two processes, two namespaces, one file, one verdict.
//!
//! Order of ownership, and so of clean-up in reverse: scratch directory, veth
//! pair, server, client. Every error, signal and death of a child unwinds
//! through the drop guards of these.

mod payload;
mod report;
pub(crate) mod session;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::payload::{FILE_NAME, GENERATED_BYTES, Payload, Scratch};
use self::report::{BothEnds, EndReport, Report};
use self::session::{Server, Session, ThreadedNapi};
use crate::machine::{self, Machine};
use crate::netns::{self, MTU_MAX, MTU_MIN, PairOptions, UdpCounters, VethPair};
use crate::stoq_cli::{self, Datapath, Done, Side};
use crate::terminal::{Terminal, Tone, size};
use crate::workspace::Workspace;
use crate::{interrupt, packages, setup};

/// Bytes of IPv6 and UDP header in every packet.
const HEADERS_BYTES: u32 = 48;
/// How long AF_XDP alone is measured.
const RAW_SECONDS: u32 = 2;

/// Options of `cargo xtask demo`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DemoArgs {
    /// Transfer this file instead of a generated one.
    #[arg(long, conflicts_with = "file_mib")]
    file: Option<PathBuf>,
    /// Size of the generated file, in MiB.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    file_mib: Option<u32>,
    /// Length of the bulk transfer after the file.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// MTU of the veth pair, in bytes.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(i64::from(MTU_MIN)..=i64::from(MTU_MAX)))]
    mtu: u32,
    /// Queues of the veth pair, and shards of the server.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    queues: u32,
    /// Datapath at both ends [default: af_xdp as root, else auto].
    #[arg(long)]
    datapath: Option<Datapath>,
    /// Print one JSON object on standard output, everything else on standard error.
    #[arg(long)]
    json: bool,
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
    /// Run over loopback even as root.
    #[arg(long)]
    unprivileged: bool,
    /// Use this `stoq` binary instead of building one.
    #[arg(long, value_name = "PATH")]
    stoq: Option<PathBuf>,
}

/// Runs the demo.
///
/// # Errors
/// Whatever went wrong first; the message says what to do. Everything is
/// cleaned up by then.
pub(crate) fn run(args: &DemoArgs) -> Result<()> {
    interrupt::install()?;
    let mut terminal = Terminal::new(args.json);
    let workspace = Workspace::load()?;
    let machine = Machine::inspect()?;
    let plan = Plan::new(args, &machine)?;
    prepare(&mut terminal, &workspace, &machine, args, &plan)?;
    let stoq = match &args.stoq {
        Some(path) => {
            path.canonicalize().with_context(|| format!("cannot find --stoq {}", path.display()))?
        }
        None => {
            terminal.heading("Building the stoq binary (release)");
            stoq_cli::build(&workspace)?
        }
    };
    let wanted = args.file_mib.map_or(GENERATED_BYTES, |mib| u64::from(mib) << 20);
    let scratch = Scratch::create(&workspace.target, wanted.saturating_mul(2))?;
    let result = transfer(&mut terminal, &machine, args, &plan, &scratch, stoq);
    if result.is_err() {
        keep_logs(&mut terminal, &scratch, &workspace);
    }
    terminal.end_live();
    let report = result?;
    report::print_summary(&mut terminal, &report);
    if args.json {
        println!("{}", serde_json::to_string(&report).context("cannot write the report")?);
    }
    if !report.verified {
        bail!("the received file differs from the source");
    }
    Ok(())
}

/// Removes the scratch directories of demos that were killed.
pub(crate) fn remove_stale_scratch() -> Result<Vec<PathBuf>> {
    Scratch::remove_stale(&Workspace::load()?.target)
}

/// What is decided before anything is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    privileged: bool,
    datapath: Datapath,
}

impl Plan {
    fn new(args: &DemoArgs, machine: &Machine) -> Result<Self> {
        let privileged = machine.is_root && !args.unprivileged;
        let datapath = match args.datapath {
            Some(Datapath::AfXdp) if !privileged => bail!(
                "--datapath af_xdp needs root (CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF): \
                 run `sudo env \"PATH=$PATH\" cargo xtask demo --datapath af_xdp`"
            ),
            Some(datapath) => datapath,
            None if privileged && machine.has_xdp_frags() => Datapath::AfXdp,
            None => Datapath::Auto,
        };
        Ok(Self { privileged, datapath })
    }
}

fn prepare(
    terminal: &mut Terminal,
    workspace: &Workspace,
    machine: &Machine,
    args: &DemoArgs,
    plan: &Plan,
) -> Result<()> {
    terminal.heading("This machine");
    for line in setup::report(machine) {
        terminal.line(&format!("  {line}"));
    }
    if !plan.privileged {
        terminal.warn(
            "without root there is no XDP program and no veth pair: both ends run over loopback \
             on kernel sockets (io_uring where allowed), --mtu does not apply and AF_XDP alone \
             is not measured; the transfer is verified all the same. With root: \
             sudo env \"PATH=$PATH\" cargo xtask demo",
        );
        return Ok(());
    }
    if !machine.has_xdp_frags() {
        terminal.warn("this kernel is too old for AF_XDP here: the engine chooses its datapath");
    }
    packages::install_missing(terminal, machine, &packages::demo_needs(), args.yes)?;
    for name in netns::remove_stale()? {
        terminal.warn(&format!("removed {name}, which a killed run had left"));
    }
    for path in Scratch::remove_stale(&workspace.target)? {
        terminal.warn(&format!("removed {}, which a killed run had left", path.display()));
    }
    Ok(())
}

/// Makes the link and the file, and runs both ends.
fn transfer(
    terminal: &mut Terminal,
    machine: &Machine,
    args: &DemoArgs,
    plan: &Plan,
    scratch: &Scratch,
    stoq: PathBuf,
) -> Result<Report> {
    let payload = make_payload(terminal, machine, args, scratch)?;
    let pair = plan.privileged.then(|| {
        let options = PairOptions {
            mtu: args.mtu,
            queues: args.queues,
            tx_checksum_offload: plan.datapath != Datapath::AfXdp,
        };
        VethPair::create(&std::process::id().to_string(), options)
    });
    let pair = pair.transpose()?;
    let (client, server) = match &pair {
        Some(pair) => {
            terminal.heading(&format!(
                "Link: {} ({}) to {} ({}), MTU {}",
                pair.client.netns,
                pair.client.address,
                pair.server.netns,
                pair.server.address,
                args.mtu
            ));
            (Side::Netns(pair.client.clone()), Side::Netns(pair.server.clone()))
        }
        None => (Side::Loopback, Side::Loopback),
    };
    let session = Session {
        stoq,
        client,
        server,
        datapath: plan.datapath,
        queues: args.queues,
        directory: scratch.join(""),
    };
    let mut report = Transfer { terminal, args, session: &session, scratch, payload: &payload }
        .run(machine, plan)?;
    measure_raw(terminal, args, plan, &session, &mut report)?;
    Ok(report)
}

fn make_payload(
    terminal: &mut Terminal,
    machine: &Machine,
    args: &DemoArgs,
    scratch: &Scratch,
) -> Result<Payload> {
    let path = scratch.join("www").join(FILE_NAME);
    if let Some(file) = &args.file {
        terminal.heading(&format!("Hashing {}", file.display()));
        let payload = payload::adopt(file, &path)?;
        let free = machine::free_bytes(&scratch.join("out"))?;
        if free < payload.bytes {
            bail!(
                "no room for the received copy: {} needed, {} free; set TMPDIR to a larger disk",
                size(payload.bytes),
                size(free)
            );
        }
        return Ok(payload);
    }
    let wanted = args.file_mib.map_or(GENERATED_BYTES, |mib| u64::from(mib) << 20);
    let free = machine::free_bytes(&scratch.join("www"))?;
    let (bytes, short) = payload::generated_bytes(machine, free, wanted)?;
    if let Some(why) = short {
        terminal.warn(&format!("{why}: the file is {} instead of {}", size(bytes), size(wanted)));
    }
    terminal.heading(&format!("Generating {} of noise", size(bytes)));
    payload::generate(&path, bytes)
}

/// The two transfers with one server.
struct Transfer<'a> {
    terminal: &'a mut Terminal,
    args: &'a DemoArgs,
    session: &'a Session,
    scratch: &'a Scratch,
    payload: &'a Payload,
}

impl Transfer<'_> {
    fn run(mut self, machine: &Machine, plan: &Plan) -> Result<Report> {
        let before = self.udp_counters()?;
        let mut server = self.session.start_server(&self.scratch.join("www"))?;
        let listening =
            format!("Server on {}: {} ({})", server.address, server.datapath, server.mode);
        self.terminal.heading(&listening);
        if plan.datapath != Datapath::Auto && server.datapath != plan.datapath.name() {
            let asked = plan.datapath.name();
            self.terminal
                .warn(&format!("{asked} was asked for; the server runs {}", server.datapath));
        }
        let mut napi = ThreadedNapi::new(machine, self.session);
        let file = self.fetch_file(&mut server, &mut napi)?;
        let verified = self.verify(&file)?;
        let bulk = self.bulk(&mut server, &mut napi)?;
        let after = self.udp_counters()?;
        let statistics = server.stop()?;
        let mut client_xdp = file.xdp.clone();
        stoq_cli::add_counters(&mut client_xdp, &bulk.xdp);
        Ok(Report {
            datapath: server.datapath.clone(),
            mode: server.mode.clone(),
            mtu: self.mtu()?,
            queues: self.args.queues,
            file_bytes: self.payload.bytes,
            file_sha256: self.payload.sha256.clone(),
            verified,
            file_seconds: file.seconds,
            file_goodput_bps: file.goodput_bps,
            seconds: bulk.seconds,
            bytes: bulk.bytes,
            goodput_bps: bulk.goodput_bps,
            rtt_us_p50: bulk.rtt_us_p50,
            packets_lost: file.packets_lost + bulk.packets_lost,
            ends: BothEnds {
                server: EndReport { datapath: server.datapath.clone(), mode: server.mode.clone() },
                client: EndReport { datapath: bulk.datapath, mode: bulk.mode },
            },
            xdp: BothEnds {
                server: statistics.get("xdp").cloned().unwrap_or(Value::Null),
                client: client_xdp,
            },
            kernel_udp: BothEnds {
                server: after.server.since(before.server),
                client: after.client.since(before.client),
            },
            raw_bps: None,
            raw_missing: None,
            threaded_napi: napi.is_enabled(),
            privileged: plan.privileged,
            kernel: machine.kernel.clone(),
            cores: machine.cores,
        })
    }

    fn fetch_file(&mut self, server: &mut Server, napi: &mut ThreadedNapi) -> Result<Done> {
        let out = self.scratch.join("out");
        let mut client = self.session.start_get(server, FILE_NAME, &out)?;
        let total = self.payload.bytes;
        let terminal = &mut *self.terminal;
        let done = session::follow(&mut client, server, napi, |view| {
            terminal.live(&report::progress_line("file", view, Some(total)));
        });
        done.context("the file transfer failed")
    }

    fn bulk(&mut self, server: &mut Server, napi: &mut ThreadedNapi) -> Result<Done> {
        let mut client = self.session.start_download(server, self.args.seconds)?;
        let terminal = &mut *self.terminal;
        let done = session::follow(&mut client, server, napi, |view| {
            terminal.live(&report::progress_line("bulk", view, None));
        });
        done.context("the bulk transfer failed")
    }

    /// Compares what the client says and what lies on its disk with the source.
    fn verify(&mut self, done: &Done) -> Result<bool> {
        let [fetched] = done.files.as_slice() else {
            bail!("the client fetched {} files instead of one", done.files.len());
        };
        let claimed = Payload { bytes: fetched.bytes, sha256: fetched.sha256.clone() };
        let path = self.scratch.join("out").join(FILE_NAME);
        let stored = payload::hash_file(&path).context("the client left no file")?;
        std::fs::remove_file(&path).context("cannot remove the received file")?;
        let verified = claimed == *self.payload && stored == *self.payload;
        let verdict = if verified {
            self.terminal.paint(Tone::Good, "SHA-256 equal at both ends")
        } else {
            self.terminal.paint(Tone::Bad, "SHA-256 DIFFERS")
        };
        self.terminal.line(&format!("  {} received, {verdict}", size(stored.bytes)));
        Ok(verified)
    }

    fn udp_counters(&self) -> Result<BothEnds<UdpCounters>> {
        let of = |side: &Side| match side {
            Side::Netns(end) => end.udp_counters(),
            Side::Loopback => {
                let text = std::fs::read_to_string("/proc/net/snmp6")
                    .context("cannot read /proc/net/snmp6: is IPv6 enabled?")?;
                UdpCounters::parse(&text)
            }
        };
        Ok(BothEnds { server: of(&self.session.server)?, client: of(&self.session.client)? })
    }

    /// The MTU that the packets really had.
    fn mtu(&self) -> Result<u32> {
        match self.session.server {
            Side::Netns(_) => Ok(self.args.mtu),
            Side::Loopback => std::fs::read_to_string("/sys/class/net/lo/mtu")
                .context("cannot read the MTU of lo")?
                .trim()
                .parse()
                .context("the MTU of lo is no number"),
        }
    }
}

/// Adds what AF_XDP alone carries; the demo does not fail for it, but says why it is missing.
fn measure_raw(
    terminal: &mut Terminal,
    args: &DemoArgs,
    plan: &Plan,
    session: &Session,
    report: &mut Report,
) -> Result<()> {
    if !plan.privileged || plan.datapath != Datapath::AfXdp {
        report.raw_missing = Some("only measured beside an AF_XDP transfer, as root".into());
        return Ok(());
    }
    terminal.live("raw  AF_XDP alone over the same link");
    match session.measure_raw(RAW_SECONDS, args.mtu - HEADERS_BYTES) {
        Ok(bps) => report.raw_bps = Some(bps),
        Err(error) => {
            interrupt::check()?;
            terminal.warn(&format!("AF_XDP alone could not be measured: {error:#}"));
            report.raw_missing = Some(format!("{error:#}"));
        }
    }
    Ok(())
}

/// Saves the logs of a failed run from the scratch directory's end.
fn keep_logs(terminal: &mut Terminal, scratch: &Scratch, workspace: &Workspace) {
    for name in ["server", "client"] {
        let from = scratch.join(&format!("{name}.log"));
        let to = workspace.logs().join(format!("demo-{name}.log"));
        if from.is_file() {
            match copy_log(&from, &to) {
                Ok(()) => terminal.line(&format!("log of the {name}: {}", to.display())),
                Err(error) => terminal.warn(&format!("{error:#}")),
            }
        }
    }
}

fn copy_log(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().expect("a log lies in a directory");
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::copy(from, to))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: DemoArgs,
    }

    fn args(words: &[&str]) -> DemoArgs {
        Line::parse_from(std::iter::once(&"demo").chain(words)).args
    }

    fn machine(is_root: bool, kernel_version: (u32, u32)) -> Machine {
        Machine { is_root, kernel_version, ..Machine::inspect().unwrap() }
    }

    #[test]
    fn root_on_a_new_kernel_gets_af_xdp_and_others_what_works() {
        let plan = |words: &[&str], machine: &Machine| Plan::new(&args(words), machine);
        let root = machine(true, (6, 1));
        let af_xdp = Plan { privileged: true, datapath: Datapath::AfXdp };
        assert_eq!(plan(&[], &root).unwrap(), af_xdp);
        let old = machine(true, (5, 4));
        assert_eq!(plan(&[], &old).unwrap().datapath, Datapath::Auto);
        let user = machine(false, (6, 1));
        let auto = Plan { privileged: false, datapath: Datapath::Auto };
        assert_eq!(plan(&[], &user).unwrap(), auto);
        assert_eq!(plan(&["--unprivileged"], &root).unwrap(), auto);
        let chosen = plan(&["--datapath", "io_uring"], &root).unwrap();
        assert_eq!(chosen.datapath, Datapath::IoUring);
        let error = plan(&["--datapath", "af_xdp"], &user).unwrap_err();
        assert!(error.to_string().contains("root"));
    }

    #[test]
    fn wrong_options_are_refused() {
        for words in [
            ["demo", "--mtu", "1279"],
            ["demo", "--mtu", "65536"],
            ["demo", "--queues", "0"],
            ["demo", "--seconds", "0"],
            ["demo", "--datapath", "dpdk"],
        ] {
            assert!(Line::try_parse_from(words).is_err(), "{words:?}");
        }
    }
}
