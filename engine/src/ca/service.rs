//! A CA that answers over STOQ: one thread beside an engine of its own.

use std::future::{Future, poll_fn};
use std::net::SocketAddrV6;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures_channel::oneshot;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use quinn_proto::VarInt;

use super::block_on::block_on;
use crate::certs::trustchain::{
    BODY_SIZE_BYTES_MAX, CodecError, FrameReader, Message, RefusalCode, TrustchainServer,
};
use crate::certs::{CertsError, ServerTls};
use crate::config::TransportConfig;
use crate::connection::Connection;
use crate::datapath::choice::DatapathChoice;
use crate::engine::{Engine, Incoming};
use crate::error::StartError;
use crate::stream::{RecvStream, SendStream};

/// Connections served at a time; further clients wait, and try again when their handshake times out.
pub const CONNECTIONS_MAX: usize = 256;
/// Age at which a client's connection ends: a request takes far less, and a slow or silent client
/// keeps its place no longer.
const CONNECTION_AGE_MS_MAX: u64 = 30_000;
const LENGTH_SIZE_BYTES: usize = 4;
/// What a connection may buffer: one request and one answer.
const WINDOW_BYTES: u64 = 256 << 10;
/// How long requests under way may go on at the end.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// A running certificate service. Dropped, it ends.
#[derive(Debug)]
pub struct CaService {
    local: SocketAddrV6,
    metrics: Option<SocketAddrV6>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl CaService {
    /// Serves on `bind`. `tls` must have the application protocol
    /// [`TRUSTCHAIN_ALPN`](crate::certs::trustchain::TRUSTCHAIN_ALPN) and verify clients that show a
    /// certificate against the CA's root and revocation list
    /// ([`ClientAuth::Optional`](crate::certs::ClientAuth::Optional)).
    ///
    /// # Errors
    /// The address is taken, or the system refused a thread.
    pub fn start(
        bind: SocketAddrV6,
        tls: &ServerTls,
        server: Arc<TrustchainServer>,
    ) -> Result<Self, StartError> {
        Self::start_with_metrics(bind, None, tls, server)
    }

    /// As [`Self::start`], with Prometheus text over HTTP on `metrics` (`/metrics`): what the service
    /// refused (`stoq_certificate_faults_total{by="trustchain"}`), which clients failed their handshake
    /// (`by="server"`), how its own certificate fares, and the transport's counters.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with_metrics(
        bind: SocketAddrV6,
        metrics: Option<SocketAddrV6>,
        tls: &ServerTls,
        server: Arc<TrustchainServer>,
    ) -> Result<Self, StartError> {
        let engine = Engine::builder()
            .config(TransportConfig { metrics_address: metrics, ..transport(bind) })
            .server(tls.crypto())
            .rotation(tls.identity().clone())
            .faults("server", tls.faults().clone())
            .faults("trustchain", server.faults().clone())
            .start()?;
        let (local, metrics) = (engine.local_addr(), engine.metrics_addr());
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("stoq-ca".to_owned())
            .spawn(move || {
                block_on(serve(&engine, &server, stopped), None);
                engine.shutdown_blocking(SHUTDOWN_GRACE, VarInt::from_u32(0), b"the CA stops");
            })
            .map_err(|source| StartError::System { what: "thread for the CA service", source })?;
        Ok(Self { local, metrics, stop: Some(stop), thread: Some(thread) })
    }

    /// The address that it is bound to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddrV6 {
        self.local
    }

    /// Where metrics are served, if they are.
    #[must_use]
    pub fn metrics_addr(&self) -> Option<SocketAddrV6> {
        self.metrics
    }

    /// Whether it serves; it ends by itself only when its engine does.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for CaService {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Refused only if the thread has ended already.
            let _ended = stop.send(());
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the CA service's thread panicked");
        }
    }
}

fn transport(bind: SocketAddrV6) -> TransportConfig {
    TransportConfig {
        bind,
        datapath: DatapathChoice::Socket,
        spin_us: 0,
        idle_timeout_ms: 10_000,
        connection_age_ms_max: CONNECTION_AGE_MS_MAX,
        connections_per_shard_max: 2 * CONNECTIONS_MAX,
        incoming_max: CONNECTIONS_MAX,
        max_concurrent_streams: 1,
        max_datagram_size: 0,
        send_buffer_size: WINDOW_BYTES,
        receive_buffer_size: WINDOW_BYTES,
        stream_receive_buffer_size: WINDOW_BYTES,
        connection_pool_size: 0,
        ..TransportConfig::default()
    }
}

/// What the service waits for.
enum Step {
    Stop,
    EngineEnded,
    Client(Incoming),
    ClientDone,
}

/// Serves clients side by side until told to stop.
async fn serve(engine: &Engine, server: &TrustchainServer, mut stop: oneshot::Receiver<()>) {
    let mut clients = FuturesUnordered::new();
    loop {
        let has_room = clients.len() < CONNECTIONS_MAX;
        let step = {
            let mut accept = pin!(engine.accept());
            poll_fn(|cx| {
                if Pin::new(&mut stop).poll(cx).is_ready() {
                    return Poll::Ready(Step::Stop);
                }
                // An empty set is at its end at once: then only a client can be next.
                if let Poll::Ready(Some(())) = clients.poll_next_unpin(cx) {
                    return Poll::Ready(Step::ClientDone);
                }
                if !has_room {
                    return Poll::Pending;
                }
                accept.as_mut().poll(cx).map(|incoming| match incoming {
                    Some(incoming) => Step::Client(incoming),
                    None => Step::EngineEnded,
                })
            })
            .await
        };
        match step {
            Step::Stop => return,
            Step::EngineEnded => {
                tracing::error!("the CA service's engine ended by itself");
                return;
            }
            Step::Client(incoming) => clients.push(serve_client(incoming, server)),
            Step::ClientDone => {}
        }
    }
}

async fn serve_client(incoming: Incoming, server: &TrustchainServer) {
    let remote = incoming.remote_address();
    let connection = match incoming.accept().await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::info!(%remote, %error, "trustchain: a client's handshake failed");
            return;
        }
    };
    // Until the client closes, or its connection reaches its age.
    while let Ok((send, recv)) = connection.accept_bi().await {
        if let Err(error) = answer(&connection, server, send, recv).await {
            tracing::info!(%remote, %error, "trustchain: a request ended early");
            return;
        }
    }
}

/// Reads one request and writes its answer.
async fn answer(
    connection: &Connection,
    server: &TrustchainServer,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<(), Box<dyn std::error::Error>> {
    let bytes = recv.read_to_end(BODY_SIZE_BYTES_MAX + LENGTH_SIZE_BYTES).await?;
    let request = FrameReader::default().handle_bytes(&bytes);
    let answer = match request.and_then(|message| message.ok_or(CodecError::Truncated)) {
        Ok(request) => server.handle_request(&request, connection.peer_identity().as_ref()),
        Err(error) => Message::Refused { code: RefusalCode::Invalid, reason: error.to_string() },
    };
    let frame = answer.encode().map_err(|error| CertsError::Configuration(error.to_string()))?;
    send.write_chunk(Bytes::from(frame)).await?;
    send.finish()?;
    Ok(())
}
