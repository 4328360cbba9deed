//! What happens to each packet, for observers and for the digest by which two
//! runs are compared.

use std::net::SocketAddrV6;
use std::time::Duration;

use crate::datapath::Ecn;

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u8)]
pub enum Fate {
    /// It entered the network.
    Sent = 0,
    /// It reached its receiver's queue.
    Delivered = 1,
    /// A link's queue was full.
    DroppedQueue = 2,
    /// Lost on the wire.
    DroppedLoss = 3,
    /// A policer had no tokens.
    DroppedPolicer = 4,
    /// Larger than a link's MTU.
    DroppedMtu = 5,
    /// A link was down.
    DroppedDown = 6,
    /// Nobody has the address (any more).
    DroppedUnreachable = 7,
    /// The receiver's queue was full.
    DroppedOverrun = 8,
    /// The test's filter took it out.
    DroppedFilter = 9,
}

/// One thing that happened to one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketEvent {
    /// Virtual time.
    pub at: Duration,
    /// Sender as the network sees it, after address translation.
    pub from: SocketAddrV6,
    /// Receiver as the sender wrote it.
    pub to: SocketAddrV6,
    /// The mark that it carries now.
    pub ecn: Ecn,
    /// UDP payload bytes.
    pub payload_bytes: usize,
    /// A bit was flipped on the way. Not part of the digest, which has the chance in its order.
    pub corrupted: bool,
    /// What happened.
    pub fate: Fate,
}

/// A stable 64-bit digest over all events: each word is folded in by xor, an odd
/// multiplier and a shift. Not cryptographic: it tells runs apart, no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EventDigest(u64);

impl Default for EventDigest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl EventDigest {
    pub(super) fn value(self) -> u64 {
        self.0
    }

    pub(super) fn absorb(&mut self, at_ns: u64, event: &PacketEvent) {
        self.word(at_ns);
        self.address(&event.from);
        self.address(&event.to);
        let length = event.payload_bytes as u64;
        self.word(length << 16 | (event.ecn as u64) << 8 | event.fate as u64);
    }

    fn address(&mut self, address: &SocketAddrV6) {
        let bits = address.ip().to_bits();
        self.word((bits >> 64) as u64);
        self.word(bits as u64);
        self.word(u64::from(address.port()));
    }

    fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_and_the_order_count() {
        let event = PacketEvent {
            at: Duration::from_nanos(5),
            from: "[fd00::1]:1".parse().expect("address"),
            to: "[fd00::2]:2".parse().expect("address"),
            ecn: Ecn::Ect0,
            payload_bytes: 1200,
            corrupted: false,
            fate: Fate::Delivered,
        };
        let digest = |at_ns, event: &PacketEvent| {
            let mut digest = EventDigest::default();
            digest.absorb(at_ns, event);
            digest
        };
        let base = digest(5, &event);
        assert_eq!(base, digest(5, &event));
        let others = [
            PacketEvent { from: event.to, to: event.from, ..event },
            PacketEvent { to: "[fd00::2]:3".parse().expect("address"), ..event },
            PacketEvent { ecn: Ecn::Ce, ..event },
            PacketEvent { payload_bytes: 1201, ..event },
            PacketEvent { fate: Fate::DroppedLoss, ..event },
        ];
        assert!(others.iter().all(|other| digest(5, other) != base));
        assert_ne!(digest(6, &event), base);

        let (mut forth, mut back) = (EventDigest::default(), EventDigest::default());
        forth.absorb(5, &event);
        forth.absorb(5, &others[0]);
        back.absorb(5, &others[0]);
        back.absorb(5, &event);
        assert_ne!(forth, back);
        // Fixed for all time: a digest may be committed with a test.
        assert_eq!(base.value(), 11_085_187_405_218_160_690);
    }
}
