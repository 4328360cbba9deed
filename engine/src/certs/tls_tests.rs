use std::time::{Duration, SystemTime};

use quinn_proto::transport_parameters::TransportParameters;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::server::ResolvesServerCert;
use rustls::sign::CertifiedKey;
use rustls::{HandshakeKind, NamedGroup, quic};
use rustls_pki_types::PrivatePkcs8KeyDer;

use super::*;
use crate::certs::authority::{CertificateAuthority, CertificateRequest, key_and_request};
use crate::certs::fault::CertificateFault;
use crate::certs::keys::KeyAlgorithm;
use crate::certs::local_ca::{LocalCa, LocalCaConfig};
use crate::certs::pem;
use crate::certs::provider::verification_provider;
use crate::certs::session::{HandshakeInfo, PeerIdentity, explain_peer_alert};
use crate::certs::test_dir::TestDir;
use crate::certs::test_handshake::{Failed, finish_handshake, handshake};
use crate::certs::wall_clock::SimWallClock;

const NAME: &str = "node.example.net";
const HOUR: Duration = Duration::from_secs(3600);

fn names() -> IdentityNames {
    IdentityNames::new().with_dns(NAME).unwrap().with_ipv6("2001:db8::1".parse().unwrap())
}

fn clock() -> Arc<SimWallClock> {
    Arc::new(SimWallClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)))
}

fn server_builder(clock: &Arc<SimWallClock>) -> ServerTlsBuilder {
    ServerTls::builder().identity_self_signed(names()).alpn(["stoq-test"]).clock(clock.clone())
}

fn server(clock: &Arc<SimWallClock>) -> ServerTls {
    server_builder(clock).build().unwrap()
}

fn client_of(clock: &Arc<SimWallClock>, server: &ServerTls) -> ClientTlsBuilder {
    client_builder(clock).roots(server.identity().roots().to_vec())
}

fn client_builder(clock: &Arc<SimWallClock>) -> ClientTlsBuilder {
    ClientTls::builder().alpn(["stoq-test"]).clock(clock.clone())
}

