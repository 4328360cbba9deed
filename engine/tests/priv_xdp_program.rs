//! The XDP program on veth pairs in fresh namespaces: attach, count, redirect,
//! and leave the interface whatever happens. Needs root.

mod common;

use std::io::{BufRead, BufReader};
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use common::netns::{Netns, veth, veth_with_queues, wait_until};
use stoq::datapath::af_xdp::program::{AttachMode, ProgramError, XdpCounters, XdpProgram};
use stoq_ebpf::{Counter, QUEUES_MAX};
use stoq_ebpf_fixtures::xsk::SinkSocket;

const DEVICE: &str = "veth0";
const PORT: u16 = 4433;
const LOCAL: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const ALIAS: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x11);
/// Set for a test's child, which is this program again with that one test.
const CHILD_IFINDEX: &str = "STOQ_TEST_HOLD_IFINDEX";

/// A veth pair: the program goes on `local`, packets come from `peer`.
struct Pair {
    local: Netns,
    peer: Netns,
    ifindex: u32,
}

impl Pair {
    fn new() -> Self {
        let (local, peer) = (Netns::new("xdp"), Netns::new("peer"));
        veth((&local, DEVICE), (&peer, DEVICE));
        Self::with_addresses(local, peer)
    }

    fn with_addresses(local: Netns, peer: Netns) -> Self {
        local.add_address(DEVICE, &format!("{LOCAL}/64"));
        local.add_address(DEVICE, &format!("{ALIAS}/64"));
        peer.add_address(DEVICE, "fd00::2/64");
        let ifindex = local.ifindex(DEVICE);
        Self { local, peer, ifindex }
    }

    fn attach(&self, mode: Option<AttachMode>) -> Result<XdpProgram, ProgramError> {
        self.local.run(|| XdpProgram::attach(self.ifindex, DEVICE, mode, false))
    }

    fn send(&self, address: Ipv6Addr, port: u16, payload: &[u8]) {
        self.peer.run(|| {
            let socket = UdpSocket::bind("[::]:0").expect("a UDP socket in the peer");
            socket.send_to(payload, SocketAddrV6::new(address, port, 0, 0)).expect("sent");
        });
    }

    fn is_attached(&self) -> bool {
        self.local.ip(&format!("link show dev {DEVICE}")).contains("prog/xdp")
    }
}

fn wait_for(program: &XdpProgram, counter: Counter, value: u64) -> XdpCounters {
    let read = || program.counters().expect("counters can be read");
    wait_until(&format!("{} is {value}", counter.name()), Duration::from_secs(5), || {
        read().value(counter) == value
    });
    read()
}

#[test]
fn counts_passes_and_redirects() {
    let pair = Pair::new();
    let mut program = pair.attach(None).expect("attached");
    assert_eq!(program.mode(), AttachMode::Driver);
    assert!(pair.is_attached());
    let receiver = pair.local.run(|| UdpSocket::bind(("::", PORT)).expect("the port is free"));
    receiver.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout is set");
    let mut buffer = [0; 64];

    // Nothing registered: the kernel gets it, and neighbour discovery works.
    pair.send(LOCAL, PORT, b"one");
    assert_eq!(receiver.recv(&mut buffer).expect("passed to the kernel"), 3);
    let counters = wait_for(&program, Counter::PassOtherPort, 1);
    assert!(counters.value(Counter::PassIcmpv6) > 0, "{counters:?}");

    // Registered, without a socket: still the kernel.
    program.register_port(PORT, None).expect("registered");
    program.register_port(PORT, None).expect("twice does no harm");
    pair.send(LOCAL, PORT, b"three");
    assert_eq!(receiver.recv(&mut buffer).expect("passed to the kernel"), 5);
    wait_for(&program, Counter::PassNoSocket, 1);

    // With a socket: ours.
    let socket = pair.local.run(|| SinkSocket::bind(pair.ifindex, 0).expect("an AF_XDP socket"));
    program.set_socket(0, socket.as_fd()).expect("the socket is in the map");
    pair.send(LOCAL, PORT, b"redirected");
    let counters = wait_for(&program, Counter::RedirectedPackets, 1);
    assert_eq!(counters.value(Counter::RedirectedBytes), 62 + 10);
    assert_eq!(counters.value(Counter::PassNoSocket), 1);

    // Socket taken out, or closed: the kernel again.
    program.clear_socket(0).expect("cleared");
    program.clear_socket(0).expect("twice does no harm");
    pair.send(LOCAL, PORT, b"back");
    assert_eq!(receiver.recv(&mut buffer).expect("passed to the kernel"), 4);
    wait_for(&program, Counter::PassNoSocket, 2);
    program.set_socket(0, socket.as_fd()).expect("the socket is in the map");
    drop(socket);
    pair.send(LOCAL, PORT, b"closed");
    assert_eq!(receiver.recv(&mut buffer).expect("passed to the kernel"), 6);
    wait_for(&program, Counter::PassNoSocket, 3);

    let named: Vec<_> = program.counters().expect("counters can be read").iter().collect();
    assert_eq!(named.len(), Counter::COUNT);
    assert!(named.contains(&("redirected_packets", 1)), "{named:?}");
}

