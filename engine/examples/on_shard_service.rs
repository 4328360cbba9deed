//! A key-value service on the shard itself: state without locks, answers within the turn in
//! which the request arrived, a timer, and a message from another thread.
//!
//! `cargo run --release -p stoq --example on_shard_service`

mod common;

use std::any::Any;
use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use common::{BoxError, NAME, config, tls};
use pollster::block_on;
use stoq::app::{ConnId, ReadOutcome, ShardApp, ShardCx};
use stoq::engine::Engine;
use stoq::error::ConnectionError;
use stoq::{Dir, StreamId, VarInt};

const REQUEST_BYTES_MAX: usize = 64 * 1024;
const TICK: Duration = Duration::from_millis(100);

/// One instance per shard: its state belongs to one thread.
#[derive(Default)]
struct Store {
    values: HashMap<Vec<u8>, Bytes>,
    /// Requests that have not come whole.
    partial: HashMap<(ConnId, StreamId), Vec<u8>>,
    requests: u64,
    ticking: bool,
}

impl Store {
    /// `key=value` stores, `key` asks.
    fn answer(&mut self, request: &[u8]) -> Bytes {
        self.requests += 1;
        match request.iter().position(|byte| *byte == b'=') {
            Some(at) => {
                let value = Bytes::copy_from_slice(&request[at + 1..]);
                self.values.insert(request[..at].to_vec(), value);
                Bytes::from_static(b"stored")
            }
            None => self.values.get(request).cloned().unwrap_or_default(),
        }
    }
}

impl ShardApp for Store {
    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, _conn: ConnId) {
        if !std::mem::replace(&mut self.ticking, true) {
            cx.set_timer(cx.now() + TICK, 0);
        }
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        while let Some(stream) = cx.accept_stream(conn, dir) {
            self.handle_readable(cx, conn, stream);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        let request = self.partial.entry((conn, stream)).or_default();
        let outcome =
            cx.read(conn, stream, REQUEST_BYTES_MAX, |chunk| request.extend_from_slice(&chunk));
        if request.len() > REQUEST_BYTES_MAX {
            cx.stop(conn, stream, VarInt::from_u32(1));
            cx.reset(conn, stream, VarInt::from_u32(1));
            self.partial.remove(&(conn, stream));
            return;
        }
        match outcome {
            ReadOutcome::Blocked => return, // called again with the rest
            ReadOutcome::Finished => {
                let request = std::mem::take(request);
                let answer = self.answer(&request);
                // Answers are far smaller than the send buffer; a service with large ones keeps
                // what was not taken and goes on in `handle_writable`.
                cx.write(conn, stream, &mut [answer]);
                cx.finish(conn, stream);
            }
            ReadOutcome::MayHaveMore => return self.handle_readable(cx, conn, stream),
            ReadOutcome::Reset(_) | ReadOutcome::Unknown => {
                cx.reset(conn, stream, VarInt::from_u32(0));
            }
        }
        self.partial.remove(&(conn, stream));
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, conn: ConnId, _why: &ConnectionError) {
        self.partial.retain(|(owner, _), _| *owner != conn);
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, token: u64) {
        // Called at the time asked for; here one would expire values.
        cx.set_timer(cx.now() + TICK, token);
    }

    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        if let Ok(reply) = message.downcast::<std::sync::mpsc::Sender<(usize, u64)>>()
            && reply.send((cx.shard(), self.requests)).is_err()
        {
            println!("shard {}: whoever asked has gone", cx.shard());
        }
    }
}

pub(crate) fn main() -> Result<(), BoxError> {
    let (server_tls, client_tls) = tls()?;
    let server =
        Engine::builder().config(config()).server(server_tls).app(|_| Store::default()).start()?;
    let client = Engine::builder().config(config()).client(client_tls).start()?;
    block_on(async {
        let conn = client.connect(server.local_addr(), NAME).await?;
        for (request, expected) in [("colour", ""), ("colour=blue", "stored"), ("colour", "blue")] {
            let (mut send, mut recv) = conn.open_bi().await?;
            send.write_all(request.as_bytes()).await?;
            send.finish()?;
            let answer = recv.read_to_end(REQUEST_BYTES_MAX).await?;
            println!("{request} -> {}", String::from_utf8_lossy(&answer));
            if answer != expected.as_bytes() {
                return Err(format!("expected {expected}").into());
            }
        }
        Ok::<_, BoxError>(())
    })?;
    let (ask, answers) = std::sync::mpsc::channel::<(usize, u64)>();
    server.send_to_app(0, Box::new(ask)).map_err(|_full| "the shard's mailbox is full")?;
    let (shard, requests) = answers.recv()?;
    println!("shard {shard} answered {requests} requests");
    Ok(())
}
