//! The soak of certificates with real deaths: the CA is a process that is killed (SIGKILL) between saving
//! and answering, at random moments while it issues as fast as it can, and for a third of the time; and
//! its directory lies on a small tmpfs that is really full once. Meanwhile 200 connections come and go
//! under certificates of 60 s. Needs root, for the mount.
//!
//! The test runs itself again: in a mount namespace of its own (`soak`), so that the mount ends with the
//! process, and as the CA (`ca`), which follows the date that it is told. `STOQ_SOAK_STEPS` lengthens the
//! run (default 120 simulated seconds).

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;
#[path = "common/soak.rs"]
#[allow(dead_code, unreachable_pub)]
mod soak;

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pair::{PATIENCE, Watchdog};
use rustls_pki_types::CertificateDer;
use soak::{Authority, CA_NAME, LIFETIME_S, Place, Soak};
use stoq::ca::{CaService, RemoteCa, RemoteCaConfig};
use stoq::certs::trustchain::{TRUSTCHAIN_ALPN, TokenDirectory, TrustchainServer};
use stoq::certs::{
    CaError, CertificateAuthority, CertificateRequest, CertificateSummary, ClientAuth,
    IdentityNames, LocalCa, LocalCaConfig, Periodic, RotatingIdentity, ServerTls, SimWallClock,
    TrustStore, WallClock,
};

const ROLE: &str = "STOQ_CERTS_SOAK_ROLE";
const DIRECTORY: &str = "STOQ_CERTS_SOAK_DIRECTORY";
const PORT: &str = "STOQ_CERTS_SOAK_PORT";
const DATE: &str = "STOQ_CERTS_SOAK_DATE_MS";
const CROWD: &str = "crowd.example.net";
const PAGE_SIZE_BYTES: usize = 4096;

fn this_as(role: &str, directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.args(["--exact", "child", "--nocapture"]).env(ROLE, role).env(DIRECTORY, directory);
    command
}

#[test]
fn rotation_survives_a_ca_that_is_killed_and_a_disk_that_is_full() {
    let path = std::env::temp_dir().join(format!("stoq-certs-soak-real-{}", std::process::id()));
    fs::create_dir(&path).expect("a new directory");
    let inner = this_as("soak", &path);
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .output()
        .expect("unshare (util-linux) is needed for this test");
    // What was written went with the mount.
    fs::remove_dir(&path).expect("empty");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let done = text.lines().find(|line| line.starts_with("done: "));
    println!("{}", done.unwrap_or_else(|| panic!("{text}")));
}

/// The body of the other processes; nothing by itself.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let directory = PathBuf::from(std::env::var(DIRECTORY).expect("given"));
    match role.as_str() {
        "soak" => run(&directory),
        "ca" => serve(&directory),
        other => panic!("unknown role {other}"),
    }
}

// ---- the CA's process

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{line}").and_then(|()| out.flush()).expect("whoever started us listens");
}

/// Issues, writes its books, and hangs before it answers, when told to: there it is killed.
struct Mortal {
    ca: Arc<LocalCa>,
    dies: Arc<AtomicBool>,
}

impl CertificateAuthority for Mortal {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let chain = self.ca.issue(request)?;
        if self.dies.swap(false, Ordering::SeqCst) {
            say("dying");
            loop {
                std::thread::park();
            }
        }
        Ok(chain)
    }
}

type Opened = (CaService, Arc<RotatingIdentity>);

/// As `stoq ca serve` does.
fn open(
    directory: &Path,
    clock: &Arc<SimWallClock>,
    dies: Arc<AtomicBool>,
) -> Result<Opened, Box<dyn std::error::Error>> {
    let leaf_lifetime = Duration::from_secs(LIFETIME_S);
    let config = LocalCaConfig { leaf_lifetime, ..LocalCaConfig::default() };
    let ca = Arc::new(LocalCa::open_at(&directory.join("ca"), config, clock.clone())?);
    let names = IdentityNames::new().with_dns(CA_NAME)?;
    let own = RotatingIdentity::with_authority(ca.clone(), names).clock(clock.clone()).start()?;
    let trust = TrustStore::builder().roots([ca.root()]).build()?;
    let tls = ServerTls::builder()
        .identity(own.clone())
        .client_auth(ClientAuth::Optional(trust))
        .clock(clock.clone())
        .alpn([TRUSTCHAIN_ALPN])
        .build()?;
    let tokens = TokenDirectory::open(&directory.join("tokens"))?;
    let server = TrustchainServer::new(Arc::new(Mortal { ca, dies }), clock.clone());
    let port = std::env::var(PORT)?.parse()?;
    let bind = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
    let service = CaService::start(bind, &tls, Arc::new(server.with_tokens(tokens)))?;
    Ok((service, own))
}

