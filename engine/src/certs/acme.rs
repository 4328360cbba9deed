//! Certificates from an ACME CA (RFC 8555), behind the feature `acme`.
//!
//! ```text
//! account file ─► Account ─► order ─► authorizations ─► hook puts the answer up, CA looks
//!                                    └► finalize (CSR) ─► chain        hook takes it down again
//! ```
//!
//! Protocol and HTTPS are `instant-acme`'s, on a runtime that lives as long as one call, on the thread
//! that renews certificates. What proves control of a name is the caller's: [`AcmeChallenges`].
//! Renewal information (RFC 9773) moves a renewal to where the CA wants it.

use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, CertificateIdentifier, ChallengeType, Error,
    Identifier, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use rustls::crypto::CryptoProvider;
use rustls_pki_types::CertificateDer;

use super::authority::{CertificateAuthority, CertificateRequest, RenewalWindow};
use super::error::{CaError, CertsError};
use super::names::IdentityNames;
use super::pem;
use super::storage::{Access, replace_file};

/// How the CA convinces itself that a name is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChallengeKind {
    /// A file on port 80 of the name (RFC 8555, section 8.3).
    Http01,
    /// A TXT record below the name (RFC 8555, section 8.4); the only one for wildcards.
    Dns01,
}

/// What must be put up for one name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AcmeChallenge {
    /// Answer `http://<name>/.well-known/acme-challenge/<token>` with `key_authorization`.
    Http01 {
        /// The name, or an IPv6 address, that the CA will ask.
        name: String,
        /// Last part of the path.
        token: String,
        /// Body of the answer.
        key_authorization: String,
    },
    /// Publish `value` as a TXT record at `record`.
    Dns01 {
        /// `_acme-challenge.` and the name.
        record: String,
        /// Content of the record.
        value: String,
    },
}

/// The caller's hooks. Called on the thread that renews, which may block.
pub trait AcmeChallenges: Send + Sync {
    /// Which kind this can answer.
    fn kind(&self) -> ChallengeKind;

    /// Puts the answer up, and returns when the CA can see it.
    ///
    /// # Errors
    /// Why it could not, in words; the order ends.
    fn present(&self, challenge: &AcmeChallenge) -> Result<(), String>;

    /// Takes the answer down again; called once for each one presented, whatever came of it.
    fn clean_up(&self, challenge: &AcmeChallenge);
}

/// Which CA, as whom.
#[derive(Debug, Clone)]
pub struct AcmeConfig {
    /// The CA's directory (RFC 8555, section 7.1.1), an `https` URL.
    pub directory_url: String,
    /// The account's key and address are kept here (mode 0600); made at the first use.
    pub account_file: PathBuf,
    /// Contacts of the account: `mailto:` URLs.
    pub contacts: Vec<String>,
    /// The CA's terms of service are agreed to; without that no account is made.
    pub terms_of_service_agreed: bool,
    /// PEM file with the root of the CA's web server; none: the system's roots.
    pub server_root: Option<PathBuf>,
    /// Longest that one order may take. Default 2 minutes.
    pub timeout: Duration,
}

impl AcmeConfig {
    /// The CA at `directory_url`, with the account in `account_file`.
    #[must_use]
    pub fn new(directory_url: impl Into<String>, account_file: impl Into<PathBuf>) -> Self {
        Self {
            directory_url: directory_url.into(),
            account_file: account_file.into(),
            contacts: Vec::new(),
            terms_of_service_agreed: false,
            server_root: None,
            timeout: Duration::from_secs(120),
        }
    }
}

/// An ACME CA.
pub struct AcmeCa {
    config: AcmeConfig,
    challenges: Arc<dyn AcmeChallenges>,
}

impl fmt::Debug for AcmeCa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("AcmeCa").field("config", &self.config).finish_non_exhaustive()
    }
}

impl AcmeCa {
    /// A client; nothing is sent yet. Makes aws-lc-rs the process's default TLS provider if there is
    /// none, as the HTTPS client wants.
    ///
    /// # Errors
    /// The directory is no `https` URL.
    pub fn new(
        config: AcmeConfig,
        challenges: Arc<dyn AcmeChallenges>,
    ) -> Result<Self, CertsError> {
        if !config.directory_url.starts_with("https://") {
            return Err(CertsError::Configuration(format!(
                "the ACME directory `{}` is no https URL",
                config.directory_url
            )));
        }
        if CryptoProvider::get_default().is_none() {
            // Lost only to another thread that installed one at the same time: as good.
            let _another = rustls::crypto::aws_lc_rs::default_provider().install_default();
        }
        Ok(Self { config, challenges })
    }