/// The handshake fails at the client with `fault`, counted once.
fn assert_client_refuses(
    client: &ClientTls,
    server: &ServerTls,
    name: &str,
    fault: CertificateFault,
) {
    let before = client.faults().count(fault);
    match handshake(client, server, name) {
        Err(Failed::Client(error)) => {
            assert!(error.reason.starts_with(fault.label()), "{}", error.reason);
            assert!(error.reason.contains(fault.advice()), "{}", error.reason);
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("accepted in spite of {fault:?}"),
    }
    assert_eq!(client.faults().count(fault), before + 1);
    assert_eq!(client.faults().total(), before + 1);
}

/// Shows one fixed pair, whatever it is.
#[derive(Debug)]
struct Fixed(Arc<CertifiedKey>);

impl ResolvesServerCert for Fixed {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

/// `server` with another pair, unchecked.
fn showing(mut server: ServerTls, chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> ServerTls {
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let key = verification_provider().key_provider.load_private_key(key).unwrap();
    let mut config = rustls::ServerConfig::clone(&server.config);
    config.cert_resolver = Arc::new(Fixed(Arc::new(CertifiedKey::new(chain, key))));
    server.config = Arc::new(config);
    server.quic =
        Arc::new(QuicServerConfig::with_initial(server.config.clone(), initial_suite()).unwrap());
    server.crypto = server_crypto(ObservedServerConfig {
        inner: server.quic.clone(),
        config: server.config.clone(),
        context: Common::default().context(&server.faults, None),
    });
    server
}

/// A CA of its own making, for certificates that `LocalCa` would not issue.
struct Forge {
    root: CertificateDer<'static>,
    params: CertificateParams,
    key: KeyPair,
}

impl Forge {
    fn new(name_constraints: Option<rcgen::NameConstraints>) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.name_constraints = name_constraints;
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { root, params, key }
    }

    fn leaf(
        &self,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
        change(&mut params);
        let issuer = rcgen::Issuer::from_params(&self.params, &self.key);
        (params.signed_by(&key, &issuer).unwrap().der().clone(), key)
    }
}

#[test]
fn a_handshake_by_dns_name_and_by_address() {
    let clock = clock();
    let server = server(&clock);
    let client = client_of(&clock, &server).build().unwrap();
    for name in [NAME, "2001:db8::1"] {
        let done = handshake(&client, &server, name).unwrap();
        for session in [&done.client, &done.server] {
            let info = HandshakeInfo::of_session(&**session).unwrap();
            assert_eq!(info.group, Some(NamedGroup::X25519MLKEM768));
            assert!(info.is_post_quantum());
            let choice = PacketCrypto::choose(CryptoProviderChoice::Auto).unwrap();
            assert_eq!(info.packet_crypto, Some(choice));
            assert_eq!(info.alpn.as_deref(), Some(&b"stoq-test"[..]));
        }
        let peer = PeerIdentity::of_session(&*done.client).unwrap().unwrap();
        assert_eq!(peer.certificate.names, names());
        assert!(PeerIdentity::of_session(&*done.server).unwrap().is_none());
    }
    assert_eq!(client.faults().total() + server.faults().total(), 0);
}

#[test]
fn dates_are_checked_against_the_clients_clock() {
    let clock = clock();
    let server = server(&clock);
    for (now, fault) in [
        (clock.now() - HOUR, CertificateFault::NotYetValid),
        (clock.now() + 25 * HOUR, CertificateFault::Expired),
    ] {
        let client = client_of(&Arc::new(SimWallClock::new(now)), &server).build().unwrap();
        assert_client_refuses(&client, &server, NAME, fault);
    }
    // Inside the backdated minutes a slow clock is forgiven.
    let slow = Arc::new(SimWallClock::new(clock.now() - Duration::from_secs(240)));
    handshake(&client_of(&slow, &server).build().unwrap(), &server, NAME).unwrap();
}

#[test]
fn names_and_roots_are_checked() {
    let clock = clock();
    let server = server(&clock);
    for name in ["other.example.net", "example.net", "2001:db8::2"] {
        let client = client_of(&clock, &server).build().unwrap();
        assert_client_refuses(&client, &server, name, CertificateFault::WrongName);
    }
    let stranger = self::server(&clock);
    let client = client_of(&clock, &stranger).build().unwrap();
    assert_client_refuses(&client, &server, NAME, CertificateFault::UnknownRoot);
}

#[test]
fn forged_certificates_are_refused() {
    let clock = clock();
    let forge = Forge::new(None);
    let client = || client_builder(&clock).roots([forge.root.clone()]).build().unwrap();
    let (leaf, key) = forge.leaf(|_| {});
    let good = showing(server(&clock), vec![leaf.clone()], &key);
    handshake(&client(), &good, NAME).unwrap();

    let wrong_key = showing(server(&clock), vec![leaf], &KeyPair::generate().unwrap());
    assert_client_refuses(&client(), &wrong_key, NAME, CertificateFault::WrongKey);

    let (leaf, key) = forge.leaf(|params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    });
    let ca_leaf = showing(server(&clock), vec![leaf], &key);
    assert_client_refuses(&client(), &ca_leaf, NAME, CertificateFault::CaAsLeaf);

    let (leaf, key) = forge.leaf(|params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    });
    let client_only = showing(server(&clock), vec![leaf], &key);
    assert_client_refuses(&client(), &client_only, NAME, CertificateFault::WrongPurpose);

    // Another CA of the same name, which somebody made anew.
    let (leaf, key) = Forge::new(None).leaf(|_| {});
    let namesake = showing(server(&clock), vec![leaf], &key);
    assert_client_refuses(&client(), &namesake, NAME, CertificateFault::UnknownRoot);

    let garbage = showing(server(&clock), vec![vec![0x30, 3, 2, 1, 0].into()], &key);
    assert_client_refuses(&client(), &garbage, NAME, CertificateFault::Malformed);
}

#[test]
fn name_constraints_bind_the_verifier() {
    let clock = clock();
    let policy =
        crate::certs::constraints::NamePolicy::new(&["example.org".to_owned()], &[]).unwrap();
    let forge = Forge::new(policy.to_extension());
    let client = client_builder(&clock).roots([forge.root.clone()]).build().unwrap();
    let (leaf, key) = forge.leaf(|_| {});
    let outside = showing(server(&clock), vec![leaf], &key);
    assert_client_refuses(&client, &outside, NAME, CertificateFault::NameConstraint);
}

