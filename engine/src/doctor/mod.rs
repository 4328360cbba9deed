//! What this machine can do for STOQ, which datapath `Auto` takes, and what costs speed.
//!
//! Reads only: netlink questions, `/proc` and `/sys`, and a trial of io_uring. A
//! trial bind of an AF_XDP socket is made only through the caller's function.

mod display;
mod genl;
mod host;
mod interface;

pub use host::{Host, Kernel, KernelFeature, Privilege};
pub use interface::{Interface, RingSizes, XdpFeatures};

use serde::{Serialize, Serializer};

use crate::datapath::choice::{Choice, DatapathChoice, InterfaceFacts, choose};
use crate::datapath::io_uring::{IoUringDatapath, UringFeatures};
use crate::proto::crypto::{IPSEC_MB_ADVICE, ipsec_mb_version};

/// What a trial bind of an AF_XDP socket proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TrialBind {
    /// Bound in zero-copy mode.
    ZeroCopy,
    /// Bound in native copy mode.
    Copy,
    /// Bound in SKB mode only.
    Generic,
}

/// Something that costs speed, and the command that changes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// What it costs.
    pub costs: String,
    /// What to run.
    pub fix: String,
}

/// An interface and the datapath that `Auto` takes on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The interface.
    pub interface: Interface,
    /// The choice, and what it refused.
    #[serde(serialize_with = "serialize_choice")]
    pub choice: Choice,
}

/// Everything that the doctor found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Kernel and its features.
    pub kernel: Kernel,
    /// Capabilities of this process.
    pub privileges: Vec<Privilege>,
    /// Machine-wide facts.
    pub host: Host,
    /// What io_uring offers, or why it cannot be used.
    pub io_uring: Result<UringFeatures, String>,
    /// Version of ipsec-mb, which seals packets unless the configuration says otherwise, or why
    /// aws-lc-rs does.
    pub ipsec_mb: Result<String, String>,
    /// One verdict for each interface examined.
    pub interfaces: Vec<Verdict>,
    /// The interface that was asked for and does not exist.
    pub missing_interface: Option<String>,
    /// What costs speed.
    pub advice: Vec<Advice>,
}

/// Examines the machine, and `interface` or else all interfaces.
///
/// Privileges improve the answer but none is needed. Takes some milliseconds.
#[must_use]
pub fn examine(interface: Option<&str>) -> Report {
    examine_with(interface, |_| None)
}

/// As [`examine`], with a proof: `trial` binds an AF_XDP socket to the interface
/// that it is given and says what it got, or `None` to make no trial there.
#[must_use]
pub fn examine_with(
    interface: Option<&str>,
    mut trial: impl FnMut(&str) -> Option<Result<TrialBind, String>>,
) -> Report {
    let kernel = Kernel::examine();
    let privileges = host::privileges();
    let host = Host::examine();
    let io_uring = IoUringDatapath::probe().map_err(|unavailable| unavailable.reason);
    let af_xdp_refused = host::af_xdp_refused(&kernel, &privileges);
    let families = interface::Families::open();
    let names = interface.map_or_else(interface::names, |name| vec![name.to_owned()]);

    let mut advice = host.advise(&privileges);
    if let Err(reason) = &io_uring {
        advice.push(Advice {
            costs: "io_uring is unavailable: plain sockets cost more per batch".to_owned(),
            fix: reason.clone(),
        });
    }
    let ipsec_mb = ipsec_mb_version().map(str::to_owned).map_err(str::to_owned);
    if ipsec_mb.is_err() && cfg!(target_arch = "x86_64") {
        advice.push(Advice {
            costs: "without ipsec-mb, sealing and opening a packet takes about twice the time"
                .to_owned(),
            fix: IPSEC_MB_ADVICE.to_owned(),
        });
    }
    let mut interfaces = Vec::new();
    let mut missing_interface = None;
    for name in names {
        let Some(mut found) = Interface::examine(&name, &families) else {
            missing_interface = interface.map(str::to_owned);
            continue;
        };
        let mut refused = af_xdp_refused.clone();
        if refused.is_none() {
            found.trial = trial(&name);
            if let Some(Err(reason)) = &found.trial {
                refused = Some(format!("a trial on {name} failed: {reason}"));
            }
        }
        let choice = choose(DatapathChoice::Auto, &facts(&found, refused, &kernel, &io_uring));
        advice.extend(found.advise(choice.kind == crate::datapath::DatapathKind::AfXdp));
        interfaces.push(Verdict { interface: found, choice });
    }
    Report { kernel, privileges, host, io_uring, ipsec_mb, interfaces, missing_interface, advice }
}

