//! The end of an engine: ordered with a grace, or dropped.

use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use quinn_proto::VarInt;

use super::Engine;
use crate::shard::mailbox::{Command, ShutdownOrder};

impl Engine {
    /// Stops accepting, lets streams go on for `grace`, closes what is left with `code` and
    /// `reason`, and waits for the end. Connections that had to be cut off are reported.
    pub async fn shutdown(self, grace: Duration, code: VarInt, reason: &[u8]) -> ShutdownReport {
        let connections_at_order = self.order_shutdown(grace, code, reason);
        loop {
            let listener = self.shared.ended.listen();
            if !self.shared.is_running() {
                break;
            }
            listener.await;
        }
        self.join();
        self.report(connections_at_order)
    }

    /// As [`shutdown`](Self::shutdown), blocking this thread.
    pub fn shutdown_blocking(self, grace: Duration, code: VarInt, reason: &[u8]) -> ShutdownReport {
        let connections_at_order = self.order_shutdown(grace, code, reason);
        self.join();
        self.report(connections_at_order)
    }

    /// Valid once every shard has ended.
    fn report(&self, connections_at_order: u64) -> ShutdownReport {
        ShutdownReport {
            connections_at_order,
            connections_cut_off: self.shared.connections_cut_off.load(Relaxed),
            streams_cut_off: self.shared.streams_cut_off.load(Relaxed),
        }
    }

    /// Orders every shard to end; returns the connections that exist.
    fn order_shutdown(&self, grace: Duration, code: VarInt, reason: &[u8]) -> u64 {
        let connections = self.stats().iter().map(|stats| stats.shard.connections).sum();
        let order = ShutdownOrder { code, reason: Bytes::copy_from_slice(reason), grace };
        for mailbox in self.shared.mailboxes.iter() {
            let mut command = Command::Shutdown(order.clone());
            // A full mailbox empties with the shard's next turn; a stopped shard needs no order.
            while let Err(back) = mailbox.push(command) {
                if !self.shared.is_running() {
                    break;
                }
                command = back;
                std::thread::yield_now();
            }
        }
        connections
    }

    fn join(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a shard's thread panicked");
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.shared.is_running() {
            self.order_shutdown(Duration::ZERO, VarInt::from_u32(0), b"");
        }
        self.join();
    }
}

/// What a shutdown found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Connections that existed when the order was given, draining ones included.
    pub connections_at_order: u64,
    /// Connections that were still open at the deadline and were closed by the shutdown.
    pub connections_cut_off: u64,
    /// Streams of those connections whose sending half was not finished and acknowledged: the
    /// peer may lack a part of their data.
    pub streams_cut_off: u64,
}
