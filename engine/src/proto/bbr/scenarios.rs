//! The reference scenarios at the level of the controller: each must hold for
//! both parameter sets. Links carry IP bytes (packet + 48); the numbers in the
//! names are those of the scenario list. Failures print the seed.

use super::testlink::{Link, MBIT, MS, OVERHEAD, S, Sim};
use super::{BbrConfig, Params, ResumeSeed, State};

pub(super) const BOTH: [Params; 2] = [Params::BBR2, Params::BBR3];
pub(super) const MIB: u64 = 1 << 20;
/// Topology Q: 10 Mbit/s, 2 ms to the switch; 4 Mbit/s, 30 ms to the receiver.
pub(super) const Q_BDP: u64 = 4 * MBIT / 8 * 64 / 1000;
pub(super) const PACKET: u64 = 1452;

pub(super) fn topology_q(queue_bytes: u64) -> Link {
    let mut link = Link::new(4 * MBIT, 30 * MS, queue_bytes);
    link.access = (10 * MBIT, 2 * MS);
    link
}

/// A link by rate in Mbit/s, one-way delay and queue in microseconds.
pub(super) fn link(mbit: u64, delay_us: u64, queue_us: u64) -> Link {
    let rate = mbit * MBIT;
    Link::new(rate, delay_us * 1000, rate / 8 * queue_us / 1_000_000)
}

pub(super) fn near(value: u64, target: u64, percent: u64) -> bool {
    value.abs_diff(target) * 100 <= target * percent
}

#[test]
fn s01_deep_queue_has_no_loss_and_the_right_estimate() {
    for params in BOTH {
        for seed in 1..6 {
            let mut sim = Sim::single(topology_q(2 * Q_BDP), params, PACKET, 12 * MIB, seed);
            sim.run_while(60 * S, |sim| sim.state(0) == State::Startup);
            assert_eq!(sim.bbr(0).full.count, 3, "seed {seed}: three rounds without growth");
            sim.finish(60 * S);
            let flow = &sim.flows[0];
            let what = format!("{} seed {seed}: {:?}", params.name, sim.snapshot(0));
            assert_eq!(flow.lost_packets, 0, "{what}");
            assert!(near(sim.estimate(0), 4 * MBIT, 1), "{what} {}", sim.estimate(0));
            assert!(flow.done.is_some_and(|d| d <= 30 * S), "{what}");
        }
    }
}

#[test]
fn s02_shallow_queue_ends_startup_by_loss() {
    for params in BOTH {
        for seed in 1..6 {
            let mut sim = Sim::single(topology_q(Q_BDP / 2), params, PACKET, 12 * MIB, seed);
            sim.run_while(60 * S, |sim| sim.state(0) == State::Startup);
            let hi = sim.snapshot(0).inflight_hi_bytes.unwrap_or(0);
            let what = format!("{} seed {seed}: {:?}", params.name, sim.snapshot(0));
            assert!(sim.bbr(0).full.count < 3, "not by the plateau: {what}");
            assert!(hi * (PACKET + OVERHEAD) / PACKET * 10 > Q_BDP * 12, "{what}");
            sim.finish(60 * S);
            assert!(sim.flows[0].done.is_some_and(|d| d <= 30 * S), "{what}");
            assert!(near(sim.estimate(0), 4 * MBIT, 2), "{what}");
        }
    }
}

#[test]
fn s03_a_hundredfold_drop_is_survived() {
    for params in BOTH {
        let mut link = Link::new(10 * MBIT, 30 * MS, 2 * 80_000);
        link.access = (15 * MBIT, 2 * MS);
        link.steps.push((10 * S, 100_000));
        let mut sim = Sim::single(link, params, PACKET, 20 * MIB, 1);
        sim.finish(1000 * S);
        let done = sim.flows[0].done.expect("finished") - 10 * S;
        println!("{} s03: {} s, {} lost", params.name, done / S, sim.flows[0].lost_packets);
        assert!(done <= 800 * S, "{}: {} s", params.name, done / S);
        // The old rate must be forgotten, not only survived.
        let flow = &sim.flows[0];
        assert!(flow.lost_packets * 2 < flow.sent_packets, "{}", flow.lost_packets);
    }
}

#[test]
fn s04_drain_empties_the_queue() {
    for params in BOTH {
        let mut sim = Sim::single(topology_q(2 * Q_BDP), params, PACKET, 12 * MIB, 1);
        sim.run_while(60 * S, |sim| sim.state(0) != State::Drain);
        let begin = sim.queue_bytes;
        sim.run_while(60 * S, |sim| sim.state(0) == State::Drain);
        let end = sim.queue_bytes;
        println!("{} s04: queue {begin} -> {end}, BDP {Q_BDP}", params.name);
        assert!(begin * 100 >= Q_BDP * 95, "{}: {begin}", params.name);
        assert!(end <= Q_BDP, "{}: {end}", params.name);
        // In CRUISE: a probe puts a queue of its own on top.
        sim.run(sim.now + S);
        let rtt = 64 * MS + 4_200_000; // and the serialisation of one packet on each link
        assert!(near(sim.flows[0].srtt, rtt, 10), "{}: {}", params.name, sim.flows[0].srtt);
    }
}