fn serve(directory: &Path) {
    let date = |text: &str| UNIX_EPOCH + Duration::from_millis(text.parse().expect("a number"));
    let clock = Arc::new(SimWallClock::new(date(&std::env::var(DATE).expect("given"))));
    let dies = Arc::new(AtomicBool::new(false));
    let (service, own) = match open(directory, &clock, dies.clone()) {
        Ok(opened) => opened,
        Err(error) => return say(&format!("failed {error}")),
    };
    say(&format!("listening {}", service.local_addr().port()));
    for line in std::io::stdin().lines() {
        let line = line.expect("text");
        match line.split_once(' ') {
            Some(("date", ms)) => clock.set(date(ms)),
            _ if line == "die" => dies.store(true, Ordering::SeqCst),
            _ => panic!("{line}"),
        }
        own.poll(clock.now());
        say("ok");
    }
}

// ---- what is done to it

/// The running CA. Dropped, it is killed.
struct Process {
    child: Arc<Mutex<Child>>,
    orders: ChildStdin,
    answers: Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

fn kill(child: &Mutex<Child>) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    child.kill().expect("our own child can be killed");
    child.wait().expect("our own child can be waited for");
}

impl Drop for Process {
    fn drop(&mut self) {
        kill(&self.child);
        let ended = self.reader.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.expect("once").expect("the reader did not panic");
        }
    }
}

impl Process {
    fn start(place: &Place, killed_in_mid_issue: &Arc<AtomicU64>) -> Self {
        let mut child = this_as("ca", &place.directory)
            .env(PORT, place.port.to_string())
            .env(DATE, date_ms(place).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let orders = child.stdin.take().expect("piped");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let child = Arc::new(Mutex::new(child));
        let (tell, answers): (Sender<String>, _) = channel();
        let (watched, count) = (child.clone(), killed_in_mid_issue.clone());
        let reader = std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if line == "dying" {
                    // Saved, and not answered: there the power fails.
                    kill(&watched);
                    count.fetch_add(1, Ordering::SeqCst);
                } else if ["ok", "listening", "failed"].iter().any(|word| line.starts_with(word)) {
                    // Nobody listens any more once it was killed from elsewhere.
                    let _nobody_waits = tell.send(line);
                }
            }
        });
        Self { child, orders, answers, reader: Some(reader) }
    }

    /// `None` if it is dead.
    fn answer(&self) -> Option<String> {
        match self.answers.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => None,
            Err(error) => panic!("the CA's process is silent: {error}"),
        }
    }

    /// `false` if it is dead.
    fn order(&mut self, line: &str) -> bool {
        let sent = writeln!(self.orders, "{line}").and_then(|()| self.orders.flush());
        sent.is_ok() && self.answer().is_some()
    }
}

fn date_ms(place: &Place) -> u128 {
    place.clock.now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis()
}

struct Ca {
    place: Place,
    process: Option<Process>,
    crowd: Arc<Crowd>,
    killed: u64,
    killed_in_mid_issue: Arc<AtomicU64>,
    /// Why it did not start.
    failures: Vec<String>,
}

impl Authority for Ca {
    fn place(&self) -> &Place {
        &self.place
    }

    /// Never otherwise than by SIGKILL.
    fn stop(&mut self) {
        self.killed += u64::from(self.process.take().is_some());
    }

    /// Starts it unless it runs; its books must hold what it has handed out.
    fn start(&mut self) {
        if self.process.is_some() {
            return;
        }
        let handed_out = self.crowd.unexpired(self.place.clock.now());
        let process = Process::start(&self.place, &self.killed_in_mid_issue);
        let answer = process.answer().expect("it says how that went");
        match answer.split_once(' ') {
            Some(("listening", port)) => self.place.port = port.parse().expect("a port"),
            Some(("failed", why)) => return self.failures.push(why.to_owned()),
            _ => panic!("{answer}"),
        }
        let books = fs::read_to_string(self.place.directory.join("ca/state.toml")).expect("kept");
        for serial in handed_out {
            assert!(books.contains(&serial), "{serial} was handed out and is in no book");
        }
        self.process = Some(process);
    }

