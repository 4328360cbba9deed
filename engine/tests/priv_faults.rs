//! What happens to a transfer when something breaks beneath it. Needs root.
//!
//! Every fault is one function, run over each datapath that it concerns. The
//! transfer ends intact, or fails with the error that says what happened; it
//! never hangs, and the interface is clean afterwards. Frame conservation is
//! asserted by the AF_XDP datapath itself on every turn of a debug build.

mod common;

use std::any::Any;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::netns::{Netns, veth_with_queues, wait_until};
use common::transfer::{Transfer, Watchdog, assert_interface_clean, start_client, start_server};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use stoq::app::{ShardApp, ShardCx};
use stoq::config::TransportConfig;
use stoq::datapath::DatapathKind;
use stoq::datapath::choice::DatapathChoice;
use stoq::engine::{Builder, Engine};
use stoq::testing::{forbid_io_uring, mount_own_sysfs};

const LEFT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const RIGHT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const DEVICE: &str = "veth0";
/// A little of a transfer, bytes.
const SOME: u64 = 8 << 20;
/// The longest time to recover: PTO backs off to some seconds while the link is gone.
const RECOVERY: Duration = Duration::from_secs(20);
const HANG: Duration = Duration::from_secs(150);

/// Two namespaces and a veth pair: the client is left, the server right.
struct Link {
    left: Netns,
    right: Netns,
    mtu: u32,
    queues: u32,
    _watchdog: Watchdog,
}

impl Link {
    fn new(what: &'static str, mtu: u32, queues: u32) -> Self {
        let (left, right) = (Netns::new("left"), Netns::new("right"));
        let link = Self { left, right, mtu, queues, _watchdog: Watchdog::new(what, HANG) };
        link.connect();
        link
    }

    fn sides(&self) -> [(&Netns, Ipv6Addr); 2] {
        [(&self.left, LEFT), (&self.right, RIGHT)]
    }

    /// Makes the pair, with addresses.
    fn connect(&self) {
        veth_with_queues((&self.left, DEVICE), (&self.right, DEVICE), self.queues);
        for (netns, address) in self.sides() {
            netns.sysctl(&format!("net/ipv6/conf/{DEVICE}/keep_addr_on_down"), "1");
            netns.ip(&format!("link set {DEVICE} mtu {}", self.mtu));
            netns.add_address(DEVICE, &format!("{address}/64"));
        }
    }

    fn transfer(&self, datapath: DatapathChoice) -> Transfer {
        let server = self
            .right
            .run(|| start_server(RIGHT, Engine::builder().config(config(datapath, RIGHT))))
            .unwrap_or_else(|error| panic!("server: {error}"));
        let client = self
            .left
            .run(|| start_client(Engine::builder().config(config(datapath, LEFT))))
            .unwrap_or_else(|error| panic!("client: {error}"));
        assert_eq!(Some(server.datapaths()[0].kind), datapath.kind());
        let transfer = Transfer::start(server, client);
        transfer.advance(SOME, RECOVERY);
        transfer
    }

    fn assert_clean(&self) {
        for (netns, _) in self.sides() {
            assert_interface_clean(netns, DEVICE);
        }
    }
}

fn config(datapath: DatapathChoice, address: Ipv6Addr) -> TransportConfig {
    TransportConfig {
        bind: SocketAddrV6::new(address, 0, 0, 0),
        datapath,
        interface: Some(DEVICE.to_owned()),
        // Tests run side by side on few cores.
        spin_us: 20,
        ..TransportConfig::default()
    }
}

/// Runs one fault over all datapaths, each in a test of its own name.
macro_rules! over_all_datapaths {
    ($($fault:ident),* $(,)?) => {$(
        mod $fault {
            use stoq::datapath::choice::DatapathChoice;
            #[test]
            fn af_xdp() {
                super::faults::$fault(DatapathChoice::AfXdp);
            }
            #[test]
            fn io_uring() {
                super::faults::$fault(DatapathChoice::IoUring);
            }
            #[test]
            fn socket() {
                super::faults::$fault(DatapathChoice::Socket);
            }
        }
    )*};
}

