//! What a handle and its shard share: queues, budgets, flags, wakers.
//!
//! Rules: queues are lock-free; each byte counter is raised by the producer and
//! lowered by the consumer; a flag is set after the data that it announces
//! (Release) and read before it (Acquire). `dirty` flags keep at most one notice
//! per connection and one entry per stream under way, so the unbounded queues that
//! carry them are bounded by the number of live handles.

use std::net::SocketAddrV6;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, fence};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use crossbeam::atomic::AtomicCell;
use crossbeam::queue::SegQueue;
use event_listener::Event;
use futures_channel::oneshot::{self, Receiver};
use futures_util::task::AtomicWaker;
use quinn_proto::{Dir, StreamId, VarInt};
use rustls_pki_types::CertificateDer;

use super::Command;
use crate::app::ConnId;
use crate::error::ConnectionError;
use crate::proto::{ConnectionStats, STATS_NUMBERS};
use crate::shard::mailbox::Mailbox;

/// Received datagrams that wait for the application, per connection; the oldest go first.
const DATAGRAMS_RECEIVED_MAX: usize = 4096;
/// Their bytes at most.
const DATAGRAMS_RECEIVED_BYTES_MAX: usize = 1 << 20;

/// Zero stands for "none" in the atomics that hold codes.
pub(crate) fn encode_code(code: VarInt) -> u64 {
    code.into_inner() + 1
}

fn decode_code(value: u64) -> Option<VarInt> {
    let code = value.checked_sub(1)?;
    Some(VarInt::from_u64(code).expect("encoded from a VarInt"))
}

/// The answer to a request for a new stream. Dropped before it is claimed (the future was
/// cancelled), it abandons the stream in both directions.
pub(crate) struct OpenedStream {
    conn: Arc<ConnShared>,
    id: StreamId,
    stream: Option<Arc<StreamShared>>,
}

impl OpenedStream {
    pub(crate) fn new(conn: Arc<ConnShared>, id: StreamId, stream: Arc<StreamShared>) -> Self {
        Self { conn, id, stream: Some(stream) }
    }

    /// Leaves the stream to the caller.
    pub(crate) fn claim(mut self) -> (StreamId, Arc<StreamShared>) {
        (self.id, self.stream.take().expect("claimed once: this consumes it"))
    }
}

impl Drop for OpenedStream {
    fn drop(&mut self) {
        if let Some(stream) = &self.stream {
            stream.request_reset(VarInt::from_u32(0));
            stream.request_stop(VarInt::from_u32(0));
            self.conn.notify_stream(self.id, stream);
        }
    }
}

/// How a stream's receiving direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecvEnd {
    Finished,
    Reset(VarInt),
    Unknown,
    Lost,
    /// It carried early data that the server refused.
    Rejected,
}

/// What became known with the handshake.
#[derive(Debug, Clone)]
pub(crate) struct HandshakeInfo {
    pub(crate) settled: Option<crate::certs::HandshakeInfo>,
    pub(crate) peer_certificates: Option<Vec<CertificateDer<'static>>>,
    /// Whether the server took our early data; `None`: none was possible, or we are the server.
    pub(crate) early_data_accepted: Option<bool>,
}

/// Both directions of one stream.
#[derive(Debug, Default)]
pub(crate) struct StreamShared {
    pub(crate) dirty: AtomicBool,
    /// It was opened before the handshake was complete.
    pub(crate) early: bool,

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
    early_rejected: AtomicBool,
    reset_requested: AtomicU64,
    pub(crate) priority: AtomicI32,
    pub(crate) priority_set: AtomicI32,

    pub(crate) recv_queue: SegQueue<Bytes>,
    pub(crate) recv_queued_bytes: AtomicUsize,
    pub(crate) recv_waker: AtomicWaker,
    /// The shard stopped reading: the reader must tell when there is room.
    pub(crate) recv_blocked: AtomicBool,
    /// The reader found its queue empty and waits.
    pub(crate) recv_waiting: AtomicBool,
    recv_end: OnceLock<RecvEnd>,
    stop_requested: AtomicU64,
}

impl StreamShared {
    pub(crate) fn new(early: bool) -> Self {
        Self { early, ..Self::default() }
    }

    /// The server refused the early data that the stream carried: it is void.
    pub(crate) fn reject_early(&self) {
        self.early_rejected.store(true, Release);
    }

    pub(crate) fn is_early_rejected(&self) -> bool {
        self.early_rejected.load(Acquire)
    }

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
    /// Bytes that writes copied, until the shard counts them.
    pub(crate) copied_bytes: AtomicU64,

    pub(crate) opening: [SegQueue<oneshot::Sender<OpenedStream>>; 2],
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
    datagram_recv_bytes: AtomicUsize,
    pub(crate) datagram_recv_event: Event,
    pub(crate) datagrams_dropped: AtomicU64,

    pub(crate) send_queue_bytes: usize,
    pub(crate) recv_queue_bytes: usize,
    /// Bytes that wait in all stream handles together, and their bound.
    pub(crate) recv_queued_bytes: AtomicUsize,
    pub(crate) recv_budget_bytes: usize,
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
        recv_budget_bytes: usize,
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
            copied_bytes: AtomicU64::new(0),
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
            datagram_recv_bytes: AtomicUsize::new(0),
            datagram_recv_event: Event::new(),
            datagrams_dropped: AtomicU64::new(0),
            send_queue_bytes,
            recv_queue_bytes,
            recv_queued_bytes: AtomicUsize::new(0),
            recv_budget_bytes,
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

