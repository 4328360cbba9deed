//! The remote CA over loopback: real shards and sockets, the date injected.

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)] // each test file uses its own part
mod pair;

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use pair::Watchdog;
use stoq::VarInt;
use stoq::ca::{CaService, RemoteCa, RemoteCaConfig, RevocationFeed};
use stoq::certs::trustchain::{
    FrameReader, Message, RefusalCode, TRUSTCHAIN_ALPN, TokenDirectory, TrustchainServer,
};
use stoq::certs::{
    CertificateAuthority, CertificateFault, CertsError, ClientAuth, ClientTls, IdentityBuilder,
    IdentityNames, LocalCa, LocalCaConfig, Periodic, RevocationDesk, RevocationDirectory,
    RotatingIdentity, ServerTls, SharedKeys, SimWallClock, TrustStore, WallClock,
};
use stoq::engine::Engine;

const CA_NAME: &str = "ca.example.net";
const HOUR: Duration = Duration::from_secs(3600);

/// A directory of one test, removed whatever happens.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = std::env::temp_dir().join(format!(
            "stoq-ca-loopback-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
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

fn sim_clock() -> Arc<SimWallClock> {
    Arc::new(SimWallClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)))
}

/// A CA in a directory, and the service in front of it.
struct Ca {
    ca: Arc<LocalCa>,
    server: Arc<TrustchainServer>,
    identity: Arc<RotatingIdentity>,
    trust: Arc<TrustStore>,
    service: CaService,
}

impl Ca {
    fn start(directory: &Path, clock: &Arc<SimWallClock>, port: u16) -> Self {
        let path = directory.join("ca");
        let ca = LocalCa::open_at(&path, LocalCaConfig::default(), clock.clone()).expect("a CA");
        let ca = Arc::new(ca);
        ca.revocation_list().expect("a list");
        let names = IdentityNames::new().with_dns(CA_NAME).expect("a name");
        let identity = RotatingIdentity::with_authority(ca.clone(), names)
            .roots([ca.root()])
            .clock(clock.clone())
            .start()
            .expect("the CA certifies itself");
        let trust = TrustStore::builder()
            .roots([ca.root()])
            .crl_pem(path.join("crl.pem"))
            .build()
            .expect("trust");
        let tls = ServerTls::builder()
            .identity(identity.clone())
            .client_auth(ClientAuth::Optional(trust.clone()))
            .clock(clock.clone())
            .alpn([TRUSTCHAIN_ALPN])
            .build()
            .expect("TLS");
        let tokens = TokenDirectory::open(&directory.join("tokens")).expect("tokens");
        let keys = SharedKeys::load_or_create(&directory.join("fleet.key")).expect("keys");
        let server = TrustchainServer::new(ca.clone(), clock.clone());
        let server = Arc::new(server.with_tokens(tokens).with_fleet_keys(keys));
        let bind = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
        let service = CaService::start(bind, &tls, server.clone()).expect("the service starts");
        Self { ca, server, identity, trust, service }
    }

    fn config(&self, clock: &Arc<SimWallClock>, token: Option<String>) -> RemoteCaConfig {
        let mut config =
            RemoteCaConfig::new(self.service.local_addr(), CA_NAME, vec![self.ca.root()]);
        config.token = token;
        config.clock = clock.clone();
        config
    }

    fn token(&self, name: &str) -> String {
        self.server.create_token(node(name), HOUR).expect("a token")
    }
}

fn node(name: &str) -> IdentityNames {
    IdentityNames::new().with_dns(name).expect("a name")
}

fn identity(ca: &Arc<RemoteCa>, name: &str, clock: &Arc<SimWallClock>) -> IdentityBuilder {
    RotatingIdentity::with_authority(ca.clone(), node(name)).clock(clock.clone())
}

fn fault(result: Result<Arc<RotatingIdentity>, CertsError>) -> CertificateFault {
    result.expect_err("refused").fault()
}

