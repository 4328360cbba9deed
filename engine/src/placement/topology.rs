//! What `/sys` and `/proc` say about the cores: which exist, which share a physical core, which are
//! near the network card, and which take its interrupts.
//!
//! Everything is read below two roots, so that tests can show other machines. What a machine does
//! not say is taken as "all alike": a core of its own, no node, no interrupts.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the kernel shows itself.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    sys: PathBuf,
    proc: PathBuf,
}

impl Default for Machine {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc".into() }
    }
}

/// Reads a file of one line, trimmed; `None` when it is not there.
fn line(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Reads the kernel's list format: `0-2,5`.
fn cpu_list(list: &str) -> BTreeSet<usize> {
    let mut cpus = BTreeSet::new();
    for part in list.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) {
            cpus.extend(first..=last.min(first.saturating_add(4096)));
        }
    }
    cpus
}

impl Machine {
    /// A machine that lives below a directory.
    #[cfg(test)]
    pub(super) fn below(root: &Path) -> Self {
        Self { sys: root.join("sys"), proc: root.join("proc") }
    }

    /// The lowest-numbered core of the physical core that `core` is part of.
    pub(super) fn physical_core(&self, core: usize) -> usize {
        let topology = self.sys.join(format!("devices/system/cpu/cpu{core}/topology"));
        // `core_cpus_list` since Linux 5.2, `thread_siblings_list` before.
        let siblings = line(&topology.join("core_cpus_list"))
            .or_else(|| line(&topology.join("thread_siblings_list")));
        siblings.and_then(|list| cpu_list(&list).first().copied()).unwrap_or(core)
    }

    /// The NUMA node of an interface's device; `None` on a machine with one node, and for devices
    /// without one.
    pub(super) fn node_of(&self, interface: &str) -> Option<usize> {
        if self.nodes() < 2 {
            return None;
        }
        let device = self.sys.join("class/net").join(interface).join("device");
        // A virtio device hangs below the PCI device that knows; -1 stands for none.
        [device.join("numa_node"), device.join("../numa_node")]
            .iter()
            .find_map(|path| line(path)?.parse().ok())
    }

    /// Cores of a node.
    pub(super) fn cores_of(&self, node: usize) -> BTreeSet<usize> {
        let path = self.sys.join(format!("devices/system/node/node{node}/cpulist"));
        line(&path).map(|list| cpu_list(&list)).unwrap_or_default()
    }

