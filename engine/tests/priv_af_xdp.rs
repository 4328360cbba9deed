//! The AF_XDP datapath on veth pairs in fresh namespaces. Needs root.
//!
//! Every test has two namespaces, `left` (fd00::1) and `right` (fd00::2), and at
//! least one AF_XDP end. Packet contents are checked, and at the end of each
//! transfer that the kernel dropped nothing and that no frame was lost.

mod common;

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use common::netns::{Netns, veth_with_queues, wait_until};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, Protocol, SendFlags, SocketType, ipproto, sendto};
use stoq::datapath::af_xdp::{
    AfXdp, AfXdpConfig, AfXdpError, AfXdpLimits, ZeroCopy, open_interface,
};
use stoq::datapath::{
    Datapath, DatapathEvent, DatapathKind, Ecn, RxBatch, TxDrop, TxMeta, TxVerdict,
};

const LEFT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const RIGHT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const PORT: u16 = 4433;
const DEVICE: &str = "veth0";
const LIMIT: Duration = Duration::from_secs(10);

struct Link {
    left: Netns,
    right: Netns,
}

impl Link {
    fn new(mtu: u32, queues: u32) -> Self {
        let (left, right) = (Netns::new("left"), Netns::new("right"));
        veth_with_queues((&left, DEVICE), (&right, DEVICE), queues);
        for (netns, address) in [(&left, LEFT), (&right, RIGHT)] {
            netns.ip(&format!("link set {DEVICE} mtu {mtu}"));
            netns.add_address(DEVICE, &format!("{address}/64"));
        }
        Self { left, right }
    }

    fn open_left(&self) -> End {
        End::open(&self.left, &config(LEFT))
    }

    fn open_right(&self) -> End {
        End::open(&self.right, &config(RIGHT))
    }

    fn kernel_right(&self) -> UdpSocket {
        let socket = self.right.run(|| UdpSocket::bind((RIGHT, PORT)).expect("a free port"));
        socket.set_read_timeout(Some(LIMIT)).expect("a timeout");
        socket
    }
}

fn config(address: Ipv6Addr) -> AfXdpConfig {
    AfXdpConfig::new(DEVICE, SocketAddrV6::new(address, PORT, 0, 0))
}

fn open(netns: &Netns, config: &AfXdpConfig) -> Result<Vec<AfXdp>, AfXdpError> {
    netns.run(|| open_interface(config))
}

fn refusal(netns: &Netns, config: &AfXdpConfig) -> AfXdpError {
    match open(netns, config) {
        Err(error) => {
            eprintln!("{error}");
            error
        }
        Ok(_) => panic!("opened, but should have been refused"),
    }
}

fn at(address: Ipv6Addr) -> SocketAddrV6 {
    SocketAddrV6::new(address, PORT, 0, 0)
}

/// One AF_XDP datapath, driven from the test's thread.
struct End {
    datapath: AfXdp,
    batch: RxBatch,
}

impl End {
    fn open(netns: &Netns, config: &AfXdpConfig) -> Self {
        let mut opened = open(netns, config).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(opened.len(), 1);
        Self::new(opened.remove(0))
    }

    fn new(datapath: AfXdp) -> Self {
        Self { datapath, batch: RxBatch::new(64, 1 << 20) }
    }

    /// One turn: receives, flushes, and returns what came.
    fn turn(&mut self) -> Vec<(SocketAddrV6, Ecn, Vec<u8>)> {
        self.datapath.receive(Instant::now(), &mut self.batch);
        self.datapath.flush(Instant::now());
        let taken = self.batch.drain();
        taken.map(|datagram| (datagram.remote, datagram.ecn, datagram.data.to_vec())).collect()
    }

    fn send(&mut self, remote: SocketAddrV6, payload: &[u8]) {
        let start = Instant::now();
        loop {
            match self.transmit(remote, payload) {
                TxVerdict::Accepted => break,
                TxVerdict::Full => {
                    self.turn();
                    assert!(start.elapsed() < LIMIT, "the TX ring stays full");
                }
                TxVerdict::Dropped(reason) => panic!("dropped: {reason:?}"),
            }
        }
        self.datapath.flush(Instant::now());
    }

