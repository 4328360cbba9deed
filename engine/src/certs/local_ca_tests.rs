use super::*;
use crate::certs::test_dir::TestDir;
use crate::certs::wall_clock::SimWallClock;

fn names() -> IdentityNames {
    IdentityNames::new().with_dns("node.example.net").unwrap()
}

fn clock() -> Arc<SimWallClock> {
    Arc::new(SimWallClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)))
}

fn issue(ca: &LocalCa, names: &IdentityNames) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let (_key, csr) = authority::key_and_request(names, KeyAlgorithm::default()).unwrap();
    ca.issue(&CertificateRequest { csr: &csr, names })
}

#[test]
fn leaves_have_the_profile() {
    let clock = clock();
    let ca = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap();
    let chain = issue(&ca, &names()).unwrap();
    assert_eq!(chain.len(), 2);
    let leaf = CertificateSummary::parse(&chain[0]).unwrap();
    assert_eq!(leaf.names, names());
    assert!(!leaf.is_ca);
    assert_eq!(leaf.not_before, clock.now() - Duration::from_secs(300));
    assert_eq!(leaf.not_after, clock.now() + DAY);
    assert!(CertificateSummary::parse(&chain[1]).unwrap().is_ca);
    let other = CertificateSummary::parse(&issue(&ca, &names()).unwrap()[0]).unwrap();
    assert_ne!(leaf.serial, other.serial);
}

#[test]
fn requests_are_checked() {
    let ca = LocalCa::in_memory(LocalCaConfig::default(), clock()).unwrap();
    let other = IdentityNames::new().with_dns("other.example.net").unwrap();
    let (_key, csr) = authority::key_and_request(&other, KeyAlgorithm::default()).unwrap();
    let error = ca.issue(&CertificateRequest { csr: &csr, names: &names() }).unwrap_err();
    assert!(matches!(error, CaError::Refused { .. }), "{error}");
    let mut broken = csr.to_vec();
    *broken.last_mut().unwrap() ^= 1;
    let broken = broken.into();
    let error = ca.issue(&CertificateRequest { csr: &broken, names: &other }).unwrap_err();
    assert!(matches!(error, CaError::InvalidRequest { .. }), "{error}");
    let truncated = csr[..40].to_vec().into();
    let error = ca.issue(&CertificateRequest { csr: &truncated, names: &other }).unwrap_err();
    assert!(matches!(error, CaError::InvalidRequest { .. }), "{error}");
    let none = IdentityNames::new();
    let error = ca.issue(&CertificateRequest { csr: &csr, names: &none }).unwrap_err();
    assert!(matches!(error, CaError::InvalidRequest { .. }), "{error}");
    assert_eq!(ca.issued_count(), 0);
}

#[test]
fn a_request_for_a_ca_is_refused() {
    let ca = LocalCa::in_memory(LocalCaConfig::default(), clock()).unwrap();
    let key = PrivateKey::generate(KeyAlgorithm::default()).unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let csr = params.serialize_request(&key).unwrap();
    let error = ca.issue(&CertificateRequest { csr: csr.der(), names: &names() }).unwrap_err();
    assert!(error.to_string().contains("CA certificate"), "{error}");
}

#[test]
fn the_policy_is_enforced_before_signing() {
    let config =
        LocalCaConfig { permitted_dns: vec!["example.org".to_owned()], ..Default::default() };
    let ca = LocalCa::in_memory(config, clock()).unwrap();
    assert!(matches!(issue(&ca, &names()), Err(CaError::Refused { .. })));
    issue(&ca, &IdentityNames::new().with_dns("a.example.org").unwrap()).unwrap();
}

#[test]
fn a_directory_keeps_the_ca() {
    let dir = TestDir::new();
    let path = dir.path().join("ca");
    let ca = LocalCa::open(&path, LocalCaConfig::default()).unwrap();
    let root = ca.root();
    issue(&ca, &names()).unwrap();
    let error = LocalCa::open(&path, LocalCaConfig::default()).unwrap_err();
    assert_eq!(error.fault(), CertificateFault::DirectoryLocked);
    drop(ca);
    let again = LocalCa::open(&path, LocalCaConfig::default()).unwrap();
    assert_eq!(again.root(), root);
    assert_eq!(again.issued_count(), 1);
    assert_eq!(
        std::fs::read_to_string(path.join(ROOT_FILE)).unwrap(),
        again.root_pem(),
        "the root is there for distribution"
    );
}

