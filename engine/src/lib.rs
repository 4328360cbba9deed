//! STOQ: a kernel-bypass QUIC data-plane engine.
#![deny(unsafe_code)]

pub mod clock;
pub mod datapath;
mod sys;
