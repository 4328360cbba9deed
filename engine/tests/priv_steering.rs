//! Steering over veth, with the kernel's help and without: a NAT changes ports and addresses in
//! mid-transfer, and every packet finds its shard. Needs root.

#[path = "common/balance.rs"]
#[allow(dead_code, unreachable_pub)]
mod balance;
mod common;
#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;
#[path = "common/relay.rs"]
#[allow(dead_code, unreachable_pub)]
mod relay;

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::time::Instant;

use bytes::Bytes;
use common::netns::{Netns, veth_with_queues, wait_until};
use pair::{NAME, PATIENCE, Watchdog, counters, identity};
use pollster::block_on;
use relay::Relay;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use stoq::config::{MIGRATIONS_PER_TURN_MAX, TransportConfig};
use stoq::connection::Connection;
use stoq::datapath::choice::DatapathChoice;
use stoq::datapath::socket::SocketDatapath;
use stoq::datapath::udp_socket::SocketConfig;
use stoq::datapath::{Datapath, Ecn, TxMeta};
use stoq::engine::Engine;

const DEVICE: &str = "veth0";
const SERVER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
/// Addresses that the NAT has towards the server.
const SOURCES: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x11),
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x12),
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x13),
];
const CLIENTS: usize = 4;
const REBINDINGS: u64 = 25;
/// The longest forged packet.
const FORGERY_BYTES: usize = 60;

/// Two namespaces, a server with shards in one, clients and their NATs in the other.
struct Stage {
    left: Netns,
    right: Netns,
    _watchdog: Watchdog,
}

impl Stage {
    fn new(test: &'static str, queues: u32) -> Self {
        let (left, right) = (Netns::new("left"), Netns::new("right"));
        veth_with_queues((&left, DEVICE), (&right, DEVICE), queues);
        right.add_address(DEVICE, &format!("{SERVER}/64"));
        for address in SOURCES {
            left.add_address(DEVICE, &format!("{address}/64"));
        }
        // The kernel fills in whole checksums, as a NIC would.
        left.exec(&format!("ethtool -K {DEVICE} tx-checksum-ip-generic off"));
        Self { left, right, _watchdog: Watchdog::new(test) }
    }

    fn engines(&self, datapath: DatapathChoice, shards: usize) -> (Engine, Engine) {
        let (server_tls, client_tls) = identity();
        let config = TransportConfig {
            bind: SocketAddrV6::new(SERVER, 0, 0, 0),
            datapath,
            interface: Some(DEVICE.to_owned()),
            shards,
            spin_us: 0,
            ..TransportConfig::default()
        };
        let server = self.right.run(|| Engine::builder().config(config).server(server_tls).start());
        // Reachable over the pair, and over `lo`, where the NATs of other tests are.
        let bind = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0);
        let config = TransportConfig { bind, shards: 3, ..pair::config() };
        let client = self.left.run(|| Engine::builder().config(config).client(client_tls).start());
        (server.expect("the server starts"), client.expect("the client starts"))
    }

    fn relay(&self, server: &Engine) -> Relay {
        self.left
            .run(|| Relay::start(Ipv6Addr::LOCALHOST, server.local_addr(), SOURCES.to_vec(), 10))
    }
}

async fn connect(client: &Engine, server: &Engine, relay: &Relay) -> (Connection, Connection) {
    let connecting = client.connect(relay.addr, NAME);
    let incoming = server.accept().await.expect("a client knocks");
    let (client, server) = futures_util::future::join(connecting, incoming.accept()).await;
    (client.expect("connected"), server.expect("accepted"))
}

/// One stream from the client to the server that lasts through all rebindings.
async fn transfer_through_rebindings(client: &Connection, server: &Connection, relay: &Relay) {
    transfer_through(client, server, REBINDINGS, || relay.rebind()).await;
}

/// One stream from the client to the server; `disturb` comes after each of its parts.
async fn transfer_through(
    client: &Connection,
    server: &Connection,
    rounds: u64,
    mut disturb: impl FnMut(),
) {
    const CHUNK_BYTES: usize = 30_000;
    let mut send = client.open_uni().await.expect("a stream");
    let mut recv = None;
    for round in 0..=rounds {
        send.write_all(&[round as u8; CHUNK_BYTES]).await.expect("written");
        if recv.is_none() {
            recv = Some(server.accept_uni().await.expect("a stream"));
        }
        let recv = recv.as_mut().expect("opened with the first chunk");
        let mut left = CHUNK_BYTES;
        while left > 0 {
            let chunk = recv.read_chunk(left).await.expect("received").expect("not the end");
            assert!(chunk.iter().all(|byte| *byte == round as u8), "round {round} is damaged");
            left -= chunk.len();
        }
        // The next packet of the client comes from elsewhere.
        disturb();
    }
    send.finish().expect("finished");
    let rest = recv.expect("opened").read_to_end(1).await.expect("the end");
    assert!(rest.is_empty());
}

