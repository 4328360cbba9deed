//! TLS for QUIC (RFC 9001): one server and one client configuration, built once, used by all
//! shards.
//!
//! TLS 1.3 only; X25519MLKEM768 first; AES-128-GCM first; an application protocol is required;
//! 0-RTT is off unless asked for.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use quinn_proto::crypto;
use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::quic::Suite;
use rustls::server::NoServerSessionStorage;
use rustls::{KeyLogFile, SupportedCipherSuite, version};
use rustls_pki_types::{CertificateDer, ServerName};

use super::error::CertsError;
use super::fault::FaultCounters;
use super::maintenance::{MaintenanceThread, Periodic};
use super::names::IdentityNames;
use super::provider::crypto_provider;
use super::resumption::{ClientSessions, ServerSessions, TrustSet, VerifiedEnds};
use super::rotation::RotatingIdentity;
use super::session::{
    ObservedClientConfig, ObservedServerConfig, SessionContext, client_crypto, server_crypto,
};
use super::tickets::TicketKeys;
use super::trust::{TrustStore, TrustStoreBuilder};
use super::verify::{ClientVerifier, DangerousAnyServerVerifier, ServerVerifier};
use super::wall_clock::{SystemWallClock, TlsTime, WallClock};
use crate::config::CryptoProviderChoice;
use crate::proto::crypto::CryptoProvider as PacketCrypto;

/// Tickets sent after a handshake; a client opens a few connections at once.
const TICKETS_PER_HANDSHAKE: usize = 2;

/// Whether clients must show a certificate.
#[derive(Debug, Clone, Default)]
pub enum ClientAuth {
    /// Clients are not asked.
    #[default]
    None,
    /// Clients are asked; without a certificate they are anonymous, with a bad one refused.
    Optional(Arc<TrustStore>),
    /// Clients without a good certificate are refused.
    Required(Arc<TrustStore>),
}

impl ClientAuth {
    fn trust(&self) -> Option<&Arc<TrustStore>> {
        match self {
            Self::None => None,
            Self::Optional(trust) | Self::Required(trust) => Some(trust),
        }
    }
}

/// Where the certificate comes from.
enum IdentityChoice {
    Given(Arc<RotatingIdentity>),
    Files(PathBuf, PathBuf),
    SelfSigned(IdentityNames),
}

impl IdentityChoice {
    fn start(self, clock: &Arc<dyn WallClock>) -> Result<Arc<RotatingIdentity>, CertsError> {
        let builder = match self {
            Self::Given(identity) => return Ok(identity),
            Self::Files(certificate, key) => RotatingIdentity::from_pem_files(certificate, key),
            Self::SelfSigned(names) => RotatingIdentity::self_signed(names),
        };
        builder.clock(Arc::clone(clock)).start()
    }
}

/// What both sides can set.
struct Common {
    alpn: Vec<Vec<u8>>,
    require_post_quantum: bool,
    /// In place of those of `packet_crypto`.
    cipher_suites: Option<Vec<SupportedCipherSuite>>,
    packet_crypto: CryptoProviderChoice,
    early_data: bool,
    key_log: bool,
    clock: Arc<dyn WallClock>,
    identity: Option<IdentityChoice>,
}

impl Default for Common {
    fn default() -> Self {
        Self {
            alpn: Vec::new(),
            require_post_quantum: false,
            cipher_suites: None,
            packet_crypto: CryptoProviderChoice::Auto,
            early_data: false,
            key_log: false,
            clock: Arc::new(SystemWallClock),
            identity: None,
        }
    }
}

impl Common {
    /// rustls's provider, and who protects packets, unless the caller's own cipher suites do.
    fn provider(&self) -> Result<(Arc<CryptoProvider>, Option<PacketCrypto>), CertsError> {
        if self.alpn.is_empty() || self.alpn.iter().any(|name| !(1..=255).contains(&name.len())) {
            return Err(CertsError::Configuration(
                "QUIC needs an application protocol (RFC 9001, section 8.1): give ALPN names of \
                 1 to 255 bytes"
                    .to_owned(),
            ));
        }
        let (suites, packet_crypto) = match &self.cipher_suites {
            Some(suites) => (suites.clone(), None),
            None => {
                let provider = PacketCrypto::choose(self.packet_crypto)
                    .map_err(|error| CertsError::Configuration(error.to_string()))?;
                (provider.cipher_suites(), Some(provider))
            }
        };
        if suites.iter().all(|suite| suite.tls13().is_none()) {
            return Err(CertsError::Configuration("no TLS 1.3 cipher suite is left".to_owned()));
        }
        Ok((crypto_provider(self.require_post_quantum, suites), packet_crypto))
    }

