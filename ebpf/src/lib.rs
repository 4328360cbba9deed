//! What the eBPF programs and userspace share: the header decoder, the judgement
//! of a packet, the choice of a shard, the layout of the maps, and the compiled
//! objects.
//!
//! ```text
//!   programs/ (bpfel)                     userspace
//!   ┌─────────────────────┐               ┌──────────────────────────────┐
//!   │ stoq_xdp            │   decode,     │ fixtures, fuzzers            │
//!   │  Packet: xdp_md     ├── judge   ────┤  Packet: [u8]                │
//!   │  Tables: BPF maps   │   maps        │  Tables: Rust collections    │
//!   └─────────┬───────────┘               └──────────────────────────────┘
//!             │ cargo xtask ebpf build
//!             ▼
//!   objects/stoq_xdp.bpf.o ── XDP_OBJECT ──▶ the engine loads it with aya
//!
//!   stoq_reuseport (connection ID → shard's socket) goes the same way: `steer` decides in the
//!   program and in the shards' hand-off.
//! ```
//!
//! Invariants:
//! * `decode`, `judge`, `steer` and `maps` have no `unsafe`, no allocation and no panic
//!   path, so that they compile to eBPF as they are. `unsafe` in this crate
//!   would have to live in `programs/`, where the kernel's pointers are.
//! * `objects/SOURCES.sha256` names the sources that the committed object was
//!   built from; `cargo xtask ebpf check` compares.
#![no_std]
#![deny(unsafe_code)]

pub mod decode;
pub mod judge;
pub mod maps;
#[cfg(feature = "objects")]
mod objects;
pub mod quic;
pub mod siphash;
pub mod steer;

pub use decode::{Address, Decoded, Packet, UdpDatagram, decode};
pub use judge::{Tables, Verdict, judge};
pub use maps::{
    Counter, PORT_KEY_BYTES, PORTS_MAX, PortKey, PortValue, QUEUES_MAX, SHARDS_MAX, SteerCounter,
};
#[cfg(feature = "objects")]
pub use objects::{REUSEPORT_OBJECT, SOURCES_SHA256, XDP_OBJECT};
