use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;

use super::*;
use crate::certs::authority::key_and_request;
use crate::certs::keys::KeyAlgorithm;
use crate::certs::local_ca::{LocalCa, LocalCaConfig};
use crate::certs::maintenance::Periodic;
use crate::certs::names::CertificateSummary;
use crate::certs::rotation::RotatingIdentity;
use crate::certs::wall_clock::SimWallClock;

const HOUR: Duration = Duration::from_secs(3600);

/// A local CA that can be away.
struct Flaky {
    ca: LocalCa,
    away: AtomicBool,
}

impl CertificateAuthority for Flaky {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        if self.away.load(Ordering::SeqCst) {
            return Err(CaError::Unreachable { reason: "no route".to_owned() });
        }
        self.ca.issue(request)
    }
}

struct Service {
    clock: Arc<SimWallClock>,
    ca: Arc<Flaky>,
    server: Arc<TrustchainServer>,
}

impl Service {
    fn new() -> Self {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Arc::new(SimWallClock::new(start));
        let ca = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap();
        let ca = Arc::new(Flaky { ca, away: AtomicBool::new(false) });
        let server = Arc::new(TrustchainServer::new(ca.clone(), clock.clone()));
        Self { clock, ca, server }
    }

    fn token(&self) -> Vec<u8> {
        let text = self.server.create_token(names(), HOUR).unwrap();
        crate::certs::names::unhex(&text).unwrap()
    }
}

fn names() -> IdentityNames {
    IdentityNames::new().with_dns("node.example.net").unwrap().with_client_id("probe-7").unwrap()
}

fn csr() -> Vec<u8> {
    key_and_request(&names(), KeyAlgorithm::default()).unwrap().1.to_vec()
}

fn peer(answer: &Message) -> PeerIdentity {
    let Message::Issued { chain } = answer else { panic!("{answer:?}") };
    let chain: Vec<_> = chain.iter().cloned().map(CertificateDer::from).collect();
    PeerIdentity { certificate: CertificateSummary::parse(&chain[0]).unwrap(), chain }
}

fn code(answer: &Message) -> RefusalCode {
    let Message::Refused { code, .. } = answer else { panic!("{answer:?}") };
    *code
}

#[test]
fn a_token_certifies_its_names_once() {
    let service = Service::new();
    let token = service.token();
    let enrol = Message::Enrol { token, csr: csr() };
    let first = service.server.handle_request(&enrol, None);
    assert_eq!(peer(&first).certificate.names, names());
    let again = service.server.handle_request(&enrol, None);
    assert_eq!(code(&again), RefusalCode::TokenSpent);
    let forged = Message::Enrol { token: vec![0; 32], csr: csr() };
    assert_eq!(code(&service.server.handle_request(&forged, None)), RefusalCode::TokenInvalid);
    let late = Message::Enrol { token: service.token(), csr: csr() };
    service.clock.advance(HOUR + Duration::from_secs(1));
    assert_eq!(code(&service.server.handle_request(&late, None)), RefusalCode::TokenInvalid);
    let faults = service.server.faults();
    assert_eq!(faults.count(CertificateFault::TokenSpent), 1);
    assert_eq!(faults.count(CertificateFault::TokenInvalid), 2);
    let counters = service.server.counters();
    assert_eq!((counters.enrolled, counters.renewed, counters.refused), (1, 0, 3));
}

#[test]
fn a_token_buys_no_other_name_and_survives_only_an_absent_ca() {
    let service = Service::new();
    let token = service.token();
    let enrol = |csr| Message::Enrol { token: token.clone(), csr };
    service.ca.away.store(true, Ordering::SeqCst);
    let answer = service.server.handle_request(&enrol(csr()), None);
    assert_eq!(code(&answer), RefusalCode::Unavailable);
    service.ca.away.store(false, Ordering::SeqCst);
    let greedy = names().with_dns("bank.example").unwrap();
    let greedy = key_and_request(&greedy, KeyAlgorithm::default()).unwrap().1.to_vec();
    let answer = service.server.handle_request(&enrol(greedy), None);
    assert_eq!(code(&answer), RefusalCode::Refused);
    // A refusal spends it.
    let answer = service.server.handle_request(&enrol(csr()), None);
    assert_eq!(code(&answer), RefusalCode::TokenSpent);
}

