//! The clock of a client: warm-up, measurement, report.

use std::time::{Duration, Instant};

use crate::outcome::{Counts, Meter};
use crate::peer::Run;

/// Counts what happens between the end of the warm-up and the end of the run.
#[derive(Debug)]
pub struct Window {
    run: Run,
    started: Instant,
    meter: Option<Meter>,
    counts: Counts,
}

impl Window {
    /// The warm-up starts.
    #[must_use]
    pub fn new(run: &Run) -> Self {
        Self { run: run.clone(), started: Instant::now(), meter: None, counts: Counts::default() }
    }

    /// Looks at the clock; `false` when the measurement is over. Call it often.
    ///
    /// # Errors
    /// The server named by `--server-pid` has ended.
    pub fn tick(&mut self) -> anyhow::Result<bool> {
        match &self.meter {
            Some(meter) => Ok(meter.seconds() < self.run.seconds),
            None => {
                if self.started.elapsed().as_secs_f64() >= self.run.warm_up {
                    self.meter = Some(Meter::start(self.run.server_pid)?);
                    self.counts = Counts::default();
                }
                Ok(true)
            }
        }
    }

    /// Adds application bytes.
    pub fn add_bytes(&mut self, bytes: u64) {
        self.counts.bytes += bytes;
    }

    /// Adds operations without a latency.
    pub fn add_ops(&mut self, ops: u64) {
        self.counts.ops += ops;
    }

    /// Adds a latency, not an operation.
    pub fn add_latency(&mut self, latency: Duration) {
        self.counts.latencies.record(latency);
    }

    /// Adds an operation that took `latency`.
    pub fn add_op(&mut self, latency: Duration) {
        self.add_ops(1);
        self.add_latency(latency);
    }

    /// What the stack says at the end.
    pub fn set_path(&mut self, udp_payload: Option<u64>, packets_lost: Option<u64>) {
        self.counts.udp_payload = udp_payload;
        self.counts.packets_lost = packets_lost;
    }

    /// Operations so far.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.counts.ops
    }

    /// Stops the clock and prints the report.
    ///
    /// # Errors
    /// The warm-up has not ended, `/proc` does not tell, or nobody reads.
    pub fn finish(self, stack: &str) -> anyhow::Result<()> {
        let meter = self.meter.ok_or_else(|| anyhow::anyhow!("ended within its warm-up"))?;
        let (workload, peer) = (self.run.workload.name(), Some(self.run.connect));
        let outcome = meter.finish(stack, workload, peer, self.counts)?;
        println!("{}", serde_json::to_string(&outcome)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::{Cli, Command};
    use clap::Parser as _;

    #[test]
    fn the_warm_up_does_not_count() {
        let words = ["peer", "run", "requests", "--connect", "[::1]:1", "--warm-up", "0.05"];
        let Command::Run(run) = Cli::parse_from(words).command else { panic!("not `run`") };
        let mut window = Window::new(&run);
        window.add_bytes(1000);
        assert!(window.tick().expect("no server"));
        std::thread::sleep(Duration::from_millis(60));
        assert!(window.tick().expect("no server"));
        window.add_bytes(1);
        assert_eq!(window.counts.bytes, 1);
        assert!(Window::new(&run).finish("x").is_err());
    }
}
