//! What has gone wrong in other implementations, one test each. Traps about the
//! filters, the arithmetic and the sampler (4, 8, 9, 10, 11) are tested with
//! those; trap 2 (a pacer that ignores its tokens) is the pacer's.

use std::time::{Duration, Instant};

use super::scenarios::{BOTH, MIB, PACKET, Q_BDP, link, near, topology_q};
use super::testlink::{MBIT, MS, S, Sim};
use super::{AckHold, Bbr, BbrConfig, Params, RateSample, State};

const MTU: u16 = 1200;
const SMSS: u64 = 1200;

fn fresh(params: Params) -> (Bbr, Instant) {
    let now = Instant::now();
    (BbrConfig::new(params, 1).build_bbr(now, MTU), now)
}

/// Sends `count` packets at `at`, a nanosecond apart, and returns when.
fn send(bbr: &mut Bbr, at: Instant, first: u64, count: u64) -> Vec<Instant> {
    let times: Vec<_> = (0..count).map(|n| at + Duration::from_nanos(n)).collect();
    for (n, &time) in times.iter().enumerate() {
        bbr.handle_sent(time, SMSS, first + n as u64);
    }
    times
}

#[test]
fn trap_1_rate_is_the_models_and_not_window_over_rtt() {
    for params in BOTH {
        let mut sim = Sim::single(topology_q(2 * Q_BDP), params, PACKET, 12 * MIB, 1);
        sim.run_to(State::ProbeBwCruise);
        sim.run(sim.now + S / 2);
        let snapshot = sim.snapshot(0);
        assert!(snapshot.pacing_rate_bytes_per_s < snapshot.max_bw_bytes_per_s);
        let rtt = snapshot.min_rtt.expect("measured").as_millis() as u64;
        let by_window = snapshot.cwnd_bytes * 1250 / rtt;
        assert!(by_window > 2 * snapshot.pacing_rate_bytes_per_s, "{by_window} {snapshot:?}");
    }
}

#[test]
fn trap_3_reno_coexistence_compares_packets() {
    let (mut bbr, _) = fresh(Params::BBR3);
    bbr.full.reached = true;
    bbr.state = State::ProbeBwCruise;
    bbr.min_rtt.min_rtt_ns = 20 * MS;
    bbr.bw = 20 * SMSS * 50; // a BDP of 20 packets
    bbr.cwnd = 40 * SMSS;
    bbr.cycle.wait_ns = 3 * S;
    bbr.cycle.rounds_since_up = 19;
    bbr.update_probe_bw(2, &super::RateSample::default());
    assert_eq!(bbr.state, State::ProbeBwCruise);
    bbr.cycle.rounds_since_up = 20;
    bbr.update_probe_bw(3, &super::RateSample::default());
    assert_eq!(bbr.state, State::ProbeBwRefill);
}

#[test]
fn trap_4_and_5_first_ack_neither_probes_rtt_nor_keeps_the_made_up_rate() {
    for params in BOTH {
        let (mut bbr, now) = fresh(params);
        let made_up = bbr.pacing_rate;
        assert_eq!(made_up, 12_000 * 1000 * 277 / 100);
        // One packet, application-limited, 50 ms: far slower than 12 kB per millisecond.
        bbr.probe().set_app_limited(true);
        let sent = send(&mut bbr, now + Duration::from_secs(6), 0, 1);
        let at = sent[0] + Duration::from_millis(50);
        bbr.handle_acked(at, sent[0], SMSS, true);
        bbr.handle_ack_end(at, 0);
        assert_eq!(bbr.state, State::Startup, "no ProbeRTT on the first ACK");
        // 10 packets in 50 ms, times 2.77 (the window has grown by the packet).
        assert!(near(bbr.pacing_rate, 13_200 * 20 * 277 / 100, 10), "{}", bbr.pacing_rate);
    }
}

#[test]
fn trap_6_window_use_is_taken_before_the_ack_and_kept_for_a_round() {
    let (mut bbr, now) = fresh(Params::BBR2);
    let sent = send(&mut bbr, now, 0, 10);
    assert!(bbr.is_cwnd_limited(), "ten packets fill the initial window");
    let at = now + Duration::from_millis(30);
    for &time in &sent {
        bbr.handle_acked(at, time, SMSS, false);
    }
    bbr.handle_ack_end(at, 0);
    assert!(bbr.is_cwnd_limited(), "the ACK that frees the window does not unlimit it");
    // A round with one packet only, and another.
    for n in 1..4u64 {
        let at = at + Duration::from_millis(100 * n);
        let sent = send(&mut bbr, at, 10 + n, 1);
        bbr.handle_acked(at + Duration::from_millis(30), sent[0], SMSS, false);
        bbr.handle_ack_end(at + Duration::from_millis(30), 0);
    }
    assert!(!bbr.is_cwnd_limited());
    bbr.probe().set_cwnd_limited();
    send(&mut bbr, at + Duration::from_secs(1), 20, 1);
    assert!(bbr.is_cwnd_limited(), "the shard says so");
}

