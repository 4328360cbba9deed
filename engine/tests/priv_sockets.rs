//! Socket datapaths where only root can set the stage: namespaces, veth, seccomp.
//!
//! Every test runs in a thread of its own, which may change its namespace or
//! system call filter for good.

mod common;

use std::fs::File;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use stoq::datapath::io_uring::IoUringDatapath;
use stoq::datapath::socket::SocketDatapath;
use stoq::datapath::udp_socket::{SocketConfig, SocketError};
use stoq::datapath::{Datapath, DatapathEvent, Ecn, RxBatch, TxMeta, TxVerdict};
use stoq::testing::forbid_io_uring;

const NEAR: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x5709, 0, 0, 0, 0, 0, 1);
const NEAR_TOO: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x5709, 0, 0, 0, 0, 0, 3);
const FAR: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x5709, 0, 0, 0, 0, 0, 2);
const PATIENCE: Duration = Duration::from_secs(20);

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).output().expect("the program starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{command}` failed (root is needed): {stderr}");
}

/// Two namespaces joined by a veth pair; removed with the value.
struct Stage {
    near: String,
    far: String,
}

impl Stage {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let stage = Self { near: format!("stoq-near-{id}"), far: format!("stoq-far-{id}") };
        run(&format!("ip netns add {}", stage.near));
        run(&format!("ip netns add {}", stage.far));
        let (near, far) = (&stage.near, &stage.far);
        run(&format!("ip -n {near} link add veth0 type veth peer name veth0 netns {far}"));
        for (namespace, address) in [(near, NEAR), (near, NEAR_TOO), (far, FAR)] {
            run(&format!("ip -n {namespace} -6 address add {address}/64 dev veth0 nodad"));
        }
        for namespace in [near, far] {
            run(&format!("ip -n {namespace} link set lo up"));
            run(&format!("ip -n {namespace} link set veth0 up"));
        }
        stage
    }

    fn near(&self, command: &str) {
        run(&format!("ip netns exec {} {command}", self.near));
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for namespace in [&self.near, &self.far] {
            // Also the way out of a half-made stage: what is missing cannot be removed.
            let _ = Command::new("ip").args(["netns", "delete", namespace]).output();
        }
    }
}

/// Moves the calling thread into a namespace for good.
fn enter(namespace: &str) {
    let file = File::open(format!("/run/netns/{namespace}")).expect("the namespace exists");
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("root");
}

fn config(address: Ipv6Addr) -> SocketConfig {
    SocketConfig::new(SocketAddrV6::new(address, 0, 0, 0))
}

/// A datapath in each namespace.
fn open_both<D: Datapath>(
    stage: &Stage,
    open: impl Fn(SocketConfig) -> Result<D, SocketError>,
) -> (D, D) {
    enter(&stage.far);
    let far = open(config(FAR)).expect("the far socket opens");
    enter(&stage.near);
    let near = open(config(Ipv6Addr::UNSPECIFIED)).expect("the near socket opens");
    (near, far)
}

fn send_equal<D: Datapath>(near: &mut D, remote: SocketAddrV6, count: usize, size: usize) {
    let meta = TxMeta { remote, local: None, ecn: Ecn::Ect0 };
    for index in 0..count {
        assert_eq!(near.transmit(&meta, &vec![index as u8; size]), TxVerdict::Accepted);
    }
    // Once to send, once to collect what became of it, once to act on that.
    near.flush(Instant::now());
    near.receive(Instant::now(), &mut RxBatch::new(4, 1 << 16));
    near.flush(Instant::now());
}

fn receive<D: Datapath>(far: &mut D, count: usize) -> Vec<(Vec<u8>, SocketAddrV6)> {
    let mut batch = RxBatch::new(64, 1 << 20);
    let (mut seen, start) = (Vec::new(), Instant::now());
    while seen.len() < count {
        far.receive(Instant::now(), &mut batch);
        seen.extend(batch.drain().map(|datagram| (datagram.data.to_vec(), datagram.remote)));
        assert!(start.elapsed() < PATIENCE, "{} of {count} datagrams arrived", seen.len());
    }
    seen
}

fn isolated(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(test).join().expect("the isolated test passed");
}

