//! Limits of the connection pool and of automatic reconnect: the `[pool]` table.

use serde::Deserialize;

use super::{ConfigError, check};

/// How a shard's connection pool behaves. `connection_pool_size` bounds what it keeps idle.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// Pooled connections to one peer at most, over all shards for async callers, per shard for
    /// code on it. Callers share connections; a further one is made while all are in use. 1 to 1024.
    pub connections_per_peer_max: usize,
    /// Peers that one shard's pool remembers (their circuit, their warm-up). 1 to 2^24.
    pub peers_max: usize,
    /// Callers that wait for a handshake, per shard. 1 to 2^24.
    pub waiters_max: usize,
    /// An unused connection is closed after this, ms; 0: never. At most 86400000.
    pub idle_timeout_ms: u64,
    /// First pause after a failed attempt, ms; doubled with each failure. 1 to 60000.
    pub reconnect_base_ms: u64,
    /// Longest pause between attempts, ms. `reconnect_base_ms` to 600000.
    pub reconnect_cap_ms: u64,
    /// Failures in a row that open a peer's circuit. 1 to 1000.
    pub circuit_failures: u32,
    /// How long an open circuit refuses callers before it tries again, ms. 1 to 600000.
    pub circuit_open_ms: u64,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            connections_per_peer_max: 1,
            peers_max: 1 << 16,
            waiters_max: 1 << 16,
            // Below the default of `idle_timeout_ms`: the pool closes, and the peer is told.
            idle_timeout_ms: 25_000,
            reconnect_base_ms: 100,
            reconnect_cap_ms: 10_000,
            circuit_failures: 5,
            circuit_open_ms: 10_000,
        }
    }
}

impl PoolConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let (base, cap) = (self.reconnect_base_ms, self.reconnect_cap_ms);
        check("pool.connections_per_peer_max", self.connections_per_peer_max, 1, 1024)?;
        check("pool.peers_max", self.peers_max, 1, 1 << 24)?;
        check("pool.waiters_max", self.waiters_max, 1, 1 << 24)?;
        check("pool.idle_timeout_ms", self.idle_timeout_ms, 0, 86_400_000)?;
        check("pool.reconnect_base_ms", base, 1, 60_000)?;
        check("pool.reconnect_cap_ms", cap, base, 600_000)?;
        check("pool.circuit_failures", self.circuit_failures, 1, 1000)?;
        check("pool.circuit_open_ms", self.circuit_open_ms, 1, 600_000)
    }
}

#[cfg(test)]
mod tests {
    use crate::config::TransportConfig;

    #[test]
    fn the_cap_is_not_below_the_base() {
        let error =
            TransportConfig::from_toml("[pool]\nreconnect_base_ms = 500\nreconnect_cap_ms = 200")
                .expect_err("cap below base");
        assert!(error.contains("pool.reconnect_cap_ms") && error.contains("500 to 600000"));
        TransportConfig::from_toml("[pool]\nreconnect_base_ms = 200\nreconnect_cap_ms = 200")
            .expect("equal is fine");
    }

    #[test]
    fn unknown_keys_of_the_table_are_refused() {
        let error = TransportConfig::from_toml("[pool]\nsize = 3").expect_err("unknown");
        assert!(error.contains("size"), "{error}");
    }
}