#[test]
fn a_renewal_needs_the_current_certificate() {
    let service = Service::new();
    let enrol = Message::Enrol { token: service.token(), csr: csr() };
    let current = peer(&service.server.handle_request(&enrol, None));
    let renew = Message::Renew { csr: csr() };
    let next = peer(&service.server.handle_request(&renew, Some(&current)));
    assert_eq!(next.certificate.names, names());
    assert_ne!(next.certificate.serial, current.certificate.serial);
    assert_eq!(code(&service.server.handle_request(&renew, None)), RefusalCode::Unauthorized);
    service.clock.advance(25 * HOUR);
    let answer = service.server.handle_request(&renew, Some(&current));
    assert_eq!(code(&answer), RefusalCode::Unauthorized);
    let broken = Message::Renew { csr: vec![1, 2, 3] };
    service.clock.advance(Duration::ZERO);
    assert_eq!(
        code(&service.server.handle_request(&broken, Some(&peer_now(&service)))),
        RefusalCode::Invalid
    );
    assert_eq!(
        code(&service.server.handle_request(&Message::Issued { chain: Vec::new() }, None)),
        RefusalCode::Invalid
    );
}

fn peer_now(service: &Service) -> PeerIdentity {
    let enrol = Message::Enrol { token: service.token(), csr: csr() };
    peer(&service.server.handle_request(&enrol, None))
}

/// Carries frames in memory, as the identity that was issued last.
struct Wire {
    server: Arc<TrustchainServer>,
    peer: Mutex<Option<PeerIdentity>>,
}

impl TrustchainTransport for Wire {
    fn exchange(&self, request: &[u8]) -> Result<Vec<u8>, CaError> {
        let request = FrameReader::default().handle_bytes(request).unwrap().unwrap();
        let mut current = self.peer.lock().unwrap();
        let answer = self.server.handle_request(&request, current.as_ref());
        if matches!(answer, Message::Issued { .. }) {
            *current = Some(peer(&answer));
        }
        Ok(answer.encode().unwrap())
    }
}

#[test]
fn a_node_enrols_once_and_renews_for_a_month() {
    let service = Service::new();
    let token = service.server.create_token(names(), HOUR).unwrap();
    let wire = Wire { server: service.server.clone(), peer: Mutex::new(None) };
    let authority = TrustchainAuthority::new(Box::new(wire), Some(&token)).unwrap();
    let identity = RotatingIdentity::with_authority(Arc::new(authority), names())
        .roots([service.ca.ca.root()])
        .clock(service.clock.clone())
        .start()
        .unwrap();
    let end = service.clock.now() + 30 * 24 * HOUR;
    while service.clock.now() < end {
        service.clock.set(identity.poll(service.clock.now()) + Duration::from_secs(1));
    }
    let status = identity.status();
    assert!(status.renewals >= 45 && status.failures == 0, "{status:?}");
    assert!(
        TrustchainAuthority::new(
            Box::new(Wire { server: service.server.clone(), peer: Mutex::new(None) }),
            Some("no hex")
        )
        .is_err()
    );
}

#[test]
fn a_restarted_node_with_a_spent_token_renews() {
    let service = Service::new();
    let token = service.server.create_token(names(), HOUR).unwrap();
    let spent = crate::certs::names::unhex(&token).unwrap();
    let enrol = Message::Enrol { token: spent, csr: csr() };
    let current = peer(&service.server.handle_request(&enrol, None));
    let wire = Wire { server: service.server.clone(), peer: Mutex::new(Some(current)) };
    let authority = TrustchainAuthority::new(Box::new(wire), Some(&token)).unwrap();
    let names = names();
    let (_key, csr) = key_and_request(&names, KeyAlgorithm::default()).unwrap();
    let request = CertificateRequest { csr: &csr, names: &names };
    let error = authority.issue(&request).unwrap_err();
    assert!(matches!(error, CaError::TokenSpent), "{error}");
    authority.issue(&request).unwrap();
}

