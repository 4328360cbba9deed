//! The shard does what its connection pools ask.

use std::time::Instant;

use bytes::Bytes;
use quinn_proto::VarInt;

use super::Shard;
use crate::app::ShardCx;
use crate::clock::Clock;
use crate::datapath::Datapath;
use crate::error::ConnectionError;
use crate::pool::PoolAction;
use crate::proto::Owner;

impl<D: Datapath, C: Clock> Shard<D, C> {
    /// Starts attempts within this turn's limit and answers callers; `false` when there was nothing.
    pub(super) fn drive_pools(&mut self, now: Instant) -> bool {
        let mut worked = false;
        for owner in [Owner::Handles, Owner::App] {
            while self.pool_connects_left > 0 && self.start_pooled(now, owner) {
                self.pool_connects_left -= 1;
                worked = true;
            }
            while let Some(action) = self.proto.pool(owner).poll_action() {
                worked = true;
                self.perform(now, owner, action);
            }
        }
        worked
    }

    fn start_pooled(&mut self, now: Instant, owner: Owner) -> bool {
        let Some((entry, endpoint)) = self.proto.pool(owner).next_connect() else { return false };
        let remote = endpoint.remote();
        let mtu_bytes = self.datapath.max_udp_payload(&remote);
        let config = endpoint.profile().map(|profile| quinn_proto::ClientConfig::new(profile.tls()));
        let name = endpoint.server_name();
        match self.proto.connect(now, remote, mtu_bytes, name, config, owner) {
            Ok(conn) => {
                let early = self.proto.join_pool(conn, entry);
                if owner == Owner::Handles {
                    let (proto, paths) = (&mut self.proto, &self.datapath);
                    self.handles.register_pooled(&mut ShardCx { proto, paths, now, owner }, conn);
                }
                self.proto.pool(owner).handle_started(entry, conn, early);
            }
            Err(error) => {
                let reason = ConnectionError::NotStarted(error);
                self.proto.pool(owner).handle_closed(now, entry, &reason);
            }
        }
        true
    }

    fn perform(&mut self, now: Instant, owner: Owner, action: PoolAction) {
        match action {
            PoolAction::Ready { token, lease } => {
                let conn = Some(lease.conn());
                self.call(now, owner, conn, |app, cx| app.handle_checkout(cx, token, Ok(lease)));
            }
            PoolAction::Failed { token, error } => {
                self.call(now, owner, None, |app, cx| app.handle_checkout(cx, token, Err(error)));
            }
            PoolAction::Event(event) => {
                tracing::debug!(peer = %event.peer, shard = event.shard, kind = ?event.kind, "pool");
                self.call(now, owner, None, |app, cx| app.handle_pool_event(cx, &event));
            }
            PoolAction::Close { conn } => match owner {
                // Callers that still hold the connection go on; it closes with the last of them.
                Owner::Handles => self.handles.release_pooled(conn),
                Owner::App => {
                    if let Some(connection) = self.proto.touch(conn) {
                        connection.close(now, VarInt::from_u32(0), Bytes::new());
                    }
                }
            },
        }
    }
}
