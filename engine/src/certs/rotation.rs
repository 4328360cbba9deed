//! An identity that renews itself.
//!
//! ```text
//! maintenance thread: poll(date) ─► new key, request ─► CA ─► check as a peer would ─┐
//!                        ▲                                                           ▼
//!                        └── back off, alarm, keep the old one ◄── refused     swap, save
//! handshakes on all shards: resolve() reads the current pair, lock-free ◄────────────┘
//! ```
//!
//! Invariants: handshakes never wait for a renewal; a certificate is served only after its chain,
//! names, dates and key were checked; a failed renewal changes nothing but the status. Established
//! connections hold no reference to the certificate, so no rotation can break one.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::authority::{CertificateAuthority, CertificateRequest, key_and_request};
use super::error::CertsError;
use super::fault::{CertificateFault, FaultCounters, count_start};
use super::keys::{KeyAlgorithm, PrivateKey};
use super::local_ca::{LocalCa, LocalCaConfig};
use super::maintenance::{MaintenanceThread, Periodic};
use super::names::{CertificateSummary, IdentityNames};
use super::schedule::{
    Alarm, BACKOFF_MAX, Backoff, Plan, WINDOW_ASK_MAX, WINDOW_ASK_MIN, WINDOW_ASK_RETRY,
};
use super::storage::{Access, replace_file};
use super::trust::{FileStamp, TrustStore};
use super::verify::check_own_chain;
use super::wall_clock::{SystemWallClock, WallClock};
use super::{pem, provider};

/// How often certificate files are looked at.
const FILE_INTERVAL: Duration = Duration::from_secs(5);
/// Wait after a certificate that could not be saved.
const SAVE_RETRY: Duration = Duration::from_secs(30);
/// Life assumed for the back-off while there is no certificate.
const ASSUMED_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// Something that happened to an identity.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RotationEvent {
    /// A new certificate is served.
    Renewed {
        /// Its serial number, hexadecimal.
        serial: String,
        /// Its end.
        not_after: SystemTime,
    },
    /// A renewal failed; the old certificate is served on.
    RenewalFailed {
        /// What kind of failure.
        fault: CertificateFault,
        /// Why, in words.
        reason: String,
        /// When the next attempt is due.
        retry_at: SystemTime,
    },
    /// The life of the served certificate runs out.
    Alarm {
        /// How urgent.
        alarm: Alarm,
        /// When it ends or ended.
        not_after: SystemTime,
    },
    /// The machine's date lies before the certificate's start: the clock seems wrong.
    ClockBehind {
        /// Start of the certificate.
        not_before: SystemTime,
    },
}

/// How an identity fares.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RotationStatus {
    /// Serial number of the served certificate, hexadecimal; `None` while there is none.
    pub serial: Option<String>,
    /// Start of its validity.
    pub not_before: Option<SystemTime>,
    /// End of its validity.
    pub not_after: Option<SystemTime>,
    /// When the next renewal is due; `None` for certificate files, which others renew.
    pub next_renewal: Option<SystemTime>,
    /// Why the last attempt failed; `None` after a success.
    pub last_error: Option<String>,
    /// Certificates taken over after the first.
    pub renewals: u64,
    /// Failed attempts.
    pub failures: u64,
    /// Alarms raised.
    pub alarms: u64,
}

type EventCallback = Arc<dyn Fn(&RotationEvent) + Send + Sync>;

enum Source {
    Authority { ca: Arc<dyn CertificateAuthority>, names: IdentityNames },
    Files { certificate: PathBuf, key: PathBuf },
}

/// A certificate and key that stay current; serves servers and clients alike.
pub struct RotatingIdentity {
    source: Source,
    trust: Option<Arc<TrustStore>>,
    roots: Vec<CertificateDer<'static>>,
    store: Option<PathBuf>,
    key_algorithm: KeyAlgorithm,
    clock: Arc<dyn WallClock>,
    on_event: Option<EventCallback>,
    current: ArcSwapOption<CertifiedKey>,
    status: ArcSwap<RotationStatus>,
    faults: FaultCounters,
    handshakes_without_certificate: AtomicU64,
    control: Mutex<Control>,
}

