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

#[test]
fn stoq_tcp_and_tls_over_loopback() {
    let html = std::env::temp_dir().join(format!("stoq-compare-{}.html", std::process::id()));
    let output = Command::new(stoq())
        .args(["compare", "--quick", "--rounds", "1", "--link", "lo", "--json"])
        .args(["--peers", "tcp,tls", "--datapaths", "socket"])
        .args(["--workloads", "download,requests,handshakes,datagrams"])
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
    assert_eq!(runs.len(), 12);
    assert_eq!(summary["event"], "summary");

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
    let refused = row("datagrams", "tcp");
    assert!(refused["note"].as_str().is_some_and(|note| note.starts_with("cannot")), "{refused}");
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
