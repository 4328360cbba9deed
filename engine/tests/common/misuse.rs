//! Random misuse of all handles at once: a seeded sequence of connects, accepts, refusals, opens, writes
//! that never wait, reads that stop in the middle, resets, stops, datagrams, closes and drops, each future
//! polled once and often thrown away.

use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use pollster::block_on;
use stoq::VarInt;
use stoq::config::TransportConfig;
use stoq::connection::Connection;
use stoq::error::ConnectionError;
use stoq::stream::{RecvStream, SendStream};

use crate::pair::{NAME, Pair, counters};

const STEPS: usize = 4000;
/// Handles of a kind that are kept at most; older ones are dropped.
const KEPT_MAX: usize = 12;

type Attempt = Pin<Box<dyn Future<Output = Result<Connection, ConnectionError>>>>;

pub fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

pub struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as usize % limit
    }
}

/// Keeps a handle; drops another one when there are too many.
fn keep<T>(random: &mut Random, kept: &mut Vec<T>, handle: T) {
    kept.push(handle);
    if kept.len() > KEPT_MAX {
        drop(kept.swap_remove(random.below(kept.len())));
    }
}

fn any<'a, T>(random: &mut Random, kept: &'a mut [T]) -> Option<&'a mut T> {
    if kept.is_empty() {
        return None;
    }
    let index = random.below(kept.len());
    kept.get_mut(index)
}

/// Everything that an application could hold.
#[derive(Default)]
struct Held {
    attempts: Vec<Attempt>,
    connections: Vec<Connection>,
    sends: Vec<SendStream>,
    recvs: Vec<RecvStream>,
}

/// What came of it, to show that the sequence does something.
#[derive(Debug, Default)]
struct Done {
    connected: usize,
    opened: usize,
    accepted: usize,
    written_bytes: usize,
    read_bytes: usize,
    datagrams: usize,
    cancelled: usize,
}

impl Held {
    fn step(&mut self, random: &mut Random, pair: &Pair, done: &mut Done) {
        match random.below(24) {
            0 if self.connections.len() < KEPT_MAX => {
                let attempt = Box::pin(pair.client.connect(pair.server.local_addr(), NAME));
                keep(random, &mut self.attempts, attempt);
            }
            1..=3 => self.decide(random, pair, done),
            4..=6 => self.advance_attempts(random, done),
            7..=9 => self.open(random, done),
            10..=12 => self.accept(random, done),
            13..=16 => self.write(random, done),
            17..=19 => self.read(random, done),
            20 => self.end_stream(random),
            21 | 22 => self.datagrams(random, done),
            _ => self.drop_something(random),
        }
    }

    fn decide(&mut self, random: &mut Random, pair: &Pair, done: &mut Done) {
        let Some(Some(incoming)) = poll_once(pair.server.accept()) else {
            return done.cancelled += 1;
        };
        match random.below(8) {
            0 => drop(incoming),
            1 => incoming.refuse(),
            2 => incoming.ignore(),
            3 => incoming.retry(),
            _ => {
                let accepting = Box::pin(incoming.accept());
                keep(random, &mut self.attempts, accepting);
            }
        }
    }

    fn advance_attempts(&mut self, random: &mut Random, done: &mut Done) {
        for mut attempt in std::mem::take(&mut self.attempts) {
            match poll_once(attempt.as_mut()) {
                Some(Ok(connection)) => {
                    done.connected += 1;
                    keep(random, &mut self.connections, connection);
                }
                Some(Err(_refused_or_lost)) => {}
                None => self.attempts.push(attempt),
            }
        }
    }

    fn open(&mut self, random: &mut Random, done: &mut Done) {
        let bi = random.below(2) == 0;
        let Some(connection) = any(random, &mut self.connections).map(|c| c.clone()) else {
            return;
        };
        let opened = if bi {
            let mut open = pin!(connection.open_bi());
            // The answer is given some time for, or the future is thrown away at once.
            patient(random, open.as_mut()).map(|streams| streams.map(|(s, r)| (s, Some(r))))
        } else {
            let mut open = pin!(connection.open_uni());
            patient(random, open.as_mut()).map(|stream| stream.map(|s| (s, None)))
        };
        match opened {
            Some(Ok((send, recv))) => {
                done.opened += 1;
                keep(random, &mut self.sends, send);
                if let Some(recv) = recv {
                    keep(random, &mut self.recvs, recv);
                }
            }
            Some(Err(_lost)) => {}
            None => done.cancelled += 1,
        }
    }

    fn accept(&mut self, random: &mut Random, done: &mut Done) {
        let bi = random.below(2) == 0;
        let Some(connection) = any(random, &mut self.connections) else { return };
        let accepted = if bi {
            poll_once(connection.accept_bi()).map(|both| both.map(|(s, r)| (Some(s), r)))
        } else {
            poll_once(connection.accept_uni()).map(|stream| stream.map(|r| (None, r)))
        };
        match accepted {
            Some(Ok((send, recv))) => {
                done.accepted += 1;
                keep(random, &mut self.recvs, recv);
                if let Some(send) = send {
                    keep(random, &mut self.sends, send);
                }
            }
            Some(Err(_lost)) => {}
            None => done.cancelled += 1,
        }
    }

