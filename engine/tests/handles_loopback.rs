//! The async handles over loopback sockets: real threads, real kernel, no privileges.

use std::future::Future;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoq::VarInt;
use stoq::certs::{ClientTls, IdentityNames, RotatingIdentity, ServerTls};
use stoq::config::{RetryPolicy, TransportConfig};
use stoq::connection::Connection;
use stoq::datapath::choice::DatapathChoice;
use stoq::engine::Engine;
use stoq::error::{ConnectError, ConnectionError, ReadError, SendDatagramError, WriteError};

/// No test may take longer: whatever hangs is named instead of hanging.
const WATCHDOG: Duration = Duration::from_secs(40);

fn watched<T>(name: &str, f: impl FnOnce() -> T) -> T {
    let done = Arc::new(AtomicBool::new(false));
    let (flag, name) = (done.clone(), name.to_owned());
    std::thread::spawn(move || {
        let start = Instant::now();
        while start.elapsed() < WATCHDOG {
            if flag.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // Past the capture, which the abort would take along.
        let _ = std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("{name}: hangs for {WATCHDOG:?}\n"),
        );
        std::process::exit(101);
    });
    let result = f();
    done.store(true, Ordering::Relaxed);
    result
}

fn config(datapath: DatapathChoice) -> TransportConfig {
    TransportConfig {
        bind: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0),
        datapath,
        spin_us: 0,
        idle_timeout_ms: 3_000,
        ..Default::default()
    }
}

struct Pair {
    server: Engine,
    client: Engine,
}

impl Pair {
    fn with(server: TransportConfig, client: TransportConfig) -> Self {
        let names = IdentityNames::new().with_dns("localhost").expect("a DNS name");
        let identity = RotatingIdentity::self_signed(names).start().expect("an identity");
        let roots = identity.roots().to_vec();
        let tls = ServerTls::builder().identity(identity).alpn(["t"]).build().expect("server TLS");
        let server =
            Engine::builder().config(server).server(tls.crypto()).start().expect("server starts");
        let tls = ClientTls::builder().roots(roots).alpn(["t"]).build().expect("client TLS");
        let client =
            Engine::builder().config(client).client(tls.crypto()).start().expect("client starts");
        Self { server, client }
    }

    fn new() -> Self {
        Self::with(config(DatapathChoice::Auto), config(DatapathChoice::Auto))
    }

    async fn connect(&self) -> (Connection, Connection) {
        let connecting = self.client.connect(self.server.local_addr(), "localhost");
        let incoming = self.server.accept().await.expect("the server runs");
        let accepting = incoming.accept();
        (connecting.await.expect("connected"), accepting.await.expect("accepted"))
    }

    /// Everything that was opened is gone.
    fn assert_clean(self) {
        for (name, engine) in [("client", self.client), ("server", self.server)] {
            let start = Instant::now();
            let connections =
                || engine.stats().iter().map(|stats| stats.shard.connections).sum::<u64>();
            while connections() > 0 && start.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(connections(), 0, "the {name} still holds connections");
            engine.shutdown_blocking(Duration::ZERO, VarInt::from_u32(0), b"");
        }
    }
}

fn run<F: Future<Output = ()>>(name: &str, f: impl FnOnce(Arc<Pair>) -> F) {
    watched(name, || {
        let pair = Arc::new(Pair::new());
        pollster::block_on(f(pair.clone()));
        Arc::into_inner(pair).expect("the test gave every clone back").assert_clean();
    });
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 % 251) as u8).collect()
}