#[test]
fn trap_7_app_limited_samples_never_lower_the_estimate() {
    for params in BOTH {
        let mut sim = Sim::single(topology_q(2 * Q_BDP), params, PACKET, MIB, 1);
        sim.run_to(State::ProbeBwCruise);
        sim.finish(60 * S);
        let before = sim.bbr(0).max_bw.max();
        let until = sim.now + 30 * S;
        sim.write_little(600, 40 * MS, until);
        sim.run(until);
        assert!(sim.bbr(0).max_bw.max() >= before, "{}", params.name);
        assert!(sim.bbr(0).full.reached);
    }
}

#[test]
fn trap_8_one_advance_per_cycle_and_headroom_is_what_stays_free() {
    for params in BOTH {
        let mut sim = Sim::single(topology_q(2 * Q_BDP), params, PACKET, 1 << 40, 1);
        sim.run(60 * S);
        let downs = sim.flows[0].visits(State::ProbeBwDown, 0) as u64;
        let rtts = sim.flows[0].visits(State::ProbeRtt, 0) as u64;
        let cycles = sim.bbr(0).max_bw.cycles;
        assert!(cycles >= downs && cycles <= downs + rtts + 1, "{cycles} {downs} {rtts}");
        let bbr = sim.bbr_mut(0);
        bbr.inflight_hi = 100_000;
        assert_eq!(bbr.inflight_with_headroom(), 85_000);
        bbr.inflight_hi = 5000;
        assert_eq!(bbr.inflight_with_headroom(), 4 * PACKET, "never below the floor");
    }
}

#[test]
fn trap_9_every_hole_of_one_detection_counts() {
    let (mut bbr, now) = fresh(Params::BBR3);
    let sent = send(&mut bbr, now, 0, 200);
    let at = now + Duration::from_millis(30);
    for (n, &time) in sent.iter().enumerate() {
        if n >= 120 || n % 20 >= 5 {
            bbr.handle_acked(at, time, SMSS, false);
        }
    }
    bbr.handle_ack_end(at, 30 * SMSS);
    bbr.handle_congestion(at, sent[104], false, 30 * SMSS);
    // Six ranges of five, in one detection. The next round's end sees them.
    let next = send(&mut bbr, at + Duration::from_nanos(1), 200, 1);
    let at = at + Duration::from_millis(30);
    bbr.handle_acked(at, next[0], SMSS, false);
    bbr.handle_ack_end(at, 0);
    assert!(bbr.full.reached, "{bbr:?}");
    assert_ne!(bbr.state, State::Startup);
    assert_eq!(bbr.sampler.lost, 30 * SMSS);
}

#[test]
fn trap_11_a_rate_of_400_gbit_and_an_rtt_of_10_s_do_not_overflow() {
    let (mut bbr, _) = fresh(Params::BBR3);
    bbr.max_bw.update(50_000_000_000);
    bbr.bw = bbr.max_bw.max();
    bbr.min_rtt.min_rtt_ns = 10 * S;
    assert_eq!(bbr.bdp(), 500_000_000_000);
    bbr.set_pacing_rate();
    assert_eq!(bbr.pacing_rate, 50_000_000_000 / 100 * 277 / 100 * 99);
    let rs = super::RateSample { newly_acked: u64::from(u32::MAX) * 4, ..Default::default() };
    bbr.set_cwnd(&rs);
    assert!(bbr.cwnd > u64::from(u32::MAX));
}

#[test]
fn trap_12_quantum_is_a_millisecond_within_its_bounds() {
    let (mut bbr, _) = fresh(Params::BBR3);
    bbr.full.reached = true;
    bbr.state = State::ProbeBwCruise;
    for (bw, quantum) in [(1000, 2400), (10_000_000, 9900), (5_000_000_000, 65_536)] {
        bbr.bw = bw;
        bbr.set_pacing_rate();
        assert_eq!(bbr.send_quantum, quantum);
    }
    bbr.bw = 3;
    bbr.set_pacing_rate();
    assert_eq!(bbr.pacing_rate, SMSS, "a packet a second is the floor");
}

