//! The perf protocol on quinn's API, which noq shares: one thread an end, UDP GSO and GRO, large
//! windows and socket buffers.

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use clap::Parser as _;
use stoq_measure::idle::Idle;
use stoq_measure::peer::{self, Cli, Command, Common, Run, Serve, Workload};
use stoq_measure::window::Window;
use stoq_measure::wire::{
    CHUNK_BYTES, CountReader, DatagramSink, ECHO_EVERY, SOCKET_BUFFER_BYTES, WINDOW_BYTES,
    asking_datagram, plain_datagram, read_head, request,
};

use super::q::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use super::q::{
    Connection, Endpoint, EndpointConfig, MtuDiscoveryConfig, RecvStream, SendStream, TokioRuntime,
    TransportConfig, VarInt,
};
use super::{STACK, chunk, path};

/// UDP payload above which a GSO batch of quinn exceeds 64 kB, which the kernel refuses.
const UDP_PAYLOAD_MAX: u16 = 6500;
/// Datagrams that wait for sending or for their reader, bytes.
const DATAGRAM_BUFFER_BYTES: usize = 1 << 20;

pub(super) fn main() -> anyhow::Result<()> {
    peer::tie_to_parent()?;
    let cli = Cli::parse();
    let (Command::Serve(Serve { common, .. }) | Command::Run(Run { common, .. })) = &cli.command;
    common.pin()?;
    let runtime = stoq_peers::runtime(common.threads())?;
    match cli.command {
        Command::Serve(args) => runtime.block_on(serve(args)),
        Command::Run(args) => runtime.block_on(run(args)),
    }
}

fn udp_payload(common: &Common) -> u16 {
    common.udp_payload.min(UDP_PAYLOAD_MAX)
}

fn transport(common: &Common) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(udp_payload(common));
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .receive_window(VarInt::from_u32(WINDOW_BYTES))
        .send_window(WINDOW_BYTES.into())
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES))
        .datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES)
        .mtu_discovery_config(Some(mtu));
    Arc::new(transport)
}

fn endpoint(
    local: SocketAddr,
    common: &Common,
    server: Option<super::q::ServerConfig>,
) -> anyhow::Result<Endpoint> {
    let socket = UdpSocket::bind(local).with_context(|| format!("binding {local}"))?;
    // Beyond the system's limit where the privilege allows it, as STOQ does.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .is_err()
    {
        rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
    }
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(udp_payload(common).max(1472))?;
    Ok(Endpoint::new(config, server, socket, Arc::new(TokioRuntime))?)
}

async fn serve(args: Serve) -> anyhow::Result<()> {
    let tls = QuicServerConfig::try_from(stoq_peers::server_tls()?)?;
    let mut config = super::q::ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(transport(&args.common));
    let endpoint = endpoint(args.listen.into(), &args.common, Some(config))?;
    let settings = format!(
        "UDP GSO and GRO, windows of {} MiB, UDP payload up to {}, Cubic, tokio with a thread a core; {}",
        WINDOW_BYTES >> 20,
        udp_payload(&args.common),
        stoq_peers::RUSTLS_SETTINGS
    );
    peer::announce(STACK, endpoint.local_addr()?, &settings);
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(async move {
            // A client that ends its connection ends its task: nothing to report.
            if let Ok(connection) = incoming.await {
                tokio::spawn(echo_datagrams(connection.clone()));
                while let Ok((send, recv)) = connection.accept_bi().await {
                    tokio::spawn(answer(send, recv));
                }
            }
        });
    }
    Ok(())
}

async fn echo_datagrams(connection: Connection) {
    let mut sink = DatagramSink::default();
    while let Ok(datagram) = connection.read_datagram().await {
        if let Some(echo) = sink.handle(&datagram) {
            // Echoes may be lost like any datagram.
            let _may_be_lost = connection.send_datagram(Bytes::copy_from_slice(&echo));
        }
    }
}

/// One stream of the perf protocol; ends with the stream, whoever ends it.
async fn answer(mut send: SendStream, mut recv: RecvStream) -> anyhow::Result<()> {
    let mut reader = CountReader::default();
    while reader.count().is_none() {
        let Some(bytes) = chunk(&mut recv).await? else { return Ok(()) };
        reader.take(&bytes);
    }
    let count = reader.count().context("the count has been read")?;
    let discarding =
        tokio::spawn(async move { while let Ok(Some(_discarded)) = chunk(&mut recv).await {} });
    fill(&mut send, count).await?;
    send.finish()?;
    Ok(discarding.await?)
}

