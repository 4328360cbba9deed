//! Idle costs nothing over AF_XDP, too: a shard without work sleeps. Needs root.

mod common;
#[path = "common/idle.rs"]
mod idle;

use std::net::{Ipv6Addr, SocketAddrV6};

use common::netns::{Netns, veth};
use stoq::config::TransportConfig;
use stoq::datapath::DatapathKind;
use stoq::datapath::choice::DatapathChoice;
use stoq::engine::Engine;

#[test]
fn a_shard_on_rings_without_work_sleeps() {
    let (left, right) = (Netns::new("left"), Netns::new("right"));
    veth((&left, "veth0"), (&right, "veth0"));
    let start = |netns: &Netns, last: u16| {
        let address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last);
        netns.add_address("veth0", &format!("{address}/64"));
        let config = TransportConfig {
            bind: SocketAddrV6::new(address, 4433, 0, 0),
            datapath: DatapathChoice::AfXdp,
            interface: Some("veth0".into()),
            ..Default::default()
        };
        netns.run(|| Engine::builder().config(config).start().expect("an engine on rings"))
    };
    let engines = [start(&left, 1), start(&right, 2)];
    for engine in &engines {
        assert_eq!(engine.datapaths()[0].kind, DatapathKind::AfXdp);
    }
    idle::assert_idle("af_xdp", &[&engines[0], &engines[1]]);
}
