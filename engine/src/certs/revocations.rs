//! Revocations ordered from outside while a CA runs, and revocation lists as files.
//!
//! ```text
//! <random>.order   names to revoke, written by whoever may write to the directory
//! <random>.done    the CA's answer: serial numbers, or why not; removed by whoever ordered
//! ```
//!
//! The process that holds a CA's directory polls a [`RevocationDesk`]. An order is removed only after
//! the revocation is on disk and in a new list, so an order survives the CA's end in between; carried
//! out twice it revokes nothing more. Both files are replaced as a whole.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls_pki_types::CertificateRevocationListDer;
use serde::{Deserialize, Serialize};

use super::error::CertsError;
use super::fault::CertificateFault;
use super::local_ca::LocalCa;
use super::maintenance::Periodic;
use super::names::{IdentityNames, hex};
use super::pem;
use super::storage::{Access, replace_file, sync_parent};

/// Most orders and answers that wait in a directory.
const ORDERS_MAX: usize = 1024;
/// How often the desk looks for orders.
const DESK_INTERVAL: Duration = Duration::from_secs(1);
/// How often whoever ordered looks for the answer.
const ANSWER_INTERVAL: Duration = Duration::from_millis(50);
/// Answers that nobody took are removed after this.
const ANSWER_KEPT: Duration = Duration::from_secs(60 * 60);
const ORDER: &str = "order";
const DONE: &str = "done";

/// Where orders and answers lie.
#[derive(Debug)]
pub struct RevocationDirectory {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OrderFile {
    #[serde(default)]
    dns: Vec<String>,
    #[serde(default)]
    ipv6: Vec<std::net::Ipv6Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_id: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DoneFile {
    #[serde(default)]
    serials: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl RevocationDirectory {
    /// Uses `path`, which is made with mode 0700 if it is missing. Whoever can write to it can revoke.
    ///
    /// # Errors
    /// Others can write to it, or a system call failed.
    pub fn open(path: &Path) -> Result<Self, CertsError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => sync_parent(path)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(CertsError::file("create directory", path, error)),
        }
        let metadata = fs::metadata(path).map_err(|error| CertsError::file("stat", path, error))?;
        let mode = metadata.mode() & 0o7777;
        if mode & 0o022 != 0 {
            return Err(CertsError::DirectoryWritableByOthers { path: path.to_owned(), mode });
        }
        Ok(Self { path: path.to_owned() })
    }

    /// Orders the revocation of every certificate with exactly `names` and waits for the running CA's
    /// answer: the serial numbers that it revoked. Blocks.
    ///
    /// # Errors
    /// The CA did not answer within `patience` (the order is withdrawn), it could not save the
    /// revocation, or a file could not be written.
    pub fn revoke(
        &self,
        names: &IdentityNames,
        patience: Duration,
    ) -> Result<Vec<String>, CertsError> {
        names.validate()?;
        if self.files()?.len() >= ORDERS_MAX {
            return Err(CertsError::Configuration(format!(
                "{ORDERS_MAX} orders and answers wait in {}: does the CA run?",
                self.path.display()
            )));
        }
        let mut id = [0; 16];
        aws_lc_rs::rand::fill(&mut id)
            .map_err(|_| CertsError::crypto("random bytes", "no entropy"))?;
        let (order, done) = (self.file(&hex(&id), ORDER), self.file(&hex(&id), DONE));
        let text = toml::to_string(&OrderFile {
            dns: names.dns().to_vec(),
            ipv6: names.ipv6().to_vec(),
            client_id: names.client_id().map(str::to_owned),
        })
        .map_err(|error| CertsError::crypto("writing an order as TOML", error))?;
        replace_file(&order, text.as_bytes(), Access::Owner)?;
        let deadline = Instant::now() + patience;
        loop {
            // Read after the time, so that an answer at the last moment counts.
            let is_late = Instant::now() >= deadline;
            if let Some(answer) = read_toml::<DoneFile>(&done)? {
                remove(&done)?;
                return match answer.error {
                    None => Ok(answer.serials),
                    Some(error) => Err(CertsError::Configuration(error)),
                };
            }
            if is_late {
                remove(&order)?;
                return Err(CertsError::Configuration(format!(
                    "the CA did not answer within {} s; the order is withdrawn, unless it is being \
                     carried out just now: look at the CA's log, or stop it and revoke then",
                    patience.as_secs()
                )));
            }
            std::thread::sleep(ANSWER_INTERVAL);
        }
    }

    fn file(&self, id: &str, ending: &str) -> PathBuf {
        self.path.join(format!("{id}.{ending}"))
    }

