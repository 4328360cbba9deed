//! Whole connections over each provider of packet protection, in the simulator.
#![allow(clippy::unwrap_used)]

#[path = "common/sim.rs"]
mod sim;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use quinn_proto::crypto;
use sim::{Pair, PairConfig, Plan, Send, pattern};
use stoq::Dir;
use stoq::certs::{ClientTls, IdentityNames, RotatingIdentity, ServerTls};
use stoq::config::CryptoProviderChoice;
use stoq::datapath::sim::LinkConfig;
use stoq::proto::crypto::{IPSEC_MB_ADVICE, ipsec_mb_version};

const BYTES: usize = 2_000_000;

/// TLS of both ends, each with its provider, over one made-up certificate.
fn tls(
    server: CryptoProviderChoice,
    client: CryptoProviderChoice,
) -> (Arc<dyn crypto::ServerConfig>, Arc<dyn crypto::ClientConfig>) {
    let names = IdentityNames::new().with_dns("stoq.test").unwrap();
    let identity = RotatingIdentity::self_signed(names).start().unwrap();
    let roots = identity.roots().to_vec();
    let client =
        ClientTls::builder().alpn(["test"]).roots(roots).packet_crypto(client).build().unwrap();
    let server = ServerTls::builder()
        .identity(identity)
        .alpn(["test"])
        .packet_crypto(server)
        .build()
        .unwrap();
    (server.crypto(), client.crypto())
}

/// An upload over a lossy link with key updates on the way.
fn upload(server: CryptoProviderChoice, client: CryptoProviderChoice) {
    let name = format!("{} to {}", client.name(), server.name());
    let link = LinkConfig {
        rate_bps: 100_000_000,
        delay_us: 3_000,
        loss: 0.005,
        reorder: 0.01,
        reorder_us: 500,
        ..LinkConfig::default()
    };
    let config = PairConfig { link, seed: 8, tls: Some(tls(server, client)), ..Default::default() };
    let sends = vec![Send { dir: Dir::Uni, data: pattern(BYTES), finish: true }];
    let client_plan = Plan { sends, ..Plan::default() };
    let server_plan = Plan { keep: true, update_keys_every: Some(200_000), ..Plan::default() };
    let mut pair = Pair::new(config, client_plan, server_plan);
    let done = pair.run(Duration::from_secs(20), |client, _| client.acknowledged.len() == 1);
    let log = pair.server_log.lock().unwrap();
    assert!(done, "{name}: {} bytes came, closed: {:?}", log.received_bytes, log.closed);
    let received: Vec<&Vec<u8>> = log.received.values().collect();
    assert_eq!(received.len(), 1, "{name}");
    assert!(*received[0] == pattern(BYTES), "{name}: other bytes came");
    let updates = log.stats.expect("stats").key_updates;
    assert!(updates >= 2, "{name}: {updates} key updates");
}

#[test]
fn each_provider_carries_a_connection_to_each() {
    use CryptoProviderChoice::{AwsLcRs, IpsecMb};
    upload(AwsLcRs, AwsLcRs);
    if let Err(reason) = ipsec_mb_version() {
        // Past the harness, which hides what a passing test prints.
        writeln!(
            std::io::stderr(),
            "NOT TESTED, ipsec-mb cannot be used here: {reason}; {IPSEC_MB_ADVICE}"
        )
        .unwrap();
        return;
    }
    upload(AwsLcRs, IpsecMb);
    upload(IpsecMb, AwsLcRs);
    upload(IpsecMb, IpsecMb);
}
