//! A pool's slow half: failures, reconnects, which peers are remembered.

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use super::{Pool, PoolAction, spread};
use crate::error::ConnectionError;
use crate::pool::circuit::Admission;
use crate::pool::{CheckoutError, PeerEndpoint, PeerId, PoolEvent, PoolEventKind};

impl Pool {
    // --- failures ---------------------------------------------------------------------

    pub(super) fn attempt_failed(&mut self, now: Instant, index: u32, reason: &ConnectionError) {
        self.fail_waiters(index, &CheckoutError::Connect(reason.clone()));
        if is_deliberate(reason) || self.stopped {
            return;
        }
        self.counters.handshakes_failed += 1;
        let peer = &mut self.peers[index as usize];
        let pause = peer.circuit.fail(now, &self.setup.limits, &mut self.rng);
        let failures = peer.circuit.failures();
        if pause.opened {
            // Nobody waits and nobody asked for it to be warm: the next caller tries again.
            peer.wanted = false;
        }
        let reconnects = peer.wanted || peer.ready < peer.warm;
        self.emit(index, PoolEventKind::AttemptFailed { reason: reason.clone(), failures });
        if pause.opened {
            self.counters.circuits_opened += 1;
            self.emit(index, PoolEventKind::CircuitOpened { retry_after: pause.duration });
        }
        if reconnects {
            self.schedule(now, index, pause.duration);
        }
    }

    pub(super) fn connection_lost(
        &mut self,
        now: Instant,
        index: u32,
        reason: &ConnectionError,
        leases: u32,
    ) {
        if self.stopped {
            return;
        }
        let peer = &mut self.peers[index as usize];
        if is_deliberate(reason) {
            if peer.ready + peer.connecting < peer.warm {
                let pause = peer.circuit.lose(now, &self.setup.limits, &mut self.rng);
                self.schedule(now, index, pause.duration);
            }
            return;
        }
        self.counters.lost += 1;
        peer.wanted |= leases > 0 && peer.ready + peer.connecting == 0;
        let reconnects = peer.wanted || peer.ready + peer.connecting < peer.warm;
        self.emit(index, PoolEventKind::Lost { reason: reason.clone(), leases });
        if reconnects {
            let peer = &mut self.peers[index as usize];
            let pause = peer.circuit.lose(now, &self.setup.limits, &mut self.rng);
            self.schedule(now, index, pause.duration);
        }
    }

    fn schedule(&mut self, now: Instant, index: u32, after: Duration) {
        self.counters.reconnects += 1;
        self.arm(index, now + after);
        self.emit(index, PoolEventKind::ReconnectScheduled { after });
    }

    fn arm(&mut self, index: u32, at: Instant) {
        let peer = &mut self.peers[index as usize];
        if !std::mem::replace(&mut peer.armed, true) {
            self.retries.push(Reverse((at, index, peer.generation)));
        }
    }

    /// Starts the attempts that the peer needs, or files when they may start.
    pub(super) fn settle(&mut self, now: Instant, index: u32) {
        loop {
            let peer = &self.peers[index as usize];
            let wanted = u32::from(peer.wanted || peer.waiters.len() > 0);
            let needed = wanted.max(peer.warm).min(peer.limit);
            let there = peer.ready + peer.connecting;
            // One attempt at a time while the peer is failing.
            let must_wait = peer.circuit.failures() > 0 && peer.connecting > 0;
            if self.stopped || there >= needed || must_wait {
                break;
            }
            match peer.circuit.admit(now) {
                Admission::Now => self.start(index),
                Admission::At(at) | Admission::Refused(at) => {
                    self.arm(index, at);
                    break;
                }
            }
        }
        self.update_vacancy(index);
    }

    // --- peers --------------------------------------------------------------------------

    pub(super) fn known(&self, id: PeerId) -> Result<u32, CheckoutError> {
        match self.peers.get(id.index as usize) {
            Some(peer) if peer.generation == id.generation => Ok(id.index),
            _ => Err(CheckoutError::UnknownPeer),
        }
    }

    /// Connections that this pool may have to a peer.
    pub(super) fn limit_for(&self, endpoint: &PeerEndpoint) -> u32 {
        let (shards, total) = (self.setup.shards, self.setup.limits.connections_per_peer_max);
        let (home, width) = spread(endpoint, shards, total);
        let offset = (self.setup.shard % shards + shards - home) % shards;
        let share = total / width + usize::from(offset < total % width);
        u32::try_from(share.max(1)).expect("validated: at most 1024")
    }

    pub(super) fn update_vacancy(&mut self, index: u32) {
        let peer = &mut self.peers[index as usize];
        let is_vacant = peer.endpoint.is_some()
            && peer.entries == 0
            && peer.waiters.len() == 0
            && peer.warm == 0
            && !peer.wanted;
        let was_vacant = std::mem::replace(&mut peer.vacant, is_vacant);
        match (was_vacant, is_vacant) {
            (false, true) => self.vacant.push_back(&mut self.peers, index, |p| &mut p.vacant_link),
            (true, false) => self.vacant.remove(&mut self.peers, index, |p| &mut p.vacant_link),
            _ => {}
        }
    }

    pub(super) fn forget_vacant_peer(&mut self) -> Option<u32> {
        let index = self.vacant.pop_front(&mut self.peers, |peer| &mut peer.vacant_link)?;
        let peer = &mut self.peers[index as usize];
        peer.vacant = false;
        peer.generation = peer.generation.wrapping_add(1);
        let endpoint = peer.endpoint.take().expect("vacant peers have an endpoint");
        self.by_endpoint.remove(&endpoint);
        Some(index)
    }

    pub(super) fn idle_timeout(&self) -> Option<Duration> {
        let ms = self.setup.limits.idle_timeout_ms;
        (ms != 0).then(|| Duration::from_millis(ms))
    }

    pub(super) fn emit(&mut self, index: u32, kind: PoolEventKind) {
        let peer = self.peers[index as usize].endpoint.clone().expect("a peer in use");
        let event = PoolEvent { peer, shard: self.setup.shard, kind };
        self.actions.push_back(PoolAction::Event(event));
    }
}

/// Whether this side ended it: no failure of the peer.
fn is_deliberate(reason: &ConnectionError) -> bool {
    use ConnectionError::{AppPanicked, ClosedLocally, EngineStopped};
    matches!(reason, ClosedLocally | EngineStopped | AppPanicked)
}
