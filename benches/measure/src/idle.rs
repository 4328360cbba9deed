//! What connections cost that do nothing: the server's memory before and with them, and both ends'
//! CPU time while they are held.

use crate::cpu::rss_bytes;
use crate::outcome::{Counts, Meter, Outcome};
use crate::peer::Run;

/// The key of a report that tells the server's resident bytes for each connection.
pub const BYTES_PER_CONNECTION: &str = "server_rss_bytes_per_connection";

/// Before the first connection.
#[derive(Debug)]
pub struct Idle {
    run: Run,
    server_before_bytes: Option<u64>,
}

/// While the connections are held.
#[derive(Debug)]
pub struct Holding {
    idle: Idle,
    meter: Meter,
}

impl Idle {
    /// Looks at the server, which nobody has connected to yet.
    ///
    /// # Errors
    /// `/proc` does not tell: the server has ended.
    pub fn before(run: &Run) -> anyhow::Result<Self> {
        let server_before_bytes = run.server_pid.map(|pid| rss_bytes(Some(pid))).transpose()?;
        Ok(Self { run: run.clone(), server_before_bytes })
    }

    /// All connections are there: the clock starts.
    ///
    /// # Errors
    /// As for [`Idle::before`].
    pub fn hold(self) -> anyhow::Result<Holding> {
        let meter = Meter::start(self.run.server_pid)?;
        Ok(Holding { idle: self, meter })
    }
}

impl Holding {
    /// Whether they have been held for long enough.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.meter.seconds() >= self.idle.run.seconds
    }

    /// Stops the clock and prints the report.
    ///
    /// # Errors
    /// `/proc` does not tell, or nobody reads.
    pub fn finish(self, stack: &str) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string(&self.outcome(stack)?)?);
        Ok(())
    }

    fn outcome(self, stack: &str) -> anyhow::Result<Outcome> {
        let run = self.idle.run;
        let mut counts = Counts { ops: run.connections as u64, ..Counts::default() };
        counts.more.insert("connections".into(), run.connections.into());
        let workload = run.workload.name();
        let mut outcome = self.meter.finish(stack, workload, Some(run.connect), counts)?;
        let held = outcome.server.zip(self.idle.server_before_bytes);
        if let Some((server, before)) = held {
            let more = server.rss_bytes.saturating_sub(before) / run.connections.max(1) as u64;
            outcome.more.insert(BYTES_PER_CONNECTION.into(), more.into());
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::{Cli, Command};
    use clap::Parser as _;

    #[test]
    fn the_memory_between_before_and_after_is_the_connections() {
        let own = std::process::id().to_string();
        let words = ["peer", "run", "idle", "--connect", "[::1]:1", "--connections", "4"];
        let words = words.into_iter().chain(["--seconds", "0.01", "--server-pid", &own]);
        let Command::Run(run) = Cli::parse_from(words).command else { panic!("not `run`") };
        let idle = Idle::before(&run).expect("this process lives");
        let held: Vec<Vec<u8>> = (0..4).map(|_| vec![1; 4 << 20]).collect();
        let holding = idle.hold().expect("this process lives");
        while !holding.is_over() {
            std::thread::yield_now();
        }
        let outcome = holding.outcome("x").expect("this process lives");
        let bytes = outcome.more[BYTES_PER_CONNECTION].as_u64().expect("a number");
        // Other tests of this process come and go meanwhile.
        assert!(bytes > 2 << 20, "{bytes} for each of four times 4 MiB");
        assert_eq!((outcome.ops, outcome.bytes, held.len()), (4, 0, 4));
    }
}
