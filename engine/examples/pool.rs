//! The connection pool: a handshake that callers share, connections that come back, a peer that
//! goes away and returns.
//!
//! `cargo run --release -p stoq --example pool`

mod common;

use std::time::{Duration, Instant};

use common::{BoxError, NAME, config, tls};
use futures_util::future::join_all;
use pollster::block_on;
use stoq::VarInt;
use stoq::config::{PoolConfig, TransportConfig};
use stoq::engine::Engine;
use stoq::pool::{PeerEndpoint, PoolEventKind, Replay};

const CALLERS: usize = 32;

pub(crate) fn main() -> Result<(), BoxError> {
    let (server_tls, client_tls) = tls()?;
    let server = Engine::builder().config(config()).server(server_tls).start()?;
    let pool = PoolConfig { reconnect_base_ms: 20, ..PoolConfig::default() };
    let client_config = TransportConfig { pool, ..config() };
    let client = Engine::builder().config(client_config).client(client_tls).start()?;
    let peer = PeerEndpoint::new(server.local_addr(), NAME);
    let acceptor = std::thread::spawn(move || {
        block_on(async {
            // The first client is sent away, to show what its pool does then.
            let first = server.accept().await.ok_or("the engine ended")?.accept().await?;
            first.accept_uni().await?.read_to_end(100).await?;
            first.close(VarInt::from_u32(1), b"restarting");
            let second = server.accept().await.ok_or("the engine ended")?.accept().await?;
            second.closed().await;
            Ok::<_, BoxError>(())
        })
    });
    block_on(async {
        let start = Instant::now();
        let callers = join_all((0..CALLERS).map(|_| client.checkout(&peer, Replay::Unsafe))).await;
        let callers = callers.into_iter().collect::<Result<Vec<_>, _>>()?;
        println!("{CALLERS} callers have a connection after {:?}", start.elapsed());
        let mut stream = callers[0].open_uni().await?;
        stream.write_all(b"that is all").await?;
        stream.finish()?;
        // The peer closes; callers that hold the connection see it, and the pool connects anew.
        println!("closed: {}", callers[0].closed().await);
        drop(callers);
        while let Some(event) = client.pool_event().await {
            println!("pool: {:?}", event.kind);
            let back = client.transport_stats().pool.handshakes == 2;
            if back && matches!(event.kind, PoolEventKind::Connected { .. }) {
                break;
            }
        }
        let start = Instant::now();
        let again = client.checkout(&peer, Replay::Unsafe).await?;
        println!("from the pool after {:?}", start.elapsed());
        drop(again);
        Ok::<_, BoxError>(())
    })?;
    let stats = client.transport_stats().pool;
    println!("handshakes: {}, saved by sharing: {}", stats.handshakes, stats.handshakes_saved);
    client.shutdown_blocking(Duration::from_secs(1), VarInt::from_u32(0), b"done");
    acceptor.join().map_err(|_panic| "the acceptor panicked")??;
    Ok(())
}