/// What [`choose`] needs to know about one interface of this machine, without a trial.
/// `None` if there is no such interface.
#[must_use]
pub fn interface_facts(name: &str) -> Option<InterfaceFacts> {
    let found = Interface::examine(name, &interface::Families::open())?;
    let kernel = Kernel::examine();
    let refused = host::af_xdp_refused(&kernel, &host::privileges());
    let io_uring = IoUringDatapath::probe().map_err(|unavailable| unavailable.reason);
    Some(facts(&found, refused, &kernel, &io_uring))
}

fn facts(
    found: &Interface,
    af_xdp_refused: Option<String>,
    kernel: &Kernel,
    io_uring: &Result<UringFeatures, String>,
) -> InterfaceFacts {
    InterfaceFacts {
        name: found.name.clone(),
        class: found.class,
        xdp: found.xdp_support(),
        af_xdp_refused,
        io_uring_refused: io_uring.as_ref().err().cloned(),
        udp_offload: kernel.version >= (5, 0),
    }
}

fn serialize_choice<S: Serializer>(choice: &Choice, serializer: S) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeStruct;
    let refused: Vec<(&str, &str)> =
        choice.refused.iter().map(|(kind, reason)| (kind.name(), reason.as_str())).collect();
    let mut fields = serializer.serialize_struct("Choice", 3)?;
    fields.serialize_field("kind", choice.kind.name())?;
    fields.serialize_field("reason", &choice.reason)?;
    fields.serialize_field("refused", &refused)?;
    fields.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::DatapathKind;

    #[test]
    fn loopback_gets_a_socket_path() {
        let report = examine(Some("lo"));
        assert_eq!(report.interfaces.len(), 1);
        let choice = &report.interfaces[0].choice;
        assert!(matches!(choice.kind, DatapathKind::IoUring | DatapathKind::Socket));
        assert!(choice.refused.iter().any(|(kind, _)| *kind == DatapathKind::AfXdp));
        assert_eq!(report.missing_interface, None);
    }

    #[test]
    fn a_missing_interface_is_reported() {
        let report = examine(Some("no-such-if"));
        assert_eq!(report.missing_interface.as_deref(), Some("no-such-if"));
        assert!(report.interfaces.is_empty());
        assert_eq!(interface_facts("no-such-if"), None);
    }

    #[test]
    fn a_failed_trial_is_a_reason() {
        let mut asked = Vec::new();
        let report = examine_with(Some("lo"), |name| {
            asked.push(name.to_owned());
            Some(Err("EBUSY".to_owned()))
        });
        let refused = &report.interfaces[0].choice.refused;
        // Without the capabilities no trial is made: then they are the reason.
        if asked.is_empty() {
            assert!(refused[0].1.contains("missing"), "{refused:?}");
        } else {
            assert!(refused[0].1.contains("EBUSY"), "{refused:?}");
        }
    }

    #[test]
    fn the_report_serializes() {
        let report = examine(None);
        let text = serde_json::to_string(&report).expect("plain data");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let interfaces = value["interfaces"].as_array().expect("a list");
        assert_eq!(interfaces.len(), report.interfaces.len());
        assert!(interfaces.iter().all(|verdict| verdict["choice"]["kind"].is_string()));
    }
}
