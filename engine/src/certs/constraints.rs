//! Which names a CA may certify: checked before signing, and written into the intermediate so
//! that every verifier checks it too (RFC 5280, section 4.2.1.10).
//!
//! With any subtree configured, kinds of names without a permitted subtree are excluded as a
//! whole, IPv4 always.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rcgen::{CidrSubnet, GeneralSubtree, NameConstraints};
use rustls_pki_types::DnsName;

use super::error::{CaError, CertsError};
use super::names::IdentityNames;

#[derive(Debug, Clone)]
pub(super) struct NamePolicy {
    dns: Vec<String>,
    ipv6: Vec<(Ipv6Addr, u8)>,
}

impl NamePolicy {
    pub(super) fn new(dns: &[String], ipv6: &[(Ipv6Addr, u8)]) -> Result<Self, CertsError> {
        for subtree in dns {
            DnsName::try_from(subtree.as_str()).map_err(|_| {
                CertsError::Configuration(format!(
                    "permitted subtree `{subtree}` is not a DNS name"
                ))
            })?;
        }
        for (prefix, length) in ipv6 {
            if *length > 128 || mask(*prefix, *length) != u128::from(*prefix) {
                return Err(CertsError::Configuration(format!(
                    "permitted prefix {prefix}/{length} must have at most 128 bits and zeros \
                     after them"
                )));
            }
        }
        let dns = dns.iter().map(|subtree| subtree.to_ascii_lowercase()).collect();
        Ok(Self { dns, ipv6: ipv6.to_vec() })
    }

    fn is_open(&self) -> bool {
        self.dns.is_empty() && self.ipv6.is_empty()
    }

    /// Refuses names outside the subtrees. Client identifiers are not constrained.
    pub(super) fn check(&self, names: &IdentityNames) -> Result<(), CaError> {
        if self.is_open() {
            return Ok(());
        }
        for name in names.dns() {
            let bare = name.strip_prefix("*.").unwrap_or(name);
            if !self.dns.iter().any(|subtree| is_within(bare, subtree)) {
                return Err(CaError::refused(format!("{name} is outside the permitted subtrees")));
            }
        }
        for address in names.ipv6() {
            let inside =
                |(prefix, length): &(Ipv6Addr, u8)| mask(*address, *length) == u128::from(*prefix);
            if !self.ipv6.iter().any(inside) {
                return Err(CaError::refused(format!(
                    "{address} is outside the permitted prefixes"
                )));
            }
        }
        Ok(())
    }

    pub(super) fn to_extension(&self) -> Option<NameConstraints> {
        if self.is_open() {
            return None;
        }
        let subnet = |address: IpAddr, length| {
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, length))
        };
        let mut permitted: Vec<_> = self.dns.iter().cloned().map(GeneralSubtree::DnsName).collect();
        permitted
            .extend(self.ipv6.iter().map(|(prefix, length)| subnet((*prefix).into(), *length)));
        let mut excluded = vec![subnet(Ipv4Addr::UNSPECIFIED.into(), 0)];
        if self.ipv6.is_empty() {
            excluded.push(subnet(Ipv6Addr::UNSPECIFIED.into(), 0));
        }
        if self.dns.is_empty() {
            excluded.push(GeneralSubtree::DnsName(String::new()));
        }
        Some(NameConstraints { permitted_subtrees: permitted, excluded_subtrees: excluded })
    }
}

fn is_within(name: &str, subtree: &str) -> bool {
    name.strip_suffix(subtree).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn mask(address: Ipv6Addr, length: u8) -> u128 {
    let bits = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
    u128::from(address) & bits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dns: &[&str], ipv6: &[&str]) -> IdentityNames {
        let start = dns
            .iter()
            .fold(IdentityNames::new(), |names, name| names.with_dns(name).expect("a DNS name"));
        ipv6.iter().fold(start, |names, address| names.with_ipv6(address.parse().unwrap()))
    }

    #[test]
    fn subtrees_bind_names() {
        let prefix = ("2001:db8::".parse().unwrap(), 32);
        let policy = NamePolicy::new(&["Example.net".to_owned()], &[prefix]).unwrap();
        policy.check(&names(&["example.net", "a.b.example.net", "*.example.net"], &[])).unwrap();
        policy.check(&names(&[], &["2001:db8:ffff::1"])).unwrap();
        policy.check(&names(&["badexample.net"], &[])).unwrap_err();
        policy.check(&names(&["net"], &[])).unwrap_err();
        policy.check(&names(&[], &["2001:db9::1"])).unwrap_err();
    }

    #[test]
    fn kinds_without_a_subtree_are_excluded() {
        let policy = NamePolicy::new(&["example.net".to_owned()], &[]).unwrap();
        policy.check(&names(&[], &["2001:db8::1"])).unwrap_err();
        let extension = policy.to_extension().unwrap();
        assert_eq!(extension.permitted_subtrees.len(), 1);
        assert_eq!(extension.excluded_subtrees.len(), 2);
        let open = NamePolicy::new(&[], &[]).unwrap();
        assert!(open.to_extension().is_none());
        open.check(&names(&["anything.example"], &["::1"])).unwrap();
    }

    #[test]
    fn prefixes_are_checked() {
        assert!(NamePolicy::new(&[], &[("2001:db8::1".parse().unwrap(), 32)]).is_err());
        assert!(NamePolicy::new(&[], &[("::".parse().unwrap(), 129)]).is_err());
        assert!(NamePolicy::new(&["no spaces".to_owned()], &[]).is_err());
        let single = NamePolicy::new(&[], &[("::1".parse().unwrap(), 128)]).unwrap();
        single.check(&names(&[], &["::1"])).unwrap();
        single.check(&names(&[], &["::2"])).unwrap_err();
        NamePolicy::new(&[], &[("::".parse().unwrap(), 0)])
            .unwrap()
            .check(&names(&[], &["2001:db8::1"]))
            .unwrap();
    }
}