    /// Cores that take an interface's interrupts.
    pub(super) fn interrupt_cores(&self, interface: &str) -> BTreeSet<usize> {
        let device = self.sys.join("class/net").join(interface).join("device");
        let directories = [device.join("msi_irqs"), device.join("../msi_irqs")];
        let entries = directories.iter().find_map(|path| fs::read_dir(path).ok());
        entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let irq = self.proc.join("irq").join(entry.file_name());
                line(&irq.join("effective_affinity_list"))
            })
            .flat_map(|list| cpu_list(&list))
            .collect()
    }

    /// Why this process may not run on a core, with where to change it.
    pub(super) fn why_not(&self, core: usize, allowed: &[usize]) -> String {
        let cpu = self.sys.join("devices/system/cpu");
        let reads = |name| line(&cpu.join(name)).map(|list| (cpu_list(&list), list));
        if let Some((present, list)) = reads("present")
            && !present.contains(&core)
        {
            return format!("this machine has the cores {list} only");
        }
        if let Some((online, list)) = reads("online")
            && !online.contains(&core)
        {
            return format!(
                "it is offline (online: {list}); echo 1 > /sys/devices/system/cpu/cpu{core}/online"
            );
        }
        if let Some((file, list)) = self.cpuset()
            && !cpu_list(&list).contains(&core)
        {
            return format!("the cgroup's cpuset allows the cores {list} only ({file})");
        }
        format!(
            "this process may run on the cores {allowed:?} only (see `taskset -p` and the cgroup's cpuset.cpus)"
        )
    }

    /// The nearest cpuset above this process, and where it stands (cgroup v2, then v1).
    fn cpuset(&self) -> Option<(String, String)> {
        let text = fs::read_to_string(self.proc.join("self/cgroup")).ok()?;
        for entry in text.lines() {
            let mut fields = entry.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let root = match controllers {
                "" => self.sys.join("fs/cgroup"),
                "cpuset" => self.sys.join("fs/cgroup/cpuset"),
                _ => continue,
            };
            let below = root.join(path.trim_start_matches('/'));
            for directory in below.ancestors().take_while(|path| path.starts_with(&root)) {
                for name in ["cpuset.cpus.effective", "cpuset.effective_cpus"] {
                    let file = directory.join(name);
                    if let Some(list) = line(&file).filter(|list| !list.is_empty()) {
                        return Some((file.display().to_string(), list));
                    }
                }
            }
        }
        None
    }

    fn nodes(&self) -> usize {
        let online = line(&self.sys.join("devices/system/node/online"));
        online.map_or(1, |list| cpu_list(&list).len())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::certs::test_dir::TestDir;

    /// A machine of files: two nodes of four cores, two of each sharing a physical core; the card
    /// `nic0` on node 1, whose interrupts go to cores 4 and 6.
    pub(crate) fn two_nodes() -> (TestDir, Machine) {
        let root = TestDir::new();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("a directory");
            fs::write(path, text).expect("a file");
        };
        for (name, list) in [("present", "0-9\n"), ("online", "0-7\n")] {
            write(&format!("sys/devices/system/cpu/{name}"), list);
        }
        for core in 0..8usize {
            let pair = core / 2 * 2;
            let topology = format!("sys/devices/system/cpu/cpu{core}/topology/core_cpus_list");
            write(&topology, &format!("{pair}-{}\n", pair + 1));
        }
        write("sys/devices/system/node/online", "0-1\n");
        write("sys/devices/system/node/node0/cpulist", "0-3\n");
        write("sys/devices/system/node/node1/cpulist", "4-7\n");
        write("sys/class/net/nic0/device/numa_node", "1\n");
        write("sys/class/net/odd0/device/numa_node", "-1\n");
        for (irq, core) in [("40", "4\n"), ("41", "6\n")] {
            write(&format!("sys/class/net/nic0/device/msi_irqs/{irq}"), "msix\n");
            write(&format!("proc/irq/{irq}/effective_affinity_list"), core);
        }
        write("proc/self/cgroup", "0::/pod/box\n");
        write("sys/fs/cgroup/pod/cpuset.cpus.effective", "0-5\n");
        write("sys/fs/cgroup/pod/box/cpuset.cpus.effective", "\n");
        let machine = Machine::below(root.path());
        (root, machine)
    }

    #[test]
    fn a_machine_of_two_nodes_is_read() {
        let (_root, machine) = two_nodes();
        assert_eq!((machine.physical_core(5), machine.physical_core(4)), (4, 4));
        assert_eq!(machine.node_of("nic0"), Some(1));
        assert_eq!((machine.node_of("odd0"), machine.node_of("lo")), (None, None));
        assert_eq!(machine.cores_of(1), BTreeSet::from([4, 5, 6, 7]));
        assert_eq!(machine.interrupt_cores("nic0"), BTreeSet::from([4, 6]));
        assert!(machine.interrupt_cores("lo").is_empty());
    }

    #[test]
    fn a_machine_that_says_nothing_has_cores_all_alike() {
        let root = TestDir::new();
        let machine = Machine::below(root.path());
        assert_eq!(machine.physical_core(3), 3);
        assert_eq!(machine.node_of("nic0"), None);
        assert!(machine.why_not(3, &[0, 1]).contains("[0, 1]"));
    }

    #[test]
    fn each_refusal_has_its_own_reason() {
        let (_root, machine) = two_nodes();
        let allowed = [0, 1];
        for (core, reason) in [
            (12, "this machine has the cores 0-9 only"),
            (8, "offline"),
            // The group's own file is empty: its parent's counts.
            (7, "cpuset allows the cores 0-5 only"),
            (3, "[0, 1]"),
        ] {
            let text = machine.why_not(core, &allowed);
            assert!(text.contains(reason), "{core}: {text}");
        }
    }

    #[test]
    fn lists_of_the_kernel() {
        assert_eq!(cpu_list("0-2,5"), BTreeSet::from([0, 1, 2, 5]));
        assert!(cpu_list("").is_empty());
    }
}