over_all_datapaths!(
    server_link_down_for_3_s,
    client_link_down_for_3_s,
    interface_deleted_and_recreated,
    mtu_lowered_from_9000_to_1500,
    queue_count_changed,
    receive_buffer_overrun,
);

mod faults {
    use super::*;

    pub(super) fn server_link_down_for_3_s(datapath: DatapathChoice) {
        let link = Link::new("server link down", 1500, 1);
        link_down_for_3_s(&link, &link.right, datapath);
    }

    pub(super) fn client_link_down_for_3_s(datapath: DatapathChoice) {
        let link = Link::new("client link down", 1500, 1);
        link_down_for_3_s(&link, &link.left, datapath);
    }

    fn link_down_for_3_s(link: &Link, side: &Netns, datapath: DatapathChoice) {
        let transfer = link.transfer(datapath);
        side.ip(&format!("link set {DEVICE} down"));
        thread::sleep(Duration::from_secs(1));
        let before = transfer.received();
        thread::sleep(Duration::from_secs(2));
        assert_eq!(transfer.received(), before, "nothing crosses a link that is down");
        side.ip(&format!("link set {DEVICE} up"));
        transfer.advance(SOME, RECOVERY);
        transfer.finish_intact();
        link.assert_clean();
    }

    /// Sockets outlive the interface; AF_XDP goes on over its socket, and back.
    pub(super) fn interface_deleted_and_recreated(datapath: DatapathChoice) {
        let link = Link::new("interface deleted", 1500, 1);
        let transfer = link.transfer(datapath);
        link.left.ip(&format!("link del {DEVICE}"));
        thread::sleep(Duration::from_millis(500));
        link.connect();
        transfer.advance(SOME, RECOVERY);
        transfer.finish_intact();
        link.assert_clean();
    }

    pub(super) fn mtu_lowered_from_9000_to_1500(datapath: DatapathChoice) {
        let link = Link::new("MTU lowered", 9000, 1);
        let transfer = link.transfer(datapath);
        let mtu_bytes = || transfer.connection.stats().mtu_bytes;
        wait_until("the large MTU is found", RECOVERY, || mtu_bytes() > 8000);
        transfer.advance(SOME, RECOVERY);
        for (netns, _) in link.sides() {
            netns.ip(&format!("link set {DEVICE} mtu 1500"));
        }
        transfer.advance(SOME, RECOVERY);
        transfer.finish_intact();
        link.assert_clean();
    }

    /// Down to one queue and back. The rings' queue 0 stays, the others' packets
    /// come by the kernel's socket.
    pub(super) fn queue_count_changed(datapath: DatapathChoice) {
        let link = Link::new("queue count changed", 1500, 4);
        let transfer = link.transfer(datapath);
        // A veth with an XDP program must have at least as many receive queues as
        // its peer has transmit queues, at every moment.
        for (first, second) in [("tx 1", "rx 1"), ("rx 4", "tx 4"), ("tx 2", "rx 2")] {
            for change in [first, second] {
                for (netns, _) in link.sides() {
                    netns.exec(&format!("ethtool -L {DEVICE} {change}"));
                }
            }
            transfer.advance(SOME, RECOVERY);
        }
        transfer.finish_intact();
        link.assert_clean();
    }

    /// The client's shard stands still while a flood arrives at its port.
    pub(super) fn receive_buffer_overrun(datapath: DatapathChoice) {
        let link = Link::new("receive buffer overrun", 1500, 1);
        let server = link
            .right
            .run(|| start_server(RIGHT, Engine::builder().config(config(datapath, RIGHT))))
            .unwrap_or_else(|error| panic!("server: {error}"));
        let builder = Engine::builder().config(config(datapath, LEFT)).app(|_| Stall);
        let client = link
            .left
            .run(|| start_client(builder))
            .unwrap_or_else(|error| panic!("client: {error}"));
        let transfer = Transfer::start(server, client);
        transfer.advance(SOME, RECOVERY);
        let overrun = || transfer.client.stats()[0].datapath.rx_drop_overrun;
        let port = transfer.client.local_addr().port();
        let socket = link.right.run(|| UdpSocket::bind((RIGHT, 0)).expect("a free port"));
        for _ in 0..3 {
            let stall = Duration::from_millis(700);
            assert!(transfer.client.send_to_app(0, Box::new(stall)).is_ok(), "the mailbox is full");
            let start = Instant::now();
            while start.elapsed() < stall {
                // Its first bit says that it is no QUIC packet (RFC 9000 §17.3.1).
                socket.send_to(&[0; 1200], (LEFT, port)).expect("the flood flows");
            }
            transfer.advance(SOME, RECOVERY);
        }
        wait_until("the kernel's drops are counted", RECOVERY, || overrun() > 0);
        transfer.finish_intact();
        link.assert_clean();
    }
}