    fn run<T>(&self, call: impl Future<Output = Result<T, CaError>>) -> Result<T, CaError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(CaError::internal)?;
        let limit = self.config.timeout;
        runtime.block_on(async {
            tokio::time::timeout(limit, call).await.unwrap_or_else(|_elapsed| {
                Err(CaError::Unreachable {
                    reason: format!("the order took longer than {} s", limit.as_secs()),
                })
            })
        })
    }

    async fn account(&self) -> Result<Account, CaError> {
        let builder = match &self.config.server_root {
            Some(path) => Account::builder_with_root(path),
            None => Account::builder(),
        }
        .map_err(|error| self.explain(error))?;
        if let Some(credentials) = self.load_account()? {
            return builder
                .from_credentials(credentials)
                .await
                .map_err(|error| self.explain(error));
        }
        let contacts: Vec<&str> = self.config.contacts.iter().map(String::as_str).collect();
        let account = NewAccount {
            contact: &contacts,
            terms_of_service_agreed: self.config.terms_of_service_agreed,
            only_return_existing: false,
        };
        let directory = self.config.directory_url.clone();
        let (account, credentials) =
            builder.create(&account, directory, None).await.map_err(|error| self.explain(error))?;
        self.save_account(&credentials)?;
        Ok(account)
    }

    fn load_account(&self) -> Result<Option<AccountCredentials>, CaError> {
        let path: &Path = &self.config.account_file;
        let storage = |error| CaError::Storage(Box::new(error));
        if !path.try_exists().map_err(|error| storage(CertsError::file("stat", path, error)))? {
            return Ok(None);
        }
        let bytes = pem::read_private(path).map_err(storage)?;
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            storage(CertsError::Parse {
                fault: super::fault::CertificateFault::Malformed,
                what: path.display().to_string(),
                reason: format!("not an ACME account: {error}"),
            })
        })
    }

    fn save_account(&self, credentials: &AccountCredentials) -> Result<(), CaError> {
        let text = serde_json::to_vec(credentials).map_err(CaError::internal)?;
        replace_file(&self.config.account_file, &text, Access::Owner)
            .map_err(|error| CaError::Storage(Box::new(error)))
    }

    async fn order(&self, request: &CertificateRequest<'_>) -> Result<String, CaError> {
        let identifiers = identifiers(request.names)?;
        let account = self.account().await?;
        let mut order = account
            .new_order(&NewOrder::new(&identifiers))
            .await
            .map_err(|error| self.explain(error))?;
        let mut presented = Presented { challenges: &*self.challenges, up: Vec::new() };
        self.authorize(&mut order, &mut presented).await?;
        let retries = RetryPolicy::new().timeout(self.config.timeout);
        let status = order.poll_ready(&retries).await.map_err(|error| self.explain(error))?;
        if status != OrderStatus::Ready {
            return Err(CaError::refused(self.why_invalid(&mut order).await));
        }
        drop(presented);
        order.finalize_csr(request.csr).await.map_err(|error| self.explain(error))?;
        order.poll_certificate(&retries).await.map_err(|error| self.explain(error))
    }

    /// Answers every authorization that is still open.
    async fn authorize(
        &self,
        order: &mut Order,
        presented: &mut Presented<'_>,
    ) -> Result<(), CaError> {
        let kind = match self.challenges.kind() {
            ChallengeKind::Http01 => ChallengeType::Http01,
            ChallengeKind::Dns01 => ChallengeType::Dns01,
        };
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization.map_err(|error| self.explain(error))?;
            match authorization.status {
                AuthorizationStatus::Pending => {}
                AuthorizationStatus::Valid => continue,
                other => return Err(CaError::refused(format!("an authorization is {other:?}"))),
            }
            let name = authorization.identifier().to_string();
            let mut challenge = authorization.challenge(kind.clone()).ok_or_else(|| {
                CaError::refused(format!("the CA offers no {kind:?} challenge for {name}"))
            })?;
            let key = challenge.key_authorization();
            let answer = match self.challenges.kind() {
                ChallengeKind::Http01 => AcmeChallenge::Http01 {
                    name: name.clone(),
                    token: challenge.token.clone(),
                    key_authorization: key.as_str().to_owned(),
                },
                ChallengeKind::Dns01 => AcmeChallenge::Dns01 {
                    record: format!("_acme-challenge.{}", name.trim_start_matches("*.")),
                    value: key.dns_value(),
                },
            };
            presented.up.push(answer.clone());
            self.challenges
                .present(&answer)
                .map_err(|why| CaError::refused(format!("the challenge for {name}: {why}")))?;
            challenge.set_ready().await.map_err(|error| self.explain(error))?;
        }
        Ok(())
    }

    /// What the CA holds against the order: its authorizations carry the problems.
    async fn why_invalid(&self, order: &mut Order) -> String {
        let mut reasons = Vec::new();
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let Ok(mut authorization) = authorization else { continue };
            if authorization.refresh().await.is_err() {
                continue;
            }
            let name = authorization.identifier().to_string();
            let problems = authorization.challenges.iter().filter_map(|one| one.error.as_ref());
            reasons.extend(problems.map(|problem| format!("{name}: {problem}")));
        }
        match reasons.is_empty() {
            true => "the order became invalid".to_owned(),
            false => reasons.join("; "),
        }
    }

    /// An answer of the CA is a refusal; that none came may pass.
    fn explain(&self, error: Error) -> CaError {
        match error {
            Error::Api(problem) => {
                let kind = problem.r#type.as_deref().unwrap_or_default();
                let passes = ["rateLimited", "serverInternal", "badNonce"]
                    .iter()
                    .any(|passing| kind.ends_with(passing));
                match passes {
                    true => CaError::Unreachable { reason: problem.to_string() },
                    false => CaError::refused(problem.to_string()),
                }
            }
            other => CaError::Unreachable {
                reason: format!("{}: {}", self.config.directory_url, words(&other)),
            },
        }
    }
}

