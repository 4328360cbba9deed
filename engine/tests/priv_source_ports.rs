//! A client's source ports over AF_XDP: chosen where the device's receive hash is known, one for all
//! shards where it is not. Needs root.
//!
//! A veth pair hashes nothing, so the hash is given here: the peer sees ports that fit it, and
//! replies are received on either port at either queue.

mod common;
#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::collections::{BTreeSet, HashMap};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::netns::{Netns, veth_with_queues, wait_until};
use common::transfer::{Transfer, Watchdog, start_client, start_server};
use pair::identity;
use stoq::config::TransportConfig;
use stoq::datapath::af_xdp::{AfXdp, AfXdpConfig, ReceiveHash, open_interface};
use stoq::datapath::choice::DatapathChoice;
use stoq::datapath::{Capabilities, Datapath, DatapathKind, Ecn, RxBatch, TxMeta, TxVerdict};
use stoq::engine::Engine;

const DEVICE: &str = "veth0";
const CLIENT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const PEER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const QUEUES: u32 = 2;
const PEERS: usize = 16;
const LIMIT: Duration = Duration::from_secs(20);

fn link() -> (Netns, Netns) {
    let (client, peer) = (Netns::new("client"), Netns::new("peer"));
    connect(&client, &peer);
    (client, peer)
}

fn connect(client: &Netns, peer: &Netns) {
    veth_with_queues((client, DEVICE), (peer, DEVICE), QUEUES);
    client.add_address(DEVICE, &format!("{CLIENT}/64"));
    peer.add_address(DEVICE, &format!("{PEER}/64"));
    // The kernel fills in whole checksums, as a NIC would.
    peer.exec(&format!("ethtool -K {DEVICE} tx-checksum-ip-generic off"));
}

/// How the client's device would hash, if it did.
fn receive_hash() -> ReceiveHash {
    let key: Vec<u8> = (0..40).map(|index: u8| index.wrapping_mul(97) ^ 0x5a).collect();
    let table: Vec<u32> = (0..128).map(|entry| entry % QUEUES).collect();
    ReceiveHash::new(&key, &table).expect("a usable table")
}

/// Sends until it has left: the first datagrams wait for the neighbour.
fn send(path: &mut AfXdp, remote: SocketAddrV6, payload: &[u8]) {
    let meta = TxMeta { remote, local: None, ecn: Ecn::NotEct };
    let start = Instant::now();
    while path.transmit(&meta, payload) != TxVerdict::Accepted {
        path.flush(Instant::now());
        assert!(start.elapsed() < LIMIT, "the datagram is not taken");
    }
    path.flush(Instant::now());
}

/// What a peer receives next while all shards turn: its sender.
fn sender_of_next(socket: &UdpSocket, paths: &mut [AfXdp], batch: &mut RxBatch) -> SocketAddrV6 {
    let start = Instant::now();
    let mut buffer = [0; 64];
    loop {
        for path in paths.iter_mut() {
            path.receive(Instant::now(), batch);
            path.flush(Instant::now());
        }
        if let Ok((_, std::net::SocketAddr::V6(sender))) = socket.recv_from(&mut buffer) {
            return sender;
        }
        assert!(start.elapsed() < LIMIT, "nothing arrives");
    }
}

#[test]
fn each_shard_sends_from_the_port_whose_replies_come_to_its_queue() {
    let (client, peer) = link();
    let hash = receive_hash();
    let mut config = AfXdpConfig::new(DEVICE, SocketAddrV6::new(CLIENT, 0, 0, 0));
    config.queues = (0..QUEUES).collect();
    config.receive_hash = Some(hash.clone());
    let mut paths = client.run(|| open_interface(&config)).expect("opened");
    let own: BTreeSet<u16> = paths.iter().map(|path| path.local_addr().port()).collect();
    assert_eq!(own.len(), QUEUES as usize, "a port for each shard");

    let sockets: Vec<UdpSocket> =
        peer.run(|| (0..PEERS).map(|_| UdpSocket::bind((PEER, 0)).expect("a free port")).collect());
    let mut batch = RxBatch::new(64, 1 << 20);
    let mut used = vec![BTreeSet::new(); QUEUES as usize];
    for socket in &sockets {
        socket.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
        let remote = match socket.local_addr().expect("bound") {
            std::net::SocketAddr::V6(address) => address,
            std::net::SocketAddr::V4(address) => panic!("{address} in an IPv6 test"),
        };
        for queue in 0..QUEUES {
            send(&mut paths[queue as usize], remote, b"ask");
            let sender = sender_of_next(socket, &mut paths, &mut batch);
            assert_eq!(hash.queue(&remote, &sender), queue, "{remote} sees {sender}");
            used[queue as usize].insert(sender.port());
            socket.send_to(b"answer", sender).expect("sent");
        }
    }
    assert!(used.iter().all(|ports| *ports == own), "shards use each other's ports: {used:?}");
    // Wherever this pair put them, the answers were received from the rings.
    let start = Instant::now();
    let received =
        |paths: &[AfXdp]| paths.iter().map(|path| path.counters().rx_datagrams).sum::<u64>();
    while received(&paths) < (PEERS * QUEUES as usize) as u64 {
        for path in &mut paths {
            path.receive(Instant::now(), &mut batch);
            batch.drain().for_each(drop);
        }
        assert!(start.elapsed() < LIMIT, "{} answers arrived", received(&paths));
    }
    for path in &paths {
        let counters = path.counters();
        assert_eq!((counters.rx_slow_path, counters.rx_drop_malformed), (0, 0), "{counters:?}");
    }
}

