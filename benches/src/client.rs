//! What the clients share: where to connect, whom to trust, progress.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args as ClapArgs;
use hdrhistogram::Histogram;
use serde_json::json;

use crate::output;

/// How often the RTT is sampled.
pub const SAMPLE_INTERVAL: Duration = Duration::from_millis(10);
/// How often progress is told.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Whom a client trusts.
#[derive(ClapArgs, Clone, Debug)]
pub struct TrustArgs {
    /// Roots to trust (PEM): the server's `--cert-out`, or `stoq ca root`.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Trust these roots alone for the server of this name or address; may be given again.
    #[arg(long, value_name = "NAME=FILE")]
    pub pin: Vec<String>,
    /// Refuse servers that a list in this file (PEM) revokes, or for whose issuer it has none.
    #[arg(long, value_name = "FILE", requires = "ca")]
    pub crl: Option<PathBuf>,
    /// Certificate chain to show to a server that asks for one (PEM); needs --key.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Private key of --cert (PEM, mode 0600).
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// Offer post-quantum key exchange (X25519MLKEM768) alone.
    #[arg(long)]
    pub require_post_quantum: bool,
    /// Trust any certificate: for measurements against a peer of your own only.
    #[arg(long, conflicts_with_all = ["ca", "pin", "crl"])]
    pub danger_insecure: bool,
    /// Name that the server's certificate must show; its address otherwise.
    #[arg(long)]
    pub server_name: Option<String>,
    /// Address to connect from.
    #[arg(long)]
    pub bind: Option<Ipv6Addr>,
}

impl TrustArgs {
    /// The address to bind a client to: an unspecified one, or the one asked for.
    pub fn bind_addr(&self, scope_id: u32) -> SocketAddrV6 {
        SocketAddrV6::new(self.bind.unwrap_or(Ipv6Addr::UNSPECIFIED), 0, 0, scope_id)
    }

    /// The name to expect of `peer`.
    pub fn name_of(&self, peer: &SocketAddrV6) -> String {
        self.server_name.clone().unwrap_or_else(|| peer.ip().to_string())
    }
}

/// Splits `https://[addr]:port/path` into the peer and the path.
pub fn parse_url(url: &str) -> anyhow::Result<(SocketAddrV6, String)> {
    let rest =
        url.strip_prefix("https://").with_context(|| format!("{url}: not an https:// URL"))?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let authority =
        if authority.ends_with(']') { format!("{authority}:443") } else { authority.to_owned() };
    let peer = authority
        .parse()
        .with_context(|| format!("{url}: `{authority}` is not `[IPv6 address]:port`"))?;
    Ok((peer, format!("/{path}")))
}

/// Round-trip times of a run, µs.
pub struct RttSamples(Histogram<u64>);

impl RttSamples {
    /// None yet.
    pub fn new() -> Self {
        Self(Histogram::new_with_bounds(1, 60_000_000, 3).expect("constant bounds are valid"))
    }

    /// Adds a sample.
    pub fn record(&mut self, rtt: Duration) {
        self.0.saturating_record(rtt.as_micros() as u64);
    }

    /// The median, µs; 0 without samples.
    pub fn p50_us(&self) -> u64 {
        if self.0.is_empty() { 0 } else { self.0.value_at_quantile(0.5) }
    }
}

/// Tells progress about once a second.
pub struct Progress {
    json: bool,
    start: std::time::Instant,
    last: std::time::Instant,
    last_bytes: u64,
}

/// A reading for [`Progress`].
pub struct Reading {
    /// Bytes carried so far.
    pub bytes: u64,
    /// Round-trip time now.
    pub rtt: Duration,
    /// Packets lost so far.
    pub packets_lost: u64,
    /// Busy share of each shard.
    pub shards: Vec<f64>,
}

impl Progress {
    /// Starts the clock.
    pub fn new(json: bool) -> Self {
        let now = std::time::Instant::now();
        Self { json, start: now, last: now, last_bytes: 0 }
    }

    /// Whether the next report is due.
    pub fn due(&self) -> bool {
        self.last.elapsed() >= PROGRESS_INTERVAL
    }

    /// Seconds since the last report.
    pub fn interval_s(&self) -> f64 {
        self.last.elapsed().as_secs_f64()
    }

    /// Prints a report.
    pub fn report(&mut self, reading: &Reading) -> anyhow::Result<()> {
        let interval_s = self.interval_s();
        let bps = (reading.bytes - self.last_bytes) as f64 * 8.0 / interval_s;
        self.last = std::time::Instant::now();
        self.last_bytes = reading.bytes;
        let rtt_us = reading.rtt.as_micros() as u64;
        if self.json {
            return output::json_line(&json!({
                "event": "progress",
                "bytes": reading.bytes,
                "seconds": self.start.elapsed().as_secs_f64(),
                "goodput_bps": bps,
                "rtt_us": rtt_us,
                "packets_lost": reading.packets_lost,
                "shards": reading.shards,
            }));
        }
        eprintln!(
            "{:>6.1} s  {:>10}  {:>14}  RTT {rtt_us} µs  lost {}",
            self.start.elapsed().as_secs_f64(),
            output::size(reading.bytes),
            output::rate(bps),
            reading.packets_lost,
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let (peer, path) = parse_url("https://[::1]:4433/a/b").expect("valid");
        assert_eq!((peer.port(), path.as_str()), (4433, "/a/b"));
        assert_eq!(parse_url("https://[fe80::1%3]/").expect("valid").0.scope_id(), 3);
        for bad in ["http://[::1]/", "https://127.0.0.1:1/", "https://host/", "[::1]:1"] {
            assert!(parse_url(bad).is_err(), "{bad}");
        }
    }
}
