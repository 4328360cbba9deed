//! Public errors: one type per operation, the peer's fault told from ours.

use std::net::SocketAddrV6;

use bytes::Bytes;
use quinn_proto::VarInt;

use crate::certs;

/// Why a connection ended or never came to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The peer's application closed the connection (RFC 9000 §19.19, frame 0x1d).
    #[error("closed by the peer's application: code {code}, {reason:?}")]
    ClosedByPeer {
        /// The application's code.
        code: VarInt,
        /// The application's reason, often UTF-8.
        reason: Bytes,
    },
    /// The peer's QUIC stack ended the connection and says that we, or the network, made it (frame 0x1c).
    #[error("aborted by the peer's QUIC stack: {0}")]
    AbortedByPeer(String),
    /// The peer broke the protocol, or its certificate was refused; we closed the connection.
    #[error("the peer broke the protocol: {0}")]
    PeerViolation(String),
    /// The peer lost its state and sent a stateless reset (RFC 9000 §10.3).
    #[error("reset by the peer: it no longer knows the connection (restarted?)")]
    Reset,
    /// The peer speaks no QUIC version that we speak.
    #[error("the peer supports no QUIC version that we support")]
    VersionMismatch,
    /// Nothing was heard for the idle timeout.
    #[error("timed out: nothing heard from the peer for the idle timeout")]
    TimedOut,
    /// The handshake did not finish within `handshake_timeout_ms`.
    #[error(
        "handshake with {remote} did not finish within {timeout_ms} ms; is the peer's UDP port reachable?"
    )]
    HandshakeTimedOut {
        /// The peer.
        remote: SocketAddrV6,
        /// The limit that was exceeded, ms.
        timeout_ms: u64,
    },
    /// The connection reached `connection_age_ms_max` and was closed; connect again.
    #[error("closed at the age limit of {age_ms_max} ms (`connection_age_ms_max`); connect again")]
    AgeLimitReached {
        /// The limit, ms.
        age_ms_max: u64,
    },
    /// The server refused the early data of this stream; the connection itself stands.
    #[error("the server refused early data; send it again on a new stream")]
    EarlyDataRejected,
    /// Our own application closed the connection.
    #[error("closed by this application")]
    ClosedLocally,
    /// The engine was shut down.
    #[error("the engine was shut down")]
    EngineStopped,
    /// The datapath beneath the connection cannot go on, and its shard has stopped; the text
    /// says what happened and what to do.
    #[error("the datapath failed: {0}")]
    DatapathFailed(String),
    /// The provider that seals the connection's packets failed; the text names it and its reason.
    #[error("packets cannot be sealed: {0}")]
    CryptoProviderFailed(String),
    /// The application on the shard panicked in a call about this connection.
    #[error("the application on the shard panicked; the connection was closed")]
    AppPanicked,
    /// The attempt could not start.
    #[error(transparent)]
    NotStarted(#[from] ConnectError),
    /// A limit of ours was reached; the text names it.
    #[error("refused by a local limit: {0}")]
    LimitReached(&'static str),
}

impl ConnectionError {
    /// Whether the peer, and not this side or the network, caused it.
    #[must_use]
    pub fn is_peer_fault(&self) -> bool {
        matches!(self, Self::PeerViolation(_) | Self::VersionMismatch | Self::Reset)
    }
}

impl From<quinn_proto::ConnectionError> for ConnectionError {
    fn from(error: quinn_proto::ConnectionError) -> Self {
        use quinn_proto::ConnectionError as Quic;
        match error {
            Quic::VersionMismatch => Self::VersionMismatch,
            Quic::TransportError(error) => Self::PeerViolation(error.to_string()),
            Quic::ConnectionClosed(close) => {
                let reason = String::from_utf8_lossy(&close.reason);
                match certs::peer_alert_advice(close.error_code.into(), &reason) {
                    Some(advice) => Self::AbortedByPeer(format!("{close}; {advice}")),
                    None => Self::AbortedByPeer(close.to_string()),
                }
            }
            Quic::ApplicationClosed(close) => {
                Self::ClosedByPeer { code: close.error_code, reason: close.reason }
            }
            Quic::Reset => Self::Reset,
            Quic::TimedOut => Self::TimedOut,
            Quic::LocallyClosed => Self::ClosedLocally,
            Quic::CidsExhausted => Self::LimitReached("connection IDs"),
        }
    }
}

/// Why a connection attempt was refused at once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address cannot be a peer.
    #[error("{0} cannot be a peer: port zero or an unspecified, multicast or IPv4-mapped address")]
    InvalidRemoteAddress(SocketAddrV6),
    /// The name is neither a DNS name nor an IPv6 address.
    #[error("`{0}` is neither a DNS name nor an IPv6 address")]
    InvalidServerName(String),
    /// The shard holds `connections_per_shard_max` connections.
    #[error("the shard holds as many connections as `connections_per_shard_max` allows")]
    TooManyConnections,
    /// The engine was built without a client configuration.
    #[error("this engine has no client configuration: give `Builder::client` one")]
    NoClientConfig,
    /// The shard's mailbox is full: commands come faster than the shard takes them.
    #[error("the shard's mailbox is full; slow down or raise `mailbox_capacity`")]
    Busy,
    /// The engine was shut down.
    #[error("the engine was shut down")]
    EngineStopped,
    /// quinn-proto refused.
    #[error("connection attempt refused: {0}")]
    Protocol(String),
}

