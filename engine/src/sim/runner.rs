//! Runs a scenario: real shards over simulated links, in virtual time.
//!
//! Each flow has a client host and a server host of its own, all on one link, so
//! that flows share nothing but the link. Deterministic: hosts are seeded from
//! the scenario's seed; TLS randomness changes bytes but no length (Ed25519
//! signatures and keys of fixed size), and so no time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};

use super::workload::{Progress, Workload};
use super::{SimHost, SimHostConfig};
use crate::clock::SimClock;
use crate::config::{CongestionControl, TransportConfig};
use crate::datapath::sim::{
    CongestionControlName, Direction, EndpointId, Fate, FlowDirection, FlowResult, FlowSpec,
    HEADER_BYTES, LinkConfigError, LinkPlan, Prefix, Scenario, ScenarioResult, SimNetwork, SimNode,
    jain_index, run_while,
};
use crate::error::StartError;
use crate::proto::ConnectionStats;
use crate::proto::bbr::{ResumeSeed, State};

/// The name in the hosts' certificate.
pub(super) const SERVER_NAME: &str = "sim.stoq.test";
const CLIENT_PORT: u16 = 4000;
const SERVER_PORT: u16 = 4433;
/// Samples that a flow's life is divided into, about.
const SAMPLES_PER_RUN: u64 = 20_000;
/// Flow control must never be what limits a flow: these windows exceed every path's BDP and queue.
const WINDOW_BYTES: u64 = 4 << 30;
/// What a sender keeps in its send buffer at most.
const SEND_BUFFER_BYTES: u64 = 256 << 20;

/// Why a scenario could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A link refused its configuration.
    #[error("the link cannot be made: {0}")]
    Link(#[from] LinkConfigError),
    /// A host refused its configuration.
    #[error("a simulated host cannot start: {0}")]
    Host(#[from] StartError),
    /// The certificate of the simulated servers could not be made.
    #[error("the simulated servers' certificate cannot be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// TLS refused the settings.
    #[error("TLS of the simulated hosts cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// What a flow's sender saw at one time.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Virtual time.
    pub at: Duration,
    /// Stream bytes received by then.
    pub received_bytes: u64,
    /// The sender's statistics.
    pub stats: ConnectionStats,
}

/// A run with everything that was recorded.
#[derive(Debug)]
pub struct ScenarioRun {
    /// What `stoq sim --json` prints.
    pub result: ScenarioResult,
    /// Per flow, in order of time.
    pub samples: Vec<Vec<Sample>>,
}

/// Runs a scenario to its end: every flow complete, or its time limit.
///
/// # Errors
/// A host, a link or TLS refused its settings.
///
/// # Panics
/// On a livelock of the simulation, naming the seed.
pub fn run_scenario(scenario: &Scenario, seed: u64) -> Result<ScenarioRun, RunError> {
    let clock = SimClock::new();
    let network = SimNetwork::new(clock.clone(), seed);
    let (near, far) = (Prefix::new(client_ip(0), 32), Prefix::new(server_ip(0), 32));
    let link = network.add_link(near, far, scenario.forward.clone(), scenario.reverse.clone())?;
    let tls = tls()?;
    let drops = count_drops(&network);
    let mut ends = Vec::with_capacity(scenario.flows.len());
    for (index, spec) in scenario.flows.iter().enumerate() {
        ends.push(flow_ends(scenario, index, spec, &network, &clock, &tls, seed)?);
    }
    let progress: Vec<_> = ends.iter().map(|(sender, _)| sender.progress.clone()).collect();
    let totals: Vec<_> = scenario.flows.iter().map(FlowSpec::total_bytes).collect();
    let is_over = |progress: &Progress, total| {
        progress.received_bytes() >= total || progress.failure().is_some()
    };
    let mut proceed = || !progress.iter().zip(&totals).all(|(flow, &total)| is_over(flow, total));
    let mut nodes: Vec<&mut dyn SimNode> = Vec::with_capacity(2 * ends.len());
    for (sender, receiver) in &mut ends {
        nodes.push(sender);
        nodes.push(receiver);
    }
    let until = Duration::from_millis(scenario.time_limit_ms);
    run_while(&mut nodes, &network, &clock, until, &mut proceed);
    drop(nodes);

    let end = clock.elapsed();
    let mut flows = Vec::with_capacity(ends.len());
    let mut samples = Vec::with_capacity(ends.len());
    for (sender, _) in &mut ends {
        sender.sample(end);
        let dropped = drops.borrow().get(&sender.address).copied().unwrap_or(0);
        flows.push(sender.result(end, dropped));
        samples.push(std::mem::take(&mut sender.samples));
    }
    let result = ScenarioResult {
        name: scenario.name.clone(),
        seed,
        virtual_ms: end.as_millis() as u64,
        jain: jain_index(flows.iter().map(|flow| flow.goodput_bps as f64)),
        flows,
        link: network.link_counters(link, Direction::Forward),
        link_reverse: network.link_counters(link, Direction::Reverse),
        digest: ScenarioResult::digest_text(network.digest()),
    };
    Ok(ScenarioRun { result, samples })
}

pub(super) fn client_ip(flow: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, flow as u16 + 1)
}

