//! Developer commands of STOQ: `cargo xtask --help`.
#![deny(unsafe_code)]

mod cpu;
mod demo;
mod interrupt;
mod machine;
mod netns;
mod packages;
mod proc;
mod setup;
mod stoq_cli;
mod terminal;
mod veth;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// Developer commands of STOQ.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Debug, clap::Subcommand)]
enum Cmd {
    /// Transfer a file and bulk data between two namespaces, verify, measure, clean up.
    Demo(demo::DemoArgs),
    /// Make, remove or show a veth pair to play with by hand.
    #[command(subcommand)]
    Veth(veth::VethCmd),
    /// Install what the other commands need.
    Setup(setup::SetupArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Cmd::Demo(args) => demo::run(&args),
        Cmd::Veth(command) => veth::run(&command),
        Cmd::Setup(args) => setup::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            match error.downcast_ref::<interrupt::Interrupted>() {
                Some(interrupted) => ExitCode::from(interrupted.exit_code()),
                None => ExitCode::FAILURE,
            }
        }
    }
}
