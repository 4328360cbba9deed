//! Whom to trust: roots and revocation lists, from files that are read again when they change.
//!
//! A changed trust has a new fingerprint. Resumption is bound to it: a ticket or cached session
//! from before a revocation does not resume afterwards (see [`tickets`](super::tickets) and
//! [`resumption`](super::resumption)), since resumption skips verification.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};

use super::error::CertsError;
use super::fault::{FaultCounters, count_start};
use super::maintenance::Periodic;
use super::{pem, provider};

/// How often files are looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Roots and revocation lists, current at every handshake.
#[derive(Debug)]
pub struct TrustStore {
    sources: Sources,
    loaded: ArcSwap<Loaded>,
    /// What the files looked like when they were last read.
    stamps: Mutex<Vec<FileStamp>>,
    reloads: AtomicU64,
    /// Changed files that were refused.
    faults: Arc<FaultCounters>,
}

#[derive(Debug, Default, Clone)]
struct Sources {
    root_files: Vec<PathBuf>,
    roots: Vec<CertificateDer<'static>>,
    crl_files: Vec<PathBuf>,
    crls: Vec<CertificateRevocationListDer<'static>>,
    require_current_crl: bool,
}

/// One generation of trust.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) server: Arc<WebPkiServerVerifier>,
    pub(super) client: Arc<dyn ClientCertVerifier>,
    /// SHA-256 over all roots and lists.
    pub(super) fingerprint: [u8; 32],
}

/// Builds a [`TrustStore`].
#[derive(Debug, Default, Clone)]
pub struct TrustStoreBuilder {
    sources: Sources,
}

impl TrustStoreBuilder {
    /// Trusts the certificates in a PEM file; the file is read again when it changes.
    #[must_use]
    pub fn roots_pem(mut self, path: impl Into<PathBuf>) -> Self {
        self.sources.root_files.push(path.into());
        self
    }

    /// Trusts `roots`.
    #[must_use]
    pub fn roots(mut self, roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Self {
        self.sources.roots.extend(roots);
        self
    }

    /// Refuses leaves listed in a PEM file of revocation lists; the file is read again when it
    /// changes. With any list given, a leaf whose issuer has no list is refused.
    #[must_use]
    pub fn crl_pem(mut self, path: impl Into<PathBuf>) -> Self {
        self.sources.crl_files.push(path.into());
        self
    }

    /// As [`Self::crl_pem`], from memory.
    #[must_use]
    pub fn crls(
        mut self,
        lists: impl IntoIterator<Item = CertificateRevocationListDer<'static>>,
    ) -> Self {
        self.sources.crls.extend(lists);
        self
    }

    /// Refuses leaves when the list is past its next update. Default off: a late list keeps
    /// working, since a stalled CRL pipeline should not cut off every node.
    #[must_use]
    pub fn require_current_crl(mut self, require: bool) -> Self {
        self.sources.require_current_crl = require;
        self
    }

    /// Reads the files.
    ///
    /// # Errors
    /// No root at all, or a file that cannot be read or parsed.
    pub fn build(self) -> Result<Arc<TrustStore>, CertsError> {
        count_start(self.load())
    }

    pub(super) fn load(self) -> Result<Arc<TrustStore>, CertsError> {
        let stamps = self.sources.stamps();
        let loaded = self.sources.load()?;
        Ok(Arc::new(TrustStore {
            sources: self.sources,
            loaded: ArcSwap::from_pointee(loaded),
            stamps: Mutex::new(stamps),
            reloads: AtomicU64::new(0),
            faults: Arc::default(),
        }))
    }
}

impl TrustStore {
    /// A builder with nothing trusted.
    #[must_use]
    pub fn builder() -> TrustStoreBuilder {
        TrustStoreBuilder::default()
    }

    /// Changed files taken over so far.
    #[must_use]
    pub fn reload_count(&self) -> u64 {
        self.reloads.load(Ordering::Relaxed)
    }

    /// Changed files that could not be taken over; the trust before them stands.
    #[must_use]
    pub fn failure_count(&self) -> u64 {
        self.faults.total()
    }

