//! A server whose shards have very unlike loads, and clients that come then.

use std::any::Any;

use bytes::Bytes;
use pollster::block_on;
use stoq::VarInt;
use stoq::app::{ConnId, Incoming, ShardApp, ShardCx};
use stoq::config::{RetryPolicy, TransportConfig};
use stoq::engine::Engine;
use stoq::metrics::ShardCounters;

use super::pair::{NAME, counters, wait_for};

/// The first clients: many more a shard than what counts as imbalance.
const CROWD: usize = 560;
const NEWCOMERS: u64 = 60;
/// Shards that the server must have.
pub const SHARDS: usize = 4;

/// A server's application that takes everybody, and gives up those of its shard when told.
#[derive(Default)]
pub struct Fickle(Vec<ConnId>);

impl ShardApp for Fickle {
    fn handle_incoming(&mut self, cx: &mut ShardCx<'_>, incoming: Incoming) {
        self.0.extend(cx.accept(incoming));
    }

    fn handle_message(&mut self, cx: &mut ShardCx<'_>, _close_all: Box<dyn Any + Send>) {
        for conn in self.0.drain(..) {
            cx.close(conn, VarInt::from_u32(0), Bytes::new());
        }
    }
}

/// What a server's configuration needs for [`newcomers_avoid_the_one_busy_shard`].
pub fn config(base: TransportConfig) -> TransportConfig {
    TransportConfig { shards: SHARDS, retry: RetryPolicy::UnderLoad, new_tokens: 0, ..base }
}

/// All shards but one lose their connections: newcomers whose IDs lead to the busy one are sent
/// elsewhere by a Retry, at no other's cost. The server's application is [`Fickle`].
pub fn newcomers_avoid_the_one_busy_shard(server: &Engine, client: &Engine) {
    let by_shard = |of: fn(&ShardCounters) -> u64| -> Vec<u64> {
        server.stats().iter().map(|stats| of(&stats.shard)).collect()
    };
    let connect = async || client.connect(server.local_addr(), NAME).await.expect("room");
    block_on(async {
        let mut crowd = Vec::new();
        for _ in 0..CROWD {
            crowd.push(connect().await);
        }
        assert_eq!(counters(server).retries, 0, "the hash has spread them evenly");
        for shard in 1..SHARDS {
            server.send_to_app(shard, Box::new(())).expect("the server runs");
        }
        wait_for("the others are empty", || {
            by_shard(|shard| shard.connections)[1..].iter().all(|connections| *connections == 0)
        });
        // Clients may know that they are accepted before the counters do.
        let accepted = || by_shard(|shard| shard.accepted);
        let count = |number| wait_for("all count", || accepted().iter().sum::<u64>() == number);
        count(CROWD as u64);
        let before = accepted();
        for _ in 0..NEWCOMERS {
            crowd.push(connect().await);
        }
        count(CROWD as u64 + NEWCOMERS);
        let after = accepted();
        let came: Vec<u64> =
            after.iter().zip(&before).map(|(after, before)| after - before).collect();
        // By the hash alone 15; of those one in 16 draws the busy shard twice and stays.
        assert!(came[0] <= 5, "{came:?}, retries {:?}", by_shard(|shard| shard.retries));
        let retries = by_shard(|shard| shard.retries);
        assert!(retries[0] > 0 && retries[1..].iter().all(|retries| *retries == 0), "{retries:?}");
    });
}
