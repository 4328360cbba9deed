//! A deterministic mini-simulator for the controller alone: senders that do
//! QUIC's loss detection and pace by the controller's word, one bottleneck link,
//! receivers that acknowledge every Nth packet. No QUIC, no wire.
//!
//! Sizes: a packet of `packet` bytes weighs 48 more on the link (IPv6 and UDP).
//! Time is nanoseconds. Everything random comes from the seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use super::model::{NS_PER_S, SplitMix, mul_div};
use super::{Bbr, BbrConfig, Params, Snapshot, State};

pub(super) const MS: u64 = 1_000_000;
pub(super) const S: u64 = NS_PER_S;
pub(super) const MBIT: u64 = 1_000_000;
/// IPv6 and UDP headers.
pub(super) const OVERHEAD: u64 = 48;
const MAX_ACK_DELAY: u64 = 25 * MS;

/// From `at` on, the link has this rate (bits per second; 0: nothing passes).
pub(super) type Step = (u64, u64);

#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) steps: Vec<Step>,
    /// One way.
    pub(super) delay: u64,
    pub(super) jitter: u64,
    pub(super) queue_bytes: u64,
    /// Per million.
    pub(super) loss_ppm: u64,
    /// Mark above this backlog in bytes; 0 is off.
    pub(super) ecn_bytes: u64,
    /// First hop of each sender: bits per second and delay; 0 is none.
    pub(super) access: (u64, u64),
    /// ACKs reach the sender at multiples of this time; 0 is off.
    pub(super) ack_slot: u64,
    /// Token bucket that drops: bits per second, bytes; 0 is off.
    pub(super) policer: (u64, u64),
}

impl Link {
    pub(super) fn new(rate: u64, delay: u64, queue_bytes: u64) -> Self {
        Self {
            steps: vec![(0, rate)],
            delay,
            jitter: 0,
            queue_bytes,
            loss_ppm: 0,
            ecn_bytes: 0,
            access: (0, 0),
            ack_slot: 0,
            policer: (0, 0),
        }
    }

    fn rate_at(&self, now: u64) -> u64 {
        self.steps.iter().rev().find(|s| s.0 <= now).map_or(0, |s| s.1)
    }
}

/// Plain Reno, to share a link with.
#[derive(Debug)]
pub(super) struct Reno {
    cwnd: u64,
    ssthresh: u64,
    acked: u64,
    recovery: u64,
}

#[derive(Debug)]
pub(super) enum Cc {
    Bbr(Box<Bbr>),
    Reno(Reno),
}

#[derive(Debug, Clone, Copy)]
struct Packet {
    flow: usize,
    number: u64,
    bytes: u64,
    marked: bool,
}

#[derive(Debug)]
struct Ack {
    flow: usize,
    numbers: Vec<u64>,
    marked: bool,
}

#[derive(Debug, Clone, Copy)]
struct Flying {
    sent: u64,
    bytes: u64,
    lost: bool,
}

#[derive(Debug)]
enum Event {
    Wake(usize),
    Write(usize, u64),
    AtSwitch(Packet),
    Served,
    AtReceiver(Packet),
    AckDelay(usize, u64),
    AckArrives(Ack),
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) cc: Cc,
    pub(super) packet: u64,
    /// Bytes that wait to be sent.
    pub(super) pending: u64,
    /// Bytes of the transfer not yet acknowledged or still to be written.
    remaining: u64,
    pub(super) done: Option<u64>,
    pub(super) sent_packets: u64,
    pub(super) lost_packets: u64,
    pub(super) spurious: u64,
    pub(super) delivered: u64,
    pub(super) srtt: u64,
    rttvar: u64,
    flying: BTreeMap<u64, Flying>,
    in_flight: u64,
    next_number: u64,
    largest_acked: Option<u64>,
    next_send: u64,
    wake_at: u64,
    probes: u32,
    pto_count: u32,
    last_sent: u64,
    access_free: u64,
    /// ACK every this many packets.
    pub(super) ack_every: u64,
    received: Vec<u64>,
    received_marked: bool,
    highest_received: Option<u64>,
    ack_generation: u64,
    pub(super) states: Vec<(u64, State)>,
}