/// Several clients, each behind a NAT that changes its port and address all the time.
fn survive_rebindings(stage: &Stage, server: &Engine, client: &Engine) {
    let relays: Vec<Relay> = (0..CLIENTS).map(|_| stage.relay(server)).collect();
    // Held until the counters were read: a packet that a slow relay delivers after its connection was
    // closed and forgotten would count as one of an unknown connection.
    let mut held = Vec::new();
    block_on(async {
        for relay in &relays {
            let (near, far) = connect(client, server, relay).await;
            transfer_through_rebindings(&near, &far, relay).await;
            held.push((near, far));
            assert!(relay.rebindings() >= REBINDINGS, "only {}", relay.rebindings());
            // The server answers on each new path with a fresh ID (RFC 9000 §9.5); the client,
            // which does not know of its NAT, cannot.
            let fresh = relay.cids_of_server().len() as u64;
            assert!(fresh > REBINDINGS / 2, "{fresh} IDs for {REBINDINGS} paths");
        }
    });
    let counters = counters(server);
    assert_eq!(counters.accepted, CLIENTS as u64);
    assert_eq!(counters.rx_drop_no_owner, 0, "{counters:?}");
    assert_eq!(counters.rx_drop_unknown_connection, 0, "{counters:?}");
}

fn steered(server: &Engine) -> BTreeMap<&'static str, u64> {
    let counters = server.steering_counters();
    let counters = counters.unwrap_or_else(|| panic!("{:?}", server.datapath_reasons()));
    counters.expect("the kernel answers").into_iter().collect()
}

/// The kernel's program: no packet ever reaches a shard that does not own it.
fn no_packet_is_handed_over(test: &'static str, datapath: DatapathChoice) {
    let stage = Stage::new(test, 4);
    let (server, client) = stage.engines(datapath, 4);
    survive_rebindings(&stage, &server, &client);
    // A client's shards share a port as well: replies name their shard.
    assert_eq!(counters(&client).rx_handed_over, 0);
    let counters = counters(&server);
    let steered = steered(&server);
    assert_eq!(counters.rx_handed_over, 0, "{steered:?} {counters:?}");
    assert!(steered["steered_by_id"] > CLIENTS as u64 * REBINDINGS, "{steered:?}");
    assert!(steered["steered_by_hash"] >= CLIENTS as u64, "{steered:?}");
    assert_eq!(steered["pass_foreign"] + steered["pass_no_socket"], 0, "{steered:?}");
    assert!(server.prometheus().contains("stoq_steering_packets_total{outcome=\"steered_by_id\"}"));
    // Rotated keys reach the kernel before the first ID is made with them.
    let rotated = stoq::config::CidConfig { rotation: 4, ..Default::default() };
    server.rotate_cids(&rotated).expect("rotated");
    survive_after_rotation(&stage, &server, &client);
}

fn survive_after_rotation(stage: &Stage, server: &Engine, client: &Engine) {
    let relay = stage.relay(server);
    block_on(async {
        let (near, far) = connect(client, server, &relay).await;
        transfer_through_rebindings(&near, &far, &relay).await;
    });
    assert!(relay.cids().iter().all(|cid| cid[0] >> 5 == 4));
    let counters = counters(server);
    assert_eq!((counters.rx_handed_over, counters.rx_drop_no_owner), (0, 0), "{counters:?}");
}

#[test]
fn the_kernel_steers_over_plain_sockets() {
    no_packet_is_handed_over("the_kernel_steers_over_plain_sockets", DatapathChoice::Socket);
}

#[test]
fn the_kernel_steers_over_io_uring() {
    no_packet_is_handed_over("the_kernel_steers_over_io_uring", DatapathChoice::IoUring);
}

