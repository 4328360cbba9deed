//! The 22 test cases of draft-ietf-ccwg-bbr-06 appendix A, for both parameter
//! sets where the case applies to both. A.14, A.15 and A.16 are scenarios 15, 13
//! and 14.

use super::scenarios::{BOTH, MIB, PACKET, Q_BDP, link, near, topology_q};
use super::testlink::{Link, MBIT, MS, S, Sim};
use super::{Params, State};

/// A bulk flow on topology Q with a deep queue.
fn bulk(params: Params) -> Sim {
    Sim::single(topology_q(2 * Q_BDP), params, PACKET, 1 << 40, 1)
}

/// A bulk flow on 100 Mbit/s with 60 ms of round trip.
fn fast(params: Params, queue_us: u64) -> Sim {
    Sim::single(link(100, 30_000, queue_us), params, PACKET, 1 << 40, 1)
}

#[test]
fn a01_startup_ends_on_the_plateau() {
    for params in BOTH {
        let mut sim = bulk(params);
        sim.run_out_of(State::Startup);
        let full = sim.bbr(0).full;
        assert_eq!(full.count, 3);
        assert!(full.now && full.reached);
        assert_eq!(sim.state(0), State::Drain);
        assert!(near(sim.estimate(0), 4 * MBIT, 2));
    }
}

#[test]
fn a02_startup_ends_on_loss_even_when_app_limited() {
    for params in BOTH {
        let mut sim = Sim::single(link(100, 30_000, 60_000), params, PACKET, 0, 1);
        sim.write_little(20 * PACKET, 10 * MS, 4 * S);
        sim.run(S);
        assert_eq!(sim.state(0), State::Startup, "{}", params.name);
        assert!(sim.bbr(0).last_sample.app_limited);
        sim.link.loss_ppm = 100_000;
        sim.run(S + 300 * MS);
        assert!(sim.bbr(0).full.reached, "{}: {:?}", params.name, sim.snapshot(0));
        // Little is in flight: Drain may begin and end within one ACK.
        assert!(sim.state(0).is_probe_bw(), "{:?}", sim.state(0));
    }
}

#[test]
fn a03_drain_ends_when_in_flight_is_a_bdp() {
    for params in BOTH {
        let mut sim = bulk(params);
        sim.run_to(State::Drain);
        let bbr = sim.bbr(0);
        assert_eq!(bbr.pacing_rate, bbr.bw / 2 * 99 / 100);
        sim.run_out_of(State::Drain);
        let bbr = sim.bbr(0);
        assert!(bbr.rounds.count <= bbr.drain_start_round + 3);
        let bdp = bbr.inflight_for(bbr.max_bw.max(), 1000);
        // Sending goes on within the event that ended Drain.
        assert!(bbr.in_flight() <= bdp + bbr.send_quantum, "{} {bdp}", bbr.in_flight());
        assert!(bbr.state.is_probe_bw());
    }
}

#[test]
fn a04_drain_ends_after_three_rounds_in_v3() {
    let mut sim = bulk(Params::BBR3);
    sim.run_to(State::Drain);
    let start = sim.bbr(0).rounds.count;
    sim.link.steps.push((sim.now, 2 * MBIT));
    sim.run_while(sim.now + 10 * S, |sim| sim.state(0) == State::Drain && sim.queue_bytes > 0);
    sim.run_out_of(State::Drain);
    assert!(sim.bbr(0).rounds.count <= start + 4, "{start} {}", sim.bbr(0).rounds.count);
}

#[test]
fn a05_up_ends_on_the_plateau() {
    for params in BOTH {
        let mut sim = bulk(params);
        sim.run_to(State::ProbeBwUp);
        let start = sim.bbr(0).rounds.count;
        sim.run_out_of(State::ProbeBwUp);
        assert_eq!(sim.flows[0].lost_packets, 0);
        assert_eq!(sim.state(0), State::ProbeBwDown);
        let rounds = sim.bbr(0).rounds.count - start;
        if params.up_exits_on_plateau {
            assert!(sim.bbr(0).full.now && rounds == 3, "{rounds}");
        } else {
            assert!(rounds <= 3, "{rounds}");
        }
    }
}

#[test]
fn a06_up_ends_on_loss_even_when_app_limited() {
    for params in BOTH {
        let mut sim = fast(params, 200_000);
        sim.run_to(State::ProbeBwUp);
        let now = sim.now;
        sim.write_little(40 * PACKET, 10 * MS, now + S);
        sim.link.loss_ppm = 200_000;
        sim.run_out_of(State::ProbeBwUp);
        assert!(sim.now < now + 300 * MS, "{}", params.name);
        assert_eq!(sim.state(0), State::ProbeBwDown);
        assert!(sim.bbr(0).cycle.prev_too_high);
    }
}

