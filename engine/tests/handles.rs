//! Misuse of the async handles over loopback sockets: whatever is dropped, cancelled or never
//! read, nothing hangs (a watchdog per test) and nothing is left behind (the shards' counters).
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{join, join_all};
use pair::{NAME, PATIENCE, Pair, Watchdog, config, counters, wait_for};
use pollster::block_on;
use stoq::VarInt;
use stoq::app::{ConnId, ShardApp, ShardCx};
use stoq::config::TransportConfig;
use stoq::engine::Engine;
use stoq::error::{ConnectError, ConnectionError, ReadError, WriteError};

/// Polls a future once, then drops it: the cancelled future.
fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

fn code(value: u32) -> VarInt {
    VarInt::from_u32(value)
}

#[test]
fn an_attempt_dropped_at_once_or_later_is_abandoned() {
    let _watchdog = Watchdog::new("attempt dropped");
    let pair = Pair::new();
    // Dropped before the shard saw it, and after its first packets left: nobody accepts.
    drop(pair.client.connect(pair.server.local_addr(), NAME));
    let connecting = pair.client.connect(pair.server.local_addr(), NAME);
    wait_for("the handshake begins", || counters(&pair.server).incoming >= 1);
    let begun = Instant::now();
    drop(connecting);
    wait_for("the attempts end", || {
        let counters = counters(&pair.client);
        counters.connections == 0 && counters.attempts_abandoned == 2
    });
    assert!(begun.elapsed() < Duration::from_secs(5), "abandoned, not timed out");
    // What it offered meanwhile is refused, decided on or not.
    while let Some(Some(incoming)) = poll_once(pair.server.accept()) {
        drop(incoming);
    }
    pair.wait_idle();
}

#[test]
fn every_decision_about_a_client_and_none() {
    let _watchdog = Watchdog::new("decisions");
    let pair = Pair::new();
    block_on(async {
        for decision in 0..4 {
            let connecting = pair.client.connect(pair.server.local_addr(), NAME);
            let incoming = pair.server.accept().await.unwrap();
            match decision {
                0 => drop(incoming),
                1 => incoming.refuse(),
                // Accepted, but the result is dropped at once.
                2 => drop(incoming.accept()),
                _ => {
                    assert!(!incoming.remote_address_validated());
                    incoming.retry();
                    let again = pair.server.accept().await.unwrap();
                    assert!(again.remote_address_validated());
                    // A second retry would loop: it refuses.
                    again.retry();
                }
            }
            let error = connecting.await.map(|conn| {
                // The server's end was abandoned while the client's was already complete.
                assert_eq!(decision, 2);
                block_on(conn.closed())
            });
            let error = error.unwrap_or_else(|error| error);
            assert!(
                matches!(
                    error,
                    ConnectionError::AbortedByPeer(_) | ConnectionError::ClosedByPeer { .. }
                ),
                "{decision}: {error:?}"
            );
        }
    });
    pair.wait_idle();
}

#[test]
fn attempts_that_cannot_start_say_why() {
    let _watchdog = Watchdog::new("cannot start");
    let pair = Pair::new();
    let invalid = "[ff02::1]:443".parse().unwrap();
    let error = block_on(pair.client.connect(invalid, NAME)).unwrap_err();
    let expected = ConnectError::InvalidRemoteAddress(invalid);
    assert_eq!(error, ConnectionError::NotStarted(expected));
    let error = block_on(pair.client.connect(pair.server.local_addr(), "not a name")).unwrap_err();
    assert!(matches!(error, ConnectionError::NotStarted(ConnectError::InvalidServerName(_))));
    let error = block_on(pair.server.connect(pair.client.local_addr(), NAME)).unwrap_err();
    assert_eq!(error, ConnectionError::NotStarted(ConnectError::NoClientConfig));
    pair.wait_idle();
}

