//! What leaves a shard, and how often it wakes for it: the pacer in whole shards, in virtual time.
//!
//! Every turn of a sender is watched from outside. A line of the pacing rate that the connection
//! reports takes what the datapath was given; it may never be ahead by more than the quantum. Turns
//! are told apart by what woke them: a packet, or the clock.

#[path = "common/sim.rs"]
mod sim;

use std::any::Any;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoq::app::{ConnId, Incoming, ShardApp, ShardCx, WriteOutcome};
use stoq::clock::{Clock, SimClock};
use stoq::config::{CongestionControl, SPIN_UNTIL_DEADLINE_US, TransportConfig};
use stoq::datapath::sim::{
    EndpointId, LinkConfig, Prefix, QueueLimit, SimNetwork, SimNode, run_while,
};
use stoq::error::ConnectionError;
use stoq::sim::{SimHost, SimHostConfig};
use stoq::{Dir, StreamId};

use sim::{CLIENT, CLIENT_HOST, Plan, SERVER, SERVER_HOST, TestApp, tls};

const ALL: [CongestionControl; 4] = [
    CongestionControl::Bbr2,
    CongestionControl::Bbr3,
    CongestionControl::Cubic,
    CongestionControl::NewReno,
];
/// A quantum is what the rate sends in this time …
const QUANTUM_MS: u64 = 1;
/// … and at most so much, at least two packets.
const QUANTUM_BYTES_MAX: u64 = 64 * 1024;
/// What a deadline of the timer wheel may be late by: its tick.
const TICK: Duration = Duration::from_nanos(4_096);

/// Writes without end; or a burst, then nothing for a while, again and again.
struct Source {
    /// Zero: without end.
    burst_bytes: usize,
    pause: Duration,
    block: Bytes,
    stream: Option<(ConnId, StreamId)>,
    unwritten: usize,
}

impl Source {
    fn new(burst_bytes: usize, pause: Duration) -> Self {
        let block = Bytes::from(vec![7; 1 << 20]);
        Self { burst_bytes, pause, block, stream: None, unwritten: 0 }
    }

    fn burst(&mut self, cx: &mut ShardCx<'_>) {
        self.unwritten = if self.burst_bytes == 0 { usize::MAX } else { self.burst_bytes };
        if self.burst_bytes > 0 {
            cx.set_timer(cx.now() + self.pause, 0);
        }
        self.write(cx);
    }

    fn write(&mut self, cx: &mut ShardCx<'_>) {
        let Some((conn, stream)) = self.stream else { return };
        while self.unwritten > 0 {
            let len = self.unwritten.min(self.block.len());
            match cx.write(conn, stream, &mut [self.block.slice(..len)]) {
                WriteOutcome::Written(bytes) => self.unwritten -= bytes,
                _ => return,
            }
        }
    }
}

impl ShardApp for Source {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, _start: Box<dyn Any + Send>) {
        cx.connect(SERVER, "stoq.test").expect("connect");
    }

    fn handle_incoming(&mut self, cx: &mut ShardCx<'_>, incoming: Incoming) {
        cx.refuse(incoming);
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.stream = cx.open(conn, Dir::Uni).map(|stream| (conn, stream));
        self.burst(cx);
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, _token: u64) {
        self.burst(cx);
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, _conn: ConnId, _stream: StreamId) {
        self.write(cx);
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, _conn: ConnId, reason: &ConnectionError) {
        panic!("the connection was lost: {reason}");
    }
}

/// What the watched turns came to.
#[derive(Debug, Default)]
struct Seen {
    datagrams: u64,
    /// Stream bytes that the receiver took.
    received_bytes: u64,
    /// Turns that nothing but the clock had caused, and those of them that sent.
    clock_turns: u64,
    clock_sends: u64,
    /// By how much the line was ahead beyond a quantum and a packet at most.
    beyond_quantum_max: Duration,
    /// Waits for the pacer, and those short enough to be spun through.
    waits: u64,
    waits_spun: u64,
    /// Instants at which something left after a pause of 10 ms or more.
    restarts: u64,
    /// 1000 × (rate × srtt / cwnd), least and most, in the second half.
    rate_milli: Option<(u64, u64)>,
}

/// A sender whose every turn is watched.
struct Watched<'a> {
    host: &'a mut SimHost,
    clock: SimClock,
    /// What is seen counts from here on.
    from: Instant,
    line_free_at: Instant,
    last_sent_at: Instant,
    seen: Seen,
}

