//! The server of `stoq perf idle`: one of our own, started here, or a process that runs already.
//!
//! What it costs comes from two places: its resident size from `/proc/PID/statm`, and its turn
//! times from `stoq serve` itself, which prints a `stats` line at SIGUSR1.

use std::io::{BufRead, BufReader};
use std::net::SocketAddrV6;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long the server may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// The server that is measured.
pub enum Server {
    /// Started here; ended when dropped.
    Ours {
        /// The process.
        child: Child,
        /// What it prints, line by line.
        lines: Receiver<Value>,
        /// Where it listens.
        addr: SocketAddrV6,
    },
    /// Somebody else's: its memory is known when its process is.
    Other {
        /// Where it listens.
        addr: SocketAddrV6,
        /// Its process on this machine.
        pid: Option<u32>,
    },
}

impl Server {
    /// Starts `stoq serve` with these flags and waits until it listens.
    pub fn start(flags: &[String]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        let mut child = Command::new(program)
            .args(["serve", "--json", "--die-with-parent"])
            .args(flags)
            .stdout(Stdio::piped())
            .spawn()
            .context("starting `stoq serve`")?;
        let stdout = child.stdout.take().expect("piped above");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // Ends with the pipe, that is with the server, or with whoever listens.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(value) = serde_json::from_str(&line) else { continue };
                if sender.send(value).is_err() {
                    return;
                }
            }
        });
        let any = "[::]:0".parse().expect("an address");
        let mut server = Self::Ours { child, lines, addr: any };
        let listening = server.wait_for("listening")?;
        let text = listening["addr"].as_str().context("the server named no address")?;
        let found = text.parse().with_context(|| format!("the server's address `{text}`"))?;
        if let Self::Ours { addr, .. } = &mut server {
            *addr = found;
        }
        Ok(server)
    }

    /// Where to connect.
    pub fn addr(&self) -> SocketAddrV6 {
        match self {
            Self::Ours { addr, .. } | Self::Other { addr, .. } => *addr,
        }
    }

    /// Its process, where that is known.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Ours { child, .. } => Some(child.id()),
            Self::Other { pid, .. } => *pid,
        }
    }

    /// Resident bytes of the server's process; `None` when the process is not known.
    pub fn rss_bytes(&self) -> anyhow::Result<Option<u64>> {
        self.pid().map(|pid| stoq_measure::cpu::rss_bytes(Some(pid))).transpose()
    }

    /// What `stoq serve` says of itself now; `None` for a server that was not started here.
    pub fn stats(&mut self) -> anyhow::Result<Option<Value>> {
        let Self::Ours { child, .. } = self else { return Ok(None) };
        let pid = Pid::from_child(child);
        kill_process(pid, Signal::USR1).context("SIGUSR1 to the server")?;
        self.wait_for("stats").map(Some)
    }

    fn wait_for(&mut self, event: &str) -> anyhow::Result<Value> {
        let Self::Ours { lines, .. } = self else {
            anyhow::bail!("only a server of our own tells events");
        };
        loop {
            let line = lines
                .recv_timeout(ANSWER_TIMEOUT)
                .with_context(|| format!("the server did not say `{event}`; see its log above"))?;
            if line["event"] == event {
                return Ok(line);
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Self::Ours { child, .. } = self {
            // Dead already is as good: nothing is asked of it any more.
            let _already_dead = child.kill();
            let _reaped = child.wait();
        }
    }
}