#[test]
fn cancelled_opens_leave_no_stream() {
    let _watchdog = Watchdog::new("cancelled opens");
    let server = TransportConfig { max_concurrent_streams: 4, ..config() };
    let pair = Pair::with(server, config());
    block_on(async {
        let (client, _server) = pair.connect().await;
        // Far more than the peer allows: each must give its place back, whether it is cancelled
        // before the shard answers or after.
        for round in 0..60 {
            let mut bi = pin!(client.open_bi());
            let mut uni = pin!(client.open_uni());
            let mut cx = Context::from_waker(Waker::noop());
            let _answered_already = bi.as_mut().poll(&mut cx);
            let _answered_already = uni.as_mut().poll(&mut cx);
            std::thread::sleep(Duration::from_millis(round % 3));
        }
        wait_for("cancelled streams are gone", || counters(&pair.client).streams == 0);
        // The limit of four is whole again.
        let streams = join_all((0..4).map(|_| client.open_bi())).await;
        assert!(streams.iter().all(Result::is_ok));
        assert!(poll_once(client.open_bi()).is_none(), "the fifth waits");
        drop(streams);
    });
    pair.wait_idle();
}

#[test]
fn short_streams_are_forgotten_by_both_sides() {
    let _watchdog = Watchdog::new("short streams");
    let pair = Pair::new();
    block_on(async {
        let (client, server) = pair.connect().await;
        for round in 0..300 {
            let mut send = client.open_uni().await.unwrap();
            send.write_all(b"whole in one packet").await.unwrap();
            send.finish().unwrap();
            let mut recv = server.accept_uni().await.unwrap();
            if round % 3 == 0 {
                assert_eq!(recv.read_to_end(100).await.unwrap(), b"whole in one packet");
            }
            drop(recv); // read or not
            send.stopped().await.unwrap();
        }
        wait_for("no stream is left", || {
            counters(&pair.client).streams == 0 && counters(&pair.server).streams == 0
        });
        drop((client, server));
    });
    pair.wait_idle();
}

#[test]
fn a_stopped_stream_is_reset_and_frees_its_place() {
    let _watchdog = Watchdog::new("stopped");
    let server = TransportConfig { max_concurrent_streams: 2, ..config() };
    let pair = Pair::with(server, config());
    block_on(async {
        let (client, server) = pair.connect().await;
        // More than the limit: a place that is not given back would stall the third.
        for round in 0..10 {
            let (mut send, recv) = client.open_bi().await.unwrap();
            send.write_all(b"x").await.unwrap();
            let (peer_send, mut peer_recv) = server.accept_bi().await.unwrap();
            peer_recv.stop(code(7)).unwrap();
            drop((peer_send, peer_recv));
            assert_eq!(send.stopped().await.unwrap(), Some(code(7)));
            let error = send.write(b"more").await.unwrap_err();
            assert_eq!(error, WriteError::Stopped(code(7)));
            match round % 3 {
                0 => drop(send),
                1 => assert!(send.finish().is_err()),
                _ => {
                    let _refused_or_late = send.reset(code(1));
                }
            }
            drop(recv);
        }
        wait_for("no stream is left", || {
            counters(&pair.client).streams == 0 && counters(&pair.server).streams == 0
        });
    });
    pair.wait_idle();
}

#[test]
fn a_reset_stream_ends_every_wait_on_it() {
    let _watchdog = Watchdog::new("reset");
    let pair = Pair::new();
    block_on(async {
        let (client, server) = pair.connect().await;
        let mut send = client.open_uni().await.unwrap();
        send.write_all(b"x").await.unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        assert_eq!(recv.read_chunk(1).await.unwrap().unwrap(), "x");
        send.reset(code(9)).unwrap();
        assert!(send.reset(code(9)).is_err() && send.finish().is_err());
        assert_eq!(send.write(b"y").await, Err(WriteError::ClosedStream));
        assert_eq!(send.stopped().await, Ok(None), "nothing to wait for");
        assert_eq!(recv.read_chunk(1).await, Err(ReadError::Reset(code(9))));
    });
    pair.wait_idle();
}

#[test]
fn what_was_acknowledged_is_readable_after_the_peer_has_gone() {
    let _watchdog = Watchdog::new("readable after close");
    let pair = Pair::new();
    let sent = Bytes::from((0..3_000_000_u32).map(|i| i as u8).collect::<Vec<_>>());
    block_on(async {
        let (client, server) = pair.connect().await;
        let mut send = client.open_uni().await.unwrap();
        let write = async {
            send.write_chunk(sent.clone()).await.unwrap();
            send.finish().unwrap();
            assert_eq!(send.stopped().await, Ok(None), "all acknowledged");
        };
        // The reader takes nothing: 3 MB fit the peer's window, not the handle's queue.
        let (mut recv, ()) = join(async { server.accept_uni().await.unwrap() }, write).await;
        client.close(code(3), b"done");
        let closed = server.closed().await;
        assert!(matches!(closed, ConnectionError::ClosedByPeer { .. }), "{closed:?}");
        let received = recv.read_to_end(sent.len()).await.expect("acknowledged data is never lost");
        assert!(received == sent, "{} bytes of {}", received.len(), sent.len());
    });
    pair.wait_idle();
}

