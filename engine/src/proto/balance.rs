//! Which shard takes a new client.
//!
//! A client's first Initials go to one shard by the hash of an ID that it chose: all shards agree,
//! whatever arrives where, and a ClientHello of several packets meets at one place. The hash spreads
//! evenly, but connections do not end evenly. A Retry (RFC 9000 §8.1.2) is the protocol's own way to
//! move a client on: the ID that it carries is the destination of all that follows, so an ID of
//! another shard sends the client there, where its token is as good as here.
//!
//! A Retry that is due anyway costs nothing more and always goes to the less busy of two shards
//! picked at random: two, because a choice of all would send everybody to the same shard until its
//! count has caught up. A Retry for balance alone costs the client a round trip and is sent only
//! where this shard holds far more than the least busy one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

use crossbeam::utils::CachePadded;

use super::Protocol;
use crate::app::Incoming;
use crate::config::{BALANCE_IMBALANCE_CONNECTIONS, RetryPolicy};

/// Connections of each shard, written by itself, read by all.
#[derive(Clone)]
pub(crate) struct Loads(Arc<[CachePadded<AtomicUsize>]>);

impl Loads {
    pub(crate) fn new(shards: usize) -> Self {
        Self((0..shards).map(|_| CachePadded::default()).collect())
    }

    // Relaxed throughout: an old count makes a choice a little worse, no more.
    fn of(&self, shard: usize) -> usize {
        self.0[shard].load(Relaxed)
    }

    fn least(&self) -> usize {
        (0..self.0.len()).map(|shard| self.of(shard)).min().unwrap_or(0)
    }
}

/// Whose ID the generator makes next, while a Retry is written; none: its own shard's.
#[derive(Clone, Default)]
pub(crate) struct Aim(Arc<AtomicU32>);

impl Aim {
    /// Zero is nobody: shards are counted from one here.
    fn set(&self, shard: Option<usize>) {
        self.0.store(shard.map_or(0, |shard| shard as u32 + 1), Relaxed);
    }

    pub(super) fn shard(&self) -> Option<u8> {
        self.0.load(Relaxed).checked_sub(1).map(|shard| shard as u8)
    }
}

/// One shard's view of the others.
pub(crate) struct Balance {
    loads: Loads,
    shard: usize,
    aim: Aim,
    noise: u64,
}

impl Balance {
    pub(crate) fn new(loads: Loads, shard: usize, aim: Aim, seed: u64) -> Self {
        Self { loads, shard, aim, noise: seed | 1 }
    }

    /// This shard has so many connections now.
    pub(crate) fn note(&self, connections: usize) {
        self.loads.0[self.shard].store(connections, Relaxed);
    }

    /// Far more than the least busy shard, and many.
    fn is_overloaded(&self) -> bool {
        self.loads.0.len() > 1
            && self.loads.of(self.shard) > 2 * self.loads.least() + BALANCE_IMBALANCE_CONNECTIONS
    }

    /// The less busy of two.
    fn choose(&mut self) -> usize {
        let shards = self.loads.0.len();
        let (first, second) = (self.draw(shards), self.draw(shards));
        if self.loads.of(second) < self.loads.of(first) { second } else { first }
    }

    /// A shard, by a xorshift: nobody gains by guessing it.
    fn draw(&mut self, shards: usize) -> usize {
        self.noise ^= self.noise << 13;
        self.noise ^= self.noise >> 7;
        self.noise ^= self.noise << 17;
        (self.noise >> 32) as usize % shards
    }
}

impl Protocol {
    /// Applies the shard's own limits to a client before the application sees it.
    pub(super) fn screen(&mut self, incoming: quinn_proto::Incoming) -> Option<Incoming> {
        if !self.accepting || self.live >= self.config.connections_per_shard_max {
            self.counters.incoming_refused += 1;
            self.refuse(incoming);
            return None;
        }
        let demand = match self.config.retry {
            RetryPolicy::Never => false,
            RetryPolicy::Always => true,
            RetryPolicy::UnderLoad => {
                self.handshaking > self.config.incoming_max / 4 || self.balance.is_overloaded()
            }
        };
        if demand && !incoming.remote_address_validated() {
            match self.retry(incoming) {
                Ok(()) => return None,
                Err(incoming) => return Some(Incoming::new(incoming, self.mailbox.clone())),
            }
        }
        if self.handshaking >= self.config.incoming_max {
            self.counters.incoming_refused += 1;
            self.refuse(incoming);
            return None;
        }
        Some(Incoming::new(incoming, self.mailbox.clone()))
    }

    /// Demands that the client shows its address, and tells it to come back to a shard with room.
    // The large error hands the client back; it lives on the stack for one call.
    #[allow(clippy::result_large_err)]
    pub(crate) fn retry(
        &mut self,
        incoming: quinn_proto::Incoming,
    ) -> Result<(), quinn_proto::Incoming> {
        self.response_buffer.clear();
        let target = self.balance.choose();
        self.balance.aim.set(Some(target));
        let retried = self.endpoint.retry(incoming, &mut self.response_buffer);
        self.balance.aim.set(None);
        match retried {
            Ok(transmit) => {
                self.counters.retries += 1;
                self.counters.retries_moved += u64::from(target != self.shard);
                self.push_response(&transmit);
                Ok(())
            }
            Err(error) => Err(error.into_incoming()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balance(loads: &Loads, shard: usize) -> Balance {
        Balance::new(loads.clone(), shard, Aim::default(), 7)
    }

    #[test]
    fn choices_even_out_what_was_uneven() {
        let loads = Loads::new(4);
        let mut shards: Vec<Balance> = (0..4).map(|shard| balance(&loads, shard)).collect();
        let mut counts = [900, 100, 0, 500];
        for (shard, count) in counts.iter().enumerate() {
            shards[shard].note(*count);
        }
        for client in 0..2500 {
            let chosen = shards[client % 4].choose();
            counts[chosen] += 1;
            shards[chosen].note(counts[chosen]);
        }
        assert_eq!(counts.iter().sum::<usize>(), 4000);
        // Both picks are the fullest shard once in sixteen times.
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    #[test]
    fn only_a_large_difference_costs_a_round_trip() {
        let loads = Loads::new(2);
        let (busy, idle) = (balance(&loads, 0), balance(&loads, 1));
        busy.note(BALANCE_IMBALANCE_CONNECTIONS);
        assert!(!busy.is_overloaded());
        busy.note(BALANCE_IMBALANCE_CONNECTIONS + 1);
        assert!(busy.is_overloaded() && !idle.is_overloaded());
        idle.note(10);
        assert!(!busy.is_overloaded());
        let alone = balance(&Loads::new(1), 0);
        alone.note(1_000_000);
        assert!(!alone.is_overloaded(), "there is nowhere else to go");
    }
}
