//! What a pooled connection costs on its shard: `cargo bench -p stoq --bench pool`.
//!
//! Real connections of a real shard (simulated link, real handshakes) to 1, 100 and 10 000 peers;
//! one lease at a time is checked out and in, the peers in random order, so that with many of them
//! neither the pool's nor the connection's memory is in the nearest cache. Times are as the clock
//! shows them, its own cost included. Ends with status 1 above the limits: median 200 ns, 99.9th
//! percentile 1 µs.

use std::any::Any;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use stoq::app::{ShardApp, ShardCx};
use stoq::certs::{ClientTls, IdentityNames, ServerTls};
use stoq::clock::SimClock;
use stoq::config::{PoolConfig, TransportConfig};
use stoq::datapath::sim::{LinkConfig, Prefix, SimNetwork, run_while};
use stoq::pool::{Checkout, CheckoutError, Lease, PeerEndpoint, PeerId};
use stoq::sim::{SimHost, SimHostConfig};

const CLIENT: SocketAddrV6 =
    SocketAddrV6::new(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1), 4000, 0, 0);
const SERVER: SocketAddrV6 =
    SocketAddrV6::new(Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1), 4433, 0, 0);
const ROUNDS: usize = 1_000_000;
const WARM_UP_ROUNDS: usize = 100_000;
const CHECKOUT_P50_NS_MAX: u64 = 200;
const CHECKOUT_P999_NS_MAX: u64 = 1_000;

struct Times {
    checkout: Histogram<u64>,
    check_in: Histogram<u64>,
    clock: Histogram<u64>,
}

#[derive(Default)]
struct Outcome {
    connected: usize,
    times: Option<Times>,
}

enum Order {
    Connect(Vec<PeerEndpoint>),
    Measure,
}

struct Client {
    peers: Vec<PeerId>,
    outcome: Arc<Mutex<Outcome>>,
}

impl ShardApp for Client {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        match *message.downcast::<Order>().expect("an order") {
            Order::Connect(endpoints) => {
                for endpoint in endpoints {
                    let peer = cx.pool_peer(&endpoint).expect("room for a peer");
                    self.peers.push(peer);
                    let answer = cx.checkout(peer, 0).expect("a handshake");
                    assert_eq!(answer, Checkout::Waiting);
                }
            }
            Order::Measure => {
                let times = self.measure(cx);
                self.outcome.lock().expect("no panic while locked").times = Some(times);
            }
        }
    }

    fn handle_checkout(
        &mut self,
        cx: &mut ShardCx<'_>,
        _token: u64,
        result: Result<Lease, CheckoutError>,
    ) {
        cx.check_in(result.expect("the handshake succeeds"));
        self.outcome.lock().expect("no panic while locked").connected += 1;
    }
}

impl Client {
    fn measure(&self, cx: &mut ShardCx<'_>) -> Times {
        let histogram = || Histogram::new_with_bounds(1, 1_000_000_000, 3).expect("valid bounds");
        let mut times = Times { checkout: histogram(), check_in: histogram(), clock: histogram() };
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..WARM_UP_ROUNDS + ROUNDS {
            // xorshift64: enough to defeat the prefetcher.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let peer = self.peers[(state % self.peers.len() as u64) as usize];
            let start = Instant::now();
            let answer = cx.checkout(peer, 0);
            let lent = Instant::now();
            let Ok(Checkout::Ready(lease)) = answer else { panic!("not lent: {answer:?}") };
            cx.check_in(lease);
            let back = Instant::now();
            let idle = Instant::now();
            if round >= WARM_UP_ROUNDS {
                times.checkout.saturating_record((lent - start).as_nanos() as u64);
                times.check_in.saturating_record((back - lent).as_nanos() as u64);
                times.clock.saturating_record((idle - back).as_nanos() as u64);
            }
        }
        times
    }
}

struct Server;

impl ShardApp for Server {}

