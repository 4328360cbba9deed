//! Shards that share their core with others: each runs for a slice and is away for much longer.
//!
//! The time a sender was away while its pacer waited is not time in which it had nothing to say.
//! Were it lost, every slice would release one quantum, BBR would measure that as the path's
//! bandwidth, and make the next quantum smaller: such a transfer ended at two packets a slice.

#[path = "common/sim.rs"]
mod sim;

use std::time::{Duration, Instant};

use sim::{Pair, PairConfig, Plan, Send, pattern};
use stoq::Dir;
use stoq::clock::{Clock, SimClock};
use stoq::config::{CongestionControl, TransportConfig};
use stoq::datapath::sim::{EndpointId, LinkConfig, QueueLimit, SimNode, run_while};
use stoq::sim::SimHost;

/// A host whose thread runs for `slice` of every `period`.
struct SharedCore<'a> {
    host: &'a mut SimHost,
    clock: SimClock,
    start: Instant,
    slice: Duration,
    period: Duration,
    phase: Duration,
}

impl SharedCore<'_> {
    /// When the thread runs next: now, or at the start of its next slice.
    fn runs_at(&self, at: Instant) -> Instant {
        let into = at.duration_since(self.start) + self.phase;
        let into_ns = into.as_nanos() % self.period.as_nanos();
        let into = Duration::from_nanos(into_ns as u64);
        if into < self.slice { at } else { at + (self.period - into) }
    }
}

impl SimNode for SharedCore<'_> {
    fn turn(&mut self) -> Option<Instant> {
        let now = self.clock.now();
        let next = self.runs_at(now);
        if next > now {
            return Some(next);
        }
        let deadline = self.host.turn()?;
        Some(self.runs_at(deadline.max(now)))
    }

    fn endpoint(&self) -> Option<EndpointId> {
        self.host.endpoint()
    }
}

/// Bytes that arrive within `time`, with both ends on shared cores.
fn upload_on_shared_cores(cc: CongestionControl, seed: u64, time: Duration) -> u64 {
    let config = || TransportConfig { congestion_control: cc, ..TransportConfig::default() };
    let link = LinkConfig {
        rate_bps: 10_000_000_000,
        delay_us: 20,
        queue: QueueLimit::Bytes(64 << 20),
        ..LinkConfig::default()
    };
    let plan = Plan {
        sends: vec![Send { dir: Dir::Bi, data: pattern(64 << 20), finish: true }],
        ..Plan::default()
    };
    let mut pair = Pair::new(
        PairConfig { link, seed, client: config(), server: config(), ..PairConfig::default() },
        plan,
        Plan::default(),
    );
    let (clock, start) = (pair.clock.clone(), pair.clock.now());
    let ms = Duration::from_millis;
    let core = |host, period, phase| SharedCore {
        host,
        clock: clock.clone(),
        start,
        slice: ms(3),
        period: ms(period),
        phase: ms(phase),
    };
    // Periods without a common divisor: the slices meet at times, as they do on a busy machine.
    let mut client = core(&mut pair.client, 47, seed * 5);
    let mut server = core(&mut pair.server, 53, seed * 11);
    run_while(&mut [&mut client, &mut server], &pair.network, &clock, time, &mut || true);
    let received = pair.server_log.lock().expect("log").received_bytes;
    println!("{cc:?}, seed {seed}: {received} bytes in {time:?}");
    received
}

#[test]
fn a_sender_that_is_away_makes_up_for_the_time() {
    for cc in [CongestionControl::Bbr2, CongestionControl::Bbr3] {
        for seed in [4, 5] {
            let time = Duration::from_secs(3);
            let received = upload_on_shared_cores(cc, seed, time);
            // Without making up, seed 4 ends below 1 MB.
            assert!(received > 8_000_000, "{cc:?}, seed {seed}: {received} bytes in {time:?}");
        }
    }
}
