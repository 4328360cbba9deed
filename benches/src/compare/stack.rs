//! Who is compared, and how each is started.

use std::net::SocketAddrV6;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use stoq_measure::peer::Workload;

use super::workload::{Sides, Task, What};

/// A stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// Its name in tables.
    pub name: String,
    /// Its program.
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// STOQ over a datapath.
    Stoq { datapath: &'static str },
    /// A peer program.
    Peer { program: PathBuf, row: PeerRow },
}

/// A peer that can be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerRow {
    /// Its name in tables.
    pub name: &'static str,
    /// Its program.
    program: &'static str,
    /// What makes the program this peer.
    flags: &'static [&'static str],
    /// The feature of stoq-peers that builds it; none: always built.
    feature: &'static str,
    /// Whether a process of it spreads its connections over several cores.
    spreads: bool,
}

const fn quic(name: &'static str, program: &'static str, spreads: bool) -> PeerRow {
    PeerRow { name, program, flags: &[], feature: name, spreads }
}

const fn tcp(name: &'static str, flags: &'static [&'static str]) -> PeerRow {
    PeerRow { name, program: "peer-tcp", flags, feature: "", spreads: true }
}

/// Every peer.
pub const PEERS: &[PeerRow] = &[
    quic("quinn", "peer-quinn", true),
    quic("noq", "peer-noq", true),
    quic("s2n-quic", "peer-s2n-quic", true),
    quic("quiche", "peer-quiche", false),
    quic("tquic", "peer-tquic", false),
    tcp("tls", &["--tls"]),
    tcp("tcp-ktls", &["--tls", "--ktls"]),
    tcp("tcp", &[]),
];
/// Stacks that are asked for and cannot be peers: name and reason.
pub const LEFT_OUT: &[(&str, &str)] = &[(
    "msquic",
    "its Rust interface sends by unsafe calls only, which this workspace keeps to the engine",
)];
/// STOQ's datapaths.
pub const DATAPATHS: &[&str] = &["io_uring", "socket", "af_xdp"];

/// Where and how one end runs.
#[derive(Debug, Clone)]
pub struct Place {
    /// The cores.
    pub cores: Vec<usize>,
    /// The interface, for AF_XDP.
    pub interface: Option<String>,
    /// Largest UDP payload; 0: what the stack does by itself.
    pub udp_payload: u16,
}

impl Stack {
    /// STOQ over `datapath`, one of [`DATAPATHS`].
    ///
    /// # Errors
    /// There is no such datapath.
    pub fn stoq(datapath: &str) -> anyhow::Result<Self> {
        let datapath = DATAPATHS
            .iter()
            .find(|known| **known == datapath)
            .with_context(|| format!("--datapaths: `{datapath}`; known: {DATAPATHS:?}"))?;
        Ok(Self { name: format!("stoq {datapath}"), kind: Kind::Stoq { datapath } })
    }

    /// The peer of this name, or why it is not there.
    ///
    /// # Errors
    /// The name is not one of [`PEERS`].
    pub fn peer(name: &str, directory: &Path) -> anyhow::Result<Result<Self, String>> {
        if let Some((_, why)) = LEFT_OUT.iter().find(|left_out| left_out.0 == name) {
            return Ok(Err(format!("{name}: {why}")));
        }
        let known = || PEERS.iter().map(|peer| peer.name).collect::<Vec<_>>().join(", ");
        let row = *PEERS
            .iter()
            .find(|peer| peer.name == name)
            .with_context(|| format!("--peers: `{name}`; known: {}", known()))?;
        let program = directory.join(row.program);
        if !program.is_file() {
            let features = match row.feature {
                "" => String::new(),
                feature => format!(" --features {feature}"),
            };
            return Ok(Err(format!(
                "{name}: {} is not built: cargo build --release -p stoq-peers{features}",
                program.display()
            )));
        }
        Ok(Ok(Self { name: row.name.to_owned(), kind: Kind::Peer { program, row } }))
    }

    /// Why it cannot run a workload at all, where that is known without asking its program.
    #[must_use]
    pub fn refuses(&self, task: &Task) -> Option<&'static str> {
        let Kind::Peer { row, .. } = &self.kind else { return None };
        if task.what == What::Raw {
            return Some("raw is what STOQ's own datapaths carry with no QUIC");
        }
        let is_spread = task.sides == Sides::Two;
        if is_spread && !row.spreads {
            return Some("one loop in one thread has no use for a second core");
        }
        let is_requests = task.what == What::Perf(Workload::Requests);
        if is_spread && is_requests && row.program == "peer-tcp" {
            return Some("its requests go over one connection, in one thread");
        }
        None
    }

    /// Whether it is STOQ.
    #[must_use]
    pub fn is_stoq(&self) -> bool {
        matches!(self.kind, Kind::Stoq { .. })
    }

    /// Whether packets go one by one through the device, which must complete their checksums.
    #[must_use]
    pub fn is_af_xdp(&self) -> bool {
        self.kind == Kind::Stoq { datapath: "af_xdp" }
    }

    /// The server's command.
    pub fn server(
        &self,
        task: &Task,
        listen: SocketAddrV6,
        place: &Place,
    ) -> anyhow::Result<Command> {
        let mut command = match &self.kind {
            Kind::Stoq { datapath } => {
                let mut command = stoq()?;
                match task.what {
                    What::Raw => command.args(["perf", "raw", "--receive"]),
                    What::Perf(_) => command.arg("serve"),
                };
                stoq_flags(&mut command, datapath, place);
                command
            }
            Kind::Peer { program, row } => {
                let mut command = Command::new(program);
                command.arg("serve");
                peer_flags(&mut command, row, place);
                command
            }
        };
        command.args(["--listen", &listen.to_string()]);
        Ok(command)
    }

    /// The client's command.
    pub fn client(
        &self,
        task: &Task,
        connect: SocketAddrV6,
        server_pid: Option<u32>,
        place: &Place,
    ) -> anyhow::Result<Command> {
        let (connect, seconds) = (connect.to_string(), task.seconds.to_string());
        let mut command = match (&self.kind, task.what) {
            (Kind::Stoq { datapath }, What::Raw) => {
                let mut command = stoq()?;
                command.args(["perf", "raw", "--peer", &connect, "--seconds", &seconds]);
                stoq_flags(&mut command, datapath, place);
                if place.udp_payload > 0 {
                    command.args(["--payload", &place.udp_payload.to_string()]);
                }
                return Ok(command);
            }
            (Kind::Stoq { datapath }, What::Perf(workload)) => {
                let mut command = stoq()?;
                command.args(["perf", stoq_workload(workload), "--danger-insecure"]);
                match workload {
                    Workload::HandshakesResumed => command.arg("--resumed"),
                    Workload::Idle => {
                        command.args(["--rate", IDLE_HANDSHAKES_PER_S, "--requests-percent", "0"])
                    }
                    _ => &mut command,
                };
                stoq_flags(&mut command, datapath, place);
                command
            }
            (Kind::Peer { program, row }, What::Perf(workload)) => {
                let mut command = Command::new(program);
                command.args(["run", workload.name()]);
                peer_flags(&mut command, row, place);
                command
            }
            (Kind::Peer { .. }, What::Raw) => {
                anyhow::bail!("{} has no datapath of ours", self.name)
            }
        };
        command.args(["--connect", &connect, "--seconds", &seconds]);
        if task.what != What::Perf(Workload::Idle) {
            command.args(["--warm-up", &task.warm_up.to_string()]);
        }
        command.args(task.flags());
        if let Some(pid) = server_pid {
            command.args(["--server-pid", &pid.to_string()]);
        }
        Ok(command)
    }
}

