//! The applications of a scenario's hosts: one writes what its flow says, the other counts.

use std::any::Any;
use std::net::SocketAddrV6;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::{Dir, StreamId};

use crate::app::{ConnId, ShardApp, ShardCx, WriteOutcome};
use crate::datapath::sim::FlowSpec;
use crate::error::ConnectionError;

/// Written by reference, again and again: the send buffer holds no copy.
const BLOCK_BYTES: usize = 1 << 20;

/// What the runner sees of a flow's two applications. All run in one thread; the
/// atomics exist because an application is `Send`, and are relaxed.
#[derive(Debug, Default)]
pub(super) struct Progress {
    received_bytes: AtomicU64,
    /// Virtual nanoseconds, plus one.
    completed_ns: AtomicU64,
    /// Why the flow cannot go on.
    failure: OnceLock<String>,
}

impl Progress {
    pub(super) fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Relaxed)
    }

    /// When the last byte was received.
    pub(super) fn completed_at(&self) -> Option<Duration> {
        self.completed_ns.load(Relaxed).checked_sub(1).map(Duration::from_nanos)
    }

    /// Why the flow ended before its last byte, if it did.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// The first reason is the one that counts: the rest follows from it.
    fn fail(&self, reason: impl FnOnce() -> String) {
        self.failure.get_or_init(reason);
    }
}

/// One end of a flow.
pub(super) struct Workload {
    spec: FlowSpec,
    /// Whether this end writes.
    sends: bool,
    /// Whom this end connects to; `None` waits for the other.
    remote: Option<SocketAddrV6>,
    progress: Arc<Progress>,
    /// The instant that stands for virtual time zero.
    base: Instant,
    block: Bytes,
    conn: Option<ConnId>,
    streams: Vec<StreamId>,
    /// Released to each stream and not yet taken by it, bytes.
    pending: Vec<u64>,
    /// Not yet released, bytes.
    unreleased: u64,
    next_burst: Option<Instant>,
}

impl Workload {
    pub(super) fn new(
        spec: FlowSpec,
        sends: bool,
        remote: Option<SocketAddrV6>,
        progress: Arc<Progress>,
        base: Instant,
    ) -> Self {
        let unreleased = spec.total_bytes();
        let block = Bytes::from(if sends { vec![0; BLOCK_BYTES] } else { Vec::new() });
        let (streams, pending) = (Vec::new(), Vec::new());
        Self {
            spec,
            sends,
            remote,
            progress,
            base,
            block,
            conn: None,
            streams,
            pending,
            unreleased,
            next_burst: None,
        }
    }

    /// Opens as many streams as the peer allows by now; the first release waits for one.
    fn open(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        while (self.streams.len() as u64) < self.spec.streams {
            let Some(stream) = cx.open(conn, Dir::Uni) else { return };
            self.streams.push(stream);
            self.pending.push(0);
        }
    }

    /// Shares `bytes` over the streams, the first ones getting what does not divide.
    fn release(&mut self, bytes: u64) {
        let bytes = bytes.min(self.unreleased);
        self.unreleased -= bytes;
        let count = self.streams.len() as u64;
        for (index, pending) in (0..count).zip(&mut self.pending) {
            *pending += bytes / count + u64::from(index < bytes % count);
        }
    }

    /// Releases a burst and sets the time of the next.
    fn burst(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        self.release(self.spec.chunk_bytes);
        if self.unreleased > 0 {
            let due = self.next_burst.unwrap_or(cx.now());
            let next = due + Duration::from_millis(self.spec.chunk_every_ms);
            self.next_burst = Some(next);
            cx.set_timer(next, 0);
        }
        self.write_all(cx, conn);
    }

    fn write_all(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        for index in 0..self.streams.len() {
            self.write(cx, conn, index);
        }
    }

    fn write(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, index: usize) {
        while self.pending[index] > 0 {
            let len = self.pending[index].min(BLOCK_BYTES as u64) as usize;
            match cx.write(conn, self.streams[index], &mut [self.block.slice(..len)]) {
                WriteOutcome::Written(bytes) => self.pending[index] -= bytes as u64,
                WriteOutcome::Blocked => return,
                outcome @ (WriteOutcome::Stopped(_) | WriteOutcome::Unknown) => {
                    self.progress.fail(|| format!("the stream takes no data: {outcome:?}"));
                    return;
                }
            }
        }
        if self.unreleased == 0 {
            // `false` when it was finished before: a burst writes to every stream.
            let _finished_now = cx.finish(conn, self.streams[index]);
        }
    }
}

impl ShardApp for Workload {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, _start: Box<dyn Any + Send>) {
        if let Some(remote) = self.remote
            && let Err(error) = cx.connect(remote, super::runner::SERVER_NAME)
        {
            self.progress.fail(|| format!("connecting failed: {error}"));
        }
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        if !self.sends {
            return;
        }
        self.conn = Some(conn);
        self.open(cx, conn);
        let bursts_only = self.spec.chunk_bytes > 0 && self.spec.chunks == 0;
        if bursts_only || self.spec.bytes == 0 {
            self.burst(cx, conn);
            return;
        }
        self.release(self.spec.bytes);
        if self.unreleased > 0 {
            let next = cx.now() + Duration::from_millis(self.spec.chunk_every_ms);
            self.next_burst = Some(next);
            cx.set_timer(next, 0);
        }
        self.write_all(cx, conn);
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, _token: u64) {
        if let Some(conn) = self.conn {
            self.burst(cx, conn);
        }
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        if let Some(index) = self.streams.iter().position(|&known| known == stream) {
            self.write(cx, conn, index);
        }
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        while let Some(stream) = cx.accept_stream(conn, dir) {
            self.handle_readable(cx, conn, stream);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        let mut bytes = 0;
        // In any order: an overflow of the queue of a long fat path leaves more gaps than
        // quinn-proto keeps for a reader that wants them filled first.
        cx.read_unordered(conn, stream, usize::MAX, |_offset, data| bytes += data.len() as u64);
        let total = self.progress.received_bytes() + bytes;
        self.progress.received_bytes.store(total, Relaxed);
        if total >= self.spec.total_bytes() && self.progress.completed_at().is_none() {
            let elapsed = (cx.now() - self.base).as_nanos() as u64;
            self.progress.completed_ns.store(elapsed + 1, Relaxed);
        }
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, _conn: ConnId, reason: &ConnectionError) {
        self.progress.fail(|| format!("the connection was lost: {reason}"));
    }
}
