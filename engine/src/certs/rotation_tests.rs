use std::sync::atomic::AtomicBool;

use rand::Rng;

use super::*;
use crate::certs::authority::RenewalWindow;
use crate::certs::error::CaError;
use crate::certs::storage::{Memory, Storage};
use crate::certs::test_dir::TestDir;
use crate::certs::test_handshake::handshake;
use crate::certs::tls::{ClientTls, ServerTls};
use crate::certs::wall_clock::SimWallClock;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const NAME: &str = "node.example.net";

fn names() -> IdentityNames {
    IdentityNames::new().with_dns(NAME).unwrap()
}

fn clock() -> Arc<SimWallClock> {
    Arc::new(SimWallClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)))
}

/// A CA that can be away, and whose disk can be full.
struct FlakyCa {
    ca: LocalCa,
    away: AtomicBool,
    calls: AtomicU64,
}

/// Memory that refuses writes while full, as a disk does.
#[derive(Default)]
struct FlakyDisk {
    memory: Memory,
    full: AtomicBool,
}

impl Storage for Arc<FlakyDisk> {
    fn read(&self, name: &str, access: Access) -> Result<Option<Vec<u8>>, CertsError> {
        self.memory.read(name, access)
    }

    fn replace(&self, name: &str, content: &[u8], access: Access) -> Result<(), CertsError> {
        if self.full.load(Ordering::SeqCst) {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(CertsError::file("write", std::path::Path::new(name), full));
        }
        self.memory.replace(name, content, access)
    }
}

impl CertificateAuthority for FlakyCa {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.away.load(Ordering::SeqCst) {
            return Err(CaError::Unreachable { reason: "connection refused".to_owned() });
        }
        self.ca.issue(request)
    }
}

fn flaky(clock: &Arc<SimWallClock>) -> (Arc<FlakyCa>, Arc<FlakyDisk>) {
    let disk = Arc::new(FlakyDisk::default());
    let storage = Box::new(Arc::clone(&disk));
    let ca = LocalCa::with_storage(storage, LocalCaConfig::default(), clock.clone()).unwrap();
    (Arc::new(FlakyCa { ca, away: AtomicBool::new(false), calls: AtomicU64::new(0) }), disk)
}

fn start(ca: &Arc<FlakyCa>, clock: &Arc<SimWallClock>) -> IdentityBuilder {
    RotatingIdentity::with_authority(ca.clone(), names())
        .roots([ca.ca.root()])
        .clock(clock.clone())
        .jitter_seed(7)
}

/// Sixty days. A third of the time nothing is issued, the CA being away or its disk full, for up
/// to six hours on end; a handshake every half hour. None may fail.
#[test]
fn two_months_with_the_ca_away_a_third_of_the_time() {
    let clock = clock();
    let (ca, disk) = flaky(&clock);
    let identity = start(&ca, &clock).start().unwrap();
    let server = ServerTls::builder()
        .identity(identity.clone())
        .alpn(["soak"])
        .clock(clock.clone())
        .build()
        .unwrap();
    let client = ClientTls::builder()
        .roots([ca.ca.root()])
        .alpn(["soak"])
        .clock(clock.clone())
        .build()
        .unwrap();
    let seed = 20_270_115;
    let mut rng = StdRng::seed_from_u64(seed);
    let end = clock.now() + 60 * DAY;
    let (mut down, mut outage, mut outage_total) = (false, Duration::ZERO, Duration::ZERO);
    let (mut deadline, mut next_change, mut next_handshake) =
        (clock.now(), clock.now(), clock.now());
    let mut serials = std::collections::HashSet::new();
    while clock.now() < end {
        if clock.now() >= next_change {
            down = !down;
            if down {
                outage = HOUR.mul_f64(rng.random_range(1.0..6.0));
                outage_total += outage;
            }
            let full = rng.random_bool(0.3);
            ca.away.store(down && !full, Ordering::SeqCst);
            disk.full.store(down && full, Ordering::SeqCst);
            next_change = clock.now() + if down { outage } else { 2 * outage };
        }
        if clock.now() >= deadline {
            deadline = identity.poll(clock.now());
            assert!(deadline >= clock.now());
        }
        if clock.now() >= next_handshake {
            handshake(&client, &server, NAME)
                .unwrap_or_else(|failed| panic!("seed {seed}, {:?}: {failed:?}", clock.now()));
            serials.insert(identity.status().serial.unwrap());
            next_handshake = clock.now() + HOUR / 2;
        }
        let next = deadline.min(next_handshake).min(next_change);
        clock.set(next.max(clock.now() + Duration::from_secs(1)));
    }
    let status = identity.status();
    assert!(outage_total >= 18 * DAY, "the CA was away for {outage_total:?} only");
    assert!(status.failures > 20, "outages were met: {status:?}");
    assert!(status.renewals >= 75, "{status:?}");
    assert_eq!(serials.len() as u64, status.renewals + 1, "every certificate was served");
    assert_eq!(client.faults().total() + server.faults().total(), 0);
}

