//! The client's side of `stoq perf idle`, on its shards: handshakes at a rate, then requests on
//! connections picked at random, spread over the time that the connections are held.

use std::any::Any;
use std::collections::HashMap;
use std::net::SocketAddrV6;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use stoq::app::{ConnId, ReadOutcome, ShardApp, ShardCx};
use stoq::error::ConnectionError;
use stoq::{Dir, StreamId};

/// How often a shard starts what has become due.
const TICK: Duration = Duration::from_millis(1);
/// Handshakes that one tick starts at most: a late tick must not become one long turn.
const HANDSHAKES_PER_TICK_MAX: usize = 4;
/// Handshakes of one shard under way at most: a server that falls behind is waited for, or else
/// the packets that end its handshakes would queue behind first flights until it gives them up.
const HANDSHAKES_UNDER_WAY_MAX: usize = 64;
/// Payload of a request's answer, bytes.
pub const ANSWER_BYTES: u64 = 64;
/// Failures that are told in words; further ones are counted.
const FAILURES_TOLD_MAX: usize = 3;

/// What the shards tell the measuring thread.
pub struct Shared {
    /// Handshakes that succeeded.
    pub connected: AtomicU64,
    /// Connections that could not be made or were lost.
    pub failed: AtomicU64,
    /// Requests sent.
    pub requests: AtomicU64,
    /// Requests answered whole.
    pub answers: AtomicU64,
    /// From writing a request to the end of its answer, µs.
    pub latency_us: Mutex<Histogram<u64>>,
    /// The run is over: connections may end.
    pub stopping: AtomicBool,
    reasons: Mutex<Vec<String>>,
}

impl Shared {
    /// Nothing happened yet.
    pub fn new() -> Self {
        let latency = Histogram::new_with_bounds(1, 60_000_000, 3).expect("constant bounds");
        Self {
            connected: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            latency_us: Mutex::new(latency),
            stopping: AtomicBool::new(false),
            reasons: Mutex::default(),
        }
    }

    /// The first failures' reasons.
    pub fn reasons(&self) -> String {
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner).join("; ")
    }

    fn fail(&self, text: String) {
        self.failed.fetch_add(1, Relaxed);
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if reasons.len() < FAILURES_TOLD_MAX {
            reasons.push(text);
        }
    }
}

/// Orders of the measuring thread to one shard.
#[derive(Debug, Clone, Copy)]
pub enum Order {
    /// Make so many connections at this rate, per second.
    Connect {
        /// Connections of this shard.
        connections: usize,
        /// Handshakes started per second by this shard.
        rate: f64,
    },
    /// Send so many requests, evenly over this time.
    Request {
        /// Requests of this shard.
        requests: usize,
        /// From first to last.
        over: Duration,
    },
}

/// Something done evenly over time.
struct Schedule {
    since: Instant,
    per_s: f64,
    done: usize,
    wanted: usize,
}

impl Schedule {
    /// How many more should have been done by now.
    fn due(&self, now: Instant) -> usize {
        let due = (now - self.since).as_secs_f64() * self.per_s;
        (due as usize).min(self.wanted).saturating_sub(self.done)
    }

    fn is_done(&self) -> bool {
        self.done >= self.wanted
    }
}

/// One shard's client.
pub struct IdleApp {
    peer: SocketAddrV6,
    name: String,
    shared: Arc<Shared>,
    random: u64,
    conns: Vec<ConnId>,
    under_way: usize,
    connects: Option<Schedule>,
    requests: Option<Schedule>,
    open: HashMap<(ConnId, StreamId), (Instant, u64)>,
}

impl IdleApp {
    /// The client of shard `shard`; `seed` chooses the connections that carry a request.
    pub fn new(
        peer: SocketAddrV6,
        name: String,
        shared: Arc<Shared>,
        seed: u64,
        shard: usize,
    ) -> Self {
        Self {
            peer,
            name,
            shared,
            random: seed ^ (shard as u64) << 32,
            conns: Vec::new(),
            under_way: 0,
            connects: None,
            requests: None,
            open: HashMap::new(),
        }
    }

