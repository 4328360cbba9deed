//! The `stoq` command as a user meets it where AF_XDP cannot start, and where its process dies.
//! Needs root.

#[path = "../../engine/tests/common/netns.rs"]
#[allow(dead_code, unreachable_pub)] // each test file uses its own part
mod netns;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netns::{Netns, veth, veth_with_queues};

const STOQ: &str = env!("CARGO_BIN_EXE_stoq");
const PATIENCE: Duration = Duration::from_secs(30);

fn inside(host: &Netns, arguments: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", host.name(), STOQ]).args(arguments);
    command
}

/// The one clear line of a command that must not start.
fn refused(mut command: Command) -> String {
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .env("RUST_BACKTRACE", "0")
        .spawn()
        .expect("starts");
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("waits") {
            break status;
        }
        if start.elapsed() > PATIENCE {
            child.kill().expect("killed");
            panic!("hangs: {command:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut text = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut text).expect("UTF-8");
    assert!(!status.success(), "started: {command:?}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

/// A server that listens; killed when dropped.
struct Server(Child);

impl Server {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("starts");
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("speaks");
        assert!(line.contains("listening"), "{line:?}");
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Dead already is as good.
        let _already_dead = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn pair(label: &str) -> (Netns, Netns) {
    let (left, right) = (Netns::new(label), Netns::new(label));
    veth((&left, "veth0"), (&right, "veth0"));
    left.add_address("veth0", "fd53:2::1/64");
    right.add_address("veth0", "fd53:2::2/64");
    (left, right)
}

fn serve<'a>(iface: &'a str, listen: &'a str) -> Vec<&'a str> {
    vec!["serve", "--datapath", "af_xdp", "--iface", iface, "--listen", listen, "--json"]
}

fn has_xdp(host: &Netns) -> bool {
    host.ip("link show veth0").contains("xdp")
}

#[test]
fn what_cannot_start_says_why_and_leaves_nothing() {
    let (left, _right) = pair("ca");
    let missing = refused(inside(&left, &serve("nosuch0", "[fd53:2::1]:4433")));
    assert!(
        missing.contains("nosuch0") && missing.contains("veth0"),
        "lists what exists: {missing}"
    );

    let foreign = refused(inside(&left, &serve("veth0", "[fd53:2::77]:4433")));
    assert!(foreign.contains("fd53:2::77"), "{foreign}");

    let ipv4 = refused(inside(&left, &serve("veth0", "127.0.0.1:4433")));
    assert!(ipv4.contains("127.0.0.1") && ipv4.contains("invalid"), "{ipv4}");

    let mut queue = serve("veth0", "[fd53:2::1]:4433");
    queue.extend(["--first-queue", "7"]);
    let queue = refused(inside(&left, &queue));
    assert!(queue.contains("queue 7") || queue.contains("queues"), "{queue}");

    let mut zero_copy = serve("veth0", "[fd53:2::1]:4433");
    zero_copy.push("--zero-copy");
    let zero_copy = refused(inside(&left, &zero_copy));
    assert!(zero_copy.contains("zero-copy"), "{zero_copy}");

    let no_iface = ["serve", "--datapath", "af_xdp", "--listen", "[fd53:2::1]:4433"];
    let no_iface = refused(inside(&left, &no_iface));
    assert!(no_iface.contains("interface") && no_iface.contains("af_xdp"), "{no_iface}");

    assert!(!has_xdp(&left), "a refused start left its program behind");
}

#[test]
fn an_interface_without_ipv6_address_is_named() {
    let (left, right) = (Netns::new("cb"), Netns::new("cb"));
    veth((&left, "veth0"), (&right, "veth0"));
    left.sysctl("net/ipv6/conf/veth0/disable_ipv6", "1");
    let error = refused(inside(&left, &serve("veth0", "[::]:4433")));
    assert!(error.contains("veth0") && error.contains("address"), "{error}");
}

#[test]
fn a_port_and_a_queue_have_one_owner() {
    let (left, right) = (Netns::new("cc"), Netns::new("cc"));
    veth_with_queues((&left, "veth0"), (&right, "veth0"), 2);
    left.add_address("veth0", "fd53:2::1/64");
    let _server = Server::start(inside(&left, &serve("veth0", "[fd53:2::1]:4433")));
    let port = refused(inside(&left, &serve("veth0", "[fd53:2::1]:4433")));
    assert!(port.contains("4433") && port.contains("in use"), "{port}");
    let queue = refused(inside(&left, &serve("veth0", "[fd53:2::1]:4434")));
    assert!(queue.contains("veth0") && queue.contains("process"), "{queue}");
}

#[test]
fn without_privileges_the_missing_one_is_named_and_auto_falls_back() {
    let (left, _right) = pair("cd");
    let unprivileged = |arguments: &[&str]| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", left.name(), "setpriv", "--bounding-set=-all"]);
        command.args(["--inh-caps=-all", "--reuid=65534", "--clear-groups", STOQ]).args(arguments);
        command
    };
    let error = refused(unprivileged(&serve("veth0", "[fd53:2::1]:4433")));
    assert!(error.to_lowercase().contains("cap_") && error.contains("setcap"), "{error}");
    let auto = ["serve", "--listen", "[fd53:2::1]:4433", "--iface", "veth0", "--json"];
    let _server = Server::start(unprivileged(&auto));
}

#[test]
fn a_killed_server_leaves_its_interface_clean_and_its_client_ends() {
    let (left, right) = pair("ce");
    let dir = std::env::temp_dir().join(format!("stoq-{}", left.name()));
    std::fs::create_dir_all(&dir).expect("directory");
    let ca = dir.join("ca.pem");
    let ca = ca.to_str().expect("UTF-8");
    let mut arguments = serve("veth0", "[fd53:2::1]:4433");
    arguments.extend(["--cert-out", ca]);
    let server = Server::start(inside(&left, &arguments));
    assert!(has_xdp(&left));
    let settings = dir.join("client.toml");
    std::fs::write(&settings, "idle_timeout_ms = 2000\n").expect("written");
    let settings = settings.to_str().expect("UTF-8");
    let client = [
        "perf",
        "download",
        "--connect",
        "[fd53:2::1]:4433",
        "--ca",
        ca,
        "--seconds",
        "60",
        "--datapath",
        "af_xdp",
        "--iface",
        "veth0",
        "--config",
        settings,
    ];
    let client = inside(&right, &client);
    let ended = std::thread::spawn(move || refused(client));
    std::thread::sleep(Duration::from_secs(1));
    drop(server); // SIGKILL in mid-transfer
    let deadline = Instant::now() + Duration::from_secs(2);
    while has_xdp(&left) {
        assert!(Instant::now() < deadline, "the program outlives its process");
        std::thread::sleep(Duration::from_millis(20));
    }
    let error = ended.join().expect("the client ends");
    // The kernel may answer for the dead port before the idle timeout does.
    assert!(error.contains("timed out") || error.contains("[fd53:2::1]:4433"), "{error}");
    assert!(!has_xdp(&right), "the client left its program behind");
    std::fs::remove_dir_all(dir).expect("clean up");
}