    /// Likewise, by kind.
    #[must_use]
    pub fn faults(&self) -> &Arc<FaultCounters> {
        &self.faults
    }

    pub(super) fn loaded(&self) -> Arc<Loaded> {
        self.loaded.load_full()
    }

    /// Looks at the files and takes a change over. `true` if the trust is another now.
    fn reload_if_changed(&self) -> bool {
        let mut stamps = self.stamps.lock().expect("no panic while locked");
        // Taken before reading: a change during the read is seen next time.
        let current = self.sources.stamps();
        if *stamps == current {
            return false;
        }
        *stamps = current;
        match self.sources.load() {
            Ok(loaded) => {
                self.loaded.store(Arc::new(loaded));
                self.reloads.fetch_add(1, Ordering::Relaxed);
                tracing::info!("trusted roots or revocation lists were reloaded");
                true
            }
            Err(error) => {
                self.faults.record(error.fault());
                tracing::warn!(%error, "cannot reload trust; the previous one stands");
                false
            }
        }
    }
}

impl Periodic for TrustStore {
    fn poll(&self, now: SystemTime) -> SystemTime {
        self.reload_if_changed();
        now + RELOAD_INTERVAL
    }
}

impl Sources {
    fn stamps(&self) -> Vec<FileStamp> {
        self.root_files.iter().chain(&self.crl_files).map(|path| FileStamp::of(path)).collect()
    }

    fn load(&self) -> Result<Loaded, CertsError> {
        let mut roots = self.roots.clone();
        for path in &self.root_files {
            roots.extend(pem::certificates_from_file(path)?);
        }
        let mut crls = self.crls.clone();
        for path in &self.crl_files {
            crls.extend(pem::revocation_lists_from_file(path)?);
        }
        if roots.is_empty() {
            return Err(CertsError::Configuration(
                "no trusted root: give a roots file or root certificates".to_owned(),
            ));
        }
        let mut store = RootCertStore::empty();
        for root in &roots {
            store.add(root.clone())?;
        }
        let store = Arc::new(store);
        Ok(Loaded {
            server: self.server_verifier(&store, &crls)?,
            client: self.client_verifier(&store, &crls)?,
            fingerprint: fingerprint(&roots, &crls),
        })
    }

    fn server_verifier(
        &self,
        roots: &Arc<RootCertStore>,
        crls: &[CertificateRevocationListDer<'static>],
    ) -> Result<Arc<WebPkiServerVerifier>, CertsError> {
        let mut builder = WebPkiServerVerifier::builder_with_provider(
            Arc::clone(roots),
            provider::verification_provider(),
        )
        .with_crls(crls.iter().cloned())
        .only_check_end_entity_revocation();
        if self.require_current_crl {
            builder = builder.enforce_revocation_expiration();
        }
        builder.build().map_err(|error| CertsError::Configuration(error.to_string()))
    }

    fn client_verifier(
        &self,
        roots: &Arc<RootCertStore>,
        crls: &[CertificateRevocationListDer<'static>],
    ) -> Result<Arc<dyn ClientCertVerifier>, CertsError> {
        let mut builder = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(roots),
            provider::verification_provider(),
        )
        .with_crls(crls.iter().cloned())
        .only_check_end_entity_revocation()
        .clear_root_hint_subjects();
        if self.require_current_crl {
            builder = builder.enforce_revocation_expiration();
        }
        builder.build().map_err(|error| CertsError::Configuration(error.to_string()))
    }
}

fn fingerprint(
    roots: &[CertificateDer<'_>],
    crls: &[CertificateRevocationListDer<'_>],
) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    let all = roots.iter().map(|root| root.as_ref()).chain(crls.iter().map(AsRef::as_ref));
    for der in all {
        // The length keeps two lists of parts from looking alike.
        context.update(&(der.len() as u64).to_be_bytes());
        context.update(der);
    }
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Enough of a file's metadata to notice that it was changed or replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileStamp(Option<(u64, u64, i64, i64)>);

impl FileStamp {
    /// A missing file has a stamp of its own, so that its return is noticed.
    pub(super) fn of(path: &Path) -> Self {
        Self(fs::metadata(path).ok().map(|metadata| {
            (metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec())
        }))
    }
}
