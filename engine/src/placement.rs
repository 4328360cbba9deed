//! Which core each shard runs on.
//!
//! Cores that the user names are taken or refused. Otherwise shards take the
//! highest cores that this process may use and that no other engine's shard is
//! pinned to: the kernel's interrupts and housekeeping tend to live on the lowest.

use core_affinity::CoreId;

use crate::config::TransportConfig;
use crate::error::StartError;

/// Name of a shard's thread, before its number; at most 15 bytes in all.
pub(crate) const THREAD_NAME_PREFIX: &str = "stoq-shard-";

/// The core of each shard; `None` leaves the choice to the scheduler.
///
/// # Errors
/// A core was named that this process may not use.
pub(crate) fn cores(config: &TransportConfig) -> Result<Vec<Option<CoreId>>, StartError> {
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    if config.cores.is_empty() {
        return Ok(automatic(config.shards, &allowed, &taken_by_other_engines()));
    }
    let named = config.cores.iter().enumerate().map(|(shard, &core)| {
        allowed.iter().find(|id| id.id == core).map(|id| Some(*id)).ok_or_else(|| {
            let ids: Vec<usize> = allowed.iter().map(|id| id.id).collect();
            let reason = format!(
                "this process may run on cores {ids:?} only (see `taskset -p` and the cgroup's cpuset.cpus)"
            );
            StartError::Core { core, shard, reason }
        })
    });
    named.collect()
}

/// Free cores from the highest down; when they do not suffice, nobody is pinned.
fn automatic(shards: usize, allowed: &[CoreId], taken: &[usize]) -> Vec<Option<CoreId>> {
    let free: Vec<CoreId> =
        allowed.iter().rev().filter(|core| !taken.contains(&core.id)).copied().collect();
    if free.len() < shards {
        tracing::info!(shards, free = free.len(), "too few free cores: shards are not pinned");
        return vec![None; shards];
    }
    free.into_iter().take(shards).map(Some).collect()
}

/// Cores to which the shards of other processes are pinned, as far as `/proc` shows.
fn taken_by_other_engines() -> Vec<usize> {
    let own = std::process::id().to_string();
    let mut taken = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let is_other = name.to_str().is_some_and(|pid| pid.parse::<u32>().is_ok() && pid != own);
        if !is_other {
            continue;
        }
        // Processes come and go while we look: what cannot be read is gone.
        for task in std::fs::read_dir(process.path().join("task")).into_iter().flatten().flatten() {
            let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if !comm.starts_with(THREAD_NAME_PREFIX) {
                continue;
            }
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            taken.extend(pinned_core(&status));
        }
    }
    taken
}

/// The one core that a thread's status allows, `None` when there are several.
fn pinned_core(status: &str) -> Option<usize> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    list.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(cores: &[Option<CoreId>]) -> Vec<Option<usize>> {
        cores.iter().map(|core| core.map(|core| core.id)).collect()
    }

    #[test]
    fn the_highest_free_cores_are_taken() {
        let allowed: Vec<CoreId> = (0..4).map(|id| CoreId { id }).collect();
        assert_eq!(ids(&automatic(2, &allowed, &[])), [Some(3), Some(2)]);
        assert_eq!(ids(&automatic(2, &allowed, &[3, 1])), [Some(2), Some(0)]);
        assert_eq!(ids(&automatic(3, &allowed, &[3, 1])), [None, None, None]);
        assert_eq!(ids(&automatic(1, &allowed[..1], &[])), [Some(0)]);
    }

    #[test]
    fn only_a_single_core_is_a_pin() {
        assert_eq!(pinned_core("Name:\tx\nCpus_allowed_list:\t3\n"), Some(3));
        assert_eq!(pinned_core("Cpus_allowed_list:\t0-3\n"), None);
        assert_eq!(pinned_core(""), None);
    }

    #[test]
    fn a_core_that_does_not_exist_is_refused() {
        let config = TransportConfig { cores: vec![9999], ..Default::default() };
        let error = cores(&config).expect_err("no such core").to_string();
        assert!(error.contains("9999") && error.contains("cpuset"), "{error}");
    }
}
