//! ACME against Pebble in strict mode, with real validation over loopback: HTTP-01 by a responder of
//! this test, DNS-01 by `pebble-challtestsrv`. Needs the Debian package `pebble`.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use stoq::certs::acme::{AcmeCa, AcmeChallenge, AcmeChallenges, AcmeConfig, ChallengeKind};
use stoq::certs::{
    CertificateAuthority, CertificateFault, CertsError, IdentityNames, LocalCa, LocalCaConfig,
    Periodic, RotatingIdentity, SimWallClock, WallClock, certificates_from_file,
    private_key_from_file,
};

const PATIENCE: Duration = Duration::from_secs(60);
const NAME: &str = "node.stoq.test";

/// A directory of one test, removed whatever happens.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("stoq-acme-{}-{number}", std::process::id()));
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

/// A child that cannot outlive its test.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).spawn().unwrap_or_else(|error| {
            panic!("{command:?}: {error}; `apt-get install pebble` installs it")
        });
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Dead already is as good.
        let _already_dead = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("[::1]:0").expect("bound").local_addr().expect("known").port()
}

fn wait_for_port(port: u16) {
    let start = Instant::now();
    while TcpStream::connect((Ipv6Addr::LOCALHOST, port)).is_err() {
        assert!(start.elapsed() < PATIENCE, "nobody listens on port {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Answers of the HTTP-01 responder: path to body.
type Answers = Arc<Mutex<HashMap<String, String>>>;

/// Serves what hooks put up. The thread ends with the process.
fn responder() -> (u16, Answers) {
    let listener = TcpListener::bind("[::1]:0").expect("bound");
    let port = listener.local_addr().expect("known").port();
    let answers = Answers::default();
    let served = answers.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
            reader.read_line(&mut line).expect("a request");
            let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
            while reader.read_line(&mut line).expect("a header") > 2 {}
            let body = served.lock().expect("not poisoned").get(&path).cloned();
            let status = if body.is_some() { "200 OK" } else { "404 Not Found" };
            let body = body.unwrap_or_default();
            let length = body.len();
            // A client that went away meanwhile is its own business.
            let _gone = write!(
                stream,
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            );
        }
    });
    (port, answers)
}

/// Pebble, its DNS, and what answers its questions.
struct Acme {
    scratch: Scratch,
    directory_url: String,
    dns_management_port: u16,
    answers: Answers,
    _processes: [Process; 2],
}

