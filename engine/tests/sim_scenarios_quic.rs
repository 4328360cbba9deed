//! The committed scenarios with real QUIC connections, each with its bounds, for BBRv2 and BBRv3.
//!
//! The arithmetic of every bound stands at the top of its file in `benches/scenarios`; where a
//! bound here is not the file's, the reason stands here. Three seeds in an ordinary run, more with
//! `STOQ_SCENARIO_SEEDS=20`. Every failing seed is printed with what failed.

use std::time::Duration;

use stoq::datapath::sim::{CongestionControlName, FlowResult, Scenario, ScenarioResult};
use stoq::proto::bbr::State;
use stoq::sim::{Sample, ScenarioRun, run_scenario};

const BOTH: [CongestionControlName; 2] = [CongestionControlName::Bbr2, CongestionControlName::Bbr3];
/// UDP payload of a full packet against its IP bytes.
const PAYLOAD: f64 = 1452.0 / 1500.0;
/// BDP of topology Q, IP bytes.
const Q_BDP: f64 = 32_000.0;

fn scenario(file: &str) -> Scenario {
    let path = format!("{}/../benches/scenarios/{file}.toml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect("a committed scenario");
    Scenario::parse(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn seeds() -> std::ops::RangeInclusive<u64> {
    let count = std::env::var("STOQ_SCENARIO_SEEDS")
        .map_or(3, |text| text.parse().expect("STOQ_SCENARIO_SEEDS is a number"));
    1..=count
}

/// Collects what does not hold, so that all seeds are heard.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    fn unless(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.0.push(what());
        }
    }
}

/// Runs `file` for both versions and every seed; every BBR flow of it becomes that version.
fn check(file: &str, mut judge: impl FnMut(&ScenarioRun, &mut Failures)) {
    check_versions(file, &BOTH, &mut judge);
}

fn check_versions(
    file: &str,
    versions: &[CongestionControlName],
    judge: &mut dyn FnMut(&ScenarioRun, &mut Failures),
) {
    let mut all = Vec::new();
    for &version in versions {
        let mut scenario = scenario(file);
        for flow in scenario.flows.iter_mut().filter(|flow| BOTH.contains(&flow.cc)) {
            flow.cc = version;
        }
        for seed in seeds() {
            let run = run_scenario(&scenario, seed).expect("it runs");
            let mut failures = Failures::default();
            judge(&run, &mut failures);
            let name = |what| format!("{file} {} seed {seed}: {what}", version.name());
            all.extend(failures.0.into_iter().map(name));
        }
    }
    assert!(all.is_empty(), "{} failures:\n{}", all.len(), all.join("\n"));
}

fn done_by(result: &ScenarioResult, limit_ms: u64, failures: &mut Failures) {
    for flow in &result.flows {
        let holds = flow.completed_ms.is_some_and(|at| at <= limit_ms);
        failures.unless(holds, || format!("done at {:?} ms of {limit_ms}", flow.completed_ms));
    }
}

fn estimate_within(flow: &FlowResult, rate_bps: u64, percent: u64, failures: &mut Failures) {
    let estimate = flow.bandwidth_estimate_bps.expect("BBR has one");
    let holds = estimate.abs_diff(rate_bps) * 100 <= rate_bps * percent;
    failures.unless(holds, || format!("estimate {estimate} of {rate_bps}"));
}

/// When a state was first entered, ms.
fn entered(flow: &FlowResult, state: State) -> Option<u64> {
    flow.states.iter().find(|(_, name)| name == state.name()).map(|(at, _)| *at)
}

/// The first sample after a time, which is in whole milliseconds.
fn sample_at(samples: &[Sample], at_ms: u64) -> &Sample {
    let at = Duration::from_millis(at_ms + 1);
    let index = samples.partition_point(|sample| sample.at < at);
    &samples[index.min(samples.len() - 1)]
}

#[test]
fn s01_no_loss_and_the_right_estimate() {
    check("01-simple-transfer", |run, failures| {
        let flow = &run.result.flows[0];
        failures.unless(flow.packets_lost == 0, || format!("{} lost", flow.packets_lost));
        done_by(&run.result, 30_000, failures);
        estimate_within(flow, 4_000_000, 1, failures);
        let drain = sample_at(&run.samples[0], entered(flow, State::Drain).unwrap_or(0));
        // Loss would have set it: only a plateau ends Startup without a bound.
        failures.unless(drain.stats.inflight_hi_bytes.is_none(), || "Startup left by loss".into());
    });
}