fn mtu_lowered_in_mid_flow<D: Datapath>(open: impl Fn(SocketConfig) -> Result<D, SocketError>) {
    let stage = Stage::new();
    let (mut near, mut far) = open_both(&stage, open);
    let remote = far.local_addr();
    assert_eq!(near.max_udp_payload(&remote), 1452);
    send_equal(&mut near, remote, 40, 1452);
    assert_eq!(receive(&mut far, 40).len(), 40);

    stage.near("ip link set veth0 mtu 1400");
    // The last one is shorter and fits: that must not be taken for a device
    // without segmentation.
    let meta = TxMeta { remote, local: None, ecn: Ecn::Ect0 };
    for index in 0..9 {
        assert_eq!(near.transmit(&meta, &[index; 1452]), TxVerdict::Accepted);
    }
    send_equal(&mut near, remote, 1, 300);
    assert_eq!(receive(&mut far, 1)[0].0.len(), 300);
    assert_eq!(near.counters().tx_drop_too_large, 9, "each one counted");
    assert_eq!(near.poll_event(), Some(DatapathEvent::MaxUdpPayload(1352)));
    assert_eq!(near.max_udp_payload(&remote), 1352);
    assert!(near.capabilities().mode.contains("gso"), "the MTU says nothing about segmentation");

    send_equal(&mut near, remote, 40, 1352);
    assert!(receive(&mut far, 40).iter().all(|(data, _)| data.len() == 1352));
    // An MTU probe beyond the link: lost, counted, nothing else.
    send_equal(&mut near, remote, 1, 1353);
    assert_eq!(near.counters().tx_drop_too_large, 10);
}

fn device_without_segmentation<D: Datapath>(open: impl Fn(SocketConfig) -> Result<D, SocketError>) {
    let stage = Stage::new();
    stage.near("ethtool -K veth0 tx-udp-segmentation off tx-checksum-ip-generic off");
    let (mut near, mut far) = open_both(&stage, open);
    let remote = far.local_addr();
    for _ in 0..3 {
        // Segmented by the kernel, or refused and sent singly: all arrive either way.
        send_equal(&mut near, remote, 50, 1452);
        for (index, (data, _)) in receive(&mut far, 50).into_iter().enumerate() {
            assert_eq!(data, vec![index as u8; 1452]);
        }
    }
    assert_eq!(near.counters().tx_drop_io, 0);
}

fn source_address_is_ours_to_choose<D: Datapath>(
    open: impl Fn(SocketConfig) -> Result<D, SocketError>,
) {
    let stage = Stage::new();
    let (mut near, mut far) = open_both(&stage, open);
    let remote = far.local_addr();
    for source in [NEAR, NEAR_TOO, NEAR] {
        let meta = TxMeta { remote, local: Some(source), ecn: Ecn::Ect1 };
        assert_eq!(near.transmit(&meta, b"from where?"), TxVerdict::Accepted);
        near.flush(Instant::now());
        let (_, seen) = receive(&mut far, 1).remove(0);
        assert_eq!(*seen.ip(), source);
        // And back: the destination is told apart on a socket bound to [::].
        let back = TxMeta { remote: seen, local: None, ecn: Ecn::Ect0 };
        assert_eq!(far.transmit(&back, b"there"), TxVerdict::Accepted);
        far.flush(Instant::now());
        let mut batch = RxBatch::new(4, 1 << 16);
        let start = Instant::now();
        while batch.is_empty() {
            near.receive(Instant::now(), &mut batch);
            assert!(start.elapsed() < PATIENCE, "the answer to {source} arrives");
        }
        let answer = batch.drain().next().expect("one datagram");
        assert_eq!((answer.local, *answer.remote.ip()), (source, FAR));
    }
    let no_route = SocketAddrV6::new("2001:db8::1".parse().expect("address"), 9, 0, 0);
    send_equal(&mut near, no_route, 3, 100);
    assert_eq!(near.counters().tx_drop_no_route, 3);
    stage.near("ip link set veth0 down");
    send_equal(&mut near, remote, 3, 100);
    let counters = near.counters();
    assert_eq!(counters.tx_drop_no_route + counters.tx_drop_link_down, 6, "{counters:?}");
}

