//! The perf protocol for stacks that are state machines without tasks: what to read and write
//! when a stream is readable or writable.

use std::collections::HashMap;
use std::time::Instant;

use stoq_measure::peer::{Run, Workload};
use stoq_measure::window::Window;
use stoq_measure::wire::{CHUNK_BYTES, CountReader, request};

/// A connection's streams, as these stacks show them.
pub trait Streams {
    /// Reads; `None`: nothing now, or the stream is gone. Else bytes, and whether it ended.
    fn read(&mut self, stream: u64, buffer: &mut [u8]) -> Option<(usize, bool)>;
    /// Writes; the bytes taken. `None`: the stream is gone.
    fn write(&mut self, stream: u64, data: &[u8], fin: bool) -> Option<usize>;
}

/// What is still to be sent on a stream.
#[derive(Debug, Clone, Copy)]
struct Owed {
    left: u64,
    fin: bool,
}

impl Owed {
    /// Writes what fits; `false` when all is written or the stream is gone.
    fn write(&mut self, io: &mut impl Streams, stream: u64, filler: &[u8]) -> (u64, bool) {
        let before = self.left;
        loop {
            let len = self.left.min(filler.len() as u64) as usize;
            let fin = self.fin && len as u64 == self.left;
            let Some(taken) = io.write(stream, &filler[..len], fin) else {
                return (before - self.left, false);
            };
            self.left -= taken as u64;
            if self.left == 0 {
                return (before, false);
            }
            if taken < len {
                return (before - self.left, true);
            }
        }
    }
}

/// The server's side of a connection.
#[derive(Debug)]
pub struct ServerStreams {
    reading: HashMap<u64, CountReader>,
    owed: HashMap<u64, Owed>,
    buffer: Vec<u8>,
    filler: Vec<u8>,
}

impl Default for ServerStreams {
    fn default() -> Self {
        Self {
            reading: HashMap::new(),
            owed: HashMap::new(),
            buffer: vec![0; CHUNK_BYTES],
            filler: vec![0x5a; CHUNK_BYTES],
        }
    }
}

impl ServerStreams {
    /// Reads a stream; answers it once its count is known. Whether it is writing now.
    pub fn handle_readable(&mut self, io: &mut impl Streams, stream: u64) -> bool {
        while let Some((len, fin)) = io.read(stream, &mut self.buffer) {
            let reader = self.reading.entry(stream).or_default();
            let known = reader.count().is_some();
            reader.take(&self.buffer[..len]);
            if let (Some(left), false) = (reader.count(), known) {
                self.owed.insert(stream, Owed { left, fin: true });
                self.handle_writable(io, stream);
            }
            if fin {
                self.reading.remove(&stream);
                break;
            }
        }
        self.owed.contains_key(&stream)
    }

    /// Goes on with an answer. Whether it is not at its end.
    pub fn handle_writable(&mut self, io: &mut impl Streams, stream: u64) -> bool {
        let Some(owed) = self.owed.get_mut(&stream) else { return false };
        let (_, more) = owed.write(io, stream, &self.filler);
        if !more {
            self.owed.remove(&stream);
        }
        more
    }
}

/// The client's side of its one connection, for bulk and requests.
pub struct ClientStreams {
    workload: Workload,
    outstanding: usize,
    request: Vec<u8>,
    next_stream: u64,
    started: HashMap<u64, Instant>,
    owed: HashMap<u64, Owed>,
    buffer: Vec<u8>,
    filler: Vec<u8>,
}

impl ClientStreams {
    /// Nothing is open yet.
    #[must_use]
    pub fn new(run: &Run) -> Self {
        let request = match run.workload {
            Workload::Requests => request(run.size, run.size as u64),
            workload if workload.receives() => request(0, u64::MAX >> 2),
            _ => request(0, 0),
        };
        Self {
            workload: run.workload,
            outstanding: run.outstanding,
            request,
            next_stream: 0,
            started: HashMap::new(),
            owed: HashMap::new(),
            buffer: vec![0; CHUNK_BYTES],
            filler: vec![0x5a; CHUNK_BYTES],
        }
    }

