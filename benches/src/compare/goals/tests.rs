//! Goals judged by made-up rows, on both sides of each bound.

use super::super::summary::Spread;
use super::super::workload::{Task, Unit};
use super::*;

/// A row whose median is `median`, in the workload's unit.
fn row(workload: &str, stack: &str, median: f64) -> Row {
    let unit = Task::named(workload, 1.0, 0.1).expect("a workload").unit();
    Row {
        workload: workload.into(),
        unit,
        stack: stack.into(),
        is_stoq: stack.starts_with("stoq"),
        runs: 3,
        near: true,
        disturbed: 0,
        all_disturbed: false,
        rate: Some(Spread { median, min: median, max: median }),
        cpu_s_per_gb: None,
        server_cpu_share: None,
        latency_us: None,
        latency_curve_us: Vec::new(),
        udp_payload: None,
        stoq_is: None,
        note: None,
    }
}

fn with_cpu(row: Row, cpu_s_per_gb: f64) -> Row {
    Row { cpu_s_per_gb: Some(cpu_s_per_gb), ..row }
}

fn with_latency(row: Row, p50: f64, p99: f64) -> Row {
    Row { latency_us: Some(LatencyUs { p50, p99, p999: 2.0 * p99 }), ..row }
}

const VETH: Run<'_> = Run { rows: &[], link: "veth", mtu: 1500, wire: false };

fn find(run: &Run<'_>, what: &str) -> Goal {
    let goals = judge(run);
    goals.iter().find(|goal| goal.what.starts_with(what)).expect("a goal of this name").clone()
}

fn verdicts(marks: &[Mark]) -> Vec<Verdict> {
    marks.iter().map(|mark| mark.verdict).collect()
}

use Verdict::{Missed, NotMeasured, Reached};

#[test]
fn nothing_measured_is_nothing_judged_and_every_goal_names_its_command() {
    let goals = judge(&VETH);
    assert_eq!(goals.len(), 11);
    for goal in &goals {
        assert_eq!(goal.measured, None, "{goal:?}");
        let marks = goal.must.iter().chain(&goal.aim);
        assert!(marks.into_iter().all(|mark| mark.verdict == NotMeasured), "{goal:?}");
        let command = goal.command.expect("what is not measured names its command");
        // Each command is one that this program takes.
        let words = command.split('`').next().expect("one").split_whitespace();
        let workloads = words.clone().skip_while(|word| *word != "--workloads").nth(1);
        for name in workloads.expect("it names workloads").split(',') {
            Task::named(name, 1.0, 0.1).expect("a workload that there is");
        }
    }
}

#[test]
fn bulk_is_judged_by_the_best_datapath() {
    let peers = [("quinn", 5e9), ("s2n-quic", 6e9), ("tls", 12e9), ("tcp", 30e9)];
    let judged = |stoq: f64| {
        let mut rows =
            vec![row("download", "stoq socket", 1e9), row("download", "stoq io_uring", stoq)];
        rows.extend(peers.map(|(name, bps)| row("download", name, bps)));
        find(&Run { rows: &rows, ..VETH }, "bulk, 1 connection")
    };
    let goal = judged(10e9);
    assert_eq!(goal.measured.as_deref(), Some("10.00 Gbit/s"));
    // 2.00 × quinn, 1.67 × s2n-quic; msquic is not there.
    assert_eq!(verdicts(&goal.must), [Reached, Reached, NotMeasured]);
    assert_eq!(verdicts(&goal.aim), [Missed, Missed]);
    assert_eq!(goal.must[0].found, "2.00 × quinn");
    assert_eq!(goal.command, None, "no command measures msquic");
    assert_eq!(goal.must[2].found, "no such row here");
    let goal = judged(9.5e9);
    assert_eq!(verdicts(&goal.must), [Missed, Missed, NotMeasured]);
    assert_eq!(verdicts(&judged(14e9).aim), [Reached, Reached]);
}

