//! Verification of peers: webpki through the current trust, faults counted and explained.

use std::collections::HashMap;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::error::CertsError;
use super::fault::{CertificateFault, FaultCounters};
use super::names::CertificateSummary;
use super::provider;
use super::resumption::VerifiedEnds;
use super::trust::TrustStore;

/// Counts a refusal and leaves its explanation for the session.
fn refuse(faults: &FaultCounters, error: Error) -> Error {
    let fault = CertificateFault::of_tls(&error);
    faults.record(fault);
    provider::note_fault(fault, error.to_string());
    error
}

/// A signature in a chain that does not fit was made by another CA of the same name: no trusted root has
/// signed it. (In a handshake's signature the same error means the wrong private key.)
fn chain_error(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(rustls::CertificateError::BadSignature) => {
            rustls::CertificateError::UnknownIssuer.into()
        }
        other => other,
    }
}

/// The client's check of a server.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) trust: Option<Arc<TrustStore>>,
    /// Peers that must chain to roots of their own, whatever else is trusted.
    pub(super) pinned: HashMap<ServerName<'static>, Arc<TrustStore>>,
    pub(super) faults: Arc<FaultCounters>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    /// Told about every certificate accepted: sessions end with it.
    pub(super) ends: Arc<VerifiedEnds>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let trust = self.pinned.get(&server_name.to_owned()).or(self.trust.as_ref());
        let Some(trust) = trust else {
            let unknown = rustls::CertificateError::UnknownIssuer.into();
            return Err(refuse(&self.faults, unknown));
        };
        trust
            .loaded()
            .server
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .map_err(|error| refuse(&self.faults, chain_error(error)))
            .inspect(|_verified| {
                // webpki has parsed it; what this parser could not read is not resumed, no more.
                if let Ok(summary) = CertificateSummary::parse(end_entity) {
                    self.ends.record(server_name.to_owned(), summary.not_after);
                }
            })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
            .map_err(|error| refuse(&self.faults, error))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
            .map_err(|error| refuse(&self.faults, error))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The server's check of a client.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) trust: Arc<TrustStore>,
    pub(super) required: bool,
    pub(super) faults: Arc<FaultCounters>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    /// No hints: they would tell strangers whom this server trusts, and cost bytes.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.trust
            .loaded()
            .client
            .verify_client_cert(end_entity, intermediates, now)
            .map_err(|error| refuse(&self.faults, chain_error(error)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
            .map_err(|error| refuse(&self.faults, error))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
            .map_err(|error| refuse(&self.faults, error))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Accepts every server certificate: encryption without knowing to whom. Tests and experiments.
/// The server must still hold the key of the certificate it shows.
#[derive(Debug)]
pub(super) struct DangerousAnyServerVerifier {
    pub(super) faults: Arc<FaultCounters>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for DangerousAnyServerVerifier {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
            .map_err(|error| refuse(&self.faults, error))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
            .map_err(|error| refuse(&self.faults, error))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Checks a chain of our own as a peer would: dates, CA flag, names and path to `trust`.
///
/// # Errors
/// The first check that fails, as its own fault.
pub(super) fn check_own_chain(
    chain: &[CertificateDer<'static>],
    names: Option<&super::names::IdentityNames>,
    trust: Option<&TrustStore>,
    now: std::time::SystemTime,
) -> Result<CertificateSummary, CertsError> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(CertsError::certificate(CertificateFault::Malformed, "the chain is empty"));
    };
    let summary = CertificateSummary::parse(leaf)?;
    if summary.is_ca {
        return Err(CertsError::certificate(
            CertificateFault::CaAsLeaf,
            format!("serial {} says CA:TRUE", summary.serial),
        ));
    }
    summary.check_dates(now)?;
    if let Some(wanted) = names {
        check_names(&summary, wanted)?;
    }
    let Some(trust) = trust else { return Ok(summary) };
    let now = super::wall_clock::unix_time(now);
    let refused = |error: Error| {
        let error = chain_error(error);
        CertsError::certificate(CertificateFault::of_tls(&error), error.to_string())
    };
    let loaded = trust.loaded();
    let server_names = names.unwrap_or(&summary.names).server_names()?;
    if server_names.is_empty() {
        loaded.client.verify_client_cert(leaf, intermediates, now).map_err(refused)?;
    }
    for name in &server_names {
        loaded.server.verify_server_cert(leaf, intermediates, name, &[], now).map_err(refused)?;
    }
    Ok(summary)
}

fn check_names(
    summary: &CertificateSummary,
    wanted: &super::names::IdentityNames,
) -> Result<(), CertsError> {
    let missing_dns = wanted.dns().iter().find(|name| !summary.names.dns().contains(name));
    let missing_ipv6 = wanted.ipv6().iter().find(|name| !summary.names.ipv6().contains(name));
    let missing =
        missing_dns.cloned().or_else(|| missing_ipv6.map(ToString::to_string)).or_else(|| {
            match (wanted.client_id(), summary.names.client_id()) {
                (Some(wanted), found) if found != Some(wanted) => Some(wanted.to_owned()),
                _ => None,
            }
        });
    match missing {
        None => Ok(()),
        Some(name) => Err(CertsError::certificate(
            CertificateFault::WrongName,
            format!("serial {} lacks {name}", summary.serial),
        )),
    }
}
