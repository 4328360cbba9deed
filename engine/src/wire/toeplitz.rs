//! The Toeplitz hash, by which network cards choose a packet's receive queue (RSS: receive-side
//! scaling, Microsoft's "RSS hashing functions").
//!
//! Each bit of the input that is set adds (XOR) the 32 bits of the key that start at its place. The
//! hash is linear: that of addresses and ports is the sum of each part's own.

use std::net::{Ipv6Addr, SocketAddrV6};

/// Bytes of a key that the hash of IPv6 addresses and ports needs: 36 of input and 4 more.
pub const KEY_BYTES_MIN: usize = 40;

/// Where the ports stand in the input: source, then destination.
const DESTINATION_PORT_OFFSET: usize = 34;

/// Hash of `input` that stands `offset` bytes into the whole input.
fn hash_at(key: &[u8; KEY_BYTES_MIN], offset: usize, input: &[u8]) -> u32 {
    let mut hash = 0;
    for (index, byte) in (offset..).zip(input) {
        let window = key[index..index + 5].iter();
        let window = window.fold(0, |window, byte| window << 8 | u64::from(*byte));
        for bit in (0..8).filter(|bit| byte & (0x80 >> bit) != 0) {
            hash ^= (window >> (8 - bit)) as u32;
        }
    }
    hash
}

/// Hash of a UDP packet over IPv6 from `source` to `destination`, as the receiving card computes it.
#[must_use]
pub fn hash_udp(
    key: &[u8; KEY_BYTES_MIN],
    source: &SocketAddrV6,
    destination: &SocketAddrV6,
) -> u32 {
    hash_without_destination_port(key, source, *destination.ip())
        ^ hash_destination_port(key, destination.port())
}

/// The part of [`hash_udp`] that does not depend on the destination port.
#[must_use]
pub fn hash_without_destination_port(
    key: &[u8; KEY_BYTES_MIN],
    source: &SocketAddrV6,
    destination: Ipv6Addr,
) -> u32 {
    hash_at(key, 0, &source.ip().octets())
        ^ hash_at(key, 16, &destination.octets())
        ^ hash_at(key, 32, &source.port().to_be_bytes())
}

/// The part of [`hash_udp`] that the destination port adds.
#[must_use]
pub fn hash_destination_port(key: &[u8; KEY_BYTES_MIN], port: u16) -> u32 {
    hash_at(key, DESTINATION_PORT_OFFSET, &port.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key of Microsoft's verification suite.
    const KEY: [u8; KEY_BYTES_MIN] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    fn address(text: &str) -> SocketAddrV6 {
        text.parse().expect("an address and a port")
    }

    /// "Verifying the RSS hash calculation", IPv6: destination, source, hash with ports, and without.
    #[test]
    fn microsofts_verification_suite() {
        let suite = [
            ("[3ffe:2501:200:3::1]:1766", "[3ffe:2501:200:1fff::7]:2794", 0x4020_7d3d, 0x2cc1_8cd5),
            ("[ff02::1]:4739", "[3ffe:501:8::260:97ff:fe40:efab]:14230", 0xdde5_1bbf, 0x0f0c_461c),
            (
                "[fe80::200:f8ff:fe21:67cf]:38024",
                "[3ffe:1900:4545:3:200:f8ff:fe21:67cf]:44251",
                0x02d1_feef,
                0x4b61_e985,
            ),
        ];
        for (destination, source, with_ports, addresses_only) in suite {
            let (source, destination) = (address(source), address(destination));
            assert_eq!(hash_udp(&KEY, &source, &destination), with_ports, "{source}");
            let addresses = hash_at(&KEY, 0, &source.ip().octets())
                ^ hash_at(&KEY, 16, &destination.ip().octets());
            assert_eq!(addresses, addresses_only, "{source}");
        }
    }

    #[test]
    fn the_last_bit_of_the_input_meets_the_last_of_the_key() {
        assert_eq!(
            hash_destination_port(&KEY, 1),
            0xbeac_01fa >> 1 | (u32::from(KEY[35]) & 1) << 31
        );
        assert_eq!(hash_destination_port(&KEY, 0), 0);
    }
}
