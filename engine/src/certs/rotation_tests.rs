use super::*;
use crate::certs::wall_clock::SimWallClock;

fn names() -> IdentityNames {
    IdentityNames::new().with_dns("node.example.net").unwrap()
}

#[test]
fn a_self_signed_identity_starts_and_renews() {
    let clock =
        Arc::new(SimWallClock::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)));
    let identity = RotatingIdentity::self_signed(names()).clock(clock.clone()).start().unwrap();
    let first = identity.status();
    assert!(first.serial.is_some());
    clock.set(identity.poll(clock.now()));
    identity.poll(clock.now());
    let second = identity.status();
    assert_ne!(first.serial, second.serial);
    assert_eq!(second.renewals, 1);
}