/// What only the maintenance side touches.
struct Control {
    rng: StdRng,
    plan: Option<Plan>,
    next_attempt: SystemTime,
    /// When the CA is asked for its renewal window again; `None` while it has none.
    ask_window_at: Option<SystemTime>,
    backoff: Backoff,
    alarm_raised: Option<Alarm>,
    clock_behind_raised: bool,
    unsaved: Option<Unsaved>,
    stamps: Option<[FileStamp; 2]>,
    events: Vec<RotationEvent>,
}

/// A pair that is served and not in the store yet.
struct Unsaved {
    pem: String,
    retry_at: SystemTime,
    /// What the status says about it.
    error: Option<String>,
}

impl fmt::Debug for RotatingIdentity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RotatingIdentity")
            .field("status", &self.status.load())
            .finish_non_exhaustive()
    }
}

/// Builds a [`RotatingIdentity`].
pub struct IdentityBuilder {
    source: SourceChoice,
    roots: Vec<CertificateDer<'static>>,
    store: Option<PathBuf>,
    key_algorithm: KeyAlgorithm,
    clock: Arc<dyn WallClock>,
    jitter_seed: Option<u64>,
    allow_pending: bool,
    on_event: Option<EventCallback>,
}

enum SourceChoice {
    Given(Source),
    SelfSigned(IdentityNames),
}

impl IdentityBuilder {
    fn new(source: SourceChoice) -> Self {
        Self {
            source,
            roots: Vec::new(),
            store: None,
            key_algorithm: KeyAlgorithm::default(),
            clock: Arc::new(SystemWallClock),
            jitter_seed: None,
            allow_pending: false,
            on_event: None,
        }
    }

    /// Checks each new chain against `roots` before use.
    #[must_use]
    pub fn roots(mut self, roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Self {
        self.roots.extend(roots);
        self
    }

    /// Keeps key and chain in `path` (mode 0600), so that a restart needs no CA.
    #[must_use]
    pub fn store(mut self, path: impl Into<PathBuf>) -> Self {
        self.store = Some(path.into());
        self
    }

    /// Kind of the keys that it makes; with [`RotatingIdentity::self_signed`] also of its root. A stored
    /// certificate serves on whatever its kind. Default [`KeyAlgorithm::EcdsaP256`].
    #[must_use]
    pub fn key_algorithm(mut self, algorithm: KeyAlgorithm) -> Self {
        self.key_algorithm = algorithm;
        self
    }

    /// Takes the date from `clock`. Default: the machine's.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn WallClock>) -> Self {
        self.clock = clock;
        self
    }

    /// Makes the jitter repeatable.
    #[must_use]
    pub fn jitter_seed(mut self, seed: u64) -> Self {
        self.jitter_seed = Some(seed);
        self
    }

    /// Starts without a certificate if the CA is away, and keeps trying; handshakes fail until
    /// then. Default: [`Self::start`] reports the failure.
    #[must_use]
    pub fn allow_pending(mut self, allow: bool) -> Self {
        self.allow_pending = allow;
        self
    }

    /// Calls `callback` for every event, on the maintenance thread.
    #[must_use]
    pub fn on_event(mut self, callback: impl Fn(&RotationEvent) + Send + Sync + 'static) -> Self {
        self.on_event = Some(Arc::new(callback));
        self
    }

    /// Obtains the first certificate: from the store if it still serves, else from the source.
    ///
    /// # Errors
    /// No usable certificate could be had (unless pending is allowed), or the configuration is
    /// invalid.
    pub fn start(self) -> Result<Arc<RotatingIdentity>, CertsError> {
        count_start(self.obtain_first())
    }

