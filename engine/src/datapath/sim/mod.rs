//! In-memory links in virtual time: the simulator's datapath.
//!
//! [`SimNetwork`] carries datagrams between [`SimDatapath`]s over links with
//! rate, delay, jitter, queue, loss, reordering, duplication, corruption, ECN,
//! aggregation, policing and MTU ([`LinkConfig`]); [`run`] drives
//! [`SimNode`]s — shards, workloads — over it in virtual time.
//! [`Scenario`] is the file format of `stoq sim`, [`ScenarioResult`] its
//! `--json` output, [`Plot`] its picture.
//!
//! Everything is deterministic: times are integer nanoseconds, randomness comes
//! from seeded streams ([`SimRng`]), events of one instant have a fixed order.
//! The same calls with the same seed give the same
//! [digest](SimNetwork::digest) of events.

mod endpoint;
mod event_loop;
mod fabric;
mod hop;
pub mod link;
mod log;
mod network;
mod packet;
pub mod plot;
mod policer;
mod result;
mod rng;
pub mod scenario;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod wire;

pub use endpoint::{RX_QUEUE_DATAGRAMS_MAX, SimDatapath, TX_RING_DATAGRAMS};
pub use event_loop::{RunEnd, SimNode, TURN_WINDOW, TURNS_PER_WINDOW_MAX, run, run_while};
pub use link::{
    BYTES_MAX, HEADER_BYTES, LinkConfig, LinkConfigError, LinkCounters, LinkPlan, LinkStep,
    MTU_MAX, MTU_MIN, QueueLimit, RATE_BPS_MAX, RATE_BPS_MIN, TIME_US_MAX,
};
pub use log::{Fate, PacketEvent};
pub use network::{
    Direction, EndpointId, Filter, INTERFACE_MTU_DEFAULT, LinkId, Prefix, SimNetwork, Tap,
};
pub use plot::{Band, Panel, Plot, Series};
pub use result::{FlowResult, ScenarioResult, jain_index};
pub use rng::{Probability, SimRng};
pub use scenario::{
    AccessConfig, CongestionControlName, FlowDirection, FlowSpec, ResumeSpec, Scenario,
    ScenarioError,
};