pub(super) fn server_ip(flow: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, flow as u16 + 1)
}

pub(super) type Tls = (Arc<QuicServerConfig>, Arc<QuicClientConfig>);
/// Packets of each sender that the network dropped or damaged, MTU probes included.
type Drops = Rc<RefCell<HashMap<SocketAddrV6, u64>>>;

fn count_drops(network: &SimNetwork) -> Drops {
    let drops = Drops::default();
    let counted = drops.clone();
    network.set_tap(Some(Box::new(move |event| {
        // A flipped bit fails authentication: such a packet is lost, wherever it ends.
        let damaged = event.corrupted && event.fate == Fate::Delivered;
        if damaged || !matches!(event.fate, Fate::Sent | Fate::Delivered) {
            *counted.borrow_mut().entry(event.from).or_default() += 1;
        }
    })));
    drops
}

/// TLS of both ends over one certificate, every part of which has a fixed length.
pub(super) fn tls() -> Result<Tls, RunError> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let mut params = rcgen::CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    params.serial_number = Some(rcgen::SerialNumber::from(1_u64));
    let certificate = params.self_signed(&key)?;
    let secret = rustls_pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.der().clone())?;
    let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], secret.into())?;
    server.alpn_protocols = vec![b"sim".to_vec()];
    server.send_tls13_tickets = 0;
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"sim".to_vec()];
    let server = server.try_into().expect("the provider has QUIC's initial cipher suite");
    let client = client.try_into().expect("the provider has QUIC's initial cipher suite");
    Ok((Arc::new(server), Arc::new(client)))
}

pub(super) fn transport_config(spec: &FlowSpec) -> TransportConfig {
    TransportConfig {
        congestion_control: match spec.cc {
            CongestionControlName::Bbr2 => CongestionControl::Bbr2,
            CongestionControlName::Bbr3 => CongestionControl::Bbr3,
            CongestionControlName::Cubic => CongestionControl::Cubic,
            CongestionControlName::NewReno => CongestionControl::NewReno,
        },
        max_concurrent_streams: spec.streams,
        send_buffer_size: SEND_BUFFER_BYTES,
        receive_buffer_size: WINDOW_BYTES,
        stream_receive_buffer_size: WINDOW_BYTES,
        // An outage, a burst an hour later, a handshake at 10 kbit/s: the time limit ends them.
        idle_timeout_ms: 0,
        handshake_timeout_ms: 600_000,
        resume: spec.resume.map(|seed| {
            let bandwidth_bytes_per_s = seed.rate_bps / 8;
            let bdp = u128::from(bandwidth_bytes_per_s) * u128::from(seed.rtt_us) / 1_000_000;
            ResumeSeed {
                bandwidth_bytes_per_s,
                min_rtt: Duration::from_micros(seed.rtt_us),
                is_limit: true,
                jump_bytes_max: u64::try_from(bdp).unwrap_or(u64::MAX),
            }
        }),
        ..TransportConfig::default()
    }
}

/// The largest packet that the link ever carries: what the hosts' interfaces are made for.
fn interface_mtu(scenario: &Scenario) -> u64 {
    let largest = |plan: &LinkPlan| {
        plan.steps.iter().map(|step| step.config.mtu).fold(plan.initial.mtu, u64::max)
    };
    largest(&scenario.forward).max(largest(&scenario.reverse))
}

fn flow_ends(
    scenario: &Scenario,
    index: usize,
    spec: &FlowSpec,
    network: &SimNetwork,
    clock: &SimClock,
    tls: &Tls,
    seed: u64,
) -> Result<(SenderNode, Starter), RunError> {
    let client_address = SocketAddrV6::new(client_ip(index), CLIENT_PORT, 0, 0);
    let server_address = SocketAddrV6::new(server_ip(index), SERVER_PORT, 0, 0);
    let upload = spec.direction == FlowDirection::Upload;
    let address = if upload { client_address } else { server_address };
    if let Some(access) = scenario.access {
        network.set_access(*address.ip(), access.rate_bps, access.delay_us)?;
    }
    let (client_path, server_path) = (network.open(client_address), network.open(server_address));
    let mtu = interface_mtu(scenario);
    network.set_interface_mtu(client_path.id(), mtu);
    network.set_interface_mtu(server_path.id(), mtu);
    let progress = Arc::new(Progress::default());
    let host_seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(2 * index as u64);
    let base = clock.instant_at(Duration::ZERO);
    let app = |sends, remote| Workload::new(spec.clone(), sends, remote, progress.clone(), base);
    let client_setup = SimHostConfig {
        config: transport_config(spec),
        server: None,
        client: Some(tls.1.clone()),
        seed: host_seed,
    };
    let server_setup = SimHostConfig {
        config: transport_config(spec),
        server: Some(tls.0.clone()),
        client: None,
        seed: host_seed.wrapping_add(1),
    };
    let client_app = app(upload, Some(server_address));
    let client = SimHost::new(clock, client_path, client_setup, client_app)?;
    let server = SimHost::new(clock, server_path, server_setup, app(!upload, None))?;
    let start = Duration::from_millis(spec.start_ms);
    let every = Duration::from_micros((scenario.time_limit_ms * 1000 / SAMPLES_PER_RUN).max(100));
    let client = Starter { host: client, clock: clock.clone(), start: Some(start) };
    let server = Starter { host: server, clock: clock.clone(), start: None };
    let (sender, receiver) = if upload { (client, server) } else { (server, client) };
    let sender = SenderNode {
        node: sender,
        address,
        spec: spec.clone(),
        progress,
        every,
        next_sample: start,
        samples: Vec::new(),
        state: None,
        states: Vec::new(),
    };
    Ok((sender, receiver))
}