#[test]
fn exposed_or_damaged_keys_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = TestDir::new();
    let path = dir.path().join("ca");
    drop(LocalCa::open(&path, LocalCaConfig::default()).unwrap());
    let file = path.join(CA_FILE);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = LocalCa::open(&path, LocalCaConfig::default()).unwrap_err();
    assert_eq!(error.fault(), CertificateFault::KeyReadableByOthers);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();

    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 40]).unwrap();
    let error = LocalCa::open(&path, LocalCaConfig::default()).unwrap_err();
    assert_eq!(error.fault(), CertificateFault::Truncated);

    // The keys of another CA under these certificates.
    let stranger = Material::generate(
        &LocalCaConfig::default(),
        &NamePolicy::new(&[], &[]).unwrap(),
        SystemTime::now(),
    )
    .unwrap();
    let mut mixed = Material::parse(&whole).unwrap();
    mixed.root_key = stranger.root_key;
    std::fs::write(&file, mixed.to_pem()).unwrap();
    let error = LocalCa::open(&path, LocalCaConfig::default()).unwrap_err();
    assert_eq!(error.fault(), CertificateFault::WrongKey);
}

#[test]
fn the_intermediate_is_renewed_with_its_name_and_key() {
    let clock = clock();
    let ca = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap();
    let first = issue(&ca, &names()).unwrap();
    clock.advance(200 * DAY);
    assert_eq!(issue(&ca, &names()).unwrap()[1], first[1]);
    clock.advance(100 * DAY);
    let renewed = issue(&ca, &names()).unwrap();
    assert_ne!(renewed[1], first[1]);
    let (_, before) = x509_parser::parse_x509_certificate(&first[1]).unwrap();
    let (_, after) = x509_parser::parse_x509_certificate(&renewed[1]).unwrap();
    assert_eq!(before.subject().as_raw(), after.subject().as_raw());
    assert_eq!(before.public_key().raw, after.public_key().raw);
    assert!(after.validity().not_after > before.validity().not_after);
}

#[test]
fn an_expired_root_is_refused_at_start() {
    let clock = clock();
    let dir = TestDir::new();
    drop(LocalCa::open_at(dir.path(), LocalCaConfig::default(), clock.clone()).unwrap());
    clock.advance(3651 * DAY);
    let error = LocalCa::open_at(dir.path(), LocalCaConfig::default(), clock).unwrap_err();
    assert_eq!(error.fault(), CertificateFault::Expired);
}

#[test]
fn lifetimes_must_nest() {
    for config in [
        LocalCaConfig { leaf_lifetime: Duration::from_secs(1), ..Default::default() },
        LocalCaConfig { intermediate_lifetime: 2 * DAY, ..Default::default() },
        LocalCaConfig { root_lifetime: 400 * DAY, ..Default::default() },
    ] {
        let error = LocalCa::in_memory(config, clock()).unwrap_err();
        assert!(matches!(error, CertsError::Configuration(_)));
    }
}

#[test]
fn positive_integers_are_minimal() {
    assert_eq!(positive(&[0x80, 1]), [1]);
    assert_eq!(positive(&[0, 0]), [0]);
    assert_eq!(positive(&[0xff, 0]), [0x7f, 0]);
}

/// A list of all that a CA remembers fits into one answer of the certificate service.
#[test]
fn the_longest_revocation_list_can_be_sent() {
    use crate::certs::ca_state::ISSUED_MAX;
    use crate::certs::trustchain::Message;
    let clock = clock();
    let ca = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap();
    {
        let mut inner = ca.lock();
        for index in 0..ISSUED_MAX {
            let summary = CertificateSummary {
                serial: format!("7f{index:030x}"),
                not_before: clock.now(),
                not_after: clock.now() + DAY,
                names: names(),
                is_ca: false,
            };
            inner.state.record(&summary, clock.now()).unwrap();
        }
    }
    assert_eq!(ca.revoke(&names()).unwrap().len(), ISSUED_MAX);
    ca.revocation_list().unwrap();
    let list = ca.current_revocation_list().unwrap().unwrap().as_ref().to_vec();
    assert!(list.len() > 30 * ISSUED_MAX);
    Message::Revoked { list }.encode().unwrap();
    assert!(matches!(issue(&ca, &names()), Err(CaError::Refused { .. })), "as many as it tracks");
}

#[test]
fn a_polled_ca_keeps_its_revocation_list_current() {
    let dir = TestDir::new();
    let clock = clock();
    let ca = LocalCa::open_at(dir.path(), LocalCaConfig::default(), clock.clone()).unwrap();
    let path = dir.path().join(CRL_FILE);
    let due = ca.poll(clock.now());
    let first = std::fs::read(&path).unwrap();
    assert_eq!(ca.poll(clock.now() + DAY), due, "polled early: nothing happens");
    assert_eq!(std::fs::read(&path).unwrap(), first);
    clock.set(due);
    assert!(ca.poll(due) > due);
    assert_ne!(std::fs::read(&path).unwrap(), first);
    // The date jumps back a year: the list is made for the new date.
    clock.set(due - 365 * DAY);
    assert!(ca.poll(clock.now()) < due);
}
