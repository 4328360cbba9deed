//! Connections that are not there yet: attempts of this side, and clients that knock.

use std::net::SocketAddrV6;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_channel::oneshot;

use super::EngineShared;
use crate::connection::Connection;
use crate::error::ConnectionError;
use crate::handles::{Command as HandleCommand, ConnRef, ConnectReply, Decision};

/// A client that knocked and waits for an answer.
pub(crate) struct Offer {
    pub(super) shard: usize,
    pub(super) key: usize,
    pub(super) remote: SocketAddrV6,
    pub(super) validated: bool,
}

/// A connection attempt; resolves when the handshake is complete. Dropped, it is abandoned.
#[must_use = "a dropped attempt is abandoned"]
pub struct Connecting {
    // First: an attempt that is dropped whole has cancelled its answer before its handle goes.
    answer: oneshot::Receiver<Result<Connection, ConnectionError>>,
    /// The connection itself, where it can be used before its handshake is complete.
    early: Option<oneshot::Receiver<Arc<ConnRef>>>,
}

impl Connecting {
    pub(super) fn new() -> (ConnectReply, Self) {
        let (done, answer) = oneshot::channel();
        let (early_sender, early) = oneshot::channel();
        (ConnectReply::new(done, early_sender), Self { answer, early: Some(early) })
    }

    /// The connection before its handshake is complete; gives the attempt back where that cannot
    /// be. Waits for the shard to begin the attempt, not for the network. Not cancel-safe: the
    /// dropped future abandons the attempt.
    ///
    /// **Clients** may send 0-RTT data (RFC 9001 §4.6) with the `zero_rtt` setting, a TLS
    /// configuration that allows early data, and a session remembered from an earlier connection to
    /// the server. Such data can be replayed by whoever records it: send only what does no harm
    /// when it is executed twice. The server may refuse it although it takes the connection:
    /// [`ZeroRttAccepted`] tells. Streams opened before then fail with `ZeroRttRejected`
    /// ([`WriteError`](crate::error::WriteError), [`ReadError`](crate::error::ReadError)), and
    /// nothing of it is sent again; datagrams sent before are lost.
    ///
    /// **Servers** always get the connection: they read early data, whose streams say
    /// [`RecvStream::is_0rtt`](crate::stream::RecvStream::is_0rtt), and may answer before the
    /// client has proved who it is (0.5-RTT data, RFC 8446 §2.3):
    /// [`Connection::peer_identity`] and [`Connection::alpn`] are known when [`ZeroRttAccepted`]
    /// resolves.
    ///
    /// # Errors
    /// The attempt, which goes on; also where it failed at once, and says why when awaited.
    pub async fn into_0rtt(mut self) -> Result<(Connection, ZeroRttAccepted), Self> {
        let Some(early) = self.early.take() else { return Err(self) };
        match early.await {
            Ok(conn) => Ok((Connection::new(conn), ZeroRttAccepted { answer: self.answer })),
            Err(oneshot::Canceled) => Err(self),
        }
    }
}

impl Future for Connecting {
    type Output = Result<Connection, ConnectionError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(Pin::new(&mut self.answer).poll(cx));
        // The answer holds the connection from now on.
        self.early = None;
        Poll::Ready(answer.unwrap_or(Err(ConnectionError::EngineStopped)))
    }
}

/// Resolves when the handshake of a connection is over that was used before: whether early data
/// was accepted. On servers `true`. `false` as well when the handshake failed, of which
/// [`Connection::closed`] tells the reason.
///
/// May be dropped at any time; the connection is not touched by it.
#[derive(Debug)]
pub struct ZeroRttAccepted {
    answer: oneshot::Receiver<Result<Connection, ConnectionError>>,
}

impl Future for ZeroRttAccepted {
    type Output = bool;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<bool> {
        let answer = ready!(Pin::new(&mut self.answer).poll(cx));
        let connection = answer.ok().and_then(Result::ok);
        Poll::Ready(connection.is_some_and(|connection| connection.was_early_data_accepted()))
    }
}

/// A client that knocks. Dropped without a decision, it is refused.
pub struct Incoming {
    offer: Option<Offer>,
    shared: Arc<EngineShared>,
}

impl Incoming {
    pub(super) fn new(offer: Offer, shared: Arc<EngineShared>) -> Self {
        Self { offer: Some(offer), shared }
    }

    /// The client's address, validated or not.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddrV6 {
        self.offer.as_ref().expect("taken only by a decision").remote
    }

    /// Whether the client has proved that it receives packets at its address.
    #[must_use]
    pub fn remote_address_validated(&self) -> bool {
        self.offer.as_ref().expect("taken only by a decision").validated
    }

    /// Goes on with the handshake. [`Connecting::into_0rtt`] gives the connection before its end.
    pub fn accept(mut self) -> Connecting {
        let (reply, connecting) = Connecting::new();
        self.decide(Decision::Accept(reply));
        connecting
    }

    /// Refuses the client with CONNECTION_REFUSED.
    pub fn refuse(mut self) {
        self.decide(Decision::Refuse);
    }

    /// Asks the client to prove its address (RFC 9000 §8.1.2). One that has already is refused.
    pub fn retry(mut self) {
        self.decide(Decision::Retry);
    }

    /// Forgets the client without an answer.
    pub fn ignore(mut self) {
        self.decide(Decision::Ignore);
    }

    fn decide(&mut self, decision: Decision) {
        if let Some(Offer { shard, key, .. }) = self.offer.take() {
            self.shared.mailboxes[shard].notify(HandleCommand::Incoming { key, decision });
        }
    }
}

/// Awaited, it is accepted.
impl IntoFuture for Incoming {
    type Output = Result<Connection, ConnectionError>;
    type IntoFuture = Connecting;

    fn into_future(self) -> Connecting {
        self.accept()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.decide(Decision::Refuse);
    }
}
