//! One small thread that keeps identities, trust and ticket keys current, away from the shards.
//!
//! Tasks are plain state machines with a date in and a deadline out, so tests drive them without
//! the thread.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use super::error::CertsError;
use super::wall_clock::WallClock;

/// Longest sleep: bounds how late a jump of the date is noticed.
const SLEEP_MAX: Duration = Duration::from_secs(30);
/// Shortest sleep: bounds what a task that always asks for more can cost.
const SLEEP_MIN: Duration = Duration::from_millis(50);

/// Work that falls due by date.
pub trait Periodic: Send + Sync {
    /// Does what is due at `now` and returns when to call again. Calling early is harmless. May
    /// block on files or on a CA: never call it from a shard.
    fn poll(&self, now: SystemTime) -> SystemTime;
}

#[derive(Debug, Default)]
struct Signal {
    stopped: Mutex<bool>,
    changed: Condvar,
}

/// The running thread; dropping it stops and joins it.
#[derive(Debug)]
pub struct MaintenanceThread {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl MaintenanceThread {
    /// Starts the thread `stoq-certs` over `tasks`.
    ///
    /// # Errors
    /// The system refuses another thread.
    pub fn spawn(
        clock: Arc<dyn WallClock>,
        tasks: Vec<Arc<dyn Periodic>>,
    ) -> Result<Self, CertsError> {
        let signal = Arc::new(Signal::default());
        let seen = Arc::clone(&signal);
        let thread = std::thread::Builder::new()
            .name("stoq-certs".to_owned())
            .spawn(move || run(&*clock, &tasks, &seen))
            .map_err(CertsError::Thread)?;
        Ok(Self { signal, thread: Some(thread) })
    }

    /// Whether the thread runs; it ends early only by a panic in a task.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for MaintenanceThread {
    /// Waits for the task in progress; a CA bounds its own calls.
    fn drop(&mut self) {
        *self.signal.stopped.lock().expect("no panic while locked") = true;
        self.signal.changed.notify_all();
        let Some(thread) = self.thread.take() else { return };
        if thread.join().is_err() {
            tracing::error!("the certificate maintenance thread panicked; renewals had stopped");
        }
    }
}

fn run(clock: &dyn WallClock, tasks: &[Arc<dyn Periodic>], signal: &Signal) {
    loop {
        let due = tasks.iter().map(|task| task.poll(clock.now())).min();
        let sleep = match due {
            Some(due) => due.duration_since(clock.now()).unwrap_or(Duration::ZERO),
            None => SLEEP_MAX,
        };
        let stopped = signal.stopped.lock().expect("no panic while locked");
        let (stopped, _) = signal
            .changed
            .wait_timeout_while(stopped, sleep.clamp(SLEEP_MIN, SLEEP_MAX), |stopped| !*stopped)
            .expect("no panic while locked");
        if *stopped {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::wall_clock::SystemWallClock;
    use super::*;

    #[derive(Default)]
    struct Counting(AtomicU64);

    impl Periodic for Counting {
        fn poll(&self, now: SystemTime) -> SystemTime {
            self.0.fetch_add(1, Ordering::SeqCst);
            now + Duration::from_millis(1)
        }
    }

    #[test]
    fn the_thread_polls_and_stops() {
        let task = Arc::new(Counting::default());
        let thread =
            MaintenanceThread::spawn(Arc::new(SystemWallClock), vec![task.clone()]).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while task.0.load(Ordering::SeqCst) < 3 {
            assert!(std::time::Instant::now() < deadline, "the thread does not poll");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(thread.is_running());
        drop(thread);
        let polls = task.0.load(Ordering::SeqCst);
        std::thread::sleep(3 * SLEEP_MIN);
        assert_eq!(task.0.load(Ordering::SeqCst), polls);
    }
}
