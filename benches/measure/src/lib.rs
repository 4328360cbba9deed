//! How everything is measured: the same clock, histograms, CPU readings and JSON for `stoq perf`
//! and for every peer of `stoq compare`.

pub mod cpu;
pub mod idle;
pub mod latency;
pub mod link;
pub mod outcome;
pub mod pace;
pub mod peer;
pub mod sessions;
pub mod window;
pub mod wire;
