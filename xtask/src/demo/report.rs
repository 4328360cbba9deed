//! What the demo says: the live line, the summary, and the JSON object.

use serde::Serialize;
use serde_json::Value;

use super::session::View;
use crate::netns::UdpCounters;
use crate::terminal::{Terminal, Tone, bar, bit_rate, size};

/// The object that `--json` prints.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// Datapath of the server.
    pub(crate) datapath: String,
    /// How it ran.
    pub(crate) mode: String,
    /// MTU of the link, in bytes.
    pub(crate) mtu: u32,
    /// Queues of the link.
    pub(crate) queues: u32,
    /// Length of the file.
    pub(crate) file_bytes: u64,
    /// SHA-256 of the file, as computed from the source.
    pub(crate) file_sha256: String,
    /// The client's SHA-256, and that of what lies on its disk, equal the source's.
    pub(crate) verified: bool,
    /// Time that the file took.
    pub(crate) file_seconds: f64,
    /// Rate of the file.
    pub(crate) file_goodput_bps: f64,
    /// Time of the bulk transfer.
    pub(crate) seconds: f64,
    /// Bytes of the bulk transfer.
    pub(crate) bytes: u64,
    /// Rate of the bulk transfer.
    pub(crate) goodput_bps: f64,
    /// Median round-trip time of the bulk transfer.
    pub(crate) rtt_us_p50: f64,
    /// Packets lost in both transfers.
    pub(crate) packets_lost: u64,
    /// Both ends.
    pub(crate) ends: BothEnds<EndReport>,
    /// Counters of the XDP programs, or null without one.
    pub(crate) xdp: BothEnds<Value>,
    /// What took the kernel's UDP sockets during both transfers.
    pub(crate) kernel_udp: BothEnds<UdpCounters>,
    /// AF_XDP alone over the same pair, or null.
    pub(crate) raw_bps: Option<f64>,
    /// Why `raw_bps` is null.
    pub(crate) raw_missing: Option<String>,
    /// NAPI ran in kernel threads of its own.
    pub(crate) threaded_napi: bool,
    /// Over a veth pair as root; otherwise over loopback.
    pub(crate) privileged: bool,
    /// Kernel release.
    pub(crate) kernel: String,
    /// Cores of the machine.
    pub(crate) cores: usize,
}

/// A value for each end.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BothEnds<T> {
    /// The server's.
    pub(crate) server: T,
    /// The client's.
    pub(crate) client: T,
}

/// How one end ran.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct EndReport {
    /// Datapath.
    pub(crate) datapath: String,
    /// Mode.
    pub(crate) mode: String,
}

/// One line of progress; `total` is unknown for bulk.
pub(crate) fn progress_line(label: &str, view: &View, total: Option<u64>) -> String {
    let progress = &view.progress;
    let amount = match total {
        Some(total) => format!(
            "{} {:>3.0} % of {}",
            bar(progress.bytes, total, 20),
            progress.bytes as f64 / total.max(1) as f64 * 100.0,
            size(total)
        ),
        None => format!("{:>4.0} s  {}", progress.seconds, size(progress.bytes)),
    };
    format!(
        "{label} {amount}  {}  RTT {:.0} µs  lost {}  CPU % server {} client {}",
        bit_rate(progress.goodput_bps),
        progress.rtt_us,
        progress.packets_lost,
        cpu(&view.server_cpu),
        cpu(&view.client_cpu)
    )
}

fn cpu(shards: &[u32]) -> String {
    if shards.is_empty() {
        return "-".into();
    }
    shards.iter().map(u32::to_string).collect::<Vec<_>>().join("+")
}

/// The summary for people.
pub(crate) fn print_summary(terminal: &mut Terminal, report: &Report) {
    let verdict = if report.verified {
        terminal.paint(Tone::Good, "equal at both ends")
    } else {
        terminal.paint(Tone::Bad, "DIFFERS")
    };
    terminal.heading("Summary");
    let mut row = |name: &str, text: String| terminal.line(&format!("  {name:<11} {text}"));
    row(
        "file",
        format!(
            "{} in {:.2} s ({}), SHA-256 {verdict} ({}…)",
            size(report.file_bytes),
            report.file_seconds,
            bit_rate(report.file_goodput_bps),
            &report.file_sha256[..report.file_sha256.len().min(16)]
        ),
    );
    row(
        "bulk",
        format!(
            "{} for {:.1} s, RTT p50 {:.0} µs, {} packets lost",
            bit_rate(report.goodput_bps),
            report.seconds,
            report.rtt_us_p50,
            report.packets_lost
        ),
    );
    match (report.raw_bps, &report.raw_missing) {
        (Some(raw), _) => row(
            "raw AF_XDP",
            format!(
                "{} over the same link: QUIC reaches {:.0} % of it",
                bit_rate(raw),
                report.goodput_bps / raw.max(1.0) * 100.0
            ),
        ),
        (None, why) => row(
            "raw AF_XDP",
            format!("not measured: {}", why.as_deref().unwrap_or("no reason given")),
        ),
    }
    for (name, end) in [("server", &report.ends.server), ("client", &report.ends.client)] {
        row(name, format!("{} ({})", end.datapath, end.mode));
    }
    for (name, counters) in
        [("server", report.kernel_udp.server), ("client", report.kernel_udp.client)]
    {
        row(
            "kernel UDP",
            format!(
                "{name}: {} datagrams in, {} out through sockets",
                counters.in_datagrams, counters.out_datagrams
            ),
        );
    }
    for (name, counters) in [("server", &report.xdp.server), ("client", &report.xdp.client)] {
        if !counters.is_null() {
            row("XDP", format!("{name}: {}", flat(counters)));
        }
    }
    let (mtu, queues) = (report.mtu, report.queues);
    let napi = if report.threaded_napi { ", threaded NAPI" } else { "" };
    row("link", format!("MTU {mtu}, {queues} queue(s){napi}, {} cores", report.cores));
}

/// Counters in one line by name, zeros left out.
fn flat(counters: &Value) -> String {
    fn collect(prefix: &str, value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let dot = if prefix.is_empty() { "" } else { "." };
                    collect(&format!("{prefix}{dot}{name}"), value, into);
                }
            }
            Value::Number(number) if number.as_u64() == Some(0) => {}
            other => into.push(format!("{prefix} {other}")),
        }
    }
    let mut words = Vec::new();
    collect("", counters, &mut words);
    words.sort();
    if words.is_empty() { "all zero".into() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::stoq_cli::Progress;

    #[test]
    fn progress_lines() {
        let view = View {
            progress: Progress {
                bytes: 1 << 30,
                seconds: 2.0,
                goodput_bps: 4e9,
                rtt_us: 210.4,
                packets_lost: 3,
            },
            server_cpu: vec![98, 3],
            client_cpu: vec![],
        };
        assert_eq!(
            progress_line("file", &view, Some(2 << 30)),
            "file [##########----------]  50 % of 2.0 GiB  4.00 Gbit/s  RTT 210 µs  lost 3  \
             CPU % server 98+3 client -"
        );
        assert!(progress_line("bulk", &view, None).starts_with("bulk    2 s  1.0 GiB  4.00"));
        assert!(progress_line("file", &view, Some(0)).contains("100 %") || view.progress.bytes > 0);
    }

    #[test]
    fn counters_in_one_line() {
        assert_eq!(
            flat(&json!({"redirect": 7, "pass": {"arp": 0, "port": 2}})),
            "pass.port 2, redirect 7"
        );
        assert_eq!(flat(&json!({"redirect": 0})), "all zero");
    }
}
