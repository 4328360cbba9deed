//! `stoq perf`: measurements, by the protocol of draft-banks-quic-performance-00 where there is QUIC.

pub mod bulk;
pub mod datagrams;
pub mod handles;
pub mod handshakes;
pub mod idle;
pub mod raw;
pub mod requests;
pub mod run;
pub mod server;

use clap::Subcommand;

/// Flags of `stoq perf`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Subcommand)]
enum Workload {
    /// Bulk from here to the server.
    Upload(bulk::Args),
    /// Bulk from the server to here.
    Download(bulk::Args),
    /// Many connections that do next to nothing: what each of them costs.
    Idle(idle::Args),
    /// Bulk both ways at once.
    Bidi(bulk::Args),
    /// Requests and answers, each on a stream of its own.
    Requests(requests::Args),
    /// Connections made, full or resumed.
    Handshakes(handshakes::Args),
    /// Unreliable datagrams.
    Datagrams(datagrams::Args),
    /// Frames through the datapath with no QUIC: the ceiling.
    Raw(raw::Args),
}

/// Runs a workload.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.workload {
        Workload::Upload(args) => bulk::run(&args, bulk::Direction::Upload),
        Workload::Download(args) => bulk::run(&args, bulk::Direction::Download),
        Workload::Idle(args) => idle::run(&args),
        Workload::Bidi(args) => bulk::run(&args, bulk::Direction::Bidi),
        Workload::Requests(args) => requests::run(&args),
        Workload::Handshakes(args) => handshakes::run(&args),
        Workload::Datagrams(args) => datagrams::run(&args),
        Workload::Raw(args) => raw::run(&args),
    }
}
