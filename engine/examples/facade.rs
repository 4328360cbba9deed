//! [`StoqTransport`]: the engine behind one type, its settings from TOML, its metrics as text.
//!
//! `cargo run --release -p stoq --example facade`

use bytes::Bytes;
use futures_util::future::join;
use pollster::block_on;
use stoq::certs::ClientTls;
use stoq::config::TransportConfig;
use stoq::pool::PeerEndpoint;
use stoq::transport::{Sent, StoqTransport};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A program would read this from a file. Unknown keys and values out of range are refused by name.
const SERVER: &str = "
bind = '[::1]:0'
max_concurrent_streams = 200
message_size_max = 1048576
metrics_address = '[::1]:0'

[tls]
alpn = ['facade-example']
self_signed = ['server.test']
";

const CLIENT: &str = "
bind = '[::1]:0'
connection_pool_size = 10

[pool]
idle_timeout_ms = 5000
";

pub(crate) fn main() -> Result<(), BoxError> {
    let server = StoqTransport::new(TransportConfig::from_toml(SERVER)?)?;
    // With `[tls] roots = 'roots.pem'` the client's trust would come from its TOML as well.
    let roots = server.identity().ok_or("the server has an identity")?.roots().to_vec();
    let tls = ClientTls::builder().alpn(["facade-example"]).roots(roots).build()?;
    let config = TransportConfig::from_toml(CLIENT)?;
    let client = StoqTransport::with_tls(config, None, Some(tls.crypto()))?;
    let peer = PeerEndpoint::new(server.engine().local_addr(), "server.test");
    block_on(async {
        let (here, there) = join(client.connect(&peer), server.accept()).await;
        let (here, there) = (here?, there.ok_or("the server ended")?);
        let question = Bytes::from_static(b"what do you carry?");
        let Sent::Stream(receipt) = client.send(&here, &question).await? else {
            return Err("datagrams were not chosen".into());
        };
        println!("the server received: {:?}", server.receive(&there).await?);
        receipt.acknowledged().await?;
        server.send(&there, &Bytes::from(vec![b'x'; 500_000])).await?;
        println!("the client received {} bytes", client.receive(&here).await?.len());
        // A message above the server's limit is refused; the connection goes on.
        client.send(&here, &Bytes::from(vec![0; 2 << 20])).await?;
        println!("too much: {}", server.receive(&there).await.expect_err("above the limit"));
        Ok::<_, BoxError>(())
    })?;
    let stats = client.stats();
    println!(
        "sent {} bytes, received {}; round trips: {} samples, median {:?}, p99 {:?}",
        stats.bytes_sent,
        stats.bytes_received,
        stats.latency.samples,
        stats.latency.p50,
        stats.latency.p99
    );
    println!("copies per byte: {:.2}", stats.copies.per_byte);
    let address = server.engine().metrics_addr().ok_or("metrics were asked for")?;
    println!("metrics of the server: http://{address}/metrics, the first lines:");
    for line in server.prometheus().lines().take(3) {
        println!("  {line}");
    }
    let report = block_on(client.shutdown());
    println!("client ended: {report:?}");
    block_on(server.shutdown());
    Ok(())
}
