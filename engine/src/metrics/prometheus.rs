//! Statistics as Prometheus text (exposition format 0.0.4).
//!
//! Names follow its conventions: `stoq_` in front, base units (seconds, bytes) at the end,
//! `_total` behind what only rises. Drops are one family with a `reason` label.

use std::fmt::Write;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::ShardMetrics;
use super::histogram::{Histogram, Merged};
use crate::certs::{CertificateFault, FaultCounters, RotatingIdentity, start_faults};
use crate::datapath::Capabilities;

/// Upper bounds of the exported latency buckets, ns: 1, 2 and 5 of every power of ten.
const LATENCY_BOUNDS_NS: [u64; 22] = [
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
    2_000_000_000,
    5_000_000_000,
    10_000_000_000,
];
/// Upper bounds of the exported batch buckets, packets.
const BATCH_BOUNDS: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
/// What is a present number, and not a total.
const SHARD_GAUGES: [&str; 3] = ["connections", "streams", "tx_queue_connections"];
const DATAPATH_GAUGES: [&str; 3] = ["frames_free", "frames_fill", "frames_tx"];
const POOL_GAUGES: [&str; 6] = ["peers", "connections", "idle", "leases", "connecting", "waiters"];

/// What an engine shows of certificates.
#[derive(Clone, Default)]
pub(crate) struct Certificates {
    /// The identity that is served.
    pub(crate) rotation: Option<Arc<RotatingIdentity>>,
    /// Further counters of faults, and who keeps them.
    pub(crate) faults: Vec<(&'static str, Arc<FaultCounters>)>,
}

/// Families of metrics in the order in which they were first named.
#[derive(Default)]
struct Exposition {
    families: Vec<Family>,
}

struct Family {
    name: String,
    kind: &'static str,
    help: String,
    samples: String,
}

impl Exposition {
    fn family(&mut self, name: &str, kind: &'static str, help: &str) -> &mut Family {
        let found = self.families.iter().position(|family| family.name == name);
        let index = found.unwrap_or_else(|| {
            self.families.push(Family {
                name: name.to_owned(),
                kind,
                help: help.trim().replace('\\', "\\\\").replace('\n', " "),
                samples: String::new(),
            });
            self.families.len() - 1
        });
        &mut self.families[index]
    }

    fn into_text(self) -> String {
        let mut text = String::new();
        for Family { name, kind, help, samples } in self.families {
            push(&mut text, format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}"));
        }
        text
    }
}

impl Family {
    fn sample(&mut self, suffix: &str, labels: &str, value: impl std::fmt::Display) {
        let name = &self.name;
        match labels.is_empty() {
            true => push(&mut self.samples, format_args!("{name}{suffix} {value}\n")),
            false => push(&mut self.samples, format_args!("{name}{suffix}{{{labels}}} {value}\n")),
        }
    }
}

fn push(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a String does not fail");
}

/// A label's value, escaped.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Everything that the shards publish, and what the kernel steered to them.
pub(crate) fn render<'a>(
    shards: impl IntoIterator<Item = &'a ShardMetrics>,
    steered: &[(&str, u64)],
    certificates: &Certificates,
) -> String {
    let mut out = Exposition::default();
    let version = concat!("version=\"", env!("CARGO_PKG_VERSION"), "\"");
    out.family("stoq_build_info", "gauge", "The engine's version.").sample("", version, 1);
    for (number, metrics) in shards.into_iter().enumerate() {
        let shard = format!("shard=\"{number}\"");
        info(&mut out, &shard, &metrics.path());
        for (name, help, value) in metrics.shard().described() {
            let is_gauge = SHARD_GAUGES.contains(&name);
            counter(&mut out, "shard", name, help, value, &shard, is_gauge);
        }
        for (name, help, value) in metrics.datapath().described() {
            let is_gauge = DATAPATH_GAUGES.contains(&name);
            counter(&mut out, "datapath", name, help, value, &shard, is_gauge);
        }
        for (name, help, value) in metrics.pool().described() {
            let is_gauge = POOL_GAUGES.contains(&name);
            counter(&mut out, "pool", name, help, value, &shard, is_gauge);
        }
        let latencies = [
            ("stoq_shard_turn_seconds", &metrics.turn_ns, "How long turns took that found work."),
            ("stoq_rtt_seconds", &metrics.rtt_ns, "Round-trip times, one sample per ACK."),
            (
                "stoq_shard_mailbox_wait_seconds",
                &metrics.mailbox_wait_ns,
                "How long the oldest command waited each time that the mailbox was emptied.",
            ),
        ];
        for (name, histogram, help) in latencies {
            let family = out.family(name, "histogram", help);
            distribution(family, &shard, histogram, &LATENCY_BOUNDS_NS, 1e9);
        }
        let batches = [
            ("stoq_shard_rx_batch_datagrams", &metrics.rx_batch, "Datagrams received per turn."),
            ("stoq_shard_tx_batch_packets", &metrics.tx_batch, "Packets sent per turn."),
        ];
        for (name, histogram, help) in batches {
            let family = out.family(name, "histogram", help);
            distribution(family, &shard, histogram, &BATCH_BOUNDS, 1.0);
        }
    }
    for (outcome, packets) in steered {
        let help = "Packets that the kernel's steering to shards looked at, by outcome.";
        let family = out.family("stoq_steering_packets_total", "counter", help);
        family.sample("", &format!("outcome=\"{outcome}\""), *packets);
    }
    if let Some(identity) = &certificates.rotation {
        certificate(&mut out, identity);
        faults(&mut out, "identity", identity.faults());
    }
    for (by, counters) in &certificates.faults {
        faults(&mut out, by, counters);
    }
    faults(&mut out, "start", start_faults());
    out.into_text()
}