#[test]
fn two_waiters_both_get_their_stream() {
    let _watchdog = Watchdog::new("two waiters");
    let pair = Pair::new();
    let (client, server) = block_on(pair.connect());
    // Both wait before either stream comes; neither runs until both came.
    let (mut first, mut second) = (Box::pin(server.accept_uni()), Box::pin(server.accept_uni()));
    let woken = [Arc::new(Counter::default()), Arc::new(Counter::default())];
    let wakers = woken.clone().map(Waker::from);
    assert!(first.as_mut().poll(&mut Context::from_waker(&wakers[0])).is_pending());
    assert!(second.as_mut().poll(&mut Context::from_waker(&wakers[1])).is_pending());
    let streams = block_on(async {
        let mut streams = Vec::new();
        for _ in 0..2 {
            let mut send = client.open_uni().await.unwrap();
            send.write_all(b"x").await.unwrap();
            streams.push(send);
        }
        streams
    });
    wait_for("both waiters are woken", || {
        woken.iter().all(|counter| counter.0.load(Ordering::Acquire) > 0)
    });
    block_on(join(first, second)).0.unwrap();
    drop((streams, client, server));
    pair.wait_idle();
}

#[derive(Default)]
struct Counter(AtomicUsize);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

#[test]
fn a_reader_that_never_reads_stops_the_writer_and_nobody_else() {
    let _watchdog = Watchdog::new("stalled reader");
    let pair = Pair::new();
    block_on(async {
        let (client, server) = pair.connect().await;
        // Eight stalled streams: more than the connection's handle queue holds.
        let mut stalled = Vec::new();
        for _ in 0..8 {
            let mut send = client.open_uni().await.unwrap();
            send.write_chunk(Bytes::from(vec![1; 512 << 10])).await.unwrap();
            stalled.push((send, server.accept_uni().await.unwrap()));
        }
        // A ninth goes through, forth and back.
        let (mut send, mut recv) = client.open_bi().await.unwrap();
        let data = Bytes::from(vec![2; 4 << 20]);
        let copy = data.clone();
        let echo = async {
            let (mut send, mut recv) = server.accept_bi().await.unwrap();
            while let Some(chunk) = recv.read_chunk(usize::MAX).await.unwrap() {
                send.write_chunk(chunk).await.unwrap();
            }
            send.finish().unwrap();
            send.stopped().await.unwrap();
        };
        let write = async {
            send.write_chunk(copy).await.unwrap();
            send.finish().unwrap();
        };
        let (received, ((), ())) = join(recv.read_to_end(8 << 20), join(echo, write)).await;
        assert!(received.unwrap() == data);
        // The writer of an unread stream is stopped in the end.
        let (writer, mut reader) = stalled.pop().unwrap();
        let mut writer = writer;
        let start = Instant::now();
        let mut written = 0;
        while let Some(result) = poll_once(writer.write(&[3; 64 << 10])) {
            written += result.unwrap();
            assert!(written < 1 << 30 && start.elapsed() < PATIENCE, "back-pressure is real");
            std::thread::sleep(Duration::from_millis(1));
        }
        // And goes on when the reader does.
        writer.finish().unwrap();
        assert_eq!(reader.read_to_end(usize::MAX).await.unwrap().len(), (512 << 10) + written);
    });
    pair.wait_idle();
}

#[test]
fn tiny_queues_do_not_stall() {
    let _watchdog = Watchdog::new("tiny queues");
    let tiny =
        TransportConfig { stream_receive_queue_bytes: 1, stream_send_queue_bytes: 1, ..config() };
    let pair = Pair::with(tiny.clone(), tiny);
    block_on(async {
        let (client, server) = pair.connect().await;
        let mut send = client.open_uni().await.unwrap();
        let write = async {
            send.write_all(&[5; 300]).await.unwrap();
            send.finish().unwrap();
        };
        let read = async {
            let mut recv = server.accept_uni().await.unwrap();
            recv.read_to_end(1000).await.unwrap()
        };
        assert_eq!(join(write, read).await.1, [5; 300]);
    });
    pair.wait_idle();
}

