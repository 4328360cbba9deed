//! The demo's behaviour over loopback, with a fake `stoq` binary: verdicts,
//! faults of either end, signals, and what is left behind.

#![allow(clippy::unwrap_used)] // A test may panic; helper functions count as tests here.

mod common;

use common::{Demo, children, finish, signal, wait_until};
use serde_json::Value;

fn loopback(name: &str, fault: &str) -> Demo {
    let mut demo = Demo::new(name, fault);
    demo.command.arg("--unprivileged");
    demo
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_good_run_prints_one_object_and_leaves_nothing() {
    let mut demo = loopback("good", "");
    let output = demo.run();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let stdout = text(&output.stdout);
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["verified"], true);
    assert_eq!(report["file_bytes"], 16 << 20);
    assert_eq!(report["goodput_bps"], 9e9);
    assert_eq!(report["packets_lost"], 3);
    assert_eq!(report["xdp"]["server"]["redirected"], 7);
    assert_eq!(report["xdp"]["client"]["redirected"], 7, "both clients' counters add up");
    assert_eq!(report["raw_bps"], Value::Null);
    for key in ["datapath", "mode", "mtu", "queues", "seconds", "bytes", "rtt_us_p50"] {
        assert!(!report[key].is_null(), "{key} is missing");
    }
    assert!(!text(&output.stderr).contains('\x1b'), "colour without a terminal");
    assert_eq!(demo.leftovers(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_file_of_the_user_is_transferred_and_kept() {
    let mut demo = loopback("file", "");
    let file = demo.directory.join("it's mine.txt");
    std::fs::write(&file, "content").unwrap();
    let fake = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_stoq.sh");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["demo", "--json", "--unprivileged", "--seconds", "1", "--file"]).arg(&file);
    command.arg("--stoq").arg(fake).env("TMPDIR", &demo.directory);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    demo.command = command;
    let output = demo.run();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["file_bytes"], 7);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "content");
    assert_eq!(demo.leftovers(), [file]);
}

#[test]
fn wrong_content_on_the_disk_fails_though_the_client_claims_otherwise() {
    for fault in ["corrupt", "short"] {
        let mut demo = loopback(fault, fault);
        let output = demo.run();
        assert_eq!(output.status.code(), Some(1), "{fault}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["verified"], false);
        assert!(demo.leftovers().is_empty());
    }
}

#[test]
fn the_death_of_either_end_is_reported_with_its_last_words() {
    for (fault, words) in [("die-server", "fake server fails"), ("die-client", "fake client fails")]
    {
        let mut demo = loopback(fault, fault);
        let output = demo.run();
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains(words), "{errors}");
        assert!(output.stdout.is_empty(), "no object after an error");
        assert!(demo.leftovers().is_empty());
    }
}

#[test]
fn signals_end_both_children_and_clean_up() {
    for (name, code) in [("INT", 130), ("TERM", 143)] {
        let mut demo = loopback(name, "hang");
        let child = demo.command.spawn().unwrap();
        let id = child.id();
        let mut pids = Vec::new();
        wait_until("server and client do not start", || {
            pids = children(id);
            pids.len() == 2
        });
        signal(id, name);
        let output = finish(child);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        for pid in pids {
            assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid} survives");
        }
        assert!(demo.leftovers().is_empty());
    }
}

#[test]
fn a_killed_child_ends_the_demo() {
    let mut demo = loopback("kill", "hang");
    let child = demo.command.spawn().unwrap();
    let id = child.id();
    let mut pids = Vec::new();
    wait_until("server and client do not start", || {
        pids = children(id);
        pids.len() == 2
    });
    signal(pids[0], "KILL");
    let output = finish(child);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("killed by signal 9"), "{}", text(&output.stderr));
    assert!(demo.leftovers().is_empty());
}
