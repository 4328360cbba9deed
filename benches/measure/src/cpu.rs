//! CPU time and memory of a process, from `/proc`.

use anyhow::Context;

/// User and system CPU time, seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuTime {
    /// In user mode.
    pub user_s: f64,
    /// In the kernel on behalf of the process.
    pub sys_s: f64,
}

/// Whose `/proc` entry.
fn entry(pid: Option<u32>, file: &str) -> String {
    pid.map_or_else(|| format!("/proc/self/{file}"), |pid| format!("/proc/{pid}/{file}"))
}

impl CpuTime {
    /// The CPU time so far of a process; this one when `pid` is `None`.
    ///
    /// # Errors
    /// When its `/proc/PID/stat` cannot be read: it has ended, or runs on another machine.
    pub fn of(pid: Option<u32>) -> anyhow::Result<Self> {
        let path = entry(pid, "stat");
        let stat = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        parse(&stat, rustix::param::clock_ticks_per_second() as f64).context(path)
    }

    /// The time since an earlier reading.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self { user_s: self.user_s - earlier.user_s, sys_s: self.sys_s - earlier.sys_s }
    }
}

fn parse(stat: &str, ticks_per_s: f64) -> anyhow::Result<CpuTime> {
    // The command name is in parentheses and may hold anything: fields count from behind it.
    let (_, rest) = stat.rsplit_once(") ").context("no command name")?;
    let mut fields = rest.split(' ').skip(11);
    let mut next = || -> anyhow::Result<f64> {
        let field = fields.next().context("too short")?;
        Ok(field.parse::<f64>()? / ticks_per_s)
    };
    Ok(CpuTime { user_s: next()?, sys_s: next()? })
}

/// Resident memory of a process, bytes; this one when `pid` is `None`.
///
/// # Errors
/// When its `/proc/PID/statm` cannot be read.
pub fn rss_bytes(pid: Option<u32>) -> anyhow::Result<u64> {
    let path = entry(pid, "statm");
    let statm = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let pages: u64 = statm.split(' ').nth(1).with_context(|| path.clone())?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_a_strange_name() {
        let stat = "1 (a b) c) R 1 2 3 4 5 6 7 8 9 10 250 50 0 0";
        let time = parse(stat, 100.0).expect("parses");
        assert!((time.user_s - 2.5).abs() < 1e-9 && (time.sys_s - 0.5).abs() < 1e-9);
        assert!(parse("1 (x) R 1 2", 100.0).is_err());
    }

    #[test]
    fn this_process_by_either_name() {
        let own = std::process::id();
        assert!(rss_bytes(None).expect("statm") > 100_000);
        assert!(rss_bytes(Some(own)).expect("statm") > 100_000);
        let (by_self, by_pid) = (CpuTime::of(None), CpuTime::of(Some(own)));
        assert!(by_pid.expect("stat").user_s >= by_self.expect("stat").user_s);
        assert!(CpuTime::of(Some(u32::MAX)).is_err());
    }
}
