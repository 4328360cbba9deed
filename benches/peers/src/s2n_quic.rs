//! s2n-quic as a peer to compare with: its default TLS (s2n-tls on AWS-LC), GSO and GRO.

use std::net::UdpSocket;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use clap::Parser as _;
use s2n_quic::client::Connect;
use s2n_quic::provider::datagram::default as datagram;
use s2n_quic::provider::io::tokio::Provider as Io;
use s2n_quic::provider::limits::Limits;
use s2n_quic::provider::tls::default as tls;
use s2n_quic::stream::{BidirectionalStream, ReceiveStream, SendStream};
use s2n_quic::{Client, Connection, Server};
use stoq_measure::idle::Idle;
use stoq_measure::peer::{self, Cli, Command, Common, Run, Serve, Workload};
use stoq_measure::window::Window;
use stoq_measure::wire::{
    ALPN, CHUNK_BYTES, CountReader, DatagramSink, ECHO_EVERY, SOCKET_BUFFER_BYTES, WINDOW_BYTES,
    asking_datagram, plain_datagram, read_head, request,
};
use stoq_peers::CertificateFiles;

const STACK: &str = "s2n-quic";
/// Bytes of IPv6 and UDP headers, which s2n-quic counts into its MTU.
const HEADER_BYTES: u16 = 48;
/// Its own upper bound of an MTU with GSO, bytes.
const MTU_MAX: u16 = 9001;
/// Datagrams that wait on either side.
const DATAGRAM_QUEUE: usize = 1000;
/// Streams that a client may have open at once.
const STREAMS_MAX: u64 = 1000;

fn any(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!("{error}")
}

