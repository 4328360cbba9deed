//! The identity module against the outside world: kills, full disks, a second process, OpenSSL.
//!
//! Tests that need a second process run this binary again with `STOQ_CERTS_ROLE` set; then only
//! [`child`] does anything.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::quic;
use stoq::certs::{
    CertificateFault, ClientTls, IdentityNames, LocalCa, LocalCaConfig, RotatingIdentity, ServerTls,
};

const ROLE: &str = "STOQ_CERTS_ROLE";
const DIRECTORY: &str = "STOQ_CERTS_DIRECTORY";
const NAME: &str = "node.example.net";

/// A directory of one test, removed whatever happens.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = std::env::temp_dir().join(format!(
            "stoq-certs-process-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir_all(&self.0);
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

/// A child that cannot outlive its test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.0.kill().expect("our own child can be killed");
            self.0.wait().expect("our own child can be waited for");
        }
    }
}

fn names() -> IdentityNames {
    IdentityNames::new()
        .with_dns(NAME)
        .unwrap()
        .with_ipv6("2001:db8::1".parse().unwrap())
        .with_client_id("probe-7")
        .unwrap()
}

fn issue(ca: &Arc<LocalCa>) -> Result<String, stoq::certs::CertsError> {
    let identity = RotatingIdentity::with_authority(ca.clone(), names()).start()?;
    Ok(identity.status().serial.unwrap())
}

fn run_as(role: &str, directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--nocapture"])
        .env(ROLE, role)
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped());
    command
}

/// The body of second processes; nothing by itself.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let directory = PathBuf::from(std::env::var(DIRECTORY).unwrap());
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{line}").unwrap();
        out.flush().unwrap();
    };
    match role.as_str() {
        "issue" => {
            let ca = Arc::new(LocalCa::open(&directory, LocalCaConfig::default()).unwrap());
            loop {
                say(format!("issued {}", issue(&ca).unwrap()));
            }
        }
        "issue-on-a-full-disk" => {
            let ca = Arc::new(LocalCa::open(&directory, LocalCaConfig::default()).unwrap());
            say(format!("refused {}", issue(&ca).unwrap_err()));
        }
        "open" => match LocalCa::open(&directory, LocalCaConfig::default()) {
            Ok(_) => say("opened".to_owned()),
            Err(error) => say(format!("{:?} {error}", error.fault())),
        },
        "key-log" => {
            let server = ServerTls::builder()
                .identity_self_signed(names())
                .alpn(["x"])
                .key_log(true)
                .build()
                .unwrap();
            let client = ClientTls::builder()
                .roots(server.identity().roots().to_vec())
                .alpn(["x"])
                .build()
                .unwrap();
            handshake(&client, &server);
        }
        other => panic!("unknown role {other}"),
    }
}

fn output(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Killed at twenty random moments while issuing as fast as it can: the CA always opens again,
/// and no certificate that was handed out is missing from its books.
#[test]
fn a_ca_killed_in_mid_issue_loses_nothing() {
    let scratch = Scratch::new();
    let directory = scratch.0.join("ca");
    let root = LocalCa::open(&directory, LocalCaConfig::default()).unwrap().root();
    let mut issued = Vec::new();
    for round in 0..20_u64 {
        let mut process = Process(run_as("issue", &directory).spawn().unwrap());
        let out = BufReader::new(process.0.stdout.take().unwrap());
        let mut serials =
            out.lines().filter_map(|line| line.unwrap().strip_prefix("issued ").map(str::to_owned));
        issued.push(serials.next().expect("the child issues"));
        std::thread::sleep(Duration::from_micros(round * 977 % 9000));
        process.0.kill().unwrap();
        process.0.wait().unwrap();
        issued.extend(serials);
        let ca = Arc::new(LocalCa::open(&directory, LocalCaConfig::default()).unwrap());
        assert_eq!(ca.root(), root);
        let books = std::fs::read_to_string(directory.join("state.toml")).unwrap();
        for serial in &issued {
            assert!(books.contains(serial), "round {round}: {serial} is missing");
        }
        // One more than was announced may have been saved before the kill.
        assert!((issued.len()..=issued.len() + 1).contains(&ca.issued_count()));
        issue(&ca).unwrap();
        let leftovers = std::fs::read_dir(&directory)
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".tmp"))
            .count();
        assert_eq!(leftovers, 0);
        let books = std::fs::read_to_string(directory.join("state.toml")).unwrap();
        issued = books
            .lines()
            .filter_map(|line| line.strip_prefix("serial = \"")?.strip_suffix('"'))
            .map(str::to_owned)
            .collect();
    }
    assert!(issued.len() >= 40, "{} certificates", issued.len());
}

