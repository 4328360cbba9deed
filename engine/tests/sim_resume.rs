//! Careful resume (`careful_resume`, RFC 9959): an engine remembers its peers' paths, and its later
//! connections start from that. Whole connections over a satellite link, in virtual time.

#[path = "common/sim.rs"]
mod sim;

use std::any::Any;
use std::net::SocketAddrV6;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use sim::{CLIENT, CLIENT_HOST, SERVER, linked, run_both, tls, tls_for};
use stoq::app::{ConnId, Incoming, ShardApp, ShardCx, WriteOutcome};
use stoq::clock::SimClock;
use stoq::config::{CongestionControl, RESUME_LIFETIME_S, TransportConfig};
use stoq::datapath::sim::{Direction, LinkConfig, LinkId, QueueLimit, SimNetwork};
use stoq::error::ConnectionError;
use stoq::metrics::ShardCounters;
use stoq::proto::bbr::ResumePhase;
use stoq::sim::{SimHost, SimHostConfig};
use stoq::{Dir, StreamId, VarInt};

const BOTH: [CongestionControl; 2] = [CongestionControl::Bbr2, CongestionControl::Bbr3];
const SEEDS: std::ops::RangeInclusive<u64> = 1..=3;
/// Enough to fill the path, and not.
const FULL_BYTES: usize = 30_000_000;
const STARTUP_BYTES: usize = 10_000_000;
const CHUNK_BYTES: usize = 64 * 1024;
const RATE_BPS: u64 = 50_000_000;

/// 50 Mbit/s, 300 ms each way, a queue of one round trip: 5 s of sending for 30 MB, a BDP of 3.75 MB.
fn satellite(rate_bps: u64, delay_us: u64) -> LinkConfig {
    LinkConfig { rate_bps, delay_us, queue: QueueLimit::TimeUs(600_000), ..LinkConfig::default() }
}

/// One transfer, as its sender saw it.
#[derive(Debug, Clone)]
struct Transfer {
    conn: ConnId,
    took: Duration,
    phase: ResumePhase,
    packets_lost: u64,
}

struct LetWait;

type Done = Arc<Mutex<Vec<Transfer>>>;

/// Connects with each message, sends so many bytes over every connection and closes what is
/// acknowledged whole.
struct Bulk {
    sends_bytes: usize,
    open: Vec<(ConnId, StreamId, usize, std::time::Instant)>,
    /// After [`LetWait`]: who knocks is accepted a second later, when the rest of the ClientHello is
    /// there, and is expected to be refused then.
    lets_wait: bool,
    waiting: Vec<Incoming>,
    done: Done,
}

impl Bulk {
    fn new(sends_bytes: usize) -> (Self, Done) {
        let done = Done::default();
        let open = Vec::new();
        let waiting = Vec::new();
        (Self { sends_bytes, open, lets_wait: false, waiting, done: done.clone() }, done)
    }

    fn write(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        let Some(entry) = self.open.iter_mut().find(|entry| entry.0 == conn) else { return };
        while entry.2 > 0 {
            let chunk = Bytes::from(vec![0; entry.2.min(CHUNK_BYTES)]);
            let length = chunk.len();
            let mut chunks = [chunk];
            let blocked = cx.write(conn, entry.1, &mut chunks) != WriteOutcome::Written(length);
            entry.2 -= length - chunks[0].len();
            if blocked && !chunks[0].is_empty() {
                return;
            }
        }
        cx.finish(conn, entry.1);
    }
}

impl ShardApp for Bulk {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        if message.is::<LetWait>() {
            self.lets_wait = true;
        } else {
            cx.connect(SERVER, "stoq.test").expect("connect");
        }
    }

    fn handle_incoming(&mut self, cx: &mut ShardCx<'_>, incoming: Incoming) {
        if self.lets_wait {
            self.waiting.push(incoming);
            cx.set_timer(cx.now() + Duration::from_secs(1), 0);
        } else {
            cx.accept(incoming).expect("accepted");
        }
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, _token: u64) {
        for incoming in self.waiting.drain(..) {
            cx.accept(incoming).expect_err("refused");
        }
        self.lets_wait = false;
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        if self.sends_bytes > 0 {
            let stream = cx.open(conn, Dir::Uni).expect("stream credit");
            self.open.push((conn, stream, self.sends_bytes, cx.now()));
            self.write(cx, conn);
        }
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        while let Some(stream) = cx.accept_stream(conn, dir) {
            self.handle_readable(cx, conn, stream);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        cx.read_unordered(conn, stream, usize::MAX, |_, _| {});
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, _stream: StreamId) {
        self.write(cx, conn);
    }

    fn handle_finished(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, _stream: StreamId) {
        let index = self.open.iter().position(|entry| entry.0 == conn).expect("opened");
        let (.., since) = self.open.remove(index);
        let stats = cx.stats(conn).expect("open");
        self.done.lock().expect("done").push(Transfer {
            conn,
            took: cx.now() - since,
            phase: stats.resume_phase,
            packets_lost: stats.packets_lost,
        });
        cx.close(conn, VarInt::from_u32(0), Bytes::new());
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, _conn: ConnId, _reason: &ConnectionError) {}
}

