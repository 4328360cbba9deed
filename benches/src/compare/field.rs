//! Where a run takes place: loopback, a veth pair of its own, or a NIC towards another machine.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::process::Command;

use anyhow::Context;

use crate::netns::{End, PairOptions, VethPair};
use crate::proc;

/// The server's port.
const PORT: u16 = 4433;

/// The link of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// The loopback interface.
    Lo,
    /// A veth pair between two namespaces.
    Veth,
    /// A NIC, with `stoq serve` on another machine.
    Nic {
        /// The interface here.
        interface: String,
        /// The server there.
        connect: SocketAddrV6,
    },
}

impl LinkKind {
    /// Its name in tables.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Lo => "lo",
            Self::Veth => "veth",
            Self::Nic { interface, .. } => interface,
        }
    }
}

/// What a link shall be like.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Queues of each end.
    pub queues: u32,
    /// AF_XDP is at work: checksums must be complete.
    pub per_packet: bool,
    /// Nothing may merge or split packets on the way.
    pub wire: bool,
}

/// A link that is up.
pub enum Field {
    /// In this namespace.
    Here {
        /// The server.
        server: SocketAddrV6,
        /// The interface, for AF_XDP.
        interface: Option<String>,
    },
    /// Over a veth pair, which ends with this value.
    Pair(VethPair),
}

impl Field {
    /// Sets the link up for one run, the `index`th of those that run at the same time.
    pub fn open(kind: &LinkKind, way: &Way, index: usize) -> anyhow::Result<Self> {
        match kind {
            LinkKind::Lo => {
                let server = SocketAddrV6::new(Ipv6Addr::LOCALHOST, free_port()?, 0, 0);
                Ok(Self::Here { server, interface: None })
            }
            LinkKind::Nic { interface, connect } => {
                Ok(Self::Here { server: *connect, interface: Some(interface.clone()) })
            }
            LinkKind::Veth => {
                let options = PairOptions {
                    mtu: way.mtu,
                    queues: way.queues,
                    tx_checksum_offload: !way.per_packet,
                };
                // Who dies leaves names with its process ID, by which they are found and removed.
                let name = match index {
                    0 => std::process::id().to_string(),
                    _ => format!("{index}-{}", std::process::id()),
                };
                let pair = VethPair::create(&name, options)?;
                for end in [&pair.client, &pair.server].into_iter().filter(|_| way.wire) {
                    one_by_one(end)?;
                }
                Ok(Self::Pair(pair))
            }
        }
    }

    /// The server's address.
    #[must_use]
    pub fn server_addr(&self) -> SocketAddrV6 {
        match self {
            Self::Here { server, .. } => *server,
            Self::Pair(pair) => SocketAddrV6::new(pair.server.address, PORT, 0, 0),
        }
    }

    /// The interface of the client's end and of the server's.
    #[must_use]
    pub fn interfaces(&self) -> [Option<String>; 2] {
        match self {
            Self::Here { interface, .. } => [interface.clone(), interface.clone()],
            Self::Pair(pair) => {
                [Some(pair.client.interface.clone()), Some(pair.server.interface.clone())]
            }
        }
    }

    /// `command` where the client runs.
    #[must_use]
    pub fn client_side(&self, command: Command) -> Command {
        match self {
            Self::Here { .. } => command,
            Self::Pair(pair) => inside(&pair.client, &command),
        }
    }

    /// `command` where the server runs.
    #[must_use]
    pub fn server_side(&self, command: Command) -> Command {
        match self {
            Self::Here { .. } => command,
            Self::Pair(pair) => inside(&pair.server, &command),
        }
    }
}

/// `ip netns exec` becomes the program itself: its process ID stays the same.
fn inside(end: &End, command: &Command) -> Command {
    let mut inside = end.command(command.get_program());
    inside.args(command.get_args());
    inside
}

/// Switches off what carries many packets as one: each crosses alone, as on a wire.
fn one_by_one(end: &End) -> anyhow::Result<()> {
    let ethtool = proc::find_program("ethtool").context("--wire needs ethtool")?;
    // `gso` speaks of the kernel's software: a veth passes UDP batches whole by a feature of its own.
    for feature in ["tso", "gso", "gro", "tx-udp-segmentation"] {
        proc::output(end.command(&ethtool).args(["-K", &end.interface, feature, "off"]))
            .with_context(|| format!("cannot switch {feature} off"))?;
    }
    Ok(())
}

/// A UDP port of loopback that nobody has now.
fn free_port() -> anyhow::Result<u16> {
    let socket = std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).context("a free port")?;
    Ok(socket.local_addr()?.port())
}
