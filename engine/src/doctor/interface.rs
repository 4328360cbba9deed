//! What an interface is and can do, asked from the kernel (netlink and sysfs).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::genl::{self, Attributes, Family};
use super::host::{line, number};
use super::{Advice, TrialBind};
use crate::datapath::af_xdp::ReceiveHash;
use crate::datapath::choice::{DeviceClass, XdpSupport};

/// Families that are asked about every interface; `None` where the kernel has none.
#[derive(Debug)]
pub(super) struct Families {
    netdev: Option<Family>,
    ethtool: Option<Family>,
}

impl Families {
    pub(super) fn open() -> Self {
        Self { netdev: Family::open("netdev").ok(), ethtool: Family::open("ethtool").ok() }
    }
}

/// What the driver says about XDP (netlink family `netdev`, kernel 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct XdpFeatures {
    /// Native XDP programs.
    pub native: bool,
    /// Redirecting to other devices and to AF_XDP sockets.
    pub redirect: bool,
    /// Zero-copy AF_XDP.
    pub zero_copy: bool,
    /// Packets in several buffers, on receipt.
    pub multi_buffer: bool,
    /// Buffers that one zero-copy packet may span.
    pub zero_copy_segments_max: Option<u64>,
    /// Checksums computed by the NIC for AF_XDP packets (kernel 6.8).
    pub tx_checksum: bool,
}

impl XdpFeatures {
    /// From the flags of `linux/netdev.h`.
    fn of(xdp: u64, zero_copy_segments_max: Option<u64>, xsk: u64) -> Self {
        let has = |flags: u64, flag: u64| flags & flag != 0;
        Self {
            native: has(xdp, 1),
            redirect: has(xdp, 2),
            zero_copy: has(xdp, 8),
            multi_buffer: has(xdp, 32),
            zero_copy_segments_max,
            tx_checksum: has(xsk, 2),
        }
    }

    fn ask(families: &Families, index: u32) -> Option<Self> {
        const NETDEV_CMD_DEV_GET: u8 = 1;
        let mut request = Vec::new();
        genl::put(&mut request, 1, &index.to_ne_bytes());
        let reply = families.netdev.as_ref()?.request(NETDEV_CMD_DEV_GET, 1, &request).ok()?;
        let xdp = genl::number(&reply, 3)?;
        Some(Self::of(xdp, genl::number(&reply, 4), genl::number(&reply, 6).unwrap_or(0)))
    }

    /// How far AF_XDP goes with this.
    #[must_use]
    pub const fn support(&self) -> XdpSupport {
        match (self.native && self.redirect, self.zero_copy) {
            (true, true) => XdpSupport::ZeroCopy,
            (true, false) => XdpSupport::NativeCopy,
            _ => XdpSupport::Generic,
        }
    }
}

/// A ring's present and largest size, in descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RingSizes {
    /// Receive ring now.
    pub rx: u64,
    /// Receive ring at most.
    pub rx_max: u64,
    /// Transmit ring now.
    pub tx: u64,
    /// Transmit ring at most.
    pub tx_max: u64,
}

/// Everything about one interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// What it is.
    pub class: DeviceClass,
    /// Driver, or the kind of software device.
    pub driver: String,
    /// `up`, `down`, `unknown` …
    pub state: String,
    /// Largest packet, in bytes.
    pub mtu_bytes: Option<u64>,
    /// Receive and transmit queues in use.
    pub queues: (usize, usize),
    /// Combined channels now and at most, where the driver has them.
    pub channels: Option<(u64, u64)>,
    /// Ring sizes, where the driver tells.
    pub rings: Option<RingSizes>,
    /// XDP, as the driver tells; `None` on kernels before 6.3.
    pub xdp: Option<XdpFeatures>,
    /// What a trial bind of an AF_XDP socket proved, where one was made.
    pub trial: Option<Result<TrialBind, String>>,
    /// Offloads that are on and matter to us.
    pub offloads_on: Vec<String>,
    /// Offloads that are off and matter to us.
    pub offloads_off: Vec<String>,
    /// CPUs that take its interrupts.
    pub interrupt_cpus: Vec<u32>,
    /// Whether NAPI runs in threads of its own.
    pub napi_threaded: Option<bool>,
    /// NUMA node of the device.
    pub numa_node: Option<i64>,
    /// Why the queue of a reply cannot be foretold (RSS), so that a client's shards hand replies over
    /// over AF_XDP; `None` where source ports are chosen by the device's hash.
    pub replies_unforeseen: Option<String>,
}

