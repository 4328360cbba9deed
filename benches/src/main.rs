//! `stoq`: examine the machine, serve, fetch and measure with the STOQ engine.

// Modules of a binary: `pub` means "for the other modules".
#![allow(unreachable_pub)]

mod ca;
mod client;
mod compare;
mod congestion;
mod doctor;
mod engine;
mod get;
mod hq;
// The veth pair of the demo, and its way to end what it started whatever happens.
#[allow(dead_code)]
#[path = "../../xtask/src/interrupt.rs"]
mod interrupt;
#[allow(dead_code)]
#[path = "../../xtask/src/netns.rs"]
mod netns;
mod output;
mod perf;
#[allow(dead_code)]
#[path = "../../xtask/src/proc.rs"]
mod proc;
mod serve;
mod sim;
mod tls;

use clap::{Parser, Subcommand};

/// QUIC over AF_XDP, io_uring or sockets, IPv6 only.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what this machine can do, which datapath `auto` takes, and what costs speed.
    Doctor(doctor::Args),
    /// Serve files (hq-interop) and the perf protocol.
    Serve(serve::Args),
    /// Fetch files by hq-interop.
    Get(get::Args),
    /// Run a certificate authority of your own.
    Ca(ca::Args),
    /// Measure.
    Perf(perf::Args),
    /// Measure against other stacks: interleaved, pinned alike, medians.
    Compare(compare::Args),
    /// Write the figures of docs/congestion.md, from the simulator.
    Congestion(congestion::Args),
    /// Run a scenario file in virtual time.
    Sim(sim::Args),
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    output::init_logging();
    let done = |()| std::process::ExitCode::SUCCESS;
    let result = match cli.command {
        Command::Compare(args) => compare::run(&args).map(done),
        Command::Doctor(args) => doctor::run(&args).map(done),
        Command::Serve(args) => serve::run(&args).map(done),
        Command::Get(args) => get::run(&args).map(done),
        Command::Ca(args) => ca::run(&args).map(done),
        Command::Perf(args) => perf::run(args).map(done),
        Command::Congestion(args) => congestion::run(&args),
        Command::Sim(args) => sim::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("stoq: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
