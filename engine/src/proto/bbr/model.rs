//! Arithmetic and filters of the path model: windowed maxima, the two-cycle
//! bandwidth filter, the two-clock round-trip filter.
//!
//! Rates are bytes per second, times are nanoseconds since the controller's
//! epoch, volumes are bytes; all are `u64`. Products that can pass 64 bits
//! (400 Gbit/s × 10 s in bytes·ns is 5 × 10²⁰) go through [`mul_div`].

/// Nanoseconds in a second.
pub(super) const NS_PER_S: u64 = 1_000_000_000;

/// `a * b / c` without overflow; saturates. Takes one 64-bit multiplication and
/// division where the product fits.
pub(super) fn mul_div(a: u64, b: u64, c: u64) -> u64 {
    debug_assert!(c > 0, "division by zero in mul_div");
    match a.checked_mul(b) {
        Some(product) => product / c,
        None => {
            let wide = u128::from(a) * u128::from(b) / u128::from(c);
            u64::try_from(wide).unwrap_or(u64::MAX)
        }
    }
}

/// `value` times a gain in thousandths; infinity ([`u64::MAX`]) stays infinity.
pub(super) fn scale(value: u64, gain_milli: u32) -> u64 {
    if value == u64::MAX { value } else { mul_div(value, u64::from(gain_milli), 1000) }
}

/// Bytes that `rate` (bytes per second) delivers in `interval_ns`.
pub(super) fn volume(rate: u64, interval_ns: u64) -> u64 {
    mul_div(rate, interval_ns, NS_PER_S)
}

/// Rate in bytes per second of `bytes` in `interval_ns`; zero without an interval.
pub(super) fn rate(bytes: u64, interval_ns: u64) -> u64 {
    if interval_ns == 0 { 0 } else { mul_div(bytes, NS_PER_S, interval_ns) }
}

#[derive(Debug, Clone, Copy, Default)]
struct Point {
    time: u64,
    value: u64,
}

/// Windowed maximum in constant space: keeps the best, the best since the best,
/// and the best since that one (Kathleen Nichols' method).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct WindowedMax {
    points: [Point; 3],
}

impl WindowedMax {
    /// Present maximum.
    pub(super) fn max(&self) -> u64 {
        self.points[0].value
    }

    /// Takes a sample at `time`; what is older than `window` falls out.
    pub(super) fn update(&mut self, value: u64, time: u64, window: u64) -> u64 {
        let new = Point { time, value };
        let age = |p: Point| time.saturating_sub(p.time);
        if value >= self.points[0].value || age(self.points[2]) > window {
            self.points = [new; 3];
            return value;
        }
        if value >= self.points[1].value {
            self.points[1] = new;
            self.points[2] = new;
        } else if value >= self.points[2].value {
            self.points[2] = new;
        }
        while age(self.points[0]) > window {
            self.points = [self.points[1], self.points[2], new];
        }
        // Spread the runners-up over the window, so that the next maximum is not
        // merely the neighbour of the one that expires.
        if self.points[1].time == self.points[0].time && age(self.points[0]) > window / 4 {
            self.points[1] = new;
            self.points[2] = new;
        } else if self.points[2].time == self.points[1].time && age(self.points[0]) > window / 2 {
            self.points[2] = new;
        }
        self.points[0].value
    }
}

/// `max_bw`: the maximum over the current and the previous ProbeBW cycle
/// (v3 §5.5.6: time is counted in cycles, two slots suffice).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MaxBwFilter {
    previous: u64,
    current: u64,
    /// Cycles completed.
    pub(super) cycles: u64,
}

impl MaxBwFilter {
    /// Present maximum, bytes per second; zero before the first sample.
    pub(super) fn max(&self) -> u64 {
        self.previous.max(self.current)
    }

    pub(super) fn update(&mut self, rate: u64) {
        self.current = self.current.max(rate);
    }

    /// Ends a cycle. A cycle without a sample does not push out the one before.
    pub(super) fn advance(&mut self) {
        if self.current != 0 {
            self.previous = self.current;
            self.current = 0;
            self.cycles += 1;
        }
    }
}

/// `min_rtt` over ten seconds, fed by `probe_rtt_min_delay` over five
/// (v3 §5.3.4.3).
#[derive(Debug, Clone, Copy)]
pub(super) struct MinRtt {
    /// The estimate, nanoseconds; [`u64::MAX`] before the first sample.
    pub(super) min_rtt_ns: u64,
    min_rtt_stamp_ns: u64,
    probe_min_ns: u64,
    /// When `probe_rtt_min_delay` was last measured or forgiven.
    pub(super) probe_stamp_ns: u64,
    /// Whether the shorter filter had expired when the last ACK came.
    pub(super) probe_expired: bool,
}

impl MinRtt {
    /// Both clocks start now: an unset `probe_rtt_min_stamp` would send the very
    /// first ACK into ProbeRTT (v3-06's `OnInit` omits it).
    pub(super) fn new(now_ns: u64) -> Self {
        Self {
            min_rtt_ns: u64::MAX,
            min_rtt_stamp_ns: now_ns,
            probe_min_ns: u64::MAX,
            probe_stamp_ns: now_ns,
            probe_expired: false,
        }
    }