/// A CA with a server under it, and the CA's revocation list in a file.
struct Site {
    clock: Arc<SimWallClock>,
    ca: Arc<LocalCa>,
    dir: TestDir,
}

impl Site {
    fn new() -> Self {
        let clock = clock();
        let ca = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap();
        Self { clock, ca: Arc::new(ca), dir: TestDir::new() }
    }

    fn identity(&self, names: IdentityNames) -> Arc<RotatingIdentity> {
        RotatingIdentity::with_authority(self.ca.clone(), names)
            .roots([self.ca.root()])
            .clock(self.clock.clone())
            .start()
            .unwrap()
    }

    fn write_crl(&self) -> PathBuf {
        let path = self.dir.path().join("crl.pem");
        std::fs::write(&path, self.ca.revocation_list().unwrap()).unwrap();
        path
    }

    fn trust_with_crl(&self) -> Arc<TrustStore> {
        TrustStore::builder().roots([self.ca.root()]).crl_pem(self.write_crl()).build().unwrap()
    }
}

#[test]
fn a_revoked_server_is_refused_once_the_list_is_reloaded() {
    let site = Site::new();
    let server = ServerTls::builder()
        .identity(site.identity(names()))
        .alpn(["stoq-test"])
        .clock(site.clock.clone())
        .build()
        .unwrap();
    let trust = site.trust_with_crl();
    let client = client_builder(&site.clock).trust(trust.clone()).build().unwrap();
    assert_eq!(kind(&client, &server), HandshakeKind::Full);
    assert_eq!(kind(&client, &server), HandshakeKind::Resumed);

    assert_eq!(site.ca.revoke(&names()).unwrap().len(), 1);
    site.write_crl();
    handshake(&client, &server, NAME).unwrap();
    trust.poll(site.clock.now());
    assert_eq!(trust.reload_count(), 1);
    // Not even by resumption, which verifies nothing.
    assert_client_refuses(&client, &server, NAME, CertificateFault::Revoked);

    // A damaged list changes nothing.
    std::fs::write(site.dir.path().join("crl.pem"), "-----BEGIN X509 CRL-----\nAAAA\n").unwrap();
    trust.poll(site.clock.now());
    assert_eq!((trust.reload_count(), trust.failure_count()), (1, 1));
}

#[test]
fn a_late_revocation_list_serves_unless_forbidden() {
    let site = Site::new();
    let server = ServerTls::builder()
        .identity(site.identity(names()))
        .alpn(["stoq-test"])
        .clock(site.clock.clone())
        .build()
        .unwrap();
    let path = site.write_crl();
    site.clock.advance(8 * 24 * HOUR);
    server.identity().poll(site.clock.now());
    for (strict, fault) in [(false, None), (true, Some(CertificateFault::RevocationUnknown))] {
        let trust = TrustStore::builder()
            .roots([site.ca.root()])
            .crl_pem(&path)
            .require_current_crl(strict)
            .build()
            .unwrap();
        let client = client_builder(&site.clock).trust(trust).build().unwrap();
        match fault {
            None => drop(handshake(&client, &server, NAME).unwrap()),
            Some(fault) => assert_client_refuses(&client, &server, NAME, fault),
        }
    }
}