impl Watched<'_> {
    fn note_sent(
        &mut self,
        now: Instant,
        bytes: u64,
        owed: u64,
        rate_bytes_per_s: u64,
        packet: u64,
    ) {
        let pause = now.saturating_duration_since(self.last_sent_at);
        self.last_sent_at = now;
        let time = |bytes: u64| Duration::from_secs_f64(bytes as f64 / rate_bytes_per_s as f64);
        self.line_free_at = self.line_free_at.max(now) + time(bytes);
        let quantum = (rate_bytes_per_s * QUANTUM_MS / 1000).min(QUANTUM_BYTES_MAX).max(2 * packet);
        let beyond = self
            .line_free_at
            .saturating_duration_since(now)
            .saturating_sub(time(quantum + packet + owed));
        if now >= self.from {
            self.seen.restarts += u64::from(pause >= Duration::from_millis(10));
            self.seen.beyond_quantum_max = self.seen.beyond_quantum_max.max(beyond);
        }
    }
}

impl SimNode for Watched<'_> {
    fn turn(&mut self) -> Option<Instant> {
        let now = self.clock.now();
        let before = self.host.datapath_counters();
        let owed_before = self.host.counters().tx_owed_acks;
        let deadline = self.host.turn();
        let after = self.host.datapath_counters();
        let Some(stats) = self.host.connection_stats().filter(|stats| stats.acks_received > 2)
        else {
            return deadline;
        };
        let datagrams = after.tx_datagrams - before.tx_datagrams;
        let (rate, packet) = (stats.pacing_rate_bps / 8, u64::from(stats.mtu_bytes));
        if datagrams > 0 {
            // The packet of an owed ACK leaves whatever the pacer says.
            let owed = (self.host.counters().tx_owed_acks - owed_before) * packet;
            self.note_sent(now, after.tx_bytes - before.tx_bytes, owed, rate, packet);
        }
        if now < self.from {
            return deadline;
        }
        let seen = &mut self.seen;
        seen.datagrams += datagrams;
        let by_clock = after.rx_datagrams == before.rx_datagrams;
        seen.clock_turns += u64::from(by_clock);
        seen.clock_sends += u64::from(by_clock && datagrams > 0);
        if datagrams > 0
            && let Some(deadline) = deadline.filter(|deadline| *deadline > now)
        {
            seen.waits += 1;
            let spun = deadline - now < Duration::from_micros(SPIN_UNTIL_DEADLINE_US);
            seen.waits_spun += u64::from(spun);
        }
        let scaled = u128::from(rate) * stats.rtt.as_nanos() / 1_000_000;
        let milli = (scaled / u128::from(stats.cwnd_bytes.max(1))) as u64;
        let (least, most) = seen.rate_milli.unwrap_or((milli, milli));
        seen.rate_milli = Some((least.min(milli), most.max(milli)));
        deadline
    }

    fn endpoint(&self) -> Option<EndpointId> {
        self.host.endpoint()
    }
}

/// A link and how long it is watched: the first third of `time` is for Startup.
struct Case {
    rate_bps: u64,
    delay_us: u64,
    time: Duration,
}

fn case(rate_bps: u64, delay_us: u64, time_ms: u64) -> Case {
    Case { rate_bps, delay_us, time: Duration::from_millis(time_ms) }
}

/// One sender on one link; what was seen of it.
fn watch(cc: CongestionControl, case: &Case, source: Source) -> Seen {
    let clock = SimClock::new();
    let network = SimNetwork::new(clock.clone(), 1);
    let queue_bytes = (case.rate_bps / 8_000_000 * case.delay_us * 2).max(30_000);
    let link = LinkConfig {
        rate_bps: case.rate_bps,
        delay_us: case.delay_us,
        queue: QueueLimit::Bytes(queue_bytes),
        ..LinkConfig::default()
    };
    network
        .add_link(Prefix::new(CLIENT_HOST, 32), Prefix::new(SERVER_HOST, 32), link.clone(), link)
        .expect("valid link");
    let config = || TransportConfig { congestion_control: cc, ..TransportConfig::default() };
    let (server_tls, client_tls) = tls();
    let setup = SimHostConfig { config: config(), server: None, client: Some(client_tls), seed: 2 };
    let mut client = SimHost::new(&clock, network.open(CLIENT), setup, source).expect("client");
    let setup = SimHostConfig { config: config(), server: Some(server_tls), client: None, seed: 3 };
    let (reader, log) = TestApp::new(Plan { unordered: true, ..Plan::default() });
    let mut server = SimHost::new(&clock, network.open(SERVER), setup, reader).expect("server");
    client.send_to_app(Box::new(()));
    let start = clock.now();
    let mut watched = Watched {
        host: &mut client,
        clock: clock.clone(),
        from: start + case.time / 3,
        line_free_at: start,
        last_sent_at: start,
        seen: Seen::default(),
    };
    let mut received_until = |until| {
        run_while(&mut [&mut watched, &mut server], &network, &clock, until, &mut || true);
        log.lock().expect("log").received_bytes
    };
    let received_before = received_until(case.time / 3);
    let received_bytes = received_until(case.time) - received_before;
    let seen = Seen { received_bytes, ..watched.seen };
    println!("{cc:?} at {} bit/s: {seen:?}", case.rate_bps);
    seen
}