#[test]
fn a_request_and_its_answer() {
    run("request", |pair| async move {
        let (client, server) = pair.connect().await;
        assert_eq!(client.alpn().as_deref(), Some(&b"t"[..]));
        assert_eq!(server.server_name().as_deref(), Some("localhost"));
        assert_eq!(client.peer_identity().expect("a chain").chain.len(), 2);
        assert_eq!(client.remote_address(), pair.server.local_addr());
        let (mut send, mut recv) = client.open_bi().await.expect("opened");
        send.write_all(&pattern(100_000)).await.expect("written");
        send.finish().expect("finished");
        assert_eq!(send.finish(), Err(WriteError::ClosedStream));
        let (mut answer, mut request) = server.accept_bi().await.expect("accepted");
        let got = request.read_to_end(1 << 20).await.expect("read");
        assert_eq!(got, pattern(100_000));
        answer.write_chunk(Bytes::from(got)).await.expect("answered");
        drop(answer); // finishes
        assert_eq!(recv.read_to_end(1 << 20).await.expect("read"), pattern(100_000));
        assert_eq!(send.stopped().await, Ok(None), "everything was acknowledged");
        assert!(client.stats().packets_sent > 0 && client.rtt() > Duration::ZERO);
        client.update_keys();
        let send = client.open_uni().await.expect("opened after a key update");
        drop(send);
        let mut recv = server.accept_uni().await.expect("accepted");
        assert_eq!(recv.read_to_end(10).await.expect("empty"), b"");
    });
}

#[test]
fn datagrams_and_their_limits() {
    run("datagrams", |pair| async move {
        let (client, server) = pair.connect().await;
        client.send_datagram(Bytes::from_static(b"ping")).expect("sent");
        assert_eq!(server.read_datagram().await.expect("read"), Bytes::from_static(b"ping"));
        let max = client.max_datagram_size().expect("supported");
        let huge = Bytes::from(vec![0; max + 100_000]);
        assert_eq!(client.send_datagram(huge), Err(SendDatagramError::TooLarge));
        for number in 0..200u32 {
            let data = Bytes::copy_from_slice(&number.to_be_bytes());
            server.send_datagram_wait(data).await.expect("sent");
        }
        assert_eq!(client.read_datagram().await.expect("read").len(), 4);
    });
}

#[test]
fn a_hundred_streams_at_once() {
    run("streams", |pair| async move {
        let (client, server) = pair.connect().await;
        let mut sends = Vec::new();
        for number in 0..100usize {
            let mut send = client.open_uni().await.expect("opened");
            send.write_all(&pattern(1000 + number)).await.expect("written");
            sends.push(send);
        }
        drop(sends);
        let mut lengths = Vec::new();
        for _ in 0..100 {
            let mut recv = server.accept_uni().await.expect("accepted");
            lengths.push(recv.read_to_end(1 << 20).await.expect("read").len());
        }
        lengths.sort_unstable();
        assert_eq!(lengths, (1000..1100).collect::<Vec<_>>());
    });
}

/// Downloads over connections that share both addresses and ports: the server opens the streams.
#[test]
fn servers_push_over_connections_of_one_port() {
    const PUSHED_BYTES: usize = 2 << 20;
    for connections in [1, 12] {
        run("pushes", |pair| async move {
            let mut pushes = Vec::new();
            for _ in 0..connections {
                let (near, far) = pair.connect().await;
                pushes.push(async move {
                    let sending = async {
                        let mut send = far.open_uni().await.expect("opened");
                        send.write_all(&pattern(PUSHED_BYTES)).await.expect("written");
                        send.finish().expect("finished");
                    };
                    let receiving = async {
                        let mut recv = near.accept_uni().await.expect("accepted");
                        let data = recv.read_to_end(PUSHED_BYTES + 1).await.expect("read");
                        assert!(data == pattern(PUSHED_BYTES), "{} bytes", data.len());
                    };
                    futures_util::future::join(sending, receiving).await;
                    (near, far)
                });
            }
            let ends = futures_util::future::join_all(pushes).await;
            assert_eq!(ends.len(), connections);
        });
    }
}