/// Offloads that matter, and on which side they belong.
const OFFLOADS: [(&str, Offload); 9] = [
    ("tx-udp-segmentation", Offload::HelpsSockets),
    ("tx-checksum-ip-generic", Offload::HelpsSockets),
    ("tx-checksum-ipv6", Offload::HelpsSockets),
    ("rx-gro", Offload::HelpsSockets),
    ("rx-checksum", Offload::HelpsSockets),
    ("rx-lro", Offload::HurtsXdp),
    ("rx-gro-hw", Offload::HurtsXdp),
    ("rx-udp-gro-forwarding", Offload::HurtsXdp),
    ("rx-vlan-hw-parse", Offload::HurtsXdp),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Offload {
    HelpsSockets,
    HurtsXdp,
}

/// Names of all interfaces, `lo` last.
pub(super) fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| Path::new("/sys/class/net").join(name).is_dir())
        .collect();
    names.sort_by_key(|name| (name == "lo", name.clone()));
    names
}

impl Interface {
    /// Examines `name`; `None` if there is no such interface.
    pub(super) fn examine(name: &str, families: &Families) -> Option<Self> {
        // A name is a file name: never a path.
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return None;
        }
        let root = Path::new("/sys/class/net").join(name);
        let index = u32::try_from(number(root.join("ifindex"))?).ok()?;
        let device = root.join("device");
        let (on, off) = offloads(families, index).unwrap_or_default();
        Some(Self {
            name: name.to_owned(),
            class: class(&root),
            driver: driver(&root),
            state: line(root.join("operstate")).unwrap_or_else(|| "unknown".to_owned()),
            mtu_bytes: number(root.join("mtu")),
            queues: (queue_count(&root, "rx-"), queue_count(&root, "tx-")),
            channels: channels(families, index),
            rings: rings(families, index),
            xdp: XdpFeatures::ask(families, index),
            trial: None,
            offloads_on: on,
            offloads_off: off,
            interrupt_cpus: interrupt_cpus(&device),
            napi_threaded: number(root.join("threaded")).map(|threaded| threaded != 0),
            numa_node: line(device.join("numa_node")).and_then(|node| node.parse().ok()),
            replies_unforeseen: ReceiveHash::of_interface(name).err(),
        })
    }

    /// How far AF_XDP goes: what was proved, else what the driver says.
    pub(super) fn xdp_support(&self) -> XdpSupport {
        match &self.trial {
            Some(Ok(TrialBind::ZeroCopy)) => XdpSupport::ZeroCopy,
            Some(Ok(TrialBind::Copy)) => XdpSupport::NativeCopy,
            Some(Ok(TrialBind::Generic)) => XdpSupport::Generic,
            Some(Err(_)) | None => {
                self.xdp.as_ref().map_or(XdpSupport::Generic, XdpFeatures::support)
            }
        }
    }

    /// What costs speed on this interface, given whether AF_XDP would be used.
    pub(super) fn advise(&self, af_xdp: bool) -> Vec<Advice> {
        let name = &self.name;
        let mut advice = Vec::new();
        let mut add = |costs: String, fix: String| advice.push(Advice { costs, fix });
        if self.class == DeviceClass::Loopback {
            return advice;
        }
        let wanted = if af_xdp { Offload::HurtsXdp } else { Offload::HelpsSockets };
        for (offload, effect) in OFFLOADS.into_iter().filter(|(_, effect)| *effect == wanted) {
            let named = |list: &[String]| list.iter().any(|entry| entry == offload);
            // A device has one of the two checksum features, never both.
            let checksum = offload.starts_with("tx-checksum")
                && self.offloads_on.iter().any(|on| on.starts_with("tx-checksum"));
            // Batches cross a software device whole without GRO, which would only
            // put a NAPI poll in their way.
            let useless = offload == "rx-gro" && self.class == DeviceClass::Virtual;
            match effect {
                _ if useless => {}
                Offload::HurtsXdp if named(&self.offloads_on) => add(
                    format!("{name}: {offload} changes packets before XDP sees them"),
                    format!("ethtool -K {name} {offload} off"),
                ),
                Offload::HelpsSockets if named(&self.offloads_off) && !checksum => add(
                    format!("{name}: {offload} is off: more work per packet"),
                    format!("ethtool -K {name} {offload} on"),
                ),
                _ => {}
            }
        }
        if let Some(rings) = self.rings.filter(|rings| rings.rx < rings.rx_max.min(2048)) {
            add(
                format!("{name}: its receive ring holds {} of {} packets", rings.rx, rings.rx_max),
                format!("ethtool -G {name} rx {}", rings.rx_max.min(4096)),
            );
        }
        if self.interrupt_cpus.len() == 1 && self.queues.0 > 1 {
            add(
                format!(
                    "{name}: all {} queues interrupt CPU {}",
                    self.queues.0, self.interrupt_cpus[0]
                ),
                format!("scripts/setup-nic.sh {name} --shards SHARDS (spreads its interrupts)"),
            );
        }
        // A software device hashes nothing: its queues are the sender's.
        if af_xdp && self.class != DeviceClass::Virtual && self.queues.0 > 1 {
            add(
                format!(
                    "{name}: RSS may spread packets over all {} queues; those of a queue without a \
                     shard take the kernel's way",
                    self.queues.0
                ),
                format!(
                    "ethtool -X {name} start FIRST_QUEUE equal SHARDS (or setup-nic.sh {name} --shards \
                     SHARDS), unless there is a shard for each; ethtool -x {name} shows it"
                ),
            );
        }
        if let Some(why) = &self.replies_unforeseen
            && af_xdp
            && self.class != DeviceClass::Virtual
            && self.queues.0 > 1
        {
            add(
                format!("{name}: a client's shards hand replies over to each other: {why}"),
                format!(
                    "ethtool -X {name} hfunc toeplitz; ethtool -N {name} rx-flow-hash udp6 sdfn"
                ),
            );
        }
        if af_xdp && self.napi_threaded == Some(false) {
            add(
                format!("{name}: NAPI runs on whichever core sends or is interrupted"),
                format!("echo 1 > /sys/class/net/{name}/threaded (once XDP is attached)"),
            );
        }
        advice
    }
}

