//! What a handle and its shard share: queues, budgets, flags, wakers.
//!
//! Rules: queues are lock-free; each byte counter is raised by the producer and
//! lowered by the consumer; a flag is set after the data that it announces
//! (Release) and read before it (Acquire). `dirty` flags keep at most one notice
//! per connection and one entry per stream under way, so the unbounded queues that
//! carry them are bounded by the number of live handles.

use std::net::SocketAddrV6;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::atomic::AtomicCell;
use crossbeam::queue::SegQueue;
use event_listener::Event;
use futures_channel::oneshot;
use futures_util::task::AtomicWaker;
use quinn_proto::{Dir, StreamId, VarInt};
use rustls_pki_types::CertificateDer;

use super::Command;
use crate::app::ConnId;
use crate::error::ConnectionError;
use crate::proto::ConnectionStats;
use crate::shard::mailbox::Mailbox;

/// Received datagrams that wait for the application, per connection; the oldest go first.
const DATAGRAMS_RECEIVED_MAX: usize = 4096;
/// How often a busy connection's statistics are published.
const STATS_INTERVAL: Duration = Duration::from_millis(1);

/// Zero stands for "none" in the atomics that hold codes.
pub(crate) fn encode_code(code: VarInt) -> u64 {
    code.into_inner() + 1
}

fn decode_code(value: u64) -> Option<VarInt> {
    let code = value.checked_sub(1)?;
    Some(VarInt::from_u64(code).expect("encoded from a VarInt"))
}

/// The answer to a request for a new stream.
pub(crate) type OpenReply = Result<(StreamId, Arc<StreamShared>), ConnectionError>;

/// How a stream's receiving direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecvEnd {
    Finished,
    Reset(VarInt),
    Unknown,
    Lost,
}

/// What became known with the handshake.
#[derive(Debug, Clone)]
pub(crate) struct HandshakeInfo {
    pub(crate) alpn: Option<Vec<u8>>,
    pub(crate) server_name: Option<String>,
    pub(crate) peer_certificates: Option<Vec<CertificateDer<'static>>>,
}

/// Both directions of one stream.
#[derive(Debug, Default)]
pub(crate) struct StreamShared {
    pub(crate) dirty: AtomicBool,

    pub(crate) send_queue: SegQueue<Bytes>,
    pub(crate) send_queued_bytes: AtomicUsize,
    pub(crate) send_waker: AtomicWaker,
    /// Wakes those who wait for the stream's end ([`SendStream::stopped`](crate::stream::SendStream::stopped)).
    pub(crate) end_event: Event,
    pub(crate) finish_requested: AtomicBool,
    /// Every byte and the FIN were acknowledged.
    pub(crate) acknowledged: AtomicBool,
    /// The code of the peer's STOP_SENDING, encoded.
    pub(crate) stopped: AtomicU64,
    reset_requested: AtomicU64,
    pub(crate) priority: AtomicI32,
    pub(crate) priority_set: AtomicI32,

    pub(crate) recv_queue: SegQueue<Bytes>,
    pub(crate) recv_queued_bytes: AtomicUsize,
    pub(crate) recv_waker: AtomicWaker,
    /// The shard stopped reading: the reader must tell when there is room.
    pub(crate) recv_blocked: AtomicBool,
    recv_budget: AtomicUsize,
    recv_end: OnceLock<RecvEnd>,
    stop_requested: AtomicU64,
}

impl StreamShared {
    pub(crate) fn request_reset(&self, code: VarInt) {
        self.reset_requested.store(encode_code(code), Release);
    }

    pub(crate) fn reset_request(&self) -> Option<VarInt> {
        decode_code(self.reset_requested.load(Acquire))
    }

    pub(crate) fn request_stop(&self, code: VarInt) {
        self.stop_requested.store(encode_code(code), Release);
    }

    pub(crate) fn stop_request(&self) -> Option<VarInt> {
        decode_code(self.stop_requested.load(Acquire))
    }

    pub(crate) fn stopped_code(&self) -> Option<VarInt> {
        decode_code(self.stopped.load(Acquire))
    }

    /// Bytes that may wait for the reader; `None`: nobody reads yet.
    pub(crate) fn recv_budget(&self) -> Option<usize> {
        match self.recv_budget.load(Acquire) {
            0 => None,
            bytes => Some(bytes),
        }
    }

    pub(crate) fn set_recv_budget(&self, bytes: usize) {
        self.recv_budget.store(bytes, Release);
    }

