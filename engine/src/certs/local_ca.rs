//! The embedded certificate authority: a root, an intermediate, short-lived leaves.
//!
//! ```text
//! root (10 years, pathlen 1) ── intermediate (1 year, pathlen 0, name constraints) ── leaf (24 h)
//! ```
//!
//! Keys and certificates live in one file that is replaced as a whole, so a crash never separates
//! them. The intermediate is certified again, with the same key and name, when two thirds of its
//! life are over: leaves and revocation lists of the old certificate stay valid under the new.
//! State is saved before a certificate leaves the CA: what is not on disk was not issued.

use std::net::Ipv6Addr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose,
    PublicKeyData, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};

use super::authority::{self, CertificateAuthority, CertificateRequest};
use super::ca_state::CaState;
use super::constraints::NamePolicy;
use super::csr::check_request;
use super::error::{CaError, CertsError};
use super::fault::{CertificateFault, count_start};
use super::keys::{KeyAlgorithm, PrivateKey};
use super::maintenance::Periodic;
use super::names::{CertificateSummary, IdentityNames};
use super::pem;
use super::storage::{Access, Directory, Memory, Storage};
use super::wall_clock::{SystemWallClock, WallClock};

const CA_FILE: &str = "ca.pem";
const STATE_FILE: &str = "state.toml";
const ROOT_FILE: &str = "root.pem";
const CRL_FILE: &str = "crl.pem";
/// Random bytes in a serial number, of the 20 that RFC 5280 allows.
const SERIAL_SIZE_BYTES: usize = 16;
/// Wait after a revocation list that could not be saved.
const CRL_RETRY: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Lifetimes and name policy of a [`LocalCa`].
#[derive(Debug, Clone)]
pub struct LocalCaConfig {
    /// Life of a leaf. Default 24 hours.
    pub leaf_lifetime: Duration,
    /// How far before the present validity starts, for peers with slow clocks; at most a tenth of the
    /// certificate's life, so that a short one is not born old. Default 5 minutes.
    pub backdate: Duration,
    /// Life of the intermediate. Default 365 days.
    pub intermediate_lifetime: Duration,
    /// Life of the root. Default 3650 days.
    pub root_lifetime: Duration,
    /// Kind of the root's and the intermediate's keys, when the CA is made. Leaves have the kind that
    /// their nodes ask for. Default [`KeyAlgorithm::EcdsaP256`].
    pub key_algorithm: KeyAlgorithm,
    /// Time until the next revocation list is due. Default 7 days.
    pub crl_lifetime: Duration,
    /// DNS subtrees that leaves may name (`example.net` covers itself and all below). With these
    /// and [`Self::permitted_ipv6`] both empty every name is allowed.
    pub permitted_dns: Vec<String>,
    /// IPv6 prefixes that leaves may name: address and prefix length in bits.
    pub permitted_ipv6: Vec<(Ipv6Addr, u8)>,
}

impl Default for LocalCaConfig {
    fn default() -> Self {
        Self {
            leaf_lifetime: DAY,
            backdate: Duration::from_secs(5 * 60),
            intermediate_lifetime: 365 * DAY,
            root_lifetime: 3650 * DAY,
            key_algorithm: KeyAlgorithm::default(),
            crl_lifetime: 7 * DAY,
            permitted_dns: Vec::new(),
            permitted_ipv6: Vec::new(),
        }
    }
}

impl LocalCaConfig {
    fn validate(&self) -> Result<(), CertsError> {
        let leaf_min = Duration::from_secs(60);
        if self.leaf_lifetime < leaf_min
            || self.intermediate_lifetime < 3 * self.leaf_lifetime
            || self.root_lifetime < 3 * self.intermediate_lifetime
        {
            return Err(CertsError::Configuration(format!(
                "CA lifetimes must satisfy leaf ≥ {} s, intermediate ≥ 3 × leaf, root ≥ 3 × \
                 intermediate (got {} s, {} s, {} s)",
                leaf_min.as_secs(),
                self.leaf_lifetime.as_secs(),
                self.intermediate_lifetime.as_secs(),
                self.root_lifetime.as_secs()
            )));
        }
        if self.crl_lifetime < leaf_min {
            return Err(CertsError::Configuration("CRL lifetime must be at least 60 s".into()));
        }
        Ok(())
    }
}

/// A CA inside this process.
pub struct LocalCa {
    config: LocalCaConfig,
    policy: NamePolicy,
    clock: Arc<dyn WallClock>,
    storage: Box<dyn Storage>,
    inner: Mutex<Inner>,
    /// When the revocation list is signed again.
    crl_due: Mutex<Option<SystemTime>>,
}

struct Inner {
    material: Material,
    state: CaState,
    /// As last signed.
    list: Option<CertificateRevocationListDer<'static>>,
}