impl Acme {
    fn start() -> Self {
        let scratch = Scratch::new();
        let [port, management, dns, dns_management] = [(); 4].map(|()| free_port());
        let (http, answers) = responder();
        // Pebble's own web server has a certificate of a CA of ours.
        let ca = LocalCa::open(&scratch.0.join("ca"), LocalCaConfig::default()).expect("a CA");
        let root = ca.root();
        let names = IdentityNames::new().with_dns("localhost").expect("a name");
        let pem = scratch.0.join("pebble.pem");
        RotatingIdentity::with_authority(Arc::new(ca), names.with_ipv6(Ipv6Addr::LOCALHOST))
            .roots([root])
            .store(&pem)
            .start()
            .expect("a certificate");
        let config = serde_json::json!({ "pebble": {
            "listenAddress": format!("[::1]:{port}"),
            "managementListenAddress": format!("[::1]:{management}"),
            "certificate": pem, "privateKey": pem,
            "httpPort": http, "tlsPort": 1, "ocspResponderURL": "",
            "externalAccountBindingRequired": false,
        }});
        let path = scratch.0.join("pebble.json");
        std::fs::write(&path, config.to_string()).expect("written");
        let challenges = Process::start(
            Command::new("pebble-challtestsrv")
                .args(["-defaultIPv4", "", "-defaultIPv6", "::1"])
                .args(["-http01", "", "-https01", "", "-tlsalpn01", ""])
                .args(["-dns01", &format!("[::1]:{dns}")])
                .args(["-management", &format!("[::1]:{dns_management}")])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        let pebble = Process::start(
            Command::new("pebble")
                .args(["-strict", "-dnsserver", &format!("[::1]:{dns}"), "-config"])
                .arg(&path)
                .env("PEBBLE_VA_NOSLEEP", "1")
                // Else it refuses some good nonces at random; a refused order is tried again by the
                // rotation's back-off, which this test does not wait for.
                .env("PEBBLE_WFE_NONCEREJECT", "0")
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        wait_for_port(dns_management);
        wait_for_port(port);
        Self {
            directory_url: format!("https://[::1]:{port}/dir"),
            dns_management_port: dns_management,
            answers,
            scratch,
            _processes: [challenges, pebble],
        }
    }

    fn ca(&self, hooks: Hooks) -> (Arc<AcmeCa>, Arc<Hooks>) {
        let account = self.scratch.0.join("account.json");
        let mut config = AcmeConfig::new(&self.directory_url, account);
        config.terms_of_service_agreed = true;
        config.server_root = Some(self.scratch.0.join("ca/root.pem"));
        config.timeout = PATIENCE;
        let hooks = Arc::new(hooks);
        (Arc::new(AcmeCa::new(config, hooks.clone()).expect("a client")), hooks)
    }

    fn hooks(&self, kind: ChallengeKind) -> Hooks {
        Hooks {
            kind,
            answers: self.answers.clone(),
            dns: SocketAddrV6::new(Ipv6Addr::LOCALHOST, self.dns_management_port, 0, 0),
            lies: false,
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
        }
    }
}

/// A directory over HTTPS that sends everybody to Pebble, and tells when it wants certificates renewed
/// (RFC 9773, section 4): the Pebble that Debian 12 has, 2.4, is older than that. The thread ends with
/// the process.
struct Wishes {
    directory_url: String,
    /// Paths asked for.
    asked: Arc<Mutex<Vec<String>>>,
    /// The answer, JSON.
    window: Arc<Mutex<String>>,
}

impl Wishes {
    fn start(acme: &Acme) -> Self {
        let pem = acme.scratch.0.join("pebble.pem");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(
                certificates_from_file(&pem).expect("Pebble's chain"),
                private_key_from_file(&pem).expect("Pebble's key"),
            );
        let config = Arc::new(config.expect("a pair"));
        let listener = TcpListener::bind("[::1]:0").expect("bound");
        let own = format!("https://{}", listener.local_addr().expect("known"));
        let pebble = acme.directory_url.trim_end_matches("/dir");
        let directory = serde_json::json!({
            "newNonce": format!("{pebble}/nonce-plz"),
            "newAccount": format!("{pebble}/sign-me-up"),
            "newOrder": format!("{pebble}/order-plz"),
            "revokeCert": format!("{pebble}/revoke-cert"),
            "keyChange": format!("{pebble}/rollover-account-key"),
            "renewalInfo": format!("{own}/renewal"),
            "meta": { "termsOfService": "data:text/plain,none" },
        });
        let wishes = Self {
            directory_url: format!("{own}/dir"),
            asked: Arc::default(),
            window: Arc::default(),
        };
        let (asked, window) = (wishes.asked.clone(), wishes.window.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let connection = rustls::ServerConnection::new(config.clone()).expect("TLS");
                let stream = rustls::StreamOwned::new(connection, stream.expect("a connection"));
                let mut reader = BufReader::new(stream);
                let mut line = String::new();
                if reader.read_line(&mut line).is_err() {
                    continue;
                }
                let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                while reader.read_line(&mut line).is_ok_and(|length| length > 2) {}
                let body = match path.as_str() {
                    "/dir" => directory.to_string(),
                    _ => window.lock().expect("not poisoned").clone(),
                };
                asked.lock().expect("not poisoned").push(path);
                let length = body.len();
                // A client that went away meanwhile is its own business.
                let _gone = write!(
                    reader.get_mut(),
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nRetry-After: 7200\r\n\
                     Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                );
                reader.get_mut().conn.send_close_notify();
                let _flushed = reader.get_mut().flush();
            }
        });
        wishes
    }
}

/// The test's own hooks.
struct Hooks {
    kind: ChallengeKind,
    answers: Answers,
    dns: SocketAddrV6,
    /// Puts up what proves nothing.
    lies: bool,
    up: AtomicU64,
    down: AtomicU64,
}

