//! Two network namespaces joined by a veth pair: the wire of the demo and of the
//! tests of its commands.
//!
//! The client's end is `a`, the server's is `b`. Both links are made inside
//! their namespaces and never appear in the machine's own. A [`VethPair`] owns
//! the namespaces and removes them when it is dropped; what a SIGKILL leaves
//! behind carries the process ID in its name and is removed by
//! [`remove_stale`] at the next start.

use std::net::Ipv6Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::proc;

/// Prefix of the pair's addresses: a unique local one (RFC 4193), never routed.
const PREFIX_LENGTH: u8 = 64;
/// The client's address.
const ADDRESS_A: Ipv6Addr = Ipv6Addr::new(0xfd53, 0x746f, 0x71, 0, 0, 0, 0, 0xa);
/// The server's address.
const ADDRESS_B: Ipv6Addr = Ipv6Addr::new(0xfd53, 0x746f, 0x71, 0, 0, 0, 0, 0xb);

/// The smallest MTU that IPv6 allows (RFC 8200 §5).
pub(crate) const MTU_MIN: u32 = 1280;
/// The largest MTU of a veth link.
pub(crate) const MTU_MAX: u32 = 65535;

/// How long the kernel may take to see a new link's carrier; its link watch acts once a second.
const CARRIER_LIMIT: Duration = Duration::from_secs(10);
/// How often to look whether it has.
const CARRIER_POLL: Duration = Duration::from_millis(20);

/// One end of the pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    /// Network namespace.
    pub(crate) netns: String,
    /// Interface within it.
    pub(crate) interface: String,
    /// Its address.
    pub(crate) address: Ipv6Addr,
}

impl End {
    /// A command that runs inside the namespace, with its own view of `/sys`.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = ip();
        command.args(["netns", "exec", &self.netns]).arg(program);
        command
    }

    /// What `ip` says about the link, XDP program included.
    pub(crate) fn link_details(&self) -> Result<String> {
        proc::output(ip().args(["-n", &self.netns, "-d", "link", "show", "dev", &self.interface]))
    }

    /// Whether an XDP program is attached to the link.
    pub(crate) fn has_xdp(&self) -> Result<bool> {
        Ok(self.link_details()?.contains("prog/xdp"))
    }

    /// The namespace's kernel UDP counters.
    pub(crate) fn udp_counters(&self) -> Result<UdpCounters> {
        UdpCounters::parse(&proc::output(self.command("cat").arg("/proc/net/snmp6"))?)
    }
}

/// Properties of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PairOptions {
    /// MTU of both links, in bytes.
    pub(crate) mtu: u32,
    /// Receive and transmit queues of both links.
    pub(crate) queues: u32,
    /// Whether the kernel may leave UDP checksums to the device. AF_XDP at the
    /// other end needs complete ones.
    pub(crate) tx_checksum_offload: bool,
}

/// Two namespaces and the pair between them; removed when dropped.
#[derive(Debug)]
pub(crate) struct VethPair {
    /// The client's end.
    pub(crate) client: End,
    /// The server's end.
    pub(crate) server: End,
    keep: bool,
}

impl VethPair {
    /// The ends that a pair of this name has, made or not.
    pub(crate) fn ends(name: &str) -> (End, End) {
        let end = |side: char, address| End {
            netns: format!("stoq-{name}-{side}"),
            interface: format!("stoq{side}"),
            address,
        };
        (end('a', ADDRESS_A), end('b', ADDRESS_B))
    }

    /// Makes the pair. What was made before an error is removed again.
    ///
    /// # Errors
    /// When a namespace of that name exists, or `ip` or `ethtool` refuse.
    pub(crate) fn create(name: &str, options: PairOptions) -> Result<Self> {
        let (client, server) = Self::ends(name);
        let existing = list()?;
        for end in [&client, &server] {
            if existing.contains(&end.netns) {
                bail!("the network namespace {} exists already", end.netns);
            }
        }
        let pair = Self { client, server, keep: false };
        for end in [&pair.client, &pair.server] {
            proc::output(ip().args(["netns", "add", &end.netns]))
                .context("cannot make a network namespace")?;
        }
        pair.add_links(options).context("cannot make the veth pair")?;
        for end in [&pair.client, &pair.server] {
            configure(end, options)
                .with_context(|| format!("cannot configure {} in {}", end.interface, end.netns))?;
        }
        for end in [&pair.client, &pair.server] {
            wait_until_up(end)?;
        }
        Ok(pair)
    }

