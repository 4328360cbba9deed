//! `stoq perf idle` as a program: small, whole, and confined to one core.

use std::process::{Command, Output};

use serde_json::Value;

fn stoq(prefix: &[&str], args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_stoq");
    let mut command = match prefix {
        [] => Command::new(program),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
    };
    command.args(args).output().expect("the program starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A core that this process may use: tests run confined, too.
fn allowed_core() -> String {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let list = list.expect("a line of the kernel").trim();
    list.split([',', '-']).next().expect("at least one").to_owned()
}

const IDLE: [&str; 10] = [
    "perf",
    "idle",
    "--connections",
    "40",
    "--seconds",
    "1",
    "--keep-alive-ms",
    "200",
    "--requests-percent",
    "50",
];

#[test]
fn connections_are_held_and_used_and_both_ends_are_measured() {
    let output = stoq(&[], &[&IDLE[..], &["--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!((&report["workload"], &report["connections"]), (&"idle".into(), &40.into()));
    assert_eq!((&report["failed"], &report["answers"]), (&0.into(), &20.into()));
    for end in ["client", "server"] {
        let end = &report[end];
        assert!(end["rss_bytes"].as_u64() > end["rss_bytes_before"].as_u64(), "{report}");
        assert!(end["rss_bytes_per_connection"].as_u64() > Some(1000), "{report}");
        // On a loaded machine one turn serves many connections: up to three handshakes in each of
        // its parts.
        assert!(end["turn_us"]["turns"].as_u64() >= Some(5), "{report}");
        assert!(end["turn_us"]["p999"].as_u64() > Some(0), "{report}");
        for key in ["cpu_user_s", "cpu_sys_s", "cpu_s_per_gb"] {
            assert!(end[key].is_number(), "{key} is missing in {report}");
        }
    }
    for key in ["seconds", "bytes", "goodput_bps", "ops", "ops_per_s", "udp_payload", "mtu"] {
        assert!(report[key].is_number(), "{key} is missing in {report}");
    }
    assert!(report.get("packets_lost").is_some(), "{report}");
    assert_eq!((&report["stack"], &report["link"]), (&"stoq".into(), &"lo".into()));
    let per_connection = &report["server"]["rss_bytes_per_connection"];
    assert_eq!(&report["server_rss_bytes_per_connection"], per_connection, "{report}");
}

#[test]
fn refused_connections_fail_the_run_with_their_reason() {
    let config = std::env::temp_dir().join(format!("stoq-idle-{}.toml", std::process::id()));
    std::fs::write(&config, "incoming_max = 1\nretry = 'never'\n").expect("a file");
    let flags = ["--rate", "100000", "--config", config.to_str().expect("a plain path")];
    let output = stoq(&[], &[&IDLE[..], &flags[..]].concat());
    std::fs::remove_file(&config).expect("written above");
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let text = stderr(&output);
    assert!(text.contains("connections failed") && text.contains("refuse"), "{text}");
}

#[test]
fn a_single_core_is_enough_and_others_are_refused() {
    let core = allowed_core();
    let confined = ["taskset", "-c", &core];
    let output = stoq(&confined, &IDLE);
    assert!(output.status.success(), "{}", stderr(&output));

    let other = if core == "0" { "1" } else { "0" };
    let output = stoq(&confined, &["serve", "--listen", "[::1]:0", "--cores", other]);
    let text = stderr(&output);
    assert!(!output.status.success(), "a core that is not allowed was taken");
    assert!(text.contains(&format!("core {other} cannot be used by shard 0")), "{text}");
    assert!(text.contains("only"), "the reason is told: {text}");
}
