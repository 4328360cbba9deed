//! Questions to the driver that netlink attributes of a link do not answer: its active queues, and how
//! it spreads received packets over them (RSS).

use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `ETHTOOL_GCHANNELS` of `linux/ethtool.h`.
const ETHTOOL_GCHANNELS: u32 = 0x3c;
/// `ETHTOOL_GRXFH`: which fields are hashed.
const ETHTOOL_GRXFH: u32 = 0x29;
/// `ETHTOOL_GRSSH`: hash function, key and indirection table (Linux 3.16).
const ETHTOOL_GRSSH: u32 = 0x46;
/// `UDP_V6_FLOW`.
const UDP_V6_FLOW: u32 = 0x06;
/// Largest key and table that are taken from a driver, in bytes and entries.
const RSS_KEY_BYTES_MAX: usize = 256;
const RSS_TABLE_ENTRIES_MAX: usize = 4096;

/// `struct ethtool_channels`.
#[derive(Default)]
#[repr(C)]
struct Channels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx_count: u32,
    tx_count: u32,
    other_count: u32,
    combined_count: u32,
}

/// The start of `struct ethtool_rxfh`; table and key follow it.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct RxfhHeader {
    cmd: u32,
    rss_context: u32,
    indir_size: u32,
    key_size: u32,
    hfunc: u8,
    input_xfrm: u8,
    reserved: [u8; 6],
}

/// `struct ethtool_rxfh` with room for what follows it.
#[repr(C)]
struct Rxfh {
    header: RxfhHeader,
    config: [u8; 4 * RSS_TABLE_ENTRIES_MAX + RSS_KEY_BYTES_MAX],
}

/// The start of `struct ethtool_rxnfc`, and room for the rest, which this command does not use.
#[repr(C)]
struct Rxnfc {
    cmd: u32,
    flow_type: u32,
    data: u64,
    rest: [u64; 32],
}

/// How a device spreads what it receives, as its driver tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RssState {
    /// `ETH_RSS_HASH_*` bits: 1 is Toeplitz.
    pub(crate) functions: u8,
    /// Changes to the input before it is hashed (`RXH_XFRM_*`); 0: none.
    pub(crate) input_changes: u8,
    pub(crate) key: Vec<u8>,
    /// Hash modulo its length → queue.
    pub(crate) table: Vec<u32>,
    /// `RXH_*` bits: the fields of UDP over IPv6 that are hashed.
    pub(crate) udp_ipv6_fields: u64,
}

/// Asks the driver of the named interface. `data` is the structure that its command, which stands
/// in its first field, reads and writes.
fn ask<T>(interface: &str, data: &mut T) -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = interface.as_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(name) {
        *target = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(data).cast();
    // SAFETY: `request` and the structure that it points to are whole, and of the shape that the
    // command reads and writes: the callers are below.
    let result = unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, &raw mut request)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Number of queues of the named interface that can be bound: the larger of its
/// active receive and transmit queues. `EOPNOTSUPP` if the driver does not say.
pub(crate) fn queue_count(interface: &str) -> io::Result<u32> {
    let mut channels = Channels { cmd: ETHTOOL_GCHANNELS, ..Channels::default() };
    ask(interface, &mut channels)?;
    Ok(channels.combined_count + channels.rx_count.max(channels.tx_count))
}

/// How the named interface spreads received packets. `EOPNOTSUPP` if it does not, or does not say;
/// `EFBIG` for a table or key beyond any known device's.
pub(crate) fn rss(interface: &str) -> io::Result<RssState> {
    let header = RxfhHeader { cmd: ETHTOOL_GRSSH, ..RxfhHeader::default() };
    let config = [0; 4 * RSS_TABLE_ENTRIES_MAX + RSS_KEY_BYTES_MAX];
    // On the heap: 16 kB. With sizes of zero the kernel tells those of the device only.
    let mut rxfh = Box::new(Rxfh { header, config });
    ask(interface, &mut *rxfh)?;
    let (entries, key_bytes) = (rxfh.header.indir_size as usize, rxfh.header.key_size as usize);
    // The kernel writes so much.
    if entries > RSS_TABLE_ENTRIES_MAX || key_bytes > RSS_KEY_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    let (indir_size, key_size) = (rxfh.header.indir_size, rxfh.header.key_size);
    rxfh.header = RxfhHeader { indir_size, key_size, ..header };
    ask(interface, &mut *rxfh)?;
    let (table, key) = rxfh.config[..4 * entries + key_bytes].split_at(4 * entries);
    let (table, _) = table.as_chunks::<4>();
    let mut fields = Rxnfc { cmd: ETHTOOL_GRXFH, flow_type: UDP_V6_FLOW, data: 0, rest: [0; 32] };
    ask(interface, &mut fields)?;
    Ok(RssState {
        functions: rxfh.header.hfunc,
        input_changes: rxfh.header.input_xfrm,
        key: key.to_vec(),
        table: table.iter().copied().map(u32::from_ne_bytes).collect(),
        udp_ipv6_fields: fields.data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_that_do_not_exist_are_an_error() {
        let error = queue_count("stoq-none").expect_err("no such interface");
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        let error = queue_count("a-name-longer-than-any").expect_err("too long");
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<RxfhHeader>(), 24);
        assert_eq!(std::mem::offset_of!(Rxfh, config), 24);
        assert_eq!(std::mem::offset_of!(RxfhHeader, hfunc), 16);
        assert_eq!(std::mem::offset_of!(Rxnfc, data), 8);
        // `struct ethtool_rxnfc` ends behind its flow specification (168 bytes) and two words.
        assert!(size_of::<Rxnfc>() >= 16 + 168 + 8);
    }

    #[test]
    fn loopback_spreads_nothing() {
        let error = rss("lo").expect_err("loopback has no driver");
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    }

    #[test]
    fn loopback_has_no_channels() {
        let error = queue_count("lo").expect_err("loopback has no driver");
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    }
}