#[derive(Debug)]
pub(super) struct Sim {
    pub(super) now: u64,
    pub(super) link: Link,
    pub(super) flows: Vec<Flow>,
    pub(super) queue_bytes: u64,
    pub(super) queue_peak: u64,
    pub(super) dropped: u64,
    pub(super) seed: u64,
    queue: VecDeque<Packet>,
    serving: Option<Packet>,
    events: BinaryHeap<Reverse<(u64, u64)>>,
    bodies: BTreeMap<u64, Event>,
    sequence: u64,
    rng: SplitMix,
    base: Instant,
    last_arrival: u64,
    tokens: (u64, u64),
}

impl Sim {
    pub(super) fn new(link: Link, seed: u64) -> Self {
        Self {
            now: 0,
            tokens: (link.policer.1, 0),
            link,
            flows: Vec::new(),
            queue_bytes: 0,
            queue_peak: 0,
            dropped: 0,
            seed,
            queue: VecDeque::new(),
            serving: None,
            events: BinaryHeap::new(),
            bodies: BTreeMap::new(),
            sequence: 0,
            rng: SplitMix(seed),
            base: Instant::now(),
            last_arrival: 0,
        }
    }

    /// Runs until flow 0 is in `state`; panics after a virtual minute.
    pub(super) fn run_to(&mut self, state: State) {
        let limit = self.now + 60 * S;
        let there = self.run_while(limit, |sim| sim.state(0) != state);
        assert!(there, "seed {}: never in {state}: {:?}", self.seed, self.flows[0].states);
    }

    /// Runs until flow 0 is no longer in `state`.
    pub(super) fn run_out_of(&mut self, state: State) {
        let limit = self.now + 60 * S;
        let left = self.run_while(limit, |sim| sim.state(0) == state);
        assert!(left, "seed {}: stays in {state}: {:?}", self.seed, self.snapshot(0));
    }

    /// From now on the application writes `bytes` every `every`, until `until`.
    pub(super) fn write_little(&mut self, bytes: u64, every: u64, until: u64) {
        self.flows[0].pending = 0;
        let mut at = self.now + every;
        while at < until {
            self.write_at(0, at, bytes);
            at += every;
        }
    }

    /// Tells flow 0's controller, and only it, that `bytes` of the newest packets were lost.
    pub(super) fn fake_loss(&mut self, bytes: u64, persistent: bool) {
        let sent = self.flows[0].flying.values().rev().map(|p| p.sent).next();
        let sent = self.instant(sent.expect("packets in flight"));
        let now = self.instant(self.now);
        self.bbr_mut(0).handle_congestion(now, sent, persistent, bytes);
    }

    /// One BBR flow of `bytes` from time 0.
    pub(super) fn single(link: Link, params: Params, packet: u64, bytes: u64, seed: u64) -> Self {
        let mut sim = Self::new(link, seed);
        sim.add_bbr(BbrConfig::new(params, seed), packet, 0, bytes);
        sim
    }

    pub(super) fn add_bbr(&mut self, config: BbrConfig, packet: u64, at: u64, bytes: u64) -> usize {
        let mtu = u16::try_from(packet).expect("packet fits an MTU");
        // Flows of a test share a seed: the flow's index keeps them out of step.
        let config = BbrConfig { seed: config.seed + 7919 * self.flows.len() as u64, ..config };
        let bbr = config.build_bbr(self.instant(at), mtu);
        self.add(Cc::Bbr(Box::new(bbr)), packet, at, bytes)
    }

    pub(super) fn add_reno(&mut self, packet: u64, at: u64, bytes: u64) -> usize {
        let reno = Reno { cwnd: 10 * packet, ssthresh: u64::MAX, acked: 0, recovery: 0 };
        self.add(Cc::Reno(reno), packet, at, bytes)
    }

    fn add(&mut self, cc: Cc, packet: u64, at: u64, bytes: u64) -> usize {
        let flow = self.flows.len();
        self.flows.push(Flow {
            cc,
            packet,
            pending: 0,
            remaining: bytes,
            done: None,
            sent_packets: 0,
            lost_packets: 0,
            spurious: 0,
            delivered: 0,
            srtt: 0,
            rttvar: 0,
            flying: BTreeMap::new(),
            in_flight: 0,
            next_number: 0,
            largest_acked: None,
            next_send: 0,
            wake_at: u64::MAX,
            probes: 0,
            pto_count: 0,
            last_sent: 0,
            access_free: 0,
            ack_every: 2,
            received: Vec::new(),
            received_marked: false,
            highest_received: None,
            ack_generation: 0,
            states: vec![(at, State::Startup)],
        });
        self.push(at, Event::Write(flow, bytes));
        flow
    }

