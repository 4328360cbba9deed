//! What the machine and the process have: kernel, capabilities, memory, clocks.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::Advice;

/// A file's first line without surrounding space; `None` if it cannot be read.
pub(super) fn line(path: impl AsRef<Path>) -> Option<String> {
    let content = fs::read_to_string(path).ok()?;
    content.lines().next().map(|line| line.trim().to_owned())
}

/// A number in a file's first line.
pub(super) fn number(path: impl AsRef<Path>) -> Option<u64> {
    line(path)?.parse().ok()
}

/// The kernel and what its version brings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// Major and minor version, zero if the release does not tell.
    pub version: (u32, u32),
    /// What STOQ uses, and whether this version has it.
    pub features: Vec<KernelFeature>,
}

/// Something that came with a kernel version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KernelFeature {
    /// What it is.
    pub name: &'static str,
    /// First version that has it.
    pub since: (u32, u32),
    /// Whether this kernel is at least that old.
    pub present: bool,
}

const FEATURES: [(&str, (u32, u32)); 8] = [
    ("UDP segmentation offload (GSO)", (4, 18)),
    ("UDP receive coalescing (GRO)", (5, 0)),
    ("XDP program held by a bpf_link", (5, 9)),
    ("io_uring multishot receive", (6, 0)),
    ("io_uring deferred task work", (6, 1)),
    ("XDP capabilities over netlink", (6, 3)),
    ("AF_XDP multi-buffer packets", (6, 6)),
    ("AF_XDP TX checksum offload", (6, 8)),
];

impl Kernel {
    pub(super) fn examine() -> Self {
        let uname = rustix::system::uname();
        Self::of(&uname.release().to_string_lossy())
    }

    fn of(release: &str) -> Self {
        let mut numbers = release.split(['.', '-', '+']).map(|part| part.parse().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let features = FEATURES
            .map(|(name, since)| KernelFeature { name, since, present: version >= since })
            .to_vec();
        Self { release: release.to_owned(), version, features }
    }
}

/// A capability, and what it buys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Privilege {
    /// Name, as in `capabilities(7)`.
    pub name: &'static str,
    /// What STOQ does with it.
    pub buys: &'static str,
    /// Whether the process has it (effective set).
    pub held: bool,
}

const CAPABILITIES: [(u32, &str, &str); 5] = [
    (12, "CAP_NET_ADMIN", "attaches XDP, raises socket buffers beyond the system's limit"),
    (13, "CAP_NET_RAW", "opens AF_XDP sockets"),
    (39, "CAP_BPF", "loads the XDP program and its maps"),
    (14, "CAP_IPC_LOCK", "locks packet memory beyond the memlock limit"),
    (10, "CAP_NET_BIND_SERVICE", "binds ports below 1024 (443)"),
];

/// The capabilities that count; `CAP_SYS_ADMIN` stands for `CAP_BPF`, as in the kernel.
pub(super) fn privileges() -> Vec<Privilege> {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    privileges_of(&status)
}

fn privileges_of(status: &str) -> Vec<Privilege> {
    const CAP_SYS_ADMIN: u32 = 21;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective >> bit & 1 == 1;
    CAPABILITIES
        .map(|(bit, name, buys)| {
            let held = has(bit) || (name == "CAP_BPF" && has(CAP_SYS_ADMIN));
            Privilege { name, buys, held }
        })
        .to_vec()
}

/// Why this process may not use AF_XDP, if so.
pub(super) fn af_xdp_refused(kernel: &Kernel, privileges: &[Privilege]) -> Option<String> {
    if kernel.version < (5, 9) {
        return Some(format!("kernel {} is older than 5.9", kernel.release));
    }
    let missing: Vec<&str> = privileges
        .iter()
        .filter(|privilege| !privilege.held)
        .map(|privilege| privilege.name)
        .filter(|name| matches!(*name, "CAP_NET_ADMIN" | "CAP_NET_RAW" | "CAP_BPF"))
        .collect();
    (!missing.is_empty()).then(|| format!("{} missing", missing.join(", ")))
}

/// Memory, limits, clocks and processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Processors online, as the kernel lists them (`0-3`).
    pub cpus_online: Option<String>,
    /// Processors kept free of other work (`isolcpus`).
    pub cpus_isolated: Option<String>,
    /// NUMA nodes online.
    pub numa_nodes: Option<String>,
    /// Whether this is a virtual machine.
    pub virtual_machine: bool,
    /// Frequency governor of CPU 0; `None` where the host decides.
    pub governor: Option<String>,
    /// Source of the system clock.
    pub clock_source: Option<String>,
    /// Free and all huge pages of the default size.
    pub huge_pages: Option<(u64, u64)>,
    /// Size of a huge page, in kilobytes.
    pub huge_page_kb: Option<u64>,
    /// Memory that may be locked, in bytes; `None` is unlimited.
    pub memlock_bytes: Option<u64>,
    /// Largest receive buffer without `CAP_NET_ADMIN`, in bytes.
    pub rmem_max_bytes: Option<u64>,
    /// Largest send buffer without `CAP_NET_ADMIN`, in bytes.
    pub wmem_max_bytes: Option<u64>,
}

