//! The server side of draft-banks-quic-performance: what a stream asks for, it gets.

use bytes::Bytes;
use stoq::app::{ConnId, ReadOutcome, ShardCx, WriteOutcome};
use stoq::{Dir, StreamId, VarInt};
use stoq_measure::wire::{CHUNK_BYTES, CountReader};

/// Bytes read of one stream in one call, so that one stream cannot hold the turn.
pub const READ_BYTES_MAX: usize = 4 << 20;

/// What a stream still owes and still expects.
#[derive(Debug, Default)]
pub struct PerfStream {
    count: CountReader,
    /// Bytes still to send, once the count is known.
    left: Option<u64>,
    read_done: bool,
    write_done: bool,
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
            let count = &mut self.count;
            match cx.read(conn, stream, READ_BYTES_MAX, |data| count.take(&data)) {
                ReadOutcome::MayHaveMore => continue,
                ReadOutcome::Blocked => break,
                ReadOutcome::Finished => self.read_done = true,
                ReadOutcome::Reset(_) | ReadOutcome::Unknown => {
                    // An abandoned request is not answered.
                    if stream.dir() == Dir::Bi {
                        cx.reset(conn, stream, VarInt::from_u32(0));
                    }
                    return false;
                }
            }
        }
        if stream.dir() == Dir::Uni {
            return !self.read_done;
        }
        if self.left.is_none() {
            self.left = self.count.count();
            if self.left.is_none() && self.read_done {
                // The draft's request is 8 bytes: fewer are no request.
                cx.reset(conn, stream, VarInt::from_u32(1));
                return false;
            }
        }
        self.handle_writable(cx, conn, stream)
    }

    /// Sends what is owed; `false` when the stream is over.
    pub fn handle_writable(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
    ) -> bool {
        if let (Some(owed), false) = (self.left, self.write_done) {
            let Some(left) = write_filler(cx, conn, stream, owed) else { return false };
            self.left = Some(left);
            if left == 0 {
                self.write_done = true;
                cx.finish(conn, stream);
            }
        }
        !(self.read_done && self.write_done)
    }
}