#[test]
fn s05_small_writes_keep_the_estimate() {
    for params in BOTH {
        let mut sim = Sim::single(topology_q(2 * Q_BDP), params, PACKET, MIB, 1);
        sim.finish(60 * S);
        let before = sim.estimate(0);
        let start = sim.now;
        for n in 1..=20 {
            sim.write_at(0, start + n * 3 * S, 512);
        }
        sim.run(start + 70 * S);
        assert!(
            near(sim.estimate(0), before, 1),
            "{}: {before} -> {}",
            params.name,
            sim.estimate(0)
        );
        assert!(near(sim.estimate(0), 4 * MBIT, 2), "{}: {}", params.name, sim.estimate(0));
    }
}

#[test]
fn s06_two_flows_and_one_against_reno() {
    for params in BOTH {
        let mut alone = Sim::single(topology_q(2 * Q_BDP), params, PACKET, 10 * MIB, 1);
        alone.finish(60 * S);
        let alone = alone.flows[0].done.expect("finished");
        for against_reno in [false, true] {
            let mut sim = Sim::single(topology_q(2 * Q_BDP), params, PACKET, 10 * MIB, 1);
            if against_reno {
                sim.add_reno(PACKET, 0, 10 * MIB);
            } else {
                sim.add_bbr(BbrConfig::new(params, 1), PACKET, 0, 10 * MIB);
            }
            sim.run_while(200 * S, |sim| sim.flows.iter().any(|f| f.done.is_none()));
            let times: Vec<_> = sim.flows.iter().map(|f| f.done.unwrap_or(u64::MAX) / MS).collect();
            println!("{} s06 reno={against_reno}: alone {} ms, {times:?}", params.name, alone / MS);
            for time in times {
                assert!(time <= 3 * alone / MS, "{}: {time} ms", params.name);
            }
        }
    }
}

fn completes(name: &str, link: &Link, bytes: u64, limit_ms: u64) {
    for params in BOTH {
        for seed in 1..4 {
            let mut sim = Sim::single(link.clone(), params, PACKET, bytes, seed);
            sim.finish(20 * limit_ms * MS);
            let done = sim.flows[0].done.expect("finished") / MS;
            println!(
                "{} {name} seed {seed}: {done} ms (limit {limit_ms}), {} lost",
                params.name, sim.flows[0].lost_packets
            );
            assert!(done <= limit_ms, "{} {name} seed {seed}: {done} ms", params.name);
        }
    }
}

#[test]
fn s08_ten_megabit() {
    completes("s08", &link(10, 10_000, 20_000), 4_000_000, 3600);
}

#[test]
fn s09_jitter() {
    let mut link = link(10, 10_000, 30_000);
    link.jitter = 5 * MS;
    completes("s09", &link, 4_000_000, 3800);
}

#[test]
fn s10_gigabit_with_jitter() {
    let mut link = link(1000, 4000, 12_000);
    link.jitter = 2 * MS;
    completes("s10", &link, 10_000_000, 250);
}

#[test]
fn s11_two_seconds_of_silence() {
    let mut link = link(10, 15_000, 30_000);
    link.steps.extend([(5 * S, 0), (7 * S, 10 * MBIT)]);
    completes("s11", &link, 10_000_000, 15_000);
}

#[test]
fn s12_satellite_cold_and_resumed() {
    for params in BOTH {
        let link = link(250, 300_000, 600_000);
        let mut cold = Sim::single(link.clone(), params, PACKET, 100_000_000, 1);
        cold.flows[0].ack_every = 10;
        cold.finish(60 * S);
        let cold = cold.flows[0].done.expect("finished") / MS;
        let mut sim = Sim::new(link, 1);
        let mut config = BbrConfig::new(params, 1);
        config.resume = Some(ResumeSeed {
            bandwidth_bytes_per_s: 250 * MBIT / 8,
            min_rtt: std::time::Duration::from_millis(600),
            is_limit: true,
            jump_bytes_max: u64::MAX,
        });
        sim.add_bbr(config, PACKET, 0, 100_000_000);
        sim.flows[0].ack_every = 10;
        sim.finish(60 * S);
        let resumed = sim.flows[0].done.expect("finished") / MS;
        println!("{} s12: cold {cold} ms, resumed {resumed} ms", params.name);
        // A round trip less than with a handshake.
        assert!(cold <= 11_400 && resumed <= 5400, "{}: {cold} {resumed}", params.name);
    }
}