/// A server sends 2 MB over each of several connections that share both addresses and ports. GRO or
/// a GSO batch may join packets of two connections, of which only the first is steered: the shards
/// sort out the rest, and nothing is lost.
#[test]
fn connections_of_one_port_all_get_their_downloads() {
    const DOWNLOAD_BYTES: usize = 2 << 20;
    const CONNECTIONS: usize = 12;
    let stage = Stage::new("connections_of_one_port_all_get_their_downloads", 4);
    let (server_tls, client_tls) = identity();
    let config = |address| TransportConfig {
        bind: SocketAddrV6::new(address, 0, 0, 0),
        shards: 3,
        ..pair::config()
    };
    let server = Engine::builder().config(config(SERVER)).server(server_tls);
    let client = Engine::builder().config(config(SOURCES[0])).client(client_tls);
    let server = stage.right.run(|| server.start()).expect("the server starts");
    let client = stage.left.run(|| client.start()).expect("the client starts");
    block_on(async {
        let mut downloads = Vec::new();
        for _ in 0..CONNECTIONS {
            let connecting = client.connect(server.local_addr(), NAME);
            let incoming = server.accept().await.expect("a client knocks");
            let (near, far) = futures_util::future::join(connecting, incoming.accept()).await;
            downloads.push(download(near.expect("connected"), far.expect("accepted")));
        }
        for received in futures_util::future::join_all(downloads).await {
            assert_eq!(received, DOWNLOAD_BYTES);
        }
    });
    async fn download(near: Connection, far: Connection) -> usize {
        let sending = async {
            let mut send = far.open_uni().await.expect("a stream");
            send.write_all(&vec![7; DOWNLOAD_BYTES]).await.expect("written");
            send.finish().expect("finished");
        };
        let receiving = async {
            let mut recv = near.accept_uni().await.expect("a stream");
            recv.read_to_end(DOWNLOAD_BYTES + 1).await.expect("received").len()
        };
        futures_util::future::join(sending, receiving).await.1
    }
    for (name, engine) in [("server", &server), ("client", &client)] {
        hand_overs_end(engine);
        println!("{name}: {} handed over", counters(engine).rx_handed_over);
        assert_eq!(counters(engine).rx_drop_no_owner, 0, "{name}");
    }
}

/// What a card's GRO, or a sender that does not look, joins of several connections: the kernel steers
/// the train by its first packet, and the shard that gets it hands over each other's packets.
#[test]
fn a_train_of_several_connections_is_taken_apart() {
    const CONNECTIONS: usize = 6;
    const PACKETS_OF_EACH: usize = 5;
    const PACKET_BYTES: usize = 60;
    let stage = Stage::new("a_train_of_several_connections_is_taken_apart", 4);
    // Without checksums by the device the kernel would refuse to send trains.
    stage.left.exec(&format!("ethtool -K {DEVICE} tx-checksum-ip-generic on"));
    let (server, client) = stage.engines(DatapathChoice::Socket, 4);
    let mut links = Vec::new();
    block_on(async {
        while links.len() < CONNECTIONS {
            let relay = stage.relay(&server);
            let (near, far) = connect(&client, &server, &relay).await;
            near.send_datagram(Bytes::from_static(b"hello")).expect("sent");
            far.read_datagram().await.expect("received");
            links.push((near, far, relay));
        }
    });
    let ids: Vec<Vec<u8>> =
        links.iter().map(|(.., relay)| relay.cids().pop_last().expect("an ID was seen")).collect();
    let mut sender = stage.left.run(|| {
        let config = SocketConfig::new(SocketAddrV6::new(SOURCES[0], 0, 0, 0));
        SocketDatapath::open(config).expect("a socket")
    });
    assert!(
        sender.capabilities().mode.contains("gso"),
        "without segmentation offload there are no trains"
    );
    let before = counters(&server);
    // Each connection's packet comes first once; nobody can read what is behind the IDs.
    for first in 0..CONNECTIONS {
        let mut train = Vec::with_capacity(1 << 16);
        for packet in 0..CONNECTIONS * PACKETS_OF_EACH {
            train.push(0x40);
            train.extend_from_slice(&ids[(first + packet) % CONNECTIONS]);
            train.resize((packet + 1) * PACKET_BYTES, packet as u8);
        }
        let meta = TxMeta { remote: server.local_addr(), local: None, ecn: Ecn::NotEct };
        assert_eq!(sender.transmit_batch(&meta, PACKET_BYTES, &mut train), 0, "dropped");
        sender.flush(Instant::now());
    }
    // A shard with so many of the connections gets as many trains, and hands over all but theirs.
    let owned = server.stats().into_iter().map(|stats| stats.shard.accepted as usize);
    let owned: Vec<usize> = owned.collect();
    assert!(owned.iter().all(|owned| *owned < CONNECTIONS), "one shard has all: {owned:?}");
    let others = owned.iter().map(|owned| owned * PACKETS_OF_EACH * (CONNECTIONS - owned));
    let others = others.sum::<usize>() as u64;
    let handed_over = || counters(&server).rx_handed_over - before.rx_handed_over;
    wait_until("all were handed over", PATIENCE, || handed_over() >= others);
    wait_until("all have arrived", PATIENCE, || {
        let now = counters(&server);
        now.rx_taken_over == now.rx_handed_over
    });
    block_on(async {
        for (near, far, _) in &links {
            near.send_datagram(Bytes::from_static(b"still there")).expect("sent");
            far.read_datagram().await.expect("received");
        }
    });
    assert_eq!(handed_over(), others, "{owned:?}");
    let after = counters(&server);
    assert_eq!((after.rx_drop_no_owner, after.rx_drop_unknown_connection), (0, 0), "{after:?}");
}

