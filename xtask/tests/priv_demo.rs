//! The demo over a veth pair, with a fake `stoq` binary. Needs root.

#![allow(clippy::unwrap_used)] // A test may panic; helper functions count as tests here.

mod common;

use std::process::Command;

use common::{Demo, children, finish, signal, wait_until};
use serde_json::Value;

fn namespaces(pid: u32) -> Vec<String> {
    let output = Command::new("ip").args(["netns", "list"]).output().unwrap();
    assert!(output.status.success(), "ip netns list: is iproute2 installed, and are you root?");
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with(&format!("stoq-{pid}-")))
        .map(str::to_owned)
        .collect()
}

fn errors(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_run_over_veth_measures_the_raw_limit_and_leaves_no_namespace() {
    let mut demo = Demo::new("veth", "");
    demo.command.args(["--mtu", "9000", "--queues", "2"]);
    let child = demo.command.spawn().unwrap();
    let id = child.id();
    let output = finish(child);
    assert!(output.status.success(), "{}", errors(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["privileged"], true);
    assert_eq!(report["verified"], true);
    assert_eq!(report["mtu"], 9000);
    assert_eq!(report["raw_bps"], 1e10);
    assert_eq!(report["kernel_udp"]["server"]["in_datagrams"], 0);
    assert!(namespaces(id).is_empty());
    assert!(demo.leftovers().is_empty());
}

#[test]
fn a_signal_removes_the_namespaces() {
    let mut demo = Demo::new("veth-int", "hang");
    let child = demo.command.spawn().unwrap();
    let id = child.id();
    wait_until("server and client do not start", || children(id).len() == 2);
    assert_eq!(namespaces(id).len(), 2);
    signal(id, "INT");
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130), "{}", errors(&output.stderr));
    assert!(namespaces(id).is_empty());
}

#[test]
fn what_a_killed_run_leaves_is_removed_at_the_next_start() {
    let mut killed = Demo::new("veth-kill", "hang");
    let mut child = killed.command.spawn().unwrap();
    let id = child.id();
    let mut pids = Vec::new();
    wait_until("server and client do not start", || {
        pids = children(id);
        pids.len() == 2
    });
    signal(id, "KILL");
    child.wait().unwrap();
    // The real binary does this itself (--die-with-parent).
    pids.into_iter().for_each(|pid| signal(pid, "KILL"));
    assert_eq!(namespaces(id).len(), 2, "SIGKILL leaves the namespaces");
    assert_eq!(killed.leftovers().len(), 1);

    let mut next = Demo::new("veth-next", "");
    next.command.env("TMPDIR", &killed.directory);
    let output = next.run();
    assert!(output.status.success(), "{}", errors(&output.stderr));
    assert!(namespaces(id).is_empty());
    assert!(killed.leftovers().is_empty());
}

#[test]
fn veth_up_status_down() {
    let name = format!("t{}", std::process::id());
    let xtask = |verb: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["veth", verb, "--name", &name])
            .output()
            .unwrap();
        (output.status.success(), errors(&output.stdout), errors(&output.stderr))
    };
    let (ok, up, stderr) = xtask("up");
    let (status_ok, status, _) = xtask("status");
    let again = xtask("up");
    let ping = Command::new("ip")
        .args(["netns", "exec", &format!("stoq-{name}-a"), "cat", "/proc/net/if_inet6"])
        .output()
        .unwrap();
    let (down_ok, ..) = xtask("down");
    assert!(ok && up.contains("stoq serve"), "{stderr}");
    assert!(
        status_ok && status.contains("no XDP program") && status.contains("mtu 1500"),
        "{status}"
    );
    assert!(!again.0 && again.2.contains("exists already"), "{}", again.2);
    assert!(errors(&ping.stdout).contains("fd53746f00710000000000000000000a"));
    assert!(down_ok);
    assert!(xtask("status").1.contains("not there"));
}
