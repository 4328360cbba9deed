//! What STOQ is to reach beside other stacks, and whether a run shows that it does.
//!
//! Each goal is judged by the medians of one run: ratios to peers of the same run, and nothing else. A
//! goal whose workload, link or peer the run did not have is not judged, and names the command that
//! measures it. TCP without TLS is no peer here: it protects nothing.

use std::fmt::Write as _;

use serde::Serialize;
use stoq_measure::latency::LatencyUs;

use super::stack::LEFT_OUT;
use super::summary::Row;
use super::table;

/// A finished comparison.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// Its rows.
    pub rows: &'a [Row],
    /// The link's name.
    pub link: &'a str,
    /// Its MTU; 0: each stack's own packet size.
    pub mtu: u32,
    /// Whether packets crossed one by one.
    pub wire: bool,
}

/// What a run says about a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is reached.
    Reached,
    /// It is not.
    Missed,
    /// The run did not measure it.
    NotMeasured,
}

impl Verdict {
    /// In a word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Reached => "reached",
            Self::Missed => "missed",
            Self::NotMeasured => "not measured",
        }
    }
}

/// One bound of a goal.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mark {
    /// The bound.
    pub bound: String,
    /// What the run has in its place: a ratio, or a value; or what it lacks. Empty: STOQ's own part.
    pub found: String,
    /// Whether it is reached.
    pub verdict: Verdict,
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.bound, self.verdict.word())?;
        if self.found.is_empty() { Ok(()) } else { write!(f, " ({})", self.found) }
    }
}

/// A goal.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goal {
    /// The workload and its conditions.
    pub what: &'static str,
    /// What STOQ has in this run; `None`: not measured.
    pub measured: Option<String>,
    /// What must be reached.
    pub must: Vec<Mark>,
    /// What is aimed at.
    pub aim: Vec<Mark>,
    /// The command that measures what this run did not; `None`: all was measured.
    pub command: Option<&'static str>,
    /// Whether some of the rows count only runs whose cores were far apart or taken away.
    pub disturbed: bool,
}

impl Goal {
    /// What a reader should know beside it.
    #[must_use]
    pub fn note(&self) -> Option<String> {
        let disturbed = "from far or stolen runs".to_owned();
        let command = self.command.map(|command| format!("measured by: `{command}`"));
        let notes: Vec<String> =
            self.disturbed.then_some(disturbed).into_iter().chain(command).collect();
        (!notes.is_empty()).then(|| notes.join("; "))
    }
}

/// A peer's value, and whose it is.
type Named<'a> = (&'a str, f64);

impl<'a> Run<'a> {
    fn of(&self, workload: &str) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.workload == workload)
    }

    /// STOQ's best row: the datapath that a user would take.
    fn stoq(&self, workload: &str) -> Option<&'a Row> {
        let rows = || self.of(workload).filter(|row| row.is_stoq);
        let unit = rows().next()?.unit;
        let best = unit.best(rows().filter_map(value))?;
        rows().find(|row| value(row) == Some(best))
    }

    fn named(&self, workload: &str, stack: &str) -> Option<&'a Row> {
        self.of(workload).find(|row| row.stack == stack && row.rate.is_some())
    }

    /// Peers that protect what they carry; `quic`: without TLS over TCP.
    fn peers(&self, workload: &str, quic: bool) -> impl Iterator<Item = &'a Row> {
        self.of(workload).filter(move |row| {
            let is_tcp = ["tls", "tcp-ktls"].contains(&row.stack.as_str());
            !row.is_stoq && row.stack != "tcp" && row.rate.is_some() && !(quic && is_tcp)
        })
    }

    /// The fastest peer.
    fn best_peer(&self, workload: &str, quic: bool) -> Option<Named<'a>> {
        let named = |row: &'a Row| Some((row.stack.as_str(), value(row)?));
        self.peers(workload, quic).filter_map(named).max_by(|a, b| a.1.total_cmp(&b.1))
    }

    fn is(&self, links: &[&str], mtu: u32, wire: bool) -> bool {
        links.contains(&self.link) && self.mtu == mtu && self.wire == wire
    }
}

fn value(row: &Row) -> Option<f64> {
    row.rate.map(|rate| rate.median)
}

