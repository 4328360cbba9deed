//! Whether a shard without work looks again at once or sleeps.
//!
//! A wake-up costs several microseconds of latency and two system calls; a spin costs the
//! core. [`BusyPoll::Adaptive`] spins where spinning has paid of late: each spin that ends
//! in work earns, each that ends in sleep costs, and a shard that has earned nothing goes to
//! sleep at once, but for a trial now and then.
//!
//! A pacing deadline is waited for by spinning where a wake-up would be late: what leaves late
//! on a path of less than a millisecond is lost to the path. How late wake-ups are is measured
//! by each sleep that a deadline ends: a few microseconds on a machine of one's own, now and then
//! milliseconds in a virtual machine whose idle cores are taken away.

use std::time::{Duration, Instant};

use crate::config::{
    BusyPoll, SPIN_PACED_RTT_US_MAX, SPIN_UNTIL_DEADLINE_US, SPIN_UNTIL_PACED_US_MAX,
};

/// Turns that found nothing before the clock is looked at: spinning costs no more than turning.
const IDLE_TURNS_PER_CLOCK_CHECK: u32 = 8;
/// The most that can be earned: so many spins in vain until the shard sleeps at once.
const CREDIT_MAX: u32 = 16;
/// What one spin that ended in work earns.
const EARNED_PER_SPIN: u32 = 2;
/// Without credit, one pause in so many is a trial.
const PAUSES_PER_TRIAL: u32 = 16;
/// A pause before a pacing deadline is slept through when it is this many times as long as
/// wake-ups are late on average.
const SLEEP_PER_LATENESS: u32 = 10;
/// The share of a new sample in the average lateness is one in 2 to the power of this …
const LATENESS_SHARE_LOG2: u32 = 4;
/// … and of that what one pause that was spun through takes away: the machine may have changed.
const LATENESS_DECAY_LOG2: u32 = 10;

/// A shard's pauses between work and work.
#[derive(Debug)]
pub(crate) struct Spinner {
    policy: BusyPoll,
    window: Duration,
    credit: u32,
    pauses: u32,
    idle_turns: u32,
    /// When the pause was first looked at by the clock.
    idle_since: Option<Instant>,
    /// This pause is spun through, as far as the window goes.
    spinning: bool,
    /// This pause would have been slept through, were wake-ups on time.
    waits_for_pacer: bool,
    /// How late a sleep ends on average that a deadline ends.
    lateness: Duration,
}

impl Spinner {
    pub(crate) fn new(policy: BusyPoll, window: Duration) -> Self {
        Self {
            // Without a window, adaptive is never.
            policy: if window.is_zero() && policy == BusyPoll::Adaptive {
                BusyPoll::Off
            } else {
                policy
            },
            window,
            credit: CREDIT_MAX,
            pauses: 0,
            idle_turns: 0,
            idle_since: None,
            spinning: false,
            waits_for_pacer: false,
            lateness: Duration::ZERO,
        }
    }

    /// A turn found work: the pause, if there was one, is over.
    pub(crate) fn handle_work(&mut self) {
        if self.spinning {
            self.credit = (self.credit + EARNED_PER_SPIN).min(CREDIT_MAX);
        }
        self.end_pause();
    }

    /// A turn found nothing: whether the shard turns again at once. `now` is read only when needed;
    /// `paced_rtt` is the round trip of a connection that waits for its pacer.
    pub(crate) fn handle_idle(
        &mut self,
        now: impl FnOnce() -> Instant,
        deadline: Option<Instant>,
        paced_rtt: Option<Duration>,
    ) -> bool {
        if self.policy == BusyPoll::Always {
            return true;
        }
        if self.policy == BusyPoll::Off {
            return false;
        }
        if self.idle_turns == 0 {
            self.begin_pause();
        }
        self.idle_turns += 1;
        if self.spinning && !self.idle_turns.is_multiple_of(IDLE_TURNS_PER_CLOCK_CHECK) {
            return true;
        }
        let now = now();
        // Parking wakes up too late for what is due this soon.
        let ahead = deadline.map(|at| at.saturating_duration_since(now));
        if ahead.is_some_and(|ahead| ahead < Duration::from_micros(SPIN_UNTIL_DEADLINE_US)) {
            return true;
        }
        if ahead.is_some_and(|ahead| ahead < self.spin_until_paced(paced_rtt)) {
            self.waits_for_pacer = true;
            return true;
        }
        let since = *self.idle_since.get_or_insert(now);
        self.spinning && now.saturating_duration_since(since) < self.window
    }

    /// The shard has slept; `late` is how long after its deadline it woke up, if the deadline had come.
    pub(crate) fn handle_sleep(&mut self, late: Option<Duration>) {
        if self.spinning {
            self.credit = self.credit.saturating_sub(1);
        }
        if let Some(late) = late {
            let late = late.min(Duration::from_micros(SPIN_UNTIL_PACED_US_MAX));
            let share = 1 << LATENESS_SHARE_LOG2;
            self.lateness = self.lateness - self.lateness / share + late / share;
        }
        self.end_pause();
    }

    /// How near a pacing deadline must be to be waited for by spinning.
    fn spin_until_paced(&self, paced_rtt: Option<Duration>) -> Duration {
        match paced_rtt {
            Some(rtt) if rtt <= Duration::from_micros(SPIN_PACED_RTT_US_MAX) => (self.lateness
                * SLEEP_PER_LATENESS)
                .min(Duration::from_micros(SPIN_UNTIL_PACED_US_MAX)),
            _ => Duration::ZERO,
        }
    }

