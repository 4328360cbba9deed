//! Idle costs nothing, with the default settings: shards without work sleep.
//!
//! One test, because it looks at every shard thread of the process.

#[path = "common/idle.rs"]
mod idle;
#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use pair::{NAME, Pair, Watchdog};
use pollster::block_on;
use stoq::config::TransportConfig;
use stoq::datapath::choice::DatapathChoice;

#[test]
fn shards_without_work_sleep() {
    let _watchdog = Watchdog::new("shards_without_work_sleep");
    for datapath in [DatapathChoice::Socket, DatapathChoice::IoUring] {
        let config = TransportConfig {
            datapath,
            spin_us: TransportConfig::default().spin_us,
            keep_alive_interval_ms: 1000,
            ..pair::config()
        };
        assert!(config.spin_us > 0, "by default a shard spins a while before it sleeps");
        let pair = Pair::with(config.clone(), config);
        let engines = [&pair.server, &pair.client];
        idle::assert_idle(&format!("{datapath}, no connection"), &engines);
        let connecting = pair.client.connect(pair.server.local_addr(), NAME);
        let accepted = block_on(pair.server.accept()).expect("a client").accept();
        let (client, server) = (block_on(connecting), block_on(accepted));
        let _held = (client.expect("connects"), server.expect("accepts"));
        idle::assert_idle(&format!("{datapath}, one idle connection"), &engines);
    }
}