#[test]
fn ports_are_per_address_and_can_be_taken_back() {
    let pair = Pair::new();
    let mut program = pair.attach(None).expect("attached");
    program.register_port(PORT, Some(LOCAL)).expect("registered");
    pair.send(ALIAS, PORT, b"not ours");
    wait_for(&program, Counter::PassOtherPort, 1);
    pair.send(LOCAL, PORT, b"ours");
    wait_for(&program, Counter::PassNoSocket, 1);
    program.unregister_port(PORT, Some(LOCAL)).expect("unregistered");
    pair.send(LOCAL, PORT, b"not any more");
    wait_for(&program, Counter::PassOtherPort, 2);

    let error = program.unregister_port(PORT, Some(LOCAL)).expect_err("already gone");
    assert!(matches!(error, ProgramError::PortNotRegistered { .. }), "{error}");
    let error = program.register_port(0, None).expect_err("port 0");
    assert!(matches!(error, ProgramError::PortZero { .. }), "{error}");
    for port in 1..=1024 {
        program.register_port(port, None).expect("there is room");
    }
    let error = program.register_port(1025, None).expect_err("full");
    assert!(matches!(error, ProgramError::PortsFull { port: 1025, .. }), "{error}");
}

#[test]
fn sockets_that_do_not_fit_are_refused() {
    let pair = Pair::new();
    let mut program = pair.attach(None).expect("attached");
    let udp = UdpSocket::bind("[::1]:0").expect("a UDP socket");
    let error = program.set_socket(0, udp.as_fd()).expect_err("not an AF_XDP socket");
    assert!(error.to_string().contains("STOQ_XSKS"), "{error}");
    let queue = QUEUES_MAX as u32;
    let error = program.set_socket(queue, udp.as_fd()).expect_err("no such queue");
    assert!(matches!(error, ProgramError::QueueOutOfRange { .. }), "{error}");
    let error = program.clear_socket(queue).expect_err("no such queue");
    assert!(matches!(error, ProgramError::QueueOutOfRange { .. }), "{error}");
}

#[test]
fn drop_detaches_and_the_interface_is_free_at_once() {
    let pair = Pair::new();
    for _ in 0..5 {
        let program = pair.attach(None).expect("attached");
        assert!(pair.is_attached());
        drop(program);
        assert!(!pair.is_attached());
    }
}

#[test]
fn a_second_program_is_told_who_is_in_the_way() {
    let pair = Pair::new();
    let first = pair.attach(None).expect("attached");
    for mode in [None, Some(AttachMode::Driver), Some(AttachMode::Skb)] {
        let error = pair.attach(mode).expect_err("the interface is held");
        assert!(matches!(error, ProgramError::Busy { .. }), "{error}");
        assert!(error.to_string().contains("ip link show dev veth0"), "{error}");
    }
    // One that goes away while we wait is waited for.
    let second = thread::scope(|scope| {
        let second = scope.spawn(|| pair.attach(None));
        thread::sleep(Duration::from_millis(150));
        drop(first);
        second.join().expect("the thread did not panic")
    });
    assert_eq!(second.expect("attached").mode(), AttachMode::Driver);
}

#[test]
fn skb_mode_where_asked_for_or_allowed() {
    let pair = Pair::new();
    let mut program = pair.attach(Some(AttachMode::Skb)).expect("attached");
    assert_eq!(program.mode(), AttachMode::Skb);
    program.register_port(PORT, None).expect("registered");
    pair.send(LOCAL, PORT, b"generic");
    wait_for(&program, Counter::PassNoSocket, 1);
    drop(program);

    // The loopback device has no native XDP.
    let lo = pair.local.ifindex("lo");
    let attach = |allow_skb| pair.local.run(|| XdpProgram::attach(lo, "lo", None, allow_skb));
    let error = attach(false).expect_err("no native XDP");
    assert!(matches!(error, ProgramError::NoDriverSupport { .. }), "{error}");
    assert_eq!(attach(true).expect("attached").mode(), AttachMode::Skb);
}

#[test]
fn without_privileges_it_says_which() {
    if let Ok(ifindex) = std::env::var(CHILD_IFINDEX) {
        let ifindex = ifindex.parse().expect("an interface index");
        let error = XdpProgram::attach(ifindex, DEVICE, None, false).expect_err("not permitted");
        assert!(matches!(error, ProgramError::NotPermitted { .. }), "{error:?}");
        assert!(error.to_string().contains("cap_net_admin,cap_net_raw,cap_bpf"), "{error}");
        return;
    }
    run_with_capabilities("-all", "without_privileges_it_says_which");
}