#[test]
fn trap_13_the_window_leaves_its_floor_at_sub_millisecond_rtt() {
    for params in BOTH {
        let mut link = link(8, 200, 20_000);
        link.steps.push((5 * S, 800 * MBIT));
        let mut sim = Sim::single(link, params, 1200, 1 << 40, 1);
        sim.run(5 * S);
        let found = sim.run_while(15 * S, |sim| sim.estimate(0) < 700 * MBIT);
        assert!(found, "{}: {:?}", params.name, sim.snapshot(0));
    }
}

#[test]
fn trap_14_stretched_acks_do_not_starve_the_estimate() {
    for params in BOTH {
        for ack_every in [1, 10, 32] {
            let mut sim = Sim::single(link(100, 20_000, 40_000), params, PACKET, 20 * MIB, 1);
            sim.flows[0].ack_every = ack_every;
            sim.finish(60 * S);
            let done = sim.flows[0].done.expect("finished");
            let what = format!("{} every {ack_every}: {} ms", params.name, done / MS);
            assert!(near(sim.estimate(0), 100 * MBIT, 3), "{what} {}", sim.estimate(0));
            assert!(done < 2300 * MS, "{what}");
        }
    }
}

#[test]
fn ecn_marks_bound_the_queue() {
    for params in BOTH {
        for delay_us in [1000, 20_000] {
            let mut link = link(100, delay_us, 200_000);
            link.ecn_bytes = 30_000;
            let mut sim = Sim::single(link, params, PACKET, 1 << 40, 1);
            sim.run(3 * S);
            sim.queue_peak = 0;
            let before = sim.flows[0].delivered;
            sim.run(13 * S);
            let rate = (sim.flows[0].delivered - before) * 8 / 10 * 1500 / PACKET;
            let what =
                format!("{} {delay_us} us: {rate} bit/s, queue {}", params.name, sim.queue_peak);
            println!("{what}");
            assert!(rate > 80 * MBIT, "{what}");
            assert_eq!(sim.flows[0].lost_packets, 0, "{what}");
        }
    }
}

#[test]
fn persistent_congestion_collapses_the_window_and_an_ack_restores_it() {
    let (mut bbr, now) = fresh(Params::BBR2);
    bbr.cwnd = 100 * SMSS;
    let sent = send(&mut bbr, now, 0, 50);
    let at = now + Duration::from_secs(3);
    bbr.handle_congestion(at, sent[49], true, 50 * SMSS);
    assert_eq!(bbr.cwnd, 4 * SMSS, "nothing is in flight: the floor");
    let sent = send(&mut bbr, at + Duration::from_millis(1), 50, 1);
    let at = at + Duration::from_millis(40);
    bbr.handle_acked(at, sent[0], SMSS, false);
    bbr.handle_ack_end(at, 0);
    assert!(bbr.cwnd >= 100 * SMSS, "{}", bbr.cwnd);
}

#[test]
fn clones_share_the_probe_and_an_mtu_raises_the_floor() {
    let (mut bbr, now) = fresh(Params::BBR2);
    let clone = bbr.clone();
    send(&mut bbr, now, 0, 3);
    assert_eq!(clone.probe().in_flight_bytes(), 3 * SMSS);
    bbr.handle_mtu(9000);
    assert_eq!(clone.probe().cwnd_bytes(), 36_000);
}

#[test]
fn a_probe_waits_for_the_feedback_of_the_last_one() {
    let (mut bbr, _) = fresh(Params::BBR2);
    bbr.full.reached = true;
    bbr.max_bw.update(1_000_000);
    bbr.start_probe_down(1);
    // The wait is long over, but the round is not: its bandwidth is not yet filed.
    bbr.update_probe_bw(60 * S, &super::RateSample::default());
    assert_eq!((bbr.state, bbr.max_bw.cycles), (State::ProbeBwCruise, 0));
    bbr.rounds.start = true;
    bbr.update_probe_bw(60 * S, &super::RateSample::default());
    assert_eq!((bbr.state, bbr.max_bw.cycles), (State::ProbeBwRefill, 1));
}

#[test]
fn up_has_two_packets_more_than_the_model() {
    let (mut bbr, _) = fresh(Params::BBR2);
    bbr.min_rtt.min_rtt_ns = 100 * MS;
    let bdp = 100_000;
    assert_eq!(bbr.inflight_for(1_000_000, 1000), bdp);
    bbr.state = State::ProbeBwUp;
    assert_eq!(bbr.inflight_for(1_000_000, 1000), bdp + 2 * SMSS);
}

