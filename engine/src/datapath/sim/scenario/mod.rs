//! The scenario file of `stoq sim`: links, flows and how long to run them.
//!
//! [`Scenario::parse`] reads TOML and checks every key: what it returns can be
//! run. Keys that a file leaves out have these values: `seed` 1,
//! `time_limit_ms` 120000, no queue limit, `mtu` 1500, `cc` "bbr2",
//! `direction` "upload", `streams` 1, everything else 0. `name`,
//! `link.rate_bps` and one `[[flow]]` are required.
//!
//! `[link]` is the direction from client to server. The other direction is the
//! same but for the keys given in `[link.reverse]`, steps included: a
//! `[[link.step]]` changes both, except for keys that `[link.reverse]` has fixed,
//! which `[[link.reverse.step]]` changes. Steps add up: a key stays as the last
//! step that gave it has set it.

mod raw;

use serde::Serialize;

use super::link::{LinkConfigError, LinkPlan};

/// Seed of a file that gives none.
pub const SEED_DEFAULT: u64 = 1;
/// Time limit of a file that gives none.
pub const TIME_LIMIT_MS_DEFAULT: u64 = 120_000;
/// The longest virtual time: one day.
pub const TIME_LIMIT_MS_MAX: u64 = 86_400_000;
/// The most flows of a scenario.
pub const FLOWS_MAX: usize = 1_000;
/// The most streams of a flow.
pub const STREAMS_MAX: u64 = 10_000;
/// The most bytes of a flow: 1 TB.
pub const FLOW_BYTES_MAX: u64 = 1_000_000_000_000;
/// The most bytes of one burst: 1 GB.
pub const BURST_BYTES_MAX: u64 = 1_000_000_000;
/// The most bursts of a flow.
pub const CHUNKS_MAX: u64 = 1_000_000;

/// A checked scenario.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// What it is called in outputs.
    pub name: String,
    /// Seed of all randomness, unless the command line gives another.
    pub seed: u64,
    /// Virtual time at which it ends whatever happens.
    pub time_limit_ms: u64,
    /// The link from client to server.
    pub forward: LinkPlan,
    /// The link from server to client.
    pub reverse: LinkPlan,
    /// A first hop of every sender, before the link; its delay counts both ways.
    pub access: Option<AccessConfig>,
    /// The flows, each a connection of its own; all share the link.
    pub flows: Vec<FlowSpec>,
}

/// A sender's first hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccessConfig {
    /// Its rate in bits of IP packets a second.
    pub rate_bps: u64,
    /// Its one-way delay.
    pub delay_us: u64,
}

/// A congestion control by the name that it has in files and outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CongestionControlName {
    /// BBRv2, the engine's default.
    #[default]
    Bbr2,
    /// BBRv3.
    Bbr3,
    /// CUBIC (RFC 9438).
    Cubic,
    /// NewReno (RFC 9002 §7).
    NewReno,
}

impl CongestionControlName {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Bbr2, Self::Bbr3, Self::Cubic, Self::NewReno];

    /// The name in files and outputs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bbr2 => "bbr2",
            Self::Bbr3 => "bbr3",
            Self::Cubic => "cubic",
            Self::NewReno => "newreno",
        }
    }
}

/// Which end of a flow sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FlowDirection {
    /// Client to server.
    #[default]
    Upload,
    /// Server to client.
    Download,
}

impl FlowDirection {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Upload, Self::Download];

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Download => "download",
        }
    }
}

/// One connection and what it sends.
///
/// With `chunks` > 0, `bytes` go first, then one burst of `chunk_bytes` every
/// `chunk_every_ms`, `chunks` times. With `chunk_bytes` but no `chunks`, `bytes`
/// themselves go in such bursts. Otherwise `bytes` go as fast as they may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowSpec {
    /// Its sender's congestion control.
    pub cc: CongestionControlName,
    /// When it connects, in virtual time.
    pub start_ms: u64,
    /// Stream bytes, over all streams.
    pub bytes: u64,
    /// Which end sends them.
    pub direction: FlowDirection,
    /// How many streams share them.
    pub streams: u64,
    /// Bytes of a burst; 0 is off.
    pub chunk_bytes: u64,
    /// Time from burst to burst.
    pub chunk_every_ms: u64,
    /// Number of bursts after `bytes`.
    pub chunks: u64,
    /// What an earlier connection knew of the path, for careful resume.
    pub resume: Option<ResumeSpec>,
}

impl FlowSpec {
    /// All stream bytes that the flow carries.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.bytes + self.chunks * self.chunk_bytes
    }
}

/// A path as an earlier connection saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeSpec {
    /// Its rate.
    pub rate_bps: u64,
    /// Its smallest RTT.
    pub rtt_us: u64,
}

impl Scenario {
    /// Reads and checks a scenario file.
    ///
    /// # Errors
    /// What is wrong with it, naming the key, its value and what is allowed.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        raw::RawScenario::parse(text)?.check()
    }
}

/// Why a scenario file was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ScenarioError {
    /// Not TOML, an unknown or missing key, or a value of the wrong type; the text shows where.
    #[error("the scenario file is wrong: {0}")]
    Syntax(#[from] toml::de::Error),
    /// A key has a value that it cannot have.
    #[error("{key} = {value}: expected {expected}")]
    Value {
        /// The key with its table: `link.step[0].rate_bps`.
        key: String,
        /// Its value.
        value: String,
        /// What it may be.
        expected: String,
    },
}

impl ScenarioError {
    fn value(key: String, value: impl ToString, expected: impl Into<String>) -> Self {
        Self::Value { key, value: value.to_string(), expected: expected.into() }
    }

    fn of_link(table: &str, error: LinkConfigError) -> Self {
        let LinkConfigError { key, value, expected } = error;
        Self::Value { key: format!("{table}.{key}"), value, expected }
    }
}

#[cfg(test)]
mod tests;
