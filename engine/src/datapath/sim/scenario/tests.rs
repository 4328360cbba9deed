//! What a scenario file may say, and how it is refused.

use super::*;
use crate::datapath::sim::{LinkConfig, QueueLimit};

const MINIMAL: &str = "name = \"m\"\n[link]\nrate_bps = 1_000_000\n[[flow]]\nbytes = 1\n";

fn refused(text: &str) -> String {
    Scenario::parse(text).expect_err("must be refused").to_string()
}

/// [`MINIMAL`] with `line` in its `[link]` table.
fn with_link(line: &str) -> String {
    MINIMAL.replace("[[flow]]", &format!("{line}\n[[flow]]"))
}

#[test]
fn the_documented_example() {
    let scenario = Scenario::parse(include_str!("example.toml")).expect("the example");
    assert_eq!(scenario.name, "asymmetric satellite");
    assert_eq!((scenario.seed, scenario.time_limit_ms), (7, 120_000));
    let forward = &scenario.forward.initial;
    assert_eq!((forward.rate_bps, forward.delay_us), (10_000_000, 10_000));
    assert_eq!(forward.queue, QueueLimit::TimeUs(20_000));
    assert_eq!(scenario.forward.steps.len(), 1);
    assert_eq!(scenario.forward.steps[0].at_ms, 5000);
    assert_eq!(scenario.forward.steps[0].config.rate_bps, 1_000_000);
    assert_eq!(scenario.reverse.initial.rate_bps, 2_000_000);
    assert_eq!(scenario.reverse.initial.delay_us, 10_000);
    assert_eq!(scenario.access, Some(AccessConfig { rate_bps: 100_000_000, delay_us: 2_000 }));
    assert_eq!(scenario.flows.len(), 1);
    assert_eq!(scenario.flows[0].cc, CongestionControlName::Bbr2);
    assert_eq!(scenario.flows[0].total_bytes(), 4_000_000);
}

#[test]
fn what_is_left_out_has_its_default() {
    let scenario = Scenario::parse(MINIMAL).expect("minimal");
    assert_eq!((scenario.seed, scenario.time_limit_ms), (SEED_DEFAULT, TIME_LIMIT_MS_DEFAULT));
    let expected = LinkConfig { rate_bps: 1_000_000, ..LinkConfig::default() };
    assert_eq!(scenario.forward, LinkPlan::constant(expected.clone()));
    assert_eq!(scenario.reverse, LinkPlan::constant(expected));
    assert_eq!(scenario.access, None);
    let flow = &scenario.flows[0];
    assert_eq!((flow.streams, flow.direction), (1, FlowDirection::Upload));
}

#[test]
fn the_reverse_follows_the_link_but_for_its_own_keys() {
    let text = with_link(
        "queue_bytes = 30_000
         [link.reverse]
         rate_bps = 500_000
         queue_us = 7
         [[link.reverse.step]]
         at_ms = 3000
         rate_bps = 600_000
         [[link.step]]
         at_ms = 2000
         rate_bps = 2_000_000
         delay_us = 9
         [[link.step]]
         at_ms = 4000
         down = true",
    );
    let scenario = Scenario::parse(&text).expect("valid");
    let states = |plan: &LinkPlan| -> Vec<_> {
        let state = |config: &LinkConfig| (config.rate_bps, config.delay_us, config.down);
        let later = plan.steps.iter().map(|step| (step.at_ms, state(&step.config)));
        std::iter::once((0, state(&plan.initial))).chain(later).collect()
    };
    assert_eq!(
        states(&scenario.forward),
        [(0, (1_000_000, 0, false)), (2000, (2_000_000, 9, false)), (4000, (2_000_000, 9, true))]
    );
    assert_eq!(
        states(&scenario.reverse),
        [
            (0, (500_000, 0, false)),
            (2000, (500_000, 9, false)),
            (3000, (600_000, 9, false)),
            (4000, (600_000, 9, true))
        ]
    );
    assert_eq!(scenario.forward.initial.queue, QueueLimit::Bytes(30_000));
    assert_eq!(scenario.reverse.initial.queue, QueueLimit::TimeUs(7));
}

