//! STOQ: a kernel-bypass QUIC data-plane engine.
#![deny(unsafe_code)]

pub mod clock;
pub mod datapath;
pub mod doctor;
mod sys;
