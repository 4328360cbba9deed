//! Who issues certificates: the seam between rotation and a CA.

use std::sync::Weak;
use std::time::{Duration, SystemTime};

use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, CertificateSigningRequestDer,
};

use super::error::{CaError, CertsError};
use super::keys::{KeyAlgorithm, PrivateKey};
use super::names::{CLIENT_URI_PREFIX, IdentityNames};
use super::rotation::RotatingIdentity;

/// A request for one certificate.
#[derive(Debug, Clone, Copy)]
pub struct CertificateRequest<'a> {
    /// PKCS#10 request, signed by the new key (RFC 2986).
    pub csr: &'a CertificateSigningRequestDer<'static>,
    /// The names that the requester is entitled to. The caller vouches for them: a CA trusts
    /// these, and the request may not ask for more.
    pub names: &'a IdentityNames,
}

/// When a CA wants a certificate renewed (RFC 9773, section 4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenewalWindow {
    /// The earliest moment; in the past when the certificate must go at once.
    pub start: SystemTime,
    /// The latest moment.
    pub end: SystemTime,
    /// How long the wish is good for.
    pub retry_after: Duration,
}

/// Something that turns requests into certificates.
///
/// Calls may block (network, disk) and come from the maintenance thread, never from a shard. An
/// implementation bounds its own waiting.
pub trait CertificateAuthority: Send + Sync {
    /// Issues a chain, leaf first, without the root.
    ///
    /// # Errors
    /// [`CaError::Unreachable`] may pass by itself; the other kinds need a change first.
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError>;

    /// When the CA wants the certificate `leaf` renewed, if it has a wish (RFC 9773). Asked after each
    /// issue and again after [`RenewalWindow::retry_after`]. Default: none.
    ///
    /// # Errors
    /// As [`Self::issue`]; the plan stays as it is.
    fn renewal_window(&self, leaf: &CertificateDer<'_>) -> Result<Option<RenewalWindow>, CaError> {
        let _unused = leaf;
        Ok(None)
    }

    /// The list of revoked certificates that is good now, if the CA keeps one (RFC 5280, section 5).
    /// Default: none.
    ///
    /// # Errors
    /// It could not be signed or saved.
    fn current_revocation_list(
        &self,
    ) -> Result<Option<CertificateRevocationListDer<'static>>, CaError> {
        Ok(None)
    }

    /// Whether the certificate with this serial number (hexadecimal, as
    /// [`CertificateSummary::serial`](super::CertificateSummary)) is revoked now: asked before
    /// a connection that was made earlier gets another certificate. Default: no.
    fn is_revoked(&self, serial: &str) -> bool {
        let _unused = serial;
        false
    }

    /// Told once, before the first request, which identity it certifies. A CA that wants requests
    /// authenticated by the current certificate keeps the reference. Default: nothing.
    fn handle_identity(&self, identity: &Weak<RotatingIdentity>) {
        let _unused = identity;
    }
}

/// A fresh key and a request for `names` signed by it.
pub(super) fn key_and_request(
    names: &IdentityNames,
    algorithm: KeyAlgorithm,
) -> Result<(PrivateKey, CertificateSigningRequestDer<'static>), CertsError> {
    let key = PrivateKey::generate(algorithm)?;
    let mut params = rcgen::CertificateParams::default();
    // The names are in the alternative names alone; a CA gives the subject it likes.
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = alternative_names(names)?;
    let request = params
        .serialize_request(&key)
        .map_err(|error| CertsError::crypto("certificate request", error))?;
    Ok((key, request.der().clone()))
}

/// The subject of every leaf: constant, since the names are in the alternative names.
pub(super) fn subject() -> rcgen::DistinguishedName {
    let mut subject = rcgen::DistinguishedName::new();
    subject.push(rcgen::DnType::CommonName, "stoq node");
    subject
}

/// `names` as X.509 subject alternative names.
pub(super) fn alternative_names(names: &IdentityNames) -> Result<Vec<rcgen::SanType>, CertsError> {
    let ia5 = |text: String| {
        rcgen::string::Ia5String::try_from(text)
            .map_err(|error| CertsError::crypto("name encoding", error))
    };
    let mut all = Vec::new();
    for name in names.dns() {
        all.push(rcgen::SanType::DnsName(ia5(name.clone())?));
    }
    for address in names.ipv6() {
        all.push(rcgen::SanType::IpAddress((*address).into()));
    }
    if let Some(id) = names.client_id() {
        all.push(rcgen::SanType::URI(ia5(format!("{CLIENT_URI_PREFIX}{id}"))?));
    }
    Ok(all)
}
