//! A shard's datagrams that are being sealed elsewhere ([`crate::proto::crypto::offload`]).
//!
//! Datagrams leave in the order in which they were built, whatever order they are sealed in: the
//! peer takes three packets out of order for a loss. All memory is bounded by
//! [`SEAL_JOBS_IN_FLIGHT_MAX`].

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::{Transmit, VarInt};

use super::Shard;
use crate::app::ConnId;
use crate::clock::Clock;
use crate::config::{SEAL_JOB_TIMEOUT_US, SEAL_JOBS_IN_FLIGHT_MAX, SEAL_POLL_INTERVAL_US};
use crate::datapath::{Datapath, TxMeta};
use crate::error::ConnectionError;
use crate::proto::crypto::offload::{Recorded, SealJob, SealProvider, SealQueue, record};
use crate::proto::tx_meta;

/// With this code a connection is closed whose packets cannot be sealed.
const SEAL_FAILED_CODE: VarInt = VarInt::from_u32(0x73_65_61_6c);

/// What becomes of a batch of datagrams.
pub(super) struct Batch {
    pub(super) conn: ConnId,
    pub(super) meta: TxMeta,
    pub(super) segment_bytes: usize,
}

struct InFlight {
    id: u64,
    batch: Batch,
    give_up_at: Instant,
    result: Option<Result<Vec<u8>, String>>,
}

/// Jobs under way, oldest first.
pub(super) struct Sealing {
    provider: String,
    queue: Box<dyn SealQueue>,
    recorded: Vec<Recorded>,
    in_flight: VecDeque<InFlight>,
    next_id: u64,
    /// Buffers that came back.
    spare: Vec<Vec<u8>>,
}

impl Sealing {
    pub(super) fn new(provider: &dyn SealProvider, shard: usize) -> Self {
        Self {
            provider: provider.name().to_owned(),
            queue: provider.queue(shard),
            recorded: Vec::new(),
            in_flight: VecDeque::with_capacity(SEAL_JOBS_IN_FLIGHT_MAX),
            next_id: 0,
            spare: Vec::new(),
        }
    }

    /// Whether another job may be submitted.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight.len() < SEAL_JOBS_IN_FLIGHT_MAX
    }

    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Calls `poll`, noting what it leaves unsealed.
    pub(super) fn record<R>(&mut self, poll: impl FnOnce() -> R) -> R {
        self.recorded.clear();
        record(&mut self.recorded, poll)
    }

    /// Whether the datagrams of the last [`Self::record`] are complete without the provider.
    pub(super) fn is_sealed(&self) -> bool {
        self.recorded.is_empty()
    }

    /// Gives the datagrams of the last [`Self::record`] to the provider; an empty buffer as large
    /// takes their place.
    ///
    /// # Errors
    /// The provider refused a key; `datagrams` is empty.
    pub(super) fn submit(
        &mut self,
        now: Instant,
        batch: Batch,
        datagrams: &mut Vec<u8>,
    ) -> Result<(), String> {
        debug_assert!(self.has_room());
        let packets = self.recorded.drain(..).map(|packet| packet.into_packet(datagrams)).collect();
        let packets = match packets {
            Ok(packets) => packets,
            Err(reason) => {
                datagrams.clear();
                return Err(self.failure(&reason));
            }
        };
        let capacity = datagrams.capacity();
        let empty = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(capacity));
        let datagrams = std::mem::replace(datagrams, empty);
        let id = self.next_id;
        self.next_id += 1;
        let give_up_at = now + Duration::from_micros(SEAL_JOB_TIMEOUT_US);
        self.in_flight.push_back(InFlight { id, batch, give_up_at, result: None });
        self.queue.submit(SealJob { id, datagrams, packets });
        Ok(())
    }

    /// At most one doorbell.
    pub(super) fn flush(&mut self) {
        if !self.in_flight.is_empty() {
            self.queue.flush();
        }
    }

    /// The oldest batch, once it is sealed or has failed.
    pub(super) fn pop(&mut self, now: Instant) -> Option<(Batch, Result<Vec<u8>, String>)> {
        // A provider that invents jobs cannot hold the turn.
        for _ in 0..SEAL_JOBS_IN_FLIGHT_MAX {
            let Some(sealed) = self.queue.poll_sealed() else { break };
            // Unknown: it was given up.
            if let Some(job) = self.in_flight.iter_mut().find(|job| job.id == sealed.id) {
                job.result = Some(sealed.datagrams);
            }
        }
        let oldest = self.in_flight.front_mut()?;
        let result = match oldest.result.take() {
            Some(result) => result,
            None if now < oldest.give_up_at => return None,
            None => Err(format!("no answer for {SEAL_JOB_TIMEOUT_US} µs")),
        };
        let result = result.map_err(|reason| self.failure(&reason));
        let oldest = self.in_flight.pop_front()?;
        Some((oldest.batch, result))
    }

    /// Takes a buffer back.
    pub(super) fn recycle(&mut self, mut buffer: Vec<u8>, capacity: usize) {
        buffer.clear();
        // One of the provider's own may be too small: quinn-proto must never move it.
        if buffer.capacity() >= capacity && self.spare.len() < SEAL_JOBS_IN_FLIGHT_MAX {
            self.spare.push(buffer);
        }
    }

    /// When to look again, if anything is under way.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        (!self.is_idle()).then(|| now + Duration::from_micros(SEAL_POLL_INTERVAL_US))
    }

    fn failure(&self, reason: &str) -> String {
        format!("{}: {reason}", self.provider)
    }
}

