//! Counters of a shard: plain integers while it works, published once per turn.
//!
//! The shard is the only writer; readers take relaxed loads from another core and
//! cost the shard nothing but the cache line's return.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crossbeam::utils::CachePadded;

use crate::datapath::DatapathCounters;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Counters of one shard, as plain numbers; totals since the engine started.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct ShardCounters { $($(#[$doc])* pub $name: u64,)+ }

        impl ShardCounters {
            /// Every counter with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }

            /// Adds another shard's counters.
            pub fn add(&mut self, other: &Self) { $(self.$name += other.$name;)+ }
        }

        #[derive(Debug, Default)]
        struct Cells { $($name: AtomicU64,)+ }

        impl Cells {
            fn store(&self, counters: &ShardCounters) {
                // Relaxed: each value stands for itself; no other memory is published with it.
                $(self.$name.store(counters.$name, Relaxed);)+
            }

            fn load(&self) -> ShardCounters {
                ShardCounters { $($name: self.$name.load(Relaxed),)+ }
            }
        }
    };
}

counters! {
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
    /// Connections started by this side.
    connects,
    /// Handshakes that exceeded their deadline.
    handshakes_timed_out,
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
    /// Calls into the shard's application that panicked.
    app_panics,
}

/// What a shard publishes; shared with readers.
#[derive(Debug, Default)]
pub(crate) struct ShardMetrics {
    shard: CachePadded<Cells>,
    datapath: CachePadded<DatapathCells>,
}

macro_rules! datapath_cells {
    ($($name:ident,)+) => {
        #[derive(Debug, Default)]
        struct DatapathCells { $($name: AtomicU64,)+ }

        impl DatapathCells {
            fn store(&self, counters: &DatapathCounters) {
                $(self.$name.store(counters.$name, Relaxed);)+
            }

            fn load(&self) -> DatapathCounters {
                DatapathCounters { $($name: self.$name.load(Relaxed),)+ }
            }
        }

        impl DatapathCounters {
            /// Every counter with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }

            /// Adds another datapath's counters.
            pub fn add(&mut self, other: &Self) { $(self.$name += other.$name;)+ }
        }
    };
}

datapath_cells! {
    rx_datagrams, rx_bytes, rx_slow_path, rx_drop_malformed, rx_drop_checksum,
    rx_drop_not_ours, rx_drop_too_long, rx_drop_overrun, tx_datagrams, tx_bytes,
    tx_drop_too_large, tx_drop_no_route, tx_drop_neighbor, tx_drop_link_down,
    tx_drop_io, system_calls, copied_bytes,
}

impl ShardMetrics {
    pub(crate) fn publish(&self, shard: &ShardCounters, datapath: &DatapathCounters) {
        self.shard.store(shard);
        self.datapath.store(datapath);
    }

    pub(crate) fn shard(&self) -> ShardCounters {
        self.shard.load()
    }

    pub(crate) fn datapath(&self) -> DatapathCounters {
        self.datapath.load()
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
