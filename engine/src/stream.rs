//! Async handles of streams. They work in any executor; dropping a future never loses data.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use quinn_proto::{StreamId, VarInt};

use crate::error::{
    ConnectionError, ReadError, ReadExactError, ReadToEndError, ResetError, WriteError,
};
use crate::handles::{ConnRef, RecvEnd, StreamShared};

/// The sending half of a stream.
///
/// Dropped without [`finish`](Self::finish) or [`reset`](Self::reset), it finishes: what was
/// written is still delivered.
pub struct SendStream {
    conn: Arc<ConnRef>,
    id: StreamId,
    shared: Arc<StreamShared>,
    closed: bool,
}

impl SendStream {
    pub(crate) fn new(conn: Arc<ConnRef>, id: StreamId, shared: Arc<StreamShared>) -> Self {
        Self { conn, id, shared, closed: false }
    }

    /// The stream's identity.
    #[must_use]
    pub fn id(&self) -> StreamId {
        self.id
    }

    /// Writes part of `data`, copying it; waits while the queue is full. Returns the bytes taken.
    /// Cancel-safe: a dropped future has taken nothing.
    ///
    /// # Errors
    /// The stream or the connection can take no more.
    pub async fn write(&mut self, data: &[u8]) -> Result<usize, WriteError> {
        poll_fn(|cx| self.poll_write(cx, data)).await
    }

    /// Writes all of `data`, copying it. Not cancel-safe: a dropped future has written a part.
    ///
    /// # Errors
    /// The stream or the connection can take no more.
    pub async fn write_all(&mut self, mut data: &[u8]) -> Result<(), WriteError> {
        while !data.is_empty() {
            let written = self.write(data).await?;
            data = &data[written..];
        }
        Ok(())
    }