#[test]
fn clients_are_authenticated() {
    let site = Site::new();
    let client_names = IdentityNames::new().with_client_id("probe-7").unwrap();
    let trust = site.trust_with_crl();
    let build = |auth| {
        ServerTls::builder()
            .identity(site.identity(names()))
            .alpn(["stoq-test"])
            .clock(site.clock.clone())
            .client_auth(auth)
            .build()
            .unwrap()
    };
    let required = build(ClientAuth::Required(trust.clone()));
    let optional = build(ClientAuth::Optional(trust.clone()));
    let anonymous = client_builder(&site.clock).roots([site.ca.root()]).build().unwrap();
    let known = client_builder(&site.clock)
        .roots([site.ca.root()])
        .identity(site.identity(client_names.clone()))
        .build()
        .unwrap();
    let stranger = client_builder(&site.clock)
        .roots([site.ca.root()])
        .identity_self_signed(client_names.clone())
        .build()
        .unwrap();

    for server in [&required, &optional] {
        let done = handshake(&known, server, NAME).unwrap();
        let peer = PeerIdentity::of_session(&*done.server).unwrap().unwrap();
        assert_eq!(peer.certificate.names.client_id(), Some("probe-7"));
        assert_eq!(peer.chain.len(), 2);
        let failed = handshake(&stranger, server, NAME).err().unwrap();
        assert!(matches!(failed, Failed::Server(_)), "{failed:?}");
        assert_eq!(server.faults().count(CertificateFault::UnknownRoot), 1);
    }
    handshake(&anonymous, &optional, NAME).unwrap();
    let failed = handshake(&anonymous, &required, NAME).err().unwrap();
    assert!(failed.error().reason.contains("sent no certificate"), "{failed:?}");
    assert_eq!(required.faults().count(CertificateFault::NoCertificate), 1);

    // The newest ticket is the other server's; after one more handshake it is this one's.
    assert_eq!(kind(&known, &required), HandshakeKind::Full);
    assert_eq!(kind(&known, &required), HandshakeKind::Resumed);
    site.ca.revoke(&client_names).unwrap();
    site.write_crl();
    trust.poll(site.clock.now());
    let failed = handshake(&known, &required, NAME).err().unwrap();
    assert!(failed.error().reason.starts_with("revoked"), "resumed in spite of it: {failed:?}");
}

/// Root, intermediate and leaf of ML-DSA-65, at both ends; a client that does not know it is told.
#[test]
fn ml_dsa_certificates_are_an_option() {
    let clock = clock();
    let config = LocalCaConfig { key_algorithm: KeyAlgorithm::MlDsa65, ..LocalCaConfig::default() };
    let dir = TestDir::new();
    let ca = LocalCa::open_at(dir.path(), config.clone(), clock.clone()).unwrap();
    let root = ca.root();
    drop(ca);
    // The keys survive their file, and renew the intermediate from it.
    clock.advance(300 * 24 * HOUR);
    let ca = Arc::new(LocalCa::open_at(dir.path(), config, clock.clone()).unwrap());
    assert_eq!(ca.root(), root);
    let identity = |algorithm, names| {
        RotatingIdentity::with_authority(ca.clone(), names)
            .key_algorithm(algorithm)
            .roots([root.clone()])
            .store(dir.path().join(format!("{algorithm:?}.pem")))
            .clock(clock.clone())
            .start()
            .unwrap()
    };
    let client_names = IdentityNames::new().with_client_id("probe-7").unwrap();
    let trust = TrustStore::builder().roots([root.clone()]).build().unwrap();
    for (ours, theirs) in [
        (KeyAlgorithm::MlDsa65, KeyAlgorithm::MlDsa65),
        (KeyAlgorithm::MlDsa65, KeyAlgorithm::EcdsaP256),
        (KeyAlgorithm::EcdsaP256, KeyAlgorithm::MlDsa65),
    ] {
        let server_identity = identity(ours, names());
        let server = ServerTls::builder()
            .identity(server_identity.clone())
            .client_auth(ClientAuth::Required(trust.clone()))
            .alpn(["stoq-test"])
            .clock(clock.clone())
            .build()
            .unwrap();
        std::fs::remove_file(dir.path().join(format!("{ours:?}.pem"))).unwrap();
        let client = client_builder(&clock)
            .roots([root.clone()])
            .identity(identity(theirs, client_names.clone()))
            .build()
            .unwrap();
        std::fs::remove_file(dir.path().join(format!("{theirs:?}.pem"))).unwrap();
        let done = handshake(&client, &server, NAME).unwrap();
        let chain = PeerIdentity::of_session(&*done.client).unwrap().unwrap().chain;
        let leaf_size_bytes = chain[0].len();
        assert_eq!(leaf_size_bytes > 5000, ours == KeyAlgorithm::MlDsa65, "{leaf_size_bytes}");
        let peer = PeerIdentity::of_session(&*done.server).unwrap().unwrap();
        assert_eq!(peer.certificate.names.client_id(), Some("probe-7"));
        // Renewed with the same kind of key, by the thread that polls.
        clock.set(server_identity.status().next_renewal.unwrap());
        server_identity.poll(clock.now());
        assert_eq!(server_identity.status().renewals, 1, "{:?}", server_identity.status());
        let renewed = server_identity.certified_key().unwrap().cert[0].len();
        assert_eq!(renewed > 5000, ours == KeyAlgorithm::MlDsa65);
        std::fs::remove_file(dir.path().join(format!("{ours:?}.pem"))).unwrap();
    }
    let server = server_builder(&clock).identity(
        RotatingIdentity::self_signed(names())
            .key_algorithm(KeyAlgorithm::MlDsa65)
            .clock(clock.clone())
            .start()
            .unwrap(),
    );
    let server = server.build().unwrap();
    handshake(&client_of(&clock, &server).build().unwrap(), &server, NAME).unwrap();
    let old = classical(client_of(&clock, &server).build().unwrap());
    let failed = handshake(&old, &server, NAME).err().unwrap();
    assert!(failed.error().reason.starts_with("no_common_signature"), "{failed:?}");
    assert_eq!(server.faults().count(CertificateFault::NoCommonSignature), 1);
}