/// Blocks its shard for as long as a message says.
struct Stall;

impl ShardApp for Stall {
    fn handle_message(&mut self, _cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        thread::sleep(*message.downcast::<Duration>().expect("a duration"));
    }
}

/// Both ends under a restriction of their threads: what they chose and why, and that it works.
fn restricted(
    what: &'static str,
    datapath: DatapathChoice,
    restrict: impl Fn() + Sync,
) -> Vec<String> {
    let link = Link::new(what, 1500, 1);
    let start = |netns: &Netns, address, start: &(dyn Fn(Builder) -> Engine + Sync)| {
        netns.run(|| {
            mount_own_sysfs().expect("root");
            restrict();
            start(Engine::builder().config(config(datapath, address)))
        })
    };
    let server = start(&link.right, RIGHT, &|builder| {
        start_server(RIGHT, builder).unwrap_or_else(|error| panic!("server: {error}"))
    });
    let client = start(&link.left, LEFT, &|builder| {
        start_client(builder).unwrap_or_else(|error| panic!("client: {error}"))
    });
    let mut said = server.datapath_reasons().to_vec();
    said.push(server.datapaths()[0].kind.name().to_owned());
    let transfer = Transfer::start(server, client);
    transfer.advance(SOME, RECOVERY);
    transfer.finish_intact();
    link.assert_clean();
    said
}

/// The error of an engine that starts under a restriction although it must not.
fn refusal(datapath: DatapathChoice, restrict: impl Fn() + Sync) -> String {
    let link = Link::new("refusal", 1500, 1);
    let result = link.left.run(|| {
        restrict();
        start_client(Engine::builder().config(config(datapath, LEFT))).map(drop)
    });
    link.assert_clean();
    result.expect_err("it must be refused").to_string()
}

fn no_io_uring() {
    forbid_io_uring(libc::EPERM as u32).expect("a filter");
}

fn no_privileges() {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).expect("capabilities may always be given up");
}

#[test]
fn forbidden_io_uring_falls_back_to_sockets_and_says_why() {
    let said = restricted("io_uring forbidden", DatapathChoice::Auto, no_io_uring);
    assert_eq!(said.last().map(String::as_str), Some(DatapathKind::Socket.name()), "{said:?}");
    let why = said.iter().find(|reason| reason.starts_with("not io_uring"));
    assert!(why.is_some_and(|why| why.contains("seccomp")), "{said:?}");
}

#[test]
fn forbidden_io_uring_demanded_is_an_error() {
    let error = refusal(DatapathChoice::IoUring, no_io_uring);
    assert!(error.contains("io_uring") && error.contains("seccomp"), "{error}");
}

#[test]
fn without_privileges_auto_falls_back_and_says_why() {
    let said = restricted("no privileges", DatapathChoice::Auto, no_privileges);
    let kind = said.last().expect("the kind");
    assert!([DatapathKind::IoUring.name(), DatapathKind::Socket.name()].contains(&kind.as_str()));
    let why = said.iter().find(|reason| reason.starts_with("not af_xdp"));
    assert!(why.is_some_and(|why| why.contains("CAP_")), "{said:?}");
}

#[test]
fn without_privileges_af_xdp_demanded_is_an_error() {
    let error = refusal(DatapathChoice::AfXdp, no_privileges);
    assert!(error.contains("af_xdp") && error.contains("CAP_"), "{error}");
}

#[test]
fn without_privileges_sockets_work() {
    let said = restricted("no privileges", DatapathChoice::Socket, no_privileges);
    assert_eq!(said.last().map(String::as_str), Some(DatapathKind::Socket.name()));
}