#[test]
fn a_slow_reader_holds_the_writer() {
    run("back-pressure", |pair| async move {
        let (client, server) = pair.connect().await;
        let mut send = client.open_uni().await.expect("opened");
        let chunk = Bytes::from(vec![9; 64 * 1024]);
        let limit = TransportConfig::default();
        let bound = limit.stream_receive_buffer_size as usize
            + limit.stream_send_queue_bytes
            + limit.stream_receive_queue_bytes
            + limit.send_buffer_size as usize
            + chunk.len();
        let mut written = 0;
        loop {
            let write = send.write_chunk(chunk.clone());
            let timeout = std::pin::pin!(sleep(Duration::from_millis(700)));
            match futures_util::future::select(std::pin::pin!(write), timeout).await {
                futures_util::future::Either::Left((result, _)) => {
                    result.expect("written");
                    written += chunk.len();
                }
                futures_util::future::Either::Right(_) => break,
            }
            assert!(written <= bound, "{written} bytes taken, bound {bound}");
        }
        // The cancelled write took nothing; reading lets everything through.
        send.finish().expect("finished");
        let mut recv = server.accept_uni().await.expect("accepted");
        let mut read = 0;
        while let Some(data) = recv.read_chunk(usize::MAX).await.expect("read") {
            read += data.len();
        }
        assert_eq!(read, written);
    });
}

/// A timer for tests: a thread that wakes the waker.
async fn sleep(duration: Duration) {
    let (done, wait) = futures_channel::oneshot::channel();
    std::thread::spawn(move || {
        std::thread::sleep(duration);
        let _nobody_waits = done.send(());
    });
    wait.await.expect("the thread sends");
}

#[test]
fn closing_and_resetting_reach_the_other_side() {
    run("close", |pair| async move {
        let (client, server) = pair.connect().await;
        let (mut send, mut recv) = client.open_bi().await.expect("opened");
        send.write_all(b"x").await.expect("written");
        let (mut answer, mut request) = server.accept_bi().await.expect("accepted");
        send.reset(VarInt::from_u32(7)).expect("reset");
        loop {
            match request.read_chunk(10).await {
                Ok(Some(_)) => {}
                Err(error) => break assert_eq!(error, ReadError::Reset(VarInt::from_u32(7))),
                Ok(None) => panic!("a reset is not an end"),
            }
        }
        recv.stop(VarInt::from_u32(8)).expect("stopped");
        assert_eq!(answer.stopped().await, Ok(Some(VarInt::from_u32(8))));
        assert_eq!(answer.write(b"y").await, Err(WriteError::Stopped(VarInt::from_u32(8))));
        server.close(VarInt::from_u32(42), b"bye");
        let expected = ConnectionError::ClosedByPeer {
            code: VarInt::from_u32(42),
            reason: Bytes::from_static(b"bye"),
        };
        assert_eq!(client.closed().await, expected);
        assert_eq!(client.open_uni().await.expect_err("closed"), expected);
        assert_eq!(client.accept_bi().await.expect_err("closed"), expected);
        assert_eq!(client.read_datagram().await.expect_err("closed"), expected);
        assert!(matches!(
            client.send_datagram(Bytes::new()),
            Err(SendDatagramError::ConnectionLost(_))
        ));
        assert_eq!(server.closed().await, ConnectionError::ClosedLocally);
    });
}

#[test]
fn dropping_the_last_handle_closes() {
    run("drop", |pair| async move {
        let (client, server) = pair.connect().await;
        let send = client.open_uni().await.expect("opened");
        let second = client.clone();
        drop(client);
        drop(second);
        // The stream still holds the connection.
        assert!(server.close_reason().is_none());
        drop(send);
        assert!(matches!(server.closed().await, ConnectionError::ClosedByPeer { .. }));
    });
}