#[test]
fn a_thousand_streams_at_once() {
    let _watchdog = Watchdog::new("1000 streams");
    let pair = Pair::new();
    block_on(async {
        let (client, server) = pair.connect().await;
        let requests = join_all((0..1000_u32).map(|number| {
            let client = client.clone();
            async move {
                let (mut send, mut recv) = client.open_bi().await.unwrap();
                send.write_all(&number.to_be_bytes()).await.unwrap();
                send.finish().unwrap();
                let answer = recv.read_to_end(10_000).await.unwrap();
                assert_eq!(answer, number.to_be_bytes().repeat(500));
            }
        }));
        let answers = join_all((0..1000).map(|_| async {
            let (mut send, mut recv) = server.accept_bi().await.unwrap();
            let request = recv.read_to_end(4).await.unwrap();
            send.write_chunk(request.repeat(500).into()).await.unwrap();
        }));
        join(requests, answers).await;
    });
    pair.wait_idle();
}

#[test]
fn cancelled_reads_and_writes_lose_nothing() {
    let _watchdog = Watchdog::new("cancelled reads and writes");
    let config = TransportConfig { stream_send_queue_bytes: 4096, ..config() };
    let pair = Pair::with(config.clone(), config);
    block_on(async {
        let (client, server) = pair.connect().await;
        let mut send = client.open_uni().await.unwrap();
        send.write_all(b"-").await.unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        let data: Vec<u8> = (0..200_000_u32).map(|i| (i / 7) as u8).collect();
        let (mut written, mut received) = (0, Vec::new());
        let mut cancelled = 0;
        while received.len() < data.len() + 1 {
            if written < data.len() {
                match poll_once(send.write(&data[written..])) {
                    Some(bytes) => written += bytes.unwrap(),
                    None => cancelled += 1,
                }
            }
            match poll_once(recv.read_chunk(1000)) {
                Some(chunk) => received.extend_from_slice(&chunk.unwrap().unwrap()),
                None => cancelled += 1,
            }
        }
        assert_eq!(received[1..], data);
        assert!(cancelled > 0, "the test cancels");
    });
    pair.wait_idle();
}

#[test]
fn handles_dropped_in_any_order() {
    let _watchdog = Watchdog::new("any order");
    let pair = Pair::new();
    for order in 0..6 {
        block_on(async {
            let (client, server) = pair.connect().await;
            let (mut send, recv) = client.open_bi().await.unwrap();
            send.write_all(&[0; 100_000]).await.unwrap();
            let (peer_send, peer_recv) = server.accept_bi().await.unwrap();
            match order {
                0 => drop((client, send, recv)),
                1 => drop((recv, send, client)),
                2 => drop((server, peer_recv, peer_send)),
                3 => drop((peer_send, client, peer_recv, recv)),
                // The streams keep the connection alive.
                4 => {
                    drop((client, server));
                    let (mut peer_send, mut recv) = (peer_send, recv);
                    peer_send.write_all(b"still here").await.unwrap();
                    peer_send.finish().unwrap();
                    assert_eq!(recv.read_to_end(100).await.unwrap(), b"still here");
                }
                _ => {
                    client.close(code(1), b"");
                    client.close(code(2), b"");
                    assert_eq!(client.closed().await, ConnectionError::ClosedLocally);
                    assert!(client.open_bi().await.is_err() && client.accept_uni().await.is_err());
                    let lost = WriteError::ConnectionLost(ConnectionError::ClosedLocally);
                    assert_eq!(send.write(b"x").await, Err(lost));
                }
            }
        });
        pair.wait_idle();
    }
}

#[test]
fn opens_that_wait_end_with_the_connection() {
    let _watchdog = Watchdog::new("waiting opens");
    let pair = Pair::with(TransportConfig { max_concurrent_streams: 0, ..config() }, config());
    block_on(async {
        let (client, server) = pair.connect().await;
        let waiting = join_all((0..10).map(|_| client.open_bi()));
        let close = async { server.close(code(4), b"no") };
        for result in join(waiting, close).await.0 {
            let error = result.unwrap_err();
            assert!(matches!(error, ConnectionError::ClosedByPeer { .. }), "{error:?}");
        }
    });
    pair.wait_idle();
}

