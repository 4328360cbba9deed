//! A serving node is handed one bad certificate or key after the other: each is refused with an error of
//! its own, counted under its own name, and connections go on being made with the good pair.
//!
//! What peers refuse is in `src/certs/tls_tests.rs`, what a CA refuses in `tests/ca_loopback.rs` and
//! `tests/certs_process.rs`.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::join;
use pair::{NAME, Watchdog, config};
use pollster::block_on;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use stoq::VarInt;
use stoq::certs::{
    CertificateFault, ClientTls, Periodic, RotatingIdentity, ServerTls, SimWallClock, WallClock,
};
use stoq::engine::Engine;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The two files of the node, in a directory that is removed whatever happens.
struct Files {
    directory: PathBuf,
    now: SystemTime,
}

impl Drop for Files {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.directory);
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

impl Files {
    fn chain(&self) -> PathBuf {
        self.directory.join("chain.pem")
    }

    fn key(&self) -> PathBuf {
        self.directory.join("node.key")
    }

    /// A pair under `ca`, written with this mode of the key.
    fn write(&self, chain: &str, key: &str, mode: u32) {
        fs::write(self.chain(), chain).unwrap();
        // Replaced, so that the change shows even where size and time are the same.
        let fresh = self.directory.join("fresh");
        fs::write(&fresh, key).unwrap();
        fs::set_permissions(&fresh, fs::Permissions::from_mode(mode)).unwrap();
        fs::rename(&fresh, self.key()).unwrap();
    }

    fn leaf(&self, ca: &Ca, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([NAME.to_owned()]).unwrap();
        params.not_before = (self.now - DAY).into();
        params.not_after = (self.now + DAY).into();
        params.is_ca = IsCa::ExplicitNoCa;
        change(&mut params);
        let leaf = params.signed_by(&key, &ca.issuer).unwrap();
        (leaf.pem(), key.serialize_pem())
    }
}

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: rcgen::Certificate,
}

impl Ca {
    fn new(now: SystemTime) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = (now - 100 * DAY).into();
        params.not_after = (now + 100 * DAY).into();
        let root = params.self_signed(&key).unwrap();
        Self { issuer: Issuer::new(params, key), root }
    }
}

#[test]
fn a_serving_node_refuses_each_bad_pair_and_serves_on() {
    use CertificateFault::{
        CaAsLeaf, Expired, KeyReadableByOthers, Malformed, NotYetValid, Truncated, UnknownRoot,
        WrongKey,
    };
    let _watchdog = Watchdog::new("a_serving_node_refuses_each_bad_pair_and_serves_on");
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let clock = Arc::new(SimWallClock::new(now));
    let directory = std::env::temp_dir().join(format!("stoq-bad-input-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let files = Files { directory, now };
    let (ca, stranger) = (Ca::new(now), Ca::new(now));
    let good = files.leaf(&ca, |_| {});
    files.write(&good.0, &good.1, 0o600);
    let identity = RotatingIdentity::from_pem_files(files.chain(), files.key())
        .roots([ca.root.der().clone()])
        .clock(clock.clone())
        .start()
        .unwrap();
    let tls = ServerTls::builder().identity(identity.clone()).clock(clock.clone()).alpn(["t"]);
    let tls = tls.build().unwrap();
    let server = Engine::builder().config(config()).server(tls.crypto()).start().unwrap();
    let client = Engine::builder().config(config()).start().unwrap();
    let connect = || {
        // A client without a memory: a resumed handshake would look at no certificate.
        let tls = ClientTls::builder().roots([ca.root.der().clone()]).clock(clock.clone());
        let tls = tls.alpn(["t"]).build().unwrap();
        block_on(async {
            let accepting = async { server.accept().await.unwrap().accept().await.unwrap() };
            let connecting = client.connect_with(server.local_addr(), NAME, tls.crypto());
            let (made, accepted) = join(connecting, accepting).await;
            made.expect("the good pair is served").close(VarInt::from_u32(0), b"");
            accepted.closed().await;
        });
    };
    connect();
    let first = identity.status();
    let other = files.leaf(&ca, |_| {});
    let expired = files.leaf(&ca, |params| params.not_after = (now - DAY / 2).into());
    let early = files.leaf(&ca, |params| params.not_before = (now + DAY / 2).into());
    let unknown = files.leaf(&stranger, |_| {});
    let ca_leaf = files.leaf(&ca, |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    });
    let cut = |text: &str| text[..text.len() / 2].to_owned();
    let cases = [
        (Expired, expired, 0o600),
        (NotYetValid, early, 0o600),
        (WrongKey, (good.0.clone(), other.1.clone()), 0o600),
        (UnknownRoot, unknown, 0o600),
        (CaAsLeaf, ca_leaf, 0o600),
        (Truncated, (cut(&other.0), other.1.clone()), 0o600),
        (Truncated, (other.0.clone(), cut(&other.1)), 0o600),
        (KeyReadableByOthers, other.clone(), 0o640),
        (Malformed, ("no certificate".to_owned(), other.1.clone()), 0o600),
        (Malformed, (other.0.clone(), "no key".to_owned()), 0o600),
    ];
    let mut errors = HashSet::new();
    for (index, (fault, (chain, key), mode)) in cases.iter().enumerate() {
        let (count, total) = (identity.faults().count(*fault), identity.faults().total());
        files.write(chain, key, *mode);
        clock.advance(Duration::from_secs(6));
        identity.poll(clock.now());
        let status = identity.status();
        let error = status.last_error.clone().unwrap_or_else(|| panic!("{fault:?} was taken"));
        assert_eq!(identity.faults().count(*fault), count + 1, "{fault:?}: {error}");
        assert_eq!(identity.faults().total(), total + 1, "{fault:?} is counted once: {error}");
        assert_eq!(status.failures, index as u64 + 1);
        assert_eq!((&status.serial, status.renewals), (&first.serial, 0));
        assert!(errors.insert(error), "{fault:?} has words of its own");
        connect();
    }
    files.write(&other.0, &other.1, 0o600);
    clock.advance(Duration::from_secs(6));
    identity.poll(clock.now());
    let status = identity.status();
    assert_eq!((status.renewals, status.last_error), (1, None));
    connect();
}
