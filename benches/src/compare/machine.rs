//! What machine measured, and under which load.

use serde::Serialize;

/// The machine of a report.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The processor's own name.
    pub processor: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Kernel release.
    pub kernel: String,
    /// Whether a hypervisor lies between.
    pub is_virtual: bool,
    /// Its memory, bytes.
    pub memory_bytes: u64,
    /// This program's version.
    pub version: &'static str,
    /// When the comparison began: seconds since 1970, UTC.
    pub began_unix_s: u64,
    /// Load averages over 1, 5 and 15 minutes at the start: what else ran.
    pub load: [f64; 3],
}

impl Machine {
    /// Looks. What `/proc` does not tell is `unknown`.
    #[must_use]
    pub fn look() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        Self {
            processor: field(&cpuinfo, "model name").unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            is_virtual: field(&cpuinfo, "flags")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            memory_bytes: memory_bytes(&read("/proc/meminfo")),
            version: env!("CARGO_PKG_VERSION"),
            began_unix_s: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            load: loads(&read("/proc/loadavg")),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.is_virtual { "virtual machine" } else { "machine" };
        let [one, five, _] = self.load;
        write!(
            f,
            "STOQ {}, {} UTC; {kind}, {} cores of {}, {:.0} GiB, Linux {}, load {one:.1} (1 min) and \
             {five:.1} (5 min) at the start",
            self.version,
            day_and_time(self.began_unix_s),
            self.cores,
            self.processor,
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.kernel
        )
    }
}

fn memory_bytes(meminfo: &str) -> u64 {
    let kib =
        field(meminfo, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// `2026-01-31 23:59` of seconds since 1970, in the Gregorian calendar.
fn day_and_time(unix_s: u64) -> String {
    let is_leap = |year: u64| {
        (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
    };
    let (mut year, mut day) = (1970, unix_s / 86_400);
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    let (hour, minute) = (unix_s / 3600 % 24, unix_s / 60 % 60);
    format!("{year}-{month:02}-{:02} {hour:02}:{minute:02}", day + 1)
}

fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim())
}

fn loads(text: &str) -> [f64; 3] {
    let mut numbers = text.split(' ').map(|word| word.parse().unwrap_or(0.0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_tells() {
        assert_eq!(field("a: 1\nmodel name\t: X 9\n", "model name"), Some("X 9"));
        assert_eq!(field("", "model name"), None);
        assert_eq!(loads("0.50 1.25 2.00 3/99 7\n"), [0.5, 1.25, 2.0]);
        assert_eq!(loads(""), [0.0; 3]);
        assert_eq!(memory_bytes("MemTotal:       2 kB\n"), 2048);
        assert_eq!(memory_bytes(""), 0);
        assert!(Machine::look().to_string().contains("Linux"));
    }

    #[test]
    fn days_of_the_calendar() {
        assert_eq!(day_and_time(0), "1970-01-01 00:00");
        assert_eq!(day_and_time(951_782_399), "2000-02-28 23:59");
        assert_eq!(day_and_time(951_782_400), "2000-02-29 00:00");
        assert_eq!(day_and_time(1_798_761_599), "2026-12-31 23:59");
        assert_eq!(day_and_time(1_798_761_600), "2027-01-01 00:00");
    }
}