    /// Adds `bytes` to the transfer, written at `at`.
    pub(super) fn write_at(&mut self, flow: usize, at: u64, bytes: u64) {
        self.flows[flow].remaining += bytes;
        self.push(at, Event::Write(flow, bytes));
    }

    pub(super) fn bbr(&self, flow: usize) -> &Bbr {
        match &self.flows[flow].cc {
            Cc::Bbr(bbr) => bbr,
            Cc::Reno(_) => panic!("flow {flow} is Reno"),
        }
    }

    pub(super) fn bbr_mut(&mut self, flow: usize) -> &mut Bbr {
        match &mut self.flows[flow].cc {
            Cc::Bbr(bbr) => bbr,
            Cc::Reno(_) => panic!("flow {flow} is Reno"),
        }
    }

    pub(super) fn snapshot(&self, flow: usize) -> Snapshot {
        self.bbr(flow).probe().snapshot()
    }

    pub(super) fn state(&self, flow: usize) -> State {
        self.bbr(flow).state
    }

    /// The bandwidth estimate in bits per second on the link.
    pub(super) fn estimate(&self, flow: usize) -> u64 {
        let packet = self.flows[flow].packet;
        mul_div(self.bbr(flow).max_bw.max() * 8, packet + OVERHEAD, packet)
    }

    /// Runs until `until` or until nothing happens any more.
    pub(super) fn run(&mut self, until: u64) {
        self.run_while(until, |_| true);
    }

    /// Runs until all transfers are done; panics after `limit`.
    pub(super) fn finish(&mut self, limit: u64) {
        self.run_while(limit, |sim| sim.flows.iter().any(|f| f.done.is_none()));
        for (i, flow) in self.flows.iter().enumerate() {
            assert!(
                flow.done.is_some(),
                "seed {}: flow {i} unfinished at {} ms: {:?}",
                self.seed,
                self.now / MS,
                self.snapshot(i)
            );
        }
    }

    /// Runs while `go` holds, at most until `until`; returns whether it ended by `go`.
    pub(super) fn run_while(&mut self, until: u64, mut go: impl FnMut(&Self) -> bool) -> bool {
        loop {
            if !go(self) {
                return true;
            }
            let Some(&Reverse((at, id))) = self.events.peek() else { return false };
            if at > until {
                self.now = until;
                return false;
            }
            self.events.pop();
            self.now = self.now.max(at);
            let event = self.bodies.remove(&id).expect("each event has a body");
            self.handle(event);
        }
    }

    fn instant(&self, at: u64) -> Instant {
        self.base + Duration::from_nanos(at)
    }

