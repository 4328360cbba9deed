//! Every kind of bad input, one after the other: each is refused with an error of its own, counted once
//! under its own name where Prometheus sees it, and leaves every file as it was.
//!
//! The test that needs a second process runs this binary again with `STOQ_REFUSALS_ROLE` set; then only
//! [`child`] does anything.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV6, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join;
use pair::{NAME, PATIENCE, Watchdog, config};
use pollster::block_on;
use quinn_proto::crypto;
use quinn_proto::crypto::rustls::QuicServerConfig;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use stoq::ca::{CaService, RemoteCa, RemoteCaConfig};
use stoq::certs::trustchain::{TRUSTCHAIN_ALPN, TokenDirectory, TrustchainServer};
use stoq::certs::{
    CertificateFault, ClientAuth, ClientTls, IdentityNames, LocalCa, LocalCaConfig, Periodic,
    RotatingIdentity, ServerTls, SimWallClock, TrustStore, start_faults,
};
use stoq::engine::Engine;

const ROLE: &str = "STOQ_REFUSALS_ROLE";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const ALPN: &str = "t";

/// A refusal: what was said, and what Prometheus shows afterwards.
struct Refusal {
    error: String,
    metrics: String,
}

impl Refusal {
    fn count(&self, by: &str, fault: CertificateFault) -> u64 {
        let line =
            format!("stoq_certificate_faults_total{{by=\"{by}\",fault=\"{}\"}} ", fault.label());
        let value = self.metrics.lines().find_map(|each| each.strip_prefix(line.as_str()));
        value.unwrap_or_else(|| panic!("{line} is not in\n{}", self.metrics)).parse().unwrap()
    }

    fn total(&self, by: &str) -> u64 {
        CertificateFault::ALL.iter().map(|fault| self.count(by, *fault)).sum()
    }
}

/// What all cases share: a date, a CA, a directory that is removed whatever happens.
struct Scene {
    directory: PathBuf,
    now: SystemTime,
    clock: Arc<SimWallClock>,
    root: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.directory);
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

fn issuer(now: SystemTime) -> (rcgen::Certificate, Issuer<'static, KeyPair>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_before = (now - 100 * DAY).into();
    params.not_after = (now + 100 * DAY).into();
    let root = params.self_signed(&key).unwrap();
    (root, Issuer::new(params, key))
}