    /// Leaves the pair in place when this value is dropped.
    pub(crate) fn keep(mut self) {
        self.keep = true;
    }

    /// Removes both namespaces, and with them the links.
    pub(crate) fn remove(name: &str) -> Result<()> {
        let (client, server) = Self::ends(name);
        remove_namespaces(&[&client.netns, &server.netns])
    }

    fn add_links(&self, options: PairOptions) -> Result<()> {
        let queues = options.queues.to_string();
        let channels = ["numrxqueues", &queues, "numtxqueues", &queues];
        let mut command = ip();
        command.args(["-n", &self.client.netns, "link", "add", "name", &self.client.interface]);
        command.args(channels).args(["type", "veth", "peer", "name", &self.server.interface]);
        command.args(channels).args(["netns", &self.server.netns]);
        proc::output(&mut command)?;
        Ok(())
    }
}

impl Drop for VethPair {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = remove_namespaces(&[&self.client.netns, &self.server.netns]) {
            eprintln!("warning: cannot clean up: {error:#}");
        }
    }
}

fn ip() -> Command {
    // Root's PATH under sudo may lack the sbin directories.
    Command::new(proc::find_program("ip").unwrap_or_else(|| "ip".into()))
}

fn configure(end: &End, options: PairOptions) -> Result<()> {
    // Containers often switch IPv6 off by default for new namespaces. Nobody else is on this
    // link, so no address waits for duplicate address detection.
    let enable = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6 \
                  /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 > $f || exit 1; done";
    proc::output(end.command("sh").args(["-c", enable])).context("cannot enable IPv6")?;
    let mtu = options.mtu.to_string();
    let address = format!("{}/{PREFIX_LENGTH}", end.address);
    let (netns, interface) = (end.netns.as_str(), end.interface.as_str());
    let steps: [&[&str]; 4] = [
        &["link", "set", "dev", "lo", "up"],
        &["link", "set", "dev", interface, "mtu", &mtu],
        &["addr", "add", &address, "dev", interface, "nodad"],
        &["link", "set", "dev", interface, "up"],
    ];
    for step in steps {
        proc::output(ip().args(["-n", netns]).args(step))?;
    }
    if !options.tx_checksum_offload {
        let ethtool = proc::find_program("ethtool").context("ethtool is not installed")?;
        proc::output(end.command(ethtool).args(["-K", interface, "tx", "off"]))
            .context("cannot switch checksum offload off")?;
    }
    Ok(())
}

/// Names of all namespaces that `ip netns` knows.
pub(crate) fn list() -> Result<Vec<String>> {
    let text = proc::output(ip().args(["netns", "list"])).context("cannot list the namespaces")?;
    Ok(text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

fn remove_namespaces(names: &[&str]) -> Result<()> {
    let existing = list()?;
    let mut failure = None;
    for name in names {
        if existing.iter().any(|each| each == name)
            && let Err(error) = proc::output(ip().args(["netns", "del", name]))
        {
            failure = Some(error);
        }
    }
    failure.map_or(Ok(()), |error| Err(error.context("cannot remove a network namespace")))
}

/// Removes the namespaces of demo processes that no longer live; returns their names.
pub(crate) fn remove_stale() -> Result<Vec<String>> {
    let stale: Vec<String> =
        list()?.into_iter().filter(|name| owner(name).is_some_and(|pid| !is_xtask(pid))).collect();
    remove_namespaces(&stale.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(stale)
}

/// The process ID in a namespace's name, if it is one of the demo's: `stoq-PID-a`, or
/// `stoq-NUMBER-PID-a` for a process's further pairs.
fn owner(name: &str) -> Option<u32> {
    let middle = name.strip_prefix("stoq-")?;
    let middle = middle.strip_suffix("-a").or_else(|| middle.strip_suffix("-b"))?;
    match middle.split_once('-') {
        Some((number, pid)) => number.parse::<u32>().ok().and_then(|_| pid.parse().ok()),
        None => middle.parse().ok(),
    }
}

/// Whether the process lives and is one of these commands or `stoq compare`, which makes its pairs
/// with this file, too (IDs are used again).
pub(crate) fn is_xtask(pid: u32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("xtask") || name.starts_with("stoq")
    })
}

/// Waits until the kernel has seen the carrier, for which it takes up to a second: until then
/// the interface answers no neighbour solicitation, and the first packet of a connection would
/// wait for the next one.
fn wait_until_up(end: &End) -> Result<()> {
    let deadline = Instant::now() + CARRIER_LIMIT;
    loop {
        let shown = proc::output(ip().args(["-n", &end.netns, "link", "show", &end.interface]))?;
        if shown.contains("state UP") {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{} in {} does not come up: {}", end.interface, end.netns, shown.trim());
        }
        std::thread::sleep(CARRIER_POLL);
    }
}

/// Switches NAPI of an interface to a kernel thread of its own, through the
/// `/sys` that a process in its namespace sees. Works only once XDP is attached.
///
/// # Errors
/// While the driver refuses; the caller tries again.
pub(crate) fn enable_threaded_napi(pid: u32, interface: &str) -> std::io::Result<()> {
    let path = format!("/proc/{pid}/root/sys/class/net/{interface}/threaded");
    if std::fs::read_to_string(Path::new(&path))?.trim() == "1" {
        return Ok(());
    }
    std::fs::write(path, "1")
}

/// The kernel's own UDP counters: what took the socket instead of the rings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct UdpCounters {
    /// `Udp6InDatagrams`: delivered to sockets.
    pub(crate) in_datagrams: u64,
    /// `Udp6OutDatagrams`: sent by sockets.
    pub(crate) out_datagrams: u64,
    /// `Udp6RcvbufErrors`: dropped because a socket's buffer was full.
    pub(crate) receive_buffer_errors: u64,
}