/// Whoever verifies by a wrong date says so, and the other end is told: both ends, both directions.
#[test]
fn a_wrong_clock_is_named_at_both_ends() {
    let site = Site::new();
    let trust = TrustStore::builder().roots([site.ca.root()]).build().unwrap();
    let right = site.clock.clone();
    let behind = Arc::new(SimWallClock::new(right.now() - HOUR));
    let ahead = Arc::new(SimWallClock::new(right.now() + 25 * HOUR));
    // The CA's clock is right, so the certificates are good.
    let (server_identity, client_identity) = (site.identity(names()), site.identity(names()));
    let refusal = |server_clock: &Arc<SimWallClock>, client_clock: &Arc<SimWallClock>| {
        let server = ServerTls::builder()
            .identity(server_identity.clone())
            .client_auth(ClientAuth::Required(trust.clone()))
            .alpn(["stoq-test"])
            .clock(server_clock.clone())
            .build()
            .unwrap();
        let client = client_builder(client_clock)
            .trust(trust.clone())
            .identity(client_identity.clone())
            .build()
            .unwrap();
        let failed = handshake(&client, &server, NAME).err();
        (failed, server.faults().clone(), client.faults().clone())
    };
    assert!(refusal(&right, &right).0.is_none());
    for (wrong, fault) in
        [(&behind, CertificateFault::NotYetValid), (&ahead, CertificateFault::Expired)]
    {
        for at_server in [true, false] {
            let (failed, server, client) =
                if at_server { refusal(wrong, &right) } else { refusal(&right, wrong) };
            let failed = failed.expect("refused");
            assert_eq!(matches!(failed, Failed::Server(_)), at_server, "{failed:?}");
            let error = failed.error();
            assert!(error.reason.starts_with(fault.label()), "{error}");
            assert!(error.reason.contains("clock"), "{error}");
            let verifier = if at_server { &server } else { &client };
            assert_eq!((verifier.count(fault), verifier.total()), (1, 1));
            // What the other end makes of the alert and the words that come with it.
            let told = explain_peer_alert(u64::from(error.code), &error.reason).unwrap();
            assert!(told.contains("clock"), "{told}");
        }
    }
}

/// A client that knows only X25519 and ECDSA, as software from before ML-KEM and ML-DSA.
fn classical(mut client: ClientTls) -> ClientTls {
    let mut provider = default_provider();
    provider.kx_groups = vec![kx_group::X25519];
    let mut algorithms = verification_provider().signature_verification_algorithms;
    let (ecdsa, ..) = algorithms.mapping.split_at(3);
    assert!(ecdsa.iter().all(|(scheme, _)| format!("{scheme:?}").starts_with("ECDSA")));
    algorithms.mapping = ecdsa;
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(DangerousAnyServerVerifier {
            faults: client.faults.clone(),
            algorithms,
        }))
        .with_no_client_auth();
    config.alpn_protocols = client.config.alpn_protocols.clone();
    client.config = Arc::new(config);
    client.quic =
        Arc::new(QuicClientConfig::with_initial(client.config.clone(), initial_suite()).unwrap());
    client.crypto = client_crypto(ObservedClientConfig {
        inner: client.quic.clone(),
        context: Common::default().context(&client.faults, None),
    });
    client
}

