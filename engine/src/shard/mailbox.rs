//! Where other threads reach a shard: bounded lock-free queues and one wake-up.
//!
//! Senders push, then look at the `parked` flag; only the first one after the
//! shard went to sleep pays for a system call. The shard sets the flag, looks at
//! its queues once more, and only then sleeps, so no wake-up is lost.

use std::any::Any;
use std::net::SocketAddrV6;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::queue::{ArrayQueue, SegQueue};
use quinn_proto::VarInt;
use rustix::event::{EventfdFlags, eventfd};

use crate::config::HANDOFF_DATAGRAMS_MAX;
use crate::datapath::RxDatagram;
use crate::handles::Command as HandleCommand;

/// What another thread asks of a shard.
pub(crate) enum Command {
    /// For the async handles.
    Handles(HandleCommand),
    /// For the application on the shard.
    App(Box<dyn Any + Send>),
    /// Start a connection for a handle.
    Connect {
        remote: SocketAddrV6,
        server_name: String,
        config: Option<quinn_proto::ClientConfig>,
        reply: crate::handles::ConnectReply,
    },
    /// A datapath that was opened for this shard.
    Datapath(Box<dyn Any + Send>),
    /// Stop: close everything with this code and reason by the deadline.
    Shutdown(ShutdownOrder),
}

/// How a shard shall end.
#[derive(Debug, Clone)]
pub(crate) struct ShutdownOrder {
    pub(crate) code: VarInt,
    pub(crate) reason: Bytes,
    /// How long streams may go on, from the order's arrival.
    pub(crate) grace: std::time::Duration,
}

/// A mailbox that others push into; cheap to clone.
#[derive(Clone)]
pub(crate) struct Mailbox {
    inner: Arc<Inner>,
}

struct Inner {
    commands: ArrayQueue<Command>,
    datagrams: ArrayQueue<RxDatagram>,
    /// Notices that are bounded by construction: at most one per live handle object.
    notices: SegQueue<HandleCommand>,
    parked: AtomicBool,
    stopped: AtomicBool,
    /// When the oldest thing that waits was pushed, ns after `epoch`; zero: nothing waits.
    waiting_since_ns: AtomicU64,
    /// None: waits are not measured (virtual time).
    epoch: Option<Instant>,
    pushing: AtomicUsize,
    wake: OwnedFd,
}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mailbox").field("stopped", &self.is_stopped()).finish_non_exhaustive()
    }
}

impl Mailbox {
    /// A mailbox for `capacity` commands.
    ///
    /// # Errors
    /// When the system gives no eventfd.
    pub(crate) fn new(capacity: usize) -> std::io::Result<Self> {
        Self::with_epoch(capacity, HANDOFF_DATAGRAMS_MAX, Some(Instant::now()))
    }

    /// As [`new`](Self::new), for a shard whose clock is not the system's and to which others hand
    /// over at most `handoff_datagrams`.
    pub(crate) fn without_wait_times(
        capacity: usize,
        handoff_datagrams: usize,
    ) -> std::io::Result<Self> {
        Self::with_epoch(capacity, handoff_datagrams, None)
    }