async fn fill(send: &mut SendStream, mut left: u64) -> anyhow::Result<()> {
    let filler = Bytes::from(vec![0x5a; left.min(CHUNK_BYTES as u64) as usize]);
    while left > 0 {
        let len = left.min(filler.len() as u64);
        send.write_chunk(filler.slice(..len as usize)).await?;
        left -= len;
    }
    Ok(())
}

type Shared = Arc<Mutex<Window>>;

fn lock(window: &Shared) -> MutexGuard<'_, Window> {
    window.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Client {
    endpoint: Endpoint,
    config: super::q::ClientConfig,
    run: Run,
}

impl Client {
    async fn connect(&self) -> anyhow::Result<Connection> {
        let config = self.config.clone();
        let connecting =
            self.endpoint.connect_with(config, self.run.connect.into(), "localhost")?;
        Ok(connecting.await?)
    }
}

async fn run(args: Run) -> anyhow::Result<()> {
    let (tls, sessions) = stoq_peers::client_tls_for(args.workload)?;
    let tls = QuicClientConfig::try_from(tls)?;
    let mut config = super::q::ClientConfig::new(Arc::new(tls));
    config.transport_config(transport(&args.common));
    let any = "[::]:0".parse().context("an address")?;
    let endpoint = endpoint(any, &args.common, None)?;
    let client = Client { endpoint, config, run: args.clone() };
    if args.workload == Workload::Idle {
        return idle(&client).await;
    }
    let mut connections = Vec::new();
    for _ in 0..if args.workload.is_handshakes() { 1 } else { args.connections } {
        connections.push(client.connect().await?);
    }
    if sessions.is_some() {
        ask(&connections[0]).await?;
    }
    let window: Shared = Arc::new(Mutex::new(Window::new(&args)));
    match args.workload {
        workload if workload.is_handshakes() => handshakes(&client, &window).await?,
        workload => {
            let mut tasks = Vec::new();
            for connection in &connections {
                let (connection, args, window) = (connection.clone(), args.clone(), window.clone());
                tasks.push(tokio::spawn(async move {
                    match workload {
                        Workload::Requests => requests(&connection, &args, &window).await,
                        Workload::Datagrams => datagrams(&connection, args.size, &window).await,
                        _ => bulk(&connection, workload, &window).await,
                    }
                }));
            }
            for task in tasks {
                task.await??;
            }
        }
    }
    stoq_peers::check_resumed(sessions.as_deref(), lock(&window).ops())?;
    let (udp_payload, _) = path(&connections[0]);
    let lost = connections.iter().map(|connection| path(connection).1).sum();
    lock(&window).set_path(udp_payload, lost);
    let window = std::mem::replace(&mut *lock(&window), Window::new(&args));
    window.finish(STACK)?;
    for connection in connections {
        connection.close(VarInt::from_u32(0), b"done");
    }
    // The server forgets us by itself; only give the close a chance to leave.
    let _elapsed =
        tokio::time::timeout(Duration::from_millis(200), client.endpoint.wait_idle()).await;
    Ok(())
}

/// Connections that do nothing.
async fn idle(client: &Client) -> anyhow::Result<()> {
    let idle = Idle::before(&client.run)?;
    let mut connections = Vec::new();
    for _ in 0..client.run.connections {
        connections.push(client.connect().await?);
    }
    let holding = idle.hold()?;
    while !holding.is_over() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let lost = connections.iter().find_map(|connection| connection.close_reason());
        anyhow::ensure!(lost.is_none(), "a connection ended: {lost:?}");
    }
    holding.finish(STACK)
}

/// One empty request: when it is answered, the tickets have come, too.
async fn ask(connection: &Connection) -> anyhow::Result<()> {
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_chunk(Bytes::from(request(0, 0))).await?;
    send.finish()?;
    while chunk(&mut recv).await?.is_some() {}
    Ok(())
}

async fn bulk(connection: &Connection, workload: Workload, window: &Shared) -> anyhow::Result<()> {
    let (mut send, mut recv) = connection.open_bi().await?;
    let count: u64 = if workload.receives() { u64::MAX >> 2 } else { 0 };
    send.write_all(&count.to_be_bytes()).await?;
    let sending = async {
        if !workload.sends() {
            send.finish()?;
            return std::future::pending().await;
        }
        let filler = Bytes::from(vec![0x5a; CHUNK_BYTES]);
        loop {
            send.write_chunk(filler.clone()).await?;
            let mut window = lock(window);
            window.add_bytes(filler.len() as u64);
            if !window.tick()? {
                return anyhow::Ok(());
            }
        }
    };
    let receiving = async {
        while workload.receives() {
            let bytes = chunk(&mut recv).await?.context("the stream ended")?;
            let mut window = lock(window);
            window.add_bytes(bytes.len() as u64);
            if !window.tick()? {
                return anyhow::Ok(());
            }
        }
        std::future::pending().await
    };
    tokio::select! { done = sending => done, done = receiving => done }
}