#[test]
fn the_cpu_time_is_that_of_the_datapath_that_is_fastest() {
    let rows = [
        with_cpu(row("download", "stoq io_uring", 10e9), 1.2),
        with_cpu(row("download", "stoq socket", 9e9), 0.1),
        with_cpu(row("download", "quinn", 5e9), 2.4),
        with_cpu(row("download", "tls", 12e9), 1.0),
    ];
    let goal = find(&Run { rows: &rows, ..VETH }, "the same, CPU");
    assert_eq!(goal.measured.as_deref(), Some("1.20 s/GB"));
    assert_eq!(
        (verdicts(&goal.must), verdicts(&goal.aim)),
        (vec![Reached, NotMeasured], vec![Missed])
    );
    let rows = [with_cpu(row("download", "stoq io_uring", 10e9), 1.21), rows[2].clone()];
    let goal = find(&Run { rows: &rows, ..VETH }, "the same, CPU");
    assert!(goal.must[0].verdict == Missed && goal.command.is_some(), "tls was not measured");
}

#[test]
fn a_goal_counts_only_under_its_own_conditions() {
    let rows = [
        row("download", "stoq io_uring", 30e9),
        row("download", "quinn", 10e9),
        row("download", "tcp", 90e9),
    ];
    let jumbo = |mtu, link| {
        find(&Run { rows: &rows, link, mtu, wire: false }, "bulk, MTU 9000").must[0].verdict
    };
    assert_eq!(jumbo(9000, "veth"), Reached);
    assert_eq!((jumbo(1500, "veth"), jumbo(9000, "lo")), (NotMeasured, NotMeasured));
    let on_lo = |mtu| {
        let goal = find(&Run { rows: &rows, link: "lo", mtu, wire: false }, "bulk on lo");
        (goal.must[0].verdict, goal.aim[0].verdict, goal.command)
    };
    assert_eq!(on_lo(0), (Reached, Reached, None));
    assert_eq!(on_lo(1500).0, NotMeasured);
    // Packets one by one are another goal's affair.
    let wired = Run { rows: &rows, wire: true, ..VETH };
    assert_eq!(find(&wired, "bulk, 1 connection").must[0].verdict, NotMeasured);
}

#[test]
fn a_second_core_is_compared_with_the_same_datapath() {
    let rows = [
        row("bulk-1+1", "stoq io_uring", 20e9),
        row("bulk-1+1", "stoq socket", 30e9),
        row("bulk-2+2", "stoq io_uring", 34e9),
        row("bulk-2+2", "stoq socket", 33e9),
    ];
    let run = Run { rows: &rows, mtu: 9000, ..VETH };
    let goal = find(&run, "bulk, 2 + 2 cores");
    assert_eq!((goal.must[0].verdict, goal.aim[0].verdict), (Reached, Missed));
    assert_eq!(goal.must[0].found, "1.70 × 1 + 1 cores");
    let rows = [rows[0].clone(), row("bulk-2+2", "stoq io_uring", 33.9e9)];
    let run = Run { rows: &rows, mtu: 9000, ..VETH };
    assert_eq!(find(&run, "bulk, 2 + 2 cores").must[0].verdict, Missed);
}

#[test]
fn on_a_wire_af_xdp_stands_for_itself() {
    let rows = |af_xdp: f64| {
        vec![
            row("download", "stoq io_uring", 50e9),
            row("download", "stoq af_xdp", af_xdp),
            row("download", "s2n-quic", 2e9),
            row("download", "tls", 3e9),
            row("raw", "stoq af_xdp", 10e9),
            row("raw", "stoq socket", 90e9),
        ]
    };
    let judged = |af_xdp| {
        let rows = rows(af_xdp);
        find(&Run { rows: &rows, wire: true, ..VETH }, "AF_XDP, veth")
    };
    let goal = judged(6e9);
    assert_eq!((goal.must[0].verdict, goal.aim[0].verdict), (Reached, Reached));
    assert_eq!(goal.must[0].found, "2.00 × tls");
    let goal = judged(5.9e9);
    assert_eq!((goal.must[0].verdict, goal.aim[0].verdict), (Missed, Missed));
}

