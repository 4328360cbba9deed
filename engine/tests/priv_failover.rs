//! Live connections over AF_XDP when the device beneath them comes and goes. Needs root.
//!
//! Every transfer ends intact: over the kernel's socket while the device is gone, over AF_XDP again
//! afterwards, with `datapaths()`, the counters and the XDP program's counters telling. Tests run
//! one after the other, because some count what the whole process holds.

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::RawFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use common::netns::{Netns, in_netns, wait_until};
use common::transfer::{Transfer, Watchdog, assert_interface_clean, start_client, start_server};
use pollster::block_on;
use rustix::process::{Pid, Signal, kill_process};
use stoq::config::TransportConfig;
use stoq::datapath::choice::DatapathChoice;
use stoq::datapath::{Capabilities, DatapathKind};
use stoq::engine::Engine;
use stoq::error::ConnectionError;
use stoq::testing::detach_bpf_link;

const LEFT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const RIGHT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const DEVICE: &str = "veth0";
/// A little of a transfer, bytes.
const SOME: u64 = 4 << 20;
/// The longest time for anything, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);
const HANG: Duration = Duration::from_secs(150);
/// The namespace of the server in a process of its own; see [`child`].
const CHILD_NETNS: &str = "STOQ_FAILOVER_TEST_NETNS";
const FAILED_OVER: &str = "failed over";

/// Two namespaces: the client is left, the server right. The veth pair between them is made anew
/// as often as a test likes.
struct Link {
    left: Netns,
    right: Netns,
    queues: u32,
    _watchdog: Watchdog,
    _alone: MutexGuard<'static, ()>,
}

impl Link {
    fn new(what: &'static str, queues: u32) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (left, right) = (Netns::new("left"), Netns::new("right"));
        let link =
            Self { left, right, queues, _watchdog: Watchdog::new(what, HANG), _alone: alone };
        link.connect(1500, queues);
        link
    }

    fn sides(&self) -> [(&Netns, Ipv6Addr); 2] {
        [(&self.left, LEFT), (&self.right, RIGHT)]
    }

    /// Makes the pair, with `active` of its queues, and sets it up last.
    fn connect(&self, mtu: u32, active: u32) {
        let queues = format!("numrxqueues {0} numtxqueues {0}", self.queues);
        self.left.ip(&format!("link add {DEVICE} {queues} type veth peer name peer0 {queues}"));
        let right = self.right.name();
        self.left.ip(&format!("link set peer0 netns {right} name {DEVICE}"));
        for (netns, address) in self.sides() {
            if active != self.queues {
                netns.exec(&format!("ethtool -L {DEVICE} rx {active} tx {active}"));
            }
            netns.ip(&format!("link set {DEVICE} mtu {mtu}"));
            netns.add_address(DEVICE, &format!("{address}/64"));
        }
        for (netns, _) in self.sides() {
            netns.ip(&format!("link set {DEVICE} up"));
        }
    }

    fn disconnect(&self) {
        self.left.ip(&format!("link del {DEVICE}"));
    }

    /// A running transfer over AF_XDP, with so many shards at the server.
    fn transfer(&self, shards: usize) -> Transfer {
        self.transfer_with(shards, |_| {})
    }

    fn transfer_with(
        &self,
        shards: usize,
        change: impl Fn(&mut TransportConfig) + Sync,
    ) -> Transfer {
        let build = |address, shards| {
            let mut config = config(address, shards);
            change(&mut config);
            Engine::builder().config(config)
        };
        let server = self.right.run(|| start_server(RIGHT, build(RIGHT, shards)));
        let server = server.unwrap_or_else(|error| panic!("server: {error}"));
        let client = self.left.run(|| start_client(build(LEFT, 1)));
        let client = client.unwrap_or_else(|error| panic!("client: {error}"));
        let transfer = Transfer::start(server, client);
        transfer.advance(SOME, PATIENCE);
        transfer
    }

    fn assert_clean(&self) {
        for (netns, _) in self.sides() {
            // The kernel takes the program of a killed process off in its own time.
            wait_until("no XDP program is left", PATIENCE, || {
                !netns.ip(&format!("-d link show dev {DEVICE}")).contains("xdp")
            });
            assert_interface_clean(netns, DEVICE);
        }
    }
}

fn config(address: Ipv6Addr, shards: usize) -> TransportConfig {
    TransportConfig {
        bind: SocketAddrV6::new(address, 0, 0, 0),
        datapath: DatapathChoice::AfXdp,
        interface: Some(DEVICE.to_owned()),
        shards,
        spin_us: 20,
        failover_backoff_ms_min: 50,
        failover_backoff_ms_max: 400,
        ..TransportConfig::default()
    }
}