/// At least, or at most, `factor` times somebody else's value.
fn ratio(
    bound: &str,
    more: bool,
    ours: Option<f64>,
    factor: f64,
    theirs: Option<Named<'_>>,
) -> Mark {
    let (found, verdict) = match (ours, theirs) {
        (Some(ours), Some((name, theirs))) => {
            let ratio = ours / theirs;
            let reached = if more { ratio >= factor } else { ratio <= factor };
            (format!("{ratio:.2} × {name}"), verdict(reached))
        }
        (None, _) => (String::new(), Verdict::NotMeasured),
        (_, None) => ("no such row here".to_owned(), Verdict::NotMeasured),
    };
    Mark { bound: bound.to_owned(), found, verdict }
}

/// At least, or at most, a number.
fn limit(
    bound: &str,
    more: bool,
    ours: Option<f64>,
    limit: f64,
    show: impl Fn(f64) -> String,
) -> Mark {
    let (found, verdict) = match ours {
        Some(ours) => (show(ours), verdict(if more { ours >= limit } else { ours <= limit })),
        None => (String::new(), Verdict::NotMeasured),
    };
    Mark { bound: bound.to_owned(), found, verdict }
}

fn verdict(reached: bool) -> Verdict {
    if reached { Verdict::Reached } else { Verdict::Missed }
}

fn gbit(bps: f64) -> String {
    format!("{:.2} Gbit/s", bps / 1e9)
}

/// Puts a goal together: rows that it stands on, marks, and the command for what is missing.
fn goal<'a>(
    what: &'static str,
    measured: Option<String>,
    rows: impl IntoIterator<Item = &'a Row>,
    [must, aim]: [Vec<Mark>; 2],
    command: &'static str,
) -> Goal {
    // A peer that nobody can run is lacking under every command.
    let can_be = |mark: &&Mark| !LEFT_OUT.iter().any(|left_out| mark.bound.contains(left_out.0));
    let mut marks = must.iter().chain(&aim).filter(can_be);
    let lacking = measured.is_none() || marks.any(|mark| mark.verdict == Verdict::NotMeasured);
    let disturbed = measured.is_some() && rows.into_iter().any(|row| row.runs > 0 && !row.near);
    Goal { what, measured, must, aim, command: lacking.then_some(command), disturbed }
}

/// Every goal, judged by one run.
#[must_use]
pub fn judge(run: &Run<'_>) -> Vec<Goal> {
    vec![
        bulk(run),
        bulk_cpu(run),
        jumbo(run),
        defaults_on_lo(run),
        two_cores(run),
        wire(run),
        requests(run),
        requests_64(run),
        handshakes(run),
        datagrams(run),
        memory(run),
    ]
}

/// A run under these conditions, else one without rows.
fn only<'a>(run: &Run<'a>, fits: bool) -> Run<'a> {
    Run { rows: if fits { run.rows } else { &[] }, ..*run }
}

fn bulk(run: &Run<'_>) -> Goal {
    let run = only(run, run.is(&["lo", "veth"], 1500, false));
    let ours = run.stoq("download").and_then(value);
    let peer = |name| Some((name, run.named("download", name).and_then(value)?));
    let must = [("quinn", 2.0), ("s2n-quic", 1.6), ("msquic", 1.25)].map(|(name, factor)| {
        ratio(&format!("≥ {factor} × {name}"), true, ours, factor, peer(name))
    });
    let aim = vec![
        ratio("≥ TCP + TLS", true, ours, 1.0, peer("tls")),
        limit("14 Gbit/s", true, ours, 14e9, gbit),
    ];
    let command = "cargo xtask compare --link veth --workloads download` and with `--link lo";
    let what = "bulk, 1 connection, MTU 1500, lo and veth";
    goal(what, ours.map(gbit), run.of("download"), [must.into(), aim], command)
}

fn bulk_cpu(run: &Run<'_>) -> Goal {
    let run = only(run, run.is(&["lo", "veth"], 1500, false));
    let ours = run.stoq("download").and_then(|row| row.cpu_s_per_gb);
    let peer = |name| Some((name, run.named("download", name)?.cpu_s_per_gb?));
    let must = vec![
        ratio("≤ 0.5 × quinn", false, ours, 0.5, peer("quinn")),
        ratio("≤ 0.8 × msquic", false, ours, 0.8, peer("msquic")),
    ];
    let aim = vec![ratio("≤ TCP + TLS", false, ours, 1.0, peer("tls"))];
    let command = "cargo xtask compare --link veth --workloads download` and with `--link lo";
    let what = "the same, CPU seconds per GB, both ends together";
    let measured = ours.map(|seconds| format!("{seconds:.2} s/GB"));
    goal(what, measured, run.of("download"), [must, aim], command)
}

