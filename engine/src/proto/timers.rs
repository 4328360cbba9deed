//! A hierarchical timer wheel: one deadline per connection slot, O(1) to set.
//!
//! Six levels of 64 buckets; a tick is 4096 ns, so the wheel spans about 78
//! hours and later deadlines wait in its last bucket and are filed anew. A
//! deadline that moves later is not moved: the entry fires at its old place,
//! is compared with the true deadline and filed again. QUIC's loss timer moves
//! later with every acknowledgement, so this saves nearly all of the work.
//!
//! Owned by one shard; time is given in, never read.

use std::time::{Duration, Instant};

const TICK_NS_LOG2: u32 = 12;
const LEVELS: usize = 6;
const BUCKETS_LOG2: u32 = 6;
const BUCKETS: usize = 1 << BUCKETS_LOG2;
const NIL: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The true deadline in ticks, `u64::MAX` when unset.
    deadline_tick: u64,
    /// The tick that it is filed under, `u64::MAX` when not filed.
    filed_tick: u64,
    next: u32,
    prev: u32,
    bucket: u16,
}

const EMPTY: Entry =
    Entry { deadline_tick: u64::MAX, filed_tick: u64::MAX, next: NIL, prev: NIL, bucket: 0 };

/// The wheel. Keys are small integers (a shard's connection slots).
#[derive(Debug)]
pub(crate) struct TimerWheel {
    origin: Instant,
    now_tick: u64,
    heads: [[u32; BUCKETS]; LEVELS],
    occupied: [u64; LEVELS],
    entries: Vec<Entry>,
}