impl Scene {
    fn new(name: &str) -> Self {
        let directory =
            std::env::temp_dir().join(format!("stoq-refusals-{}-{name}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let (root, issuer) = issuer(now);
        Self { directory, now, clock: Arc::new(SimWallClock::new(now)), root, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A pair that is good but for `change`.
    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> (rcgen::Certificate, KeyPair) {
        self.leaf_under(&self.issuer, change)
    }

    fn leaf_under(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([NAME.to_owned()]).unwrap();
        params.not_before = (self.now - DAY).into();
        params.not_after = (self.now + DAY).into();
        params.is_ca = IsCa::ExplicitNoCa;
        change(&mut params);
        (params.signed_by(&key, issuer).unwrap(), key)
    }

    /// Every file and what is in it.
    fn content(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let (mut files, mut directories) = (Vec::new(), vec![self.directory.clone()]);
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    let content = fs::read(&path).unwrap();
                    files.push((path, content));
                }
            }
        }
        files.sort();
        files
    }

    /// Runs `act`, after which each file must be what it was.
    fn leaves_files_alone<T>(&self, act: impl FnOnce() -> T) -> T {
        let before = self.content();
        let result = act();
        assert_eq!(self.content(), before, "something was written");
        result
    }

    /// A client of the scene's CA meets a server that shows this pair, good or not: no check of its own.
    fn client_meets(&self, (leaf, _): (rcgen::Certificate, KeyPair), key: &KeyPair) -> Refusal {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let key = provider.key_provider.load_private_key(key).unwrap();
        let shown = CertifiedKey::new(vec![leaf.der().clone()], key);
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
        tls.alpn_protocols = vec![ALPN.as_bytes().to_vec()];
        let trust = TrustStore::builder().roots([self.root.der().clone()]).build().unwrap();
        self.client_refuses(Arc::new(QuicServerConfig::try_from(tls).unwrap()), trust)
    }

    fn client_refuses(
        &self,
        server: Arc<dyn crypto::ServerConfig>,
        trust: Arc<TrustStore>,
    ) -> Refusal {
        let tls = ClientTls::builder().trust(trust).clock(self.clock.clone()).alpn([ALPN]);
        let tls = tls.build().unwrap();
        let server = Engine::builder().config(config()).server(server).start().unwrap();
        let client = Engine::builder().config(config()).client(tls.crypto());
        let client = client.faults("client", tls.faults().clone()).start().unwrap();
        let error = block_on(async {
            let accepting = async { server.accept().await.unwrap().accept().await };
            let (made, _told_too) =
                join(client.connect(server.local_addr(), NAME), accepting).await;
            made.expect_err("accepted").to_string()
        });
        Refusal { error, metrics: client.prometheus() }
    }

    /// A serving node whose files are replaced by this: it is refused, and the old pair stands.
    fn node_is_handed(&self, chain: &str, key: &str, mode: u32) -> Refusal {
        let (chain_file, key_file) = (self.path("chain.pem"), self.path("node.key"));
        let write = |chain: &str, key: &str, mode| {
            fs::write(&chain_file, chain).unwrap();
            let _first = fs::remove_file(&key_file);
            fs::write(&key_file, key).unwrap();
            fs::set_permissions(&key_file, fs::Permissions::from_mode(mode)).unwrap();
        };
        let good = self.leaf(|_| {});
        write(&good.0.pem(), &good.1.serialize_pem(), 0o600);
        let identity = RotatingIdentity::from_pem_files(&chain_file, &key_file)
            .roots([self.root.der().clone()])
            .clock(self.clock.clone())
            .start()
            .unwrap();
        let tls = ServerTls::builder().identity(identity.clone()).alpn([ALPN]).build().unwrap();
        let engine = Engine::builder().config(config()).server(tls.crypto());
        let engine = engine.rotation(identity.clone()).start().unwrap();
        let serial = identity.status().serial;
        write(chain, key, mode);
        self.leaves_files_alone(|| identity.poll(self.now + Duration::from_secs(6)));
        let status = identity.status();
        assert_eq!((status.serial, status.renewals, status.failures), (serial, 0, 1));
        let (error, metrics) = (status.last_error.unwrap(), engine.prometheus());
        let line = format!("stoq_certificate_last_error{{error=\"{error}\"}} 1");
        assert!(metrics.lines().any(|each| each == line), "{line} is not in\n{metrics}");
        Refusal { error, metrics }
    }

    fn ca(&self, name: &str) -> Arc<LocalCa> {
        let ca = LocalCa::open_at(&self.path(name), LocalCaConfig::default(), self.clock.clone());
        Arc::new(ca.unwrap())
    }

    fn certified(&self, ca: &Arc<LocalCa>, name: &str) -> Arc<RotatingIdentity> {
        let names = IdentityNames::new().with_dns(name).unwrap();
        let identity = RotatingIdentity::with_authority(ca.clone(), names);
        identity.clock(self.clock.clone()).start().unwrap()
    }
}

fn expired(scene: &Scene) -> Refusal {
    let pair = scene.leaf(|params| params.not_after = (scene.now - DAY / 2).into());
    let key = KeyPair::try_from(pair.1.serialize_der()).unwrap();
    scene.client_meets(pair, &key)
}

fn not_yet_valid(scene: &Scene) -> Refusal {
    let pair = scene.leaf(|params| params.not_before = (scene.now + DAY / 2).into());
    let key = KeyPair::try_from(pair.1.serialize_der()).unwrap();
    scene.client_meets(pair, &key)
}

fn wrong_name(scene: &Scene) -> Refusal {
    let other = CertificateParams::new(["other.example.net".to_owned()]).unwrap();
    let pair = scene.leaf(|params| params.subject_alt_names = other.subject_alt_names);
    let key = KeyPair::try_from(pair.1.serialize_der()).unwrap();
    scene.client_meets(pair, &key)
}

fn wrong_key(scene: &Scene) -> Refusal {
    scene.client_meets(scene.leaf(|_| {}), &KeyPair::generate().unwrap())
}

fn unknown_root(scene: &Scene) -> Refusal {
    let pair = scene.leaf_under(&issuer(scene.now).1, |_| {});
    let key = KeyPair::try_from(pair.1.serialize_der()).unwrap();
    scene.client_meets(pair, &key)
}

fn ca_as_leaf(scene: &Scene) -> Refusal {
    let pair = scene.leaf(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let key = KeyPair::try_from(pair.1.serialize_der()).unwrap();
    scene.client_meets(pair, &key)
}

fn revoked_server(scene: &Scene) -> Refusal {
    let ca = scene.ca("revoking");
    let tls = ServerTls::builder().identity(scene.certified(&ca, NAME)).alpn([ALPN]);
    let tls = tls.clock(scene.clock.clone()).build().unwrap();
    ca.revoke(&IdentityNames::new().with_dns(NAME).unwrap()).unwrap();
    ca.revocation_list().unwrap();
    let trust = TrustStore::builder().roots([ca.root()]);
    let trust = trust.crl_pem(scene.path("revoking/crl.pem")).build().unwrap();
    scene.client_refuses(tls.crypto(), trust)
}

/// The server refuses a client's certificate; the client is told why.
fn revoked_client(scene: &Scene) -> Refusal {
    let ca = scene.ca("revoking-clients");
    let (own, bad) = (scene.certified(&ca, NAME), scene.certified(&ca, "bad.example.net"));
    ca.revoke(&IdentityNames::new().with_dns("bad.example.net").unwrap()).unwrap();
    ca.revocation_list().unwrap();
    let trust = TrustStore::builder().roots([ca.root()]);
    let trust = trust.crl_pem(scene.path("revoking-clients/crl.pem")).build().unwrap();
    let tls = ServerTls::builder().identity(own).client_auth(ClientAuth::Required(trust));
    let tls = tls.clock(scene.clock.clone()).alpn([ALPN]).build().unwrap();
    let server = Engine::builder().config(config()).server(tls.crypto());
    let server = server.faults("server", tls.faults().clone()).start().unwrap();
    let client = ClientTls::builder().roots([ca.root()]).identity(bad).alpn([ALPN]);
    let client = client.clock(scene.clock.clone()).build().unwrap();
    let client = Engine::builder().config(config()).client(client.crypto()).start().unwrap();
    let error = block_on(async {
        let accepting = async { server.accept().await.unwrap().accept().await };
        let connecting = async {
            // The client's side of the handshake is over before the server looks at its certificate.
            match client.connect(server.local_addr(), NAME).await {
                Ok(connection) => connection.closed().await,
                Err(error) => error,
            }
        };
        let (told, accepted) = join(connecting, accepting).await;
        accepted.expect_err("accepted");
        told.to_string()
    });
    Refusal { error, metrics: server.prometheus() }
}

fn truncated_chain(scene: &Scene) -> Refusal {
    let (leaf, key) = scene.leaf(|_| {});
    let pem = leaf.pem();
    scene.node_is_handed(&pem[..pem.len() / 2], &key.serialize_pem(), 0o600)
}

/// A roots file that is cut short while it is in use: the trust before it stands.
fn truncated_roots(scene: &Scene) -> Refusal {
    let (old, new) = (scene.root.pem(), issuer(scene.now).0.pem());
    let file = scene.path("roots.pem");
    fs::write(&file, &old).unwrap();
    let trust = TrustStore::builder().roots_pem(&file).build().unwrap();
    let engine = Engine::builder().config(config()).faults("trust", trust.faults().clone());
    let engine = engine.start().unwrap();
    fs::write(&file, format!("{old}{}", &new[..new.len() / 2])).unwrap();
    scene.leaves_files_alone(|| trust.poll(scene.now));
    assert_eq!((trust.reload_count(), trust.failure_count()), (0, 1));
    let error = TrustStore::builder().roots_pem(&file).build().unwrap_err().to_string();
    Refusal { error, metrics: engine.prometheus() }
}

fn key_readable_by_others(scene: &Scene) -> Refusal {
    let (leaf, key) = scene.leaf(|_| {});
    scene.node_is_handed(&leaf.pem(), &key.serialize_pem(), 0o640)
}

/// Another process serves the CA's directory.
fn directory_in_use(scene: &Scene) -> Refusal {
    let mut other = Process::hold(&scene.path("held"));
    let error = scene.leaves_files_alone(|| {
        LocalCa::open(&scene.path("held"), LocalCaConfig::default()).unwrap_err().to_string()
    });
    let engine = Engine::builder().config(config()).start().unwrap();
    other.0.kill().unwrap();
    other.0.wait().unwrap();
    LocalCa::open(&scene.path("held"), LocalCaConfig::default()).expect("free again");
    Refusal { error, metrics: engine.prometheus() }
}

/// The token of a node that has enrolled already, by whoever found it.
fn token_used_twice(scene: &Scene) -> Refusal {
    let ca = scene.ca("service");
    let trust = TrustStore::builder().roots([ca.root()]).build().unwrap();
    let tls = ServerTls::builder().identity(scene.certified(&ca, "ca.example.net"));
    let tls = tls.client_auth(ClientAuth::Optional(trust)).clock(scene.clock.clone());
    let tls = tls.alpn([TRUSTCHAIN_ALPN]).build().unwrap();
    let tokens = TokenDirectory::open(&scene.path("tokens")).unwrap();
    let server = TrustchainServer::new(ca.clone(), scene.clock.clone()).with_tokens(tokens);
    let names = IdentityNames::new().with_dns(NAME).unwrap();
    let token = server.create_token(names.clone(), DAY).unwrap();
    let local = SocketAddrV6::new(std::net::Ipv6Addr::LOCALHOST, 0, 0, 0);
    let service = CaService::start_with_metrics(local, Some(local), &tls, Arc::new(server));
    let service = service.unwrap();
    let enrol = || {
        let mut config =
            RemoteCaConfig::new(service.local_addr(), "ca.example.net", vec![ca.root()]);
        config.token = Some(token.clone());
        config.clock = scene.clock.clone();
        let remote = RemoteCa::new(config).unwrap();
        RotatingIdentity::with_authority(remote, names.clone()).clock(scene.clock.clone()).start()
    };
    enrol().unwrap();
    let issued = ca.issued_count();
    let error = scene.leaves_files_alone(|| enrol().unwrap_err().to_string());
    assert_eq!(ca.issued_count(), issued);
    let mut stream = TcpStream::connect(service.metrics_addr().unwrap()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ca\r\nConnection: close\r\n\r\n").unwrap();
    let mut metrics = String::new();
    stream.read_to_string(&mut metrics).unwrap();
    Refusal { error, metrics }
}

#[test]
fn every_bad_input_is_refused_counted_and_leaves_no_trace() {
    use CertificateFault as F;
    type Case = (&'static str, F, fn(&Scene) -> Refusal);
    const CASES: [Case; 13] = [
        ("client", F::Expired, expired),
        ("client", F::NotYetValid, not_yet_valid),
        ("client", F::WrongName, wrong_name),
        ("client", F::WrongKey, wrong_key),
        ("client", F::UnknownRoot, unknown_root),
        ("client", F::CaAsLeaf, ca_as_leaf),
        ("client", F::Revoked, revoked_server),
        ("server", F::Revoked, revoked_client),
        ("identity", F::Truncated, truncated_chain),
        ("trust", F::Truncated, truncated_roots),
        ("identity", F::KeyReadableByOthers, key_readable_by_others),
        ("start", F::DirectoryLocked, directory_in_use),
        ("trustchain", F::TokenSpent, token_used_twice),
    ];
    let _watchdog = Watchdog::new("every_bad_input_is_refused_counted_and_leaves_no_trace");
    let mut errors = HashSet::new();
    for (index, (by, fault, run)) in CASES.iter().enumerate() {
        let scene = Scene::new(&index.to_string());
        let started_badly = start_faults().total();
        let refusal = run(&scene);
        println!("{by}, {fault:?}: {}", refusal.error);
        assert_eq!(refusal.count(by, *fault), 1, "{by}, {fault:?}: {}", refusal.error);
        if *by == "start" {
            // Earlier cases may have counted other kinds: the process counts for all.
            assert_eq!(start_faults().total(), started_badly + 1);
        } else {
            assert_eq!(refusal.total(by), 1, "{by}, {fault:?} counts once, as nothing else");
        }
        assert!(errors.insert(refusal.error), "{by}, {fault:?} has words of its own");
    }
}

/// rustls without post-quantum key exchange, as other software from before ML-KEM.
fn classical() -> Arc<rustls::crypto::CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.kx_groups = vec![rustls::crypto::aws_lc_rs::kx_group::X25519];
    Arc::new(provider)
}

/// Accepts any server: what is tested is settled before certificates are shown.
#[derive(Debug)]
struct AcceptAny(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _leaf: &rustls::pki_types::CertificateDer<'_>,
        _intermediates: &[rustls::pki_types::CertificateDer<'_>],
        _name: &rustls::pki_types::ServerName<'_>,
        _ocsp: &[u8],
        _now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, leaf, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, leaf, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What both ends are told of a handshake that fails.
fn both_errors(server: &Engine, client: &Engine) -> [String; 2] {
    let (told, accepted) = block_on(async {
        let accepting = async { server.accept().await.unwrap().accept().await };
        join(client.connect(server.local_addr(), NAME), accepting).await
    });
    [accepted.expect_err("accepted").to_string(), told.expect_err("connected").to_string()]
}

/// With post-quantum key exchange a ClientHello comes in two packets, and the second brings the refusal
/// while the first still waits for `accept`: the client is told all the same, at once.
#[test]
fn a_refusal_of_the_second_part_of_a_client_hello_arrives() {
    let _watchdog = Watchdog::new("a_refusal_of_the_second_part_of_a_client_hello_arrives");
    let names = IdentityNames::new().with_dns(NAME).unwrap();
    let tls = ServerTls::builder().identity_self_signed(names).alpn([ALPN]).build().unwrap();
    let server = Engine::builder().config(config()).server(tls.crypto()).start().unwrap();
    let other = ClientTls::builder().roots(tls.identity().roots().to_vec()).alpn(["another"]);
    let other = other.build().unwrap();
    let client = Engine::builder().config(config()).client(other.crypto()).start().unwrap();
    for error in both_errors(&server, &client) {
        assert!(error.contains("configure the same ALPN on both sides"), "{error}");
    }
    assert_eq!(tls.faults().count(CertificateFault::NoCommonProtocol), 1);
    // Counted, which is published after the turn, and nothing of it stays.
    let start = Instant::now();
    loop {
        let shard = server.stats()[0].shard;
        if (shard.incoming_failed, shard.connections) == (1, 0) {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{shard:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn both_ends_say_that_post_quantum_is_required() {
    let _watchdog = Watchdog::new("both_ends_say_that_post_quantum_is_required");
    let names = IdentityNames::new().with_dns(NAME).unwrap();
    let count = |engine: &Engine, by| {
        let refusal = Refusal { error: String::new(), metrics: engine.prometheus() };
        assert_eq!(refusal.total(by), 1);
        refusal.count(by, CertificateFault::NoCommonKeyExchange)
    };
    // A server that requires it, and a client of other software without it.
    let tls = ServerTls::builder().identity_self_signed(names.clone()).require_post_quantum(true);
    let tls = tls.alpn([ALPN]).build().unwrap();
    let server = Engine::builder().config(config()).server(tls.crypto());
    let server = server.faults("server", tls.faults().clone()).start().unwrap();
    let mut old = rustls::ClientConfig::builder_with_provider(classical())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AcceptAny(classical())))
        .with_no_client_auth();
    old.alpn_protocols = vec![ALPN.as_bytes().to_vec()];
    let old = Arc::new(crypto::rustls::QuicClientConfig::try_from(old).unwrap());
    let client = Engine::builder().config(config()).client(old).start().unwrap();
    for error in both_errors(&server, &client) {
        assert!(error.contains("post-quantum required"), "{error}");
        assert!(error.contains("X25519MLKEM768"), "{error}");
    }
    assert_eq!(count(&server, "server"), 1);
    // A client that requires it, and a server of other software without it.
    let scene = Scene::new("post-quantum");
    let (leaf, key) = scene.leaf(|_| {});
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut old = rustls::ServerConfig::builder_with_provider(classical())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .unwrap();
    old.alpn_protocols = vec![ALPN.as_bytes().to_vec()];
    let old = Arc::new(QuicServerConfig::try_from(old).unwrap());
    let server = Engine::builder().config(config()).server(old).start().unwrap();
    let tls = ClientTls::builder().roots([scene.root.der().clone()]).require_post_quantum(true);
    let tls = tls.alpn([ALPN]).build().unwrap();
    let client = Engine::builder().config(config()).client(tls.crypto());
    let client = client.faults("client", tls.faults().clone()).start().unwrap();
    let [other_software, ours] = both_errors(&server, &client);
    assert!(other_software.contains("NoKxGroups"), "{other_software}");
    assert!(ours.contains("X25519MLKEM768") && ours.contains("post-quantum"), "{ours}");
    // Between two of ours it is what they settle on, and each connection tells.
    let tls = ServerTls::builder().identity_self_signed(names).require_post_quantum(true);
    let tls = tls.alpn([ALPN]).build().unwrap();
    let client = ClientTls::builder().roots(tls.identity().roots().to_vec()).alpn([ALPN]);
    let client = client.require_post_quantum(true).build().unwrap();
    let server = Engine::builder().config(config()).server(tls.crypto()).start().unwrap();
    let client = Engine::builder().config(config()).client(client.crypto()).start().unwrap();
    let (made, accepted) = block_on(async {
        let accepting = async { server.accept().await.unwrap().accept().await };
        join(client.connect(server.local_addr(), NAME), accepting).await
    });
    for connection in [made.unwrap(), accepted.unwrap()] {
        let settled = connection.handshake().unwrap();
        assert_eq!(settled.group, Some(rustls::NamedGroup::X25519MLKEM768));
    }
}

/// Another process, which does not outlive its test.
struct Process(Child);

impl Process {
    /// Returns when it holds the CA in `directory`.
    fn hold(directory: &std::path::Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(ROLE, directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let process = Self(child);
        let mut lines = out.lines().map(Result::unwrap);
        assert!(lines.any(|line| line == "held"), "the other process opens the directory");
        process
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.0.kill().expect("our own child can be killed");
            self.0.wait().expect("our own child can be waited for");
        }
    }
}

/// The body of the other process; nothing by itself.
#[test]
fn child() {
    let Ok(directory) = std::env::var(ROLE) else { return };
    let _ca = LocalCa::open(directory.as_ref(), LocalCaConfig::default()).unwrap();
    println!("\nheld");
    std::io::stdout().flush().unwrap();
    // Until it is killed, or whoever started it is gone.
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).unwrap();
}