/// The served certificate: its dates as Unix time, what happened to it, what was refused.
fn certificate(out: &mut Exposition, identity: &RotatingIdentity) {
    let status = identity.status();
    let dates = [
        ("not_before", status.not_before, "Start of the served certificate's validity, Unix time."),
        ("not_after", status.not_after, "End of the served certificate's validity, Unix time."),
        ("next_renewal", status.next_renewal, "When the next renewal is due, Unix time."),
    ];
    for (name, date, help) in dates {
        let Some(since) = date.and_then(|date| date.duration_since(UNIX_EPOCH).ok()) else {
            continue;
        };
        let family = out.family(&format!("stoq_certificate_{name}_seconds"), "gauge", help);
        family.sample("", "", since.as_secs());
    }
    let counts = [
        ("renewals", status.renewals, "Certificates taken over after the first."),
        ("renewal_failures", status.failures, "Failed attempts to renew the certificate."),
        ("alarms", status.alarms, "Alarms that the certificate runs out."),
    ];
    for (name, count, help) in counts {
        let family = out.family(&format!("stoq_certificate_{name}_total"), "counter", help);
        family.sample("", "", count);
    }
    if let Some(serial) = &status.serial {
        let labels = format!("serial=\"{}\"", escape(serial));
        out.family("stoq_certificate_info", "gauge", "The served certificate.")
            .sample("", &labels, 1);
    }
    if let Some(error) = &status.last_error {
        let labels = format!("error=\"{}\"", escape(error));
        let help = "Why the last renewal failed; absent after a success.";
        out.family("stoq_certificate_last_error", "gauge", help).sample("", &labels, 1);
    }
}

/// What was refused by whom, each kind by its name.
fn faults(out: &mut Exposition, by: &str, counters: &FaultCounters) {
    let help = "Refused certificates, keys, tokens and handshakes, by kind and by who refused.";
    let family = out.family("stoq_certificate_faults_total", "counter", help);
    for fault in CertificateFault::ALL {
        let labels = format!("by=\"{}\",fault=\"{}\"", escape(by), fault.label());
        family.sample("", &labels, counters.count(fault));
    }
}

fn info(out: &mut Exposition, shard: &str, capabilities: &Capabilities) {
    let labels = format!(
        "{shard},datapath=\"{}\",mode=\"{}\",interface=\"{}\",queue=\"{}\"",
        capabilities.kind.name(),
        escape(&capabilities.mode),
        escape(capabilities.interface.as_deref().unwrap_or_default()),
        capabilities.queue.map(|queue| queue.to_string()).unwrap_or_default(),
    );
    out.family("stoq_shard_info", "gauge", "What carries a shard.").sample("", &labels, 1);
}

