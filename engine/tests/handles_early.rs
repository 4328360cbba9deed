//! 0-RTT with the async handles: early data arrives as such, refused data is told, nothing leaks.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use pair::{NAME, Watchdog, config, counters, wait_for};
use pollster::block_on;
use stoq::VarInt;
use stoq::certs::{ClientTls, IdentityNames, RotatingIdentity, ServerTls};
use stoq::config::TransportConfig;
use stoq::connection::Connection;
use stoq::engine::{Connecting, Engine};
use stoq::error::{ConnectionError, ReadError, ResetError, WriteError};

/// How long early data has to leave before the server accepts the client: data that is written when
/// the handshake has ended is not early any more. Shorter than the client's first PTO.
const EARLY_HEAD_START: Duration = Duration::from_millis(300);

struct Early {
    identity: Arc<RotatingIdentity>,
    server: Engine,
    client: Engine,
}

fn early_config() -> TransportConfig {
    TransportConfig { zero_rtt: true, ..config() }
}

fn server_tls(identity: &Arc<RotatingIdentity>) -> ServerTls {
    let tls = ServerTls::builder().identity(identity.clone()).alpn(["stoq-test"]);
    tls.early_data(true).build().unwrap()
}

impl Early {
    fn new() -> Self {
        Self::with(early_config(), early_config())
    }

    fn with(server: TransportConfig, client: TransportConfig) -> Self {
        let names = IdentityNames::new().with_dns(NAME).unwrap();
        let identity = RotatingIdentity::self_signed(names).start().unwrap();
        let client_tls = ClientTls::builder()
            .alpn(["stoq-test"])
            .roots(identity.roots().to_vec())
            .early_data(true)
            .build()
            .unwrap();
        Self {
            server: Engine::builder()
                .config(server)
                .server(server_tls(&identity).crypto())
                .start()
                .unwrap(),
            client: Engine::builder().config(client).client(client_tls.crypto()).start().unwrap(),
            identity,
        }
    }

    fn connect(&self) -> Connecting {
        self.client.connect(self.server.local_addr(), NAME)
    }

    /// A whole connection, from which the client remembers a session.
    async fn remember(&self) {
        let accepting = async {
            // An attempt that was abandoned before may still knock.
            loop {
                if let Ok(server) = self.server.accept().await.unwrap().accept().await {
                    return server;
                }
            }
        };
        let (client, server) = join(self.connect(), accepting).await;
        let client = client.unwrap();
        let mut send = client.open_uni().await.unwrap();
        send.write_all(b"hello").await.unwrap();
        send.finish().unwrap();
        server.accept_uni().await.unwrap().read_to_end(100).await.unwrap();
        // Acknowledged after the tickets, which came before.
        assert_eq!(send.stopped().await.unwrap(), None);
        client.close(VarInt::from_u32(0), b"");
        server.closed().await;
    }

    /// The server's process is another one: the same address and certificate, no memory.
    fn restart_server(&mut self) {
        let config = TransportConfig { bind: self.server.local_addr(), ..early_config() };
        let idle =
            Engine::builder().config(early_config()).server(server_tls(&self.identity).crypto());
        drop(std::mem::replace(&mut self.server, idle.start().unwrap()));
        let tls = server_tls(&self.identity).crypto();
        self.server = Engine::builder().config(config).server(tls).start().unwrap();
    }

    fn wait_idle(&self) {
        for engine in [&self.server, &self.client] {
            wait_for("no connection is left", || counters(engine).connections == 0);
            assert_eq!(counters(engine).streams, 0, "streams left behind");
        }
    }
}

