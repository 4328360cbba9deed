//! The committed scenario files: every one is valid, and none is missing.

use std::collections::BTreeSet;
use std::path::PathBuf;

use stoq::datapath::sim::{CongestionControlName, QueueLimit, Scenario};

fn scenarios() -> Vec<(String, Scenario)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../benches/scenarios");
    let entries = std::fs::read_dir(&folder).expect("benches/scenarios");
    let mut all: Vec<_> = entries
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.is_file())
        .map(|path| {
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path).expect("readable");
            let scenario = Scenario::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, scenario)
        })
        .collect();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    all
}

#[test]
fn every_number_from_1_to_18_is_there_and_valid() {
    let all = scenarios();
    let numbers: BTreeSet<u32> =
        all.iter().map(|(name, _)| name[..2].parse().expect("a number first")).collect();
    assert_eq!(numbers, (1..=18).collect());
    let names: BTreeSet<_> = all.iter().map(|(_, scenario)| &scenario.name).collect();
    assert_eq!(names.len(), all.len(), "two scenarios of one name");
}

#[test]
fn queues_are_limited_and_controllers_covered() {
    let all = scenarios();
    for (name, scenario) in &all {
        assert_ne!(scenario.forward.initial.queue, QueueLimit::Unlimited, "{name}");
    }
    for cc in CongestionControlName::ALL {
        let lossy = all.iter().filter(|(name, scenario)| {
            name.starts_with("17-") && scenario.flows.iter().all(|flow| flow.cc == cc)
        });
        assert_eq!(lossy.count(), 4, "{}", cc.name());
    }
}