#[test]
fn the_revocation_list_is_for_everybody() {
    let service = Service::new();
    // This CA keeps none.
    let answer = service.server.handle_request(&Message::List, None);
    assert_eq!(answer, Message::Revoked { list: Vec::new() });
    let clock = service.clock.clone();
    let ca = Arc::new(LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap());
    let server = TrustchainServer::new(ca.clone(), clock);
    let list = |expected: usize| {
        let answer = server.handle_request(&Message::List, None);
        let Message::Revoked { list } = answer else { panic!("{answer:?}") };
        let (_, parsed) = x509_parser::parse_x509_crl(&list).unwrap();
        assert_eq!(parsed.iter_revoked_certificates().count(), expected);
        list.clone()
    };
    let first = list(0);
    assert_eq!(list(0), first, "signed once, not for everybody who asks");
    let csr = csr().into();
    ca.issue(&CertificateRequest { csr: &csr, names: &names() }).unwrap();
    assert_eq!(ca.revoke(&names()).unwrap().len(), 1);
    assert_eq!(list(0), first);
    ca.revocation_list().unwrap();
    list(1);
}

/// Its connection was authenticated before the revocation: the handshake's check comes too late for it.
#[test]
fn a_revoked_node_whose_connection_still_stands_gets_no_other_certificate() {
    let clock = Service::new().clock;
    let ca = Arc::new(LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap());
    let keys = SharedKeys::from_secret(&[9; 64]).unwrap();
    let server = TrustchainServer::new(ca.clone(), clock).with_fleet_keys(keys);
    let token = server.create_token(names(), HOUR).unwrap();
    let token = crate::certs::names::unhex(&token).unwrap();
    let node = peer(&server.handle_request(&Message::Enrol { token, csr: csr() }, None));
    let requests = [Message::Renew { csr: csr() }, Message::Keys];
    for request in &requests {
        let answer = server.handle_request(request, Some(&node));
        assert!(!matches!(answer, Message::Refused { .. }), "{answer:?}");
    }
    ca.revoke(&names()).unwrap();
    let issued = ca.issued_count();
    for (index, request) in requests.iter().enumerate() {
        let answer = server.handle_request(request, Some(&node));
        assert_eq!(code(&answer), RefusalCode::Unauthorized);
        let Message::Refused { reason, .. } = answer else { unreachable!() };
        assert!(reason.contains("revoked"), "{reason}");
        assert_eq!(server.faults().count(CertificateFault::Revoked), index as u64 + 1);
    }
    assert_eq!(ca.issued_count(), issued, "a revoked node would outlive its revocation");
}

#[test]
fn machines_with_the_same_names_share_a_secret() {
    let service = Service::new();
    let clock = service.clock.clone();
    let keys = SharedKeys::from_secret(&[9; 64]).unwrap();
    let server = TrustchainServer::new(service.ca.clone(), clock).with_fleet_keys(keys);
    let enrolled = |name: &str| {
        let names = IdentityNames::new().with_dns(name).unwrap();
        let token = server.create_token(names.clone(), HOUR).unwrap();
        let token = crate::certs::names::unhex(&token).unwrap();
        let csr = key_and_request(&names, KeyAlgorithm::default()).unwrap().1.to_vec();
        peer(&server.handle_request(&Message::Enrol { token, csr }, None))
    };
    let secret = |peer: &PeerIdentity| server.handle_request(&Message::Keys, Some(peer));
    let [one, two, other] = ["a.example", "a.example", "b.example"].map(enrolled);
    assert_eq!(secret(&one), secret(&two));
    assert_ne!(secret(&one), secret(&other));
    assert!(matches!(secret(&one), Message::Secret { secret } if secret.len() == 64));
    assert_eq!(code(&server.handle_request(&Message::Keys, None)), RefusalCode::Unauthorized);
    assert_eq!(
        code(&service.server.handle_request(&Message::Keys, Some(&one))),
        RefusalCode::Refused
    );
}
