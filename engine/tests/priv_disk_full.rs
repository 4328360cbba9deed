//! A disk that is really full (a small tmpfs, ENOSPC) under everything that the identity module writes:
//! each write site refuses with an error that says so, nothing is half-written, nothing is lost, and it
//! goes on when there is room again. Needs root, for the mount.
//!
//! The test runs itself again in a mount namespace of its own, so that the mount ends with the process,
//! whatever ends it.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::fs::{self, File};
use std::io::Write;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pair::Watchdog;
use stoq::ca::{CaService, RemoteCa, RemoteCaConfig, RevocationFeed};
use stoq::certs::trustchain::{TRUSTCHAIN_ALPN, TokenDirectory, TrustchainServer};
use stoq::certs::{
    CertsError, ClientAuth, IdentityNames, KeyAlgorithm, LocalCa, LocalCaConfig, Periodic,
    RevocationDirectory, RotatingIdentity, ServerTls, SharedKeys, SimWallClock, TrustStore,
    WallClock,
};

const ROLE: &str = "STOQ_DISK_FULL_ROLE";
const DISK: &str = "STOQ_DISK_FULL_PATH";
const HOUR: Duration = Duration::from_secs(3600);
const PAGE_SIZE_BYTES: usize = 4096;

/// The small disk, mounted by [`child`].
struct Disk(PathBuf);

impl Disk {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Leaves room for `pages` and no more.
    fn fill(&self, pages: usize) {
        let mut filler = File::create(self.path("filler")).unwrap();
        let mut size = 0;
        while filler.write_all(&[7; PAGE_SIZE_BYTES]).is_ok() {
            size += PAGE_SIZE_BYTES;
        }
        filler.set_len((size - pages * PAGE_SIZE_BYTES) as u64).unwrap();
    }

    fn free(&self) {
        fs::remove_file(self.path("filler")).unwrap();
    }

    /// Runs `write` with so many pages free: each time it is refused in words that say why, and no file
    /// but the filler differs from before. Then it succeeds.
    fn refuses_when_full<T: std::fmt::Debug>(
        &self,
        pages: &[usize],
        mut write: impl FnMut() -> Result<T, CertsError>,
    ) -> T {
        for free in pages {
            self.fill(*free);
            let before = self.content();
            let error = write().expect_err("the disk is full");
            assert!(error.to_string().contains("No space left on device"), "{error}");
            assert_eq!(self.content(), before, "{free} pages free");
            self.free();
        }
        write().expect("there is room again")
    }

    /// Every file and what is in it.
    fn content(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        let mut directories = vec![self.0.clone()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else if !path.ends_with("filler") {
                    let content = fs::read(&path).unwrap();
                    files.push((path, content));
                }
            }
        }
        files.sort();
        files
    }
}

fn run_as(role: &str) {
    let path = std::env::temp_dir().join(format!("stoq-disk-full-{}-{role}", std::process::id()));
    fs::create_dir(&path).unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(ROLE, role)
        .env(DISK, &path)
        .output()
        .expect("unshare (util-linux) is needed for this test");
    // What was written went with the mount.
    fs::remove_dir(&path).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(&format!("done: {role}")), "{text}");
}

/// The body of the tests, in the namespace; nothing by itself.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let _watchdog = Watchdog::new("a test of full disks");
    let path = std::env::var(DISK).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs", &path])
        .status()
        .expect("mount runs");
    assert!(mounted.success(), "mounting needs root");
    let disk = Disk(PathBuf::from(path));
    match role.as_str() {
        "local-ca" => local_ca(&disk),
        "node" => node(&disk),
        "service" => service(&disk),
        other => panic!("unknown role {other}"),
    }
    println!("\ndone: {role}");
}

#[test]
fn an_embedded_ca_on_a_full_disk() {
    run_as("local-ca");
}

#[test]
fn a_nodes_own_files_on_a_full_disk() {
    run_as("node");
}

#[test]
fn a_certificate_service_on_a_full_disk() {
    run_as("service");
}

fn names(name: &str) -> IdentityNames {
    IdentityNames::new().with_dns(name).unwrap()
}

