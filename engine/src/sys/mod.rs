//! Kernel calls that need `unsafe`, behind safe interfaces.

pub(crate) mod raw_array;
pub(crate) mod udp;
pub(crate) mod uring;
