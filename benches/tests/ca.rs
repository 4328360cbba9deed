//! `stoq ca` and a node that enrols with it, as processes over loopback.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

const STOQ: &str = env!("CARGO_BIN_EXE_stoq");
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory of one test, removed whatever happens.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = std::env::temp_dir().join(format!(
            "stoq-ca-cli-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::create_dir(&path).expect("a new directory");
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir_all(&self.0);
        if !std::thread::panicking() {
            removed.expect("removed");
        }
    }
}

/// A server that announced its address; killed when dropped.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(STOQ)
            .args(arguments)
            .args(["--json", "--die-with-parent"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("speaks");
        let event: Value = serde_json::from_str(&line).unwrap_or_else(|_| {
            panic!("{arguments:?} announced {line:?}");
        });
        assert_eq!(event["event"], "listening", "{event}");
        let address = event["addr"].as_str().expect("an address").to_owned();
        Self { child, address }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Dead already is as good.
        let _already_dead = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn run(arguments: &[&str]) -> Output {
    let mut child = Command::new(STOQ)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let start = Instant::now();
    while child.try_wait().expect("waits").is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().expect("killed");
            panic!("hangs: {arguments:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().expect("ended")
}

fn stdout(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn refusal(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(!output.status.success(), "{arguments:?} was not refused");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn serial_of(path: &str) -> String {
    let mut text = String::new();
    std::fs::File::open(path).expect("stored").read_to_string(&mut text).expect("UTF-8");
    text
}

#[test]
fn a_node_enrols_serves_and_restarts_with_what_it_has() {
    enrols_serves_and_restarts("ecdsa-p256");
}

#[test]
fn so_does_one_with_post_quantum_certificates() {
    enrols_serves_and_restarts("ml-dsa-65");
}

fn enrols_serves_and_restarts(key: &str) {
    let scratch = Scratch::new();
    let (dir, token_file) = (scratch.file("ca"), scratch.file("token"));
    let (root, store) = (scratch.file("root.pem"), scratch.file("node.pem"));
    let www = scratch.file("www");
    std::fs::create_dir(&www).expect("made");
    std::fs::write(Path::new(&www).join("hello"), "hello, node\n").expect("written");
    let listen = ["ca", "serve", "--dir", &dir, "--listen", "[::1]:0"];
    let ca = Server::start(&[&listen[..], &["--key-algorithm", key]].concat());
    std::fs::write(&root, stdout(&["ca", "root", "--dir", &dir])).expect("written");
    let json = stdout(&["ca", "token", "--dir", &dir, "--names", "localhost,::1", "--json"]);
    let json: Value = serde_json::from_str(&json).expect("JSON");
    std::fs::write(&token_file, json["token"].as_str().expect("a token")).expect("written");
    let node = |listen: &'static str| {
        [
            "serve",
            "--listen",
            listen,
            "--datapath",
            "socket",
            "--www",
            &www,
            "--ca-connect",
            &ca.address,
            "--ca-root",
            &root,
            "--ca-token-file",
            &token_file,
            "--ca-store",
            &store,
            "--key-algorithm",
            key,
        ]
        .map(str::to_owned)
    };
    let serve = node("[::1]:0");
    let arguments: Vec<&str> = serve.iter().map(String::as_str).collect();
    let server = Server::start(&arguments);
    let url = format!("https://{}/hello", server.address);
    let out = scratch.file("out");
    std::fs::create_dir(&out).expect("made");
    stdout(&["get", &url, "--ca", &root, "--out", &out, "--datapath", "socket"]);
    let fetched = std::fs::read_to_string(Path::new(&out).join("hello")).expect("fetched");
    assert_eq!(fetched, "hello, node\n");
    // A restart takes what is stored: the token is spent, and the CA is away.
    let stored = serial_of(&store);
    drop(server);
    let address = ca.address.clone();
    drop(ca);
    let again: Vec<String> = serve
        .iter()
        .map(|argument| match argument == &address {
            true => address.clone(),
            false => argument.clone(),
        })
        .collect();
    let arguments: Vec<&str> = again.iter().map(String::as_str).collect();
    let server = Server::start(&arguments);
    let url = format!("https://{}/hello", server.address);
    stdout(&["get", &url, "--ca", &root, "--out", &out, "--datapath", "socket"]);
    assert_eq!(serial_of(&store), stored);
}

#[test]
fn each_misuse_of_a_ca_has_its_own_words() {
    let scratch = Scratch::new();
    let (dir, token_file, root) =
        (scratch.file("ca"), scratch.file("token"), scratch.file("root.pem"));
    assert!(refusal(&["ca", "root", "--dir", &dir]).contains("stoq ca serve"));
    assert!(refusal(&["ca", "token", "--dir", &dir, "--names", "a.example"]).contains("no CA"));
    let ca = Server::start(&["ca", "serve", "--dir", &dir, "--listen", "[::1]:0"]);
    // Two processes on one directory.
    let second = refusal(&["ca", "serve", "--dir", &dir, "--listen", "[::1]:0"]);
    assert!(second.contains("in use by another process"), "{second}");
    let revoke = ["ca", "revoke", "--dir", &dir, "--names", "localhost,::1"];
    assert!(refusal(&["ca", "revoke", "--dir", &root, "--names", "a.example"]).contains("no CA"));
    assert!(refusal(&["ca", "token", "--dir", &dir]).contains("--names"));
    std::fs::write(&root, stdout(&["ca", "root", "--dir", &dir])).expect("written");
    let token = stdout(&["ca", "token", "--dir", &dir, "--names", "localhost,::1"]);
    std::fs::write(&token_file, token).expect("written");
    let enrol = [
        "serve",
        "--listen",
        "[::1]:0",
        "--datapath",
        "socket",
        "--ca-connect",
        &ca.address,
        "--ca-root",
        &root,
        "--ca-token-file",
        &token_file,
    ];
    drop(Server::start(&enrol));
    // Revoked while the CA serves, which goes on; then there is nobody left to revoke.
    let revoke = [&revoke[..], &["--json"]].concat();
    let revoked: Value = serde_json::from_str(&stdout(&revoke)).expect("JSON");
    // The service's own certificate carries the same names.
    assert_eq!(revoked["revoked"].as_array().expect("a list").len(), 2, "{revoked}");
    let revoked: Value = serde_json::from_str(&stdout(&revoke)).expect("JSON");
    assert!(revoked["revoked"].as_array().expect("a list").is_empty(), "{revoked}");
    // The token again, by somebody who found it.
    let stolen = refusal(&enrol);
    assert!(stolen.contains("certified somebody already"), "{stolen}");
    // A root of another CA.
    let other_dir = scratch.file("other");
    drop(Server::start(&["ca", "serve", "--dir", &other_dir, "--listen", "[::1]:0"]));
    std::fs::write(&root, stdout(&["ca", "root", "--dir", &other_dir])).expect("written");
    let token = stdout(&["ca", "token", "--dir", &dir, "--names", "localhost,::1"]);
    std::fs::write(&token_file, token).expect("written");
    let false_root = refusal(&enrol);
    assert!(false_root.contains("does not end at a trusted root"), "{false_root}");
    // Stopped, its certificates can be revoked, too: the service's own of the next start.
    drop(ca);
    drop(Server::start(&["ca", "serve", "--dir", &dir, "--listen", "[::1]:0"]));
    let revoked: Value = serde_json::from_str(&stdout(&revoke)).expect("JSON");
    assert_eq!(revoked["revoked"].as_array().expect("a list").len(), 1, "{revoked}");
}
