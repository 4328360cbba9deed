//! A CA elsewhere as a [`CertificateAuthority`].

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::VarInt;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};

use super::block_on::block_on;
use crate::certs::trustchain::{
    ANSWER_SIZE_BYTES_MAX, Message, TRUSTCHAIN_ALPN, TrustchainAuthority, TrustchainTransport,
};
use crate::certs::{
    CaError, CertificateAuthority, CertificateFault, CertificateRequest, CertsError, ClientTls,
    RotatingIdentity, SharedKeys, SystemWallClock, TrustStore, WallClock,
};
use crate::config::TransportConfig;
use crate::datapath::choice::DatapathChoice;
use crate::engine::Engine;

/// Length that goes before a message.
const LENGTH_SIZE_BYTES: usize = 4;
/// What a connection of one request may buffer.
const WINDOW_BYTES: u64 = 256 << 10;

/// Where the CA is, whom to believe that it is the CA, and what to enrol with.
#[derive(Debug, Clone)]
pub struct RemoteCaConfig {
    /// The service's address.
    pub address: SocketAddrV6,
    /// The name that its certificate must show: a DNS name or an IPv6 address.
    pub server_name: String,
    /// The CA's root: what `stoq ca root` prints.
    pub roots: Vec<CertificateDer<'static>>,
    /// One-time token for the first certificate; not needed while a stored certificate serves.
    pub token: Option<String>,
    /// Longest that one request may take. Default 20 s.
    pub timeout: Duration,
    /// The date that certificates are judged by. Default the machine's.
    pub clock: Arc<dyn WallClock>,
}

impl RemoteCaConfig {
    /// The CA at `address` under `roots`, asked for by `server_name`.
    #[must_use]
    pub fn new(
        address: SocketAddrV6,
        server_name: impl Into<String>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Self {
        Self {
            address,
            server_name: server_name.into(),
            roots,
            token: None,
            timeout: Duration::from_secs(20),
            clock: Arc::new(SystemWallClock),
        }
    }
}

/// The client of a remote CA. An identity that is built on it
/// ([`RotatingIdentity::with_authority`]) authenticates its renewals by itself.
#[derive(Debug)]
pub struct RemoteCa {
    authority: TrustchainAuthority,
    link: Arc<Link>,
}

impl RemoteCa {
    /// A client; nothing is sent yet.
    ///
    /// # Errors
    /// The token is not hexadecimal, or there is no root.
    pub fn new(config: RemoteCaConfig) -> Result<Arc<Self>, CertsError> {
        let token = config.token.clone();
        let trust = TrustStore::builder().roots(config.roots.clone()).build()?;
        let link = Arc::new(Link { config, trust, identity: Mutex::default() });
        let carrier = Carrier(Arc::clone(&link));
        let authority = TrustchainAuthority::new(Box::new(carrier), token.as_deref())?;
        Ok(Arc::new(Self { authority, link }))
    }

    /// Gives it another one-time token, for a node whose certificate has expired: the next attempt
    /// enrols anew.
    ///
    /// # Errors
    /// The token is not hexadecimal.
    pub fn set_token(&self, token: &str) -> Result<(), CertsError> {
        self.authority.set_token(token)
    }

    /// The keys that this node shares with all machines of its DNS names
    /// ([`TrustchainAuthority::shared_keys`]).
    ///
    /// # Errors
    /// No answer, no certificate yet, or the CA keeps no such secret.
    pub fn shared_keys(&self) -> Result<SharedKeys, CaError> {
        self.authority.shared_keys()
    }

    /// The CA's current revocation list, or `None` if it keeps none. [`RevocationFeed`](super::RevocationFeed)
    /// keeps a file of it current.
    ///
    /// # Errors
    /// No answer.
    pub fn revocation_list(
        &self,
    ) -> Result<Option<CertificateRevocationListDer<'static>>, CaError> {
        self.authority.revocation_list()
    }
}