/// A client and a server over the satellite, of which one sends.
struct Path {
    clock: SimClock,
    network: SimNetwork,
    link: LinkId,
    client: SimHost,
    server: SimHost,
    done: Done,
    client_sends: bool,
}

impl Path {
    fn new(config: &TransportConfig, bytes: usize, client_sends: bool, seed: u64) -> Self {
        let (clock, network, link) = linked(seed, satellite(RATE_BPS, 300_000));
        let (server_tls, client_tls) = tls();
        let host =
            |server, client, seed| SimHostConfig { config: config.clone(), server, client, seed };
        let (client_app, client_done) = Bulk::new(if client_sends { bytes } else { 0 });
        let (server_app, server_done) = Bulk::new(if client_sends { 0 } else { bytes });
        let setup = host(None, Some(client_tls), seed * 2);
        let client = SimHost::new(&clock, network.open(CLIENT), setup, client_app).expect("client");
        let setup = host(Some(server_tls), None, seed * 2 + 1);
        let server = SimHost::new(&clock, network.open(SERVER), setup, server_app).expect("server");
        let done = if client_sends { client_done } else { server_done };
        Self { clock, network, link, client, server, done, client_sends }
    }

    fn set(&self, rate_bps: u64, delay_us: u64) {
        for direction in [Direction::Forward, Direction::Reverse] {
            self.network
                .set_link(self.link, direction, satellite(rate_bps, delay_us))
                .expect("set");
        }
    }

    fn run(&mut self, limit: Duration, mut is_done: impl FnMut() -> bool) {
        let Self { client, server, network, clock, .. } = self;
        run_both([client, server], network, clock, limit, &mut is_done);
    }

    /// So many connections at once, and a while for their ends to be known.
    fn transfer(&mut self, connections: usize) -> Vec<Transfer> {
        self.done.lock().expect("done").clear();
        for _ in 0..connections {
            self.client.send_to_app(Box::new(()));
        }
        let done = self.done.clone();
        self.run(Duration::from_secs(600), || done.lock().expect("done").len() == connections);
        let transfers = self.done.lock().expect("done").clone();
        assert_eq!(transfers.len(), connections, "all arrive");
        self.pass(Duration::from_secs(5));
        transfers
    }

    fn pass(&mut self, time: Duration) {
        let end = self.clock.elapsed() + time;
        self.run(time, || false);
        // Nothing may be left that would happen: then time stands still.
        self.clock.advance_to(end.max(self.clock.elapsed()));
    }

    fn counters(&self) -> ShardCounters {
        if self.client_sends { self.client.counters() } else { self.server.counters() }
    }
}

fn config(congestion_control: CongestionControl, careful_resume: bool) -> TransportConfig {
    TransportConfig {
        congestion_control,
        careful_resume,
        // Twice the BDP and the queue.
        send_buffer_size: 32 << 20,
        receive_buffer_size: 32 << 20,
        stream_receive_buffer_size: 32 << 20,
        idle_timeout_ms: 0,
        ..TransportConfig::default()
    }
}

/// Runs `check` for both versions of BBR, both roles and all seeds; a failure says which.
fn all(bytes: usize, check: impl Fn(&mut Path)) {
    for congestion_control in BOTH {
        for client_sends in [true, false] {
            for seed in SEEDS {
                eprintln!("{} client sends: {client_sends} seed {seed}", congestion_control.name());
                check(&mut Path::new(&config(congestion_control, true), bytes, client_sends, seed));
            }
        }
    }
}

fn first(transfers: &[Transfer]) -> Transfer {
    transfers[0].clone()
}

#[test]
fn the_second_connection_starts_where_the_first_one_ended() {
    all(FULL_BYTES, |path| {
        let cold = first(&path.transfer(1));
        assert_eq!(cold.phase, ResumePhase::Off);
        let resumed = first(&path.transfer(1));
        eprintln!("{cold:?} {resumed:?}");
        assert_eq!(resumed.phase, ResumePhase::Validated);
        assert!(resumed.took * 10 < cold.took * 8, "{resumed:?} after {cold:?}");
        assert_eq!(path.counters().resume_validated, 1);
        assert_eq!(path.counters().resume_retreated, 0);
    });
}

#[test]
fn a_rate_that_was_not_the_limit_does_not_end_startup() {
    all(STARTUP_BYTES, |path| {
        let takes: Vec<_> = (0..4).map(|_| first(&path.transfer(1))).collect();
        eprintln!("{takes:?}");
        assert_eq!(takes[1].phase, ResumePhase::Validated);
        assert!(takes[1].took * 10 < takes[0].took * 8, "{takes:?}");
        // 1.7 s of sending, and the round trips of the start: no slower than any before.
        assert!(takes[3].took * 10 < takes[1].took * 11, "{takes:?}");
    });
}

