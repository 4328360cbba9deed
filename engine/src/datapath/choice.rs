//! Which datapath a shard uses, decided from facts, with the reason in words.
//!
//! The best path wins, not the most exotic: AF_XDP where a physical NIC gives it
//! native mode; io_uring with segmentation offload elsewhere, because a GSO
//! batch crosses a virtual device in one piece and no per-packet path matches
//! that; plain sockets where io_uring is forbidden.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::DatapathKind;

/// What the configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatapathChoice {
    /// The best that this machine has.
    #[default]
    Auto,
    /// AF_XDP rings.
    AfXdp,
    /// io_uring over a kernel UDP socket.
    IoUring,
    /// `recvmmsg`/`sendmmsg` over a kernel UDP socket.
    Socket,
}

impl DatapathChoice {
    /// Every choice, in the order of preference.
    pub const ALL: [Self; 4] = [Self::Auto, Self::AfXdp, Self::IoUring, Self::Socket];

    /// The name used in configurations and on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::AfXdp => DatapathKind::AfXdp.name(),
            Self::IoUring => DatapathKind::IoUring.name(),
            Self::Socket => DatapathKind::Socket.name(),
        }
    }

    /// The kind asked for; `None` for `Auto`.
    #[must_use]
    pub const fn kind(self) -> Option<DatapathKind> {
        match self {
            Self::Auto => None,
            Self::AfXdp => Some(DatapathKind::AfXdp),
            Self::IoUring => Some(DatapathKind::IoUring),
            Self::Socket => Some(DatapathKind::Socket),
        }
    }
}

impl fmt::Display for DatapathChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A datapath name that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no datapath: use auto, af_xdp, io_uring or socket")]
pub struct UnknownDatapath(pub String);

impl FromStr for DatapathChoice {
    type Err = UnknownDatapath;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wanted = text.trim().to_ascii_lowercase().replace('-', "_");
        Self::ALL
            .into_iter()
            .find(|choice| choice.name() == wanted)
            .ok_or_else(|| UnknownDatapath(text.to_owned()))
    }
}

/// What kind of device an interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceClass {
    /// A device on a bus: a NIC, or the paravirtual NIC of a virtual machine.
    Physical,
    /// `lo`.
    Loopback,
    /// veth, bridge, bond, VLAN, tunnel …: made of software.
    Virtual,
}

/// How far AF_XDP goes on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum XdpSupport {
    /// The driver has none: SKB (generic) mode, slower than a socket.
    Generic,
    /// Native XDP; AF_XDP copies each packet once.
    NativeCopy,
    /// Native XDP; the NIC reads and writes the UMEM itself.
    ZeroCopy,
}

/// Everything that the choice depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InterfaceFacts {
    /// Interface name.
    pub name: String,
    /// What it is.
    pub class: DeviceClass,
    /// What its driver says about XDP.
    pub xdp: XdpSupport,
    /// Why AF_XDP cannot be used at all (privileges, kernel, a failed trial), if so.
    pub af_xdp_refused: Option<String>,
    /// Why io_uring cannot be used, if so.
    pub io_uring_refused: Option<String>,
    /// Whether UDP sockets have GSO and GRO here.
    pub udp_offload: bool,
}

/// The outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Datapath to open.
    pub kind: DatapathKind,
    /// Why.
    pub reason: String,
    /// The better or requested ones that were not taken, each with the reason.
    pub refused: Vec<(DatapathKind, String)>,
}

impl Choice {
    /// Whether `requested` was granted. A caller that must not fall back checks this.
    #[must_use]
    pub fn grants(&self, requested: DatapathChoice) -> bool {
        requested.kind().is_none_or(|kind| kind == self.kind)
    }
}

/// Decides. Pure: the same facts always give the same answer.
///
/// An explicit request that cannot be met falls down the same list as `Auto`,
/// and the refusal is in [`Choice::refused`].
#[must_use]
pub fn choose(requested: DatapathChoice, facts: &InterfaceFacts) -> Choice {
    let mut refused = Vec::new();
    if requested == DatapathChoice::Socket {
        return Choice { kind: DatapathKind::Socket, reason: "asked for".to_owned(), refused };
    }
    let asked = requested == DatapathChoice::AfXdp;
    if requested != DatapathChoice::IoUring {
        match af_xdp(asked, facts) {
            Ok(reason) => return Choice { kind: DatapathKind::AfXdp, reason, refused },
            Err(reason) => refused.push((DatapathKind::AfXdp, reason)),
        }
    }
    let sockets_why = if facts.udp_offload { "with UDP GSO and GRO" } else { "without UDP GSO" };
    match &facts.io_uring_refused {
        None => {
            let reason = if requested == DatapathChoice::IoUring {
                "asked for".to_owned()
            } else {
                format!("io_uring {sockets_why} is the fastest path on {}", facts.name)
            };
            Choice { kind: DatapathKind::IoUring, reason, refused }
        }
        Some(why) => {
            refused.push((DatapathKind::IoUring, why.clone()));
            let reason = format!("plain sockets {sockets_why} are what is left");
            Choice { kind: DatapathKind::Socket, reason, refused }
        }
    }
}