#[test]
fn a_node_enrols_once_and_renews_over_quic_for_days() {
    let _watchdog = Watchdog::new("a_node_enrols_once_and_renews_over_quic_for_days");
    let (scratch, clock) = (Scratch::new(), sim_clock());
    let ca = Ca::start(&scratch.0, &clock, 0);
    let remote = RemoteCa::new(ca.config(&clock, Some(ca.token("a.example")))).expect("a client");
    let node = identity(&remote, "a.example", &clock)
        .roots([ca.ca.root()])
        .store(scratch.0.join("node.pem"))
        .start()
        .expect("enrolled");
    let end = clock.now() + 5 * 24 * HOUR;
    while clock.now() < end {
        let next = node.poll(clock.now()).min(ca.identity.poll(clock.now()));
        clock.set(next + Duration::from_secs(1));
    }
    let status = node.status();
    assert!(status.renewals >= 7 && status.failures == 0, "{status:?}");
    let counters = ca.server.counters();
    assert_eq!((counters.enrolled, counters.refused), (1, 0));
    assert_eq!(counters.renewed, status.renewals);
    // A restart takes the stored certificate, and renews with it: no token is left.
    drop(node);
    let remote = RemoteCa::new(ca.config(&clock, None)).expect("a client");
    let node = identity(&remote, "a.example", &clock)
        .store(scratch.0.join("node.pem"))
        .start()
        .expect("stored");
    clock.set(node.status().next_renewal.expect("planned") + Duration::from_secs(1));
    node.poll(clock.now());
    assert_eq!(node.status().renewals, 1, "{:?}", node.status());
    // The fleet's secret comes the same way.
    let keys = remote.shared_keys().expect("keys").ticket_secret().expect("derived");
    assert_eq!(keys, remote.shared_keys().expect("keys").ticket_secret().expect("derived"));
}

#[test]
fn a_stolen_token_works_once_and_is_counted() {
    let _watchdog = Watchdog::new("a_stolen_token_works_once_and_is_counted");
    let (scratch, clock) = (Scratch::new(), sim_clock());
    let ca = Ca::start(&scratch.0, &clock, 0);
    let token = ca.token("a.example");
    let enrol = |token: &str| {
        let remote = RemoteCa::new(ca.config(&clock, Some(token.to_owned()))).expect("a client");
        identity(&remote, "a.example", &clock).start()
    };
    let first = enrol(&token).expect("the first wins");
    assert_eq!(fault(enrol(&token)), CertificateFault::TokenSpent);
    assert_eq!(fault(enrol(&"0".repeat(64))), CertificateFault::TokenInvalid);
    let late = ca.token("b.example");
    clock.advance(2 * HOUR);
    assert_eq!(fault(enrol(&late)), CertificateFault::TokenInvalid);
    assert_eq!(ca.server.faults().count(CertificateFault::TokenSpent), 1);
    assert_eq!(ca.server.faults().count(CertificateFault::TokenInvalid), 2);
    assert_eq!(ca.server.counters().enrolled, 1);
    // The CA itself and the first node: nothing was half-issued.
    assert_eq!(ca.ca.issued_count(), 2);
    assert!(first.status().serial.is_some());
}

#[test]
fn a_false_ca_gets_no_token_and_a_stranger_no_renewal() {
    let _watchdog = Watchdog::new("a_false_ca_gets_no_token_and_a_stranger_no_renewal");
    let (scratch, clock) = (Scratch::new(), sim_clock());
    let ca = Ca::start(&scratch.0, &clock, 0);
    let other = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).expect("a CA");
    let token = ca.token("a.example");
    let mut config = ca.config(&clock, Some(token.clone()));
    config.roots = vec![other.root()];
    let remote = RemoteCa::new(config).expect("a client");
    let refused = identity(&remote, "a.example", &clock).start();
    assert_eq!(fault(refused), CertificateFault::UnknownRoot);
    let mut config = ca.config(&clock, Some(token.clone()));
    config.server_name = "elsewhere.example".to_owned();
    let remote = RemoteCa::new(config).expect("a client");
    let refused = identity(&remote, "a.example", &clock).start();
    assert_eq!(fault(refused), CertificateFault::WrongName);
    // Without a token and without a certificate there is nothing to authenticate with.
    let remote = RemoteCa::new(ca.config(&clock, None)).expect("a client");
    let error = identity(&remote, "a.example", &clock).start().expect_err("refused");
    assert!(error.to_string().contains("authenticated by the current certificate"), "{error}");
    // The token was shown to nobody who could spend it.
    let remote = RemoteCa::new(ca.config(&clock, Some(token))).expect("a client");
    identity(&remote, "a.example", &clock).start().expect("enrolled");
}

