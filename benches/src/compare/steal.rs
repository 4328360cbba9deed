//! Time that the hypervisor took a run's cores away for: `steal` of `/proc/stat` (proc_pid_stat(5),
//! Linux 2.6.11).
//!
//! A run that lost its cores measures the neighbours, not the stack. Such runs are told apart by this
//! cause, never by their result.

use std::time::{Duration, Instant};

/// The share of a run's time that a core may be away before the run counts as disturbed.
const STOLEN_SHARE_MAX: f64 = 0.05;
/// What the kernel counts in on every architecture that STOQ runs on (`USER_HZ`).
const TICKS_PER_S: f64 = 100.0;
/// Place of `steal` among the numbers of a `cpuN` line.
const STEAL_COLUMN: usize = 7;

/// Readings at the start of a run.
#[derive(Debug)]
pub struct Watch {
    cores: Vec<usize>,
    start: Instant,
    ticks: Vec<Option<u64>>,
}

impl Watch {
    /// Starts to watch.
    #[must_use]
    pub fn start(cores: Vec<usize>) -> Self {
        Self { start: Instant::now(), ticks: read(&cores), cores }
    }

    /// The largest share of the time since the start that one of the cores was away; `None` where
    /// the kernel does not say.
    #[must_use]
    pub fn stolen_share(&self) -> Option<f64> {
        share(&self.ticks, &read(&self.cores), self.start.elapsed())
    }
}

/// Whether a run of which this share was stolen is a measurement of its own kind.
#[must_use]
pub fn is_disturbed(stolen_share: Option<f64>) -> bool {
    stolen_share.is_some_and(|share| share > STOLEN_SHARE_MAX)
}

fn share(before: &[Option<u64>], after: &[Option<u64>], elapsed: Duration) -> Option<f64> {
    let stolen = before.iter().zip(after).filter_map(|(before, after)| {
        let ticks = (*after)?.saturating_sub((*before)?);
        Some(ticks as f64 / TICKS_PER_S / elapsed.as_secs_f64().max(f64::MIN_POSITIVE))
    });
    stolen.max_by(f64::total_cmp)
}

fn read(cores: &[usize]) -> Vec<Option<u64>> {
    // Unreadable, as in some sandboxes: nothing is known about it, and no run is called disturbed.
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    cores.iter().map(|core| steal_ticks(&text, *core)).collect()
}

fn steal_ticks(stat: &str, core: usize) -> Option<u64> {
    let name = format!("cpu{core}");
    let line = stat.lines().find(|line| line.split(' ').next() == Some(&name))?;
    line.split_whitespace().nth(1 + STEAL_COLUMN)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_column_of_the_core_is_read() {
        let stat =
            "cpu  1 2 3 4 5 6 7 80 9 10\ncpu1 1 2 3 4 5 6 7 8 9 10\ncpu10 0 0 0 0 0 0 0 44\n";
        assert_eq!(steal_ticks(stat, 1), Some(8));
        assert_eq!(steal_ticks(stat, 10), Some(44));
        assert_eq!(steal_ticks(stat, 0), None);
        assert!(read(&[0])[0].is_some(), "this machine has a core 0");
    }

    #[test]
    fn a_twentieth_is_allowed() {
        let share = |ticks: u64| {
            share(&[Some(100), Some(5)], &[Some(100 + ticks), Some(5)], Duration::from_secs(2))
        };
        assert!(!is_disturbed(share(10)), "100 ms of 2 s");
        assert!(is_disturbed(share(11)));
        assert!(!is_disturbed(None));
    }
}
