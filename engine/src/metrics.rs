//! Counters of a shard: plain integers while it works, published once per turn.
//!
//! The shard is the only writer; readers take relaxed loads from another core and
//! cost the shard nothing but the cache line's return.

mod histogram;
pub(crate) mod prometheus;
mod server;
mod stats;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crossbeam::utils::CachePadded;

use crate::datapath::{Capabilities, DatapathCounters};

pub(crate) use histogram::Histogram;
pub use histogram::LatencySummary;
#[cfg(test)]
pub(crate) use histogram::Merged;
pub use server::MetricsServer;
pub(crate) use stats::RateWindow;
pub use stats::{Copies, ShardReport, TransportStats};

/// Published cells of a type whose fields are all `u64`, and iteration over its fields.
macro_rules! cells {
    ($type:ident as $cells:ident: $($name:ident: $help:expr,)+) => {
        #[derive(Debug, Default)]
        struct $cells { $($name: AtomicU64,)+ }

        impl $cells {
            fn store(&self, counters: &$type) {
                // Relaxed: each value stands for itself; no other memory is published with it.
                $(self.$name.store(counters.$name, Relaxed);)+
            }

            fn load(&self) -> $type {
                $type { $($name: self.$name.load(Relaxed),)+ }
            }
        }

        impl $type {
            /// Every counter with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }

            /// Every counter with its name and what it counts.
            pub(crate) fn described(
                &self,
            ) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
                [$((stringify!($name), $help, self.$name),)+].into_iter()
            }

            /// Adds another one's counters.
            pub fn add(&mut self, other: &Self) { $(self.$name += other.$name;)+ }
        }
    };
}