    fn context(
        &self,
        faults: &Arc<FaultCounters>,
        packet_crypto: Option<PacketCrypto>,
    ) -> SessionContext {
        let groups = match self.require_post_quantum {
            true => "X25519MLKEM768 alone, post-quantum required",
            false => "X25519MLKEM768, X25519, secp256r1",
        };
        SessionContext { faults: Arc::clone(faults), groups, packet_crypto }
    }
}

macro_rules! common_setters {
    () => {
        /// Application protocols (ALPN, RFC 7301) in order of preference; at least one.
        #[must_use]
        pub fn alpn<P: Into<Vec<u8>>>(mut self, protocols: impl IntoIterator<Item = P>) -> Self {
            self.common.alpn = protocols.into_iter().map(Into::into).collect();
            self
        }

        /// Shows this identity to the peer.
        #[must_use]
        pub fn identity(mut self, identity: Arc<RotatingIdentity>) -> Self {
            self.common.identity = Some(IdentityChoice::Given(identity));
            self
        }

        /// Shows the certificate in PEM files (the key with mode 0600); they are read again when
        /// they change.
        #[must_use]
        pub fn identity_pem(
            mut self,
            certificate: impl Into<PathBuf>,
            key: impl Into<PathBuf>,
        ) -> Self {
            self.common.identity = Some(IdentityChoice::Files(certificate.into(), key.into()));
            self
        }

        /// Shows a certificate under a root made at start; see [`RotatingIdentity::roots`].
        #[must_use]
        pub fn identity_self_signed(mut self, names: IdentityNames) -> Self {
            self.common.identity = Some(IdentityChoice::SelfSigned(names));
            self
        }

        /// Offers X25519MLKEM768 only: handshakes with peers that lack it fail. Default off: it is
        /// preferred, and classical peers are served.
        #[must_use]
        pub fn require_post_quantum(mut self, require: bool) -> Self {
            self.common.require_post_quantum = require;
            self
        }

        /// Allows 0-RTT (RFC 9001, section 4.6). Early data can be replayed by an attacker:
        /// only for applications whose first request is idempotent. Default off.
        #[must_use]
        pub fn early_data(mut self, allow: bool) -> Self {
            self.common.early_data = allow;
            self
        }

        /// Who seals and opens packets of the AES suites. Default: ipsec-mb where it can be
        /// used, else aws-lc-rs.
        #[must_use]
        pub fn packet_crypto(mut self, choice: CryptoProviderChoice) -> Self {
            self.common.packet_crypto = choice;
            self
        }

        /// Replaces the cipher suites, in order of preference, and with them
        /// [`Self::packet_crypto`]. Initial packets always use rustls's own AES-128-GCM.
        #[must_use]
        pub fn cipher_suites(mut self, suites: Vec<SupportedCipherSuite>) -> Self {
            self.common.cipher_suites = Some(suites);
            self
        }

        /// Writes session secrets to the file that `SSLKEYLOGFILE` names, for packet analysers.
        #[must_use]
        pub fn key_log(mut self, write: bool) -> Self {
            self.common.key_log = write;
            self
        }

        /// Takes the date from `clock`. Default: the machine's.
        #[must_use]
        pub fn clock(mut self, clock: Arc<dyn WallClock>) -> Self {
            self.common.clock = clock;
            self
        }
    };
}

/// The server's TLS.
pub struct ServerTls {
    config: Arc<rustls::ServerConfig>,
    quic: Arc<QuicServerConfig>,
    crypto: Arc<dyn crypto::ServerConfig>,
    identity: Arc<RotatingIdentity>,
    faults: Arc<FaultCounters>,
    clock: Arc<dyn WallClock>,
    tasks: Vec<Arc<dyn Periodic>>,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ServerTls")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Builds a [`ServerTls`].
#[derive(Default)]
pub struct ServerTlsBuilder {
    common: Common,
    client_auth: ClientAuth,
    ticket_secret: Option<Vec<u8>>,
}

impl ServerTlsBuilder {
    common_setters!();

    /// Whether and by whom clients must be certified. Default: not at all.
    #[must_use]
    pub fn client_auth(mut self, client_auth: ClientAuth) -> Self {
        self.client_auth = client_auth;
        self
    }