#[test]
fn s13_tenfold_increase_is_found() {
    for params in BOTH {
        let mut link = link(10, 50_000, 100_000);
        link.steps.push((10 * S, 100 * MBIT));
        let mut sim = Sim::single(link, params, PACKET, 1 << 40, 1);
        sim.run(10 * S);
        let (mut rounds, mut last) = (0, sim.bbr(0).rounds.count);
        let found = sim.run_while(100 * S, |sim| {
            let bbr = sim.bbr(0);
            if bbr.rounds.count != last {
                last = bbr.rounds.count;
                rounds += u64::from(bbr.state == State::ProbeBwUp);
            }
            sim.estimate(0) * 100 < 90 * 100 * MBIT
        });
        println!("{} s13: {rounds} rounds of UP, {} s", params.name, sim.now / S - 10);
        assert!(found && rounds <= 25, "{}: {rounds} rounds, {}", params.name, sim.estimate(0));
    }
}

#[test]
fn s14_tenfold_decrease_is_followed() {
    for params in BOTH {
        let mut link = link(100, 50_000, 100_000);
        link.steps.push((10 * S, 10 * MBIT));
        let mut sim = Sim::single(link, params, PACKET, 1 << 40, 1);
        sim.run(10 * S);
        let cycles = sim.bbr(0).max_bw.cycles;
        let down = sim.run_while(100 * S, |sim| sim.estimate(0) > 1_150 * MBIT / 100);
        let took = sim.bbr(0).max_bw.cycles - cycles;
        println!("{} s14: {took} cycles, {} s, {}", params.name, sim.now / S - 10, sim.estimate(0));
        assert!(
            down && took <= 4 && sim.estimate(0) >= 850 * MBIT / 100,
            "{}: {took}",
            params.name
        );
    }
}

#[test]
fn s15_sub_packet_bdp() {
    for params in BOTH {
        let mut sim = Sim::single(link(8, 200, 20_000), params, 1200, 1 << 40, 1);
        sim.run(2 * S);
        let before = sim.flows[0].delivered;
        let mut floor = u64::MAX;
        let mut ceiling = 0;
        sim.run_while(12 * S, |sim| {
            floor = floor.min(sim.snapshot(0).cwnd_bytes);
            ceiling = ceiling.max(sim.snapshot(0).cwnd_bytes);
            true
        });
        let goodput = (sim.flows[0].delivered - before) * 8 / 10 * 1248 / 1200;
        println!(
            "{} s15: goodput {goodput}, cwnd {floor}..{ceiling} {:?}",
            params.name,
            sim.snapshot(0)
        );
        assert_eq!(floor, 4800, "{}", params.name);
        assert!(near(goodput, 8 * MBIT, 10), "{}: {goodput}", params.name);
    }
}

#[test]
fn s16_forty_gigabit() {
    for params in BOTH {
        let mut sim = Sim::single(link(40_000, 100, 1000), params, 9000, 4_000_000_000, 1);
        sim.run(100 * MS);
        let before = sim.flows[0].delivered;
        let at = sim.now;
        sim.finish(10 * S);
        let spent = sim.flows[0].done.expect("finished") - at;
        let goodput =
            (sim.flows[0].delivered - before) * 8 * 9048 / 9000 * 1000 / (spent / MS).max(1);
        println!(
            "{} s16: goodput {} Mbit/s, {} lost",
            params.name,
            goodput / MBIT,
            sim.flows[0].lost_packets
        );
        assert!(goodput >= 38_000 * MBIT, "{}: {goodput}", params.name);
    }
}

/// Bbr3, and 2 % and 5 % of loss, have no floor in the specification: `sim_scenarios_quic` runs them.
#[test]
fn s17_random_loss() {
    for (ppm, floor) in [(1000, 95), (10_000, 70)] {
        let mut link = link(1000, 25_000, 50_000);
        link.loss_ppm = ppm;
        let mut sim = Sim::single(link, Params::BBR2, PACKET, 1 << 40, 1);
        sim.run(2 * S);
        let before = sim.flows[0].delivered;
        sim.run(12 * S);
        let percent = (sim.flows[0].delivered - before) * 8 / 10 * 1500 / PACKET / (10 * MBIT);
        println!("bbr2 s17: loss {} %: {percent} % of the link", ppm as f64 / 10_000.0);
        assert!(percent >= floor, "{ppm} ppm: {percent} %");
    }
}

#[test]
fn s18_eight_flows_are_fair() {
    for params in BOTH {
        let mut sim = Sim::new(link(100, 20_000, 40_000), 1);
        for _ in 0..8 {
            sim.add_bbr(BbrConfig::new(params, 1), PACKET, 0, 1 << 40);
        }
        sim.run(30 * S);
        let before: Vec<u64> = sim.flows.iter().map(|f| f.delivered).collect();
        sim.run(60 * S);
        let rates: Vec<f64> =
            sim.flows.iter().zip(before).map(|(f, b)| (f.delivered - b) as f64).collect();
        let sum: f64 = rates.iter().sum();
        let jain = sum * sum / (8.0 * rates.iter().map(|r| r * r).sum::<f64>());
        println!("{} s18: Jain {jain:.3}, {} % of the link", params.name, sum * 8.0 / 30.0 / 1e6);
        assert!(jain >= 0.9, "{}: {jain}", params.name);
    }
}
