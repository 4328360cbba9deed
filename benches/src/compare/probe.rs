//! How far apart two cores are: the time a cache line takes from one to the other.
//!
//! A hypervisor moves virtual cores between core complexes while they run; throughput halves
//! when the two ends are far apart. So each run is bracketed by this probe, and runs are told
//! apart by its latency, never by their throughput.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Release};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};

/// Crossings in one reading.
const CROSSINGS: u64 = 200;
/// Readings; the least disturbed one counts.
const READINGS: u32 = 100;
/// A probe that takes longer is given up: one of the cores is taken.
const TIMEOUT: Duration = Duration::from_secs(2);
/// What the partner sees at the end.
const STOP: u64 = u64::MAX;

/// The latency between the two cores that are farthest apart of several pairs; as
/// [`core_to_core_ns`].
///
/// # Errors
/// A core is not ours to use.
pub fn farthest_ns(pairs: &[[usize; 2]]) -> anyhow::Result<Option<f64>> {
    let mut farthest = Some(0.0);
    for pair in pairs {
        farthest = farthest.zip(core_to_core_ns(*pair)?).map(|(a, b): (f64, f64)| a.max(b));
    }
    Ok(farthest)
}

/// One-way latency from core to core, nanoseconds: the smallest of many readings. `None` when
/// others hold a core all the time.
///
/// # Errors
/// A core is not ours to use.
pub fn core_to_core_ns(cores: [usize; 2]) -> anyhow::Result<Option<f64>> {
    if cores[0] == cores[1] {
        return Ok(Some(0.0));
    }
    // Even values are the prober's to advance, odd ones the partner's.
    let ball = Arc::new(AtomicU64::new(0));
    let partner = {
        let ball = ball.clone();
        std::thread::spawn(move || -> anyhow::Result<()> {
            pin(cores[1])?;
            loop {
                // Acquire and Release: the ball is all that is shared; no more is needed.
                match ball.load(Acquire) {
                    STOP => return Ok(()),
                    value if !value.is_multiple_of(2) => ball.store(value + 1, Release),
                    _ => std::hint::spin_loop(),
                }
            }
        })
    };
    let prober = {
        let ball = ball.clone();
        std::thread::spawn(move || pin(cores[0]).map(|()| probe(&ball)))
    };
    let probed = prober.join().map_err(|_panic| anyhow::anyhow!("the probe panicked"))?;
    // The partner may be between its load and its store, and so overwrite the end: say it again.
    while !partner.is_finished() {
        ball.store(STOP, Release);
        std::thread::yield_now();
    }
    partner.join().map_err(|_panic| anyhow::anyhow!("the probe's partner panicked"))??;
    probed
}

fn pin(core: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).map_err(|error| anyhow::anyhow!("core {core}: {error}"))
}

fn probe(ball: &AtomicU64) -> Option<f64> {
    let began = Instant::now();
    let mut best = f64::INFINITY;
    let mut value = 0;
    for _ in 0..READINGS {
        let start = Instant::now();
        for _ in 0..CROSSINGS / 2 {
            ball.store(value + 1, Release);
            value += 2;
            let mut spins = 0u32;
            while ball.load(Acquire) != value {
                std::hint::spin_loop();
                spins += 1;
                if spins.is_multiple_of(65_536) && began.elapsed() >= TIMEOUT {
                    return best.is_finite().then_some(best);
                }
            }
        }
        best = best.min(start.elapsed().as_nanos() as f64 / CROSSINGS as f64);
    }
    Some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cores_are_some_way_apart() {
        let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { panic!("no affinity") };
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
        if let [first, second, ..] = cores[..] {
            let ns = core_to_core_ns([first, second]).expect("both are ours");
            // On a busy machine there may be no reading at all.
            let ns = ns.unwrap_or(50.0);
            assert!(ns > 1.0 && ns < 1e6, "{ns} ns");
        }
        assert_eq!(core_to_core_ns([cores[0]; 2]).expect("one core"), Some(0.0));
        assert_eq!(farthest_ns(&[[cores[0]; 2]; 2]).expect("one core"), Some(0.0));
        assert!(farthest_ns(&[[cores[0]; 2], [cores[0], CpuSet::MAX_CPU - 1]]).is_err());
        assert!(core_to_core_ns([cores[0], CpuSet::MAX_CPU - 1]).is_err());
    }
}