    /// Derives ticket keys from a secret of at least 32 bytes, so that several machines resume
    /// each other's sessions. Default: random keys of this process. Unused with 0-RTT, which
    /// needs single-use sessions kept in memory.
    #[must_use]
    pub fn ticket_secret(mut self, secret: impl Into<Vec<u8>>) -> Self {
        self.ticket_secret = Some(secret.into());
        self
    }

    /// Checks everything and builds.
    ///
    /// # Errors
    /// No identity, no ALPN, an unusable certificate or a configuration rustls refuses.
    pub fn build(mut self) -> Result<ServerTls, CertsError> {
        let (provider, packet_crypto) = self.common.provider()?;
        let clock = Arc::clone(&self.common.clock);
        let faults = Arc::new(FaultCounters::default());
        let identity = self
            .common
            .identity
            .take()
            .ok_or_else(|| {
                CertsError::Configuration(
                    "a server needs an identity: a rotating one, PEM files or self-signed"
                        .to_owned(),
                )
            })?
            .start(&clock)?;
        let builder = rustls::ServerConfig::builder_with_details(
            Arc::clone(&provider),
            Arc::new(TlsTime(Arc::clone(&clock))),
        )
        .with_protocol_versions(&[&version::TLS13])?;
        let builder = match self.client_auth.trust() {
            None => builder.with_no_client_auth(),
            Some(trust) => builder.with_client_cert_verifier(Arc::new(ClientVerifier {
                trust: Arc::clone(trust),
                required: matches!(self.client_auth, ClientAuth::Required(_)),
                faults: Arc::clone(&faults),
                algorithms: provider.signature_verification_algorithms,
            })),
        };
        let mut config = builder.with_cert_resolver(Arc::clone(&identity) as _);
        let mut tasks: Vec<Arc<dyn Periodic>> = vec![Arc::clone(&identity) as _];
        tasks.extend(self.client_auth.trust().map(|trust| Arc::clone(trust) as _));
        config.alpn_protocols = self.common.alpn.clone();
        config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
        if self.common.key_log {
            config.key_log = Arc::new(KeyLogFile::new());
        }
        tasks.extend(self.set_resumption(&mut config)?);
        let config = Arc::new(config);
        let quic = QuicServerConfig::with_initial(Arc::clone(&config), initial_suite())
            .expect("the initial suite is AES-128-GCM");
        let quic = Arc::new(quic);
        let crypto = server_crypto(ObservedServerConfig {
            inner: Arc::clone(&quic),
            config: Arc::clone(&config),
            context: self.common.context(&faults, packet_crypto),
        });
        Ok(ServerTls { config, quic, crypto, identity, faults, clock, tasks })
    }

    /// Stateless tickets, or single-use sessions in memory where 0-RTT makes replay matter.
    fn set_resumption(
        &self,
        config: &mut rustls::ServerConfig,
    ) -> Result<Option<Arc<dyn Periodic>>, CertsError> {
        let trust = self.client_auth.trust().cloned();
        if self.common.early_data {
            // QUIC knows no other value than 0 and this (RFC 9001, section 4.6.1).
            config.max_early_data_size = u32::MAX;
            config.session_storage =
                Arc::new(ServerSessions::new(TrustSet(trust.into_iter().collect())));
            return Ok(None);
        }
        let clock = Arc::clone(&self.common.clock);
        let tickets = Arc::new(match &self.ticket_secret {
            Some(secret) => TicketKeys::shared(clock, trust, secret)?,
            None => TicketKeys::random(clock, trust)?,
        });
        config.max_early_data_size = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = Arc::clone(&tickets) as _;
        Ok(Some(tickets))
    }
}

impl ServerTls {
    /// A builder with safe defaults.
    #[must_use]
    pub fn builder() -> ServerTlsBuilder {
        ServerTlsBuilder::default()
    }

    /// quinn-proto's configuration, bare.
    #[must_use]
    pub fn quic(&self) -> Arc<QuicServerConfig> {
        Arc::clone(&self.quic)
    }

    /// For `quinn_proto::ServerConfig::new`: as [`Self::quic`], and its sessions report
    /// [`HandshakeInfo`](super::HandshakeInfo) and put the cause of a failure into words.
    #[must_use]
    pub fn crypto(&self) -> Arc<dyn crypto::ServerConfig> {
        Arc::clone(&self.crypto)
    }

    /// rustls's configuration.
    #[must_use]
    pub fn rustls(&self) -> Arc<rustls::ServerConfig> {
        Arc::clone(&self.config)
    }

