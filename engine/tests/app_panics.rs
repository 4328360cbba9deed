//! A panic in each call of a [`ShardApp`]: what ends is what the trait's table says, and the shard's
//! other connections complete. Whole shards in virtual time.

#[path = "common/sim.rs"]
mod sim;

use std::any::Any;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use sim::{CLIENT, CLIENT_HOST, Plan, SERVER, SERVER_HOST, TestApp};
use stoq::app::{ConnId, Incoming, ReadOutcome, ShardApp, ShardCx, WriteOutcome};
use stoq::clock::SimClock;
use stoq::config::{PoolConfig, TransportConfig};
use stoq::datapath::sim::{LinkConfig, Prefix, SimNetwork, run_while};
use stoq::error::ConnectionError;
use stoq::pool::{Checkout, CheckoutError, Lease, PeerEndpoint, PoolEvent};
use stoq::sim::{SimHost, SimHostConfig};
use stoq::{Dir, StreamId, VarInt};

const UPLOAD_BYTES: usize = 300_000;
const ANSWER_BYTES: usize = 100_000;
/// Connections that the panicking host makes; one of them is lost at most.
const CONNECTIONS: usize = 3;
/// Streams that its peer allows.
const STREAMS: u64 = 4;

/// Every call of the trait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Call {
    Incoming,
    IncomingAccepted,
    Connected,
    StreamOpened,
    Readable,
    Writable,
    Finished,
    Stopped,
    StreamsAvailable,
    Datagrams,
    DatagramsUnblocked,
    Closed,
    Checkout,
    PoolEvent,
    Timer,
    Message,
}

#[derive(Default)]
struct Seen {
    /// Calls that were made, the one that panicked included.
    calls: BTreeSet<Call>,
    /// The connection of the call that panicked.
    victim: Option<ConnId>,
    closed: Vec<(ConnId, ConnectionError)>,
    /// Streams whose data the peer acknowledged.
    uploaded: Vec<ConnId>,
    /// Streams read to their end.
    answered: Vec<ConnId>,
}

/// Does a little of everything, and panics once.
struct Fragile {
    panics_in: Option<Call>,
    has_panicked: bool,
    seen: Arc<Mutex<Seen>>,
    unwritten: Vec<(ConnId, StreamId, Bytes)>,
    uploads: Vec<(ConnId, StreamId)>,
}

impl Fragile {
    fn note<R>(&self, note: impl FnOnce(&mut Seen) -> R) -> R {
        note(&mut self.seen.lock().expect("never panics while locked"))
    }

    /// Notes a call, and panics the first time that it is the planned one.
    fn enter(&mut self, call: Call, conn: Option<ConnId>) {
        self.note(|seen| seen.calls.insert(call));
        if self.panics_in == Some(call) && !self.has_panicked {
            self.has_panicked = true;
            self.note(|seen| seen.victim = conn);
            panic!("planned, in {call:?}");
        }
    }

    fn write(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        let found = self.unwritten.iter().position(|(c, s, _)| (*c, *s) == (conn, stream));
        let Some(found) = found else { return };
        let mut data = [std::mem::take(&mut self.unwritten[found].2)];
        let outcome = cx.write(conn, stream, &mut data);
        let [rest] = data;
        if matches!(outcome, WriteOutcome::Written(_)) && rest.is_empty() {
            self.unwritten.remove(found);
            cx.finish(conn, stream);
        } else {
            self.unwritten[found].2 = rest;
        }
    }
}

