//! What a run was: one JSON object, the same for every stack.

use std::net::SocketAddrV6;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::cpu::{CpuTime, rss_bytes};
use crate::latency::{Latencies, LatencyUs};
use crate::link::Link;

/// What one end used while the clock ran.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EndUse {
    /// CPU time in user mode, seconds.
    pub cpu_user_s: f64,
    /// CPU time in the kernel on the process's behalf, seconds.
    pub cpu_sys_s: f64,
    /// Both, for each 10⁹ bytes carried; `None` when nothing was.
    pub cpu_s_per_gb: Option<f64>,
    /// Resident memory at the end, bytes.
    pub rss_bytes: u64,
}

/// A finished run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// Always `done`.
    pub event: String,
    /// What was done: `upload`, `download`, `bidi`, `requests`, `handshakes`, `handshakes-resumed`,
    /// `datagrams`, `idle`, `raw`.
    pub workload: String,
    /// By whom.
    pub stack: String,
    /// Interface that carried it.
    pub link: Option<String>,
    /// Its MTU, bytes.
    pub mtu: Option<u32>,
    /// Largest UDP payload at the end, bytes; `None` where there is no UDP.
    pub udp_payload: Option<u64>,
    /// Length of the measurement.
    pub seconds: f64,
    /// Bytes of application data carried, both directions together.
    pub bytes: u64,
    /// Their rate.
    pub goodput_bps: f64,
    /// Requests, handshakes or datagrams done; 0 for bulk.
    pub ops: u64,
    /// Their rate.
    pub ops_per_s: f64,
    /// Latencies of the operations, from the intended start.
    pub latency_us: Option<LatencyUs>,
    /// The same as a curve: quantiles and µs.
    #[serde(default)]
    pub latency_curve_us: Vec<(f64, f64)>,
    /// Packets this end declared lost; `None` where the stack does not say.
    pub packets_lost: Option<u64>,
    /// The end that measured.
    pub client: EndUse,
    /// The other end; `None` unless it is a process of this machine that was named.
    pub server: Option<EndUse>,
    /// What only this stack tells.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// What was counted while the clock ran.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Bytes of application data.
    pub bytes: u64,
    /// Operations.
    pub ops: u64,
    /// Their latencies.
    pub latencies: Latencies,
    /// Packets lost.
    pub packets_lost: Option<u64>,
    /// Largest UDP payload, bytes.
    pub udp_payload: Option<u64>,
    /// What only this stack tells.
    pub more: Map<String, Value>,
}

/// A clock that runs: CPU times of both ends at its start.
#[derive(Debug, Clone)]
pub struct Meter {
    start: Instant,
    client: CpuTime,
    server: Option<(u32, CpuTime)>,
}

impl Meter {
    /// Starts; `server_pid` names the other end's process on this machine.
    ///
    /// # Errors
    /// `/proc` does not tell.
    pub fn start(server_pid: Option<u32>) -> anyhow::Result<Self> {
        let server =
            server_pid.map(|pid| anyhow::Ok((pid, CpuTime::of(Some(pid))?))).transpose()?;
        Ok(Self { start: Instant::now(), client: CpuTime::of(None)?, server })
    }

    /// Time since the start, seconds.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Stops; `peer` says over which link, where that is known.
    ///
    /// # Errors
    /// `/proc` does not tell: the server has ended.
    pub fn finish(
        self,
        stack: &str,
        workload: &str,
        peer: Option<SocketAddrV6>,
        counts: Counts,
    ) -> anyhow::Result<Outcome> {
        let seconds = self.seconds();
        let gigabytes = counts.bytes as f64 / 1e9;
        let used = |pid, since: CpuTime| -> anyhow::Result<EndUse> {
            let cpu = CpuTime::of(pid)?.since(since);
            let total = cpu.user_s + cpu.sys_s;
            Ok(EndUse {
                cpu_user_s: cpu.user_s,
                cpu_sys_s: cpu.sys_s,
                cpu_s_per_gb: (counts.bytes > 0).then(|| total / gigabytes),
                rss_bytes: rss_bytes(pid)?,
            })
        };
        let link = peer.map(Link::towards).transpose()?;
        Ok(Outcome {
            event: "done".into(),
            workload: workload.into(),
            stack: stack.into(),
            mtu: link.as_ref().map(|link| link.mtu),
            link: link.map(|link| link.name),
            udp_payload: counts.udp_payload,
            seconds,
            bytes: counts.bytes,
            goodput_bps: counts.bytes as f64 * 8.0 / seconds,
            ops: counts.ops,
            ops_per_s: counts.ops as f64 / seconds,
            latency_us: counts.latencies.quantiles(),
            latency_curve_us: counts.latencies.curve_us(),
            packets_lost: counts.packets_lost,
            client: used(None, self.client)?,
            server: self.server.map(|(pid, since)| used(Some(pid), since)).transpose()?,
            more: counts.more,
        })
    }
}

impl Outcome {
    /// CPU seconds of both ends for each 10⁹ bytes; of the client alone when the server is not known.
    #[must_use]
    pub fn cpu_s_per_gb(&self) -> Option<f64> {
        let server = self.server.and_then(|server| server.cpu_s_per_gb).unwrap_or(0.0);
        Some(self.client.cpu_s_per_gb? + server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(bytes: u64) -> Outcome {
        let meter = Meter::start(Some(std::process::id())).expect("proc");
        let mut counts = Counts { bytes, ops: 2, ..Counts::default() };
        counts.latencies.record(std::time::Duration::from_micros(7));
        counts.more.insert("datapath".into(), "socket".into());
        let peer = "[::1]:1".parse().expect("an address");
        meter.finish("x", "requests", Some(peer), counts).expect("proc")
    }

    #[test]
    fn the_keys_that_readers_rely_on() {
        let json = serde_json::to_value(outcome(1000)).expect("JSON");
        for key in [
            "workload",
            "stack",
            "link",
            "mtu",
            "udp_payload",
            "seconds",
            "bytes",
            "goodput_bps",
            "ops",
            "ops_per_s",
            "packets_lost",
            "datapath",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing in {json}");
        }
        for end in ["client", "server"] {
            for key in ["cpu_user_s", "cpu_sys_s", "cpu_s_per_gb", "rss_bytes"] {
                assert!(json[end].get(key).is_some(), "{end}.{key} is missing in {json}");
            }
        }
        for key in ["p50", "p99", "p999"] {
            assert!(json["latency_us"][key].is_number(), "latency_us.{key} is missing in {json}");
        }
        assert_eq!(json["link"], "lo");
        let back: Outcome = serde_json::from_value(json).expect("reads what it wrote");
        assert_eq!((back.ops, back.more["datapath"].as_str()), (2, Some("socket")));
    }

    #[test]
    fn nothing_carried_costs_nothing_per_gigabyte() {
        assert_eq!(outcome(0).cpu_s_per_gb(), None);
        assert!(outcome(1).cpu_s_per_gb().is_some());
    }
}