impl Host {
    pub(super) fn examine() -> Self {
        let cpu = Path::new("/sys/devices/system/cpu");
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let memory = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_end_matches("kB").trim().parse().ok()
        };
        let memlock = rustix::process::getrlimit(rustix::process::Resource::Memlock);
        Self {
            cpus_online: line(cpu.join("online")),
            cpus_isolated: line(cpu.join("isolated")).filter(|cpus| !cpus.is_empty()),
            numa_nodes: line("/sys/devices/system/node/online"),
            virtual_machine: cpuinfo
                .lines()
                .any(|line| line.starts_with("flags") && line.contains(" hypervisor")),
            governor: line(cpu.join("cpu0/cpufreq/scaling_governor")),
            clock_source: line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            huge_pages: memory("HugePages_Free:").zip(memory("HugePages_Total:")),
            huge_page_kb: memory("Hugepagesize:"),
            memlock_bytes: memlock.current,
            rmem_max_bytes: number("/proc/sys/net/core/rmem_max"),
            wmem_max_bytes: number("/proc/sys/net/core/wmem_max"),
        }
    }

    /// What costs speed here.
    pub(super) fn advise(&self, privileges: &[Privilege]) -> Vec<Advice> {
        let held = |name: &str| privileges.iter().any(|have| have.name == name && have.held);
        let mut advice = Vec::new();
        let mut add = |costs: String, fix: &str| advice.push(Advice { costs, fix: fix.to_owned() });
        if let Some(governor) = self.governor.as_deref().filter(|name| *name != "performance") {
            add(
                format!("the CPU governor \"{governor}\" slows cores down between bursts"),
                "cpupower frequency-set -g performance",
            );
        }
        if let Some(clock) = self.clock_source.as_deref() {
            // Read without a system call: these two, and Hyper-V's.
            if !matches!(clock, "tsc" | "kvm-clock" | "arch_sys_counter")
                && !clock.starts_with("hyperv")
            {
                add(
                    format!("reading the clock source \"{clock}\" is slow"),
                    "echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource",
                );
            }
        }
        if self.cpus_isolated.is_none() {
            add(
                "no core is isolated: other work interrupts the shards' cores".to_owned(),
                "add isolcpus=<cores> nohz_full=<cores> to the kernel command line",
            );
        }
        if !held("CAP_NET_ADMIN") {
            let wanted = 8 * 1024 * 1024;
            if self.rmem_max_bytes.is_some_and(|max| max < wanted) {
                add(
                    "receive buffers are small: bursts will be lost".to_owned(),
                    "sysctl -w net.core.rmem_max=8388608",
                );
            }
            if self.wmem_max_bytes.is_some_and(|max| max < wanted / 4) {
                add(
                    "send buffers are small: the sender stalls early".to_owned(),
                    "sysctl -w net.core.wmem_max=2097152",
                );
            }
        }
        if !held("CAP_IPC_LOCK") && self.memlock_bytes.is_some_and(|limit| limit < 64 << 20) {
            add(
                "little memory may be locked: packet memory for AF_XDP may not fit".to_owned(),
                "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service's unit",
            );
        }
        advice
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_any_release() {
        assert_eq!(Kernel::of("6.18.44-custom+").version, (6, 18));
        assert_eq!(Kernel::of("5.4-rc1").version, (5, 4));
        assert_eq!(Kernel::of("nonsense").version, (0, 0));
        let old = Kernel::of("6.0.3");
        assert!(old.features.iter().any(|f| f.since == (6, 0) && f.present));
        assert!(old.features.iter().any(|f| f.since == (6, 1) && !f.present));
    }

    #[test]
    fn capabilities_come_from_the_effective_mask() {
        let held = |mask: u64, name: &str| {
            let list = privileges_of(&format!("Name:\tx\nCapEff:\t{mask:016x}\n"));
            list.iter().any(|privilege| privilege.name == name && privilege.held)
        };
        assert!(held(1 << 12, "CAP_NET_ADMIN") && !held(1 << 12, "CAP_NET_RAW"));
        assert!(held(1 << 39, "CAP_BPF") && held(1 << 21, "CAP_BPF"));
        assert!(!held(0, "CAP_BPF"));
        assert!(privileges_of("").iter().all(|privilege| !privilege.held));
    }

    #[test]
    fn missing_capabilities_are_named() {
        let kernel = Kernel::of("6.18.0");
        let some = privileges_of(&format!("CapEff:\t{:x}\n", 1_u64 << 12));
        assert_eq!(af_xdp_refused(&kernel, &some).as_deref(), Some("CAP_NET_RAW, CAP_BPF missing"));
        let all = privileges_of("CapEff:\tffffffffffffffff\n");
        assert_eq!(af_xdp_refused(&kernel, &all), None);
        assert!(af_xdp_refused(&Kernel::of("5.4.0"), &all).is_some());
    }

    #[test]
    fn advice_follows_the_facts() {
        let mut host = Host::examine();
        host.governor = Some("powersave".to_owned());
        host.clock_source = Some("hpet".to_owned());
        host.cpus_isolated = Some("2-3".to_owned());
        host.rmem_max_bytes = Some(212_992);
        host.wmem_max_bytes = Some(4 << 20);
        host.memlock_bytes = Some(8 << 20);
        let fixes = |privileges: &[Privilege]| {
            let advice = host.advise(privileges);
            advice.into_iter().map(|advice| advice.fix).collect::<Vec<_>>().join("\n")
        };
        let poor = fixes(&privileges_of("CapEff:\t0\n"));
        for word in ["cpupower", "tsc", "rmem_max", "ulimit -l"] {
            assert!(poor.contains(word), "{word} in {poor}");
        }
        assert!(!poor.contains("wmem_max") && !poor.contains("isolcpus"));
        let rich = fixes(&privileges_of("CapEff:\tffffffffffffffff\n"));
        assert!(!rich.contains("rmem_max") && !rich.contains("ulimit"));
    }
}
