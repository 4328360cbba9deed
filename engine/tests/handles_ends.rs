//! Every end that a stream or a connection can come to, at every stage of its life: streams on a living
//! connection, peers that vanish, writers that never stop, shutdowns in the middle. Nothing hangs (a
//! watchdog per test) and nothing is left (the shards' counters).
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;
#[path = "common/relay.rs"]
#[allow(dead_code, unreachable_pub)]
mod relay;

use std::net::Ipv6Addr;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{join, join_all};
use pair::{NAME, PATIENCE, Pair, Watchdog, config, counters, wait_for};
use pollster::block_on;
use relay::Relay;
use stoq::VarInt;
use stoq::config::TransportConfig;
use stoq::connection::Connection;
use stoq::error::{ConnectionError, ReadError, WriteError};
use stoq::stream::{RecvStream, SendStream};

fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

fn code(value: u32) -> VarInt {
    VarInt::from_u32(value)
}

/// Where a sending handle is when it is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SendStage {
    Fresh,
    Written,
    /// The last write was blocked, and its future dropped.
    Blocked,
    Finished,
    /// A wait for the peer's acknowledgement was dropped.
    FinishedAndWaiting,
    Reset,
}

const SEND_STAGES: [SendStage; 6] = [
    SendStage::Fresh,
    SendStage::Written,
    SendStage::Blocked,
    SendStage::Finished,
    SendStage::FinishedAndWaiting,
    SendStage::Reset,
];

/// Where a receiving handle is when it is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RecvStage {
    Unread,
    /// A read was begun, and its future dropped.
    ReadCancelled,
    /// A part was read, if anything came.
    ReadInPart,
    /// More came than the caller's limit.
    OverLimit,
    Stopped,
    /// Read to its end or to its error.
    ReadToTheEnd,
}

const RECV_STAGES: [RecvStage; 6] = [
    RecvStage::Unread,
    RecvStage::ReadCancelled,
    RecvStage::ReadInPart,
    RecvStage::OverLimit,
    RecvStage::Stopped,
    RecvStage::ReadToTheEnd,
];

/// The peer may have stopped or left already: what a call answers is not what is looked at here.
async fn drop_sending(mut send: SendStream, stage: SendStage) {
    match stage {
        SendStage::Fresh => {}
        SendStage::Written => drop(send.write_all(&[1; 20_000]).await),
        SendStage::Blocked => while let Some(Ok(_bytes)) = poll_once(send.write(&[2; 64 << 10])) {},
        SendStage::Finished => {
            drop(send.write_all(&[3; 20_000]).await);
            drop(send.finish());
        }
        SendStage::FinishedAndWaiting => {
            drop(send.write_all(b"waited for").await);
            drop(send.finish());
            drop(poll_once(send.stopped()));
        }
        SendStage::Reset => {
            drop(send.write_all(b"taken back").await);
            drop(send.reset(code(1)));
        }
    }
}

async fn drop_receiving(mut recv: RecvStream, stage: RecvStage) {
    match stage {
        RecvStage::Unread => {}
        RecvStage::ReadCancelled => drop(poll_once(recv.read_chunk(100))),
        RecvStage::ReadInPart => drop(recv.read_chunk(100).await),
        RecvStage::OverLimit => drop(recv.read_to_end(1).await),
        RecvStage::Stopped => drop(recv.stop(code(2))),
        RecvStage::ReadToTheEnd => drop(recv.read_to_end(usize::MAX).await),
    }
}

