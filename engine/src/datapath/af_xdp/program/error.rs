//! Why the XDP program could not be set up, in words that the user can act on.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::Ipv6Addr;

use aya::maps::MapError;
use aya::util::KernelVersion;
use stoq_ebpf::{PORTS_MAX, QUEUES_MAX};

/// First kernel with multi-buffer XDP programs.
const KERNEL_MIN: KernelVersion = KernelVersion::new(5, 18, 0);

/// Why the XDP program could not be attached or set up. Each message names the
/// interface, the step, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// EPERM or EACCES.
    #[error(
        "{step} for {interface} is not permitted ({source}): run as root, or \
         `setcap cap_net_admin,cap_net_raw,cap_bpf+ep` on the program"
    )]
    NotPermitted {
        /// Name of the interface.
        interface: String,
        /// What was being done.
        step: Step,
        /// The system call's error.
        source: io::Error,
    },
    /// EBUSY, or EEXIST for one in the other mode.
    #[error(
        "cannot attach the XDP program to {interface} ({source}): another XDP program or process \
         holds it; see who with `ip link show dev {interface}` and stop that one first"
    )]
    Busy {
        /// Name of the interface.
        interface: String,
        /// The system call's error.
        source: io::Error,
    },
    /// EOPNOTSUPP: no native XDP.
    #[error(
        "cannot attach the XDP program to {interface} ({source}): its driver has no native XDP, or \
         not with its present settings; allow SKB mode, or use the socket datapath"
    )]
    NoDriverSupport {
        /// Name of the interface.
        interface: String,
        /// The system call's error.
        source: io::Error,
    },
    /// The kernel knows no multi-buffer XDP.
    #[error(
        "{step} for {interface} failed ({source}): this kernel ({kernel}) is too old, XDP with \
         multi-buffer packets needs 5.18; use the socket datapath"
    )]
    KernelTooOld {
        /// Name of the interface.
        interface: String,
        /// What was being done.
        step: Step,
        /// The running kernel's version.
        kernel: String,
        /// The system call's error.
        source: io::Error,
    },
    /// ENOMEM.
    #[error(
        "{step} for {interface} failed ({source}): out of memory; raise the memory limit of the \
         control group, and RLIMIT_MEMLOCK (`ulimit -l`)"
    )]
    MemoryLimit {
        /// Name of the interface.
        interface: String,
        /// What was being done.
        step: Step,
        /// The system call's error.
        source: io::Error,
    },
    /// ERANGE: the driver takes XDP only below some MTU.
    #[error(
        "cannot attach the XDP program to {interface} ({source}): its MTU, or its veth peer's, is \
         too large for XDP in this driver; lower it with `ip link set dev {interface} mtu 1500`"
    )]
    MtuTooLarge {
        /// Name of the interface.
        interface: String,
        /// The system call's error.
        source: io::Error,
    },
    /// ENOSPC: too few queues.
    #[error(
        "cannot attach the XDP program to {interface} ({source}): too few receive queues (a veth \
         needs as many as its peer has for transmission); see `ethtool -l {interface}`"
    )]
    TooFewQueues {
        /// Name of the interface.
        interface: String,
        /// The system call's error.
        source: io::Error,
    },
    /// ENODEV: no interface of this index in this network namespace.
    #[error(
        "cannot attach the XDP program to {interface} ({source}): there is no such interface in \
         this network namespace; see `ip link`"
    )]
    NoInterface {
        /// Name of the interface.
        interface: String,
        /// The system call's error.
        source: io::Error,
    },
    /// The kernel or the driver refused to attach for another reason.
    #[error(
        "cannot attach the XDP program to {interface} ({source}): refused; common reasons are an \
         MTU above 1500, LRO (`ethtool -K {interface} lro off rx-gro-hw off`), and too many \
         queues; `dmesg` may say more"
    )]
    Refused {
        /// Name of the interface.
        interface: String,
        /// The system call's error.
        source: io::Error,
    },
    /// Any other failure of loading the program or using its maps.
    #[error("{step} for {interface} failed: {message}")]
    Failed {
        /// Name of the interface.
        interface: String,
        /// What was being done.
        step: Step,
        /// What the loader said, with its causes.
        message: String,
    },
    /// Port 0 cannot be registered.
    #[error("port 0 cannot be registered with the XDP program on {interface}: bind a real one")]
    PortZero {
        /// Name of the interface.
        interface: String,
    },
    /// The port map is full.
    #[error(
        "port {port} cannot be registered with the XDP program on {interface}: {PORTS_MAX} are \
         already; unregister one"
    )]
    PortsFull {
        /// Name of the interface.
        interface: String,
        /// The port that found no room.
        port: u16,
    },
    /// Such a port was never registered, or not at this address.
    #[error("port {port} at {addr} is not registered with the XDP program on {interface}")]
    PortNotRegistered {
        /// Name of the interface.
        interface: String,
        /// The port.
        port: u16,
        /// The address; `::` for any.
        addr: Ipv6Addr,
    },
    /// The program knows fewer queues.
    #[error(
        "queue {queue} of {interface} is beyond the {QUEUES_MAX} that the XDP program serves: \
         reduce them with `ethtool -L {interface} combined {QUEUES_MAX}`"
    )]
    QueueOutOfRange {
        /// Name of the interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
}