#[test]
fn a07_startup_lasts_while_app_limited_without_loss() {
    for params in BOTH {
        let mut sim = Sim::single(link(100, 30_000, 60_000), params, PACKET, 0, 1);
        sim.write_little(20 * PACKET, 10 * MS, 5 * S);
        sim.run(4800 * MS);
        assert_eq!(sim.flows[0].states.len(), 1, "{}: {:?}", params.name, sim.flows[0].states);
    }
}

#[test]
fn a08_down_ends_when_the_queue_and_the_headroom_are_free() {
    for params in BOTH {
        let mut sim = bulk(params);
        sim.run_to(State::ProbeBwUp);
        sim.run_to(State::ProbeBwDown);
        let bbr = sim.bbr(0);
        assert_eq!(bbr.pacing_rate, bbr.bw * 9 / 10 * 99 / 100);
        sim.run_out_of(State::ProbeBwDown);
        assert_eq!(sim.state(0), State::ProbeBwCruise);
        let bbr = sim.bbr(0);
        assert!(bbr.in_flight() <= bbr.inflight_for(bbr.bw, 1000) + bbr.send_quantum);
        assert!(bbr.in_flight() <= bbr.inflight_with_headroom());
    }
}

#[test]
fn a09_down_ends_after_its_wait() {
    for params in BOTH {
        let mut sim = bulk(params);
        sim.run_to(State::ProbeBwUp);
        sim.run_to(State::ProbeBwDown);
        // Half the rate: in-flight stays above the estimated BDP.
        sim.link.steps.push((sim.now, 2 * MBIT));
        let start = sim.now;
        let wait = sim.bbr(0).cycle.wait_ns;
        sim.run_out_of(State::ProbeBwDown);
        if sim.state(0) == State::ProbeBwRefill {
            assert!(sim.now <= start + wait + 300 * MS);
        } else {
            assert_eq!(sim.state(0), State::ProbeRtt, "{:?}", sim.flows[0].states);
        }
    }
}

#[test]
fn a10_probe_rtt_every_five_seconds_for_200_ms() {
    for params in BOTH {
        let mut sim = bulk(params);
        sim.run_to(State::ProbeRtt);
        let entered = sim.now;
        assert!(entered > 5 * S && entered < 7 * S, "{}", entered / MS);
        sim.run(entered + 100 * MS);
        let bbr = sim.bbr(0);
        assert_eq!(bbr.cwnd, bbr.probe_rtt_cwnd());
        sim.run_out_of(State::ProbeRtt);
        assert!(sim.now > entered + 200 * MS && sim.now < entered + 600 * MS);
        assert_eq!(sim.state(0), State::ProbeBwCruise);
        assert!(sim.bbr(0).cwnd > bulk_bdp(&sim), "the window is back: {:?}", sim.snapshot(0));
    }
}

fn bulk_bdp(sim: &Sim) -> u64 {
    sim.bbr(0).bdp()
}

#[test]
fn a11_idleness_replaces_probe_rtt() {
    for params in BOTH {
        let mut sim = Sim::single(topology_q(2 * Q_BDP), params, PACKET, MIB, 1);
        sim.finish(20 * S);
        let visits = sim.flows[0].visits(State::ProbeRtt, 0);
        let restart = sim.now + 8 * S;
        sim.write_at(0, restart, 100_000);
        sim.run(restart + 10 * MS);
        assert!(sim.bbr(0).idle_restart);
        sim.run(restart + 2 * S);
        assert_eq!(sim.flows[0].visits(State::ProbeRtt, 0), visits);
        assert!(!sim.bbr(0).idle_restart);
    }
}

fn aggregated() -> Link {
    let mut link = link(50, 15_000, 200_000);
    link.ack_slot = 20 * MS;
    link
}

#[test]
fn a12_startup_finds_the_bandwidth_behind_aggregation() {
    for params in BOTH {
        let mut sim = Sim::single(aggregated(), params, PACKET, 1 << 40, 1);
        sim.run_out_of(State::Startup);
        let bbr = sim.bbr(0);
        assert!(bbr.extra_acked() > 0);
        assert!(bbr.cwnd > 2 * bbr.bdp() * 95 / 100, "{} {}", bbr.cwnd, bbr.bdp());
        assert!(sim.estimate(0) > 45 * MBIT, "{}: {}", params.name, sim.estimate(0));
        assert!(sim.estimate(0) < 60 * MBIT, "{}: {}", params.name, sim.estimate(0));
    }
}

