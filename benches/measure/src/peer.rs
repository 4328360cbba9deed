//! The command line that every peer of `stoq compare` has, and the lines that it prints.

use std::net::SocketAddrV6;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::json;

/// A peer's command line.
#[derive(Parser, Debug)]
pub struct Cli {
    /// What to be.
    #[command(subcommand)]
    pub command: Command,
}

/// What a peer is.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serve the perf protocol until killed.
    Serve(Serve),
    /// Run a workload against a server of the same stack and print one JSON object.
    Run(Run),
}

/// What both ends take.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Cores to run on, comma-separated: a thread for each, where the stack can use them.
    #[arg(long = "core", value_delimiter = ',')]
    pub cores: Vec<usize>,
    /// Largest UDP payload, bytes.
    #[arg(long, default_value_t = 1452)]
    pub udp_payload: u16,
    /// Wrap TCP in TLS 1.3 (TCP peers only).
    #[arg(long)]
    pub tls: bool,
    /// Leave its records to the kernel (kernel TLS) after the handshake.
    #[arg(long, requires = "tls")]
    pub ktls: bool,
}

/// A server.
#[derive(Args, Clone, Debug)]
pub struct Serve {
    /// Address and port.
    #[arg(long)]
    pub listen: SocketAddrV6,
    /// What both ends take.
    #[command(flatten)]
    pub common: Common,
}

/// A client.
#[derive(Args, Clone, Debug)]
pub struct Run {
    /// What to do.
    pub workload: Workload,
    /// The server.
    #[arg(long)]
    pub connect: SocketAddrV6,
    /// How long to measure, seconds.
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Traffic before the clock starts, seconds.
    #[arg(long, default_value_t = 0.5)]
    pub warm_up: f64,
    /// Bytes of a request and of its answer, or of a datagram.
    #[arg(long, default_value_t = 64)]
    pub size: usize,
    /// Requests or handshakes under way.
    #[arg(long, default_value_t = 1)]
    pub outstanding: usize,
    /// Connections: of bulk and requests where the stack can hold several, and of `idle`.
    #[arg(long, default_value_t = 1)]
    pub connections: usize,
    /// The server's process on this machine.
    #[arg(long)]
    pub server_pid: Option<u32>,
    /// What both ends take.
    #[command(flatten)]
    pub common: Common,
}

/// What to measure.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Workload {
    /// Bulk from client to server.
    Upload,
    /// Bulk from server to client.
    Download,
    /// Bulk both ways at once.
    Bidi,
    /// Requests and answers.
    Requests,
    /// Full handshakes.
    Handshakes,
    /// Handshakes resumed with a ticket.
    HandshakesResumed,
    /// Unreliable datagrams.
    Datagrams,
    /// Connections that do nothing.
    Idle,
}

impl Workload {
    /// Its name on the command line and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Download => "download",
            Self::Bidi => "bidi",
            Self::Requests => "requests",
            Self::Handshakes => "handshakes",
            Self::HandshakesResumed => "handshakes-resumed",
            Self::Datagrams => "datagrams",
            Self::Idle => "idle",
        }
    }

    /// Whether connections are made and closed one after another.
    #[must_use]
    pub const fn is_handshakes(self) -> bool {
        matches!(self, Self::Handshakes | Self::HandshakesResumed)
    }

    /// Whether the client sends without end.
    #[must_use]
    pub const fn sends(self) -> bool {
        matches!(self, Self::Upload | Self::Bidi)
    }

    /// Whether the server sends without end.
    #[must_use]
    pub const fn receives(self) -> bool {
        matches!(self, Self::Download | Self::Bidi)
    }
}

impl Common {
    /// Pins this process's threads to the cores asked for.
    ///
    /// # Errors
    /// A core is not this process's to use.
    pub fn pin(&self) -> anyhow::Result<()> {
        if self.cores.is_empty() {
            return Ok(());
        }
        let allowed = rustix::thread::sched_getaffinity(None)?;
        let mut set = rustix::thread::CpuSet::new();
        for core in &self.cores {
            let is_ours = *core < rustix::thread::CpuSet::MAX_CPU && allowed.is_set(*core);
            anyhow::ensure!(is_ours, "core {core} cannot be used by this process");
            set.set(*core);
        }
        Ok(rustix::thread::sched_setaffinity(None, &set)?)
    }

    /// Threads that a stack which can use several should run.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.cores.len().max(1)
    }
}

/// Tells that the server is ready, and with which settings.
pub fn announce(stack: &str, addr: impl std::fmt::Display, settings: &str) {
    let line = json!({
        "event": "listening", "stack": stack, "addr": addr.to_string(), "settings": settings,
    });
    println!("{line}");
}

/// Tells that this stack cannot run this workload; the client then ends with success.
pub fn unsupported(stack: &str, workload: Workload, why: &str) {
    let line = json!({
        "event": "unsupported", "stack": stack, "workload": workload.name(), "why": why,
    });
    println!("{line}");
}

/// Ends this process when its parent ends.
///
/// # Errors
/// prctl refuses.
pub fn tie_to_parent() -> anyhow::Result<()> {
    let signal = rustix::process::Signal::TERM;
    Ok(rustix::process::set_parent_process_death_signal(Some(signal))?)
}
