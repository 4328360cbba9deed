//! Credit that grows with use: how many streams the peer may open.
//!
//! quinn-proto keeps a table entry for every stream that it allows, used or not. A connection
//! therefore starts with a small part of `max_concurrent_streams` and is given more when the peer
//! has more than half of it open, or opens more than half of it within a round trip. The peer is
//! never held at less than it uses: it reaches the configured limit five times as far with each
//! round trip.

use std::time::{Duration, Instant};

use quinn_proto::{Dir, VarInt};

use super::{Conn, Protocol};
use crate::app::ConnId;
use crate::config::{STREAMS_ALLOWED_INITIAL, TransportConfig};

/// A connection's credit for the peer's streams, by direction.
pub(crate) struct Credit {
    streams: [StreamCredit; 2],
}

/// What the peer may open in one direction, and what it used lately.
struct StreamCredit {
    allowed: u64,
    max: u64,
    /// The round trip that is looked at began then.
    since: Instant,
    /// Streams that the peer had opened by then.
    opened_before: u64,
}

impl Credit {
    pub(crate) fn new(config: &TransportConfig, now: Instant) -> Self {
        let streams = || StreamCredit {
            allowed: streams_allowed_initial(config.max_concurrent_streams),
            max: config.max_concurrent_streams,
            since: now,
            opened_before: 0,
        };
        Self { streams: [streams(), streams()] }
    }
}

impl StreamCredit {
    /// The new limit, if the peer uses so much of this one: `open` streams are open, `opened`
    /// were opened since the connection began (where that is known).
    fn grow(&mut self, now: Instant, open: u64, opened: Option<u64>, rtt: Duration) -> Option<u64> {
        if self.allowed == self.max {
            return None;
        }
        let mut lately = 0;
        if let Some(opened) = opened {
            if now.saturating_duration_since(self.since) > rtt {
                (self.since, self.opened_before) = (now, opened - 1);
            }
            lately = opened - self.opened_before;
        }
        if open.max(lately) <= self.allowed / 2 {
            return None;
        }
        // A last small step would be below what quinn-proto announces (an eighth of the limit).
        self.allowed = if self.allowed <= self.max / 8 { self.allowed * 5 } else { self.max };
        (self.since, self.opened_before) = (now, opened.unwrap_or(self.opened_before));
        Some(self.allowed)
    }
}

/// Streams of each kind that a peer may open from the first on, of at most `max`.
pub(crate) const fn streams_allowed_initial(max: u64) -> u64 {
    if max < 2 * STREAMS_ALLOWED_INITIAL { max } else { STREAMS_ALLOWED_INITIAL }
}

impl Conn {
    fn grow_streams(&mut self, now: Instant, dir: Dir, opened: Option<u64>) {
        let credit = &mut self.credit.streams[dir as usize];
        let open = self.inner.streams().remote_open_streams(dir);
        if let Some(allowed) = credit.grow(now, open, opened, self.inner.rtt()) {
            let allowed = VarInt::from_u64(allowed).expect("validated: at most 2^60");
            self.inner.set_max_concurrent_streams(dir, allowed);
        }
    }
}

impl Protocol {
    /// The peer opened streams, which the application may or may not accept.
    pub(crate) fn note_streams_opened(&mut self, now: Instant, id: ConnId, dir: Dir) {
        if let Some(conn) = self.conn_in_slot(id.slot).filter(|conn| conn.id == id) {
            conn.grow_streams(now, dir, None);
        }
    }

    /// The application took a stream of the peer's, the `index`th in its direction.
    pub(crate) fn note_stream_accepted(&mut self, now: Instant, id: ConnId, dir: Dir, index: u64) {
        if let Some(conn) = self.conn_in_slot(id.slot).filter(|conn| conn.id == id) {
            conn.grow_streams(now, dir, Some(index + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(10);

    fn credit(max: u64, now: Instant) -> StreamCredit {
        let config = TransportConfig { max_concurrent_streams: max, ..Default::default() };
        let Credit { streams: [credit, _] } = Credit::new(&config, now);
        credit
    }

    #[test]
    fn more_than_half_open_grows_up_to_the_limit() {
        let now = Instant::now();
        let mut credit = credit(1000, now);
        assert_eq!(credit.grow(now, 14, None, RTT), None);
        assert_eq!(credit.grow(now, 15, None, RTT), Some(140));
        assert_eq!(credit.grow(now, 70, None, RTT), None);
        assert_eq!(credit.grow(now, 71, None, RTT), Some(1000), "700 would leave a small step");
        assert_eq!(credit.grow(now, 1000, None, RTT), None);
    }

    #[test]
    fn short_streams_in_quick_succession_grow_it_and_slow_ones_do_not() {
        let start = Instant::now();
        let mut slow = credit(1000, start);
        for index in 0..1000u32 {
            // One at a time, 13 a round trip.
            let now = start + RTT / 13 * index;
            assert_eq!(slow.grow(now, 1, Some(u64::from(index) + 1), RTT), None, "{index}");
        }
        let mut quick = credit(1000, start);
        let grown = (0..60u32).find_map(|index| {
            quick.grow(start + RTT / 30 * index, 1, Some(u64::from(index) + 1), RTT)
        });
        assert_eq!(grown, Some(140));
    }

    #[test]
    fn every_step_is_announced_by_quinn_proto() {
        for max in (0..3000).chain([1 << 20, 1 << 60]) {
            let mut credit = credit(max, Instant::now());
            assert!(credit.allowed == max || credit.allowed * 2 <= max, "{max}");
            while credit.allowed != max {
                let before = credit.allowed;
                let after = credit.grow(Instant::now(), before, None, RTT).expect("all are open");
                assert!(after - before > after / 8 && after <= max, "{before} to {after} of {max}");
            }
        }
    }
}