async fn requests(connection: &Connection, args: &Run, window: &Shared) -> anyhow::Result<()> {
    let request = Bytes::from(request(args.size, args.size as u64));
    let tasks: Vec<_> = (0..args.outstanding)
        .map(|_| {
            let (connection, window) = (connection.clone(), window.clone());
            let request = request.clone();
            tokio::spawn(async move {
                loop {
                    let start = Instant::now();
                    let (mut send, mut recv) = connection.open_bi().await?;
                    send.write_chunk(request.clone()).await?;
                    send.finish()?;
                    let mut bytes = request.len() as u64;
                    while let Some(answer) = chunk(&mut recv).await? {
                        bytes += answer.len() as u64;
                    }
                    let mut window = lock(&window);
                    window.add_op(start.elapsed());
                    window.add_bytes(bytes);
                    if !window.tick()? {
                        return anyhow::Ok(());
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    Ok(())
}

async fn handshakes(client: &Client, window: &Shared) -> anyhow::Result<()> {
    let resumed = client.run.workload == Workload::HandshakesResumed;
    let one_after_another = || async {
        loop {
            let start = Instant::now();
            let connection = client.connect().await?;
            let latency = start.elapsed();
            if resumed {
                ask(&connection).await?;
            }
            connection.close(VarInt::from_u32(0), b"");
            let mut window = lock(window);
            window.add_op(latency);
            if !window.tick()? {
                return anyhow::Ok(());
            }
        }
    };
    let all: Vec<_> = (0..client.run.outstanding).map(|_| Box::pin(one_after_another())).collect();
    join_all(all).await
}

/// Drives all to their ends, or to the first error.
async fn join_all<F: Future<Output = anyhow::Result<()>> + Unpin>(
    mut all: Vec<F>,
) -> anyhow::Result<()> {
    std::future::poll_fn(|cx| {
        let mut failed = None;
        all.retain_mut(|each| match std::pin::Pin::new(each).poll(cx) {
            std::task::Poll::Pending => true,
            std::task::Poll::Ready(result) => {
                failed = failed.take().or(result.err());
                false
            }
        });
        match failed {
            Some(error) => std::task::Poll::Ready(Err(error)),
            None if all.is_empty() => std::task::Poll::Ready(Ok(())),
            None => std::task::Poll::Pending,
        }
    })
    .await
}

async fn datagrams(connection: &Connection, size: usize, window: &Shared) -> anyhow::Result<()> {
    // Path MTU discovery comes first.
    let start = Instant::now();
    while connection.max_datagram_size().is_none_or(|fits| fits < size) {
        anyhow::ensure!(start.elapsed() < Duration::from_secs(5), "{size} bytes do not fit");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let epoch = Instant::now();
    let sending = async {
        let mut sent = 0u64;
        let plain = plain_datagram(size).context("more than UDP carries")?;
        loop {
            let datagram = if sent.is_multiple_of(ECHO_EVERY) {
                Bytes::from(asking_datagram(size, epoch.elapsed().as_nanos() as u64))
            } else {
                Bytes::from_static(plain)
            };
            connection.send_datagram_wait(datagram).await?;
            sent += 1;
            if sent.is_multiple_of(ECHO_EVERY) {
                if !lock(window).tick()? {
                    return anyhow::Ok(());
                }
                // The queue may never be full: the connection's task must run, too.
                tokio::task::yield_now().await;
            }
        }
    };
    let receiving = async {
        let mut delivered = 0;
        loop {
            let echo = connection.read_datagram().await?;
            let Some((_, time_ns, received)) = read_head(&echo) else { continue };
            let more = received.saturating_sub(delivered);
            delivered += more;
            let mut window = lock(window);
            window.add_ops(more);
            window.add_bytes(more * size as u64);
            window.add_latency(epoch.elapsed().saturating_sub(Duration::from_nanos(time_ns)));
        }
    };
    tokio::select! { done = sending => done, done = receiving => done }
}