fn on_af_xdp(path: &Capabilities) -> bool {
    path.kind == DatapathKind::AfXdp && path.standby_reason.is_none()
}

fn on_standby(path: &Capabilities) -> bool {
    path.kind == DatapathKind::Socket && path.standby_reason.is_some()
}

fn wait_for_all(engines: [&Engine; 2], what: &str, state: impl Fn(&Capabilities) -> bool) {
    for engine in engines {
        wait_until(what, PATIENCE, || engine.datapaths().iter().all(&state));
    }
}

/// Failovers and returns, over all shards.
fn changes(engine: &Engine) -> (u64, u64) {
    let stats = engine.stats();
    let sum = |of: fn(&stoq::datapath::DatapathCounters) -> u64| {
        stats.iter().map(|shard| of(&shard.datapath)).sum()
    };
    (sum(|path| path.failovers), sum(|path| path.returns))
}

/// Packets that the XDP program of now has redirected.
fn redirected(engine: &Engine) -> u64 {
    let counters = engine.xdp_counters().expect("an XDP engine").expect("the program runs");
    let redirected = counters.iter().find(|(name, _)| name.contains("redirect"));
    redirected.unwrap_or_else(|| panic!("{counters:?}")).1
}

/// The transfer goes on, and the engine receives over its rings.
fn assert_redirects(transfer: &Transfer, engine: &Engine) {
    let before = redirected(engine);
    transfer.advance(SOME, PATIENCE);
    wait_until("the program redirects", PATIENCE, || redirected(engine) > before);
}

#[test]
fn interface_deleted_and_recreated_with_another_mtu() {
    let link = Link::new("interface deleted", 1);
    let transfer = link.transfer(1);
    let engines = [&*transfer.server, &*transfer.client];
    link.disconnect();
    wait_for_all(engines, "the socket stands in", on_standby);
    for engine in engines {
        let reason = engine.datapaths()[0].standby_reason.clone().expect("just seen");
        assert!(reason.contains("AF_XDP on queue 0 of interface veth0"), "{reason}");
        assert!(engine.xdp_counters().expect("an XDP engine").is_err(), "the program is gone");
    }
    link.connect(1400, 1);
    wait_for_all(engines, "AF_XDP is back", on_af_xdp);
    assert_redirects(&transfer, &transfer.server);
    assert_redirects(&transfer, &transfer.client);
    for engine in engines {
        assert_eq!(changes(engine), (1, 1));
        let text = engine.prometheus();
        for name in ["failovers", "returns"] {
            let line = format!("stoq_datapath_{name}_total{{shard=\"0\"}} 1");
            assert!(text.lines().any(|found| found == line), "missing: {line}");
        }
        assert!(text.contains("datapath=\"af_xdp\""), "stoq_shard_info is live");
    }
    transfer.finish_intact();
    link.assert_clean();
}

#[test]
fn a_transfer_goes_on_over_the_socket_alone() {
    let link = Link::new("socket alone", 1);
    // The device is opened again long after this test.
    let transfer = link.transfer_with(1, |config| {
        config.failover_backoff_ms_min = 60_000;
        config.failover_backoff_ms_max = 60_000;
    });
    let engines = [&*transfer.server, &*transfer.client];
    link.disconnect();
    wait_for_all(engines, "the socket stands in", on_standby);
    link.connect(1500, 1);
    transfer.advance(SOME, PATIENCE);
    assert!(engines.iter().all(|engine| changes(engine) == (1, 0)));
    wait_for_all(engines, "the socket still stands in", on_standby);
    link.assert_clean();
    transfer.finish_intact();
}

/// The kernel gives the sockets that stand in each its own shard's packets.
#[test]
fn sockets_that_stand_in_are_steered() {
    let link = Link::new("standby steered", 2);
    let transfer = link.transfer_with(2, |config| {
        config.failover_backoff_ms_min = 60_000;
        config.failover_backoff_ms_max = 60_000;
    });
    let server = &*transfer.server;
    let steered = || {
        let counters = server.steering_counters().expect("it runs").expect("the kernel answers");
        counters.iter().find(|(name, _)| *name == "steered_by_id").expect("counted").1
    };
    let reasons = server.datapath_reasons();
    assert!(reasons.iter().any(|reason| reason.contains("beside the rings: packets are steered")));
    link.disconnect();
    wait_for_all([server, &transfer.client], "the socket stands in", on_standby);
    link.connect(1500, 2);
    transfer.advance(SOME, PATIENCE);
    let handed_over = || server.stats().iter().map(|stats| stats.shard.rx_handed_over).sum::<u64>();
    let (steered_before, handed_over_before) = (steered(), handed_over());
    transfer.advance(SOME, PATIENCE);
    wait_until("the kernel steers", PATIENCE, || steered() > steered_before);
    assert_eq!(handed_over(), handed_over_before, "each packet meets its shard");
    transfer.finish_intact();
    link.assert_clean();
}