    fn transmit(&mut self, remote: SocketAddrV6, payload: &[u8]) -> TxVerdict {
        let meta = TxMeta { remote, local: None, ecn: Ecn::Ect0 };
        self.datapath.transmit(&meta, payload)
    }

    /// Turns until an event comes for which `wanted` holds.
    fn event(&mut self, wanted: impl Fn(&DatapathEvent) -> bool) -> DatapathEvent {
        let start = Instant::now();
        loop {
            self.turn();
            while let Some(event) = self.datapath.poll_event() {
                if wanted(&event) {
                    return event;
                }
            }
            assert!(start.elapsed() < LIMIT, "the event does not come");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Nothing was dropped for any reason, and every frame is where it belongs.
    fn assert_clean(&mut self) {
        self.assert_frames_conserved();
        let counters = self.datapath.counters();
        assert_eq!(counters.rx_drop_malformed, 0);
        assert_eq!(counters.rx_drop_checksum, 0);
        assert_eq!(counters.rx_drop_not_ours, 0);
        assert_eq!(counters.rx_drop_too_long, 0);
        assert_eq!(counters.tx_drop_io, 0);
        let rings = self.datapath.ring_counters().expect("statistics");
        assert_eq!((rings.rx_dropped, rings.rx_ring_full), (0, 0));
        assert_eq!((rings.rx_invalid_descriptors, rings.tx_invalid_descriptors), (0, 0));
    }

    fn assert_frames_conserved(&mut self) {
        wait_until("all frames sent are completed", LIMIT, || {
            self.turn();
            self.datapath.ring_counters().expect("statistics").frames_tx == 0
        });
        let limits = AfXdpLimits::default();
        let rings = self.datapath.ring_counters().expect("statistics");
        assert_eq!(rings.frames_fill, u64::from(limits.rx_frames));
        assert_eq!(rings.frames_free, u64::from(limits.tx_frames));
    }
}

/// Turns both ends until `to` has received `count` datagrams.
fn collect(from: &mut End, to: &mut End, count: usize) -> Vec<(SocketAddrV6, Ecn, Vec<u8>)> {
    let start = Instant::now();
    let mut received = Vec::new();
    while received.len() < count {
        assert!(from.turn().is_empty(), "nothing comes back");
        received.extend(to.turn());
        assert!(start.elapsed() < LIMIT, "{} of {count} datagrams arrived", received.len());
    }
    received
}

/// Turns an end until it has received `count` datagrams.
fn receive(end: &mut End, count: usize) -> Vec<(SocketAddrV6, Ecn, Vec<u8>)> {
    let start = Instant::now();
    let mut received = Vec::new();
    while received.len() < count {
        received.extend(end.turn());
        assert!(start.elapsed() < LIMIT, "{} of {count} datagrams arrived", received.len());
    }
    received
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251 + seed * 7) as u8).collect()
}

/// MTUs, and how the socket must work there.
const MTUS: [(u32, bool); 4] = [(1500, false), (3506, false), (9000, true), (65535, true)];

fn lengths(mtu: u32) -> [usize; 5] {
    let max = mtu as usize - 48;
    [1, 100, 1199, max - 1, max]
}

