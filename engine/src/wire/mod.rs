//! Wire formats beneath QUIC: Ethernet II, IPv6, UDP and the Internet checksum.
//!
//! ```text
//!  0              14                    54        62
//!  ┌──────────────┬─────────────────────┬─────────┬──────────────┬─────────┐
//!  │ Ethernet II  │ IPv6 (no extension) │ UDP     │ UDP payload  │ padding │
//!  └──────────────┴─────────────────────┴─────────┴──────────────┴─────────┘
//!                 └── total length less padding says the IPv6 payload length
//! ```
//!
//! Everything here is pure: bytes in, values out, no allocation, no `unsafe`, no
//! panic on any input from the wire. A packet that is not exactly the one drawn
//! above is refused with its reason ([`ParseError`]); the XDP program leaves such
//! packets to the kernel, so one that arrives here is counted and dropped.

pub mod checksum;
pub mod ethernet;
pub mod ipv6;
pub mod toeplitz;
pub mod udp;

pub use ethernet::MacAddr;
pub use udp::{HeaderFields, ParseError, UdpPacket, parse_udp, write_checksum, write_headers};

/// Bytes before the UDP payload: Ethernet II (14), IPv6 (40) and UDP (8) header.
pub const HEADERS_BYTES: usize = ethernet::HEADER_BYTES + ipv6::HEADER_BYTES + udp::HEADER_BYTES;

/// Bytes of an interface's MTU that the IPv6 and UDP headers take.
pub const IP_OVERHEAD_BYTES: usize = ipv6::HEADER_BYTES + udp::HEADER_BYTES;

/// Largest UDP payload that an IPv6 packet without jumbo option carries (RFC 8200 §3).
pub const UDP_PAYLOAD_BYTES_MAX: usize = u16::MAX as usize - udp::HEADER_BYTES;