#[test]
fn link_down_is_no_failover() {
    let link = Link::new("link down", 1);
    let transfer = link.transfer(1);
    link.right.sysctl(&format!("net/ipv6/conf/{DEVICE}/keep_addr_on_down"), "1");
    link.right.ip(&format!("link set {DEVICE} down"));
    thread::sleep(Duration::from_secs(3));
    link.right.ip(&format!("link set {DEVICE} up"));
    assert_redirects(&transfer, &transfer.server);
    assert_redirects(&transfer, &transfer.client);
    assert_eq!(changes(&transfer.server), (0, 0), "the rings survive");
    transfer.finish_intact();
    link.assert_clean();
}

#[test]
fn program_detached_from_outside() {
    let link = Link::new("program detached", 1);
    let transfer = link.transfer(1);
    let links = xdp_links();
    assert_eq!(links.len(), 2, "one program for each engine");
    for fd in links {
        detach_bpf_link(fd).expect("a link");
    }
    for engine in [&*transfer.server, &*transfer.client] {
        wait_until("there and back", PATIENCE, || changes(engine) == (1, 1));
    }
    assert_redirects(&transfer, &transfer.server);
    assert_redirects(&transfer, &transfer.client);
    transfer.finish_intact();
    link.assert_clean();
}

/// A link-local address names its link by the interface's index. That stays what it was when only the
/// program goes; a new interface of the same name is another link, where the port works for new
/// connections and the old ones end.
#[test]
fn a_link_local_port_returns() {
    let link = Link::new("link-local", 1);
    let local = |last| Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x57, last);
    let add_addresses = || {
        for (netns, last) in [(&link.left, 1), (&link.right, 2)] {
            netns.add_address(DEVICE, &format!("{}/64", local(last)));
        }
    };
    add_addresses();
    let build = |address| {
        let config = TransportConfig { idle_timeout_ms: 3_000, ..config(address, 1) };
        Engine::builder().config(config)
    };
    let server = link.right.run(|| start_server(local(2), build(local(2))));
    let server = server.unwrap_or_else(|error| panic!("server: {error}"));
    let client = link.left.run(|| start_client(build(local(1))));
    let client = client.unwrap_or_else(|error| panic!("client: {error}"));
    let port = server.local_addr().port();
    let remote = || SocketAddrV6::new(local(2), port, 0, link.left.ifindex(DEVICE));
    let transfer = Transfer::start_to(remote(), server, client);
    transfer.advance(SOME, PATIENCE);
    for fd in xdp_links() {
        detach_bpf_link(fd).expect("a link");
    }
    let engines = [&*transfer.server, &*transfer.client];
    for engine in engines {
        wait_until("there and back", PATIENCE, || changes(engine) == (1, 1));
    }
    assert_redirects(&transfer, &transfer.server);
    assert_redirects(&transfer, &transfer.client);

    let index_before = remote().scope_id();
    link.disconnect();
    wait_for_all(engines, "the socket stands in", on_standby);
    link.connect(1500, 1);
    add_addresses();
    assert_ne!(remote().scope_id(), index_before, "the kernel does not give an index twice");
    wait_for_all(engines, "AF_XDP is back", on_af_xdp);
    assert_eq!(block_on(transfer.connection.closed()), ConnectionError::TimedOut);
    // The server's end times out as well: who knocks now is another.
    let knocking = transfer.client.connect(remote(), &local(2).to_string());
    let (near, far) = block_on(async {
        let far = transfer.server.accept().await.expect("a client").accept();
        futures_util::future::join(knocking, far).await
    });
    let (near, far) = (near.expect("connected"), far.expect("accepted"));
    assert_eq!(near.remote_address(), remote());
    drop((near, far));
    let outcomes = transfer.finish();
    assert!(
        outcomes.iter().all(|end| end.as_ref().is_err_and(|error| error.contains("timed out")))
    );
    link.assert_clean();
}

/// Shard 1 has lost its queue for good, shard 0 has not; then the queue is there again.
#[test]
fn one_of_two_queues_disappears_and_returns() {
    let link = Link::new("queue gone", 2);
    let transfer = link.transfer(2);
    let server = &transfer.server;
    link.disconnect();
    wait_for_all([server, &transfer.client], "the socket stands in", on_standby);
    link.connect(1500, 1);
    wait_until("shard 0 is back", PATIENCE, || on_af_xdp(&server.datapaths()[0]));
    transfer.advance(SOME, PATIENCE);
    // Several attempts, which must not disturb the other shard.
    thread::sleep(Duration::from_secs(1));
    assert!(on_af_xdp(&server.datapaths()[0]) && on_standby(&server.datapaths()[1]));
    assert_eq!(changes(server), (2, 1));
    for change in ["rx 2", "tx 2"] {
        for (netns, _) in link.sides() {
            netns.exec(&format!("ethtool -L {DEVICE} {change}"));
        }
    }
    wait_until("shard 1 is back", PATIENCE, || server.datapaths().iter().all(on_af_xdp));
    assert_eq!(changes(server), (2, 2), "shard 0 was left alone");
    // Not the client: what shard 1 sends arrives at its queue 1, for which it has no shard.
    assert_redirects(&transfer, server);
    transfer.finish_intact();
    link.assert_clean();
}

