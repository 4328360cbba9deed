//! The shard's end of the async handles: a [`ShardApp`] that bridges to other threads.
//!
//! Each connection and stream has a shared part (`shared`): lock-free queues with
//! byte budgets, flags and wakers. Handles push into them and send one notice
//! per connection however much they pushed; [`HandleApp::pump`] then serves
//! everything that is dirty in one pass of the turn.
//!
//! Back-pressure is real in both directions: a writer waits while its queue is
//! over budget, and the shard stops reading a stream whose reader is behind, so
//! that QUIC's flow control stops the peer.

mod early;
mod pool;
mod shared;

use std::collections::VecDeque;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_channel::oneshot;
use quinn_proto::{Dir, StreamId, VarInt};
use rustc_hash::FxHashMap;
use slab::Slab;

use crate::app::{ConnId, Incoming as RawIncoming, ReadOutcome, ShardApp, ShardCx, WriteOutcome};
use crate::config::STATS_PUBLISHED_PER_TURN_MAX;
use crate::connection::Connection;
use crate::engine::EngineShared;
use crate::error::{ConnectError, ConnectionError, SendDatagramError};
use crate::pool::{CheckoutError, Lease, PoolEvent};
use crate::stream::{RecvStream, SendStream};

pub(crate) use early::ConnectReply;
pub(crate) use pool::{CheckoutReply, PoolCommand};
pub(crate) use shared::{
    ConnRef, ConnShared, HandshakeInfo, OpenedStream, RecvEnd, StreamShared, encode_code,
};

/// Small writes are gathered up to this size: quinn-proto's send buffer is searched linearly.
const COALESCE_BYTES: usize = 16 * 1024;
/// Chunks up to this size are copied into a gathered one; larger ones go by reference.
const COALESCE_CHUNK_BYTES_MAX: usize = 8 * 1024;
/// What a waiting reader gets although other streams' readers have filled the connection's queue.
const WAITING_READER_BYTES_MIN: usize = 16 * 1024;

/// How often a busy connection's statistics are published.
const STATS_INTERVAL: Duration = Duration::from_millis(1);

/// What handles ask of their shard.
pub(crate) enum Command {
    /// Something of this connection is dirty.
    Dirty(ConnId),
    /// The handle of this connection attempt was dropped.
    Abandoned(ConnId),
    /// What to do with a client that knocked.
    Incoming { key: usize, decision: Decision },
    /// A client that an application on the shard dropped without an answer.
    Undecided(Box<quinn_proto::Incoming>),
    /// For the connection pool.
    Pool(PoolCommand),
}

/// The application's answer to a client that knocked.
pub(crate) enum Decision {
    Accept(ConnectReply),
    Refuse,
    Retry,
    Ignore,
}

/// One stream as the shard sees it.
struct Stream {
    shared: Arc<StreamShared>,
    /// Taken from the handle's queue but not yet by quinn-proto.
    pending: Option<Bytes>,
    finish_sent: bool,
    send_over: bool,
    recv_over: bool,
}

impl Stream {
    /// Nothing more is sent: what is queued is dropped, whoever waits is told.
    fn end_send(&mut self) {
        self.pending = None;
        self.send_over = true;
        while self.shared.send_queue.pop().is_some() {}
        self.shared.wake_all_senders();
    }
}

struct Conn {
    shared: Arc<ConnShared>,
    connecting: Option<oneshot::Sender<Result<Connection, ConnectionError>>>,
    /// The handle that was given out before the handshake's end, if it still exists.
    early: Weak<ConnRef>,
    /// The pool's own handle.
    pooled: Option<Arc<ConnRef>>,
    streams: FxHashMap<StreamId, Stream>,
    opening: [VecDeque<oneshot::Sender<OpenedStream>>; 2],
    /// It is in the list of those whose statistics changed.
    unpublished: bool,
}

/// The shard's end of all handles.
pub(crate) struct HandleApp {
    engine: Arc<EngineShared>,
    conns: FxHashMap<ConnId, Conn>,
    incoming: Slab<RawIncoming>,
    /// Callers that wait for a pooled connection.
    checkouts: Slab<CheckoutReply>,
    dirty: Vec<ConnId>,
    /// Connections whose statistics changed since they were published, each once.
    unpublished: VecDeque<ConnId>,
    /// Busy connections' statistics are published then.
    publish_at: Option<Instant>,
    gather: BytesMut,
    streams: usize,
}

