//! A whole connection in virtual time while a shard's datapath is swapped beneath it.

use std::any::Any;
use std::net::SocketAddrV6;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use super::runner::{client_ip, server_ip, tls, transport_config};
use super::workload::{Progress, Workload};
use super::{SimHost, SimHostConfig, shard_on, siblings};
use crate::clock::{Clock, SimClock};
use crate::config::HANDOFF_DATAGRAMS_MAX;
use crate::datapath::failover::{Failover, Primary};
use crate::datapath::sim::{
    EndpointId, Prefix, Scenario, SimDatapath, SimNetwork, SimNode, run_while,
};
use crate::datapath::{
    Capabilities, Datapath, DatapathCounters, DatapathEvent, RxBatch, TxDrop, TxMeta, TxVerdict,
};
use crate::metrics::ShardMetrics;
use crate::proto::QuicIdentity;
use crate::shard::Shard;

/// A device over a simulated port, which it leaves behind when it fails.
struct Device {
    port: Option<SimDatapath>,
    capabilities: Capabilities,
    local: SocketAddrV6,
    fails_at: Instant,
    now: Instant,
    told: bool,
}

impl Device {
    fn new(port: Option<SimDatapath>, local: SocketAddrV6, fails_at: Instant) -> Self {
        let capabilities = Capabilities {
            kind: crate::datapath::DatapathKind::Sim,
            mode: "device".to_owned(),
            interface: None,
            queue: None,
            standby_reason: None,
        };
        Self { port, capabilities, local, fails_at, now: fails_at, told: false }
    }

    fn port(&mut self) -> &mut SimDatapath {
        self.port.as_mut().expect("given before its first turn")
    }

    fn has_failed(&self) -> bool {
        self.now >= self.fails_at
    }
}

impl Datapath for Device {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn local_addr(&self) -> SocketAddrV6 {
        self.local
    }

    fn receive(&mut self, now: Instant, batch: &mut RxBatch) {
        self.now = now;
        if !self.has_failed() {
            self.port().receive(now, batch);
        }
    }

    fn transmit_capacity(&self) -> usize {
        self.port.as_ref().map_or(0, Datapath::transmit_capacity)
    }

    fn transmit(&mut self, meta: &TxMeta, payload: &[u8]) -> TxVerdict {
        if self.has_failed() {
            return TxVerdict::Dropped(TxDrop::Io);
        }
        self.port().transmit(meta, payload)
    }

    fn flush(&mut self, now: Instant) {
        self.port().flush(now);
    }

    fn poll_event(&mut self) -> Option<DatapathEvent> {
        if self.has_failed() && !std::mem::replace(&mut self.told, true) {
            return Some(DatapathEvent::Failed("the device is gone".to_owned()));
        }
        self.port().poll_event()
    }

    fn max_udp_payload(&self, remote: &SocketAddrV6) -> u16 {
        self.port.as_ref().map_or(1200, |port| port.max_udp_payload(remote))
    }

    fn wait(&mut self, wake: BorrowedFd<'_>, timeout: Option<Duration>) -> std::io::Result<()> {
        self.port().wait(wake, timeout)
    }

    fn counters(&self) -> DatapathCounters {
        DatapathCounters::default()
    }
}

impl Primary for Device {
    type Standby = SimDatapath;

    fn take_standby(&mut self) -> Option<SimDatapath> {
        self.port.take()
    }

    fn give_standby(&mut self, standby: SimDatapath) {
        self.port = Some(standby);
    }
}

/// A host whose device fails and comes back again and again.
struct FlakyHost {
    shard: Shard<Failover<Device>, SimClock>,
    metrics: Arc<ShardMetrics>,
    clock: SimClock,
    endpoint: EndpointId,
    local: SocketAddrV6,
    next_return: Instant,
    paths: Vec<Capabilities>,
}

/// The device works for so long, and is away for so long.
const HALF_PERIOD: Duration = Duration::from_millis(150);

