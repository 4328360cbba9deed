//! TLS from a configuration file: the `[tls]` table of
//! [`StoqTransport`](crate::transport::StoqTransport).
//!
//! It covers files, self-made certificates and pinned roots. Programs with other needs (a CA,
//! shared ticket keys, a verifier of their own) build [`crate::certs`]' types themselves.

use std::net::Ipv6Addr;
use std::path::PathBuf;

use serde::Deserialize;

use super::ConfigError;

/// Certificates, trust and application protocols.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// Application protocols (ALPN, RFC 7301) in order of preference; at least one, 1 to 255 bytes each.
    pub alpn: Vec<String>,
    /// PEM file with this side's certificate chain. With it or `self_signed`, peers are accepted.
    pub certificate: Option<PathBuf>,
    /// PEM file with its private key (mode 0600).
    pub key: Option<PathBuf>,
    /// Names of a certificate made at start, instead of files: DNS names and IPv6 addresses.
    pub self_signed: Vec<String>,
    /// PEM file with the roots that peers' certificates must lead to. With it, connections can be made.
    pub roots: Option<PathBuf>,
    /// Require certificates of clients, too, under the same roots.
    pub client_certificates: bool,
    /// Offer post-quantum key exchange only.
    pub require_post_quantum: bool,
    /// Write session secrets to the file that the environment's `SSLKEYLOGFILE` names. Whoever
    /// reads it reads the traffic.
    pub key_log: bool,
}

impl TlsConfig {
    /// Whether this side has an identity to accept connections with.
    #[must_use]
    pub fn is_server(&self) -> bool {
        self.certificate.is_some() || !self.self_signed.is_empty()
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |key, value: String, allowed: &str| {
            Err(ConfigError { key, value, allowed: allowed.to_owned() })
        };
        let has_bad_name = self.alpn.iter().any(|name| !(1..=255).contains(&name.len()));
        if self.alpn.is_empty() || has_bad_name {
            let value = format!("{:?}", self.alpn);
            return refuse("tls.alpn", value, "at least one name of 1 to 255 bytes");
        }
        if self.certificate.is_some() != self.key.is_some() {
            let value = format!("{:?}", self.key);
            return refuse("tls.key", value, "set exactly when tls.certificate is");
        }
        if self.certificate.is_some() && !self.self_signed.is_empty() {
            let value = format!("{:?}", self.self_signed);
            return refuse("tls.self_signed", value, "empty when tls.certificate is set");
        }
        if !self.is_server() && self.roots.is_none() {
            let allowed = "a PEM file, unless tls.certificate or tls.self_signed makes a server";
            return refuse("tls.roots", "unset".into(), allowed);
        }
        if self.client_certificates && self.roots.is_none() {
            let allowed = "false, or tls.roots says whom to trust";
            return refuse("tls.client_certificates", "true".into(), allowed);
        }
        Ok(())
    }

    /// `self_signed` as DNS names and addresses.
    pub(crate) fn self_signed_names(&self) -> impl Iterator<Item = Result<Ipv6Addr, &str>> + '_ {
        self.self_signed.iter().map(|name| name.parse().map_err(|_dns| name.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use crate::config::TransportConfig;

    fn refused(tls: &str) -> String {
        TransportConfig::from_toml(&format!("[tls]\n{tls}")).expect_err("refused")
    }

    #[test]
    fn each_contradiction_is_named() {
        assert!(refused("self_signed = ['a']").contains("tls.alpn"));
        assert!(refused("alpn = ['x']").contains("tls.roots"));
        assert!(refused("alpn = ['x']\ncertificate = 'c.pem'").contains("tls.key"));
        let both = "alpn = ['x']\ncertificate = 'c.pem'\nkey = 'k.pem'\nself_signed = ['a']";
        assert!(refused(both).contains("tls.self_signed"));
        let unrooted = "alpn = ['x']\nself_signed = ['a']\nclient_certificates = true";
        assert!(refused(unrooted).contains("tls.client_certificates"));
        assert!(refused("alpn = ['']\nself_signed = ['a']").contains("tls.alpn"));
    }

    #[test]
    fn names_and_addresses_are_told_apart() {
        let text = "[tls]\nalpn = ['x']\nself_signed = ['host.test', '::1']";
        let config = TransportConfig::from_toml(text).expect("valid");
        let tls = config.tls.expect("given");
        assert!(tls.is_server());
        let names: Vec<_> = tls.self_signed_names().collect();
        assert_eq!(names, [Err("host.test"), Ok(std::net::Ipv6Addr::LOCALHOST)]);
    }
}
