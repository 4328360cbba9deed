//! The `tokio` feature at run time: stream handles as tokio's AsyncRead and AsyncWrite.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::io::ErrorKind;
use std::time::Duration;

use pair::{Pair, Watchdog};
use stoq::VarInt;
use stoq::connection::Connection;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional, join};

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

/// Answers every bidirectional stream with its own bytes until the connection ends.
async fn echo(server: Connection) {
    while let Ok((mut send, mut recv)) = server.accept_bi().await {
        tokio::spawn(async move {
            // The client may have gone in the middle: that is its affair.
            if tokio::io::copy(&mut recv, &mut send).await.is_ok() {
                let _client_gone = send.shutdown().await;
            }
        });
    }
}

#[test]
fn a_proxy_copies_both_ways_between_tcp_and_a_stream() {
    let _watchdog = Watchdog::new("copy_bidirectional");
    let pair = Pair::new();
    let data: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    run(async {
        let (client, server) = pair.connect().await;
        let echoing = tokio::spawn(echo(server));
        let listener = tokio::net::TcpListener::bind("[::1]:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let proxy = async {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let (send, recv) = client.open_bi().await.unwrap();
            copy_bidirectional(&mut tcp, &mut join(recv, send)).await.unwrap()
        };
        let user = async {
            let tcp = tokio::net::TcpStream::connect(addr).await.unwrap();
            let (mut read, mut write) = tcp.into_split();
            let sent = data.clone();
            let writer = tokio::spawn(async move {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut back = Vec::new();
            read.read_to_end(&mut back).await.unwrap();
            writer.await.unwrap();
            back
        };
        let (copied, back) = futures_util::future::join(proxy, user).await;
        assert_eq!(copied, (data.len() as u64, data.len() as u64));
        assert!(back == data, "{} of {} bytes", back.len(), data.len());
        client.close(VarInt::from_u32(0), b"");
        echoing.await.unwrap();
    });
    pair.wait_idle();
}

#[test]
fn ends_and_errors_are_what_tokio_expects() {
    let _watchdog = Watchdog::new("tokio errors");
    let pair = Pair::new();
    run(async {
        let (client, server) = pair.connect().await;
        let mut send = client.open_uni().await.unwrap();
        AsyncWriteExt::write_all(&mut send, b"whole").await.unwrap();
        send.flush().await.unwrap();
        send.shutdown().await.unwrap();
        send.shutdown().await.unwrap();
        let error = AsyncWriteExt::write_all(&mut send, b"more").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        let mut recv = server.accept_uni().await.unwrap();
        let mut text = String::new();
        assert_eq!(recv.read_to_string(&mut text).await.unwrap(), 5);
        let at_end = AsyncReadExt::read(&mut recv, &mut [0; 4]).await.unwrap();
        assert_eq!(at_end, 0, "the end stays the end");

        let mut reset = client.open_uni().await.unwrap();
        reset.write_all(b"x").await.unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        assert_eq!(recv.read_u8().await.unwrap(), b'x');
        reset.reset(VarInt::from_u32(9)).unwrap();
        let error = recv.read_u8().await.unwrap_err();
        assert!(error.to_string().contains("code 9"), "{error}");

        // A read that is given up has taken nothing.
        let mut late = client.open_uni().await.unwrap();
        late.write_all(b"1").await.unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        assert_eq!(recv.read_u8().await.unwrap(), b'1');
        let waited = tokio::time::timeout(Duration::from_millis(20), recv.read_u8()).await;
        assert!(waited.is_err(), "nothing was sent");
        late.write_all(b"2").await.unwrap();
        assert_eq!(recv.read_u8().await.unwrap(), b'2');
    });
    pair.wait_idle();
}
