//! What is compared: a workload with its numbers.

use anyhow::Context;
use serde::Serialize;
use stoq_measure::peer::Workload;

/// A workload of a comparison.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its name in tables.
    pub name: &'static str,
    /// What is done.
    pub workload: Workload,
    size: usize,
    outstanding: usize,
    /// How long to measure.
    pub seconds: f64,
    /// Traffic before the clock starts.
    pub warm_up: f64,
}

/// What of a workload's outcome is compared first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Bits a second; more is better.
    GoodputBps,
    /// Operations a second; more is better.
    OpsPerS,
}

/// Every workload: name, what, size, outstanding.
const TASKS: &[(&str, Workload, usize, usize)] = &[
    ("download", Workload::Download, 0, 1),
    ("upload", Workload::Upload, 0, 1),
    ("bidi", Workload::Bidi, 0, 1),
    ("requests", Workload::Requests, 64, 1),
    ("requests-64", Workload::Requests, 64, 64),
    ("handshakes", Workload::Handshakes, 0, 16),
    ("datagrams", Workload::Datagrams, 1200, 1),
];
/// What is compared unless told otherwise.
pub const DEFAULT: &str = "download,upload,requests,requests-64,handshakes,datagrams";

impl Task {
    /// The workload of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str, seconds: f64, warm_up: f64) -> anyhow::Result<Self> {
        let known = || TASKS.iter().map(|task| task.0).collect::<Vec<_>>().join(", ");
        let (name, workload, size, outstanding) = *TASKS
            .iter()
            .find(|task| task.0 == name)
            .with_context(|| format!("--workloads: `{name}`; known: {}", known()))?;
        Ok(Self { name, workload, size, outstanding, seconds, warm_up })
    }

    /// What is compared first.
    #[must_use]
    pub const fn unit(&self) -> Unit {
        match self.workload {
            Workload::Upload | Workload::Download | Workload::Bidi => Unit::GoodputBps,
            _ => Unit::OpsPerS,
        }
    }

    /// The flags that every stack's client takes.
    #[must_use]
    pub fn flags(&self) -> Vec<String> {
        let (size, outstanding) = (self.size.to_string(), self.outstanding.to_string());
        let words: &[&str] = match self.workload {
            Workload::Requests => &["--size", &size, "--outstanding", &outstanding],
            Workload::Handshakes => &["--outstanding", &outstanding],
            Workload::Datagrams => &["--size", &size],
            _ => &[],
        };
        words.iter().map(|word| (*word).to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in DEFAULT.split(',') {
            assert_eq!(Task::named(name, 1.0, 0.1).expect("known").name, name);
        }
        let error = Task::named("nosuch", 1.0, 0.1).expect_err("unknown").to_string();
        assert!(error.contains("nosuch") && error.contains("requests-64"), "{error}");
        let task = Task::named("requests-64", 1.0, 0.1).expect("known");
        assert_eq!(task.flags().join(" "), "--size 64 --outstanding 64");
        assert_eq!(task.unit(), Unit::OpsPerS);
    }
}
