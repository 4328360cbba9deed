//! Certificates of the commands.

use std::fmt::Write as _;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::Path;

use anyhow::Context;
use stoq::certs::{ClientTls, IdentityNames, RotatingIdentity, ServerTls};
use stoq::config::CryptoProviderChoice;

use crate::ca::EnrolArgs;
use crate::client::TrustArgs;

/// What a server shows.
pub struct ServerOptions<'a> {
    /// Its address; part of a self-made certificate.
    pub listen: SocketAddrV6,
    /// Further names.
    pub names: &'a [String],
    /// Application protocols.
    pub alpn: &'a [String],
    /// Chain and key, PEM.
    pub cert: Option<&'a Path>,
    /// The key.
    pub key: Option<&'a Path>,
    /// Who seals packets.
    pub packet_crypto: CryptoProviderChoice,
    /// Where to write what clients shall trust.
    pub cert_out: Option<&'a Path>,
    /// A CA elsewhere.
    pub enrol: &'a EnrolArgs,
}

/// The server's TLS: the given certificate, or one under a root of its own in memory.
pub fn server(options: &ServerOptions<'_>) -> anyhow::Result<ServerTls> {
    let names = || listen_names(options.listen, options.names);
    let identity = match (options.enrol.identity(names)?, options.cert, options.key) {
        (Some(enrolled), ..) => enrolled,
        (None, Some(cert), Some(key)) => RotatingIdentity::from_pem_files(cert, key)
            .start()
            .context("the server's certificate")?,
        _ => RotatingIdentity::self_signed(names()?)
            .key_algorithm(options.enrol.key_algorithm())
            .start()
            .context("the server's certificate")?,
    };
    if let Some(path) = options.cert_out {
        let pem: String = identity.roots().iter().map(|root| pem(root)).collect();
        anyhow::ensure!(!pem.is_empty(), "--cert-out: with --cert, clients trust your own root");
        std::fs::write(path, pem).with_context(|| format!("writing {}", path.display()))?;
    }
    ServerTls::builder()
        .identity(identity)
        .alpn(options.alpn.iter().map(String::as_bytes))
        .packet_crypto(options.packet_crypto)
        .key_log(true)
        .build()
        .context("the server's TLS")
}

/// The client's TLS for one protocol.
pub fn client(
    trust: &TrustArgs,
    alpn: &str,
    packet_crypto: CryptoProviderChoice,
) -> anyhow::Result<ClientTls> {
    let mut builder = ClientTls::builder().alpn([alpn]).packet_crypto(packet_crypto).key_log(true);
    builder = match (&trust.ca, trust.danger_insecure) {
        (Some(path), _) => builder.roots_pem(path),
        (None, true) => builder.danger_accept_any_server_certificate(),
        (None, false) => {
            anyhow::bail!("whom to trust? give --ca FILE.pem (the server's --cert-out writes one)")
        }
    };
    builder.build().context("the client's TLS")
}

/// `localhost`, the names asked for, and the listen address, or every address of this machine when it
/// listens on all.
pub fn listen_names(listen: SocketAddrV6, further: &[String]) -> anyhow::Result<IdentityNames> {
    let mut names = add_names(IdentityNames::new().with_dns("localhost")?, further)?;
    if !listen.ip().is_unspecified() {
        return Ok(names.with_ipv6(*listen.ip()));
    }
    let text = std::fs::read_to_string("/proc/net/if_inet6").context("/proc/net/if_inet6")?;
    for address in text.lines().filter_map(|line| line.split(' ').next()) {
        let bits = u128::from_str_radix(address, 16).context("/proc/net/if_inet6")?;
        names = names.with_ipv6(Ipv6Addr::from_bits(bits));
    }
    Ok(names)
}

/// Adds DNS names and IPv6 addresses.
pub fn add_names(mut names: IdentityNames, further: &[String]) -> anyhow::Result<IdentityNames> {
    for name in further {
        names = match name.parse::<Ipv6Addr>() {
            Ok(address) => names.with_ipv6(address),
            Err(_not_an_address) => names.with_dns(name)?,
        };
    }
    Ok(names)
}

/// RFC 7468's text of a certificate.
fn pem(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut base64 = String::with_capacity(der.len() * 4 / 3 + 4);
    for group in der.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - group.len()));
        for place in 0..4 {
            let symbol = ALPHABET[(bits >> (18 - 6 * place)) as usize & 63];
            base64.push(if place <= group.len() { symbol.into() } else { '=' });
        }
    }
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in base64.as_bytes().chunks(64) {
        let line = std::str::from_utf8(line).expect("base64 is ASCII");
        writeln!(text, "{line}").expect("a String takes everything");
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_of_known_bytes() {
        assert!(pem(b"Man").contains("\nTWFu\n"));
        assert!(pem(b"Ma").contains("\nTWE=\n"));
        assert!(pem(b"M").contains("\nTQ==\n"));
    }
}
