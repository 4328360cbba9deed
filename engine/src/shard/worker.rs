//! The thread of a shard: pinned, turning, spinning a while, then asleep.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::Shard;
use super::panics::panic_text;
use super::spin::Spinner;
use crate::clock::Clock;
use crate::datapath::Datapath;
use crate::error::ConnectionError;

/// Runs a shard until it has ended or its datapath failed. Whatever happens, a panic included,
/// its handles are told.
pub(crate) fn run<D: Datapath, C: Clock>(mut shard: Shard<D, C>, spinner: Spinner) {
    // After a panic the shard only tells its handles, whose queues are sound at any point.
    let ended = catch_unwind(AssertUnwindSafe(|| run_until_end(&mut shard, spinner)));
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
    mut spinner: Spinner,
) -> ConnectionError {
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
            spinner.handle_work();
            continue;
        }
        if spinner.handle_idle(|| shard.clock().now(), turn.deadline, turn.paced_rtt) {
            std::hint::spin_loop();
            continue;
        }
        match park(shard, turn.deadline) {
            Ok(late) => spinner.handle_sleep(late),
            Err(error) => {
                tracing::error!(%error, "shard stops: it cannot wait for its descriptors");
                break ConnectionError::DatapathFailed(format!(
                    "waiting for its descriptors: {error}; start the engine again"
                ));
            }
        }
    }
}

/// Sleeps until something happens or `deadline`; returns how late that was, if it was the deadline.
fn park<D: Datapath, C: Clock>(
    shard: &mut Shard<D, C>,
    deadline: Option<Instant>,
) -> std::io::Result<Option<Duration>> {
    let mailbox = shard.mailbox().clone();
    if !mailbox.prepare_to_park() {
        return Ok(None);
    }
    shard.count_park();
    let now = shard.clock().now();
    let timeout = deadline.map(|deadline| deadline.saturating_duration_since(now));
    let result = shard.datapath().wait(mailbox.wake_fd(), timeout);
    mailbox.unpark();
    result?;
    Ok(deadline.and_then(|at| shard.clock().now().checked_duration_since(at.max(now))))
}