fn main() -> anyhow::Result<()> {
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

fn mtu(common: &Common) -> u16 {
    common.udp_payload.saturating_add(HEADER_BYTES).min(MTU_MAX)
}

fn io(local: std::net::SocketAddr, common: &Common) -> anyhow::Result<Io> {
    let socket = UdpSocket::bind(local).with_context(|| format!("binding {local}"))?;
    socket.set_nonblocking(true)?;
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .is_err()
    {
        rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
    }
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
    let mtu = mtu(common);
    Ok(Io::builder().with_rx_socket(socket)?.with_max_mtu(mtu)?.build()?)
}

fn limits() -> anyhow::Result<Limits> {
    let window = u64::from(WINDOW_BYTES);
    Limits::new()
        .with_data_window(window)
        .and_then(|limits| limits.with_bidirectional_local_data_window(window))
        .and_then(|limits| limits.with_bidirectional_remote_data_window(window))
        .and_then(|limits| limits.with_max_open_remote_bidirectional_streams(STREAMS_MAX))
        .and_then(|limits| limits.with_max_send_buffer_size(WINDOW_BYTES))
        .map_err(any)
}

fn datagrams_endpoint() -> anyhow::Result<datagram::Endpoint> {
    let builder = datagram::Endpoint::builder();
    let builder = builder.with_send_capacity(DATAGRAM_QUEUE).map_err(any)?;
    builder.with_recv_capacity(DATAGRAM_QUEUE).map_err(any)?.build().map_err(any)
}

async fn serve(args: Serve) -> anyhow::Result<()> {
    let files = CertificateFiles::create()?;
    let (certificate, key) =
        (std::fs::read_to_string(files.certificate())?, std::fs::read_to_string(files.key())?);
    let mut tls = tls::Server::builder();
    // Its default has no post-quantum group; everybody agrees on the same key exchange here.
    tls.config_mut().set_security_policy(&s2n_tls::security::DEFAULT_PQ).map_err(any)?;
    let tls = tls
        .with_certificate(certificate.as_str(), key.as_str())
        .map_err(any)?
        .with_application_protocols([ALPN].iter())
        .map_err(any)?
        .build()
        .map_err(any)?;
    let mut server = Server::builder()
        .with_tls(tls)?
        .with_io(io(args.listen.into(), &args.common)?)?
        .with_limits(limits()?)?
        .with_datagram(datagrams_endpoint()?)?
        .start()
        .map_err(any)?;
    let settings = format!(
        "UDP GSO and GRO, windows of {} MiB, MTU up to {}, Cubic, tokio with a thread a core; s2n-tls (client: rustls), AES-128-GCM, X25519MLKEM768",
        WINDOW_BYTES >> 20,
        mtu(&args.common)
    );
    peer::announce(STACK, server.local_addr().map_err(any)?, &settings);
    drop(files);
    while let Some(connection) = server.accept().await {
        tokio::spawn(answer_all(connection));
    }
    Ok(())
}

/// Serves a connection until its client ends it.
async fn answer_all(mut connection: Connection) {
    let handle = connection.handle();
    tokio::spawn(echo_datagrams(handle));
    while let Ok(Some(stream)) = connection.accept_bidirectional_stream().await {
        tokio::spawn(answer(stream));
    }
}

async fn echo_datagrams(handle: s2n_quic::connection::Handle) {
    let mut sink = DatagramSink::default();
    while let Ok(datagram) = receive_datagram(&handle).await {
        if let Some(echo) = sink.handle(&datagram) {
            let echo = Bytes::copy_from_slice(&echo);
            // Echoes may be lost like any datagram.
            let _may_be_lost =
                handle.datagram_mut(|sender: &mut datagram::Sender| sender.send_datagram(echo));
        }
    }
}

async fn receive_datagram(handle: &s2n_quic::connection::Handle) -> anyhow::Result<Bytes> {
    std::future::poll_fn(|cx| {
        match handle
            .datagram_mut(|receiver: &mut datagram::Receiver| receiver.poll_recv_datagram(cx))
        {
            Ok(poll) => poll.map_err(any),
            Err(error) => std::task::Poll::Ready(Err(any(error))),
        }
    })
    .await
}

async fn answer(stream: BidirectionalStream) -> anyhow::Result<()> {
    let (mut recv, mut send) = stream.split();
    let mut reader = CountReader::default();
    while reader.count().is_none() {
        let Some(bytes) = recv.receive().await? else { return Ok(()) };
        reader.take(&bytes);
    }
    let count = reader.count().context("the count has been read")?;
    let discarding =
        tokio::spawn(async move { while let Ok(Some(_discarded)) = recv.receive().await {} });
    let filler = Bytes::from(vec![0x5a; count.min(CHUNK_BYTES as u64) as usize]);
    let mut left = count;
    while left > 0 {
        let len = left.min(filler.len() as u64);
        send.send(filler.slice(..len as usize)).await?;
        left -= len;
    }
    send.finish()?;
    Ok(discarding.await?)
}

type Shared = Arc<Mutex<Window>>;

fn lock(window: &Shared) -> MutexGuard<'_, Window> {
    window.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client over rustls, because s2n-tls trusts any certificate only by an unsafe call; s2n-quic
/// seals packets the same way under both.
// The constructor that is not deprecated takes no verifier.
#[allow(deprecated)]
fn client_tls() -> anyhow::Result<s2n_quic::provider::tls::rustls::Client> {
    Ok(s2n_quic::provider::tls::rustls::Client::new(stoq_peers::client_tls()?))
}

async fn connect(client: &Client, args: &Run) -> anyhow::Result<Connection> {
    let target =
        Connect::new(std::net::SocketAddr::from(args.connect)).with_server_name("localhost");
    client.connect(target).await.context("connecting")
}

async fn run(args: Run) -> anyhow::Result<()> {
    let any_address = "[::]:0".parse().context("an address")?;
    let client = Client::builder()
        .with_tls(client_tls()?)?
        .with_io(io(any_address, &args.common)?)?
        .with_limits(limits()?)?
        .with_datagram(datagrams_endpoint()?)?
        .start()
        .map_err(any)?;
    match args.workload {
        Workload::Idle => return idle(&client, &args).await,
        // Its s2n-tls gives out session tickets only by a key that its builder does not take.
        Workload::HandshakesResumed => {
            peer::unsupported(
                STACK,
                args.workload,
                "its default TLS server issues no session tickets",
            );
            return Ok(());
        }
        _ => {}
    }
    let window: Shared = Arc::new(Mutex::new(Window::new(&args)));
    if args.workload == Workload::Handshakes {
        handshakes(&client, &args, &window).await?;
    } else {
        let mut tasks = Vec::new();
        for _ in 0..args.connections {
            let connection = connect(&client, &args).await?;
            tasks.push(tokio::spawn(one(connection, args.clone(), window.clone())));
        }
        for task in tasks {
            task.await??;
        }
    }
    let window = std::mem::replace(&mut *lock(&window), Window::new(&args));
    window.finish(STACK)
}

/// One connection's part of a workload.
async fn one(mut connection: Connection, args: Run, window: Shared) -> anyhow::Result<()> {
    match args.workload {
        Workload::Requests => requests(&connection, &args, &window).await?,
        Workload::Datagrams => datagrams(&connection, args.size, &window).await?,
        workload => {
            let stream = connection.open_bidirectional_stream().await?;
            bulk(stream, workload, &window).await?;
        }
    }
    connection.close(0u32.into());
    Ok(())
}

/// Connections that do nothing.
async fn idle(client: &Client, args: &Run) -> anyhow::Result<()> {
    let idle = Idle::before(args)?;
    let mut connections = Vec::new();
    for _ in 0..args.connections {
        let mut connection = connect(client, args).await?;
        // It ends connections without streams unless told.
        connection.keep_alive(true)?;
        connections.push(connection);
    }
    let holding = idle.hold()?;
    while !holding.is_over() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for connection in &mut connections {
        connection.ping().context("a connection ended while it was held")?;
    }
    holding.finish(STACK)
}

async fn bulk(
    stream: BidirectionalStream,
    workload: Workload,
    window: &Shared,
) -> anyhow::Result<()> {
    let (mut recv, mut send): (ReceiveStream, SendStream) = stream.split();
    let count: u64 = if workload.receives() { u64::MAX >> 2 } else { 0 };
    send.send(Bytes::copy_from_slice(&count.to_be_bytes())).await?;
    let sending = async {
        if !workload.sends() {
            send.finish()?;
            return std::future::pending().await;
        }
        let filler = Bytes::from(vec![0x5a; CHUNK_BYTES]);
        loop {
            send.send(filler.clone()).await?;
            let mut window = lock(window);
            window.add_bytes(filler.len() as u64);
            if !window.tick()? {
                return anyhow::Ok(());
            }
        }
    };
    let receiving = async {
        while workload.receives() {
            let bytes = recv.receive().await?.context("the stream ended")?;
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
            let (mut handle, window) = (connection.handle(), window.clone());
            let request = request.clone();
            tokio::spawn(async move {
                loop {
                    let start = Instant::now();
                    let stream = handle.open_bidirectional_stream().await?;
                    let (mut recv, mut send) = stream.split();
                    send.send(request.clone()).await?;
                    send.finish()?;
                    let mut bytes = request.len() as u64;
                    while let Some(answer) = recv.receive().await? {
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

async fn handshakes(client: &Client, args: &Run, window: &Shared) -> anyhow::Result<()> {
    let tasks: Vec<_> = (0..args.outstanding)
        .map(|_| {
            let (client, args, window) = (client.clone(), args.clone(), window.clone());
            tokio::spawn(async move {
                loop {
                    let start = Instant::now();
                    let connection = connect(&client, &args).await?;
                    let latency = start.elapsed();
                    connection.close(0u32.into());
                    let mut window = lock(&window);
                    window.add_op(latency);
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

async fn datagrams(connection: &Connection, size: usize, window: &Shared) -> anyhow::Result<()> {
    let handle = connection.handle();
    let epoch = Instant::now();
    let sending = async {
        let mut sent = 0u64;
        let plain = plain_datagram(size).context("more than UDP carries")?;
        loop {
            let mut datagram = if sent.is_multiple_of(ECHO_EVERY) {
                Bytes::from(asking_datagram(size, epoch.elapsed().as_nanos() as u64))
            } else {
                Bytes::from_static(plain)
            };
            std::future::poll_fn(|cx| {
                match handle.datagram_mut(|sender: &mut datagram::Sender| {
                    sender.poll_send_datagram(&mut datagram, cx)
                }) {
                    Ok(poll) => poll.map_err(any),
                    Err(error) => std::task::Poll::Ready(Err(any(error))),
                }
            })
            .await?;
            sent += 1;
            if sent.is_multiple_of(ECHO_EVERY) {
                if !lock(window).tick()? {
                    return anyhow::Ok(());
                }
                tokio::task::yield_now().await;
            }
        }
    };
    let receiving = async {
        let mut delivered = 0;
        loop {
            let echo = receive_datagram(&handle).await?;
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