impl HandleApp {
    pub(crate) fn new(engine: Arc<EngineShared>) -> Self {
        Self {
            engine,
            conns: FxHashMap::default(),
            incoming: Slab::new(),
            checkouts: Slab::new(),
            dirty: Vec::new(),
            unpublished: VecDeque::new(),
            publish_at: None,
            gather: BytesMut::new(),
            streams: 0,
        }
    }

    pub(crate) fn handle_command(&mut self, cx: &mut ShardCx<'_>, command: Command) {
        match command {
            Command::Dirty(conn) => self.dirty.push(conn),
            Command::Abandoned(conn) => self.abandon_attempt(cx, conn),
            Command::Incoming { key, decision } => self.decide(cx, key, decision),
            Command::Undecided(incoming) => {
                cx.proto.counters.incoming_refused += 1;
                cx.proto.refuse(*incoming);
            }
            Command::Pool(command) => self.handle_pool_command(cx, command),
        }
    }

    /// Serves every connection that a handle made dirty; `false` when there was none.
    pub(crate) fn pump(&mut self, cx: &mut ShardCx<'_>) -> bool {
        if self.dirty.is_empty() {
            return false;
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        for id in dirty.drain(..) {
            self.serve(cx, id);
        }
        // Keep the allocation; nothing was pushed meanwhile but by ourselves.
        if self.dirty.is_empty() {
            self.dirty = dirty;
        }
        true
    }

    /// The outcome of starting a connection for a handle.
    pub(crate) fn handle_connect_result(
        &mut self,
        cx: &mut ShardCx<'_>,
        result: Result<ConnId, ConnectError>,
        reply: ConnectReply,
    ) {
        match result {
            Ok(id) => self.insert(cx, id, Some(reply)),
            Err(error) => reply.fail(error),
        }
    }

    /// Streams that handles hold now.
    pub(crate) fn streams(&self) -> usize {
        self.streams
    }

    /// Refuses every client that still waits for the application's answer.
    pub(crate) fn refuse_waiting(&mut self, cx: &mut ShardCx<'_>) {
        for incoming in self.incoming.drain() {
            cx.refuse(incoming);
        }
    }

    /// Notes what a shutdown cut off.
    pub(crate) fn note_cut_off(&self, connections: u64, streams: u64) {
        self.engine.note_cut_off(connections, streams);
    }

    /// Tells everything that is left that the shard is gone.
    pub(crate) fn end(&mut self, reason: &ConnectionError) {
        for (_, conn) in self.conns.drain() {
            close_all(conn, reason);
        }
        self.streams = 0;
        for reply in self.checkouts.drain() {
            let _nobody_waits = reply.send(Err(CheckoutError::Connect(reason.clone())));
        }
        self.engine.shard_ended();
    }

    /// Drops a connection's entry and tells its handles.
    fn forget(&mut self, id: ConnId, reason: &ConnectionError) {
        if let Some(conn) = self.conns.remove(&id) {
            self.streams -= conn.streams.len();
            close_all(conn, reason);
        }
    }

    fn decide(&mut self, cx: &mut ShardCx<'_>, key: usize, decision: Decision) {
        let Some(incoming) = self.incoming.try_remove(key) else { return };
        match decision {
            // A handle dropped before its turn came is a refusal.
            Decision::Accept(reply) if reply.is_canceled() => cx.refuse(incoming),
            Decision::Accept(reply) => match cx.accept(incoming) {
                Ok(id) => self.insert(cx, id, Some(reply)),
                Err(error) => reply.end(error),
            },
            Decision::Refuse => cx.refuse(incoming),
            Decision::Retry => {
                if let Err(validated) = cx.retry(incoming) {
                    // Validated already: a retry would loop, so the client is refused.
                    cx.refuse(validated);
                }
            }
            Decision::Ignore => cx.ignore(incoming),
        }
    }

    fn insert(&mut self, cx: &mut ShardCx<'_>, id: ConnId, reply: Option<ConnectReply>) {
        let mailbox = self.engine.mailbox(cx.shard());
        let (mut connecting, early) = reply.map(ConnectReply::into_parts).unzip();
        let canceled = connecting
            .as_mut()
            .is_some_and(|connecting| early::watch_attempt(connecting, &mailbox, id));
        let config = cx.proto.config();
        let shared = Arc::new(ConnShared::new(
            id,
            mailbox,
            cx.remote(id).expect("the connection was just made"),
            config.stream_send_queue_bytes,
            config.stream_receive_queue_bytes,
            config.handle_receive_queue_bytes() as usize,
            config.datagram_send_buffer_size,
        ));
        let conn = Conn {
            shared,
            connecting,
            early: Weak::new(),
            pooled: None,
            streams: FxHashMap::default(),
            opening: Default::default(),
            unpublished: false,
        };
        let conn = self.conns.entry(id).insert_entry(conn).into_mut();
        if canceled {
            return self.abandon_attempt(cx, id);
        }
        if let Some(early) = early {
            Self::offer_early(cx, id, conn, early);
        }
    }

    /// Everything that handles asked of one connection.
    fn serve(&mut self, cx: &mut ShardCx<'_>, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let shared = conn.shared.clone();
        // Acquire pairs with the handle's Release: what it pushed before is visible now.
        // Cleared first, so that whatever is pushed from here on sends a new notice.
        shared.dirty.swap(false, AcqRel);
        for dir in [Dir::Bi, Dir::Uni] {
            while let Some(reply) = shared.opening[dir as usize].pop() {
                conn.opening[dir as usize].push_back(reply);
            }
            Self::open_streams(cx, id, conn, dir, &mut self.streams);
        }
        cx.proto.counters.handle_copied_bytes += shared.copied_bytes.swap(0, Relaxed);
        while let Some(stream) = shared.dirty_streams.pop() {
            let Some(entry) = conn.streams.get_mut(&stream) else { continue };
            entry.shared.dirty.swap(false, AcqRel);
            Self::serve_send(cx, id, stream, entry, &mut self.gather);
            Self::serve_stop(cx, id, stream, entry);
            Self::serve_recv(cx, id, stream, entry, &shared);
            Self::release(conn, stream, &mut self.streams);
        }
        Self::serve_datagrams(cx, id, conn);
        if let Some((code, reason)) = shared.close_request() {
            let is_attempt = conn.connecting.as_ref().is_some_and(oneshot::Sender::is_canceled);
            cx.proto.counters.attempts_abandoned += u64::from(is_attempt);
            cx.close(id, code, reason);
            cx.proto.report_closed(id);
            cx.proto.pool_closed(cx.now, id, &ConnectionError::ClosedLocally);
            return self.forget(id, &ConnectionError::ClosedLocally);
        }
        if shared.update_keys.swap(false, Relaxed) {
            cx.update_keys(id);
        }
    }

    fn open_streams(
        cx: &mut ShardCx<'_>,
        id: ConnId,
        conn: &mut Conn,
        dir: Dir,
        streams: &mut usize,
    ) {
        while let Some(front) = conn.opening[dir as usize].front() {
            if front.is_canceled() {
                conn.opening[dir as usize].pop_front();
                continue;
            }
            let Some(stream) = cx.open(id, dir) else { return };
            let reply = conn.opening[dir as usize].pop_front().expect("front() saw it");
            let early = cx.is_handshaking(id);
            let shared = Self::add_stream(conn, stream, dir == Dir::Uni, early, streams);
            // A reply that nobody takes is dropped, here or with its future, and abandons the stream.
            let _dropped_stream_closes =
                reply.send(OpenedStream::new(conn.shared.clone(), stream, shared));
        }
    }

    /// `send_only`: we opened it and it is unidirectional. `early`: before the handshake's end.
    fn add_stream(
        conn: &mut Conn,
        stream: StreamId,
        send_only: bool,
        early: bool,
        streams: &mut usize,
    ) -> Arc<StreamShared> {
        let shared = Arc::new(StreamShared::new(early));
        *streams += 1;
        let entry = Stream {
            shared: shared.clone(),
            pending: None,
            finish_sent: false,
            send_over: false,
            recv_over: send_only,
        };
        conn.streams.insert(stream, entry);
        shared
    }

    /// Takes what the peer opened; `early`: some of it may have come before the handshake's end.
    fn take_streams(
        cx: &mut ShardCx<'_>,
        id: ConnId,
        conn: &mut Conn,
        dir: Dir,
        early: bool,
        streams: &mut usize,
    ) {
        while let Some(stream) = cx.accept_stream(id, dir) {
            let shared = Self::add_stream(conn, stream, false, early, streams);
            let entry = conn.streams.get_mut(&stream).expect("just added");
            entry.send_over = dir == Dir::Uni;
            Self::serve_recv(cx, id, stream, entry, &conn.shared);
            conn.shared.offer_stream(dir, stream, shared);
            // It may have come whole in its first packet.
            Self::release(conn, stream, streams);
        }
    }

    /// Forgets a stream of which both directions are over.
    fn release(conn: &mut Conn, stream: StreamId, streams: &mut usize) {
        if conn.streams.get(&stream).is_some_and(|s| s.send_over && s.recv_over) {
            conn.streams.remove(&stream);
            *streams -= 1;
        }
    }

    /// Moves the handle's chunks into quinn-proto until it has no credit.
    fn serve_send(
        cx: &mut ShardCx<'_>,
        id: ConnId,
        stream: StreamId,
        entry: &mut Stream,
        gather: &mut BytesMut,
    ) {
        if entry.send_over {
            return;
        }
        let shared = entry.shared.clone();
        if let Some(code) = shared.reset_request() {
            cx.reset(id, stream, code);
            entry.end_send();
            return;
        }
        let priority = shared.priority.load(Relaxed);
        if priority != shared.priority_set.swap(priority, Relaxed) {
            cx.set_priority(id, stream, priority);
        }
        loop {
            let copied = &mut cx.proto.counters.handle_copied_bytes;
            let chunk = entry.pending.take().or_else(|| next_chunk(&shared, gather, copied));
            let Some(chunk) = chunk else { break };
            let mut chunks = [chunk];
            let outcome = cx.write(id, stream, &mut chunks);
            let [rest] = chunks;
            match outcome {
                WriteOutcome::Written(bytes) => {
                    shared.send_queued_bytes.fetch_sub(bytes, AcqRel);
                    if !rest.is_empty() {
                        entry.pending = Some(rest);
                        break; // handle_writable goes on
                    }
                }
                WriteOutcome::Blocked => {
                    entry.pending = Some(rest);
                    break;
                }
                WriteOutcome::Stopped(code) => return Self::stop_send(cx, id, stream, entry, code),
                WriteOutcome::Unknown => return entry.end_send(),
            }
        }
        shared.send_waker.wake();
        let drained = entry.pending.is_none() && shared.send_queue.is_empty();
        if drained && shared.finish_requested.load(Acquire) && !entry.finish_sent {
            entry.finish_sent = true;
            // `false`: the peer has stopped the stream, and handle_stopped follows in this turn.
            let _stopped = cx.finish(id, stream);
        }
    }

    /// The peer wants no more: what is queued is dropped and the stream reset with the peer's
    /// code (RFC 9000 §3.5), which frees it at both ends.
    fn stop_send(
        cx: &mut ShardCx<'_>,
        id: ConnId,
        stream: StreamId,
        entry: &mut Stream,
        code: VarInt,
    ) {
        entry.shared.stopped.store(encode_code(code), Release);
        cx.reset(id, stream, code);
        entry.end_send();
    }

    fn serve_stop(cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId, entry: &mut Stream) {
        if entry.recv_over {
            return;
        }
        if let Some(code) = entry.shared.stop_request() {
            cx.stop(id, stream, code);
            entry.recv_over = true;
        }
    }

    /// Moves received chunks towards the reader while its queue has room.
    fn serve_recv(
        cx: &mut ShardCx<'_>,
        id: ConnId,
        stream: StreamId,
        entry: &mut Stream,
        conn: &ConnShared,
    ) {
        let shared = &entry.shared;
        if entry.recv_over {
            return;
        }
        // Each lap either ends or reads something, and the reader's own queue bounds that.
        let end = loop {
            let room = recv_room(conn, shared);
            if room == 0 {
                // A reader that only waits for a reset hears of it though nobody reads.
                if let Some(code) = cx.received_reset(id, stream) {
                    break RecvEnd::Reset(code);
                }
                if conn.block_recv(shared) {
                    return;
                }
                continue;
            }
            let outcome = cx.read(id, stream, room, |bytes| conn.push_received(shared, bytes));
            match outcome {
                ReadOutcome::Blocked => {
                    shared.recv_waker.wake();
                    return;
                }
                ReadOutcome::MayHaveMore => shared.recv_waker.wake(),
                ReadOutcome::Finished => break RecvEnd::Finished,
                ReadOutcome::Reset(code) => break RecvEnd::Reset(code),
                ReadOutcome::Unknown => break RecvEnd::Unknown,
            }
        };
        entry.recv_over = true;
        shared.end_recv(end);
    }

    /// What the peer sent and we acknowledged is the reader's, though the connection is gone.
    fn rescue_received(cx: &mut ShardCx<'_>, id: ConnId, conn: &mut Conn) {
        for (stream, entry) in &mut conn.streams {
            if entry.recv_over {
                continue;
            }
            let shared = &entry.shared;
            let outcome =
                cx.read(id, *stream, usize::MAX, |bytes| conn.shared.push_received(shared, bytes));
            let end = match outcome {
                ReadOutcome::Finished => RecvEnd::Finished,
                ReadOutcome::Reset(code) => RecvEnd::Reset(code),
                ReadOutcome::Blocked | ReadOutcome::MayHaveMore | ReadOutcome::Unknown => continue,
            };
            entry.recv_over = true;
            shared.end_recv(end);
        }
    }

    fn serve_datagrams(cx: &mut ShardCx<'_>, id: ConnId, conn: &mut Conn) {
        let shared = &conn.shared;
        let mut sent = false;
        while let Some(data) =
            shared.datagram_pending.take().or_else(|| shared.datagram_send_queue.pop())
        {
            let len = data.len();
            match cx.send_datagram(id, data.clone()) {
                Ok(()) => {}
                Err(SendDatagramError::Full) => {
                    shared.datagram_pending.put(data);
                    break; // handle_datagrams_unblocked goes on
                }
                // Too large for a path that shrank after the handle's check: counted, and told by statistics.
                Err(_refused) => {
                    shared.datagrams_refused.fetch_add(1, Relaxed);
                }
            }
            shared.datagram_send_bytes.fetch_sub(len, AcqRel);
            sent = true;
        }
        if sent {
            shared.datagram_send_event.notify(usize::MAX);
        }
    }

    /// Something happened on the connection: its statistics are published with the next lot.
    pub(crate) fn note_touched(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id)
            && !conn.unpublished
        {
            conn.unpublished = true;
            self.unpublished.push_back(id);
        }
    }