    fn obtain_first(self) -> Result<Arc<RotatingIdentity>, CertsError> {
        let (source, mut roots) = match self.source {
            SourceChoice::Given(source) => (source, self.roots),
            SourceChoice::SelfSigned(names) => {
                let config =
                    LocalCaConfig { key_algorithm: self.key_algorithm, ..LocalCaConfig::default() };
                let ca = LocalCa::in_memory(config, Arc::clone(&self.clock))?;
                let root = ca.root();
                (Source::Authority { ca: Arc::new(ca), names }, vec![root])
            }
        };
        if let Source::Authority { names, .. } = &source {
            names.validate()?;
        }
        roots.dedup();
        let trust = match roots.is_empty() {
            true => None,
            false => Some(TrustStore::builder().roots(roots.clone()).load()?),
        };
        let now = self.clock.now();
        let rng = match self.jitter_seed {
            Some(seed) => StdRng::seed_from_u64(seed),
            None => StdRng::from_os_rng(),
        };
        let identity = Arc::new(RotatingIdentity {
            source,
            trust,
            roots,
            store: self.store,
            key_algorithm: self.key_algorithm,
            clock: self.clock,
            on_event: self.on_event,
            current: ArcSwapOption::empty(),
            status: ArcSwap::default(),
            faults: FaultCounters::default(),
            handshakes_without_certificate: AtomicU64::new(0),
            control: Mutex::new(Control {
                rng,
                plan: None,
                next_attempt: now,
                ask_window_at: None,
                backoff: Backoff::default(),
                alarm_raised: None,
                clock_behind_raised: false,
                unsaved: None,
                stamps: None,
                events: Vec::new(),
            }),
        });
        if let Source::Authority { ca, .. } = &identity.source {
            ca.handle_identity(&Arc::downgrade(&identity));
        }
        identity.start(now, self.allow_pending)?;
        Ok(identity)
    }
}

impl RotatingIdentity {
    /// An identity for `names`, certified and renewed by `ca`.
    #[must_use]
    pub fn with_authority(
        ca: Arc<dyn CertificateAuthority>,
        names: IdentityNames,
    ) -> IdentityBuilder {
        IdentityBuilder::new(SourceChoice::Given(Source::Authority { ca, names }))
    }

    /// An identity from PEM files (chain leaf first; key with mode 0600) that others renew; both
    /// are read again when they change.
    #[must_use]
    pub fn from_pem_files(
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> IdentityBuilder {
        let source = Source::Files { certificate: certificate.into(), key: key.into() };
        IdentityBuilder::new(SourceChoice::Given(source))
    }

    /// An identity under a root of its own that lives in memory; peers need [`Self::roots`].
    #[must_use]
    pub fn self_signed(names: IdentityNames) -> IdentityBuilder {
        IdentityBuilder::new(SourceChoice::SelfSigned(names))
    }

    /// How it fares, as of the last poll.
    #[must_use]
    pub fn status(&self) -> RotationStatus {
        RotationStatus::clone(&self.status.load())
    }

    /// Refused certificates and failed renewals by kind.
    #[must_use]
    pub fn faults(&self) -> &FaultCounters {
        &self.faults
    }

    /// Handshakes that came before the first certificate.
    #[must_use]
    pub fn handshakes_without_certificate(&self) -> u64 {
        self.handshakes_without_certificate.load(Ordering::Relaxed)
    }

    /// The roots that chains are checked against: what peers of a self-signed node must trust.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The chain and key served now.
    #[must_use]
    pub fn certified_key(&self) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }

    /// Runs renewals on a thread of their own until the value is dropped. An engine that has
    /// other tasks too puts them all on one [`MaintenanceThread`].
    ///
    /// # Errors
    /// The system refuses another thread.
    pub fn spawn(self: &Arc<Self>) -> Result<MaintenanceThread, CertsError> {
        MaintenanceThread::spawn(Arc::clone(&self.clock), vec![Arc::clone(self) as _])
    }

    fn start(&self, now: SystemTime, allow_pending: bool) -> Result<(), CertsError> {
        let mut control = self.control();
        let stored = self.load_stored(&mut control, now);
        let obtained = if stored { Ok(()) } else { self.obtain(&mut control, now) };
        if let Err(error) = obtained {
            if !allow_pending {
                return Err(error);
            }
            self.note_failure(&mut control, &error, now);
        }
        self.deliver(control);
        Ok(())
    }

