//! Network namespaces and veth pairs for tests that need root.
//!
//! * Names are unique per process and call, so tests run in parallel and beside
//!   those of other checkouts.
//! * A [`Netns`] deletes its namespace when dropped, also while a test panics;
//!   the veth pairs inside go with it.
//! * Whatever cannot be set up panics with the command and its output: a test
//!   that cannot run fails, it does not skip.
//!
//! ```ignore
//! let (client, server) = (Netns::new("client"), Netns::new("server"));
//! veth((&client, "veth0"), (&server, "veth0"));
//! client.add_address("veth0", "fd00::1/64");
//! server.add_address("veth0", "fd00::2/64");
//! client.run(|| { /* sockets made here live in the client's namespace */ });
//! ```

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where iproute2 keeps its named namespaces.
const NETNS_DIR: &str = "/run/netns";

/// A network namespace of this test's own; deleted on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// A fresh namespace with `lo` up, and with duplicate address detection and
    /// router solicitation off, so that addresses are usable at once and nothing
    /// unexpected is on the wire. (A test of DAD turns it on again with
    /// [`sysctl`](Self::sysctl).)
    #[must_use]
    pub fn new(label: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // Relaxed: only uniqueness matters.
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("stoq-{}-{count}-{label}", std::process::id());
        shell("ip", &["netns", "add", &name]);
        let netns = Self { name };
        netns.ip("link set lo up");
        for conf in ["all", "default"] {
            netns.sysctl(&format!("net/ipv6/conf/{conf}/accept_dad"), "0");
            netns.sysctl(&format!("net/ipv6/conf/{conf}/router_solicitations"), "0");
        }
        netns
    }

    /// Its name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip -n NAME …` (arguments separated by blanks) and returns its output.
    pub fn ip(&self, arguments: &str) -> String {
        let mut all = vec!["-n", &self.name];
        all.extend(arguments.split_whitespace());
        shell("ip", &all)
    }

    /// Runs a command inside the namespace (arguments separated by blanks) and returns its output.
    pub fn exec(&self, command: &str) -> String {
        let mut all = vec!["netns", "exec", &self.name];
        all.extend(command.split_whitespace());
        shell("ip", &all)
    }

    /// Runs `f` on a thread inside the namespace: see [`in_netns`].
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        in_netns(&self.name, f)
    }

    /// Writes `/proc/sys/KEY` inside the namespace (`net/ipv6/conf/all/forwarding` …).
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/{key}");
        self.run(|| fs::write(&path, value))
            .unwrap_or_else(|error| panic!("cannot write {value:?} to {path}: {error}"));
    }

    /// Adds an address such as `fd00::1/64`, usable at once.
    pub fn add_address(&self, device: &str, address: &str) {
        self.ip(&format!("addr add {address} dev {device} nodad"));
    }

    /// Index of a device.
    #[must_use]
    pub fn ifindex(&self, device: &str) -> u32 {
        let line = self.ip(&format!("-o link show dev {device}"));
        let index = line.split(':').next().expect("split yields at least one part");
        index.trim().parse().unwrap_or_else(|_| panic!("no ifindex in {line:?}"))
    }

    /// MAC address of a device.
    #[must_use]
    pub fn mac(&self, device: &str) -> [u8; 6] {
        let line = self.ip(&format!("-o link show dev {device}"));
        let text = line
            .split_once("link/ether ")
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .unwrap_or_else(|| panic!("no MAC in {line:?}"));
        let mut mac = [0; 6];
        for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
            *byte = u8::from_str_radix(digits, 16).expect("ip prints hexadecimal digits");
        }
        mac
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let deleted = Command::new("ip").args(["netns", "del", &self.name]).status();
        if !matches!(&deleted, Ok(status) if status.success()) {
            // Not a panic: drop may run while another panic unwinds.
            eprintln!("cannot delete namespace {}: {deleted:?}", self.name);
        }
    }
}

/// Connects two namespaces by a veth pair and sets both ends up. One queue per
/// direction; see [`veth_with_queues`] for more.
pub fn veth(left: (&Netns, &str), right: (&Netns, &str)) {
    veth_with_queues(left, right, 1);
}

/// Connects two namespaces by a veth pair with `queues` receive and transmit
/// queues at each end, sets both ends up and waits until both have carrier.
pub fn veth_with_queues(left: (&Netns, &str), right: (&Netns, &str), queues: u32) {
    let (left_ns, left_device) = left;
    let (right_ns, right_device) = right;
    left_ns.ip(&format!(
        "link add {left_device} numrxqueues {queues} numtxqueues {queues} type veth \
         peer name {right_device} netns {} numrxqueues {queues} numtxqueues {queues}",
        right_ns.name
    ));
    left_ns.ip(&format!("link set {left_device} up"));
    right_ns.ip(&format!("link set {right_device} up"));
    for (netns, device) in [left, right] {
        wait_until("the veth has carrier", Duration::from_secs(5), || {
            netns.ip(&format!("-o link show dev {device}")).contains("state UP")
        });
    }
}

/// Runs `f` on a new thread that has entered the named namespace, and returns
/// its result. Sockets opened by `f` stay in the namespace wherever they are
/// used later; threads that `f` starts are in it too. A panic in `f` goes on here.
pub fn in_netns<T: Send>(name: &str, f: impl FnOnce() -> T + Send) -> T {
    let path = format!("{NETNS_DIR}/{name}");
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let file =
                File::open(&path).unwrap_or_else(|error| panic!("cannot open {path}: {error}"));
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .unwrap_or_else(|error| panic!("setns({path}): {error}; these tests need root"));
            f()
        });
        worker.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Polls `condition` every 5 ms.
///
/// # Panics
/// If it does not hold within `limit`.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command and returns its standard output.
///
/// # Panics
/// If it cannot be started or fails.
pub fn shell(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program} {arguments:?}: {error}"));
    assert!(
        output.status.success(),
        "{program} {} failed ({}): {}; these tests need root",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
