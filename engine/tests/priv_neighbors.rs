//! Routes, neighbours and link events on veth pairs in fresh namespaces. Needs root.
//!
//! Time is a parameter of the resolver, so half-minute intervals are tested
//! without waiting; the kernel's own neighbour timers are real and made short.

mod common;

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use common::netns::{Netns, veth, veth_with_queues, wait_until};
use stoq::datapath::af_xdp::link::{InterfaceInfo, interface_by_name, interface_for, interfaces};
use stoq::datapath::af_xdp::neighbors::{
    LinkEvent, Neighbors, NetlinkError, NextHop, NoRouteReason, REFRESH_INTERVAL, RESOLUTION_LIMIT,
    Resolution,
};

const DEVICE: &str = "veth0";
const LIMIT: Duration = Duration::from_secs(5);

/// Two connected namespaces; the resolver watches `left`'s end of the pair.
struct Pair {
    left: Netns,
    right: Netns,
    neighbors: Neighbors,
    /// How much virtual time is ahead of the real one.
    ahead: Duration,
}

impl Pair {
    fn new() -> Self {
        let (left, right) = (Netns::new("left"), Netns::new("right"));
        veth((&left, DEVICE), (&right, DEVICE));
        left.add_address(DEVICE, "fd00::1/64");
        right.add_address(DEVICE, "fd00::2/64");
        let neighbors = open(&left).expect("a veth interface can be watched");
        Self { left, right, neighbors, ahead: Duration::ZERO }
    }

    fn now(&self) -> Instant {
        Instant::now() + self.ahead
    }

    fn poll(&mut self) {
        self.neighbors.poll(self.now());
    }

    fn resolve(&mut self, remote: &str) -> Resolution {
        self.neighbors.resolve(self.now(), &peer(remote, 0), None)
    }

    /// Polls and resolves until `done` holds, and returns that answer.
    fn resolve_until(
        &mut self,
        what: &str,
        remote: SocketAddrV6,
        done: impl Fn(Resolution) -> bool,
    ) -> Resolution {
        let mut last = Resolution::Pending;
        wait_until(what, LIMIT, || {
            self.poll();
            last = self.neighbors.resolve(self.now(), &remote, None);
            done(last)
        });
        last
    }

    fn ready(&mut self, remote: SocketAddrV6) -> NextHop {
        let found = self.resolve_until("the peer is resolved", remote, |answer| {
            matches!(answer, Resolution::Ready(_))
        });
        let Resolution::Ready(hop) = found else { unreachable!("waited for it") };
        hop
    }

    /// Polls until an event comes, and checks that it is the expected one.
    fn expect_event(&mut self, expected: LinkEvent) {
        let mut seen = None;
        wait_until(&format!("event {expected:?}"), LIMIT, || {
            self.poll();
            seen = self.neighbors.poll_event();
            seen.is_some()
        });
        assert_eq!(seen, Some(expected));
    }

    fn reason(&self, remote: &str) -> Option<NoRouteReason> {
        self.neighbors.no_route_reason(&peer(remote, 0), None)
    }
}

fn open(netns: &Netns) -> Result<Neighbors, NetlinkError> {
    let ifindex = netns.ifindex(DEVICE);
    netns.run(|| Neighbors::open(ifindex, DEVICE))
}

fn address(text: &str) -> Ipv6Addr {
    text.parse().expect("a valid IPv6 address")
}

fn peer(remote: &str, scope: u32) -> SocketAddrV6 {
    SocketAddrV6::new(address(remote), 4433, 0, scope)
}

fn link_local(netns: &Netns) -> Ipv6Addr {
    let line = netns.ip(&format!("-6 -o addr show dev {DEVICE} scope link"));
    let text = line.split_whitespace().nth(3).expect("autoconfigured when the link came up");
    address(text.split('/').next().expect("split yields at least one part"))
}

#[test]
fn on_link_peer() {
    let mut pair = Pair::new();
    let hop = pair.ready(peer("fd00::2", 0));
    assert_eq!(hop.src, address("fd00::1"), "the kernel's choice");
    assert_eq!(hop.src_mac, pair.left.mac(DEVICE));
    assert_eq!(hop.dst_mac, pair.right.mac(DEVICE));
    assert_eq!(hop.src_mac, pair.neighbors.mac());
    let generation = pair.neighbors.generation();
    for _ in 0..100 {
        assert_eq!(pair.resolve("fd00::2"), Resolution::Ready(hop));
    }
    assert_eq!(pair.neighbors.generation(), generation, "nothing changed");
}

