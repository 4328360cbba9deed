//! What this machine has: privileges, kernel, cores, memory.

use std::path::Path;

use anyhow::{Context as _, Result};

/// The lowest kernel whose XDP passes multi-buffer packets (`xdp.frags`).
pub(crate) const KERNEL_MIN: (u32, u32) = (5, 18);

/// What the commands ask about the machine.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// Effective user is root.
    pub(crate) is_root: bool,
    /// Kernel release as printed by `uname -r`.
    pub(crate) kernel: String,
    /// Major and minor number of it.
    pub(crate) kernel_version: (u32, u32),
    /// Cores that this process may use.
    pub(crate) cores: usize,
    /// `MemAvailable`, in bytes.
    pub(crate) memory_available_bytes: u64,
}

impl Machine {
    /// Looks.
    pub(crate) fn inspect() -> Result<Self> {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let kernel_version = parse_release(&kernel)
            .with_context(|| format!("cannot read a version from the kernel release {kernel:?}"))?;
        let meminfo =
            std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        let memory_available_bytes =
            parse_available(&meminfo).context("/proc/meminfo has no MemAvailable")?;
        let cores = std::thread::available_parallelism()
            .context("cannot count the cores (sched_getaffinity)")?
            .get();
        let is_root = rustix::process::geteuid().is_root();
        Ok(Self { is_root, kernel, kernel_version, cores, memory_available_bytes })
    }

    /// Whether the kernel is new enough for AF_XDP with packets of several buffers.
    pub(crate) fn has_xdp_frags(&self) -> bool {
        self.kernel_version >= KERNEL_MIN
    }
}

/// Free bytes for this user on the file system of `path`.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).with_context(|| {
        format!("cannot ask for the free space at {} (statvfs)", path.display())
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        assert_eq!(parse_release("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(parse_release("5.15+"), Some((5, 15)));
        assert_eq!(parse_release("six"), None);
        assert!((5, 4) < KERNEL_MIN && (5, 18) >= KERNEL_MIN && (6, 1) >= KERNEL_MIN);
    }

    #[test]
    fn memory() {
        assert_eq!(parse_available("MemTotal: 9 kB\nMemAvailable:   4 kB\n"), Some(4096));
        assert_eq!(parse_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn this_machine_can_be_inspected() {
        let machine = Machine::inspect().unwrap();
        assert!(machine.cores > 0 && machine.memory_available_bytes > 0);
        assert!(free_bytes(Path::new("/")).unwrap() > 0);
    }
}