#[test]
fn two_af_xdp_ends_exchange_datagrams_at_every_mtu() {
    for (mtu, multi_buffer) in MTUS {
        let link = Link::new(mtu, 1);
        let (mut left, mut right) = (link.open_left(), link.open_right());
        let capabilities = left.datapath.capabilities();
        assert_eq!(capabilities.kind, DatapathKind::AfXdp);
        assert_eq!(capabilities.mode.contains("multi-buffer"), multi_buffer, "{capabilities:?}");
        assert!(capabilities.mode.starts_with("copy"), "veth has no zero-copy");
        let max = left.datapath.max_udp_payload(&at(RIGHT));
        assert_eq!(u32::from(max), mtu - 48);
        for (seed, len) in lengths(mtu).into_iter().enumerate() {
            let payload = pattern(len, seed);
            for _ in 0..3 {
                left.send(at(RIGHT), &payload);
            }
            for (remote, ecn, data) in collect(&mut left, &mut right, 3) {
                assert_eq!((remote, ecn), (at(LEFT), Ecn::Ect0));
                assert_eq!(data, payload, "MTU {mtu}, {len} bytes");
            }
            right.send(at(LEFT), &payload);
            let (remote, _, data) = collect(&mut right, &mut left, 1).remove(0);
            assert_eq!((remote, data), (at(RIGHT), payload), "MTU {mtu}, {len} bytes back");
        }
        let too_large = vec![0; usize::from(max) + 1];
        assert_eq!(left.transmit(at(RIGHT), &too_large), TxVerdict::Dropped(TxDrop::TooLarge));
        left.assert_clean();
        right.assert_clean();
        let counters = right.datapath.counters();
        assert_eq!((counters.rx_datagrams, counters.rx_slow_path), (15, 0));
    }
}

#[test]
fn kernel_sockets_understand_what_is_sent_with_and_without_offload() {
    for (mtu, _) in MTUS {
        for offload in [true, false] {
            let link = Link::new(mtu, 1);
            let mut config = config(LEFT);
            config.checksum_offload = offload;
            let mut left = End::open(&link.left, &config);
            let mode = &left.datapath.capabilities().mode;
            assert_eq!(mode.contains("checksum offload"), offload, "{mode}");
            let socket = link.kernel_right();
            let mut buffer = vec![0; 65536];
            for (seed, len) in lengths(mtu).into_iter().enumerate() {
                let payload = pattern(len, seed);
                left.send(at(RIGHT), &payload);
                // A first datagram waits for its neighbour.
                let start = Instant::now();
                socket.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
                let (received, from) = loop {
                    match socket.recv_from(&mut buffer) {
                        Ok(received) => break received,
                        Err(_) => assert!(start.elapsed() < LIMIT, "{len} bytes do not arrive"),
                    }
                    left.turn();
                };
                assert_eq!(from, SocketAddr::V6(at(LEFT)));
                assert_eq!(buffer[..received], payload[..], "MTU {mtu}, offload {offload}");
            }
            left.assert_clean();
        }
    }
}

#[test]
fn kernel_sockets_are_understood_with_and_without_their_offload() {
    for (mtu, _) in MTUS {
        for offload in ["on", "off"] {
            let link = Link::new(mtu, 1);
            link.right.exec(&format!("ethtool -K {DEVICE} tx {offload}"));
            let mut left = link.open_left();
            let socket = link.kernel_right();
            for (seed, len) in lengths(mtu).into_iter().enumerate() {
                let payload = pattern(len, seed);
                socket.send_to(&payload, at(LEFT)).expect("sent");
                let (remote, ecn, data) = receive(&mut left, 1).remove(0);
                assert_eq!((remote, ecn), (at(RIGHT), Ecn::NotEct));
                assert_eq!(data, payload, "MTU {mtu}, offload {offload}, {len} bytes");
            }
            left.assert_clean();
            let partial = left.datapath.ring_counters().expect("statistics").rx_partial_checksums;
            assert_eq!(partial, if offload == "on" { 5 } else { 0 });
            assert_eq!(left.datapath.counters().rx_slow_path, 0);
        }
    }
}