    fn push(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((at.max(self.now), self.sequence)));
        self.bodies.insert(self.sequence, event);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Wake(flow) => {
                if self.flows[flow].wake_at <= self.now {
                    self.flows[flow].wake_at = u64::MAX;
                    self.expire(flow);
                    self.send(flow);
                }
            }
            Event::Write(flow, bytes) => {
                self.flows[flow].pending += bytes;
                if let Cc::Bbr(bbr) = &self.flows[flow].cc {
                    bbr.probe().set_app_limited(false);
                }
                self.send(flow);
            }
            Event::AtSwitch(packet) => self.enqueue(packet),
            Event::Served => self.served(),
            Event::AtReceiver(packet) => self.receive(packet),
            Event::AckDelay(flow, generation) => {
                if self.flows[flow].ack_generation == generation {
                    self.acknowledge(flow);
                }
            }
            Event::AckArrives(ack) => self.handle_ack(ack),
        }
    }

    // ---- Sender ------------------------------------------------------------

    fn send(&mut self, flow: usize) {
        let mut nth = 0;
        loop {
            let now = self.now + nth;
            let f = &mut self.flows[flow];
            let (cwnd, rate, quantum) = match &f.cc {
                Cc::Bbr(bbr) => (bbr.cwnd, bbr.pacing_rate, bbr.send_quantum),
                Cc::Reno(reno) => (reno.cwnd, u64::MAX, u64::MAX),
            };
            let is_probe = f.probes > 0;
            let allowed = f.in_flight + f.packet <= cwnd && now + nth >= f.next_send;
            if f.pending == 0 && !is_probe {
                if allowed && let Cc::Bbr(bbr) = &f.cc {
                    bbr.probe().set_app_limited(true);
                }
                break;
            }
            if !allowed && !is_probe {
                break;
            }
            // A quantum at a time, then as long as the rate needs for it.
            let mut burst = 0;
            while burst + f.packet <= quantum.max(f.packet)
                && (f.pending > 0 || f.probes > 0)
                && (f.in_flight + f.packet <= cwnd || f.probes > 0)
            {
                let bytes = if f.pending == 0 { f.packet } else { f.packet.min(f.pending) };
                f.pending -= bytes.min(f.pending);
                f.probes = f.probes.saturating_sub(1);
                let number = f.next_number;
                f.next_number += 1;
                let at = self.now + nth;
                nth += 1;
                f.flying.insert(number, Flying { sent: at, bytes, lost: false });
                f.in_flight += bytes;
                f.sent_packets += 1;
                f.last_sent = at;
                burst += bytes;
                if let Cc::Bbr(bbr) = &mut f.cc {
                    bbr.handle_sent(self.base + Duration::from_nanos(at), bytes, number);
                }
                let packet = Packet { flow, number, bytes: bytes + OVERHEAD, marked: false };
                let (access_rate, access_delay) = self.link.access;
                let mut arrives = at + access_delay;
                if access_rate > 0 {
                    let takes = mul_div(packet.bytes * 8, NS_PER_S, access_rate);
                    f.access_free = f.access_free.max(at) + takes;
                    arrives = f.access_free + access_delay;
                }
                self.sequence += 1;
                self.events.push(Reverse((arrives, self.sequence)));
                self.bodies.insert(self.sequence, Event::AtSwitch(packet));
            }
            if rate != u64::MAX {
                f.next_send = f.next_send.max(now) + mul_div(burst, NS_PER_S, rate);
            }
        }
        self.arm(flow);
    }

    /// Sets the one wake-up: pacing, loss or probe timer.
    fn arm(&mut self, flow: usize) {
        let f = &self.flows[flow];
        let mut at = u64::MAX;
        let cwnd = match &f.cc {
            Cc::Bbr(bbr) => bbr.cwnd,
            Cc::Reno(reno) => reno.cwnd,
        };
        if f.pending > 0 && f.in_flight + f.packet <= cwnd {
            at = f.next_send;
        }
        if let Some(loss) = self.loss_time(flow) {
            at = at.min(loss);
        } else if f.in_flight > 0 {
            at = at.min(f.last_sent + (self.pto(flow) << f.pto_count.min(6)));
        }
        if at != u64::MAX && at < self.flows[flow].wake_at {
            let at = at.max(self.now + 1);
            self.flows[flow].wake_at = at;
            self.push(at, Event::Wake(flow));
        }
    }

    fn pto(&self, flow: usize) -> u64 {
        let f = &self.flows[flow];
        if f.srtt == 0 { 999 * MS } else { f.srtt + (4 * f.rttvar).max(MS) + MAX_ACK_DELAY }
    }

    fn loss_delay(&self, flow: usize) -> u64 {
        (self.flows[flow].srtt * 9 / 8).max(MS)
    }

    fn loss_time(&self, flow: usize) -> Option<u64> {
        let largest = self.flows[flow].largest_acked?;
        let delay = self.loss_delay(flow);
        let mut live = self.flows[flow].flying.range(..largest).filter(|(_, p)| !p.lost);
        live.next().map(|(_, p)| p.sent + delay)
    }

    fn expire(&mut self, flow: usize) {
        if let Some(at) = self.loss_time(flow) {
            if at <= self.now {
                self.detect_loss(flow);
            }
            return;
        }
        let pto = self.pto(flow);
        let f = &mut self.flows[flow];
        if f.in_flight > 0 && self.now >= f.last_sent + (pto << f.pto_count.min(6)) {
            f.pto_count += 1;
            f.probes = 2;
        }
    }

    fn handle_ack(&mut self, ack: Ack) {
        let flow = ack.flow;
        let now = self.instant(self.now);
        let mut newest = None;
        let mut acked = 0;
        let f = &mut self.flows[flow];
        for number in ack.numbers {
            let Some(packet) = f.flying.remove(&number) else { continue };
            if packet.lost {
                // quinn-proto has forgotten it.
                f.spurious += 1;
                continue;
            }
            f.in_flight -= packet.bytes;
            f.delivered += packet.bytes;
            f.remaining = f.remaining.saturating_sub(packet.bytes);
            acked += packet.bytes;
            newest = Some(
                newest.map_or((number, packet.sent), |n: (u64, u64)| n.max((number, packet.sent))),
            );
            if let Cc::Bbr(bbr) = &mut f.cc {
                bbr.handle_acked(
                    now,
                    self.base + Duration::from_nanos(packet.sent),
                    packet.bytes,
                    false,
                );
            }
        }
        let Some((number, sent)) = newest else { return };
        if let Cc::Bbr(bbr) = &mut f.cc {
            bbr.handle_ack_end(now, f.in_flight);
        }
        let is_largest = f.largest_acked.is_none_or(|l| number > l);
        if is_largest {
            f.largest_acked = Some(number);
            f.update_rtt(self.now - sent);
        }
        f.pto_count = 0;
        if let Cc::Reno(reno) = &mut f.cc {
            reno.acked(sent, acked, f.packet);
        }
        self.detect_loss(flow);
        let f = &mut self.flows[flow];
        if ack.marked && is_largest {
            match &mut f.cc {
                Cc::Bbr(bbr) => {
                    bbr.handle_congestion(now, self.base + Duration::from_nanos(sent), false, 0);
                }
                Cc::Reno(reno) => reno.congested(sent, self.now, f.packet),
            }
        }
        if f.remaining == 0 && f.done.is_none() {
            f.done = Some(self.now);
        }
        self.note_state(flow);
        self.send(flow);
    }

    fn note_state(&mut self, flow: usize) {
        let now = self.now;
        let f = &mut self.flows[flow];
        if let Cc::Bbr(bbr) = &f.cc
            && f.states.last().is_none_or(|s| s.1 != bbr.state)
        {
            f.states.push((now, bbr.state));
        }
    }

    fn detect_loss(&mut self, flow: usize) {
        let Some(largest) = self.flows[flow].largest_acked else { return };
        let delay = self.loss_delay(flow);
        let period = 3 * self.pto(flow);
        let now = self.now;
        let f = &mut self.flows[flow];
        // Forget what was lost long ago, as a late ACK would.
        let old: Vec<u64> = f
            .flying
            .iter()
            .take_while(|(_, p)| p.lost)
            .filter(|(_, p)| p.sent + 8 * delay < now)
            .map(|(&n, _)| n)
            .collect();
        for number in old {
            f.flying.remove(&number);
        }
        let (mut bytes, mut first, mut last) = (0, None, 0);
        for (&number, packet) in f.flying.range_mut(..largest) {
            if packet.lost || (largest < number + 3 && packet.sent + delay > now) {
                continue;
            }
            packet.lost = true;
            bytes += packet.bytes;
            first = first.or(Some(packet.sent));
            last = packet.sent;
            f.lost_packets += 1;
        }
        let Some(first) = first else { return };
        f.in_flight -= bytes;
        f.pending += bytes;
        let persistent = last - first > period;
        match &mut f.cc {
            Cc::Bbr(bbr) => {
                bbr.probe().set_app_limited(false);
                let sent = self.base + Duration::from_nanos(last);
                bbr.handle_congestion(
                    self.base + Duration::from_nanos(now),
                    sent,
                    persistent,
                    bytes,
                );
            }
            Cc::Reno(reno) => reno.congested(last, now, f.packet),
        }
        self.note_state(flow);
    }

    // ---- Link and receiver -------------------------------------------------

    fn enqueue(&mut self, mut packet: Packet) {
        let (police_rate, bucket) = self.link.policer;
        if police_rate > 0 {
            let (tokens, since) = self.tokens;
            let tokens =
                (tokens + mul_div(self.now - since, police_rate / 8, NS_PER_S)).min(bucket);
            let pass = tokens >= packet.bytes;
            self.tokens = (if pass { tokens - packet.bytes } else { tokens }, self.now);
            if !pass {
                self.dropped += 1;
                return;
            }
        }
        let lost = self.link.loss_ppm > 0 && self.rng.below(1_000_000) < self.link.loss_ppm;
        if lost || self.queue_bytes + packet.bytes > self.link.queue_bytes {
            self.dropped += 1;
            return;
        }
        packet.marked = self.link.ecn_bytes > 0 && self.queue_bytes > self.link.ecn_bytes;
        if self.serving.is_none() {
            self.serve(packet);
        } else {
            self.queue_bytes += packet.bytes;
            self.queue_peak = self.queue_peak.max(self.queue_bytes);
            self.queue.push_back(packet);
        }
    }

    fn serve(&mut self, packet: Packet) {
        // A link that is down takes packets at its old rate and loses them.
        let rate = match self.link.rate_at(self.now) {
            0 => self.link.steps[0].1,
            rate => rate,
        };
        let takes = mul_div(packet.bytes * 8, NS_PER_S, rate);
        self.serving = Some(packet);
        self.push(self.now + takes, Event::Served);
    }

    fn served(&mut self) {
        let packet = self.serving.take().expect("served while idle");
        if self.link.rate_at(self.now) > 0 {
            let jitter = self.rng.below(self.link.jitter + 1);
            self.last_arrival = self.last_arrival.max(self.now + self.link.delay + jitter);
            self.push(self.last_arrival, Event::AtReceiver(packet));
        } else {
            self.dropped += 1;
        }
        if let Some(next) = self.queue.pop_front() {
            self.queue_bytes -= next.bytes;
            self.serve(next);
        }
    }

    fn receive(&mut self, packet: Packet) {
        let f = &mut self.flows[packet.flow];
        let in_order = f.highest_received.map_or(0, |h| h + 1) == packet.number;
        f.highest_received =
            Some(f.highest_received.map_or(packet.number, |h| h.max(packet.number)));
        f.received.push(packet.number);
        f.received_marked |= packet.marked;
        if f.received.len() as u64 >= f.ack_every || !in_order || packet.marked {
            self.acknowledge(packet.flow);
        } else if f.received.len() == 1 {
            f.ack_generation += 1;
            let event = Event::AckDelay(packet.flow, f.ack_generation);
            self.push(self.now + MAX_ACK_DELAY, event);
        }
    }

    fn acknowledge(&mut self, flow: usize) {
        let f = &mut self.flows[flow];
        f.ack_generation += 1;
        if f.received.is_empty() {
            return;
        }
        let mut numbers = std::mem::take(&mut f.received);
        numbers.sort_unstable();
        let marked = std::mem::take(&mut f.received_marked);
        let mut at = self.now + self.link.delay + self.link.access.1;
        if self.link.ack_slot > 0 {
            at = at.div_ceil(self.link.ack_slot) * self.link.ack_slot;
        }
        self.push(at, Event::AckArrives(Ack { flow, numbers, marked }));
    }
}

impl Flow {
    fn update_rtt(&mut self, rtt: u64) {
        if self.srtt == 0 {
            (self.srtt, self.rttvar) = (rtt, rtt / 2);
        } else {
            self.rttvar = (3 * self.rttvar + self.srtt.abs_diff(rtt)) / 4;
            self.srtt = (7 * self.srtt + rtt) / 8;
        }
    }

    /// Times that `state` was entered at or after `from`.
    pub(super) fn visits(&self, state: State, from: u64) -> usize {
        self.states.iter().filter(|s| s.0 >= from && s.1 == state).count()
    }
}

impl Reno {
    fn acked(&mut self, sent: u64, bytes: u64, packet: u64) {
        if sent <= self.recovery {
            return;
        }
        if self.cwnd < self.ssthresh {
            self.cwnd += bytes;
            return;
        }
        self.acked += bytes;
        if self.acked >= self.cwnd {
            self.acked -= self.cwnd;
            self.cwnd += packet;
        }
    }

    fn congested(&mut self, sent: u64, now: u64, packet: u64) {
        if sent > self.recovery {
            self.recovery = now;
            self.cwnd = (self.cwnd / 2).max(2 * packet);
            self.ssthresh = self.cwnd;
        }
    }
}