    /// SplitMix64.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn start_handshakes(&mut self, cx: &mut ShardCx<'_>) {
        let Some(schedule) = &mut self.connects else { return };
        let room = HANDSHAKES_UNDER_WAY_MAX.saturating_sub(self.under_way);
        for _ in 0..schedule.due(cx.now()).min(HANDSHAKES_PER_TICK_MAX).min(room) {
            schedule.done += 1;
            match cx.connect(self.peer, &self.name) {
                Ok(_conn) => self.under_way += 1,
                Err(error) => self.shared.fail(error.to_string()),
            }
        }
    }

    fn send_requests(&mut self, cx: &mut ShardCx<'_>) {
        let due = self.requests.as_ref().map_or(0, |schedule| schedule.due(cx.now()));
        for _ in 0..due {
            if let Some(schedule) = &mut self.requests {
                schedule.done += 1;
            }
            self.shared.requests.fetch_add(1, Relaxed);
            let pick = self.next_random() as usize;
            // Without any connection the request counts as not answered.
            let Some(&conn) = self.conns.get(pick % self.conns.len().max(1)) else { continue };
            let Some(stream) = cx.open(conn, Dir::Bi) else { continue };
            cx.write(conn, stream, &mut [Bytes::copy_from_slice(&ANSWER_BYTES.to_be_bytes())]);
            cx.finish(conn, stream);
            self.open.insert((conn, stream), (Instant::now(), 0));
        }
    }

    fn is_busy(&self) -> bool {
        [&self.connects, &self.requests].into_iter().flatten().any(|schedule| !schedule.is_done())
    }
}

impl ShardApp for IdleApp {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        let Ok(order) = message.downcast::<Order>() else { return };
        let idle = !self.is_busy();
        let since = cx.now();
        match *order {
            Order::Connect { connections: wanted, rate: per_s } => {
                self.conns.reserve_exact(wanted);
                self.connects = Some(Schedule { since, per_s, done: 0, wanted });
            }
            Order::Request { requests: wanted, over } => {
                let per_s = wanted as f64 / over.as_secs_f64();
                self.requests = Some(Schedule { since, per_s, done: 0, wanted });
            }
        }
        if idle {
            cx.set_timer(since + TICK, 0);
        }
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, _token: u64) {
        self.start_handshakes(cx);
        self.send_requests(cx);
        if self.is_busy() {
            cx.set_timer(cx.now() + TICK, 0);
        }
    }

    fn handle_connected(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId) {
        self.under_way -= 1;
        self.conns.push(conn);
        self.shared.connected.fetch_add(1, Relaxed);
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        let Some((since, bytes)) = self.open.get_mut(&(conn, stream)) else { return };
        let outcome = cx.read(conn, stream, usize::MAX, |data| *bytes += data.len() as u64);
        if !matches!(outcome, ReadOutcome::Finished) {
            return;
        }
        if *bytes == ANSWER_BYTES {
            self.shared.answers.fetch_add(1, Relaxed);
            let mut latency = self.shared.latency_us.lock().unwrap_or_else(PoisonError::into_inner);
            latency.saturating_record(since.elapsed().as_micros() as u64);
        }
        self.open.remove(&(conn, stream));
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId, reason: &ConnectionError) {
        if self.shared.stopping.load(Relaxed) {
            return;
        }
        match self.conns.iter().position(|other| *other == conn) {
            Some(place) => drop(self.conns.swap_remove(place)),
            None => self.under_way -= 1,
        }
        self.shared.fail(reason.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_is_even_and_ends() {
        let since = Instant::now();
        let mut schedule = Schedule { since, per_s: 1000.0, done: 0, wanted: 10 };
        assert_eq!(schedule.due(since), 0);
        assert_eq!(schedule.due(since + Duration::from_millis(4)), 4);
        schedule.done = 3;
        assert_eq!(schedule.due(since + Duration::from_millis(4)), 1);
        assert_eq!(schedule.due(since + Duration::from_secs(9)), 7);
        schedule.done = 10;
        assert!(schedule.is_done() && schedule.due(since + Duration::from_secs(9)) == 0);
    }
}