/// One counter under its Prometheus name.
fn counter(
    out: &mut Exposition,
    subsystem: &str,
    name: &str,
    help: &str,
    value: u64,
    shard: &str,
    is_gauge: bool,
) {
    if is_gauge {
        let name = format!("stoq_{subsystem}_{name}");
        out.family(&name, "gauge", help).sample("", shard, value);
        return;
    }
    let (direction, rest) = name.split_once('_').unwrap_or(("", name));
    if let Some(reason) = rest.strip_prefix("drop_") {
        let family = format!("stoq_{subsystem}_drops_total");
        let labels = format!("{shard},direction=\"{direction}\",reason=\"{reason}\"");
        let help = "Packets dropped, by direction and reason.";
        out.family(&family, "counter", help).sample("", &labels, value);
        return;
    }
    if let Some(base) = name.strip_suffix("_ns") {
        let family = format!("stoq_{subsystem}_{base}_seconds_total");
        out.family(&family, "counter", help).sample("", shard, value as f64 / 1e9);
        return;
    }
    let family = format!("stoq_{subsystem}_{name}_total");
    out.family(&family, "counter", help).sample("", shard, value);
}

fn distribution(family: &mut Family, shard: &str, from: &Histogram, bounds: &[u64], unit: f64) {
    let merged = Merged::of([from]);
    for bound in bounds {
        let labels = format!("{shard},le=\"{}\"", *bound as f64 / unit);
        family.sample("_bucket", &labels, merged.count_up_to(*bound));
    }
    family.sample("_bucket", &format!("{shard},le=\"+Inf\""), merged.count());
    family.sample("_sum", shard, merged.sum() as f64 / unit);
    family.sample("_count", shard, merged.count());
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::datapath::{DatapathCounters, DatapathKind};
    use crate::metrics::{PoolCounters, ShardCounters};

    fn capabilities() -> Capabilities {
        Capabilities {
            interface: Some("veth\"0".into()),
            mode: "GSO".into(),
            kind: DatapathKind::Socket,
            queue: None,
            standby_reason: None,
        }
    }

    fn text() -> String {
        let metrics = [ShardMetrics::default(), ShardMetrics::default()];
        let shard = ShardCounters {
            busy_ns: 1_500_000_000,
            connections: 7,
            rx_drop_protocol: 3,
            ..Default::default()
        };
        let datapath = DatapathCounters { tx_bytes: 99, tx_drop_io: 2, ..Default::default() };
        metrics[1].publish(&shard, &datapath);
        metrics[1].publish_pool(0, &PoolCounters { hits: 5, idle: 4, ..Default::default() });
        metrics[1].publish_pool(1, &PoolCounters { hits: 1, idle: 1, ..Default::default() });
        for us in [90, 110, 20_000_000] {
            metrics[1].rtt_ns.record(us * 1000);
        }
        for metrics in &metrics {
            metrics.set_path(capabilities());
        }
        render(&metrics, &[("steered_by_id", 3)], &Certificates::default())
    }

    #[test]
    fn names_units_and_labels_follow_the_conventions() {
        let text = text();
        for line in [
            "stoq_shard_busy_seconds_total{shard=\"1\"} 1.5",
            "stoq_shard_connections{shard=\"1\"} 7",
            "stoq_shard_drops_total{shard=\"1\",direction=\"rx\",reason=\"protocol\"} 3",
            "stoq_datapath_drops_total{shard=\"1\",direction=\"tx\",reason=\"io\"} 2",
            "stoq_datapath_tx_bytes_total{shard=\"1\"} 99",
            "stoq_pool_hits_total{shard=\"1\"} 6",
            "stoq_pool_idle{shard=\"1\"} 5",
            "stoq_rtt_seconds_bucket{shard=\"1\",le=\"0.0001\"} 1",
            "stoq_rtt_seconds_bucket{shard=\"1\",le=\"0.0002\"} 2",
            "stoq_rtt_seconds_bucket{shard=\"1\",le=\"+Inf\"} 3",
            "stoq_rtt_seconds_count{shard=\"0\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "missing: {line}\n{text}");
        }
        assert!(text.contains("interface=\"veth\\\"0\""), "labels are escaped");
    }

    #[test]
    fn each_family_is_declared_once_and_stands_together() {
        let mut declared = HashSet::new();
        let (mut current, mut samples) = (String::new(), HashSet::new());
        for line in text().lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                current = rest.split(' ').next().expect("a name").to_owned();
                assert!(declared.insert(current.clone()), "{current} is declared twice");
            } else if !line.starts_with('#') {
                let (sample, value) = line.rsplit_once(' ').expect("a value");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(sample.starts_with(&current), "{line} is not under {current}");
                assert!(samples.insert(sample.to_owned()), "{sample} is there twice");
            }
        }
        assert!(declared.len() > 50);
    }
}
