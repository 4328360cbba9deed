//! Two hosts on one simulated link, with small applications that record what they see.
#![allow(dead_code, unreachable_pub)] // each test file uses its own part

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use quinn_proto::crypto;
use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use stoq::app::{ConnId, Incoming, ReadOutcome, ShardApp, ShardCx, WriteOutcome};
use stoq::clock::SimClock;
use stoq::config::TransportConfig;
use stoq::datapath::sim::{LinkConfig, LinkId, Prefix, SimNetwork, run_while};
use stoq::error::ConnectionError;
use stoq::proto::ConnectionStats;
use stoq::sim::{SimHost, SimHostConfig};
use stoq::{Dir, StreamId, VarInt};

pub const CLIENT_HOST: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
pub const SERVER_HOST: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1);
pub const CLIENT: SocketAddrV6 = SocketAddrV6::new(CLIENT_HOST, 4000, 0, 0);
pub const SERVER: SocketAddrV6 = SocketAddrV6::new(SERVER_HOST, 4433, 0, 0);

/// What an application saw.
#[derive(Debug, Default)]
pub struct Log {
    pub connected: u64,
    /// The peers' addresses when they were connected.
    pub remotes: Vec<SocketAddrV6>,
    pub closed: Vec<ConnectionError>,
    pub received: BTreeMap<StreamId, Vec<u8>>,
    pub received_bytes: u64,
    pub finished_reading: Vec<StreamId>,
    pub acknowledged: Vec<StreamId>,
    pub resets: Vec<(StreamId, VarInt)>,
    pub stopped: Vec<(StreamId, VarInt)>,
    pub datagrams: Vec<Bytes>,
    pub stats: Option<ConnectionStats>,
    pub alpn: Option<Vec<u8>>,
}

pub type SharedLog = Arc<Mutex<Log>>;

/// A stream's worth of work.
#[derive(Debug, Clone)]
pub struct Send {
    pub dir: Dir,
    pub data: Bytes,
    pub finish: bool,
}

/// What the peer's application does.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Opened and written by this side once connected.
    pub sends: Vec<Send>,
    pub datagrams: Vec<Bytes>,
    /// Answer every bidirectional stream with so many bytes, from its opening on.
    pub answer_bytes: usize,
    /// Connect to the peer at the start.
    pub connect: Option<SocketAddrV6>,
    pub server_name: Option<String>,
    /// Keep the received bytes (else only count them).
    pub keep: bool,
    /// Read in whatever order data arrives.
    pub unordered: bool,
    /// Never read.
    pub stall: bool,
    /// Close after this much has been received.
    pub close_after: Option<u64>,
    /// Reset every stream that is opened by us, after writing.
    pub reset_code: Option<u32>,
    /// Stop every stream that the peer opens.
    pub stop_code: Option<u32>,
    /// Update keys every so many received bytes.
    pub update_keys_every: Option<u64>,
    /// Refuse clients that knock.
    pub refuse: bool,
}

/// Makes the application say something on every connection it has.
pub struct Ping;

pub struct TestApp {
    pub plan: Plan,
    pub log: SharedLog,
    pending: BTreeMap<(ConnId, StreamId), (VecDeque<Bytes>, bool)>,
    next_key_update: u64,
    conns: Vec<ConnId>,
}

impl TestApp {
    pub fn new(plan: Plan) -> (Self, SharedLog) {
        let log = SharedLog::default();
        let next_key_update = plan.update_keys_every.unwrap_or(u64::MAX);
        (
            Self {
                plan,
                log: log.clone(),
                pending: BTreeMap::new(),
                next_key_update,
                conns: Vec::new(),
            },
            log,
        )
    }

    fn write(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        let Some((queue, finish)) = self.pending.get_mut(&(conn, stream)) else { return };
        while let Some(chunk) = queue.pop_front() {
            let mut chunks = [chunk];
            let outcome = cx.write(conn, stream, &mut chunks);
            let [rest] = chunks;
            if !rest.is_empty() {
                queue.push_front(rest);
            }
            match outcome {
                WriteOutcome::Written(_) if queue.is_empty() => {}
                WriteOutcome::Written(_) => continue,
                WriteOutcome::Blocked => return,
                WriteOutcome::Stopped(_) | WriteOutcome::Unknown => {
                    self.pending.remove(&(conn, stream));
                    return;
                }
            }
        }
        if *finish {
            cx.finish(conn, stream);
        }
        self.pending.remove(&(conn, stream));
        if let Some(code) = self.plan.reset_code {
            cx.reset(conn, stream, code.into());
        }
    }

    fn queue(&mut self, conn: ConnId, stream: StreamId, data: &Bytes, finish: bool) {
        let chunks = data.chunks(64 * 1024).map(|chunk| data.slice_ref(chunk)).collect();
        self.pending.insert((conn, stream), (chunks, finish));
    }