    /// Serves what an earlier run saved; `false` if there is nothing of use.
    fn load_stored(&self, control: &mut Control, now: SystemTime) -> bool {
        let (Some(path), Source::Authority { names, .. }) = (&self.store, &self.source) else {
            return false;
        };
        let is_there = path.try_exists().map_err(|error| CertsError::file("stat", path, error));
        if matches!(is_there, Ok(false)) {
            return false;
        }
        let loaded = is_there.and_then(|_there| pem::read_private(path)).and_then(|bytes| {
            let what = path.display().to_string();
            let chain = pem::certificates(&bytes, &what)?;
            let key = pem::private_key(&bytes, &what)?;
            self.install(control, chain, key, Some(names), now)
        });
        match loaded {
            Ok(()) => true,
            Err(error) => {
                self.faults.record(error.fault());
                tracing::warn!(%error, "the stored certificate is of no use; asking for another");
                false
            }
        }
    }

    /// Gets a certificate from the source and serves it.
    fn obtain(&self, control: &mut Control, now: SystemTime) -> Result<(), CertsError> {
        match &self.source {
            Source::Authority { ca, names } => {
                let (key, csr) = key_and_request(names, self.key_algorithm)?;
                let chain = ca.issue(&CertificateRequest { csr: &csr, names })?;
                let key_der = PrivatePkcs8KeyDer::from(key.pkcs8().to_vec());
                // The date moves on while a CA thinks.
                let now = now.max(self.clock.now());
                self.install(control, chain.clone(), key_der.into(), Some(names), now)?;
                self.save(control, &chain, &key, now);
                Ok(())
            }
            Source::Files { certificate, key } => {
                control.stamps = Some([FileStamp::of(certificate), FileStamp::of(key)]);
                let chain = pem::certificates_from_file(certificate)?;
                let key = pem::private_key_from_file(key)?;
                self.install(control, chain, key, None, now)
            }
        }
    }

    /// Checks a pair as a peer would and swaps it in.
    fn install(
        &self,
        control: &mut Control,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        names: Option<&IdentityNames>,
        now: SystemTime,
    ) -> Result<(), CertsError> {
        let summary = check_own_chain(&chain, names, self.trust.as_deref(), now)?;
        let pair = CertifiedKey::from_der(chain, key, &provider::verification_provider()).map_err(
            |error| match &error {
                rustls::Error::InconsistentKeys(_) => CertsError::certificate(
                    CertificateFault::WrongKey,
                    format!("serial {}: {error}", summary.serial),
                ),
                _ => CertsError::Tls(error),
            },
        )?;
        let plan = Plan::new(&summary, &mut control.rng);
        self.current.store(Some(Arc::new(pair)));
        control.next_attempt = match self.source {
            Source::Authority { .. } => plan.renew_at,
            Source::Files { .. } => now + FILE_INTERVAL,
        };
        control.plan = Some(plan);
        control.ask_window_at = Some(now);
        control.backoff.reset();
        control.alarm_raised = None;
        control.clock_behind_raised = false;
        self.note_success(control, &summary);
        Ok(())
    }

    fn note_success(&self, control: &mut Control, summary: &CertificateSummary) {
        let mut status = self.status();
        if status.serial.is_some() {
            status.renewals += 1;
        }
        tracing::info!(serial = %summary.serial, "serving a new certificate");
        status.serial = Some(summary.serial.clone());
        status.not_before = Some(summary.not_before);
        status.not_after = Some(summary.not_after);
        status.next_renewal = match self.source {
            Source::Authority { .. } => Some(control.next_attempt),
            Source::Files { .. } => None,
        };
        status.last_error = None;
        self.status.store(Arc::new(status));
        control.events.push(RotationEvent::Renewed {
            serial: summary.serial.clone(),
            not_after: summary.not_after,
        });
    }