    /// `UpdateMinRTT`.
    pub(super) fn update(&mut self, now_ns: u64, rtt_ns: Option<u64>, interval: u64, window: u64) {
        self.probe_expired = now_ns > self.probe_stamp_ns.saturating_add(interval);
        if let Some(rtt_ns) = rtt_ns
            && (rtt_ns < self.probe_min_ns || self.probe_expired)
        {
            self.probe_min_ns = rtt_ns;
            self.probe_stamp_ns = now_ns;
        }
        let expired = now_ns > self.min_rtt_stamp_ns.saturating_add(window);
        if self.probe_min_ns < self.min_rtt_ns || (expired && self.probe_min_ns != u64::MAX) {
            self.min_rtt_ns = self.probe_min_ns;
            self.min_rtt_stamp_ns = self.probe_stamp_ns;
        }
    }
}

/// A splitmix64 generator: the wait between probes is drawn from it, so that
/// flows do not probe in step; seeded, so that a simulation repeats.
#[derive(Debug, Clone, Copy)]
pub(super) struct SplitMix(pub(super) u64);

impl SplitMix {
    /// A value in `0..bound`; zero for an empty range.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // The high half of the product is uniform enough for a wait time.
        u64::try_from((u128::from(z) * u128::from(bound)) >> 64).expect("below a 64-bit bound")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trap_11_arithmetic_holds_at_400_gbit_and_10_seconds() {
        let rate_400g = 50_000_000_000;
        assert_eq!(volume(rate_400g, 10 * NS_PER_S), 500_000_000_000);
        assert_eq!(rate(500_000_000_000, 10 * NS_PER_S), rate_400g);
        assert_eq!(rate(50, 1), rate_400g, "sub-nanosecond bytes keep their rate");
        assert_eq!(scale(500_000_000_000, 2770), 1_385_000_000_000);
        assert_eq!(scale(u64::MAX, 500), u64::MAX);
        assert_eq!(mul_div(u64::MAX, u64::MAX, 1), u64::MAX, "saturates");
        // 10 Gbit/s for 2 s overflows 32 bits of bytes; a counter past 4.3 GB keeps its rate.
        assert_eq!(volume(1_250_000_000, 2 * NS_PER_S), 2_500_000_000);
        assert_eq!(rate(6_000_000_000, 6 * NS_PER_S), 1_000_000_000);
    }

    #[test]
    fn rate_without_interval_is_zero() {
        assert_eq!(rate(1200, 0), 0);
    }

    #[test]
    fn windowed_max_forgets_by_age() {
        let mut filter = WindowedMax::default();
        assert_eq!(filter.update(100, 0, 10), 100);
        assert_eq!(filter.update(60, 4, 10), 100);
        assert_eq!(filter.update(50, 8, 10), 100);
        assert_eq!(filter.update(10, 11, 10), 60, "100 is eleven rounds old");
        assert_eq!(filter.update(10, 15, 10), 50);
        assert_eq!(filter.update(10, 40, 10), 10, "everything is stale");
        assert_eq!(filter.update(70, 41, 10), 70);
        assert_eq!(filter.max(), 70);
    }

    #[test]
    fn windowed_max_never_reports_less_than_the_window_holds_at_its_head() {
        let mut rng = SplitMix(3);
        let mut filter = WindowedMax::default();
        for time in 0..2000 {
            let value = rng.below(1000);
            assert!(filter.update(value, time, 10) >= value, "time {time}");
        }
    }

    #[test]
    fn trap_8_max_bw_lives_for_two_cycles() {
        let mut filter = MaxBwFilter::default();
        filter.update(100);
        filter.update(90);
        filter.advance();
        filter.update(10);
        assert_eq!(filter.max(), 100, "the previous cycle still counts");
        filter.advance();
        assert_eq!(filter.max(), 10);
        filter.advance();
        filter.advance();
        assert_eq!(filter.max(), 10, "empty cycles push nothing out");
        assert_eq!(filter.cycles, 2);
    }

    #[test]
    fn trap_4_the_first_ack_does_not_expire_probe_rtt() {
        let mut filter = MinRtt::new(1);
        filter.update(50_000_000, Some(50_000_000), 5 * NS_PER_S, 10 * NS_PER_S);
        assert!(!filter.probe_expired);
        assert_eq!(filter.min_rtt_ns, 50_000_000);
    }

    #[test]
    fn min_rtt_rises_only_after_its_window() {
        let (interval, window) = (5 * NS_PER_S, 10 * NS_PER_S);
        let mut filter = MinRtt::new(0);
        filter.update(1, Some(10), interval, window);
        filter.update(4 * NS_PER_S, Some(20), interval, window);
        assert_eq!(filter.min_rtt_ns, 10);
        filter.update(6 * NS_PER_S, Some(20), interval, window);
        assert!(filter.probe_expired);
        assert_eq!(filter.min_rtt_ns, 10, "the long filter still remembers");
        filter.update(11 * NS_PER_S, Some(30), interval, window);
        assert_eq!(filter.min_rtt_ns, 20);
        filter.update(12 * NS_PER_S, None, interval, window);
        assert_eq!(filter.min_rtt_ns, 20);
    }

    #[test]
    fn random_waits_stay_below_their_bound() {
        let mut rng = SplitMix(1);
        let (mut low, mut high) = (u64::MAX, 0);
        for _ in 0..10_000 {
            let value = rng.below(1000);
            low = low.min(value);
            high = high.max(value);
        }
        assert!(low < 10 && (990..1000).contains(&high), "{low} {high}");
        assert_eq!(rng.below(0), 0);
    }
}
