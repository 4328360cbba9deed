//! CPU time and memory of this process, from `/proc`.

use anyhow::Context;

/// User and system CPU time, seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuTime {
    /// In user mode.
    pub user_s: f64,
    /// In the kernel on behalf of the process.
    pub sys_s: f64,
}

impl CpuTime {
    /// This process's CPU time so far.
    ///
    /// # Errors
    /// When `/proc/self/stat` cannot be read.
    pub fn now() -> anyhow::Result<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").context("/proc/self/stat")?;
        parse(&stat, rustix::param::clock_ticks_per_second() as f64)
    }

    /// The time since an earlier reading.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self { user_s: self.user_s - earlier.user_s, sys_s: self.sys_s - earlier.sys_s }
    }
}

fn parse(stat: &str, ticks_per_s: f64) -> anyhow::Result<CpuTime> {
    // The command name is in parentheses and may hold anything: fields count from behind it.
    let (_, rest) = stat.rsplit_once(") ").context("/proc/self/stat has no command name")?;
    let mut fields = rest.split(' ').skip(11);
    let mut next = || -> anyhow::Result<f64> {
        let field = fields.next().context("/proc/self/stat is too short")?;
        Ok(field.parse::<f64>()? / ticks_per_s)
    };
    Ok(CpuTime { user_s: next()?, sys_s: next()? })
}

/// Resident memory of this process, bytes.
///
/// # Errors
/// When `/proc/self/statm` cannot be read.
pub fn rss_bytes() -> anyhow::Result<u64> {
    rss_bytes_of("self")
}

/// Resident memory of a process, `self` or its number, bytes.
///
/// # Errors
/// When there is no such process.
pub fn rss_bytes_of(pid: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/statm");
    let statm = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let pages: u64 =
        statm.split(' ').nth(1).with_context(|| format!("{path} is too short"))?.parse()?;
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
    fn this_process_has_memory() {
        assert!(rss_bytes().expect("statm") > 100_000);
    }
}