fn jumbo(run: &Run<'_>) -> Goal {
    let run = only(run, run.is(&["veth"], 9000, false));
    let ours = run.stoq("download").and_then(value);
    let best = run.best_peer("download", true);
    let must = vec![ratio("≥ 1.2 × the best QUIC peer", true, ours, 1.2, best)];
    let aim = vec![limit("22 Gbit/s", true, ours, 22e9, gbit)];
    let command = "cargo xtask compare --link veth --mtu 9000 --workloads download";
    let what = "bulk, MTU 9000, veth";
    goal(what, ours.map(gbit), run.of("download"), [must, aim], command)
}

fn defaults_on_lo(run: &Run<'_>) -> Goal {
    let run = only(run, run.is(&["lo"], 0, false));
    let ours = run.stoq("download").and_then(value);
    let best = run.best_peer("download", true);
    let must = vec![ratio("≥ 2 × the best QUIC peer", true, ours, 2.0, best)];
    let aim = vec![limit("28 Gbit/s", true, ours, 28e9, gbit)];
    let command = "cargo xtask compare --link lo --mtu 0 --workloads download";
    let what = "bulk on lo with what each stack does by default";
    goal(what, ours.map(gbit), run.of("download"), [must, aim], command)
}

fn two_cores(run: &Run<'_>) -> Goal {
    let run = only(run, run.is(&["lo", "veth"], 9000, false));
    // A datapath is compared with itself.
    let best = run.stoq("bulk-2+2");
    let one = best.and_then(|two| run.named("bulk-1+1", &two.stack));
    let ours = best.and_then(value);
    let one_named = one.and_then(|row| Some(("1 + 1 cores", value(row)?)));
    let must = vec![ratio("≥ 1.7 × 1 + 1 cores", true, ours, 1.7, one_named)];
    let aim = vec![limit("40 Gbit/s in all", true, ours, 40e9, gbit)];
    let command =
        "cargo xtask compare --link veth --mtu 9000 --workloads bulk-1+1,bulk-2+2,bulk-2x1+1";
    let what = "bulk, 2 + 2 cores, MTU 9000";
    let rows = best.into_iter().chain(one);
    goal(what, ours.map(gbit), rows, [must, aim], command)
}

fn wire(run: &Run<'_>) -> Goal {
    let run = only(run, run.is(&["veth"], 1500, true));
    let ours = run.named("download", "stoq af_xdp").and_then(value);
    let raw = run.named("raw", "stoq af_xdp").and_then(value).map(|bps| ("raw", bps));
    let best = run.best_peer("download", false);
    let must = vec![ratio("≥ 2 × the best peer, TCP + TLS included", true, ours, 2.0, best)];
    let aim = vec![ratio("≥ 0.6 × what raw AF_XDP carries", true, ours, 0.6, raw)];
    let command = "cargo xtask compare --link veth --wire --workloads download,raw";
    let what = "AF_XDP, veth with --wire, MTU 1500";
    goal(what, ours.map(gbit), run.of("download"), [must, aim], command)
}

fn requests(run: &Run<'_>) -> Goal {
    // Latency decides here, not the rate.
    let quantile = |of: fn(LatencyUs) -> f64| {
        let named = |row: &'_ Row| row.latency_us.map(of);
        let ours = run.of("requests").filter(|row| row.is_stoq).filter_map(named);
        let peers = run.peers("requests", false);
        let peers = peers.filter_map(|row| Some((row.stack.as_str(), named(row)?)));
        (ours.min_by(f64::total_cmp), peers.min_by(|a, b| a.1.total_cmp(&b.1)))
    };
    let (p50, p99) = (quantile(|us| us.p50), quantile(|us| us.p99));
    let must = vec![
        ratio("p50 ≤ 0.5 × the best peer's", false, p50.0, 0.5, p50.1),
        ratio("p99 ≤ 0.5 × the best peer's", false, p99.0, 0.5, p99.1),
    ];
    let us = |us: f64| format!("{us:.1} µs");
    let aim = vec![limit("p50 20 µs", false, p50.0, 20.0, us)];
    let measured = p50.0.zip(p99.0).map(|(p50, p99)| format!("p50 {p50:.1}, p99 {p99:.1} µs"));
    let command = "cargo xtask compare --link veth --workloads requests";
    let what = "requests, 1 outstanding, 64 B";
    goal(what, measured, run.of("requests"), [must, aim], command)
}

