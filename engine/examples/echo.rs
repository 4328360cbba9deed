//! The same echo server twice: with async handles, and as code on the shard. Prints the
//! round-trip time of small messages against each, so that the cost of the hop between threads
//! can be seen.
//!
//! `cargo run --release -p stoq --example echo`

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{BoxError, NAME, config, tls};
use pollster::block_on;
use stoq::app::{ConnId, ReadOutcome, ShardApp, ShardCx, WriteOutcome};
use stoq::engine::Engine;
use stoq::{Dir, StreamId, VarInt};

const MESSAGES: usize = 200;

// --- with handles ---------------------------------------------------------------------------

/// Echoes every stream of every client. One thread per connection keeps the example free of an
/// executor; any executor will do.
fn serve_with_handles(server: &Engine) {
    while let Some(incoming) = block_on(server.accept()) {
        std::thread::spawn(move || {
            block_on(async {
                let conn = incoming.accept().await?;
                loop {
                    let (mut send, mut recv) = conn.accept_bi().await?;
                    while let Some(chunk) = recv.read_chunk(usize::MAX).await? {
                        send.write_chunk(chunk).await?;
                    }
                    send.finish()?;
                }
                // The client closes the connection, which ends the loop with an error.
                #[allow(unreachable_code)]
                Ok::<(), BoxError>(())
            })
        });
    }
}

// --- on the shard ---------------------------------------------------------------------------

/// The same, called from inside the shard's turn: no queue and no wake-up in between.
struct EchoApp;

impl ShardApp for EchoApp {
    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
        while let Some(stream) = cx.accept_stream(conn, dir) {
            self.handle_readable(cx, conn, stream);
        }
    }

    fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
        let mut chunks = Vec::new();
        let outcome = cx.read(conn, stream, usize::MAX, |chunk| chunks.push(chunk));
        match cx.write(conn, stream, &mut chunks) {
            WriteOutcome::Written(_) if chunks.iter().all(|chunk| chunk.is_empty()) => {}
            // An echo of more than the path can take: a real server keeps the rest and goes on
            // in `handle_writable`; this one serves small messages only.
            _ => return cx.close(conn, VarInt::from_u32(1), "too much at once".into()),
        }
        if outcome == ReadOutcome::Finished {
            cx.finish(conn, stream);
        }
    }
}

/// Median and 99th percentile of a small echo.
fn measure(client: &Engine, server: &Engine) -> Result<(Duration, Duration), BoxError> {
    block_on(async {
        let conn = client.connect(server.local_addr(), NAME).await?;
        let (mut send, mut recv) = conn.open_bi().await?;
        let mut times = Vec::with_capacity(MESSAGES);
        for _ in 0..MESSAGES {
            let start = Instant::now();
            send.write_all(b"sixteen bytes...").await?;
            let mut received = 0;
            while received < 16 {
                let chunk = recv.read_chunk(16 - received).await?;
                received += chunk.ok_or("the server ended the stream")?.len();
            }
            times.push(start.elapsed());
        }
        send.finish()?;
        send.stopped().await?;
        conn.close(VarInt::from_u32(0), b"done");
        times.sort_unstable();
        Ok((times[MESSAGES / 2], times[MESSAGES * 99 / 100]))
    })
}

pub(crate) fn main() -> Result<(), BoxError> {
    let (server_tls, client_tls) = tls()?;
    let client = Engine::builder().config(config()).client(client_tls).start()?;

    let handles = Arc::new(Engine::builder().config(config()).server(server_tls.clone()).start()?);
    let serving = handles.clone();
    std::thread::spawn(move || serve_with_handles(&serving));
    let (p50, p99) = measure(&client, &handles)?;
    println!("handles on both sides: p50 {p50:?}, p99 {p99:?}");

    let shard = Engine::builder().config(config()).server(server_tls).app(|_| EchoApp).start()?;
    let (p50, p99) = measure(&client, &shard)?;
    println!("server on the shard:   p50 {p50:?}, p99 {p99:?}");

    shard.shutdown_blocking(Duration::from_secs(1), VarInt::from_u32(0), b"");
    client.shutdown_blocking(Duration::from_secs(1), VarInt::from_u32(0), b"");
    Ok(())
}
