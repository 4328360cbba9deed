//! A post-quantum ClientHello spans two Initials: with and without Retry, whichever part is lost,
//! late, early or doubled, the connection is made, and made once.

#[path = "common/sim.rs"]
mod sim;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use sim::{CLIENT, Pair, PairConfig, Plan, Send, pattern};
use stoq::Dir;
use stoq::config::{RetryPolicy, TransportConfig};
use stoq::datapath::sim::LinkConfig;

const LIMIT: Duration = Duration::from_secs(60);

fn pair(retry: RetryPolicy, link: LinkConfig, seed: u64) -> Pair {
    let server = TransportConfig { retry, handshake_timeout_ms: 60_000, ..Default::default() };
    let client = TransportConfig { handshake_timeout_ms: 60_000, ..Default::default() };
    let plan = Plan {
        sends: vec![Send { dir: Dir::Bi, data: pattern(5_000), finish: true }],
        ..Plan::default()
    };
    let config = PairConfig { link, seed, client, server, ..Default::default() };
    Pair::new(config, plan, Plan { keep: true, ..Plan::default() })
}

fn link() -> LinkConfig {
    LinkConfig { rate_bps: 100_000_000, delay_us: 5_000, ..LinkConfig::default() }
}

fn finishes(pair: &mut Pair, case: &str) {
    let done = pair.run(LIMIT, |client, _| client.acknowledged.len() == 1);
    let counters = pair.server.counters();
    assert!(done, "{case}: no connection after {:?}: {counters:?}", pair.clock.elapsed());
    // A part that came back late must not open a second connection.
    let later = pair.clock.elapsed() + Duration::from_secs(5);
    pair.run(Duration::from_secs(5), |_, _| false);
    assert!(pair.clock.elapsed() >= later);
    assert_eq!(pair.server.counters().accepted, 1, "{case}");
    let log = pair.server_log.lock().expect("log");
    assert_eq!(log.connected, 1, "{case}");
    assert!(log.received.values().all(|data| *data == pattern(5_000)), "{case}");
}

/// Long header of type Initial (RFC 9000 §17.2.2).
fn is_initial(payload: &[u8]) -> bool {
    payload.first().is_some_and(|first| first & 0xf0 == 0xc0)
}

/// Loses the client's Initials whose numbers are in `lost`; notes how many there were.
fn lose(pair: &Pair, lost: &'static [usize]) -> Rc<RefCell<usize>> {
    let seen = Rc::new(RefCell::new(0));
    let counted = seen.clone();
    pair.network.set_filter(Some(Box::new(move |event, payload| {
        if event.from != CLIENT || !is_initial(payload) {
            return true;
        }
        let mut counted = counted.borrow_mut();
        *counted += 1;
        !lost.contains(&(*counted - 1))
    })));
    seen
}

#[test]
fn either_part_may_be_lost_before_and_after_a_retry() {
    const LOST: [&[usize]; 9] =
        [&[], &[0], &[1], &[0, 1], &[2], &[3], &[2, 3], &[0, 2], &[1, 3, 4]];
    for retry in [RetryPolicy::Never, RetryPolicy::Always] {
        for lost in LOST {
            let mut pair = pair(retry, link(), 7);
            let seen = lose(&pair, lost);
            finishes(&mut pair, &format!("{retry:?}, lost {lost:?}"));
            assert!(*seen.borrow() >= 2, "the ClientHello fits one datagram: nothing was tested");
        }
    }
}

#[test]
fn parts_that_overtake_each_other_and_come_twice_make_one_connection() {
    let reordered = LinkConfig {
        reorder: 0.5,
        reorder_us: 12_000,
        duplicate: 0.3,
        loss: 0.15,
        jitter_us: 3_000,
        ..link()
    };
    for retry in [RetryPolicy::Never, RetryPolicy::Always] {
        for seed in 1..=60 {
            let mut pair = pair(retry, reordered.clone(), seed);
            finishes(&mut pair, &format!("{retry:?}, seed {seed}"));
        }
    }
}