    fn note(&self, cx: &ShardCx<'_>, conn: ConnId) {
        if let Some(stats) = cx.stats(conn) {
            self.log.lock().expect("log").stats = Some(stats);
        }
    }
}

impl ShardApp for TestApp {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + std::marker::Send>) {
        if message.is::<Ping>() {
            for conn in self.conns.clone() {
                cx.send_datagram(conn, Bytes::from_static(b"still there?")).expect("sent");
            }
            return;
        }
        if let Some(peer) = self.plan.connect {
            let name = self.plan.server_name.clone().unwrap_or_else(|| "stoq.test".into());
            cx.connect(peer, &name).expect("connect");
        }
    }

    fn handle_incoming(&mut self, cx: &mut ShardCx<'_>, incoming: Incoming) {
        if self.plan.refuse {
            cx.refuse(incoming);
        } else if let Err(error) = cx.accept(incoming) {
            self.log.lock().expect("log").closed.push(error);
        }
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        {
            let mut log = self.log.lock().expect("log");
            log.connected += 1;
            log.remotes.extend(cx.remote(conn));
            self.conns.push(conn);
            log.alpn = cx.alpn(conn);
        }
        for send in self.plan.sends.clone() {
            let stream = cx.open(conn, send.dir).expect("stream credit");
            self.queue(conn, stream, &send.data, send.finish);
            self.write(cx, conn, stream);
        }
        for datagram in self.plan.datagrams.clone() {
            cx.send_datagram(conn, datagram).expect("datagram");
        }
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        while let Some(stream) = cx.accept_stream(conn, dir) {
            if let Some(code) = self.plan.stop_code {
                cx.stop(conn, stream, code.into());
                continue;
            }
            if dir == Dir::Bi && self.plan.answer_bytes > 0 {
                let answer = Bytes::from(vec![7; self.plan.answer_bytes]);
                self.queue(conn, stream, &answer, true);
                self.write(cx, conn, stream);
            }
            self.handle_readable(cx, conn, stream);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        if self.plan.stall {
            return;
        }
        let log = self.log.clone();
        let mut log = log.lock().expect("log");
        let keep = self.plan.keep;
        let mut take = |offset: Option<u64>, data: Bytes| {
            log.received_bytes += data.len() as u64;
            if keep {
                let received = log.received.entry(stream).or_default();
                let from = offset.map_or(received.len(), |offset| offset as usize);
                received.resize(received.len().max(from + data.len()), 0);
                received[from..from + data.len()].copy_from_slice(&data);
            }
        };
        let outcome = if self.plan.unordered {
            cx.read_unordered(conn, stream, usize::MAX, |offset, data| take(Some(offset), data))
        } else {
            cx.read(conn, stream, usize::MAX, |data| take(None, data))
        };
        match outcome {
            ReadOutcome::Finished => log.finished_reading.push(stream),
            ReadOutcome::Reset(code) => log.resets.push((stream, code)),
            _ => {}
        }
        if self.plan.close_after.is_some_and(|limit| log.received_bytes >= limit) {
            cx.close(conn, VarInt::from_u32(9), Bytes::from_static(b"enough"));
        }
        if log.received_bytes >= self.next_key_update {
            self.next_key_update += self.plan.update_keys_every.unwrap_or(u64::MAX / 2);
            cx.update_keys(conn);
        }
        drop(log);
        self.note(cx, conn);
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.write(cx, conn, stream);
        self.note(cx, conn);
    }

    fn handle_finished(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.log.lock().expect("log").acknowledged.push(stream);
        self.note(cx, conn);
    }

    fn handle_stopped(
        &mut self,
        _cx: &mut ShardCx<'_>,
        _conn: ConnId,
        stream: StreamId,
        code: VarInt,
    ) {
        self.log.lock().expect("log").stopped.push((stream, code));
    }

    fn handle_datagrams(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        while let Some(data) = cx.recv_datagram(conn) {
            self.log.lock().expect("log").datagrams.push(data);
        }
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, _conn: ConnId, reason: &ConnectionError) {
        self.log.lock().expect("log").closed.push(reason.clone());
    }
}

/// TLS for both ends over one self-made certificate.
pub fn tls() -> (Arc<QuicServerConfig>, Arc<QuicClientConfig>) {
    tls_for(b"test")
}

/// [`tls`] for another application protocol.
pub fn tls_for(alpn: &[u8]) -> (Arc<QuicServerConfig>, Arc<QuicClientConfig>) {
    let made = rcgen::generate_simple_self_signed(vec!["stoq.test".into()]).expect("certificate");
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("root");
    let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .expect("server config");
    server.alpn_protocols = vec![alpn.to_vec()];
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![alpn.to_vec()];
    (
        Arc::new(server.try_into().expect("QUIC server config")),
        Arc::new(client.try_into().expect("QUIC client config")),
    )
}

/// A client and a server on one link.
pub struct Pair {
    pub clock: SimClock,
    pub network: SimNetwork,
    pub link: LinkId,
    pub client: SimHost,
    pub server: SimHost,
    pub client_log: SharedLog,
    pub server_log: SharedLog,
}