    fn with_epoch(
        capacity: usize,
        handoff_datagrams: usize,
        epoch: Option<Instant>,
    ) -> std::io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            inner: Arc::new(Inner {
                commands: ArrayQueue::new(capacity),
                datagrams: ArrayQueue::new(handoff_datagrams),
                notices: SegQueue::new(),
                parked: AtomicBool::new(false),
                stopped: AtomicBool::new(false),
                waiting_since_ns: AtomicU64::new(0),
                epoch,
                pushing: AtomicUsize::new(0),
                wake,
            }),
        })
    }

    /// Pushes a command and wakes the shard; gives it back when the mailbox is full or the shard gone.
    // The command is handed back whole so that its reply can be failed by the caller.
    #[allow(clippy::result_large_err)]
    pub(crate) fn push(&self, command: Command) -> Result<(), Command> {
        // Counted before `stopped` is read, so that the shard's last drain waits for us.
        self.inner.pushing.fetch_add(1, Ordering::SeqCst);
        let result = if self.inner.stopped.load(Ordering::SeqCst) {
            Err(command)
        } else {
            self.inner.commands.push(command)
        };
        self.inner.pushing.fetch_sub(1, Ordering::SeqCst);
        if result.is_ok() {
            self.note_waiting();
            self.wake();
        }
        result
    }

    /// Whether the shard has ended.
    pub(crate) fn is_stopped(&self) -> bool {
        self.inner.stopped.load(Ordering::SeqCst)
    }

    /// Pushes a notice that must not fail; the caller keeps at most one per handle in the queue.
    pub(crate) fn notify(&self, notice: HandleCommand) {
        // Counted as in `push`: a notice may carry a reply, which the last drain must drop.
        self.inner.pushing.fetch_add(1, Ordering::SeqCst);
        let taken = !self.inner.stopped.load(Ordering::SeqCst);
        if taken {
            self.inner.notices.push(notice);
            self.note_waiting();
        }
        self.inner.pushing.fetch_sub(1, Ordering::SeqCst);
        if taken {
            self.wake();
        }
    }

    /// Hands a datagram over; gives it back when the other shard is too far behind.
    // The datagram is handed back so that the caller counts what it drops.
    #[allow(clippy::result_large_err)]
    pub(crate) fn hand_over(&self, datagram: RxDatagram) -> Result<(), RxDatagram> {
        self.inner.datagrams.push(datagram)
    }

    /// Notes the time, unless something waits already. Relaxed: a statistic, which at worst
    /// misses a wait.
    fn note_waiting(&self) {
        let Some(epoch) = self.inner.epoch else { return };
        if self.inner.waiting_since_ns.load(Relaxed) == 0 {
            let since_ns = u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.inner.waiting_since_ns.store(since_ns.max(1), Relaxed);
        }
    }

    /// Wakes the shard if it sleeps.
    pub(crate) fn wake(&self) {
        // SeqCst against `prepare_to_park`: either the shard sees what was pushed,
        // or we see that it is parked.
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.inner.parked.load(Ordering::Relaxed)
            && self.inner.parked.swap(false, Ordering::SeqCst)
        {
            // EAGAIN means that the counter is already high: the shard wakes up anyway.
            let _woken_anyway = rustix::io::write(&self.inner.wake, &1u64.to_ne_bytes());
        }
    }

    // --- the shard's side ----------------------------------------------------------

    /// How long the oldest thing has waited that is about to be taken; `None`: nothing waits.
    pub(crate) fn take_wait(&self, now: Instant) -> Option<Duration> {
        let epoch = self.inner.epoch?;
        if self.inner.waiting_since_ns.load(Relaxed) == 0 {
            return None;
        }
        let since = epoch + Duration::from_nanos(self.inner.waiting_since_ns.swap(0, Relaxed));
        Some(now.saturating_duration_since(since))
    }

    pub(crate) fn pop(&self) -> Option<Command> {
        self.inner.commands.pop()
    }

    pub(crate) fn pop_notice(&self) -> Option<HandleCommand> {
        self.inner.notices.pop()
    }

    pub(crate) fn pop_datagram(&self) -> Option<RxDatagram> {
        self.inner.datagrams.pop()
    }

    /// Announces that the shard is about to sleep; `false` when something arrived meanwhile.
    pub(crate) fn prepare_to_park(&self) -> bool {
        self.inner.parked.store(true, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
        let empty = self.inner.commands.is_empty()
            && self.inner.notices.is_empty()
            && self.inner.datagrams.is_empty();
        if !empty {
            self.inner.parked.store(false, Ordering::SeqCst);
        }
        empty
    }

    /// The shard is awake again: the wake-up is consumed.
    pub(crate) fn unpark(&self) {
        self.inner.parked.store(false, Ordering::SeqCst);
        let mut count = [0; 8];
        // EAGAIN: nobody woke us, a packet or a deadline did.
        let _nobody_woke_us = rustix::io::read(&self.inner.wake, &mut count);
    }

    /// No command is taken from now on; returns when the last one under way has been pushed.
    pub(crate) fn stop(&self) {
        self.inner.stopped.store(true, Ordering::SeqCst);
        while self.inner.pushing.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.inner.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(number: u32) -> Command {
        Command::App(Box::new(number))
    }

    #[test]
    fn a_full_mailbox_gives_the_command_back() {
        let mailbox = Mailbox::new(2).expect("eventfd");
        assert!(mailbox.push(app(1)).is_ok());
        assert!(mailbox.push(app(2)).is_ok());
        assert!(mailbox.push(app(3)).is_err());
        assert!(mailbox.pop().is_some());
        assert!(mailbox.push(app(4)).is_ok());
    }

    #[test]
    fn parking_is_refused_while_something_waits() {
        let mailbox = Mailbox::new(2).expect("eventfd");
        assert!(mailbox.push(app(1)).is_ok());
        assert!(!mailbox.prepare_to_park());
        assert!(mailbox.pop().is_some());
        assert!(mailbox.prepare_to_park());
    }

    #[test]
    fn one_wake_up_per_sleep() {
        let mailbox = Mailbox::new(8).expect("eventfd");
        assert!(mailbox.prepare_to_park());
        for number in 0..4 {
            assert!(mailbox.push(app(number)).is_ok());
        }
        let mut count = [0; 8];
        rustix::io::read(mailbox.wake_fd(), &mut count).expect("woken");
        assert_eq!(u64::from_ne_bytes(count), 1, "one system call for four commands");
    }

    #[test]
    fn the_oldest_wait_is_told_once() {
        let mailbox = Mailbox::new(8).expect("eventfd");
        assert_eq!(mailbox.take_wait(Instant::now()), None);
        assert!(mailbox.push(app(1)).is_ok());
        std::thread::sleep(Duration::from_millis(5));
        assert!(mailbox.push(app(2)).is_ok());
        let wait = mailbox.take_wait(Instant::now()).expect("waited");
        assert!(wait >= Duration::from_millis(5), "{wait:?} is not the first one's");
        assert_eq!(mailbox.take_wait(Instant::now()), None);
        let unmeasured = Mailbox::without_wait_times(8, 8).expect("eventfd");
        assert!(unmeasured.push(app(1)).is_ok());
        assert_eq!(unmeasured.take_wait(Instant::now()), None);
    }

    #[test]
    fn a_stopped_mailbox_takes_nothing() {
        let mailbox = Mailbox::new(2).expect("eventfd");
        mailbox.stop();
        assert!(mailbox.push(app(1)).is_err());
        assert!(mailbox.pop().is_none());
    }
}
