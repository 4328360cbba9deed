//! Committed scenarios with real QUIC connections, and their bounds.

use stoq::datapath::sim::{Scenario, ScenarioResult};
use stoq::sim::run_scenario;

fn run(file: &str, seed: u64) -> ScenarioResult {
    let path = format!("{}/../benches/scenarios/{file}.toml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect("a committed scenario");
    run_scenario(&Scenario::parse(&text).expect("valid"), seed).expect("it runs").result
}

#[test]
fn the_same_file_and_seed_give_the_same_events() {
    let runs = [1, 1, 2].map(|seed| run("09-ten-megabit-jitter", seed).digest);
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0], runs[2]);
}

#[test]
fn s01_no_loss_and_the_right_estimate() {
    let result = run("01-simple-transfer", 1);
    let flow = &result.flows[0];
    assert_eq!(flow.packets_lost, 0, "{flow:?}");
    assert!(flow.completed_ms.is_some_and(|at| at <= 30_000), "{flow:?}");
    let estimate = flow.bandwidth_estimate_bps.expect("BBR has one");
    assert!(estimate.abs_diff(4_000_000) <= 40_000, "{flow:?}");
}

#[test]
fn s08_ten_megabit() {
    let result = run("08-ten-megabit", 1);
    assert!(result.flows[0].completed_ms.is_some_and(|at| at <= 3_600), "{:?}", result.flows[0]);
}
