//! `cargo xtask veth`: a veth pair between two namespaces, to play with by hand.

use anyhow::{Result, bail};

use crate::machine::Machine;
use crate::netns::{self, End, MTU_MAX, MTU_MIN, PairOptions, VethPair};
use crate::terminal::{Terminal, Tone};
use crate::{interrupt, packages};

/// Subcommands of `cargo xtask veth`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum VethCmd {
    /// Make two namespaces and a veth pair, and print how to use them.
    Up {
        /// MTU of both links, in bytes.
        #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(i64::from(MTU_MIN)..=i64::from(MTU_MAX)))]
        mtu: u32,
        /// Receive and transmit queues of both links.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
        queues: u32,
        /// Name within the namespaces' names: `stoq-NAME-a` and `stoq-NAME-b`.
        #[arg(long, default_value = "play")]
        name: String,
        /// Install what is missing without asking.
        #[arg(long)]
        yes: bool,
    },
    /// Remove them.
    Down {
        /// Name that `up` was given.
        #[arg(long, default_value = "play")]
        name: String,
    },
    /// Show what there is: links, addresses, XDP programs.
    Status {
        /// Name that `up` was given.
        #[arg(long, default_value = "play")]
        name: String,
    },
}

/// Runs the subcommand.
pub(crate) fn run(command: &VethCmd) -> Result<()> {
    interrupt::install()?;
    let mut terminal = Terminal::new(false);
    let machine = Machine::inspect()?;
    if !machine.is_root {
        bail!("network namespaces need root: run `sudo env \"PATH=$PATH\" cargo xtask veth …`");
    }
    match command {
        VethCmd::Up { mtu, queues, name, yes } => {
            check_name(name)?;
            packages::install_missing(&mut terminal, &machine, &packages::demo_needs(), *yes)?;
            let options = PairOptions { mtu: *mtu, queues: *queues, tx_checksum_offload: false };
            let pair = VethPair::create(name, options)?;
            terminal.heading(&format!("veth pair up, MTU {mtu}, {queues} queue(s)"));
            for line in usage(&pair.client, &pair.server, name) {
                terminal.line(&line);
            }
            pair.keep();
        }
        VethCmd::Down { name } => {
            check_name(name)?;
            VethPair::remove(name)?;
            terminal.line(&format!("stoq-{name}-a and stoq-{name}-b are gone"));
        }
        VethCmd::Status { name } => {
            check_name(name)?;
            status(&mut terminal, name)?;
        }
    }
    Ok(())
}

/// A name that cannot be taken for one of the demo's, nor for an option or path.
fn check_name(name: &str) -> Result<()> {
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if name.is_empty() || name.len() > 64 || !plain {
        bail!("--name {name:?}: use 1 to 64 letters, digits, '-' and '_'");
    }
    if name.chars().all(|c| c.is_ascii_digit()) {
        bail!("--name {name}: names of digits only belong to the demo, which removes them");
    }
    Ok(())
}

fn usage(client: &End, server: &End, name: &str) -> Vec<String> {
    let enter = |end: &End| format!("sudo ip netns exec {}", end.netns);
    let listen = format!("[{}]:4433", server.address);
    vec![
        format!("  client: {} on {} in {}", client.address, client.interface, client.netns),
        format!("  server: {} on {} in {}", server.address, server.interface, server.netns),
        String::new(),
        format!("  {} ping -c 3 {}", enter(client), server.address),
        format!(
            "  {} target/release/stoq serve --listen '{listen}' --www . --alpn hq-interop,perf \
             --datapath af_xdp --iface {} --cert-out /tmp/stoq.pem",
            enter(server),
            server.interface
        ),
        format!(
            "  {} target/release/stoq perf download --connect '{listen}' --seconds 5 \
             --datapath af_xdp --iface {} --ca /tmp/stoq.pem",
            enter(client),
            client.interface
        ),
        String::new(),
        format!("  cargo xtask veth status --name {name}"),
        format!("  cargo xtask veth down --name {name}"),
    ]
}

fn status(terminal: &mut Terminal, name: &str) -> Result<()> {
    let existing = netns::list()?;
    let (client, server) = VethPair::ends(name);
    for end in [&client, &server] {
        if !existing.contains(&end.netns) {
            terminal.line(&format!("{}: not there (cargo xtask veth up)", end.netns));
            continue;
        }
        let xdp = if end.has_xdp()? {
            terminal.paint(Tone::Good, "XDP program attached")
        } else {
            terminal.paint(Tone::Dim, "no XDP program")
        };
        terminal.line(&format!("{}: {} {}: {xdp}", end.netns, end.interface, end.address));
        for line in end.link_details()?.lines() {
            terminal.line(&format!("    {line}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["play", "a-b_c", "x1"] {
            check_name(good).unwrap();
        }
        for bad in ["", "12", "a b", "../x", "a/b", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_printed_commands_name_both_ends() {
        let (client, server) = VethPair::ends("play");
        let text = usage(&client, &server, "play").join("\n");
        for word in ["stoq-play-a", "stoq-play-b", "[fd53:746f:71::b]:4433", "veth down"] {
            assert!(text.contains(word), "{word}");
        }
    }
}
