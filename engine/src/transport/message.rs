//! Messages of a connection: datagrams and whole unidirectional streams, in order of arrival.

use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};
use quinn_proto::VarInt;

use crate::connection::Connection;
use crate::error::{ConnectionError, ReadError};
use crate::stream::RecvStream;

/// Tells a peer that its message is too large (the application's code space of RFC 9000 §20.2).
const MESSAGE_TOO_LARGE: VarInt = VarInt::from_u32(1);

/// Why a message was not received.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The connection is gone.
    #[error("connection lost: {0}")]
    ConnectionLost(#[from] ConnectionError),
    /// The peer abandoned the message.
    #[error("the peer abandoned a message with code {0}")]
    Reset(VarInt),
    /// The message is larger than allowed; the peer was told to stop.
    #[error("a message is larger than `message_size_max` ({limit_bytes} bytes)")]
    TooLarge {
        /// The limit, bytes.
        limit_bytes: usize,
    },
}

/// A message of which a part has arrived.
#[derive(Debug)]
struct Partial {
    stream: RecvStream,
    chunks: Vec<Bytes>,
    bytes: usize,
}

/// Messages that a cancelled call left half read.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    partial: Mutex<Vec<Partial>>,
}

/// Puts a message back that was not read to its end.
struct Reading<'a> {
    inbox: &'a Inbox,
    partial: Option<Partial>,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if let Some(partial) = self.partial.take() {
            self.inbox.partials().push(partial);
        }
    }
}

impl Inbox {
    fn partials(&self) -> std::sync::MutexGuard<'_, Vec<Partial>> {
        self.partial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn receive(
        &self,
        conn: &Connection,
        limit_bytes: usize,
    ) -> Result<Bytes, ReceiveError> {
        let left = self.partials().pop();
        let partial = match left {
            Some(partial) => partial,
            None => {
                let datagram = std::pin::pin!(conn.read_datagram());
                let stream = std::pin::pin!(conn.accept_uni());
                match select(datagram, stream).await {
                    Either::Left((datagram, _)) => return Ok(datagram?),
                    Either::Right((stream, _)) => {
                        Partial { stream: stream?, chunks: Vec::new(), bytes: 0 }
                    }
                }
            }
        };
        let mut reading = Reading { inbox: self, partial: Some(partial) };
        let result = reading.read(limit_bytes).await;
        // Read to its end, one way or the other.
        reading.partial = None;
        result
    }
}

impl Reading<'_> {
    async fn read(&mut self, limit_bytes: usize) -> Result<Bytes, ReceiveError> {
        let partial = self.partial.as_mut().expect("set until the end");
        loop {
            match partial.stream.read_chunk(usize::MAX).await {
                Ok(Some(chunk)) => {
                    partial.bytes += chunk.len();
                    if partial.bytes > limit_bytes {
                        // An end that came first makes it no smaller.
                        let _ended_before = partial.stream.stop(MESSAGE_TOO_LARGE);
                        return Err(ReceiveError::TooLarge { limit_bytes });
                    }
                    partial.chunks.push(chunk);
                }
                Ok(None) => return Ok(join(std::mem::take(&mut partial.chunks), partial.bytes)),
                Err(ReadError::Reset(code)) => return Err(ReceiveError::Reset(code)),
                Err(ReadError::ConnectionLost(reason)) => return Err(reason.into()),
                Err(ReadError::ClosedStream | ReadError::ZeroRttRejected) => {
                    unreachable!("nobody else stops this stream, and the peer opened it")
                }
            }
        }
    }
}

/// One chunk as it is, several copied into one.
fn join(mut chunks: Vec<Bytes>, bytes: usize) -> Bytes {
    if chunks.len() == 1 {
        return chunks.pop().expect("one chunk");
    }
    let mut message = BytesMut::with_capacity(bytes);
    for chunk in chunks {
        message.extend_from_slice(&chunk);
    }
    message.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_chunk_is_not_copied_and_several_are_joined() {
        let chunk = Bytes::from_static(b"abc");
        let address = chunk.as_ptr();
        assert_eq!(join(vec![chunk], 3).as_ptr(), address);
        let parts = vec![Bytes::from_static(b"ab"), Bytes::from_static(b"c")];
        assert_eq!(join(parts, 3), "abc");
        assert!(join(Vec::new(), 0).is_empty());
    }
}