/// A step of setting up the XDP program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// `BPF_MAP_CREATE`, after the object was read.
    CreateMaps,
    /// `BPF_PROG_LOAD`: the verifier.
    Load,
    /// `BPF_LINK_CREATE`.
    Attach,
    /// `BPF_MAP_UPDATE_ELEM` or `BPF_MAP_DELETE_ELEM` on this map.
    UpdateMap(&'static str),
    /// `BPF_MAP_LOOKUP_ELEM` on this map.
    ReadMap(&'static str),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateMaps => f.write_str("creating the XDP program's maps (bpf)"),
            Self::Load => f.write_str("loading the XDP program (bpf)"),
            Self::Attach => f.write_str("attaching the XDP program (bpf)"),
            Self::UpdateMap(name) => write!(f, "changing the XDP program's map {name} (bpf)"),
            Self::ReadMap(name) => write!(f, "reading the XDP program's map {name} (bpf)"),
        }
    }
}

impl ProgramError {
    /// Turns what aya says into what the user can act on.
    pub(super) fn new(interface: &str, step: Step, error: &(dyn Error + 'static)) -> Self {
        let kernel = KernelVersion::current().ok();
        Self::classify(interface.to_owned(), step, error, kernel)
    }

    fn classify(
        interface: String,
        step: Step,
        error: &(dyn Error + 'static),
        kernel: Option<KernelVersion>,
    ) -> Self {
        let Some(errno) = errno(error) else {
            return Self::Failed { interface, step, message: with_causes(error) };
        };
        let source = io::Error::from_raw_os_error(errno);
        let old_kernel = kernel.filter(|&kernel| kernel < KERNEL_MIN);
        match (step, errno) {
            // Load: EACCES is the verifier's answer, and has a log.
            (Step::CreateMaps | Step::Load | Step::Attach, libc::EPERM)
            | (Step::CreateMaps | Step::Attach, libc::EACCES) => {
                Self::NotPermitted { interface, step, source }
            }
            (Step::CreateMaps | Step::Load | Step::Attach, libc::ENOMEM) => {
                Self::MemoryLimit { interface, step, source }
            }
            (Step::CreateMaps | Step::Load | Step::Attach, _) if old_kernel.is_some() => {
                let kernel = old_kernel.map(version_text).unwrap_or_default();
                Self::KernelTooOld { interface, step, kernel, source }
            }
            (Step::Attach, libc::EBUSY | libc::EEXIST) => Self::Busy { interface, source },
            (Step::Attach, libc::EOPNOTSUPP) => Self::NoDriverSupport { interface, source },
            (Step::Attach, libc::ERANGE) => Self::MtuTooLarge { interface, source },
            (Step::Attach, libc::ENOSPC) => Self::TooFewQueues { interface, source },
            (Step::Attach, libc::ENODEV) => Self::NoInterface { interface, source },
            (Step::Attach, _) => Self::Refused { interface, source },
            _ => Self::Failed { interface, step, message: with_causes(error) },
        }
    }
}

/// The system call's error at the bottom of an error of aya's.
pub(super) fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut error = Some(error);
    while let Some(current) = error {
        if let Some(errno) = own_errno(current) {
            return Some(errno);
        }
        error = current.source();
    }
    None
}

/// Some of aya's variants are transparent: they stand for the error inside
/// them, which is then not among the sources.
fn own_errno(error: &(dyn Error + 'static)) -> Option<i32> {
    use aya::programs::{ProgramError, XdpError};
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return error.raw_os_error();
    }
    if let Some(MapError::IoError(error)) = error.downcast_ref() {
        return error.raw_os_error();
    }
    match error.downcast_ref()? {
        ProgramError::IOError(error) => error.raw_os_error(),
        ProgramError::XdpError(XdpError::NetlinkError(error))
        | ProgramError::NetlinkError(error) => error.raw_os_error(),
        _ => None,
    }
}

fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(current) = cause {
        text.push_str(": ");
        text.push_str(&current.to_string());
        cause = current.source();
    }
    text
}