    fn follow_clock(&mut self) {
        let order = format!("date {}", date_ms(&self.place));
        if self.process.as_mut().is_some_and(|process| !process.order(&order)) {
            self.process = None;
        }
    }
}

impl Ca {
    /// Told to die at the next certificate, and dead then.
    fn die_in_mid_issue(&mut self) {
        let before = self.killed_in_mid_issue.load(Ordering::SeqCst);
        // It may be dead before it answers: the crowd asks at any moment.
        let answered = self.process.as_mut().expect("it runs").order("die");
        let dead = self.killed_in_mid_issue.load(Ordering::SeqCst) > before;
        assert!(answered || dead, "it lives until it issues");
        wait_for("a certificate to be asked for", || {
            self.killed_in_mid_issue.load(Ordering::SeqCst) > before
        });
        self.stop();
    }

    /// What befalls it in a step.
    fn suffer(&mut self, step: u64, full_at: u64) {
        let tmpfs = Disk(&self.place.directory.clone());
        match step % 60 {
            0 | 30 => self.stop(),
            1..10 | 31..40 => {}
            14 => self.die_in_mid_issue(),
            // Somewhere between the request and the answer of whoever is being served.
            44 | 48 | 52 | 56 => {
                std::thread::sleep(Duration::from_micros(step * 977 % 9000));
                self.stop();
            }
            _ if (full_at + 1..full_at + 11).contains(&step) => {
                tmpfs.fill();
                if step == full_at + 5 {
                    self.stop();
                    tmpfs.remove_unfinished(&self.place.directory.join("ca"));
                    tmpfs.fill();
                }
                self.start();
            }
            _ => self.start(),
        }
        if step == full_at {
            let before = self.crowd.disk_full.load(Ordering::SeqCst);
            wait_for("the CA to run into the full disk", || {
                tmpfs.fill();
                self.crowd.disk_full.load(Ordering::SeqCst) > before
            });
        } else if step == full_at + 11 {
            tmpfs.free();
        }
    }
}

fn wait_for(what: &str, mut is_there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_there() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The small disk under the CA.
struct Disk<'a>(&'a Path);

impl Disk<'_> {
    /// Takes what is left of it.
    fn fill(&self) {
        let path = self.0.join("filler");
        let filler = OpenOptions::new().create(true).append(true).open(path);
        let mut filler = filler.expect("an empty file takes no page");
        while filler.write_all(&[7; PAGE_SIZE_BYTES]).is_ok() {}
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).expect("filled before");
    }

    /// What a killed writer left would be room for the next start.
    fn remove_unfinished(&self, directory: &Path) {
        for entry in fs::read_dir(directory).expect("listed") {
            let path = entry.expect("listed").path();
            if path.extension().is_some_and(|ending| ending == "tmp") {
                fs::remove_file(path).expect("removed");
            }
        }
    }
}

/// A node that asks for one certificate after the other, so that there is always something to kill.
#[derive(Default)]
struct Crowd {
    issued: Mutex<Vec<(String, SystemTime)>>,
    disk_full: AtomicU64,
    stop: AtomicBool,
}