    /// Writes a chunk by reference, without copying. Cancel-safe: all or nothing.
    ///
    /// Chunks of 16 KiB and more are cheapest.
    ///
    /// # Errors
    /// The stream or the connection can take no more.
    pub async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), WriteError> {
        let mut chunk = Some(chunk);
        poll_fn(|cx| {
            ready!(self.poll_ready(cx))?;
            let chunk = chunk.take().expect("polled after completion");
            self.push(chunk);
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// Writes chunks by reference as far as the queue has room; waits until it has some. Chunks
    /// that were taken are left empty. Returns their number. Cancel-safe: a dropped future has
    /// taken nothing.
    ///
    /// # Errors
    /// The stream or the connection can take no more.
    pub async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<usize, WriteError> {
        poll_fn(|cx| {
            let mut taken = 0;
            for chunk in &mut *chunks {
                match self.poll_ready(cx) {
                    Poll::Ready(Ok(())) => self.push(std::mem::take(chunk)),
                    Poll::Ready(Err(error)) if taken == 0 => return Poll::Ready(Err(error)),
                    Poll::Pending if taken == 0 => return Poll::Pending,
                    // What was taken is reported first; an error comes again with the next call.
                    Poll::Ready(Err(_)) | Poll::Pending => break,
                }
                taken += 1;
            }
            Poll::Ready(Ok(taken))
        })
        .await
    }

    /// Writes all chunks by reference. Chunks that were taken are left empty, so a call that was
    /// dropped may be repeated with the same chunks.
    ///
    /// # Errors
    /// The stream or the connection can take no more.
    pub async fn write_all_chunks(&mut self, mut chunks: &mut [Bytes]) -> Result<(), WriteError> {
        while !chunks.is_empty() {
            let taken = self.write_chunks(chunks).await?;
            chunks = &mut chunks[taken..];
        }
        Ok(())
    }

    /// Marks the end of the stream: nothing more can be written. Returns at once;
    /// [`stopped`](Self::stopped) tells when the peer has acknowledged everything.
    ///
    /// # Errors
    /// It was finished or reset before.
    pub fn finish(&mut self) -> Result<(), WriteError> {
        self.check_open()?;
        self.closed = true;
        self.shared.finish_requested.store(true, Release);
        self.conn.shared.notify_stream(self.id, &self.shared);
        Ok(())
    }

    /// Abandons the stream: data not yet delivered is dropped, the peer sees `code`.
    ///
    /// # Errors
    /// It was finished or reset before.
    pub fn reset(&mut self, code: VarInt) -> Result<(), WriteError> {
        if self.shared.reset_request().is_some() {
            return Err(WriteError::ClosedStream);
        }
        self.closed = true;
        self.shared.request_reset(code);
        self.shared.end_event.notify(usize::MAX);
        self.conn.shared.notify_stream(self.id, &self.shared);
        Ok(())
    }

    /// Streams with a higher priority are sent first; 0 at the start.
    pub fn set_priority(&mut self, priority: i32) {
        self.shared.priority.store(priority, Release);
        self.conn.shared.notify_stream(self.id, &self.shared);
    }

    /// Whether the peer has acknowledged all data and the finish. Stays true when the connection
    /// is lost afterwards; while false, nobody on this side knows how much arrived.
    #[must_use]
    pub fn is_acknowledged(&self) -> bool {
        self.shared.acknowledged.load(Acquire)
    }

    /// What [`set_priority`](Self::set_priority) set; 0 at the start.
    #[must_use]
    pub fn priority(&self) -> i32 {
        self.shared.priority.load(Acquire)
    }

    /// Waits for the stream's end: `None` when the peer has acknowledged all data and the
    /// finish (or this side reset the stream before), or the code with which it asked to stop.
    /// Cancel-safe.
    ///
    /// # Errors
    /// The connection was lost before: the peer may or may not have everything.
    pub async fn stopped(&self) -> Result<Option<VarInt>, ConnectionError> {
        loop {
            let listener = self.shared.end_event.listen();
            if let Some(code) = self.shared.stopped_code() {
                return Ok(Some(code));
            }
            if self.shared.acknowledged.load(Acquire) || self.shared.reset_request().is_some() {
                return Ok(None);
            }
            if self.shared.is_early_rejected() {
                return Err(ConnectionError::EarlyDataRejected);
            }
            if let Some(reason) = self.conn.shared.closed() {
                return Err(reason);
            }
            listener.await;
        }
    }

    /// The stream has no sending half: nothing to finish.
    pub(crate) fn forget(&mut self) {
        self.closed = true;
    }

    fn check_open(&self) -> Result<(), WriteError> {
        if let Some(code) = self.shared.stopped_code() {
            return Err(WriteError::Stopped(code));
        }
        if self.shared.is_early_rejected() {
            return Err(WriteError::ZeroRttRejected);
        }
        if let Some(reason) = self.conn.shared.closed() {
            return Err(WriteError::ConnectionLost(reason));
        }
        if self.closed { Err(WriteError::ClosedStream) } else { Ok(()) }
    }

    /// Ready when the queue is under its budget.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        let limit = self.conn.shared.send_queue_bytes;
        for registered in [false, true] {
            self.check_open()?;
            if self.shared.send_queued_bytes.load(Acquire) < limit {
                return Poll::Ready(Ok(()));
            }
            if !registered {
                self.shared.send_waker.register(cx.waker());
            }
        }
        Poll::Pending
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, WriteError>> {
        ready!(self.poll_ready(cx))?;
        let queued = self.shared.send_queued_bytes.load(Acquire);
        let room = self.conn.shared.send_queue_bytes.saturating_sub(queued).max(1);
        let taken = data.len().min(room);
        self.conn.shared.copied_bytes.fetch_add(taken as u64, Relaxed);
        self.push(Bytes::copy_from_slice(&data[..taken]));
        Poll::Ready(Ok(taken))
    }

    fn push(&mut self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        self.shared.send_queued_bytes.fetch_add(chunk.len(), AcqRel);
        self.shared.send_queue.push(chunk);
        self.conn.shared.notify_stream(self.id, &self.shared);
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        if !self.closed {
            self.shared.finish_requested.store(true, Release);
            self.conn.shared.notify_stream(self.id, &self.shared);
        }
    }
}

impl std::fmt::Debug for SendStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendStream").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The receiving half of a stream.
///
/// Dropped before its end, it tells the peer to stop (code 0).
pub struct RecvStream {
    conn: Arc<ConnRef>,
    id: StreamId,
    shared: Arc<StreamShared>,
    /// The rest of a chunk that [`read`](Self::read) took in part.
    rest: Bytes,
    ended: bool,
}

impl RecvStream {
    pub(crate) fn new(conn: Arc<ConnRef>, id: StreamId, shared: Arc<StreamShared>) -> Self {
        Self { conn, id, shared, rest: Bytes::new(), ended: false }
    }

    /// The stream's identity.
    #[must_use]
    pub fn id(&self) -> StreamId {
        self.id
    }

    /// Whether the stream was opened before the handshake was complete: what it carries may have
    /// been recorded and sent again by an attacker (RFC 9001 §9.2). Act on it only where twice does no
    /// harm, or wait for [`ZeroRttAccepted`](crate::engine::ZeroRttAccepted) first: an attacker
    /// cannot complete a handshake. Streams that came along with the handshake's last packet count.
    #[must_use]
    pub fn is_0rtt(&self) -> bool {
        self.shared.early
    }

    /// The next bytes in order, without copying, at most `bytes_max`; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// The peer reset the stream, it was stopped, or the connection is gone.
    pub async fn read_chunk(&mut self, bytes_max: usize) -> Result<Option<Bytes>, ReadError> {
        poll_fn(|cx| self.poll_chunk(cx, bytes_max)).await
    }

    /// The next chunks in order, without copying, as many as wait and `chunks` has places for;
    /// waits for the first one. Returns their number; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// As [`read_chunk`](Self::read_chunk).
    pub async fn read_chunks(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, ReadError> {
        let Some((first, others)) = chunks.split_first_mut() else { return Ok(Some(0)) };
        let Some(chunk) = self.read_chunk(usize::MAX).await? else { return Ok(None) };
        *first = chunk;
        let mut filled = 1;
        for place in others {
            let Some(chunk) = self.conn.shared.pop_received(self.id, &self.shared) else { break };
            *place = chunk;
            filled += 1;
        }
        Ok(Some(filled))
    }

    /// Copies the next bytes into `buffer`; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// As [`read_chunk`](Self::read_chunk).
    pub async fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, ReadError> {
        if buffer.is_empty() {
            return Ok(Some(0));
        }
        let Some(mut chunk) = self.read_chunk(buffer.len()).await? else { return Ok(None) };
        let len = chunk.len();
        chunk.copy_to_slice(&mut buffer[..len]);
        Ok(Some(len))
    }

    /// Fills `buffer`. Not cancel-safe: a dropped future has consumed a part.
    ///
    /// # Errors
    /// The stream ends before, or reading fails.
    pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), ReadExactError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..]).await? {
                Some(bytes) => filled += bytes,
                None => return Err(ReadExactError::FinishedEarly(filled)),
            }
        }
        Ok(())
    }

    /// Reads to the end of the stream. Not cancel-safe: a dropped future has consumed a part.
    ///
    /// # Errors
    /// The stream is longer than `bytes_max`, or reading fails.
    pub async fn read_to_end(&mut self, bytes_max: usize) -> Result<Vec<u8>, ReadToEndError> {
        let mut data = Vec::new();
        while let Some(chunk) = self.read_chunk(usize::MAX).await? {
            if data.len() + chunk.len() > bytes_max {
                return Err(ReadToEndError::TooLong(bytes_max));
            }
            data.extend_from_slice(&chunk);
        }
        Ok(data)
    }

    /// Waits until the peer resets the stream, without reading: `Some` code then; `None` when the
    /// stream has ended otherwise, and a reset can no longer come: all of it was received, or
    /// [`stop`](Self::stop) was called. Cancel-safe.
    ///
    /// Who reads instead learns of a reset from [`read`](Self::read).
    ///
    /// # Errors
    /// The connection was lost before, or the server refused the early data of this stream.
    pub async fn received_reset(&mut self) -> Result<Option<VarInt>, ResetError> {
        poll_fn(|cx| {
            for registered in [false, true] {
                if let Some(outcome) = self.reset_outcome(registered) {
                    return Poll::Ready(outcome);
                }
                if !registered {
                    self.shared.recv_waker.register(cx.waker());
                }
            }
            Poll::Pending
        })
        .await
    }

    /// `None`: not known yet. See `poll_chunk` for the order, and for `registered`.
    fn reset_outcome(&self, registered: bool) -> Option<Result<Option<VarInt>, ResetError>> {
        if self.shared.stop_request().is_some() {
            return Some(Ok(None));
        }
        let closed = self.conn.shared.closed();
        match self.shared.recv_end() {
            Some(RecvEnd::Reset(code)) => Some(Ok(Some(code))),
            Some(RecvEnd::Finished | RecvEnd::Unknown) => Some(Ok(None)),
            Some(RecvEnd::Rejected) => Some(Err(ResetError::ZeroRttRejected)),
            Some(RecvEnd::Lost) => {
                let reason = closed.unwrap_or(ConnectionError::EngineStopped);
                Some(Err(ResetError::ConnectionLost(reason)))
            }
            None => {
                closed.filter(|_| registered).map(|reason| Err(ResetError::ConnectionLost(reason)))
            }
        }
    }

    /// Tells the peer to stop sending; whatever waits is dropped, reading fails with
    /// [`ReadError::ClosedStream`] from now on.
    ///
    /// # Errors
    /// The stream ended before.
    pub fn stop(&mut self, code: VarInt) -> Result<(), ReadError> {
        if self.ended {
            return Err(ReadError::ClosedStream);
        }
        self.ended = true;
        self.rest.clear();
        self.shared.request_stop(code);
        self.conn.shared.discard_received(self.id, &self.shared);
        self.conn.shared.notify_stream(self.id, &self.shared);
        Ok(())
    }

    /// The stream has no receiving half: nothing to stop.
    pub(crate) fn forget(&mut self) {
        self.ended = true;
    }

    fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        bytes_max: usize,
    ) -> Poll<Result<Option<Bytes>, ReadError>> {
        for registered in [false, true] {
            // The ends are read before the queue: they are set after the last chunk was pushed,
            // and the connection's before the stream's.
            let closed = self.conn.shared.closed();
            let end = self.shared.recv_end();
            if self.rest.is_empty()
                && !self.ended
                && let Some(chunk) = self.conn.shared.pop_received(self.id, &self.shared)
            {
                self.rest = chunk;
            }
            if !self.rest.is_empty() {
                let len = self.rest.len().min(bytes_max);
                return Poll::Ready(Ok(Some(self.rest.split_to(len))));
            }
            if self.ended {
                let stopped = self.shared.stop_request().is_some();
                let answer = if stopped { Err(ReadError::ClosedStream) } else { Ok(None) };
                return Poll::Ready(answer);
            }
            match end {
                Some(RecvEnd::Finished) => {
                    self.ended = true;
                    return Poll::Ready(Ok(None));
                }
                Some(RecvEnd::Reset(code)) => {
                    self.ended = true;
                    return Poll::Ready(Err(ReadError::Reset(code)));
                }
                Some(RecvEnd::Unknown) => return Poll::Ready(Err(ReadError::ClosedStream)),
                Some(RecvEnd::Rejected) => return Poll::Ready(Err(ReadError::ZeroRttRejected)),
                Some(RecvEnd::Lost) => {
                    let reason = self.conn.shared.closed();
                    let reason = reason.unwrap_or(ConnectionError::EngineStopped);
                    return Poll::Ready(Err(ReadError::ConnectionLost(reason)));
                }
                None => {}
            }
            // Closed for good before the queue was looked at, and the stream has no end of its own
            // (seen twice: the shard sets the connection's end first).
            if let Some(reason) = closed
                && registered
            {
                return Poll::Ready(Err(ReadError::ConnectionLost(reason)));
            }
            if !registered {
                self.shared.recv_waker.register(cx.waker());
                self.conn.shared.await_received(self.id, &self.shared);
            }
        }
        Poll::Pending
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        if !self.ended && self.shared.recv_end().is_none() {
            self.shared.request_stop(VarInt::from_u32(0));
            self.conn.shared.notify_stream(self.id, &self.shared);
        }
        self.conn.shared.discard_received(self.id, &self.shared);
    }
}