#[test]
fn post_quantum_is_preferred_and_can_be_required() {
    let clock = clock();
    let lenient = server(&clock);
    let strict = server_builder(&clock).require_post_quantum(true).build().unwrap();
    let old = classical(client_of(&clock, &lenient).build().unwrap());
    let done = handshake(&old, &lenient, NAME).unwrap();
    let info = HandshakeInfo::of_session(&*done.server).unwrap();
    assert_eq!(info.group, Some(NamedGroup::X25519));
    assert!(!info.is_post_quantum());

    let failed = handshake(&old, &strict, NAME).err().unwrap();
    let Failed::Server(error) = &failed else { panic!("{failed:?}") };
    assert!(error.reason.contains("X25519MLKEM768"), "{}", error.reason);
    assert!(error.reason.contains("post-quantum required"), "{}", error.reason);
    assert_eq!(strict.faults().count(CertificateFault::NoCommonKeyExchange), 1);
    // What the client's application is told when the server's CONNECTION_CLOSE arrives.
    let text = explain_peer_alert(u64::from(error.code), &error.reason).unwrap();
    assert!(text.contains("post-quantum required"), "{text}");
    let silent = explain_peer_alert(u64::from(error.code), "").unwrap();
    assert!(silent.contains("X25519MLKEM768"), "{silent}");

    let modern = client_of(&clock, &strict).require_post_quantum(true).build().unwrap();
    let done = handshake(&modern, &strict, NAME).unwrap();
    assert!(HandshakeInfo::of_session(&*done.client).unwrap().is_post_quantum());
}

#[test]
fn protocols_must_match() {
    let clock = clock();
    let server = server(&clock);
    let client = client_of(&clock, &server).alpn(["another"]).build().unwrap();
    let failed = handshake(&client, &server, NAME).err().unwrap();
    assert!(failed.error().reason.contains("same ALPN"), "{failed:?}");
    assert_eq!(server.faults().count(CertificateFault::NoCommonProtocol), 1);
}

#[test]
fn pinned_peers_need_their_own_root() {
    let clock = clock();
    let (ours, theirs) = (server(&clock), server(&clock));
    let pin = TrustStore::builder().roots(theirs.identity().roots().to_vec()).build().unwrap();
    let client = client_of(&clock, &ours).pin(NAME, pin).unwrap().build().unwrap();
    handshake(&client, &theirs, NAME).unwrap();
    assert_client_refuses(&client, &ours, NAME, CertificateFault::UnknownRoot);
    handshake(&client, &ours, "2001:db8::1").unwrap();
}

#[test]
fn danger_accepts_anyone_who_holds_the_key() {
    let clock = clock();
    let server = server(&clock);
    let client = client_builder(&clock).danger_accept_any_server_certificate().build().unwrap();
    handshake(&client, &server, "anything.example").unwrap();
    let (leaf, _key) = Forge::new(None).leaf(|_| {});
    let impostor = showing(server, vec![leaf], &KeyPair::generate().unwrap());
    assert_client_refuses(&client, &impostor, NAME, CertificateFault::WrongKey);
}

#[test]
fn rotation_breaks_neither_old_sessions_nor_new_handshakes() {
    let clock = clock();
    let server = server(&clock);
    let client = client_of(&clock, &server).build().unwrap();
    let mut old = handshake(&client, &server, NAME).unwrap();
    let first = server.identity().status().serial;
    clock.advance(17 * HOUR);
    for task in server.tasks() {
        task.poll(clock.now());
    }
    assert_ne!(server.identity().status().serial, first);
    handshake(&client, &server, NAME).unwrap();
    // A key update on the old connection needs nothing from the certificate.
    assert!(old.client.next_1rtt_keys().is_some() && old.server.next_1rtt_keys().is_some());
}

