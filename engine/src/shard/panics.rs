//! What a panic in the application's code on the shard ends: the connection that the call was about, and
//! nothing else ([`ShardApp`](crate::app::ShardApp) has the table).

use std::any::Any;
use std::time::Instant;

use bytes::Bytes;

use super::{APP_PANIC_CODE, Shard};
use crate::app::ConnId;
use crate::clock::Clock;
use crate::datapath::Datapath;
use crate::error::ConnectionError;
use crate::proto::Owner;

impl<D: Datapath, C: Clock> Shard<D, C> {
    #[cold]
    pub(super) fn handle_app_panic(
        &mut self,
        now: Instant,
        conn: Option<ConnId>,
        payload: &(dyn Any + Send),
    ) {
        self.proto.counters.app_panics += 1;
        let shard = self.proto.shard_index();
        let panic = panic_text(payload);
        tracing::error!(shard, panic, ?conn, "the shard's application panicked");
        if let Some(conn) = conn {
            self.close_panicked(now, conn);
        }
    }

    /// Ends the client that a call accepted before it panicked.
    #[cold]
    pub(super) fn close_accepted(&mut self, now: Instant) {
        if let Some(conn) = self.proto.accepted_last.take() {
            self.close_panicked(now, conn);
        }
    }

    fn close_panicked(&mut self, now: Instant, id: ConnId) {
        if let Some(connection) = self.proto.touch(id) {
            connection.close(now, APP_PANIC_CODE, Bytes::from_static(b"application panicked"));
        }
        self.proto.handshake_over(id);
        // The application and its pool are told once; a panic in `handle_closed` is only counted.
        self.tell_closed(now, id, Owner::App, &ConnectionError::AppPanicked);
    }
}

/// The message of a panic.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