#[test]
fn careful_resume_retreats_from_a_path_that_has_changed() {
    let seed = |mbit: u64, rtt_ms| super::ResumeSeed {
        bandwidth_bytes_per_s: mbit * MBIT / 8,
        min_rtt: Duration::from_millis(rtt_ms),
        is_limit: true,
        jump_bytes_max: u64::MAX,
    };
    for params in BOTH {
        let time = |resume| {
            let mut sim = Sim::new(link(20, 25_000, 50_000), 1);
            let mut config = BbrConfig::new(params, 1);
            config.resume = resume;
            sim.add_bbr(config, PACKET, 0, 10 * MIB);
            sim.finish(60 * S);
            let flow = &sim.flows[0];
            (flow.done.expect("finished") / MS, flow.lost_packets)
        };
        let (cold, _) = time(None);
        // Ten times the bandwidth: half of it is 625 kB into 250 kB of pipe and queue.
        let (wrong, lost) = time(Some(seed(200, 50)));
        println!("{}: cold {cold} ms, wrong seed {wrong} ms, {lost} lost", params.name);
        assert!(lost > 100 && lost < 625_000 / PACKET, "{}: {lost}", params.name);
        assert!(wrong < cold * 12 / 10, "{}: {cold} {wrong}", params.name);
        // Another path altogether: the round trip gives it away, nothing is risked.
        assert_eq!(time(Some(seed(200, 500))).0, cold);
        assert_eq!(time(Some(seed(200, 1))).0, cold);
    }
}

#[test]
fn the_smallest_window_outlasts_an_ack_that_is_held_back() {
    for params in BOTH {
        let mut config = BbrConfig::new(params, 1);
        config.ack_hold = AckHold { packets: 11, time_ns: MS };
        let mut bbr = config.build_bbr(Instant::now(), MTU);
        bbr.full.reached = true;
        bbr.min_rtt.min_rtt_ns = 50_000;
        // ProbeRTT of a gigabit path of 50 µs: the ACK comes after eleven packets, not after 1 ms.
        bbr.bw = 125_000_000;
        assert_eq!(bbr.probe_rtt_cwnd(), (4 + 11) * SMSS, "{}", params.name);
        // What a slow path delivers in that time is less than a packet.
        bbr.bw = 125_000;
        assert_eq!(bbr.probe_rtt_cwnd(), 4 * SMSS + 125, "{}", params.name);
        // A receiver that was asked for nothing holds no more than one packet back.
        let (mut plain, _) = fresh(params);
        plain.bw = 125_000_000;
        assert_eq!(plain.min_pipe_cwnd(), 4 * SMSS);
    }
}

#[test]
fn aggregation_is_remembered_for_ten_milliseconds_on_a_short_path() {
    for params in BOTH {
        let (mut bbr, _) = fresh(params);
        bbr.full.reached = true;
        bbr.bw = 125_000_000;
        bbr.cwnd = 1_000_000;
        let ack = |bbr: &mut Bbr, now_ns, newly_acked| {
            bbr.rounds.start = true;
            bbr.rounds.count += 1;
            let rs = RateSample { newly_acked, has_data: true, ..RateSample::default() };
            bbr.update_ack_aggregation(now_ns, &rs);
        };
        // The receiver was away: 100 kB are acknowledged at once, then nothing for as long as
        // the path needs for them, then a round every 50 µs.
        ack(&mut bbr, 20 * MS, 100_000);
        assert_eq!(bbr.extra_acked(), 100_000);
        let mut now_us = 1_000;
        let mut rounds = |until_us| {
            while now_us < until_us {
                ack(&mut bbr, 20 * MS + now_us * 1000, 6_250);
                now_us += 50;
            }
            bbr.extra_acked()
        };
        assert!(rounds(9_000) >= 90_000, "forgotten after 9 ms");
        assert!(rounds(21_000) < 20_000, "kept for 21 ms");
    }
}

#[test]
fn a_withdrawn_seed_is_not_tried() {
    for params in BOTH {
        let time = |resume, is_withdrawn| {
            let mut sim = Sim::new(link(20, 25_000, 50_000), 1);
            let mut config = BbrConfig::new(params, 1);
            config.resume = resume;
            sim.add_bbr(config, PACKET, 0, 10 * MIB);
            if is_withdrawn {
                sim.bbr_mut(0).probe().withdraw_resume();
            }
            sim.finish(60 * S);
            sim.flows[0].done.expect("finished") / MS
        };
        let seed = super::ResumeSeed {
            bandwidth_bytes_per_s: 20 * MBIT / 8,
            min_rtt: Duration::from_millis(50),
            is_limit: true,
            jump_bytes_max: u64::MAX,
        };
        let cold = time(None, false);
        assert_ne!(time(Some(seed), false), cold, "{}: it would have helped", params.name);
        assert_eq!(time(Some(seed), true), cold, "{}", params.name);
    }
}
