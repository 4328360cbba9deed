//! Requests: so many outstanding, each on a stream of its own.

use std::time::Instant;

use bytes::Bytes;
use clap::Args as ClapArgs;
use rustc_hash::FxHashMap;
use stoq::app::{ConnId, ReadOutcome, ShardCx, WriteOutcome};
use stoq::{Dir, StreamId};
use stoq_measure::{pace::Pace, wire};

use super::run::{self, Base, Plan, RunArgs, Work};
use super::server::READ_BYTES_MAX;

/// The timer of the next request at a rate.
const NEXT_REQUEST: u64 = 1;

/// Flags of the requests workload.
#[derive(ClapArgs)]
pub struct Args {
    /// Connections.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Bytes of a request (at least 8) and of its answer.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Requests under way on each connection.
    #[arg(long, default_value_t = 1)]
    outstanding: usize,
    /// Requests a second on each connection; 0: the next one when one is answered.
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    #[command(flatten)]
    run: RunArgs,
}

/// A connection's requests.
struct Client {
    pace: Pace,
    under_way: usize,
}

/// A request that waits for its answer.
struct Waiting {
    /// When it should have started.
    since: Instant,
    /// What is left to write of it.
    left: Bytes,
}

struct Requests {
    request: Bytes,
    outstanding: usize,
    rate: f64,
    clients: FxHashMap<ConnId, Client>,
    waiting: FxHashMap<(ConnId, StreamId), Waiting>,
}

impl Requests {
    /// Starts what is due and has room.
    fn start(&mut self, cx: &mut ShardCx<'_>, base: &Base, conn: ConnId) {
        let Some(client) = self.clients.get_mut(&conn) else { return };
        let now = Instant::now();
        while client.under_way < self.outstanding && !base.is_stopping() {
            // A paced request is taken from the schedule only once it has its stream.
            if client.pace.next_at().is_some_and(|due| due > now) {
                break;
            }
            // `handle_streams_available` follows when there is none.
            let Some(stream) = cx.open(conn, Dir::Bi) else { return };
            let since = client.pace.take(now).expect("it is due");
            client.under_way += 1;
            let mut left = [self.request.clone()];
            cx.write(conn, stream, &mut left);
            let [left] = left;
            if left.is_empty() {
                cx.finish(conn, stream);
            }
            self.waiting.insert((conn, stream), Waiting { since, left });
        }
    }
}

impl Work for Requests {
    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId) {
        let pace = Pace::new(Instant::now(), self.rate);
        self.clients.insert(conn, Client { pace, under_way: 0 });
        self.start(cx, base, conn);
        if self.rate > 0.0 && self.clients.len() == 1 {
            self.handle_timer(cx, base, NEXT_REQUEST);
        }
    }

    fn handle_writable(
        &mut self,
        cx: &mut ShardCx<'_>,
        base: &mut Base,
        conn: ConnId,
        stream: StreamId,
    ) {
        let Some(waiting) = self.waiting.get_mut(&(conn, stream)) else { return };
        if waiting.left.is_empty() {
            return;
        }
        let mut left = [std::mem::take(&mut waiting.left)];
        let outcome = cx.write(conn, stream, &mut left);
        [waiting.left] = left;
        match outcome {
            WriteOutcome::Stopped(_) | WriteOutcome::Unknown => {
                base.fail("the server stopped a request".into());
            }
            _ if waiting.left.is_empty() => {
                cx.finish(conn, stream);
            }
            _ => {}
        }
    }

    fn handle_readable(
        &mut self,
        cx: &mut ShardCx<'_>,
        base: &mut Base,
        conn: ConnId,
        stream: StreamId,
    ) {
        let mut bytes = 0;
        let outcome = loop {
            let outcome = cx.read(conn, stream, READ_BYTES_MAX, |data| bytes += data.len() as u64);
            if outcome != ReadOutcome::MayHaveMore {
                break outcome;
            }
        };
        base.add_bytes(bytes);
        match outcome {
            ReadOutcome::Finished => {
                let Some(waiting) = self.waiting.remove(&(conn, stream)) else { return };
                base.add_op(waiting.since.elapsed());
                base.add_bytes(self.request.len() as u64);
                if let Some(client) = self.clients.get_mut(&conn) {
                    client.under_way -= 1;
                }
                self.start(cx, base, conn);
            }
            ReadOutcome::Reset(code) => base.fail(format!("the server reset a request: {code}")),
            _ => {}
        }
    }

    fn handle_streams_available(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId) {
        self.start(cx, base, conn);
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, _token: u64) {
        let conns: Vec<ConnId> = self.clients.keys().copied().collect();
        for conn in conns {
            self.start(cx, base, conn);
        }
        // A request that is due and has no room starts when an answer arrives.
        let now = Instant::now();
        let next = self.clients.values().filter_map(|client| client.pace.next_at()).min();
        if let (Some(next), false) = (next, base.is_stopping()) {
            cx.set_timer(next.max(now + run::TIMER_MIN), NEXT_REQUEST);
        }
    }
}

/// Runs the workload and reports.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let plan = Plan {
        workload: "requests",
        connections: args.connections,
        crypto: run::plain_crypto(&args.run)?,
    };
    let request = Bytes::from(wire::request(args.size, args.size as u64));
    let (outstanding, rate) = (args.outstanding, args.rate);
    let make = move |_shard| Requests {
        request: request.clone(),
        outstanding,
        rate,
        clients: FxHashMap::default(),
        waiting: FxHashMap::default(),
    };
    run::run(&args.run, plan, make, |_counts| {})
}
