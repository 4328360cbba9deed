//! The TLS session that quinn-proto drives, with what it does not tell: the key exchange group,
//! and the reason of a failure in words.
//!
//! Only the handshake passes through here; packet keys are handed out as they are, but for
//! padding, which the receiving ones drop ([`super::padding`]).

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use quinn_proto::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn_proto::crypto::{
    self, ClientConfig, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey,
    ServerConfig, Session, UnsupportedVersion,
};
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{ConnectError, ConnectionId, Side, TransportError};
use rustls::NamedGroup;
use rustls::quic::Version;
use rustls_pki_types::CertificateDer;

use super::error::CertsError;
use super::fault::{CertificateFault, FaultCounters};
use super::names::CertificateSummary;
use super::padding::WithoutPadding;
use super::provider;
use super::server_session::ServerSession;
use super::tls::initial_suite;
use crate::proto::crypto::CryptoProvider as PacketCrypto;

/// Counts the changes of a connection's packet protection keys (RFC 9001 §6). Clones count together.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyUpdates(Arc<AtomicU64>);

impl KeyUpdates {
    pub(crate) fn count(&self) -> u64 {
        // quinn-proto makes each generation one update ahead, the first with the handshake.
        // Relaxed: a statistic.
        self.0.load(Relaxed).saturating_sub(1)
    }
}

// A counter is no part of what a handshake settled.
impl PartialEq for KeyUpdates {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for KeyUpdates {}

/// What a handshake settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandshakeInfo {
    /// Application protocol (ALPN, RFC 7301).
    pub alpn: Option<Vec<u8>>,
    /// Name that the client asked for (SNI); servers only.
    pub server_name: Option<String>,
    /// Key exchange group; [`NamedGroup::X25519MLKEM768`] is post-quantum.
    pub group: Option<NamedGroup>,
    /// Who seals and opens packets of the AES suites; unknown with cipher suites of the
    /// application's own.
    pub packet_crypto: Option<PacketCrypto>,
    pub(crate) key_updates: KeyUpdates,
}

impl HandshakeInfo {
    /// Reads it from a connection's `crypto_session()`. `None` until quinn-proto emits
    /// `HandshakeDataReady`.
    #[must_use]
    pub fn of_session(session: &dyn Session) -> Option<Self> {
        match session.handshake_data()?.downcast::<Self>() {
            Ok(info) => Some(*info),
            // A session of a bare rustls configuration: the group stays unknown.
            Err(other) => other.downcast::<HandshakeData>().ok().map(|data| Self {
                alpn: data.protocol,
                server_name: data.server_name,
                group: None,
                packet_crypto: None,
                key_updates: KeyUpdates::default(),
            }),
        }
    }

    /// Whether the key exchange withstands a quantum computer.
    #[must_use]
    pub fn is_post_quantum(&self) -> bool {
        self.group == Some(NamedGroup::X25519MLKEM768)
    }
}

/// Who the peer proved to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Names, serial and validity of the leaf.
    pub certificate: CertificateSummary,
    /// The chain as sent, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
}

impl PeerIdentity {
    /// Reads it from a connection's `crypto_session()`. `None` if the peer sent no certificate.
    ///
    /// # Errors
    /// The leaf does not parse, which verification would have refused; possible only with a
    /// verifier that accepts anything.
    pub fn of_session(session: &dyn Session) -> Result<Option<Self>, CertsError> {
        let Some(identity) = session.peer_identity() else { return Ok(None) };
        let chain = identity
            .downcast::<Vec<CertificateDer<'static>>>()
            .expect("quinn-proto's rustls sessions hand out certificate chains");
        let Some(leaf) = chain.first() else { return Ok(None) };
        Ok(Some(Self { certificate: CertificateSummary::parse(leaf)?, chain: *chain }))
    }
}

/// What a peer's CONNECTION_CLOSE means when it carries a TLS alert: the fault, and what to do.
/// `None` if `error_code` is no TLS alert (RFC 9001, section 4.8).
#[must_use]
pub fn explain_peer_alert(error_code: u64, reason: &str) -> Option<String> {
    let fault = CertificateFault::of_peer_alert(error_code)?;
    let alert = error_code - 0x100;
    // Peers that run STOQ say the cause themselves.
    let advice = if reason.is_empty() { fault.advice() } else { reason };
    Some(format!("the peer refused the handshake (TLS alert {alert}): {advice}"))
}

/// What to do about a TLS alert from a peer that says no more than `reason`. `None` if `error_code` is no
/// alert that tells something, or the reason says it: peers that run STOQ name the cure themselves.
pub(crate) fn peer_alert_advice(error_code: u64, reason: &str) -> Option<&'static str> {
    if CertificateFault::ALL.iter().any(|fault| reason.contains(fault.advice())) {
        return None;
    }
    match CertificateFault::of_peer_alert(error_code)? {
        CertificateFault::Other => None,
        // handshake_failure (40), RFC 8446, section 6.2: whatever could not be agreed on.
        CertificateFault::NoCommonKeyExchange => Some(
            "no key exchange group, signature scheme or cipher suite in common: with post-quantum key \
             exchange required, both sides must offer X25519MLKEM768",
        ),
        fault => Some(fault.advice()),
    }
}

/// What both sides of a session share.
#[derive(Debug, Clone)]
pub(super) struct SessionContext {
    pub(super) faults: Arc<FaultCounters>,
    /// The groups on offer here, for the error text.
    pub(super) groups: &'static str,
    pub(super) packet_crypto: Option<PacketCrypto>,
}