#[test]
fn two_queues_receive_each_its_part_on_one_port() {
    let link = Link::new(1500, 2);
    let mut config = config(LEFT);
    config.queues = vec![0, 1];
    let opened = open(&link.left, &config).unwrap_or_else(|error| panic!("{error}"));
    let mut ends: Vec<_> = opened.into_iter().map(End::new).collect();
    assert_eq!(ends.len(), 2);
    let sockets: Vec<_> = link
        .right
        .run(|| (0..32).map(|_| UdpSocket::bind((RIGHT, 0)).expect("a free port")).collect());
    for socket in &sockets {
        socket.send_to(b"spread", at(LEFT)).expect("sent");
    }
    let start = Instant::now();
    let mut received = [0, 0];
    while received.iter().sum::<usize>() < sockets.len() {
        for (count, end) in received.iter_mut().zip(&mut ends) {
            *count += end.turn().len();
        }
        assert!(start.elapsed() < LIMIT, "{received:?} datagrams arrived");
    }
    assert!(received.iter().all(|&count| count > 0), "both queues are used: {received:?}");
    for (queue, end) in ends.iter_mut().enumerate() {
        assert_eq!(end.datapath.capabilities().queue, Some(queue as u32));
        assert_eq!(end.datapath.counters().rx_slow_path, 0);
        // Both queues can send from the one port.
        end.send(sockets[0].local_addr().map(v6).expect("bound"), &[queue as u8]);
        sockets[0].set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
        let mut buffer = [9; 16];
        wait_until("the datagram arrives", LIMIT, || {
            end.turn();
            sockets[0].recv_from(&mut buffer).is_ok()
        });
        assert_eq!(buffer[0], queue as u8);
        end.assert_clean();
    }
}

fn v6(address: SocketAddr) -> SocketAddrV6 {
    match address {
        SocketAddr::V6(address) => address,
        SocketAddr::V4(address) => panic!("{address} in an IPv6 test"),
    }
}

#[test]
fn a_queue_without_a_socket_goes_the_slow_way() {
    let link = Link::new(1500, 2);
    let mut left = link.open_left();
    let sockets: Vec<_> = link
        .right
        .run(|| (0..32).map(|_| UdpSocket::bind((RIGHT, 0)).expect("a free port")).collect());
    for socket in &sockets {
        socket.send_to(b"spread", at(LEFT)).expect("sent");
    }
    let received = receive(&mut left, sockets.len());
    assert!(received.iter().all(|(_, _, data)| data == b"spread"));
    let counters = left.datapath.counters();
    assert!(counters.rx_slow_path > 0 && counters.rx_slow_path < counters.rx_datagrams);
    left.assert_clean();
}

/// A UDP datagram as the payload of an IPv6 packet, with a right checksum.
fn datagram(payload: &[u8]) -> Vec<u8> {
    let len = 8 + payload.len() as u16;
    let mut datagram = [999_u16, PORT, len, 0].map(u16::to_be_bytes).concat();
    datagram.extend(payload);
    let words = |bytes: &[u8]| -> u64 {
        bytes
            .chunks(2)
            .map(|w| u64::from(u16::from_be_bytes([w[0], *w.get(1).unwrap_or(&0)])))
            .sum()
    };
    let mut sum = words(&LEFT.octets()) + words(&RIGHT.octets()) + 17 + u64::from(len);
    sum += words(&datagram);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    datagram[6..8].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    datagram
}