    /// Orders and answers.
    fn files(&self) -> Result<Vec<PathBuf>, CertsError> {
        let listing = |error| CertsError::file("list directory", &self.path, error);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(listing)? {
            let path = entry.map_err(listing)?.path();
            if path.extension().is_some_and(|ending| ending == ORDER || ending == DONE) {
                files.push(path);
            }
        }
        Ok(files)
    }
}

/// Carries out the orders in a directory, about once a second while it is polled.
pub struct RevocationDesk {
    ca: Arc<LocalCa>,
    directory: RevocationDirectory,
}

impl std::fmt::Debug for RevocationDesk {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("RevocationDesk")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl RevocationDesk {
    /// A desk in front of `ca`.
    #[must_use]
    pub fn new(ca: Arc<LocalCa>, directory: RevocationDirectory) -> Self {
        Self { ca, directory }
    }

    fn serve(&self) -> Result<(), CertsError> {
        for path in self.directory.files()? {
            if path.extension().is_some_and(|ending| ending == DONE) {
                remove_if_old(&path)?;
                continue;
            }
            let answer = match self.carry_out(&path) {
                Ok(None) => continue,
                Ok(Some(serials)) => {
                    tracing::info!(serials = serials.join(", "), "revoked by order");
                    DoneFile { serials, error: None }
                }
                Err(error) => {
                    tracing::warn!(%error, order = %path.display(), "cannot revoke as ordered");
                    DoneFile { serials: Vec::new(), error: Some(error.to_string()) }
                }
            };
            let text = toml::to_string(&answer)
                .map_err(|error| CertsError::crypto("writing an answer as TOML", error))?;
            replace_file(&path.with_extension(DONE), text.as_bytes(), Access::Owner)?;
            remove(&path)?;
        }
        Ok(())
    }

