//! A rustls client's tickets, counted: a handshake that was to be resumed says so by its count.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustls::NamedGroup;
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::pki_types::ServerName;

/// Tickets are of one server: one entry would do.
const SERVERS_MAX: usize = 8;

/// Counts the tickets that handshakes start with.
#[derive(Debug)]
pub struct CountingSessions {
    cache: ClientSessionMemoryCache,
    offered: AtomicU64,
}

impl CountingSessions {
    /// An empty store.
    #[must_use]
    pub fn shared() -> Arc<Self> {
        let cache = ClientSessionMemoryCache::new(SERVERS_MAX);
        Arc::new(Self { cache, offered: AtomicU64::new(0) })
    }

    /// Tickets that handshakes started with so far.
    #[must_use]
    pub fn offered(&self) -> u64 {
        self.offered.load(Relaxed)
    }
}

impl ClientSessionStore for CountingSessions {
    fn set_kx_hint(&self, server_name: ServerName<'static>, group: NamedGroup) {
        self.cache.set_kx_hint(server_name, group);
    }

    fn kx_hint(&self, server_name: &ServerName<'_>) -> Option<NamedGroup> {
        self.cache.kx_hint(server_name)
    }

    fn set_tls12_session(&self, server_name: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.cache.set_tls12_session(server_name, value);
    }

    fn tls12_session(&self, server_name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.cache.tls12_session(server_name)
    }

    fn remove_tls12_session(&self, server_name: &ServerName<'static>) {
        self.cache.remove_tls12_session(server_name);
    }

    fn insert_tls13_ticket(
        &self,
        server_name: ServerName<'static>,
        value: Tls13ClientSessionValue,
    ) {
        self.cache.insert_tls13_ticket(server_name, value);
    }

    fn take_tls13_ticket(
        &self,
        server_name: &ServerName<'static>,
    ) -> Option<Tls13ClientSessionValue> {
        let ticket = self.cache.take_tls13_ticket(server_name)?;
        self.offered.fetch_add(1, Relaxed);
        Some(ticket)
    }
}
