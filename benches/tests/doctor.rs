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

/// What the doctor says of packet sealing: its text with single blanks, and its JSON.
fn cryptography(library_path: Option<&std::path::Path>) -> (String, serde_json::Value) {
    let told = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stoq"));
        command.arg("doctor").args(["--iface", "lo"]).args(arguments);
        if let Some(path) = library_path {
            command.env("LD_LIBRARY_PATH", path);
        }
        let output = command.output().expect("the command starts");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let text = told(&[]).split_whitespace().collect::<Vec<_>>().join(" ");
    let json: serde_json::Value = serde_json::from_str(&told(&["--json"])).expect("JSON");
    (text, json["ipsec_mb"].clone())
}

#[test]
fn who_seals_packets_is_told_with_the_library_and_without() {
    let (text, json) = cryptography(None);
    match json["Ok"].as_str() {
        Some(version) => assert!(text.contains(&format!("ipsec-mb {version} seals")), "{text}"),
        None => assert!(text.contains("aws-lc-rs seals packets; ipsec-mb: "), "{text}"),
    }

    // A library that cannot be loaded is found first.
    let name = format!("stoq-doctor-{}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&directory).expect("a directory");
    std::fs::write(directory.join("libIPSec_MB.so.1"), "no library").expect("a file");
    let (text, json) = cryptography(Some(&directory));
    std::fs::remove_dir_all(&directory).expect("made above");
    let reason = json["Err"].as_str().unwrap_or_else(|| panic!("{json}"));
    assert!(!reason.is_empty() && text.contains("aws-lc-rs seals packets; ipsec-mb: "), "{text}");
    if cfg!(target_arch = "x86_64") {
        assert!(text.contains("without ipsec-mb, sealing and opening a packet takes"), "{text}");
    }
}