/// On one connection that lives on, and that allows so few streams that a forgotten one would end it all.
#[test]
fn every_stream_handle_dropped_at_every_stage() {
    let _watchdog = Watchdog::new("stages");
    let config = TransportConfig {
        max_concurrent_streams: 2,
        stream_send_queue_bytes: 64 << 10,
        // Less than what is sent: the rest waits in the connection for a reader.
        stream_receive_queue_bytes: 1000,
        stream_receive_buffer_size: 64 << 10,
        ..config()
    };
    let pair = Pair::with(config.clone(), config);
    let (client, server) = block_on(pair.connect());
    for near in SEND_STAGES {
        for far in RECV_STAGES {
            // The same the other way round, on the stream's other direction.
            block_on(join(
                async {
                    let (send, recv) = client.open_bi().await.unwrap();
                    drop_sending(send, near).await;
                    drop_receiving(recv, far).await;
                },
                async {
                    let (send, recv) = server.accept_bi().await.unwrap();
                    drop_sending(send, near).await;
                    drop_receiving(recv, far).await;
                },
            ));
            wait_for("both sides forget the stream", || {
                counters(&pair.client).streams == 0 && counters(&pair.server).streams == 0
            });
            assert!(client.close_reason().is_none(), "{near:?}, {far:?}: the connection lives");
        }
    }
    block_on(echo(&client, &server));
    drop((client, server));
    pair.wait_idle();
}

async fn echo(client: &Connection, server: &Connection) {
    let ask = async {
        let (mut send, mut recv) = client.open_bi().await.unwrap();
        send.write_all(b"still here").await.unwrap();
        send.finish().unwrap();
        assert_eq!(recv.read_to_end(100).await.unwrap(), b"still here");
    };
    let answer = async {
        let (mut send, mut recv) = server.accept_bi().await.unwrap();
        send.write_all(&recv.read_to_end(100).await.unwrap()).await.unwrap();
        send.finish().unwrap();
    };
    join(ask, answer).await;
}

/// A connection over a relay: who drops it cuts the peers off from each other.
async fn connect_through(pair: &Pair) -> (Connection, Connection, Relay) {
    let local = vec![Ipv6Addr::LOCALHOST];
    let relay = Relay::start(Ipv6Addr::LOCALHOST, pair.server.local_addr(), local, 8);
    let connecting = pair.client.connect(relay.addr, NAME);
    let accepting = pair.server.accept().await.unwrap().accept();
    let (client, server) = join(connecting, accepting).await;
    (client.unwrap(), server.unwrap(), relay)
}

/// Waits of every kind, each on a thread, that must end when the peer falls silent.
fn every_wait_ends(end: &Connection, peer: &Connection, relay: Relay) {
    let (mut blocked, mut read, mut finished) = block_on(async {
        let blocked = end.open_uni().await.unwrap();
        let (mut send, recv) = end.open_bi().await.unwrap();
        send.write_all(b"hello").await.unwrap();
        (blocked, recv, send)
    });
    let (_kept, unread) = block_on(join(peer.accept_bi(), async {
        // Nobody reads it: the writer fills what the peer allows, then waits.
        while let Some(written) = poll_once(blocked.write(&[1; 64 << 10])) {
            written.unwrap();
        }
        peer.accept_uni().await.unwrap()
    }));
    drop(relay);
    finished.finish().unwrap();
    let timed_out = ConnectionError::TimedOut;
    let lost = || WriteError::ConnectionLost(ConnectionError::TimedOut);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(block_on(end.closed()), timed_out));
        scope.spawn(|| assert_eq!(block_on(end.accept_uni()).err(), Some(timed_out.clone())));
        scope.spawn(|| assert_eq!(block_on(end.accept_bi()).err(), Some(timed_out.clone())));
        scope.spawn(|| assert_eq!(block_on(end.read_datagram()).err(), Some(timed_out.clone())));
        scope.spawn(|| {
            let error = loop {
                if let Err(error) = block_on(blocked.write(&[1; 64 << 10])) {
                    break error;
                }
            };
            assert_eq!(error, lost());
        });
        scope.spawn(|| {
            let wanted = ReadError::ConnectionLost(ConnectionError::TimedOut);
            assert_eq!(block_on(read.read_chunk(100)), Err(wanted));
        });
        scope.spawn(|| {
            // The data had not been acknowledged, or it had: which of them is told.
            let told = block_on(finished.stopped());
            assert!(told.is_err() || told == Ok(None), "{told:?}");
        });
        scope.spawn(|| {
            // As many as the peer allows, and then one more that waits.
            let error = loop {
                match block_on(end.open_uni()) {
                    Ok(stream) => std::mem::forget(stream),
                    Err(error) => break error,
                }
            };
            assert_eq!(error, timed_out);
        });
    });
    drop(unread);
}

