//! quinn as a peer to compare with: one bulk stream from a server to a client.
//!
//! One thread an end, pinned when asked; UDP GSO and GRO (quinn's default), windows of 32 MiB,
//! large socket buffers, aws-lc-rs, and the same cap of the UDP payload as `stoq --udp-payload`.

use std::net::{SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use clap::{Args, Parser, Subcommand};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, EndpointConfig, MtuDiscoveryConfig, TokioRuntime, TransportConfig, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

const WINDOW_BYTES: u32 = 32 << 20;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
const CHUNK_BYTES: usize = 256 << 10;
const ALPN: &[u8] = b"bulk";
/// Traffic before the clock starts: slow start and path MTU discovery.
const WARM_UP: Duration = Duration::from_millis(500);

/// Bulk transfer by quinn.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sends to whoever opens a stream.
    Serve(Serve),
    /// Receives for a while and prints one JSON object.
    Download(Download),
}

#[derive(Args)]
struct Common {
    /// Core to run on.
    #[arg(long)]
    core: Option<usize>,
    /// Largest UDP payload, bytes.
    #[arg(long, default_value_t = 1452)]
    udp_payload: u16,
}

#[derive(Args)]
struct Serve {
    /// Address and port.
    #[arg(long)]
    listen: SocketAddrV6,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Download {
    /// The server.
    #[arg(long)]
    connect: SocketAddrV6,
    /// How long to measure, seconds.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    #[command(flatten)]
    common: Common,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let (Command::Serve(Serve { common, .. }) | Command::Download(Download { common, .. })) =
        &cli.command;
    if let Some(id) = common.core {
        let pinned = core_affinity::set_for_current(core_affinity::CoreId { id });
        anyhow::ensure!(pinned, "core {id} cannot be used");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match cli.command {
        Command::Serve(args) => runtime.block_on(serve(args)),
        Command::Download(args) => runtime.block_on(download(args)),
    }
}

/// AES-128-GCM, as STOQ prefers.
fn provider() -> Arc<CryptoProvider> {
    use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
    let cipher_suites = vec![cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..default_provider() })
}

fn transport(udp_payload: u16) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(udp_payload);
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .receive_window(VarInt::from_u32(WINDOW_BYTES))
        .send_window(WINDOW_BYTES.into())
        .mtu_discovery_config(Some(mtu));
    Arc::new(transport)
}

fn endpoint(
    local: SocketAddr,
    common: &Common,
    server: Option<quinn::ServerConfig>,
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
    config.max_udp_payload_size(common.udp_payload.max(1472))?;
    Ok(Endpoint::new(config, server, socket, Arc::new(TokioRuntime))?)
}

async fn serve(args: Serve) -> anyhow::Result<()> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let key =
        PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport(args.common.udp_payload));
    let endpoint = endpoint(args.listen.into(), &args.common, Some(config))?;
    eprintln!("listening on {}", endpoint.local_addr()?);
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(async move {
            if let Err(error) = send(incoming).await {
                eprintln!("quinn-peer: {error:#}");
            }
        });
    }
    Ok(())
}

/// Sends until the client stops the stream or closes.
async fn send(incoming: quinn::Incoming) -> anyhow::Result<()> {
    let connection = incoming.await?;
    let (mut send, mut recv) = connection.accept_bi().await?;
    recv.read_to_end(64).await?;
    let filler = Bytes::from(vec![0x5a; CHUNK_BYTES]);
    loop {
        match send.write_chunk(filler.clone()).await {
            Ok(()) => {}
            Err(quinn::WriteError::Stopped(_) | quinn::WriteError::ConnectionLost(_)) => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn download(args: Download) -> anyhow::Result<()> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate))
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport(args.common.udp_payload));
    let any = "[::]:0".parse().expect("an address");
    let endpoint = endpoint(any, &args.common, None)?;
    let connection = endpoint.connect_with(config, args.connect.into(), "localhost")?.await?;
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(b"go").await?;
    send.finish()?;
    receive(&mut recv, WARM_UP).await?;
    let start = Instant::now();
    let bytes = receive(&mut recv, Duration::from_secs_f64(args.seconds)).await?;
    let seconds = start.elapsed().as_secs_f64();
    let stats = connection.stats();
    connection.close(VarInt::from_u32(0), b"done");
    endpoint.wait_idle().await;
    println!(
        "{}",
        serde_json::json!({
            "event": "done", "workload": "download", "stack": "quinn", "seconds": seconds,
            "bytes": bytes, "goodput_bps": bytes as f64 * 8.0 / seconds,
            "udp_payload": stats.path.current_mtu, "packets_lost": stats.path.lost_packets,
        })
    );
    Ok(())
}

async fn receive(recv: &mut quinn::RecvStream, time: Duration) -> anyhow::Result<u64> {
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        let chunk = recv.read_chunk(usize::MAX, true).await?.context("the stream ended")?;
        bytes += chunk.bytes.len() as u64;
    }
    Ok(bytes)
}

/// Trusts whom it is told to measure.
#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("QUIC has no TLS 1.2".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
