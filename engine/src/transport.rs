//! [`StoqTransport`]: the whole engine behind one type.
//!
//! It connects (from the pool first), accepts, sends and receives messages, and counts. A message
//! is one unidirectional stream, or one unreliable datagram where `send_datagrams` chose those and
//! the message fits. Everything else (streams of both kinds, priorities, code on the shard) is there
//! through [`TransportConnection`], which is a [`Connection`], and [`StoqTransport::engine`].

mod message;
mod tls;

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, select};
use futures_util::lock::Mutex as AsyncMutex;
use futures_util::stream::{FuturesUnordered, StreamExt};
use quinn_proto::VarInt;
use quinn_proto::crypto;

use crate::certs::{MaintenanceThread, RotatingIdentity};
use crate::config::TransportConfig;
use crate::connection::Connection;
use crate::engine::{Builder, Connecting, Engine, ShutdownReport};
use crate::error::{ConnectionError, SendDatagramError, StartError, WriteError};
use crate::metrics::TransportStats;
use crate::pool::{CheckoutError, PeerEndpoint, PoolEvent, PooledConnection, Replay};
use crate::stream::SendStream;

use message::Inbox;
pub use message::ReceiveError;

/// A peer's connection: lent by the pool, or accepted. It is a [`Connection`]; dropped, it goes back
/// to the pool, or closes when it was accepted and no clone of it is left.
#[derive(Debug)]
pub struct TransportConnection {
    origin: Origin,
    inbox: Inbox,
}

#[derive(Debug)]
enum Origin {
    Pooled(PooledConnection),
    Accepted(Connection),
}

impl TransportConnection {
    fn new(origin: Origin) -> Self {
        Self { origin, inbox: Inbox::default() }
    }

    /// Whether it was lent before its handshake was complete
    /// ([`PooledConnection::is_early`]).
    #[must_use]
    pub fn is_early(&self) -> bool {
        match &self.origin {
            Origin::Pooled(pooled) => pooled.is_early(),
            Origin::Accepted(_) => false,
        }
    }
}

impl Deref for TransportConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        match &self.origin {
            Origin::Pooled(pooled) => pooled,
            Origin::Accepted(connection) => connection,
        }
    }
}

/// How a message left.
#[derive(Debug)]
pub enum Sent {
    /// As an unreliable datagram: nothing will tell whether it arrived.
    Datagram,
    /// As a stream: the receipt tells when the peer has all of it.
    Stream(Receipt),
}

/// Follows a message sent as a stream. Dropped, it stops nothing: the message is still delivered.
#[derive(Debug)]
pub struct Receipt {
    stream: SendStream,
}

impl Receipt {
    /// Waits until the peer has acknowledged all of the message. Cancel-safe.
    ///
    /// # Errors
    /// It never will; the error says that not all was acknowledged, and why. A message that was
    /// acknowledged before the connection was lost is a success.
    pub async fn acknowledged(&self) -> Result<(), DeliveryError> {
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(DeliveryError::Stopped(code)),
            Err(ConnectionError::EarlyDataRejected) => Err(DeliveryError::EarlyDataRejected),
            Err(reason) => Err(DeliveryError::ConnectionLost(reason)),
        }
    }

    /// Whether the peer has acknowledged all of the message.
    #[must_use]
    pub fn is_acknowledged(&self) -> bool {
        self.stream.is_acknowledged()
    }

    /// The stream, for its priority or to abandon it.
    #[must_use]
    pub fn stream(&mut self) -> &mut SendStream {
        &mut self.stream
    }
}

/// Why a message was not, or not certainly, delivered. Nothing is sent again by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeliveryError {
    /// The peer did not want it: it is too large for it, for one.
    #[error("the peer stopped the message with code {0}")]
    Stopped(VarInt),
    /// The connection was lost first; how much of the message arrived is not known.
    #[error("connection lost before the peer acknowledged all of the message: {0}")]
    ConnectionLost(ConnectionError),
    /// It was sent as early data, which the server refused: the server has acted on none of it.
    #[error("the server refused the message as early data; send it again")]
    EarlyDataRejected,
}

/// Why a message was not taken for sending: nothing of it was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The connection is gone.
    #[error("connection lost, nothing of the message was sent: {0}")]
    ConnectionLost(#[from] ConnectionError),
    /// The peer stopped the stream at once.
    #[error("the peer stopped the message with code {0}")]
    Stopped(VarInt),
}