/// Packets that wait for their next hop fill the send buffer, and then the slots:
/// that is back-pressure, and nothing may get lost by it.
fn full_send_buffer_pushes_back<D: Datapath>(
    open: impl Fn(SocketConfig) -> Result<D, SocketError>,
) {
    const BEYOND: &str = "fd00:5709:1::1";
    let stage = Stage::new();
    run(&format!("ip -n {} -6 address add {BEYOND}/128 dev lo nodad", stage.far));
    stage.near(&format!("ip -6 route add {BEYOND}/128 via fd00:5709::9 dev veth0"));
    let open_small = |mut config: SocketConfig| {
        config.send_buffer_bytes = 64 * 1024;
        config.tx_batches = 8;
        if *config.local.ip() == FAR {
            config.local.set_ip(Ipv6Addr::UNSPECIFIED);
        }
        open(config)
    };
    let (mut near, mut far) = open_both(&stage, open_small);
    let remote = SocketAddrV6::new(BEYOND.parse().expect("address"), far.local_addr().port(), 0, 0);
    let meta = TxMeta { remote, local: None, ecn: Ecn::Ect0 };
    let mut sent = 0_usize;
    // Sizes that alternate in pairs: batches of two.
    let mut transmit = |near: &mut D| loop {
        match near.transmit(&meta, &vec![(sent % 251) as u8; 1400 - (sent / 2 % 2)]) {
            TxVerdict::Accepted if sent < 1500 => sent += 1,
            TxVerdict::Accepted | TxVerdict::Full => return sent,
            TxVerdict::Dropped(reason) => panic!("dropped: {reason:?}"),
        }
    };
    let mut full = 0;
    while full < 3 {
        transmit(&mut near);
        near.flush(Instant::now());
        near.receive(Instant::now(), &mut RxBatch::new(1, 1 << 16));
        full = if near.transmit_capacity() == 0 { full + 1 } else { 0 };
        assert!(near.counters().tx_datagrams < 1500, "the send buffer never pushed back");
    }
    let mac = Command::new("ip")
        .args(["netns", "exec", &stage.far, "cat", "/sys/class/net/veth0/address"])
        .output()
        .expect("ip runs");
    let mac = String::from_utf8_lossy(&mac.stdout).trim().to_owned();
    stage.near(&format!("ip -6 neigh replace fd00:5709::9 lladdr {mac} dev veth0"));

    let wake = File::open("/dev/null").expect("it exists");
    let (mut seen, mut batch, start) = (0, RxBatch::new(64, 1 << 20), Instant::now());
    loop {
        let accepted = near.counters().tx_datagrams as usize;
        if accepted < 1500 {
            transmit(&mut near);
        }
        near.flush(Instant::now());
        near.receive(Instant::now(), &mut RxBatch::new(1, 1 << 16));
        near.wait(wake.as_fd(), Some(Duration::from_millis(1))).expect("wait works");
        far.receive(Instant::now(), &mut batch);
        seen += batch.drain().count();
        if accepted >= 1500 && seen == near.counters().tx_datagrams as usize {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{seen} arrived, {:?}", near.counters());
    }
    assert_eq!(near.counters().tx_drop_io + near.counters().tx_drop_no_route, 0);
    near.receive(Instant::now(), &mut RxBatch::new(1, 1 << 16));
    assert_eq!(near.transmit_capacity(), 8, "every slot is back");
}

#[test]
fn full_send_buffer_socket() {
    isolated(|| full_send_buffer_pushes_back(SocketDatapath::open));
}

#[test]
fn full_send_buffer_io_uring() {
    isolated(|| full_send_buffer_pushes_back(IoUringDatapath::open));
}

#[test]
fn mtu_lowered_socket() {
    isolated(|| mtu_lowered_in_mid_flow(SocketDatapath::open));
}

#[test]
fn mtu_lowered_io_uring() {
    isolated(|| mtu_lowered_in_mid_flow(IoUringDatapath::open));
}

#[test]
fn device_without_segmentation_socket() {
    isolated(|| device_without_segmentation(SocketDatapath::open));
}

#[test]
fn device_without_segmentation_io_uring() {
    isolated(|| device_without_segmentation(IoUringDatapath::open));
}

#[test]
fn source_address_socket() {
    isolated(|| source_address_is_ours_to_choose(SocketDatapath::open));
}

#[test]
fn source_address_io_uring() {
    isolated(|| source_address_is_ours_to_choose(IoUringDatapath::open));
}

#[test]
fn forbidden_io_uring_is_explained() {
    isolated(|| {
        forbid_io_uring(libc::EPERM as u32).expect("a filter");
        let unavailable = IoUringDatapath::probe().expect_err("io_uring is forbidden");
        assert!(unavailable.reason.contains("seccomp"), "{unavailable}");
        let error = IoUringDatapath::open(config(Ipv6Addr::LOCALHOST)).expect_err("forbidden");
        assert!(matches!(error, SocketError::IoUring(_)), "{error}");
        // Plain sockets go on.
        SocketDatapath::open(config(Ipv6Addr::LOCALHOST)).expect("sockets are allowed");
    });
}

#[test]
fn missing_io_uring_is_explained() {
    isolated(|| {
        forbid_io_uring(libc::ENOSYS as u32).expect("a filter");
        let unavailable = IoUringDatapath::probe().expect_err("io_uring is hidden");
        assert!(unavailable.reason.contains("CONFIG_IO_URING"), "{unavailable}");
    });
}