    /// Hands received bytes to a stream's reader, who is woken by the caller.
    pub(crate) fn push_received(&self, shared: &StreamShared, bytes: Bytes) {
        // Counted first: the consumer may take the chunk, and its count, at once.
        shared.recv_queued_bytes.fetch_add(bytes.len(), AcqRel);
        self.recv_queued_bytes.fetch_add(bytes.len(), AcqRel);
        shared.recv_waiting.store(false, Relaxed);
        shared.recv_queue.push(bytes);
    }

    /// The shard has no room for a stream: its reader will notify. `false` when the reader made
    /// room, or began to wait, meanwhile.
    pub(crate) fn block_recv(&self, shared: &StreamShared) -> bool {
        shared.recv_blocked.store(true, Relaxed);
        // SeqCst against the reader's fences: either we see its progress, or it sees the flag.
        fence(SeqCst);
        if super::recv_room(self, shared) == 0 {
            return true;
        }
        shared.recv_blocked.store(false, Relaxed);
        false
    }

    /// The next received chunk of a stream; lets the shard read on once half of the queue is free.
    pub(crate) fn pop_received(&self, stream: StreamId, shared: &StreamShared) -> Option<Bytes> {
        let chunk = shared.recv_queue.pop()?;
        let left = shared.recv_queued_bytes.fetch_sub(chunk.len(), AcqRel) - chunk.len();
        self.recv_queued_bytes.fetch_sub(chunk.len(), AcqRel);
        if left <= self.recv_queue_bytes / 2 {
            self.unblock_recv(stream, shared);
        }
        Some(chunk)
    }

    /// A stream's reader found nothing and is about to wait.
    pub(crate) fn await_received(&self, stream: StreamId, shared: &StreamShared) {
        shared.recv_waiting.store(true, Relaxed);
        self.unblock_recv(stream, shared);
    }

    fn unblock_recv(&self, stream: StreamId, shared: &StreamShared) {
        // See `block_recv`.
        fence(SeqCst);
        if shared.recv_blocked.load(Relaxed) && shared.recv_blocked.swap(false, AcqRel) {
            self.notify_stream(stream, shared);
        }
    }

    /// Nobody reads the stream any more: what waits is dropped.
    pub(crate) fn discard_received(&self, stream: StreamId, shared: &StreamShared) {
        while self.pop_received(stream, shared).is_some() {}
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
        // Against `request_open`: either it sees the reason, or its request is dropped below.
        fence(SeqCst);
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

    /// Asks the shard for a new stream.
    pub(crate) fn request_open(&self, dir: Dir) -> Result<Receiver<OpenedStream>, ConnectionError> {
        let (reply, answer) = oneshot::channel();
        self.opening[dir as usize].push(reply);
        fence(SeqCst);
        if let Some(reason) = self.closed() {
            return Err(reason);
        }
        self.notify();
        Ok(answer)
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
        // Additional: a second stream wakes a second waiter, though the first one has not run yet.
        self.accept_event[dir as usize].notify_additional(1);
    }

    pub(crate) fn take_stream(&self, dir: Dir) -> Option<(StreamId, Arc<StreamShared>)> {
        self.accepted[dir as usize].pop()
    }

    pub(crate) fn offer_datagram(&self, data: Bytes) {
        while self.datagram_recv_queue.len() >= DATAGRAMS_RECEIVED_MAX
            || self.datagram_recv_bytes.load(Acquire) + data.len() > DATAGRAMS_RECEIVED_BYTES_MAX
        {
            // Unreliable by contract: the oldest makes room and is counted.
            if self.take_datagram().is_none() {
                break;
            }
            self.datagrams_dropped.fetch_add(1, Relaxed);
        }
        self.datagram_recv_bytes.fetch_add(data.len(), AcqRel);
        self.datagram_recv_queue.push(data);
    }

    pub(crate) fn take_datagram(&self) -> Option<Bytes> {
        let data = self.datagram_recv_queue.pop()?;
        self.datagram_recv_bytes.fetch_sub(data.len(), AcqRel);
        Some(data)
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
    cells: [AtomicU64; STATS_NUMBERS],
}

impl StatsCell {
    pub(crate) fn publish(&self, stats: &ConnectionStats) {
        let sequence = self.sequence.load(Relaxed);
        // The odd number must be visible before any cell (Release fence), and every
        // cell before the even one (Release store).
        self.sequence.store(sequence + 1, Relaxed);
        fence(Release);
        for (cell, value) in self.cells.iter().zip(stats.to_array()) {
            cell.store(value, Relaxed);
        }
        self.sequence.store(sequence + 2, Release);
    }

    pub(crate) fn read(&self) -> ConnectionStats {
        loop {
            let before = self.sequence.load(Acquire);
            let mut values = [0; STATS_NUMBERS];
            for (cell, value) in self.cells.iter().zip(&mut values) {
                *value = cell.load(Relaxed);
            }
            fence(Acquire);
            if before.is_multiple_of(2) && self.sequence.load(Relaxed) == before {
                return ConnectionStats::from_array(values);
            }
            std::hint::spin_loop();
        }
    }
}
