//! What holds for the simulator and for congestion control on any link: the same events on every
//! machine, the peer's ACKs where probing needs them, congestion marks, and links of every kind.

use std::time::Duration;

use stoq::datapath::sim::{CongestionControlName, Scenario, ScenarioResult};
use stoq::proto::bbr::State;
use stoq::sim::{ScenarioRun, run_scenario};

const BOTH: [CongestionControlName; 2] = [CongestionControlName::Bbr2, CongestionControlName::Bbr3];

fn scenario(file: &str, cc: CongestionControlName) -> Scenario {
    let path = format!("{}/../benches/scenarios/{file}.toml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect("a committed scenario");
    let mut scenario = Scenario::parse(&text).unwrap_or_else(|error| panic!("{path}: {error}"));
    for flow in &mut scenario.flows {
        flow.cc = cc;
    }
    scenario
}

fn run(file: &str, cc: CongestionControlName, seed: u64) -> ScenarioRun {
    run_scenario(&scenario(file, cc), seed).expect("it runs")
}

/// Runs a file for both versions; `judge` says what is wrong.
fn check(file: &str, judge: impl Fn(&ScenarioRun) -> Option<String>) {
    for cc in BOTH {
        let run = run(file, cc, 1);
        if let Some(wrong) = judge(&run) {
            panic!("{file} {} seed 1: {wrong}\n{:?}", cc.name(), run.result.link);
        }
    }
}

/// Goodput of the only flow over a part of the run, bits/s.
fn goodput_between(run: &ScenarioRun, from_s: u64, to_s: u64) -> f64 {
    let samples = &run.samples[0];
    let at = |seconds| {
        let index = samples.partition_point(|s| s.at < Duration::from_secs(seconds));
        samples[index.min(samples.len() - 1)]
    };
    let (from, to) = (at(from_s), at(to_s));
    (to.received_bytes - from.received_bytes) as f64 * 8.0 / (to.at - from.at).as_secs_f64()
}

fn at_least(what: &str, value: f64, least: f64) -> Option<String> {
    (value < least).then(|| format!("{what} {value:.3e}, at least {least:.3e} expected"))
}

fn done_by(run: &ScenarioRun, limit_ms: u64) -> Option<String> {
    let done_ms = run.result.flows[0].completed_ms;
    done_ms.is_none_or(|at| at > limit_ms).then(|| format!("done at {done_ms:?} ms of {limit_ms}"))
}

#[test]
fn the_same_file_and_seed_give_the_same_events() {
    let file = "09-ten-megabit-jitter";
    let [first, again, other] = [1, 1, 2].map(|seed| run(file, BOTH[0], seed).result);
    assert_eq!(first.digest, again.digest);
    let text = |result: &ScenarioResult| serde_json::to_string(result).expect("JSON");
    assert_eq!(text(&first), text(&again), "every figure, not only the packets");
    assert_ne!(first.digest, other.digest);
}

/// `sim_digests.txt` was written by another process, on another machine. A change of the engine that
/// moves a packet changes it: write it anew with `STOQ_WRITE_DIGESTS=1`, if that was meant.
#[test]
fn digests_are_the_same_on_every_machine() {
    use CongestionControlName::{Bbr2, Bbr3, NewReno};
    let runs = [
        ("01-simple-transfer", Bbr2),
        ("08-ten-megabit", Bbr3),
        ("08-ten-megabit", NewReno),
        ("09-ten-megabit-jitter", Bbr2),
        ("further/bad-link", Bbr2),
    ];
    let line = |(file, cc): (&str, CongestionControlName)| {
        format!("{file} {} {}\n", cc.name(), run(file, cc, 1).result.digest)
    };
    let digests: String = runs.into_iter().map(line).collect();
    let path = format!("{}/tests/sim_digests.txt", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("STOQ_WRITE_DIGESTS").is_some() {
        std::fs::write(&path, &digests).expect("writable");
    }
    assert_eq!(digests, std::fs::read_to_string(&path).expect("the committed digests"));
}

#[test]
fn probing_sees_four_acks_a_round_and_high_rates_few() {
    for file in ["08-ten-megabit", "13-bandwidth-grows", "01-simple-transfer"] {
        check(file, |run| {
            let probing = run.samples[0]
                .windows(2)
                .filter(|two| two.iter().all(|s| s.stats.bbr_state == Some(State::ProbeBwUp)));
            let (mut acks, mut rounds) = (0, 0.0);
            for two in probing {
                acks += two[1].stats.acks_received - two[0].stats.acks_received;
                let rtt = two[1].stats.rtt.as_secs_f64();
                rounds += (two[1].at - two[0].at).as_secs_f64() / rtt;
            }
            at_least("ACKs a round of ProbeBW_UP:", acks as f64 / rounds, 4.0)
        });
    }
    let run = run("10-gigabit-jitter", BOTH[0], 1);
    let stats = run.samples[0].last().expect("samples").stats;
    let packets_per_ack = stats.packets_sent as f64 / stats.acks_received as f64;
    assert!(packets_per_ack >= 8.0, "{packets_per_ack:.1} packets an ACK at 1 Gbit/s");
}

#[test]
fn congestion_marks_keep_a_short_path_free_of_loss() {
    check("further/congestion-marks", |run| {
        let (flow, link) = (&run.result.flows[0], &run.result.link);
        if link.marked_ce == 0 || flow.packets_lost > 0 {
            return Some(format!("{} marks, {} lost", link.marked_ce, flow.packets_lost));
        }
        // 0.5 ms of path and 0.2 ms of queue before marks; 5 ms fit.
        if flow.srtt_us_p50 > 1_000 {
            return Some(format!("a round trip of {} us", flow.srtt_us_p50));
        }
        at_least("goodput", goodput_between(run, 1, 5), 0.80 * 0.945e9)
    });
    // Without the marks Startup alone fills the queue.
    let mut unmarked = scenario("further/congestion-marks", BOTH[0]);
    unmarked.forward.initial.ecn_threshold_us = 0;
    let run_unmarked = run_scenario(&unmarked, 1).expect("it runs");
    let marked = run("further/congestion-marks", BOTH[0], 1);
    let queue = |run: &ScenarioRun| run.result.link.queue_bytes_max;
    assert!(queue(&run_unmarked) > queue(&marked), "{:?}", run_unmarked.result.link);
}

#[test]
fn congestion_marks_do_not_empty_a_long_path() {
    check("further/congestion-marks-long", |run| {
        if run.result.link.marked_ce == 0 {
            return Some("no marks".to_owned());
        }
        at_least("goodput", goodput_between(run, 5, 30), 0.75 * 0.945 * 5e6)
    });
}

#[test]
fn a_gigabit_lan_is_full_although_acks_are_held_back() {
    check("further/gigabit-lan", |run| {
        // A few quanta of the eight that the queue holds: no standing queue.
        let queue_bytes = run.result.link.queue_bytes_max;
        if queue_bytes > 3 * 65_536 {
            return Some(format!("{queue_bytes} bytes waited"));
        }
        at_least("goodput", goodput_between(run, 1, 12), 0.985 * 0.945 * 1e9)
    });
}

#[test]
fn a_burst_is_no_more_than_path_and_queue_hold() {
    check("further/shallow-lan", |run| {
        let loss = run.result.flows[0].loss;
        if loss > 0.03 {
            return Some(format!("{loss:.3} lost"));
        }
        at_least("goodput", goodput_between(run, 1, 4), 0.985 * 0.945 * 1e9)
    });
}

#[test]
fn a_policer_is_not_fought() {
    check("further/policer", |run| {
        let loss = run.result.flows[0].loss;
        if loss > 0.10 {
            return Some(format!("{loss:.3} lost"));
        }
        at_least("goodput", goodput_between(run, 5, 60), 0.85 * 0.945 * 10e6)
    });
}

#[test]
fn aggregation_does_not_starve() {
    check("further/aggregation", |run| {
        at_least("goodput", goodput_between(run, 2, 20), 0.90 * 0.945 * 50e6)
    });
}

#[test]
fn the_senders_own_link_may_be_the_bottleneck() {
    check("further/access-hop", |run| {
        at_least("goodput", goodput_between(run, 2, 20), 0.93 * 0.945 * 20e6)
    });
}

#[test]
fn ten_kilobit_are_enough() {
    check("further/ten-kilobit", |run| done_by(run, 120_000));
}

#[test]
fn duplicates_flipped_bits_and_reordering_are_survived() {
    check("further/bad-link", |run| {
        at_least("goodput", goodput_between(run, 2, 20), 0.65 * 0.945 * 20e6)
    });
}

#[test]
fn flipped_bits_and_a_smaller_mtu_lose_packets_and_late_ones_are_not_lost() {
    let run = |what: &str| {
        let text = format!(
            "name = \"damage\"\ntime_limit_ms = 5_000\n[link]\nrate_bps = 20_000_000\n\
             delay_us = 10_000\nqueue_us = 40_000\n{what}\n[[flow]]\nbytes = 1_000_000_000\n"
        );
        let run = run_scenario(&Scenario::parse(&text).expect("right"), 1).expect("it runs");
        let flow = run.result.flows[0].clone();
        (flow.packets_lost, flow.spurious_losses)
    };
    let (lost, spurious) = run("corrupt = 0.01");
    assert!(lost >= 40 && spurious == 0, "{lost} lost, {spurious} of them in vain");
    let (lost, spurious) = run("reorder = 0.01\nreorder_us = 5_000");
    assert!(lost >= 40 && spurious + 5 >= lost, "{lost} lost, {spurious} of them in vain");
    let (lost, spurious) = run("mtu = 1500\n[[link.step]]\nat_ms = 2_000\nmtu = 1300");
    assert!(lost >= 40 && spurious == 0, "{lost} lost, {spurious} of them in vain");
}

#[test]
fn a_path_whose_mtu_shrinks_is_filled_again() {
    check("further/smaller-mtu", |run| {
        let before = at_least("goodput before", goodput_between(run, 2, 6), 0.90 * 0.945 * 20e6);
        before
            .or_else(|| at_least("goodput after", goodput_between(run, 10, 20), 0.90 * 0.93 * 20e6))
    });
}

#[test]
fn aggregation_jitter_and_loss_together_do_not_starve() {
    check("further/wireless", |run| {
        at_least("goodput", goodput_between(run, 2, 20), 0.90 * 0.945 * 60e6)
    });
}

#[test]
fn random_loss_beside_congestion_marks_costs_little() {
    check("further/marks-and-loss", |run| {
        if run.result.link.marked_ce == 0 {
            return Some("no marks".to_owned());
        }
        at_least("goodput", goodput_between(run, 1, 5), 0.85 * 0.945 * 500e6)
    });
}

#[test]
fn nobody_starves_beside_bbr_and_bbr_beside_nobody() {
    for version in BOTH {
        let mut scenario = scenario("further/beside-cubic-and-newreno", version);
        let rest = [CongestionControlName::Cubic, CongestionControlName::NewReno];
        for (flow, cc) in scenario.flows[2..].iter_mut().zip(rest) {
            flow.cc = cc;
        }
        for seed in 1..=3 {
            let run = run_scenario(&scenario, seed).expect("it runs");
            let rates: Vec<_> = run.result.flows.iter().map(|flow| flow.goodput_bps).collect();
            let total: u64 = rates.iter().sum();
            let what = format!("{} seed {seed}: {rates:?}", version.name());
            assert!(total as f64 >= 0.95 * 0.945 * 50e6, "the link is full, {what}");
            assert!(rates.iter().all(|rate| rate * 10 >= total), "a tenth for each, {what}");
        }
    }
}

#[test]
fn round_trips_of_ten_seconds_work() {
    check("further/ten-seconds", |run| {
        // 200 MB take 85 s of the link, doubling up to it 130 s.
        done_by(run, 260_000)
    });
}

#[test]
fn acks_fit_into_a_hundredth_of_the_rate() {
    check("further/asymmetric", |run| {
        at_least("goodput", goodput_between(run, 2, 20), 0.93 * 0.945 * 100e6)
    });
}

#[test]
fn downloads_follow_a_changing_link() {
    check("further/download", |run| {
        at_least("goodput at 50 Mbit/s", goodput_between(run, 2, 10), 0.90 * 0.945 * 50e6)
            .or_else(|| {
                at_least("goodput at 10 Mbit/s", goodput_between(run, 13, 20), 0.85 * 0.945 * 10e6)
            })
            .or_else(|| {
                at_least("goodput at 50 again", goodput_between(run, 27, 30), 0.80 * 0.945 * 50e6)
            })
    });
}

#[test]
fn a_long_fat_path_with_a_shallow_queue_is_filled() {
    check("further/long-fat-shallow", |run| {
        let flow = &run.result.flows[0];
        // 300 MB take 2.5 s of the link, doubling up to it and filling the gaps as much again.
        flow.failure.clone().or_else(|| done_by(run, 12_000))
    });
}

#[test]
fn a_faster_link_is_found_in_two_probes() {
    for seed in 1..=5 {
        for cc in BOTH {
            let run = run("further/faster-link", cc, seed);
            let goodput = goodput_between(&run, 12, 20);
            let least = 0.90 * 0.945 * 50e6;
            assert!(goodput >= least, "{} seed {seed}: {goodput:.3e}", cc.name());
        }
    }
}

#[test]
fn rates_of_hundreds_of_gigabits_do_not_overflow() {
    let mut scenario = scenario("further/four-hundred-gigabit", BOTH[0]);
    scenario.flows[0].bytes = 2_000_000_000;
    let run = run_scenario(&scenario, 1).expect("it runs");
    let flow = &run.result.flows[0];
    let estimate = flow.bandwidth_estimate_bps.expect("BBR has one");
    assert!(estimate > 100_000_000_000 && flow.packets_lost == 0, "{flow:?}");
}
