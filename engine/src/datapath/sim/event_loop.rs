//! Runs nodes on a network in virtual time.
//!
//! Time stands still while there is something to do, then jumps to the earliest
//! of all node deadlines and network events. Within one instant the order is
//! fixed: network events in the order in which they were planned, then the
//! nodes that have something to do in the order of the slice, then again, until
//! nothing is left. So the same nodes and seed give the same run.

use std::time::{Duration, Instant};

use super::network::{EndpointId, SimNetwork};
use crate::clock::SimClock;

/// How many turns may happen within [`TURN_WINDOW`] of virtual time before the
/// loop calls it a livelock: a thousand times what a shard needs at 40 Gbit/s.
pub const TURNS_PER_WINDOW_MAX: u32 = 1_000_000;
/// See [`TURNS_PER_WINDOW_MAX`].
pub const TURN_WINDOW: Duration = Duration::from_millis(1);

/// Something that the event loop drives: a shard, a workload, a sampler.
pub trait SimNode {
    /// Does what there is to do at the clock's present. Returns when to be
    /// called again at the latest: the next deadline, the present (or before)
    /// if there is more to do now, `None` to wait for the network alone.
    fn turn(&mut self) -> Option<Instant>;

    /// The port whose deliveries wake this node. Without one it is given a turn
    /// whenever anything is delivered anywhere, which is right but slower.
    fn endpoint(&self) -> Option<EndpointId> {
        None
    }
}

/// Why the event loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunEnd {
    /// Virtual time reached its limit; the clock stands there.
    TimeLimit,
    /// No node has a deadline and no packet is under way.
    Idle,
    /// The caller's condition held.
    Stopped,
}

/// Runs until virtual time `until`, or until nothing is left to do.
///
/// # Panics
/// On a livelock, naming the seed and the virtual time.
pub fn run(
    nodes: &mut [&mut dyn SimNode],
    network: &SimNetwork,
    clock: &SimClock,
    until: Duration,
) -> RunEnd {
    run_while(nodes, network, clock, until, &mut || true)
}

/// [`run`] for as long as `proceed`, asked after every round of turns, says yes.
///
/// # Panics
/// On a livelock, naming the seed and the virtual time.
pub fn run_while(
    nodes: &mut [&mut dyn SimNode],
    network: &SimNetwork,
    clock: &SimClock,
    until: Duration,
    proceed: &mut dyn FnMut() -> bool,
) -> RunEnd {
    let mut schedule = Schedule::new(nodes, network, clock);
    loop {
        network.advance();
        while schedule.round(nodes) {
            if !proceed() {
                return RunEnd::Stopped;
            }
            network.advance();
        }
        let next = match (schedule.next_deadline(), network.next_event()) {
            (Some(deadline), Some(event)) => deadline.min(event),
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => return RunEnd::Idle,
        };
        if next > until {
            clock.advance_to(until.max(clock.elapsed()));
            return RunEnd::TimeLimit;
        }
        clock.advance_to(next);
    }
}

/// When each node wants its next turn.
struct Schedule<'a> {
    network: &'a SimNetwork,
    clock: &'a SimClock,
    base: Instant,
    entries: Vec<Entry>,
    window_start: Duration,
    window_turns: u32,
}

struct Entry {
    endpoint: Option<EndpointId>,
    /// Virtual time; the first turn is due at once.
    deadline: Option<Duration>,
    /// Deliveries of the whole network at the last turn.
    deliveries: u64,
}

impl<'a> Schedule<'a> {
    fn new(nodes: &[&mut dyn SimNode], network: &'a SimNetwork, clock: &'a SimClock) -> Self {
        let now = clock.elapsed();
        let entries = nodes
            .iter()
            .map(|node| Entry { endpoint: node.endpoint(), deadline: Some(now), deliveries: 0 })
            .collect();
        let base = clock.instant_at(Duration::ZERO);
        Self { network, clock, base, entries, window_start: now, window_turns: 0 }
    }

    /// One turn for every node that has something to do; whether one had.
    fn round(&mut self, nodes: &mut [&mut dyn SimNode]) -> bool {
        let now = self.clock.elapsed();
        let mut any = false;
        for (index, node) in nodes.iter_mut().enumerate() {
            if self.is_due(index, now) {
                self.spend(index, now);
                let deadline = node.turn();
                self.entries[index].deadline =
                    deadline.map(|instant| instant.saturating_duration_since(self.base).max(now));
                any = true;
            }
        }
        any
    }

    fn is_due(&mut self, index: usize, now: Duration) -> bool {
        let entry = &mut self.entries[index];
        let woken = match entry.endpoint {
            Some(endpoint) => self.network.take_wake(endpoint),
            None => {
                let deliveries = self.network.deliveries();
                std::mem::replace(&mut entry.deliveries, deliveries) != deliveries
            }
        };
        woken || entry.deadline.is_some_and(|deadline| deadline <= now)
    }

    fn next_deadline(&self) -> Option<Duration> {
        self.entries.iter().filter_map(|entry| entry.deadline).min()
    }

