//! What goes over the wire.
//!
//! Streams speak draft-banks-quic-performance-00 (ALPN `perf`): the first 8 bytes of a stream
//! say how many bytes the other side shall send back on it; what else arrives is discarded.
//! The draft has no datagrams (RFC 9221); these are ours: a datagram is
//!
//! ```text
//! byte 0       1: send me back            0: count me
//! bytes 1..9   echoed as they are (the sender's intended time)
//! bytes 9..17  in the echo: datagrams received on this connection so far
//! ```
//! so the sender learns how many arrived and how long one takes there and back.

/// The application protocol.
pub const ALPN: &[u8] = b"perf";
/// Bytes of the count at the head of a stream.
pub const COUNT_BYTES: usize = 8;
/// Bytes of one chunk of filler.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Flow-control windows of every stack, bytes.
pub const WINDOW_BYTES: u32 = 32 << 20;
/// Socket buffers asked for, bytes.
pub const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// Bytes of a datagram's head, and of an echo.
pub const DATAGRAM_HEAD_BYTES: usize = 17;
/// Every so many datagrams asks for an echo.
pub const ECHO_EVERY: u64 = 64;

/// Writes a datagram's head.
///
/// # Panics
/// If `datagram` is shorter than [`DATAGRAM_HEAD_BYTES`].
pub fn write_head(datagram: &mut [u8], wants_echo: bool, time_ns: u64, received: u64) {
    datagram[0] = wants_echo.into();
    datagram[1..9].copy_from_slice(&time_ns.to_be_bytes());
    datagram[9..DATAGRAM_HEAD_BYTES].copy_from_slice(&received.to_be_bytes());
}

/// A datagram of `size` bytes that asks for no echo: they are all alike, and a stack that sends
/// shared bytes needs no buffer for them. `None`: more than a UDP datagram carries.
#[must_use]
pub fn plain_datagram(size: usize) -> Option<&'static [u8]> {
    static ZEROS: [u8; u16::MAX as usize] = [0; u16::MAX as usize];
    ZEROS.get(..size)
}

/// A datagram of `size` bytes that asks for an echo.
///
/// # Panics
/// If `size` is below [`DATAGRAM_HEAD_BYTES`].
#[must_use]
pub fn asking_datagram(size: usize, time_ns: u64) -> Vec<u8> {
    let mut datagram = vec![0; size];
    write_head(&mut datagram, true, time_ns, 0);
    datagram
}

/// A datagram's head: whether an echo is wanted, the time, the count. `None`: too short to be one.
#[must_use]
pub fn read_head(datagram: &[u8]) -> Option<(bool, u64, u64)> {
    let head = datagram.first_chunk::<DATAGRAM_HEAD_BYTES>()?;
    let word = |at: usize| {
        let bytes = head[at..at + 8].first_chunk().expect("8 bytes inside the head");
        u64::from_be_bytes(*bytes)
    };
    Some((head[0] == 1, word(1), word(9)))
}

/// The receiving side of datagrams on one connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct DatagramSink {
    received: u64,
}

impl DatagramSink {
    /// Counts a datagram; the echo to send back, if it asks for one.
    pub fn handle(&mut self, datagram: &[u8]) -> Option<[u8; DATAGRAM_HEAD_BYTES]> {
        self.received += 1;
        let (wants_echo, time_ns, _) = read_head(datagram)?;
        let mut echo = [0; DATAGRAM_HEAD_BYTES];
        write_head(&mut echo, false, time_ns, self.received);
        wants_echo.then_some(echo)
    }
}

/// Reads the count at the head of a stream, however it is cut.
#[derive(Debug, Clone, Copy, Default)]
pub struct CountReader {
    bytes: [u8; COUNT_BYTES],
    len: usize,
}

impl CountReader {
    /// Takes the next bytes of the stream.
    pub fn take(&mut self, data: &[u8]) {
        let taken = data.len().min(COUNT_BYTES - self.len);
        self.bytes[self.len..self.len + taken].copy_from_slice(&data[..taken]);
        self.len += taken;
    }

    /// The count, once it has arrived.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        (self.len == COUNT_BYTES).then(|| u64::from_be_bytes(self.bytes))
    }
}

/// A request of `size` bytes (at least the count) that asks for `answer` bytes.
#[must_use]
pub fn request(size: usize, answer: u64) -> Vec<u8> {
    let mut request = vec![0x5a; size.max(COUNT_BYTES)];
    request[..COUNT_BYTES].copy_from_slice(&answer.to_be_bytes());
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_cut_anywhere() {
        let bytes = request(12, 0x0102_0304_0506_0708);
        assert_eq!((bytes.len(), request(3, 1).len()), (12, 8));
        for cut in 0..=12 {
            let mut reader = CountReader::default();
            reader.take(&bytes[..cut]);
            assert_eq!(reader.count().is_some(), cut >= 8, "{cut}");
            reader.take(&bytes[cut..]);
            assert_eq!(reader.count(), Some(0x0102_0304_0506_0708), "{cut}");
        }
    }

    #[test]
    fn only_what_asks_is_echoed_and_all_is_counted() {
        let mut sink = DatagramSink::default();
        let mut datagram = [0; 100];
        assert_eq!(sink.handle(&datagram), None);
        assert_eq!(sink.handle(&[1; DATAGRAM_HEAD_BYTES - 1]), None);
        write_head(&mut datagram, true, 99, 0);
        let echo = sink.handle(&datagram).expect("an echo");
        assert_eq!(read_head(&echo), Some((false, 99, 3)));
    }
}
