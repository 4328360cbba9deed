//! Connections before the end of their handshake: attempts and who waits for them, 0-RTT.
//!
//! A connection that can carry data at once is given to its attempt as a handle, which the attempt
//! may turn into (`into_0rtt`). It is the same handle that the answer carries after the handshake:
//! the connection is closed when all are gone, not when one is.

use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use bytes::Bytes;
use futures_channel::oneshot;
use quinn_proto::{Dir, VarInt};

use super::{Command, Conn, ConnRef, HandleApp, RecvEnd};
use crate::app::{ConnId, ShardCx};
use crate::connection::Connection;
use crate::error::{ConnectError, ConnectionError};
use crate::shard::mailbox::Mailbox;

type Answer = oneshot::Sender<Result<Connection, ConnectionError>>;

/// Where the outcome of a connection attempt goes.
pub(crate) struct ConnectReply {
    done: Answer,
    early: oneshot::Sender<Arc<ConnRef>>,
}

impl ConnectReply {
    pub(crate) fn new(done: Answer, early: oneshot::Sender<Arc<ConnRef>>) -> Self {
        Self { done, early }
    }

    /// Whether the handle was dropped already.
    pub(crate) fn is_canceled(&self) -> bool {
        self.done.is_canceled()
    }

    /// The attempt could not even start.
    pub(crate) fn fail(self, error: ConnectError) {
        self.end(ConnectionError::NotStarted(error));
    }

    /// The attempt is over.
    pub(super) fn end(self, error: ConnectionError) {
        // The caller may have dropped its future: nobody is left to tell.
        let _nobody_waits = self.done.send(Err(error));
    }

    pub(super) fn into_parts(self) -> (Answer, oneshot::Sender<Arc<ConnRef>>) {
        (self.done, self.early)
    }
}

/// Wakes the shard when the handle of a connection attempt is dropped.
struct AttemptDropped {
    mailbox: Mailbox,
    id: ConnId,
}

impl Wake for AttemptDropped {
    fn wake(self: Arc<Self>) {
        self.mailbox.notify(Command::Abandoned(self.id));
    }
}

/// Makes the shard hear of it when nobody waits for the answer any more; `true` if so already.
pub(super) fn watch_attempt(answer: &mut Answer, mailbox: &Mailbox, id: ConnId) -> bool {
    let dropped = Waker::from(Arc::new(AttemptDropped { mailbox: mailbox.clone(), id }));
    answer.poll_canceled(&mut Context::from_waker(&dropped)).is_ready()
}

impl HandleApp {
    /// Nobody waits for this handshake any more: it ends here, the peer is told.
    pub(super) fn abandon_attempt(&mut self, cx: &mut ShardCx<'_>, id: ConnId) {
        // Connected meanwhile: the reply carried the handle, whose drop closes the connection.
        // In use before the handshake's end: likewise.
        let is_attempt = |conn: &Conn| conn.connecting.is_some() && conn.early.strong_count() == 0;
        if !self.conns.get(&id).is_some_and(is_attempt) {
            return;
        }
        cx.proto.counters.attempts_abandoned += 1;
        cx.close(id, VarInt::from_u32(0), Bytes::new());
        cx.proto.report_closed(id);
        self.forget(id, &ConnectionError::ClosedLocally);
    }

    /// Gives the attempt its connection, where it can carry data already.
    pub(super) fn offer_early(
        cx: &mut ShardCx<'_>,
        id: ConnId,
        conn: &mut Conn,
        early: oneshot::Sender<Arc<ConnRef>>,
    ) {
        if cx.proto.may_be_used_early(id) {
            let handle = Arc::new(ConnRef::new(conn.shared.clone()));
            conn.early = Arc::downgrade(&handle);
            Self::publish(cx, id, conn);
            // An attempt that was dropped meanwhile drops the handle, which closes the connection.
            let _dropped_handle_closes = early.send(handle);
        }
    }

    /// What the peer allows is known now: streams that waited for it are opened.
    pub(crate) fn handle_handshake_data(&mut self, cx: &mut ShardCx<'_>, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        for dir in [Dir::Bi, Dir::Uni] {
            Self::open_streams(cx, id, conn, dir, &mut self.streams);
        }
    }

    /// The handshake is complete: what is opened from now on is not early.
    pub(super) fn end_early(
        cx: &mut ShardCx<'_>,
        id: ConnId,
        conn: &mut Conn,
        streams: &mut usize,
    ) {
        if cx.early_data_accepted(id) == Some(false) {
            // The streams that carried it are void (RFC 9001 §4.6.2).
            *streams -= conn.streams.len();
            for (_, stream) in conn.streams.drain() {
                stream.shared.reject_early();
                stream.shared.end_recv(RecvEnd::Rejected);
                stream.shared.wake_all_senders();
            }
        }
        let may_have_received_early = cx.proto.has_early_keys(id);
        for dir in [Dir::Bi, Dir::Uni] {
            // Came with the packets that ended the handshake, or before: nobody can tell.
            Self::take_streams(cx, id, conn, dir, may_have_received_early, streams);
            Self::open_streams(cx, id, conn, dir, streams);
        }
    }
}
