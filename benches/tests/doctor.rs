//! `stoq doctor` as its user sees it, on loopback: nothing is attached there.

use std::process::{Command, Output};

fn doctor(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stoq"))
        .arg("doctor")
        .args(arguments)
        .output()
        .expect("the command starts")
}

#[test]
fn loopback_works_and_fits_eighty_columns() {
    let output = doctor(&["--iface", "lo"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    for part in ["Kernel", "Interface lo", "auto takes", "What costs speed"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
}

#[test]
fn json_is_one_object_a_line() {
    let output = doctor(&["--iface", "lo", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(text.lines().count(), 1);
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["works"], true);
    let loopback = &report["interfaces"][0];
    assert_eq!(loopback["interface"]["name"], "lo");
    assert!(loopback["interface"]["trial"].is_null(), "no trial on loopback");
    let kind = loopback["choice"]["kind"].as_str().expect("a name");
    assert!(["io_uring", "socket"].contains(&kind), "{kind}");
}

#[test]
fn a_missing_interface_fails_and_is_named() {
    for json in [&[][..], &["--json"]] {
        let output = doctor(&[&["--iface", "no-such-if"], json].concat());
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let error = String::from_utf8(output.stderr).expect("UTF-8");
        assert!(error.contains("no interface no-such-if"), "{error}");
    }
}
