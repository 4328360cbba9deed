//! What can be wrong with an identity, each kind named, counted and explained.
//!
//! One list serves verification of peers, checks of our own certificates and the metrics, so that
//! a fault has the same name in a log line, in a counter and in the reason sent to the peer.

use std::sync::atomic::{AtomicU64, Ordering};

use rustls::{CertificateError, PeerIncompatible};

use super::error::CertsError;

/// One kind of fault of a certificate, key or handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CertificateFault {
    /// Past its not-after date.
    Expired,
    /// Before its not-before date.
    NotYetValid,
    /// Valid, but for other names.
    WrongName,
    /// The private key is not the certificate's: at load, or as a bad handshake signature.
    WrongKey,
    /// The chain does not end at a trusted root.
    UnknownRoot,
    /// The leaf says CA:TRUE (RFC 5280, section 4.2.1.9).
    CaAsLeaf,
    /// Listed in a certificate revocation list.
    Revoked,
    /// No revocation list speaks for its issuer, or the list is out of date.
    RevocationUnknown,
    /// The extended key usage does not allow this use.
    WrongPurpose,
    /// A name lies outside the issuer's name constraints (RFC 5280, section 4.2.1.10).
    NameConstraint,
    /// A PEM file ends in the middle of a section.
    Truncated,
    /// Not parseable, or nothing of the wanted kind inside.
    Malformed,
    /// A private key file can be read by group or others.
    KeyReadableByOthers,
    /// Another process holds the CA directory.
    DirectoryLocked,
    /// The peer sent no certificate although one is required.
    NoCertificate,
    /// No key exchange group in common.
    NoCommonKeyExchange,
    /// No signature scheme in common: the peer cannot verify the kind of key that is shown to it.
    NoCommonSignature,
    /// No application protocol (ALPN) in common.
    NoCommonProtocol,
    /// An enrolment token was used a second time.
    TokenSpent,
    /// An enrolment token is unknown or has expired.
    TokenInvalid,
    /// Anything else that made a handshake fail.
    Other,
}

impl CertificateFault {
    /// Every fault, in the order of the counters.
    pub const ALL: [Self; 21] = [
        Self::Expired,
        Self::NotYetValid,
        Self::WrongName,
        Self::WrongKey,
        Self::UnknownRoot,
        Self::CaAsLeaf,
        Self::Revoked,
        Self::RevocationUnknown,
        Self::WrongPurpose,
        Self::NameConstraint,
        Self::Truncated,
        Self::Malformed,
        Self::KeyReadableByOthers,
        Self::DirectoryLocked,
        Self::NoCertificate,
        Self::NoCommonKeyExchange,
        Self::NoCommonSignature,
        Self::NoCommonProtocol,
        Self::TokenSpent,
        Self::TokenInvalid,
        Self::Other,
    ];