#[test]
fn source_address_of_the_caller() {
    let mut pair = Pair::new();
    pair.left.add_address(DEVICE, "fd00::11/64");
    pair.left.ip("addr add fd99::1/128 dev lo nodad");
    pair.expect_event(LinkEvent::AddressesChanged);
    pair.ready(peer("fd00::2", 0));
    for local in ["fd00::11", "fd99::1"] {
        let local = address(local);
        match pair.neighbors.resolve(pair.now(), &peer("fd00::2", 0), Some(local)) {
            Resolution::Ready(hop) => assert_eq!(hop.src, local),
            other => panic!("{local}: {other:?}"),
        }
    }
    let foreign = Some(address("fd00::99"));
    let answer = pair.neighbors.resolve(pair.now(), &peer("fd00::2", 0), foreign);
    assert_eq!(answer, Resolution::NoRoute);
    let reason = pair.neighbors.no_route_reason(&peer("fd00::2", 0), foreign);
    assert_eq!(reason, Some(NoRouteReason::ForeignSource));
}

#[test]
fn gateway_and_withdrawn_route() {
    let mut pair = Pair::new();
    assert_eq!(pair.resolve("2001:db8::1"), Resolution::NoRoute);
    assert_eq!(pair.reason("2001:db8::1"), Some(NoRouteReason::Kernel(libc_enetunreach())));
    let generation = pair.neighbors.generation();
    pair.left.ip("route add 2001:db8::/32 via fd00::2");
    let hop = pair.ready(peer("2001:db8::1", 0));
    assert_eq!(hop.dst_mac, pair.right.mac(DEVICE));
    assert_eq!(hop.src, address("fd00::1"));
    assert_ne!(pair.neighbors.generation(), generation);
    pair.left.ip("route del 2001:db8::/32");
    let _ = pair.resolve_until("the route is withdrawn", peer("2001:db8::1", 0), |answer| {
        answer == Resolution::NoRoute
    });
    assert!(matches!(pair.resolve("fd00::2"), Resolution::Ready(_)), "another prefix");
}

#[test]
fn route_with_preferred_source_and_reject() {
    let mut pair = Pair::new();
    pair.left.add_address(DEVICE, "fd00::12/64");
    pair.left.ip("route add 2001:db8:1::/48 via fd00::2 src fd00::12");
    pair.left.ip("route add unreachable 2001:db8:2::/48");
    pair.expect_event(LinkEvent::AddressesChanged);
    assert_eq!(pair.ready(peer("2001:db8:1::1", 0)).src, address("fd00::12"));
    assert_eq!(pair.resolve("2001:db8:2::1"), Resolution::NoRoute);
    assert!(matches!(pair.reason("2001:db8:2::1"), Some(NoRouteReason::Kernel(_))));
}

#[test]
fn policy_rules_are_the_kernels() {
    let mut pair = Pair::new();
    pair.left.ip("route add 2001:db8::/32 via fd00::2 table 77");
    assert_eq!(pair.resolve("2001:db8::1"), Resolution::NoRoute);
    pair.left.ip("-6 rule add to 2001:db8::/32 lookup 77");
    let hop = pair.ready(peer("2001:db8::1", 0));
    assert_eq!(hop.dst_mac, pair.right.mac(DEVICE));
}

#[test]
fn route_by_another_interface() {
    let mut pair = Pair::new();
    let other = Netns::new("other");
    veth((&pair.left, "veth1"), (&other, "veth0"));
    pair.left.add_address("veth1", "fd01::1/64");
    pair.poll();
    let with_source = Some(address("fd01::1"));
    let answer = pair.neighbors.resolve(pair.now(), &peer("fd01::9", 0), with_source);
    assert_eq!(answer, Resolution::NoRoute);
    assert_eq!(pair.resolve("fd01::9"), Resolution::NoRoute);
    assert_eq!(pair.resolve("fd00::1"), Resolution::NoRoute, "ourselves");
    for remote in ["ff02::1", "::", "::ffff:10.0.0.1"] {
        assert_eq!(pair.resolve(remote), Resolution::NoRoute);
        assert_eq!(pair.reason(remote), Some(NoRouteReason::NotUnicast), "{remote}");
    }
}

