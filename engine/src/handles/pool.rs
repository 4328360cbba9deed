//! The connection pool behind the async handles: callers of other threads, their answers.

use std::sync::Arc;

use futures_channel::oneshot;

use super::{Conn, ConnRef, HandleApp};
use crate::app::{ConnId, ShardCx};
use crate::connection::Connection;
use crate::error::ConnectionError;
use crate::pool::{
    Checkout, CheckoutError, Lease, PeerEndpoint, PoolEvent, PooledConnection, Replay,
};

/// What other threads ask of a shard's pool.
pub(crate) enum PoolCommand {
    Checkout {
        endpoint: PeerEndpoint,
        replay: Replay,
        reply: CheckoutReply,
    },
    CheckIn(Lease),
    WarmUp {
        endpoint: PeerEndpoint,
        connections: usize,
        reply: oneshot::Sender<Result<(), CheckoutError>>,
    },
}

pub(crate) type CheckoutReply = oneshot::Sender<Result<PooledConnection, CheckoutError>>;

impl HandleApp {
    pub(crate) fn handle_pool_command(&mut self, cx: &mut ShardCx<'_>, command: PoolCommand) {
        match command {
            PoolCommand::Checkout { endpoint, replay, reply } => {
                self.checkout(cx, &endpoint, replay, reply);
            }
            PoolCommand::CheckIn(lease) => cx.check_in(lease),
            PoolCommand::WarmUp { endpoint, connections, reply } => {
                let result = cx.pool_peer(&endpoint).and_then(|peer| cx.warm_up(peer, connections));
                let _nobody_waits = reply.send(result);
            }
        }
    }

    fn checkout(
        &mut self,
        cx: &mut ShardCx<'_>,
        endpoint: &PeerEndpoint,
        replay: Replay,
        reply: CheckoutReply,
    ) {
        let token = self.checkouts.insert(reply) as u64;
        let answer = cx.pool_peer(endpoint).and_then(|peer| match replay {
            Replay::Unsafe => cx.checkout(peer, token),
            Replay::Safe => cx.checkout_replay_safe(peer, token),
        });
        match answer {
            Ok(Checkout::Ready(lease)) => self.answer_checkout(cx, token, Ok(lease)),
            Ok(Checkout::Waiting) => {}
            Err(error) => self.answer_checkout(cx, token, Err(error)),
        }
    }

    pub(super) fn answer_checkout(
        &mut self,
        cx: &mut ShardCx<'_>,
        token: u64,
        result: Result<Lease, CheckoutError>,
    ) {
        let reply = self.checkouts.remove(token as usize);
        let result = result.and_then(|lease| match self.conns.get(&lease.conn()) {
            Some(Conn { pooled: Some(conn), .. }) => {
                let connection = Connection::new(conn.clone());
                Ok(PooledConnection::new(connection, lease, self.engine.mailbox(cx.shard())))
            }
            // Its own handles closed it in this very turn.
            _ => {
                cx.check_in(lease);
                Err(CheckoutError::Connect(ConnectionError::ClosedLocally))
            }
        });
        // A caller that no longer waits drops the handle, which checks the lease in.
        let _dropped_handle_checks_in = reply.send(result);
    }

    /// A connection that the pool started: handles share it from now on.
    pub(crate) fn register_pooled(&mut self, cx: &mut ShardCx<'_>, id: ConnId) {
        self.insert(cx, id, None);
        let conn = self.conns.get_mut(&id).expect("just inserted");
        conn.pooled = Some(Arc::new(ConnRef::new(conn.shared.clone())));
        Self::publish(cx, id, conn);
    }

    /// The pool no longer keeps the connection open.
    pub(crate) fn release_pooled(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id) {
            // The last one closes it, by a notice that this turn serves.
            conn.pooled = None;
        }
    }

    pub(super) fn publish_pool_event(&mut self, cx: &mut ShardCx<'_>, event: &PoolEvent) {
        if self.engine.offer_pool_event(event.clone()) {
            cx.proto.pool(cx.owner).counters.events_dropped += 1;
        }
    }
}
