//! Fixed work for `cargo xtask instructions` to count the instructions of: two whole shards on a
//! simulated link, in virtual time, in one thread.
//!
//! callgrind collects inside [`measured_turn`] alone. Each scenario first brings the connection
//! into its steady state without measuring, then measures the turns of one end or of both.

// The tests' file: its TLS and its addresses.
#[path = "../../../engine/tests/common/sim.rs"]
mod sim;

use std::any::Any;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Parser, ValueEnum};
use stoq::app::{ConnId, ReadOutcome, ShardApp, ShardCx};
use stoq::clock::SimClock;
use stoq::config::{CongestionControl, TransportConfig};
use stoq::datapath::sim::{EndpointId, LinkConfig, Prefix, SimNetwork, SimNode, run_while};
use stoq::sim::{SimHost, SimHostConfig};
use stoq::{Dir, StreamId};

/// UDP payload of a full packet on the link, bytes.
const UDP_PAYLOAD_BYTES: u64 = 1452;
/// Packets of a measured transfer.
const PACKETS: u64 = 1000;
/// Requests of a measured series.
const REQUESTS: u64 = 100;
/// Bytes of a request and of its answer.
const REQUEST_BYTES: usize = 64;
/// Traffic before measuring: the window is open, the path MTU is known.
const WARM_UP_BYTES: u64 = 16 << 20;
/// Virtual time that nothing may exceed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// The sender's turns of 1000 full packets.
    Send1000,
    /// The receiver's turns of the same.
    Receive1000,
    /// Both ends' turns of one full handshake.
    Handshake,
    /// Both ends' turns of 100 requests of 64 bytes, one after the other.
    Request,
}

/// Runs one scenario.
#[derive(Parser)]
struct Cli {
    scenario: Scenario,
    /// Congestion control of both ends; the baselines are the default's.
    #[arg(long, default_value = "bbr2")]
    cc: CongestionControl,
}

/// What the applications count.
#[derive(Default)]
struct Counts {
    connected: AtomicU64,
    received: AtomicU64,
    answers: AtomicU64,
}

/// Orders to the client's application.
enum Order {
    Connect,
    Upload(u64),
    Requests(u64),
}

struct Client {
    counts: Arc<Counts>,
    conn: Option<ConnId>,
    /// The upload's stream and what is left of it.
    upload: Option<(StreamId, u64)>,
    requests: u64,
    filler: Bytes,
}

impl Client {
    fn write(&mut self, cx: &mut ShardCx<'_>) {
        let (Some(conn), Some((stream, left))) = (self.conn, &mut self.upload) else { return };
        while *left > 0 {
            let len = (self.filler.len() as u64).min(*left) as usize;
            let mut chunk = [self.filler.slice(..len)];
            match cx.write(conn, *stream, &mut chunk) {
                stoq::app::WriteOutcome::Written(bytes) => *left -= bytes as u64,
                _ => return,
            }
        }
        cx.finish(conn, *stream);
        self.upload = None;
    }

    fn request(&mut self, cx: &mut ShardCx<'_>) {
        let (Some(conn), 1..) = (self.conn, self.requests) else { return };
        let stream = cx.open(conn, Dir::Bi).expect("the server allows streams");
        self.requests -= 1;
        cx.write(conn, stream, &mut [self.filler.slice(..REQUEST_BYTES)]);
        cx.finish(conn, stream);
    }
}

impl ShardApp for Client {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        match *message.downcast::<Order>().expect("only orders are sent") {
            Order::Connect => {
                cx.connect(sim::SERVER, "stoq.test").expect("the client may connect");
            }
            Order::Upload(bytes) => {
                let conn = self.conn.expect("connected");
                let stream = cx.open(conn, Dir::Uni).expect("the server allows streams");
                self.upload = Some((stream, bytes));
                self.write(cx);
            }
            Order::Requests(count) => {
                self.requests = count;
                self.request(cx);
            }
        }
    }

    fn handle_connected(&mut self, _: &mut ShardCx<'_>, conn: ConnId) {
        self.conn = Some(conn);
        self.counts.connected.fetch_add(1, Relaxed);
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, _: ConnId, _: StreamId) {
        self.write(cx);
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        if cx.read(conn, stream, usize::MAX, |_data| {}) == ReadOutcome::Finished {
            self.counts.answers.fetch_add(1, Relaxed);
            self.request(cx);
        }
    }
}

struct Server {
    counts: Arc<Counts>,
    answer: Bytes,
}