/// The rate at which `idle` makes STOQ's connections; peers make theirs one after another.
const IDLE_HANDSHAKES_PER_S: &str = "2000";

/// The subcommand of `stoq perf`.
fn stoq_workload(workload: Workload) -> &'static str {
    match workload {
        Workload::HandshakesResumed => Workload::Handshakes.name(),
        workload => workload.name(),
    }
}

fn stoq() -> anyhow::Result<Command> {
    Ok(Command::new(std::env::current_exe().context("finding this program")?))
}

fn list(cores: &[usize]) -> String {
    cores.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn stoq_flags(command: &mut Command, datapath: &str, place: &Place) {
    command.args(["--datapath", datapath, "--json", "--die-with-parent"]);
    command.args(["--cores", &list(&place.cores)]);
    if place.cores.len() > 1 {
        command.args(["--queues", &place.cores.len().to_string()]);
    }
    command.args(["--udp-payload", &place.udp_payload.to_string()]);
    if let Some(interface) = place.interface.as_deref().filter(|_| datapath == "af_xdp") {
        command.args(["--iface", interface]);
    }
}

fn peer_flags(command: &mut Command, row: &PeerRow, place: &Place) {
    command.args(["--core", &list(&place.cores)]);
    // By itself a peer takes the largest it can: it says which.
    let udp_payload = if place.udp_payload == 0 { u16::MAX } else { place.udp_payload };
    command.args(["--udp-payload", &udp_payload.to_string()]);
    command.args(row.flags);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let error = Stack::peer("nosuch", Path::new("/")).expect_err("unknown").to_string();
        assert!(error.contains("nosuch") && error.contains("s2n-quic"), "{error}");
        assert!(Stack::stoq("dpdk").expect_err("unknown").to_string().contains("io_uring"));
    }

    #[test]
    fn a_peer_that_is_not_built_says_how_to_build_it() {
        let quinn = Stack::peer("quinn", Path::new("/nonexistent")).expect("known");
        assert!(quinn.expect_err("not built").contains("-p stoq-peers --features quinn"));
        let msquic = Stack::peer("msquic", Path::new("/nonexistent")).expect("known");
        assert!(msquic.expect_err("left out").contains("unsafe"));
        let tcp = Stack::peer("tcp", Path::new("/nonexistent")).expect("known");
        assert!(tcp.expect_err("not built").ends_with("-p stoq-peers"));
    }

    #[test]
    fn commands_are_pinned_alike() {
        let place = Place { cores: vec![3], interface: Some("veth7".into()), udp_payload: 1452 };
        let listen = "[::1]:1".parse().expect("an address");
        let task = Task::named("download", 1.0, 0.1).expect("known");
        let words = |stack: &Stack, place: &Place| {
            crate::proc::describe(&stack.server(&task, listen, place).expect("ok"))
        };
        let stoq = |datapath| Stack::stoq(datapath).expect("known");
        let xdp = words(&stoq("af_xdp"), &place);
        assert!(xdp.contains("--cores 3 ") && xdp.contains("--iface veth7"), "{xdp}");
        let socket = words(&stoq("socket"), &place);
        assert!(!socket.contains("veth7") && !socket.contains("--queues"), "{socket}");
        let two = words(&stoq("socket"), &Place { cores: vec![3, 1], ..place.clone() });
        assert!(two.contains("--cores 3,1 --queues 2"), "{two}");
        let tls = words(&peer("tls"), &Place { cores: vec![3, 1], ..place });
        assert!(tls.contains("--core 3,1") && tls.contains("--tls"), "{tls}");
    }

    fn peer(name: &str) -> Stack {
        let row = *PEERS.iter().find(|peer| peer.name == name).expect("known");
        let kind = Kind::Peer { program: row.program.into(), row };
        Stack { name: name.into(), kind }
    }

    #[test]
    fn raw_goes_through_our_datapaths_and_no_peers() {
        let place = Place { cores: vec![0], interface: None, udp_payload: 1452 };
        let address = "[::1]:1".parse().expect("an address");
        let raw = Task::named("raw", 2.0, 0.1).expect("known");
        let stoq = Stack::stoq("socket").expect("known");
        let words =
            |command: anyhow::Result<Command>| crate::proc::describe(&command.expect("a command"));
        let server = words(stoq.server(&raw, address, &place));
        assert!(server.contains("perf raw --receive") && server.contains("--listen"), "{server}");
        let client = words(stoq.client(&raw, address, Some(7), &place));
        assert!(
            client.contains("--peer '[::1]:1'") || client.contains("--peer [::1]:1"),
            "{client}"
        );
        assert!(client.contains("--payload 1452") && !client.contains("--server-pid"), "{client}");
        assert_eq!(stoq.refuses(&raw), None);
        assert!(peer("quinn").refuses(&raw).is_some_and(|why| why.contains("datapath")));
    }

    #[test]
    fn a_second_core_goes_to_those_who_can_use_it() {
        let two = Task::named("bulk-2+2", 1.0, 0.1).expect("known");
        assert_eq!(peer("quinn").refuses(&two), None);
        assert!(peer("quiche").refuses(&two).is_some());
        let control = Task::named("bulk-2x1+1", 1.0, 0.1).expect("known");
        assert_eq!(peer("quiche").refuses(&control), None);
        let requests = Task::named("requests-64-2+2", 1.0, 0.1).expect("known");
        assert!(peer("tcp").refuses(&requests).is_some());
        assert_eq!(peer("s2n-quic").refuses(&requests), None);
    }

    #[test]
    fn resumption_and_idleness_in_each_ones_words() {
        let place = Place { cores: vec![0], interface: None, udp_payload: 1452 };
        let address = "[::1]:1".parse().expect("an address");
        let words = |stack: &Stack, name: &str| {
            let task = Task::named(name, 2.0, 0.1).expect("known");
            crate::proc::describe(&stack.client(&task, address, Some(7), &place).expect("ok"))
        };
        let stoq = Stack::stoq("io_uring").expect("known");
        let resumed = words(&stoq, "handshakes-resumed");
        assert!(resumed.contains("perf handshakes ") && resumed.contains("--resumed"), "{resumed}");
        assert!(words(&peer("quinn"), "handshakes-resumed").contains("run handshakes-resumed"));
        let idle = words(&stoq, "idle");
        assert!(idle.contains("--connections 1000") && !idle.contains("--warm-up"), "{idle}");
        assert!(idle.contains("--server-pid 7"), "{idle}");
    }
}