    fn write(&mut self, random: &mut Random, done: &mut Done) {
        let bytes = 1 << random.below(19);
        let Some(send) = any(random, &mut self.sends) else { return };
        match poll_once(send.write(&vec![5; bytes])) {
            Some(Ok(written)) => done.written_bytes += written,
            Some(Err(_ended)) => {}
            None => done.cancelled += 1,
        }
    }

    fn read(&mut self, random: &mut Random, done: &mut Done) {
        let bytes = 1 << random.below(19);
        let Some(recv) = any(random, &mut self.recvs) else { return };
        match poll_once(recv.read_chunk(bytes)) {
            Some(Ok(chunk)) => done.read_bytes += chunk.map_or(0, |chunk| chunk.len()),
            Some(Err(_ended)) => {}
            None => done.cancelled += 1,
        }
    }

    /// Each may be refused: the stream or its connection has ended before.
    fn end_stream(&mut self, random: &mut Random) {
        let code = VarInt::from_u32(random.below(100) as u32);
        match random.below(3) {
            0 => drop(any(random, &mut self.sends).map(SendStream::finish)),
            1 => drop(any(random, &mut self.sends).map(|send| send.reset(code))),
            _ => drop(any(random, &mut self.recvs).map(|recv| recv.stop(code))),
        }
    }

    fn datagrams(&mut self, random: &mut Random, done: &mut Done) {
        let which = random.below(3);
        let data = Bytes::from(vec![9; 1 + random.below(1000)]);
        let Some(connection) = any(random, &mut self.connections) else { return };
        let happened = match which {
            0 => connection.send_datagram(data).is_ok(),
            1 => matches!(poll_once(connection.send_datagram_wait(data)), Some(Ok(()))),
            _ => matches!(poll_once(connection.read_datagram()), Some(Ok(_))),
        };
        done.datagrams += usize::from(happened);
    }

    fn drop_something(&mut self, random: &mut Random) {
        fn drop_one<T>(random: &mut Random, kept: &mut Vec<T>) {
            if !kept.is_empty() {
                drop(kept.swap_remove(random.below(kept.len())));
            }
        }
        match random.below(8) {
            0 => drop_one(random, &mut self.attempts),
            1 => drop_one(random, &mut self.connections),
            2 => {
                if let Some(connection) = any(random, &mut self.connections) {
                    connection.close(VarInt::from_u32(1), b"chaos");
                }
            }
            3 | 4 => drop_one(random, &mut self.sends),
            5 | 6 => drop_one(random, &mut self.recvs),
            // A breath for the shards.
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }

    fn drop_all(mut self, random: &mut Random) {
        while !(self.attempts.is_empty()
            && self.connections.is_empty()
            && self.sends.is_empty()
            && self.recvs.is_empty())
        {
            match random.below(4) {
                0 => drop(self.attempts.pop()),
                1 => drop(self.connections.pop()),
                2 => drop(self.sends.pop()),
                _ => drop(self.recvs.pop()),
            }
        }
    }
}

/// Polls a few times with pauses, or once: then the future is cancelled.
fn patient<F: Future>(random: &mut Random, mut future: Pin<&mut F>) -> Option<F::Output> {
    for _ in 0..random.below(6) {
        if let Some(output) = poll_once(future.as_mut()) {
            return Some(output);
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    poll_once(future)
}

/// Two shards, and limits so small that every one is met.
pub fn tight(config: TransportConfig) -> TransportConfig {
    TransportConfig {
        max_concurrent_streams: 20,
        stream_send_queue_bytes: 64 << 10,
        receive_buffer_size: 1 << 20,
        stream_receive_buffer_size: 256 << 10,
        send_buffer_size: 256 << 10,
        ..config
    }
}

/// Misuses a pair's handles. Afterwards nothing is left, and a whole transfer works.
///
/// # Panics
/// If a connection or stream is left, or the transfer fails.
pub fn misuse(pair: &Pair, seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let (mut held, mut done) = (Held::default(), Done::default());
    for _ in 0..STEPS {
        held.step(&mut random, pair, &mut done);
    }
    held.drop_all(&mut random);
    println!("{done:?}");
    assert!(done.connected > 2 && done.opened > 10 && done.accepted > 2, "{done:?}");
    assert!(done.written_bytes > 0 && done.read_bytes > 0 && done.cancelled > 100, "{done:?}");
    pair.wait_idle();
    // Clients that knocked and went: nobody decided about them.
    while let Some(Some(incoming)) = poll_once(pair.server.accept()) {
        drop(incoming);
    }
    block_on(whole_transfer(pair));
    pair.wait_idle();
    for engine in [&pair.server, &pair.client] {
        assert_eq!(counters(engine).app_panics, 0);
    }
}

async fn whole_transfer(pair: &Pair) {
    let (near, far) = pair.connect().await;
    let (mut send, _answer) = near.open_bi().await.expect("opened");
    let write = async {
        send.write_all(&[3; 3_000_000]).await.expect("written");
        send.finish().expect("open");
        assert_eq!(send.stopped().await, Ok(None), "all acknowledged");
    };
    let read = async {
        let (_answer, mut recv) = far.accept_bi().await.expect("accepted");
        recv.read_to_end(3_000_001).await.expect("read").len()
    };
    assert_eq!(join(write, read).await.1, 3_000_000);
}
