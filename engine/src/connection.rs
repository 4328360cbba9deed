//! Async handle of a connection.

use std::net::SocketAddrV6;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::time::Duration;

use bytes::Bytes;
use quinn_proto::{Dir, VarInt};
use rustls_pki_types::CertificateDer;

use crate::certs::{CertificateSummary, HandshakeInfo, PeerIdentity};
use crate::error::{ConnectionError, SendDatagramError};
use crate::handles::{ConnRef, halves};
use crate::proto::ConnectionStats;
use crate::stream::{RecvStream, SendStream};

/// A QUIC connection. Clones are the same connection; when the last clone and the last
/// stream are dropped it closes with code 0.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<ConnRef>,
}

impl Connection {
    pub(crate) fn new(inner: Arc<ConnRef>) -> Self {
        Self { inner }
    }

    /// Opens a bidirectional stream; waits while the peer allows no more. Cancel-safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        self.open(Dir::Bi).await
    }

    /// Opens a unidirectional stream; waits while the peer allows no more. Cancel-safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        let (send, mut recv) = self.open(Dir::Uni).await?;
        recv.forget();
        Ok(send)
    }

    async fn open(&self, dir: Dir) -> Result<(SendStream, RecvStream), ConnectionError> {
        let shared = &self.inner.shared;
        let answer = shared.request_open(dir)?;
        let gone = |_closed| shared.closed().unwrap_or(ConnectionError::EngineStopped);
        let (id, stream) = answer.await.map_err(gone)?.claim();
        Ok(halves(&self.inner, id, stream))
    }

    /// The next bidirectional stream that the peer opens. Cancel-safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        self.accept(Dir::Bi).await
    }

    /// The next unidirectional stream that the peer opens. Cancel-safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        let (mut send, recv) = self.accept(Dir::Uni).await?;
        send.forget();
        Ok(recv)
    }

    async fn accept(&self, dir: Dir) -> Result<(SendStream, RecvStream), ConnectionError> {
        let shared = &self.inner.shared;
        loop {
            let listener = shared.accept_event[dir as usize].listen();
            if let Some((id, stream)) = shared.take_stream(dir) {
                return Ok(halves(&self.inner, id, stream));
            }
            if let Some(reason) = shared.closed() {
                return Err(reason);
            }
            listener.await;
        }
    }

    /// Sends an unreliable datagram at once or not at all.
    ///
    /// # Errors
    /// Too large for the path, the queue is full, the peer takes none, or the connection is gone.
    pub fn send_datagram(&self, data: Bytes) -> Result<(), SendDatagramError> {
        let shared = &self.inner.shared;
        if let Some(reason) = shared.closed() {
            return Err(SendDatagramError::ConnectionLost(reason));
        }
        match self.max_datagram_size() {
            None => return Err(SendDatagramError::UnsupportedByPeer),
            Some(max) if data.len() > max => return Err(SendDatagramError::TooLarge),
            Some(_) => {}
        }
        let queued = shared.datagram_send_bytes.load(Acquire);
        if queued != 0 && queued + data.len() > shared.datagram_queue_bytes {
            return Err(SendDatagramError::Full);
        }
        shared.datagram_send_bytes.fetch_add(data.len(), AcqRel);
        shared.datagram_send_queue.push(data);
        shared.notify();
        Ok(())
    }

    /// Sends an unreliable datagram; waits while the queue is full. Cancel-safe.
    ///
    /// # Errors
    /// As [`send_datagram`](Self::send_datagram), but never `Full`.
    pub async fn send_datagram_wait(&self, data: Bytes) -> Result<(), SendDatagramError> {
        loop {
            let listener = self.inner.shared.datagram_send_event.listen();
            match self.send_datagram(data.clone()) {
                Err(SendDatagramError::Full) => listener.await,
                result => return result,
            }
        }
    }

    /// The next datagram from the peer. Cancel-safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        let shared = &self.inner.shared;
        loop {
            let listener = shared.datagram_recv_event.listen();
            if let Some(data) = shared.take_datagram() {
                return Ok(data);
            }
            if let Some(reason) = shared.closed() {
                return Err(reason);
            }
            listener.await;
        }
    }

    /// The largest datagram that fits the path now, bytes; `None`: the peer takes none.
    #[must_use]
    pub fn max_datagram_size(&self) -> Option<usize> {
        self.inner.shared.datagram_size_max.load(Relaxed).checked_sub(1)
    }

    /// Closes at once with a code and a reason that the peer's application sees. Data that is
    /// not yet acknowledged may be lost: wait for [`SendStream::stopped`] first where it matters.
    pub fn close(&self, code: VarInt, reason: &[u8]) {
        self.inner.shared.request_close(code, Bytes::copy_from_slice(reason));
    }

    /// Waits until the connection is over, and says why. Cancel-safe.
    pub async fn closed(&self) -> ConnectionError {
        loop {
            let listener = self.inner.shared.closed_event.listen();
            if let Some(reason) = self.inner.shared.closed() {
                return reason;
            }
            listener.await;
        }
    }

    /// Why the connection is over, if it is.
    #[must_use]
    pub fn close_reason(&self) -> Option<ConnectionError> {
        self.inner.shared.closed()
    }

    /// Statistics, at most a millisecond old while the connection is busy. Costs the shard nothing.
    #[must_use]
    pub fn stats(&self) -> ConnectionStats {
        self.inner.shared.stats.read()
    }

    /// Smoothed round-trip time.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.stats().rtt
    }

    /// The peer's address when the connection was made.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddrV6 {
        self.inner.shared.remote()
    }

    /// The negotiated application protocol.
    #[must_use]
    pub fn alpn(&self) -> Option<Vec<u8>> {
        self.inner.shared.handshake()?.settled.as_ref()?.alpn.clone()
    }

    /// The name that the client asked for (server side).
    #[must_use]
    pub fn server_name(&self) -> Option<String> {
        self.inner.shared.handshake()?.settled.as_ref()?.server_name.clone()
    }

    /// What the handshake settled: protocol, name and key exchange group. `None` with a TLS
    /// implementation that does not say.
    #[must_use]
    pub fn handshake(&self) -> Option<HandshakeInfo> {
        self.inner.shared.handshake()?.settled.clone()
    }

    /// Who the peer proved to be; `None` when it showed no certificate.
    #[must_use]
    pub fn peer_identity(&self) -> Option<PeerIdentity> {
        let chain = self.peer_certificates()?;
        // Verification has parsed it; only a verifier that accepts anything lets another through.
        let certificate = CertificateSummary::parse(chain.first()?).ok()?;
        Some(PeerIdentity { certificate, chain })
    }

    /// The peer's certificate chain, leaf first; `None` when it showed none.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        self.inner.shared.handshake()?.peer_certificates.clone()
    }

    /// Unknown counts as accepted: there was none to refuse.
    pub(crate) fn was_early_data_accepted(&self) -> bool {
        let handshake = self.inner.shared.handshake();
        handshake.is_some_and(|handshake| handshake.early_data_accepted != Some(false))
    }

    /// Datagrams that were dropped because nobody read them.
    #[must_use]
    pub fn datagrams_dropped(&self) -> u64 {
        self.inner.shared.datagrams_dropped.load(Relaxed)
    }

    /// Switches to new packet protection keys (RFC 9001 §6); the engine also does so by itself.
    pub fn update_keys(&self) {
        self.inner.shared.update_keys.store(true, Relaxed);
        self.inner.shared.notify();
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("remote", &self.remote_address())
            .field("closed", &self.close_reason())
            .finish_non_exhaustive()
    }
}