#[test]
fn a13_cruise_keeps_the_pipe_full_behind_aggregation() {
    for params in BOTH {
        let mut sim = Sim::single(aggregated(), params, PACKET, 1 << 40, 1);
        sim.run(3 * S);
        let before = sim.flows[0].delivered;
        sim.run(13 * S);
        let rate = (sim.flows[0].delivered - before) * 8 / 10 * 1500 / PACKET;
        assert!(rate > 45 * MBIT, "{}: {rate}", params.name);
        assert!(sim.bbr(0).extra_acked() > 5 * PACKET);
    }
}

#[test]
fn a17_policer_is_obeyed() {
    for params in BOTH {
        let mut link = link(100, 15_000, 100_000);
        link.policer = (10 * MBIT, 200_000);
        let mut sim = Sim::single(link, params, PACKET, 1 << 40, 1);
        sim.run(10 * S);
        let (sent, lost, delivered) = {
            let f = &sim.flows[0];
            (f.sent_packets, f.lost_packets, f.delivered)
        };
        sim.run(40 * S);
        let f = &sim.flows[0];
        let rate = (f.delivered - delivered) * 8 / 30 * 1500 / PACKET;
        let loss = (f.lost_packets - lost) * 1000 / (f.sent_packets - sent);
        println!("{} a17: {rate} bit/s, loss {loss}/1000", params.name);
        assert!(rate > 6 * MBIT && loss < 60, "{}: {rate} {loss}", params.name);
    }
}

#[test]
fn a18_and_a19_spurious_loss_is_undone() {
    for params in BOTH {
        for persistent in [false, true] {
            let mut sim = fast(params, 200_000);
            sim.run_to(State::ProbeBwUp);
            let (cwnd, now) = (sim.bbr(0).cwnd, sim.now);
            sim.fake_loss(PACKET * 100, persistent);
            let bbr = sim.bbr(0);
            assert_eq!(bbr.state, State::ProbeBwDown, "{}", params.name);
            assert_ne!(bbr.inflight_hi, u64::MAX);
            bbr.probe().report_spurious_loss();
            sim.run_while(now + S, |sim| sim.state(0) == State::ProbeBwDown);
            let bbr = sim.bbr(0);
            assert_eq!(bbr.state, State::ProbeBwRefill, "back to probing");
            assert_eq!(
                (bbr.inflight_hi, bbr.inflight_lo, bbr.bw_lo),
                (u64::MAX, u64::MAX, u64::MAX)
            );
            assert!(bbr.cwnd * 10 >= cwnd * 8, "{} {cwnd}", bbr.cwnd);
        }
    }
}

#[test]
fn a20_probe_rtt_during_startup_returns_to_startup() {
    for params in BOTH {
        let mut sim = Sim::single(link(100, 30_000, 60_000), params, PACKET, 0, 1);
        sim.write_little(20 * PACKET, 10 * MS, 9 * S);
        sim.run(7 * S);
        let states: Vec<State> = sim.flows[0].states.iter().map(|s| s.1).collect();
        assert_eq!(states, [State::Startup, State::ProbeRtt, State::Startup], "{}", params.name);
    }
}

#[test]
fn a21_loss_in_up_lowers_inflight_hi_and_ends_it() {
    for params in BOTH {
        let mut sim = fast(params, 100_000);
        sim.run_to(State::ProbeBwUp);
        // Below what v2 wants in flight to end by itself.
        let hi = sim.bbr(0).bdp() * 11 / 10;
        sim.bbr_mut(0).inflight_hi = hi;
        sim.run(sim.now + 200 * MS);
        let grown = sim.bbr(0).inflight_hi;
        assert!(grown > hi && sim.state(0) == State::ProbeBwUp, "{grown} {hi}");
        sim.link.loss_ppm = 200_000;
        sim.run_out_of(State::ProbeBwUp);
        let bbr = sim.bbr(0);
        assert_eq!(bbr.state, State::ProbeBwDown);
        assert!(bbr.cycle.prev_too_high);
        assert!(bbr.inflight_hi < bbr.undo_inflight_hi(), "{}", bbr.inflight_hi);
        assert!(bbr.inflight_hi >= bbr.target_inflight() * 7 / 10);
    }
}

#[test]
fn a22_app_limited_refill_does_not_lower_max_bw() {
    for params in BOTH {
        let mut sim = fast(params, 60_000);
        sim.run_to(State::ProbeBwRefill);
        let before = sim.bbr(0).max_bw.max();
        let now = sim.now;
        sim.write_little(2 * PACKET, 5 * MS, now + 4 * S);
        sim.run_out_of(State::ProbeBwRefill);
        assert_eq!(sim.state(0), State::ProbeBwUp, "{}", params.name);
        sim.run(now + 3 * S);
        assert_eq!(sim.bbr(0).max_bw.max(), before);
    }
}
