//! Unreliable datagrams (RFC 9221): what arrives is counted, what is lost stays lost.
//!
//! `cargo run --release -p stoq --example datagrams`

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{BoxError, NAME, config, tls};
use pollster::block_on;
use stoq::VarInt;
use stoq::engine::Engine;

const DATAGRAMS: u32 = 10_000;
const DATAGRAM_BYTES: usize = 1000;

pub(crate) fn main() -> Result<(), BoxError> {
    let (server_tls, client_tls) = tls()?;
    let server = Engine::builder().config(config()).server(server_tls).start()?;
    let client = Engine::builder().config(config()).client(client_tls).start()?;
    let address = server.local_addr();
    let receiver = std::thread::spawn(move || {
        block_on(async {
            let conn = server.accept().await.ok_or("the engine ended")?.accept().await?;
            let mut received = 0_u32;
            // Until the client closes the connection.
            while let Ok(datagram) = conn.read_datagram().await {
                received += u32::from(datagram.len() == DATAGRAM_BYTES);
            }
            Ok::<_, BoxError>((received, conn.datagrams_dropped()))
        })
    });
    block_on(async {
        let conn = client.connect(address, NAME).await?;
        let largest = conn.max_datagram_size().ok_or("the peer takes no datagrams")?;
        println!("datagrams of up to {largest} bytes fit the path now");
        for _ in 0..DATAGRAMS {
            // Waits while the queue is full; `send_datagram` would say so instead.
            conn.send_datagram_wait(Bytes::from_static(&[7; DATAGRAM_BYTES])).await?;
        }
        // The last ones are on their way.
        std::thread::sleep(Duration::from_millis(200));
        conn.close(VarInt::from_u32(0), b"done");
        Ok::<_, BoxError>(())
    })?;
    let (received, unread) = receiver.join().map_err(|_panic| "the receiver panicked")??;
    println!("{received} of {DATAGRAMS} arrived; {unread} came faster than they were read");
    if received == 0 {
        return Err("nothing arrived".into());
    }
    Ok(())
}