impl TimerWheel {
    /// An empty wheel that starts at `now`.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            origin: now,
            now_tick: 0,
            heads: [[NIL; BUCKETS]; LEVELS],
            occupied: [0; LEVELS],
            entries: Vec::new(),
        }
    }

    /// Sets the deadline of `key`; an earlier call is replaced.
    pub(crate) fn set(&mut self, key: u32, deadline: Instant) {
        // Round up: a timer never fires early.
        let nanos = deadline.saturating_duration_since(self.origin).as_nanos() as u64;
        let tick = nanos.div_ceil(1 << TICK_NS_LOG2).max(self.now_tick);
        let index = key as usize;
        if index >= self.entries.len() {
            self.entries.resize(index + 1, EMPTY);
        }
        self.entries[index].deadline_tick = tick;
        if self.entries[index].filed_tick <= tick {
            return; // fires early, is compared and filed again
        }
        self.unlink(key);
        self.link(key, tick);
    }

    /// Clears the deadline of `key`.
    pub(crate) fn cancel(&mut self, key: u32) {
        if let Some(entry) = self.entries.get_mut(key as usize) {
            entry.deadline_tick = u64::MAX;
            self.unlink(key);
        }
    }

    /// Moves time to `now` and appends every key whose deadline has come to `expired`.
    /// Looks at most at `limit` entries, due or to be filed anew: the rest come with the next call.
    pub(crate) fn expire(&mut self, now: Instant, expired: &mut Vec<u32>, limit: usize) {
        let target = now.saturating_duration_since(self.origin).as_nanos() as u64 >> TICK_NS_LOG2;
        let mut left = limit;
        while let Some(tick) = self.next_filed_tick() {
            if tick > target || left == 0 {
                break;
            }
            self.now_tick = self.now_tick.max(tick);
            left = self.sweep(tick, expired, left);
        }
        if left > 0 {
            self.now_tick = self.now_tick.max(target);
        }
    }

    /// A time not later than the earliest deadline, exact to one bucket, or `None` when none is set.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.next_filed_tick().map(|tick| self.origin + Duration::from_nanos(tick << TICK_NS_LOG2))
    }

    /// The start of the first occupied bucket in time order.
    fn next_filed_tick(&self) -> Option<u64> {
        let mut best: Option<u64> = None;
        for level in 0..LEVELS {
            if self.occupied[level] == 0 {
                continue;
            }
            let shift = BUCKETS_LOG2 * level as u32;
            let position = (self.now_tick >> shift) & (BUCKETS as u64 - 1);
            let ahead = self.occupied[level].rotate_right(position as u32).trailing_zeros() as u64;
            let bucket_start = ((self.now_tick >> shift) + ahead) << shift;
            let start = bucket_start.max(self.now_tick);
            best = Some(best.map_or(start, |b| b.min(start)));
        }
        best
    }

    /// Empties the buckets that begin at `tick` on every level; returns what is left of the limit.
    fn sweep(&mut self, tick: u64, expired: &mut Vec<u32>, mut left: usize) -> usize {
        for level in (0..LEVELS).rev() {
            let shift = BUCKETS_LOG2 * level as u32;
            let bucket = ((tick >> shift) & (BUCKETS as u64 - 1)) as usize;
            if self.occupied[level] & (1 << bucket) == 0 {
                continue;
            }
            let mut key = self.heads[level][bucket];
            while key != NIL && left > 0 {
                left -= 1;
                let next = self.entries[key as usize].next;
                self.unlink(key);
                let deadline_tick = self.entries[key as usize].deadline_tick;
                if deadline_tick <= tick {
                    self.entries[key as usize].deadline_tick = u64::MAX;
                    expired.push(key);
                } else if deadline_tick != u64::MAX {
                    self.link(key, deadline_tick);
                }
                key = next;
            }
        }
        left
    }

    fn link(&mut self, key: u32, tick: u64) {
        let distance = tick.saturating_sub(self.now_tick);
        let mut level = 0;
        while level + 1 < LEVELS && distance >> (BUCKETS_LOG2 * (level as u32 + 1)) != 0 {
            level += 1;
        }
        let shift = BUCKETS_LOG2 * level as u32;
        // A distance of a whole turn or more would land on the present bucket: use the last one.
        let ahead = ((tick >> shift) - (self.now_tick >> shift)).min(BUCKETS as u64 - 1);
        let bucket = (((self.now_tick >> shift) + ahead) & (BUCKETS as u64 - 1)) as usize;
        let head = self.heads[level][bucket];
        self.entries[key as usize] = Entry {
            deadline_tick: self.entries[key as usize].deadline_tick,
            filed_tick: tick,
            next: head,
            prev: NIL,
            bucket: (level * BUCKETS + bucket) as u16,
        };
        if head != NIL {
            self.entries[head as usize].prev = key;
        }
        self.heads[level][bucket] = key;
        self.occupied[level] |= 1 << bucket;
    }

    fn unlink(&mut self, key: u32) {
        let entry = self.entries[key as usize];
        if entry.filed_tick == u64::MAX {
            return;
        }
        let (level, bucket) = (entry.bucket as usize / BUCKETS, entry.bucket as usize % BUCKETS);
        if entry.prev == NIL {
            self.heads[level][bucket] = entry.next;
            if entry.next == NIL {
                self.occupied[level] &= !(1 << bucket);
            }
        } else {
            self.entries[entry.prev as usize].next = entry.next;
        }
        if entry.next != NIL {
            self.entries[entry.next as usize].prev = entry.prev;
        }
        let slot = &mut self.entries[key as usize];
        slot.filed_tick = u64::MAX;
        slot.next = NIL;
        slot.prev = NIL;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fired(wheel: &mut TimerWheel, at: Instant) -> Vec<u32> {
        let mut keys = Vec::new();
        wheel.expire(at, &mut keys, usize::MAX - 1);
        keys.sort_unstable();
        keys
    }

    #[test]
    fn fires_once_and_not_early() {
        let start = Instant::now();
        let mut wheel = TimerWheel::new(start);
        wheel.set(3, start + Duration::from_millis(10));
        assert_eq!(fired(&mut wheel, start + Duration::from_millis(9)), Vec::<u32>::new());
        assert_eq!(fired(&mut wheel, start + Duration::from_micros(10_005)), vec![3]);
        assert_eq!(fired(&mut wheel, start + Duration::from_secs(10)), Vec::<u32>::new());
        assert_eq!(wheel.next_deadline(), None);
    }

    #[test]
    fn later_replaces_earlier_without_firing() {
        let start = Instant::now();
        let mut wheel = TimerWheel::new(start);
        wheel.set(0, start + Duration::from_millis(1));
        wheel.set(0, start + Duration::from_millis(50));
        assert_eq!(fired(&mut wheel, start + Duration::from_millis(49)), Vec::<u32>::new());
        assert_eq!(fired(&mut wheel, start + Duration::from_millis(51)), vec![0]);
    }

    #[test]
    fn earlier_replaces_later() {
        let start = Instant::now();
        let mut wheel = TimerWheel::new(start);
        wheel.set(0, start + Duration::from_secs(5));
        wheel.set(0, start + Duration::from_millis(1));
        assert_eq!(fired(&mut wheel, start + Duration::from_millis(2)), vec![0]);
    }

    #[test]
    fn cancelled_never_fires() {
        let start = Instant::now();
        let mut wheel = TimerWheel::new(start);
        for key in 0..4 {
            wheel.set(key, start + Duration::from_millis(1));
        }
        wheel.cancel(1);
        wheel.cancel(77); // never set
        assert_eq!(fired(&mut wheel, start + Duration::from_millis(2)), vec![0, 2, 3]);
    }

    #[test]
    fn limit_leaves_the_rest_for_the_next_call() {
        let start = Instant::now();
        let mut wheel = TimerWheel::new(start);
        for key in 0..10 {
            wheel.set(key, start + Duration::from_millis(1));
        }
        let mut keys = Vec::new();
        // Each is looked at twice: filed anew when its bucket comes, then due.
        for calls in 1..=4 {
            wheel.expire(start + Duration::from_millis(2), &mut keys, 4);
            assert!(keys.len() <= 4 * calls, "{} after {calls} calls", keys.len());
        }
        assert!(!keys.is_empty() && keys.len() < 10, "{} after 16 looks at 10 keys", keys.len());
        wheel.expire(start + Duration::from_millis(2), &mut keys, 100);
        assert_eq!(keys.len(), 10);
    }

    #[test]
    fn a_full_bucket_is_moved_in_parts() {
        let start = Instant::now();
        let mut wheel = TimerWheel::new(start);
        for key in 0..10_000 {
            // One bucket of a high level; their true places are apart.
            wheel.set(
                key,
                start + Duration::from_millis(20_100) + Duration::from_micros(key.into()),
            );
        }
        let moved = |wheel: &TimerWheel| {
            wheel.entries.iter().filter(|entry| usize::from(entry.bucket) < 3 * BUCKETS).count()
        };
        let (mut keys, at) = (Vec::new(), start + Duration::from_millis(20_099));
        for calls in 1..=3 {
            wheel.expire(at, &mut keys, 100);
            assert_eq!((moved(&wheel), keys.len()), (calls * 100, 0));
        }
        assert!(wheel.next_deadline().is_some_and(|next| next <= at), "the rest is due now");
    }

    #[test]
    fn a_hundred_thousand_timers_cost_a_few_visits_each() {
        const TIMERS: usize = 100_000;
        const LIMIT: usize = 128;
        let start = Instant::now();
        let mut wheel = TimerWheel::new(start);
        for key in 0..TIMERS as u32 {
            // Keep-alives of 15 s, spread as 1000 handshakes a second spread them, and moved once.
            wheel.set(key, start + Duration::from_millis(15_000 + u64::from(key)));
            wheel.set(key, start + Duration::from_millis(30_000 + u64::from(key)));
        }
        let (mut fired, mut calls, mut keys) = (0, 0, Vec::new());
        let end = start + Duration::from_secs(140);
        while fired < TIMERS {
            wheel.expire(end, &mut keys, LIMIT);
            calls += 1;
            fired += keys.len();
            keys.clear();
            assert!(
                calls * LIMIT <= TIMERS * (2 * LEVELS + 1),
                "{fired} fired after {calls} calls"
            );
        }
    }

    #[test]
    fn beyond_the_span_still_fires_at_its_time() {
        let start = Instant::now();
        let mut wheel = TimerWheel::new(start);
        let week = Duration::from_secs(7 * 24 * 3600);
        wheel.set(0, start + week);
        assert_eq!(fired(&mut wheel, start + week - Duration::from_secs(1)), Vec::<u32>::new());
        assert_eq!(fired(&mut wheel, start + week + Duration::from_millis(1)), vec![0]);
    }

    proptest! {
        #[test]
        fn agrees_with_a_sorted_list(ops in proptest::collection::vec(
            (0u32..32, 0u64..40_000_000_000u64, 0u64..3_000_000_000u64, 0u8..8), 1..200)) {
            let start = Instant::now();
            let mut wheel = TimerWheel::new(start);
            let mut model = std::collections::BTreeMap::new();
            let mut now_ns = 0u64;
            for (key, after_ns, advance_ns, op) in ops {
                if op == 0 {
                    wheel.cancel(key);
                    model.remove(&key);
                } else {
                    wheel.set(key, start + Duration::from_nanos(now_ns + after_ns));
                    model.insert(key, now_ns + after_ns);
                }
                if let Some(next) = wheel.next_deadline() {
                    let earliest = *model.values().min().expect("wheel and model agree");
                    prop_assert!(next <= start + Duration::from_nanos(earliest + (1 << TICK_NS_LOG2)));
                }
                now_ns += advance_ns;
                let got = fired(&mut wheel, start + Duration::from_nanos(now_ns));
                for key in got {
                    let deadline = model.remove(&key);
                    prop_assert!(deadline.is_some_and(|d| d <= now_ns), "fired early or unset");
                }
                let late = model.values().filter(|d| **d + (1 << TICK_NS_LOG2) <= now_ns).count();
                prop_assert_eq!(late, 0, "a due timer did not fire");
            }
        }
    }
}