#[test]
fn a_long_outage_raises_each_alarm_once_and_heals() {
    let clock = clock();
    let (ca, _disk) = flaky(&clock);
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&events);
    let identity = start(&ca, &clock)
        .on_event(move |event| seen.lock().unwrap().push(event.clone()))
        .start()
        .unwrap();
    let served = identity.certified_key().unwrap();
    ca.away.store(true, Ordering::SeqCst);
    let end = clock.now() + 30 * HOUR;
    let mut polls = 0;
    while clock.now() < end {
        let deadline = identity.poll(clock.now());
        clock.set(deadline.max(clock.now() + Duration::from_millis(1)));
        polls += 1;
    }
    assert!(Arc::ptr_eq(&served, &identity.certified_key().unwrap()), "the old one is kept");
    let status = identity.status();
    assert!(status.last_error.as_deref().unwrap().contains("cannot be reached"), "{status:?}");
    let alarms: Vec<_> = events
        .lock()
        .unwrap()
        .iter()
        .filter_map(|event| match event {
            RotationEvent::Alarm { alarm, .. } => Some(*alarm),
            _ => None,
        })
        .collect();
    assert_eq!(alarms, [Alarm::ThirdLeft, Alarm::TenthLeft, Alarm::Expired]);
    assert_eq!(status.alarms, 3);
    // A certificate of a day is tried for about every five to ten minutes, not every second.
    assert!((60..400).contains(&status.failures), "{status:?}");
    assert!(polls < 500, "{polls} polls");

    ca.away.store(false, Ordering::SeqCst);
    clock.advance(BACKOFF_MAX);
    identity.poll(clock.now());
    let healed = identity.status();
    assert_eq!((healed.renewals, healed.last_error), (1, None));
    assert!(healed.not_after.unwrap() > clock.now());
}

#[test]
fn a_start_without_a_ca_fails_or_waits_as_asked() {
    let clock = clock();
    let (ca, _disk) = flaky(&clock);
    ca.away.store(true, Ordering::SeqCst);
    let error = start(&ca, &clock).start().unwrap_err();
    assert!(matches!(error, CertsError::Authority(CaError::Unreachable { .. })), "{error}");
    let identity = start(&ca, &clock).allow_pending(true).start().unwrap();
    assert!(identity.serve().is_none());
    assert_eq!(identity.handshakes_without_certificate(), 1);
    ca.away.store(false, Ordering::SeqCst);
    clock.set(identity.poll(clock.now()));
    identity.poll(clock.now());
    assert!(identity.serve().is_some());
    assert_eq!(identity.status().renewals, 0, "the first is no renewal");
}

#[test]
fn a_restart_uses_the_stored_certificate_while_it_serves() {
    let clock = clock();
    let (ca, _disk) = flaky(&clock);
    let dir = TestDir::new();
    let path = dir.path().join("node.pem");
    let serial = start(&ca, &clock).store(&path).start().unwrap().status().serial;
    ca.away.store(true, Ordering::SeqCst);
    clock.advance(6 * HOUR);
    assert_eq!(start(&ca, &clock).store(&path).start().unwrap().status().serial, serial);
    // Expired, for other names, cut short: each asks the CA instead, which is away.
    clock.advance(2 * DAY);
    start(&ca, &clock).store(&path).start().unwrap_err();
    ca.away.store(false, Ordering::SeqCst);
    let renewed = start(&ca, &clock).store(&path).start().unwrap().status().serial;
    assert_ne!(renewed, serial);
    let text = std::fs::read(&path).unwrap();
    std::fs::write(&path, &text[..text.len() - 40]).unwrap();
    let identity = start(&ca, &clock).store(&path).start().unwrap();
    assert_ne!(identity.status().serial, renewed);
    assert_eq!(identity.faults().count(CertificateFault::Truncated), 1);
}