/// Takes the privilege to load eBPF programs from this thread and those that it starts.
fn give_up_bpf() {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).expect("capabilities can be given up");
}

#[test]
fn without_privilege_shards_hand_over() {
    let stage = Stage::new("without_privilege_shards_hand_over", 4);
    std::thread::scope(|scope| {
        let unprivileged = scope.spawn(|| {
            // Unprivileged eBPF does not exist for this program type, whatever the sysctl says.
            let (server_tls, client_tls) = identity();
            let config = TransportConfig {
                bind: SocketAddrV6::new(SERVER, 0, 0, 0),
                shards: 4,
                ..pair::config()
            };
            let server = stage.right.run(|| {
                give_up_bpf();
                Engine::builder().config(config).server(server_tls).start()
            });
            let client = stage
                .left
                .run(|| Engine::builder().config(pair::config()).client(client_tls).start());
            (server.expect("the server starts"), client.expect("the client starts"))
        });
        let (server, client) = unprivileged.join().expect("started");
        assert!(server.steering_counters().is_none());
        let reasons = server.datapath_reasons().join("; ");
        assert!(reasons.contains("no steering in the kernel"), "{reasons}");
        assert!(reasons.contains("cap_bpf"), "{reasons}");
        survive_rebindings(&stage, &server, &client);
        let counters = counters(&server);
        assert!(counters.rx_handed_over > 0, "four sockets, but nothing went astray: {counters:?}");
        hand_overs_end(&server);
    });
}

#[test]
fn af_xdp_queues_hand_over() {
    let stage = Stage::new("af_xdp_queues_hand_over", 2);
    let (server, client) = stage.engines(DatapathChoice::AfXdp, 2);
    survive_rebindings(&stage, &server, &client);
    let counters = counters(&server);
    assert!(counters.rx_handed_over > 0, "two queues, but nothing went astray: {counters:?}");
    hand_overs_end(&server);
}

/// Whatever one shard handed over (drops at a full queue do not count) another takes: soon, as
/// connections may be talking still.
fn hand_overs_end(server: &Engine) {
    wait_until("every hand-over has ended", PATIENCE, || {
        let now = counters(server);
        now.rx_handed_over == now.rx_taken_over
    });
}