impl From<WriteError> for SendError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::Stopped(code),
            WriteError::ConnectionLost(reason) => Self::ConnectionLost(reason),
            WriteError::ZeroRttRejected => Self::ConnectionLost(ConnectionError::EarlyDataRejected),
            WriteError::ClosedStream => Self::ConnectionLost(ConnectionError::ClosedLocally),
        }
    }
}

/// The transport. See the [module documentation](self).
pub struct StoqTransport {
    engine: Engine,
    /// Handshakes of clients that [`accept`](Self::accept) let in.
    accepting: AsyncMutex<FuturesUnordered<Connecting>>,
    enable_zero_copy: bool,
    send_datagrams: bool,
    message_size_max: usize,
    shutdown_grace: Duration,
    identity: Option<Arc<RotatingIdentity>>,
    /// Keeps certificates and trust up to date while the transport lives.
    maintenance: Vec<MaintenanceThread>,
}

impl StoqTransport {
    /// Starts a transport with TLS as `config.tls` says: it accepts where that names an identity,
    /// and connects where it names roots.
    ///
    /// # Errors
    /// A setting is out of range, `tls` is missing or unusable, or the engine does not start;
    /// nothing is left behind.
    pub fn new(config: TransportConfig) -> Result<Self, StartError> {
        config.validate()?;
        let tls = tls::build(&config)?;
        let identity = tls.identity.clone();
        let mut transport = Self::build(config, tls.server, tls.client, |mut builder| {
            if let Some(identity) = tls.identity {
                builder = builder.rotation(identity);
            }
            tls.faults.into_iter().fold(builder, |builder, (by, faults)| builder.faults(by, faults))
        })?;
        transport.identity = identity;
        transport.maintenance = tls.maintenance;
        Ok(transport)
    }

    /// Starts a transport with TLS configurations of the caller's
    /// ([`ServerTls::crypto`](crate::certs::ServerTls::crypto),
    /// [`ClientTls::crypto`](crate::certs::ClientTls::crypto)); `config.tls` is ignored.
    ///
    /// # Errors
    /// A setting is out of range, or the engine does not start.
    pub fn with_tls(
        config: TransportConfig,
        server: Option<Arc<dyn crypto::ServerConfig>>,
        client: Option<Arc<dyn crypto::ClientConfig>>,
    ) -> Result<Self, StartError> {
        Self::build(config, server, client, |builder| builder)
    }

    fn build(
        config: TransportConfig,
        server: Option<Arc<dyn crypto::ServerConfig>>,
        client: Option<Arc<dyn crypto::ClientConfig>>,
        shows: impl FnOnce(Builder) -> Builder,
    ) -> Result<Self, StartError> {
        let (enable_zero_copy, send_datagrams) = (config.enable_zero_copy, config.send_datagrams);
        let message_size_max = config.message_size_max;
        let shutdown_grace = Duration::from_millis(config.shutdown_grace_ms);
        let mut builder = Engine::builder().config(config);
        if let Some(server) = server {
            builder = builder.server(server);
        }
        if let Some(client) = client {
            builder = builder.client(client);
        }
        Ok(Self {
            engine: shows(builder).start()?,
            accepting: AsyncMutex::new(FuturesUnordered::new()),
            enable_zero_copy,
            send_datagrams,
            message_size_max,
            shutdown_grace,
            identity: None,
            maintenance: Vec::new(),
        })
    }

    /// A connection to a peer: an open one of the pool first, else a new one, whose handshake all
    /// callers of the moment share. Cancel-safe.
    ///
    /// # Errors
    /// The handshake failed, the peer's circuit is open, or a limit is reached.
    pub async fn connect(
        &self,
        endpoint: &PeerEndpoint,
    ) -> Result<TransportConnection, CheckoutError> {
        let pooled = self.engine.checkout(endpoint, Replay::Unsafe).await?;
        Ok(TransportConnection::new(Origin::Pooled(pooled)))
    }