/// An error with its causes.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Answers that are up; taken down when dropped, whatever came of the order.
struct Presented<'a> {
    challenges: &'a dyn AcmeChallenges,
    up: Vec<AcmeChallenge>,
}

impl Drop for Presented<'_> {
    fn drop(&mut self) {
        self.up.iter().for_each(|challenge| self.challenges.clean_up(challenge));
    }
}

fn identifiers(names: &IdentityNames) -> Result<Vec<Identifier>, CaError> {
    if names.client_id().is_some() {
        return Err(CaError::refused("an ACME CA certifies no client identifiers"));
    }
    let dns = names.dns().iter().map(|name| Identifier::Dns(name.clone()));
    let addresses = names.ipv6().iter().map(|address| Identifier::Ip((*address).into()));
    Ok(dns.chain(addresses).collect())
}

impl CertificateAuthority for AcmeCa {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let text = self.run(self.order(request))?;
        pem::certificates(text.as_bytes(), "the ACME CA's chain").map_err(CaError::internal)
    }

    fn renewal_window(&self, leaf: &CertificateDer<'_>) -> Result<Option<RenewalWindow>, CaError> {
        let id = CertificateIdentifier::try_from(leaf).map_err(CaError::internal)?;
        self.run(async {
            let account = self.account().await?;
            match account.renewal_info(&id).await {
                Ok((info, retry_after)) => Ok(Some(RenewalWindow {
                    start: SystemTime::from(info.suggested_window.start),
                    end: SystemTime::from(info.suggested_window.end),
                    retry_after,
                })),
                Err(Error::Unsupported(_)) => Ok(None),
                Err(error) => Err(self.explain(error)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Never;

    impl AcmeChallenges for Never {
        fn kind(&self) -> ChallengeKind {
            ChallengeKind::Http01
        }

        fn present(&self, _challenge: &AcmeChallenge) -> Result<(), String> {
            Err("not wanted".to_owned())
        }

        fn clean_up(&self, _challenge: &AcmeChallenge) {}
    }

    #[test]
    fn client_identifiers_and_plain_http_are_refused() {
        let names = IdentityNames::new().with_client_id("a").unwrap();
        assert!(matches!(identifiers(&names), Err(CaError::Refused { .. })));
        let names = names_of_a_node();
        assert_eq!(identifiers(&names).unwrap().len(), 2);
        let config = AcmeConfig::new("http://ca.example/dir", "/nowhere");
        AcmeCa::new(config, Arc::new(Never)).unwrap_err();
    }

    fn names_of_a_node() -> IdentityNames {
        let names = IdentityNames::new().with_dns("a.example").unwrap();
        names.with_ipv6("2001:db8::1".parse().unwrap())
    }
}