impl std::fmt::Debug for RecvStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecvStream").field("id", &self.id).finish_non_exhaustive()
    }
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::BrokenPipe, error)
}

impl futures_io::AsyncWrite for SendStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Self::poll_write(self.get_mut(), cx, data).map_err(broken)
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        // Everything written is on its way: the shard sends as soon as the path allows.
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        Poll::Ready(if this.closed { Ok(()) } else { this.finish().map_err(broken) })
    }
}

impl futures_io::AsyncRead for RecvStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        if buffer.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let chunk = ready!(self.get_mut().poll_chunk(cx, buffer.len())).map_err(broken)?;
        Poll::Ready(Ok(chunk.map_or(0, |mut chunk| {
            let len = chunk.len();
            chunk.copy_to_slice(&mut buffer[..len]);
            len
        })))
    }
}

#[cfg(feature = "tokio")]
impl tokio::io::AsyncWrite for SendStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Self::poll_write(self.get_mut(), cx, data).map_err(broken)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        futures_io::AsyncWrite::poll_flush(self, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        futures_io::AsyncWrite::poll_close(self, cx)
    }
}

#[cfg(feature = "tokio")]
impl tokio::io::AsyncRead for RecvStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let chunk = ready!(self.get_mut().poll_chunk(cx, buffer.remaining())).map_err(broken)?;
        if let Some(chunk) = chunk {
            buffer.put_slice(&chunk);
        }
        Poll::Ready(Ok(()))
    }
}
