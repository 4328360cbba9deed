//! Whether a shard without work looks again at once or sleeps.
//!
//! A wake-up costs several microseconds of latency and two system calls; a spin costs the
//! core. [`BusyPoll::Adaptive`] spins where spinning has paid of late: each spin that ends
//! in work earns, each that ends in sleep costs, and a shard that has earned nothing goes to
//! sleep at once, but for a trial now and then.

use std::time::{Duration, Instant};

use crate::config::{BusyPoll, SPIN_UNTIL_DEADLINE_US};

/// Turns that found nothing before the clock is looked at: spinning costs no more than turning.
const IDLE_TURNS_PER_CLOCK_CHECK: u32 = 8;
/// The most that can be earned: so many spins in vain until the shard sleeps at once.
const CREDIT_MAX: u32 = 16;
/// What one spin that ended in work earns.
const EARNED_PER_SPIN: u32 = 2;
/// Without credit, one pause in so many is a trial.
const PAUSES_PER_TRIAL: u32 = 16;

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
        }
    }

    /// A turn found work: the pause, if there was one, is over.
    pub(crate) fn handle_work(&mut self) {
        if self.spinning {
            self.credit = (self.credit + EARNED_PER_SPIN).min(CREDIT_MAX);
        }
        self.end_pause();
    }

    /// A turn found nothing: whether the shard turns again at once. `now` is read only when needed.
    pub(crate) fn handle_idle(
        &mut self,
        now: impl FnOnce() -> Instant,
        deadline: Option<Instant>,
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
        let soon = Duration::from_micros(SPIN_UNTIL_DEADLINE_US);
        if deadline.is_some_and(|at| at.saturating_duration_since(now) < soon) {
            return true;
        }
        let since = *self.idle_since.get_or_insert(now);
        self.spinning && now.saturating_duration_since(since) < self.window
    }

    /// The shard has slept.
    pub(crate) fn handle_sleep(&mut self) {
        if self.spinning {
            self.credit = self.credit.saturating_sub(1);
        }
        self.end_pause();
    }

    fn begin_pause(&mut self) {
        self.pauses = self.pauses.wrapping_add(1);
        self.spinning = self.credit > 0 || self.pauses.is_multiple_of(PAUSES_PER_TRIAL);
    }

    fn end_pause(&mut self) {
        self.idle_turns = 0;
        self.idle_since = None;
        self.spinning = false;
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
            if !spinner.handle_idle(|| start + Duration::from_micros(us), None) {
                spinner.handle_sleep();
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
        assert!(spinner.handle_idle(|| start, soon));
        let later = Some(start + Duration::from_millis(5));
        assert!(!spinner.handle_idle(|| start, later));
    }
}