/// Of a deadline that was late by a tick, the line was free for a tick before; another tick is for
/// rounding, which adds up while the line is never free.
fn assert_no_burst(what: &str, seen: &Seen) {
    assert!(seen.beyond_quantum_max <= 2 * TICK, "{what}: a burst beyond the quantum: {seen:?}");
}

#[test]
fn quanta_leave_at_the_rate_from_10_kbit_to_100_gbit() {
    for case in [
        case(10_000, 50_000, 300_000),
        case(1_000_000, 10_000, 20_000),
        case(100_000_000, 5_000, 1_500),
        case(1_000_000_000, 500, 150),
        case(10_000_000_000, 100, 15),
        case(40_000_000_000, 50, 6),
        case(100_000_000_000, 20, 3),
    ] {
        for cc in ALL {
            let what = format!("{cc:?} at {} bit/s", case.rate_bps);
            let seen = watch(cc, &case, Source::new(0, Duration::ZERO));
            assert_no_burst(&what, &seen);
            let bps = seen.received_bytes as f64 * 8.0 / (case.time * 2 / 3).as_secs_f64();
            let share = bps / case.rate_bps as f64;
            assert!(share >= 0.8, "{what}: {share:.2} of the link: {seen:?}");
            if !is_bbr(cc) {
                // RFC 9002 §7.7: 1.25 × cwnd / smoothed_rtt.
                let (least, most) = seen.rate_milli.expect("it was watched");
                assert!(least >= 1_240 && most <= 1_250, "{what}: {least} to {most}");
            }
            if case.rate_bps >= 100_000_000 {
                assert_few_wakes(&what, &seen, case.rate_bps);
            }
            if is_bbr(cc) && case.rate_bps >= 10_000_000_000 {
                let holds = seen.waits_spun * 10 >= seen.waits * 9;
                assert!(holds, "{what}: a quantum's end is nearer than parking: {seen:?}");
            }
        }
    }
}

fn is_bbr(cc: CongestionControl) -> bool {
    matches!(cc, CongestionControl::Bbr2 | CongestionControl::Bbr3)
}

/// A quantum is 8 packets at 100 Mbit/s and 45 from 524 Mbit/s on; acknowledgements wake as well,
/// and take part of what the clock would have released.
fn assert_few_wakes(what: &str, seen: &Seen, rate_bps: u64) {
    let packets_per_turn = if rate_bps >= 1_000_000_000 { 10 } else { 3 };
    let few = seen.clock_turns * packets_per_turn <= seen.datagrams;
    assert!(few, "{what}: less than {packets_per_turn} packets a turn by the clock: {seen:?}");
    let sends = seen.clock_sends * 6 <= seen.datagrams;
    assert!(sends, "{what}: less than 6 packets each time the clock let some out: {seen:?}");
}

/// The controllers of a window alone have no rate before they have a round trip. A guess of 100 ms
/// would hold a server's first flight back for 16 ms, and a client's first request as long.
#[test]
fn nothing_is_paced_by_a_guessed_round_trip() {
    for cc in ALL {
        // 0.2 ms of round trip: a handshake and four rounds of an initial window and more.
        let seen = watch(cc, &case(10_000_000_000, 100, 1), Source::new(0, Duration::ZERO));
        assert!(seen.received_bytes >= 20_000, "{cc:?}: {seen:?}");
    }
}

#[test]
fn unused_time_does_not_become_a_burst() {
    for (case, burst_bytes, pause_ms) in [
        (case(100_000_000, 5_000, 3_000), 300_000, 60),
        (case(10_000_000_000, 100, 600), 2_000_000, 15),
    ] {
        for cc in ALL {
            let what = format!("{cc:?} at {} bit/s in bursts", case.rate_bps);
            let source = Source::new(burst_bytes, Duration::from_millis(pause_ms));
            let seen = watch(cc, &case, source);
            assert!(seen.restarts >= 10, "{what}: {seen:?}");
            assert_no_burst(&what, &seen);
        }
    }
}
