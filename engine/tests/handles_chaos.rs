//! Random misuse of all handles at once, over loopback sockets (`common/misuse.rs`). Afterwards nothing is
//! left (the shards' counts of connections and streams), nothing hangs (a watchdog), and a whole transfer
//! works. The same over AF_XDP, with packet memory counted: `priv_handles.rs`.
//!
//! A failure prints its seed; `STOQ_SEED=n` repeats one (what threads and the kernel do is not part of
//! it), `STOQ_SOAK=100` tries so many more.
#![allow(clippy::unwrap_used)]

#[path = "common/misuse.rs"]
#[allow(dead_code, unreachable_pub)]
mod misuse;
#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::time::Duration;

use pair::{Pair, Watchdog, config};
use stoq::config::TransportConfig;
use stoq::datapath::choice::DatapathChoice;

fn misuse(datapath: DatapathChoice, seed: u64) {
    println!("{datapath}: seed {seed}");
    let config = misuse::tight(TransportConfig { datapath, shards: 2, ..config() });
    misuse::misuse(&Pair::with(config.clone(), config), seed);
}

#[test]
fn whatever_is_misused_nothing_is_left_and_nothing_hangs() {
    let soak: u64 = std::env::var("STOQ_SOAK").map_or(0, |count| count.parse().unwrap());
    let _watchdog = Watchdog::with_limit("chaos", Duration::from_secs(240 + 60 * soak));
    if let Ok(seed) = std::env::var("STOQ_SEED") {
        return misuse(DatapathChoice::Socket, seed.parse().unwrap());
    }
    for seed in 1..=3 + soak {
        misuse(DatapathChoice::Socket, seed);
    }
    misuse(DatapathChoice::IoUring, 4);
}
