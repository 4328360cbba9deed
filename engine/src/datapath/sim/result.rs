//! What a scenario's run came to: the object that `stoq sim --json` prints.

use serde::Serialize;

use super::link::LinkCounters;
use super::scenario::CongestionControlName;

/// One run of a scenario.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScenarioResult {
    /// The scenario's name.
    pub name: String,
    /// The seed that it ran with: the file's, or the one that took its place.
    pub seed: u64,
    /// Virtual time at the end.
    pub virtual_ms: u64,
    /// One entry for each flow, in the file's order.
    pub flows: Vec<FlowResult>,
    /// The link from client to server.
    pub link: LinkCounters,
    /// The link from server to client.
    pub link_reverse: LinkCounters,
    /// Jain's fairness index over the flows' goodput.
    pub jain: f64,
    /// Digest of all packet events, as hexadecimal digits: equal for equal runs.
    pub digest: String,
}

impl ScenarioResult {
    /// The digits of [`digest`](Self::digest) for
    /// [`SimNetwork::digest`](super::SimNetwork::digest).
    #[must_use]
    pub fn digest_text(digest: u64) -> String {
        format!("{digest:016x}")
    }
}

/// One flow: its own connection.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlowResult {
    /// Its congestion control.
    pub cc: CongestionControlName,
    /// When it started, in virtual time.
    pub start_ms: u64,
    /// When its last byte was received; `None` when the time limit or a [failure](Self::failure)
    /// came first.
    pub completed_ms: Option<u64>,
    /// Stream bytes received.
    pub bytes: u64,
    /// Stream bits received a second, from the start to the end of the flow.
    pub goodput_bps: u64,
    /// QUIC packets that the flow's sender sent.
    pub packets_sent: u64,
    /// Those of them that it declared lost.
    pub packets_lost: u64,
    /// `packets_lost` / `packets_sent`; 0 when none was sent.
    pub loss: f64,
    /// Packets declared lost and acknowledged after all.
    pub spurious_losses: u64,
    /// Median of the smoothed RTT over the flow's life.
    pub srtt_us_p50: u64,
    /// 99th percentile of it.
    pub srtt_us_p99: u64,
    /// Smallest RTT measured.
    pub min_rtt_us: u64,
    /// The controller's bandwidth estimate at the end; `None` for a controller without one.
    pub bandwidth_estimate_bps: Option<u64>,
    /// Congestion window at the end.
    pub cwnd_bytes: u64,
    /// BBR's long-term bound on the bytes in flight; `None` when there is none.
    pub inflight_hi_bytes: Option<u64>,
    /// The controller's states and when each was entered, in virtual milliseconds.
    pub states: Vec<(u64, String)>,
    /// Why the flow ended before its last byte; `None` unless its connection failed.
    pub failure: Option<String>,
}

impl FlowResult {
    /// Bits a second of `bytes` in `elapsed_us`; 0 when no time has passed.
    #[must_use]
    pub fn goodput(bytes: u64, elapsed_us: u64) -> u64 {
        let bits_us = u128::from(bytes) * 8_000_000;
        let rate_bps = bits_us.checked_div(u128::from(elapsed_us)).unwrap_or(0);
        u64::try_from(rate_bps).unwrap_or(u64::MAX)
    }

    /// Share of packets lost; 0 when none was sent.
    #[must_use]
    pub fn loss(packets_lost: u64, packets_sent: u64) -> f64 {
        if packets_sent == 0 {
            return 0.0;
        }
        packets_lost as f64 / packets_sent as f64
    }
}

/// Jain's fairness index: (Σx)² / (n Σx²). 1 when all have the same, 1/n when one
/// has it all; 1 by convention for no flow, or when none has anything.
#[must_use]
pub fn jain_index(rates: impl IntoIterator<Item = f64>) -> f64 {
    let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for rate in rates {
        count += 1.0;
        sum += rate;
        squares += rate * rate;
    }
    if squares == 0.0 { 1.0 } else { sum * sum / (count * squares) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jain_of_equal_unequal_and_none() {
        assert!((jain_index([5.0, 5.0, 5.0]) - 1.0).abs() < 1e-12);
        assert!((jain_index([8.0, 0.0, 0.0, 0.0]) - 0.25).abs() < 1e-12);
        assert!((jain_index([1.0, 3.0]) - 0.8).abs() < 1e-12);
        assert!((jain_index([]) - 1.0).abs() < 1e-12);
        assert!((jain_index([0.0, 0.0]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn goodput_does_not_overflow_or_divide_by_zero() {
        assert_eq!(FlowResult::goodput(1_250_000, 1_000_000), 10_000_000);
        assert_eq!(FlowResult::goodput(1, 0), 0);
        assert_eq!(FlowResult::goodput(u64::MAX, 1), u64::MAX);
        assert!(FlowResult::loss(0, 0).abs() < 1e-12);
        assert!((FlowResult::loss(1, 4) - 0.25).abs() < 1e-12);
    }

    #[test]
    fn the_object_has_the_documented_keys() {
        let flow = FlowResult {
            cc: CongestionControlName::Bbr2,
            start_ms: 0,
            completed_ms: None,
            bytes: 1,
            goodput_bps: 2,
            packets_sent: 3,
            packets_lost: 0,
            loss: 0.0,
            spurious_losses: 0,
            srtt_us_p50: 4,
            srtt_us_p99: 5,
            min_rtt_us: 6,
            bandwidth_estimate_bps: Some(7),
            cwnd_bytes: 8,
            inflight_hi_bytes: None,
            states: vec![(12, "Startup".to_owned())],
            failure: None,
        };
        let result = ScenarioResult {
            name: "keys".to_owned(),
            seed: 7,
            virtual_ms: 9,
            flows: vec![flow],
            link: LinkCounters::default(),
            link_reverse: LinkCounters::default(),
            jain: 1.0,
            digest: ScenarioResult::digest_text(0xab),
        };
        let json = serde_json::to_value(&result).expect("plain data");
        for key in ["name", "seed", "virtual_ms", "flows", "link", "jain"] {
            assert!(json.get(key).is_some(), "{key}");
        }
        let flow = &json["flows"][0];
        assert_eq!(flow["cc"], "bbr2");
        assert!(flow["completed_ms"].is_null());
        assert_eq!(flow["states"], serde_json::json!([[12, "Startup"]]));
        let link = json["link"].as_object().expect("an object");
        for key in [
            "delivered",
            "dropped_queue",
            "dropped_loss",
            "dropped_policer",
            "dropped_mtu",
            "marked_ce",
            "queue_bytes_max",
        ] {
            assert!(link.contains_key(key), "{key}");
        }
        assert_eq!(json["digest"], "00000000000000ab");
    }
}
