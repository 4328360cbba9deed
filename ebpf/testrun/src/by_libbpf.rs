//! Loaded by libbpf.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use anyhow::{Context as _, Result, ensure};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, Object, ObjectBuilder, ProgramInput};
use stoq_ebpf::{Counter, PortKey, PortValue, maps};

use crate::{LoadedObject, context};

/// The object, loaded by libbpf.
pub struct LibbpfObject {
    object: Object,
    ports: MapHandle,
    sockets: MapHandle,
    counters: MapHandle,
}

impl LibbpfObject {
    /// Loads maps and program.
    ///
    /// # Errors
    /// What libbpf or the verifier has against them.
    pub fn load(object: &[u8]) -> Result<Self> {
        let object = ObjectBuilder::default().open_memory(object)?.load()?;
        let map = |name: &str| {
            let map = object.maps().find(|map| map.name() == name);
            Ok::<_, anyhow::Error>(MapHandle::try_from(
                &map.with_context(|| format!("no map {name}"))?,
            )?)
        };
        let ports = map(maps::PORTS_MAP)?;
        let sockets = map(maps::SOCKETS_MAP)?;
        let counters = map(maps::COUNTERS_MAP)?;
        Ok(Self { object, ports, sockets, counters })
    }
}

impl LoadedObject for LibbpfObject {
    fn register(&mut self, key: &PortKey) -> Result<()> {
        let value: PortValue = 0;
        Ok(self.ports.update(&key.to_bytes(), &value.to_ne_bytes(), MapFlags::ANY)?)
    }

    fn set_socket(&mut self, socket: Option<BorrowedFd<'_>>) -> Result<()> {
        let queue = 0_u32.to_ne_bytes();
        match socket {
            Some(socket) => {
                self.sockets.update(&queue, &socket.as_raw_fd().to_ne_bytes(), MapFlags::ANY)?
            }
            None => self.sockets.delete(&queue)?,
        }
        Ok(())
    }

    fn run(&mut self, packet: &[u8], linear_bytes: Option<usize>) -> Result<u32> {
        let mut context = linear_bytes.map(context);
        let program = self.object.progs_mut().find(|program| program.name() == maps::XDP_PROGRAM);
        let input = ProgramInput {
            data_in: Some(packet),
            context_in: context.as_mut().map(|context| &mut context[..]),
            ..ProgramInput::default()
        };
        Ok(program.context("no such program")?.test_run(input)?.return_value)
    }

    fn counters(&self) -> Result<Vec<u64>> {
        let sum = |counter: &Counter| {
            let per_cpu = self
                .counters
                .lookup_percpu(&counter.index().to_ne_bytes(), MapFlags::ANY)?
                .with_context(|| format!("no counter {}", counter.name()))?;
            per_cpu.iter().try_fold(0, |sum, value| {
                ensure!(value.len() == 8, "{} has {} bytes", counter.name(), value.len());
                let value = value.first_chunk().expect("just checked");
                Ok(sum + u64::from_ne_bytes(*value))
            })
        };
        Counter::ALL.iter().map(sum).collect()
    }
}