#[test]
fn a_peer_that_vanishes_ends_every_wait_on_both_sides() {
    let _watchdog = Watchdog::new("vanished peer");
    let config = TransportConfig {
        idle_timeout_ms: 3_000,
        max_concurrent_streams: 50,
        stream_send_queue_bytes: 64 << 10,
        stream_receive_buffer_size: 256 << 10,
        receive_buffer_size: 1 << 20,
        send_buffer_size: 256 << 10,
        ..config()
    };
    for server_waits in [false, true] {
        let pair = Pair::with(config.clone(), config.clone());
        let (client, server, relay) = block_on(connect_through(&pair));
        if server_waits {
            every_wait_ends(&server, &client, relay);
        } else {
            every_wait_ends(&client, &server, relay);
        }
        for end in [&client, &server] {
            assert_eq!(block_on(end.closed()), ConnectionError::TimedOut);
        }
        drop((client, server));
        wait_for("no connection is left", || {
            counters(&pair.server).connections == 0 && counters(&pair.client).connections == 0
        });
    }
}

/// A lost connection tells of each stream whether the peer had acknowledged all of its data, finished
/// or not, waited for or not; nothing more can be known.
#[test]
fn a_lost_connection_tells_what_had_been_acknowledged() {
    let _watchdog = Watchdog::new("acknowledged or not");
    let config = TransportConfig { idle_timeout_ms: 3_000, ..config() };
    let pair = Pair::with(config.clone(), config);
    let (client, server, relay) = block_on(connect_through(&pair));
    let write = async |finish: bool| {
        let mut send = client.open_uni().await.unwrap();
        send.write_all(&[9; 5_000]).await.unwrap();
        if finish {
            send.finish().unwrap();
        }
        send
    };
    let arrived = block_on(async {
        let arrived = write(true).await;
        assert_eq!(arrived.stopped().await, Ok(None));
        arrived
    });
    // All of its data arrived, but nobody said that this was all.
    let unfinished = block_on(write(false));
    let mut peer = block_on(async {
        drop(server.accept_uni().await.unwrap());
        server.accept_uni().await.unwrap()
    });
    let mut received = 0;
    while received < 5_000 {
        received += block_on(peer.read_chunk(usize::MAX)).unwrap().unwrap().len();
    }
    drop(relay);
    let in_flight = block_on(write(true));
    assert_eq!(block_on(client.closed()), ConnectionError::TimedOut);
    for (send, is_acknowledged) in [(&arrived, true), (&unfinished, false), (&in_flight, false)] {
        assert_eq!(send.is_acknowledged(), is_acknowledged);
        let told = if is_acknowledged { Ok(None) } else { Err(ConnectionError::TimedOut) };
        assert_eq!(block_on(send.stopped()), told);
    }
    assert_eq!(block_on(server.closed()), ConnectionError::TimedOut);
    drop((client, server, peer, arrived, unfinished, in_flight));
    pair.wait_idle();
}

/// How a thousand writers are ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The peer's handles are all dropped.
    PeerDrops,
    /// The peer closes the connection.
    PeerCloses,
    /// The peer's engine is dropped.
    PeerEngineDropped,
    /// The writers' own engine shuts down.
    OwnShutdown,
}

/// Writes as long as it can; the error that ended it.
async fn write_for_ever(client: &Connection) -> String {
    let mut send = match client.open_uni().await {
        Ok(send) => send,
        Err(error) => return error.to_string(),
    };
    let chunk = Bytes::from_static(&[7; 8 << 10]);
    loop {
        if let Err(error) = send.write_chunk(chunk.clone()).await {
            return error.to_string();
        }
    }
}