#[test]
fn the_named_privileges_are_enough() {
    if let Ok(ifindex) = std::env::var(CHILD_IFINDEX) {
        let ifindex = ifindex.parse().expect("an interface index");
        let mut program = XdpProgram::attach(ifindex, DEVICE, None, false).expect("attached");
        program.register_port(PORT, None).expect("registered");
        let socket = SinkSocket::bind(ifindex, 0).expect("an AF_XDP socket");
        program.set_socket(0, socket.as_fd()).expect("the socket is in the map");
        program.counters().expect("counters can be read");
        return;
    }
    run_with_capabilities("-all,+net_admin,+net_raw,+bpf", "the_named_privileges_are_enough");
}

/// Runs one test of this program beside a fresh veth pair, with other capabilities.
fn run_with_capabilities(capabilities: &str, test: &str) {
    let pair = Pair::new();
    let run = || {
        Command::new("setpriv")
            .arg(format!("--bounding-set={capabilities}"))
            .arg(std::env::current_exe().expect("the path of this program"))
            .args(["--exact", test])
            .env(CHILD_IFINDEX, pair.ifindex.to_string())
            .output()
            .expect("setpriv (util-linux) starts")
    };
    let output = pair.local.run(run);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{output:?}");
}

#[test]
fn settings_that_the_driver_refuses() {
    let pair = Pair::new();
    let error = pair
        .local
        .run(|| XdpProgram::attach(9999, "nowhere", None, false))
        .expect_err("no such interface");
    assert!(matches!(error, ProgramError::NoInterface { .. }), "{error}");

    let (local, peer) = (Netns::new("few"), Netns::new("many"));
    veth_with_queues((&local, DEVICE), (&peer, DEVICE), 2);
    local.exec(&format!("ethtool -L {DEVICE} rx 1"));
    let pair = Pair::with_addresses(local, peer);
    let error = pair.attach(None).expect_err("one queue for the peer's two");
    assert!(matches!(error, ProgramError::TooFewQueues { .. }), "{error}");
}

#[test]
fn the_link_survives_down_up_and_jumbo_mtu() {
    let pair = Pair::new();
    let mut program = pair.attach(None).expect("attached");
    program.register_port(PORT, None).expect("registered");
    for netns in [&pair.local, &pair.peer] {
        netns.ip(&format!("link set {DEVICE} mtu 9000"));
    }
    pair.local.ip(&format!("link set {DEVICE} down"));
    pair.local.ip(&format!("link set {DEVICE} up"));
    pair.local.add_address(DEVICE, &format!("{ALIAS}/64"));
    assert!(pair.is_attached());
    wait_until("packets come in again", Duration::from_secs(5), || {
        pair.send(ALIAS, PORT, &[7; 8900]);
        program.counters().expect("counters can be read").value(Counter::PassNoSocket) > 0
    });
    let counters = program.counters().expect("counters can be read");
    assert_eq!(counters.value(Counter::PassTruncated), 0, "{counters:?}");
    assert_eq!(counters.value(Counter::PassFragment), 0, "{counters:?}");
}

/// Kills the child when the test ends early.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        // It may be dead already, which is what the test wants.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn kill_9_leaves_the_interface_clean() {
    if let Ok(ifindex) = std::env::var(CHILD_IFINDEX) {
        return hold_program(&ifindex);
    }
    let pair = Pair::new();
    let spawn = || {
        Command::new(std::env::current_exe().expect("the path of this program"))
            .args(["--exact", "kill_9_leaves_the_interface_clean", "--nocapture"])
            .env(CHILD_IFINDEX, pair.ifindex.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started")
    };
    let mut child = Holder(pair.local.run(spawn));
    let stdout = child.0.stdout.take().expect("piped");
    let mut lines = BufReader::new(stdout).lines();
    assert!(lines.any(|line| line.expect("readable") == "attached"), "the child did not attach");
    assert!(pair.is_attached());

    child.0.kill().expect("SIGKILL is sent"); // Child::kill is kill -9
    child.0.wait().expect("it is dead");
    wait_until("the interface is clean", Duration::from_secs(2), || !pair.is_attached());
    pair.attach(None).expect("the interface is free");
}

/// The child's part: holds the program until it is killed, or its parent is.
fn hold_program(ifindex: &str) {
    let ifindex = ifindex.parse().expect("an interface index");
    let program = XdpProgram::attach(ifindex, DEVICE, None, false).expect("attached");
    println!("\nattached");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("standard input ends with the parent");
    drop(program);
}
