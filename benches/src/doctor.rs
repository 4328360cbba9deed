//! `stoq doctor`: what this machine can do, which datapath `auto` takes, and what costs speed.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::Path;

use anyhow::Context;
use clap::Args as ClapArgs;
use stoq::datapath::af_xdp::{AfXdpConfig, open_interface};
use stoq::datapath::choice::{DeviceClass, XdpSupport};
use stoq::datapath::socket::SocketDatapath;
use stoq::datapath::udp_socket::SocketConfig;
use stoq::doctor::{Report, TrialBind, examine_with, interface_facts};

use crate::output;

/// Flags of `stoq doctor`.
#[derive(ClapArgs)]
pub struct Args {
    /// Only this interface. AF_XDP is tried on it even if it carries the default route.
    #[arg(long)]
    iface: Option<String>,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

/// Examines and reports.
///
/// # Errors
/// When nothing works here: the error says why.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let untouchable = match &args.iface {
        Some(_) => BTreeSet::new(),
        None => default_route_devices().context("finding the interface of the default route")?,
    };
    let report = examine_with(args.iface.as_deref(), |name| {
        (!untouchable.contains(name)).then(|| trial(name)).flatten()
    });
    let refused = refusal(&report, args.iface.as_deref());
    if args.json {
        let mut value = serde_json::to_value(&report)?;
        value["works"] = refused.is_none().into();
        output::json_line(&value)?;
    } else {
        write!(io::stdout().lock(), "{report}")?;
    }
    refused.map_or(Ok(()), |why| Err(anyhow::anyhow!("nothing works here: {why}")))
}

/// Binds queue 0 on a port that the kernel chooses, and lets go at once.
///
/// `None` where the driver has no native XDP: there is nothing to prove.
fn trial(name: &str) -> Option<Result<TrialBind, String>> {
    let facts = interface_facts(name)?;
    if facts.class == DeviceClass::Loopback || facts.xdp == XdpSupport::Generic {
        return None;
    }
    let config = AfXdpConfig::new(name, SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0));
    let bound = open_interface(&config).map_err(|error| error.to_string());
    Some(bound.map(|opened| {
        let zero_copy = opened.iter().all(|datapath| datapath.is_zero_copy());
        if zero_copy { TrialBind::ZeroCopy } else { TrialBind::Copy }
    }))
}

/// Why nothing works, if so: no such interface, no IPv6 address, no UDP socket.
fn refusal(report: &Report, iface: Option<&str>) -> Option<String> {
    if let Some(name) = &report.missing_interface {
        return Some(format!("there is no interface {name}; see `ip link`"));
    }
    let addresses = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    if !has_address(&addresses, iface) {
        let place =
            iface.map_or_else(|| "this machine".to_owned(), |name| format!("interface {name}"));
        return Some(format!(
            "{place} has no IPv6 address; set the link up, and see `ip -6 address` and \
             `sysctl net.ipv6.conf.all.disable_ipv6`"
        ));
    }
    let local = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0);
    SocketDatapath::open(SocketConfig::new(local)).err().map(|error| error.to_string())
}

/// Whether `/proc/net/if_inet6` lists an address of `iface`, or of any interface.
fn has_address(table: &str, iface: Option<&str>) -> bool {
    let mut owners = table.lines().filter_map(|line| line.split_whitespace().nth(5));
    owners.any(|owner| iface.is_none_or(|name| name == owner))
}

/// The devices that a default route of this machine leaves by, with the devices beneath them
/// (of a bridge, a bond, a VLAN): attaching XDP may reset their link.
fn default_route_devices() -> io::Result<BTreeSet<String>> {
    let mut devices = BTreeSet::new();
    devices.extend(default_devices_ipv6(&route_table("ipv6_route")?));
    devices.extend(default_devices_ipv4(&route_table("route")?));
    let mut upper: Vec<String> = devices.iter().cloned().collect();
    while let Some(device) = upper.pop() {
        for entry in fs::read_dir(Path::new("/sys/class/net").join(&device)).into_iter().flatten() {
            let name = entry?.file_name();
            if let Some(lower) = name.to_str().and_then(|name| name.strip_prefix("lower_"))
                && devices.insert(lower.to_owned())
            {
                upper.push(lower.to_owned());
            }
        }
    }
    Ok(devices)
}

/// A table of `/proc/net`; empty where the kernel lacks the protocol.
fn route_table(name: &str) -> io::Result<String> {
    match fs::read_to_string(Path::new("/proc/thread-self/net").join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other,
    }
}

/// Destination and prefix length first, device last.
fn default_devices_ipv6(table: &str) -> impl Iterator<Item = String> {
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| {
        row.len() == 10 && row[0].bytes().all(|digit| digit == b'0') && row[1] == "00"
    })
    .map(|row| row[9].to_owned())
}

/// Device first, then the destination; the mask is the eighth.
fn default_devices_ipv4(table: &str) -> impl Iterator<Item = String> {
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.len() > 7 && row[1] == "00000000" && row[7] == "00000000")
        .map(|row| row[0].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_found() {
        let zeros = "0".repeat(32);
        let net = format!("fd{}", "0".repeat(30));
        let table = format!(
            "{net} 40 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001 veth0\n\
             {zeros} 00 {zeros} 00 {net} 00000400 00000001 00000000 00000003 eth0\n\
             {zeros} 10 {zeros} 00 {net} 00000400 00000001 00000000 00000003 eth1\n"
        );
        assert_eq!(default_devices_ipv6(&table).collect::<Vec<_>>(), ["eth0"]);
        let table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                     eth2\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     eth3\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(default_devices_ipv4(table).collect::<Vec<_>>(), ["eth2"]);
        assert_eq!(default_devices_ipv4("").count() + default_devices_ipv6("").count(), 0);
    }

    #[test]
    fn addresses_are_found_by_interface() {
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n";
        assert!(has_address(table, None) && has_address(table, Some("lo")));
        assert!(!has_address(table, Some("eth0")) && !has_address("", None));
    }
}
