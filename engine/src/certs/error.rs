//! Errors of the identity module: what failed, on what, what to do next.

use std::io;
use std::path::{Path, PathBuf};

use super::fault::CertificateFault;

/// Why an identity, a CA or a TLS configuration could not be made or kept up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertsError {
    /// A file or directory operation failed.
    #[error("cannot {operation} {}: {source}", path.display())]
    File {
        /// What was tried: a verb and, where it helps, the system call.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A private key file is open to group or others.
    #[error(
        "private key {} can be read by others (mode {mode:04o}): run `chmod 600 {}` and consider \
         the key leaked",
        path.display(), path.display()
    )]
    KeyReadableByOthers {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A CA directory can be changed by group or others.
    #[error(
        "CA directory {} can be written by others (mode {mode:04o}): run `chmod 700 {}`",
        path.display(), path.display()
    )]
    DirectoryWritableByOthers {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another process holds the CA directory.
    #[error(
        "CA directory {} is in use by another process: stop it (`fuser {}/lock` names it) or use \
         another directory",
        path.display(), path.display()
    )]
    DirectoryLocked {
        /// The directory.
        path: PathBuf,
    },
    /// PEM or DER that could not be read.
    #[error("{what}: {reason}; {}", fault.advice())]
    Parse {
        /// [`CertificateFault::Truncated`] or [`CertificateFault::Malformed`].
        fault: CertificateFault,
        /// The file, or what the bytes should have been.
        what: String,
        /// What was found instead.
        reason: String,
    },
    /// A certificate was refused.
    #[error("certificate refused: {detail}; {}", fault.advice())]
    Certificate {
        /// Which check it failed.
        fault: CertificateFault,
        /// The specifics: names, dates.
        detail: String,
    },
    /// A configuration that cannot work.
    #[error("invalid TLS configuration: {0}")]
    Configuration(String),
    /// The certificate authority did not issue.
    #[error(transparent)]
    Authority(#[from] CaError),
    /// Key generation, signing or encoding failed inside the cryptography library.
    #[error("{operation} failed in the cryptography library: {reason}")]
    Crypto {
        /// What was tried.
        operation: &'static str,
        /// The library's answer.
        reason: String,
    },
    /// rustls refused the configuration.
    #[error("rustls refused the configuration: {0}")]
    Tls(#[from] rustls::Error),
    /// The maintenance thread could not be started.
    #[error("cannot start the certificate maintenance thread: {0}")]
    Thread(io::Error),
}

impl CertsError {
    pub(super) fn file(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { operation, path: path.to_owned(), source }
    }

    pub(super) fn certificate(fault: CertificateFault, detail: impl Into<String>) -> Self {
        Self::Certificate { fault, detail: detail.into() }
    }

    pub(super) fn crypto(operation: &'static str, reason: impl ToString) -> Self {
        Self::Crypto { operation, reason: reason.to_string() }
    }

    /// The kind to count this error under.
    #[must_use]
    pub fn fault(&self) -> CertificateFault {
        match self {
            Self::KeyReadableByOthers { .. } => CertificateFault::KeyReadableByOthers,
            Self::DirectoryLocked { .. } => CertificateFault::DirectoryLocked,
            Self::Parse { fault, .. } | Self::Certificate { fault, .. } => *fault,
            Self::Tls(error) => CertificateFault::of_tls(error),
            Self::Authority(error) => error.fault(),
            _ => CertificateFault::Other,
        }
    }
}

/// Why a certificate authority issued nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// No answer: try again later, the current certificate serves on.
    #[error("the certificate authority cannot be reached: {reason}; will try again")]
    Unreachable {
        /// What the transport said.
        reason: String,
    },
    /// The CA answered no: its policy forbids this identity.
    #[error("the certificate authority refused: {reason}; change the request or the CA's policy")]
    Refused {
        /// The CA's reason.
        reason: String,
    },
    /// The request itself is broken.
    #[error("invalid certificate request: {reason}")]
    InvalidRequest {
        /// What is wrong with it.
        reason: String,
    },
    /// The CA's server is not the one that the roots vouch for, or it refused our certificate.
    #[error(
        "no trusted connection to the certificate authority: {reason}; {}", fault.advice()
    )]
    Untrusted {
        /// Which check failed.
        fault: CertificateFault,
        /// The specifics.
        reason: String,
    },
    /// The enrolment token certified somebody already.
    #[error("the certificate authority refused: {}", CertificateFault::TokenSpent.advice())]
    TokenSpent,
    /// The enrolment token is unknown or expired.
    #[error("the certificate authority refused: {}", CertificateFault::TokenInvalid.advice())]
    TokenInvalid,
    /// The CA could not store what it issued, so it did not issue.
    #[error("the certificate authority could not save its state: {0}; nothing was issued")]
    Storage(Box<CertsError>),
    /// Signing failed.
    #[error("the certificate authority failed to sign: {reason}")]
    Internal {
        /// The cryptography library's answer.
        reason: String,
    },
}

impl CaError {
    /// The kind to count this error under.
    #[must_use]
    pub fn fault(&self) -> CertificateFault {
        match self {
            Self::Untrusted { fault, .. } => *fault,
            Self::TokenSpent => CertificateFault::TokenSpent,
            Self::TokenInvalid => CertificateFault::TokenInvalid,
            Self::Storage(error) => error.fault(),
            _ => CertificateFault::Other,
        }
    }

    pub(super) fn refused(reason: impl Into<String>) -> Self {
        Self::Refused { reason: reason.into() }
    }

    pub(super) fn invalid(reason: impl ToString) -> Self {
        Self::InvalidRequest { reason: reason.to_string() }
    }

    pub(crate) fn internal(reason: impl ToString) -> Self {
        Self::Internal { reason: reason.to_string() }
    }
}
