//! Sessions that resume elsewhere: tickets of one engine at another, over all shards, with keys from a
//! file or from the CA; early data that is sent again.
//!
//! Whether a handshake was resumed shows without looking inside: the second engine's certificate is
//! one that the client refuses, and only a resumed handshake does not look at it.

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use futures_channel::oneshot;
use futures_util::future::{Either, join, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use pair::{NAME, Watchdog, config};
use pollster::block_on;
use stoq::VarInt;
use stoq::ca::{CaService, RemoteCa, RemoteCaConfig};
use stoq::certs::trustchain::{TRUSTCHAIN_ALPN, TrustchainServer};
use stoq::certs::{
    CertificateFault, ClientAuth, ClientTls, IdentityNames, LocalCa, LocalCaConfig,
    RotatingIdentity, ServerTls, SharedKeys, SimWallClock, SystemWallClock, TrustStore,
};
use stoq::config::TransportConfig;
use stoq::connection::Connection;
use stoq::engine::Engine;
use stoq::error::{ConnectionError, ReadError, ReadToEndError};

const SHARDS: usize = 4;
const HOUR: Duration = Duration::from_secs(3600);

/// A directory of one test, removed whatever happens.
struct Scratch(PathBuf);

impl Scratch {
    fn new(test: &str) -> Self {
        let name = format!("stoq-resumption-{}-{test}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a new directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir_all(&self.0);
        if !std::thread::panicking() {
            removed.expect("removed");
        }
    }
}

fn names() -> IdentityNames {
    IdentityNames::new().with_dns(NAME).expect("a name")
}

fn sharded() -> TransportConfig {
    TransportConfig { shards: SHARDS, zero_rtt: true, ..config() }
}

fn sim_clock() -> Arc<SimWallClock> {
    Arc::new(SimWallClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)))
}

/// A server of several shards under a root of its own, with this ticket secret.
fn server(clock: &Arc<SimWallClock>, secret: [u8; 32]) -> (Engine, ServerTls) {
    let tls = ServerTls::builder()
        .identity_self_signed(names())
        .clock(clock.clone())
        .alpn(["stoq-test"])
        .ticket_secret(secret)
        .build()
        .expect("server TLS");
    (Engine::builder().config(sharded()).server(tls.crypto()).start().expect("starts"), tls)
}

/// A client that trusts `first` alone.
fn client(clock: &Arc<SimWallClock>, first: &ServerTls) -> (Engine, ClientTls) {
    let tls = ClientTls::builder()
        .roots(first.identity().roots().to_vec())
        .clock(clock.clone())
        .alpn(["stoq-test"])
        .build()
        .expect("client TLS");
    (Engine::builder().config(config()).client(tls.crypto()).start().expect("starts"), tls)
}

/// A connection that lives until the client has the server's tickets.
fn visit(client: &Engine, server: &Engine) -> Result<(), ConnectionError> {
    block_on(async {
        let accepting = async {
            let incoming = server.accept().await.expect("a client knocks");
            let connection = incoming.accept().await?;
            connection.accept_uni().await
        };
        let connecting = async {
            let connection = client.connect(server.local_addr(), NAME).await?;
            let mut send = connection.open_uni().await?;
            // Refused clients are shown the reason by what they do next.
            if send.write_all(b"hello").await.is_ok() && send.finish().is_ok() {
                // Acknowledged after the tickets, which came before.
                assert_eq!(send.stopped().await, Ok(None));
            }
            connection.close(VarInt::from_u32(0), b"");
            Ok(())
        };
        let (made, _accepted) = join(connecting, accepting).await;
        made
    })
}