#[test]
fn refused_ignored_and_retried_clients() {
    watched("knock", || {
        let mut impatient = config(DatapathChoice::Auto);
        impatient.handshake_timeout_ms = 2_000;
        let pair = Pair::with(config(DatapathChoice::Auto), impatient);
        pollster::block_on(async {
            let address = pair.server.local_addr();
            let connecting = pair.client.connect(address, "localhost");
            pair.server.accept().await.expect("knocks").refuse();
            assert!(matches!(connecting.await, Err(ConnectionError::AbortedByPeer(_))));

            let connecting = pair.client.connect(address, "localhost");
            drop(pair.server.accept().await.expect("knocks"));
            assert!(matches!(connecting.await, Err(ConnectionError::AbortedByPeer(_))));

            let connecting = pair.client.connect(address, "localhost");
            let incoming = pair.server.accept().await.expect("knocks");
            assert!(!incoming.remote_address_validated());
            incoming.retry();
            // A ClientHello of two packets may knock again before the Retry arrives.
            let accepted = loop {
                let incoming = pair.server.accept().await.expect("knocks again");
                if incoming.remote_address_validated() {
                    break incoming.accept();
                }
                incoming.ignore();
            };
            let (client, server) = (connecting.await.expect("connected"), accepted.await);
            drop((client, server.expect("accepted")));

            let connecting = pair.client.connect(address, "wrong.example");
            let accepted = pair.server.accept().await.expect("knocks").accept();
            assert!(matches!(connecting.await, Err(ConnectionError::PeerViolation(_))));
            assert!(accepted.await.is_err());

            let connecting = pair.client.connect(address, "localhost");
            // Whatever comes is ignored: the client gives up by its own deadline.
            let gave_up = std::pin::pin!(connecting);
            let ignore_all = std::pin::pin!(async {
                loop {
                    pair.server.accept().await.expect("the server runs").ignore();
                }
            });
            let ended = futures_util::future::select(gave_up, ignore_all).await;
            let futures_util::future::Either::Left((result, _)) = ended;
            assert!(matches!(result, Err(ConnectionError::HandshakeTimedOut { .. })));
        });
        pair.assert_clean();
    });
}

#[test]
fn impossible_peers_are_refused_at_once() {
    run("addresses", |pair| async move {
        for bad in ["[::1]:0", "[::]:4433", "[::ffff:127.0.0.1]:4433", "[ff02::1]:4433"] {
            let peer = bad.parse().expect("an address");
            let error = pair.client.connect(peer, "localhost").await.expect_err("refused");
            assert_eq!(
                error,
                ConnectionError::NotStarted(ConnectError::InvalidRemoteAddress(peer)),
                "{bad}"
            );
        }
        let peer = pair.server.local_addr();
        let error = pair.server.connect(peer, "localhost").await.expect_err("no client");
        assert_eq!(error, ConnectionError::NotStarted(ConnectError::NoClientConfig));
    });
}

#[test]
fn a_dropped_engine_tells_its_peers() {
    watched("vanish", || {
        let pair = Pair::new();
        let (client, server) = pollster::block_on(pair.connect());
        let Pair { server: engine, client: client_engine } = pair;
        drop(engine);
        let reason = pollster::block_on(client.closed());
        assert!(matches!(reason, ConnectionError::ClosedByPeer { .. }), "{reason}");
        assert_eq!(server.close_reason(), Some(ConnectionError::EngineStopped));
        drop((client, server, client_engine));
    });
}

#[test]
fn shutdown_in_the_middle_of_everything() {
    watched("shutdown", || {
        for grace_ms in [0, 300] {
            let pair = Pair::new();
            let (client, server) = pollster::block_on(pair.connect());
            let writer = std::thread::spawn(move || {
                pollster::block_on(async {
                    let mut send = client.open_uni().await.expect("opened");
                    loop {
                        if let Err(error) = send.write_all(&[5; 100_000]).await {
                            return error;
                        }
                    }
                })
            });
            let reader = std::thread::spawn(move || {
                pollster::block_on(async {
                    let mut recv = server.accept_uni().await.expect("accepted");
                    loop {
                        match recv.read_chunk(usize::MAX).await {
                            Ok(Some(_)) => {}
                            Ok(None) => panic!("the writer never finishes"),
                            Err(error) => return error,
                        }
                    }
                })
            });
            std::thread::sleep(Duration::from_millis(200));
            let start = Instant::now();
            let grace = Duration::from_millis(grace_ms);
            let report = pair.server.shutdown_blocking(grace, VarInt::from_u32(5), b"stop");
            // That it did not wait for the stream, which never ends, is seen below: it cut it off.
            assert!(start.elapsed() >= grace, "{:?}", start.elapsed());
            assert_eq!((report.connections_at_order, report.connections_cut_off), (1, 1));
            let lost = |error: &ConnectionError| match error {
                ConnectionError::ClosedByPeer { code, .. } => *code == VarInt::from_u32(5),
                _ => false,
            };
            let error = writer.join().expect("the writer ends");
            assert!(
                matches!(&error, WriteError::ConnectionLost(reason) if lost(reason)),
                "{error}"
            );
            let error = reader.join().expect("the reader ends");
            let stopped = ReadError::ConnectionLost(ConnectionError::EngineStopped);
            assert_eq!(error, stopped);
            drop(pair.client);
        }
    });
}