impl Crowd {
    fn start(self: &Arc<Self>, place: &Place) -> JoinHandle<()> {
        let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, place.port, 0, 0);
        let mut config = RemoteCaConfig::new(address, CA_NAME, vec![place.root.clone()]);
        config.token = Some(place.token(CROWD));
        config.clock = place.clock.clone();
        config.timeout = Duration::from_millis(300);
        let (crowd, clock) = (self.clone(), place.clock.clone());
        let tokens = place.directory.join("tokens");
        let remote = RemoteCa::new(config).expect("a client");
        let names = IdentityNames::new().with_dns(CROWD).expect("a name");
        let identity = RotatingIdentity::with_authority(remote.clone(), names.clone())
            .clock(clock.clone())
            .allow_pending(true)
            .start()
            .expect("started");
        std::thread::spawn(move || {
            let key = rcgen::KeyPair::generate().expect("a key");
            let params = rcgen::CertificateParams::new([CROWD.to_owned()]).expect("a name");
            let csr = params.serialize_request(&key).expect("a request").der().to_vec().into();
            while !crowd.stop.load(Ordering::SeqCst) {
                identity.poll(clock.now());
                match remote.issue(&CertificateRequest { csr: &csr, names: &names }) {
                    Ok(chain) => {
                        let leaf = CertificateSummary::parse(&chain[0]).expect("a certificate");
                        let mut issued = crowd.issued.lock().expect("not poisoned");
                        issued.push((leaf.serial, leaf.not_after));
                    }
                    Err(error) if error.to_string().contains("No space left on device") => {
                        crowd.disk_full.fetch_add(1, Ordering::SeqCst);
                    }
                    // The CA is dead: that is what this is about.
                    Err(CaError::Unreachable { .. }) => {}
                    Err(error) => {
                        let end = identity.status().not_after;
                        assert!(end.is_none_or(|end| end < clock.now()), "{error}");
                        // Starved until its certificate ended, on a busy machine: as a new node, once
                        // there is room for a token.
                        let tokens = TokenDirectory::open(&tokens).expect("there");
                        let token = tokens.create(&names, Duration::from_secs(60), clock.now());
                        if let Ok(token) = token {
                            remote.set_token(&token).expect("hexadecimal");
                        }
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    }

    /// Serial numbers of what was handed out and serves at least a little longer.
    fn unexpired(&self, now: SystemTime) -> Vec<String> {
        let issued = self.issued.lock().expect("not poisoned");
        let soon = now + Duration::from_secs(2);
        issued.iter().filter(|(_, end)| *end > soon).map(|(serial, _)| serial.clone()).collect()
    }
}

fn run(directory: &Path) {
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs"])
        .arg(directory)
        .status()
        .expect("mount runs");
    assert!(mounted.success(), "mounting needs root");
    let steps: u64 = std::env::var("STOQ_SOAK_STEPS").map_or(120, |text| {
        text.parse().expect("STOQ_SOAK_STEPS is a number of simulated seconds")
    });
    assert!(steps >= 60, "STOQ_SOAK_STEPS: a minute has everything that befalls the CA");
    let limit = Duration::from_secs(180) + Duration::from_secs(1) * steps as u32;
    let _watchdog = Watchdog::with_limit("the soak with real deaths", limit);
    let clock = Arc::new(SimWallClock::new(UNIX_EPOCH + Duration::from_secs(1_800_000_000)));
    // Makes the CA.
    let root = LocalCa::open_at(&directory.join("ca"), LocalCaConfig::default(), clock.clone());
    let root = root.expect("made").root();
    let mut ca = Ca {
        place: Place { directory: directory.to_owned(), clock: clock.clone(), port: 0, root },
        process: None,
        crowd: Arc::default(),
        killed: 0,
        killed_in_mid_issue: Arc::default(),
        failures: Vec::new(),
    };
    ca.start();
    let mut soak = Soak::start(&ca.place);
    let crowding = ca.crowd.start(&ca.place);
    let crowd = ca.crowd.clone();
    wait_for("the first certificates", || crowd.unexpired(clock.now()).len() > 1);
    let full_at = steps / 2 / 60 * 60 + 15;
    for step in 0..steps {
        ca.suffer(step, full_at);
        soak.step(step, &mut ca);
    }
    soak.all_stand();
    ca.crowd.stop.store(true, Ordering::SeqCst);
    crowding.join().expect("the crowd did not panic");
    ca.start();
    let (renewals, failures) = soak.counts();
    let in_mid_issue = ca.killed_in_mid_issue.load(Ordering::SeqCst);
    assert!(renewals >= 2 * (steps / LIFETIME_S), "{renewals} renewals");
    assert!(in_mid_issue >= steps / 60 && ca.killed >= 7 * (steps / 60), "{}", ca.killed);
    // Started on the full disk, it says what is wrong; with room it starts again.
    assert!(!ca.failures.is_empty());
    let full = |why: &String| why.contains("No space left on device");
    assert!(ca.failures.iter().all(full), "{:?}", ca.failures);
    let certificates = crowd.issued.lock().expect("not poisoned").len();
    soak.end(&mut ca);
    println!(
        "\ndone: {steps} s, {} handshakes, {renewals} renewals, {failures} failed attempts; CA killed \
         {} times, {in_mid_issue} of them between saving and answering, {certificates} certificates \
         beside, {} starts and {} requests refused by the full disk",
        soak.handshakes,
        ca.killed,
        ca.failures.len(),
        crowd.disk_full.load(Ordering::SeqCst),
    );
}