#[test]
fn a_ca_that_restarts_is_waited_for_and_keeps_its_tokens() {
    let _watchdog = Watchdog::new("a_ca_that_restarts_is_waited_for_and_keeps_its_tokens");
    let (scratch, clock) = (Scratch::new(), sim_clock());
    let ca = Ca::start(&scratch.0, &clock, 0);
    let port = ca.service.local_addr().port();
    let mut config = ca.config(&clock, Some(ca.token("a.example")));
    config.timeout = Duration::from_secs(2);
    let remote = RemoteCa::new(config).expect("a client");
    let node = identity(&remote, "a.example", &clock).start().expect("enrolled");
    let unused = ca.server.create_token(self::node("b.example"), 48 * HOUR).expect("a token");
    let serial = node.status().serial;
    drop(ca);
    clock.set(node.status().next_renewal.expect("planned") + Duration::from_secs(1));
    node.poll(clock.now());
    let status = node.status();
    assert_eq!((status.failures, &status.serial), (1, &serial), "{status:?}");
    assert!(status.last_error.expect("told").contains("cannot be reached"));
    let ca = Ca::start(&scratch.0, &clock, port);
    clock.set(node.status().next_renewal.expect("planned") + Duration::from_secs(1));
    node.poll(clock.now());
    let status = node.status();
    assert_eq!((status.renewals, status.last_error), (1, None));
    assert_ne!(status.serial, serial);
    let remote = RemoteCa::new(ca.config(&clock, Some(unused))).expect("a client");
    identity(&remote, "b.example", &clock).start().expect("a token outlives a restart");
}

#[test]
fn a_revoked_node_renews_no_more() {
    let _watchdog = Watchdog::new("a_revoked_node_renews_no_more");
    let (scratch, clock) = (Scratch::new(), sim_clock());
    let ca = Ca::start(&scratch.0, &clock, 0);
    let remote = RemoteCa::new(ca.config(&clock, Some(ca.token("a.example")))).expect("a client");
    let node = identity(&remote, "a.example", &clock).start().expect("enrolled");
    assert_eq!(ca.ca.revoke(&self::node("a.example")).expect("revoked").len(), 1);
    ca.ca.revocation_list().expect("a list");
    ca.trust.poll(clock.now());
    clock.set(node.status().next_renewal.expect("planned") + Duration::from_secs(1));
    node.poll(clock.now());
    let status = node.status();
    assert_eq!(status.renewals, 0, "{status:?}");
    assert!(status.last_error.as_ref().is_some_and(|why| why.contains("revoked")), "{status:?}");
    assert_eq!(ca.server.counters().renewed, 0);
}

