//! Kernel calls and the memory that is shared with the kernel: one of the few places where `unsafe` lives.
//!
//! Everything here is a thin, typed wrapper: it states the kernel's contract in
//! its types or in a `# Safety` section, returns the bare [`std::io::Error`] of
//! the system call, and leaves names, advice and policy to its callers.
#![allow(unsafe_code)]

pub(crate) mod bpf;
pub(crate) mod cursor;
pub(crate) mod ethtool;
pub(crate) mod ipsec_mb;
pub(crate) mod mmap;
pub(crate) mod numa;
pub(crate) mod raw_array;
#[cfg(feature = "privileged-tests")]
pub mod testing;
pub(crate) mod udp;
pub(crate) mod uring;
pub(crate) mod xsk;