#[test]
fn s02_loss_ends_startup_in_a_shallow_queue() {
    check("02-small-buffer", |run, failures| {
        let flow = &run.result.flows[0];
        done_by(&run.result, 30_000, failures);
        estimate_within(flow, 4_000_000, 2, failures);
        let drain = entered(flow, State::Drain).expect("Startup ends");
        let hi = sample_at(&run.samples[0], drain).stats.inflight_hi_bytes.unwrap_or(0);
        let holds = hi != 0 && hi as f64 > 1.2 * Q_BDP * PAYLOAD;
        failures.unless(holds, || format!("inflight_hi {hi} when Startup was left"));
    });
}

#[test]
fn s03_a_hundredfold_drop_is_survived() {
    // 830 s after the drop, not 800: see the file.
    check("03-bandwidth-drop", |run, failures| done_by(&run.result, 840_000, failures));
}

#[test]
fn s04_drain_empties_the_queue() {
    check("04-drain", |run, failures| {
        let (flow, samples) = (&run.result.flows[0], &run.samples[0]);
        let begin = entered(flow, State::Drain).expect("Startup ends");
        let end = flow.states.iter().map(|&(at, _)| at).find(|&at| at > begin).expect("Drain ends");
        // What is in flight and not in the pipe waits in the queue (of the link or of the access).
        let queued = |at| sample_at(samples, at).stats.inflight_bytes as f64 / PAYLOAD - Q_BDP;
        // Samples follow states by some milliseconds: two packets may have left meanwhile.
        let (before, after) = (queued(begin) + 3000.0, queued(end));
        failures.unless(before >= 0.95 * Q_BDP, || format!("queue {before} B before Drain"));
        failures.unless(after <= Q_BDP, || format!("queue {after} B after Drain"));
        let last = |state: &Sample| state.stats.bbr_state == Some(State::ProbeBwCruise);
        let later = Duration::from_millis(end + 1000);
        let mut rtts: Vec<_> =
            samples.iter().filter(|s| s.at > later && last(s)).map(|s| s.stats.rtt).collect();
        rtts.sort_unstable();
        let median = rtts[rtts.len() / 2];
        failures
            .unless(median <= Duration::from_micros(75_350), || format!("cruises at {median:?}"));
    });
}

#[test]
fn s05_bursts_do_not_lower_the_estimate() {
    check("05-application-limited-bursts", |run, failures| {
        // A probe of the path's MTU shortens samples by up to 2.3 %: see the file.
        let estimate = run.result.flows[0].bandwidth_estimate_bps.unwrap_or(0);
        let right = (3_960_000..=4_100_000).contains(&estimate);
        failures.unless(right, || format!("estimate {estimate} of 4000000"));
        let bps = |sample: &Sample| sample.stats.bandwidth_estimate_bps;
        let (bulk, last) =
            (bps(sample_at(&run.samples[0], 2_500)), bps(run.samples[0].last().expect("samples")));
        failures.unless(bulk.abs_diff(last) * 100 <= bulk, || format!("{last} was {bulk}"));
    });
}

/// Every flow takes at most three times what it takes alone, in all scenarios of two flows.
fn shares(file: &str) {
    for version in BOTH {
        let alone: Vec<_> = (0..2)
            .map(|index| {
                let mut scenario = scenario(file);
                let mut flow = scenario.flows.swap_remove(index);
                flow.start_ms = 0;
                flow.cc = if BOTH.contains(&flow.cc) { version } else { flow.cc };
                scenario.flows = vec![flow];
                let run = run_scenario(&scenario, 1).expect("it runs");
                run.result.flows[0].completed_ms.expect("done alone")
            })
            .collect();
        check_versions(file, &[version], &mut |run, failures| {
            for (flow, alone) in run.result.flows.iter().zip(&alone) {
                let took = flow.completed_ms.map(|at| at - flow.start_ms);
                let holds = took.is_some_and(|took| took <= 3 * alone);
                failures.unless(holds, || format!("{took:?} ms, alone {alone}"));
            }
        });
    }
}

#[test]
fn s06_two_bbr_share() {
    shares("06-two-bbr");
}

#[test]
fn s06_newreno_shares() {
    shares("06-bbr-newreno");
}

#[test]
fn s07_cubic_shares() {
    shares("07-bbr-cubic");
}

#[test]
fn s08_ten_megabit() {
    check("08-ten-megabit", |run, failures| done_by(&run.result, 3_600, failures));
}

#[test]
fn s09_ten_megabit_with_jitter() {
    check("09-ten-megabit-jitter", |run, failures| done_by(&run.result, 3_800, failures));
}

#[test]
fn s10_gigabit_with_jitter() {
    check("10-gigabit-jitter", |run, failures| done_by(&run.result, 250, failures));
}

#[test]
fn s11_two_seconds_without_a_packet() {
    check("11-outage", |run, failures| done_by(&run.result, 15_000, failures));
}

#[test]
fn s12_satellite_cold() {
    check("12-satellite-cold", |run, failures| done_by(&run.result, 12_000, failures));
}

