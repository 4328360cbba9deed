//! `stoq serve` and `stoq get` as a user meets them, over loopback sockets and without privileges.

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv6Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

const STOQ: &str = env!("CARGO_BIN_EXE_stoq");
/// Anything that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// The code with which a stream of an unknown file is reset.
const NOT_FOUND: &str = "code 4";

/// A directory of its own for each test, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("stoq-cli-{name}-{}", std::process::id()));
        std::fs::create_dir_all(path.join("www")).expect("a directory");
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("UTF-8").to_owned()
    }

    /// A file to serve, whose bytes differ everywhere.
    fn file(&self, name: &str, len: usize) -> Vec<u8> {
        let mut state = len as u32;
        let data: Vec<u8> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        std::fs::write(self.0.join("www").join(name), &data).expect("written");
        data
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A directory left behind is the system's to clean.
        let _left_behind = std::fs::remove_dir_all(&self.0);
    }
}

/// A server on a port of its own; killed when dropped.
struct Server {
    child: Child,
    lines: BufReader<ChildStdout>,
    addr: String,
}

impl Server {
    fn start(scratch: &Scratch, further: &[&str]) -> Self {
        let mut child = Command::new(STOQ)
            .args(["serve", "--listen", "[::1]:0", "--datapath", "socket", "--json"])
            .args(["--www", &scratch.path("www"), "--cert-out", &scratch.path("ca.pem")])
            .arg("--die-with-parent")
            .args(further)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        let mut server = Self { child, lines, addr: String::new() };
        let listening = server.line("listening");
        assert_eq!((&listening["datapath"], &listening["queues"]), (&"socket".into(), &1.into()));
        server.addr = listening["addr"].as_str().expect("an address").to_owned();
        server
    }

