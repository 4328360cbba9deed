//! `stoq-peer`: hq-interop clients and servers on other people's QUIC stacks, over kernel sockets.
//!
//! Thin on purpose: what speaks here is s2n-quic and quiche, not us.

mod quiche_peer;
mod s2n_peer;

use std::net::SocketAddrV6;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Whose QUIC.
#[derive(Clone, Copy, ValueEnum)]
enum Stack {
    S2n,
    Quiche,
}

/// hq-interop over independent QUIC stacks.
#[derive(Parser)]
struct Cli {
    /// The QUIC implementation.
    stack: Stack,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch files into a directory.
    Get(Get),
    /// Serve the files of a directory until killed; prints `listening` when ready.
    Serve(Serve),
}

#[derive(Args)]
struct Get {
    /// The server.
    #[arg(long)]
    connect: SocketAddrV6,
    /// Name that its certificate must show.
    #[arg(long, default_value = "localhost")]
    server_name: String,
    /// Certificates to trust (PEM).
    #[arg(long)]
    ca: PathBuf,
    /// Where the files go.
    #[arg(long)]
    out: PathBuf,
    /// Paths to fetch, each on a stream of its own.
    #[arg(required = true)]
    paths: Vec<String>,
}

#[derive(Args)]
struct Serve {
    /// Address and port.
    #[arg(long)]
    listen: SocketAddrV6,
    /// Certificate chain (PEM).
    #[arg(long)]
    cert: PathBuf,
    /// Private key (PEM).
    #[arg(long)]
    key: PathBuf,
    /// The files.
    #[arg(long)]
    www: PathBuf,
}

/// The protocol, RFC 7301's form.
const ALPN: &str = "hq-interop";

/// The path of a request line.
fn requested(request: &[u8]) -> Option<&str> {
    std::str::from_utf8(request).ok()?.trim_end().strip_prefix("GET /")
}

/// Where a fetched path is stored.
fn destination(out: &std::path::Path, path: &str) -> PathBuf {
    out.join(path.rsplit('/').next().unwrap_or("index"))
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match (cli.stack, cli.command) {
        (Stack::S2n, Command::Get(get)) => s2n_peer::get(&get),
        (Stack::S2n, Command::Serve(serve)) => s2n_peer::serve(&serve),
        (Stack::Quiche, Command::Get(get)) => quiche_peer::get(&get),
        (Stack::Quiche, Command::Serve(serve)) => quiche_peer::serve(&serve),
    }
}