#[test]
fn s12_satellite_resume() {
    check("12-satellite-resume", |run, failures| done_by(&run.result, 6_000, failures));
}

#[test]
fn s13_tenfold_increase_is_found() {
    check("13-bandwidth-grows", |run, failures| {
        let found = |s: &&Sample| {
            s.at > Duration::from_secs(10) && s.stats.bandwidth_estimate_bps as f64 > 90e6 * PAYLOAD
        };
        let Some(found) = run.samples[0].iter().find(found) else {
            return failures.0.push("never found".into());
        };
        let found_ms = found.at.as_millis() as u64;
        let states = &run.result.flows[0].states;
        let up_ms: u64 = states
            .windows(2)
            .filter(|two| two[0].1 == State::ProbeBwUp.name())
            .map(|two| two[1].0.min(found_ms).saturating_sub(two[0].0.max(10_000)))
            .sum();
        // A round is an RTT of 100 ms at least.
        failures.unless(up_ms <= 2_500, || format!("{up_ms} ms of ProbeBW_UP"));
    });
}

#[test]
fn s14_tenfold_decrease_is_followed() {
    check("14-bandwidth-shrinks", |run, failures| {
        let off = |s: &&Sample| {
            let share = s.stats.bandwidth_estimate_bps as f64 / (10e6 * PAYLOAD);
            s.at > Duration::from_secs(10) && !(0.85..=1.15).contains(&share)
        };
        let last_off = run.samples[0].iter().rfind(off).map_or(10_000, |s| s.at.as_millis() as u64);
        // A cycle begins with ProbeBW_DOWN.
        let cycles = run.result.flows[0]
            .states
            .iter()
            .filter(|(at, name)| {
                (10_000..last_off).contains(at) && name == State::ProbeBwDown.name()
            })
            .count();
        failures.unless(cycles <= 4, || format!("{cycles} cycles, off until {last_off} ms"));
    });
}

#[test]
fn s15_less_than_a_packet_of_bdp() {
    check("15-tiny-bdp", |run, failures| {
        done_by(&run.result, 11_900, failures);
        let samples = &run.samples[0];
        let mut windows: Vec<_> = samples
            .iter()
            .filter(|s| s.at > Duration::from_secs(1))
            .filter(|s| s.stats.bbr_state == Some(State::ProbeBwCruise))
            .map(|s| s.stats.cwnd_bytes / u64::from(s.stats.mtu_bytes))
            .collect();
        windows.sort_unstable();
        let median = windows.get(windows.len() / 2);
        failures.unless(median == Some(&4), || format!("cruises with {median:?} packets"));
    });
}

#[test]
fn s16_forty_gigabit() {
    check("16-forty-gigabit", |run, failures| {
        done_by(&run.result, 1_020, failures);
        estimate_within(&run.result.flows[0], 40_000_000_000, 5, failures);
    });
}

/// Random loss; `least` is the share of the link, in IP bytes, from the first second on.
fn random_loss(file: &str, loss: f64, least: f64) {
    // What the sender's packets filled, headers of IPv6 and UDP included, but for what was
    // lost: the network loses at the far end, a lost packet has used the link too.
    let arrived = |s: &Sample| {
        let stats = &s.stats;
        let packets = stats.udp_tx_datagrams - stats.packets_lost;
        (stats.udp_tx_bytes - stats.bytes_lost + 48 * packets) as f64
    };
    check_versions(file, &[CongestionControlName::Bbr2], &mut |run, failures| {
        let samples = &run.samples[0];
        let (first, last) = (sample_at(samples, 1_000), samples.last().expect("samples"));
        let bits = (arrived(last) - arrived(first)) * 8.0;
        let used = bits / (last.at - first.at).as_secs_f64() / (1.0 - loss) / 1e9;
        failures.unless(used >= least, || format!("{used:.3} of the link"));
    });
}

#[test]
fn s17_a_loss_in_a_thousand() {
    // 0.95 is more than the draft's own terms leave: see the file.
    random_loss("17-loss-0.1pct-bbr2", 0.001, 0.94);
}

#[test]
fn s17_a_loss_in_a_hundred() {
    random_loss("17-loss-1pct-bbr2", 0.01, 0.70);
}

#[test]
fn s18_eight_flows_are_fair() {
    check_versions("18-eight-flows", &[CongestionControlName::Bbr2], &mut |run, failures| {
        let late = run.samples.iter().map(|samples| {
            let (from, to) = (sample_at(samples, 30_000), sample_at(samples, 60_000));
            (to.received_bytes - from.received_bytes) as f64
        });
        let jain = stoq::datapath::sim::jain_index(late);
        failures.unless(jain >= 0.9, || format!("Jain's index {jain:.3}"));
    });
}
