//! Sessions remembered for resumption, forgotten when the trust changes.
//!
//! A resumed handshake verifies no certificate. So each store carries the fingerprint of the
//! trust it was filled under, and starts empty under another: a revoked peer cannot resume. A client
//! resumes nothing beyond the end of the certificate that it verified.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use rustls::NamedGroup;
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::server::{ServerSessionMemoryCache, StoresServerSessions};
use rustls_pki_types::ServerName;

use super::trust::TrustStore;
use super::wall_clock::WallClock;

/// Servers that a client remembers sessions of.
const CLIENT_SERVERS_MAX: usize = 1024;
/// Sessions that a server with 0-RTT remembers.
const SERVER_SESSIONS_MAX: usize = 16_384;

/// The trust stores that a configuration verifies against.
#[derive(Debug, Clone, Default)]
pub(super) struct TrustSet(pub(super) Vec<Arc<TrustStore>>);

impl TrustSet {
    fn fingerprint(&self) -> Vec<[u8; 32]> {
        self.0.iter().map(|trust| trust.loaded().fingerprint).collect()
    }
}

/// A cache and the trust it was filled under.
struct Bound<T: ?Sized> {
    fingerprint: Vec<[u8; 32]>,
    cache: Arc<T>,
}

/// When the certificates end that a client's verifier accepted, by server.
#[derive(Debug, Default)]
pub(super) struct VerifiedEnds(Mutex<HashMap<ServerName<'static>, SystemTime>>);

impl VerifiedEnds {
    pub(super) fn record(&self, server: ServerName<'static>, not_after: SystemTime) {
        let mut ends = self.0.lock().expect("no panic while locked");
        if ends.len() >= CLIENT_SERVERS_MAX && !ends.contains_key(&server) {
            // Forgotten servers are verified again: a full handshake, no harm.
            ends.clear();
        }
        ends.insert(server, not_after);
    }

    fn is_current(&self, server: &ServerName<'static>, now: SystemTime) -> bool {
        let ends = self.0.lock().expect("no panic while locked");
        ends.get(server).is_some_and(|not_after| now <= *not_after)
    }
}

/// A client's tickets, each used once, and not beyond the end of the server's certificate.
pub(super) struct ClientSessions {
    trust: TrustSet,
    ends: Option<Arc<VerifiedEnds>>,
    clock: Arc<dyn WallClock>,
    bound: Mutex<Bound<ClientSessionMemoryCache>>,
}

impl std::fmt::Debug for ClientSessions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ClientSessions").finish_non_exhaustive()
    }
}

impl ClientSessions {
    /// Sessions under `trust`; without `ends` nobody verified, and the ends do not matter.
    pub(super) fn new(
        trust: TrustSet,
        ends: Option<Arc<VerifiedEnds>>,
        clock: Arc<dyn WallClock>,
    ) -> Self {
        let bound = Bound {
            fingerprint: trust.fingerprint(),
            cache: Arc::new(ClientSessionMemoryCache::new(CLIENT_SERVERS_MAX)),
        };
        Self { trust, ends, clock, bound: Mutex::new(bound) }
    }

    fn cache(&self) -> Arc<ClientSessionMemoryCache> {
        let fingerprint = self.trust.fingerprint();
        let mut bound = self.bound.lock().expect("no panic while locked");
        if bound.fingerprint != fingerprint {
            bound.fingerprint = fingerprint;
            bound.cache = Arc::new(ClientSessionMemoryCache::new(CLIENT_SERVERS_MAX));
        }
        Arc::clone(&bound.cache)
    }
}

impl ClientSessionStore for ClientSessions {
    fn set_kx_hint(&self, server_name: ServerName<'static>, group: NamedGroup) {
        self.cache().set_kx_hint(server_name, group);
    }

    fn kx_hint(&self, server_name: &ServerName<'_>) -> Option<NamedGroup> {
        self.cache().kx_hint(server_name)
    }

    fn set_tls12_session(&self, server_name: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.cache().set_tls12_session(server_name, value);
    }

    fn tls12_session(&self, server_name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.cache().tls12_session(server_name)
    }

    fn remove_tls12_session(&self, server_name: &ServerName<'static>) {
        self.cache().remove_tls12_session(server_name);
    }

    fn insert_tls13_ticket(
        &self,
        server_name: ServerName<'static>,
        value: Tls13ClientSessionValue,
    ) {
        self.cache().insert_tls13_ticket(server_name, value);
    }

    fn take_tls13_ticket(
        &self,
        server_name: &ServerName<'static>,
    ) -> Option<Tls13ClientSessionValue> {
        if let Some(ends) = &self.ends
            && !ends.is_current(server_name, self.clock.now())
        {
            return None;
        }
        self.cache().take_tls13_ticket(server_name)
    }
}

/// A server's sessions when 0-RTT is on: taken once, so that early data is not replayed within
/// this process (RFC 8446, section 8.1). Shared by all shards.
pub(super) struct ServerSessions {
    trust: TrustSet,
    bound: Mutex<Bound<dyn StoresServerSessions>>,
}

impl std::fmt::Debug for ServerSessions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ServerSessions").finish_non_exhaustive()
    }
}

impl ServerSessions {
    pub(super) fn new(trust: TrustSet) -> Self {
        let bound = Bound {
            fingerprint: trust.fingerprint(),
            cache: ServerSessionMemoryCache::new(SERVER_SESSIONS_MAX) as _,
        };
        Self { trust, bound: Mutex::new(bound) }
    }

    fn cache(&self) -> Arc<dyn StoresServerSessions> {
        let fingerprint = self.trust.fingerprint();
        let mut bound = self.bound.lock().expect("no panic while locked");
        if bound.fingerprint != fingerprint {
            bound.fingerprint = fingerprint;
            bound.cache = ServerSessionMemoryCache::new(SERVER_SESSIONS_MAX);
        }
        Arc::clone(&bound.cache)
    }
}

impl StoresServerSessions for ServerSessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.cache().put(key, value)
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.cache().get(key)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.cache().take(key)
    }

    fn can_cache(&self) -> bool {
        self.cache().can_cache()
    }
}