    /// The identity shown to clients.
    #[must_use]
    pub fn identity(&self) -> &Arc<RotatingIdentity> {
        &self.identity
    }

    /// Refused handshakes by kind.
    #[must_use]
    pub fn faults(&self) -> &Arc<FaultCounters> {
        &self.faults
    }

    /// What must be polled: renewals, trust files, ticket keys.
    #[must_use]
    pub fn tasks(&self) -> Vec<Arc<dyn Periodic>> {
        self.tasks.clone()
    }

    /// Runs [`Self::tasks`] on a thread until the value is dropped.
    ///
    /// # Errors
    /// The system refuses another thread.
    pub fn spawn_maintenance(&self) -> Result<MaintenanceThread, CertsError> {
        MaintenanceThread::spawn(Arc::clone(&self.clock), self.tasks())
    }
}

/// The client's TLS.
pub struct ClientTls {
    config: Arc<rustls::ClientConfig>,
    quic: Arc<QuicClientConfig>,
    crypto: Arc<dyn crypto::ClientConfig>,
    identity: Option<Arc<RotatingIdentity>>,
    faults: Arc<FaultCounters>,
    clock: Arc<dyn WallClock>,
    tasks: Vec<Arc<dyn Periodic>>,
}

impl std::fmt::Debug for ClientTls {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ClientTls")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Builds a [`ClientTls`].
#[derive(Default)]
pub struct ClientTlsBuilder {
    common: Common,
    roots: Option<TrustStoreBuilder>,
    trust: Option<Arc<TrustStore>>,
    pinned: HashMap<ServerName<'static>, Arc<TrustStore>>,
    danger_accept_any_server_certificate: bool,
}

impl ClientTlsBuilder {
    common_setters!();

    /// Trusts the roots in a PEM file; it is read again when it changes.
    #[must_use]
    pub fn roots_pem(mut self, path: impl Into<PathBuf>) -> Self {
        self.roots = Some(self.roots.unwrap_or_default().roots_pem(path));
        self
    }