/// Clients over AF_XDP whose own address changes again and again, with connections on every shard: they
/// move (RFC 9000 §9), and the transfers go on.
#[test]
fn clients_move_to_other_addresses_in_mid_transfer() {
    const MOVES: u64 = 6;
    // More for each of the client's shards than move in one turn.
    const CONNECTIONS: usize = 3 * MIGRATIONS_PER_TURN_MAX;
    let stage = Stage::new("clients_move_to_other_addresses_in_mid_transfer", 2);
    for address in &SOURCES[1..] {
        stage.left.ip(&format!("addr del {address}/64 dev {DEVICE}"));
    }
    let (server_tls, client_tls) = identity();
    let config = |address| TransportConfig {
        bind: SocketAddrV6::new(address, 0, 0, 0),
        datapath: DatapathChoice::AfXdp,
        interface: Some(DEVICE.to_owned()),
        shards: 2,
        spin_us: 0,
        ..TransportConfig::default()
    };
    let server = Engine::builder().config(config(SERVER)).server(server_tls);
    let client = Engine::builder().config(config(Ipv6Addr::UNSPECIFIED)).client(client_tls);
    let server = stage.right.run(|| server.start()).expect("the server starts");
    let client = stage.left.run(|| client.start()).expect("the client starts");
    let mut own = SOURCES[0];
    block_on(async {
        let mut pairs = Vec::new();
        for _ in 0..CONNECTIONS {
            let connecting = client.connect(server.local_addr(), NAME);
            let incoming = server.accept().await.expect("a client knocks");
            let (near, far) = futures_util::future::join(connecting, incoming.accept()).await;
            pairs.push((near.expect("connected"), far.expect("accepted")));
        }
        for (near, far) in &pairs[..CLIENTS] {
            let relocate = || {
                let new = Ipv6Addr::from_bits(own.to_bits() + 1);
                stage.left.add_address(DEVICE, &format!("{new}/64"));
                stage.left.ip(&format!("addr del {own}/64 dev {DEVICE}"));
                own = new;
            };
            transfer_through(near, far, MOVES, relocate).await;
        }
        // Those that said nothing meanwhile have moved, too: the server reaches them where they are.
        for (near, far) in &pairs {
            let mut send = far.open_uni().await.expect("a stream");
            send.write_all(b"there you are").await.expect("written");
            send.finish().expect("finished");
            let mut recv = near.accept_uni().await.expect("a stream");
            assert_eq!(recv.read_to_end(100).await.expect("received"), b"there you are");
        }
    });
    let counters = counters(&server);
    assert!(counters.rx_handed_over > 0, "nothing went astray: {counters:?}");
    assert_eq!((counters.rx_drop_no_owner, counters.rx_drop_unknown_connection), (0, 0));
    hand_overs_end(&server);
}

/// Accept balance is the shards' own: it holds where packets come by queues as where the kernel steers.
fn newcomers_avoid_the_one_busy_shard(test: &'static str, datapath: DatapathChoice) {
    let stage = Stage::new(test, balance::SHARDS as u32);
    let (server_tls, client_tls) = identity();
    let config = balance::config(TransportConfig {
        bind: SocketAddrV6::new(SERVER, 0, 0, 0),
        datapath,
        interface: Some(DEVICE.to_owned()),
        spin_us: 0,
        ..TransportConfig::default()
    });
    let server = Engine::builder().config(config).server(server_tls);
    let server = server.app(|_| balance::Fickle::default());
    let server = stage.right.run(|| server.start()).expect("the server starts");
    let bind = SocketAddrV6::new(SOURCES[0], 0, 0, 0);
    let client = Engine::builder().config(TransportConfig { bind, ..pair::config() });
    let client = stage.left.run(|| client.client(client_tls).start()).expect("the client starts");
    balance::newcomers_avoid_the_one_busy_shard(&server, &client);
}

#[test]
fn newcomers_avoid_the_one_busy_shard_over_io_uring() {
    let test = "newcomers_avoid_the_one_busy_shard_over_io_uring";
    newcomers_avoid_the_one_busy_shard(test, DatapathChoice::IoUring);
}

#[test]
fn newcomers_avoid_the_one_busy_shard_over_af_xdp() {
    let test = "newcomers_avoid_the_one_busy_shard_over_af_xdp";
    newcomers_avoid_the_one_busy_shard(test, DatapathChoice::AfXdp);
}

/// Forged, random and truncated packets: counted, dropped, and the connection goes on.
fn forgeries_reach_nobody(test: &'static str, datapath: DatapathChoice, shards: usize) {
    const FORGERIES: u64 = 20_000;
    let stage = Stage::new(test, shards as u32);
    let (server, client) = stage.engines(datapath, shards);
    let relay = stage.relay(&server);
    block_on(async {
        let (near, far) = connect(&client, &server, &relay).await;
        transfer_through_rebindings(&near, &far, &relay).await;
        let real: Vec<u8> = relay.cids().into_iter().next().expect("an ID was seen");
        let forger = stage.left.run(|| UdpSocket::bind((SOURCES[0], 0)).expect("a free port"));
        let sent = forge(&forger, server.local_addr(), &real, FORGERIES);
        // All of them have arrived or were lost before the shards; none disturbs the connection.
        transfer_through_rebindings(&near, &far, &relay).await;
        let before = counters(&server);
        assert!(before.rx_drop_no_owner > sent / 4, "{before:?}");
        hand_overs_end(&server);
        assert_replies_are_small(&forger, sent);
    });
    let after = counters(&server);
    assert_eq!(after.accepted, 1, "a forgery became a connection: {after:?}");
    assert_eq!(after.connections, 1, "{after:?}");
    // Each is answered by one stateless packet at most.
    assert!(after.tx_stateless + after.tx_drop_responses <= FORGERIES, "{after:?}");
}

