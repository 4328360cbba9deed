//! Who is compared, and how each is started.

use std::net::SocketAddrV6;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use super::workload::Task;

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
    Peer { program: PathBuf, tls: bool },
}

/// Every peer: name, program, whether under TLS, feature that builds it (none: always built).
pub const PEERS: &[(&str, &str, bool, &str)] = &[
    ("quinn", "peer-quinn", false, "quinn"),
    ("noq", "peer-noq", false, "noq"),
    ("s2n-quic", "peer-s2n-quic", false, "s2n-quic"),
    ("quiche", "peer-quiche", false, "quiche"),
    ("tquic", "peer-tquic", false, "tquic"),
    ("tls", "peer-tcp", true, ""),
    ("tcp", "peer-tcp", false, ""),
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
    /// The core.
    pub core: usize,
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
        let known = || PEERS.iter().map(|peer| peer.0).collect::<Vec<_>>().join(", ");
        let (name, program, tls, feature) = PEERS
            .iter()
            .find(|peer| peer.0 == name)
            .with_context(|| format!("--peers: `{name}`; known: {}", known()))?;
        let path = directory.join(program);
        if !path.is_file() {
            let features =
                if feature.is_empty() { String::new() } else { format!(" --features {feature}") };
            return Ok(Err(format!(
                "{name}: {} is not built: cargo build --release -p stoq-peers{features}",
                path.display()
            )));
        }
        let kind = Kind::Peer { program: path, tls: *tls };
        Ok(Ok(Self { name: (*name).to_owned(), kind }))
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
    pub fn server(&self, listen: SocketAddrV6, place: &Place) -> anyhow::Result<Command> {
        let mut command = match &self.kind {
            Kind::Stoq { datapath } => {
                let mut command = stoq()?;
                command.arg("serve");
                stoq_flags(&mut command, datapath, place);
                command
            }
            Kind::Peer { program, tls } => {
                let mut command = Command::new(program);
                command.arg("serve");
                peer_flags(&mut command, *tls, place);
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
        let mut command = match &self.kind {
            Kind::Stoq { datapath } => {
                let mut command = stoq()?;
                command.args(["perf", task.workload.name(), "--danger-insecure"]);
                stoq_flags(&mut command, datapath, place);
                command
            }
            Kind::Peer { program, tls } => {
                let mut command = Command::new(program);
                command.args(["run", task.workload.name()]);
                peer_flags(&mut command, *tls, place);
                command
            }
        };
        command.args(["--connect", &connect.to_string()]);
        command.args(["--seconds", &task.seconds.to_string()]);
        command.args(["--warm-up", &task.warm_up.to_string()]);
        command.args(task.flags());
        if let Some(pid) = server_pid {
            command.args(["--server-pid", &pid.to_string()]);
        }
        Ok(command)
    }
}

fn stoq() -> anyhow::Result<Command> {
    Ok(Command::new(std::env::current_exe().context("finding this program")?))
}

fn stoq_flags(command: &mut Command, datapath: &str, place: &Place) {
    command.args(["--datapath", datapath, "--json", "--die-with-parent"]);
    command.args(["--cores", &place.core.to_string()]);
    command.args(["--udp-payload", &place.udp_payload.to_string()]);
    if let Some(interface) = place.interface.as_deref().filter(|_| datapath == "af_xdp") {
        command.args(["--iface", interface]);
    }
}

fn peer_flags(command: &mut Command, tls: bool, place: &Place) {
    command.args(["--core", &place.core.to_string()]);
    // By itself a peer takes the largest it can: it says which.
    let udp_payload = if place.udp_payload == 0 { u16::MAX } else { place.udp_payload };
    command.args(["--udp-payload", &udp_payload.to_string()]);
    if tls {
        command.arg("--tls");
    }
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
        let place = Place { core: 3, interface: Some("veth7".into()), udp_payload: 1452 };
        let listen = "[::1]:1".parse().expect("an address");
        let words = |command: Command| crate::proc::describe(&command);
        let xdp = words(Stack::stoq("af_xdp").expect("known").server(listen, &place).expect("ok"));
        assert!(xdp.contains("--cores 3") && xdp.contains("--iface veth7"), "{xdp}");
        let socket =
            words(Stack::stoq("socket").expect("known").server(listen, &place).expect("ok"));
        assert!(!socket.contains("veth7"), "{socket}");
        let kind = Kind::Peer { program: "peer-tcp".into(), tls: true };
        let tls = Stack { name: "tls".into(), kind };
        let tls = words(tls.server(listen, &place).expect("ok"));
        assert!(tls.contains("--core 3") && tls.contains("--tls"), "{tls}");
    }
}