    pub(crate) fn end_recv(&self, end: RecvEnd) {
        // Only the first end counts.
        let _ended_before = self.recv_end.set(end);
        self.recv_waker.wake();
    }

    pub(crate) fn recv_end(&self) -> Option<RecvEnd> {
        self.recv_end.get().copied()
    }

    pub(crate) fn wake_all_senders(&self) {
        self.send_waker.wake();
        self.end_event.notify(usize::MAX);
    }
}

/// One connection.
pub(crate) struct ConnShared {
    pub(crate) id: ConnId,
    mailbox: Mailbox,
    pub(crate) dirty: AtomicBool,
    pub(crate) dirty_streams: SegQueue<StreamId>,
    remote: SocketAddrV6,
    handshake: OnceLock<HandshakeInfo>,
    closed: OnceLock<ConnectionError>,
    pub(crate) closed_event: Event,
    close_requested: OnceLock<(VarInt, Bytes)>,
    close_taken: AtomicBool,
    pub(crate) update_keys: AtomicBool,

    pub(crate) opening: [SegQueue<oneshot::Sender<OpenReply>>; 2],
    accepted: [SegQueue<(StreamId, Arc<StreamShared>)>; 2],
    pub(crate) accept_event: [Event; 2],

    pub(crate) datagram_send_queue: SegQueue<Bytes>,
    pub(crate) datagram_pending: Slot,
    pub(crate) datagram_send_bytes: AtomicUsize,
    pub(crate) datagram_send_event: Event,
    /// Largest size plus one; zero: the peer takes none.
    pub(crate) datagram_size_max: AtomicUsize,
    pub(crate) datagrams_refused: AtomicU64,
    datagram_recv_queue: SegQueue<Bytes>,
    pub(crate) datagram_recv_event: Event,
    pub(crate) datagrams_dropped: AtomicU64,

    pub(crate) send_queue_bytes: usize,
    pub(crate) recv_queue_bytes: usize,
    pub(crate) datagram_queue_bytes: usize,
    pub(crate) stats: StatsCell,
}

impl ConnShared {
    pub(crate) fn new(
        id: ConnId,
        mailbox: Mailbox,
        remote: SocketAddrV6,
        send_queue_bytes: usize,
        recv_queue_bytes: usize,
        datagram_queue_bytes: usize,
    ) -> Self {
        Self {
            id,
            mailbox,
            dirty: AtomicBool::new(false),
            dirty_streams: SegQueue::new(),
            remote,
            handshake: OnceLock::new(),
            closed: OnceLock::new(),
            closed_event: Event::new(),
            close_requested: OnceLock::new(),
            close_taken: AtomicBool::new(false),
            update_keys: AtomicBool::new(false),
            opening: Default::default(),
            accepted: Default::default(),
            accept_event: Default::default(),
            datagram_send_queue: SegQueue::new(),
            datagram_pending: Slot::default(),
            datagram_send_bytes: AtomicUsize::new(0),
            datagram_send_event: Event::new(),
            datagram_size_max: AtomicUsize::new(0),
            datagrams_refused: AtomicU64::new(0),
            datagram_recv_queue: SegQueue::new(),
            datagram_recv_event: Event::new(),
            datagrams_dropped: AtomicU64::new(0),
            send_queue_bytes,
            recv_queue_bytes,
            datagram_queue_bytes,
            stats: StatsCell::default(),
        }
    }

    /// Tells the shard that something of this connection is dirty.
    pub(crate) fn notify(&self) {
        // Release publishes what was pushed before; one notice is enough until it is served.
        if !self.dirty.swap(true, AcqRel) {
            self.mailbox.notify(Command::Dirty(self.id));
        }
    }

    /// Tells the shard that something of a stream is dirty.
    pub(crate) fn notify_stream(&self, stream: StreamId, shared: &StreamShared) {
        if !shared.dirty.swap(true, AcqRel) {
            self.dirty_streams.push(stream);
        }
        self.notify();
    }

    pub(crate) fn remote(&self) -> SocketAddrV6 {
        self.remote
    }

    pub(crate) fn handshake(&self) -> Option<&HandshakeInfo> {
        self.handshake.get()
    }

    pub(crate) fn set_handshake(&self, info: HandshakeInfo) {
        let _set_once = self.handshake.set(info);
    }

