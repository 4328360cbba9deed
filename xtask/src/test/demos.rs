//! The steps that run the demo itself, and kill it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::steps::this_command;
use super::tally::Tally;
use super::{Context, Outcome};
use crate::demo::session::Session;
use crate::interrupt;
use crate::netns::{self, PairOptions, VethPair};
use crate::proc::{self, Group};
use crate::stoq_cli::{Datapath, Side};

/// How long one demo with a small file may take.
const DEMO_LIMIT: Duration = Duration::from_secs(180);
/// How long clean-up may take.
const CLEAN_LIMIT: Duration = Duration::from_secs(20);
/// Share of the packets that may have taken the kernel's sockets: neighbour
/// discovery and what arrives before the program is attached.
const SOCKET_SHARE_MAX: f64 = 0.02;

/// Over loopback, as a user without root sees it.
pub(crate) fn loopback(context: &mut Context, log: &Path) -> Result<Outcome> {
    let report = demo(context, log, &["--unprivileged"])?;
    ensure!(report["privileged"] == false, "the demo did not run over loopback");
    Ok(Outcome::Ran(Tally::one(true)))
}

/// Over AF_XDP at Ethernet's MTU.
pub(crate) fn mtu_1500(context: &mut Context, log: &Path) -> Result<Outcome> {
    over_af_xdp(context, log, 1500)
}

/// Over AF_XDP with jumbo frames, which need several buffers each.
pub(crate) fn mtu_9000(context: &mut Context, log: &Path) -> Result<Outcome> {
    over_af_xdp(context, log, 9000)
}

fn over_af_xdp(context: &mut Context, log: &Path, mtu: u32) -> Result<Outcome> {
    let report = demo(context, log, &["--datapath", "af_xdp", "--mtu", &mtu.to_string()])?;
    check_af_xdp(&report, mtu)?;
    Ok(Outcome::Ran(Tally::one(true)))
}

/// What a demo over AF_XDP must have shown.
fn check_af_xdp(report: &Value, mtu: u32) -> Result<()> {
    for end in ["server", "client"] {
        let datapath = &report["ends"][end]["datapath"];
        ensure!(datapath == "af_xdp", "the {end} ran on {datapath} instead of af_xdp");
        ensure!(report["xdp"][end].is_object(), "the {end} reports no counters of its XDP program");
    }
    ensure!(report["mtu"] == mtu, "the link had MTU {}", report["mtu"]);
    let number = |value: &Value| value.as_f64().with_context(|| format!("no number: {value}"));
    let bytes = number(&report["file_bytes"])? + number(&report["bytes"])?;
    let packets = bytes / f64::from(mtu);
    let through_sockets = number(&report["kernel_udp"]["client"]["in_datagrams"])?
        + number(&report["kernel_udp"]["server"]["in_datagrams"])?;
    ensure!(
        through_sockets <= packets * SOCKET_SHARE_MAX,
        "{through_sockets} of about {packets:.0} packets took the kernel's sockets"
    );
    let raw = &report["raw_bps"];
    ensure!(raw.is_number(), "AF_XDP alone was not measured: {}", report["raw_missing"]);
    Ok(())
}

/// Runs the demo with a small file to its end, and checks what is true of every demo.
fn demo(context: &mut Context, log: &Path, options: &[&str]) -> Result<Value> {
    let stoq = context.stoq()?;
    let output = log.with_extension("json");
    let mut command = this_command()?;
    command.args(["demo", "--json", "--yes", "--seconds", "2", "--file-mib", "64", "--stoq"]);
    command.arg(stoq).args(options);
    let finished = proc::run_to_files(&mut command, &output, log, DEMO_LIMIT)?;
    ensure!(finished.success(), "the demo {}", finished.explain(DEMO_LIMIT));
    let text = std::fs::read_to_string(&output).context("cannot read the demo's output")?;
    let last = text.lines().last().context("the demo printed no object")?;
    let report: Value = serde_json::from_str(last).context("the demo's last line is no JSON")?;
    ensure!(report["verified"] == true, "the transfer was not verified");
    ensure!(report["file_bytes"] == 64 << 20, "the file had {} bytes", report["file_bytes"]);
    Ok(report)
}