    /// The name in metrics and `--json` outputs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::WrongName => "wrong_name",
            Self::WrongKey => "wrong_key",
            Self::UnknownRoot => "unknown_root",
            Self::CaAsLeaf => "ca_as_leaf",
            Self::Revoked => "revoked",
            Self::RevocationUnknown => "revocation_unknown",
            Self::WrongPurpose => "wrong_purpose",
            Self::NameConstraint => "name_constraint",
            Self::Truncated => "truncated",
            Self::Malformed => "malformed",
            Self::KeyReadableByOthers => "key_readable_by_others",
            Self::DirectoryLocked => "directory_locked",
            Self::NoCertificate => "no_certificate",
            Self::NoCommonKeyExchange => "no_common_key_exchange",
            Self::NoCommonSignature => "no_common_signature",
            Self::NoCommonProtocol => "no_common_protocol",
            Self::TokenSpent => "token_spent",
            Self::TokenInvalid => "token_invalid",
            Self::Other => "other",
        }
    }

    /// What it means and what to do next, in one sentence.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::Expired => {
                "the certificate has expired: renew it; if it should still be valid, your clock is \
                 ahead (compare `date -u`)"
            }
            Self::NotYetValid => {
                "the certificate is not valid yet: your clock is behind, or its issuer's was ahead \
                 (compare `date -u`)"
            }
            Self::WrongName => {
                "the certificate is for other names: connect by a name it carries, or issue one \
                 with this DNS name or IPv6 address"
            }
            Self::WrongKey => {
                "the private key does not belong to the certificate: install the pair together"
            }
            Self::UnknownRoot => {
                "the chain does not end at a trusted root: add the peer's CA to the roots, or \
                 send the intermediates with the leaf"
            }
            Self::CaAsLeaf => {
                "a CA certificate (CA:TRUE) was used as a leaf: issue a leaf certificate under it"
            }
            Self::Revoked => "the certificate is revoked: enrol again with a new key",
            Self::RevocationUnknown => {
                "no current revocation list covers the issuer: install its CRL or remove the \
                 CRL requirement"
            }
            Self::WrongPurpose => {
                "the extended key usage forbids this role: issue with serverAuth or clientAuth"
            }
            Self::NameConstraint => {
                "a name lies outside what the issuing CA may certify: widen its permitted \
                 subtrees or change the name"
            }
            Self::Truncated => "the PEM file is cut short: copy it again, whole",
            Self::Malformed => "the data is not what it should be: check the file and its type",
            Self::KeyReadableByOthers => {
                "a private key can be read by others: chmod 600 it, and consider it leaked"
            }
            Self::DirectoryLocked => {
                "another process holds the CA directory: stop it or use another directory"
            }
            Self::NoCertificate => {
                "the peer sent no certificate: configure an identity on the client"
            }
            Self::NoCommonKeyExchange => {
                "no key exchange group in common: with post-quantum key exchange required, both \
                 sides must offer X25519MLKEM768"
            }
            Self::NoCommonSignature => {
                "no signature scheme in common: the peer cannot verify this certificate's kind of \
                 key; ML-DSA certificates are for peers that know ML-DSA, ECDSA ones for all"
            }
            Self::NoCommonProtocol => {
                "no application protocol in common: configure the same ALPN on both sides"
            }
            Self::TokenSpent => {
                "the enrolment token certified somebody already: unless that was this node, revoke \
                 what it certified; make another token"
            }
            Self::TokenInvalid => {
                "the enrolment token is unknown or has expired: make another (`stoq ca token`)"
            }
            Self::Other => "the handshake failed: see the reason",
        }
    }

    /// The kind of a rustls error.
    #[must_use]
    pub fn of_tls(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(certificate) => Self::of_certificate(certificate),
            rustls::Error::InvalidCertRevocationList(_) => Self::RevocationUnknown,
            rustls::Error::InconsistentKeys(_) => Self::WrongKey,
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::NoApplicationProtocol => Self::NoCommonProtocol,
            rustls::Error::PeerIncompatible(
                PeerIncompatible::NoKxGroupsInCommon
                | PeerIncompatible::NamedGroupsExtensionRequired,
            ) => Self::NoCommonKeyExchange,
            rustls::Error::PeerIncompatible(
                PeerIncompatible::NoSignatureSchemesInCommon
                | PeerIncompatible::NoCertificateRequestSignatureSchemesInCommon,
            ) => Self::NoCommonSignature,
            _ => Self::Other,
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Self::NotYetValid
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Self::WrongName
            }
            CertificateError::UnknownIssuer => Self::UnknownRoot,
            CertificateError::BadSignature => Self::WrongKey,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::UnknownRevocationStatus
            | CertificateError::ExpiredRevocationList
            | CertificateError::ExpiredRevocationListContext { .. } => Self::RevocationUnknown,
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                Self::WrongPurpose
            }
            CertificateError::BadEncoding => Self::Malformed,
            // webpki's own error is opaque behind rustls; its text is the variant's name, and
            // the tests of `verify` hold both cases fast.
            CertificateError::Other(other) => match other.0.to_string().as_str() {
                "CaUsedAsEndEntity" => Self::CaAsLeaf,
                "NameConstraintViolation" => Self::NameConstraint,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }

    /// The kind behind a TLS alert that the peer sent: QUIC error code 0x0100 + alert
    /// (RFC 9001, section 4.8). `None` if the code carries no alert.
    #[must_use]
    pub fn of_peer_alert(quic_error_code: u64) -> Option<Self> {
        let alert = u8::try_from(quic_error_code.checked_sub(0x100)?).ok()?;
        Some(match alert {
            40 => Self::NoCommonKeyExchange,
            42 => Self::Malformed,
            43 => Self::WrongPurpose,
            44 => Self::Revoked,
            45 => Self::Expired,
            48 => Self::UnknownRoot,
            51 => Self::WrongKey,
            116 => Self::NoCertificate,
            120 => Self::NoCommonProtocol,
            _ => Self::Other,
        })
    }
}

