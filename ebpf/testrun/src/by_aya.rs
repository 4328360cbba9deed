//! Loaded by aya.

use std::os::fd::BorrowedFd;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData, PerCpuArray, XskMap};
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use stoq_ebpf::{Counter, PORT_KEY_BYTES, PortKey, PortValue, maps};

use crate::{LoadedObject, context};

/// The object, loaded by aya.
pub struct AyaObject {
    ebpf: Ebpf,
    ports: HashMap<MapData, [u8; PORT_KEY_BYTES], PortValue>,
    sockets: XskMap<MapData>,
    counters: PerCpuArray<MapData, u64>,
}

impl AyaObject {
    /// Loads maps and program.
    ///
    /// # Errors
    /// What aya or the verifier has against them.
    pub fn load(object: &[u8]) -> Result<Self> {
        let mut ebpf = EbpfLoader::new().load(object)?;
        let mut map = |name| ebpf.take_map(name).with_context(|| format!("no map {name}"));
        let ports = map(maps::PORTS_MAP)?.try_into()?;
        let sockets = map(maps::SOCKETS_MAP)?.try_into()?;
        let counters = map(maps::COUNTERS_MAP)?.try_into()?;
        let mut object = Self { ebpf, ports, sockets, counters };
        object.program()?.load()?;
        Ok(object)
    }

    fn program(&mut self) -> Result<&mut Xdp> {
        let program = self.ebpf.program_mut(maps::XDP_PROGRAM).context("no such program")?;
        Ok(program.try_into()?)
    }
}

impl LoadedObject for AyaObject {
    fn register(&mut self, key: &PortKey) -> Result<()> {
        Ok(self.ports.insert(key.to_bytes(), 0, 0)?)
    }

    fn set_socket(&mut self, socket: Option<BorrowedFd<'_>>) -> Result<()> {
        match socket {
            Some(socket) => self.sockets.set(0, socket, 0)?,
            None => self.sockets.unset(0)?,
        }
        Ok(())
    }

    fn run(&mut self, packet: &[u8], linear_bytes: Option<usize>) -> Result<u32> {
        let context = linear_bytes.map(context);
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.ctx_in = context.as_ref().map(|context| &context[..]);
        Ok(self.program()?.test_run(options)?.return_value)
    }

    fn counters(&self) -> Result<Vec<u64>> {
        let sum = |counter: &Counter| {
            let per_cpu = self.counters.get(&counter.index(), 0)?;
            Ok(per_cpu.iter().sum())
        };
        Counter::ALL.iter().map(sum).collect()
    }
}