fn run(peers: usize) -> Times {
    let clock = SimClock::new();
    let network = SimNetwork::new(clock.clone(), 1);
    let link = LinkConfig { rate_bps: 100_000_000_000, delay_us: 10, ..LinkConfig::default() };
    network
        .add_link(Prefix::new(*CLIENT.ip(), 32), Prefix::new(*SERVER.ip(), 32), link.clone(), link)
        .expect("a valid link");
    let config = TransportConfig {
        idle_timeout_ms: 0,
        connection_pool_size: peers,
        pool: PoolConfig { idle_timeout_ms: 0, ..PoolConfig::default() },
        ..TransportConfig::default()
    };
    let names = IdentityNames::new().with_dns("peer.test").expect("a name");
    let server_tls = ServerTls::builder()
        .alpn(["bench"])
        .identity_self_signed(names)
        .build()
        .expect("server TLS");
    // Peers differ by name, which one certificate cannot carry ten thousand of.
    let client_tls = ClientTls::builder()
        .alpn(["bench"])
        .danger_accept_any_server_certificate()
        .build()
        .expect("client TLS");
    let outcome = Arc::new(Mutex::new(Outcome::default()));
    let client = Client { peers: Vec::new(), outcome: outcome.clone() };
    let host =
        |server, client, seed| SimHostConfig { config: config.clone(), server, client, seed };
    let (near, far) = (network.open(CLIENT), network.open(SERVER));
    let mut client =
        SimHost::new(&clock, near, host(None, Some(client_tls.crypto()), 1), client).expect("host");
    let mut server =
        SimHost::new(&clock, far, host(Some(server_tls.crypto()), None, 2), Server).expect("host");
    let endpoints: Vec<PeerEndpoint> =
        (0..peers).map(|peer| PeerEndpoint::new(SERVER, &format!("p{peer}.peer.test"))).collect();
    for (done, part) in endpoints.chunks(256).enumerate() {
        client.send_to_app(Box::new(Order::Connect(part.to_vec())));
        let wanted = done * 256 + part.len();
        let until = clock.elapsed() + Duration::from_secs(5);
        run_while(&mut [&mut client, &mut server], &network, &clock, until, &mut || {
            outcome.lock().expect("no panic while locked").connected < wanted
        });
    }
    assert_eq!(outcome.lock().expect("no panic while locked").connected, peers);
    client.send_to_app(Box::new(Order::Measure));
    let until = clock.elapsed() + Duration::from_secs(1);
    run_while(&mut [&mut client, &mut server], &network, &clock, until, &mut || {
        outcome.lock().expect("no panic while locked").times.is_none()
    });
    outcome.lock().expect("no panic while locked").times.take().expect("measured")
}

fn main() -> ExitCode {
    let mut within = true;
    println!("{:>6}  {:<9} {:>8} {:>8} {:>8} {:>9}", "peers", "ns", "p50", "p99", "p99.9", "max");
    for peers in [1, 100, 10_000] {
        let times = run(peers);
        for (name, histogram) in [
            ("checkout", &times.checkout),
            ("check-in", &times.check_in),
            ("(clock)", &times.clock),
        ] {
            let at = |quantile| histogram.value_at_quantile(quantile);
            println!(
                "{peers:>6}  {name:<9} {:>8} {:>8} {:>8} {:>9}",
                at(0.5),
                at(0.99),
                at(0.999),
                histogram.max()
            );
        }
        let p50 = times.checkout.value_at_quantile(0.5);
        let p999 = times.checkout.value_at_quantile(0.999);
        within &= p50 <= CHECKOUT_P50_NS_MAX && p999 <= CHECKOUT_P999_NS_MAX;
    }
    println!(
        "checkout limits: p50 {CHECKOUT_P50_NS_MAX} ns, p99.9 {CHECKOUT_P999_NS_MAX} ns: {}",
        if within { "kept" } else { "EXCEEDED" }
    );
    if within { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
