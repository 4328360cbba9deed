//! The AF_XDP datapath.

pub mod program;
