//! Every workload of `stoq perf` over loopback sockets: it works, counts, and says so in the
//! agreed keys.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const STOQ: &str = env!("CARGO_BIN_EXE_stoq");
/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server on a port of its own; killed when dropped.
struct Server {
    child: Child,
    /// Its further lines; a closed pipe would end it.
    lines: BufReader<ChildStdout>,
    addr: String,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(STOQ)
            .args(arguments)
            .args(["--datapath", "socket", "--json", "--die-with-parent"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut line = String::new();
        let mut lines = BufReader::new(child.stdout.take().expect("piped"));
        lines.read_line(&mut line).expect("speaks");
        let line: Value = serde_json::from_str(&line).expect("JSON");
        let addr = line["addr"].as_str().expect("an address").to_owned();
        Self { child, lines, addr }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Dead already is as good.
        let _already_dead = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The last line of a client.
fn perf(server: &Server, arguments: &[&str]) -> Value {
    let pid = server.child.id().to_string();
    let mut child = Command::new(STOQ)
        .arg("perf")
        .args(arguments)
        .args(["--connect", &server.addr, "--danger-insecure", "--datapath", "socket", "--json"])
        .args(["--seconds", "0.5", "--warm-up", "0.2", "--server-pid", &pid])
        .stdout(Stdio::piped())
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
    let output = child.wait_with_output().expect("ended");
    assert!(output.status.success(), "{arguments:?} failed");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let done = serde_json::from_str(text.lines().last().expect("speaks")).expect("JSON");
    check_keys(&done);
    done
}

fn check_keys(done: &Value) {
    for key in
        ["seconds", "bytes", "goodput_bps", "ops", "ops_per_s", "packets_lost", "udp_payload"]
    {
        assert!(done[key].is_number(), "{key} is missing in {done}");
    }
    assert_eq!((&done["stack"], &done["link"]), (&"stoq".into(), &"lo".into()), "{done}");
    assert!(done["mtu"].as_u64() >= Some(1280), "{done}");
    for end in ["client", "server"] {
        for key in ["cpu_user_s", "cpu_sys_s", "rss_bytes"] {
            assert!(done[end][key].is_number(), "{end}.{key} is missing in {done}");
        }
        assert_eq!(done[end]["cpu_s_per_gb"].is_number(), done["bytes"] != 0, "{done}");
    }
}

fn assert_latencies(done: &Value) {
    let us = |key: &str| done["latency_us"][key].as_f64().unwrap_or_default();
    assert!(us("p50") > 0.0 && us("p50") <= us("p99") && us("p99") <= us("p999"), "{done}");
}

#[test]
fn bulk_in_every_direction() {
    let server = Server::start(&["serve", "--listen", "[::1]:0"]);
    for workload in ["upload", "download", "bidi"] {
        let done = perf(&server, &[workload, "--connections", "2", "--streams", "3"]);
        assert_eq!(done["workload"], workload);
        assert!(done["bytes"].as_u64() > Some(1 << 20), "{done}");
        assert!(done["latency_us"].is_null(), "{done}");
    }
}

#[test]
fn requests_in_a_closed_loop_and_at_a_rate() {
    let server = Server::start(&["serve", "--listen", "[::1]:0"]);
    let closed = perf(&server, &["requests", "--size", "100", "--outstanding", "4"]);
    let ops = closed["ops"].as_u64().expect("a number");
    assert!(ops > 10, "{closed}");
    assert_latencies(&closed);
    // Requests and answers; those under way at the ends of the clock blur the number.
    let bytes = closed["bytes"].as_u64().expect("a number");
    assert!(bytes.abs_diff(ops * 200) <= 8 * 200, "{closed}");

    let paced = perf(&server, &["requests", "--rate", "100", "--outstanding", "4"]);
    let ops = paced["ops"].as_u64().expect("a number");
    assert!((1..200).contains(&ops), "100 a second for half a second: {paced}");
    assert_latencies(&paced);
}

#[test]
fn the_server_with_handles_does_the_same() {
    let server = Server::start(&["serve", "--listen", "[::1]:0", "--handles"]);
    for workload in ["upload", "download", "bidi"] {
        assert!(perf(&server, &[workload])["bytes"].as_u64() > Some(1_000_000), "{workload}");
    }
    let done = perf(&server, &["requests", "--connections", "3", "--outstanding", "4"]);
    assert!(done["ops"].as_u64() > Some(10), "{done}");
    assert_latencies(&done);
}

#[test]
fn full_handshakes_use_no_ticket_and_resumed_ones_do() {
    let server = Server::start(&["serve", "--listen", "[::1]:0"]);
    let full = perf(&server, &["handshakes", "--outstanding", "4"]);
    assert!(full["ops"].as_u64() > Some(2), "{full}");
    assert_eq!(full["tickets_offered"], 0);
    assert_latencies(&full);
    let resumed = perf(&server, &["handshakes", "--resumed", "--outstanding", "4"]);
    assert_eq!(resumed["workload"], "handshakes-resumed");
    let ops = resumed["ops"].as_u64().expect("a number");
    assert!(ops > 2 && resumed["tickets_offered"].as_u64() >= Some(ops), "{resumed}");
}

#[test]
fn datagrams_that_the_server_has_counted() {
    let server = Server::start(&["serve", "--listen", "[::1]:0"]);
    let fast = perf(&server, &["datagrams", "--size", "1000"]);
    let ops = fast["ops"].as_u64().expect("a number");
    assert!(ops > 64, "{fast}");
    assert_eq!(fast["bytes"].as_u64(), Some(ops * 1000));
    assert_latencies(&fast);
    let paced = perf(&server, &["datagrams", "--size", "1200", "--rate", "2000"]);
    let ops = paced["ops"].as_u64().expect("a number");
    assert!((1..3000).contains(&ops), "2000 a second for half a second: {paced}");
}

#[test]
fn raw_datagrams() {
    let receive = ["perf", "raw", "--receive", "--listen", "[::1]:0"];
    let mut server = Server::start(&receive);
    let sent = Command::new(STOQ)
        .args(["perf", "raw", "--peer", &server.addr, "--datapath", "socket", "--json"])
        .args(["--seconds", "0.3", "--payload", "1200"])
        .output()
        .expect("runs");
    assert!(sent.status.success(), "{sent:?}");
    let text = String::from_utf8(sent.stdout).expect("UTF-8");
    let done: Value = serde_json::from_str(text.lines().last().expect("speaks")).expect("JSON");
    assert!(done["packets"].as_u64() > Some(0) && done["udp_payload"] == 1200, "{done}");
    let mut line = String::new();
    server.lines.read_line(&mut line).expect("speaks");
    let received: Value = serde_json::from_str(&line).expect("JSON");
    assert!(received["packets"].as_u64() <= done["packets"].as_u64(), "{received}");
    assert!(received["goodput_bps"].as_f64() > Some(0.0), "{received}");
    assert_eq!((&received["ops"], &done["ops"]), (&received["packets"], &done["packets"]));
    // Half a second of silence follows, which is no part of it, whatever it costs.
    let cpu = |key: &str| received["client"][key].as_f64().expect("a number");
    let seconds = received["seconds"].as_f64().expect("a number");
    assert!(cpu("cpu_user_s") + cpu("cpu_sys_s") < seconds + 0.2, "{received}");
    assert!(server.child.wait().expect("ends by itself").success());
}