/// What kept something from starting in this process, by kind: a CA whose directory another process
/// holds, an identity, a trust store, a directory of tokens. There is no object yet that could count it,
/// so the process does; every engine exports it (`stoq_certificate_faults_total{by="start"}`).
#[must_use]
pub fn start_faults() -> &'static FaultCounters {
    static FAULTS: FaultCounters = FaultCounters::new();
    &FAULTS
}

/// Counts in [`start_faults`] what `started` failed with.
pub(super) fn count_start<T>(started: Result<T, CertsError>) -> Result<T, CertsError> {
    started.inspect_err(|error| start_faults().record(error.fault()))
}

/// Counts faults by kind; shared by all shards, touched once per failed handshake or renewal.
#[derive(Debug, Default)]
pub struct FaultCounters {
    counts: [AtomicU64; CertificateFault::ALL.len()],
}

impl FaultCounters {
    /// None counted yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { counts: [const { AtomicU64::new(0) }; CertificateFault::ALL.len()] }
    }

    /// Counts one `fault`.
    pub fn record(&self, fault: CertificateFault) {
        // Relaxed: a counter publishes nothing but itself.
        self.counts[fault as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How often `fault` was seen.
    #[must_use]
    pub fn count(&self, fault: CertificateFault) -> u64 {
        self.counts[fault as usize].load(Ordering::Relaxed)
    }

    /// All faults seen so far, of any kind.
    #[must_use]
    pub fn total(&self) -> u64 {
        CertificateFault::ALL.iter().map(|fault| self.count(*fault)).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_list_is_complete_and_in_order() {
        for (index, fault) in CertificateFault::ALL.iter().enumerate() {
            assert_eq!(*fault as usize, index);
        }
        assert_eq!(CertificateFault::Other as usize + 1, CertificateFault::ALL.len());
        let labels: HashSet<_> = CertificateFault::ALL.iter().map(|fault| fault.label()).collect();
        assert_eq!(labels.len(), CertificateFault::ALL.len());
    }

    #[test]
    fn counters_count_by_kind() {
        let counters = FaultCounters::default();
        counters.record(CertificateFault::Revoked);
        counters.record(CertificateFault::Revoked);
        counters.record(CertificateFault::Other);
        assert_eq!(counters.count(CertificateFault::Revoked), 2);
        assert_eq!(counters.count(CertificateFault::Expired), 0);
        assert_eq!(counters.total(), 3);
    }

    #[test]
    fn alerts_map_to_faults() {
        assert_eq!(CertificateFault::of_peer_alert(0x100 + 45), Some(CertificateFault::Expired));
        assert_eq!(
            CertificateFault::of_peer_alert(0x100 + 40),
            Some(CertificateFault::NoCommonKeyExchange)
        );
        assert_eq!(CertificateFault::of_peer_alert(0xff), None);
        assert_eq!(CertificateFault::of_peer_alert(0x200), None);
    }

    #[test]
    fn clock_advice_names_the_clock() {
        assert!(CertificateFault::Expired.advice().contains("your clock is ahead"));
        assert!(CertificateFault::NotYetValid.advice().contains("your clock is behind"));
    }
}
