//! The cryptography that TLS may use, and which key exchange group a handshake settled on.
//!
//! quinn-proto does not pass rustls's negotiated group on, so each group is wrapped: completing an
//! exchange notes the group in a thread-local cell, which [`session`](super::session) reads right
//! after the call into TLS that caused it, on the same thread. Cost: one thread-local store and
//! one boxed wrapper per handshake; nothing per packet.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::{
    ActiveKeyExchange, CompletedKeyExchange, CryptoProvider, SharedSecret, SupportedKxGroup,
};
use rustls::ffdhe_groups::FfdheGroup;
use rustls::{Error, NamedGroup, ProtocolVersion, SupportedCipherSuite};

use super::fault::CertificateFault;
use crate::proto::crypto::CryptoProvider as PacketCrypto;

thread_local! {
    static GROUP: Cell<Option<NamedGroup>> = const { Cell::new(None) };
    static FAULT: RefCell<Option<(CertificateFault, String)>> = const { RefCell::new(None) };
}

/// The group that the last key exchange on this thread completed with; forgets it.
pub(super) fn take_group() -> Option<NamedGroup> {
    GROUP.take()
}

/// Leaves a verification fault for the TLS session that is running on this thread.
pub(super) fn note_fault(fault: CertificateFault, detail: String) {
    FAULT.set(Some((fault, detail)));
}

/// The fault that the running TLS session met, if any; forgets it.
pub(super) fn take_fault() -> Option<(CertificateFault, String)> {
    FAULT.take()
}

/// aws-lc-rs with X25519MLKEM768 first, alone if `require_post_quantum`.
pub(super) fn crypto_provider(
    require_post_quantum: bool,
    cipher_suites: Vec<SupportedCipherSuite>,
) -> Arc<CryptoProvider> {
    static X25519MLKEM768: ObservedGroup = ObservedGroup(kx_group::X25519MLKEM768);
    static X25519: ObservedGroup = ObservedGroup(kx_group::X25519);
    static SECP256R1: ObservedGroup = ObservedGroup(kx_group::SECP256R1);
    let kx_groups: Vec<&'static dyn SupportedKxGroup> = if require_post_quantum {
        vec![&X25519MLKEM768]
    } else {
        vec![&X25519MLKEM768, &X25519, &SECP256R1]
    };
    Arc::new(CryptoProvider { kx_groups, cipher_suites, ..aws_lc_rs::default_provider() })
}

/// The provider for checks outside handshakes.
pub(super) fn verification_provider() -> Arc<CryptoProvider> {
    crypto_provider(false, PacketCrypto::AwsLcRs.cipher_suites())
}

/// A key exchange group that notes its use.
#[derive(Debug)]
struct ObservedGroup(&'static dyn SupportedKxGroup);

impl SupportedKxGroup for ObservedGroup {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        Ok(Box::new(ObservedExchange(self.0.start()?)))
    }

    fn start_and_complete(&self, peer_pub_key: &[u8]) -> Result<CompletedKeyExchange, Error> {
        let completed = self.0.start_and_complete(peer_pub_key)?;
        GROUP.set(Some(completed.group));
        Ok(completed)
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        self.0.ffdhe_group()
    }

    fn name(&self) -> NamedGroup {
        self.0.name()
    }

    fn fips(&self) -> bool {
        self.0.fips()
    }

    fn usable_for_version(&self, version: ProtocolVersion) -> bool {
        self.0.usable_for_version(version)
    }
}

/// The client's half of an exchange.
struct ObservedExchange(Box<dyn ActiveKeyExchange>);

impl ActiveKeyExchange for ObservedExchange {
    fn complete(self: Box<Self>, peer_pub_key: &[u8]) -> Result<SharedSecret, Error> {
        let group = self.0.group();
        let secret = self.0.complete(peer_pub_key)?;
        GROUP.set(Some(group));
        Ok(secret)
    }

    fn hybrid_component(&self) -> Option<(NamedGroup, &[u8])> {
        self.0.hybrid_component()
    }

    fn complete_hybrid_component(
        self: Box<Self>,
        peer_pub_key: &[u8],
    ) -> Result<SharedSecret, Error> {
        let component = self.0.hybrid_component().map(|(group, _)| group);
        let secret = self.0.complete_hybrid_component(peer_pub_key)?;
        GROUP.set(component);
        Ok(secret)
    }

    fn pub_key(&self) -> &[u8] {
        self.0.pub_key()
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        self.0.ffdhe_group()
    }

    fn group(&self) -> NamedGroup {
        self.0.group()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_notes_its_group_once() {
        let provider = crypto_provider(false, PacketCrypto::AwsLcRs.cipher_suites());
        for group in &provider.kx_groups {
            assert_eq!(take_group(), None);
            let client = group.start().unwrap();
            let server = group.start_and_complete(client.pub_key()).unwrap();
            assert_eq!(take_group(), Some(group.name()));
            assert_eq!(take_group(), None);
            let secret = client.complete(&server.pub_key).unwrap();
            assert_eq!(secret.secret_bytes(), server.secret.secret_bytes());
            assert_eq!(take_group(), Some(group.name()));
        }
    }

    #[test]
    fn the_classical_half_of_a_hybrid_is_named() {
        let provider = crypto_provider(false, PacketCrypto::AwsLcRs.cipher_suites());
        let hybrid = provider.kx_groups[0].start().unwrap();
        let (group, share) = hybrid.hybrid_component().unwrap();
        assert_eq!(group, NamedGroup::X25519);
        let server = provider.kx_groups[1].start_and_complete(share).unwrap();
        take_group();
        hybrid.complete_hybrid_component(&server.pub_key).unwrap();
        assert_eq!(take_group(), Some(NamedGroup::X25519));
    }

    #[test]
    fn a_failed_exchange_notes_nothing() {
        let provider = crypto_provider(true, PacketCrypto::AwsLcRs.cipher_suites());
        assert_eq!(provider.kx_groups.len(), 1);
        assert!(provider.kx_groups[0].start_and_complete(&[0; 3]).is_err());
        assert_eq!(take_group(), None);
    }
}