impl SimNode for FlakyHost {
    fn turn(&mut self) -> Option<Instant> {
        let now = self.clock.now();
        if now >= self.next_return {
            self.next_return = now + 2 * HALF_PERIOD;
            let device = Device::new(None, self.local, now + HALF_PERIOD);
            let offer: Box<dyn Any> = Box::new(device);
            self.shard.datapath().adopt(now, offer);
        }
        let turn = self.shard.turn();
        let path = self.metrics.path();
        if self.paths.last() != Some(&path) {
            self.paths.push(path);
        }
        let deadline = if turn.more { Some(now) } else { turn.deadline };
        Some(deadline.map_or(self.next_return, |at| at.min(self.next_return)))
    }

    fn endpoint(&self) -> Option<EndpointId> {
        Some(self.endpoint)
    }
}

const SCENARIO: &str = "name = \"failover\"\n[link]\nrate_bps = 20_000_000\ndelay_us = 5000\n\
                        [[flow]]\nbytes = 4_000_000\n";

#[test]
fn a_transfer_survives_every_swap() {
    for seed in 1..=4 {
        println!("seed {seed}");
        let scenario = Scenario::parse(SCENARIO).expect("a scenario");
        let clock = SimClock::new();
        let network = SimNetwork::new(clock.clone(), seed);
        let (near, far) = (Prefix::new(client_ip(0), 32), Prefix::new(server_ip(0), 32));
        network
            .add_link(near, far, scenario.forward.clone(), scenario.reverse.clone())
            .expect("ok");
        let (client, server) = tls().map(|(server, client)| (client, server)).expect("TLS");
        let local = SocketAddrV6::new(client_ip(0), 4000, 0, 0);
        let remote = SocketAddrV6::new(server_ip(0), 4433, 0, 0);
        let (port, server_port) = (network.open(local), network.open(remote));
        let (endpoint, progress) = (port.id(), Arc::new(Progress::default()));
        let (start, spec) = (clock.now(), &scenario.flows[0]);
        let app = |sends, to| Workload::new(spec.clone(), sends, to, progress.clone(), start);
        let (coordinator, given_up) = sync_channel(64);
        let device = Device::new(Some(port), local, start + HALF_PERIOD);
        let path = Failover::new(0, device, coordinator);
        let config = Arc::new(transport_config(spec));
        let identity = QuicIdentity { client: Some(client), ..QuicIdentity::default() };
        let siblings = siblings(&config, 1, HANDOFF_DATAGRAMS_MAX).expect("mailboxes");
        let app_here = app(true, Some(remote));
        let (shard, mailbox, metrics) =
            shard_on(&clock, path, config, identity, siblings, (0, seed), app_here);
        let first = Device::new(None, local, start).capabilities;
        metrics.set_path(first.clone());
        let message = crate::shard::mailbox::Command::App(Box::new(()));
        assert!(mailbox.push(message).is_ok(), "an empty mailbox");
        let next_return = start + 2 * HALF_PERIOD;
        let (paths, clock2) = (Vec::new(), clock.clone());
        let mut flaky =
            FlakyHost { shard, metrics, clock: clock2, endpoint, local, next_return, paths };
        let setup = SimHostConfig {
            config: transport_config(spec),
            server: Some(server),
            client: None,
            seed: seed + 100,
        };
        let mut other = SimHost::new(&clock, server_port, setup, app(false, None)).expect("a host");
        let mut nodes: [&mut dyn SimNode; 2] = [&mut flaky, &mut other];
        let limit = Duration::from_secs(60);
        let mut proceed = || progress.completed_at().is_none() && progress.failure().is_none();
        run_while(&mut nodes, &network, &clock, limit, &mut proceed);
        assert_eq!(progress.received_bytes(), 4_000_000, "seed {seed}: all, after {limit:?}");
        let counters = flaky.shard.datapath().counters();
        assert!(counters.failovers >= 3 && counters.returns >= 2, "seed {seed}: {counters:?}");
        assert_eq!(given_up.try_iter().count() as u64, counters.failovers, "seed {seed}");
        assert!(flaky.paths.len() as u64 >= counters.failovers + counters.returns, "told live");
        for (index, path) in flaky.paths.iter().enumerate() {
            assert_eq!(path.standby_reason.is_some(), index % 2 == 1, "seed {seed}: {path:?}");
        }
        assert_eq!(flaky.paths[0], first);
    }
}