impl CertificateAuthority for RemoteCa {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        self.authority.issue(request)
    }

    /// The first identity that lives counts: requests of a second one would be authenticated as the
    /// first. One that could not start leaves its place to the next attempt.
    fn handle_identity(&self, identity: &Weak<RotatingIdentity>) {
        let mut current = self.link.identity();
        if current.strong_count() > 0 {
            tracing::error!("a RemoteCa certifies one identity; make another for the second");
            return;
        }
        *current = Weak::clone(identity);
    }
}

/// What carries requests.
#[derive(Debug)]
struct Link {
    config: RemoteCaConfig,
    trust: Arc<TrustStore>,
    identity: Mutex<Weak<RotatingIdentity>>,
}

struct Carrier(Arc<Link>);

impl TrustchainTransport for Carrier {
    fn exchange(&self, request: &[u8]) -> Result<Vec<u8>, CaError> {
        self.0.exchange(request)
    }
}

impl Link {
    fn identity(&self) -> MutexGuard<'_, Weak<RotatingIdentity>> {
        self.identity.lock().expect("no panic while locked")
    }

    fn exchange(&self, request: &[u8]) -> Result<Vec<u8>, CaError> {
        let tls = self.tls(Message::is_anonymous(request)).map_err(CaError::internal)?;
        let engine = Engine::builder()
            .config(self.transport())
            .client(tls.crypto())
            .start()
            .map_err(|error| CaError::Unreachable { reason: error.to_string() })?;
        let deadline = Instant::now() + self.config.timeout;
        let answer = block_on(self.ask(&engine, request), Some(deadline));
        engine.shutdown_blocking(Duration::ZERO, VarInt::from_u32(0), b"done");
        match answer {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(reason)) => Err(self.explain(&tls, reason)),
            None => {
                let reason = format!("no answer within {} ms", self.config.timeout.as_millis());
                Err(self.explain(&tls, reason))
            }
        }
    }

    async fn ask(&self, engine: &Engine, request: &[u8]) -> Result<Vec<u8>, String> {
        let connection = engine
            .connect(self.config.address, &self.config.server_name)
            .await
            .map_err(|error| error.to_string())?;
        let (mut send, mut recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
        send.write_chunk(Bytes::copy_from_slice(request))
            .await
            .map_err(|error| error.to_string())?;
        send.finish().map_err(|error| error.to_string())?;
        let answer = recv
            .read_to_end(ANSWER_SIZE_BYTES_MAX + LENGTH_SIZE_BYTES)
            .await
            .map_err(|error| error.to_string())?;
        connection.close(VarInt::from_u32(0), b"done");
        Ok(answer)
    }

    /// Shows the current certificate, if there is one and it is asked for.
    fn tls(&self, anonymous: bool) -> Result<ClientTls, CertsError> {
        let builder = ClientTls::builder()
            .trust(Arc::clone(&self.trust))
            .clock(Arc::clone(&self.config.clock))
            .alpn([TRUSTCHAIN_ALPN]);
        let identity = self.identity().upgrade();
        match identity.filter(|identity| !anonymous && identity.certified_key().is_some()) {
            Some(identity) => builder.identity(identity).build(),
            None => builder.build(),
        }
    }

    fn transport(&self) -> TransportConfig {
        let timeout_ms = self.config.timeout.as_millis().clamp(1, 600_000) as u64;
        TransportConfig {
            bind: SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, self.config.address.scope_id()),
            datapath: DatapathChoice::Socket,
            spin_us: 0,
            handshake_timeout_ms: timeout_ms,
            idle_timeout_ms: timeout_ms,
            max_concurrent_streams: 0,
            max_datagram_size: 0,
            send_buffer_size: WINDOW_BYTES,
            receive_buffer_size: WINDOW_BYTES,
            stream_receive_buffer_size: WINDOW_BYTES,
            connection_pool_size: 0,
            ..TransportConfig::default()
        }
    }

    /// A certificate that was refused, on either side, is no passing trouble.
    fn explain(&self, tls: &ClientTls, reason: String) -> CaError {
        let fault = CertificateFault::ALL.into_iter().find(|fault| tls.faults().count(*fault) > 0);
        match fault {
            Some(fault) => CaError::Untrusted { fault, reason },
            None => CaError::Unreachable { reason: format!("{}: {reason}", self.config.address) },
        }
    }
}