#[test]
fn damaged_datagrams_are_counted_and_frames_conserved() {
    let link = Link::new(1500, 1);
    let mut left = link.open_left();
    // A raw socket sends the bytes given as the payload of an IPv6 packet.
    let inject = |protocol, bytes: &[u8]| {
        link.right.run(|| {
            let raw = rustix::net::socket(AddressFamily::INET6, SocketType::RAW, Some(protocol))
                .expect("a raw socket");
            let to = SocketAddrV6::new(LEFT, 0, 0, 0);
            sendto(&raw, bytes, SendFlags::empty(), &to).expect("sent");
        });
    };
    let good = datagram(b"payload");
    inject(ipproto::UDP, &good);
    assert_eq!(receive(&mut left, 1)[0].2, b"payload");

    let mut damaged = good.clone();
    damaged[9] ^= 0x40;
    for _ in 0..100 {
        inject(ipproto::UDP, &damaged);
    }
    wait_until("the damaged datagrams are counted", LIMIT, || {
        assert!(left.turn().is_empty(), "a damaged datagram was delivered");
        left.datapath.counters().rx_drop_checksum == 100
    });

    // Left to the kernel by the XDP program, which drops them: no checksum, wrong length.
    let mut no_checksum = good.clone();
    no_checksum[6..8].fill(0);
    inject(ipproto::UDP, &no_checksum);
    let mut too_long = good.clone();
    too_long[5] += 1;
    inject(ipproto::UDP, &too_long);

    // Left to the kernel, which understands it: destination options (RFC 8200 §4.6) of padding.
    let mut with_options = vec![17, 0, 1, 4, 0, 0, 0, 0];
    with_options.extend(&good);
    inject(Protocol::from_raw(60.try_into().expect("not zero")), &with_options);
    assert_eq!(receive(&mut left, 1)[0].2, b"payload");
    let counters = left.datapath.counters();
    assert_eq!((counters.rx_slow_path, counters.rx_datagrams), (1, 2));
    assert_eq!(counters.rx_drop_malformed, 0);
    left.assert_frames_conserved();
}

#[test]
fn more_than_the_rings_hold_passes_through_without_loss() {
    const COUNT: usize = 20_000;
    let link = Link::new(1500, 1);
    let (mut left, mut right) = (link.open_left(), link.open_right());
    let mut sent = 0;
    let mut received = 0;
    let start = Instant::now();
    while received < COUNT {
        while sent < COUNT && left.datapath.transmit_capacity() > 0 && sent - received < 1024 {
            let payload = pattern(64 + sent % 1300, sent);
            assert_eq!(left.transmit(at(RIGHT), &payload), TxVerdict::Accepted);
            sent += 1;
            if sent % 32 == 0 || sent <= 1 {
                break;
            }
        }
        left.turn();
        for (_, _, data) in right.turn() {
            assert_eq!(data, pattern(64 + received % 1300, received), "in order and whole");
            received += 1;
        }
        assert!(start.elapsed() < 3 * LIMIT, "{received} of {sent} datagrams arrived");
    }
    left.assert_clean();
    right.assert_clean();
}

#[test]
fn wait_ends_when_a_datagram_or_a_wake_up_comes() {
    let link = Link::new(1500, 1);
    let mut left = link.open_left();
    let socket = link.kernel_right();
    let wake = eventfd(0, EventfdFlags::empty()).expect("an eventfd");
    // Prime the neighbours, and let upkeep settle.
    socket.send_to(b"first", at(LEFT)).expect("sent");
    receive(&mut left, 1);

    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(50) {
        let rest = Duration::from_millis(50).saturating_sub(start.elapsed());
        left.datapath.wait(wake.as_fd(), Some(rest)).expect("poll works");
        assert!(left.turn().is_empty());
    }

    let sender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        socket.send_to(b"second", at(LEFT)).expect("sent");
    });
    let start = Instant::now();
    loop {
        left.datapath.wait(wake.as_fd(), Some(LIMIT)).expect("poll works");
        if !left.turn().is_empty() {
            break;
        }
    }
    assert!(start.elapsed() < LIMIT / 2, "woken by the datagram, not by the timeout");
    sender.join().expect("sent");

    rustix::io::write(&wake, &1_u64.to_ne_bytes()).expect("written");
    let start = Instant::now();
    left.datapath.wait(wake.as_fd(), Some(LIMIT)).expect("poll works");
    assert!(start.elapsed() < LIMIT / 2, "woken by the eventfd");
}

#[test]
fn the_queue_can_be_bound_again_right_after_close() {
    let link = Link::new(1500, 1);
    let mut right = link.open_right();
    for round in 0..10 {
        let mut left = link.open_left();
        left.send(at(RIGHT), &[round]);
        assert_eq!(collect(&mut left, &mut right, 1)[0].2, [round]);
    }
}

