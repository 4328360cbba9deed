use std::time::{Duration, SystemTime};

use rustls::NamedGroup;

use super::*;
use crate::certs::fault::CertificateFault;
use crate::certs::session::{HandshakeInfo, PeerIdentity};
use crate::certs::test_handshake::handshake;
use crate::certs::wall_clock::SimWallClock;

const NAME: &str = "node.example.net";

fn names() -> IdentityNames {
    IdentityNames::new().with_dns(NAME).unwrap().with_ipv6("2001:db8::1".parse().unwrap())
}

fn clock() -> Arc<SimWallClock> {
    Arc::new(SimWallClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)))
}

fn server(clock: &Arc<SimWallClock>) -> ServerTls {
    ServerTls::builder()
        .identity_self_signed(names())
        .alpn(["stoq-test"])
        .clock(clock.clone())
        .build()
        .unwrap()
}

fn client(clock: &Arc<SimWallClock>, server: &ServerTls) -> ClientTlsBuilder {
    ClientTls::builder()
        .roots(server.identity().roots().to_vec())
        .alpn(["stoq-test"])
        .clock(clock.clone())
}

#[test]
fn a_handshake_by_dns_name_and_by_address() {
    let clock = clock();
    let server = server(&clock);
    let client = client(&clock, &server).build().unwrap();
    for name in [NAME, "2001:db8::1"] {
        let done = handshake(&client, &server, name).unwrap();
        for session in [&done.client, &done.server] {
            let info = HandshakeInfo::of_session(&**session).unwrap();
            assert_eq!(info.group, Some(NamedGroup::X25519MLKEM768));
            assert!(info.is_post_quantum());
            assert_eq!(info.alpn.as_deref(), Some(&b"stoq-test"[..]));
        }
        let peer = PeerIdentity::of_session(&*done.client).unwrap().unwrap();
        assert_eq!(peer.certificate.names, names());
        assert!(PeerIdentity::of_session(&*done.server).unwrap().is_none());
    }
    assert_eq!(client.faults().total() + server.faults().total(), 0);
}

#[test]
fn wrong_names_and_unknown_roots_are_refused() {
    let clock = clock();
    let server = server(&clock);
    let good = client(&clock, &server).build().unwrap();
    let failed = handshake(&good, &server, "other.example.net").err().unwrap();
    assert!(failed.error().reason.starts_with("wrong_name"), "{failed:?}");
    assert_eq!(good.faults().count(CertificateFault::WrongName), 1);
    handshake(&good, &server, "2001:db8::2").err().unwrap();
    assert_eq!(good.faults().count(CertificateFault::WrongName), 2);
}

#[test]
fn misconfigurations_are_named() {
    let error = ServerTls::builder().alpn(["x"]).build().unwrap_err();
    assert!(error.to_string().contains("identity"), "{error}");
    let error = ServerTls::builder().identity_self_signed(names()).build().unwrap_err();
    assert!(error.to_string().contains("application protocol"), "{error}");
    let error = ClientTls::builder().alpn(["x"]).build().unwrap_err();
    assert!(error.to_string().contains("roots"), "{error}");
}