    /// Publishes the statistics that changed: once an interval while the shard is busy, at once
    /// when it has nothing else to do, so that a connection that falls silent leaves its last word.
    pub(crate) fn publish_statistics(&mut self, cx: &mut ShardCx<'_>, idle: bool) {
        if self.unpublished.is_empty()
            || (!idle && self.publish_at.is_some_and(|due| cx.now() < due))
        {
            return;
        }
        for _ in 0..STATS_PUBLISHED_PER_TURN_MAX {
            let Some(id) = self.unpublished.pop_front() else { break };
            let Some(conn) = self.conns.get_mut(&id) else { continue };
            conn.unpublished = false;
            Self::publish(cx, id, conn);
        }
        if self.unpublished.is_empty() {
            self.publish_at = Some(cx.now() + STATS_INTERVAL);
        }
    }

    /// Whether statistics wait to be published.
    pub(crate) fn has_unpublished(&self) -> bool {
        !self.unpublished.is_empty()
    }

    /// Makes the handshake's results and the statistics visible to handles.
    fn publish(cx: &mut ShardCx<'_>, id: ConnId, conn: &Conn) {
        let max = cx.max_datagram_size(id).map_or(0, |bytes| bytes + 1);
        conn.shared.datagram_size_max.store(max, Relaxed);
        if let Some(stats) = cx.stats(id) {
            conn.shared.stats.publish(&stats);
        }
    }
}

