//! Certificates of the commands.

use std::fmt::Write as _;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args as ClapArgs;
use stoq::certs::{ClientAuth, ClientTls, IdentityNames, RotatingIdentity, ServerTls, TrustStore};
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
    /// What clients must show.
    pub clients: &'a ClientAuthArgs,
}

/// What a server demands of its clients.
#[derive(ClapArgs, Clone, Debug)]
pub struct ClientAuthArgs {
    /// Ask clients for certificates under these roots (PEM, read again when it changes).
    #[arg(long, value_name = "FILE")]
    client_ca: Option<PathBuf>,
    /// Refuse client certificates that a list in this file (PEM, read again when it changes) revokes,
    /// or for whose issuer it has none.
    #[arg(long, value_name = "FILE", requires = "client_ca")]
    client_crl: Option<PathBuf>,
    /// Whether clients without a certificate are refused; a bad certificate always is.
    #[arg(long, value_enum, default_value_t, requires = "client_ca")]
    client_auth: Demand,
    /// Offer post-quantum key exchange (X25519MLKEM768) alone: clients without it are refused.
    #[arg(long)]
    require_post_quantum: bool,
}

/// Whether something must be there.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default)]
enum Demand {
    /// Clients without a certificate are refused.
    #[default]
    Required,
    /// Clients without a certificate are served, anonymously.
    Optional,
}

impl ClientAuthArgs {
    /// Roots and lists, if clients are asked at all.
    fn trust(&self) -> anyhow::Result<Option<Arc<TrustStore>>> {
        let Some(roots) = &self.client_ca else { return Ok(None) };
        let mut builder = TrustStore::builder().roots_pem(roots);
        if let Some(list) = &self.client_crl {
            builder = builder.crl_pem(list);
        }
        Ok(Some(builder.build().context("--client-ca, --client-crl")?))
    }
}

/// A server's TLS, and whom it trusts.
pub struct Server {
    /// Certificates, sessions.
    pub tls: ServerTls,
    /// Of clients.
    pub trust: Option<Arc<TrustStore>>,
}

/// The server's TLS: the given certificate, or one under a root of its own in memory.
pub fn server(options: &ServerOptions<'_>) -> anyhow::Result<Server> {
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
    let trust = options.clients.trust()?;
    let client_auth = match (&trust, options.clients.client_auth) {
        (None, _) => ClientAuth::None,
        (Some(trust), Demand::Required) => ClientAuth::Required(trust.clone()),
        (Some(trust), Demand::Optional) => ClientAuth::Optional(trust.clone()),
    };
    let tls = ServerTls::builder()
        .identity(identity)
        .client_auth(client_auth)
        .require_post_quantum(options.clients.require_post_quantum)
        .alpn(options.alpn.iter().map(String::as_bytes))
        .packet_crypto(options.packet_crypto)
        .key_log(true)
        .build()
        .context("the server's TLS")?;
    Ok(Server { tls, trust })
}

/// The client's TLS for one protocol.
pub fn client(
    trust: &TrustArgs,
    alpn: &str,
    packet_crypto: CryptoProviderChoice,
) -> anyhow::Result<ClientTls> {
    let mut builder = ClientTls::builder()
        .alpn([alpn])
        .packet_crypto(packet_crypto)
        .key_log(true)
        .require_post_quantum(trust.require_post_quantum);
    builder = match (&trust.ca, trust.danger_insecure) {
        (Some(path), _) => {
            let mut store = TrustStore::builder().roots_pem(path);
            if let Some(list) = &trust.crl {
                store = store.crl_pem(list);
            }
            builder.trust(store.build().context("--ca, --crl")?)
        }
        (None, true) => builder.danger_accept_any_server_certificate(),
        (None, false) if trust.pin.is_empty() => {
            anyhow::bail!("whom to trust? give --ca FILE.pem (the server's --cert-out writes one)")
        }
        (None, false) => builder,
    };
    for pin in &trust.pin {
        let (name, path) =
            pin.rsplit_once('=').with_context(|| format!("--pin {pin}: must be NAME=FILE"))?;
        let roots = TrustStore::builder().roots_pem(path).build();
        let roots = roots.with_context(|| format!("--pin {pin}"))?;
        builder = builder.pin(name, roots).with_context(|| format!("--pin {pin}"))?;
    }
    if let (Some(cert), Some(key)) = (&trust.cert, &trust.key) {
        let identity = RotatingIdentity::from_pem_files(cert, key).start();
        builder = builder.identity(identity.context("--cert, --key")?);
    }
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