fn clock() -> Arc<SimWallClock> {
    Arc::new(SimWallClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)))
}

fn open(path: &Path, clock: &Arc<SimWallClock>) -> Result<Arc<LocalCa>, CertsError> {
    // Its key file takes several pages.
    let config = LocalCaConfig { key_algorithm: KeyAlgorithm::MlDsa65, ..LocalCaConfig::default() };
    LocalCa::open_at(path, config, clock.clone()).map(Arc::new)
}

fn issue(ca: &Arc<LocalCa>, clock: &Arc<SimWallClock>) -> Result<String, CertsError> {
    let identity = RotatingIdentity::with_authority(ca.clone(), names("a.example"));
    Ok(identity.clock(clock.clone()).start()?.status().serial.unwrap())
}

/// `ca.pem` and `root.pem` when it is made, `state.toml` at issue and revocation, `crl.pem`, and `ca.pem`
/// again when the intermediate is renewed.
fn local_ca(disk: &Disk) {
    let clock = clock();
    let path = disk.path("ca");
    // The directory and the lock are made first; an empty file takes no page.
    let ca = {
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        File::create(path.join("lock")).unwrap();
        disk.refuses_when_full(&[0, 1, 2], || open(&path, &clock))
    };
    let root = ca.root();
    let first = disk.refuses_when_full(&[0], || issue(&ca, &clock));
    assert_eq!(ca.issued_count(), 1, "what was refused was not issued");
    // Books of several pages.
    for _ in 0..60 {
        issue(&ca, &clock).unwrap();
    }
    disk.refuses_when_full(&[0, 1], || issue(&ca, &clock));
    assert_eq!(ca.issued_count(), 62);
    disk.refuses_when_full(&[0], || ca.revocation_list());
    let revoked = disk.refuses_when_full(&[0, 1], || ca.revoke(&names("a.example")));
    assert_eq!((revoked.len(), ca.issued_count()), (62, 0));
    assert!(revoked.contains(&first));
    let list = disk.refuses_when_full(&[0, 1], || ca.revocation_list());
    assert!(list.len() > PAGE_SIZE_BYTES);
    // The intermediate is due: no certificate without its new one on disk.
    clock.advance(300 * 24 * HOUR);
    let before = fs::read(path.join("ca.pem")).unwrap();
    disk.refuses_when_full(&[0, 1, 3], || issue(&ca, &clock));
    assert_ne!(fs::read(path.join("ca.pem")).unwrap(), before);
    drop(ca);
    // All of it is on disk.
    let ca = open(&path, &clock).unwrap();
    assert_eq!((ca.root(), ca.issued_count()), (root, 1));
}

/// The stored pair, the fleet's key, a copy of the revocation list.
fn node(disk: &Disk) {
    let clock = clock();
    let path = disk.path("fleet.key");
    disk.refuses_when_full(&[0], || SharedKeys::load_or_create(&path));
    let config = LocalCaConfig { key_algorithm: KeyAlgorithm::MlDsa65, ..LocalCaConfig::default() };
    let ca = Arc::new(LocalCa::in_memory(config, clock.clone()).unwrap());
    let store = disk.path("node.pem");
    let start = || {
        RotatingIdentity::with_authority(ca.clone(), names("a.example"))
            .key_algorithm(KeyAlgorithm::MlDsa65)
            .clock(clock.clone())
            .store(&store)
            .start()
            .unwrap()
    };
    let identity = start();
    let stored = fs::read(&store).unwrap();
    // Renewed on a full disk: it serves, says that it is not saved, and the old pair stands.
    for pages in [0, 1] {
        disk.fill(pages);
        let before = disk.content();
        let serial = identity.status().serial;
        clock.set(identity.status().next_renewal.unwrap());
        identity.poll(clock.now());
        let status = identity.status();
        assert_ne!(status.serial, serial, "{status:?}");
        assert!(status.last_error.as_ref().is_some_and(|why| why.contains("No space")));
        assert_eq!(disk.content(), before);
        disk.free();
    }
    assert_eq!(fs::read(&store).unwrap(), stored);
    // Room again: saved without waiting for the next renewal.
    let retry = identity.poll(clock.now());
    assert!(retry <= clock.now() + Duration::from_secs(30), "{retry:?}");
    clock.set(retry);
    identity.poll(clock.now());
    let status = identity.status();
    assert_eq!((status.renewals, &status.last_error), (2, &None), "{status:?}");
    drop(identity);
    assert_eq!(start().status().serial, status.serial, "a restart serves what was saved late");
}