#[test]
fn requests_are_judged_by_latency_against_protected_peers() {
    let rows = |p50: f64, p99: f64| {
        vec![
            with_latency(row("requests", "stoq io_uring", 1.0), p50, p99),
            with_latency(row("requests", "tcp", 9.0), 1.0, 2.0),
            with_latency(row("requests", "tls", 9.0), 44.0, 60.0),
            with_latency(row("requests", "quinn", 9.0), 50.0, 50.0),
        ]
    };
    let judged = |p50, p99| {
        let rows = rows(p50, p99);
        find(&Run { rows: &rows, ..VETH }, "requests, 1")
    };
    let goal = judged(22.0, 26.0);
    // p50 against tls, p99 against quinn: each quantile has its own best peer.
    assert_eq!(verdicts(&goal.must), [Reached, Missed]);
    assert_eq!(verdicts(&goal.aim), [Missed]);
    let goal = judged(20.0, 25.0);
    assert_eq!((verdicts(&goal.must), verdicts(&goal.aim)), (vec![Reached; 2], vec![Reached]));
}

#[test]
fn the_other_rows_of_both_sides() {
    let rows = |better: f64| {
        vec![
            row("requests-64", "stoq socket", 400e3 * better),
            row("requests-64-2+2", "stoq socket", 0.999e6 * better),
            row("handshakes", "stoq socket", 5.9e3 * better),
            row("handshakes", "s2n-quic", 5.95e3),
            row("handshakes", "tls", 7e3),
            row("datagrams", "stoq socket", 1.49e6 * better),
            row("datagrams", "quiche", 1e6),
            row("idle", "stoq socket", 40_400.0 / better),
        ]
    };
    let judged = |what, better| {
        let rows = rows(better);
        let goal = find(&Run { rows: &rows, ..VETH }, what);
        (goal.must[0].verdict, goal.aim[0].verdict)
    };
    assert_eq!(judged("requests, 64", 1.0), (NotMeasured, Missed));
    assert_eq!(judged("requests, 64", 1.01), (NotMeasured, Reached));
    assert_eq!(judged("full handshakes", 1.0), (Missed, Missed));
    assert_eq!(judged("full handshakes", 1.01), (Reached, Missed));
    assert_eq!(judged("datagrams", 1.0), (Missed, Missed));
    assert_eq!(judged("datagrams", 1.4), (Reached, Reached));
    assert_eq!(judged("memory", 1.0), (Missed, Missed));
    assert_eq!(judged("memory", 1.01 * 2.0), (Reached, Reached));
    assert_eq!(judged("memory", 1.01), (Reached, Missed));
}

#[test]
fn far_runs_are_told_and_text_and_json_say_the_same() {
    let mut rows = vec![row("datagrams", "stoq socket", 3e6), row("datagrams", "quiche", 1e6)];
    let goal = find(&Run { rows: &rows, ..VETH }, "datagrams");
    assert_eq!((goal.disturbed, goal.note()), (false, None));
    rows[1].near = false;
    let goal = find(&Run { rows: &rows, ..VETH }, "datagrams");
    assert!(goal.note().is_some_and(|note| note.contains("far")), "{goal:?}");
    let text = markdown(std::slice::from_ref(&goal));
    assert!(text.contains("| 3.00 M/s; from far or stolen runs |"), "{text}");
    assert!(text.contains("≥ 1.5 × quiche: reached (3.00 × quiche)"), "{text}");
    let elsewhere = markdown(&[find(&VETH, "datagrams")]);
    assert!(elsewhere.contains("| ≥ 1.5 × quiche: not measured | ≥ 2 × quiche: not measured |"));
    assert!(elsewhere.contains("–; measured by: `cargo xtask compare"), "{elsewhere}");
    let json = serde_json::to_value(&goal).expect("JSON");
    assert_eq!(json["must"][0]["verdict"], "reached");
    assert_eq!(json["measured"], "3.00 M/s");
    assert_eq!(Unit::BytesPerConnection.best([2.0, 1.0].into_iter()), Some(1.0));
}