#[test]
fn the_program_leaves_with_the_last_datapath() {
    let link = Link::new(1500, 2);
    let mut config = config(LEFT);
    config.queues = vec![1, 0];
    let mut opened = open(&link.left, &config).unwrap_or_else(|error| panic!("{error}"));
    let handle = opened[0].interface();
    assert!(link.left.ip(&format!("link show dev {DEVICE}")).contains("xdp"));
    drop(opened.remove(0));
    assert!(link.left.ip(&format!("link show dev {DEVICE}")).contains("xdp"));
    handle.xdp_counters().expect("still attached").expect("counters can be read");
    drop(opened);
    assert!(handle.xdp_counters().is_none());
    wait_until("the program is detached", LIMIT, || {
        !link.left.ip(&format!("link show dev {DEVICE}")).contains("xdp")
    });
}

#[test]
fn zero_copy_required_on_veth_is_refused() {
    let link = Link::new(1500, 1);
    let mut config = config(LEFT);
    config.zero_copy = ZeroCopy::Require;
    let error = refusal(&link.left, &config);
    assert!(matches!(&error, AfXdpError::NoZeroCopy { queue: 0, .. }), "{error}");
    assert!(error.to_string().contains("zero-copy on queue 0 of interface veth0"));
    // Nothing was left behind.
    config.zero_copy = ZeroCopy::Never;
    End::open(&link.left, &config);
}

#[test]
fn wrong_requests_are_refused_with_what_to_do() {
    let link = Link::new(1500, 1);
    let netns = &link.left;
    let mut missing = config(LEFT);
    missing.interface = "nosuch0".into();
    let error = refusal(netns, &missing).to_string();
    assert!(error.contains("nosuch0") && error.contains("lo") && error.contains(DEVICE), "{error}");

    let error = refusal(netns, &config(RIGHT));
    assert!(matches!(error, AfXdpError::ForeignAddress { .. }));

    let error = refusal(netns, &config("::ffff:10.0.0.1".parse().expect("an address")));
    assert!(matches!(error, AfXdpError::Ipv4(_)));

    let mut queues = config(LEFT);
    queues.queues = vec![0, 5];
    let error = refusal(netns, &queues);
    assert!(matches!(error, AfXdpError::NoQueue { queue: 5, available: 1, .. }));
    queues.queues = vec![0, 0];
    assert!(matches!(refusal(netns, &queues), AfXdpError::Queues { .. }));
    queues.queues = vec![];
    assert!(matches!(refusal(netns, &queues), AfXdpError::Queues { .. }));

    let mut limits = config(LEFT);
    limits.limits.frame_size_bytes = 3000;
    assert!(matches!(refusal(netns, &limits), AfXdpError::Limits(_)));

    netns.ip(&format!("-6 addr flush dev {DEVICE}"));
    assert!(matches!(refusal(netns, &config(LEFT)), AfXdpError::NoAddress { .. }));
}

#[test]
fn a_port_in_use_is_refused_by_number() {
    let link = Link::new(1500, 1);
    let _holder = link.left.run(|| UdpSocket::bind((LEFT, PORT)).expect("a free port"));
    let error = refusal(&link.left, &config(LEFT));
    assert!(matches!(error, AfXdpError::PortInUse { port: PORT }), "{error}");
}

#[test]
fn a_queue_in_use_is_refused_by_number() {
    let link = Link::new(1500, 1);
    let _holder = link.open_left();
    let mut config = config(LEFT);
    config.local.set_port(PORT + 1);
    config.limits.bind_retries = 2;
    let error = refusal(&link.left, &config);
    assert!(matches!(error, AfXdpError::QueueInUse { queue: 0, .. }), "{error}");
}

