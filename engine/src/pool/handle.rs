//! A pooled connection in the hands of other threads.

use std::ops::Deref;

use super::Lease;
use crate::connection::Connection;
use crate::handles::{Command, PoolCommand};
use crate::shard::mailbox::Mailbox;

/// A connection lent by the pool: a [`Connection`] that goes back when it is dropped.
///
/// Others may use the same connection at the same time. Clones of the inner [`Connection`] stay
/// usable after it went back; the pool may then close its side as idle, and the connection ends
/// with the last clone.
#[derive(Debug)]
pub struct PooledConnection {
    connection: Connection,
    is_early: bool,
    /// Taken when dropped.
    lease: Option<Lease>,
    mailbox: Mailbox,
}

impl PooledConnection {
    pub(crate) fn new(connection: Connection, lease: Lease, mailbox: Mailbox) -> Self {
        Self { connection, is_early: lease.is_early(), lease: Some(lease), mailbox }
    }

    /// Whether it was lent before its handshake was complete; see
    /// [`Lease::is_early`](super::Lease::is_early). Streams that the server refused fail with
    /// [`WriteError::ZeroRttRejected`](crate::error::WriteError::ZeroRttRejected).
    #[must_use]
    pub fn is_early(&self) -> bool {
        self.is_early
    }
}

impl Deref for PooledConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            self.mailbox.notify(Command::Pool(PoolCommand::CheckIn(lease)));
        }
    }
}