/// A service whose disk fills up: orders, tokens and renewals wait, nothing certifies twice, and nodes
/// go on with what they have.
fn service(disk: &Disk) {
    let clock = clock();
    let ca = LocalCa::open_at(&disk.path("ca"), LocalCaConfig::default(), clock.clone()).unwrap();
    let ca = Arc::new(ca);
    ca.revocation_list().unwrap();
    let own = RotatingIdentity::with_authority(ca.clone(), names("ca.example"))
        .clock(clock.clone())
        .start()
        .unwrap();
    let trust = TrustStore::builder().roots([ca.root()]).build().unwrap();
    let tls = ServerTls::builder()
        .identity(own.clone())
        .client_auth(ClientAuth::Optional(trust))
        .clock(clock.clone())
        .alpn([TRUSTCHAIN_ALPN])
        .build()
        .unwrap();
    let tokens = || TokenDirectory::open(&disk.path("tokens")).unwrap();
    let server = TrustchainServer::new(ca.clone(), clock.clone()).with_tokens(tokens());
    let server = Arc::new(server);
    let bind = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0);
    let lo = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(lo.success());
    let running = CaService::start(bind, &tls, server.clone()).unwrap();
    let remote = |token: Option<String>| {
        let mut config = RemoteCaConfig::new(running.local_addr(), "ca.example", vec![ca.root()]);
        config.token = token;
        config.clock = clock.clone();
        RemoteCa::new(config).unwrap()
    };
    let create = || tokens().create(&names("a.example"), 48 * HOUR, clock.now());
    let token = disk.refuses_when_full(&[0], create);
    let orders = RevocationDirectory::open(&disk.path("revocations")).unwrap();
    disk.fill(0);
    let before = disk.content();
    let error = orders.revoke(&names("b.example"), Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    assert_eq!(disk.content(), before);
    // An enrolment on the full disk: refused as "later", and the token is good again.
    let issued = ca.issued_count();
    let client = remote(Some(token));
    let start = || {
        RotatingIdentity::with_authority(client.clone(), names("a.example"))
            .roots([ca.root()])
            .clock(clock.clone())
            .start()
    };
    let error = start().unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    assert!(error.to_string().contains("will try again"), "{error}");
    assert_eq!((disk.content(), ca.issued_count()), (before, issued));
    disk.free();
    let node = start().unwrap();
    // A renewal: the old certificate serves, the next attempt succeeds.
    disk.fill(0);
    let serial = node.status().serial;
    clock.set(node.status().next_renewal.unwrap());
    own.poll(clock.now());
    node.poll(clock.now());
    let status = node.status();
    assert_eq!((status.failures, &status.serial), (1, &serial), "{status:?}");
    assert!(status.last_error.as_ref().is_some_and(|why| why.contains("No space left")));
    disk.free();
    clock.set(status.next_renewal.unwrap());
    own.poll(clock.now());
    node.poll(clock.now());
    let status = node.status();
    assert_eq!((status.renewals, &status.last_error), (1, &None), "{status:?}");
    // The list as a file of the node.
    let path = disk.path("node-crl.pem");
    let feed = disk.refuses_when_full(&[0], || RevocationFeed::start(client.clone(), &path));
    let first = fs::read(&path).unwrap();
    ca.revocation_list().unwrap();
    disk.fill(0);
    clock.advance(Duration::from_secs(61));
    feed.poll(clock.now());
    assert_eq!((feed.failure_count(), fs::read(&path).unwrap()), (1, first.clone()));
    disk.free();
    clock.advance(Duration::from_secs(61));
    feed.poll(clock.now());
    assert_eq!((feed.failure_count(), feed.update_count()), (1, 2));
    assert_ne!(fs::read(&path).unwrap(), first);
    assert_eq!(server.counters().enrolled, 1);
}
