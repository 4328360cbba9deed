//! The names of a node, and what a certificate says about itself.
//!
//! A node is known by DNS names, IPv6 addresses and, as a client, by an opaque identifier that
//! travels as the URI `urn:stoq:client:<id>` in the subject alternative names. IPv4 addresses do
//! not exist here.

use std::net::Ipv6Addr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::{CertificateDer, DnsName, ServerName};
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;
use x509_parser::time::ASN1Time;

use super::error::CertsError;
use super::fault::CertificateFault;

/// What precedes a client identifier in its URI.
pub(super) const CLIENT_URI_PREFIX: &str = "urn:stoq:client:";
/// Longest client identifier.
const CLIENT_ID_LENGTH_MAX: usize = 64;
/// Most names that one certificate carries.
const NAMES_MAX: usize = 64;

/// The names that an identity stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdentityNames {
    dns: Vec<String>,
    ipv6: Vec<Ipv6Addr>,
    client_id: Option<String>,
}

impl IdentityNames {
    /// No names yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a DNS name; `*.example.net` is allowed. Case is folded.
    ///
    /// # Errors
    /// The text is not a DNS name.
    pub fn with_dns(mut self, name: &str) -> Result<Self, CertsError> {
        let bare = name.strip_prefix("*.").unwrap_or(name);
        DnsName::try_from(bare).map_err(|_| invalid(format!("`{name}` is not a DNS name")))?;
        self.dns.push(name.to_ascii_lowercase());
        Ok(self)
    }

    /// Adds an IPv6 address.
    #[must_use]
    pub fn with_ipv6(mut self, address: Ipv6Addr) -> Self {
        self.ipv6.push(address);
        self
    }

    /// Sets the client identifier: 1 to 64 characters of `A-Z a-z 0-9 . _ -`.
    ///
    /// # Errors
    /// The identifier has another shape.
    pub fn with_client_id(mut self, id: &str) -> Result<Self, CertsError> {
        if !is_client_id(id) {
            return Err(invalid(format!(
                "client identifier `{id}` must be 1 to {CLIENT_ID_LENGTH_MAX} characters of \
                 A-Z a-z 0-9 . _ -"
            )));
        }
        self.client_id = Some(id.to_owned());
        Ok(self)
    }

    /// The DNS names, in lower case.
    #[must_use]
    pub fn dns(&self) -> &[String] {
        &self.dns
    }

    /// The IPv6 addresses.
    #[must_use]
    pub fn ipv6(&self) -> &[Ipv6Addr] {
        &self.ipv6
    }

    /// The client identifier.
    #[must_use]
    pub fn client_id(&self) -> Option<&str> {
        self.client_id.as_deref()
    }

    /// Whether there is no name at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.dns.is_empty() && self.ipv6.is_empty() && self.client_id.is_none()
    }

    /// Names there are, and not too many.
    ///
    /// # Errors
    /// No name, or more than 64.
    pub fn validate(&self) -> Result<(), CertsError> {
        if self.is_empty() {
            return Err(invalid("an identity needs a DNS name, an IPv6 address or a client id"));
        }
        if self.dns.len() + self.ipv6.len() > NAMES_MAX {
            return Err(invalid(format!("more than {NAMES_MAX} names in one identity")));
        }
        Ok(())
    }

    /// A name to verify against, for each DNS name and address; wildcards as one instance.
    pub(super) fn server_names(&self) -> Result<Vec<ServerName<'static>>, CertsError> {
        let mut names = Vec::with_capacity(self.dns.len() + self.ipv6.len());
        for name in &self.dns {
            let instance = match name.strip_prefix("*.") {
                Some(parent) => format!("any.{parent}"),
                None => name.clone(),
            };
            // Names of a parsed certificate were checked by nobody before.
            names.push(
                ServerName::try_from(instance)
                    .map_err(|_| malformed(format!("`{name}` is not a DNS name")))?,
            );
        }
        names.extend(self.ipv6.iter().map(|address| ServerName::from(*address)));
        Ok(names)
    }
}

fn is_client_id(id: &str) -> bool {
    (1..=CLIENT_ID_LENGTH_MAX).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

fn invalid(reason: impl Into<String>) -> CertsError {
    CertsError::Configuration(reason.into())
}

/// What one certificate says about itself. Parsed, not verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateSummary {
    /// Serial number in lower-case hexadecimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity, inclusive.
    pub not_after: SystemTime,
    /// DNS, IPv6 and client names.
    pub names: IdentityNames,
    /// Basic constraints say CA:TRUE.
    pub is_ca: bool,
}