/// The next chunk of a handle's queue; small ones are gathered into one.
fn next_chunk(
    shared: &StreamShared,
    gather: &mut BytesMut,
    copied_bytes: &mut u64,
) -> Option<Bytes> {
    let first = shared.send_queue.pop()?;
    if first.len() > COALESCE_CHUNK_BYTES_MAX || shared.send_queue.is_empty() {
        return Some(first);
    }
    gather.clear();
    gather.reserve(COALESCE_BYTES + COALESCE_CHUNK_BYTES_MAX);
    gather.extend_from_slice(&first);
    while gather.len() < COALESCE_BYTES {
        let Some(chunk) = shared.send_queue.pop() else { break };
        gather.extend_from_slice(&chunk);
    }
    *copied_bytes += gather.len() as u64;
    Some(gather.split().freeze())
}

/// Bytes that may go to a stream's reader now.
fn recv_room(conn: &ConnShared, shared: &StreamShared) -> usize {
    let queued = shared.recv_queued_bytes.load(Acquire);
    let stream_room = conn.recv_queue_bytes.saturating_sub(queued);
    let conn_room = conn.recv_budget_bytes.saturating_sub(conn.recv_queued_bytes.load(Acquire));
    if queued == 0 && shared.recv_waiting.load(Acquire) {
        // Readers that stall on other streams must not starve the one that waits.
        return stream_room.min(conn_room.max(WAITING_READER_BYTES_MIN));
    }
    stream_room.min(conn_room)
}

