//! Bulk upload, download and both at once, on the shards themselves.

use clap::Args as ClapArgs;
use stoq::app::{ConnId, ReadOutcome, ShardCx};
use stoq::{Dir, StreamId};

use super::run::{self, Base, Plan, RunArgs, Work};
use super::server::{READ_BYTES_MAX, write_filler};

/// What a stream that never ends asks for.
const ENDLESS_BYTES: u64 = u64::MAX >> 2;

/// Flags of bulk workloads.
#[derive(ClapArgs)]
pub struct Args {
    /// Connections.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Streams of each connection.
    #[arg(long, default_value_t = 1)]
    streams: usize,
    #[command(flatten)]
    run: RunArgs,
}

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From here.
    Upload,
    /// To here.
    Download,
    /// Both at once.
    Bidi,
}

impl Direction {
    const fn name(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Download => "download",
            Self::Bidi => "bidi",
        }
    }

    fn sends(self) -> bool {
        self != Self::Download
    }

    fn receives(self) -> bool {
        self != Self::Upload
    }
}

struct Bulk {
    direction: Direction,
    streams: usize,
}

impl Bulk {
    fn send(&self, cx: &mut ShardCx<'_>, base: &Base, conn: ConnId, stream: StreamId) {
        if base.is_stopping() {
            return;
        }
        if let Some(left) = write_filler(cx, conn, stream, ENDLESS_BYTES) {
            base.add_bytes(ENDLESS_BYTES - left);
        }
    }
}

impl Work for Bulk {
    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId) {
        for _ in 0..self.streams {
            let Some(stream) = cx.open(conn, Dir::Bi) else {
                base.fail("the server allows fewer streams".into());
                return;
            };
            let count = if self.direction.receives() { ENDLESS_BYTES } else { 0 };
            cx.write(conn, stream, &mut [bytes::Bytes::copy_from_slice(&count.to_be_bytes())]);
            if self.direction.sends() {
                self.send(cx, base, conn, stream);
            } else {
                cx.finish(conn, stream);
            }
        }
    }

    fn handle_readable(
        &mut self,
        cx: &mut ShardCx<'_>,
        base: &mut Base,
        conn: ConnId,
        stream: StreamId,
    ) {
        loop {
            let mut bytes = 0;
            let outcome = cx.read(conn, stream, READ_BYTES_MAX, |data| bytes += data.len() as u64);
            base.add_bytes(bytes);
            if outcome != ReadOutcome::MayHaveMore {
                return;
            }
        }
    }

    fn handle_writable(
        &mut self,
        cx: &mut ShardCx<'_>,
        base: &mut Base,
        conn: ConnId,
        stream: StreamId,
    ) {
        if self.direction.sends() {
            self.send(cx, base, conn, stream);
        }
    }
}

/// Runs the workload and reports.
pub fn run(args: &Args, direction: Direction) -> anyhow::Result<()> {
    let plan = Plan {
        workload: direction.name(),
        connections: args.connections,
        crypto: run::plain_crypto(&args.run)?,
    };
    let streams = args.streams;
    run::run(&args.run, plan, move |_shard| Bulk { direction, streams }, |_counts| {})
}
