//! `cargo xtask setup`: everything that the other commands need, on a fresh machine.

use anyhow::Result;

use crate::machine::{KERNEL_MIN, Machine};
use crate::terminal::{Terminal, Tone};
use crate::workspace::Workspace;
use crate::{interrupt, packages};

/// Options of `cargo xtask setup`.
#[derive(Debug, clap::Args)]
pub(crate) struct SetupArgs {
    /// Install without asking.
    #[arg(long)]
    yes: bool,
}

/// Installs what is missing and says what the machine can do.
pub(crate) fn run(args: &SetupArgs) -> Result<()> {
    interrupt::install()?;
    let mut terminal = Terminal::new(false);
    let workspace = Workspace::load()?;
    let machine = Machine::inspect()?;
    let needs = packages::test_needs(&workspace);
    terminal.heading("Needed:");
    for line in packages::explain(&needs) {
        terminal.line(&format!("  {line}"));
    }
    packages::install_missing(&mut terminal, &machine, &needs, args.yes)?;
    packages::install_optional(&mut terminal, &machine, &packages::optional_needs(), args.yes)?;
    for line in report(&machine) {
        terminal.line(&line);
    }
    let ready = terminal.paint(Tone::Good, "ready");
    terminal
        .line(&format!("{ready}: `cargo xtask demo` and `cargo xtask test` have all they need"));
    Ok(())
}

/// What the machine can do, in sentences.
pub(crate) fn report(machine: &Machine) -> Vec<String> {
    let (major, minor) = KERNEL_MIN;
    let kernel = if machine.has_xdp_frags() {
        format!("kernel {}: new enough for AF_XDP with xdp.frags", machine.kernel)
    } else {
        format!("kernel {}: AF_XDP with xdp.frags needs {major}.{minor}", machine.kernel)
    };
    let root = if machine.is_root {
        "root: XDP programs, namespaces and veth pairs are allowed"
    } else {
        "not root: no XDP, no namespaces; sockets over loopback only"
    };
    vec![kernel, root.to_owned(), format!("{} cores", machine.cores)]
}
