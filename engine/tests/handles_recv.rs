//! What a receiving handle tells of a stream's end without reading, after it was stopped, and where a
//! buffer is to be filled; and that a client whom an application on the shard forgets is refused.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use pair::{NAME, Pair, Watchdog, config, counters, wait_for};
use pollster::block_on;
use stoq::VarInt;
use stoq::app::{Incoming, ShardApp, ShardCx};
use stoq::config::TransportConfig;
use stoq::engine::Engine;
use stoq::error::{ConnectionError, ReadError, ReadExactError, ReadToEndError, ResetError};

fn code(value: u32) -> VarInt {
    VarInt::from_u32(value)
}

#[test]
fn a_reset_is_told_without_reading() {
    let _watchdog = Watchdog::new("received_reset");
    let server = TransportConfig { stream_receive_queue_bytes: 1000, ..config() };
    let pair = Pair::with(server, config());
    block_on(async {
        let (client, server) = pair.connect().await;
        // The second fills the reader's queue, so that its shard has stopped reading.
        for bytes in [1, 100_000] {
            let mut send = client.open_uni().await.unwrap();
            send.write_all(&vec![7; bytes]).await.unwrap();
            let mut recv = server.accept_uni().await.unwrap();
            let reset = async {
                pair_sleep(Duration::from_millis(20)).await;
                send.reset(code(9)).unwrap();
            };
            let (told, ()) = join(recv.received_reset(), reset).await;
            assert_eq!(told, Ok(Some(code(9))), "{bytes} bytes");
            assert_eq!(recv.received_reset().await, Ok(Some(code(9))), "again");
        }
    });
    pair.wait_idle();
}

#[test]
fn no_reset_can_come_after_the_end_or_a_stop() {
    let _watchdog = Watchdog::new("no reset");
    let pair = Pair::new();
    block_on(async {
        let (client, server) = pair.connect().await;
        let mut finished = client.open_uni().await.unwrap();
        finished.write_all(b"all").await.unwrap();
        finished.finish().unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        assert_eq!(recv.received_reset().await, Ok(None));
        assert_eq!(recv.read_to_end(10).await.unwrap(), b"all", "nothing was taken");
        assert_eq!(recv.read_chunk(1).await, Ok(None));

        let mut open = client.open_uni().await.unwrap();
        open.write_all(b"some").await.unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        recv.stop(code(3)).unwrap();
        assert_eq!(recv.received_reset().await, Ok(None));
        assert_eq!(recv.read_chunk(1).await, Err(ReadError::ClosedStream));
        assert_eq!(recv.read(&mut [0; 4]).await, Err(ReadError::ClosedStream));
        let error = recv.read_to_end(10).await;
        assert_eq!(error, Err(ReadToEndError::Read(ReadError::ClosedStream)));
        assert_eq!(recv.stop(code(3)), Err(ReadError::ClosedStream));

        let mut lost = client.open_uni().await.unwrap();
        lost.write_all(b"x").await.unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        let close = async { client.close(code(5), b"bye") };
        let (told, ()) = join(recv.received_reset(), close).await;
        let Err(ResetError::ConnectionLost(reason)) = told else { panic!("{told:?}") };
        assert!(matches!(reason, ConnectionError::ClosedByPeer { .. }), "{reason:?}");
        assert_eq!(recv.received_reset().await, Err(ResetError::ConnectionLost(reason)));
    });
    pair.wait_idle();
}

/// Forgets clients: the first at once, the second with a message.
#[derive(Default)]
struct Forgetful {
    kept: Option<Incoming>,
    seen: usize,
}

impl ShardApp for Forgetful {
    fn handle_incoming(&mut self, _cx: &mut ShardCx<'_>, incoming: Incoming) {
        self.seen += 1;
        self.kept = (self.seen == 2).then_some(incoming);
    }

    fn handle_message(&mut self, _cx: &mut ShardCx<'_>, _message: Box<dyn std::any::Any + Send>) {
        self.kept = None;
    }
}

#[test]
fn buffers_are_filled_and_chunks_written_whole() {
    let _watchdog = Watchdog::new("exact");
    // Room for one chunk at a time, so that both calls have to wait in between.
    let config = TransportConfig { stream_send_queue_bytes: 1000, ..config() };
    let pair = Pair::with(config.clone(), config);
    block_on(async {
        let connecting = pair.client.connect(pair.server.local_addr(), NAME);
        // Awaited, a client is accepted.
        let (client, server) =
            join(connecting, async { pair.server.accept().await.unwrap().await }).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        let write = async {
            let mut send = client.open_uni().await.unwrap();
            let mut chunks: Vec<Bytes> = (0..10).map(|n| Bytes::from(vec![n; 700])).collect();
            send.write_all_chunks(&mut chunks).await.unwrap();
            assert!(chunks.iter().all(Bytes::is_empty));
            send.finish().unwrap();
            assert_eq!(send.write_all_chunks(&mut []).await, Ok(()), "nothing to write");
        };
        let read = async {
            let mut recv = server.accept_uni().await.unwrap();
            for n in 0..7 {
                let mut buffer = [0; 1000];
                recv.read_exact(&mut buffer).await.unwrap();
                let expected = |at: usize| ((n * 1000 + at) / 700) as u8;
                assert!((0..1000).all(|at| buffer[at] == expected(at)));
            }
            assert_eq!(recv.read_exact(&mut []).await, Ok(()));
            let end = recv.read_exact(&mut [0; 10]).await;
            assert_eq!(end, Err(ReadExactError::FinishedEarly(0)));
        };
        join(write, read).await;
    });
    pair.wait_idle();
}

#[test]
fn a_client_that_an_application_forgets_is_refused() {
    let _watchdog = Watchdog::new("forgotten client");
    let app = Engine::builder().config(config()).app(|_| Forgetful::default());
    let pair = Pair::build(app, Engine::builder().config(config()));
    block_on(async {
        let error = pair.client.connect(pair.server.local_addr(), NAME).await.unwrap_err();
        assert!(matches!(error, ConnectionError::AbortedByPeer(_)), "{error:?}");
        let kept = pair.client.connect(pair.server.local_addr(), NAME);
        wait_for("the second client knocks", || counters(&pair.server).incoming == 2);
        pair.server.send_to_app(0, Box::new(())).unwrap();
        let error = kept.await.unwrap_err();
        assert!(matches!(error, ConnectionError::AbortedByPeer(_)), "{error:?}");
    });
    wait_for("both are refused", || counters(&pair.server).incoming_refused == 2);
    pair.wait_idle();
}

async fn pair_sleep(duration: Duration) {
    let (done, wait) = futures_channel::oneshot::channel();
    std::thread::spawn(move || {
        std::thread::sleep(duration);
        let _nobody_waits = done.send(());
    });
    wait.await.unwrap();
}