/// Why a write failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The peer asked us to stop sending on this stream (STOP_SENDING, RFC 9000 §19.5).
    #[error("the peer stopped the stream with code {0}")]
    Stopped(VarInt),
    /// The stream was finished or reset before.
    #[error("the stream was finished or reset before")]
    ClosedStream,
    /// The connection is gone.
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
    /// 0-RTT data was refused by the server; send it again after the handshake.
    #[error("the server refused early data")]
    ZeroRttRejected,
}

/// Why a read failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The peer abandoned the stream (RESET_STREAM, RFC 9000 §19.4).
    #[error("the peer reset the stream with code {0}")]
    Reset(VarInt),
    /// The stream was stopped before.
    #[error("the stream was stopped before")]
    ClosedStream,
    /// The server refused the early data that this stream carried; send it again.
    #[error("the server refused early data")]
    ZeroRttRejected,
    /// The connection is gone.
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
}

/// Why [`RecvStream::received_reset`](crate::stream::RecvStream::received_reset) could not tell.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// The server refused the early data that this stream carried; send it again.
    #[error("the server refused early data")]
    ZeroRttRejected,
    /// The connection is gone.
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
}

impl From<ResetError> for ReadError {
    fn from(error: ResetError) -> Self {
        match error {
            ResetError::ZeroRttRejected => Self::ZeroRttRejected,
            ResetError::ConnectionLost(reason) => Self::ConnectionLost(reason),
        }
    }
}

/// Why [`RecvStream::read_to_end`](crate::stream::RecvStream::read_to_end) failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadToEndError {
    /// The stream holds more than the given limit.
    #[error("the stream is longer than the limit of {0} bytes")]
    TooLong(usize),
    /// Reading failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Why [`RecvStream::read_exact`](crate::stream::RecvStream::read_exact) failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadExactError {
    /// The stream ended before the buffer was full; so many bytes were read.
    #[error("the stream ended after {0} bytes, before the buffer was full")]
    FinishedEarly(usize),
    /// Reading failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Why a datagram was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendDatagramError {
    /// The peer does not take datagrams (RFC 9221 §3).
    #[error("the peer does not support datagrams")]
    UnsupportedByPeer,
    /// Datagrams are switched off here (`max_datagram_size` is 0).
    #[error("datagrams are switched off: `max_datagram_size` is 0")]
    Disabled,
    /// Larger than the path or the peer allows now.
    #[error("larger than the path or the peer allows now")]
    TooLarge,
    /// The connection's queue (`datagram_send_buffer_size`) is full.
    #[error("the datagram queue is full")]
    Full,
    /// The connection is gone.
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
}

/// Why an engine did not start; nothing was left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The datapath could not be opened; the text says what to do.
    #[error("datapath {datapath}: {reason}")]
    Datapath {
        /// Which one.
        datapath: &'static str,
        /// What failed, on what, and the fix.
        reason: String,
    },
    /// A core could not be used.
    #[error("core {core} cannot be used by shard {shard}: {reason}")]
    Core {
        /// The core.
        core: usize,
        /// The shard that should run there.
        shard: usize,
        /// Why not.
        reason: String,
    },
    /// A thread or a descriptor could not be made.
    #[error("{what}: {source}")]
    System {
        /// What was asked of the system.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// TLS set-up failed.
    #[error("TLS: {0}")]
    Tls(String),
}
