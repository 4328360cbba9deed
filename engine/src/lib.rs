//! STOQ: a kernel-bypass QUIC data-plane engine.
#![deny(unsafe_code)]

pub mod app;
pub mod clock;
pub mod config;
pub mod connection;
pub mod datapath;
pub mod engine;
pub mod error;
mod handles;
pub mod metrics;
pub mod proto;
pub mod shard;
pub mod sim;
pub mod stream;

pub use quinn_proto::{Dir, StreamId, VarInt};