/// How to build a [`Pair`].
pub struct PairConfig {
    pub link: LinkConfig,
    pub seed: u64,
    pub client: TransportConfig,
    pub server: TransportConfig,
    pub interface_mtu: Option<u64>,
    /// In place of [`tls`].
    pub tls: Option<(Arc<dyn crypto::ServerConfig>, Arc<dyn crypto::ClientConfig>)>,
}

impl Default for PairConfig {
    fn default() -> Self {
        Self {
            link: LinkConfig { rate_bps: 100_000_000, delay_us: 5_000, ..LinkConfig::default() },
            seed: 1,
            client: TransportConfig::default(),
            server: TransportConfig::default(),
            interface_mtu: None,
            tls: None,
        }
    }
}

/// The client's and the server's network, with one link between them, alike in both directions.
pub fn linked(seed: u64, plan: LinkConfig) -> (SimClock, SimNetwork, LinkId) {
    let clock = SimClock::new();
    let network = SimNetwork::new(clock.clone(), seed);
    let (left, right) = (Prefix::new(CLIENT_HOST, 32), Prefix::new(SERVER_HOST, 32));
    let link = network.add_link(left, right, plan.clone(), plan).expect("valid link");
    (clock, network, link)
}

impl Pair {
    pub fn new(config: PairConfig, client_plan: Plan, server_plan: Plan) -> Self {
        let (clock, network, link) = linked(config.seed, config.link);
        let (client_path, server_path) = (network.open(CLIENT), network.open(SERVER));
        if let Some(mtu) = config.interface_mtu {
            network.set_interface_mtu(client_path.id(), mtu);
            network.set_interface_mtu(server_path.id(), mtu);
        }
        let (server_tls, client_tls) = config.tls.unwrap_or_else(|| {
            let (server, client) = tls();
            (server, client)
        });
        let (client_app, client_log) =
            TestApp::new(Plan { connect: client_plan.connect.or(Some(SERVER)), ..client_plan });
        let (server_app, server_log) = TestApp::new(server_plan);
        let client_setup = SimHostConfig {
            config: config.client,
            server: None,
            client: Some(client_tls),
            seed: config.seed * 2,
        };
        let server_setup = SimHostConfig {
            config: config.server,
            server: Some(server_tls),
            client: None,
            seed: config.seed * 2 + 1,
        };
        let client = SimHost::new(&clock, client_path, client_setup, client_app).expect("client");
        let server = SimHost::new(&clock, server_path, server_setup, server_app).expect("server");
        client.send_to_app(Box::new(()));
        Self { clock, network, link, client, server, client_log, server_log }
    }

    /// The server's process dies and comes back with its reset key, but without its memory.
    pub fn crash_server(&mut self) {
        let (server_app, server_log) = TestApp::new(Plan::default());
        let setup = SimHostConfig {
            config: TransportConfig::default(),
            server: Some(tls().0),
            client: None,
            seed: self.network.seed() * 2 + 1,
        };
        // The old datapath gives its port back when it is dropped: a stand-in holds the place.
        let stand_in = self.network.open(SocketAddrV6::new(SERVER_HOST, 9, 0, 0));
        let idle = SimHostConfig {
            config: TransportConfig::default(),
            server: None,
            client: None,
            seed: 0,
        };
        let (idle_app, _) = TestApp::new(Plan::default());
        let idle = SimHost::new(&self.clock, stand_in, idle, idle_app).expect("stand-in");
        drop(std::mem::replace(&mut self.server, idle));
        let path = self.network.open(SERVER);
        self.server = SimHost::new(&self.clock, path, setup, server_app).expect("server");
        self.server_log = server_log;
    }

    /// Runs until `done` says so or `limit` of virtual time has passed; whether it was done.
    pub fn run(&mut self, limit: Duration, mut done: impl FnMut(&Log, &Log) -> bool) -> bool {
        let (client_log, server_log) = (self.client_log.clone(), self.server_log.clone());
        let mut is_done =
            || done(&client_log.lock().expect("log"), &server_log.lock().expect("log"));
        run_both(
            [&mut self.client, &mut self.server],
            &self.network,
            &self.clock,
            limit,
            &mut is_done,
        );
        is_done()
    }
}

/// Both ends go on until `is_done` says so or `limit` of virtual time has passed.
pub fn run_both(
    [client, server]: [&mut SimHost; 2],
    network: &SimNetwork,
    clock: &SimClock,
    limit: Duration,
    is_done: &mut dyn FnMut() -> bool,
) {
    let until = clock.elapsed() + limit;
    run_while(&mut [client, server], network, clock, until, &mut || !is_done());
}

/// Bytes that differ everywhere, so that a displaced one shows.
pub fn pattern(len: usize) -> Bytes {
    let mut state = 0x1234_5678_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}