#[test]
fn a_peer_that_vanishes_times_out() {
    let _watchdog = Watchdog::new("vanished peer");
    // A socket that swallows the handshake, and a server whose process is stopped by refusing to turn.
    let client =
        TransportConfig { handshake_timeout_ms: 1_500, idle_timeout_ms: 2_500, ..config() };
    let pair = Pair::with(config(), client);
    let hole = std::net::UdpSocket::bind("[::1]:0").unwrap();
    let std::net::SocketAddr::V6(nowhere) = hole.local_addr().unwrap() else { unreachable!() };
    let error = block_on(pair.client.connect(nowhere, NAME)).unwrap_err();
    assert!(matches!(error, ConnectionError::HandshakeTimedOut { .. }), "{error:?}");
    // Silence on an idle connection.
    let (client, server) = block_on(pair.connect());
    let mut send = block_on(client.open_uni()).unwrap();
    block_on(send.write_all(b"x")).unwrap();
    assert_eq!(block_on(client.closed()), ConnectionError::TimedOut);
    let lost = WriteError::ConnectionLost(ConnectionError::TimedOut);
    assert_eq!(block_on(send.write(b"y")), Err(lost));
    drop((client, server, send));
    pair.wait_idle();
}

#[test]
fn shutdown_in_the_middle_of_everything() {
    let _watchdog = Watchdog::new("shutdown in the middle");
    let pair = Pair::new();
    let server_addr = pair.server.local_addr();
    let (client, server) = block_on(pair.connect());
    let mut send = block_on(client.open_uni()).unwrap();
    let (mut bi_send, mut bi_recv) = block_on(client.open_bi()).unwrap();
    block_on(send.write_all(&[1; 900_000])).unwrap();
    block_on(bi_send.write_all(b"x")).unwrap();
    let unread = block_on(server.accept_uni()).unwrap();
    let late = pair.client.connect(server_addr, NAME);
    let waiting = std::thread::scope(|scope| {
        let reader = scope.spawn(|| block_on(bi_recv.read_chunk(1)));
        let accepter = scope.spawn(|| block_on(client.accept_bi()));
        let closed = scope.spawn(|| block_on(client.closed()));
        let Pair { server: server_engine, client: client_engine } = pair;
        let report = client_engine.shutdown_blocking(Duration::from_millis(50), code(5), b"bye");
        assert!(report.connections_cut_off >= 1, "{report:?}");
        assert_eq!(report.streams_cut_off, 2, "{report:?}");
        assert_eq!(
            reader.join().unwrap(),
            Err(ReadError::ConnectionLost(ConnectionError::EngineStopped))
        );
        assert!(accepter.join().unwrap().is_err());
        assert_eq!(closed.join().unwrap(), ConnectionError::EngineStopped);
        server_engine
    });
    assert!(block_on(late).is_err());
    assert!(block_on(client.open_bi()).is_err());
    assert!(block_on(send.write(b"x")).is_err() && send.finish().is_err());
    // The peer was told.
    let closed = block_on(server.closed());
    assert!(matches!(closed, ConnectionError::ClosedByPeer { code: c, .. } if c == code(5)));
    drop((unread, server));
    // A client that waits for its answer when the engine goes, and its handle afterwards.
    let offered = poll_once(waiting.accept()).flatten();
    drop(waiting);
    drop(offered);
}

#[test]
fn shutdown_waits_for_streams_within_the_grace() {
    let _watchdog = Watchdog::new("grace");
    let pair = Pair::new();
    let Pair { server, client } = pair;
    let pair_client = std::thread::spawn(move || {
        let connecting = client.connect(server.local_addr(), NAME);
        let (conn, peer) = block_on(async {
            let accepting = server.accept().await.unwrap().accept();
            let (conn, peer) = join(connecting, accepting).await;
            (conn.unwrap(), peer.unwrap())
        });
        let mut send = block_on(conn.open_uni()).unwrap();
        block_on(send.write_chunk(vec![7; 2_000_000].into())).unwrap();
        send.finish().unwrap();
        let reader = std::thread::spawn(move || {
            let mut recv = block_on(peer.accept_uni()).unwrap();
            std::thread::sleep(Duration::from_millis(200));
            let received = block_on(recv.read_to_end(3_000_000)).unwrap().len();
            drop((peer, recv));
            received
        });
        let report = client.shutdown_blocking(PATIENCE, code(0), b"");
        assert_eq!(reader.join().unwrap(), 2_000_000);
        assert_eq!((report.connections_at_order, report.connections_cut_off), (1, 0));
        drop((conn, send));
        server.shutdown_blocking(Duration::ZERO, code(0), b"")
    });
    assert_eq!(pair_client.join().unwrap().streams_cut_off, 0);
}