impl CertificateSummary {
    /// Parses `certificate`.
    ///
    /// # Errors
    /// It is not a certificate, or one that its own extensions contradict.
    pub fn parse(certificate: &CertificateDer<'_>) -> Result<Self, CertsError> {
        let (rest, parsed) = parse_x509_certificate(certificate)
            .map_err(|error| malformed(format!("not an X.509 certificate: {error}")))?;
        if !rest.is_empty() {
            return Err(malformed(format!("{} bytes after the certificate", rest.len())));
        }
        let is_ca = parsed
            .basic_constraints()
            .map_err(|error| malformed(format!("basic constraints: {error}")))?
            .is_some_and(|extension| extension.value.ca);
        let mut names = IdentityNames::default();
        if let Some(extension) = parsed
            .subject_alternative_name()
            .map_err(|error| malformed(format!("subject alternative names: {error}")))?
        {
            for name in &extension.value.general_names {
                add_name(&mut names, name);
            }
        }
        let validity = parsed.validity();
        Ok(Self {
            serial: hex(parsed.raw_serial()),
            not_before: system_time(validity.not_before)?,
            not_after: system_time(validity.not_after)?,
            names,
            is_ca,
        })
    }

    /// From start to end of validity.
    #[must_use]
    pub fn lifetime(&self) -> Duration {
        self.not_after.duration_since(self.not_before).unwrap_or_default()
    }

    /// Checks the dates against `now`.
    ///
    /// # Errors
    /// Expired or not yet valid, with a word about the clock.
    pub fn check_dates(&self, now: SystemTime) -> Result<(), CertsError> {
        if now < self.not_before {
            let early = self.not_before.duration_since(now).unwrap_or_default();
            return Err(CertsError::certificate(
                CertificateFault::NotYetValid,
                format!("serial {} becomes valid in {} s", self.serial, early.as_secs()),
            ));
        }
        if now > self.not_after {
            let late = now.duration_since(self.not_after).unwrap_or_default();
            return Err(CertsError::certificate(
                CertificateFault::Expired,
                format!("serial {} ended {} s ago", self.serial, late.as_secs()),
            ));
        }
        Ok(())
    }
}

/// Names of other kinds (e-mail, IPv4, foreign URIs) are not ours to interpret and are left out.
fn add_name(names: &mut IdentityNames, name: &GeneralName<'_>) {
    match name {
        GeneralName::DNSName(dns) => names.dns.push(dns.to_ascii_lowercase()),
        GeneralName::IPAddress(octets) => {
            if let Ok(octets) = <[u8; 16]>::try_from(*octets) {
                names.ipv6.push(Ipv6Addr::from(octets));
            }
        }
        GeneralName::URI(uri) => {
            if let Some(id) = uri.strip_prefix(CLIENT_URI_PREFIX).filter(|id| is_client_id(id)) {
                names.client_id = Some(id.to_owned());
            }
        }
        _ => {}
    }
}

fn system_time(time: ASN1Time) -> Result<SystemTime, CertsError> {
    let seconds = u64::try_from(time.timestamp())
        .map_err(|_| malformed(format!("validity date {time} lies before 1970")))?;
    Ok(UNIX_EPOCH + Duration::from_secs(seconds))
}

fn malformed(reason: String) -> CertsError {
    CertsError::Parse { fault: CertificateFault::Malformed, what: "certificate".to_owned(), reason }
}

/// Lower-case hexadecimal of `bytes`, without the leading zero byte that DER adds to serials.
pub(super) fn hex(bytes: &[u8]) -> String {
    let significant = match bytes {
        [0, rest @ ..] if !rest.is_empty() => rest,
        all => all,
    };
    significant.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of hexadecimal `text`; `None` if it is empty, odd or something else.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() || !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_when_added() {
        assert!(IdentityNames::new().with_dns("node.example.net").is_ok());
        assert!(IdentityNames::new().with_dns("*.example.net").is_ok());
        for bad in ["", "a b", "-x.example", "*.", "http://x", "2001:db8::1"] {
            assert!(IdentityNames::new().with_dns(bad).is_err(), "{bad:?}");
        }
        let long = "x".repeat(CLIENT_ID_LENGTH_MAX + 1);
        for bad in ["", "a/b", "a b", "é", long.as_str()] {
            assert!(IdentityNames::new().with_client_id(bad).is_err(), "{bad:?}");
        }
        assert!(IdentityNames::new().validate().is_err());
    }

    #[test]
    fn serials_lose_only_the_sign_byte() {
        assert_eq!(hex(&[0, 0x8f, 1]), "8f01");
        assert_eq!(hex(&[0]), "00");
        assert_eq!(hex(&[1, 0]), "0100");
        assert_eq!(unhex("8f01").unwrap(), [0x8f, 1]);
        for bad in ["", "abc", "zz", "é", "+1"] {
            assert_eq!(unhex(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn garbage_is_malformed() {
        for bytes in [&b""[..], b"\x30\x03\x02\x01\x00", b"hello"] {
            let error = CertificateSummary::parse(&CertificateDer::from(bytes)).unwrap_err();
            assert_eq!(error.fault(), CertificateFault::Malformed);
        }
    }
}