impl ShardApp for Fragile {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, _message: Box<dyn Any + Send>) {
        self.enter(Call::Message, None);
        cx.set_timer(cx.now() + Duration::from_millis(1), 7);
        cx.connect(SERVER, "stoq.test").expect("within the limits");
        let peer = cx.pool_peer(&PeerEndpoint::new(SERVER, "stoq.test")).expect("room");
        if let Checkout::Ready(lease) = cx.checkout(peer, 1).expect("within the limits") {
            cx.check_in(lease);
        }
    }

    fn handle_incoming(&mut self, cx: &mut ShardCx<'_>, incoming: Incoming) {
        self.enter(Call::Incoming, None);
        let conn = cx.accept(incoming).expect("a good client");
        self.enter(Call::IncomingAccepted, Some(conn));
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.enter(Call::Connected, Some(conn));
        let Some(stream) = cx.open(conn, Dir::Uni) else { return };
        self.unwritten.push((conn, stream, Bytes::from(vec![1; UPLOAD_BYTES])));
        self.uploads.push((conn, stream));
        self.write(cx, conn, stream);
        let asking = cx.open(conn, Dir::Bi).expect("a fresh connection");
        cx.write(conn, asking, &mut [Bytes::from_static(b"answer me")]);
        cx.finish(conn, asking);
        // All that the peer allows, and one more.
        while let Some(stream) = cx.open(conn, Dir::Uni) {
            cx.finish(conn, stream);
        }
        while cx.send_datagram(conn, Bytes::from_static(&[5; 1000])).is_ok() {}
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        self.enter(Call::StreamOpened, Some(conn));
        while let Some(stream) = cx.accept_stream(conn, dir) {
            self.handle_readable(cx, conn, stream);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.enter(Call::Readable, Some(conn));
        if cx.read(conn, stream, usize::MAX, drop) == ReadOutcome::Finished
            && stream.dir() == Dir::Bi
        {
            self.note(|seen| seen.answered.push(conn));
        }
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.enter(Call::Writable, Some(conn));
        self.write(cx, conn, stream);
    }

    fn handle_finished(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        self.enter(Call::Finished, Some(conn));
        if self.uploads.contains(&(conn, stream)) {
            self.note(|seen| seen.uploaded.push(conn));
        }
    }

    fn handle_stopped(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, s: StreamId, code: VarInt) {
        self.enter(Call::Stopped, Some(conn));
        cx.reset(conn, s, code);
    }

    fn handle_streams_available(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId, _dir: Dir) {
        self.enter(Call::StreamsAvailable, Some(conn));
    }

    fn handle_datagrams(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.enter(Call::Datagrams, Some(conn));
        while cx.recv_datagram(conn).is_some() {}
    }

    fn handle_datagrams_unblocked(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId) {
        self.enter(Call::DatagramsUnblocked, Some(conn));
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId, reason: &ConnectionError) {
        self.note(|seen| seen.closed.push((conn, reason.clone())));
        self.enter(Call::Closed, Some(conn));
    }

    fn handle_checkout(
        &mut self,
        cx: &mut ShardCx<'_>,
        _token: u64,
        result: Result<Lease, CheckoutError>,
    ) {
        let lease = result.expect("the peer answers");
        self.enter(Call::Checkout, Some(lease.conn()));
        cx.check_in(lease);
    }

    fn handle_pool_event(&mut self, _cx: &mut ShardCx<'_>, _event: &PoolEvent) {
        self.enter(Call::PoolEvent, None);
    }

    fn handle_timer(&mut self, _cx: &mut ShardCx<'_>, _token: u64) {
        self.enter(Call::Timer, None);
    }
}

/// The panicking host and its peer on one link.
struct Net {
    clock: SimClock,
    network: SimNetwork,
    fragile: SimHost,
    peer: SimHost,
    seen: Arc<Mutex<Seen>>,
    peer_log: sim::SharedLog,
}

impl Net {
    /// The panicking host connects, unless clients are what it panics at.
    fn new(panics_in: Option<Call>, accepts: bool, plan: Plan) -> Self {
        let clock = SimClock::new();
        let network = SimNetwork::new(clock.clone(), 11);
        let link = LinkConfig { rate_bps: 100_000_000, delay_us: 2_000, ..LinkConfig::default() };
        let (here, there) = (Prefix::new(CLIENT_HOST, 32), Prefix::new(SERVER_HOST, 32));
        network.add_link(here, there, link.clone(), link).expect("a valid link");
        let (server_tls, client_tls) = sim::tls();
        let config = TransportConfig {
            max_concurrent_streams: STREAMS,
            send_buffer_size: 64 << 10,
            stream_send_queue_bytes: 64 << 10,
            datagram_send_buffer_size: 8 << 10,
            handshake_timeout_ms: 2_000,
            idle_timeout_ms: 5_000,
            pool: PoolConfig { idle_timeout_ms: 1_000, ..PoolConfig::default() },
            ..TransportConfig::default()
        };
        let server = |seed| SimHostConfig {
            config: config.clone(),
            server: Some(server_tls.clone() as _),
            client: None,
            seed,
        };
        let client = |seed| SimHostConfig {
            config: config.clone(),
            server: None,
            client: Some(client_tls.clone() as _),
            seed,
        };
        let seen = Arc::<Mutex<Seen>>::default();
        let app = Fragile {
            panics_in,
            has_panicked: false,
            seen: seen.clone(),
            unwritten: Vec::new(),
            uploads: Vec::new(),
        };
        let (peer_app, peer_log) = TestApp::new(plan);
        let (left, right) = (network.open(CLIENT), network.open(SERVER));
        let (fragile, peer) = if accepts {
            let fragile = SimHost::new(&clock, right, server(1), app).expect("a host");
            (fragile, SimHost::new(&clock, left, client(2), peer_app).expect("a host"))
        } else {
            let fragile = SimHost::new(&clock, left, client(1), app).expect("a host");
            (fragile, SimHost::new(&clock, right, server(2), peer_app).expect("a host"))
        };
        Self { clock, network, fragile, peer, seen, peer_log }
    }

    fn run(&mut self, time: Duration) {
        let until = self.clock.elapsed() + time;
        let (network, clock) = (&self.network, &self.clock);
        run_while(&mut [&mut self.fragile, &mut self.peer], network, clock, until, &mut || true);
        if self.clock.elapsed() < until {
            self.clock.advance_to(until);
        }
    }

