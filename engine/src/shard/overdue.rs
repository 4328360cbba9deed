//! Connections whose time is up: handshakes that take too long, connections at their age limit.

use std::time::Instant;

use bytes::Bytes;
use quinn_proto::VarInt;

use super::Shard;
use crate::app::ConnId;
use crate::clock::Clock;
use crate::config::CONNECTION_AGE_CODE;
use crate::datapath::Datapath;
use crate::error::ConnectionError;

impl<D: Datapath, C: Clock> Shard<D, C> {
    /// Closes what [`Protocol::expire`](crate::proto::Protocol::expire) reported, and tells its owner.
    pub(super) fn end_overdue(&mut self, now: Instant, id: ConnId) {
        let config = self.proto.config();
        let (timeout_ms, age_ms_max) = (config.handshake_timeout_ms, config.connection_age_ms_max);
        let Some(conn) = self.proto.conn_in_slot(id.slot).filter(|conn| conn.id == id) else {
            return;
        };
        let is_old = conn.age_deadline.is_some_and(|deadline| deadline <= now);
        if is_old {
            conn.age_deadline = None;
        }
        if conn.inner.is_closed() || conn.inner.is_drained() {
            return;
        }
        let owner = conn.owner;
        let reason = if conn.inner.is_handshaking() {
            let remote = crate::proto::v6(conn.inner.remote_address());
            conn.inner.close(now, VarInt::from_u32(0), Bytes::from_static(b"handshake timeout"));
            self.proto.counters.handshakes_timed_out += 1;
            self.proto.handshake_over(id);
            ConnectionError::HandshakeTimedOut { remote, timeout_ms }
        } else if is_old {
            let words = Bytes::from_static(b"connection age limit reached");
            conn.inner.close(now, CONNECTION_AGE_CODE, words);
            self.proto.counters.connections_aged_out += 1;
            ConnectionError::AgeLimitReached { age_ms_max }
        } else {
            return;
        };
        self.tell_closed(now, id, owner, &reason);
    }
}