#[test]
fn an_ended_engine_refuses_everything_at_once() {
    let _watchdog = Watchdog::new("ended");
    let Pair { server, client } = Pair::new();
    let (address, handle) = (
        server.local_addr(),
        block_on(async {
            let connecting = client.connect(server.local_addr(), NAME);
            let incoming = server.accept().await.unwrap();
            (connecting, incoming)
        }),
    );
    let (connecting, incoming) = handle;
    drop(server);
    // Decided after the end: nobody is left to decide for.
    assert_eq!(block_on(incoming.accept()).unwrap_err(), ConnectionError::EngineStopped);
    let error = block_on(connecting).unwrap_err();
    assert!(
        matches!(error, ConnectionError::AbortedByPeer(_)),
        "refused, not timed out: {error:?}"
    );
    let _unanswered = address;
    let dropped = client.connect(address, NAME);
    drop(client);
    assert!(block_on(dropped).is_err());
}

/// Panics where its plan says.
struct Panicking(&'static str);

impl ShardApp for Panicking {
    fn handle_connected(&mut self, _cx: &mut ShardCx<'_>, _conn: ConnId) {
        assert!(self.0 != "connected", "planned");
    }

    fn handle_readable(&mut self, _cx: &mut ShardCx<'_>, _conn: ConnId, _id: stoq::StreamId) {
        panic!("planned");
    }

    fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: stoq::Dir) {
        while let Some(stream) = cx.accept_stream(conn, dir) {
            assert!(self.0 != "opened", "planned");
            cx.finish(conn, stream);
        }
    }

    fn handle_closed(&mut self, _cx: &mut ShardCx<'_>, _conn: ConnId, reason: &ConnectionError) {
        assert_eq!(*reason, ConnectionError::AppPanicked, "the application is told once");
        panic!("planned");
    }

    fn handle_message(&mut self, _cx: &mut ShardCx<'_>, _message: Box<dyn std::any::Any + Send>) {
        panic!("planned");
    }
}

#[test]
fn a_panicking_application_loses_its_connection_and_nothing_else() {
    let _watchdog = Watchdog::new("panic");
    let plan = Arc::new(std::sync::Mutex::new("opened"));
    let now = *plan.lock().unwrap();
    let server = Engine::builder().config(config()).app(move |_| Panicking(now));
    let pair = Pair::build(server, Engine::builder().config(config()));
    for panics in [2, 4] {
        let conn = block_on(pair.client.connect(pair.server.local_addr(), NAME)).unwrap();
        let (mut send, _recv) = block_on(conn.open_bi()).unwrap();
        block_on(send.write_all(b"x")).unwrap();
        match block_on(conn.closed()) {
            ConnectionError::ClosedByPeer { reason, .. } => {
                assert_eq!(reason, "application panicked");
            }
            other => panic!("{other:?}"),
        }
        // In the call and in `handle_closed`, each counted.
        wait_for("panics are counted", || counters(&pair.server).app_panics == panics);
    }
    assert!(pair.server.send_to_app(0, Box::new(())).is_ok());
    wait_for("panics are counted", || counters(&pair.server).app_panics == 5);
    assert!(pair.server.is_running());
    pair.wait_idle();
}

#[test]
fn an_application_that_panics_when_it_is_made_leaves_nothing_running() {
    struct Idle;
    impl ShardApp for Idle {}
    let _watchdog = Watchdog::new("panic at the start");
    let port = {
        let pair = Pair::new();
        pair.server.local_addr().port()
    };
    let mut config = TransportConfig { shards: 2, ..config() };
    config.bind.set_port(port);
    let builder = Engine::builder().config(config.clone()).app(|shard| {
        assert!(shard == 0, "planned");
        Idle
    });
    let start = std::panic::AssertUnwindSafe(|| builder.server(pair::identity().0).start());
    let panic = std::panic::catch_unwind(start).err().expect("it comes through");
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"planned"));
    // The port is free again: no shard holds it.
    let again = Engine::builder().config(TransportConfig { shards: 1, ..config });
    drop(again.server(pair::identity().0).start().unwrap());
}