/// The kernel refuses every write of the child (`ulimit -f 0`: EFBIG), as a full disk does.
#[test]
fn a_ca_that_cannot_write_issues_nothing_and_recovers() {
    let scratch = Scratch::new();
    let directory = scratch.0.join("ca");
    let ca = Arc::new(LocalCa::open(&directory, LocalCaConfig::default()).unwrap());
    issue(&ca).unwrap();
    drop(ca);
    let before = std::fs::read(directory.join("state.toml")).unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" --exact child --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .env(ROLE, "issue-on-a-full-disk")
        .env(DIRECTORY, &directory);
    let text = output(command);
    assert!(text.contains("could not save its state: cannot write"), "{text}");
    assert!(text.contains("nothing was issued"), "{text}");
    assert_eq!(std::fs::read(directory.join("state.toml")).unwrap(), before);
    let ca = Arc::new(LocalCa::open(&directory, LocalCaConfig::default()).unwrap());
    assert_eq!(ca.issued_count(), 1);
    issue(&ca).unwrap();
}

#[test]
fn a_second_process_is_refused_until_the_first_ends() {
    let scratch = Scratch::new();
    let directory = scratch.0.join("ca");
    let ca = LocalCa::open(&directory, LocalCaConfig::default()).unwrap();
    let text = output(run_as("open", &directory));
    assert!(text.contains(&format!("{:?}", CertificateFault::DirectoryLocked)), "{text}");
    assert!(text.contains("in use by another process"), "{text}");
    drop(ca);
    assert!(output(run_as("open", &directory)).contains("opened"));
}

fn openssl(arguments: &[&str]) -> Output {
    Command::new("openssl")
        .args(arguments)
        .output()
        .expect("the openssl command is needed for this test: apt-get install openssl")
}

#[test]
fn openssl_accepts_the_chains_and_the_revocation_list() {
    let open = LocalCaConfig::default();
    let constrained = LocalCaConfig {
        permitted_dns: vec!["example.net".to_owned()],
        permitted_ipv6: vec![("2001:db8::".parse().unwrap(), 32)],
        ..LocalCaConfig::default()
    };
    for config in [open, constrained] {
        let scratch = Scratch::new();
        let directory = scratch.0.join("ca");
        let ca = Arc::new(LocalCa::open(&directory, config).unwrap());
        let node = scratch.0.join("node.pem");
        let _identity = RotatingIdentity::with_authority(ca.clone(), names())
            .roots([ca.root()])
            .store(&node)
            .start()
            .unwrap();
        ca.revocation_list().unwrap();
        let node = node.to_str().unwrap();
        let root = directory.join("root.pem");
        let crl = directory.join("crl.pem");
        let verify = |extra: &[&str]| {
            let mut arguments = vec!["verify", "-x509_strict", "-CAfile", root.to_str().unwrap()];
            arguments.extend(["-untrusted", node, "-CRLfile", crl.to_str().unwrap()]);
            arguments.extend(["-crl_check"]);
            arguments.extend(extra);
            arguments.push(node);
            openssl(&arguments)
        };
        for extra in [
            &["-verify_hostname", NAME, "-purpose", "sslserver"][..],
            &["-verify_ip", "2001:db8::1", "-purpose", "sslserver"],
            &["-purpose", "sslclient"],
        ] {
            let output = verify(extra);
            assert!(output.status.success(), "{extra:?}: {output:?}");
        }
        assert!(!verify(&["-verify_hostname", "other.example.net"]).status.success());
        ca.revoke(&names()).unwrap();
        ca.revocation_list().unwrap();
        let output = verify(&[]);
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("revoked"), "{output:?}");
    }
}

#[test]
fn session_secrets_go_to_the_named_file() {
    let scratch = Scratch::new();
    let path = scratch.0.join("keys.log");
    let mut command = run_as("key-log", &scratch.0);
    command.env("SSLKEYLOGFILE", &path);
    output(command);
    let log = std::fs::read_to_string(&path).unwrap();
    for label in ["CLIENT_HANDSHAKE_TRAFFIC_SECRET", "SERVER_TRAFFIC_SECRET_0"] {
        assert!(log.contains(label), "{log}");
    }
}

fn handshake(client: &ClientTls, server: &ServerTls) {
    let name = ServerName::try_from(NAME).unwrap();
    let client = quic::ClientConnection::new(client.rustls(), quic::Version::V1, name, Vec::new());
    let server = quic::ServerConnection::new(server.rustls(), quic::Version::V1, Vec::new());
    let mut ends: [quic::Connection; 2] = [client.unwrap().into(), server.unwrap().into()];
    let deadline = Instant::now() + Duration::from_secs(10);
    while ends.iter().any(|end| end.is_handshaking()) {
        assert!(Instant::now() < deadline, "the handshake hangs");
        for from in [0, 1] {
            loop {
                let mut flight = Vec::new();
                let keys = ends[from].write_hs(&mut flight).is_some();
                if !flight.is_empty() {
                    ends[1 - from].read_hs(&flight).unwrap();
                }
                if !keys && flight.is_empty() {
                    break;
                }
            }
        }
    }
}
