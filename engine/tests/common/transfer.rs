//! A download between two engines that lasts until the test has seen enough.
//!
//! The server sends a pattern without end; the client compares every byte with
//! it. [`Transfer::finish`] asks the server to end the stream and returns what
//! both ends say. Nothing waits for ever: every wait has a limit.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, LazyLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoq::VarInt;
use stoq::certs::{ClientTls, IdentityNames, RotatingIdentity, ServerTls};
use stoq::connection::Connection;
use stoq::engine::{Builder, Engine};
use stoq::error::StartError;

use super::netns::{Netns, wait_until};

/// The longest wait for an end of a transfer; above the idle timeout of 30 s.
const END_LIMIT: Duration = Duration::from_secs(45);
const ALPN: &str = "fault-test";
const CHUNK_BYTES: usize = 64 * 1024;

/// Repeats after a prime number of bytes, so that misplaced data is seen.
static PATTERN: LazyLock<Bytes> = LazyLock::new(|| {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes = (0..1_048_583).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    });
    bytes.collect()
});

/// A slice of the pattern from stream offset `offset`: at most `bytes_max`, at least one byte.
fn pattern(offset: u64, bytes_max: usize) -> Bytes {
    let start = (offset % PATTERN.len() as u64) as usize;
    PATTERN.slice(start..PATTERN.len().min(start + bytes_max))
}

/// Aborts the process if dropped too late: a hang is a failure, not a long run.
pub struct Watchdog(std::sync::mpsc::Sender<()>);

impl Watchdog {
    /// Starts the clock.
    #[must_use]
    pub fn new(what: &'static str, limit: Duration) -> Self {
        let (alive, end) = channel();
        thread::spawn(move || {
            if end.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                // Past the capture, which the abort would take along.
                let _ = std::io::Write::write_fmt(
                    &mut std::io::stderr(),
                    format_args!("{what} hangs: not over after {limit:?}\n"),
                );
                std::process::abort();
            }
        });
        Self(alive)
    }
}

/// Builds a server in a namespace.
///
/// # Errors
/// What the engine's start says.
pub fn start_server(address: Ipv6Addr, builder: Builder) -> Result<Engine, StartError> {
    let names = IdentityNames::new().with_ipv6(address);
    let identity = RotatingIdentity::self_signed(names).start().expect("a certificate");
    let tls = ServerTls::builder().identity(identity).alpn([ALPN]).build().expect("TLS");
    builder.server(tls.crypto()).start()
}

/// Builds a client in a namespace.
///
/// # Errors
/// What the engine's start says.
pub fn start_client(builder: Builder) -> Result<Engine, StartError> {
    let tls = ClientTls::builder().alpn([ALPN]).danger_accept_any_server_certificate();
    builder.client(tls.build().expect("TLS").crypto()).start()
}

/// What an end of the transfer says: the bytes it carried, or the error as the application reads it.
pub type Outcome = Result<u64, String>;

/// A running download.
pub struct Transfer {
    pub server: Arc<Engine>,
    pub client: Arc<Engine>,
    pub connection: Connection,
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    ends: [(Receiver<Outcome>, JoinHandle<()>); 2],
}

impl Transfer {
    /// Connects and starts the download.
    #[must_use]
    pub fn start(server: Engine, client: Engine) -> Self {
        Self::start_to(server.local_addr(), server, client)
    }