impl Hooks {
    fn tell_dns(&self, path: &str, body: &serde_json::Value) -> Result<(), String> {
        let mut stream = TcpStream::connect(self.dns).map_err(|error| error.to_string())?;
        let body = body.to_string();
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )
        .map_err(|error| error.to_string())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
        match answer.starts_with("HTTP/1.1 200") {
            true => Ok(()),
            false => Err(answer),
        }
    }
}

impl AcmeChallenges for Hooks {
    fn kind(&self) -> ChallengeKind {
        self.kind
    }

    fn present(&self, challenge: &AcmeChallenge) -> Result<(), String> {
        self.up.fetch_add(1, Ordering::Relaxed);
        match challenge {
            AcmeChallenge::Http01 { token, key_authorization, .. } => {
                let path = format!("/.well-known/acme-challenge/{token}");
                let body = if self.lies { "something else" } else { key_authorization };
                self.answers.lock().expect("not poisoned").insert(path, body.to_owned());
                Ok(())
            }
            AcmeChallenge::Dns01 { record, value } => self.tell_dns(
                "/set-txt",
                &serde_json::json!({ "host": format!("{record}."), "value": value }),
            ),
            other => Err(format!("{other:?} is unknown")),
        }
    }

    fn clean_up(&self, challenge: &AcmeChallenge) {
        self.down.fetch_add(1, Ordering::Relaxed);
        match challenge {
            AcmeChallenge::Http01 { token, .. } => {
                let path = format!("/.well-known/acme-challenge/{token}");
                self.answers.lock().expect("not poisoned").remove(&path);
            }
            AcmeChallenge::Dns01 { record, .. } => {
                let host = serde_json::json!({ "host": format!("{record}.") });
                self.tell_dns("/clear-txt", &host).expect("cleared");
            }
            other => panic!("{other:?} is unknown"),
        }
    }
}

fn names() -> IdentityNames {
    IdentityNames::new().with_dns(NAME).expect("a name")
}

#[test]
fn http_01_certifies_and_renews_with_one_account() {
    let acme = Acme::start();
    let (ca, hooks) = acme.ca(acme.hooks(ChallengeKind::Http01));
    // Pebble dates its certificates from the moment it signs.
    let clock = Arc::new(SimWallClock::new(SystemTime::now() + Duration::from_secs(60)));
    let store = acme.scratch.0.join("node.pem");
    let node = RotatingIdentity::with_authority(ca.clone(), names())
        .clock(clock.clone())
        .store(&store)
        .start()
        .expect("certified");
    let account = std::fs::read(acme.scratch.0.join("account.json")).expect("stored");
    let first = node.status();
    // Renewed at its time, by the same account.
    clock.set(first.next_renewal.expect("planned") + Duration::from_secs(1));
    node.poll(clock.now());
    let status = node.status();
    assert_eq!((status.renewals, &status.last_error), (1, &None));
    assert_ne!(status.serial, first.serial);
    assert_eq!(std::fs::read(acme.scratch.0.join("account.json")).expect("stored"), account);
    let (up, down) = (hooks.up.load(Ordering::Relaxed), hooks.down.load(Ordering::Relaxed));
    assert!(up >= 1 && up == down, "{up} answers put up, {down} taken down");
    assert!(acme.answers.lock().expect("not poisoned").is_empty());
    // This Pebble knows no renewal information: no wish, and no error.
    let key = node.certified_key().expect("serves");
    assert_eq!(ca.renewal_window(&key.cert[0]).expect("answered"), None);
}