/// A ticket of `a` opens at `b`, on whichever shards, until its key is gone.
fn resumes_elsewhere(secrets: [[u8; 32]; 2]) {
    let clock = sim_clock();
    let (a, a_tls) = server(&clock, secrets[0]);
    let (b, _b_tls) = server(&clock, secrets[1]);
    // The control: without a ticket of A, B is a stranger.
    let (stranger, stranger_tls) = client(&clock, &a_tls);
    visit(&stranger, &b).expect_err("another root");
    assert_eq!(stranger_tls.faults().count(CertificateFault::UnknownRoot), 1);
    let (client, tls) = client(&clock, &a_tls);
    visit(&client, &a).expect("a full handshake");
    // Each visit brings new tickets for the next.
    for round in 0..12 {
        let (at, name) = if round % 3 == 0 { (&a, "A") } else { (&b, "B") };
        visit(&client, at).unwrap_or_else(|error| panic!("round {round} at {name}: {error}"));
        clock.advance(Duration::from_secs(60));
    }
    for engine in [&a, &b] {
        let accepted: Vec<u64> = engine.stats().iter().map(|shard| shard.shard.accepted).collect();
        assert!(accepted.iter().filter(|count| **count > 0).count() > 1, "{accepted:?}");
    }
    assert_eq!(tls.faults().total(), 0);
    // No key lives longer than six hours.
    clock.advance(6 * HOUR);
    visit(&client, &b).expect_err("the ticket's key is gone");
    assert_eq!(tls.faults().count(CertificateFault::UnknownRoot), 1);
}

#[test]
fn a_ticket_of_one_engine_resumes_at_another_with_the_same_file() {
    let _watchdog = Watchdog::new("tickets by file");
    let scratch = Scratch::new("file");
    let path = scratch.0.join("fleet.key");
    resumes_elsewhere([(); 2].map(|()| {
        SharedKeys::load_or_create(&path).and_then(|keys| keys.ticket_secret()).expect("keys")
    }));
}

#[test]
fn a_ticket_of_one_engine_resumes_at_another_of_the_same_fleet() {
    let _watchdog = Watchdog::new("tickets by CA");
    let ca = LocalCa::in_memory(LocalCaConfig::default(), Arc::new(SystemWallClock));
    let ca = Arc::new(ca.expect("a CA"));
    let own = IdentityNames::new().with_dns("ca.example.net").expect("a name");
    let identity = RotatingIdentity::with_authority(ca.clone(), own).start().expect("certified");
    let trust = TrustStore::builder().roots([ca.root()]).build().expect("trust");
    let tls = ServerTls::builder()
        .identity(identity)
        .client_auth(ClientAuth::Optional(trust))
        .alpn([TRUSTCHAIN_ALPN])
        .build()
        .expect("TLS");
    let service = TrustchainServer::new(ca.clone(), Arc::new(SystemWallClock))
        .with_fleet_keys(SharedKeys::generate().expect("keys"));
    let service = Arc::new(service);
    let bind = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0);
    let running = CaService::start(bind, &tls, service.clone()).expect("the service starts");
    let secret_of = |names: IdentityNames| {
        let mut config =
            RemoteCaConfig::new(running.local_addr(), "ca.example.net", vec![ca.root()]);
        config.token = Some(service.create_token(names.clone(), HOUR).expect("a token"));
        let remote = RemoteCa::new(config).expect("a client");
        let _identity =
            RotatingIdentity::with_authority(remote.clone(), names).start().expect("enrolled");
        remote.shared_keys().expect("keys").ticket_secret().expect("derived")
    };
    let other = IdentityNames::new().with_dns("other.example.net").expect("a name");
    let fleet = [secret_of(names()), secret_of(names())];
    assert_ne!(secret_of(other), fleet[0], "another fleet has another secret");
    resumes_elsewhere(fleet);
}

