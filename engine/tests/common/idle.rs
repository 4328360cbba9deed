//! What an engine costs that has nothing to do: CPU time of its shards' threads, and wake-ups.
#![allow(dead_code, unreachable_pub)] // each test file uses its own part

use std::fs;
use std::time::Duration;

use stoq::engine::Engine;

/// How long the engines are watched.
pub const WATCHED: Duration = Duration::from_secs(3);
/// Part of a core that a parked shard may take.
const SHARE_MAX: f64 = 0.005;
/// Times that a shard may wake up per second: keep-alives, acknowledgements, the kernel's notices.
const WAKE_UPS_PER_S_MAX: f64 = 20.0;

/// Nanoseconds on a core of this process's shard threads, and how many there are.
fn shards_on_cpu() -> (u64, usize) {
    let (mut on_cpu_ns, mut threads) = (0, 0);
    for task in fs::read_dir("/proc/self/task").expect("procfs").flatten() {
        let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if !read("comm").starts_with("stoq-shard-") {
            continue;
        }
        let schedstat = read("schedstat");
        let first = schedstat.split(' ').next().expect("a field");
        on_cpu_ns += first.parse::<u64>().expect("nanoseconds on a core");
        threads += 1;
    }
    (on_cpu_ns, threads)
}

fn parks(engines: &[&Engine]) -> u64 {
    engines.iter().flat_map(|engine| engine.stats()).map(|stats| stats.shard.parks).sum()
}

/// Fails when the shards of these engines, all there are in this process, do not sleep.
pub fn assert_idle(what: &str, engines: &[&Engine]) {
    // Whatever starting an engine left to do is over.
    std::thread::sleep(Duration::from_millis(500));
    let (before_ns, threads) = shards_on_cpu();
    let parks_before = parks(engines);
    std::thread::sleep(WATCHED);
    let (after_ns, threads_after) = shards_on_cpu();
    assert_eq!(threads, threads_after, "{what}: a shard ended");
    assert!(threads > 0, "{what}: no shard is running");
    let seconds = WATCHED.as_secs_f64() * threads as f64;
    let share = (after_ns - before_ns) as f64 / 1e9 / seconds;
    let wake_ups = (parks(engines) - parks_before) as f64 / seconds;
    println!("{what}: {:.3} % of a core and {wake_ups:.1} wake-ups a second", share * 100.0);
    assert!(share < SHARE_MAX, "{what}: {:.2} % of a core for nothing", share * 100.0);
    assert!(wake_ups <= WAKE_UPS_PER_S_MAX, "{what}: {wake_ups:.1} wake-ups a second");
}
