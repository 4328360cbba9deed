//! Unreliable datagrams (RFC 9221): how many arrive, and how long one takes there and back.
//!
//! Delivered is what the server says it has received: every [`ECHO_EVERY`]th datagram asks for an
//! echo with the server's count. Latency is from the intended start of such a datagram to its echo.
//!
//! [`ECHO_EVERY`]: wire::ECHO_EVERY

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args as ClapArgs;
use stoq::app::{ConnId, ShardCx};
use stoq::error::SendDatagramError;
use stoq_measure::{pace::Pace, wire};

use super::run::{self, Base, Plan, RunArgs, Work};

/// Looks again whether something is due, or fits.
const LOOK_AGAIN: u64 = 1;
/// How long path MTU discovery may take until a datagram fits.
const FIT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often to look meanwhile.
const FIT_INTERVAL: Duration = Duration::from_millis(5);
/// Datagrams queued in one call, so that the turn goes on to send them.
const BATCH: usize = 256;

/// Flags of the datagrams workload.
#[derive(ClapArgs)]
pub struct Args {
    /// Connections.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Bytes of a datagram, at least 17.
    #[arg(long, default_value_t = 1200)]
    size: usize,
    /// Datagrams a second on each connection; 0: as fast as they go.
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    #[command(flatten)]
    run: RunArgs,
}

/// A connection's datagrams.
struct Source {
    connected: Instant,
    pace: Pace,
    sent: u64,
    delivered: u64,
    /// Wakes up by itself: a timer, or the queue's room.
    has_timer: bool,
}

struct Datagrams {
    size: usize,
    /// A datagram that asks for no echo: the same bytes each time.
    plain: Bytes,
    rate: f64,
    epoch: Instant,
    sources: HashMap<ConnId, Source>,
}

impl Datagrams {
    fn send(&mut self, cx: &mut ShardCx<'_>, base: &Base, conn: ConnId) {
        let Some(source) = self.sources.get_mut(&conn) else { return };
        if base.is_stopping() {
            return;
        }
        let now = Instant::now();
        if cx.max_datagram_size(conn).is_none_or(|fits| fits < self.size) {
            if source.connected.elapsed() > FIT_TIMEOUT {
                return base.fail(format!("datagrams of {} bytes do not fit", self.size));
            }
            return source.look_again(cx, now + FIT_INTERVAL);
        }
        for _ in 0..BATCH {
            if let Some(due) = source.pace.next_at()
                && due > now
            {
                return source.look_again(cx, due.max(now + run::TIMER_MIN));
            }
            let intended = source.pace.next_at().unwrap_or(now);
            let wants_echo = source.sent.is_multiple_of(wire::ECHO_EVERY);
            let datagram = if wants_echo {
                let time_ns = (intended - self.epoch).as_nanos() as u64;
                Bytes::from(wire::asking_datagram(self.size, time_ns))
            } else {
                self.plain.clone()
            };
            match cx.send_datagram(conn, datagram) {
                Ok(()) => {
                    source.sent += 1;
                    source.pace.take(now);
                }
                // `handle_datagrams_unblocked` follows.
                Err(SendDatagramError::Full) => return,
                Err(error) => return base.fail(error.to_string()),
            }
        }
        source.look_again(cx, now);
    }
}

impl Source {
    fn look_again(&mut self, cx: &mut ShardCx<'_>, at: Instant) {
        if !std::mem::replace(&mut self.has_timer, true) {
            cx.set_timer(at, LOOK_AGAIN);
        }
    }
}

impl Work for Datagrams {
    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId) {
        let now = Instant::now();
        let pace = Pace::new(now, self.rate);
        let source = Source { connected: now, pace, sent: 0, delivered: 0, has_timer: false };
        self.sources.insert(conn, source);
        self.send(cx, base, conn);
    }

    fn handle_begin(&mut self, _: &mut ShardCx<'_>, _: &mut Base) {
        let now = Instant::now();
        for source in self.sources.values_mut() {
            source.pace = Pace::new(now, self.rate);
        }
    }

    fn handle_datagrams(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId) {
        let Some(source) = self.sources.get_mut(&conn) else { return };
        while let Some(echo) = cx.recv_datagram(conn) {
            let Some((_, time_ns, delivered)) = wire::read_head(&echo) else { continue };
            let more = delivered.saturating_sub(source.delivered);
            source.delivered += more;
            base.add_ops(more);
            base.add_bytes(more * self.size as u64);
            let intended = self.epoch + Duration::from_nanos(time_ns);
            base.add_latency(intended.elapsed());
        }
    }

    fn handle_datagrams_unblocked(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, conn: ConnId) {
        self.send(cx, base, conn);
    }

    fn handle_timer(&mut self, cx: &mut ShardCx<'_>, base: &mut Base, _token: u64) {
        let due: Vec<ConnId> = self
            .sources
            .iter_mut()
            .filter_map(|(conn, source)| std::mem::take(&mut source.has_timer).then_some(*conn))
            .collect();
        for conn in due {
            self.send(cx, base, conn);
        }
    }
}

/// Runs the workload and reports.
pub fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.size >= wire::DATAGRAM_HEAD_BYTES,
        "--size: a datagram has at least {} bytes",
        wire::DATAGRAM_HEAD_BYTES
    );
    let plain =
        wire::plain_datagram(args.size).context("--size: UDP carries at most 65535 bytes")?;
    let plan = Plan {
        workload: "datagrams",
        connections: args.connections,
        crypto: run::plain_crypto(&args.run)?,
    };
    let (size, rate, epoch) = (args.size, args.rate, Instant::now());
    let make = move |_shard| Datagrams {
        size,
        plain: Bytes::from_static(plain),
        rate,
        epoch,
        sources: HashMap::new(),
    };
    run::run(&args.run, plan, make, |_counts| {})
}