/// Server configuration whose sessions report group and faults.
pub(super) struct ObservedServerConfig {
    pub(super) inner: Arc<QuicServerConfig>,
    /// What `inner` is made of.
    pub(super) config: Arc<rustls::ServerConfig>,
    pub(super) context: SessionContext,
}

impl ServerConfig for ObservedServerConfig {
    fn initial_keys(
        &self,
        version: u32,
        dst_cid: &ConnectionId,
    ) -> Result<Keys, UnsupportedVersion> {
        self.inner.initial_keys(version, dst_cid)
    }

    fn retry_tag(&self, version: u32, orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.inner.retry_tag(version, orig_dst_cid, packet)
    }

    fn start_session(
        self: Arc<Self>,
        version: u32,
        params: &TransportParameters,
    ) -> Box<dyn Session> {
        // quinn-proto asks `initial_keys` first, which refuses versions that it does not know.
        let version = match version {
            0xff00_001d..=0xff00_0020 => Version::V1Draft,
            _ => Version::V1,
        };
        let config = Arc::clone(&self.config);
        let inner = ServerSession::new(config, initial_suite(), version, params);
        Box::new(ObservedSession::new(Box::new(inner), self.context.clone()))
    }
}

/// Client configuration whose sessions report group and faults.
pub(super) struct ObservedClientConfig {
    pub(super) inner: Arc<QuicClientConfig>,
    pub(super) context: SessionContext,
}

impl ClientConfig for ObservedClientConfig {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn Session>, ConnectError> {
        let inner = Arc::clone(&self.inner).start_session(version, server_name, params)?;
        Ok(Box::new(ObservedSession::new(inner, self.context.clone())))
    }
}

struct ObservedSession {
    inner: Box<dyn Session>,
    group: Option<NamedGroup>,
    key_updates: KeyUpdates,
    context: SessionContext,
}

impl ObservedSession {
    fn new(inner: Box<dyn Session>, context: SessionContext) -> Self {
        Self { inner, group: None, key_updates: KeyUpdates::default(), context }
    }
}

impl ObservedSession {
    /// Adds the fault's name and cure to an error, and counts what no verifier has counted.
    fn explain(&self, mut error: TransportError) -> TransportError {
        if let Some((fault, detail)) = provider::take_fault() {
            error.reason = format!("{}: {detail}; {}", fault.label(), fault.advice());
            return error;
        }
        let fault = CertificateFault::of_peer_alert(u64::from(error.code))
            .unwrap_or(CertificateFault::Other);
        // handshake_failure (40) has many causes; rustls's text tells them apart.
        let fault = match fault {
            CertificateFault::NoCommonKeyExchange
                if error.reason.contains("NoSignatureSchemes") =>
            {
                CertificateFault::NoCommonSignature
            }
            CertificateFault::NoCommonKeyExchange if !error.reason.contains("NoKxGroups") => {
                CertificateFault::Other
            }
            other => other,
        };
        self.context.faults.record(fault);
        if fault == CertificateFault::NoCommonKeyExchange {
            error.reason = format!("{} (offered here: {})", fault.advice(), self.context.groups);
        } else if fault == CertificateFault::NoCommonSignature {
            error.reason = format!("{}: {}", fault.label(), fault.advice());
        } else if fault != CertificateFault::Other {
            error.reason = format!("{}; {}", error.reason, fault.advice());
        }
        error
    }
}

impl Session for ObservedSession {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        self.inner.initial_keys(dst_cid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        let data = self
            .inner
            .handshake_data()?
            .downcast::<HandshakeData>()
            .expect("quinn-proto's rustls sessions hand out HandshakeData");
        Some(Box::new(HandshakeInfo {
            alpn: data.protocol,
            server_name: data.server_name,
            group: self.group,
            packet_crypto: self.context.packet_crypto,
            key_updates: self.key_updates.clone(),
        }))
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.inner.peer_identity()
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        self.inner.early_crypto()
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.inner.early_data_accepted()
    }

    fn is_handshaking(&self) -> bool {
        self.inner.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        // Whatever an interrupted session left on this thread is not ours.
        provider::take_fault();
        provider::take_group();
        let read = self.inner.read_handshake(buf);
        if let Some(group) = provider::take_group() {
            self.group = Some(group);
        }
        read.map_err(|error| self.explain(error))
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        self.inner.transport_parameters()
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let mut keys = self.inner.write_handshake(buf)?;
        keys.packet = receive_without_padding(keys.packet);
        Some(keys)
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        self.key_updates.0.fetch_add(1, Relaxed);
        self.inner.next_1rtt_keys().map(receive_without_padding)
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        self.inner.is_valid_retry(orig_dst_cid, header, payload)
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        self.inner.export_keying_material(output, label, context)
    }
}

fn receive_without_padding(keys: KeyPair<Box<dyn PacketKey>>) -> KeyPair<Box<dyn PacketKey>> {
    KeyPair { local: keys.local, remote: Box::new(WithoutPadding(keys.remote)) }
}

/// Erases the type for `quinn_proto::ServerConfig::new`.
pub(super) fn server_crypto(config: ObservedServerConfig) -> Arc<dyn crypto::ServerConfig> {
    Arc::new(config)
}

/// Erases the type for `quinn_proto::ClientConfig::new`.
pub(super) fn client_crypto(config: ObservedClientConfig) -> Arc<dyn crypto::ClientConfig> {
    Arc::new(config)
}