    /// Trusts `roots`.
    #[must_use]
    pub fn roots(mut self, roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Self {
        self.roots = Some(self.roots.unwrap_or_default().roots(roots));
        self
    }

    /// Trusts what `trust` holds (roots and revocation lists), instead of
    /// [`Self::roots`] and [`Self::roots_pem`].
    #[must_use]
    pub fn trust(mut self, trust: Arc<TrustStore>) -> Self {
        self.trust = Some(trust);
        self
    }

    /// Trusts `trust` alone for the server `name` (a DNS name or an IPv6 address).
    ///
    /// # Errors
    /// `name` is neither.
    pub fn pin(mut self, name: &str, trust: Arc<TrustStore>) -> Result<Self, CertsError> {
        let name = ServerName::try_from(name.to_owned()).map_err(|_| {
            CertsError::Configuration(format!("`{name}` is no DNS name or IPv6 address"))
        })?;
        self.pinned.insert(name, trust);
        Ok(self)
    }

    /// DANGER: accepts any server certificate. Traffic is encrypted, but to whoever answered.
    #[must_use]
    pub fn danger_accept_any_server_certificate(mut self) -> Self {
        self.danger_accept_any_server_certificate = true;
        self
    }

    /// Checks everything and builds.
    ///
    /// # Errors
    /// Nothing to trust, no ALPN, an unusable identity or a configuration rustls refuses.
    pub fn build(mut self) -> Result<ClientTls, CertsError> {
        let (provider, packet_crypto) = self.common.provider()?;
        let clock = Arc::clone(&self.common.clock);
        let faults = Arc::new(FaultCounters::default());
        let ends = Arc::new(VerifiedEnds::default());
        let (verifier, trust) = self.verifier(&provider, &faults, &ends)?;
        let ends = (!self.danger_accept_any_server_certificate).then_some(ends);
        let mut tasks: Vec<Arc<dyn Periodic>> =
            trust.0.iter().map(|trust| Arc::clone(trust) as _).collect();
        let builder = rustls::ClientConfig::builder_with_details(
            provider,
            Arc::new(TlsTime(Arc::clone(&clock))),
        )
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
        let identity =
            self.common.identity.take().map(|choice| choice.start(&clock)).transpose()?;
        let mut config = match &identity {
            Some(identity) => {
                tasks.push(Arc::clone(identity) as _);
                builder.with_client_cert_resolver(Arc::clone(identity) as _)
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.common.alpn.clone();
        config.enable_early_data = self.common.early_data;
        let sessions = ClientSessions::new(trust, ends, Arc::clone(&clock));
        config.resumption = rustls::client::Resumption::store(Arc::new(sessions));
        if self.common.key_log {
            config.key_log = Arc::new(KeyLogFile::new());
        }
        let config = Arc::new(config);
        let quic = QuicClientConfig::with_initial(Arc::clone(&config), initial_suite())
            .expect("the initial suite is AES-128-GCM");
        let quic = Arc::new(quic);
        let crypto = client_crypto(ObservedClientConfig {
            inner: Arc::clone(&quic),
            context: self.common.context(&faults, packet_crypto),
        });
        Ok(ClientTls { config, quic, crypto, identity, faults, clock, tasks })
    }

    fn verifier(
        &mut self,
        provider: &CryptoProvider,
        faults: &Arc<FaultCounters>,
        ends: &Arc<VerifiedEnds>,
    ) -> Result<(Arc<dyn rustls::client::danger::ServerCertVerifier>, TrustSet), CertsError> {
        let algorithms = provider.signature_verification_algorithms;
        let faults = Arc::clone(faults);
        let trusts_something =
            self.roots.is_some() || self.trust.is_some() || !self.pinned.is_empty();
        if self.danger_accept_any_server_certificate {
            if trusts_something {
                return Err(CertsError::Configuration(
                    "roots and danger_accept_any_server_certificate contradict each other"
                        .to_owned(),
                ));
            }
            tracing::warn!("DANGER: server certificates are not verified by this client");
            let verifier = DangerousAnyServerVerifier { faults, algorithms };
            return Ok((Arc::new(verifier), TrustSet::default()));
        }
        if !trusts_something {
            return Err(CertsError::Configuration(
                "a client must trust something: give roots (a PEM file or certificates)".to_owned(),
            ));
        }
        let trust = match (self.trust.take(), self.roots.take()) {
            (Some(_), Some(_)) => {
                return Err(CertsError::Configuration(
                    "give either a trust store or roots, not both".to_owned(),
                ));
            }
            (Some(trust), None) => Some(trust),
            (None, Some(roots)) => Some(roots.build()?),
            (None, None) => None,
        };
        let pinned = std::mem::take(&mut self.pinned);
        let set = TrustSet(trust.iter().chain(pinned.values()).cloned().collect());
        let ends = Arc::clone(ends);
        Ok((Arc::new(ServerVerifier { trust, pinned, faults, algorithms, ends }), set))
    }
}

impl ClientTls {
    /// A builder with safe defaults.
    #[must_use]
    pub fn builder() -> ClientTlsBuilder {
        ClientTlsBuilder::default()
    }

    /// quinn-proto's configuration, bare.
    #[must_use]
    pub fn quic(&self) -> Arc<QuicClientConfig> {
        Arc::clone(&self.quic)
    }

    /// For `quinn_proto::ClientConfig::new`: as [`Self::quic`], and its sessions report
    /// [`HandshakeInfo`](super::HandshakeInfo) and put the cause of a failure into words.
    #[must_use]
    pub fn crypto(&self) -> Arc<dyn crypto::ClientConfig> {
        Arc::clone(&self.crypto)
    }

    /// rustls's configuration.
    #[must_use]
    pub fn rustls(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.config)
    }

    /// The identity shown to servers that ask.
    #[must_use]
    pub fn identity(&self) -> Option<&Arc<RotatingIdentity>> {
        self.identity.as_ref()
    }

    /// Refused handshakes by kind.
    #[must_use]
    pub fn faults(&self) -> &Arc<FaultCounters> {
        &self.faults
    }

    /// What must be polled: renewals, trust files.
    #[must_use]
    pub fn tasks(&self) -> Vec<Arc<dyn Periodic>> {
        self.tasks.clone()
    }

    /// Runs [`Self::tasks`] on a thread until the value is dropped.
    ///
    /// # Errors
    /// The system refuses another thread.
    pub fn spawn_maintenance(&self) -> Result<MaintenanceThread, CertsError> {
        MaintenanceThread::spawn(Arc::clone(&self.clock), self.tasks())
    }
}

/// AES-128-GCM, which RFC 9001, section 5.2, prescribes for Initial packets.
pub(super) fn initial_suite() -> Suite {
    TLS13_AES_128_GCM_SHA256
        .tls13()
        .and_then(rustls::Tls13CipherSuite::quic_suite)
        .expect("aws-lc-rs has AES-128-GCM for QUIC")
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