/// Both certificates with their keys.
struct Material {
    root: CertificateDer<'static>,
    root_key: PrivateKey,
    intermediate: CertificateDer<'static>,
    intermediate_key: PrivateKey,
}

impl std::fmt::Debug for LocalCa {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("LocalCa").field("config", &self.config).finish_non_exhaustive()
    }
}

impl LocalCa {
    /// Opens the CA in `directory`, creating both if they are missing, and locks the directory
    /// until the value is dropped.
    ///
    /// # Errors
    /// Another process holds it, its keys are readable by others, its files are damaged, the root
    /// has expired, or a system call failed.
    pub fn open(directory: &Path, config: LocalCaConfig) -> Result<Self, CertsError> {
        Self::open_at(directory, config, Arc::new(SystemWallClock))
    }

    /// As [`Self::open`], with the date injected.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(
        directory: &Path,
        config: LocalCaConfig,
        clock: Arc<dyn WallClock>,
    ) -> Result<Self, CertsError> {
        let opened = Directory::open(directory)
            .and_then(|directory| Self::with_storage(Box::new(directory), config, clock));
        count_start(opened)
    }

    /// A CA that leaves nothing behind: self-signed nodes, tests.
    ///
    /// # Errors
    /// The configuration is invalid or key generation failed.
    pub fn in_memory(config: LocalCaConfig, clock: Arc<dyn WallClock>) -> Result<Self, CertsError> {
        Self::with_storage(Box::new(Memory::default()), config, clock)
    }

    pub(super) fn with_storage(
        storage: Box<dyn Storage>,
        config: LocalCaConfig,
        clock: Arc<dyn WallClock>,
    ) -> Result<Self, CertsError> {
        config.validate()?;
        let policy = NamePolicy::new(&config.permitted_dns, &config.permitted_ipv6)?;
        let now = clock.now();
        let (material, fresh) = match storage.read(CA_FILE, Access::Owner)? {
            Some(bytes) => (Material::parse(&bytes)?, false),
            None => (Material::generate(&config, &policy, now)?, true),
        };
        CertificateSummary::parse(&material.root)?.check_dates(now)?;
        let state = match storage.read(STATE_FILE, Access::Owner)? {
            Some(bytes) => CaState::parse(&bytes)?,
            None => CaState::default(),
        };
        if fresh {
            storage.replace(CA_FILE, material.to_pem().as_bytes(), Access::Owner)?;
        }
        let root_pem = pem::encode("CERTIFICATE", &material.root);
        if storage.read(ROOT_FILE, Access::Everyone)?.as_deref() != Some(root_pem.as_bytes()) {
            storage.replace(ROOT_FILE, root_pem.as_bytes(), Access::Everyone)?;
        }
        Ok(Self {
            config,
            policy,
            clock,
            storage,
            inner: Mutex::new(Inner { material, state, list: None }),
            crl_due: Mutex::new(None),
        })
    }

    /// The root certificate: what peers must trust.
    #[must_use]
    pub fn root(&self) -> CertificateDer<'static> {
        self.lock().material.root.clone()
    }

    /// The root certificate as PEM, for distribution.
    #[must_use]
    pub fn root_pem(&self) -> String {
        pem::encode("CERTIFICATE", &self.root())
    }

    /// Revokes every unexpired certificate of `names` that carries the same names, and returns
    /// their serial numbers. The next list ([`Self::revocation_list`]) names them.
    ///
    /// # Errors
    /// The state could not be saved; then nothing is revoked.
    pub fn revoke(&self, names: &IdentityNames) -> Result<Vec<String>, CertsError> {
        let now = self.clock.now();
        let mut inner = self.lock();
        let mut state = inner.state.clone();
        let serials = state.revoke(names, now);
        self.save(&state)?;
        inner.state = state;
        Ok(serials)
    }

    /// Signs a current revocation list, saves it as `crl.pem` and returns its PEM text.
    ///
    /// # Errors
    /// Signing or saving failed.
    pub fn revocation_list(&self) -> Result<String, CertsError> {
        let now = self.clock.now();
        let mut inner = self.lock();
        let mut state = inner.state.clone();
        state.crl_number += 1;
        let params = rcgen::CertificateRevocationListParams {
            this_update: (now - self.config.backdate).into(),
            next_update: (now + self.config.crl_lifetime).into(),
            crl_number: SerialNumber::from_slice(&positive(&state.crl_number.to_be_bytes())),
            issuing_distribution_point: None,
            revoked_certs: state.revoked_params()?,
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        let list = params
            .signed_by(&inner.material.intermediate_issuer()?)
            .map_err(|error| CertsError::crypto("revocation list signing", error))?;
        let text = pem::encode("X509 CRL", list.der());
        self.save(&state)?;
        inner.state = state;
        self.storage.replace(CRL_FILE, text.as_bytes(), Access::Everyone)?;
        inner.list = Some(list.der().clone());
        Ok(text)
    }

    /// Unexpired certificates issued so far.
    #[must_use]
    pub fn issued_count(&self) -> usize {
        self.lock().state.issued.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while the CA is locked")
    }

    fn save(&self, state: &CaState) -> Result<(), CertsError> {
        self.storage.replace(STATE_FILE, state.to_toml()?.as_bytes(), Access::Owner)
    }

    /// Certifies the intermediate again when its last third has begun.
    fn refresh_intermediate(&self, inner: &mut Inner, now: SystemTime) -> Result<(), CertsError> {
        let summary = CertificateSummary::parse(&inner.material.intermediate)?;
        if now + self.config.intermediate_lifetime / 3 < summary.not_after {
            return Ok(());
        }
        if CertificateSummary::parse(&inner.material.root)?.not_after <= summary.not_after {
            tracing::warn!("the CA's root ends with its intermediate: create a new CA");
            return Ok(());
        }
        let material = &inner.material;
        let renewed = sign_intermediate(
            &self.config,
            &self.policy,
            now,
            &material.root,
            &material.root_key,
            &material.intermediate_key,
        )?;
        let text = material.to_pem_with(&renewed);
        self.storage.replace(CA_FILE, text.as_bytes(), Access::Owner)?;
        inner.material.intermediate = renewed;
        tracing::info!("the CA's intermediate certificate was renewed");
        Ok(())
    }

    fn sign_leaf(
        &self,
        material: &Material,
        names: &IdentityNames,
        key: &impl PublicKeyData,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, CertsError> {
        let mut params = profile(now, &self.config, self.config.leaf_lifetime)?;
        // A leaf that outlives its issuer would be a promise that the chain cannot keep.
        let issuer_end = CertificateSummary::parse(&material.intermediate)?.not_after;
        params.not_after = (now + self.config.leaf_lifetime).min(issuer_end).into();
        params.distinguished_name = authority::subject();
        params.subject_alt_names = authority::alternative_names(names)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params
            .signed_by(key, &material.intermediate_issuer()?)
            .map_err(|error| CertsError::crypto("leaf signing", error))?;
        Ok(leaf.der().clone())
    }
}

impl CertificateAuthority for LocalCa {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        request.names.validate().map_err(CaError::invalid)?;
        self.policy.check(request.names)?;
        let key = check_request(request)?;
        let now = self.clock.now();
        let mut inner = self.lock();
        self.refresh_intermediate(&mut inner, now)
            .map_err(|error| CaError::Storage(Box::new(error)))?;
        let leaf =
            self.sign_leaf(&inner.material, request.names, &key, now).map_err(CaError::internal)?;
        let summary = CertificateSummary::parse(&leaf).map_err(CaError::internal)?;
        let mut state = inner.state.clone();
        state.record(&summary, now)?;
        self.save(&state).map_err(|error| CaError::Storage(Box::new(error)))?;
        inner.state = state;
        Ok(vec![leaf, inner.material.intermediate.clone()])
    }

    fn is_revoked(&self, serial: &str) -> bool {
        self.lock().state.is_revoked(serial)
    }

    /// As last signed, by [`Self::revocation_list`] or by polling; signed now if it never was.
    fn current_revocation_list(
        &self,
    ) -> Result<Option<CertificateRevocationListDer<'static>>, CaError> {
        if self.lock().list.is_none() {
            self.revocation_list().map_err(|error| CaError::Storage(Box::new(error)))?;
        }
        Ok(self.lock().list.clone())
    }
}