/// No reply is as long as what it answers (RFC 9000 §10.3.3), so that forgers cannot make loops or
/// amplify.
fn assert_replies_are_small(forger: &UdpSocket, sent: u64) {
    forger.set_nonblocking(true).expect("non-blocking");
    let mut buffer = [0; 2048];
    let mut replies = 0;
    while let Ok(bytes) = forger.recv(&mut buffer) {
        assert!(bytes < FORGERY_BYTES, "a reply of {bytes} bytes");
        replies += 1;
    }
    assert!(replies <= sent, "{replies} replies to {sent} packets");
}

/// Sends junk to the server: variations of a real ID, random IDs, cut packets, long headers.
fn forge(socket: &UdpSocket, server: SocketAddrV6, real: &[u8], count: u64) -> u64 {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut sent = 0;
    for index in 0..count {
        let mut packet: Vec<u8> =
            std::iter::repeat_with(|| random() as u8).take(FORGERY_BYTES).collect();
        match index % 4 {
            // Aimed at another shard: the real ID with other octets of the shard.
            0 => {
                packet[0] = 0x40 | packet[0] & 0x3f;
                packet[1..1 + real.len()].copy_from_slice(real);
                packet[real.len() - 1] ^= 1 + (random() % 255) as u8;
            }
            1 => packet[0] = 0x40 | packet[0] & 0x3f,
            2 => {
                packet[0] = 0x40 | packet[0] & 0x3f;
                packet.truncate((random() % 30) as usize);
            }
            // A long header of a version that we speak, with nothing sound behind it.
            _ => {
                packet[0] = 0xe0 | packet[0] & 0x0f;
                packet[1..5].copy_from_slice(&[0, 0, 0, 1]);
                packet[5] = 10;
            }
        }
        sent += u64::from(socket.send_to(&packet, server).is_ok());
    }
    sent
}

#[test]
fn forgeries_reach_nobody_over_sockets() {
    forgeries_reach_nobody("forgeries_reach_nobody_over_sockets", DatapathChoice::Socket, 4);
}

#[test]
fn forgeries_reach_nobody_over_io_uring() {
    forgeries_reach_nobody("forgeries_reach_nobody_over_io_uring", DatapathChoice::IoUring, 4);
}

#[test]
fn forgeries_reach_nobody_over_af_xdp() {
    forgeries_reach_nobody("forgeries_reach_nobody_over_af_xdp", DatapathChoice::AfXdp, 2);
}

/// Without a relay, and where the kernel refuses segmentation offload for want of checksums.
#[test]
fn the_server_opens_streams_on_connections_that_share_a_port() {
    const DOWNLOAD_BYTES: usize = 2 << 20;
    let stage = Stage::new("the_server_opens_streams_on_connections_that_share_a_port", 4);
    for datapath in [DatapathChoice::Socket, DatapathChoice::IoUring] {
        let (server, client) = stage.engines(datapath, 4);
        block_on(async {
            let mut downloads = Vec::new();
            for _ in 0..12 {
                let connecting = client.connect(server.local_addr(), NAME);
                let incoming = server.accept().await.expect("a client knocks");
                let (near, far) = futures_util::future::join(connecting, incoming.accept()).await;
                let (near, far) = (near.expect("connected"), far.expect("accepted"));
                downloads.push(async move {
                    let sending = async {
                        let mut send = far.open_uni().await.expect("a stream");
                        send.write_all(&vec![7; DOWNLOAD_BYTES]).await.expect("written");
                        send.finish().expect("finished");
                    };
                    let receiving = async {
                        let mut recv = near.accept_uni().await.expect("a stream");
                        let data = recv.read_to_end(DOWNLOAD_BYTES + 1).await.expect("received");
                        assert_eq!(data.len(), DOWNLOAD_BYTES);
                    };
                    futures_util::future::join(sending, receiving).await;
                    (near, far)
                });
            }
            futures_util::future::join_all(downloads).await;
        });
        for engine in [&server, &client] {
            let counters = counters(engine);
            assert_eq!(counters.rx_drop_no_owner, 0, "{datapath:?} {counters:?}");
        }
    }
}
