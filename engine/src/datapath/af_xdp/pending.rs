//! Datagrams that wait for their next hop's link-layer address.
//!
//! The queue holds copies, since the caller's scratch is reused; it is bounded
//! in number and in time, and empty almost always: only the first datagrams to
//! a peer that the kernel has not heard of pass through it. It is the one place
//! on the transmit side that allocates per packet.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::datapath::TxMeta;

/// What became of a waiting datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// Sent, or dropped and counted: forget it.
    Done,
    /// Still no answer, or no room.
    Still,
}

#[derive(Debug)]
struct Pending {
    since: Instant,
    meta: TxMeta,
    payload: Box<[u8]>,
}

/// The queue.
#[derive(Debug)]
pub(super) struct PendingQueue {
    waiting: VecDeque<Pending>,
    limit: usize,
    patience: Duration,
}

impl PendingQueue {
    /// At most `limit` datagrams, each for at most `patience`.
    pub(super) fn new(limit: usize, patience: Duration) -> Self {
        Self { waiting: VecDeque::with_capacity(limit), limit, patience }
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Lets a datagram wait; false if too many do already.
    pub(super) fn push(&mut self, now: Instant, meta: &TxMeta, payload: &[u8]) -> bool {
        if self.waiting.len() >= self.limit {
            return false;
        }
        self.waiting.push_back(Pending { since: now, meta: *meta, payload: payload.into() });
        true
    }

    /// Offers each waiting datagram to `attempt`, in order, and keeps those that
    /// must wait on. Returns how many were given up because they waited too long.
    pub(super) fn retry(
        &mut self,
        now: Instant,
        mut attempt: impl FnMut(&TxMeta, &[u8]) -> Waiting,
    ) -> u64 {
        let mut expired = 0;
        self.waiting.retain(|pending| match attempt(&pending.meta, &pending.payload) {
            Waiting::Done => false,
            Waiting::Still => {
                let keep = now.saturating_duration_since(pending.since) < self.patience;
                expired += u64::from(!keep);
                keep
            }
        });
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::Ecn;
    use std::net::{Ipv6Addr, SocketAddrV6};

    fn meta(port: u16) -> TxMeta {
        let remote = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
        TxMeta { remote, local: None, ecn: Ecn::Ect0 }
    }

    #[test]
    fn full_then_sent_in_order() {
        let now = Instant::now();
        let mut queue = PendingQueue::new(2, Duration::from_secs(1));
        assert!(queue.push(now, &meta(1), b"one"));
        assert!(queue.push(now, &meta(2), b"two"));
        assert!(!queue.push(now, &meta(3), b"three"), "two may wait");
        let mut sent = Vec::new();
        let expired = queue.retry(now, |meta, payload| {
            sent.push((meta.remote.port(), payload.to_vec()));
            Waiting::Done
        });
        assert_eq!(sent, [(1, b"one".to_vec()), (2, b"two".to_vec())]);
        assert_eq!(expired, 0);
        assert!(queue.is_empty());
    }

    #[test]
    fn the_stale_are_given_up_and_the_fresh_stay() {
        let start = Instant::now();
        let mut queue = PendingQueue::new(2, Duration::from_secs(1));
        queue.push(start, &meta(1), b"old");
        queue.push(start + Duration::from_millis(600), &meta(2), b"young");
        let later = start + Duration::from_secs(1);
        assert_eq!(queue.retry(later, |_, _| Waiting::Still), 1);
        let mut left = Vec::new();
        queue.retry(later, |meta, _| {
            left.push(meta.remote.port());
            Waiting::Still
        });
        assert_eq!(left, [2]);
    }
}
