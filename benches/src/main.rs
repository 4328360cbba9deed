//! `stoq`: examine the machine, serve, fetch and measure with the STOQ engine.

// Modules of a binary: `pub` means "for the other modules".
#![allow(unreachable_pub)]

mod ca;
mod client;
mod doctor;
mod engine;
mod get;
mod hq;
mod output;
mod perf;
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
    /// Run a scenario file in virtual time.
    Sim(sim::Args),
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    output::init_logging();
    let done = |()| std::process::ExitCode::SUCCESS;
    let result = match cli.command {
        Command::Doctor(args) => doctor::run(&args).map(done),
        Command::Serve(args) => serve::run(&args).map(done),
        Command::Get(args) => get::run(&args).map(done),
        Command::Ca(args) => ca::run(&args).map(done),
        Command::Perf(args) => perf::run(args).map(done),
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