/// Runs a handshake on rustls itself, which tells how it went; sends early data if it may.
fn kind(client: &ClientTls, server: &ServerTls) -> HandshakeKind {
    rustls_handshake(client, server).0
}

fn rustls_handshake(client: &ClientTls, server: &ServerTls) -> (HandshakeKind, bool) {
    let name = ServerName::try_from(NAME).unwrap();
    let mut client: quic::Connection =
        quic::ClientConnection::new(client.rustls(), quic::Version::V1, name, Vec::new())
            .unwrap()
            .into();
    let offered = client.zero_rtt_keys().is_some();
    let mut server: quic::Connection =
        quic::ServerConnection::new(server.rustls(), quic::Version::V1, Vec::new()).unwrap().into();
    for _ in 0..8 {
        step(&mut client, &mut server);
        step(&mut server, &mut client);
    }
    let quic::Connection::Client(client) = client else { unreachable!("made as a client") };
    let kind = client.handshake_kind().unwrap();
    (kind, offered && client.is_early_data_accepted())
}

fn step(from: &mut quic::Connection, to: &mut quic::Connection) {
    loop {
        let mut flight = Vec::new();
        let keys = from.write_hs(&mut flight).is_some();
        if !flight.is_empty() {
            to.read_hs(&flight).unwrap();
        }
        if !keys && flight.is_empty() {
            return;
        }
    }
}

#[test]
fn sessions_resume_across_machines_with_a_shared_secret() {
    let site = Site::new();
    let build = |secret: Option<[u8; 32]>| {
        let builder = ServerTls::builder()
            .identity(site.identity(names()))
            .alpn(["stoq-test"])
            .clock(site.clock.clone());
        let builder = match secret {
            Some(secret) => builder.ticket_secret(secret),
            None => builder,
        };
        builder.build().unwrap()
    };
    let (a, b, alone) = (build(Some([5; 32])), build(Some([5; 32])), build(None));
    let client = client_builder(&site.clock).roots([site.ca.root()]).build().unwrap();
    assert_eq!(kind(&client, &a), HandshakeKind::Full);
    assert_eq!(kind(&client, &b), HandshakeKind::Resumed);
    let client = client_builder(&site.clock).roots([site.ca.root()]).build().unwrap();
    assert_eq!(kind(&client, &a), HandshakeKind::Full);
    assert_eq!(kind(&client, &alone), HandshakeKind::Full);
}

#[test]
fn early_data_is_off_unless_both_sides_ask() {
    let clock = clock();
    for (server_on, client_on) in [(false, false), (false, true), (true, false), (true, true)] {
        let server = server_builder(&clock).early_data(server_on).build().unwrap();
        let client = client_of(&clock, &server).early_data(client_on).build().unwrap();
        assert_eq!(rustls_handshake(&client, &server), (HandshakeKind::Full, false));
        let expected = (HandshakeKind::Resumed, server_on && client_on);
        assert_eq!(rustls_handshake(&client, &server), expected, "{server_on} {client_on}");
    }
}

