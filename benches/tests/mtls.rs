//! Mutual TLS, revocation, pinned roots, ages of connections and metrics, through the binary over loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
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
            "stoq-mtls-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        std::fs::create_dir(&path).expect("a new directory");
        std::fs::create_dir(path.join("www")).expect("made");
        std::fs::write(path.join("www/hello"), "hello\n").expect("written");
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

/// A server that announced its addresses; killed when dropped.
struct Server {
    child: Child,
    out: BufReader<ChildStdout>,
    address: String,
    metrics: String,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(STOQ)
            .args(arguments)
            .args(["--metrics", "[::1]:0", "--json", "--die-with-parent"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let mut server = Self { child, out, address: String::new(), metrics: String::new() };
        let event = server.line("listening");
        server.address = event["addr"].as_str().expect("an address").to_owned();
        server.metrics = event["metrics"].as_str().expect("an address").to_owned();
        server
    }

    fn serve(scratch: &Scratch, further: &[&str]) -> Self {
        let (www, root) = (scratch.file("www"), scratch.file("server-root.pem"));
        let fixed = ["serve", "--listen", "[::1]:0", "--datapath", "socket", "--www", &www];
        Self::start(&[&fixed[..], &["--cert-out", &root], further].concat())
    }

    fn line(&mut self, event: &str) -> Value {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("speaks");
        let line: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?}"));
        assert_eq!(line["event"], event, "{line}");
        line
    }

