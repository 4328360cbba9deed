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
            "{kind}, {} cores of {}, Linux {}, load {one:.1} (1 min) and {five:.1} (5 min) at the start",
            self.cores, self.processor, self.kernel
        )
    }
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
        assert!(Machine::look().to_string().contains("Linux"));
    }
}