impl ShardApp for Server {
    fn handle_connected(&mut self, _: &mut ShardCx<'_>, _: ConnId) {
        self.counts.connected.fetch_add(1, Relaxed);
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        while let Some(stream) = cx.accept_stream(conn, dir) {
            self.handle_readable(cx, conn, stream);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        let mut bytes = 0;
        let outcome = cx.read(conn, stream, usize::MAX, |data| bytes += data.len() as u64);
        self.counts.received.fetch_add(bytes, Relaxed);
        if outcome == ReadOutcome::Finished && stream.dir() == Dir::Bi {
            cx.write(conn, stream, &mut [self.answer.clone()]);
            cx.finish(conn, stream);
        }
    }
}

/// One turn, between callgrind's switching on and off.
#[inline(never)]
fn measured_turn(host: &mut SimHost) -> Option<Instant> {
    std::hint::black_box(host).turn()
}

/// A host whose turns are measured while the switch is on.
struct Measured<'a> {
    host: &'a mut SimHost,
    on: &'a Cell<bool>,
}

impl SimNode for Measured<'_> {
    fn turn(&mut self) -> Option<Instant> {
        if self.on.get() { measured_turn(self.host) } else { self.host.turn() }
    }

    fn endpoint(&self) -> Option<EndpointId> {
        self.host.endpoint()
    }
}

/// Both hosts, their link and their switches.
struct World {
    clock: SimClock,
    network: SimNetwork,
    client: SimHost,
    server: SimHost,
    counts: Arc<Counts>,
    measure_client: Cell<bool>,
    measure_server: Cell<bool>,
}

impl World {
    fn new(cc: CongestionControl) -> anyhow::Result<Self> {
        let clock = SimClock::new();
        let network = SimNetwork::new(clock.clone(), 1);
        let link = LinkConfig { rate_bps: 10_000_000_000, delay_us: 50, ..LinkConfig::default() };
        network
            .add_link(
                Prefix::new(sim::CLIENT_HOST, 32),
                Prefix::new(sim::SERVER_HOST, 32),
                link.clone(),
                link,
            )
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        let (client_path, server_path) = (network.open(sim::CLIENT), network.open(sim::SERVER));
        let (server_tls, client_tls) = sim::tls();
        let counts = Arc::new(Counts::default());
        let config = TransportConfig {
            mtu_upper_bound_bytes: UDP_PAYLOAD_BYTES as u16,
            congestion_control: cc,
            ..TransportConfig::default()
        };
        let setup =
            |seed, server, client| SimHostConfig { config: config.clone(), server, client, seed };
        let client_app = Client {
            counts: counts.clone(),
            conn: None,
            upload: None,
            requests: 0,
            filler: Bytes::from(vec![0x5a; 256 << 10]),
        };
        let server_app =
            Server { counts: counts.clone(), answer: Bytes::from(vec![0x5a; REQUEST_BYTES]) };
        let client = setup(2, None, Some(client_tls as _));
        let server = setup(3, Some(server_tls as _), None);
        Ok(Self {
            client: SimHost::new(&clock, client_path, client, client_app)?,
            server: SimHost::new(&clock, server_path, server, server_app)?,
            clock,
            network,
            counts,
            measure_client: Cell::new(false),
            measure_server: Cell::new(false),
        })
    }

    /// Gives the client an order and runs until `done`.
    fn run(&mut self, order: Order, done: impl Fn(&Counts) -> bool) -> anyhow::Result<()> {
        self.client.send_to_app(Box::new(order));
        let until = self.clock.elapsed() + PATIENCE;
        let counts = self.counts.clone();
        let mut client = Measured { host: &mut self.client, on: &self.measure_client };
        let mut server = Measured { host: &mut self.server, on: &self.measure_server };
        run_while(&mut [&mut client, &mut server], &self.network, &self.clock, until, &mut || {
            !done(&counts)
        });
        anyhow::ensure!(done(&self.counts), "the scenario did not come to its end");
        Ok(())
    }

    fn upload(&mut self, bytes: u64) -> anyhow::Result<()> {
        let goal = self.counts.received.load(Relaxed) + bytes;
        self.run(Order::Upload(bytes), move |counts| counts.received.load(Relaxed) >= goal)
    }

    fn connect(&mut self) -> anyhow::Result<()> {
        self.run(Order::Connect, |counts| counts.connected.load(Relaxed) == 2)
    }
}

fn main() -> anyhow::Result<()> {
    let Cli { scenario, cc } = Cli::parse();
    let mut world = World::new(cc)?;
    if scenario == Scenario::Handshake {
        world.measure_client.set(true);
        world.measure_server.set(true);
        return world.connect();
    }
    world.connect()?;
    world.upload(WARM_UP_BYTES)?;
    let measured = (
        matches!(scenario, Scenario::Send1000 | Scenario::Request),
        matches!(scenario, Scenario::Receive1000 | Scenario::Request),
    );
    world.measure_client.set(measured.0);
    world.measure_server.set(measured.1);
    if scenario == Scenario::Request {
        return world
            .run(Order::Requests(REQUESTS), |counts| counts.answers.load(Relaxed) >= REQUESTS);
    }
    // 30 bytes of a packet are header, frame header and tag, about.
    world.upload(PACKETS * (UDP_PAYLOAD_BYTES - 30))
}