/// Calls `poll`, which builds datagrams; with a provider, what it leaves unsealed is noted.
#[inline]
pub(super) fn poll<R>(sealing: &mut Option<Sealing>, poll: impl FnOnce() -> R) -> R {
    match sealing {
        None => poll(),
        Some(sealing) => sealing.record(poll),
    }
}

impl<D: Datapath, C: Clock> Shard<D, C> {
    /// Has `provider` seal what keys made for it leave unsealed.
    pub(crate) fn set_seal_provider(&mut self, provider: &dyn SealProvider) {
        self.sealing = Some(Sealing::new(provider, self.proto.shard_index()));
    }

    /// Whether what is built now could be sealed, now or later.
    #[inline]
    pub(super) fn can_seal(&self) -> bool {
        self.sealing.as_ref().is_none_or(Sealing::has_room)
    }

    /// Whether datagrams are still being sealed.
    pub(super) fn is_sealing(&self) -> bool {
        self.sealing.as_ref().is_some_and(|sealing| !sealing.is_idle())
    }

    /// Sends what was sealed since, oldest first.
    pub(super) fn transmit_sealed(&mut self, now: Instant) -> bool {
        let mut worked = false;
        while self.datapath.transmit_capacity() > 0 {
            let Some((batch, result)) = self.sealing.as_mut().and_then(|sealing| sealing.pop(now))
            else {
                break;
            };
            worked = true;
            match result {
                Ok(mut datagrams) => {
                    let (meta, segment_bytes) = (&batch.meta, batch.segment_bytes);
                    let dropped = self.datapath.transmit_batch(meta, segment_bytes, &mut datagrams);
                    self.proto.counters.tx_drop_datapath += dropped as u64;
                    let capacity = self.batch.capacity();
                    if let Some(sealing) = &mut self.sealing {
                        sealing.recycle(datagrams, capacity);
                    }
                }
                Err(reason) => self.handle_seal_failure(now, batch.conn, reason),
            }
        }
        worked
    }

    /// Gives what was built last to the provider, if it is not sealed; whether it took it or
    /// dropped it.
    #[inline]
    pub(super) fn defer(&mut self, now: Instant, slot: u32, transmit: &Transmit) -> bool {
        match &self.sealing {
            Some(sealing) if !sealing.is_sealed() => self.submit(now, slot, transmit),
            _ => return false,
        }
        true
    }

    fn submit(&mut self, now: Instant, slot: u32, transmit: &Transmit) {
        let Some(conn) = self.proto.conn_in_slot(slot).map(|conn| conn.id) else { return };
        let Some(sealing) = &mut self.sealing else { return };
        let segment_bytes = transmit.segment_size.unwrap_or(transmit.size);
        let batch = Batch { conn, meta: tx_meta(transmit), segment_bytes };
        if let Err(reason) = sealing.submit(now, batch, &mut self.batch) {
            self.handle_seal_failure(now, conn, reason);
        }
    }

    #[cold]
    fn handle_seal_failure(&mut self, now: Instant, id: ConnId, reason: String) {
        self.proto.counters.tx_drop_sealing += 1;
        let Some(owner) = self.proto.conn(id).map(|conn| conn.owner) else { return };
        tracing::error!(shard = self.proto.shard_index(), reason, "packets cannot be sealed");
        if let Some(connection) = self.proto.touch(id) {
            connection.close(now, SEAL_FAILED_CODE, Bytes::from_static(b"sealing failed"));
        }
        self.tell_closed(now, id, owner, &ConnectionError::CryptoProviderFailed(reason));
    }
}