/// Signs the revocation list again in good time before its end, for as long as it is polled.
impl Periodic for LocalCa {
    fn poll(&self, now: SystemTime) -> SystemTime {
        let mut due = self.crl_due.lock().expect("no panic while locked");
        // A date that jumped back must not stretch the wait.
        let longest = now + self.config.crl_lifetime / 3;
        if let Some(due) = due.filter(|due| now < *due && *due <= longest) {
            return due;
        }
        let next = match self.revocation_list() {
            Ok(_) => longest,
            Err(error) => {
                tracing::warn!(%error, "the revocation list was not renewed");
                now + CRL_RETRY
            }
        };
        *due = Some(next);
        next
    }
}

impl Material {
    fn generate(
        config: &LocalCaConfig,
        policy: &NamePolicy,
        now: SystemTime,
    ) -> Result<Self, CertsError> {
        let root_key = PrivateKey::generate(config.key_algorithm)?;
        let mut params = profile(now, config, config.root_lifetime)?;
        params.distinguished_name = ca_subject("stoq root CA", &random_tag()?);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.use_authority_key_identifier_extension = false;
        let root = params
            .self_signed(&root_key)
            .map_err(|error| CertsError::crypto("root signing", error))?
            .der()
            .clone();
        let intermediate_key = PrivateKey::generate(config.key_algorithm)?;
        let intermediate =
            sign_intermediate(config, policy, now, &root, &root_key, &intermediate_key)?;
        Ok(Self { root, root_key, intermediate, intermediate_key })
    }

