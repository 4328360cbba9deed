//! The maps between the eBPF programs and userspace: names, sizes, layouts.
//!
//! | map | type | key | value |
//! |---|---|---|---|
//! | [`PORTS_MAP`] | hash | [`PortKey`] | [`PortValue`] |
//! | [`SOCKETS_MAP`] | XSKMAP | receive queue index, `u32` | AF_XDP socket |
//! | [`COUNTERS_MAP`] | per-CPU array | [`Counter`] as `u32` | `u64`, monotonic |
//! | [`STEER_MAP`] | array of one | 0 | [`SteerTable`](crate::steer::SteerTable) |
//! | [`SHARDS_MAP`] | reuseport socket array | shard, `u32` | UDP socket |
//! | [`STEER_COUNTERS_MAP`] | per-CPU array | [`SteerCounter`] as `u32` | `u64`, monotonic |
//!
//! Integers are in host byte order unless said; the layouts have no padding,
//! since the kernel hashes keys bytewise.

use crate::decode::Address;

/// Name of the program in the object, and its function's name.
pub const XDP_PROGRAM: &str = "stoq_xdp";
/// Name of the port map.
pub const PORTS_MAP: &str = "STOQ_PORTS";
/// Name of the map of AF_XDP sockets.
pub const SOCKETS_MAP: &str = "STOQ_XSKS";
/// Name of the counters' map.
pub const COUNTERS_MAP: &str = "STOQ_COUNTERS";

/// Name of the `SO_REUSEPORT` program in its object, and its function's name.
pub const REUSEPORT_PROGRAM: &str = "stoq_reuseport";
/// Name of the map with what decides about connection IDs.
pub const STEER_MAP: &str = "STOQ_STEER";
/// Name of the map of the shards' UDP sockets.
pub const SHARDS_MAP: &str = "STOQ_SHARDS";
/// Name of the map of the `SO_REUSEPORT` program's counters.
pub const STEER_COUNTERS_MAP: &str = "STOQ_STEERED";
/// Shards that can have a socket; shard numbers are below this.
pub const SHARDS_MAX: usize = 256;

/// Ports (with their addresses) that can be registered at a time.
pub const PORTS_MAX: usize = 1024;
/// Receive queues that can have a socket; queue indices are below this.
pub const QUEUES_MAX: usize = 256;

/// Size of a [`PortKey`]. A multiple of four lets the kernel hash it word-wise.
pub const PORT_KEY_BYTES: usize = 24;

/// Key of the port map: whose packets are ours. In memory: the address as on
/// the wire, the port as on the wire, six zero bytes. The fields are words
/// because the eBPF compiler moves (and clears) an array of bytes in a loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PortKey {
    address: Address,
    port_and_zero: u64,
}

impl PortKey {
    /// UDP port `port` at exactly `address`; the unspecified address (`::`)
    /// stands for any.
    #[inline(always)]
    #[must_use]
    pub const fn new(address: Address, port: u16) -> Self {
        let [high, low] = port.to_be_bytes();
        Self { address, port_and_zero: u64::from_ne_bytes([high, low, 0, 0, 0, 0, 0, 0]) }
    }

    /// UDP port `port` at any unicast address.
    #[inline(always)]
    #[must_use]
    pub const fn any_address(port: u16) -> Self {
        Self::new(Address::UNSPECIFIED, port)
    }

    /// The key as the kernel sees it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; PORT_KEY_BYTES] {
        let mut bytes = [0; PORT_KEY_BYTES];
        bytes[..16].copy_from_slice(&self.address.octets());
        bytes[16..].copy_from_slice(&self.port_and_zero.to_ne_bytes());
        bytes
    }
}

const _: () = assert!(size_of::<PortKey>() == PORT_KEY_BYTES && align_of::<PortKey>() == 8);

/// Value of the port map: flags, none of which exist yet. That the key is
/// there is what counts; userspace writes zero.
pub type PortValue = u32;

