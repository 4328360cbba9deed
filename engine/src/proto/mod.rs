//! The QUIC protocol side of a shard.

pub mod bbr;