/// One ClientHello with early data, at eight shards at the same moment: what shards share is the
/// configuration that starts their sessions. One takes the early data, and whoever did not goes on
/// without.
#[test]
fn early_data_is_taken_by_one_shard_alone() {
    const SHARDS: usize = 8;
    let clock = clock();
    let server = server_builder(&clock).early_data(true).build().unwrap();
    let client = client_of(&clock, &server).early_data(true).build().unwrap();
    let params = TransportParameters::read(quinn_proto::Side::Server, &mut &[][..]).unwrap();
    for round in 0..16 {
        handshake(&client, &server, NAME).unwrap();
        let mut one = client.crypto().start_session(1, NAME, &params).unwrap();
        let mut hello = Vec::new();
        assert!(one.write_handshake(&mut hello).is_none());
        assert!(one.early_crypto().is_some(), "the client has early keys");
        let together = std::sync::Barrier::new(SHARDS);
        let sessions: Vec<Box<dyn crypto::Session>> = std::thread::scope(|scope| {
            let shards: Vec<_> = (0..SHARDS)
                .map(|_| {
                    scope.spawn(|| {
                        let mut session = server.crypto().start_session(1, &params);
                        together.wait();
                        session.read_handshake(&hello).unwrap();
                        session
                    })
                })
                .collect();
            shards.into_iter().map(|shard| shard.join().unwrap()).collect()
        });
        let (taken, refused): (Vec<_>, Vec<_>) =
            sessions.into_iter().partition(|session| session.early_crypto().is_some());
        assert_eq!((taken.len(), refused.len()), (1, SHARDS - 1), "round {round}");
        // The client ends at another shard than the one that took its early data, or at that one.
        let accepted = round % 2 == 0;
        let mut other = if accepted { taken } else { refused }.pop().unwrap();
        finish_handshake(&mut *one, &mut *other).unwrap();
        assert_eq!(one.early_data_accepted(), Some(accepted));
    }
    assert_eq!(client.faults().total() + server.faults().total(), 0);
}

#[test]
fn misconfigurations_are_named() {
    let clock = clock();
    let error = ServerTls::builder().alpn(["x"]).build().unwrap_err();
    assert!(error.to_string().contains("identity"), "{error}");
    let error = ServerTls::builder().identity_self_signed(names()).build().unwrap_err();
    assert!(error.to_string().contains("application protocol"), "{error}");
    let error = server_builder(&clock).ticket_secret([1; 8]).build().unwrap_err();
    assert!(error.to_string().contains("at least 32"), "{error}");
    let error = server_builder(&clock).cipher_suites(Vec::new()).build().unwrap_err();
    assert!(error.to_string().contains("cipher suite"), "{error}");
    let error = client_builder(&clock).build().unwrap_err();
    assert!(error.to_string().contains("roots"), "{error}");
    let error = client_builder(&clock).roots(Vec::new()).build().unwrap_err();
    assert!(error.to_string().contains("root"), "{error}");
    let server = server(&clock);
    let error =
        client_of(&clock, &server).danger_accept_any_server_certificate().build().unwrap_err();
    assert!(error.to_string().contains("contradict"), "{error}");
    assert!(
        client_builder(&clock)
            .pin(
                "not a name",
                TrustStore::builder().roots(server.identity().roots().to_vec()).build().unwrap()
            )
            .is_err()
    );
    let dir = TestDir::new();
    let path = dir.path().join("roots.pem");
    std::fs::write(&path, &pem::encode("CERTIFICATE", &server.identity().roots()[0])[..200])
        .unwrap();
    let error = client_builder(&clock).roots_pem(&path).build().unwrap_err();
    assert_eq!(error.fault(), CertificateFault::Truncated);
}

#[test]
fn a_node_may_name_only_itself() {
    let site = Site::new();
    let (_key, csr) = key_and_request(&names(), KeyAlgorithm::default()).unwrap();
    let other = IdentityNames::new().with_client_id("x").unwrap();
    assert!(site.ca.issue(&CertificateRequest { csr: &csr, names: &other }).is_err());
}

#[test]
fn no_session_outlives_the_certificate_that_was_verified() {
    let clock = clock();
    let server = server(&clock);
    let client = client_of(&clock, &server).build().unwrap();
    assert_eq!(kind(&client, &server), HandshakeKind::Full);
    assert_eq!(kind(&client, &server), HandshakeKind::Resumed);
    // Nobody renewed it. Minutes before its end the ticket still resumes, after it a full
    // handshake finds out.
    let end = server.identity().status().not_after.unwrap();
    clock.set(end - Duration::from_secs(60));
    assert_eq!(kind(&client, &server), HandshakeKind::Full, "the ticket keys are older than that");
    assert_eq!(kind(&client, &server), HandshakeKind::Resumed);
    clock.set(end + Duration::from_secs(60));
    server.identity().poll(clock.now());
    let renewed = server.identity().status().not_after.unwrap();
    assert!(renewed > end);
    assert_eq!(kind(&client, &server), HandshakeKind::Full);
    assert_eq!(kind(&client, &server), HandshakeKind::Resumed);
}