/// A node follows its CA's revocation list: whom the CA revokes, while both run, the node's server
/// refuses; while the CA is away the last list stands.
#[test]
fn a_revocation_reaches_the_nodes_of_a_running_ca() {
    let _watchdog = Watchdog::new("a_revocation_reaches_the_nodes_of_a_running_ca");
    let (scratch, clock) = (Scratch::new(), sim_clock());
    let ca = Ca::start(&scratch.0, &clock, 0);
    let orders = scratch.0.join("revocations");
    let open = || RevocationDirectory::open(&orders).expect("a directory");
    let desk = RevocationDesk::new(ca.ca.clone(), open());
    let enrol = |name: &str| {
        let mut config = ca.config(&clock, Some(ca.token(name)));
        config.timeout = Duration::from_secs(5);
        let remote = RemoteCa::new(config).expect("a client");
        let identity = identity(&remote, name, &clock).start().expect("enrolled");
        (remote, identity)
    };
    let (server_ca, server) = enrol("a.example");
    let (_, thief) = enrol("thief.example");
    let (_, good) = enrol("good.example");
    let path = scratch.0.join("node-crl.pem");
    let feed = RevocationFeed::start(server_ca.clone(), &path).expect("fetched");
    let trust = TrustStore::builder().roots([ca.ca.root()]).crl_pem(&path).build().expect("trust");
    let tls = ServerTls::builder()
        .identity(server)
        .client_auth(ClientAuth::Required(trust.clone()))
        .clock(clock.clone())
        .alpn(["t"])
        .build()
        .expect("TLS");
    let serving = Arc::new(
        Engine::builder().config(pair::config()).server(tls.crypto()).start().expect("starts"),
    );
    let client = Engine::builder().config(pair::config()).start().expect("starts");
    let root = ca.ca.root();
    let visit = |identity: &Arc<RotatingIdentity>| {
        let tls = ClientTls::builder()
            .roots([root.clone()])
            .identity(identity.clone())
            .clock(clock.clone())
            .alpn(["t"])
            .build()
            .expect("TLS");
        pollster::block_on(async {
            let accepting = async { serving.accept().await.expect("knocks").accept().await };
            let name = "a.example";
            let connecting = client.connect_with(serving.local_addr(), name, tls.crypto());
            // The client's side is done before the server has judged its certificate.
            let (connected, accepted) = futures_util::future::join(connecting, accepting).await;
            drop(connected);
            accepted.map(drop)
        })
    };
    visit(&thief).expect("not revoked yet");
    // Ordered by another process, in effect.
    let revoked = std::thread::scope(|scope| {
        let patience = Duration::from_secs(60);
        let order = scope.spawn(move || open().revoke(&node("thief.example"), patience));
        while !order.is_finished() {
            desk.poll(clock.now());
            std::thread::sleep(Duration::from_millis(10));
        }
        order.join().expect("did not panic")
    });
    assert_eq!(revoked.expect("revoked").len(), 1);
    clock.advance(Duration::from_secs(61));
    feed.poll(clock.now());
    trust.poll(clock.now());
    assert_eq!((feed.update_count(), trust.reload_count()), (2, 1));
    let error = visit(&thief).expect_err("revoked");
    assert!(error.to_string().contains("revoked"), "{error}");
    assert_eq!(tls.faults().count(CertificateFault::Revoked), 1);
    visit(&good).expect("nobody else is");
    // Nothing new, then no CA: the list stands, across a restart, too.
    clock.advance(Duration::from_secs(61));
    feed.poll(clock.now());
    assert_eq!((feed.update_count(), feed.failure_count()), (2, 0));
    drop((desk, ca));
    clock.advance(Duration::from_secs(61));
    feed.poll(clock.now());
    assert_eq!((feed.update_count(), feed.failure_count()), (2, 1));
    let feed = RevocationFeed::start(server_ca.clone(), &path).expect("the stored list serves");
    assert_eq!(feed.failure_count(), 1);
    RevocationFeed::start(server_ca, scratch.0.join("other.pem")).expect_err("nothing to serve");
}

/// A node whose clock is wrong cannot enrol or renew, keeps what it has, and is told why; so is one
/// whose CA has the wrong date.
#[test]
fn a_node_or_a_ca_with_a_wrong_clock_is_told() {
    let _watchdog = Watchdog::new("a_node_or_a_ca_with_a_wrong_clock_is_told");
    let (scratch, clock) = (Scratch::new(), sim_clock());
    let ca = Ca::start(&scratch.0, &clock, 0);
    let (behind, ahead) = (clock.now() - HOUR, clock.now() + 48 * HOUR);
    for (wrong, fault) in
        [(behind, CertificateFault::NotYetValid), (ahead, CertificateFault::Expired)]
    {
        let node_clock = Arc::new(SimWallClock::new(wrong));
        let token = ca.token("a.example");
        let remote = RemoteCa::new(ca.config(&node_clock, Some(token.clone()))).expect("a client");
        let error = identity(&remote, "a.example", &node_clock).start().expect_err("refused");
        assert_eq!(error.fault(), fault, "{error}");
        assert!(error.to_string().contains("clock"), "{error}");
        // Set right, the same token serves: it was shown to nobody.
        node_clock.set(clock.now());
        let node = identity(&remote, "a.example", &node_clock).start().expect("enrolled");
        let before = node.status();
        // Wrong again, when the next renewal is due.
        let due = before.next_renewal.expect("planned") + Duration::from_secs(1);
        node_clock.set(if fault == CertificateFault::Expired { ahead } else { behind });
        node.poll(node_clock.now());
        let status = node.status();
        assert_eq!((status.failures, &status.serial), (1, &before.serial), "{status:?}");
        assert!(status.last_error.as_ref().is_some_and(|why| why.contains("clock")), "{status:?}");
        assert!(node.faults().count(fault) > 0);
        // And right: it renews by itself.
        clock.set(due);
        node_clock.set(due + Duration::from_secs(660));
        ca.identity.poll(clock.now());
        node.poll(node_clock.now());
        assert_eq!(node.status().renewals, 1, "{:?}", node.status());
    }
    // A CA two days ahead of everybody certifies nobody.
    clock.advance(48 * HOUR);
    ca.identity.poll(clock.now());
    let right = Arc::new(SimWallClock::new(clock.now() - 48 * HOUR));
    let remote = RemoteCa::new(ca.config(&right, Some(ca.token("b.example")))).expect("a client");
    let error = identity(&remote, "b.example", &right).start().expect_err("refused");
    assert_eq!(error.fault(), CertificateFault::NotYetValid, "{error}");
    assert!(error.to_string().contains("issuer's"), "{error}");
}