#[test]
fn port_zero_lets_the_kernel_choose_and_any_address_means_each_of_them() {
    let link = Link::new(1500, 1);
    link.left.add_address(DEVICE, "fd00::11/64");
    let mut config = config(Ipv6Addr::UNSPECIFIED);
    config.local.set_port(0);
    let mut left = End::open(&link.left, &config);
    let port = left.datapath.local_addr().port();
    assert_ne!(port, 0);
    let socket = link.kernel_right();
    for address in [LEFT, "fd00::11".parse().expect("an address")] {
        socket.send_to(b"x", (address, port)).expect("sent");
        assert_eq!(receive(&mut left, 1)[0].2, b"x");
    }
    left.assert_clean();
}

#[test]
fn the_first_datagram_waits_for_its_neighbour_and_one_that_never_answers_is_given_up() {
    let link = Link::new(1500, 1);
    let (mut left, mut right) = (link.open_left(), link.open_right());
    left.send(at(RIGHT), b"first");
    assert_eq!(collect(&mut left, &mut right, 1)[0].2, b"first");
    let nobody = at("fd00::dead".parse().expect("an address"));
    left.send(nobody, b"lost");
    wait_until("the datagram is given up", LIMIT, || {
        left.turn();
        let counters = left.datapath.counters();
        counters.tx_drop_neighbor + counters.tx_drop_no_route == 1
    });
    let elsewhere = at("2001:db8::1".parse().expect("an address"));
    assert_eq!(left.transmit(elsewhere, b"x"), TxVerdict::Dropped(TxDrop::NoRoute));
}

#[test]
fn link_down_is_told_and_survived() {
    let link = Link::new(1500, 1);
    let (mut left, mut right) = (link.open_left(), link.open_right());
    left.send(at(RIGHT), b"before");
    collect(&mut left, &mut right, 1);
    // An address that survives the link going down.
    link.left.sysctl(&format!("net/ipv6/conf/{DEVICE}/keep_addr_on_down"), "1");
    link.left.ip(&format!("link set {DEVICE} down"));
    left.event(|event| *event == DatapathEvent::LinkDown);
    assert_eq!(left.transmit(at(RIGHT), b"x"), TxVerdict::Dropped(TxDrop::LinkDown));
    assert_eq!(left.datapath.counters().tx_drop_link_down, 1);
    link.left.ip(&format!("link set {DEVICE} up"));
    left.event(|event| *event == DatapathEvent::LinkUp);
    wait_until("datagrams arrive again", LIMIT, || {
        if left.transmit(at(RIGHT), b"after") == TxVerdict::Accepted {
            left.datapath.flush(Instant::now());
        }
        left.turn();
        thread::sleep(Duration::from_millis(1));
        right.turn().iter().any(|(_, _, data)| data == b"after")
    });
}

#[test]
fn a_new_mtu_is_told() {
    let link = Link::new(1500, 1);
    let mut left = link.open_left();
    link.left.ip(&format!("link set {DEVICE} mtu 1400"));
    let event = left.event(|event| matches!(event, DatapathEvent::MaxUdpPayload(_)));
    assert_eq!(event, DatapathEvent::MaxUdpPayload(1352));
    assert_eq!(left.datapath.max_udp_payload(&at(RIGHT)), 1352);
    // Larger than the frames of a socket without multi-buffer: capped by these.
    link.left.ip(&format!("link set {DEVICE} mtu 9000"));
    let event = left.event(|event| matches!(event, DatapathEvent::MaxUdpPayload(_)));
    assert_eq!(event, DatapathEvent::MaxUdpPayload(4096 - 64 - 62));
}

#[test]
fn a_device_that_is_gone_is_told() {
    let link = Link::new(1500, 1);
    let mut left = link.open_left();
    link.left.ip(&format!("link del {DEVICE}"));
    let event = left.event(|event| matches!(event, DatapathEvent::Failed(_)));
    let DatapathEvent::Failed(text) = event else { panic!("just matched") };
    assert!(text.contains("queue 0 of interface veth0"), "{text}");
    assert_eq!(left.transmit(at(RIGHT), b"x"), TxVerdict::Dropped(TxDrop::Io));
    assert_eq!(left.datapath.counters().tx_drop_io, 1);
    // A failed datapath does not turn its shard into a busy loop.
    let wake = eventfd(0, EventfdFlags::empty()).expect("an eventfd");
    let start = Instant::now();
    left.datapath.wait(wake.as_fd(), Some(Duration::from_millis(50))).expect("poll works");
    assert!(start.elapsed() >= Duration::from_millis(50));
}