/// The CA's wish is asked for by the certificate's identifier, and moves the renewal.
#[test]
fn renewal_information_moves_the_renewal() {
    let acme = Acme::start();
    let wishes = Wishes::start(&acme);
    let hooks = Arc::new(acme.hooks(ChallengeKind::Http01));
    let mut config = AcmeConfig::new(&wishes.directory_url, acme.scratch.0.join("account.json"));
    config.terms_of_service_agreed = true;
    config.server_root = Some(acme.scratch.0.join("ca/root.pem"));
    config.timeout = PATIENCE;
    let ca = Arc::new(AcmeCa::new(config, hooks).expect("a client"));
    let clock = Arc::new(SimWallClock::new(SystemTime::now() + Duration::from_secs(60)));
    *wishes.window.lock().expect("not poisoned") = serde_json::json!({
        "suggestedWindow": { "start": "2020-01-01T00:00:00Z", "end": "2020-01-02T00:00:00Z" },
    })
    .to_string();
    let node = RotatingIdentity::with_authority(ca.clone(), names())
        .clock(clock.clone())
        .start()
        .expect("certified");
    let key = node.certified_key().expect("serves");
    let window = ca.renewal_window(&key.cert[0]).expect("answered").expect("a wish");
    let at = |text: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(text);
    assert_eq!((window.start, window.end), (at(1_577_836_800), at(1_577_923_200)));
    assert!(window.retry_after > Duration::from_secs(7000), "{window:?}");
    // base64url(key identifier of the issuer).base64url(serial), RFC 9773 §4.1.
    let asked = wishes.asked.lock().expect("not poisoned").last().cloned().expect("asked");
    let id = asked.strip_prefix("/renewal/").unwrap_or_else(|| panic!("asked for {asked}"));
    let (issuer, serial) = id.split_once('.').expect("two parts");
    let is_base64url = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    assert!(is_base64url(issuer) && is_base64url(serial), "{id}");
    // In the past: at once, far before half of the life; once, for the new certificate is asked about
    // anew, and wished for later.
    let first = node.status();
    node.poll(clock.now());
    let planned = node.status().next_renewal.expect("planned");
    assert!(planned <= clock.now(), "moved to the present: {planned:?} {:?}", clock.now());
    assert!(first.next_renewal.expect("planned") > clock.now() + Duration::from_secs(3600));
    *wishes.window.lock().expect("not poisoned") = serde_json::json!({
        "suggestedWindow": { "start": "2090-01-01T00:00:00Z", "end": "2090-01-02T00:00:00Z" },
    })
    .to_string();
    node.poll(clock.now());
    let status = node.status();
    assert_eq!((status.renewals, &status.last_error), (1, &None), "{status:?}");
    assert_ne!(status.serial, first.serial);
    node.poll(clock.now());
    assert_eq!(node.status().renewals, 1, "a wish for later moves nothing");
}

#[test]
fn dns_01_certifies_wildcards() {
    let acme = Acme::start();
    let (ca, hooks) = acme.ca(acme.hooks(ChallengeKind::Dns01));
    let names = IdentityNames::new().with_dns("*.wild.stoq.test").expect("a name");
    let names = names.with_dns("wild.stoq.test").expect("a name");
    let node = RotatingIdentity::with_authority(ca, names).start().expect("certified");
    assert!(node.status().serial.is_some());
    let (up, down) = (hooks.up.load(Ordering::Relaxed), hooks.down.load(Ordering::Relaxed));
    assert!(up >= 1 && up == down, "{up} answers put up, {down} taken down");
}

#[test]
fn a_failed_proof_is_refused_and_leaves_nothing() {
    let acme = Acme::start();
    let hooks = Hooks { lies: true, ..acme.hooks(ChallengeKind::Http01) };
    let (ca, hooks) = acme.ca(hooks);
    let store = acme.scratch.0.join("node.pem");
    let refused = RotatingIdentity::with_authority(ca, names()).store(&store).start();
    let error = refused.expect_err("refused");
    assert!(matches!(error, CertsError::Authority(_)), "{error:?}");
    assert!(error.to_string().contains("acme:error:unauthorized"), "{error}");
    assert!(!store.exists());
    assert_eq!(hooks.up.load(Ordering::Relaxed), hooks.down.load(Ordering::Relaxed));
    assert!(acme.answers.lock().expect("not poisoned").is_empty());
    // A web server of another CA gets no account.
    let mut config =
        AcmeConfig::new(&acme.directory_url, acme.scratch.0.join("another-account.json"));
    let other = LocalCa::open(&acme.scratch.0.join("other"), LocalCaConfig::default());
    drop(other.expect("a CA"));
    config.server_root = Some(acme.scratch.0.join("other/root.pem"));
    let ca = AcmeCa::new(config, hooks).expect("a client");
    let error =
        RotatingIdentity::with_authority(Arc::new(ca), names()).start().expect_err("refused");
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    assert_eq!(error.fault(), CertificateFault::Other);
    assert!(!acme.scratch.0.join("another-account.json").exists());
}