#[test]
fn without_the_switch_every_start_is_cold() {
    for congestion_control in BOTH {
        let mut path = Path::new(&config(congestion_control, false), FULL_BYTES, true, 1);
        let cold = first(&path.transfer(1));
        let again = first(&path.transfer(1));
        assert_eq!(again.phase, ResumePhase::Off);
        let (slower, faster) = (cold.took.max(again.took), cold.took.min(again.took));
        assert!(slower * 9 < faster * 10, "{cold:?} {again:?}");
    }
}

#[test]
fn a_path_that_became_slower_is_retreated_from() {
    all(FULL_BYTES, |path| {
        path.transfer(1);
        path.set(RATE_BPS / 20, 300_000);
        let retreated = first(&path.transfer(1));
        eprintln!("{retreated:?}");
        assert_eq!(retreated.phase, ResumePhase::Retreated);
        // Half of the old BDP left at once, into a twentieth of it and its queue.
        let jump_packets = RATE_BPS * 6 / 10 / 8 / 2 / 1452;
        assert!(retreated.packets_lost < 2 * jump_packets, "{retreated:?}");
        assert_eq!(path.counters().resume_retreated, 1);
        // 30 MB at 2.5 Mbit/s are 96 s and 6 % of headers.
        assert!(retreated.took < Duration::from_secs(125), "{retreated:?}");
        // What the path was then is known now.
        let again = first(&path.transfer(1));
        assert!(again.phase != ResumePhase::Retreated, "{again:?}");
        assert!(again.packets_lost < retreated.packets_lost, "{again:?} {retreated:?}");
    });
}

#[test]
fn another_round_trip_is_another_path() {
    all(FULL_BYTES, |path| {
        path.transfer(1);
        // Below half of it.
        path.set(RATE_BPS, 100_000);
        let other = first(&path.transfer(1));
        assert_eq!(other.phase, ResumePhase::Declined);
        assert_eq!(path.counters().resume_declined, 1);
    });
}

#[test]
fn what_is_old_is_forgotten() {
    all(FULL_BYTES, |path| {
        path.transfer(1);
        path.pass(Duration::from_secs(RESUME_LIFETIME_S + 10));
        let later = first(&path.transfer(1));
        assert_eq!(later.phase, ResumePhase::Off);
        assert_eq!(path.counters().resume_expired, 1);
    });
}

#[test]
fn of_several_connections_at_once_one_tries() {
    all(FULL_BYTES, |path| {
        path.transfer(1);
        let both = path.transfer(3);
        let tried = both.iter().filter(|one| one.phase != ResumePhase::Off).count();
        assert_eq!(tried, 1, "{both:?}");
        let ids: std::collections::BTreeSet<_> = both.iter().map(|one| one.conn).collect();
        assert_eq!(ids.len(), 3);
    });
}

#[test]
fn who_only_acknowledges_learns_nothing() {
    for congestion_control in BOTH {
        let mut path = Path::new(&config(congestion_control, true), FULL_BYTES, true, 1);
        path.transfer(1);
        path.transfer(1);
        let receiver = path.server.counters();
        let tries =
            receiver.resume_validated + receiver.resume_declined + receiver.resume_retreated;
        assert_eq!(tries, 0, "who only acknowledges knows no rate");
    }
}

/// With post-quantum key exchange a ClientHello comes in two packets, the second of which brings the
/// refusal while the first waits for `accept`: that connection never sends, and tries nothing.
#[test]
fn who_is_refused_leaves_the_trial_to_the_next() {
    for congestion_control in BOTH {
        let mut path = Path::new(&config(congestion_control, true), FULL_BYTES, false, 1);
        path.transfer(1);
        path.server.send_to_app(Box::new(LetWait));
        let (app, _) = Bulk::new(0);
        let at = SocketAddrV6::new(CLIENT_HOST, CLIENT.port() + 1, 0, 0);
        let setup = SimHostConfig {
            config: config(congestion_control, false),
            server: None,
            client: Some(tls_for(b"other").1),
            seed: 9,
        };
        let mut stranger =
            SimHost::new(&path.clock, path.network.open(at), setup, app).expect("stranger");
        stranger.send_to_app(Box::new(()));
        let Path { server, network, clock, .. } = &mut path;
        run_both([&mut stranger, server], network, clock, Duration::from_secs(5), &mut || false);
        let counters = path.server.counters();
        assert_eq!((counters.incoming_failed, counters.accepted), (1, 1), "{counters:?}");
        assert_eq!(first(&path.transfer(1)).phase, ResumePhase::Validated);
    }
}
