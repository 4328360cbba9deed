//! The XDP object in the kernel, by way of either loader.
//!
//! aya is what the engine loads with; libbpf is the second opinion: what both
//! load and run alike is a sound object and not one loader's reading of it.

mod by_aya;
mod by_libbpf;
pub mod reuseport;

use std::os::fd::BorrowedFd;

use anyhow::Result;
use stoq_ebpf::PortKey;

pub use by_aya::AyaObject;
pub use by_libbpf::LibbpfObject;

/// A loaded object: its maps, and its program ready to run on test packets.
pub trait LoadedObject {
    /// Puts a key into the port map.
    ///
    /// # Errors
    /// That of the system call.
    fn register(&mut self, key: &PortKey) -> Result<()>;

    /// Sets (or with `None` clears) the AF_XDP socket of queue 0.
    ///
    /// # Errors
    /// That of the system call.
    fn set_socket(&mut self, socket: Option<BorrowedFd<'_>>) -> Result<()>;

    /// Runs the program once (`BPF_PROG_TEST_RUN`, Linux ≥ 5.18 for packets
    /// over a page) and returns its action. The packet arrives by queue 0 of
    /// the loopback device. `linear_bytes` sets how much of it is in the first
    /// buffer (Linux ≥ 6.18).
    ///
    /// # Errors
    /// That of the system call: EINVAL for packets that it does not take.
    fn run(&mut self, packet: &[u8], linear_bytes: Option<usize>) -> Result<u32>;

    /// Every counter, summed over the CPUs, in the order of
    /// [`Counter::ALL`](stoq_ebpf::Counter::ALL).
    ///
    /// # Errors
    /// That of the system call.
    fn counters(&self) -> Result<Vec<u64>>;
}

/// `struct xdp_md` in which only `data_end`, the linear part's length, is set.
fn context(linear_bytes: usize) -> [u8; 24] {
    let mut context = [0; 24];
    let data_end = u32::try_from(linear_bytes).expect("a packet is shorter than 4 GiB");
    context[4..8].copy_from_slice(&data_end.to_ne_bytes());
    context
}