#[test]
fn a_peer_that_never_answers() {
    let mut pair = Pair::new();
    let start = Instant::now();
    assert_eq!(pair.resolve("fd00::dead"), Resolution::Pending);
    assert_eq!(pair.reason("fd00::dead"), None);
    let answer = pair.resolve_until("the neighbour fails", peer("fd00::dead", 0), |answer| {
        answer != Resolution::Pending
    });
    assert_eq!(answer, Resolution::NoRoute);
    assert!(start.elapsed() > Duration::from_secs(2), "the kernel has tried three times");
    assert!(start.elapsed() < RESOLUTION_LIMIT, "the kernel's word counts");
    let failed = NoRouteReason::NeighborFailed(address("fd00::dead"));
    assert_eq!(pair.reason("fd00::dead"), Some(failed));
    // It comes to life: noticed by the next attempt.
    pair.right.add_address(DEVICE, "fd00::dead/64");
    let hop = pair.ready(peer("fd00::dead", 0));
    assert_eq!(hop.dst_mac, pair.right.mac(DEVICE));
    assert_eq!(pair.reason("fd00::dead"), None);
}

#[test]
fn a_peer_that_announces_its_new_mac() {
    let mut pair = Pair::new();
    let before = pair.ready(peer("fd00::2", 0));
    let generation = pair.neighbors.generation();
    pair.right.ip(&format!("link set {DEVICE} address 02:00:00:00:00:99"));
    // The peer sends by itself: its solicitation carries the new address.
    pair.right.ip(&format!("neigh flush dev {DEVICE}"));
    let socket = pair.right.run(|| UdpSocket::bind("[::]:0")).expect("bind");
    socket.send_to(b"", "[fd00::1]:9").expect("on-link");
    let changed = pair.resolve_until(
        "the new MAC is used",
        peer("fd00::2", 0),
        |answer| matches!(answer, Resolution::Ready(hop) if hop.dst_mac != before.dst_mac),
    );
    let Resolution::Ready(hop) = changed else { unreachable!("waited for it") };
    assert_eq!(hop.dst_mac, [2, 0, 0, 0, 0, 0x99]);
    assert_ne!(pair.neighbors.generation(), generation);
}

/// Bypassed traffic does not make the kernel verify its entry: our refresh does.
#[test]
fn a_peer_that_changes_its_mac_silently() {
    let mut pair = Pair::new();
    for (key, value) in [
        ("base_reachable_time_ms", "100"),
        ("delay_first_probe_time", "0"),
        ("retrans_time_ms", "50"),
    ] {
        pair.left.sysctl(&format!("net/ipv6/neigh/{DEVICE}/{key}"), value);
    }
    pair.ready(peer("fd00::2", 0));
    pair.right.ip(&format!("link set {DEVICE} address 02:00:00:00:00:98"));
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(20));
        pair.poll();
        let _ = pair.resolve("fd00::2");
    }
    pair.ahead = REFRESH_INTERVAL - Duration::from_secs(1);
    let _ = pair.resolve("fd00::2"); // still in use
    pair.ahead = REFRESH_INTERVAL + Duration::from_secs(1);
    let _ = pair.resolve_until(
        "the new MAC is found",
        peer("fd00::2", 0),
        |answer| matches!(answer, Resolution::Ready(hop) if hop.dst_mac == [2, 0, 0, 0, 0, 0x98]),
    );
}

#[test]
fn entries_in_use_stay_fresh() {
    let mut pair = Pair::new();
    pair.left.sysctl(&format!("net/ipv6/neigh/{DEVICE}/base_reachable_time_ms"), "100");
    pair.left.sysctl(&format!("net/ipv6/neigh/{DEVICE}/delay_first_probe_time"), "0");
    pair.ready(peer("fd00::2", 0));
    let state = |pair: &Pair| pair.left.ip(&format!("-6 neigh show fd00::2 dev {DEVICE}"));
    // Idle: the kernel's entry grows stale (with its first periodic work if needed).
    wait_until("the entry is stale", Duration::from_secs(10), || {
        pair.neighbors.poll(pair.now());
        state(&pair).contains("STALE")
    });
    pair.ahead = REFRESH_INTERVAL - Duration::from_secs(1);
    let _ = pair.resolve("fd00::2");
    pair.ahead = REFRESH_INTERVAL + Duration::from_secs(1);
    pair.poll();
    wait_until("the entry is confirmed", LIMIT, || !state(&pair).contains("STALE"));
}

