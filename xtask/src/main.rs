//! Developer commands of STOQ: `cargo xtask --help`.
#![deny(unsafe_code)]

mod bench;
mod compare;
mod cpu;
mod demo;
mod ebpf;
mod fuzz;
mod instructions;
mod interrupt;
mod machine;
mod netns;
mod packages;
mod proc;
mod profile;
mod setup;
mod stoq_cli;
mod terminal;
mod test;
mod veth;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// Developer commands of STOQ.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(clap::Subcommand)]
enum Cmd {
    /// Transfer a file and bulk data between two namespaces, verify, measure, clean up.
    Demo(demo::DemoArgs),
    /// Make, remove or show a veth pair to play with by hand.
    #[command(subcommand)]
    Veth(veth::VethCmd),
    /// Build and check the eBPF objects.
    #[command(subcommand)]
    Ebpf(ebpf::EbpfCmd),
    /// Install what the other commands need.
    Setup(setup::SetupArgs),
    /// Run all tests and checks, and count them.
    Test(test::TestArgs),
    /// What continuous integration runs: `test --yes`.
    Ci,
    /// Run the property tests for longer.
    Fuzz(fuzz::FuzzArgs),
    /// Measure bulk transfers over a veth pair.
    Bench(bench::BenchArgs),
    /// Show where both ends of a bulk transfer spend their time.
    Profile(profile::ProfileArgs),
    /// Count instructions of fixed scenarios and compare with the committed baselines.
    Instructions(instructions::InstructionsArgs),
    /// Measure STOQ against other stacks.
    Compare(compare::CompareArgs),
}

fn main() -> ExitCode {
    let done = |()| ExitCode::SUCCESS;
    let result = match Cli::parse().command {
        Cmd::Demo(args) => demo::run(&args).map(done),
        Cmd::Veth(command) => veth::run(&command).map(done),
        Cmd::Ebpf(command) => ebpf::run(command).map(done),
        Cmd::Setup(args) => setup::run(&args).map(done),
        Cmd::Test(args) => test::run(&args),
        Cmd::Ci => test::run(&test::TestArgs::ci()),
        Cmd::Fuzz(args) => fuzz::run(&args).map(done),
        Cmd::Bench(args) => bench::run(&args).map(done),
        Cmd::Profile(args) => profile::run(&args).map(done),
        Cmd::Instructions(args) => instructions::run(&args).map(done),
        Cmd::Compare(args) => compare::run(&args).map(done),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            match error.downcast_ref::<interrupt::Interrupted>() {
                Some(interrupted) => ExitCode::from(interrupted.exit_code()),
                None => ExitCode::FAILURE,
            }
        }
    }
}