fn class(root: &Path) -> DeviceClass {
    // ARPHRD_LOOPBACK
    if number(root.join("type")) == Some(772) {
        DeviceClass::Loopback
    } else if root.join("device").exists() {
        DeviceClass::Physical
    } else {
        DeviceClass::Virtual
    }
}

fn driver(root: &Path) -> String {
    if let Ok(target) = fs::read_link(root.join("device/driver"))
        && let Some(name) = target.file_name()
    {
        return name.to_string_lossy().into_owned();
    }
    let uevent = fs::read_to_string(root.join("uevent")).unwrap_or_default();
    let devtype = uevent.lines().find_map(|line| line.strip_prefix("DEVTYPE="));
    devtype.unwrap_or("software").to_owned()
}

fn queue_count(root: &Path, prefix: &str) -> usize {
    fs::read_dir(root.join("queues")).map_or(0, |entries| {
        entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
            .count()
    })
}

fn interrupt_cpus(device: &Path) -> Vec<u32> {
    // Virtio devices hang below the PCI device that owns the interrupts.
    let directories: [PathBuf; 2] = [device.join("msi_irqs"), device.join("../msi_irqs")];
    let mut cpus = BTreeSet::new();
    for entry in directories.iter().find_map(|path| fs::read_dir(path).ok()).into_iter().flatten() {
        let Ok(entry) = entry else { continue };
        let irq = entry.file_name().to_string_lossy().into_owned();
        if let Some(list) = line(format!("/proc/irq/{irq}/effective_affinity_list")) {
            cpus.extend(cpu_list(&list));
        }
    }
    cpus.into_iter().collect()
}

/// Reads the kernel's list format: `0-2,5`.
fn cpu_list(list: &str) -> Vec<u32> {
    let mut cpus = Vec::new();
    for part in list.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            cpus.extend(first..=last.min(first.saturating_add(4096)));
        }
    }
    cpus
}

const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_MSG_RINGS_GET: u8 = 15;
const ETHTOOL_MSG_CHANNELS_GET: u8 = 17;

fn ethtool(families: &Families, command: u8, index: u32) -> Option<Vec<u8>> {
    let (mut header, mut request) = (Vec::new(), Vec::new());
    genl::put(&mut header, 1, &index.to_ne_bytes());
    genl::put_nested(&mut request, 1, &header);
    families.ethtool.as_ref()?.request(command, 1, &request).ok()
}

fn rings(families: &Families, index: u32) -> Option<RingSizes> {
    let reply = ethtool(families, ETHTOOL_MSG_RINGS_GET, index)?;
    let at = |kind| genl::number(&reply, kind);
    Some(RingSizes { rx_max: at(2)?, tx_max: at(5)?, rx: at(6)?, tx: at(9)? })
}

fn channels(families: &Families, index: u32) -> Option<(u64, u64)> {
    let reply = ethtool(families, ETHTOOL_MSG_CHANNELS_GET, index)?;
    Some((genl::number(&reply, 9)?, genl::number(&reply, 5)?))
}

/// Names of the bits in a bitset without a mask, or set in one with a mask.
fn bitset(set: &[u8]) -> BTreeSet<String> {
    let without_mask = genl::find(set, 1).is_some();
    let bits = genl::find(set, 3).unwrap_or_default();
    Attributes(bits)
        .filter(|(_, bit)| without_mask || genl::find(bit, 3).is_some())
        .filter_map(|(_, bit)| genl::text(bit, 2))
        .collect()
}

