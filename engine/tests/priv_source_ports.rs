//! A client's source ports over AF_XDP: chosen where the device's receive hash is known, one for all
//! shards where it is not. Needs root.
//!
//! A veth pair hashes nothing, so the hash is given here: the peer sees ports that fit it, and
//! replies are received on either port at either queue.

mod common;
#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::time::{Duration, Instant};

use common::netns::{Netns, veth_with_queues};
use pair::identity;
use stoq::config::TransportConfig;
use stoq::datapath::af_xdp::{AfXdp, AfXdpConfig, ReceiveHash, open_interface};
use stoq::datapath::choice::DatapathChoice;
use stoq::datapath::{Datapath, Ecn, RxBatch, TxMeta, TxVerdict};
use stoq::engine::Engine;

const DEVICE: &str = "veth0";
const CLIENT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const PEER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const QUEUES: u32 = 2;
const PEERS: usize = 16;
const LIMIT: Duration = Duration::from_secs(20);

fn link() -> (Netns, Netns) {
    let (client, peer) = (Netns::new("client"), Netns::new("peer"));
    veth_with_queues((&client, DEVICE), (&peer, DEVICE), QUEUES);
    client.add_address(DEVICE, &format!("{CLIENT}/64"));
    peer.add_address(DEVICE, &format!("{PEER}/64"));
    // The kernel fills in whole checksums, as a NIC would.
    peer.exec(&format!("ethtool -K {DEVICE} tx-checksum-ip-generic off"));
    (client, peer)
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
    let key: Vec<u8> = (0..40).map(|index: u8| index.wrapping_mul(97) ^ 0x5a).collect();
    let table: Vec<u32> = (0..128).map(|entry| entry % QUEUES).collect();
    let hash = ReceiveHash::new(&key, &table).expect("a usable table");
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
