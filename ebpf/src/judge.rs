//! What becomes of a packet: redirected to the AF_XDP socket of its queue, or
//! passed to the kernel with the reason counted.
//!
//! There is no third way: nothing is dropped and nothing aborts. A kernel UDP
//! socket holds the port and receives what is passed, so a packet that this
//! program does not understand only takes the slow way.

use crate::decode::{Decoded, Packet, decode};
use crate::maps::{Counter, PortKey};

/// What [`judge`] asks of the maps.
pub trait Tables {
    /// Whether the port map holds `key`.
    fn is_port_registered(&self, key: &PortKey) -> bool;

    /// Marks the packet for the AF_XDP socket of the queue that it came in by;
    /// false where none is set. One helper call does both, so that the common
    /// case costs one look-up. Asked last.
    fn redirect(&self) -> bool;
}

/// The judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// To the queue's AF_XDP socket: counted in
    /// [`Counter::RedirectedPackets`] and, with these bytes (Ethernet header
    /// included), in [`Counter::RedirectedBytes`].
    Redirect {
        /// Length of the packet.
        packet_bytes: usize,
    },
    /// To the kernel, counted here.
    Pass(Counter),
}

impl Verdict {
    /// The packet counter that this verdict moves.
    #[must_use]
    pub const fn counter(self) -> Counter {
        match self {
            Self::Redirect { .. } => Counter::RedirectedPackets,
            Self::Pass(counter) => counter,
        }
    }
}

/// Judges one packet. The order is that of the counters' documentation: what
/// the packet is, whose it is, whether it is sound, and whether anybody on this
/// queue takes it.
#[inline(always)]
#[must_use]
pub fn judge<P: Packet + ?Sized, T: Tables>(packet: &P, tables: &T) -> Verdict {
    let udp = match decode(packet) {
        Decoded::Udp(udp) => udp,
        Decoded::Truncated => return Verdict::Pass(Counter::PassTruncated),
        Decoded::NotIpv6 => return Verdict::Pass(Counter::PassNotIpv6),
        Decoded::Vlan => return Verdict::Pass(Counter::PassVlan),
        Decoded::ExtensionHeader => return Verdict::Pass(Counter::PassExtension),
        Decoded::Fragment => return Verdict::Pass(Counter::PassFragment),
        Decoded::Icmpv6 => return Verdict::Pass(Counter::PassIcmpv6),
        Decoded::OtherProtocol => return Verdict::Pass(Counter::PassOtherProtocol),
    };
    let bound = PortKey::new(udp.destination, udp.destination_port);
    if !tables.is_port_registered(&bound) {
        let any = PortKey::any_address(udp.destination_port);
        if !tables.is_port_registered(&any) {
            return Verdict::Pass(Counter::PassOtherPort);
        }
    }
    // An any-address registration must not take multicast: QUIC is unicast, and
    // other sockets of the machine may have joined the group.
    if udp.destination.is_multicast() {
        return Verdict::Pass(Counter::PassMulticast);
    }
    let packet_bytes = packet.len_bytes();
    if !udp.lengths_agree(packet_bytes) {
        return Verdict::Pass(Counter::PassBadLength);
    }
    if !udp.has_checksum() {
        return Verdict::Pass(Counter::PassZeroChecksum);
    }
    if !tables.redirect() {
        return Verdict::Pass(Counter::PassNoSocket);
    }
    Verdict::Redirect { packet_bytes }
}