/// Passes datagrams between one client and the server, and keeps copies of the client's.
struct Wiretap {
    addr: SocketAddrV6,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wiretap {
    fn start(server: SocketAddrV6) -> Self {
        let bind = || {
            let socket = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("bound");
            socket.set_nonblocking(true).expect("set");
            socket
        };
        let (front, back) = (bind(), bind());
        let SocketAddr::V6(addr) = front.local_addr().expect("bound") else { panic!("IPv6") };
        let (heard, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (copies, stopped) = (heard.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_535];
            let mut client = None;
            while !stopped.load(Ordering::Relaxed) {
                let mut is_idle = true;
                while let Ok((len, source)) = front.recv_from(&mut buffer) {
                    is_idle = false;
                    client = Some(source);
                    copies.lock().expect("not poisoned").push(buffer[..len].to_vec());
                    back.send_to(&buffer[..len], server).expect("sent");
                }
                while let Ok((len, _)) = back.recv_from(&mut buffer) {
                    is_idle = false;
                    front.send_to(&buffer[..len], client.expect("spoke first")).expect("sent");
                }
                if is_idle {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Self { addr, heard, stop, thread: Some(thread) }
    }

    /// Waits until the client has said something early: what it asks later may follow the handshake.
    async fn early_data(&self) {
        let is_early = |datagram: &Vec<u8>| has_early_data(datagram);
        std::future::poll_fn(|cx| {
            if self.heard.lock().expect("not poisoned").iter().any(is_early) {
                return Poll::Ready(());
            }
            std::thread::sleep(Duration::from_millis(1));
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// What the client said, ended.
    fn end(mut self) -> Vec<Vec<u8>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("once").join().expect("the tap did not panic");
        std::mem::take(&mut *self.heard.lock().expect("not poisoned"))
    }
}

/// Whether one of the packets in a datagram is a 0-RTT packet (RFC 9000 §17.2.3).
fn has_early_data(mut datagram: &[u8]) -> bool {
    /// A variable-length integer (RFC 9000 §16) and what is behind it.
    fn varint(bytes: &[u8]) -> (usize, &[u8]) {
        let (number, rest) = bytes.split_at(1 << (bytes[0] >> 6));
        let number = number.iter().fold(0, |number, byte| number << 8 | usize::from(*byte));
        (number & ((1 << (8 * (bytes.len() - rest.len()) - 2)) - 1), rest)
    }
    // The bit behind the first may be anything (RFC 9287).
    while datagram.first().is_some_and(|first| first & 0x80 != 0) {
        let packet_type = datagram[0] >> 4 & 0b11;
        if packet_type == 0b01 {
            return true;
        }
        let (dcid_bytes, rest) = (usize::from(datagram[5]), &datagram[6..]);
        let (scid_bytes, rest) = (usize::from(rest[dcid_bytes]), &rest[dcid_bytes + 1..]);
        let mut rest = &rest[scid_bytes..];
        if packet_type == 0b00 {
            let (token_bytes, behind) = varint(rest);
            rest = &behind[token_bytes..];
        }
        let (bytes, behind) = varint(rest);
        datagram = &behind[bytes..];
    }
    false
}

async fn ask(connection: &Connection) -> Result<Vec<u8>, ReadError> {
    let (mut send, mut recv) = connection.open_bi().await?;
    // A refusal shows on either half, whichever comes first.
    if send.write_all(b"pay 100").await.is_ok() {
        let _shown_by_the_answer = send.finish();
    }
    match recv.read_to_end(100).await {
        Ok(answer) => Ok(answer),
        Err(ReadToEndError::Read(error)) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

/// Answers one request; whether it came early.
async fn answer(connection: &Connection) -> bool {
    let (mut send, mut recv) = connection.accept_bi().await.expect("asked");
    let request = recv.read_to_end(100).await.expect("read");
    send.write_all(&request).await.expect("written");
    recv.is_0rtt()
}

/// A ticket of one shard is good at every other, early data included.
#[test]
fn early_data_is_taken_by_whichever_shard_it_comes_to() {
    const VISITS: usize = 12;
    let _watchdog = Watchdog::new("early_data_is_taken_by_whichever_shard_it_comes_to");
    let tls = ServerTls::builder()
        .identity_self_signed(names())
        .alpn(["stoq-test"])
        .early_data(true)
        .build()
        .expect("server TLS");
    let server = Engine::builder().config(sharded()).server(tls.crypto()).start().expect("starts");
    let client_tls = ClientTls::builder()
        .roots(tls.identity().roots().to_vec())
        .alpn(["stoq-test"])
        .early_data(true)
        .build()
        .expect("client TLS");
    let client = Engine::builder().config(TransportConfig { zero_rtt: true, ..config() });
    let client = client.client(client_tls.crypto()).start().expect("starts");
    visit(&client, &server).expect("a full handshake");
    let before = accepted_by_shard(&server);
    block_on(async {
        for visit in 0..VISITS {
            let tap = Wiretap::start(server.local_addr());
            let Ok((early, taken)) = client.connect(tap.addr, NAME).into_0rtt().await else {
                panic!("visit {visit}: a session is remembered")
            };
            let accepting = async {
                let incoming = server.accept().await.expect("knocks");
                tap.early_data().await;
                let connection = incoming.accept().await;
                let connection = connection.expect("accepted");
                assert!(answer(&connection).await, "visit {visit}: told that it came early");
                connection
            };
            let (asked, connection) = join(ask(&early), accepting).await;
            assert_eq!(asked.expect("answered"), b"pay 100");
            assert!(taken.await, "visit {visit}: the client is told, too");
            // The next ticket comes behind the handshake.
            let mut send = early.open_uni().await.expect("a stream");
            send.write_all(b"thanks").await.expect("written");
            send.finish().expect("finished");
            assert_eq!(send.stopped().await, Ok(None));
            early.close(VarInt::from_u32(0), b"");
            connection.closed().await;
            tap.end();
        }
    });
    let took =
        accepted_by_shard(&server).iter().zip(&before).filter(|(now, then)| now > then).count();
    assert!(took > 1, "one shard took every visit: tickets were not carried over");
}

fn accepted_by_shard(server: &Engine) -> Vec<u64> {
    server.stats().iter().map(|stats| stats.shard.accepted).collect()
}

/// Everything that a client with early data sent, sent again from elsewhere: the request was carried
/// out once, and no copy reaches the application.
#[test]
fn a_recorded_flight_with_early_data_is_good_once() {
    const REPLAYS: u64 = 2;
    let _watchdog = Watchdog::new("a_recorded_flight_with_early_data_is_good_once");
    let tls = ServerTls::builder()
        .identity_self_signed(names())
        .alpn(["stoq-test"])
        .early_data(true)
        .build()
        .expect("server TLS");
    let server = Engine::builder().config(TransportConfig {
        // Copies never finish their handshakes: their ends are waited for.
        handshake_timeout_ms: 4_000,
        ..sharded()
    });
    let server = server.server(tls.crypto()).start().expect("starts");
    let client_tls = ClientTls::builder()
        .roots(tls.identity().roots().to_vec())
        .alpn(["stoq-test"])
        .early_data(true)
        .build()
        .expect("client TLS");
    let client = Engine::builder().config(TransportConfig { zero_rtt: true, ..config() });
    let client = client.client(client_tls.crypto()).start().expect("starts");
    visit(&client, &server).expect("a full handshake");
    let tap = Wiretap::start(server.local_addr());
    block_on(async {
        let Ok((early, taken)) = client.connect(tap.addr, NAME).into_0rtt().await else {
            panic!("a session is remembered")
        };
        let accepting = async {
            let incoming = server.accept().await.expect("knocks");
            tap.early_data().await;
            let connection = incoming.accept().await.expect("accepted");
            assert!(answer(&connection).await, "told that it came early");
            connection
        };
        let (asked, connection) = join(ask(&early), accepting).await;
        assert_eq!(asked.expect("answered"), b"pay 100");
        assert!(taken.await, "the client is told, too");
        early.close(VarInt::from_u32(0), b"");
        connection.closed().await;
    });
    let heard = tap.end();
    pair::wait_for("the first connection is gone", || pair::counters(&server).connections == 0);
    let (stop, stopped) = oneshot::channel();
    let delivered = std::thread::scope(|scope| {
        let serving = scope.spawn(|| block_on(count_requests(&server, stopped)));
        for replay in 1..=REPLAYS {
            let thief = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("bound");
            for datagram in &heard {
                thief.send_to(datagram, server.local_addr()).expect("sent");
            }
            let timed_out = || pair::counters(&server).handshakes_timed_out >= replay;
            pair::wait_for("the copy of a ClientHello gets nowhere", timed_out);
            // Until then copies would belong to the connection that is draining.
            pair::wait_for("it is gone", || pair::counters(&server).connections == 0);
        }
        stop.send(()).expect("the server runs");
        serving.join().expect("did not panic")
    });
    assert_eq!(delivered, 0, "early data was delivered again");
}

/// Accepts whoever knocks, as early as can be, until told to stop; how many streams came of it.
async fn count_requests(server: &Engine, mut stopped: oneshot::Receiver<()>) -> usize {
    let mut clients = FuturesUnordered::new();
    let mut delivered = 0;
    loop {
        let next = async {
            match clients.next().await {
                Some(streams) => streams,
                None => std::future::pending().await,
            }
        };
        let work = select(Box::pin(server.accept()), Box::pin(next));
        match select(&mut stopped, work).await {
            Either::Left(_) | Either::Right((Either::Left((None, _)), _)) => return delivered,
            Either::Right((Either::Left((Some(incoming), _)), _)) => clients.push(async move {
                // A copy of half a ClientHello is refused.
                let Ok((connection, _)) = incoming.accept().into_0rtt().await else { return 0 };
                usize::from(connection.accept_bi().await.is_ok())
            }),
            Either::Right((Either::Right((streams, _)), _)) => delivered += streams,
        }
    }
}