#[test]
fn a_device_without_a_receive_hash_gets_one_port_and_says_so() {
    let (client, _peer) = link();
    let (_, client_tls) = identity();
    let config = TransportConfig {
        bind: SocketAddrV6::new(CLIENT, 0, 0, 0),
        datapath: DatapathChoice::AfXdp,
        interface: Some(DEVICE.to_owned()),
        shards: QUEUES as usize,
        ..TransportConfig::default()
    };
    let engine = client.run(|| Engine::builder().config(config).client(client_tls).start());
    let reasons = engine.expect("the client starts").datapath_reasons().join("; ");
    assert!(reasons.contains("replies are handed over between shards"), "{reasons}");
    assert!(reasons.contains("veth0 does not tell how it spreads packets"), "{reasons}");
}

/// Stands between a client on the link and a server on `lo`, and notes from which ports the client sends.
/// To the server each of them is a client that has moved.
struct Witness {
    addr: SocketAddrV6,
    ports: Arc<Mutex<BTreeSet<u16>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Witness {
    /// At this port of the peer, in the calling thread's namespace.
    fn start(port: u16, server: SocketAddrV6) -> Self {
        let addr = SocketAddrV6::new(PEER, port, 0, 0);
        let front = UdpSocket::bind(addr).expect("a free port of a namespace of our own");
        front.set_nonblocking(true).expect("non-blocking");
        let (ports, stop): (Arc<Mutex<BTreeSet<u16>>>, Arc<AtomicBool>) = Default::default();
        let (noted, stopped) = (ports.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut backs: HashMap<SocketAddr, UdpSocket> = HashMap::new();
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                let mut worked = false;
                // Errors: nothing there, or the link is gone, which loses what is sent, as a wire does.
                while let Ok((bytes, from)) = front.recv_from(&mut buffer) {
                    worked = true;
                    noted.lock().expect("not poisoned").insert(from.port());
                    let back = backs.entry(from).or_insert_with(|| {
                        let back = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("a free port");
                        back.set_nonblocking(true).expect("non-blocking");
                        back.connect(server).expect("an address");
                        back
                    });
                    let _lost = back.send(&buffer[..bytes]);
                }
                for (to, back) in &backs {
                    while let Ok(bytes) = back.recv(&mut buffer) {
                        worked = true;
                        let _lost = front.send_to(&buffer[..bytes], to);
                    }
                }
                if !worked {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        });
        Self { addr, ports, stop, thread: Some(thread) }
    }

    /// The ports that are sent from from now on, while the transfer goes on a little.
    fn ports_now(&self, transfer: &Transfer) -> BTreeSet<u16> {
        self.ports.lock().expect("not poisoned").clear();
        transfer.advance(200_000, LIMIT);
        self.ports.lock().expect("not poisoned").clone()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the witness panicked");
    }
}

/// The ports of an engine's shards, in order, as its reasons tell them.
fn source_ports(engine: &Engine) -> Vec<u16> {
    let reasons = engine.datapath_reasons().join("; ");
    let list = reasons.split_once("source ports [").and_then(|(_, rest)| rest.split_once(']'));
    let (list, _) = list.unwrap_or_else(|| panic!("one port for all: {reasons}"));
    list.split(", ").map(|port| port.parse().expect("a port")).collect()
}

/// A shard's queue goes, and with it the choice of ports; the queue returns, and the choice with it.
#[test]
fn a_shard_that_returns_from_its_socket_sends_from_the_same_port_again() {
    let _watchdog = Watchdog::new("source ports over a failover", Duration::from_secs(120));
    let (client_side, peer_side) = link();
    let hash = receive_hash();
    let config = TransportConfig {
        bind: SocketAddrV6::new(CLIENT, 0, 0, 0),
        datapath: DatapathChoice::AfXdp,
        interface: Some(DEVICE.to_owned()),
        shards: QUEUES as usize,
        spin_us: 20,
        failover_backoff_ms_min: 50,
        failover_backoff_ms_max: 400,
        ..TransportConfig::default()
    };
    let client = client_side.run(|| {
        hash.clone().assume_on_this_thread();
        start_client(Engine::builder().config(config))
    });
    let client = client.unwrap_or_else(|error| panic!("client: {error}"));
    let ports = source_ports(&client);
    let at = |port| SocketAddrV6::new(CLIENT, port, 0, 0);
    // A peer to which each shard sends from the other's port: the socket cannot do that.
    let crosswise = |peer: &u16| {
        let peer = SocketAddrV6::new(PEER, *peer, 0, 0);
        hash.queue(&peer, &at(ports[0])) == 1 && hash.queue(&peer, &at(ports[1])) == 0
    };
    let peer_port = (4000..5000).find(crosswise).expect("every other one is");
    let (server, witness) = peer_side.run(|| {
        let server = start_server(
            Ipv6Addr::LOCALHOST,
            Engine::builder().config(TransportConfig {
                // What the link carries; a witness of larger ones would have to cut them.
                mtu_upper_bound_bytes: 1400,
                ..pair::config()
            }),
        );
        let server = server.unwrap_or_else(|error| panic!("server: {error}"));
        let witness = Witness::start(peer_port, server.local_addr());
        (server, witness)
    });
    // Shards take turns; the connection shall be the second one's, whose queue can be taken away.
    drop(client.connect(SocketAddrV6::new(PEER, 9, 0, 0), "nobody"));
    let transfer = Transfer::start_to(witness.addr, server, client);
    let paths = || transfer.client.datapaths();
    let on_device = |path: &Capabilities| path.kind == DatapathKind::AfXdp;
    let chosen = BTreeSet::from([ports[0]]);
    assert_eq!(witness.ports_now(&transfer), chosen, "{ports:?}");

    client_side.ip(&format!("link del {DEVICE}"));
    wait_until("the sockets stand in", LIMIT, || !paths().iter().any(on_device));
    connect_with_one_queue(&client_side, &peer_side);
    wait_until("shard 0 is back", LIMIT, || on_device(&paths()[0]));
    let own = BTreeSet::from([ports[1]]);
    wait_until("shard 1 sends from its own port", LIMIT, || witness.ports_now(&transfer) == own);
    assert!(!on_device(&paths()[1]));

    // With XDP an end has no fewer receive queues than its peer has transmit queues.
    for change in ["rx", "tx"] {
        for netns in [&client_side, &peer_side] {
            netns.exec(&format!("ethtool -L {DEVICE} {change} {QUEUES}"));
        }
    }
    wait_until("shard 1 is back", LIMIT, || paths().iter().all(on_device));
    wait_until("it chooses again", LIMIT, || witness.ports_now(&transfer) == chosen);
    let counters = pair::counters(&transfer.client);
    assert_eq!(counters.rx_drop_no_owner, 0, "{counters:?}");
    transfer.finish_intact();
}

/// The link as it was, but for the second queue of either end.
fn connect_with_one_queue(client: &Netns, peer: &Netns) {
    client.ip(&format!(
        "link add {DEVICE} numrxqueues {QUEUES} numtxqueues {QUEUES} type veth \
         peer name {DEVICE} netns {} numrxqueues {QUEUES} numtxqueues {QUEUES}",
        peer.name()
    ));
    for (netns, address) in [(client, CLIENT), (peer, PEER)] {
        netns.exec(&format!("ethtool -L {DEVICE} rx 1 tx 1"));
        netns.add_address(DEVICE, &format!("{address}/64"));
    }
    peer.exec(&format!("ethtool -K {DEVICE} tx-checksum-ip-generic off"));
    for netns in [peer, client] {
        netns.ip(&format!("link set {DEVICE} up"));
    }
}
