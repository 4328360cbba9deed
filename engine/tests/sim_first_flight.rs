//! What the size of a server's certificates costs in round trips: its first flight may be three times as
//! large as what the client has sent, until the client's address is validated (RFC 9000 §8.1).
//!
//! Virtual time; `cargo test -p stoq --test sim_first_flight -- --nocapture` prints the table.

#[path = "common/sim.rs"]
mod sim;

use std::sync::Arc;
use std::time::Duration;

use sim::{Pair, PairConfig, Plan};
use stoq::certs::{
    ClientAuth, ClientTls, IdentityNames, KeyAlgorithm, LocalCa, LocalCaConfig, RotatingIdentity,
    ServerTls, SystemWallClock, TrustStore,
};
use stoq::config::{RetryPolicy, TransportConfig};
use stoq::datapath::sim::LinkConfig;

const NAME: &str = "node.example.net";
const ROUND_TRIP: Duration = Duration::from_millis(100);

/// An identity whose root and intermediate have keys of one kind, and its leaf of another.
fn identity(ca: KeyAlgorithm, leaf: KeyAlgorithm) -> Arc<RotatingIdentity> {
    let config = LocalCaConfig { key_algorithm: ca, ..LocalCaConfig::default() };
    let ca = LocalCa::in_memory(config, Arc::new(SystemWallClock)).expect("a CA");
    let root = ca.root();
    let names = IdentityNames::new().with_dns(NAME).expect("a name");
    RotatingIdentity::with_authority(Arc::new(ca), names)
        .key_algorithm(leaf)
        .roots([root])
        .start()
        .expect("certified")
}

fn chain_size_bytes(identity: &RotatingIdentity) -> usize {
    let chain = identity.certified_key().expect("served");
    chain.cert.iter().map(|certificate| certificate.len()).sum()
}

/// Round trips until the client's handshake is done, on a fast link without loss.
fn round_trips(identity: &Arc<RotatingIdentity>, retry: RetryPolicy, window_packets: u64) -> f64 {
    let client = ClientTls::builder().roots(identity.roots().to_vec()).alpn(["t"]);
    let server = ServerTls::builder().identity(identity.clone()).alpn(["t"]);
    let tls = (
        server.build().expect("server TLS").crypto(),
        client.build().expect("client TLS").crypto(),
    );
    let link = LinkConfig {
        rate_bps: 10_000_000_000,
        delay_us: ROUND_TRIP.as_micros() as u64 / 2,
        ..LinkConfig::default()
    };
    let server = TransportConfig {
        retry,
        initial_window_packets: window_packets,
        ..TransportConfig::default()
    };
    let config = PairConfig { link, server, tls: Some(tls), ..PairConfig::default() };
    let plan = Plan { server_name: Some(NAME.to_owned()), ..Plan::default() };
    let mut pair = Pair::new(config, plan, Plan::default());
    let done = pair.run(100 * ROUND_TRIP, |client, _| client.connected == 1);
    assert!(done, "no connection: {:?}", pair.server.counters());
    pair.clock.elapsed().as_secs_f64() / ROUND_TRIP.as_secs_f64()
}

#[test]
fn ml_dsa_chains_cost_a_round_trip_or_two() {
    use KeyAlgorithm::{EcdsaP256, MlDsa65};
    let window = TransportConfig::default().initial_window_packets;
    for (ca, leaf, expected) in [
        (EcdsaP256, EcdsaP256, [1, 2, 2]),
        // 7 kB with the handshake's signature: just too much for three times two Initials.
        (EcdsaP256, MlDsa65, [2, 2, 2]),
        // 16 kB: more than the initial window, too, unless that is enlarged.
        (MlDsa65, MlDsa65, [2, 3, 2]),
    ] {
        let identity = identity(ca, leaf);
        let measured = [
            round_trips(&identity, RetryPolicy::Never, window),
            round_trips(&identity, RetryPolicy::Always, window),
            round_trips(&identity, RetryPolicy::Always, 2 * window),
        ];
        let size = chain_size_bytes(&identity);
        println!(
            "CA {ca:?}, leaf {leaf:?}, {size} B: {:.2} round trips, with Retry {:.2}, with Retry \
             and {} packets at once {:.2}",
            measured[0],
            measured[1],
            2 * window,
            measured[2]
        );
        // Pacing spreads the last flight a little.
        assert_eq!(measured.map(|trips| trips as u64), expected, "{ca:?} {leaf:?} {measured:?}");
    }
}

/// Both ends show such a chain, with packets lost and out of order: 16 kB of handshake in each
/// direction, which quinn-proto holds back for while a part is missing.
#[test]
fn ml_dsa_chains_at_both_ends_arrive_over_a_bad_path() {
    let server_identity = identity(KeyAlgorithm::MlDsa65, KeyAlgorithm::MlDsa65);
    let client_identity = identity(KeyAlgorithm::MlDsa65, KeyAlgorithm::MlDsa65);
    for seed in 1..=30 {
        let trust = TrustStore::builder().roots(client_identity.roots().to_vec());
        let server = ServerTls::builder()
            .identity(server_identity.clone())
            .client_auth(ClientAuth::Required(trust.build().expect("trust")))
            .alpn(["t"]);
        let client = ClientTls::builder()
            .roots(server_identity.roots().to_vec())
            .identity(client_identity.clone())
            .alpn(["t"]);
        let tls = (
            server.build().expect("server TLS").crypto(),
            client.build().expect("client TLS").crypto(),
        );
        let link = LinkConfig {
            rate_bps: 100_000_000,
            delay_us: 5_000,
            loss: 0.1,
            reorder: 0.2,
            reorder_us: 8_000,
            ..LinkConfig::default()
        };
        let limits = TransportConfig { handshake_timeout_ms: 60_000, ..TransportConfig::default() };
        let config = PairConfig {
            link,
            seed,
            client: limits.clone(),
            server: limits,
            tls: Some(tls),
            ..PairConfig::default()
        };
        let plan = Plan { server_name: Some(NAME.to_owned()), ..Plan::default() };
        let mut pair = Pair::new(config, plan, Plan::default());
        let limit = Duration::from_secs(60);
        let done = pair.run(limit, |client, server| client.connected + server.connected == 2);
        assert!(done, "seed {seed}: {:?}", pair.client_log.lock().expect("log").closed);
    }
}
