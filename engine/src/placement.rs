//! Which core each shard runs on, and on which NUMA node its packet memory lies.
//!
//! Cores that the user names are taken or refused with the reason. Otherwise each shard gets a
//! physical core of its own, if it can: near the network card, not one that takes the card's
//! interrupts, and the highest-numbered of what remains, because the kernel's housekeeping
//! tends to live on the lowest. Cores to which another engine's shard is pinned are left alone.

mod topology;

use core_affinity::CoreId;

use self::topology::Machine;
use crate::config::TransportConfig;
use crate::error::StartError;

/// Name of a shard's thread, before its number; at most 15 bytes in all.
pub(crate) const THREAD_NAME_PREFIX: &str = "stoq-shard-";

/// Where an engine's shards run.
#[derive(Debug)]
pub(crate) struct Placement {
    /// The core of each shard; `None` leaves the choice to the scheduler.
    pub(crate) cores: Vec<Option<CoreId>>,
    /// The node of the network card, where there are several.
    pub(crate) node: Option<usize>,
}

/// Places the shards; `interface` is the network card, where one is known.
///
/// # Errors
/// A core was named that this process may not use.
pub(crate) fn place(
    config: &TransportConfig,
    interface: Option<&str>,
) -> Result<Placement, StartError> {
    let allowed: Vec<usize> =
        core_affinity::get_core_ids().unwrap_or_default().iter().map(|id| id.id).collect();
    let machine = Machine::default();
    let node = interface.and_then(|name| machine.node_of(name));
    let cores = if config.cores.is_empty() {
        let taken = taken_by_other_engines();
        let free: Vec<usize> = allowed.into_iter().filter(|core| !taken.contains(core)).collect();
        automatic(config.shards, &free, &machine, interface)
    } else {
        named(&config.cores, &allowed, &machine)?
    };
    tracing::info!(?cores, node, interface, "shards placed");
    Ok(Placement { cores, node })
}

fn named(
    cores: &[usize],
    allowed: &[usize],
    machine: &Machine,
) -> Result<Vec<Option<CoreId>>, StartError> {
    let checked = cores.iter().enumerate().map(|(shard, &core)| {
        if allowed.contains(&core) {
            return Ok(Some(CoreId { id: core }));
        }
        Err(StartError::Core { core, shard, reason: machine.why_not(core, allowed) })
    });
    checked.collect()
}

/// The best of the free cores; when they do not suffice, nobody is pinned.
fn automatic(
    shards: usize,
    free: &[usize],
    machine: &Machine,
    interface: Option<&str>,
) -> Vec<Option<CoreId>> {
    if free.len() < shards {
        tracing::info!(shards, free = free.len(), "too few free cores: shards are not pinned");
        return vec![None; shards];
    }
    let near = interface
        .and_then(|name| machine.node_of(name))
        .map(|node| machine.cores_of(node))
        .unwrap_or_default();
    let interrupted = interface.map(|name| machine.interrupt_cores(name)).unwrap_or_default();
    let mut chosen: Vec<usize> = Vec::with_capacity(shards);
    let mut physical_taken = Vec::with_capacity(shards);
    while chosen.len() < shards {
        // Worst first: another shard's physical core, a far node, the card's interrupts, low numbers.
        let best = free.iter().copied().filter(|core| !chosen.contains(core)).min_by_key(|&core| {
            let shared = physical_taken.contains(&machine.physical_core(core));
            let far = !near.is_empty() && !near.contains(&core);
            (shared, far, interrupted.contains(&core), std::cmp::Reverse(core))
        });
        let core = best.expect("as many free cores as shards");
        physical_taken.push(machine.physical_core(core));
        chosen.push(core);
    }
    chosen.into_iter().map(|id| Some(CoreId { id })).collect()
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
    use crate::certs::test_dir::TestDir;

    fn ids(cores: &[Option<CoreId>]) -> Vec<Option<usize>> {
        cores.iter().map(|core| core.map(|core| core.id)).collect()
    }

    #[test]
    fn the_highest_free_cores_are_taken() {
        // No topology is known: every core is one of its own.
        let root = TestDir::new();
        let machine = Machine::below(root.path());
        let place = |shards, free: &[usize]| ids(&automatic(shards, free, &machine, None));
        assert_eq!(place(2, &[0, 1, 2, 3]), [Some(3), Some(2)]);
        assert_eq!(place(2, &[0, 2]), [Some(2), Some(0)]);
        assert_eq!(place(3, &[0, 2]), [None, None, None]);
        assert_eq!(place(1, &[0]), [Some(0)], "a single core will do");
    }

    #[test]
    fn each_shard_has_a_physical_core_near_the_card_and_off_its_interrupts() {
        let (_root, machine) = topology::tests::two_nodes();
        let all: Vec<usize> = (0..8).collect();
        let place = |shards, interface| ids(&automatic(shards, &all, &machine, interface));
        assert_eq!(place(2, Some("nic0")), [Some(7), Some(5)], "node 1, and neither 4 nor 6");
        assert_eq!(
            place(4, Some("nic0")),
            [Some(7), Some(5), Some(3), Some(1)],
            "a far physical core is better than half of a near one"
        );
        assert_eq!(
            place(6, Some("nic0"))[4..],
            [Some(6), Some(4)],
            "then the other halves, near ones first"
        );
        assert_eq!(place(2, None), [Some(7), Some(5)]);
        let busy = [3, 6];
        assert_eq!(
            ids(&automatic(2, &busy, &machine, Some("nic0"))),
            [Some(6), Some(3)],
            "the card's interrupts are better than a far node"
        );
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
        let error = place(&config, None).expect_err("no such core").to_string();
        assert!(error.contains("9999") && error.contains("only"), "{error}");
    }
}