#[test]
fn neighbour_entries_of_the_administrator() {
    let mut pair = Pair::new();
    pair.left
        .ip(&format!("neigh add fd00::77 lladdr 02:00:00:00:00:77 dev {DEVICE} nud permanent"));
    let now = pair.now();
    let answer = pair.neighbors.resolve(now, &peer("fd00::77", 0), None);
    assert!(matches!(answer, Resolution::Ready(hop) if hop.dst_mac == [2, 0, 0, 0, 0, 0x77]));
    pair.ahead = 2 * REFRESH_INTERVAL;
    let _ = pair.resolve("fd00::77");
    pair.poll();
    let entry = pair.left.ip(&format!("-6 neigh show fd00::77 dev {DEVICE}"));
    assert!(entry.contains("PERMANENT"), "left alone: {entry}");
    pair.left.ip(&format!("neigh del fd00::77 dev {DEVICE}"));
    let _ = pair.resolve_until("the entry is gone", peer("fd00::77", 0), |answer| {
        answer == Resolution::Pending
    });
}

#[test]
fn link_local_peer_needs_its_scope() {
    let mut pair = Pair::new();
    let remote = link_local(&pair.right);
    let ifindex = pair.left.ifindex(DEVICE);
    let hop = pair.ready(SocketAddrV6::new(remote, 4433, 0, ifindex));
    assert_eq!(hop.dst_mac, pair.right.mac(DEVICE));
    assert_eq!(hop.src, link_local(&pair.left));
    for scope in [0, ifindex + 1000] {
        let wrong = SocketAddrV6::new(remote, 4433, 0, scope);
        assert_eq!(pair.neighbors.resolve(pair.now(), &wrong, None), Resolution::NoRoute);
        let reason = pair.neighbors.no_route_reason(&wrong, None);
        assert_eq!(reason, Some(NoRouteReason::WrongScope(scope)));
    }
}

#[test]
fn addresses_come_and_go() {
    let mut pair = Pair::new();
    let link_local = link_local(&pair.left);
    assert_eq!(pair.neighbors.addresses(), [address("fd00::1"), link_local]);
    pair.left.add_address(DEVICE, "fd00::5/64");
    pair.expect_event(LinkEvent::AddressesChanged);
    assert!(pair.neighbors.addresses().contains(&address("fd00::5")));
    pair.ready(peer("fd00::2", 0));
    pair.left.ip(&format!("addr change fd00::1/64 dev {DEVICE} preferred_lft 0"));
    pair.expect_event(LinkEvent::AddressesChanged);
    assert_eq!(
        pair.neighbors.addresses(),
        [address("fd00::5"), link_local, address("fd00::1")],
        "a deprecated address is the last one"
    );
    assert_eq!(pair.ready(peer("fd00::2", 0)).src, address("fd00::5"));
    pair.left.ip(&format!("addr del fd00::5/64 dev {DEVICE}"));
    pair.expect_event(LinkEvent::AddressesChanged);
    assert_eq!(pair.neighbors.addresses(), [link_local, address("fd00::1")]);
}

#[test]
fn duplicate_address_detection_is_waited_for() {
    let mut pair = Pair::new();
    for conf in ["all", DEVICE] {
        pair.left.sysctl(&format!("net/ipv6/conf/{conf}/accept_dad"), "1");
    }
    pair.left.ip(&format!("addr add fd00::6/64 dev {DEVICE}"));
    pair.poll();
    assert!(!pair.neighbors.addresses().contains(&address("fd00::6")), "still tentative");
    let source = Some(address("fd00::6"));
    let answer = pair.neighbors.resolve(pair.now(), &peer("fd00::2", 0), source);
    assert_eq!(answer, Resolution::NoRoute);
    pair.expect_event(LinkEvent::AddressesChanged);
    assert!(pair.neighbors.addresses().contains(&address("fd00::6")));
    // The peer owns this one: it never becomes usable.
    pair.left.ip(&format!("addr add fd00::2/64 dev {DEVICE}"));
    wait_until("the duplicate is found", LIMIT, || {
        pair.neighbors.poll(Instant::now());
        pair.left.ip(&format!("-6 addr show dev {DEVICE}")).contains("dadfailed")
    });
    thread::sleep(Duration::from_millis(50));
    pair.poll();
    assert!(!pair.neighbors.addresses().contains(&address("fd00::2")));
}