/// Why AF_XDP is taken, or why not.
fn af_xdp(asked: bool, facts: &InterfaceFacts) -> Result<String, String> {
    if let Some(why) = &facts.af_xdp_refused {
        return Err(why.clone());
    }
    let mode = match facts.xdp {
        XdpSupport::Generic => "SKB mode",
        XdpSupport::NativeCopy => "native copy mode",
        XdpSupport::ZeroCopy => "zero-copy",
    };
    if asked {
        return Ok(format!("asked for: {mode} on {}", facts.name));
    }
    match (facts.class, facts.xdp) {
        (DeviceClass::Physical, XdpSupport::ZeroCopy) => {
            Ok(format!("{} has zero-copy AF_XDP: no copy, no kernel stack", facts.name))
        }
        (DeviceClass::Physical, XdpSupport::NativeCopy) => {
            Ok(format!("{} has native XDP: one copy, no kernel stack", facts.name))
        }
        (DeviceClass::Physical, XdpSupport::Generic) => Err(format!(
            "the driver of {} has no XDP: SKB mode is slower than a socket; used only when asked for",
            facts.name
        )),
        (DeviceClass::Loopback | DeviceClass::Virtual, _) => Err(format!(
            "{} is a software device, which a GSO batch crosses in one piece; AF_XDP is used \
             here only when asked for",
            facts.name
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(class: DeviceClass, xdp: XdpSupport) -> InterfaceFacts {
        InterfaceFacts {
            name: "eth0".to_owned(),
            class,
            xdp,
            af_xdp_refused: None,
            io_uring_refused: None,
            udp_offload: true,
        }
    }

    fn kind(requested: DatapathChoice, facts: &InterfaceFacts) -> DatapathKind {
        choose(requested, facts).kind
    }

    #[test]
    fn auto_prefers_native_xdp_on_a_physical_nic_only() {
        use DeviceClass::{Loopback, Physical, Virtual};
        use XdpSupport::{Generic, NativeCopy, ZeroCopy};
        let auto = |class, xdp| kind(DatapathChoice::Auto, &facts(class, xdp));
        assert_eq!(auto(Physical, ZeroCopy), DatapathKind::AfXdp);
        assert_eq!(auto(Physical, NativeCopy), DatapathKind::AfXdp);
        assert_eq!(auto(Physical, Generic), DatapathKind::IoUring);
        for class in [Loopback, Virtual] {
            for xdp in [Generic, NativeCopy, ZeroCopy] {
                assert_eq!(auto(class, xdp), DatapathKind::IoUring);
            }
        }
    }

    #[test]
    fn a_request_overrides_taste_but_not_possibility() {
        let veth = facts(DeviceClass::Virtual, XdpSupport::NativeCopy);
        assert_eq!(kind(DatapathChoice::AfXdp, &veth), DatapathKind::AfXdp);
        let skb = facts(DeviceClass::Loopback, XdpSupport::Generic);
        assert_eq!(kind(DatapathChoice::AfXdp, &skb), DatapathKind::AfXdp);

        let mut poor = facts(DeviceClass::Physical, XdpSupport::ZeroCopy);
        poor.af_xdp_refused = Some("CAP_NET_RAW is missing".to_owned());
        let choice = choose(DatapathChoice::AfXdp, &poor);
        assert_eq!(choice.kind, DatapathKind::IoUring);
        assert!(!choice.grants(DatapathChoice::AfXdp) && choice.grants(DatapathChoice::Auto));
        assert_eq!(choice.refused, [(DatapathKind::AfXdp, "CAP_NET_RAW is missing".to_owned())]);
    }

    #[test]
    fn sockets_are_what_is_left() {
        let mut poor = facts(DeviceClass::Virtual, XdpSupport::NativeCopy);
        poor.io_uring_refused = Some("forbidden".to_owned());
        for requested in [DatapathChoice::Auto, DatapathChoice::IoUring] {
            let choice = choose(requested, &poor);
            assert_eq!(choice.kind, DatapathKind::Socket);
            assert!(choice.refused.contains(&(DatapathKind::IoUring, "forbidden".to_owned())));
        }
        assert_eq!(kind(DatapathChoice::Socket, &poor), DatapathKind::Socket);
        let rich = facts(DeviceClass::Physical, XdpSupport::ZeroCopy);
        assert_eq!(kind(DatapathChoice::Socket, &rich), DatapathKind::Socket);
        assert_eq!(kind(DatapathChoice::IoUring, &rich), DatapathKind::IoUring);
    }

    #[test]
    fn names_go_there_and_back() {
        for choice in DatapathChoice::ALL {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert_eq!("AF-XDP".parse(), Ok(DatapathChoice::AfXdp));
        let error = "dpdk".parse::<DatapathChoice>().expect_err("not a datapath");
        assert!(error.to_string().contains("\"dpdk\""));
    }
}