/// A case: the `stoq` binary and the log.
type Case = fn(&Path, &Path) -> Result<()>;

/// `kill -9`, of the server by itself, of the demo's server, of the demo.
pub(crate) fn kill(context: &mut Context, log: &Path) -> Result<Outcome> {
    use std::io::Write as _;
    let stoq = context.stoq()?;
    let mut tally = Tally::default();
    let cases: [(&str, Case); 3] = [
        ("kill -9 of a server leaves its interface clean", killed_server),
        ("kill -9 of the demo's server ends the demo in order", killed_server_of_demo),
        ("kill -9 of the demo ends its children", killed_demo),
    ];
    for (name, case) in cases {
        let result = case(&stoq, log);
        interrupt::check()?;
        let verdict =
            result.as_ref().map_or_else(|error| format!("FAILED: {error:#}"), |()| "ok".into());
        writeln!(proc::append(log)?, "test {name} ... {verdict}")?;
        tally.add(Tally::one(result.is_ok()));
    }
    Ok(Outcome::Ran(tally))
}

/// The XDP program leaves with its process, and the queue can be bound again.
fn killed_server(stoq: &Path, log: &Path) -> Result<()> {
    let options = PairOptions { mtu: 1500, queues: 1, tx_checksum_offload: false };
    let pair = VethPair::create(&std::process::id().to_string(), options)?;
    let directory = log.with_extension("files");
    std::fs::create_dir_all(&directory).context("cannot create a directory")?;
    let session = Session {
        stoq: stoq.to_path_buf(),
        client: Side::Netns(pair.client.clone()),
        server: Side::Netns(pair.server.clone()),
        datapath: Datapath::AfXdp,
        queues: 1,
        directory: directory.clone(),
    };
    let mut server = session.start_server(&directory)?;
    ensure!(pair.server.has_xdp()?, "the server listens, but no XDP program is attached");
    server.kill()?;
    wait("an XDP program stays attached", || Ok(!pair.server.has_xdp()?))?;
    let mut again = session.start_server(&directory).context("the queue cannot be bound again")?;
    ensure!(pair.server.has_xdp()?, "no XDP program after the restart");
    again.stop()?;
    wait("an XDP program stays attached after an orderly end", || Ok(!pair.server.has_xdp()?))
}

fn killed_server_of_demo(stoq: &Path, log: &Path) -> Result<()> {
    let mut demo = start_demo(stoq, log)?;
    let server = wait_for_child(&mut demo, "serve")?;
    signal_kill(server)?;
    let status = demo
        .wait_until(Instant::now() + CLEAN_LIMIT)?
        .context("the demo goes on without its server")?;
    ensure!(!status.success(), "the demo calls this a success");
    let left = namespaces_of(demo.id())?;
    ensure!(left.is_empty(), "left behind: {}", left.join(", "));
    Ok(())
}

fn killed_demo(stoq: &Path, log: &Path) -> Result<()> {
    let mut demo = start_demo(stoq, log)?;
    let pids = [wait_for_child(&mut demo, "serve")?, wait_for_child(&mut demo, "perf")?];
    signal_kill(demo.id())?;
    demo.wait_until(Instant::now() + CLEAN_LIMIT)?.context("the demo survives SIGKILL")?;
    let orphans =
        wait("server or client survives the demo", || Ok(pids.iter().all(|pid| !is_stoq(*pid))));
    // Whatever the verdict, nothing of it may stay.
    for pid in pids.into_iter().filter(|pid| is_stoq(*pid)) {
        signal_kill(pid)?;
    }
    let removed = netns::remove_stale()?;
    crate::demo::remove_stale_scratch()?;
    orphans?;
    ensure!(removed.len() >= 2, "the next start found {} namespaces to remove", removed.len());
    Ok(())
}