#[test]
fn nothing_leaks_over_many_failovers() {
    let link = Link::new("leaks", 2);
    let transfer = link.transfer(2);
    let engines = [&*transfer.server, &*transfer.client];
    let held = || (fs::read_dir("/proc/self/fd").expect("procfs").count(), ring_mappings());
    let before = held();
    for _ in 0..4 {
        link.disconnect();
        wait_for_all(engines, "the socket stands in", on_standby);
        link.connect(1500, 2);
        wait_for_all(engines, "AF_XDP is back", on_af_xdp);
        transfer.advance(SOME, PATIENCE);
    }
    wait_until("descriptors and rings are as before", PATIENCE, || held() == before);
    assert_eq!((changes(engines[0]), changes(engines[1])), ((8, 8), (4, 4)));
    transfer.finish_intact();
    link.assert_clean();
}

#[test]
fn switched_off_the_connection_ends_with_the_reason() {
    let link = Link::new("failover off", 1);
    let transfer = link.transfer_with(1, |config| config.failover = false);
    link.disconnect();
    for outcome in transfer.finish() {
        let error = outcome.expect_err("the rings are gone");
        assert!(error.contains("the datapath failed"), "{error}");
        assert!(error.contains("AF_XDP on queue 0 of interface veth0"), "{error}");
    }
    link.connect(1500, 1);
    link.assert_clean();
}

/// A process that dies in the middle of it leaves nothing on the interface.
#[test]
fn killed_in_the_middle_of_a_failover() {
    let link = Link::new("killed", 1);
    for (round, signal) in [Signal::KILL, Signal::INT, Signal::KILL].into_iter().enumerate() {
        let mut child = KillOnDrop(
            Command::new(std::env::current_exe().expect("this test"))
                .args(["--exact", "child", "--nocapture"])
                .env(CHILD_NETNS, link.right.name())
                .stdout(Stdio::piped())
                .spawn()
                .expect("this test can be started"),
        );
        let mut lines = BufReader::new(child.0.stdout.take().expect("piped")).lines();
        wait_until("the program is attached", PATIENCE, || {
            link.right.ip(&format!("-d link show dev {DEVICE}")).contains("xdp")
        });
        link.disconnect();
        let failed = lines.any(|line| line.is_ok_and(|line| line.contains(FAILED_OVER)));
        assert!(failed, "the server does not say that it failed over");
        link.connect(1500, 1);
        // From "not tried yet" to "attached again".
        thread::sleep(Duration::from_millis(40 * round as u64));
        let pid = Pid::from_raw(child.0.id() as i32).expect("not zero");
        kill_process(pid, signal).expect("it runs");
        assert!(!child.0.wait().expect("a child").success());
        link.assert_clean();
    }
}

/// Not a test: the server of [`killed_in_the_middle_of_a_failover`], in a process of its own.
#[test]
fn child() {
    let Ok(netns) = std::env::var(CHILD_NETNS) else { return };
    let server = in_netns(&netns, || {
        start_server(RIGHT, Engine::builder().config(config(RIGHT, 1))).expect("it starts")
    });
    wait_until(FAILED_OVER, PATIENCE, || on_standby(&server.datapaths()[0]));
    println!("{FAILED_OVER}");
    thread::sleep(PATIENCE);
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // Ended by the test already, unless that has failed.
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

/// Mappings of AF_XDP rings in this process.
fn ring_mappings() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").expect("procfs");
    maps.lines().filter(|line| line.contains("socket:[")).count()
}

/// This process's descriptors of XDP links. What others attached is no business of a test.
fn xdp_links() -> Vec<RawFd> {
    let entries = fs::read_dir("/proc/self/fdinfo").expect("procfs");
    let is_link = |path: &std::path::Path| {
        fs::read_to_string(path).is_ok_and(|text| text.contains("link_type:\txdp"))
    };
    entries
        .map(|entry| entry.expect("procfs").path())
        .filter(|path| is_link(path))
        .map(|path| path.file_name().and_then(|name| name.to_str()?.parse().ok()).expect("a fd"))
        .collect()
}