    fn intermediate_issuer(&self) -> Result<Issuer<'static, &PrivateKey>, CertsError> {
        Issuer::from_ca_cert_der(&self.intermediate, &self.intermediate_key)
            .map_err(|error| CertsError::crypto("reading the intermediate", error))
    }

    fn to_pem(&self) -> String {
        self.to_pem_with(&self.intermediate)
    }

    fn to_pem_with(&self, intermediate: &CertificateDer<'_>) -> String {
        [
            pem::encode("CERTIFICATE", &self.root),
            pem::encode("PRIVATE KEY", self.root_key.pkcs8()),
            pem::encode("CERTIFICATE", intermediate),
            pem::encode("PRIVATE KEY", self.intermediate_key.pkcs8()),
        ]
        .concat()
    }

    fn parse(bytes: &[u8]) -> Result<Self, CertsError> {
        let mut certificates = pem::certificates(bytes, CA_FILE)?.into_iter();
        let mut keys = pem::private_keys(bytes, CA_FILE)?.into_iter();
        let mut next = || -> Result<(CertificateDer<'static>, PrivateKey), CertsError> {
            let (Some(certificate), Some(key)) = (certificates.next(), keys.next()) else {
                return Err(CertsError::Parse {
                    fault: CertificateFault::Malformed,
                    what: CA_FILE.to_owned(),
                    reason: "must hold two certificates, each followed by its key".to_owned(),
                });
            };
            let key = PrivateKey::parse(&key)?;
            check_pair(&certificate, &key)?;
            Ok((certificate, key))
        };
        let (root, root_key) = next()?;
        let (intermediate, intermediate_key) = next()?;
        Ok(Self { root, root_key, intermediate, intermediate_key })
    }
}

fn check_pair(certificate: &CertificateDer<'_>, key: &PrivateKey) -> Result<(), CertsError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|error| CertsError::crypto("reading a CA certificate", error))?;
    if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
        return Err(CertsError::certificate(
            CertificateFault::WrongKey,
            format!("{CA_FILE}: a key does not belong to the certificate before it"),
        ));
    }
    Ok(())
}

fn sign_intermediate(
    config: &LocalCaConfig,
    policy: &NamePolicy,
    now: SystemTime,
    root: &CertificateDer<'_>,
    root_key: &PrivateKey,
    key: &PrivateKey,
) -> Result<CertificateDer<'static>, CertsError> {
    let root_end = CertificateSummary::parse(root)?.not_after;
    let mut params = profile(now, config, config.intermediate_lifetime)?;
    params.not_after = (now + config.intermediate_lifetime).min(root_end).into();
    // The tag comes from the key, so that the name survives a renewal and differs between CAs.
    let tag = &super::names::hex(&params.key_identifier(key))[..8];
    params.distinguished_name = ca_subject("stoq intermediate CA", tag);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.name_constraints = policy.to_extension();
    let issuer = Issuer::from_ca_cert_der(root, root_key)
        .map_err(|error| CertsError::crypto("reading the root", error))?;
    let certificate = params
        .signed_by(key, &issuer)
        .map_err(|error| CertsError::crypto("intermediate signing", error))?;
    Ok(certificate.der().clone())
}

/// What root, intermediate and leaf have in common.
fn profile(
    now: SystemTime,
    config: &LocalCaConfig,
    lifetime: Duration,
) -> Result<CertificateParams, CertsError> {
    let mut serial = [0; SERIAL_SIZE_BYTES];
    fill_random(&mut serial)?;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&positive(&serial)));
    params.not_before = (now - config.backdate.min(lifetime / 10)).into();
    params.not_after = (now + lifetime).into();
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Clears the sign bit and a leading zero: DER integers are signed and minimal.
fn positive(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[0] &= 0x7f;
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count().min(bytes.len() - 1);
    bytes.drain(..zeros);
    bytes
}

fn fill_random(bytes: &mut [u8]) -> Result<(), CertsError> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| CertsError::crypto("random bytes", "no entropy"))
}

fn random_tag() -> Result<String, CertsError> {
    let mut tag = [0; 4];
    fill_random(&mut tag)?;
    Ok(tag.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn ca_subject(role: &str, tag: &str) -> rcgen::DistinguishedName {
    let mut subject = rcgen::DistinguishedName::new();
    subject.push(rcgen::DnType::OrganizationName, "STOQ");
    subject.push(rcgen::DnType::CommonName, format!("{role} {tag}"));
    subject
}

#[cfg(test)]
#[path = "local_ca_tests.rs"]
mod tests;