/// A host whose application is told to begin at a time of its own.
struct Starter {
    host: SimHost,
    clock: SimClock,
    start: Option<Duration>,
}

impl SimNode for Starter {
    fn turn(&mut self) -> Option<Instant> {
        if self.start.is_some_and(|start| start <= self.clock.elapsed()) {
            self.start = None;
            self.host.send_to_app(Box::new(()));
        }
        let deadline = self.host.turn();
        let start = self.start.map(|start| self.clock.instant_at(start));
        [deadline, start].into_iter().flatten().min()
    }

    fn endpoint(&self) -> Option<EndpointId> {
        self.host.endpoint()
    }
}

/// The sending end of a flow, and what is recorded of it.
struct SenderNode {
    node: Starter,
    address: SocketAddrV6,
    spec: FlowSpec,
    progress: Arc<Progress>,
    every: Duration,
    next_sample: Duration,
    samples: Vec<Sample>,
    state: Option<State>,
    states: Vec<(u64, String)>,
}

impl SimNode for SenderNode {
    fn turn(&mut self) -> Option<Instant> {
        let deadline = self.node.turn();
        let now = self.node.clock.elapsed();
        let state = self.node.host.bbr_state();
        if state != self.state
            && let Some(state) = state
        {
            self.state = Some(state);
            self.states.push((now.as_millis() as u64, state.name().to_owned()));
        }
        if now >= self.next_sample {
            self.sample(now);
            self.next_sample = now + self.every;
        }
        let sample = self
            .progress
            .completed_at()
            .is_none()
            .then(|| self.node.clock.instant_at(self.next_sample));
        [deadline, sample].into_iter().flatten().min()
    }

    fn endpoint(&self) -> Option<EndpointId> {
        self.node.endpoint()
    }
}

impl SenderNode {
    fn sample(&mut self, at: Duration) {
        if let Some(stats) = self.node.host.connection_stats() {
            self.samples.push(Sample { at, received_bytes: self.progress.received_bytes(), stats });
        }
    }

    fn result(&self, end: Duration, dropped: u64) -> FlowResult {
        let stats = self.samples.last().map(|sample| sample.stats).unwrap_or_default();
        let mut srtts: Vec<_> = self.samples.iter().map(|sample| sample.stats.rtt).collect();
        srtts.sort_unstable();
        let percentile = |percent: usize| {
            let index = srtts.len().saturating_sub(1) * percent / 100;
            srtts.get(index).map_or(0, |rtt| rtt.as_micros() as u64)
        };
        let start = Duration::from_millis(self.spec.start_ms);
        let completed = self.progress.completed_at();
        let elapsed = completed.unwrap_or(end).saturating_sub(start);
        let bytes = self.progress.received_bytes();
        let mtu = u64::from(stats.mtu_bytes).max(1);
        // The controller counts QUIC packets, the link IP packets.
        let ip = |rate: u64| {
            (u128::from(rate) * u128::from(mtu + HEADER_BYTES) / u128::from(mtu)) as u64
        };
        FlowResult {
            cc: self.spec.cc,
            start_ms: self.spec.start_ms,
            completed_ms: completed.map(|at| at.as_millis() as u64),
            bytes,
            goodput_bps: FlowResult::goodput(bytes, elapsed.as_micros() as u64),
            packets_sent: stats.packets_sent,
            packets_lost: stats.packets_lost,
            loss: FlowResult::loss(stats.packets_lost, stats.packets_sent),
            // The network knows what it dropped; the rest of what was declared lost had arrived. A lost
            // probe of the path's MTU is none of the packets lost.
            spurious_losses: stats
                .packets_lost
                .saturating_sub(dropped.saturating_sub(stats.mtu_probes_lost)),
            srtt_us_p50: percentile(50),
            srtt_us_p99: percentile(99),
            min_rtt_us: stats.min_rtt.as_micros() as u64,
            bandwidth_estimate_bps: stats.bbr_state.map(|_| ip(stats.bandwidth_estimate_bps)),
            cwnd_bytes: stats.cwnd_bytes,
            inflight_hi_bytes: stats.inflight_hi_bytes,
            states: self.states.clone(),
            failure: self.progress.failure().map(str::to_owned),
        }
    }
}
