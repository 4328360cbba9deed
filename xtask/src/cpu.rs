//! CPU time of a process's shard threads, from `/proc`.

use std::collections::HashMap;
use std::time::Instant;

/// Measures between two calls of [`sample`](CpuMeter::sample).
#[derive(Debug)]
pub(crate) struct CpuMeter {
    pid: u32,
    last: HashMap<u32, u64>,
    at: Instant,
}

impl CpuMeter {
    /// Starts to measure a process.
    pub(crate) fn new(pid: u32) -> Self {
        let last = threads(pid).into_iter().map(|thread| (thread.id, thread.ticks)).collect();
        Self { pid, last, at: Instant::now() }
    }

    /// Percent of a core that each shard used since the last call; all threads
    /// together when none is named as a shard, and nothing once the process is gone.
    pub(crate) fn sample(&mut self) -> Vec<u32> {
        let now = Instant::now();
        let seconds = now.duration_since(self.at).as_secs_f64().max(1e-3);
        let per_second = rustix::param::clock_ticks_per_second() as f64;
        let mut threads = threads(self.pid);
        threads.sort_by(|a, b| a.name.cmp(&b.name));
        let percent = |thread: &Thread| {
            let before = self.last.get(&thread.id).copied().unwrap_or(0);
            let ticks = thread.ticks.saturating_sub(before) as f64;
            ticks / per_second / seconds * 100.0
        };
        let shards: Vec<f64> =
            threads.iter().filter(|thread| thread.name.contains("shard")).map(percent).collect();
        let result = match (shards.is_empty(), threads.is_empty()) {
            (false, _) => shards.into_iter().map(|value| value.round() as u32).collect(),
            (true, false) => vec![threads.iter().map(percent).sum::<f64>().round() as u32],
            (true, true) => Vec::new(),
        };
        self.last = threads.into_iter().map(|thread| (thread.id, thread.ticks)).collect();
        self.at = now;
        result
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Thread {
    id: u32,
    name: String,
    ticks: u64,
}

/// The threads of a process; those that end meanwhile are left out.
fn threads(pid: u32) -> Vec<Thread> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("stat")).ok())
        .filter_map(|stat| parse(&stat))
        .collect()
}

/// Reads a `stat` line (proc_pid_stat(5)): fields 1, 2, and 14 + 15.
fn parse(stat: &str) -> Option<Thread> {
    let (id, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Thread { id: id.parse().ok()?, name: name.to_owned(), ticks: user + system })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_with_blanks_and_brackets_in_the_name() {
        let thread = parse("17 (shard) 0) S 1 2 3 4 5 6 7 8 9 10 100 20 0 0").unwrap();
        assert_eq!(thread, Thread { id: 17, name: "shard) 0".into(), ticks: 120 });
        assert_eq!(parse("17 (x"), None);
        assert_eq!(parse("17 (x) S 1 2"), None);
    }

    #[test]
    fn a_busy_process_shows_and_a_dead_one_does_not() {
        let mut meter = CpuMeter::new(std::process::id());
        let start = Instant::now();
        let mut sum = 0u64;
        while start.elapsed().as_millis() < 300 {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let sample = meter.sample();
        assert!(sample.len() == 1 && sample[0] > 5, "{sample:?}");
        assert!(CpuMeter::new(u32::MAX).sample().is_empty());
    }
}