macro_rules! counters {
    ($counter:ident: $($(#[$doc:meta])+ $variant:ident = $name:literal,)+) => {
        /// Index into the counters' map. Names are stable: they are the keys in
        /// `--json` outputs and the metric names of exporters. New counters are
        /// added at the end.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        #[non_exhaustive]
        pub enum $counter { $($(#[$doc])+ $variant,)+ }

        impl $counter {
            /// Every counter, in the order of the indices.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// Stable name, in `snake_case`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// Number of counters: the size of the map.
            pub const COUNT: usize = Self::ALL.len();

            /// Index into the map.
            #[inline(always)]
            #[must_use]
            pub const fn index(self) -> u32 {
                self as u32
            }
        }
    };
}

counters! {
    Counter:
    /// Packets handed to an AF_XDP socket. (Its full ring may still lose them:
    /// the socket's own statistics say so.)
    RedirectedPackets = "redirected_packets",
    /// Bytes of these packets, Ethernet header included.
    RedirectedBytes = "redirected_bytes",
    /// Passed: ends within a header, or its first buffer does.
    PassTruncated = "pass_truncated",
    /// Passed: ARP, IPv4 and everything else that is not IPv6.
    PassNotIpv6 = "pass_not_ipv6",
    /// Passed: carries a VLAN tag.
    PassVlan = "pass_vlan",
    /// Passed: carries an IPv6 extension header.
    PassExtension = "pass_extension",
    /// Passed: an IPv6 fragment.
    PassFragment = "pass_fragment",
    /// Passed: `ICMPv6`, with it neighbour discovery and packet-too-big.
    PassIcmpv6 = "pass_icmpv6",
    /// Passed: TCP and every other protocol above IPv6.
    PassOtherProtocol = "pass_other_protocol",
    /// Passed: UDP to a port, or to an address at this port, that is not registered.
    PassOtherPort = "pass_other_port",
    /// Passed: our port, but a multicast address.
    PassMulticast = "pass_multicast",
    /// Passed: our port, but the lengths of IPv6, UDP and packet disagree.
    PassBadLength = "pass_bad_length",
    /// Passed: our port, but no UDP checksum; the kernel drops and counts it (RFC 8200 §8.1).
    PassZeroChecksum = "pass_zero_checksum",
    /// Passed: our port, but no AF_XDP socket for the receive queue.
    PassNoSocket = "pass_no_socket",
}

counters! {
    SteerCounter:
    /// Given to the shard that the connection ID names.
    SteeredById = "steered_by_id",
    /// Given to a shard by the hash of a client's own connection ID.
    SteeredByHash = "steered_by_hash",
    /// Left to the kernel's choice: a short header with an ID that we never gave out.
    PassForeign = "pass_foreign",
    /// Left to the kernel's choice: too short for a QUIC packet.
    PassTruncated = "pass_truncated",
    /// Left to the kernel's choice: the shard has no socket.
    PassNoSocket = "pass_no_socket",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_dense_and_named_once() {
        for (index, counter) in SteerCounter::ALL.iter().enumerate() {
            assert_eq!(counter.index() as usize, index);
            let name = counter.name();
            assert_eq!(SteerCounter::ALL.iter().filter(|other| other.name() == name).count(), 1);
        }
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(counter.index() as usize, index);
            let name = counter.name();
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b == b'6'));
            assert_eq!(Counter::ALL.iter().filter(|other| other.name() == name).count(), 1);
        }
    }

    #[test]
    fn key_layout() {
        let key = PortKey::new(Address::from_octets([7; 16]), 0x1234).to_bytes();
        assert_eq!(key[..16], [7; 16]);
        assert_eq!(key[16..], [0x12, 0x34, 0, 0, 0, 0, 0, 0]);
        assert_eq!(PortKey::any_address(1).to_bytes()[..16], [0; 16]);
    }
}