    /// Opens what shall be open. Streams that go on writing are returned.
    pub fn start(&mut self, io: &mut impl Streams) -> Vec<u64> {
        let wanted = if self.workload == Workload::Requests { self.outstanding } else { 1 };
        while self.started.len() < wanted {
            let stream = self.next_stream;
            let sends = self.workload.sends();
            // The head of a stream is small: it is taken whole or, without credit, not at all.
            match io.write(stream, &self.request, !sends) {
                Some(taken) if taken == self.request.len() => {}
                _ => break,
            }
            // Client-initiated bidirectional streams: 0, 4, 8 (RFC 9000, section 2.1).
            self.next_stream += 4;
            self.started.insert(stream, Instant::now());
            if sends {
                self.owed.insert(stream, Owed { left: u64::MAX >> 2, fin: false });
            }
        }
        self.owed.keys().copied().collect()
    }

    /// Reads a stream.
    pub fn handle_readable(&mut self, io: &mut impl Streams, stream: u64, window: &mut Window) {
        while let Some((len, fin)) = io.read(stream, &mut self.buffer) {
            window.add_bytes(len as u64);
            if fin {
                if self.workload == Workload::Requests
                    && let Some(start) = self.started.remove(&stream)
                {
                    window.add_bytes(self.request.len() as u64);
                    window.add_op(start.elapsed());
                }
                break;
            }
        }
    }

    /// Goes on writing. Whether there is more.
    pub fn handle_writable(
        &mut self,
        io: &mut impl Streams,
        stream: u64,
        window: &mut Window,
    ) -> bool {
        let Some(owed) = self.owed.get_mut(&stream) else { return false };
        let (written, more) = owed.write(io, stream, &self.filler);
        window.add_bytes(written);
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// One end of streams that carry `room` bytes at a time.
    #[derive(Default)]
    struct Pipe {
        inbound: HashMap<u64, (VecDeque<u8>, bool)>,
        outbound: HashMap<u64, (Vec<u8>, bool)>,
        room: usize,
    }

    impl Streams for Pipe {
        fn read(&mut self, stream: u64, buffer: &mut [u8]) -> Option<(usize, bool)> {
            let (data, fin) = self.inbound.get_mut(&stream)?;
            if data.is_empty() && !*fin {
                return None;
            }
            let len = data.len().min(buffer.len());
            for (place, byte) in buffer.iter_mut().zip(data.drain(..len)) {
                *place = byte;
            }
            let ended = *fin && data.is_empty();
            if ended {
                self.inbound.remove(&stream);
            }
            Some((len, ended))
        }

        fn write(&mut self, stream: u64, data: &[u8], fin: bool) -> Option<usize> {
            let taken = data.len().min(self.room);
            self.room -= taken;
            let out = self.outbound.entry(stream).or_default();
            out.0.extend_from_slice(&data[..taken]);
            out.1 |= fin && taken == data.len();
            Some(taken)
        }
    }

    #[test]
    fn an_answer_as_long_as_asked_for_whatever_the_room() {
        let mut server = ServerStreams::default();
        let mut io = Pipe { room: 10, ..Pipe::default() };
        let asked = request(20, 25);
        io.inbound.insert(0, (asked[..5].iter().copied().collect(), false));
        assert!(!server.handle_readable(&mut io, 0), "the count is not known yet");
        io.inbound.insert(0, (asked[5..].iter().copied().collect(), true));
        assert!(server.handle_readable(&mut io, 0));
        assert_eq!(io.outbound[&0], (vec![0x5a; 10], false));
        io.room = 100;
        assert!(!server.handle_writable(&mut io, 0));
        assert_eq!(io.outbound[&0], (vec![0x5a; 25], true));
    }

    #[test]
    fn an_empty_answer_ends_at_once() {
        let mut server = ServerStreams::default();
        let mut io = Pipe { room: 10, ..Pipe::default() };
        io.inbound.insert(4, (request(8, 0).into(), true));
        assert!(!server.handle_readable(&mut io, 4));
        assert_eq!(io.outbound[&4], (Vec::new(), true));
    }
}
