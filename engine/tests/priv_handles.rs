//! Misuse of the async handles over AF_XDP: besides connections and streams, the frames of packet memory
//! are counted. Afterwards every one is free or waits to be filled, as before; nothing is left of rings
//! and program when the engines have gone. Needs root.
//!
//! Frames are also checked against their ledger in every turn of a debug build.

mod common;
#[path = "common/misuse.rs"]
#[allow(dead_code, unreachable_pub)]
mod misuse;
#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::fs;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::netns::{Netns, veth_with_queues};
use common::transfer::assert_interface_clean;
use futures_util::future::join_all;
use pair::{NAME, PATIENCE, Pair, Watchdog, identity, wait_for};
use pollster::block_on;
use stoq::VarInt;
use stoq::config::TransportConfig;
use stoq::datapath::DatapathKind;
use stoq::datapath::choice::DatapathChoice;
use stoq::engine::Engine;
use stoq::error::ConnectionError;

const DEVICE: &str = "veth0";
const SHARDS: usize = 2;
const LEFT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const RIGHT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

/// Two namespaces on a veth pair; the client is left. One at a time: the process's mappings are counted.
struct Link {
    left: Netns,
    right: Netns,
    _watchdog: Watchdog,
    _alone: MutexGuard<'static, ()>,
}

impl Link {
    fn new(what: &'static str) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (left, right) = (Netns::new("left"), Netns::new("right"));
        veth_with_queues((&left, DEVICE), (&right, DEVICE), SHARDS as u32);
        left.add_address(DEVICE, &format!("{LEFT}/64"));
        right.add_address(DEVICE, &format!("{RIGHT}/64"));
        Self {
            left,
            right,
            _watchdog: Watchdog::with_limit(what, Duration::from_secs(240)),
            _alone,
        }
    }

    fn pair(&self, change: impl Fn(TransportConfig) -> TransportConfig) -> Pair {
        let config = |address| {
            change(TransportConfig {
                bind: SocketAddrV6::new(address, 0, 0, 0),
                datapath: DatapathChoice::AfXdp,
                interface: Some(DEVICE.to_owned()),
                shards: SHARDS,
                spin_us: 0,
                ..TransportConfig::default()
            })
        };
        let (server_tls, client_tls) = identity();
        let server = Engine::builder().config(config(RIGHT)).server(server_tls);
        let client = Engine::builder().config(config(LEFT)).client(client_tls);
        let pair = Pair {
            server: self.right.run(|| server.start().expect("the server starts")),
            client: self.left.run(|| client.start().expect("the client starts")),
        };
        for engine in [&pair.server, &pair.client] {
            assert!(engine.datapaths().iter().all(|path| path.kind == DatapathKind::AfXdp));
        }
        pair
    }

    /// The engines have gone: no program, no ring and no packet memory of theirs is left.
    fn assert_clean(&self) {
        for netns in [&self.left, &self.right] {
            assert_interface_clean(netns, DEVICE);
        }
        let maps = fs::read_to_string("/proc/self/maps").expect("procfs");
        let rings = maps.lines().filter(|line| line.contains("socket:[")).count();
        assert_eq!(rings, 0, "mappings of rings are left:\n{maps}");
    }
}

/// Frames of all shards: free, with the kernel for receiving, for sending.
fn frames(engine: &Engine) -> [u64; 3] {
    let mut sum = [0; 3];
    for stats in engine.stats() {
        let path = stats.datapath;
        let kinds = [path.frames_free, path.frames_fill, path.frames_tx];
        assert!(kinds.iter().sum::<u64>() > 0, "a shard without packet memory: {path:?}");
        for (sum, frames) in sum.iter_mut().zip(kinds) {
            *sum += frames;
        }
    }
    sum
}

/// Packet memory of both engines once nothing is under way.
fn resting(pair: &Pair) -> [[u64; 3]; 2] {
    let engines = [&pair.server, &pair.client];
    wait_for("nothing is being sent", || engines.iter().all(|engine| frames(engine)[2] == 0));
    engines.map(frames)
}

#[test]
fn whatever_is_misused_no_frame_is_lost() {
    let link = Link::new("misuse over AF_XDP");
    let pair = link.pair(misuse::tight);
    // One connection, so that everything that is made once has been made.
    drop(block_on(pair.connect()));
    pair.wait_idle();
    let before = resting(&pair);
    println!("frames free, filling, sending: server {:?}, client {:?}", before[0], before[1]);
    misuse::misuse(&pair, 5);
    assert_eq!(resting(&pair), before, "frames are missing");
    drop(pair);
    link.assert_clean();
}

/// A thousand streams, read by nobody, when the peer's link goes down for good.
#[test]
fn a_peer_that_vanishes_takes_no_frame_along() {
    let link = Link::new("vanished peer over AF_XDP");
    let pair = link.pair(|config| TransportConfig { idle_timeout_ms: 3_000, ..config });
    drop(block_on(pair.connect()));
    pair.wait_idle();
    let before = resting(&pair);
    let (client, server) = block_on(pair.connect());
    let sends = block_on(join_all((0..1000).map(|_| async {
        let mut send = client.open_uni().await.expect("opened");
        send.write_all(&[6; 10_000]).await.expect("written");
        send
    })));
    link.right.ip(&format!("link set {DEVICE} down"));
    for end in [&client, &server] {
        assert_eq!(block_on(end.closed()), ConnectionError::TimedOut);
    }
    // Knocks in vain meanwhile.
    drop(pair.client.connect(pair.server.local_addr(), NAME));
    drop((client, server, sends));
    pair.wait_idle();
    link.right.ip(&format!("link set {DEVICE} up"));
    // The address went with the link; what is counted is packet memory.
    assert_eq!(resting(&pair), before, "frames are missing");
    drop(pair);
    link.assert_clean();
}

#[test]
fn a_shutdown_in_the_middle_frees_everything() {
    let link = Link::new("shutdown over AF_XDP");
    for grace in [Duration::ZERO, Duration::from_millis(50)] {
        let pair = link.pair(|config| config);
        let (client, server) = block_on(pair.connect());
        let sends = block_on(join_all((0..100).map(|_| async {
            let mut send = client.open_uni().await.expect("opened");
            send.write_all(&[6; 100_000]).await.expect("written");
            send
        })));
        let Pair { server: server_engine, client: client_engine } = pair;
        let report = client_engine.shutdown_blocking(grace, VarInt::from_u32(2), b"over");
        assert_eq!(report.connections_cut_off, 1, "{report:?}");
        assert_eq!(report.streams_cut_off, 100, "{report:?}");
        assert!(matches!(block_on(server.closed()), ConnectionError::ClosedByPeer { .. }));
        let start = std::time::Instant::now();
        drop(server_engine);
        assert!(start.elapsed() < PATIENCE);
        link.assert_clean();
        drop((client, server, sends));
    }
}
