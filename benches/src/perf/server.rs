//! The server side of draft-banks-quic-performance: what a stream asks for, it gets.

use bytes::Bytes;
use stoq::app::{ConnId, ReadOutcome, ShardCx, WriteOutcome};
use stoq::{StreamId, VarInt};

/// Bytes of one chunk: large, because the send buffer's look-up is linear in chunks.
pub const CHUNK_BYTES: usize = 256 * 1024;
/// Bytes read of one stream in one call, so that one stream cannot hold the turn.
pub const READ_BYTES_MAX: usize = 4 << 20;

/// What a stream still owes and still expects.
#[derive(Debug, Default)]
pub struct PerfStream {
    count: [u8; 8],
    count_bytes: usize,
    left: u64,
    read_done: bool,
    finished: bool,
}

/// The bytes that everybody sends; shared, never copied.
pub fn filler() -> Bytes {
    static FILLER: std::sync::OnceLock<Bytes> = std::sync::OnceLock::new();
    FILLER.get_or_init(|| Bytes::from(vec![0x5a; CHUNK_BYTES])).clone()
}

/// Writes up to `left` filler bytes; returns what is left, `None` when the peer stopped the stream.
pub fn write_filler(
    cx: &mut ShardCx<'_>,
    conn: ConnId,
    stream: StreamId,
    mut left: u64,
) -> Option<u64> {
    let filler = filler();
    while left > 0 {
        let len = left.min(filler.len() as u64) as usize;
        let mut chunk = [filler.slice(..len)];
        match cx.write(conn, stream, &mut chunk) {
            WriteOutcome::Written(bytes) => {
                left -= bytes as u64;
                if bytes < len {
                    break;
                }
            }
            WriteOutcome::Blocked => break,
            WriteOutcome::Stopped(_) | WriteOutcome::Unknown => return None,
        }
    }
    Some(left)
}

impl PerfStream {
    /// Reads the count and discards the rest; `false` when the stream is over.
    pub fn handle_readable(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
    ) -> bool {
        while !self.read_done {
            let (count, count_bytes) = (&mut self.count, &mut self.count_bytes);
            let outcome = cx.read(conn, stream, READ_BYTES_MAX, |data| {
                let taken = data.len().min(8 - *count_bytes);
                count[*count_bytes..*count_bytes + taken].copy_from_slice(&data[..taken]);
                *count_bytes += taken;
            });
            match outcome {
                ReadOutcome::MayHaveMore => continue,
                ReadOutcome::Blocked => break,
                ReadOutcome::Finished => self.read_done = true,
                ReadOutcome::Reset(_) | ReadOutcome::Unknown => {
                    // An abandoned request is not answered.
                    if stream.dir() == stoq::Dir::Bi {
                        cx.reset(conn, stream, VarInt::from_u32(0));
                    }
                    return false;
                }
            }
        }
        if self.read_done {
            if stream.dir() == stoq::Dir::Uni {
                return false;
            }
            if self.count_bytes < 8 {
                // The draft's request is 8 bytes: fewer are no request.
                cx.reset(conn, stream, VarInt::from_u32(1));
                return false;
            }
            if !self.finished && self.left == 0 {
                self.left = u64::from_be_bytes(self.count);
            }
            return self.handle_writable(cx, conn, stream);
        }
        true
    }

    /// Sends what is owed; `false` when the stream is over.
    pub fn handle_writable(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
    ) -> bool {
        if !self.read_done || self.finished {
            return !self.finished;
        }
        let Some(left) = write_filler(cx, conn, stream, self.left) else { return false };
        self.left = left;
        if left == 0 {
            self.finished = true;
            cx.finish(conn, stream);
            return false;
        }
        true
    }
}