#[test]
fn mtu_and_own_mac() {
    let mut pair = Pair::new();
    assert_eq!(pair.neighbors.mtu(), 1500);
    pair.left.ip(&format!("link set {DEVICE} mtu 9000"));
    pair.expect_event(LinkEvent::MtuChanged(9000));
    assert_eq!(pair.neighbors.mtu(), 9000);
    pair.left.ip(&format!("link set {DEVICE} address 02:00:00:00:00:55"));
    let hop = pair.resolve_until(
        "our MAC is the new one",
        peer("fd00::2", 0),
        |answer| matches!(answer, Resolution::Ready(hop) if hop.src_mac == [2, 0, 0, 0, 0, 0x55]),
    );
    assert!(matches!(hop, Resolution::Ready(_)));
}

#[test]
fn link_down_and_up() {
    let mut pair = Pair::new();
    assert!(pair.neighbors.link_up());
    pair.right.ip(&format!("link set {DEVICE} down")); // carrier lost
    pair.expect_event(LinkEvent::Down);
    assert!(!pair.neighbors.link_up());
    assert_eq!(pair.resolve("fd00::2"), Resolution::LinkDown);
    pair.right.ip(&format!("link set {DEVICE} up"));
    pair.right.ip(&format!("addr replace fd00::2/64 dev {DEVICE} nodad"));
    wait_until("the link is up again", LIMIT, || {
        pair.neighbors.poll(Instant::now());
        pair.neighbors.link_up()
    });
    pair.ready(peer("fd00::2", 0));
}

#[test]
fn administratively_down() {
    let mut pair = Pair::new();
    pair.left.ip(&format!("link set {DEVICE} down"));
    wait_until("the link is down", LIMIT, || {
        pair.neighbors.poll(Instant::now());
        !pair.neighbors.link_up()
    });
    assert_eq!(pair.resolve("fd00::2"), Resolution::LinkDown);
    assert!(pair.neighbors.addresses().is_empty(), "IPv6 addresses go with the link");
}

#[test]
fn deleted_interface() {
    let mut pair = Pair::new();
    pair.ready(peer("fd00::2", 0));
    let ifindex = pair.left.ifindex(DEVICE);
    pair.left.ip(&format!("link del {DEVICE}"));
    let mut seen = Vec::new();
    wait_until("the interface is gone", LIMIT, || {
        pair.poll();
        seen.extend(std::iter::from_fn(|| pair.neighbors.poll_event()));
        seen.contains(&LinkEvent::Gone)
    });
    assert_eq!(seen.last(), Some(&LinkEvent::Gone));
    assert_eq!(pair.resolve("fd00::2"), Resolution::LinkDown);
    pair.poll();
    assert_eq!(pair.neighbors.poll_event(), None, "told once");
    let again = pair.left.run(|| Neighbors::open(ifindex, DEVICE));
    assert!(matches!(again, Err(NetlinkError::Gone { .. })), "{again:?}");
}

#[test]
fn lost_notifications_are_made_good() {
    let mut pair = Pair::new();
    pair.ready(peer("fd00::2", 0));
    // Old news in the buffer, overtaken when it is read:
    pair.left.ip(&format!("link set {DEVICE} mtu 1300"));
    pair.left.ip(&format!("neigh replace fd00::2 lladdr 02:00:00:00:00:41 dev {DEVICE}"));
    // More route changes than it holds, while nobody reads.
    let mut batch = String::new();
    for n in 0..20_000 {
        batch.push_str(&format!("route add 2001:db8:{:x}::{:x}/128 via fd00::2\n", n / 256, n));
    }
    let file = std::env::temp_dir().join(format!("{}-routes", pair.left.name()));
    std::fs::write(&file, batch).expect("a temporary file");
    pair.left.ip(&format!("-force -batch {}", file.display()));
    std::fs::remove_file(&file).expect("written above");
    // Lost with the rest:
    pair.left.ip(&format!("link set {DEVICE} mtu 1400"));
    pair.left.add_address(DEVICE, "fd00::5/64");
    pair.left.ip(&format!("neigh replace fd00::2 lladdr 02:00:00:00:00:42 dev {DEVICE}"));
    let is_latest =
        |answer| matches!(answer, Resolution::Ready(hop) if hop.dst_mac == [2, 0, 0, 0, 0, 0x42]);
    wait_until("everything is known", LIMIT, || {
        pair.poll();
        pair.neighbors.mtu() == 1400
            && pair.neighbors.addresses().contains(&address("fd00::5"))
            && is_latest(pair.resolve("fd00::2"))
    });
    for _ in 0..1000 {
        pair.poll();
        assert_eq!(pair.neighbors.mtu(), 1400, "old news must not come after it");
        assert!(is_latest(pair.resolve("fd00::2")));
    }
}