/// aya does not print versions; their code is that of `KERNEL_VERSION` in C.
fn version_text(kernel: KernelVersion) -> String {
    let code = kernel.code();
    format!("{}.{}.{}", code >> 16, (code >> 8) & 0xff, code & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW_KERNEL: Option<KernelVersion> = Some(KernelVersion::new(6, 12, 0));

    fn classify(step: Step, errno: i32, kernel: Option<KernelVersion>) -> ProgramError {
        let error = MapError::IoError(io::Error::from_raw_os_error(errno));
        ProgramError::classify("eth7".to_owned(), step, &error, kernel)
    }

    #[test]
    fn messages_say_what_to_do() {
        for (step, errno, kernel, fix) in [
            (Step::CreateMaps, libc::EPERM, NEW_KERNEL, "setcap cap_net_admin,cap_net_raw,cap_bpf"),
            (Step::Load, libc::EPERM, None, "run as root"),
            (Step::Attach, libc::EPERM, NEW_KERNEL, "run as root"),
            (Step::Attach, libc::EBUSY, NEW_KERNEL, "ip link show dev eth7"),
            (Step::Attach, libc::EEXIST, NEW_KERNEL, "ip link show dev eth7"),
            (Step::Attach, libc::EOPNOTSUPP, NEW_KERNEL, "allow SKB mode"),
            (Step::Attach, libc::ERANGE, NEW_KERNEL, "mtu 1500"),
            (Step::Attach, libc::ENOSPC, NEW_KERNEL, "ethtool -l eth7"),
            (Step::Attach, libc::ENODEV, NEW_KERNEL, "ip link"),
            (Step::Attach, libc::EINVAL, NEW_KERNEL, "ethtool -K eth7 lro off"),
            (Step::CreateMaps, libc::ENOMEM, NEW_KERNEL, "RLIMIT_MEMLOCK"),
            (Step::Load, libc::EINVAL, Some(KernelVersion::new(5, 15, 7)), "5.15.7"),
            (Step::Attach, libc::EINVAL, Some(KernelVersion::new(5, 17, 0)), "needs 5.18"),
        ] {
            let text = classify(step, errno, kernel).to_string();
            assert!(text.contains("eth7"), "no interface in: {text}");
            assert!(text.contains(fix), "no {fix:?} in: {text}");
            let os_error = io::Error::from_raw_os_error(errno).to_string();
            assert!(text.contains(&os_error), "no {os_error:?} in: {text}");
        }
    }

    #[test]
    fn verifier_errors_keep_their_text() {
        let error = classify(Step::Load, libc::EACCES, NEW_KERNEL);
        assert!(matches!(error, ProgramError::Failed { .. }), "{error}");
        let error = MapError::InvalidName { name: "odd".to_owned() };
        let error = ProgramError::classify("eth7".to_owned(), Step::CreateMaps, &error, NEW_KERNEL);
        assert!(error.to_string().contains("invalid map name `odd`"), "{error}");
    }

    #[test]
    fn old_kernels_still_need_permission_first() {
        let kernel = Some(KernelVersion::new(5, 10, 0));
        let error = classify(Step::CreateMaps, libc::EPERM, kernel);
        assert!(matches!(error, ProgramError::NotPermitted { .. }), "{error}");
    }
}