    /// As [`connect`](Self::connect), for requests that do no harm when they are executed twice:
    /// with `zero_rtt` they may leave before the handshake is complete.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_replay_safe(
        &self,
        endpoint: &PeerEndpoint,
    ) -> Result<TransportConnection, CheckoutError> {
        let pooled = self.engine.checkout(endpoint, Replay::Safe).await?;
        Ok(TransportConnection::new(Origin::Pooled(pooled)))
    }

    /// Keeps at least so many connections to a peer open; lost ones are made again. 0 ends it.
    ///
    /// # Errors
    /// The limits allow fewer.
    pub async fn warm_up(
        &self,
        endpoint: &PeerEndpoint,
        connections: usize,
    ) -> Result<(), CheckoutError> {
        self.engine.warm_up(endpoint, connections).await
    }

    /// The next event of the pool; `None` when the transport has ended. Cancel-safe.
    pub async fn pool_event(&self) -> Option<PoolEvent> {
        self.engine.pool_event().await
    }

    /// The next client whose handshake is complete; `None` when the transport has ended. Handshakes
    /// go on side by side; those that fail are logged and counted by the shards. Cancel-safe.
    pub async fn accept(&self) -> Option<TransportConnection> {
        let mut accepting = self.accepting.lock().await;
        loop {
            let next_client = std::pin::pin!(self.engine.accept());
            let done = if accepting.is_empty() {
                accepting.push(next_client.await?.accept());
                continue;
            } else {
                match select(next_client, accepting.next()).await {
                    Either::Left((Some(incoming), _)) => {
                        accepting.push(incoming.accept());
                        continue;
                    }
                    // What is under way ends with the engine's own error.
                    Either::Left((None, _)) => accepting.next().await,
                    Either::Right((done, _)) => done,
                }
            };
            match done {
                Some(Ok(connection)) => {
                    return Some(TransportConnection::new(Origin::Accepted(connection)));
                }
                Some(Err(error)) => tracing::debug!(%error, "a client's handshake failed"),
                None => {}
            }
        }
    }

    /// Sends a message: as an unreliable datagram when `send_datagrams` chose those and it fits the
    /// path now, else as a stream of its own. `data` is sent by reference; with `enable_zero_copy`
    /// off it is copied once and not held. Waits while the peer allows no more. Cancel-safe: all
    /// of it is sent, or nothing.
    ///
    /// # Errors
    /// Nothing of it was sent. What happens later, [`Receipt::acknowledged`] tells.
    pub async fn send(&self, conn: &TransportConnection, data: &Bytes) -> Result<Sent, SendError> {
        let data = if self.enable_zero_copy { data.clone() } else { Bytes::copy_from_slice(data) };
        if self.send_datagrams && conn.max_datagram_size().is_some_and(|max| data.len() <= max) {
            match conn.send_datagram_wait(data.clone()).await {
                Ok(()) => return Ok(Sent::Datagram),
                Err(SendDatagramError::ConnectionLost(reason)) => return Err(reason.into()),
                // The path shrank meanwhile: a stream takes any size.
                Err(_too_large) => {}
            }
        }
        let mut stream = conn.open_uni().await?;
        // A new stream's queue is empty: nothing below waits, so nothing is sent in part.
        stream.write_chunk(data).await?;
        stream.finish()?;
        Ok(Sent::Stream(Receipt { stream }))
    }

    /// The next message of a peer, in the order in which they arrive. One that arrived in one piece
    /// is handed on without copying. Cancel-safe: a message half read is gone on with by the next
    /// call. Bidirectional streams are left for [`Connection::accept_bi`].
    ///
    /// # Errors
    /// The connection is gone, the peer abandoned the message, or it is larger than
    /// `message_size_max` (the peer is told to stop). After the latter two, receiving goes on.
    pub async fn receive(&self, conn: &TransportConnection) -> Result<Bytes, ReceiveError> {
        conn.inbox.receive(conn, self.message_size_max).await
    }

    /// Statistics. Costs the shards nothing.
    #[must_use]
    pub fn stats(&self) -> TransportStats {
        self.engine.transport_stats()
    }

    /// The statistics as Prometheus text, as `metrics_address` serves them.
    #[must_use]
    pub fn prometheus(&self) -> String {
        self.engine.prometheus()
    }

    /// The certificate that is shown to clients, where `config.tls` named it.
    #[must_use]
    pub fn identity(&self) -> Option<&Arc<RotatingIdentity>> {
        self.identity.as_ref()
    }

    /// The engine beneath.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Stops accepting, closes what is idle in the pool, lets streams go on for
    /// `shutdown_grace_ms`, closes the rest with code 0 and waits for the end.
    pub async fn shutdown(self) -> ShutdownReport {
        self.engine.shutdown(self.shutdown_grace, VarInt::from_u32(0), b"shutdown").await
    }
}
