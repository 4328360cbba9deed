//! The asking side of `trustchain/1`.

use std::sync::{Mutex, MutexGuard};

use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};

use super::codec::{FrameReader, Message, RefusalCode};
use crate::certs::authority::{CertificateAuthority, CertificateRequest};
use crate::certs::error::{CaError, CertsError};
use crate::certs::names::unhex;
use crate::certs::shared_keys::{SHARED_SECRET_SIZE_BYTES, SharedKeys};

/// Carries one request to the service and brings the answer: a QUIC stream, in practice.
pub trait TrustchainTransport: Send + Sync {
    /// Sends a framed request, returns the framed answer. Blocks, with a time limit of its own.
    ///
    /// # Errors
    /// [`CaError::Unreachable`] if no answer came.
    fn exchange(&self, request: &[u8]) -> Result<Vec<u8>, CaError>;
}

/// The service as a [`CertificateAuthority`]: enrols with the token once, renews from then on.
///
/// If the answer to an enrolment is lost on its way, the token is spent and the node needs
/// another.
pub struct TrustchainAuthority {
    transport: Box<dyn TrustchainTransport>,
    token: Mutex<Option<Vec<u8>>>,
}

impl std::fmt::Debug for TrustchainAuthority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("TrustchainAuthority").finish_non_exhaustive()
    }
}

impl TrustchainAuthority {
    /// A client of the service; `token` is the text of
    /// [`TrustchainServer::create_token`](super::TrustchainServer::create_token), or `None` for a node that has a certificate.
    ///
    /// # Errors
    /// The token is not hexadecimal.
    pub fn new(
        transport: Box<dyn TrustchainTransport>,
        token: Option<&str>,
    ) -> Result<Self, CertsError> {
        let token = token.map(parse_token).transpose()?;
        Ok(Self { transport, token: Mutex::new(token) })
    }

    /// Gives it another one-time token, which the next request spends.
    ///
    /// # Errors
    /// The token is not hexadecimal.
    pub fn set_token(&self, token: &str) -> Result<(), CertsError> {
        *self.token() = Some(parse_token(token)?);
        Ok(())
    }

    /// The keys that this node shares with all machines of its DNS names: for
    /// [`SharedKeys::ticket_secret`], so that the fleet resumes each other's sessions.
    ///
    /// # Errors
    /// No answer, or the CA keeps no such secret.
    pub fn shared_keys(&self) -> Result<SharedKeys, CaError> {
        match self.ask(&Message::Keys)? {
            Message::Secret { secret } => {
                let secret: [u8; SHARED_SECRET_SIZE_BYTES] = secret
                    .try_into()
                    .map_err(|_| CaError::internal("the shared secret has another size"))?;
                SharedKeys::from_secret(&secret).map_err(CaError::internal)
            }
            Message::Refused { code, reason } => Err(error_of(code, reason)),
            other => Err(unexpected(&other)),
        }
    }

    /// The CA's current revocation list, or `None` if it keeps none. No certificate is needed.
    ///
    /// # Errors
    /// No answer.
    pub fn revocation_list(
        &self,
    ) -> Result<Option<CertificateRevocationListDer<'static>>, CaError> {
        match self.ask(&Message::List)? {
            Message::Revoked { list } if list.is_empty() => Ok(None),
            Message::Revoked { list } => Ok(Some(list.into())),
            Message::Refused { code, reason } => Err(error_of(code, reason)),
            other => Err(unexpected(&other)),
        }
    }

    fn token(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.token.lock().expect("no panic while locked")
    }

    fn ask(&self, request: &Message) -> Result<Message, CaError> {
        let answer = self.transport.exchange(&request.encode().map_err(CaError::invalid)?)?;
        FrameReader::of_answers()
            .handle_bytes(&answer)
            .map_err(|error| CaError::Unreachable { reason: error.to_string() })?
            .ok_or_else(|| CaError::Unreachable { reason: "the answer was cut short".to_owned() })
    }
}

impl CertificateAuthority for TrustchainAuthority {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let mut token = self.token();
        let csr = request.csr.as_ref().to_vec();
        let message = match token.clone() {
            Some(token) => Message::Enrol { token, csr },
            None => Message::Renew { csr },
        };
        match self.ask(&message)? {
            Message::Issued { chain } => {
                *token = None;
                Ok(chain.into_iter().map(CertificateDer::from).collect())
            }
            Message::Refused { code, reason } => {
                let error = error_of(code, reason);
                if matches!(error, CaError::TokenSpent | CaError::TokenInvalid) {
                    // Spent before a restart, perhaps: the stored certificate may still renew.
                    *token = None;
                }
                Err(error)
            }
            other => Err(unexpected(&other)),
        }
    }
}

fn parse_token(text: &str) -> Result<Vec<u8>, CertsError> {
    unhex(text).ok_or_else(|| {
        CertsError::Configuration("the enrolment token is not hexadecimal".to_owned())
    })
}

fn error_of(code: RefusalCode, reason: String) -> CaError {
    match code {
        RefusalCode::Unavailable => CaError::Unreachable { reason },
        RefusalCode::Invalid => CaError::InvalidRequest { reason },
        RefusalCode::Refused | RefusalCode::Unauthorized => CaError::Refused { reason },
        RefusalCode::TokenSpent => CaError::TokenSpent,
        RefusalCode::TokenInvalid => CaError::TokenInvalid,
    }
}

fn unexpected(answer: &Message) -> CaError {
    let kind = match answer {
        Message::Enrol { .. } | Message::Renew { .. } | Message::Keys | Message::List => {
            "a request"
        }
        Message::Issued { .. } => "a certificate",
        Message::Secret { .. } => "a secret",
        Message::Revoked { .. } => "a revocation list",
        Message::Refused { .. } => "a refusal",
    };
    CaError::Unreachable { reason: format!("the service answered with {kind}") }
}
