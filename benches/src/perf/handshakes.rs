//! Handshakes: connect, close, again; full ones, or resumed ones with a ticket each.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use clap::Args as ClapArgs;
use quinn_proto::crypto::rustls::QuicClientConfig;
use rustls::client::Resumption;
use stoq::app::{ConnId, ReadOutcome, ShardCx};
use stoq::{Dir, StreamId, VarInt};
use stoq_measure::sessions::CountingSessions;

use super::run::{self, Base, Plan, RunArgs, Work};
use crate::tls;

/// Flags of the handshakes workload.
#[derive(ClapArgs)]
pub struct Args {
    /// Handshakes under way.
    #[arg(long, default_value_t = 16)]
    outstanding: usize,
    /// Resume with a ticket of an earlier connection instead of a full handshake. Each connection
    /// then makes one empty request before it closes, so that its tickets have arrived.
    #[arg(long)]
    resumed: bool,
    #[command(flatten)]
    run: RunArgs,
}

struct Handshakes {
    resumed: bool,
    started: HashMap<ConnId, Instant>,
    /// Closed by us: not a failure.
    closing: u64,
}

impl Handshakes {
    fn again(&mut self, cx: &mut ShardCx<'_>, base: &mut Base) {
        if base.is_stopping() {
            return;
        }
        let now = Instant::now();
        if let Some(conn) = base.connect(cx) {
            self.started.insert(conn, now);
        }
    }

    fn done(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId) {
        self.closing += 1;
        cx.close(conn, VarInt::from_u32(0), Bytes::new());
        self.again(cx, base);
    }
}

impl Work for Handshakes {
    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId) {
        // The runner's own first connections have no start here and are not counted.
        if let Some(start) = self.started.remove(&conn) {
            base.add_op(start.elapsed());
        }
        if !self.resumed {
            return self.done(cx, base, conn);
        }
        let Some(stream) = cx.open(conn, Dir::Bi) else {
            return base.fail("the server allows no streams".into());
        };
        cx.write(conn, stream, &mut [Bytes::from_static(&[0; 8])]);
        cx.finish(conn, stream);
    }

    fn handle_readable(
        &mut self,
        cx: &mut ShardCx<'_>,
        base: &mut Base,
        conn: ConnId,
        stream: StreamId,
    ) {
        if cx.read(conn, stream, usize::MAX, |_data| {}) == ReadOutcome::Finished {
            self.done(cx, base, conn);
        }
    }

    fn handle_closed(&mut self, _: &mut ShardCx<'_>, _: &mut Base, conn: ConnId) -> bool {
        let expected = self.closing > 0 && !self.started.contains_key(&conn);
        self.closing -= u64::from(expected);
        expected
    }
}

/// Runs the workload and reports.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let tls = tls::client(&args.run.trust, "perf", args.run.transport.packet_crypto()?)?;
    let mut config = (*tls.rustls()).clone();
    let sessions = CountingSessions::shared();
    config.resumption =
        if args.resumed { Resumption::store(sessions.clone()) } else { Resumption::disabled() };
    let plan = Plan {
        workload: if args.resumed { "handshakes-resumed" } else { "handshakes" },
        connections: args.outstanding,
        crypto: Arc::new(QuicClientConfig::try_from(config)?),
    };
    let resumed = args.resumed;
    let make = move |_shard| Handshakes { resumed, started: HashMap::new(), closing: 0 };
    run::run(&args.run, plan, make, move |counts| {
        counts.more.insert("tickets_offered".into(), sessions.offered().into());
    })
}