fn close_all(conn: Conn, reason: &ConnectionError) {
    conn.shared.close(reason.clone());
    if let Some(reply) = conn.connecting {
        let _nobody_waits = reply.send(Err(reason.clone()));
    }
    for (_, stream) in conn.streams {
        if !stream.recv_over {
            stream.shared.end_recv(RecvEnd::Lost);
        }
        stream.shared.wake_all_senders();
        stream.shared.recv_waker.wake();
    }
}

impl ShardApp for HandleApp {
    fn handle_incoming(&mut self, cx: &mut ShardCx<'_>, incoming: RawIncoming) {
        if self.incoming.len() >= cx.proto.config().incoming_max {
            cx.proto.counters.incoming_refused += 1;
            cx.refuse(incoming);
            return;
        }
        let (remote, validated) = (incoming.remote(), incoming.is_validated());
        let key = self.incoming.insert(incoming);
        self.engine.offer(cx.shard(), key, remote, validated);
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.shared.set_handshake(HandshakeInfo {
            settled: cx.proto.handshake_data(id),
            peer_certificates: cx.peer_certificates(id),
            early_data_accepted: cx.early_data_accepted(id),
        });
        Self::end_early(cx, id, conn, &mut self.streams);
        Self::publish(cx, id, conn);
        if let Some(reply) = conn.connecting.take() {
            let handle = conn.early.upgrade();
            let handle = handle.unwrap_or_else(|| Arc::new(ConnRef::new(conn.shared.clone())));
            let connection = Connection::new(handle);
            // Nobody waits: the handle is dropped here and closes the connection.
            let _dropped_handle_closes = reply.send(Ok(connection));
        }
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, id: ConnId, dir: Dir) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let early = cx.is_handshaking(id);
        Self::take_streams(cx, id, conn, dir, early, &mut self.streams);
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(entry) = conn.streams.get_mut(&stream) {
            Self::serve_recv(cx, id, stream, entry, &conn.shared);
            Self::release(conn, stream, &mut self.streams);
        }
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(entry) = conn.streams.get_mut(&stream) {
            Self::serve_send(cx, id, stream, entry, &mut self.gather);
            Self::release(conn, stream, &mut self.streams);
        }
    }

    fn handle_finished(&mut self, _cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(entry) = conn.streams.get_mut(&stream) {
            entry.send_over = true;
            entry.shared.acknowledged.store(true, Release);
            entry.shared.wake_all_senders();
            Self::release(conn, stream, &mut self.streams);
        }
    }

    fn handle_stopped(&mut self, cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId, code: VarInt) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(entry) = conn.streams.get_mut(&stream).filter(|entry| !entry.send_over) {
            Self::stop_send(cx, id, stream, entry, code);
            Self::release(conn, stream, &mut self.streams);
        }
    }

    fn handle_streams_available(&mut self, cx: &mut ShardCx<'_>, id: ConnId, dir: Dir) {
        if let Some(conn) = self.conns.get_mut(&id) {
            Self::open_streams(cx, id, conn, dir, &mut self.streams);
        }
    }

    fn handle_datagrams(&mut self, cx: &mut ShardCx<'_>, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        while let Some(data) = cx.recv_datagram(id) {
            conn.shared.offer_datagram(data);
        }
        conn.shared.datagram_recv_event.notify(usize::MAX);
    }

    fn handle_datagrams_unblocked(&mut self, cx: &mut ShardCx<'_>, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id) {
            Self::serve_datagrams(cx, id, conn);
        }
    }

    fn handle_checkout(
        &mut self,
        cx: &mut ShardCx<'_>,
        token: u64,
        result: Result<Lease, CheckoutError>,
    ) {
        self.answer_checkout(cx, token, result);
    }

    fn handle_pool_event(&mut self, cx: &mut ShardCx<'_>, event: &PoolEvent) {
        self.publish_pool_event(cx, event);
    }

    fn handle_closed(&mut self, cx: &mut ShardCx<'_>, id: ConnId, reason: &ConnectionError) {
        if let Some(conn) = self.conns.get_mut(&id) {
            Self::rescue_received(cx, id, conn);
        }
        self.forget(id, reason);
    }
}

/// The two halves of a stream for the application.
pub(crate) fn halves(
    conn: &Arc<ConnRef>,
    stream: StreamId,
    shared: Arc<StreamShared>,
) -> (SendStream, RecvStream) {
    (
        SendStream::new(conn.clone(), stream, shared.clone()),
        RecvStream::new(conn.clone(), stream, shared),
    )
}