    fn stats(&mut self) -> Value {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::USR1).expect("alive");
        self.line("stats")
    }

    /// `stoq_certificate_faults_total` as Prometheus reads it.
    fn faults(&self, by: &str, fault: &str) -> u64 {
        let text = self.scrape();
        let line = format!("stoq_certificate_faults_total{{by=\"{by}\",fault=\"{fault}\"}} ");
        let value = text.lines().find_map(|each| each.strip_prefix(line.as_str()));
        let value = value.unwrap_or_else(|| panic!("{line} is not in\n{text}"));
        value.parse().expect("a number")
    }

    fn scrape(&self) -> String {
        let mut stream = TcpStream::connect(&self.metrics).expect("listens");
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            .expect("asked");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("answered");
        text
    }

    fn get(&self, further: &[&str]) -> Output {
        let url = format!("https://{}/hello", self.address);
        run(&[&["get", &url, "--datapath", "socket"], further].concat())
    }

    /// The file is fetched.
    fn serves(&self, further: &[&str]) {
        let output = self.get(further);
        assert!(output.status.success(), "{further:?}: {output:?}");
    }

    /// The file is not fetched; why.
    fn refuses(&self, further: &[&str]) -> String {
        words(further, self.get(further))
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

fn words(arguments: &[&str], output: Output) -> String {
    assert!(!output.status.success(), "{arguments:?} was not refused");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn refusal(arguments: &[&str]) -> String {
    words(arguments, run(arguments))
}

fn stdout(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A CA that serves, its root in `root.pem`.
fn ca(scratch: &Scratch) -> Server {
    let ca = Server::start(&["ca", "serve", "--dir", &scratch.file("ca"), "--listen", "[::1]:0"]);
    let root = stdout(&["ca", "root", "--dir", &scratch.file("ca")]);
    std::fs::write(scratch.file("root.pem"), root).expect("written");
    ca
}

/// Key and certificate of a client, in one file.
fn enrol(scratch: &Scratch, ca: &Server, id: &str) -> String {
    let (dir, root) = (scratch.file("ca"), scratch.file("root.pem"));
    let (token, store) = (scratch.file("token"), scratch.file(&format!("{id}.pem")));
    std::fs::write(&token, stdout(&["ca", "token", "--dir", &dir, "--client-id", id])).expect("ok");
    let place = ["--ca-connect", &ca.address, "--ca-root", &root, "--ca-store", &store];
    let arguments =
        [&["ca", "enrol", "--client-id", id, "--ca-token-file", &token, "--json"], &place[..]];
    let first: Value = serde_json::from_str(&stdout(&arguments.concat())).expect("JSON");
    // Again: the token is spent, what is stored serves.
    let again: Value = serde_json::from_str(&stdout(&arguments.concat())).expect("JSON");
    assert_eq!(first["serial"], again["serial"], "{again}");
    store
}

#[test]
fn clients_show_certificates_until_they_are_revoked() {
    let scratch = Scratch::new();
    let ca = ca(&scratch);
    let probe = enrol(&scratch, &ca, "probe-7");
    let (roots, list) = (scratch.file("root.pem"), scratch.file("ca/ca/crl.pem"));
    let mut server =
        Server::serve(&scratch, &["--client-ca", &roots, "--client-crl", &list, "--names", "n"]);
    let trust = ["--ca", &scratch.file("server-root.pem")];
    let shown = [&trust[..], &["--cert", &probe, "--key", &probe]].concat();
    server.serves(&shown);
    let anonymous = server.refuses(&trust);
    assert!(anonymous.contains("sent no certificate"), "{anonymous}");
    assert_eq!(
        (server.faults("server", "no_certificate"), server.faults("server", "revoked")),
        (1, 0)
    );
    let optional = ["--client-ca", &roots, "--client-auth", "optional"];
    let elsewhere = Scratch::new();
    let lenient = Server::serve(&elsewhere, &optional);
    lenient.serves(&["--ca", &elsewhere.file("server-root.pem")]);
    drop(lenient);
    // The list changes under the server, which reads it again.
    stdout(&["ca", "revoke", "--dir", &scratch.file("ca"), "--client-id", "probe-7"]);
    let start = Instant::now();
    let revoked = loop {
        let output = server.get(&shown);
        if !output.status.success() {
            break String::from_utf8(output.stderr).expect("UTF-8");
        }
        assert!(start.elapsed() < PATIENCE, "a revoked client is served on");
        std::thread::sleep(Duration::from_millis(200));
    };
    assert!(revoked.contains("revoked"), "{revoked}");
    assert_eq!(server.faults("server", "revoked"), 1);
    let stats = server.stats();
    assert_eq!(stats["faults"]["server"]["revoked"], 1, "{stats}");
    let certificate = &stats["certificate"];
    for date in ["not_before_unix_s", "not_after_unix_s", "next_renewal_unix_s"] {
        assert!(certificate[date].as_u64().is_some_and(|at| at > 1_700_000_000), "{stats}");
    }
    let text = server.scrape();
    let serial = certificate["serial"].as_str().expect("served");
    assert!(text.contains(&format!("stoq_certificate_info{{serial=\"{serial}\"}} 1")), "{text}");
    assert!(certificate["last_error"].is_null() && !text.contains("last_error"), "{stats}");
}

#[test]
fn a_stolen_token_shows_in_the_metrics_of_the_ca() {
    let scratch = Scratch::new();
    let ca = ca(&scratch);
    enrol(&scratch, &ca, "probe-7");
    let (root, token, loot) =
        (scratch.file("root.pem"), scratch.file("token"), scratch.file("loot.pem"));
    let stolen = refusal(&[
        "ca",
        "enrol",
        "--client-id",
        "probe-7",
        "--ca-token-file",
        &token,
        "--ca-connect",
        &ca.address,
        "--ca-root",
        &root,
        "--ca-store",
        &loot,
    ]);
    assert!(stolen.contains("certified somebody already"), "{stolen}");
    assert!(!Path::new(&loot).exists(), "nothing is written for a thief");
    assert_eq!(ca.faults("trustchain", "token_spent"), 1);
}

/// Tokens that were used.
fn spent(tokens: &Path) -> usize {
    let entries = std::fs::read_dir(tokens).expect("listed").map(|entry| entry.expect("listed"));
    entries.filter(|entry| entry.path().extension().is_some_and(|one| one == "spent")).count()
}

/// Killed (SIGKILL) while nodes enrol, the CA starts again on what it has: each certificate that arrived is
/// in its books, a token whose answer was lost is spent, one that was not taken is good.
#[test]
fn a_ca_killed_while_nodes_enrol_keeps_its_books_and_tokens() {
    let scratch = Scratch::new();
    let mut ca = ca(&scratch);
    let (dir, root, address) = (scratch.file("ca"), scratch.file("root.pem"), ca.address.clone());
    let (mut again, mut anew) = (0, 0);
    for round in 0..3_u64 {
        let ids: Vec<String> = (0..4).map(|node| format!("r{round}n{node}")).collect();
        let enrol = |id: &str, timeout_s: &str| -> Vec<String> {
            let (token, store) = (scratch.file(&format!("{id}.token")), scratch.file(id));
            let flags = [
                "ca",
                "enrol",
                "--client-id",
                id,
                "--ca-timeout-s",
                timeout_s,
                "--ca-connect",
                &address,
                "--ca-root",
            ];
            let rest = [&root, "--ca-token-file", &token, "--ca-store", &store, "--json"];
            flags.iter().chain(&rest).map(ToString::to_string).collect()
        };
        let give_token = |id: &str| {
            let token = stdout(&["ca", "token", "--dir", &dir, "--client-id", id]);
            std::fs::write(scratch.file(&format!("{id}.token")), token).expect("written");
        };
        ids.iter().for_each(|id| give_token(id));
        let spent_before = spent(Path::new(&scratch.file("ca/tokens")));
        let start = |id: &String| {
            let mut command = Command::new(STOQ);
            let command =
                command.args(enrol(id, "3")).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().expect("starts")
        };
        let enrolling: Vec<Child> = ids.iter().map(start).collect();
        // Once a token is spent: certificates are being made, and none, or not all, have left.
        let begun = Instant::now();
        while spent(Path::new(&scratch.file("ca/tokens"))) <= spent_before {
            assert!(begun.elapsed() < PATIENCE, "nobody enrols");
            std::hint::spin_loop();
        }
        drop(ca);
        ca = Server::start(&["ca", "serve", "--dir", &dir, "--listen", &address]);
        for (id, child) in ids.iter().zip(enrolling) {
            let mut output = child.wait_with_output().expect("ended");
            if !output.status.success() {
                assert!(!Path::new(&scratch.file(id)).exists(), "{id}: half a certificate");
                again += 1;
                let same = enrol(id, "20");
                output = run(&same.iter().map(String::as_str).collect::<Vec<_>>());
            }
            if !output.status.success() {
                anew += 1;
                let why = String::from_utf8_lossy(&output.stderr);
                assert!(why.contains("certified somebody already"), "{why}");
                give_token(id);
                let fresh = enrol(id, "20");
                output = run(&fresh.iter().map(String::as_str).collect::<Vec<_>>());
            }
            assert!(output.status.success(), "{id}: {output:?}");
            let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            let books = std::fs::read_to_string(scratch.file("ca/ca/state.toml")).expect("kept");
            let serial = told["serial"].as_str().expect("certified");
            assert!(books.contains(serial), "{id}: {serial} is in no book");
        }
    }
    println!("of 12 enrolments {again} were tried again, {anew} with another token");
}

#[test]
fn a_pinned_server_needs_its_own_root() {
    let scratch = Scratch::new();
    let _ca = ca(&scratch);
    let server = Server::serve(&scratch, &[]);
    let (right, other) = (scratch.file("server-root.pem"), scratch.file("root.pem"));
    let pin = |root: &str| format!("::1={root}");
    server.serves(&["--pin", &pin(&right)]);
    server.serves(&["--ca", &other, "--pin", &pin(&right)]);
    let refused = server.refuses(&["--ca", &right, "--pin", &pin(&other)]);
    assert!(refused.contains("does not end at a trusted root"), "{refused}");
    let elsewhere = server.refuses(&["--pin", &format!("localhost={right}")]);
    assert!(elsewhere.contains("does not end at a trusted root"), "{elsewhere}");
    // A pin is a pin for each name.
    server.serves(&["--server-name", "localhost", "--pin", &format!("localhost={right}")]);
}

#[test]
fn connections_end_at_their_age() {
    let scratch = Scratch::new();
    let server = Server::serve(&scratch, &["--max-connection-age-s", "1"]);
    let root = scratch.file("server-root.pem");
    server.serves(&["--ca", &root]);
    let perf = ["perf", "download", "--connect", &server.address, "--ca", &root];
    let ended = refusal(&[&perf[..], &["--seconds", "30", "--datapath", "socket"]].concat());
    assert!(ended.contains("connection age limit reached"), "{ended}");
}

#[test]
fn post_quantum_can_be_required_at_both_ends() {
    let scratch = Scratch::new();
    let server = Server::serve(&scratch, &["--require-post-quantum"]);
    let root = scratch.file("server-root.pem");
    server.serves(&["--ca", &root]);
    server.serves(&["--ca", &root, "--require-post-quantum"]);
}

#[test]
fn each_flag_is_explained_and_each_misuse_has_its_own_words() {
    for (command, flags) in [
        (
            &["serve"][..],
            &[
                "--client-ca",
                "--client-crl",
                "--client-auth",
                "--max-connection-age-s",
                "--metrics",
                "--require-post-quantum",
            ][..],
        ),
        (&["get"], &["--cert", "--key", "--pin", "--crl", "--require-post-quantum"]),
        (&["perf", "download"], &["--cert", "--key", "--pin", "--crl", "--require-post-quantum"]),
        (&["ca", "enrol"], &["--ca-store", "--client-id", "--ca-token-file"]),
    ] {
        let help = stdout(&[command, &["--help"]].concat());
        for flag in flags {
            assert!(help.contains(flag), "{flag} is not in\n{help}");
        }
    }
    let scratch = Scratch::new();
    let ca = ca(&scratch);
    let probe = enrol(&scratch, &ca, "probe-7");
    let (root, list) = (scratch.file("root.pem"), scratch.file("ca/ca/crl.pem"));
    let serve = |further: &[&str]| {
        refusal(&[&["serve", "--listen", "[::1]:0", "--datapath", "socket"], further].concat())
    };
    let get = |further: &[&str]| refusal(&[&["get", "https://[::1]:1/x"], further].concat());
    assert!(serve(&["--client-crl", &list]).contains("--client-ca"));
    assert!(serve(&["--client-auth", "optional"]).contains("--client-ca"));
    assert!(serve(&["--client-ca", "/nowhere"]).contains("cannot open /nowhere"));
    let age = serve(&["--max-connection-age-s", "99999999999"]);
    assert!(age.contains("connection_age_ms_max"), "{age}");
    let cut = scratch.file("cut.pem");
    let text = std::fs::read_to_string(&list).expect("there");
    std::fs::write(&cut, &text[..text.len() / 2]).expect("written");
    let short = serve(&["--client-ca", &root, "--client-crl", &cut]);
    assert!(short.contains("cut short"), "{short}");
    assert!(get(&["--ca", &root, "--cert", &probe]).contains("--key"));
    assert!(get(&["--ca", &root, "--pin", "::1"]).contains("must be NAME=FILE"));
    assert!(get(&["--pin", &format!("a b={root}")]).contains("no DNS name"));
    assert!(get(&["--pin", "::1=/nowhere"]).contains("cannot open /nowhere"));
    assert!(get(&[]).contains("whom to trust?"));
    let open = scratch.file("open.pem");
    std::fs::copy(&probe, &open).expect("copied");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&open, mode).expect("set");
    let leaked = get(&["--ca", &root, "--cert", &open, "--key", &open]);
    assert!(leaked.contains("can be read by others"), "{leaked}");
    let storeless =
        refusal(&["ca", "enrol", "--ca-connect", "[::1]:1", "--ca-root", &root, "--names", "a.b"]);
    assert!(storeless.contains("--ca-store"), "{storeless}");
}
