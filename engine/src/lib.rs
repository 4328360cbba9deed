//! STOQ: a kernel-bypass QUIC data-plane engine.
#![deny(unsafe_code)]

pub mod app;
pub mod certs;
pub mod clock;
pub mod config;
pub mod connection;
pub mod datapath;
pub mod doctor;
pub mod engine;
pub mod error;
mod handles;
pub mod metrics;
mod placement;
pub mod pool;
pub mod proto;
pub mod shard;
pub mod sim;
pub mod stream;
mod sys;
pub mod transport;
mod umem;
pub mod wire;

pub use quinn_proto::{Dir, StreamId, VarInt};

/// Pins the calling thread to a core; `false` when the process may not use that core.
#[must_use]
pub fn pin_current_thread(core: usize) -> bool {
    core_affinity::set_for_current(core_affinity::CoreId { id: core })
}