fn offloads(families: &Families, index: u32) -> Option<(Vec<String>, Vec<String>)> {
    let reply = ethtool(families, ETHTOOL_MSG_FEATURES_GET, index)?;
    let changeable = bitset(genl::find(&reply, 2)?);
    let active = bitset(genl::find(&reply, 4)?);
    let named = |filter: &dyn Fn(&str) -> bool| {
        let names = OFFLOADS.iter().map(|(name, _)| *name);
        names.filter(|name| filter(name)).map(str::to_owned).collect()
    };
    // Off and beyond reach is no fact worth telling.
    let off = named(&|name| !active.contains(name) && changeable.contains(name));
    Some((named(&|name| active.contains(name)), off))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> Interface {
        Interface {
            name: "eth9".to_owned(),
            class: DeviceClass::Physical,
            driver: "ice".to_owned(),
            state: "up".to_owned(),
            mtu_bytes: Some(1500),
            queues: (4, 4),
            channels: Some((4, 8)),
            rings: Some(RingSizes { rx: 512, rx_max: 8192, tx: 512, tx_max: 8192 }),
            xdp: Some(XdpFeatures::of(0b10_1011, Some(5), 2)),
            trial: None,
            offloads_on: vec!["rx-lro".to_owned(), "tx-checksum-ip-generic".to_owned()],
            offloads_off: vec!["tx-udp-segmentation".to_owned(), "tx-checksum-ipv6".to_owned()],
            interrupt_cpus: vec![0],
            napi_threaded: Some(false),
            numa_node: Some(0),
            replies_unforeseen: Some("eth9 hashes no ports".to_owned()),
        }
    }

    #[test]
    fn flags_become_support() {
        let of = |flags| XdpFeatures::of(flags, None, 0).support();
        assert_eq!(of(0), XdpSupport::Generic);
        assert_eq!(of(1), XdpSupport::Generic, "without redirect there is no AF_XDP");
        assert_eq!(of(3), XdpSupport::NativeCopy);
        assert_eq!(of(3 | 8), XdpSupport::ZeroCopy);
        let full = interface().xdp.expect("set above");
        assert!(full.multi_buffer && full.tx_checksum);
    }

    #[test]
    fn a_trial_outranks_what_the_driver_says() {
        let mut interface = interface();
        assert_eq!(interface.xdp_support(), XdpSupport::ZeroCopy);
        interface.trial = Some(Ok(TrialBind::Copy));
        assert_eq!(interface.xdp_support(), XdpSupport::NativeCopy);
    }

    #[test]
    fn advice_fits_the_path() {
        let text = |af_xdp| {
            let advice = interface().advise(af_xdp);
            advice.into_iter().map(|advice| advice.fix).collect::<Vec<_>>().join("\n")
        };
        let xdp = text(true);
        assert!(xdp.contains("rx-lro off") && xdp.contains("threaded"), "{xdp}");
        assert!(xdp.contains("ethtool -X eth9 start"), "{xdp}");
        assert!(xdp.contains("rx-flow-hash udp6 sdfn"), "{xdp}");
        assert!(!xdp.contains("tx-udp-segmentation"));
        let sockets = text(false);
        assert!(sockets.contains("tx-udp-segmentation on"), "{sockets}");
        assert!(!sockets.contains("rx-lro") && !sockets.contains("tx-checksum"));
        for text in [xdp, sockets] {
            assert!(text.contains("ethtool -G eth9 rx 4096"));
            assert!(text.contains("scripts/setup-nic.sh eth9 --shards"), "{text}");
        }
    }

    #[test]
    fn a_software_device_is_not_told_to_use_gro() {
        let mut interface = interface();
        interface.offloads_off = vec!["rx-gro".to_owned()];
        let told = |interface: &Interface| {
            interface.advise(false).iter().any(|advice| advice.fix.contains("rx-gro"))
        };
        assert!(told(&interface));
        interface.class = DeviceClass::Virtual;
        assert!(!told(&interface));
    }

    #[test]
    fn loopback_is_there_and_paths_are_not_names() {
        let families = Families::open();
        let lo = Interface::examine("lo", &families).expect("lo exists");
        assert_eq!(lo.class, DeviceClass::Loopback);
        assert!(lo.mtu_bytes.is_some_and(|mtu| mtu > 1280));
        assert!(!lo.offloads_on.is_empty(), "the ethtool family answers");
        for name in ["no-such-if", "", ".", "..", "lo/../lo", "../net/lo"] {
            assert!(Interface::examine(name, &families).is_none(), "{name}");
        }
        assert_eq!(names().last().map(String::as_str), Some("lo"));
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(cpu_list("7"), [7]);
        assert!(cpu_list("").is_empty() && cpu_list("x-y").is_empty());
    }
}