#[test]
fn values_are_refused_with_key_value_and_range() {
    let cases = [
        ("delay_us = -1", "link.delay_us = -1: expected 0 to 3600000000"),
        ("loss = 1.5", "link.loss = 1.5: expected a probability, 0.0 to 1.0"),
        ("loss = -0.1", "link.loss = -0.1: expected a probability, 0.0 to 1.0"),
        ("mtu = 100", "link.mtu = 100: expected 1280 to 65575"),
        ("queue_us = 0", "link.queue_us = 0: expected 1 to 3600000000"),
        ("policer_rate_bps = 5000", "link.policer_bucket_bytes = 0: expected 1280 to 64000000000"),
        ("[link.reverse]\nrate_bps = 1", "link.reverse.rate_bps = 1: expected 1000 to"),
        ("[[link.step]]\nat_ms = 5\nmtu = 9", "link.step[0].mtu = 9: expected 1280 to 65575"),
        ("[[link.step]]\nrate_bps = 5000", "link.step[0].at_ms = nothing: expected 0 to 86400000"),
        ("at_ms = 5", "link.at_ms = given: expected only in a step"),
        ("queue_us = 1\nqueue_bytes = 1", "link.queue_bytes = given: expected queue_us or"),
        ("[access]\nrate_bps = 0", "access.rate_bps = 0: expected 1000 to 1000000000000"),
    ];
    for (line, expected) in cases {
        let message = refused(&with_link(line));
        assert!(message.starts_with(expected), "{line}: {message}");
    }
    let steps = "[[link.step]]\nat_ms = 9\n[[link.step]]\nat_ms = 8";
    let message = refused(&with_link(steps));
    assert!(message.starts_with("link.step[1].at_ms = 8: expected 9 to"), "{message}");
}

#[test]
fn flows_are_refused_with_key_value_and_range() {
    let cases = [
        ("cc = \"bbr9\"", "flow[0].cc = \"bbr9\": expected bbr2 | bbr3 | cubic | newreno"),
        ("direction = \"up\"", "flow[0].direction = \"up\": expected upload | download"),
        ("streams = 0", "flow[0].streams = 0: expected 1 to 10000"),
        ("start_ms = 120_001", "flow[0].start_ms = 120001: expected 0 to 120000"),
        ("chunks = 3", "flow[0].chunk_bytes = 0: expected 1 to 1000000000"),
        ("chunk_bytes = 3", "flow[0].chunk_every_ms = 0: expected 1 to 86400000"),
        ("resume_rate_bps = 5000", "flow[0].resume_rtt_us = 0: expected 1 to 3600000000"),
        ("bytes = -4", "flow[0].bytes = -4: expected 1 to 1000000000000"),
    ];
    for (line, expected) in cases {
        let message = refused(
            &MINIMAL.replace(
                "bytes = 1\n",
                &format!("bytes = 1\n{line}\n")
                    .replace(if line.starts_with("bytes") { "bytes = 1\n" } else { "\0" }, ""),
            ),
        );
        assert_eq!(message, expected, "{line}");
    }
    let none = MINIMAL.replace("[[flow]]\nbytes = 1\n", "");
    assert!(refused(&none).starts_with("flow = 0: expected 1 to 1000"));
    let empty = MINIMAL.replace("bytes = 1\n", "");
    assert!(refused(&empty).starts_with("flow[0].bytes = 0: expected 1 to"));
}

#[test]
fn unknown_missing_and_mistyped_keys_are_named() {
    let cases = [
        (with_link("ratebps = 5"), "ratebps"),
        (MINIMAL.replace("bytes", "size"), "size"),
        (MINIMAL.replace("name", "title"), "title"),
        (with_link("loss = \"much\""), "loss"),
        (with_link("[link.reverse]\nspeed = 5"), "speed"),
        (with_link("[access]\nmtu = 5"), "mtu"),
        (MINIMAL.replace("[link]\nrate_bps = 1_000_000\n", ""), "link"),
        (MINIMAL.replace("[link]", "[link"), "link"),
        (String::new(), "name"),
    ];
    for (text, key) in cases {
        let message = refused(&text);
        assert!(message.contains(key), "{key}: {message}");
    }
    let message = refused(&MINIMAL.replace("rate_bps = 1_000_000\n", ""));
    assert!(message.starts_with("link.rate_bps = nothing: expected 1000 to"), "{message}");
}

#[test]
fn bursts_follow_the_bytes_or_carry_them() {
    let flow = |keys: &str| {
        let text = MINIMAL.replace("bytes = 1\n", keys);
        Scenario::parse(&text).expect("valid").flows.remove(0)
    };
    let after = flow("bytes = 1_048_576\nchunk_bytes = 512\nchunk_every_ms = 3000\nchunks = 20");
    assert_eq!(after.total_bytes(), 1_048_576 + 20 * 512);
    let carried = flow("bytes = 5000\nchunk_bytes = 512\nchunk_every_ms = 3000");
    assert_eq!(carried.total_bytes(), 5000);
    let alone = flow("chunk_bytes = 512\nchunk_every_ms = 3000\nchunks = 2");
    assert_eq!(alone.total_bytes(), 1024);
}