macro_rules! counters {
    ($(#[$type_doc:meta])* $type:ident as $cells:ident {
        $($(#[doc = $doc:literal])+ $name:ident,)+
    }) => {
        $(#[$type_doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct $type { $($(#[doc = $doc])+ pub $name: u64,)+ }

        cells! { $type as $cells: $($name: concat!($($doc),+),)+ }
    };
}

counters! {
    /// Counters of one shard, as plain numbers; totals since the engine started.
    ShardCounters as ShardCells {
    /// Turns taken.
    turns,
    /// Turns that found nothing to do.
    turns_idle,
    /// Times that the shard slept.
    parks,
    /// Nanoseconds spent in turns that found work.
    busy_ns,
    /// Connections that exist now, draining ones included.
    connections,
    /// Clients that knocked.
    incoming,
    /// Clients accepted.
    accepted,
    /// Clients refused by a limit.
    incoming_refused,
    /// Clients whose first flight was invalid.
    incoming_failed,
    /// Retry packets sent.
    retries,
    /// Of these, such that send the client to another shard.
    retries_moved,
    /// Connections started by this side.
    connects,
    /// Handshakes that exceeded their deadline.
    handshakes_timed_out,
    /// Connections closed at their age limit.
    connections_aged_out,
    /// Connections that ended.
    closed,
    /// Packets that quinn-proto did not recognise: malformed headers, unknown connections.
    rx_drop_protocol,
    /// Packets for a connection that is no more.
    rx_drop_unknown_connection,
    /// Packets whose connection ID names no shard.
    rx_drop_no_owner,
    /// Packets handed to another shard.
    rx_handed_over,
    /// Packets received from another shard.
    rx_taken_over,
    /// Packets dropped because the other shard's mailbox was full.
    rx_drop_handoff_full,
    /// Stateless replies sent: version negotiation, retry, reset, refusal.
    tx_stateless,
    /// Stateless replies dropped because their queue was full.
    tx_drop_responses,
    /// Packets that the datapath did not take although QUIC counts them as sent.
    tx_drop_datapath,
    /// Batches that could not be sealed; their connections end.
    tx_drop_sealing,
    /// Times that a full TX ring stopped a turn's transmission.
    tx_ring_full,
    /// Packets sent through a closed gate because an ACK was owed.
    tx_owed_acks,
    /// Commands from handles.
    commands,
    /// Streams that async handles hold now.
    streams,
    /// Connection attempts whose handle was dropped before the handshake ended.
    attempts_abandoned,
    /// Connections that started at the remembered rate of their path, which carried it.
    resume_validated,
    /// Connections that remembered their path and did without: it was another, or they sent too little.
    resume_declined,
    /// Connections that started at the remembered rate of their path, which no longer carried it.
    resume_retreated,
    /// Remembered paths that were too old when they were asked for.
    resume_expired,
    /// Calls into the shard's application that panicked.
    app_panics,
    /// Packets that wait for room or for their turn to be sent, now: connections with more to send.
    tx_queue_connections,
    /// Bytes that the handles' small writes were copied to become larger ones.
    handle_copied_bytes,
    }
}

counters! {
    /// What a connection pool did and holds; the first six are present numbers, the others totals.
    PoolCounters as PoolCells {
    /// Peers that the pool remembers.
    peers,
    /// Connections that can be lent, now.
    connections,
    /// Of these, unused ones.
    idle,
    /// Leases that are out, now.
    leases,
    /// Handshakes under way, now.
    connecting,
    /// Callers that wait for one, now.
    waiters,
    /// Checkouts that got a connection at once.
    hits,
    /// Checkouts that had to wait, share a handshake, or were refused.
    misses,
    /// Handshakes started.
    handshakes,
    /// Misses that shared a handshake under way.
    handshakes_saved,
    /// Handshakes that failed.
    handshakes_failed,
    /// Established connections lost, other than by our own closing them.
    lost,
    /// Reconnects scheduled without a caller.
    reconnects,
    /// Connections closed for having been idle too long.
    evicted_idle,
    /// Connections closed because more than `connection_pool_size` were idle.
    evicted_full,
    /// Checkouts refused by an open circuit.
    refused_by_circuit,
    /// Circuits that opened.
    circuits_opened,
    /// Events that no asynchronous reader took in time.
    events_dropped,
    }
}

cells! {
    DatapathCounters as DatapathCells:
    rx_datagrams: "Datagrams handed to the shard.",
    rx_bytes: "Their UDP payload bytes.",
    rx_slow_path: "Datagrams that came through the kernel's socket instead of the rings.",
    rx_drop_malformed: "Not a well-formed Ethernet, IPv6 and UDP packet.",
    rx_drop_checksum: "Wrong UDP checksum, or none.",
    rx_drop_not_ours: "Not addressed to our port or address.",
    rx_drop_too_long: "Longer than any datagram that is accepted.",
    rx_drop_overrun: "A ring or a socket buffer was full.",
    tx_datagrams: "Datagrams accepted for sending.",
    tx_bytes: "Their UDP payload bytes.",
    tx_drop_too_large: "Larger than the interface carries.",
    tx_drop_no_route: "No route to the peer.",
    tx_drop_neighbor: "The next hop's address is unknown.",
    tx_drop_link_down: "The interface is down.",
    tx_drop_io: "The kernel refused it.",
    failovers: "Times that the kernel's socket took over from a failed device.",
    returns: "Times that the device was taken into use again.",
    system_calls: "System calls made to receive, to kick and to send.",
    copied_bytes: "Bytes copied between packet memory and the engine's buffers.",
    frames_free: "AF_XDP: frames of packet memory that are free.",
    frames_fill: "AF_XDP: frames that are with the kernel for receiving.",
    frames_tx: "AF_XDP: frames that are with the kernel for sending.",
}

/// What a shard publishes; shared with readers.
#[derive(Debug, Default)]
pub(crate) struct ShardMetrics {
    /// What carries the shard; written when that changes, never per turn.
    path: Mutex<Option<Capabilities>>,
    shard: CachePadded<ShardCells>,
    datapath: CachePadded<DatapathCells>,
    /// Of the code on the shard and of the handles.
    pools: CachePadded<[PoolCells; 2]>,
    /// Round-trip times, one sample per ACK that acknowledges something new, ns.
    pub(crate) rtt_ns: Histogram,
    /// How long the oldest command waited each time that the mailbox was emptied, ns.
    pub(crate) mailbox_wait_ns: Histogram,
    /// How long each turn took that found work, ns: from the turn's own two clock reads.
    pub(crate) turn_ns: Histogram,
    /// Datagrams received per turn that received any.
    pub(crate) rx_batch: Histogram,
    /// Packets sent per turn that sent any.
    pub(crate) tx_batch: Histogram,
}

impl ShardMetrics {
    pub(crate) fn set_path(&self, path: Capabilities) {
        *self.path.lock().unwrap_or_else(PoisonError::into_inner) = Some(path);
    }

    /// What carries the shard now.
    ///
    /// # Panics
    /// Before the shard's datapath was opened.
    pub(crate) fn path(&self) -> Capabilities {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        path.clone().expect("set before the shard's thread starts")
    }

    pub(crate) fn publish(&self, shard: &ShardCounters, datapath: &DatapathCounters) {
        self.shard.store(shard);
        self.datapath.store(datapath);
    }

    pub(crate) fn publish_pool(&self, index: usize, pool: &PoolCounters) {
        self.pools[index].store(pool);
    }

    pub(crate) fn shard(&self) -> ShardCounters {
        self.shard.load()
    }

    pub(crate) fn datapath(&self) -> DatapathCounters {
        self.datapath.load()
    }

    /// Both pools together.
    pub(crate) fn pool(&self) -> PoolCounters {
        let mut sum = self.pools[0].load();
        sum.add(&self.pools[1].load());
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_counters_are_read_back() {
        let metrics = ShardMetrics::default();
        let shard = ShardCounters { turns: 3, closed: 9, ..Default::default() };
        let datapath = DatapathCounters { rx_bytes: 77, copied_bytes: 5, ..Default::default() };
        metrics.publish(&shard, &datapath);
        assert_eq!(metrics.shard(), shard);
        assert_eq!(metrics.datapath(), datapath);
        let mut sum = metrics.shard();
        sum.add(&shard);
        assert_eq!((sum.turns, sum.closed), (6, 18));
        assert!(sum.iter().any(|(name, value)| name == "closed" && value == 18));
    }
}