fn requests_64(run: &Run<'_>) -> Goal {
    let ours = run.stoq("requests-64").and_then(value);
    let msquic = run.named("requests-64", "msquic").and_then(|row| Some(("msquic", value(row)?)));
    let must = vec![ratio("≥ 1.2 × msquic", true, ours, 1.2, msquic)];
    let two = run.stoq("requests-64-2+2").and_then(value);
    let show = |per_s| table::rate(super::workload::Unit::OpsPerS, per_s);
    let aim = vec![limit("1 M/s on 2 + 2 cores", true, two, 1e6, show)];
    let command = "cargo xtask compare --link veth --workloads requests-64,requests-64-2+2";
    let what = "requests, 64 outstanding";
    let rows = run.of("requests-64").chain(run.of("requests-64-2+2"));
    goal(what, ours.map(show), rows, [must, aim], command)
}

fn handshakes(run: &Run<'_>) -> Goal {
    let ours = run.stoq("handshakes").and_then(value);
    let peer = |name| Some((name, run.named("handshakes", name).and_then(value)?));
    let must = vec![ratio("≥ s2n-quic", true, ours, 1.0, peer("s2n-quic"))];
    let aim = vec![ratio("≥ TLS over TCP", true, ours, 1.0, peer("tls"))];
    let show = |per_s| table::rate(super::workload::Unit::OpsPerS, per_s);
    let command = "cargo xtask compare --link veth --workloads handshakes";
    let what = "full handshakes, server on one core, X25519MLKEM768";
    goal(what, ours.map(show), run.of("handshakes"), [must, aim], command)
}

fn datagrams(run: &Run<'_>) -> Goal {
    let ours = run.stoq("datagrams").and_then(value);
    let quiche = run.named("datagrams", "quiche").and_then(|row| Some(("quiche", value(row)?)));
    let must = vec![ratio("≥ 1.5 × quiche", true, ours, 1.5, quiche)];
    let aim = vec![ratio("≥ 2 × quiche", true, ours, 2.0, quiche)];
    let show = |per_s| table::rate(super::workload::Unit::OpsPerS, per_s);
    let command = "cargo xtask compare --link veth --workloads datagrams";
    let what = "datagrams of 1200 B, delivered";
    goal(what, ours.map(show), run.of("datagrams"), [must, aim], command)
}

fn memory(run: &Run<'_>) -> Goal {
    let ours = run.stoq("idle").and_then(value);
    let show = |bytes| table::rate(super::workload::Unit::BytesPerConnection, bytes);
    let must = vec![limit("≤ 40 kB", false, ours, 40_000.0, show)];
    let aim = vec![limit("≤ 20 kB", false, ours, 20_000.0, show)];
    let command = "cargo xtask compare --link veth --workloads idle";
    let what = "memory for each idle server connection";
    // Memory does not depend on how far apart the cores are.
    goal(what, ours.map(show), [], [must, aim], command)
}

/// The goals as a table.
#[must_use]
pub fn markdown(goals: &[Goal]) -> String {
    let mut text = String::from(
        "\n**Goals**\n\n| workload | STOQ here | must reach | aim |\n|---|---|---|---|\n",
    );
    for goal in goals {
        let marks = |marks: &[Mark]| {
            let marks: Vec<String> = marks.iter().map(Mark::to_string).collect();
            marks.join("; ")
        };
        let note = goal.note().map_or_else(String::new, |note| format!("; {note}"));
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            text,
            "| {} | {}{note} | {} | {} |",
            goal.what,
            goal.measured.as_deref().unwrap_or("–"),
            marks(&goal.must),
            marks(&goal.aim),
        );
    }
    text
}

#[cfg(test)]
mod tests;
