//! What the peers of `stoq compare` share: TLS by rustls, the perf protocol for state machines,
//! UDP sockets.

pub mod ktls;
pub mod streams;
#[cfg(any(feature = "quiche", feature = "tquic"))]
pub mod udp;

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use stoq_measure::peer::Workload;
use stoq_measure::sessions::CountingSessions;
use stoq_measure::wire::ALPN;

/// tokio with so many threads; one is the current thread.
///
/// # Errors
/// The system refuses a thread.
#[cfg(any(feature = "quinn", feature = "noq", feature = "s2n-quic"))]
pub fn runtime(threads: usize) -> std::io::Result<tokio::runtime::Runtime> {
    use tokio::runtime::Builder;
    match threads {
        1 => Builder::new_current_thread().enable_all().build(),
        _ => Builder::new_multi_thread().worker_threads(threads).enable_all().build(),
    }
}

/// What rustls-based peers say about their cryptography.
pub const RUSTLS_SETTINGS: &str = "rustls, aws-lc-rs, AES-128-GCM, X25519MLKEM768";

/// AES-128-GCM only, as STOQ prefers.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
    let cipher_suites = vec![cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..default_provider() })
}

/// A certificate for `localhost` and its key (ECDSA P-256).
///
/// # Errors
/// rcgen refuses.
pub fn certificate() -> anyhow::Result<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let key =
        PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    Ok((made.cert.der().clone(), key))
}

/// The same in files, for C libraries; removed when dropped.
pub struct CertificateFiles {
    directory: std::path::PathBuf,
}

impl CertificateFiles {
    /// Writes them.
    ///
    /// # Errors
    /// The temporary directory cannot be written.
    pub fn create() -> anyhow::Result<Self> {
        let name = format!("stoq-peer-{}", std::process::id());
        let files = Self { directory: std::env::temp_dir().join(name) };
        std::fs::create_dir_all(&files.directory)?;
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        std::fs::write(files.certificate(), made.cert.pem())?;
        std::fs::write(files.key(), made.signing_key.serialize_pem())?;
        Ok(files)
    }

    /// The certificate's PEM file.
    #[must_use]
    pub fn certificate(&self) -> String {
        self.directory.join("cert.pem").display().to_string()
    }

    /// The key's PEM file.
    #[must_use]
    pub fn key(&self) -> String {
        self.directory.join("key.pem").display().to_string()
    }
}

impl Drop for CertificateFiles {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("warning: {}: {error}", self.directory.display());
        }
    }
}

/// A server's TLS 1.3.
///
/// # Errors
/// rustls or rcgen refuse.
pub fn server_tls() -> anyhow::Result<rustls::ServerConfig> {
    let (certificate, key) = certificate()?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // Tickets that need no memory of the server, as STOQ's.
    tls.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new()?;
    Ok(tls)
}

/// The same, resuming with a ticket of an earlier connection whenever there is one.
///
/// # Errors
/// rustls refuses.
pub fn resuming_client_tls() -> anyhow::Result<(rustls::ClientConfig, Arc<CountingSessions>)> {
    let sessions = CountingSessions::shared();
    let mut tls = client_tls()?;
    tls.resumption = rustls::client::Resumption::store(sessions.clone());
    Ok((tls, sessions))
}

/// The TLS of a client's workload, and its tickets where it resumes.
///
/// # Errors
/// rustls refuses.
pub fn client_tls_for(
    workload: Workload,
) -> anyhow::Result<(rustls::ClientConfig, Option<Arc<CountingSessions>>)> {
    if workload == Workload::HandshakesResumed {
        let (tls, sessions) = resuming_client_tls()?;
        return Ok((tls, Some(sessions)));
    }
    Ok((client_tls()?, None))
}

/// Refuses handshakes that were to be resumed and were full: `done` of them against tickets used.
///
/// # Errors
/// There were more handshakes than tickets.
pub fn check_resumed(sessions: Option<&CountingSessions>, done: u64) -> anyhow::Result<()> {
    let offered = sessions.map_or(done, CountingSessions::offered);
    anyhow::ensure!(offered >= done, "only {offered} of {done} handshakes had a ticket");
    Ok(())
}

/// A client's TLS 1.3, without resumption, trusting whom it is told to measure.
///
/// # Errors
/// rustls refuses.
pub fn client_tls() -> anyhow::Result<rustls::ClientConfig> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate))
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = rustls::client::Resumption::disabled();
    Ok(tls)
}

/// Verifies the handshake's signature, as everybody does, but no chain.
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
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
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