    fn note_failure(&self, control: &mut Control, error: &CertsError, now: SystemTime) {
        let fault = error.fault();
        self.faults.record(fault);
        let lifetime = control.plan.map_or(ASSUMED_LIFETIME, |plan| {
            plan.not_after.duration_since(plan.not_before).unwrap_or_default()
        });
        let delay = match self.source {
            Source::Authority { .. } => control.backoff.next_delay(lifetime, &mut control.rng),
            Source::Files { .. } => FILE_INTERVAL,
        };
        control.next_attempt = now + delay;
        let reason = error.to_string();
        tracing::warn!(
            fault = fault.label(), %reason, retry_s = delay.as_secs(), "certificate renewal failed"
        );
        let mut status = self.status();
        status.failures += 1;
        status.last_error = Some(reason.clone());
        if matches!(self.source, Source::Authority { .. }) {
            status.next_renewal = Some(control.next_attempt);
        }
        self.status.store(Arc::new(status));
        control.events.push(RotationEvent::RenewalFailed {
            fault,
            reason,
            retry_at: control.next_attempt,
        });
    }

    /// A certificate that cannot be saved serves all the same, and saving is tried again.
    fn save(
        &self,
        control: &mut Control,
        chain: &[CertificateDer<'static>],
        key: &PrivateKey,
        now: SystemTime,
    ) {
        if self.store.is_none() {
            return;
        }
        let mut text = pem::encode("PRIVATE KEY", key.pkcs8());
        for certificate in chain {
            text.push_str(&pem::encode("CERTIFICATE", certificate));
        }
        control.unsaved = Some(Unsaved { pem: text, retry_at: now, error: None });
        self.write_unsaved(control, now);
    }

    /// Writes what is not in the store yet, if it is due.
    fn write_unsaved(&self, control: &mut Control, now: SystemTime) {
        let Some(path) = &self.store else { return };
        // A date that jumped back must not stretch the wait.
        let is_due = |at: SystemTime| now >= at || at > now + SAVE_RETRY;
        let Some(mut unsaved) = control.unsaved.take_if(|one| is_due(one.retry_at)) else { return };
        let mut status = self.status();
        match replace_file(path, unsaved.pem.as_bytes(), Access::Owner) {
            // A renewal that failed meanwhile is still worth telling.
            Ok(()) if status.last_error == unsaved.error => status.last_error = None,
            Ok(()) => {}
            Err(error) => {
                self.faults.record(error.fault());
                tracing::warn!(%error, "the new certificate serves but is not saved for a restart");
                unsaved.error = Some(error.to_string());
                unsaved.retry_at = now + SAVE_RETRY;
                status.last_error.clone_from(&unsaved.error);
                control.unsaved = Some(unsaved);
            }
        }
        self.status.store(Arc::new(status));
    }

    fn is_due(&self, control: &mut Control, now: SystemTime) -> bool {
        if let Source::Files { certificate, key } = &self.source {
            let stamps = [FileStamp::of(certificate), FileStamp::of(key)];
            control.next_attempt = now + FILE_INTERVAL;
            return control.stamps.as_ref() != Some(&stamps);
        }
        if now >= control.next_attempt {
            return true;
        }
        let retrying = control.plan.is_none_or(|plan| control.next_attempt != plan.renew_at);
        if retrying {
            // A date that jumped back must not stretch a wait that was meant to be short.
            return control.next_attempt > now + BACKOFF_MAX;
        }
        // Made while the clock was ahead: peers refuse it until the clock gets there again.
        control.plan.is_some_and(|plan| now < plan.not_before)
    }

    /// Lets the CA move the renewal forward (RFC 9773).
    fn ask_window(&self, control: &mut Control, now: SystemTime) {
        let Source::Authority { ca, .. } = &self.source else { return };
        let due = control.ask_window_at.is_some_and(|due| now >= due || due > now + WINDOW_ASK_MAX);
        let (true, Some(mut plan)) = (due, control.plan) else { return };
        let Some(current) = self.current.load_full() else { return };
        let leaf = current.cert.first().expect("an installed chain has a leaf");
        control.ask_window_at = match ca.renewal_window(leaf) {
            Ok(None) => None,
            Ok(Some(window)) => {
                // A renewal that already failed keeps its own pace.
                if control.next_attempt == plan.renew_at {
                    plan.follow(&window, &mut control.rng);
                    control.next_attempt = plan.renew_at;
                    control.plan = Some(plan);
                    let mut status = self.status();
                    status.next_renewal = Some(control.next_attempt);
                    self.status.store(Arc::new(status));
                }
                Some(now + window.retry_after.clamp(WINDOW_ASK_MIN, WINDOW_ASK_MAX))
            }
            Err(error) => {
                tracing::warn!(%error, "the CA did not say when it wants the certificate renewed");
                Some(now + WINDOW_ASK_RETRY)
            }
        };
    }

    fn raise_alarms(&self, control: &mut Control, now: SystemTime) {
        let Some(plan) = control.plan else { return };
        if now < plan.not_before && !control.clock_behind_raised {
            control.clock_behind_raised = true;
            tracing::error!("{}", CertificateFault::NotYetValid.advice());
            self.faults.record(CertificateFault::NotYetValid);
            control.events.push(RotationEvent::ClockBehind { not_before: plan.not_before });
        }
        // Only the most urgent of those that came due together.
        let due = Alarm::ALL.into_iter().rev().find(|alarm| now >= plan.alarm_at(*alarm));
        let Some(alarm) = due.filter(|alarm| control.alarm_raised < Some(*alarm)) else { return };
        control.alarm_raised = Some(alarm);
        let mut status = self.status();
        status.alarms += 1;
        if alarm == Alarm::Expired {
            self.faults.record(CertificateFault::Expired);
        }
        tracing::error!(
            ?alarm,
            last_error = status.last_error.as_deref().unwrap_or("none"),
            "the served certificate runs out and is not renewed"
        );
        self.status.store(Arc::new(status));
        control.events.push(RotationEvent::Alarm { alarm, not_after: plan.not_after });
    }

    fn next_deadline(&self, control: &Control, now: SystemTime) -> SystemTime {
        let alarms = control.plan.into_iter().flat_map(|plan| {
            Alarm::ALL
                .into_iter()
                .filter(|alarm| control.alarm_raised < Some(*alarm))
                .map(move |alarm| plan.alarm_at(alarm))
        });
        alarms
            .chain([control.next_attempt])
            .chain(control.ask_window_at)
            .chain(control.unsaved.as_ref().map(|one| one.retry_at))
            .min()
            .unwrap_or(now)
            .max(now)
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().expect("no panic while a renewal runs")
    }

    /// Hands out events after the lock, so that a callback may ask for the status or poll.
    fn deliver(&self, mut control: MutexGuard<'_, Control>) {
        let events = std::mem::take(&mut control.events);
        drop(control);
        if let Some(callback) = &self.on_event {
            events.iter().for_each(|event| callback(event));
        }
    }

    fn serve(&self) -> Option<Arc<CertifiedKey>> {
        let current = self.current.load_full();
        if current.is_none() {
            self.handshakes_without_certificate.fetch_add(1, Ordering::Relaxed);
        }
        current
    }
}

impl Periodic for RotatingIdentity {
    fn poll(&self, now: SystemTime) -> SystemTime {
        let mut control = self.control();
        if self.is_due(&mut control, now)
            && let Err(error) = self.obtain(&mut control, now)
        {
            self.note_failure(&mut control, &error, now);
        }
        self.write_unsaved(&mut control, now);
        self.ask_window(&mut control, now);
        self.raise_alarms(&mut control, now);
        let deadline = self.next_deadline(&control, now);
        self.deliver(control);
        deadline
    }
}

impl ResolvesServerCert for RotatingIdentity {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.serve()
    }
}

impl ResolvesClientCert for RotatingIdentity {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.serve()
    }

    fn has_certs(&self) -> bool {
        self.current.load().is_some()
    }
}

#[cfg(test)]
#[path = "rotation_tests.rs"]
mod tests;