impl UdpCounters {
    /// Reads `/proc/net/snmp6`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let value = |name: &str| -> Result<u64> {
            text.lines()
                .filter_map(|line| line.split_once(char::is_whitespace))
                .find(|(key, _)| *key == name)
                .with_context(|| format!("/proc/net/snmp6 has no {name}"))?
                .1
                .trim()
                .parse()
                .with_context(|| format!("/proc/net/snmp6 holds no number for {name}"))
        };
        Ok(Self {
            in_datagrams: value("Udp6InDatagrams")?,
            out_datagrams: value("Udp6OutDatagrams")?,
            receive_buffer_errors: value("Udp6RcvbufErrors")?,
        })
    }

    /// What was counted since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            in_datagrams: self.in_datagrams.saturating_sub(earlier.in_datagrams),
            out_datagrams: self.out_datagrams.saturating_sub(earlier.out_datagrams),
            receive_buffer_errors: self
                .receive_buffer_errors
                .saturating_sub(earlier.receive_buffer_errors),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_with_a_process_id_have_an_owner() {
        assert_eq!(owner("stoq-4194304-a"), Some(4_194_304));
        assert_eq!(owner("stoq-17-b"), Some(17));
        assert_eq!(owner("stoq-1-17-b"), Some(17));
        let others =
            ["stoq-play-a", "stoq-17", "stoq-17-c", "other-17-a", "stoq--a", "stoq-x-17-a"];
        for other in others {
            assert_eq!(owner(other), None, "{other}");
        }
    }

    #[test]
    fn a_dead_or_foreign_process_is_not_ours() {
        assert!(is_xtask(std::process::id()));
        assert!(!is_xtask(1));
        assert!(!is_xtask(u32::MAX));
    }

    #[test]
    fn names_fit_into_an_interface_name() {
        let (client, server) = VethPair::ends("4194304");
        assert_eq!(client.netns, "stoq-4194304-a");
        assert_eq!(server.address.to_string(), "fd53:746f:71::b");
        assert!(client.interface.len() < 16 && server.interface.len() < 16);
    }

    #[test]
    fn udp_counters() {
        let text = "Udp6InDatagrams \t 12\nUdp6OutDatagrams 7\nUdp6RcvbufErrors 1\n";
        let counters = UdpCounters::parse(text).unwrap();
        assert_eq!(counters.in_datagrams, 12);
        assert_eq!(counters.since(counters), UdpCounters::default());
        let error = UdpCounters::parse("Udp6InDatagrams x\n").unwrap_err();
        assert!(error.to_string().contains("Udp6InDatagrams"));
        assert!(UdpCounters::parse("").is_err());
    }
}