    /// `None` if the order was withdrawn.
    fn carry_out(&self, path: &Path) -> Result<Option<Vec<String>>, CertsError> {
        let Some(order) = read_toml::<OrderFile>(path)? else { return Ok(None) };
        let mut names = IdentityNames::new();
        for name in &order.dns {
            names = names.with_dns(name)?;
        }
        for address in &order.ipv6 {
            names = names.with_ipv6(*address);
        }
        if let Some(id) = &order.client_id {
            names = names.with_client_id(id)?;
        }
        let serials = self.ca.revoke(&names)?;
        // Also where nothing was revoked now: the end may have come before the list last time.
        self.ca.revocation_list()?;
        Ok(Some(serials))
    }
}

impl Periodic for RevocationDesk {
    fn poll(&self, now: SystemTime) -> SystemTime {
        if let Err(error) = self.serve() {
            tracing::warn!(%error, "revocation orders wait");
        }
        now + DESK_INTERVAL
    }
}

/// Writes `list` to `path` as PEM unless it is there already; whether it was written.
///
/// # Errors
/// It is no revocation list, or the file could not be written: the old one stands.
pub(crate) fn write_revocation_list(
    path: &Path,
    list: &CertificateRevocationListDer<'_>,
) -> Result<bool, CertsError> {
    x509_parser::parse_x509_crl(list).map_err(|error| CertsError::Parse {
        fault: CertificateFault::Malformed,
        what: "the CA's revocation list".to_owned(),
        reason: error.to_string(),
    })?;
    let text = pem::encode("X509 CRL", list);
    match fs::read(path) {
        Ok(old) if old == text.as_bytes() => return Ok(false),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(CertsError::file("read", path, error)),
    }
    replace_file(path, text.as_bytes(), Access::Everyone)?;
    Ok(true)
}

/// A file's content; `None` if there is none.
fn read_toml<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, CertsError> {
    let bytes = match pem::read_private(path) {
        Ok(bytes) => bytes,
        Err(CertsError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let damaged = |reason: String| CertsError::Parse {
        fault: CertificateFault::Malformed,
        what: path.display().to_string(),
        reason,
    };
    let text = std::str::from_utf8(&bytes).map_err(|error| damaged(error.to_string()))?;
    toml::from_str(text).map(Some).map_err(|error| damaged(error.to_string()))
}

/// Removes a file that may be gone already.
fn remove(path: &Path) -> Result<(), CertsError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(CertsError::file("remove", path, error)),
    }
}

fn remove_if_old(path: &Path) -> Result<(), CertsError> {
    let written = match fs::metadata(path).and_then(|metadata| metadata.modified()) {
        Ok(written) => written,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(CertsError::file("stat", path, error)),
    };
    // Files carry the machine's time, whatever date the CA lives by.
    match written.elapsed() {
        Ok(age) if age > ANSWER_KEPT => remove(path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::authority::{CertificateAuthority, CertificateRequest, key_and_request};
    use super::super::keys::KeyAlgorithm;
    use super::super::local_ca::LocalCaConfig;
    use super::super::test_dir::TestDir;
    use super::super::wall_clock::SystemWallClock;
    use super::*;

    fn names(name: &str) -> IdentityNames {
        IdentityNames::new().with_dns(name).unwrap()
    }

    fn desk(dir: &TestDir) -> (Arc<LocalCa>, RevocationDesk, RevocationDirectory) {
        let ca = LocalCa::open(&dir.path().join("ca"), LocalCaConfig::default()).unwrap();
        let ca = Arc::new(ca);
        for name in ["a.example", "a.example", "b.example"] {
            let csr = key_and_request(&names(name), KeyAlgorithm::default()).unwrap().1;
            ca.issue(&CertificateRequest { csr: &csr, names: &names(name) }).unwrap();
        }
        let path = dir.path().join("revocations");
        let open = || RevocationDirectory::open(&path).unwrap();
        (ca.clone(), RevocationDesk::new(ca, open()), open())
    }

    /// What `order` gets while the desk is polled.
    fn with_desk<T: Send>(desk: &RevocationDesk, order: impl FnOnce() -> T + Send) -> T {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let ordering = scope.spawn(|| {
                let result = order();
                done.store(true, Ordering::SeqCst);
                result
            });
            while !done.load(Ordering::SeqCst) && !ordering.is_finished() {
                desk.poll(SystemTime::now());
                std::thread::sleep(Duration::from_millis(5));
            }
            ordering.join().unwrap()
        })
    }

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn an_order_is_carried_out_and_answered() {
        let dir = TestDir::new();
        let (ca, desk, directory) = desk(&dir);
        let serials = with_desk(&desk, || directory.revoke(&names("a.example"), PATIENCE)).unwrap();
        assert_eq!((serials.len(), ca.issued_count()), (2, 1));
        let list = ca.current_revocation_list().unwrap().unwrap();
        let (_, list) = x509_parser::parse_x509_crl(&list).unwrap();
        assert_eq!(list.iter_revoked_certificates().count(), 2);
        // Again, or for somebody unknown: nothing is left to revoke.
        for name in ["a.example", "c.example"] {
            let serials = with_desk(&desk, || directory.revoke(&names(name), PATIENCE)).unwrap();
            assert!(serials.is_empty());
        }
        assert!(directory.files().unwrap().is_empty());
    }

    #[test]
    fn an_order_survives_the_ca_and_one_that_nobody_reads_is_withdrawn() {
        let dir = TestDir::new();
        let (ca, desk, directory) = desk(&dir);
        let error = directory.revoke(&names("a.example"), Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("withdrawn"), "{error}");
        assert!(directory.files().unwrap().is_empty());
        desk.poll(SystemTime::now());
        assert_eq!(ca.issued_count(), 3);
        // Ordered, and the CA is away for a moment.
        let path = directory.file("00", ORDER);
        replace_file(&path, b"dns = ['b.example']", Access::Owner).unwrap();
        drop((desk, ca));
        let ca = LocalCa::open(&dir.path().join("ca"), LocalCaConfig::default()).unwrap();
        let ca = Arc::new(ca);
        RevocationDesk::new(ca.clone(), directory).poll(SystemTime::now());
        assert_eq!(ca.issued_count(), 2);
    }

    #[test]
    fn bad_orders_are_answered_and_stop_nobody() {
        let dir = TestDir::new();
        let (ca, desk, directory) = desk(&dir);
        for (id, content) in [("00", &b"dns = 3"[..]), ("01", b"\xff"), ("02", b"dns = ['*']")] {
            replace_file(&directory.file(id, ORDER), content, Access::Owner).unwrap();
        }
        let exposed = directory.file("03", ORDER);
        replace_file(&exposed, b"dns = ['a.example']", Access::Everyone).unwrap();
        replace_file(&directory.file("04", ORDER), b"dns = ['b.example']", Access::Owner).unwrap();
        desk.poll(SystemTime::now());
        for id in ["00", "01", "02", "03"] {
            let done: DoneFile = read_toml(&directory.file(id, DONE)).unwrap().unwrap();
            assert!(done.error.is_some(), "{id}");
        }
        assert_eq!(ca.issued_count(), 2, "the good order was carried out");
        fs::set_permissions(&directory.path, fs::Permissions::from_mode(0o777)).unwrap();
        let error = RevocationDirectory::open(&directory.path).unwrap_err();
        assert!(error.to_string().contains("chmod 700"), "{error}");
    }

    #[test]
    fn a_list_is_written_when_it_changed_and_only_a_list() {
        let dir = TestDir::new();
        let ca = LocalCa::in_memory(LocalCaConfig::default(), Arc::new(SystemWallClock)).unwrap();
        let path = dir.path().join("crl.pem");
        let list = || {
            ca.revocation_list().unwrap();
            ca.current_revocation_list().unwrap().unwrap()
        };
        let first = list();
        assert!(write_revocation_list(&path, &first).unwrap());
        assert!(!write_revocation_list(&path, &first).unwrap());
        assert!(write_revocation_list(&path, &list()).unwrap());
        let before = fs::read(&path).unwrap();
        let error = write_revocation_list(&path, &vec![1, 2, 3].into()).unwrap_err();
        assert_eq!(error.fault(), CertificateFault::Malformed);
        assert_eq!(fs::read(&path).unwrap(), before);
    }
}
