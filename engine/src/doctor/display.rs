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
    use super::super::examine;

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
