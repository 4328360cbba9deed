//! The report as text for a terminal of 80 columns.

use std::fmt;

use super::{Interface, Report, Verdict};
use crate::datapath::choice::XdpSupport;

const COLUMNS: usize = 80;
/// Column at which values start.
const VALUE: usize = 16;

/// Writes `label` and `text`, wrapped between words; continued lines are indented to the value.
fn entry(f: &mut fmt::Formatter<'_>, label: &str, text: &str) -> fmt::Result {
    let mut line = format!("  {label:<width$}", width = VALUE - 2);
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            writeln!(f, "{line}")?;
            line = " ".repeat(VALUE);
            empty = true;
        }
        if !empty || !line.ends_with(' ') {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    writeln!(f, "{}", line.trim_end())
}

fn known<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "unknown".to_owned(), |value| value.to_string())
}

const fn tick(present: bool) -> &'static str {
    if present { "yes" } else { "no " }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Kernel {}", self.kernel.release)?;
        for feature in &self.kernel.features {
            let (major, minor) = feature.since;
            let text = format!("{} (since {major}.{minor})", feature.name);
            entry(f, tick(feature.present), &text)?;
        }
        writeln!(f, "Privileges")?;
        for privilege in &self.privileges {
            let text = format!("{}: {}", privilege.name, privilege.buys);
            entry(f, tick(privilege.held), &text)?;
        }
        self.fmt_host(f)?;
        for verdict in &self.interfaces {
            verdict.fmt_lines(f)?;
        }
        if let Some(name) = &self.missing_interface {
            writeln!(f, "Interface {name}")?;
            entry(f, "missing", "there is no such interface; see `ip link`")?;
        }
        writeln!(f, "What costs speed")?;
        for advice in &self.advice {
            entry(f, "cost", &advice.costs)?;
            entry(f, "  fix", &advice.fix)?;
        }
        if self.advice.is_empty() {
            entry(f, "nothing", "that the doctor knows of")?;
        }
        Ok(())
    }
}

impl Report {
    fn fmt_host(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = &self.host;
        writeln!(f, "Machine")?;
        let isolated = host.cpus_isolated.as_deref().unwrap_or("none");
        let kind = if host.virtual_machine { "virtual machine" } else { "bare metal" };
        let cpus = known(host.cpus_online.as_ref());
        let nodes = known(host.numa_nodes.as_ref());
        let text = format!("{cpus} online, isolated: {isolated}; NUMA nodes {nodes}; {kind}");
        entry(f, "processors", &text)?;
        let governor = host.governor.as_deref().unwrap_or("none (the host decides)");
        entry(f, "governor", governor)?;
        entry(f, "clock", &known(host.clock_source.as_ref()))?;
        let pages = host.huge_pages.map_or_else(
            || "unknown".to_owned(),
            |(free, total)| format!("{free} of {total} free, {} kB", known(host.huge_page_kb)),
        );
        entry(f, "huge pages", &pages)?;
        let memlock = host
            .memlock_bytes
            .map_or_else(|| "unlimited".to_owned(), |bytes| format!("{bytes} bytes"));
        entry(f, "locked memory", &memlock)?;
        let (rmem, wmem) = (known(host.rmem_max_bytes), known(host.wmem_max_bytes));
        entry(f, "socket buffers", &format!("receive {rmem}, send {wmem} bytes at most"))?;
        let io_uring = match &self.io_uring {
            Ok(features) if features.deferred_task_run => {
                "available, multishot receive, deferred task work".to_owned()
            }
            Ok(_) => "available, multishot receive".to_owned(),
            Err(reason) => format!("unavailable: {reason}"),
        };
        entry(f, "io_uring", &io_uring)?;
        let cryptography = match &self.ipsec_mb {
            Ok(version) => format!("ipsec-mb {version} seals packets (AES-GCM, self-tested)"),
            Err(reason) => format!("aws-lc-rs seals packets; ipsec-mb: {reason}"),
        };
        entry(f, "cryptography", &cryptography)
    }
}

