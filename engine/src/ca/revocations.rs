//! The CA's revocation list as a file on a node, kept current.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use super::client::RemoteCa;
use crate::certs::{CertsError, Periodic, write_revocation_list};

/// How often the CA is asked.
const INTERVAL: Duration = Duration::from_secs(60);

/// Asks a CA for its revocation list every minute and writes it to a file when it has changed:
/// [`TrustStoreBuilder::crl_pem`](crate::certs::TrustStoreBuilder::crl_pem) on that file then refuses
/// whom the CA has revoked. While the CA is away the last list serves.
#[derive(Debug)]
pub struct RevocationFeed {
    ca: Arc<RemoteCa>,
    path: PathBuf,
    updates: AtomicU64,
    failures: AtomicU64,
    due: Mutex<Option<SystemTime>>,
}

impl RevocationFeed {
    /// Fetches the list into `path` (PEM, mode 0644), whose directory must exist. Poll it on a
    /// [`MaintenanceThread`](crate::certs::MaintenanceThread) from then on.
    ///
    /// # Errors
    /// The file could not be written, or there is none yet and the CA did not give a list.
    pub fn start(ca: Arc<RemoteCa>, path: impl Into<PathBuf>) -> Result<Arc<Self>, CertsError> {
        let feed = Self {
            ca,
            path: path.into(),
            updates: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            due: Mutex::default(),
        };
        match feed.fetch() {
            Ok(()) => {}
            Err(error @ CertsError::Authority(_)) if feed.path.exists() => {
                feed.failures.fetch_add(1, Relaxed);
                tracing::warn!(%error, "the stored revocation list serves until the CA answers");
            }
            Err(error) => return Err(error),
        }
        Ok(Arc::new(feed))
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lists that were written.
    #[must_use]
    pub fn update_count(&self) -> u64 {
        self.updates.load(Relaxed)
    }

    /// Attempts that failed; the list before them stands.
    #[must_use]
    pub fn failure_count(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    fn fetch(&self) -> Result<(), CertsError> {
        let Some(list) = self.ca.revocation_list()? else {
            return Err(CertsError::Configuration(
                "the CA keeps no revocation list: do without a feed".to_owned(),
            ));
        };
        if write_revocation_list(&self.path, &list)? {
            self.updates.fetch_add(1, Relaxed);
        }
        Ok(())
    }
}

impl Periodic for RevocationFeed {
    fn poll(&self, now: SystemTime) -> SystemTime {
        let mut due = self.due.lock().expect("no panic while locked");
        // A date that jumped back must not stretch the wait.
        if let Some(due) = due.filter(|due| now < *due && *due <= now + INTERVAL) {
            return due;
        }
        if let Err(error) = self.fetch() {
            self.failures.fetch_add(1, Relaxed);
            tracing::warn!(%error, "no newer revocation list; the last one stands");
        }
        *due.insert(now + INTERVAL)
    }
}
