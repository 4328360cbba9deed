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

mod pool;
mod shared;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use bytes::{Bytes, BytesMut};
use futures_channel::oneshot;
use quinn_proto::{Dir, StreamId, VarInt};
use rustc_hash::FxHashMap;
use slab::Slab;

use crate::app::{ConnId, Incoming as RawIncoming, ReadOutcome, ShardApp, ShardCx, WriteOutcome};
use crate::connection::Connection;
use crate::engine::EngineShared;
use crate::error::{ConnectError, ConnectionError, SendDatagramError};
use crate::pool::{CheckoutError, Lease, PoolEvent};
use crate::stream::{RecvStream, SendStream};

pub(crate) use pool::{CheckoutReply, PoolCommand};
pub(crate) use shared::{
    ConnRef, ConnShared, HandshakeInfo, OpenReply, RecvEnd, StreamShared, encode_code,
};

/// Small writes are gathered up to this size: quinn-proto's send buffer is searched linearly.
const COALESCE_BYTES: usize = 16 * 1024;
/// Chunks up to this size are copied into a gathered one; larger ones go by reference.
const COALESCE_CHUNK_BYTES_MAX: usize = 8 * 1024;

/// What handles ask of their shard.
pub(crate) enum Command {
    /// Something of this connection is dirty.
    Dirty(ConnId),
    /// What to do with a client that knocked.
    Incoming { key: usize, decision: Decision },
    /// For the connection pool.
    Pool(PoolCommand),
}

/// The application's answer to a client that knocked.
pub(crate) enum Decision {
    Accept(oneshot::Sender<Result<Connection, ConnectionError>>),
    Refuse,
    Retry,
    Ignore,
}

/// Where the outcome of a connection attempt goes.
pub(crate) struct ConnectReply(pub(crate) oneshot::Sender<Result<Connection, ConnectionError>>);

impl ConnectReply {
    /// The attempt could not even start.
    pub(crate) fn fail(self, error: ConnectError) {
        // The caller may have dropped its future: nobody is left to tell.
        let _nobody_waits = self.0.send(Err(ConnectionError::NotStarted(error)));
    }
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

struct Conn {
    shared: Arc<ConnShared>,
    connecting: Option<oneshot::Sender<Result<Connection, ConnectionError>>>,
    /// The pool's own handle.
    pooled: Option<Arc<ConnRef>>,
    streams: FxHashMap<StreamId, Stream>,
    opening: [VecDeque<oneshot::Sender<OpenReply>>; 2],
}

/// The shard's end of all handles.
pub(crate) struct HandleApp {
    engine: Arc<EngineShared>,
    conns: FxHashMap<ConnId, Conn>,
    incoming: Slab<RawIncoming>,
    /// Callers that wait for a pooled connection.
    checkouts: Slab<CheckoutReply>,
    dirty: Vec<ConnId>,
    gather: BytesMut,
}

impl HandleApp {
    pub(crate) fn new(engine: Arc<EngineShared>) -> Self {
        Self {
            engine,
            conns: FxHashMap::default(),
            incoming: Slab::new(),
            checkouts: Slab::new(),
            dirty: Vec::new(),
            gather: BytesMut::new(),
        }
    }

    pub(crate) fn handle_command(&mut self, cx: &mut ShardCx<'_>, command: Command) {
        match command {
            Command::Dirty(conn) => self.dirty.push(conn),
            Command::Incoming { key, decision } => self.decide(cx, key, decision),
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
            Ok(id) => self.insert(cx, id, Some(reply.0)),
            Err(error) => reply.fail(error),
        }
    }

    /// Tells everything that is left that the shard is gone.
    pub(crate) fn end(&mut self, reason: &ConnectionError) {
        for (_, conn) in self.conns.drain() {
            close_all(conn, reason);
        }
        for reply in self.checkouts.drain() {
            let _nobody_waits = reply.send(Err(CheckoutError::Connect(reason.clone())));
        }
        self.engine.shard_ended();
    }