/// Prints the one-way throughput between two threads:
/// `cargo test --release -p stoq --features privileged-tests --test priv_af_xdp throughput -- --ignored --nocapture`.
///
/// With checksum offload neither end passes over the payload to sum it, since a
/// packet never leaves the machine: the figures without are the ones to compare
/// with a NIC. The interface's own counter is the witness for what was received.
#[test]
#[ignore = "a measurement, not a test"]
fn throughput() {
    for offload in [true, false] {
        for (mtu, payload_len) in [(1500, 1200), (1500, 1452), (9000, 8952), (65535, 60_000)] {
            measure(mtu, payload_len, offload);
        }
    }
}

fn measure(mtu: u32, payload_len: usize, offload: bool) {
    let link = Link::new(mtu, 1);
    let mut config = config(LEFT);
    config.checksum_offload = offload;
    let (mut left, mut right) = (End::open(&link.left, &config), link.open_right());
    left.send(at(RIGHT), b"prime");
    collect(&mut left, &mut right, 1);
    let duration = Duration::from_secs(3);
    let packets_before = rx_packets(&link.right);
    let (sent, received) = thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (start, cpu) = (Instant::now(), thread_cpu_time());
            let mut packets = 0;
            let mut batch = RxBatch::new(64, 1 << 20);
            while start.elapsed() < duration + Duration::from_millis(200) {
                right.datapath.receive(Instant::now(), &mut batch);
                for datagram in batch.drain() {
                    assert_eq!(datagram.data.len(), payload_len);
                    packets += 1;
                }
            }
            (packets, thread_cpu_time() - cpu)
        });
        let payload = pattern(payload_len, 1);
        let (start, cpu) = (Instant::now(), thread_cpu_time());
        let mut batch = RxBatch::new(64, 1 << 16);
        let mut packets = 0_u64;
        while start.elapsed() < duration {
            left.datapath.receive(Instant::now(), &mut batch);
            for _ in 0..left.datapath.transmit_capacity().min(64) {
                if left.transmit(at(RIGHT), &payload) == TxVerdict::Accepted {
                    packets += 1;
                }
            }
            left.datapath.flush(Instant::now());
        }
        let cpu = thread_cpu_time() - cpu;
        ((packets, cpu), receiver.join().expect("the receiver ends"))
    });
    let report = |(packets, cpu): (u64, Duration)| {
        let gbit = (packets * payload_len as u64 * 8) as f64 / duration.as_secs_f64() / 1e9;
        format!("{gbit:.2} Gbit/s, {} ns/packet", cpu.as_nanos() / u128::from(packets.max(1)))
    };
    println!(
        "payload {payload_len} offload {offload}: sent {}; received {}",
        report(sent),
        report(received)
    );
    let rings = right.datapath.ring_counters().expect("statistics");
    println!(
        "  packets: sent {}, received {}, by the interface {}, ring full {}, partial sums {}",
        sent.0,
        received.0,
        rx_packets(&link.right) - packets_before,
        rings.rx_ring_full,
        rings.rx_partial_checksums,
    );
}

/// Packets that the kernel counted as received on the device.
fn rx_packets(netns: &Netns) -> u64 {
    let text = netns.ip(&format!("-s link show dev {DEVICE}"));
    let mut lines = text.lines().skip_while(|line| !line.trim_start().starts_with("RX:"));
    let values = lines.nth(1).unwrap_or_else(|| panic!("no RX line in {text}"));
    let packets = values.split_whitespace().nth(1).expect("bytes, packets, ...");
    packets.parse().unwrap_or_else(|_| panic!("no packet count in {values}"))
}

/// CPU time of this thread, time in softirqs on its back included.
fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
