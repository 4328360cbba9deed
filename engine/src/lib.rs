//! STOQ: a kernel-bypass QUIC data-plane engine.
#![deny(unsafe_code)]

pub mod certs;
pub mod clock;
pub mod datapath;
