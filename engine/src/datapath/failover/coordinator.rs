//! The thread that opens a device again for the shards that lost it.
//!
//! It drops what a failed datapath left behind, which closes rings and takes the program off the
//! interface with the last of them; tries to open each queue again with back-off; and offers the
//! result through the shard's mailbox, which never blocks: a full mailbox is a failed attempt.
//! It ends when the last shard's datapath is gone.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::{Failover, GivenUp, Primary};
use crate::config::FAILOVER_CHECK_INTERVAL_MS;

/// How the coordinator opens a device again.
pub(super) trait Reopen<P>: Send + 'static {
    /// Opens the queue of `shard`, without a standby.
    fn reopen(&mut self, shard: usize) -> Result<P, String>;

    /// Looks for failures that a shard does not see by itself.
    fn check(&mut self);
}

/// Gives a datapath to a shard, or back when it cannot be taken now.
pub(super) type Offer<P> = Box<dyn FnMut(usize, Box<P>) -> bool + Send>;

/// A running coordinator.
#[derive(Debug)]
pub(crate) struct Coordinator {
    thread: JoinHandle<()>,
}

impl Coordinator {
    /// Wraps the datapaths of shards 0, 1, … and starts the thread, in the network namespace of
    /// the calling one.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn start<P: Primary + Send>(
        primaries: Vec<P>,
        backoff: Backoff,
        reopen: impl Reopen<P>,
        offer: Offer<P>,
    ) -> std::io::Result<(Vec<Failover<P>>, Self)> {
        // A shard fails over again only after it was offered a datapath, and its message was read.
        let (sender, notices) = sync_channel(primaries.len());
        let waiting = vec![false; primaries.len()];
        let wrap = |(shard, primary), sender: &SyncSender<_>| {
            Failover::new(shard, primary, sender.clone())
        };
        let paths = primaries.into_iter().enumerate().map(|part| wrap(part, &sender)).collect();
        drop(sender);
        let run = Run { notices, waiting, attempt_at: None, backoff, reopen, offer };
        let thread =
            std::thread::Builder::new().name("stoq-failover".into()).spawn(move || run.run())?;
        Ok((paths, Self { thread }))
    }

    /// The thread, which ends with the last of the datapaths.
    pub(crate) fn into_thread(self) -> JoinHandle<()> {
        self.thread
    }
}

struct Run<P, R> {
    notices: Receiver<GivenUp<P>>,
    /// By shard.
    waiting: Vec<bool>,
    attempt_at: Option<Instant>,
    backoff: Backoff,
    reopen: R,
    offer: Offer<P>,
}

impl<P: Primary, R: Reopen<P>> Run<P, R> {
    fn run(mut self) {
        let interval = Duration::from_millis(FAILOVER_CHECK_INTERVAL_MS);
        loop {
            let now = Instant::now();
            let left = self.attempt_at.map_or(interval, |at| at.saturating_duration_since(now));
            match self.notices.recv_timeout(left.min(interval)) {
                Ok(notice) => {
                    self.note(notice);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.reopen.check();
            if self.attempt_at.is_some_and(|at| at <= Instant::now()) {
                self.attempt();
            }
        }
    }

    fn note(&mut self, notice: GivenUp<P>) {
        let GivenUp { shard, remains } = notice;
        drop(remains);
        self.waiting[shard] = true;
        if self.attempt_at.is_none() {
            let now = Instant::now();
            self.backoff.failed(now);
            self.attempt_at = Some(now + self.backoff.delay());
        }
    }

    fn attempt(&mut self) {
        for shard in 0..self.waiting.len() {
            if !self.waiting[shard] {
                continue;
            }
            match self.reopen.reopen(shard) {
                Ok(primary) => {
                    // Noted before: the shard may lose it again at once.
                    self.waiting[shard] = !(self.offer)(shard, Box::new(primary));
                    self.backoff.succeeded(Instant::now());
                }
                Err(reason) => tracing::debug!(shard, reason, "the device is not there yet"),
            }
        }
        let waits = self.waiting.contains(&true);
        self.attempt_at = waits.then(|| Instant::now() + self.backoff.delay());
    }
}
