//! What the peer may use grows with its use: nobody is held back for long, nothing is reserved.
//! In virtual time: a wait for credit is counted in round trips.

#[path = "common/sim.rs"]
mod sim;

use std::any::Any;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use sim::{CLIENT, CLIENT_HOST, Plan, SERVER, SERVER_HOST, TestApp};
use stoq::app::{ConnId, ShardApp, ShardCx};
use stoq::clock::SimClock;
use stoq::config::{STREAMS_ALLOWED_INITIAL, TransportConfig};
use stoq::datapath::sim::{LinkConfig, Prefix, SimNetwork, run_while};
use stoq::sim::{SimHost, SimHostConfig};
use stoq::{Dir, StreamId, VarInt};

const ROUND_TRIP: Duration = Duration::from_millis(40);

/// Opens streams with a byte each, as many as the peer lets it.
struct Opener {
    dir: Dir,
    /// End each stream at once; else it stays open.
    finish: bool,
    /// Opened at the start; later ones by message, one each.
    burst: usize,
    opened: Arc<Mutex<Vec<StreamId>>>,
    conn: Option<ConnId>,
    wanted: usize,
}

impl Opener {
    fn open(&mut self, cx: &mut ShardCx<'_>) {
        let Some(conn) = self.conn else { return };
        while self.wanted > 0 {
            let Some(stream) = cx.open(conn, self.dir) else { return };
            self.wanted -= 1;
            cx.write(conn, stream, &mut [Bytes::from_static(b"x")]);
            if self.finish {
                cx.finish(conn, stream);
            }
            self.opened.lock().expect("list").push(stream);
        }
    }
}

impl ShardApp for Opener {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        match message.downcast::<usize>() {
            Ok(wanted) => {
                self.wanted += *wanted;
                self.open(cx);
            }
            Err(_connect) => {
                cx.connect(SERVER, "stoq.test").expect("within the limits");
            }
        }
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.conn = Some(conn);
        self.wanted += self.burst;
        self.open(cx);
    }

    fn handle_stopped(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
        code: VarInt,
    ) {
        cx.reset(conn, stream, code);
    }

    fn handle_streams_available(&mut self, cx: &mut ShardCx<'_>, _conn: ConnId, dir: Dir) {
        if dir == self.dir {
            self.open(cx);
        }
    }
}

/// A server that keeps every stream open, as if its application only listened.
struct Keeper {
    accept: bool,
    stop: Option<VarInt>,
    conn: Option<ConnId>,
}

impl ShardApp for Keeper {
    fn handle_connected(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId) {
        self.conn = Some(conn);
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        while self.accept && cx.accept_stream(conn, dir).is_some() {}
    }

    /// Stops the client's first unidirectional streams.
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        let count = *message.downcast::<u64>().expect("a number");
        let (conn, code) = (self.conn.expect("connected"), self.stop.expect("a code"));
        for index in 0..count {
            let stream = StreamId::new(quinn_proto::Side::Client, Dir::Uni, index);
            assert!(cx.stop(conn, stream, code), "the stream is open");
        }
    }
}

struct Stage {
    clock: SimClock,
    network: SimNetwork,
    client: SimHost,
    server: SimHost,
    opened: Arc<Mutex<Vec<StreamId>>>,
}

impl Stage {
    fn new(opener: impl FnOnce(Arc<Mutex<Vec<StreamId>>>) -> Opener, app: impl ShardApp) -> Self {
        let clock = SimClock::new();
        let network = SimNetwork::new(clock.clone(), 11);
        let link = LinkConfig {
            rate_bps: 1_000_000_000,
            delay_us: ROUND_TRIP.as_micros() as u64 / 2,
            ..LinkConfig::default()
        };
        let (near, far) = (Prefix::new(CLIENT_HOST, 32), Prefix::new(SERVER_HOST, 32));
        network.add_link(near, far, link.clone(), link).expect("a valid link");
        let (server_tls, client_tls) = sim::tls();
        let setup = |server, client, seed| SimHostConfig {
            config: TransportConfig { idle_timeout_ms: 0, ..TransportConfig::default() },
            server,
            client,
            seed,
        };
        let opened = Arc::new(Mutex::new(Vec::new()));
        let (server, client) =
            (setup(Some(server_tls as _), None, 1), setup(None, Some(client_tls as _), 2));
        let server = SimHost::new(&clock, network.open(SERVER), server, app).expect("server");
        let opener = opener(opened.clone());
        let client = SimHost::new(&clock, network.open(CLIENT), client, opener).expect("client");
        client.send_to_app(Box::new(()));
        Self { clock, network, client, server, opened }
    }

    fn opened(&self) -> usize {
        self.opened.lock().expect("list").len()
    }

    fn run(&mut self, limit: Duration, mut done: impl FnMut(usize) -> bool) -> Duration {
        let (start, opened) = (self.clock.elapsed(), self.opened.clone());
        let until = start + limit;
        let mut goes_on = || !done(opened.lock().expect("list").len());
        let hosts: &mut [&mut dyn stoq::datapath::sim::SimNode] =
            &mut [&mut self.client, &mut self.server];
        run_while(hosts, &self.network, &self.clock, until, &mut goes_on);
        self.clock.elapsed() - start
    }
}

fn opener(
    dir: Dir,
    finish: bool,
    burst: usize,
) -> impl FnOnce(Arc<Mutex<Vec<StreamId>>>) -> Opener {
    move |opened| Opener { dir, finish, burst, opened, conn: None, wanted: 0 }
}

#[test]
fn a_thousand_open_streams_take_a_few_round_trips_and_no_more_are_allowed() {
    for (dir, accept) in [(Dir::Bi, true), (Dir::Uni, true), (Dir::Uni, false)] {
        let keeper = Keeper { accept, stop: Some(VarInt::from_u32(7)), conn: None };
        let mut stage = Stage::new(opener(dir, false, 5000), keeper);
        stage.run(Duration::from_secs(10), |opened| opened > 0);
        assert_eq!(stage.opened() as u64, STREAMS_ALLOWED_INITIAL);
        let took = stage.run(Duration::from_secs(10), |opened| opened >= 1000);
        assert_eq!(stage.opened(), 1000, "{dir:?}");
        // 32, 128, 1000.
        assert!(took < 3 * ROUND_TRIP, "{dir:?}: {took:?}");
        stage.run(Duration::from_secs(2), |_| false);
        assert_eq!(stage.opened(), 1000, "max_concurrent_streams holds");
        if dir == Dir::Uni {
            // Freed places are announced an eighth of the limit at a time.
            stage.server.send_to_app(Box::new(200_u64));
            stage.run(Duration::from_secs(2), |opened| opened >= 1200);
            assert_eq!(stage.opened(), 1200);
        }
    }
}

#[test]
fn short_streams_one_after_another_are_never_held_back() {
    let (server, log) = TestApp::new(Plan::default());
    let mut stage = Stage::new(opener(Dir::Uni, true, 0), server);
    stage.run(Duration::from_secs(1), |_| log.lock().expect("log").connected == 1);
    let mut waited = Duration::ZERO;
    for number in 1..=2000 {
        // Ten a millisecond: 400 in a round trip, while hardly any is open at the same time.
        stage.run(Duration::from_micros(100), |_| false);
        stage.client.send_to_app(Box::new(1_usize));
        waited += stage.run(Duration::from_secs(1), |opened| opened >= number);
    }
    assert_eq!(stage.opened(), 2000);
    assert!(waited < 4 * ROUND_TRIP, "streams waited {waited:?} for credit in all");
}