/// A demo that runs for minutes, to be killed.
fn start_demo(stoq: &Path, log: &Path) -> Result<Group> {
    let mut command = this_command()?;
    command.args(["demo", "--json", "--yes", "--seconds", "120", "--file-mib", "16", "--stoq"]);
    command.arg(stoq).args(["--datapath", "af_xdp"]);
    Group::spawn(command.stdout(proc::append(log)?).stderr(proc::append(log)?))
}

/// Waits for a child of the demo whose first argument is `verb`.
fn wait_for_child(demo: &mut Group, verb: &str) -> Result<u32> {
    let parent = demo.id();
    let mut found = None;
    wait(&format!("the demo starts no `stoq {verb}`"), || {
        if let Some(status) = demo.try_wait()? {
            bail!("the demo {}", proc::explain(status));
        }
        found = child_with_argument(parent, verb)?;
        Ok(found.is_some())
    })?;
    found.context("a child was found")
}

fn child_with_argument(parent: u32, verb: &str) -> Result<Option<u32>> {
    for entry in std::fs::read_dir("/proc").context("cannot list /proc")? {
        let path: PathBuf = entry.context("cannot list /proc")?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else {
            continue;
        };
        // A process may end between the listing and the reading.
        let Ok(stat) = std::fs::read_to_string(path.join("stat")) else { continue };
        let Ok(arguments) = std::fs::read(path.join("cmdline")) else { continue };
        let is_child = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split_whitespace().nth(1))
            .is_some_and(|ppid| ppid == parent.to_string());
        let mut arguments = arguments.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        let program = arguments.next().unwrap_or_default();
        if is_child && program.ends_with("stoq") && arguments.next().is_some_and(|own| own == verb)
        {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

fn is_stoq(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|arguments| {
        arguments.split(|byte| *byte == 0).next().is_some_and(|program| program.ends_with(b"stoq"))
    })
}

fn signal_kill(pid: u32) -> Result<()> {
    let raw = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let pid = raw.with_context(|| format!("{pid} is no process ID"))?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).context("cannot kill (kill)")
}

fn namespaces_of(pid: u32) -> Result<Vec<String>> {
    let prefix = format!("stoq-{pid}-");
    Ok(netns::list()?.into_iter().filter(|name| name.starts_with(&prefix)).collect())
}

/// Waits until `condition` holds; fails with `otherwise` after the clean-up limit.
fn wait(otherwise: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + CLEAN_LIMIT;
    while !condition()? {
        interrupt::check()?;
        if Instant::now() >= deadline {
            bail!("{otherwise} ({} s)", CLEAN_LIMIT.as_secs());
        }
        std::thread::sleep(proc::POLL_INTERVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Value {
        json!({
            "mtu": 1500, "file_bytes": 64 << 20, "bytes": 1 << 30, "raw_bps": 1e10, "raw_missing": null,
            "ends": {"server": {"datapath": "af_xdp"}, "client": {"datapath": "af_xdp"}},
            "xdp": {"server": {"redirected": 1}, "client": {"redirected": 1}},
            "kernel_udp": {"server": {"in_datagrams": 3}, "client": {"in_datagrams": 2}},
        })
    }

    #[test]
    fn a_good_report_passes_and_each_fault_is_seen() {
        check_af_xdp(&report(), 1500).unwrap();
        let faults: [(&str, Value); 5] = [
            ("/ends/client/datapath", json!("socket")),
            ("/xdp/server", Value::Null),
            ("/kernel_udp/client/in_datagrams", json!(500_000)),
            ("/mtu", json!(9000)),
            ("/raw_bps", Value::Null),
        ];
        for (pointer, value) in faults {
            let mut broken = report();
            *broken.pointer_mut(pointer).unwrap() = value;
            assert!(check_af_xdp(&broken, 1500).is_err(), "{pointer}");
        }
    }

    #[test]
    fn waiting_ends_with_the_condition_or_its_error() {
        let mut calls = 0;
        wait("x", || {
            calls += 1;
            Ok(calls == 3)
        })
        .unwrap();
        assert_eq!(calls, 3);
        assert!(wait("x", || bail!("broken")).is_err());
    }
}
