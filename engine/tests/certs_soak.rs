//! Certificates of 60 s under 200 connections that come and go, in accelerated time, while the CA is
//! stopped for a third of it, dies between issuing and answering, and cannot write once.
//!
//! Time is counted in steps of one simulated second. `STOQ_SOAK_STEPS` lengthens the run (default
//! 240; a day is 86400).

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

#[path = "common/soak.rs"]
#[allow(dead_code, unreachable_pub)]
mod soak;

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use pair::Watchdog;
use rustls_pki_types::CertificateDer;
use soak::{Authority, CA_NAME, LIFETIME_S, Place, Scratch, Soak};
use stoq::ca::CaService;
use stoq::certs::trustchain::{TRUSTCHAIN_ALPN, TokenDirectory, TrustchainServer};
use stoq::certs::{
    CaError, CertificateAuthority, CertificateRequest, ClientAuth, IdentityNames, LocalCa,
    LocalCaConfig, RotatingIdentity, ServerTls, SimWallClock, TrustStore,
};

/// Issues, writes its books, and dies before it answers, when told to.
struct Mortal {
    ca: Arc<LocalCa>,
    dies: Arc<AtomicBool>,
    deaths: Arc<AtomicU64>,
}

impl CertificateAuthority for Mortal {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let chain = self.ca.issue(request)?;
        if self.dies.swap(false, Ordering::SeqCst) {
            self.deaths.fetch_add(1, Ordering::SeqCst);
            return Err(CaError::Unreachable { reason: "killed in mid-issue".to_owned() });
        }
        Ok(chain)
    }
}

/// A CA service that can be stopped and started again on its directory and port.
struct Ca {
    place: Place,
    dies: Arc<AtomicBool>,
    deaths: Arc<AtomicU64>,
    running: Option<CaService>,
    starts: u64,
}

fn open_ca(directory: &Path, clock: &Arc<SimWallClock>) -> Arc<LocalCa> {
    let config = LocalCaConfig {
        leaf_lifetime: Duration::from_secs(LIFETIME_S),
        ..LocalCaConfig::default()
    };
    let ca = LocalCa::open_at(&directory.join("ca"), config, clock.clone());
    Arc::new(ca.expect("the directory opens, whatever happened before"))
}

impl Ca {
    fn new(directory: &Path, clock: &Arc<SimWallClock>) -> Self {
        let mut ca = Self {
            place: Place {
                directory: directory.to_owned(),
                clock: clock.clone(),
                port: 0,
                root: open_ca(directory, clock).root(),
            },
            dies: Arc::default(),
            deaths: Arc::default(),
            running: None,
            starts: 0,
        };
        ca.start();
        ca
    }
}

impl Authority for Ca {
    fn place(&self) -> &Place {
        &self.place
    }

    fn start(&mut self) {
        if self.running.is_some() {
            return;
        }
        let ca = open_ca(&self.place.directory, &self.place.clock);
        let names = IdentityNames::new().with_dns(CA_NAME).expect("a name");
        let identity = RotatingIdentity::with_authority(ca.clone(), names)
            .clock(self.place.clock.clone())
            .start()
            .expect("the CA certifies itself");
        let trust = TrustStore::builder().roots([ca.root()]).build().expect("trust");
        let tls = ServerTls::builder()
            .identity(identity)
            .client_auth(ClientAuth::Optional(trust))
            .clock(self.place.clock.clone())
            .alpn([TRUSTCHAIN_ALPN])
            .build()
            .expect("TLS");
        let tokens = TokenDirectory::open(&self.place.directory.join("tokens")).expect("tokens");
        let mortal = Mortal { ca, dies: self.dies.clone(), deaths: self.deaths.clone() };
        let server = TrustchainServer::new(Arc::new(mortal), self.place.clock.clone());
        let bind = SocketAddrV6::new(Ipv6Addr::LOCALHOST, self.place.port, 0, 0);
        let service = CaService::start(bind, &tls, Arc::new(server.with_tokens(tokens)));
        let service = service.expect("the service starts");
        self.place.port = service.local_addr().port();
        self.running = Some(service);
        self.starts += 1;
    }

    fn stop(&mut self) {
        self.running = None;
    }
}

/// What happens to the CA in a step: stopped for 10 of each 30 seconds, and twice worse.
fn misfortune(ca: &mut Ca, step: u64, steps: u64) {
    match step % 30 {
        0 => ca.stop(),
        10 => ca.start(),
        _ => {}
    }
    let blocked = ca.place.directory.join("ca/state.toml.tmp");
    // Once: for eleven seconds nothing can be written, as on a full disk.
    if step == steps / 2 / 60 * 60 + 15 {
        std::fs::create_dir(&blocked).expect("blocked");
    } else if step == steps / 2 / 60 * 60 + 26 {
        std::fs::remove_dir(&blocked).expect("unblocked");
    }
    // In every other minute it dies after issuing, and is started again a step later.
    if step % 120 == 14 {
        ca.dies.store(true, Ordering::SeqCst);
    }
}

#[test]
fn rotation_breaks_nothing_while_the_ca_comes_and_goes() {
    let steps: u64 = std::env::var("STOQ_SOAK_STEPS").map_or(240, |text| {
        text.parse().expect("STOQ_SOAK_STEPS is a number of simulated seconds")
    });
    let limit = Duration::from_secs(180) + Duration::from_millis(700) * steps as u32;
    let _watchdog =
        Watchdog::with_limit("rotation_breaks_nothing_while_the_ca_comes_and_goes", limit);
    let path = std::env::temp_dir().join(format!("stoq-certs-soak-{}", std::process::id()));
    std::fs::create_dir(&path).expect("a new directory");
    let scratch = Scratch(path);
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let clock = Arc::new(SimWallClock::new(start));
    let mut ca = Ca::new(&scratch.0, &clock);
    let mut soak = Soak::start(&ca.place);
    for step in 0..steps {
        misfortune(&mut ca, step, steps);
        soak.step(step, &mut ca);
    }
    soak.all_stand();
    let (renewals, failures) = soak.counts();
    let handshakes = soak.handshakes;
    println!(
        "{steps} s, {handshakes} handshakes, {renewals} renewals, {failures} failed attempts, \
         CA started {} times and killed {} times",
        ca.starts,
        ca.deaths.load(Ordering::SeqCst)
    );
    assert!(renewals >= 2 * steps / LIFETIME_S, "{renewals} renewals");
    if steps >= 240 {
        assert!(failures > 0 && ca.starts >= steps / 30 && ca.deaths.load(Ordering::SeqCst) > 0);
    }
    soak.end(&mut ca);
}
