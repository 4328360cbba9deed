//! What is compared: a workload with its numbers.

use anyhow::Context;
use serde::Serialize;
use stoq_measure::idle::BYTES_PER_CONNECTION;
use stoq_measure::outcome::Outcome;
use stoq_measure::peer::Workload;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A workload of the perf protocol, which peers have, too.
    Perf(Workload),
    /// Datagrams through a STOQ datapath with no QUIC.
    Raw,
}

/// The cores of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sides {
    /// One a side.
    One,
    /// Two a side, of one process a side.
    Two,
    /// One a side, twice at the same time: two servers and two clients that share nothing. What
    /// the machine gives to four busy cores.
    TwiceOne,
}

impl Sides {
    /// Pairs of cores, client's and server's, that such a run takes.
    #[must_use]
    pub const fn pairs(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two | Self::TwiceOne => 2,
        }
    }
}

/// A workload of a comparison.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its name in tables.
    pub name: &'static str,
    /// What is done.
    pub what: What,
    /// On which cores.
    pub sides: Sides,
    size: usize,
    outstanding: usize,
    connections: usize,
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
    /// The server's resident bytes for each connection; less is better.
    BytesPerConnection,
}

impl Unit {
    /// Whether more is better.
    #[must_use]
    pub const fn more_is_better(self) -> bool {
        !matches!(self, Self::BytesPerConnection)
    }

    /// The best of several values.
    pub fn best(self, values: impl Iterator<Item = f64>) -> Option<f64> {
        if self.more_is_better() {
            values.max_by(f64::total_cmp)
        } else {
            values.min_by(f64::total_cmp)
        }
    }

    /// This of an outcome, where the outcome tells it.
    #[must_use]
    pub fn of(self, outcome: &Outcome) -> Option<f64> {
        match self {
            Self::GoodputBps => Some(outcome.goodput_bps),
            Self::OpsPerS => Some(outcome.ops_per_s),
            Self::BytesPerConnection => outcome.more.get(BYTES_PER_CONNECTION)?.as_f64(),
        }
    }
}

/// Connections of the workloads that measure cores: enough for each of two shards to have its own.
const CONNECTIONS_ON_CORES: usize = 16;
/// Connections of `idle`.
const CONNECTIONS_IDLE: usize = 1000;

/// A row of [`TASKS`]: name, what, cores, size, outstanding, connections.
type TaskRow = (&'static str, What, Sides, usize, usize, usize);

/// Every workload.
const TASKS: &[TaskRow] = {
    use Sides::{One, TwiceOne, Two};
    use What::{Perf, Raw};
    use Workload::{
        Bidi, Datagrams, Download, Handshakes, HandshakesResumed, Idle, Requests, Upload,
    };
    &[
        ("raw", Raw, One, 0, 1, 1),
        ("download", Perf(Download), One, 0, 1, 1),
        ("upload", Perf(Upload), One, 0, 1, 1),
        ("bidi", Perf(Bidi), One, 0, 1, 1),
        ("requests", Perf(Requests), One, 64, 1, 1),
        ("requests-64", Perf(Requests), One, 64, 64, 1),
        ("handshakes", Perf(Handshakes), One, 0, 16, 1),
        ("handshakes-resumed", Perf(HandshakesResumed), One, 0, 16, 1),
        ("datagrams", Perf(Datagrams), One, 1200, 1, 1),
        ("idle", Perf(Idle), One, 64, 1, CONNECTIONS_IDLE),
        ("bulk-1+1", Perf(Download), One, 0, 1, CONNECTIONS_ON_CORES),
        ("bulk-2+2", Perf(Download), Two, 0, 1, CONNECTIONS_ON_CORES),
        ("bulk-2x1+1", Perf(Download), TwiceOne, 0, 1, CONNECTIONS_ON_CORES / 2),
        ("requests-64-2+2", Perf(Requests), Two, 64, 64, CONNECTIONS_ON_CORES),
    ]
};
/// What is compared unless told otherwise.
pub const DEFAULT: &str = "download,upload,requests,requests-64,handshakes,datagrams";

impl Task {
    /// The workload of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str, seconds: f64, warm_up: f64) -> anyhow::Result<Self> {
        let known = || TASKS.iter().map(|task| task.0).collect::<Vec<_>>().join(", ");
        let (name, what, sides, size, outstanding, connections) = *TASKS
            .iter()
            .find(|task| task.0 == name)
            .with_context(|| format!("--workloads: `{name}`; known: {}, all", known()))?;
        Ok(Self { name, what, sides, size, outstanding, connections, seconds, warm_up })
    }

    /// The workloads of a list of names; `all` is every one that so many pairs of cores can run.
    ///
    /// # Errors
    /// A name is unknown, or names a workload that takes more cores.
    pub fn list(
        names: &[String],
        pairs: usize,
        seconds: f64,
        warm_up: f64,
    ) -> anyhow::Result<Vec<Self>> {
        let all: Vec<String> = TASKS
            .iter()
            .filter(|task| task.2.pairs() <= pairs)
            .map(|task| task.0.to_owned())
            .collect();
        let names = if names == ["all"] { &all } else { names };
        let tasks = names.iter().map(|name| {
            let task = Self::named(name, seconds, warm_up)?;
            anyhow::ensure!(
                task.sides.pairs() <= pairs,
                "--workloads {name} takes two cores a side: give \
                 --cores CLIENT,SERVER,SECOND_CLIENT,SECOND_SERVER on a machine that has them"
            );
            Ok(task)
        });
        tasks.collect()
    }

    /// What is compared first.
    #[must_use]
    pub const fn unit(&self) -> Unit {
        match self.what {
            What::Raw | What::Perf(Workload::Upload | Workload::Download | Workload::Bidi) => {
                Unit::GoodputBps
            }
            What::Perf(Workload::Idle) => Unit::BytesPerConnection,
            What::Perf(_) => Unit::OpsPerS,
        }
    }

    /// The flags that every stack's client takes.
    #[must_use]
    pub fn flags(&self) -> Vec<String> {
        let (size, outstanding) = (self.size.to_string(), self.outstanding.to_string());
        let What::Perf(workload) = self.what else { return Vec::new() };
        let words: &[&str] = match workload {
            Workload::Requests => &["--size", &size, "--outstanding", &outstanding],
            Workload::Handshakes | Workload::HandshakesResumed => &["--outstanding", &outstanding],
            Workload::Datagrams => &["--size", &size],
            _ => &[],
        };
        let mut flags: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        if self.connections > 1 {
            flags.extend(["--connections".to_owned(), self.connections.to_string()]);
        }
        flags
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
        let idle = Task::named("idle", 1.0, 0.1).expect("known");
        assert_eq!(idle.flags().join(" "), "--connections 1000");
        assert!(!idle.unit().more_is_better());
    }

    #[test]
    fn two_cores_a_side_are_asked_for_only_where_they_are() {
        let names = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let list = |text, pairs| Task::list(&names(text), pairs, 1.0, 0.1);
        assert_eq!(list("all", 2).expect("all").len(), TASKS.len());
        let one = list("all", 1).expect("all of one core a side");
        assert!(one.len() > 8 && one.iter().all(|task| task.sides == Sides::One));
        let error = list("download,bulk-2+2", 1).expect_err("too few cores").to_string();
        assert!(error.contains("bulk-2+2") && error.contains("--cores"), "{error}");
        let control = &list("bulk-2x1+1", 2).expect("enough")[0];
        let whole = &list("bulk-2+2", 2).expect("enough")[0];
        assert_eq!(2 * control.connections, whole.connections);
    }
}