    fn spend(&mut self, index: usize, now: Duration) {
        if now >= self.window_start + TURN_WINDOW {
            self.window_start = now;
            self.window_turns = 0;
        }
        self.window_turns += 1;
        assert!(
            self.window_turns <= TURNS_PER_WINDOW_MAX,
            "simulation livelock: {TURNS_PER_WINDOW_MAX} turns within {TURN_WINDOW:?} of virtual \
             time, the last by node {index} at {now:?}; run again with seed {}",
            self.network.seed(),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;
    use crate::clock::Clock;
    use crate::datapath::sim::testing::{CLIENT, SERVER, meta, wire};
    use crate::datapath::sim::{LinkConfig, SimDatapath};
    use crate::datapath::{Datapath, RxBatch, TxVerdict};

    type Log = Rc<RefCell<Vec<(Duration, &'static str)>>>;

    /// Sends `left` datagrams, one each `every`, and notes when it receives.
    struct Pinger {
        name: &'static str,
        datapath: SimDatapath,
        clock: SimClock,
        left: u32,
        every: Duration,
        next: Duration,
        log: Log,
    }

    impl SimNode for Pinger {
        fn turn(&mut self) -> Option<Instant> {
            let now = self.clock.now();
            let mut batch = RxBatch::new(1, 4096);
            self.datapath.receive(now, &mut batch);
            if !batch.is_empty() {
                self.log.borrow_mut().push((self.clock.elapsed(), self.name));
            }
            if self.left > 0 && self.clock.elapsed() >= self.next {
                assert_eq!(self.datapath.transmit(&meta(SERVER), &[0; 952]), TxVerdict::Accepted);
                self.left -= 1;
                self.next += self.every;
            }
            self.datapath.flush(now);
            (self.left > 0).then(|| self.clock.instant_at(self.next))
        }

        fn endpoint(&self) -> Option<EndpointId> {
            Some(self.datapath.id())
        }
    }

    fn pair(every: Duration, left: u32) -> (SimClock, SimNetwork, Pinger, Pinger, Log) {
        let config = LinkConfig { rate_bps: 8_000_000, delay_us: 500, ..LinkConfig::default() };
        pair_over(config, every, left)
    }

    fn pair_over(
        config: LinkConfig,
        every: Duration,
        left: u32,
    ) -> (SimClock, SimNetwork, Pinger, Pinger, Log) {
        let (clock, network, _link) = wire(config, 7);
        let log = Log::default();
        let node = |name, address, left| Pinger {
            name,
            datapath: network.open(address),
            clock: clock.clone(),
            left,
            every,
            next: Duration::ZERO,
            log: Rc::clone(&log),
        };
        let client = node("client", CLIENT, left);
        let server = node("server", SERVER, 0);
        (clock, network, client, server, log)
    }

    #[test]
    fn time_jumps_to_deadlines_and_deliveries() {
        let (clock, network, mut client, mut server, log) = pair(Duration::from_millis(10), 3);
        let end = run(&mut [&mut client, &mut server], &network, &clock, Duration::from_secs(9));
        assert_eq!(end, RunEnd::Idle);
        // 1000 IP bytes at 8 Mbit/s take 1 ms, then 0.5 ms of delay.
        let times: Vec<_> = log.borrow().iter().map(|(at, _)| at.as_micros()).collect();
        assert_eq!(times, [1_500, 11_500, 21_500]);
        assert_eq!(clock.elapsed(), Duration::from_micros(21_500));
    }

    #[test]
    fn what_a_full_batch_left_is_received_at_the_same_instant() {
        // Each packet arrives with its copy; a batch of the test's nodes takes one.
        let config = LinkConfig { rate_bps: 8_000_000, duplicate: 1.0, ..LinkConfig::default() };
        let (clock, network, mut client, mut server, log) = pair_over(config, Duration::ZERO, 2);
        let end = run(&mut [&mut client, &mut server], &network, &clock, Duration::from_millis(50));
        assert_eq!(end, RunEnd::Idle);
        let times: Vec<_> = log.borrow().iter().map(|(at, _)| at.as_millis()).collect();
        assert_eq!(times, [1, 1, 2, 2]);
    }

    #[test]
    fn the_time_limit_and_the_condition_end_it() {
        let (clock, network, mut client, mut server, log) = pair(Duration::from_millis(10), 100);
        let nodes: &mut [&mut dyn SimNode] = &mut [&mut client, &mut server];
        let until = Duration::from_millis(35);
        assert_eq!(run(nodes, &network, &clock, until), RunEnd::TimeLimit);
        assert_eq!(clock.elapsed(), until);
        assert_eq!(log.borrow().len(), 4);

        let mut enough = || log.borrow().len() < 6;
        let end = run_while(nodes, &network, &clock, Duration::from_secs(1), &mut enough);
        assert_eq!(end, RunEnd::Stopped);
        assert_eq!(clock.elapsed(), Duration::from_micros(51_500));
    }

    #[test]
    fn a_node_without_a_port_sees_every_delivery() {
        struct Counter(u32);
        impl SimNode for Counter {
            fn turn(&mut self) -> Option<Instant> {
                self.0 += 1;
                None
            }
        }
        let (clock, network, mut client, mut server, _log) = pair(Duration::from_millis(10), 3);
        let mut counter = Counter(0);
        run(&mut [&mut client, &mut server, &mut counter], &network, &clock, Duration::MAX);
        assert_eq!(counter.0, 1 + 3);
    }

    #[test]
    #[should_panic(expected = "run again with seed 7")]
    fn a_livelock_is_named_with_its_seed() {
        struct Busy(SimClock);
        impl SimNode for Busy {
            fn turn(&mut self) -> Option<Instant> {
                Some(self.0.now())
            }
        }
        let (clock, network, ..) = pair(Duration::ZERO, 0);
        let mut busy = Busy(clock.clone());
        run(&mut [&mut busy], &network, &clock, Duration::from_secs(1));
    }
}
