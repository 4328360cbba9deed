//! `cargo xtask compare`: builds `stoq` and the peers, each with its own features, and runs
//! `stoq compare`.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::machine::Machine;
use crate::terminal::Terminal;
use crate::workspace::Workspace;
use crate::{interrupt, packages, proc};

/// Peers, and the feature of stoq-peers that builds each (none: always built).
const PEERS: [(&str, Option<&str>); 8] = [
    ("quinn", Some("quinn")),
    ("noq", Some("noq")),
    ("s2n-quic", Some("s2n-quic")),
    ("quiche", Some("quiche")),
    ("tquic", Some("tquic")),
    ("tls", None),
    ("tcp-ktls", None),
    ("tcp", None),
];

/// Peers that build a C library.
const NEED_C: [&str; 2] = ["quiche", "tquic"];

/// Options of `cargo xtask compare`.
#[derive(Debug, clap::Args)]
pub(crate) struct CompareArgs {
    /// Peers to build and run, comma-separated; `none`: STOQ alone. Default: all.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Install what building the peers needs without asking.
    #[arg(long)]
    yes: bool,
    /// Everything else goes to `stoq compare`: see its `--help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Builds and runs.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    interrupt::install()?;
    let mut terminal = Terminal::new(false);
    let workspace = Workspace::load()?;
    proc::run_visibly(workspace.cargo().args(["build", "--release", "--package", "stoq-bench"]))?;
    let wanted_peers = wanted(&args.peers)?;
    if wanted_peers.iter().any(|(peer, _)| NEED_C.contains(peer)) {
        // Without it those peers are left out, and that is said.
        let needs = packages::peer_needs();
        packages::install_optional(&mut terminal, &Machine::inspect()?, &needs, args.yes)?;
    }
    let mut built = Vec::new();
    for (peer, feature) in wanted_peers {
        match build(&workspace, feature) {
            Ok(()) => built.push(peer),
            Err(error) => {
                interrupt::check()?;
                // A C library that does not compile here must not stop the others.
                terminal.warn(&format!("{peer} is left out: {error:#}"));
            }
        }
    }
    let list = if built.is_empty() { "none".to_owned() } else { built.join(",") };
    let stoq = workspace.target.join("release/stoq");
    compare(&stoq, &list, &args.arguments)
}

fn wanted(names: &[String]) -> Result<Vec<(&'static str, Option<&'static str>)>> {
    match names {
        [] => Ok(PEERS.to_vec()),
        [none] if none == "none" => Ok(Vec::new()),
        names => names
            .iter()
            .map(|name| {
                let known = PEERS.iter().find(|peer| peer.0 == name).copied();
                known.with_context(|| {
                    let all: Vec<_> = PEERS.iter().map(|peer| peer.0).collect();
                    format!("--peers: `{name}`; known: {}", all.join(", "))
                })
            })
            .collect(),
    }
}

/// One cargo call a peer: features of one must not reach another.
fn build(workspace: &Workspace, feature: Option<&str>) -> Result<()> {
    let mut command = workspace.cargo();
    command.args(["build", "--release", "--package", "stoq-peers"]);
    if let Some(feature) = feature {
        command.args(["--features", feature]);
    }
    proc::run_visibly(&mut command)
}

/// Its output is this command's output.
fn compare(stoq: &Path, peers: &str, arguments: &[String]) -> Result<()> {
    let mut command = std::process::Command::new(stoq);
    command.args(["compare", "--peers", peers]).args(arguments);
    let mut group = proc::Group::spawn(&mut command)?;
    loop {
        if let Some(status) = group.try_wait()? {
            if status.success() {
                return Ok(());
            }
            bail!("`stoq compare` {}", proc::explain(status));
        }
        interrupt::check()?;
        std::thread::sleep(proc::POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_by_name() {
        let names = |list: &[&str]| {
            let list: Vec<String> = list.iter().map(|name| (*name).to_owned()).collect();
            wanted(&list).map(|peers| peers.iter().map(|peer| peer.0).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), PEERS.len());
        assert_eq!(names(&["tcp", "quinn"]).unwrap(), ["tcp", "quinn"]);
        assert!(names(&["none"]).unwrap().is_empty());
        assert!(names(&["nosuch"]).unwrap_err().to_string().contains("s2n-quic"));
    }

    #[test]
    fn what_is_not_ours_goes_on() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            args: CompareArgs,
        }
        let words = ["x", "--peers", "tcp,tls", "--link", "veth", "--quick"];
        let args = <Cli as clap::Parser>::parse_from(words).args;
        assert_eq!(args.peers, ["tcp", "tls"]);
        assert_eq!(args.arguments, ["--link", "veth", "--quick"]);
    }
}