    /// Ends the connection for every handle.
    pub(crate) fn close(&self, reason: ConnectionError) {
        let _first_reason_counts = self.closed.set(reason);
        self.closed_event.notify(usize::MAX);
        for event in &self.accept_event {
            event.notify(usize::MAX);
        }
        self.datagram_send_event.notify(usize::MAX);
        self.datagram_recv_event.notify(usize::MAX);
        // Requests that were never served: their futures end with the reason above.
        for queue in &self.opening {
            while queue.pop().is_some() {}
        }
    }

    pub(crate) fn closed(&self) -> Option<ConnectionError> {
        self.closed.get().cloned()
    }

    pub(crate) fn request_close(&self, code: VarInt, reason: Bytes) {
        let _first_request_counts = self.close_requested.set((code, reason));
        self.notify();
    }

    /// The request to close, once.
    pub(crate) fn close_request(&self) -> Option<(VarInt, Bytes)> {
        let request = self.close_requested.get()?;
        (!self.close_taken.swap(true, Relaxed)).then(|| request.clone())
    }

    pub(crate) fn offer_stream(&self, dir: Dir, stream: StreamId, shared: Arc<StreamShared>) {
        self.accepted[dir as usize].push((stream, shared));
        self.accept_event[dir as usize].notify(1);
    }

    pub(crate) fn take_stream(&self, dir: Dir) -> Option<(StreamId, Arc<StreamShared>)> {
        self.accepted[dir as usize].pop()
    }

    pub(crate) fn offer_datagram(&self, data: Bytes) {
        if self.datagram_recv_queue.len() >= DATAGRAMS_RECEIVED_MAX {
            // Unreliable by contract: the oldest makes room and is counted.
            self.datagram_recv_queue.pop();
            self.datagrams_dropped.fetch_add(1, Relaxed);
        }
        self.datagram_recv_queue.push(data);
    }

    pub(crate) fn take_datagram(&self) -> Option<Bytes> {
        self.datagram_recv_queue.pop()
    }
}

/// Held by every handle of a connection; the last one to go closes it.
pub(crate) struct ConnRef {
    pub(crate) shared: Arc<ConnShared>,
}

impl ConnRef {
    pub(crate) fn new(shared: Arc<ConnShared>) -> Self {
        Self { shared }
    }
}

impl Drop for ConnRef {
    fn drop(&mut self) {
        if self.shared.closed().is_none() {
            self.shared.request_close(VarInt::from_u32(0), Bytes::new());
        }
    }
}

/// A place for one chunk, used by the shard only.
#[derive(Default)]
pub(crate) struct Slot(AtomicCell<Option<Box<Bytes>>>);

impl Slot {
    pub(crate) fn take(&self) -> Option<Bytes> {
        self.0.take().map(|data| *data)
    }

    pub(crate) fn put(&self, data: Bytes) {
        self.0.store(Some(Box::new(data)));
    }
}

/// Statistics behind a sequence counter: the shard writes, handles read without disturbing it.
#[derive(Default)]
pub(crate) struct StatsCell {
    /// Odd while the shard writes.
    sequence: AtomicU64,
    cells: [AtomicU64; 21],
    published: AtomicCell<Option<Instant>>,
}

impl StatsCell {
    pub(crate) fn is_stale(&self, now: Instant) -> bool {
        let due = self.published.load().is_none_or(|at| now >= at + STATS_INTERVAL);
        if due {
            self.published.store(Some(now));
        }
        due
    }

    pub(crate) fn publish(&self, stats: &ConnectionStats) {
        let sequence = self.sequence.load(Relaxed);
        // The odd number must be visible before any cell (Release fence), and every
        // cell before the even one (Release store).
        self.sequence.store(sequence + 1, Relaxed);
        std::sync::atomic::fence(Release);
        for (cell, value) in self.cells.iter().zip(stats.to_array()) {
            cell.store(value, Relaxed);
        }
        self.sequence.store(sequence + 2, Release);
    }

    pub(crate) fn read(&self) -> ConnectionStats {
        loop {
            let before = self.sequence.load(Acquire);
            let mut values = [0; 21];
            for (cell, value) in self.cells.iter().zip(&mut values) {
                *value = cell.load(Relaxed);
            }
            std::sync::atomic::fence(Acquire);
            if before.is_multiple_of(2) && self.sequence.load(Relaxed) == before {
                return ConnectionStats::from_array(values);
            }
            std::hint::spin_loop();
        }
    }
}
