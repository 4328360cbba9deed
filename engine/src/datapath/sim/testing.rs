//! Two hosts on one link: what the simulator's own tests share.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use super::{LinkConfig, LinkId, SimDatapath, SimNetwork};
use crate::clock::{Clock, SimClock};
use crate::datapath::{Datapath, Ecn, RxBatch, RxDatagram, TxMeta, TxVerdict};

pub(super) const CLIENT_HOST: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
pub(super) const SERVER_HOST: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1);
pub(super) const CLIENT: SocketAddrV6 = SocketAddrV6::new(CLIENT_HOST, 4000, 0, 0);
pub(super) const SERVER: SocketAddrV6 = SocketAddrV6::new(SERVER_HOST, 443, 0, 0);

/// A network with one link of `config` both ways between all client and all server hosts.
pub(super) fn wire(config: LinkConfig, seed: u64) -> (SimClock, SimNetwork, LinkId) {
    let clock = SimClock::new();
    let network = SimNetwork::new(clock.clone(), seed);
    let near = super::Prefix::new(CLIENT_HOST, 32);
    let far = super::Prefix::new(SERVER_HOST, 32);
    let link = network.add_link(near, far, config.clone(), config).expect("a valid link");
    (clock, network, link)
}

pub(super) fn meta(remote: SocketAddrV6) -> TxMeta {
    TxMeta { remote, local: None, ecn: Ecn::NotEct }
}

/// A client and a server port on one link.
pub(super) struct Bench {
    pub(super) clock: SimClock,
    pub(super) network: SimNetwork,
    pub(super) link: LinkId,
    pub(super) client: SimDatapath,
    pub(super) server: SimDatapath,
}

impl Bench {
    pub(super) fn new(config: LinkConfig, seed: u64) -> Self {
        let (clock, network, link) = wire(config, seed);
        let (client, server) = (network.open(CLIENT), network.open(SERVER));
        for port in [client.id(), server.id()] {
            network.set_interface_mtu(port, super::MTU_MAX);
        }
        Self { clock, network, link, client, server }
    }

    /// Sends one datagram of `ip_bytes` to the server, its number in the first four bytes.
    pub(super) fn send_ecn(&mut self, number: u32, ip_bytes: usize, ecn: Ecn) {
        let mut payload = vec![0; ip_bytes - 48];
        payload[..4].copy_from_slice(&number.to_be_bytes());
        let meta = TxMeta { ecn, ..meta(SERVER) };
        assert_eq!(self.client.transmit(&meta, &payload), TxVerdict::Accepted);
        self.client.flush(self.clock.now());
    }

    pub(super) fn send(&mut self, number: u32, ip_bytes: usize) {
        self.send_ecn(number, ip_bytes, Ecn::NotEct);
    }

    /// Moves time to `at`, receiving what arrives at the server with its time of arrival.
    pub(super) fn run_to(&mut self, at: Duration) -> Vec<(u64, RxDatagram)> {
        let mut received = Vec::new();
        while let Some(next) = self.network.next_event().filter(|next| *next <= at) {
            self.clock.advance_to(next);
            self.network.advance();
            received.extend(self.receive());
        }
        self.clock.advance_to(at);
        received
    }

    /// Runs until nothing is under way.
    pub(super) fn run_out(&mut self) -> Vec<(u64, RxDatagram)> {
        let mut received = self.run_to(self.clock.elapsed());
        while let Some(next) = self.network.next_event() {
            received.extend(self.run_to(next));
        }
        received
    }

    /// What the server can receive now.
    pub(super) fn receive(&mut self) -> Vec<(u64, RxDatagram)> {
        let now_ns = u64::try_from(self.clock.elapsed().as_nanos()).expect("short test");
        let mut all = Vec::new();
        loop {
            let mut batch = RxBatch::new(64, 1 << 16);
            self.server.receive(self.clock.now(), &mut batch);
            if batch.is_empty() {
                return all;
            }
            all.extend(batch.drain().map(|datagram| (now_ns, datagram)));
        }
    }
}

/// The number that [`Bench::send`] wrote.
pub(super) fn number(datagram: &RxDatagram) -> u32 {
    u32::from_be_bytes(datagram.data[..4].try_into().expect("four bytes"))
}