    /// The server's next line, which must tell of `event`.
    fn line(&mut self, event: &str) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("speaks");
        let line: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?}"));
        assert_eq!(line["event"], event, "{line}");
        line
    }

    fn signal(&self, signal: libc::c_int) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let signal = rustix::process::Signal::from_named_raw(signal).expect("a signal");
        rustix::process::kill_process(pid, signal).expect("alive");
    }

    fn stats(&mut self) -> Value {
        self.signal(libc::SIGUSR1);
        self.line("stats")["stats"].take()
    }

    /// Ends it as a service manager does.
    fn stop(mut self) -> Value {
        self.signal(libc::SIGTERM);
        let stopped = self.line("stopped");
        assert!(wait(&mut self.child), "SIGTERM is no failure");
        stopped
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}/{path}", self.addr)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Dead already is as good.
        let _already_dead = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn wait(child: &mut Child) -> bool {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("waits") {
            return status.success();
        }
        if start.elapsed() > PATIENCE {
            child.kill().expect("killed");
            panic!("hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn stoq(arguments: &[&str]) -> Command {
    let mut command = Command::new(STOQ);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("RUST_BACKTRACE", "0");
    command
}

fn finish(mut command: Command) -> Output {
    let mut child = command.spawn().expect("starts");
    // Outputs are short: they fit the pipes.
    wait(&mut child);
    child.wait_with_output().expect("ended")
}

/// What a command that must fail says.
fn refused(command: Command) -> String {
    let output = finish(command);
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!output.status.success() && !text.contains("panicked"), "{text}");
    text
}

fn get(scratch: &Scratch, urls: &[&str]) -> Command {
    let mut command = stoq(&["get", "--datapath", "socket", "--json"]);
    command.args(["--ca", &scratch.path("ca.pem")]).args(urls);
    command
}

fn done(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::str::from_utf8(&output.stdout).expect("UTF-8");
    let done: Value = serde_json::from_str(text.lines().last().expect("speaks")).expect("JSON");
    assert_eq!(done["event"], "done", "{done}");
    done
}

#[test]
fn files_arrive_and_everything_is_told_in_json() {
    let scratch = Scratch::new("files");
    let files = [("empty", 0), ("one", 1), ("large", 3_000_000)];
    let contents = files.map(|(name, len)| scratch.file(name, len));
    let server = Server::start(&scratch, &[]);
    let urls = files.map(|(name, _)| server.url(name));
    let out = scratch.path("out");
    std::fs::create_dir(&out).expect("a directory");
    let mut command = get(&scratch, &urls.each_ref().map(String::as_str));
    command.args(["--out", &out]);
    let done = done(&finish(command));
    for key in ["seconds", "bytes", "goodput_bps", "rtt_us_p50", "packets_lost", "udp_payload"] {
        assert!(done[key].is_number(), "{key} is missing in {done}");
    }
    assert_eq!((&done["datapath"], &done["xdp"]), (&"socket".into(), &Value::Null), "{done}");
    for (((name, len), url), (content, told)) in
        files.iter().zip(&urls).zip(contents.iter().zip(done["files"].as_array().expect("a list")))
    {
        assert_eq!((&told["url"], &told["bytes"]), (&url.as_str().into(), &(*len).into()));
        assert!(told["sha256"].as_str().is_some_and(|sum| sum.len() == 64), "{told}");
        assert!(&std::fs::read(Path::new(&out).join(name)).expect("there") == content, "{name}");
    }
    let stopped = server.stop();
    assert_eq!(stopped["stats"]["accepted"], 1, "{stopped}");
    assert!(stopped["stats"]["tx_datagrams"].as_u64() > Some(40), "{stopped}");
}

#[test]
fn sigterm_lets_a_transfer_end() {
    let scratch = Scratch::new("sigterm");
    let content = scratch.file("large", 20_000_000);
    let mut server = Server::start(&scratch, &[]);
    let out = scratch.path("out");
    std::fs::create_dir(&out).expect("a directory");
    let mut command = get(&scratch, &[&server.url("large")]);
    let mut client = command.args(["--out", &out]).spawn().expect("starts");
    let start = Instant::now();
    while server.stats()["tx_bytes"].as_u64() < Some(100_000) {
        assert!(start.elapsed() < PATIENCE, "nothing is sent");
    }
    server.stop();
    assert!(wait(&mut client), "the transfer was within the grace");
    let received = std::fs::read(Path::new(&out).join("large")).expect("there");
    assert!(received == content, "{} of {} bytes", received.len(), content.len());
}

#[test]
fn what_is_not_beneath_the_root_is_reset() {
    let scratch = Scratch::new("paths");
    scratch.file("there", 10);
    std::fs::write(scratch.0.join("secret"), "not yours").expect("written");
    std::os::unix::fs::symlink("../secret", scratch.0.join("www/link")).expect("a link");
    let server = Server::start(&scratch, &[]);
    for path in ["none", "../secret", "a/../../secret", "link", "", "."] {
        let text = refused(get(&scratch, &[&server.url(path)]));
        assert!(text.contains("no such file") && text.contains(NOT_FOUND), "{path:?}: {text}");
    }
    // Nothing is left of a file that is not there.
    let out = scratch.path("out");
    std::fs::create_dir(&out).expect("a directory");
    let mut command = get(&scratch, &[&server.url("none")]);
    command.args(["--out", &out]);
    refused(command);
    assert_eq!(std::fs::read_dir(&out).expect("a directory").count(), 0);
    // One refusal does no harm to others.
    assert_eq!(done(&finish(get(&scratch, &[&server.url("there")])))["bytes"], 10);
}

#[test]
fn keys_and_events_are_logged_when_asked() {
    let scratch = Scratch::new("logs");
    scratch.file("file", 100_000);
    let qlog = scratch.path("qlog");
    let server = Server::start(&scratch, &["--qlog-dir", &qlog]);
    let keys = scratch.path("keys");
    let mut command = get(&scratch, &[&server.url("file")]);
    command.args(["--qlog-dir", &qlog]).env("SSLKEYLOGFILE", &keys);
    done(&finish(command));
    server.stop();
    let keys = std::fs::read_to_string(keys).expect("written");
    for label in ["CLIENT_HANDSHAKE", "SERVER_HANDSHAKE", "CLIENT", "SERVER"] {
        let label = format!("{label}_TRAFFIC_SECRET");
        assert!(keys.lines().any(|line| line.starts_with(&label)), "{label} is missing:\n{keys}");
    }
    let mut sides: Vec<&str> = std::fs::read_dir(&qlog)
        .expect("made")
        .map(|file| file.expect("an entry").path())
        .inspect(|path| {
            let text = std::fs::read_to_string(path).expect("text");
            assert!(text.contains("qlog_version"), "{}: {text:.100}", path.display());
        })
        .map(|path| if path.to_string_lossy().contains("-server") { "server" } else { "client" })
        .collect();
    sides.sort_unstable();
    assert_eq!(sides, ["client", "server"]);
}

#[test]
fn whom_to_trust_must_be_said_and_is_checked() {
    let scratch = Scratch::new("trust");
    scratch.file("file", 10);
    let server = Server::start(&scratch, &[]);
    let url = server.url("file");
    let text = refused(stoq(&["get", "--datapath", "socket", &url]));
    assert!(text.contains("--ca"), "{text}");
    let other = Scratch::new("trust-other");
    let _other_server = Server::start(&other, &[]);
    let text = refused(get(&other, &[&url]));
    assert!(text.contains("certificate"), "{text}");
    let mut command = get(&scratch, &[&url]);
    command.args(["--server-name", "elsewhere.example"]);
    let text = refused(command);
    assert!(text.contains("certificate") || text.contains("name"), "{text}");
    let text = refused(stoq(&["get", "--datapath", "socket", "--ca", "/nowhere.pem", &url]));
    assert!(text.contains("/nowhere.pem"), "{text}");
    assert_eq!(done(&finish(get(&scratch, &[&url])))["bytes"], 10);
}

#[test]
fn settings_are_checked_before_anything_starts() {
    let scratch = Scratch::new("settings");
    let file = scratch.path("stoq.toml");
    let serve = |further: &[&str]| {
        let mut command = stoq(&["serve", "--listen", "[::1]:0", "--datapath", "socket"]);
        command.args(further);
        refused(command)
    };
    std::fs::write(&file, "idle_timeout_ms = 5\nmax_streams = 3\n").expect("written");
    let text = serve(&["--config", &file]);
    assert!(text.contains("max_streams") && text.contains("line 2"), "{text}");
    std::fs::write(&file, "spin_us = 2000000\n").expect("written");
    let text = serve(&["--config", &file]);
    assert!(text.contains("spin_us") && text.contains("0 to 1000000"), "{text}");
    for bytes in ["1199", "65528"] {
        let text = serve(&["--udp-payload", bytes]);
        assert!(text.contains("mtu_upper_bound_bytes") && text.contains(bytes), "{text}");
    }
    assert!(serve(&["--udp-payload", "70000"]).contains("70000"));
    assert!(serve(&["--www", "/nowhere"]).contains("/nowhere"));
    assert!(serve(&["--key", &file]).contains("--cert"));
}

#[test]
fn the_smallest_and_the_largest_udp_payload_work() {
    let scratch = Scratch::new("payload");
    scratch.file("file", 2_000_000);
    for (payload, least) in [("1200", 1200), ("65527", 1500)] {
        let server = Server::start(&scratch, &["--udp-payload", payload]);
        let mut command = get(&scratch, &[&server.url("file")]);
        command.args(["--udp-payload", payload]);
        let done = done(&finish(command));
        assert_eq!(done["bytes"], 2_000_000);
        let found = done["udp_payload"].as_u64();
        assert!(found <= payload.parse().ok() && found >= Some(least), "{payload}: {done}");
    }
}

/// Carries datagrams between one client and a server, and sends the server damaged copies of the
/// client's, and things that were never QUIC.
fn damage(server: &str, stop: Arc<AtomicBool>) -> (String, std::thread::JoinHandle<u64>) {
    let front = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("a socket");
    let back = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("a socket");
    let stranger = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("a socket");
    back.connect(server).expect("an address");
    stranger.connect(server).expect("an address");
    front.set_nonblocking(true).expect("supported");
    back.set_nonblocking(true).expect("supported");
    let addr = front.local_addr().expect("bound").to_string();
    let thread = std::thread::spawn(move || {
        let (mut buffer, mut client, mut copies) = (vec![0; 65_535], None, 0_u64);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        while !stop.load(Ordering::Relaxed) {
            let mut idle = true;
            while let Ok((len, from)) = front.recv_from(&mut buffer) {
                (idle, client) = (false, Some(from));
                let packet = &mut buffer[..len];
                // A full socket buffer drops: QUIC repeats.
                let _dropped = back.send(packet);
                for damaged in damaged_copies(packet, &mut random) {
                    copies += u64::from(back.send(&damaged).is_ok());
                }
                for nonsense in nonsense(&mut random) {
                    copies += u64::from(stranger.send(&nonsense).is_ok());
                }
            }
            while let (Ok(len), Some(client)) = (back.recv(&mut buffer), client) {
                idle = false;
                let _dropped = front.send_to(&buffer[..len], client);
            }
            if idle {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        copies
    });
    (addr, thread)
}

fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

/// Truncated, and corrupted at a random place behind the connection ID.
fn damaged_copies(packet: &[u8], random: &mut u64) -> [Vec<u8>; 2] {
    let cut = 1 + next(random) as usize % packet.len().max(2) / 2;
    let mut corrupted = packet.to_vec();
    let place = next(random) as usize % corrupted.len();
    corrupted[place] ^= 1 << (next(random) % 8);
    [packet[..cut.min(packet.len())].to_vec(), corrupted]
}

/// Random bytes, a version that nobody speaks, and an Initial that nobody sealed.
fn nonsense(random: &mut u64) -> [Vec<u8>; 3] {
    let mut noise: Vec<u8> = (0..next(random) % 60).map(|_| next(random) as u8).collect();
    noise.insert(0, 0x40);
    let long = |version: u32, random: &mut u64| {
        let mut packet: Vec<u8> = (0..1200).map(|_| next(random) as u8).collect();
        packet[0] = 0xc3;
        packet[1..5].copy_from_slice(&version.to_be_bytes());
        // Connection IDs of eight bytes, no token, the rest is payload.
        (packet[5], packet[14], packet[23]) = (8, 8, 0);
        packet[24..26].copy_from_slice(&(0x4000 | (1200_u16 - 26)).to_be_bytes());
        packet
    };
    [noise, long(0x1a2a_3a4a, random), long(1, random)]
}

#[test]
fn malformed_packets_are_counted_and_do_no_harm() {
    let scratch = Scratch::new("malformed");
    let content = scratch.file("large", 8_000_000);
    let mut server = Server::start(&scratch, &[]);
    let before = server.stats();
    let stop = Arc::new(AtomicBool::new(false));
    let (addr, thread) = damage(&server.addr, stop.clone());
    let out = scratch.path("out");
    std::fs::create_dir(&out).expect("a directory");
    let mut command = get(&scratch, &[&format!("https://{addr}/large")]);
    command.args(["--out", &out, "--udp-payload", "1400"]);
    let output = finish(command);
    stop.store(true, Ordering::Relaxed);
    let copies = thread.join().expect("no panic");
    assert_eq!(done(&output)["bytes"], 8_000_000);
    assert!(std::fs::read(Path::new(&out).join("large")).expect("there") == content);
    assert!(copies > 100, "only {copies} packets were malformed");
    let after = server.stats();
    let grew = |key: &str| after[key].as_u64().expect(key) - before[key].as_u64().expect(key);
    assert!(grew("rx_drop_protocol") > 10, "{after}");
    // Version negotiation and stateless resets.
    assert!(grew("tx_stateless") > 10, "{after}");
    assert_eq!(grew("accepted"), 1, "nothing malformed became a connection: {after}");
    server.stop();
}

#[test]
fn an_unreadable_stdout_ends_the_client_and_not_the_server() {
    let scratch = Scratch::new("stdout");
    scratch.file("file", 10);
    let server = Server::start(&scratch, &[]);
    let mut child = get(&scratch, &[&server.url("file")]).spawn().expect("starts");
    drop(child.stdout.take());
    assert!(!wait(&mut child), "nobody got the result");
    let mut text = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut text).expect("UTF-8");
    assert!(!text.contains("panicked"), "{text}");
    assert_eq!(done(&finish(get(&scratch, &[&server.url("file")])))["bytes"], 10);
}