#[test]
fn interfaces_and_what_is_refused() {
    let (left, right) = (Netns::new("left"), Netns::new("right"));
    veth_with_queues((&left, DEVICE), (&right, DEVICE), 3);
    left.add_address(DEVICE, "fd00::1/64");
    veth((&left, "veth1"), (&right, "veth1"));
    left.ip("link add br0 type bridge");
    left.ip("link set veth1 master br0");
    left.ip("tuntap add tun0 mode tun");
    let (all, found, missing) = left.run(|| {
        (interfaces(), interface_by_name(DEVICE), interface_by_name("eth7").map(|info| info.name))
    });
    let all = all.expect("the kernel lists them");
    let info = found.expect("it exists");
    assert_eq!((info.rx_queues, info.tx_queues, info.mtu, info.up), (3, 3, 1500, true));
    assert_eq!((info.kind.as_str(), info.mac), ("veth", left.mac(DEVICE)));
    let missing = missing.expect_err("does not exist").to_string();
    assert!(missing.contains("lo") && missing.contains("br0"), "{missing}");
    let by_name = |name: &str| -> &InterfaceInfo {
        all.iter().find(|info| info.name == name).expect("made above")
    };
    assert_eq!(by_name("veth1").master, Some(by_name("br0").index));
    for (name, words) in [
        ("tun0", "no Ethernet frames"),
        ("br0", "member interface instead (veth1)"),
        ("veth1", "member of the bridge br0"),
    ] {
        let index = by_name(name).index;
        let error = left.run(|| Neighbors::open(index, name)).expect_err("unsuitable");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn the_interface_that_the_kernel_would_use() {
    let pair = Pair::new();
    let ifindex = pair.left.ifindex(DEVICE);
    let remote = link_local(&pair.right);
    let found = |remote: SocketAddrV6| pair.left.run(|| interface_for(&remote));
    assert_eq!(found(peer("fd00::2", 0)).expect("on-link").name, DEVICE);
    assert_eq!(found(peer("fd00::1", 0)).expect("our own").name, "lo");
    let scoped = SocketAddrV6::new(remote, 1, 0, ifindex);
    assert_eq!(found(scoped).expect("its scope says so").index, ifindex);
    let error = found(peer("2001:db8::1", 0)).expect_err("no route").to_string();
    assert!(error.contains("no route to 2001:db8::1"), "{error}");
}

/// A process that has given up its privileges asks through an ordinary socket.
#[test]
fn without_privileges() {
    let Pair { left, right, mut neighbors, .. } = Pair::new();
    let hop = left.run(|| {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        set_capabilities(None, sets).expect("privileges can be given up");
        let mut last = Resolution::Pending;
        wait_until("the peer is resolved", LIMIT, || {
            neighbors.poll(Instant::now());
            last = neighbors.resolve(Instant::now(), &peer("fd00::2", 0), None);
            matches!(last, Resolution::Ready(_))
        });
        last
    });
    let Resolution::Ready(hop) = hop else { unreachable!("waited for it") };
    assert_eq!(hop.dst_mac, right.mac(DEVICE));
}

#[test]
fn loopback() {
    let netns = Netns::new("lo");
    let mut neighbors = netns.run(|| Neighbors::open(1, "lo")).expect("loopback can be watched");
    let mut last = Resolution::Pending;
    wait_until("::1 is resolved", LIMIT, || {
        neighbors.poll(Instant::now());
        last = neighbors.resolve(Instant::now(), &peer("::1", 0), None);
        matches!(last, Resolution::Ready(_))
    });
    let expected = NextHop { src: Ipv6Addr::LOCALHOST, src_mac: [0; 6], dst_mac: [0; 6] };
    assert_eq!(last, Resolution::Ready(expected));
}

/// `ENETUNREACH` on Linux.
fn libc_enetunreach() -> i32 {
    rustix::io::Errno::NETUNREACH.raw_os_error()
}