/// Accepts every stream, reads a little of some, drops some and keeps others.
async fn read_badly(server: &Connection, accepted_max: usize) -> Vec<RecvStream> {
    let mut kept = Vec::new();
    for number in 0..accepted_max {
        let Ok(mut recv) = server.accept_uni().await else { break };
        match number % 4 {
            0 => drop(recv),
            1 => {
                drop(recv.read_chunk(1000).await);
                kept.push(recv);
            }
            2 => drop(recv.stop(code(8))),
            _ => kept.push(recv),
        }
    }
    kept
}

#[test]
fn a_thousand_writers_that_never_stop() {
    let _watchdog = Watchdog::with_limit("endless writers", Duration::from_secs(240));
    for end in [End::PeerDrops, End::PeerCloses, End::PeerEngineDropped, End::OwnShutdown] {
        endless_writers(end);
    }
}

fn endless_writers(end: End) {
    // What is left unread in a thousand streams fits the connection's window: new ones get through.
    let config = TransportConfig { stream_receive_buffer_size: 8 << 10, ..config() };
    let pair = Pair::with(config.clone(), config);
    let (client, server) = block_on(pair.connect());
    let writers = std::thread::spawn({
        let client = client.clone();
        move || block_on(join_all((0..1000).map(|_| write_for_ever(&client))))
    });
    let kept = block_on(read_badly(&server, 800));
    assert!(kept.len() > 300, "{end:?}: {:?}", server.close_reason());
    let Pair { server: peer_engine, client: engine } = pair;
    let (peer_engine, engine) = match end {
        End::PeerDrops => {
            drop(kept);
            drop(server);
            (Some(peer_engine), Some(engine))
        }
        End::PeerCloses => {
            server.close(code(3), b"no more");
            drop((kept, server));
            (Some(peer_engine), Some(engine))
        }
        End::PeerEngineDropped => {
            drop(peer_engine);
            assert_eq!(block_on(server.closed()), ConnectionError::EngineStopped);
            drop((kept, server));
            (None, Some(engine))
        }
        End::OwnShutdown => {
            let report = engine.shutdown_blocking(Duration::from_millis(20), code(4), b"over");
            assert_eq!(report.connections_cut_off, 1, "{report:?}");
            // The peer stopped half of those that it accepted, and never saw the last.
            assert!((500..=1000).contains(&report.streams_cut_off), "{report:?}");
            let closed = block_on(server.closed());
            assert!(matches!(closed, ConnectionError::ClosedByPeer { .. }), "{closed:?}");
            drop((kept, server));
            (Some(peer_engine), None)
        }
    };
    let errors = writers.join().unwrap();
    assert_eq!(errors.len(), 1000, "{end:?}: every writer is told");
    let late = ConnectionError::TimedOut.to_string();
    assert!(!errors.iter().any(|error| error.contains(&late)), "{end:?}: told at once: {errors:?}");
    assert!(block_on(client.open_bi()).is_err());
    drop(client);
    for engine in [peer_engine, engine].into_iter().flatten() {
        wait_for("nothing is left", || {
            let counters = counters(&engine);
            (counters.connections, counters.streams) == (0, 0)
        });
        let start = Instant::now();
        drop(engine);
        assert!(start.elapsed() < PATIENCE, "dropping an engine does not wait");
    }
}

/// The table of docs/handles.md names tests that exist.
#[test]
fn the_table_of_misuse_names_tests() {
    let table = include_str!("../../docs/handles.md").split("## Misuse").nth(1).unwrap();
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let (mut source, mut names) = (String::new(), 0);
    for name in table.split('`').skip(1).step_by(2) {
        if name.ends_with(".rs") {
            source = std::fs::read_to_string(format!("{here}/{name}"))
                .unwrap_or_else(|error| panic!("tests/{name}: {error}"));
        } else if name.contains('_') && name.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
            assert!(source.contains(&format!("fn {name}()")), "no such test: {name}");
            names += 1;
        }
    }
    assert!(names >= 15, "{names} tests named");
}
