//! Code that runs on the shard itself.
//!
//! A [`ShardApp`] is called from inside the shard's turn: no queue, wake-up or
//! allocation stands between a packet and the application. Each shard has its own
//! instance, so its state needs no locks. Calls must not block: a call that takes
//! a millisecond delays every connection of the shard by one.
//!
//! The engine's async handles are one `ShardApp` among others (`handles`).

use std::any::Any;
use std::net::SocketAddrV6;
use std::time::Instant;

use bytes::Bytes;
use quinn_proto::{Dir, StreamId, VarInt};

use crate::datapath::Datapath;
use crate::error::{ConnectError, ConnectionError, SendDatagramError};
use crate::handles::Command as HandleCommand;
use crate::pool::{CheckoutError, Lease, PoolEvent};
use crate::proto::{ConnectionStats, Owner, Protocol};
use crate::shard::mailbox::{Command, Mailbox};

/// A connection of one shard. Never reused: a stale id is answered with "unknown".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

/// A client that knocks: accept, refuse, retry or ignore it through [`ShardCx`]. It may be kept and
/// answered later; dropped without an answer, it is refused.
#[derive(Debug)]
pub struct Incoming {
    /// Taken by an answer.
    inner: Option<quinn_proto::Incoming>,
    mailbox: Mailbox,
}

impl Incoming {
    pub(crate) fn new(inner: quinn_proto::Incoming, mailbox: Mailbox) -> Self {
        Self { inner: Some(inner), mailbox }
    }

    /// The client's address, validated or not.
    #[must_use]
    pub fn remote(&self) -> SocketAddrV6 {
        crate::proto::v6(self.inner().remote_address())
    }

    /// Whether the client has proved that it receives packets at its address.
    #[must_use]
    pub fn is_validated(&self) -> bool {
        self.inner().remote_address_validated()
    }

    fn inner(&self) -> &quinn_proto::Incoming {
        self.inner.as_ref().expect("taken only by an answer, which consumes it")
    }

    fn into_inner(mut self) -> quinn_proto::Incoming {
        self.inner.take().expect("taken only by an answer, which consumes it")
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(incoming) = self.inner.take() {
            self.mailbox.notify(HandleCommand::Undecided(Box::new(incoming)));
        }
    }
}

/// What a call to [`ShardCx::read`] left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOutcome {
    /// Nothing more now: [`ShardApp::handle_readable`] will be called.
    Blocked,
    /// The limit was reached; more may be there.
    MayHaveMore,
    /// The peer finished the stream and everything was read.
    Finished,
    /// The peer reset the stream.
    Reset(VarInt),
    /// The stream or the connection is unknown (stopped, read to its end, or gone).
    Unknown,
}

/// What a call to [`ShardCx::write`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteOutcome {
    /// So many bytes were taken; when fewer than given, [`ShardApp::handle_writable`] follows.
    Written(usize),
    /// No credit or buffer space: [`ShardApp::handle_writable`] will be called.
    Blocked,
    /// The peer asked to stop.
    Stopped(VarInt),
    /// The stream or the connection is unknown (finished, reset, or gone).
    Unknown,
}