async fn ask(connection: &Connection, request: &'static [u8]) -> Result<Vec<u8>, ReadError> {
    let (mut send, mut recv) = connection.open_bi().await?;
    // A refusal shows on either half, whichever comes first.
    if send.write_all(request).await.is_ok() {
        let _shown_by_the_answer = send.finish();
    }
    match recv.read_to_end(100).await {
        Ok(answer) => Ok(answer),
        Err(stoq::error::ReadToEndError::Read(error)) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

/// Answers one request; whether it came early.
async fn answer(connection: &Connection) -> bool {
    let (mut send, mut recv) = connection.accept_bi().await.unwrap();
    let request = recv.read_to_end(100).await.unwrap();
    send.write_all(&request).await.unwrap();
    recv.is_0rtt()
}

#[test]
fn without_a_session_the_attempt_goes_on() {
    let _watchdog = Watchdog::new("no session");
    let early = Early::new();
    block_on(async {
        let connecting = early.connect().into_0rtt().await.expect_err("nothing is remembered");
        let accepting = async { early.server.accept().await.unwrap().accept().await.unwrap() };
        let (client, server) = join(connecting, accepting).await;
        let client = client.unwrap();
        let (answered, was_early) = join(ask(&client, b"x"), answer(&server)).await;
        assert_eq!((answered.unwrap().as_slice(), was_early), (&b"x"[..], false));
    });
    early.wait_idle();
}

#[test]
fn early_data_is_read_before_the_handshake_ends_and_marked() {
    let _watchdog = Watchdog::new("early data");
    let early = Early::new();
    block_on(async {
        early.remember().await;
        let Ok((client, accepted)) = early.connect().into_0rtt().await else {
            panic!("a session is remembered")
        };
        let (mut send, mut recv) = client.open_bi().await.unwrap();
        send.write_all(b"early").await.unwrap();
        send.finish().unwrap();
        // Nobody has accepted the client yet, so its handshake cannot end before this has left.
        std::thread::sleep(EARLY_HEAD_START);
        let (tell, told) = futures_channel::oneshot::channel();
        let asking = async {
            assert_eq!(recv.read_to_end(100).await.unwrap(), b"early");
            assert!(accepted.await, "the server took it");
            // What comes in one batch with the end of the handshake counts as early.
            told.await.unwrap();
            // Opened after the handshake: not early any more.
            assert_eq!(ask(&client, b"late").await.unwrap(), b"late");
            client.alpn()
        };
        let answering = async {
            let incoming = early.server.accept().await.unwrap();
            let Ok((server, done)) = incoming.accept().into_0rtt().await else {
                panic!("servers always can")
            };
            assert!(answer(&server).await, "it is told which data was early");
            assert!(done.await);
            assert!(server.alpn().is_some(), "known with the handshake");
            tell.send(()).unwrap();
            assert!(!answer(&server).await);
            server
        };
        let (alpn, _server) = join(asking, answering).await;
        assert_eq!(alpn.as_deref(), Some(&b"stoq-test"[..]));
    });
    early.wait_idle();
}

#[test]
fn a_server_that_waits_for_the_handshake_is_told_too() {
    let _watchdog = Watchdog::new("early data, late server");
    let early = Early::new();
    block_on(async {
        early.remember().await;
        let Ok((client, accepted)) = early.connect().into_0rtt().await else {
            panic!("a session is remembered")
        };
        let (mut send, mut recv) = client.open_bi().await.unwrap();
        send.write_all(b"early").await.unwrap();
        send.finish().unwrap();
        std::thread::sleep(EARLY_HEAD_START);
        let answering = async {
            let server = early.server.accept().await.unwrap().accept().await.unwrap();
            assert!(answer(&server).await);
            server
        };
        let (answered, _server) = join(recv.read_to_end(100), answering).await;
        assert_eq!(answered.unwrap(), b"early");
        assert!(accepted.await);
    });
    early.wait_idle();
}

#[test]
fn refused_early_data_is_told_on_every_handle_and_the_connection_stands() {
    let _watchdog = Watchdog::new("refused early data");
    let mut early = Early::new();
    block_on(early.remember());
    early.restart_server();
    block_on(async {
        let Ok((client, accepted)) = early.connect().into_0rtt().await else {
            panic!("a session is remembered")
        };
        let (mut send, mut recv) = client.open_bi().await.unwrap();
        send.write_all(b"void").await.unwrap();
        let mut finished = client.open_uni().await.unwrap();
        finished.write_chunk(Bytes::from_static(b"void")).await.unwrap();
        finished.finish().unwrap();
        let server = early.server.accept().await.unwrap().accept();
        let (accepted, server) = join(accepted, server).await;
        let server = server.unwrap();
        assert!(!accepted, "another server has no such session");
        assert_eq!(send.write(b"x").await, Err(WriteError::ZeroRttRejected));
        assert_eq!(send.stopped().await, Err(ConnectionError::EarlyDataRejected));
        assert_eq!(recv.received_reset().await, Err(ResetError::ZeroRttRejected));
        assert_eq!(recv.read_chunk(1).await, Err(ReadError::ZeroRttRejected));
        assert_eq!(finished.stopped().await, Err(ConnectionError::EarlyDataRejected));
        assert!(!finished.is_acknowledged());
        // What is sent again is all that the server sees, under ids that are used again.
        let (answered, was_early) = join(ask(&client, b"again"), answer(&server)).await;
        assert_eq!((answered.unwrap().as_slice(), was_early), (&b"again"[..], false));
        drop((send, recv, finished));
        assert_eq!(ask_and_answer(&client, &server).await, b"still here");
    });
    early.wait_idle();
}

async fn ask_and_answer(client: &Connection, server: &Connection) -> Vec<u8> {
    join(ask(client, b"still here"), answer(server)).await.0.unwrap()
}

#[test]
fn without_the_setting_nothing_is_sent_early() {
    let _watchdog = Watchdog::new("zero_rtt off");
    let early = Early::with(early_config(), config());
    block_on(async {
        early.remember().await;
        assert!(early.connect().into_0rtt().await.is_err());
    });
    early.wait_idle();
}

#[test]
fn handles_dropped_at_every_stage_close_and_leave_nothing() {
    let _watchdog = Watchdog::new("early handles dropped");
    let early = Early::new();
    for round in 0..6 {
        block_on(early.remember());
        let connecting = early.connect();
        if round == 0 {
            drop(connecting);
            early.wait_idle();
            continue;
        }
        let Ok((client, accepted)) = block_on(connecting.into_0rtt()) else {
            panic!("round {round}: a session is remembered")
        };
        match round {
            1 => drop((client, accepted)),
            2 => drop((accepted, client)),
            3 => {
                // The future is of no concern to the connection.
                drop(accepted);
                let server =
                    block_on(async { early.server.accept().await.unwrap().accept().await });
                let (answered, _) = block_on(join(ask(&client, b"x"), async {
                    answer(server.as_ref().unwrap()).await
                }));
                assert_eq!(answered.unwrap(), b"x");
            }
            4 => {
                // A stream keeps the connection.
                let mut send = block_on(client.open_uni()).unwrap();
                drop((client, accepted));
                let server = block_on(async {
                    let incoming = early.server.accept().await.unwrap();
                    incoming.accept().into_0rtt().await.map_err(drop).unwrap().0
                });
                block_on(send.write_all(b"kept")).unwrap();
                send.finish().unwrap();
                let mut recv = block_on(server.accept_uni()).unwrap();
                let (read, end) = block_on(join(recv.read_to_end(10), send.stopped()));
                assert_eq!((read.unwrap().as_slice(), end), (&b"kept"[..], Ok(None)));
            }
            _ => {
                // The server gives up in the middle of the handshake.
                let incoming = block_on(early.server.accept()).unwrap();
                drop(block_on(incoming.accept().into_0rtt()));
                assert!(matches!(
                    block_on(client.closed()),
                    ConnectionError::ClosedByPeer { .. } | ConnectionError::AbortedByPeer(_)
                ));
            }
        }
        // Rounds that answered nobody: whoever still knocks is refused.
        while let Some(Some(incoming)) = pair_poll(early.server.accept()) {
            incoming.refuse();
        }
        early.wait_idle();
    }
}

fn pair_poll<F: Future>(future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut cx) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}