#[test]
fn an_engine_with_an_application_still_connects_with_handles() {
    struct Echo;
    impl ShardApp for Echo {}
    let _watchdog = Watchdog::new("owner");
    let app = Engine::builder().config(config()).app(|_| Echo);
    let pair = Pair::build(Engine::builder().config(config()), app);
    block_on(async {
        let (client, server) = pair.connect().await;
        let mut send = client.open_uni().await.unwrap();
        send.write_all(b"from a handle").await.unwrap();
        send.finish().unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        assert_eq!(recv.read_to_end(100).await.unwrap(), b"from a handle");
    });
    pair.wait_idle();
}

/// A waker that takes the shard's thread down with it.
struct Bomb;

impl Wake for Bomb {
    fn wake(self: Arc<Self>) {
        panic!("planned: the shard's thread");
    }
}

#[test]
fn a_shard_that_panics_leaves_no_handle_waiting() {
    let _watchdog = Watchdog::new("shard panics");
    let pair = Pair::new();
    let (client, server) = block_on(pair.connect());
    let (mut send, mut recv) = block_on(client.open_bi()).unwrap();
    block_on(send.write_all(b"x")).unwrap();
    let (mut peer_send, _peer_recv) = block_on(server.accept_bi()).unwrap();
    let bomb = Waker::from(Arc::new(Bomb));
    let mut read = Box::pin(recv.read_chunk(1));
    assert!(read.as_mut().poll(&mut Context::from_waker(&bomb)).is_pending());
    std::thread::scope(|scope| {
        let waits = [
            scope.spawn(|| block_on(client.accept_bi()).err()),
            scope.spawn(|| block_on(client.closed()).into()),
            scope.spawn(|| block_on(client.read_datagram()).err()),
        ];
        std::thread::sleep(Duration::from_millis(50));
        block_on(peer_send.write_all(b"x")).unwrap();
        for wait in waits {
            assert_eq!(wait.join().unwrap(), Some(ConnectionError::EngineStopped));
        }
    });
    // Its handles are told one after another, the engine last.
    wait_for("the engine has ended", || !pair.client.is_running());
    assert!(block_on(pair.client.connect(pair.server.local_addr(), NAME)).is_err());
    assert!(block_on(pair.client.accept()).is_none());
}

#[test]
fn chunks_in_groups_and_who_the_peer_is() {
    let _watchdog = Watchdog::new("chunks");
    let pair = Pair::new();
    block_on(async {
        let (client, server) = pair.connect().await;
        let identity = client.peer_identity().expect("the server showed a certificate");
        assert_eq!(identity.certificate.names.dns(), [NAME]);
        assert_eq!(identity.chain, client.peer_certificates().unwrap());
        assert!(server.peer_identity().is_none());
        let settled = server.handshake().unwrap();
        assert!(settled.is_post_quantum() && client.handshake().unwrap().is_post_quantum());
        assert_eq!(settled.server_name.as_deref(), Some(NAME));
        assert_eq!(client.alpn().unwrap(), b"stoq-test");

        let mut send = client.open_uni().await.unwrap();
        send.set_priority(3);
        assert_eq!(send.priority(), 3);
        let mut chunks = [Bytes::from_static(b"one "), Bytes::new(), Bytes::from_static(b"three")];
        assert_eq!(send.write_chunks(&mut chunks).await, Ok(3));
        assert!(chunks.iter().all(Bytes::is_empty));
        send.finish().unwrap();
        let mut recv = server.accept_uni().await.unwrap();
        let mut received = Vec::new();
        let mut places = [const { Bytes::new() }; 4];
        while let Some(filled) = recv.read_chunks(&mut places).await.unwrap() {
            assert!(filled > 0);
            received.extend(places[..filled].iter().flatten().copied());
        }
        assert_eq!(received, b"one three");
        assert_eq!(recv.read_chunks(&mut places).await, Ok(None));
    });
    pair.wait_idle();
}