impl Verdict {
    fn fmt_lines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let interface = &self.interface;
        writeln!(f, "Interface {} ({}, {})", interface.name, interface.driver, interface.state)?;
        interface.fmt_device(f)?;
        interface.fmt_xdp(f)?;
        let choice = &self.choice;
        entry(f, "auto takes", &format!("{}: {}", choice.kind.name(), choice.reason))?;
        for (kind, reason) in &choice.refused {
            entry(f, "  not taken", &format!("{}: {reason}", kind.name()))?;
        }
        Ok(())
    }
}

impl Interface {
    fn fmt_device(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rx, tx) = self.queues;
        let mut text = format!("MTU {}, {rx} RX and {tx} TX queues", known(self.mtu_bytes));
        if let Some((now, max)) = self.channels {
            text.push_str(&format!(", {now} of {max} channels"));
        }
        if let Some(rings) = self.rings {
            text.push_str(&format!(
                ", rings RX {} of {}, TX {} of {}",
                rings.rx, rings.rx_max, rings.tx, rings.tx_max
            ));
        }
        entry(f, "device", &text)?;
        if !self.interrupt_cpus.is_empty() || self.napi_threaded.is_some() {
            let cpus: Vec<String> = self.interrupt_cpus.iter().map(u32::to_string).collect();
            let cpus = if cpus.is_empty() { "none".to_owned() } else { cpus.join(",") };
            let napi = match self.napi_threaded {
                Some(true) => "in threads",
                Some(false) => "in softirq",
                None => "unknown",
            };
            let node = self.numa_node.filter(|node| *node >= 0);
            let text = format!("CPUs {cpus}; NAPI {napi}; NUMA node {}", known(node));
            entry(f, "interrupts", &text)?;
        }
        if !self.offloads_on.is_empty() {
            entry(f, "offloads on", &self.offloads_on.join(", "))?;
        }
        if !self.offloads_off.is_empty() {
            entry(f, "offloads off", &self.offloads_off.join(", "))?;
        }
        Ok(())
    }

    fn fmt_xdp(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(xdp) = self.xdp else {
            return entry(f, "XDP", "the kernel does not tell (it does since 6.3)");
        };
        let mode = match xdp.support() {
            XdpSupport::Generic => "SKB mode only",
            XdpSupport::NativeCopy => "native, copy mode",
            XdpSupport::ZeroCopy => "native, zero-copy",
        };
        let mut text = mode.to_owned();
        if xdp.multi_buffer {
            text.push_str(", multi-buffer");
        }
        if let Some(segments) = xdp.zero_copy_segments_max {
            text.push_str(&format!(", {segments} buffers a zero-copy packet"));
        }
        if xdp.tx_checksum {
            text.push_str(", TX checksum");
        }
        match &self.trial {
            Some(Ok(bound)) => text.push_str(&format!("; trial: {bound:?}")),
            Some(Err(reason)) => text.push_str(&format!("; trial failed: {reason}")),
            None if xdp.support() != XdpSupport::Generic => {
                text.push_str(" (the driver says so; no trial was made)");
            }
            None => {}
        }
        entry(f, "XDP", &text)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Advice, Interface, Report, RingSizes, TrialBind, Verdict, XdpFeatures, examine,
    };
    use crate::datapath::choice::{DatapathChoice, DeviceClass, choose};

    /// This machine with a NIC that has everything, whose `auto` choice is zero-copy AF_XDP.
    fn with_everything() -> Report {
        let mut report = examine(Some("no-such-if"));
        let interface = Interface {
            name: "nic0".to_owned(),
            class: DeviceClass::Physical,
            driver: "mlx5_core".to_owned(),
            state: "up".to_owned(),
            mtu_bytes: Some(9000),
            queues: (16, 17),
            channels: Some((16, 63)),
            rings: Some(RingSizes { rx: 1024, rx_max: 8192, tx: 1023, tx_max: 8191 }),
            xdp: Some(XdpFeatures {
                native: true,
                redirect: true,
                zero_copy: true,
                multi_buffer: true,
                zero_copy_segments_max: Some(5),
                tx_checksum: true,
            }),
            trial: Some(Ok(TrialBind::ZeroCopy)),
            offloads_on: vec!["rx-gro".to_owned(), "rx-lro".to_owned()],
            offloads_off: vec!["tx-udp-segmentation".to_owned()],
            interrupt_cpus: vec![2, 3],
            napi_threaded: Some(true),
            numa_node: Some(1),
            replies_unforeseen: None,
        };
        let facts = super::super::facts(&interface, None, &report.kernel, &report.io_uring);
        let choice = choose(DatapathChoice::Auto, &facts);
        report.advice.extend(interface.advise(true));
        report.interfaces.push(Verdict { interface, choice });
        report
    }

    /// Each thing that the doctor promises to look at stands in the text and in the JSON object.
    #[test]
    fn everything_promised_is_in_text_and_json() {
        let report = with_everything();
        let text = report.to_string();
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line:?}");
        }
        // Wrapped lines as one.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let json = serde_json::to_value(&report).expect("plain data");
        let promised = [
            ("/kernel/release", "Kernel "),
            ("/kernel/features/0/since", "UDP segmentation offload (GSO) (since 4.18)"),
            ("/privileges/0/name", "CAP_NET_ADMIN"),
            ("/privileges/0/buys", "attaches XDP"),
            ("/interfaces/0/interface/driver", "mlx5_core"),
            ("/interfaces/0/interface/state", "up"),
            ("/interfaces/0/interface/queues/1", "16 RX and 17 TX queues"),
            ("/interfaces/0/interface/channels/1", "16 of 63 channels"),
            ("/interfaces/0/interface/rings/tx_max", "rings RX 1024 of 8192, TX 1023 of 8191"),
            ("/interfaces/0/interface/mtu_bytes", "MTU 9000"),
            ("/interfaces/0/interface/xdp/native", "native"),
            ("/interfaces/0/interface/xdp/zero_copy", "zero-copy"),
            ("/interfaces/0/interface/xdp/multi_buffer", "multi-buffer"),
            ("/interfaces/0/interface/xdp/zero_copy_segments_max", "5 buffers a zero-copy packet"),
            ("/interfaces/0/interface/xdp/tx_checksum", "TX checksum"),
            ("/interfaces/0/interface/trial/Ok", "trial: ZeroCopy"),
            ("/interfaces/0/interface/offloads_on/0", "offloads on rx-gro, rx-lro"),
            ("/interfaces/0/interface/offloads_off/0", "offloads off tx-udp-segmentation"),
            ("/interfaces/0/interface/interrupt_cpus/0", "interrupts CPUs 2,3"),
            ("/interfaces/0/interface/napi_threaded", "NAPI in threads"),
            ("/interfaces/0/interface/numa_node", "NUMA node 1"),
            ("/interfaces/0/choice/kind", "auto takes af_xdp"),
            ("/interfaces/0/choice/reason", "auto takes af_xdp: "),
            ("/host/cpus_online", "processors"),
            ("/host/cpus_isolated", "isolated: "),
            ("/host/numa_nodes", "NUMA nodes"),
            ("/host/governor", "governor"),
            ("/host/clock_source", "clock"),
            ("/host/huge_pages", "huge pages"),
            ("/host/memlock_bytes", "locked memory"),
            ("/host/rmem_max_bytes", "socket buffers receive"),
            ("/host/wmem_max_bytes", "bytes at most"),
            ("/io_uring", "io_uring"),
            ("/advice", "What costs speed"),
        ];
        for (pointer, words) in promised {
            assert!(json.pointer(pointer).is_some(), "{pointer} in {json:#}");
            assert!(text.contains(words), "{words:?} in {text}");
        }
        // The offload that hurts AF_XDP, with the command that changes it.
        let lro = |advice: &&Advice| advice.costs.contains("rx-lro");
        let lro = report.advice.iter().find(lro).expect("rx-lro is on");
        assert!(lro.fix.contains("ethtool -K nic0"), "{lro:?}");
        assert!(text.contains(&format!("fix {}", lro.fix)), "{text}");
    }

    #[test]
    fn fits_eighty_columns_and_says_the_choice() {
        let text = examine(None).to_string();
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line:?}");
            assert_eq!(line.trim_end(), line);
        }
        for word in ["Kernel", "CAP_NET_ADMIN", "io_uring", "auto takes", "What costs speed"] {
            assert!(text.contains(word), "{word} in\n{text}");
        }
    }

    #[test]
    fn a_missing_interface_is_said() {
        assert!(examine(Some("no-such-if")).to_string().contains("no such interface"));
    }
}