#[test]
fn several_shards_and_always_retry() {
    watched("shards", || {
        for datapath in [DatapathChoice::Socket, DatapathChoice::IoUring] {
            let mut server = config(datapath);
            server.shards = 2;
            server.retry = RetryPolicy::Always;
            let mut client = config(datapath);
            client.shards = 2;
            let pair = Pair::with(server, client);
            pollster::block_on(async {
                let mut connections = Vec::new();
                for _ in 0..8 {
                    connections.push(pair.connect().await);
                }
                for (client, server) in &connections {
                    let (mut send, mut recv) = client.open_bi().await.expect("opened");
                    send.write_all(&pattern(50_000)).await.expect("written");
                    send.finish().expect("finished");
                    let (mut answer, mut request) = server.accept_bi().await.expect("accepted");
                    let got = request.read_to_end(1 << 20).await.expect("read");
                    answer.write_all(&got).await.expect("answered");
                    answer.finish().expect("finished");
                    assert_eq!(recv.read_to_end(1 << 20).await.expect("read"), pattern(50_000));
                }
            });
            let stats = pair.server.stats();
            assert!(stats.iter().all(|stats| stats.shard.accepted > 0), "one shard got nothing");
            // The first client must show its address; later ones may bring a token instead.
            let retries = stats.iter().map(|stats| stats.shard.retries).sum::<u64>();
            assert!((1..=8).contains(&retries), "{retries} retries for 8 connections");
            pair.assert_clean();
        }
    });
}

/// The server speaks first, on many connections at once that share one address and port.
#[test]
fn the_server_opens_streams_on_many_connections() {
    const LEN: usize = 2 << 20;
    watched("downloads", || {
        for (datapath, shards) in [DatapathChoice::Socket, DatapathChoice::IoUring]
            .into_iter()
            .flat_map(|d| [(d, 1), (d, 4)])
        {
            let engine = || TransportConfig { shards, ..config(datapath) };
            let pair = Pair::with(engine(), engine());
            pollster::block_on(async {
                let mut downloads = Vec::new();
                for _ in 0..12 {
                    let (client, server) = pair.connect().await;
                    downloads.push(async move {
                        let sending = async {
                            let mut send = server.open_uni().await.expect("opened");
                            send.write_all(&vec![7; LEN]).await.expect("written");
                            send.finish().expect("finished");
                        };
                        let receiving = async {
                            let mut recv = client.accept_uni().await.expect("accepted");
                            assert_eq!(recv.read_to_end(LEN + 1).await.expect("read").len(), LEN);
                        };
                        futures_util::future::join(sending, receiving).await;
                        (client, server)
                    });
                }
                futures_util::future::join_all(downloads).await;
            });
            pair.assert_clean();
        }
    });
}

#[test]
fn a_parked_engine_costs_nothing() {
    watched("idle", || {
        let pair = Pair::new();
        let (client, server) = pollster::block_on(pair.connect());
        std::thread::sleep(Duration::from_millis(300));
        let turns =
            |engine: &Engine| engine.stats().iter().map(|stats| stats.shard.turns).sum::<u64>();
        let before = turns(&pair.server);
        std::thread::sleep(Duration::from_millis(500));
        let during = turns(&pair.server) - before;
        assert!(during < 50, "{during} turns in half an idle second");
        drop((client, server));
        pair.assert_clean();
    });
}
