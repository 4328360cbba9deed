//! Developer commands: `cargo xtask <command>`.

mod ebpf;

use clap::Parser;

/// Developer commands of STOQ.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Command {
    /// Builds and checks the eBPF objects.
    #[command(subcommand)]
    Ebpf(ebpf::EbpfCmd),
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Ebpf(command) => ebpf::run(command),
    }
}
