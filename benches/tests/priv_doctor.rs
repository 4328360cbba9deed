//! `stoq doctor` with a real trial of AF_XDP on veth, in namespaces. Needs root.

#![allow(dead_code, unreachable_pub)]

#[path = "../../engine/tests/common/netns.rs"]
mod netns;

use std::process::{Command, Output};

use netns::{Netns, veth};
use serde_json::Value;

fn doctor(netns: &Netns, arguments: &[&str]) -> Output {
    Command::new("ip")
        .args(["netns", "exec", netns.name(), env!("CARGO_BIN_EXE_stoq"), "doctor"])
        .args(arguments)
        .output()
        .expect("ip starts")
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn interface<'a>(report: &'a Value, name: &str) -> &'a Value {
    let interfaces = report["interfaces"].as_array().expect("a list");
    let mut named = interfaces.iter().filter(|verdict| verdict["interface"]["name"] == name);
    named.next().unwrap_or_else(|| panic!("{name} in {report}"))
}

fn assert_clean(netns: &Netns, device: &str) {
    let link = netns.ip(&format!("-d link show dev {device}"));
    assert!(!link.contains("xdp"), "the trial left its program behind: {link}");
}

/// Two veth pairs between two namespaces; the first carries the default route.
fn stage() -> (Netns, Netns) {
    let (near, far) = (Netns::new("near"), Netns::new("far"));
    for (device, net) in [("veth0", "fd00:1"), ("veth1", "fd00:2")] {
        veth((&near, device), (&far, device));
        near.add_address(device, &format!("{net}::1/64"));
    }
    near.ip("-6 route add default via fd00:1::2 dev veth0");
    (near, far)
}

#[test]
fn a_trial_proves_copy_mode_and_leaves_nothing() {
    let (near, _far) = stage();
    let output = doctor(&near, &["--iface", "veth0", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = report(&output);
    let veth = interface(&report, "veth0");
    // Named, so tried although it carries the default route.
    assert_eq!(veth["interface"]["trial"]["Ok"], "copy", "{report}");
    assert_eq!(veth["choice"]["kind"], "io_uring", "a software device: {report}");
    assert_clean(&near, "veth0");
}

#[test]
fn the_default_route_is_not_touched_unasked() {
    let (near, _far) = stage();
    let output = doctor(&near, &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = report(&output);
    assert!(interface(&report, "veth0")["interface"]["trial"].is_null(), "{report}");
    assert_eq!(interface(&report, "veth1")["interface"]["trial"]["Ok"], "copy", "{report}");
    assert_clean(&near, "veth0");
    assert_clean(&near, "veth1");
}

#[test]
fn a_queue_in_use_is_the_reason() {
    let (near, _far) = stage();
    let config = stoq::datapath::af_xdp::AfXdpConfig::new(
        "veth1",
        std::net::SocketAddrV6::new(std::net::Ipv6Addr::UNSPECIFIED, 0, 0, 0),
    );
    let held = near.run(|| stoq::datapath::af_xdp::open_interface(&config).expect("AF_XDP opens"));
    let output = doctor(&near, &["--iface", "veth1", "--json"]);
    assert_eq!(output.status.code(), Some(0), "sockets still work: {output:?}");
    let report = report(&output);
    let trial = interface(&report, "veth1")["interface"]["trial"]["Err"].as_str();
    assert!(trial.is_some_and(|reason| reason.contains("veth1")), "{report}");
    assert!(near.ip("-d link show dev veth1").contains("xdp"), "its owner keeps the program");
    drop(held);
    assert_clean(&near, "veth1");
}

#[test]
fn without_an_address_nothing_works() {
    let near = Netns::new("bare");
    near.ip("link set lo down");
    let output = doctor(&near, &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("no IPv6 address"), "{error}");
}