    fn decide(&mut self, cx: &mut ShardCx<'_>, key: usize, decision: Decision) {
        let Some(incoming) = self.incoming.try_remove(key) else { return };
        match decision {
            Decision::Accept(reply) => match cx.accept(incoming) {
                Ok(id) => self.insert(cx, id, Some(reply)),
                Err(error) => {
                    let _nobody_waits = reply.send(Err(error));
                }
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

    fn insert(
        &mut self,
        cx: &mut ShardCx<'_>,
        id: ConnId,
        connecting: Option<oneshot::Sender<Result<Connection, ConnectionError>>>,
    ) {
        let mailbox = self.engine.mailbox(cx.shard());
        let config = cx.proto.config();
        let shared = Arc::new(ConnShared::new(
            id,
            mailbox,
            cx.remote(id).expect("the connection was just made"),
            config.stream_send_queue_bytes,
            config.stream_receive_queue_bytes,
            config.datagram_send_buffer_size,
        ));
        let conn = Conn {
            shared,
            connecting,
            pooled: None,
            streams: FxHashMap::default(),
            opening: Default::default(),
        };
        self.conns.insert(id, conn);
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
            Self::open_streams(cx, id, conn, dir);
        }
        cx.proto.counters.handle_copied_bytes += shared.copied_bytes.swap(0, Relaxed);
        while let Some(stream) = shared.dirty_streams.pop() {
            let Some(entry) = conn.streams.get_mut(&stream) else { continue };
            entry.shared.dirty.swap(false, AcqRel);
            Self::serve_send(cx, id, stream, entry, &mut self.gather);
            Self::serve_stop(cx, id, stream, entry);
            Self::serve_recv(cx, id, stream, entry);
            Self::release(conn, stream);
        }
        Self::serve_datagrams(cx, id, conn);
        if let Some((code, reason)) = shared.close_request() {
            cx.close(id, code, reason);
            let reason = ConnectionError::ClosedLocally;
            cx.proto.report_closed(id);
            cx.proto.pool_closed(cx.now, id, &reason);
            if let Some(conn) = self.conns.remove(&id) {
                close_all(conn, &reason);
            }
            return;
        }
        if shared.update_keys.swap(false, Relaxed) {
            cx.update_keys(id);
        }
        Self::publish(cx, id, conn);
    }

    fn open_streams(cx: &mut ShardCx<'_>, id: ConnId, conn: &mut Conn, dir: Dir) {
        while let Some(front) = conn.opening[dir as usize].front() {
            if front.is_canceled() {
                conn.opening[dir as usize].pop_front();
                continue;
            }
            let Some(stream) = cx.open(id, dir) else { return };
            let reply = conn.opening[dir as usize].pop_front().expect("front() saw it");
            let shared = Self::add_stream(conn, stream, dir == Dir::Uni);
            // A reply that nobody takes drops the handles, which close the stream as always.
            let _dropped_handles_close = reply.send(Ok((stream, shared)));
        }
    }

    /// `send_only`: we opened it and it is unidirectional.
    fn add_stream(conn: &mut Conn, stream: StreamId, send_only: bool) -> Arc<StreamShared> {
        let shared = Arc::new(StreamShared::default());
        shared.set_recv_budget(conn.shared.recv_queue_bytes);
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

    /// Forgets a stream of which both directions are over.
    fn release(conn: &mut Conn, stream: StreamId) {
        if conn.streams.get(&stream).is_some_and(|s| s.send_over && s.recv_over) {
            conn.streams.remove(&stream);
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
            entry.pending = None;
            entry.send_over = true;
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
                WriteOutcome::Stopped(code) => {
                    shared.stopped.store(encode_code(code), Release);
                    shared.wake_all_senders();
                    return;
                }
                WriteOutcome::Unknown => {
                    entry.send_over = true;
                    shared.wake_all_senders();
                    return;
                }
            }
        }
        shared.send_waker.wake();
        let drained = entry.pending.is_none() && shared.send_queue.is_empty();
        if drained && shared.finish_requested.load(Acquire) && !entry.finish_sent {
            entry.finish_sent = true;
            if !cx.finish(id, stream) {
                entry.send_over = true;
                shared.wake_all_senders();
            }
        }
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
    fn serve_recv(cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId, entry: &mut Stream) {
        let shared = &entry.shared;
        if entry.recv_over {
            return;
        }
        let Some(budget) = shared.recv_budget() else { return };
        let room = budget.saturating_sub(shared.recv_queued_bytes.load(Acquire));
        if room == 0 {
            shared.recv_blocked.store(true, Release);
            // The reader may have emptied the queue between the two lines above.
            if shared.recv_queued_bytes.load(Acquire) >= budget {
                return;
            }
            shared.recv_blocked.store(false, Release);
            return Self::serve_recv(cx, id, stream, entry);
        }
        let outcome = cx.read(id, stream, room, |bytes| {
            shared.recv_queued_bytes.fetch_add(bytes.len(), AcqRel);
            shared.recv_queue.push(bytes);
        });
        match outcome {
            ReadOutcome::Blocked => {}
            ReadOutcome::MayHaveMore => {
                shared.recv_blocked.store(true, Release);
                if shared.recv_queued_bytes.load(Acquire) < budget / 2 {
                    // Read away while we were reading: nobody else would call us.
                    shared.recv_blocked.store(false, Release);
                    return Self::serve_recv(cx, id, stream, entry);
                }
            }
            ReadOutcome::Finished => {
                entry.recv_over = true;
                shared.end_recv(RecvEnd::Finished);
            }
            ReadOutcome::Reset(code) => {
                entry.recv_over = true;
                shared.end_recv(RecvEnd::Reset(code));
            }
            ReadOutcome::Unknown => {
                entry.recv_over = true;
                shared.end_recv(RecvEnd::Unknown);
            }
        }
        shared.recv_waker.wake();
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
        let data = cx.proto.handshake_data(id);
        conn.shared.set_handshake(HandshakeInfo {
            alpn: data.as_ref().and_then(|data| data.alpn.clone()),
            server_name: data.and_then(|data| data.server_name),
            peer_certificates: cx.peer_certificates(id),
        });
        if cx.early_data_accepted(id) == Some(false) {
            Self::reject_early_streams(conn);
        }
        Self::publish(cx, id, conn);
        if let Some(reply) = conn.connecting.take() {
            let connection = Connection::new(Arc::new(ConnRef::new(conn.shared.clone())));
            // Nobody waits: the handle is dropped here and closes the connection.
            let _dropped_handle_closes = reply.send(Ok(connection));
        }
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, id: ConnId, dir: Dir) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        while let Some(stream) = cx.accept_stream(id, dir) {
            let shared = Self::add_stream(conn, stream, false);
            let entry = conn.streams.get_mut(&stream).expect("just added");
            entry.send_over = dir == Dir::Uni;
            Self::serve_recv(cx, id, stream, entry);
            conn.shared.offer_stream(dir, stream, shared);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(entry) = conn.streams.get_mut(&stream) {
            Self::serve_recv(cx, id, stream, entry);
            Self::release(conn, stream);
        }
        Self::publish_if_stale(cx, id, conn);
    }

    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(entry) = conn.streams.get_mut(&stream) {
            Self::serve_send(cx, id, stream, entry, &mut self.gather);
            Self::release(conn, stream);
        }
        Self::publish_if_stale(cx, id, conn);
    }

    fn handle_finished(&mut self, _cx: &mut ShardCx<'_>, id: ConnId, stream: StreamId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(entry) = conn.streams.get_mut(&stream) {
            entry.send_over = true;
            entry.shared.acknowledged.store(true, Release);
            entry.shared.wake_all_senders();
            Self::release(conn, stream);
        }
    }

    fn handle_stopped(
        &mut self,
        _cx: &mut ShardCx<'_>,
        id: ConnId,
        stream: StreamId,
        code: VarInt,
    ) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Some(entry) = conn.streams.get_mut(&stream) {
            entry.shared.stopped.store(encode_code(code), Release);
            entry.shared.wake_all_senders();
        }
    }

    fn handle_streams_available(&mut self, cx: &mut ShardCx<'_>, id: ConnId, dir: Dir) {
        if let Some(conn) = self.conns.get_mut(&id) {
            Self::open_streams(cx, id, conn, dir);
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

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, id: ConnId, reason: &ConnectionError) {
        if let Some(conn) = self.conns.remove(&id) {
            close_all(conn, reason);
        }
    }
}

impl HandleApp {
    /// Statistics of a busy connection are published at most once a millisecond.
    fn publish_if_stale(cx: &mut ShardCx<'_>, id: ConnId, conn: &Conn) {
        if conn.shared.stats.is_stale(cx.now()) {
            Self::publish(cx, id, conn);
        }
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
