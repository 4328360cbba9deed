//! The `SO_REUSEPORT` program: the kernel gives each packet to the socket of the shard that owns
//! its connection.
//!
//! One program per group of sockets that share a port. It decides as the shards do
//! ([`stoq_ebpf::steer`]), by a copy of the same table, and keeps nothing per connection. Where it
//! cannot be loaded (no privilege, an old or restricted kernel) the kernel spreads packets by their
//! addresses and ports, and shards hand over what is not theirs.
//!
//! The group holds the program: it goes when the last socket is closed, however the process ends.
//! Lowest kernel: 4.19, and CAP_BPF (5.8; CAP_SYS_ADMIN before). None of this runs per packet.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{Array, MapData, PerCpuArray, ReusePortSockArray};
use aya::programs::SkReuseport;
use aya::{EbpfError, EbpfLoader};
use stoq_ebpf::steer::{STEER_TABLE_BYTES, SteerTable};
use stoq_ebpf::{REUSEPORT_OBJECT, SteerCounter, maps};

/// Why packets are not steered in the kernel.
#[derive(Debug, thiserror::Error)]
#[error(
    "{step}: {source}; packets are handed over between shards instead, which costs a copy each: \
     run as root or `setcap cap_bpf+ep` on the program (Linux 4.19 is needed)"
)]
pub(crate) struct SteeringError {
    step: &'static str,
    source: EbpfError,
}

/// The program on one group of sockets, shared by whoever rotates or reads it.
#[derive(Clone)]
pub struct SteeringHandle(Arc<Program>);

struct Program {
    table: Mutex<Array<MapData, [u8; STEER_TABLE_BYTES]>>,
    counters: PerCpuArray<MapData, u64>,
}

impl SteeringHandle {
    /// Loads the program and attaches it to the group of `sockets`, which are in the order of their
    /// shards.
    pub(crate) fn attach(
        sockets: &[BorrowedFd<'_>],
        table: &SteerTable,
    ) -> Result<Self, SteeringError> {
        let failed = |step| move |source: EbpfError| SteeringError { step, source };
        let loading = failed("cannot load the SO_REUSEPORT program");
        let mut ebpf = EbpfLoader::new().load(REUSEPORT_OBJECT).map_err(loading)?;
        let mut take = |name| ebpf.take_map(name).expect("the object has the maps of `maps`");
        let (tables, shards, counters) =
            (take(maps::STEER_MAP), take(maps::SHARDS_MAP), take(maps::STEER_COUNTERS_MAP));
        let typed = || -> Result<_, EbpfError> {
            let mut tables: Array<_, [u8; STEER_TABLE_BYTES]> = tables.try_into()?;
            tables.set(0, table.to_bytes(), 0)?;
            let mut shards: ReusePortSockArray<_> = shards.try_into()?;
            for (shard, socket) in (0..).zip(sockets) {
                shards.set(shard, socket, 0)?;
            }
            Ok((tables, shards, counters.try_into()?))
        };
        // The sockets' map must live until the program that names it is loaded.
        let (tables, _shards, counters) =
            typed().map_err(failed("cannot set up the steering maps"))?;
        let program: &mut SkReuseport = ebpf
            .program_mut(maps::REUSEPORT_PROGRAM)
            .and_then(|program| program.try_into().ok())
            .expect("the object has the program of `maps`");
        program.load().map_err(|error| loading(error.into()))?;
        let first = sockets.first().expect("a group has a socket");
        let attaching = failed("cannot attach the SO_REUSEPORT program");
        program.attach(first).map_err(|error| attaching(error.into()))?;
        // Program and sockets' map live on in the group; `ebpf` closes only our descriptors of them.
        Ok(Self(Arc::new(Program { table: Mutex::new(tables), counters })))
    }

    /// Replaces what decides.
    pub(crate) fn set_table(&self, table: &SteerTable) -> Result<(), String> {
        let mut tables = self.0.table.lock().unwrap_or_else(PoisonError::into_inner);
        tables.set(0, table.to_bytes(), 0).map_err(|error| error.to_string())
    }

    /// The counters for an exporter: none where no program runs, a logged gap where the kernel does
    /// not answer.
    pub(crate) fn published(steering: Option<&Self>) -> Vec<(&'static str, u64)> {
        match steering.map(Self::counters) {
            Some(Ok(counters)) => counters,
            Some(Err(error)) => {
                tracing::warn!(error, "no counters of the SO_REUSEPORT program");
                Vec::new()
            }
            None => Vec::new(),
        }
    }

    /// Every counter with its name, summed over the CPUs.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, String> {
        let sum = |counter: &SteerCounter| {
            let per_cpu = self.0.counters.get(&counter.index(), 0);
            let per_cpu = per_cpu.map_err(|error| error.to_string())?;
            Ok((counter.name(), per_cpu.iter().sum()))
        };
        SteerCounter::ALL.iter().map(sum).collect()
    }
}