    fn run_all(&mut self, accepts: bool) {
        for _ in 0..CONNECTIONS {
            let host = if accepts { &self.peer } else { &self.fragile };
            host.send_to_app(Box::new(()));
            self.run(Duration::from_millis(500));
        }
        // Idle connections have timed out and drained.
        self.run(Duration::from_secs(30));
    }
}

/// Runs everything with one planned panic.
fn panic_in(call: Call) {
    let accepts = matches!(call, Call::Incoming | Call::IncomingAccepted);
    let said_by_peer =
        |bytes: usize| sim::Send { dir: Dir::Uni, data: Bytes::from(vec![3; bytes]), finish: true };
    let plan = Plan {
        connect: accepts.then_some(SERVER),
        sends: if accepts { Vec::new() } else { vec![said_by_peer(5_000)] },
        datagrams: vec![Bytes::from_static(b"datagram")],
        answer_bytes: ANSWER_BYTES,
        stop_code: (call == Call::Stopped).then_some(9),
        ..Plan::default()
    };
    let mut net = Net::new(Some(call), accepts, plan);
    net.run_all(accepts);

    let seen = net.seen.lock().expect("not poisoned");
    assert!(seen.calls.contains(&call), "{call:?} was never called: {:?}", seen.calls);
    let counters = net.fragile.counters();
    assert_eq!(counters.app_panics, 1, "{call:?}");
    assert_eq!((counters.connections, counters.streams), (0, 0), "{call:?}: something is left");
    let peer = net.peer.counters();
    assert_eq!((peer.connections, peer.streams), (0, 0), "{call:?}: something is left at the peer");

    // Told once about each, and about the victim with the cause.
    let told: BTreeSet<_> = seen.closed.iter().map(|(conn, _)| *conn).collect();
    assert_eq!(told.len(), seen.closed.len(), "{call:?}: told twice: {:?}", seen.closed);
    let panicked: Vec<_> =
        seen.closed.iter().filter(|(_, reason)| *reason == ConnectionError::AppPanicked).collect();
    let peer_log = net.peer_log.lock().expect("not poisoned");
    // A close in the handshake does not carry the application's words (RFC 9000 §10.2.3).
    let words = ["application panicked", "closed during the handshake"];
    let is_told = |reason: &&ConnectionError| {
        let text = reason.to_string();
        words.iter().any(|words| text.contains(words))
    };
    let peer_told = peer_log.closed.iter().filter(is_told).count();
    match seen.victim.filter(|_| call != Call::Closed) {
        Some(victim) => {
            assert_eq!(panicked, [&(victim, ConnectionError::AppPanicked)], "{call:?}");
            assert_eq!(peer_told, 1, "{call:?}: {:?}", peer_log.closed);
        }
        None => {
            assert!(panicked.is_empty(), "{call:?}: {panicked:?}");
            assert_eq!(peer_told, 0, "{call:?}: {:?}", peer_log.closed);
        }
    }
    if accepts {
        // Refused, or ended in its handshake; the others were served.
        assert_eq!(peer_log.connected as usize, CONNECTIONS - 1, "{call:?}");
        return;
    }
    // Its other connections did all that they were there for. One of them is the pool's.
    let used: BTreeSet<_> = told.iter().filter(|conn| Some(**conn) != seen.victim).collect();
    let first_message_lost = usize::from(call == Call::Message);
    assert!(used.len() >= CONNECTIONS - first_message_lost, "{call:?}: {used:?}");
    for conn in used.iter().filter(|_| call != Call::Stopped) {
        assert!(seen.answered.contains(conn), "{call:?}: {conn:?} was not answered");
        assert!(seen.uploaded.contains(conn), "{call:?}: {conn:?} did not send");
    }
}

macro_rules! each_call {
    ($($name:ident: $call:ident,)*) => {
        $(#[test] fn $name() { panic_in(Call::$call); })*

        /// A call that is added to the trait is added here.
        #[test]
        fn every_call_of_the_trait_has_its_test() {
            let here = [$(stringify!($name)),*];
            let source = include_str!("../src/app.rs");
            let calls = source.lines().filter_map(|line| {
                line.strip_prefix("    fn handle_").and_then(|rest| rest.split('(').next())
            });
            let calls: BTreeSet<_> = calls.collect();
            assert!(calls.len() >= 14, "{calls:?}");
            for call in calls {
                assert!(here.contains(&call), "handle_{call} has no test of its panic");
            }
        }
    };
}

each_call! {
    incoming: Incoming,
    incoming_after_it_was_accepted: IncomingAccepted,
    connected: Connected,
    stream_opened: StreamOpened,
    readable: Readable,
    writable: Writable,
    finished: Finished,
    stopped: Stopped,
    streams_available: StreamsAvailable,
    datagrams: Datagrams,
    datagrams_unblocked: DatagramsUnblocked,
    closed: Closed,
    checkout: Checkout,
    pool_event: PoolEvent,
    timer: Timer,
    message: Message,
}