/// A CA that answers with whatever it was given.
struct FixedCa(Mutex<Vec<CertificateDer<'static>>>);

impl CertificateAuthority for FixedCa {
    fn issue(
        &self,
        _request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        Ok(self.0.lock().unwrap().clone())
    }
}

#[test]
fn a_bad_answer_is_never_served() {
    let clock = clock();
    let (ca, _disk) = flaky(&clock);
    let issue = |names: &IdentityNames| {
        let (_key, csr) = key_and_request(names, KeyAlgorithm::default()).unwrap();
        ca.issue(&CertificateRequest { csr: &csr, names }).unwrap()
    };
    let good = issue(&names());
    let other = issue(&IdentityNames::new().with_dns("other.example.net").unwrap());
    let stranger = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap();
    let (_key, csr) = key_and_request(&names(), KeyAlgorithm::default()).unwrap();
    let untrusted = stranger.issue(&CertificateRequest { csr: &csr, names: &names() }).unwrap();
    let cases = [
        (Vec::new(), CertificateFault::Malformed),
        (good.clone(), CertificateFault::WrongKey),
        (good[..1].to_vec(), CertificateFault::UnknownRoot),
        (other, CertificateFault::WrongName),
        (untrusted, CertificateFault::UnknownRoot),
        (vec![good[1].clone()], CertificateFault::CaAsLeaf),
        (vec![vec![1, 2, 3].into()], CertificateFault::Malformed),
    ];
    for (chain, fault) in cases {
        let fixed = Arc::new(FixedCa(Mutex::new(chain)));
        let error = RotatingIdentity::with_authority(fixed, names())
            .roots([ca.ca.root()])
            .clock(clock.clone())
            .start()
            .unwrap_err();
        assert_eq!(error.fault(), fault, "{error}");
    }
    let fixed = Arc::new(FixedCa(Mutex::new(good)));
    for (step, fault) in [
        (-HOUR.as_secs_f64(), CertificateFault::NotYetValid),
        (25.0 * 3600.0, CertificateFault::Expired),
    ] {
        let now = if step < 0.0 { clock.now() - HOUR } else { clock.now() + 25 * HOUR };
        let error = RotatingIdentity::with_authority(fixed.clone(), names())
            .clock(Arc::new(SimWallClock::new(now)))
            .start()
            .unwrap_err();
        assert_eq!(error.fault(), fault);
        assert!(error.to_string().contains("your clock is"), "{error}");
    }
}

#[test]
fn a_clock_that_jumps_back_gets_a_certificate_for_the_new_date() {
    let clock = clock();
    let (ca, _disk) = flaky(&clock);
    clock.advance(10 * DAY);
    let identity = start(&ca, &clock).start().unwrap();
    clock.set(clock.now() - 3 * DAY);
    ca.away.store(true, Ordering::SeqCst);
    identity.poll(clock.now());
    assert_eq!(identity.status().failures, 1, "renewal was tried at once");
    ca.away.store(false, Ordering::SeqCst);
    clock.advance(BACKOFF_MAX);
    identity.poll(clock.now());
    let status = identity.status();
    assert_eq!(status.renewals, 1);
    assert!(status.not_before.unwrap() <= clock.now());
}

#[test]
fn files_are_taken_over_when_both_fit() {
    let clock = clock();
    let (ca, _disk) = flaky(&clock);
    let dir = TestDir::new();
    let (chain_path, key_path) = (dir.path().join("chain.pem"), dir.path().join("node.key"));
    let write = |which: u8| {
        let (key, csr) = key_and_request(&names(), KeyAlgorithm::default()).unwrap();
        let chain = ca.issue(&CertificateRequest { csr: &csr, names: &names() }).unwrap();
        let text: String = chain.iter().map(|der| pem::encode("CERTIFICATE", der)).collect();
        if which & 1 != 0 {
            replace_file(&chain_path, text.as_bytes(), Access::Everyone).unwrap();
        }
        if which & 2 != 0 {
            let text = pem::encode("PRIVATE KEY", key.pkcs8());
            replace_file(&key_path, text.as_bytes(), Access::Owner).unwrap();
        }
        CertificateSummary::parse(&chain[0]).unwrap().serial
    };
    let first = write(3);
    let identity = RotatingIdentity::from_pem_files(&chain_path, &key_path)
        .clock(clock.clone())
        .start()
        .unwrap();
    assert_eq!(identity.status().serial.as_ref(), Some(&first));
    write(1);
    identity.poll(clock.now());
    assert_eq!(identity.status().serial.as_ref(), Some(&first), "the key does not fit yet");
    assert_eq!(identity.faults().count(CertificateFault::WrongKey), 1);
    identity.poll(clock.now());
    assert_eq!(identity.status().failures, 1, "an unchanged file is not read again");
    let second = write(3);
    identity.poll(clock.now());
    assert_eq!(identity.status().serial, Some(second));
    std::fs::remove_file(&chain_path).unwrap();
    identity.poll(clock.now());
    assert!(identity.status().last_error.unwrap().contains("chain.pem"));
    assert!(identity.serve().is_some());
}

#[test]
fn the_thread_renews() {
    let clock = clock();
    let (ca, _disk) = flaky(&clock);
    let identity = start(&ca, &clock).start().unwrap();
    let thread = identity.spawn().unwrap();
    clock.advance(16 * HOUR);
    drop(thread);
    let thread = identity.spawn().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while identity.status().renewals == 0 {
        assert!(std::time::Instant::now() < deadline, "no renewal");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(thread);
}

/// A CA that wants its certificates renewed early, from some moment on.
struct Hasty {
    ca: LocalCa,
    window: Mutex<Result<Option<RenewalWindow>, ()>>,
    asked: AtomicU64,
}

impl CertificateAuthority for Hasty {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        self.ca.issue(request)
    }

    fn renewal_window(&self, _leaf: &CertificateDer<'_>) -> Result<Option<RenewalWindow>, CaError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let window = *self.window.lock().unwrap();
        window.map_err(|()| CaError::Unreachable { reason: "no route".to_owned() })
    }
}

#[test]
fn the_cas_renewal_window_moves_a_renewal_forward_only() {
    let clock = clock();
    let ca = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap();
    let ca = Arc::new(Hasty { ca, window: Mutex::new(Err(())), asked: AtomicU64::new(0) });
    let identity = RotatingIdentity::with_authority(ca.clone(), names())
        .clock(clock.clone())
        .jitter_seed(3)
        .start()
        .unwrap();
    let planned = identity.status().next_renewal.unwrap();
    // Nobody answers: the plan stands, and the question comes again.
    identity.poll(clock.now());
    assert_eq!(identity.status().next_renewal, Some(planned));
    let late = RenewalWindow {
        start: planned + HOUR,
        end: planned + 2 * HOUR,
        retry_after: Duration::from_secs(1800),
    };
    *ca.window.lock().unwrap() = Ok(Some(late));
    clock.advance(7 * HOUR);
    identity.poll(clock.now());
    assert_eq!(identity.status().next_renewal, Some(planned), "never later than planned");
    // An incident: certificates must go within the hour.
    let soon = RenewalWindow { start: clock.now(), end: clock.now() + HOUR, ..late };
    *ca.window.lock().unwrap() = Ok(Some(soon));
    clock.advance(Duration::from_secs(1801));
    identity.poll(clock.now());
    let moved = identity.status().next_renewal.unwrap();
    assert!(moved >= soon.start && moved < soon.end, "{moved:?}");
    *ca.window.lock().unwrap() = Ok(None);
    clock.set(moved.max(clock.now()));
    identity.poll(clock.now());
    assert_eq!(identity.status().renewals, 1);
    assert_eq!(ca.asked.load(Ordering::SeqCst), 4);
    // A CA without wishes is asked once for each certificate.
    clock.advance(HOUR);
    identity.poll(clock.now());
    assert_eq!(ca.asked.load(Ordering::SeqCst), 4);
}
