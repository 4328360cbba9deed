//! The thread of a shard: pinned, turning, spinning a while, then asleep.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::{Shard, panic_text};
use crate::clock::Clock;
use crate::config::SPIN_UNTIL_DEADLINE_US;
use crate::datapath::Datapath;
use crate::error::ConnectionError;

/// Turns that found nothing before the clock is looked at: spinning costs no more than turning.
const IDLE_TURNS_PER_CLOCK_CHECK: u32 = 8;

/// Runs a shard until it has ended or its datapath failed. Whatever happens, a panic included,
/// its handles are told.
pub(crate) fn run<D: Datapath, C: Clock>(mut shard: Shard<D, C>, spin: Duration) {
    // After a panic the shard only tells its handles, whose queues are sound at any point.
    let ended = catch_unwind(AssertUnwindSafe(|| run_until_end(&mut shard, spin)));
    match ended {
        Ok(reason) => shard.abandon(&reason),
        Err(payload) => {
            let panic = panic_text(payload.as_ref());
            tracing::error!(panic, "shard stops: it panicked, which is a bug of the engine");
            shard.abandon_broken(&ConnectionError::EngineStopped);
        }
    }
}

fn run_until_end<D: Datapath, C: Clock>(
    shard: &mut Shard<D, C>,
    spin: Duration,
) -> ConnectionError {
    let mut idle_since: Option<Instant> = None;
    let mut idle_turns = 0u32;
    loop {
        let turn = shard.turn();
        if turn.ended {
            break ConnectionError::EngineStopped;
        }
        if let Some(failure) = shard.failure() {
            tracing::error!(failure, "shard stops: its datapath failed");
            break ConnectionError::DatapathFailed(failure.to_owned());
        }
        if turn.worked || turn.more {
            idle_since = None;
            idle_turns = 0;
            continue;
        }
        idle_turns += 1;
        if !idle_turns.is_multiple_of(IDLE_TURNS_PER_CLOCK_CHECK) && !spin.is_zero() {
            std::hint::spin_loop();
            continue;
        }
        let now = shard.clock().now();
        let since = *idle_since.get_or_insert(now);
        let left = turn.deadline.map(|deadline| deadline.saturating_duration_since(now));
        let soon = left.is_some_and(|left| left < Duration::from_micros(SPIN_UNTIL_DEADLINE_US));
        if now - since < spin || (soon && !spin.is_zero()) {
            std::hint::spin_loop();
            continue;
        }
        if let Err(error) = park(shard, left) {
            tracing::error!(%error, "shard stops: it cannot wait for its descriptors");
            break ConnectionError::DatapathFailed(format!(
                "waiting for its descriptors: {error}; start the engine again"
            ));
        }
        idle_since = None;
        idle_turns = 0;
    }
}

fn park<D: Datapath, C: Clock>(
    shard: &mut Shard<D, C>,
    timeout: Option<Duration>,
) -> std::io::Result<()> {
    let mailbox = shard.mailbox().clone();
    if !mailbox.prepare_to_park() {
        return Ok(());
    }
    shard.count_park();
    let result = shard.datapath().wait(mailbox.wake_fd(), timeout);
    mailbox.unpark();
    result
}