/// What is no request is refused, and the service goes on.
#[test]
fn garbage_is_refused_and_harms_nobody() {
    let _watchdog = Watchdog::new("garbage_is_refused_and_harms_nobody");
    let (scratch, clock) = (Scratch::new(), sim_clock());
    let ca = Ca::start(&scratch.0, &clock, 0);
    let tls = ClientTls::builder()
        .roots([ca.ca.root()])
        .clock(clock.clone())
        .alpn([TRUSTCHAIN_ALPN])
        .build()
        .expect("TLS");
    let client =
        Engine::builder().config(pair::config()).client(tls.crypto()).start().expect("starts");
    let answer = Message::Issued { chain: Vec::new() }.encode().expect("encodes");
    let renew = Message::Renew { csr: vec![1; 100] }.encode().expect("encodes");
    let long = [&renew[..], b"x"].concat();
    for (bytes, code) in [
        (&b""[..], RefusalCode::Invalid),
        (b"\xff\xff\xff\xff", RefusalCode::Invalid),
        (&renew[..50], RefusalCode::Invalid),
        (&long, RefusalCode::Invalid),
        (&answer, RefusalCode::Invalid),
        (&renew, RefusalCode::Unauthorized),
    ] {
        let refused = pollster::block_on(async {
            let connection = client.connect(ca.service.local_addr(), CA_NAME).await.expect("made");
            let (mut send, mut recv) = connection.open_bi().await.expect("opened");
            send.write_all(bytes).await.expect("written");
            send.finish().expect("finished");
            let frame = recv.read_to_end(1 << 20).await.expect("answered");
            FrameReader::default().handle_bytes(&frame).expect("a message").expect("whole")
        });
        assert!(
            matches!(&refused, Message::Refused { code: why, .. } if *why == code),
            "{refused:?}"
        );
    }
    client.shutdown_blocking(Duration::ZERO, VarInt::from_u32(0), b"");
    assert_eq!(ca.server.counters().enrolled + ca.server.counters().renewed, 0);
    let remote = RemoteCa::new(ca.config(&clock, Some(ca.token("a.example")))).expect("a client");
    identity(&remote, "a.example", &clock).start().expect("still serves");
    // A request for other names than the token's is refused by the CA's policy.
    let remote = RemoteCa::new(ca.config(&clock, Some(ca.token("a.example")))).expect("a client");
    let error = identity(&remote, "bank.example", &clock).start().expect_err("refused");
    assert!(error.to_string().contains("not entitled"), "{error}");
    let _implements: &dyn CertificateAuthority = &*remote;
}

#[test]
fn statistics_and_metrics_tell_how_a_certificate_fares() {
    let _watchdog = Watchdog::new("statistics_and_metrics_tell_how_a_certificate_fares");
    let clock = sim_clock();
    let identity = RotatingIdentity::self_signed(node("a.example"))
        .clock(clock.clone())
        .start()
        .expect("made");
    let tls = ServerTls::builder()
        .identity(identity.clone())
        .clock(clock.clone())
        .alpn(["t"])
        .build()
        .expect("TLS");
    let engine = Engine::builder()
        .config(pair::config())
        .server(tls.crypto())
        .rotation(identity.clone())
        .start()
        .expect("starts");
    assert_eq!(engine.transport_stats().rotation, Some(identity.status()));
    let first = identity.status();
    clock.set(first.next_renewal.expect("planned"));
    identity.poll(clock.now());
    let status = engine.transport_stats().rotation.expect("given");
    assert!(status.serial != first.serial && status.renewals == 1, "{status:?}");
    let end = status.not_after.expect("served").duration_since(SystemTime::UNIX_EPOCH);
    let text = engine.prometheus();
    for line in [
        format!("stoq_certificate_not_after_seconds {}", end.expect("after 1970").as_secs()),
        "stoq_certificate_renewals_total 1".to_owned(),
        "stoq_certificate_alarms_total 0".to_owned(),
        "stoq_certificate_faults_total{by=\"identity\",fault=\"expired\"} 0".to_owned(),
    ] {
        assert!(text.lines().any(|each| each == line), "{line} is not in\n{text}");
    }
}
