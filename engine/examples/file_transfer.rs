//! Sends a file over a stream and checks at the far end that it came whole.
//!
//! `cargo run --release -p stoq --example file_transfer [FILE]`: without a file, 32 MiB of data
//! made up.

mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{BoxError, NAME, config, tls};
use futures_util::future::try_join;
use pollster::block_on;
use stoq::VarInt;
use stoq::engine::Engine;

/// Chunks of 16 KiB and more are cheapest.
const CHUNK_BYTES: usize = 256 * 1024;

async fn send(client: &Engine, server: &Engine, data: Bytes) -> Result<(), BoxError> {
    let conn = client.connect(server.local_addr(), NAME).await?;
    let mut stream = conn.open_uni().await?;
    for chunk in data.chunks(CHUNK_BYTES) {
        // By reference: `slice_ref` shares the memory, and so does the engine.
        stream.write_chunk(data.slice_ref(chunk)).await?;
    }
    stream.finish()?;
    // Not before the peer has acknowledged everything may the connection be closed.
    match stream.stopped().await? {
        None => conn.close(VarInt::from_u32(0), b"sent"),
        Some(code) => return Err(format!("the receiver gave up with code {code}").into()),
    }
    Ok(())
}

async fn receive(server: &Engine) -> Result<Vec<u8>, BoxError> {
    let conn = server.accept().await.ok_or("the engine ended")?.accept().await?;
    let mut stream = conn.accept_uni().await?;
    let mut data = Vec::new();
    while let Some(chunk) = stream.read_chunk(usize::MAX).await? {
        data.extend_from_slice(&chunk);
    }
    Ok(data)
}

pub(crate) fn main() -> Result<(), BoxError> {
    let file = std::env::args().nth(1).filter(|name| std::path::Path::new(name).is_file());
    let data: Bytes = match file {
        Some(name) => std::fs::read(name)?.into(),
        None => (0..32_u32 << 20).map(|i| (i ^ (i >> 9)) as u8).collect::<Vec<_>>().into(),
    };
    let (server_tls, client_tls) = tls()?;
    let server = Engine::builder().config(config()).server(server_tls).start()?;
    let client = Engine::builder().config(config()).client(client_tls).start()?;
    let start = Instant::now();
    let ((), received) =
        block_on(try_join(send(&client, &server, data.clone()), receive(&server)))?;
    let seconds = start.elapsed().as_secs_f64();
    if received != data {
        return Err("the file came damaged".into());
    }
    let gbit = data.len() as f64 * 8.0 / seconds / 1e9;
    println!("{} bytes in {seconds:.3} s, {gbit:.2} Gbit/s, whole", data.len());
    let report = client.shutdown_blocking(Duration::from_secs(1), VarInt::from_u32(0), b"");
    println!("{report:?}");
    Ok(())
}