/// Application code on a shard. Every method has an empty default but the first.
///
/// # When a call panics
/// The shard, its other connections and its pool go on; the panic is counted (`app_panics`) and logged
/// with its message. The application is called again afterwards, so what the call left half done in its
/// own state is its own to mend.
///
/// | panic in | what ends |
/// |---|---|
/// | a call about a connection, [`handle_checkout`](Self::handle_checkout) with a lease included | that connection: closed, the peer reads the reason "application panicked" (in its handshake, that the application closed), [`handle_closed`](Self::handle_closed) follows with [`AppPanicked`](ConnectionError::AppPanicked) |
/// | [`handle_incoming`](Self::handle_incoming) | the client: refused, or, if it had been accepted, closed as above |
/// | [`handle_closed`](Self::handle_closed) | nothing: the connection is over already; it is not called again |
/// | [`handle_timer`](Self::handle_timer), [`handle_message`](Self::handle_message), [`handle_pool_event`](Self::handle_pool_event), a failed [`handle_checkout`](Self::handle_checkout) | nothing; the timer, message or event is used up |
///
/// A [`Lease`] that is lost in the unwinding stays lent until its connection ends. A panic where the
/// application is made comes out of [`Builder::start`](crate::engine::Builder::start). The process must be built with `panic = "unwind"`.
#[allow(unused_variables)]
pub trait ShardApp: Send + 'static {
    /// A client knocks. The default accepts it.
    fn handle_incoming(&mut self, cx: &mut ShardCx<'_>, incoming: Incoming) {
        // A failure is the client's; the shard has answered it and counted it.
        let _counted = cx.accept(incoming);
    }

    /// The handshake is complete: streams may be opened, the peer is authenticated.
    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {}

    /// The peer opened one or more streams: take them with [`ShardCx::accept_stream`] until `None`.
    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {}

    /// Data, the end or a reset can be read.
    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {}

    /// A blocked write can go on.
    fn handle_writable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {}

    /// The peer acknowledged all data of a finished stream.
    fn handle_finished(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {}

    /// The peer asked to stop sending on a stream.
    fn handle_stopped(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
        code: VarInt,
    ) {
    }

    /// The peer allows more streams, after [`ShardCx::open`] answered `None`.
    fn handle_streams_available(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {}

    /// Datagrams can be taken with [`ShardCx::recv_datagram`].
    fn handle_datagrams(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {}

    /// A full datagram queue has room again.
    fn handle_datagrams_unblocked(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {}

    /// The connection is over; its id is dead after this call. Called once per connection.
    fn handle_closed(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, reason: &ConnectionError) {}

    /// The answer to a [`ShardCx::checkout`] that had to wait, with the caller's token.
    fn handle_checkout(
        &mut self,
        cx: &mut ShardCx<'_>,
        token: u64,
        result: Result<Lease, CheckoutError>,
    ) {
        // Nobody wants the connection: it becomes idle.
        if let Ok(lease) = result {
            cx.check_in(lease);
        }
    }

    /// Something happened to a peer of this shard's pool.
    fn handle_pool_event(&mut self, cx: &mut ShardCx<'_>, event: &PoolEvent) {}

    /// A timer set by [`ShardCx::set_timer`] is due.
    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, token: u64) {}

    /// A message sent by [`Engine::send_to_app`](crate::engine::Engine::send_to_app).
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {}
}

/// Sends messages to the application of one shard from any thread.
#[derive(Clone)]
pub struct AppSender {
    mailbox: Mailbox,
}

impl AppSender {
    /// Sends a message; [`ShardApp::handle_message`] gets it.
    ///
    /// # Errors
    /// Gives the message back when the mailbox is full or the shard has ended.
    pub fn send(&self, message: Box<dyn Any + Send>) -> Result<(), Box<dyn Any + Send>> {
        match self.mailbox.push(Command::App(message)) {
            Err(Command::App(message)) => Err(message),
            _ => Ok(()),
        }
    }

    /// Whether the shard has ended: nothing sent will ever be taken.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.mailbox.is_stopped()
    }
}

/// What a [`ShardApp`] may do during a call.
pub struct ShardCx<'a> {
    pub(crate) proto: &'a mut Protocol,
    pub(crate) paths: &'a dyn Datapath,
    pub(crate) now: Instant,
    pub(crate) owner: Owner,
}

impl ShardCx<'_> {
    /// The turn's time.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.now
    }

    /// A sender of messages to this shard's own application, for helper threads.
    #[must_use]
    pub fn sender(&self) -> AppSender {
        AppSender { mailbox: self.proto.mailbox.clone() }
    }

    /// This shard's number, from 0.
    #[must_use]
    pub fn shard(&self) -> usize {
        self.proto.shard_index()
    }

    /// Starts a connection; [`ShardApp::handle_connected`] or [`ShardApp::handle_closed`] follows.
    ///
    /// # Errors
    /// The address, the name or a limit forbids it.
    pub fn connect(
        &mut self,
        remote: SocketAddrV6,
        server_name: &str,
    ) -> Result<ConnId, ConnectError> {
        let mtu_bytes = self.paths.max_udp_payload(&remote);
        self.proto.connect(self.now, remote, mtu_bytes, server_name, None, self.owner)
    }

    /// Accepts a client. The handshake goes on; [`ShardApp::handle_connected`] follows.
    ///
    /// # Errors
    /// The client's first flight was invalid or a limit is reached; it was answered.
    pub fn accept(&mut self, incoming: Incoming) -> Result<ConnId, ConnectionError> {
        let mtu_bytes = self.paths.max_udp_payload(&incoming.remote());
        self.proto.accept(self.now, incoming.into_inner(), mtu_bytes, self.owner)
    }

    /// Refuses a client with CONNECTION_REFUSED.
    pub fn refuse(&mut self, incoming: Incoming) {
        self.proto.refuse(incoming.into_inner());
    }

    /// Asks a client to prove its address; one that has already is accepted or refused by the caller.
    ///
    /// # Errors
    /// Gives the client back when it is validated already.
    // The large error hands the client back; it lives on the stack for one call.
    #[allow(clippy::result_large_err)]
    pub fn retry(&mut self, incoming: Incoming) -> Result<(), Incoming> {
        let mailbox = incoming.mailbox.clone();
        let retried = self.proto.retry(incoming.into_inner());
        retried.map_err(|validated| Incoming::new(validated, mailbox))
    }

    /// Forgets a client without an answer.
    pub fn ignore(&mut self, incoming: Incoming) {
        self.proto.ignore(incoming.into_inner());
    }

    /// Opens a stream; `None` while the peer allows no more, or when the connection is gone.
    pub fn open(&mut self, conn: ConnId, dir: Dir) -> Option<StreamId> {
        self.proto.touch(conn)?.streams().open(dir)
    }

    /// Takes the next stream that the peer opened.
    pub fn accept_stream(&mut self, conn: ConnId, dir: Dir) -> Option<StreamId> {
        let stream = self.proto.touch(conn)?.streams().accept(dir)?;
        self.proto.note_stream_accepted(self.now, conn, dir, stream.index());
        Some(stream)
    }

    /// Writes chunks by reference; taken chunks are left empty, a partly taken one is advanced.
    ///
    /// Chunks of 16 KiB and more are cheapest: the send buffer's look-up is linear in chunks.
    pub fn write(&mut self, conn: ConnId, stream: StreamId, chunks: &mut [Bytes]) -> WriteOutcome {
        let Some(connection) = self.proto.touch(conn) else { return WriteOutcome::Unknown };
        let mut bytes = 0;
        // quinn-proto promises a Writable event only after it answered "blocked", so a
        // partial write is followed up until it is either whole or blocked.
        loop {
            let left = chunks.iter().position(|chunk| !chunk.is_empty());
            let Some(first) = left else { return WriteOutcome::Written(bytes) };
            match connection.send_stream(stream).write_chunks(&mut chunks[first..]) {
                Ok(written) => bytes += written.bytes,
                Err(quinn_proto::WriteError::Blocked) if bytes > 0 => {
                    return WriteOutcome::Written(bytes);
                }
                Err(quinn_proto::WriteError::Blocked) => return WriteOutcome::Blocked,
                Err(quinn_proto::WriteError::Stopped(code)) => return WriteOutcome::Stopped(code),
                Err(quinn_proto::WriteError::ClosedStream) => return WriteOutcome::Unknown,
            }
        }
    }

    /// Marks the end of a stream; `false` when it is unknown or stopped by the peer.
    pub fn finish(&mut self, conn: ConnId, stream: StreamId) -> bool {
        self.proto.touch(conn).is_some_and(|c| c.send_stream(stream).finish().is_ok())
    }

    /// Abandons a stream; `false` when it is unknown.
    pub fn reset(&mut self, conn: ConnId, stream: StreamId, code: VarInt) -> bool {
        self.proto.touch(conn).is_some_and(|c| c.send_stream(stream).reset(code).is_ok())
    }

    /// Asks the peer to stop sending; `false` when the stream is unknown.
    pub fn stop(&mut self, conn: ConnId, stream: StreamId, code: VarInt) -> bool {
        self.proto.touch(conn).is_some_and(|c| c.recv_stream(stream).stop(code).is_ok())
    }

    /// Sends a stream's data before (higher) or after (lower) others'; `false` when it is unknown.
    pub fn set_priority(&mut self, conn: ConnId, stream: StreamId, priority: i32) -> bool {
        self.proto.touch(conn).is_some_and(|c| c.send_stream(stream).set_priority(priority).is_ok())
    }

    /// Hands at most `bytes_max` bytes of a stream, in order, to `take`, chunk by chunk and without copying.
    ///
    /// What arrives behind a gap waits in quinn-proto, which ends the connection (`INTERNAL_ERROR`)
    /// when a stream has 1024 gaps: see [`read_unordered`](Self::read_unordered).
    pub fn read(
        &mut self,
        conn: ConnId,
        stream: StreamId,
        bytes_max: usize,
        mut take: impl FnMut(Bytes),
    ) -> ReadOutcome {
        self.read_chunks(conn, stream, bytes_max, true, |_offset, data| take(data))
    }

    /// As [`read`](Self::read), but in whatever order data arrived, each chunk with its offset in
    /// the stream: nothing waits behind a gap, and no number of gaps ends the connection. For
    /// bulk data on long fat paths, where one overflow of a queue leaves thousands of gaps.
    ///
    /// A stream that was read so cannot be read in order any more: [`read`](Self::read) then says
    /// [`ReadOutcome::Unknown`]. What was taken counts as consumed for flow control, gap or not.
    pub fn read_unordered(
        &mut self,
        conn: ConnId,
        stream: StreamId,
        bytes_max: usize,
        take: impl FnMut(u64, Bytes),
    ) -> ReadOutcome {
        self.read_chunks(conn, stream, bytes_max, false, take)
    }

    fn read_chunks(
        &mut self,
        conn: ConnId,
        stream: StreamId,
        bytes_max: usize,
        ordered: bool,
        mut take: impl FnMut(u64, Bytes),
    ) -> ReadOutcome {
        let Some(connection) = self.proto.touch_for_read(conn) else {
            return ReadOutcome::Unknown;
        };
        let mut recv = connection.recv_stream(stream);
        let Ok(mut chunks) = recv.read(ordered) else { return ReadOutcome::Unknown };
        let mut left = bytes_max;
        let outcome = loop {
            if left == 0 {
                break ReadOutcome::MayHaveMore;
            }
            match chunks.next(left) {
                Ok(Some(chunk)) => {
                    left -= chunk.bytes.len();
                    take(chunk.offset, chunk.bytes);
                }
                Ok(None) => break ReadOutcome::Finished,
                Err(quinn_proto::ReadError::Blocked) => break ReadOutcome::Blocked,
                Err(quinn_proto::ReadError::Reset(code)) => break ReadOutcome::Reset(code),
            }
        };
        if chunks.finalize().should_transmit() {
            self.proto.queue_transmit(conn);
        }
        outcome
    }

    /// The code with which the peer reset a stream, whether or not its data was read; once, after
    /// which the stream is unknown.
    pub fn received_reset(&mut self, conn: ConnId, stream: StreamId) -> Option<VarInt> {
        let code = self.proto.touch_for_read(conn)?.recv_stream(stream).received_reset().ok()??;
        self.proto.queue_transmit(conn);
        Some(code)
    }

    /// Queues an unreliable datagram (RFC 9221).
    ///
    /// # Errors
    /// Too large, unsupported, or the queue is full ([`ShardApp::handle_datagrams_unblocked`] follows).
    pub fn send_datagram(&mut self, conn: ConnId, data: Bytes) -> Result<(), SendDatagramError> {
        let Some(connection) = self.proto.touch(conn) else {
            return Err(SendDatagramError::ConnectionLost(ConnectionError::ClosedLocally));
        };
        connection.datagrams().send(data, false).map_err(|error| match error {
            quinn_proto::SendDatagramError::UnsupportedByPeer => {
                SendDatagramError::UnsupportedByPeer
            }
            quinn_proto::SendDatagramError::Disabled => SendDatagramError::Disabled,
            quinn_proto::SendDatagramError::TooLarge => SendDatagramError::TooLarge,
            quinn_proto::SendDatagramError::Blocked(_) => SendDatagramError::Full,
        })
    }

    /// The next received datagram.
    pub fn recv_datagram(&mut self, conn: ConnId) -> Option<Bytes> {
        self.proto.touch_for_read(conn)?.datagrams().recv()
    }

    /// The largest datagram that fits the path now, bytes; `None`: the peer takes none.
    pub fn max_datagram_size(&mut self, conn: ConnId) -> Option<usize> {
        self.proto.touch_for_read(conn)?.datagrams().max_size()
    }

    /// Closes a connection at once; data not yet acknowledged may be lost. [`ShardApp::handle_closed`] follows.
    pub fn close(&mut self, conn: ConnId, code: VarInt, reason: Bytes) {
        let now = self.now;
        if let Some(connection) = self.proto.touch(conn) {
            connection.close(now, code, reason);
        }
    }

    /// Whether the handshake still goes on: what arrives now is early data, which an attacker may
    /// have recorded and sent again (RFC 9001 §9.2), and nobody has proved who they are.
    #[must_use]
    pub fn is_handshaking(&self, conn: ConnId) -> bool {
        self.proto.connection(conn).is_some_and(quinn_proto::Connection::is_handshaking)
    }

    /// Statistics of a connection.
    #[must_use]
    pub fn stats(&self, conn: ConnId) -> Option<ConnectionStats> {
        self.proto.stats(conn)
    }

    /// The peer's address now.
    #[must_use]
    pub fn remote(&self, conn: ConnId) -> Option<SocketAddrV6> {
        self.proto.connection(conn).map(|c| crate::proto::v6(c.remote_address()))
    }

    /// The negotiated application protocol, once the handshake has got that far.
    #[must_use]
    pub fn alpn(&self, conn: ConnId) -> Option<Vec<u8>> {
        self.proto.handshake_data(conn)?.alpn
    }

    /// The peer's certificate chain, once the handshake has got that far.
    #[must_use]
    pub fn peer_certificates(
        &self,
        conn: ConnId,
    ) -> Option<Vec<rustls_pki_types::CertificateDer<'static>>> {
        self.proto.peer_certificates(conn)
    }

    /// Switches to new packet protection keys (RFC 9001 §6).
    pub fn update_keys(&mut self, conn: ConnId) {
        if let Some(connection) = self.proto.touch(conn) {
            connection.force_key_update();
        }
    }

    /// Calls [`ShardApp::handle_timer`] with `token` at `at` or soon after.
    pub fn set_timer(&mut self, at: Instant, token: u64) {
        self.proto.set_app_timer(at, token, self.owner);
    }
}