    /// The same through a relay at `address`.
    #[must_use]
    pub fn start_to(address: SocketAddrV6, server: Engine, client: Engine) -> Self {
        let (server, client) = (Arc::new(server), Arc::new(client));
        let (received, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let sender = spawn_end({
            let (server, stop) = (server.clone(), stop.clone());
            move || pollster::block_on(serve(&server, &stop))
        });
        let name = address.ip().to_string();
        let remote = SocketAddrV6::new(*address.ip(), address.port(), 0, address.scope_id());
        let connection = pollster::block_on(client.connect(remote, &name));
        let connection = connection.unwrap_or_else(|error| panic!("no connection: {error}"));
        let reader = spawn_end({
            let (connection, received) = (connection.clone(), received.clone());
            move || pollster::block_on(download(&connection, &received))
        });
        Self { server, client, connection, received, stop, ends: [sender, reader] }
    }

    /// Bytes received and found right.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// Waits until `bytes` more have arrived.
    ///
    /// # Panics
    /// If that takes longer than `limit`.
    pub fn advance(&self, bytes: u64, limit: Duration) {
        let target = self.received() + bytes;
        let start = Instant::now();
        wait_until("the transfer goes on", limit, || {
            if let Some(reason) = self.connection.close_reason() {
                panic!("the connection ended after {:?}: {reason}", start.elapsed());
            }
            self.received() >= target
        });
    }

    /// Ends the stream and waits: what the server and the client say.
    ///
    /// # Panics
    /// If an end does not come to an end.
    pub fn finish(self) -> [Outcome; 2] {
        self.stop.store(true, Relaxed);
        let mut engines = vec![self.server, self.client];
        drop(self.connection);
        let outcomes = self.ends.map(|(outcome, thread)| {
            let outcome = outcome.recv_timeout(END_LIMIT).expect("an end of the transfer hangs");
            thread.join().expect("it said its outcome");
            outcome
        });
        for engine in engines.drain(..) {
            let engine = Arc::into_inner(engine).expect("the transfer's threads have ended");
            engine.shutdown_blocking(Duration::ZERO, VarInt::from_u32(0), b"test over");
        }
        outcomes
    }

    /// As [`finish`](Self::finish), where all must have arrived; returns the bytes.
    ///
    /// # Panics
    /// If the transfer failed or the ends disagree.
    pub fn finish_intact(self) -> u64 {
        let [sent, received] = self.finish();
        let sent = sent.unwrap_or_else(|error| panic!("the server: {error}"));
        let received = received.unwrap_or_else(|error| panic!("the client: {error}"));
        assert_eq!(sent, received, "every byte sent has arrived");
        received
    }
}

fn spawn_end(
    end: impl FnOnce() -> Outcome + Send + 'static,
) -> (Receiver<Outcome>, JoinHandle<()>) {
    let (sender, outcome) = channel();
    let thread = thread::spawn(move || {
        // Dropped by its receiver only when the test has failed already.
        let _test_is_gone = sender.send(end());
    });
    (outcome, thread)
}

async fn serve(server: &Engine, stop: &AtomicBool) -> Outcome {
    let incoming = server.accept().await.ok_or("the server's engine ended")?;
    let connection = incoming.accept().await.map_err(|error| error.to_string())?;
    let (mut send, mut recv) = connection.accept_bi().await.map_err(|error| error.to_string())?;
    recv.read_to_end(16).await.map_err(|error| error.to_string())?;
    let mut sent = 0;
    while !stop.load(Relaxed) {
        let chunk = pattern(sent, CHUNK_BYTES);
        sent += chunk.len() as u64;
        send.write_chunk(chunk).await.map_err(|error| error.to_string())?;
    }
    send.finish().map_err(|error| error.to_string())?;
    // The client closes when it has everything; an earlier end is an error.
    match connection.closed().await {
        stoq::error::ConnectionError::ClosedByPeer { .. } => Ok(sent),
        other => Err(other.to_string()),
    }
}

async fn download(connection: &Connection, received: &AtomicU64) -> Outcome {
    let (mut send, mut recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
    send.write_all(b"go").await.map_err(|error| error.to_string())?;
    send.finish().map_err(|error| error.to_string())?;
    let mut offset = 0;
    while let Some(mut chunk) = recv.read_chunk(1 << 20).await.map_err(|error| error.to_string())? {
        while !chunk.is_empty() {
            let expected = pattern(offset, chunk.len());
            let part = chunk.split_to(expected.len());
            if part != expected {
                return Err(format!("wrong bytes behind offset {offset}"));
            }
            offset += part.len() as u64;
        }
        received.store(offset, Relaxed);
    }
    connection.close(VarInt::from_u32(0), b"all here");
    Ok(offset)
}

/// Checks that no XDP program is left on a device.
///
/// # Panics
/// If one is.
pub fn assert_interface_clean(netns: &Netns, device: &str) {
    let link = netns.ip(&format!("-d link show dev {device}"));
    assert!(!link.contains("xdp"), "an XDP program is left behind: {link}");
}
