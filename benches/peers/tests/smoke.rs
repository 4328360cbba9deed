//! A whole comparison over loopback, as short as it can be: STOQ over sockets against TCP and TLS.
//!
//! The other peers take minutes to build: `cargo xtask compare` runs them.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// `stoq`, which the workspace's test build puts beside the peers.
fn stoq() -> PathBuf {
    let stoq = Path::new(env!("CARGO_BIN_EXE_peer-tcp")).with_file_name("stoq");
    assert!(stoq.is_file(), "{} is missing: cargo build -p stoq-bench", stoq.display());
    stoq
}

/// What the test runs, once each.
const WORKLOADS: &str = "raw,download,requests,handshakes,handshakes-resumed,datagrams,idle";

/// Every run that was measured tells what readers of JSON rely on.
fn check_keys(run: &Value) {
    assert!(run["ending"].get("failed").is_none(), "{run}");
    let Some(done) = run["ending"].get("done") else { return };
    let numbers = ["seconds", "bytes", "goodput_bps", "ops", "ops_per_s", "mtu"];
    for key in numbers {
        assert!(done[key].is_number(), "{key} is missing in {run}");
    }
    for key in ["udp_payload", "latency_us", "packets_lost"] {
        assert!(done.get(key).is_some(), "{key} is missing in {run}");
    }
    assert_eq!(done["link"], "lo", "{run}");
    assert!(done["stack"].is_string() && done["workload"].is_string(), "{run}");
    if done["latency_us"].is_object() {
        for key in ["p50", "p99", "p999"] {
            assert!(done["latency_us"][key].is_number(), "latency_us.{key} is missing in {run}");
        }
    }
    for end in ["client", "server"] {
        for key in ["cpu_user_s", "cpu_sys_s", "rss_bytes"] {
            assert!(done[end][key].is_number(), "{end}.{key} is missing in {run}");
        }
        assert!(done[end].get("cpu_s_per_gb").is_some(), "{end}.cpu_s_per_gb is missing in {run}");
    }
}

/// Kernel TLS is measured where the kernel has it, and its absence is told where not.
fn check_ktls(row: &Value) {
    let note = row["note"].as_str().unwrap_or_default();
    let told = note.starts_with("cannot") && note.contains("CONFIG_TLS");
    assert!(told != (row["rate"]["median"].as_f64() > Some(0.0)), "{row}");
}

#[test]
fn stoq_tcp_and_tls_over_loopback() {
    let html = std::env::temp_dir().join(format!("stoq-compare-{}.html", std::process::id()));
    let output = Command::new(stoq())
        .args(["compare", "--seconds", "0.4", "--rounds", "1", "--link", "lo", "--json"])
        .args(["--peers", "tcp,tls,tcp-ktls", "--datapaths", "socket"])
        .args(["--workloads", WORKLOADS])
        // One core is enough for a test: nothing is said about speed.
        .args(["--cores", "0"])
        .args(["--html".as_ref(), html.as_os_str()])
        .output()
        .expect("runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let (summary, runs) = lines.split_last().expect("lines");
    assert_eq!(runs.len(), 4 * WORKLOADS.split(',').count());
    assert_eq!(summary["event"], "summary");
    for run in runs.iter().map(|line| &line["run"]) {
        check_keys(run);
    }

    let row = |workload: &str, stack: &str| {
        let rows = summary["rows"].as_array().expect("rows");
        let found =
            rows.iter().find(|row| row["workload"] == workload && row["stack"] == stack).cloned();
        found.unwrap_or_else(|| panic!("no row {workload} of {stack}: {summary}"))
    };
    for stack in ["stoq socket", "tcp", "tls"] {
        for workload in ["download", "requests"] {
            let row = row(workload, stack);
            assert!(row["rate"]["median"].as_f64() > Some(0.0), "{row}\n{errors}");
            assert!(row["stoq_is"].as_f64() > Some(0.0), "{row}");
        }
        assert!(row("requests", stack)["latency_us"]["p50"].as_f64() > Some(0.0));
        assert!(row("download", stack)["cpu_s_per_gb"].is_number());
    }
    assert!(row("handshakes", "tls")["rate"]["median"].as_f64() > Some(0.0));
    for (workload, stack) in [("handshakes-resumed", "stoq socket"), ("handshakes-resumed", "tls")]
    {
        assert!(row(workload, stack)["rate"]["median"].as_f64() > Some(0.0), "{errors}");
    }
    assert!(row("raw", "stoq socket")["rate"]["median"].as_f64() > Some(0.0), "{errors}");
    assert!(row("idle", "stoq socket")["rate"]["median"].as_f64() > Some(1000.0), "{errors}");
    for (workload, stack) in [("datagrams", "tcp"), ("raw", "tls"), ("idle", "tcp")] {
        let refused = row(workload, stack);
        let note = refused["note"].as_str().unwrap_or_default();
        assert!(note.starts_with("cannot") && refused["rate"].is_null(), "{refused}");
    }
    check_ktls(&row("download", "tcp-ktls"));

    let goals = summary["goals"].as_array().expect("goals");
    let goal = |what: &str| {
        let found = goals
            .iter()
            .find(|goal| goal["what"].as_str().is_some_and(|text| text.starts_with(what)));
        found.unwrap_or_else(|| panic!("no goal {what}: {summary}"))
    };
    assert_ne!(goal("memory")["must"][0]["verdict"], "not_measured");
    assert_ne!(goal("requests, 1")["must"][0]["verdict"], "not_measured");
    assert_eq!(goal("datagrams")["must"][0]["verdict"], "not_measured", "quiche did not run");
    assert!(goal("bulk, 2 + 2")["command"].as_str().is_some_and(|text| text.contains("bulk-2+2")));
    assert!(summary["settings"]["tls"].as_str().is_some_and(|text| text.contains("AES-128-GCM")));

    let page = std::fs::read_to_string(&html).expect("the report");
    std::fs::remove_file(&html).expect("removed");
    assert!(page.contains("<svg") && page.contains("stoq socket"));
}

#[test]
fn a_peer_that_is_not_built_is_named_with_its_command() {
    let output = Command::new(stoq())
        .args(["compare", "--peers", "quinn", "--peer-dir", "/nonexistent"])
        .output()
        .expect("runs");
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("--features quinn"), "{errors}");
}