    fn begin_pause(&mut self) {
        self.pauses = self.pauses.wrapping_add(1);
        self.spinning = self.credit > 0 || self.pauses.is_multiple_of(PAUSES_PER_TRIAL);
    }

    fn end_pause(&mut self) {
        self.idle_turns = 0;
        self.idle_since = None;
        self.spinning = false;
        if std::mem::take(&mut self.waits_for_pacer) {
            self.lateness -= self.lateness / (1 << LATENESS_DECAY_LOG2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_micros(50);

    /// Idle turns, a microsecond each, until the spinner would sleep; `None` when work comes first.
    fn pause(spinner: &mut Spinner, work_after_us: u64) -> Option<u64> {
        let start = Instant::now();
        for us in 0..work_after_us {
            if !spinner.handle_idle(|| start + Duration::from_micros(us), None, None) {
                spinner.handle_sleep(None);
                return Some(us);
            }
        }
        spinner.handle_work();
        None
    }

    #[test]
    fn spinning_goes_on_while_it_pays() {
        let mut spinner = Spinner::new(BusyPoll::Adaptive, WINDOW);
        for _ in 0..100 {
            assert_eq!(pause(&mut spinner, 30), None);
        }
    }

    #[test]
    fn spinning_in_vain_ends_and_is_tried_now_and_then() {
        let mut spinner = Spinner::new(BusyPoll::Adaptive, WINDOW);
        let slept: Vec<u64> =
            (0..160).map(|_| pause(&mut spinner, 1000).expect("sleeps")).collect();
        assert!(slept[..CREDIT_MAX as usize].iter().all(|us| *us >= 50), "{slept:?}");
        let later = &slept[CREDIT_MAX as usize..];
        let trials = later.iter().filter(|us| **us >= 50).count();
        let at_once = later.iter().filter(|us| **us == 0).count();
        assert_eq!((trials, at_once), (later.len() / 16, later.len() - later.len() / 16));
        // Traffic comes back: the next trials find out.
        let mut missed = 0;
        while spinner.credit < CREDIT_MAX {
            missed += usize::from(pause(&mut spinner, 30).is_some());
        }
        assert!(missed <= PAUSES_PER_TRIAL as usize, "{missed} slept through");
    }

    #[test]
    fn always_and_off_do_not_learn() {
        let mut always = Spinner::new(BusyPoll::Always, Duration::ZERO);
        assert_eq!(pause(&mut always, 100_000), None);
        for mut off in
            [Spinner::new(BusyPoll::Off, WINDOW), Spinner::new(BusyPoll::Adaptive, Duration::ZERO)]
        {
            assert_eq!(pause(&mut off, 100), Some(0));
        }
    }

    #[test]
    fn what_is_due_soon_is_waited_for() {
        let mut spinner = Spinner::new(BusyPoll::Adaptive, WINDOW);
        let start = Instant::now();
        let soon = Some(start + Duration::from_micros(SPIN_UNTIL_DEADLINE_US / 2));
        spinner.credit = 0;
        assert!(spinner.handle_idle(|| start, soon, None));
        let later = Some(start + Duration::from_millis(5));
        assert!(!spinner.handle_idle(|| start, later, None));
    }

    /// What a shard does whose pacer lets go in `ahead_us`, after sleeps that ended `late_us` late.
    fn spins_for_pacer(late_us: u64, ahead_us: u64, rtt_us: u64) -> bool {
        let mut spinner = Spinner::new(BusyPoll::Adaptive, WINDOW);
        while spinner.credit > 0 {
            pause(&mut spinner, 1000);
        }
        for _ in 0..100 {
            spinner.handle_sleep(Some(Duration::from_micros(late_us)));
        }
        let now = Instant::now();
        let deadline = Some(now + Duration::from_micros(ahead_us));
        spinner.handle_idle(|| now, deadline, Some(Duration::from_micros(rtt_us)))
    }

    #[test]
    fn late_wake_ups_are_not_waited_for_by_a_paced_connection() {
        assert!(!spins_for_pacer(3, 500, 100), "wake-ups are on time");
        assert!(spins_for_pacer(100, 500, 100), "500 µs with wake-ups 100 µs late");
        assert!(!spins_for_pacer(30, 500, 100), "500 µs with wake-ups 30 µs late");
        assert!(!spins_for_pacer(5000, 1500, 100), "never longer than a quantum");
        assert!(!spins_for_pacer(100, 500, 30_000), "such a round trip makes up for it");
        let mut spinner = Spinner::new(BusyPoll::Off, WINDOW);
        spinner.handle_sleep(Some(Duration::from_millis(1)));
        let now = Instant::now();
        assert!(!spinner.handle_idle(|| now, Some(now), Some(WINDOW)), "off is off");
    }

    #[test]
    fn a_machine_that_is_on_time_again_is_noticed() {
        let mut spinner = Spinner::new(BusyPoll::Adaptive, WINDOW);
        spinner.handle_sleep(Some(Duration::from_millis(1)));
        let start = Instant::now();
        let paced = Some(Duration::from_micros(100));
        let mut spun = 0;
        loop {
            let ahead = Some(start + Duration::from_micros(300));
            // Past the window, so that only the pacer is a reason.
            spinner.idle_since = Some(start - WINDOW);
            spinner.idle_turns = IDLE_TURNS_PER_CLOCK_CHECK - 1;
            if !spinner.handle_idle(|| start, ahead, paced) {
                break;
            }
            spinner.handle_work();
            spun += 1;
        }
        assert!((100..10_000).contains(&spun), "{spun} pauses spun through after one late wake-up");
    }
}
