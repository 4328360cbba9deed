//! One run after another: processes started, their reports read, probes and watch around each.

use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use stoq_measure::outcome::{EndUse, Outcome};

use super::field::{Field, LinkKind, Way};
use super::program::Program;
use super::stack::{Place, Stack};
use super::steal::Watch;
use super::summary::{Ending, Record};
use super::workload::{Sides, Task, What};
use super::{Args, Comparison, probe, tell};
use crate::{interrupt, output};

/// How long a server may take to listen.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a client may take beyond its measurement.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of IPv6 and UDP headers in a packet.
const HEADER_BYTES: u32 = 48;

/// A server, where one is ours, and its client.
struct Ends {
    // Dropped in this order: the link ends last.
    client: Program,
    server: Option<Program>,
    _field: Field,
}

impl Comparison {
    pub(super) fn measure(&mut self, args: &Args) -> anyhow::Result<Vec<Record>> {
        let mut records = Vec::new();
        let total = args.rounds as usize * self.tasks.len() * self.stacks.len();
        for round in 1..=args.rounds {
            for task in self.tasks.clone() {
                for stack in self.stacks.clone() {
                    let record = self.record(args, round, &task, &stack)?;
                    if args.json {
                        output::json_line(&json!({"event": "run", "run": record}))?;
                    }
                    records.push(record);
                    let last = records.last().expect("just pushed");
                    tell(last, records.len(), total);
                }
            }
        }
        Ok(records)
    }

    /// One run between two probes. Its failure is a finding, a signal ends everything.
    fn record(
        &mut self,
        args: &Args,
        round: u32,
        task: &Task,
        stack: &Stack,
    ) -> anyhow::Result<Record> {
        interrupt::check()?;
        let blank = Record {
            workload: task.name.to_owned(),
            unit: task.unit(),
            stack: stack.name.clone(),
            is_stoq: stack.is_stoq(),
            round,
            probe_ns: [None; 2],
            near: false,
            stolen_share: None,
            ending: Ending::Unsupported(String::new()),
        };
        if let Some(why) = stack.refuses(task) {
            return Ok(Record { ending: Ending::Unsupported(why.to_owned()), ..blank });
        }
        let pairs = self.cores[..task.sides.pairs()].to_vec();
        let before = probe::farthest_ns(&pairs)?;
        let watch = Watch::start(pairs.iter().flatten().copied().collect());
        let ending = match self.once(args, task, stack) {
            Ok(ending) => ending,
            Err(error) => {
                interrupt::check()?;
                Ending::Failed(format!("{error:#}"))
            }
        };
        let stolen_share = watch.stolen_share();
        let after = probe::farthest_ns(&pairs)?;
        Ok(Record {
            probe_ns: [before, after],
            near: [before, after].iter().all(|ns| ns.is_some_and(|ns| ns < args.near_ns)),
            stolen_share,
            ending,
            ..blank
        })
    }

    fn once(&mut self, args: &Args, task: &Task, stack: &Stack) -> anyhow::Result<Ending> {
        let is_remote = matches!(self.link, LinkKind::Nic { .. });
        anyhow::ensure!(
            !is_remote || (task.what != What::Raw && task.sides == Sides::One),
            "{} needs a server that is started for it: not with --link {}",
            task.name,
            self.link.name()
        );
        // The servers first: clients that run at the same time start at the same time.
        let mut waiting = Vec::new();
        for (index, (clients, servers)) in ends(&self.cores, task.sides).into_iter().enumerate() {
            waiting.push((self.serve(args, task, stack, servers, index)?, clients));
        }
        let mut running = Vec::new();
        for ((field, server), cores) in waiting {
            let place = self.place(args, cores, field.interfaces()[0].clone());
            let pid = server.as_ref().map(Program::id);
            let command = stack.client(task, field.server_addr(), pid, &place)?;
            let command = field.client_side(command);
            let client = Program::start(command, format!("{} client", stack.name))?;
            running.push(Ends { client, server, _field: field });
        }
        let mut outcomes = Vec::new();
        for ends in &mut running {
            match ends.finish(task)? {
                Ending::Done(outcome) => outcomes.push(*outcome),
                other => return Ok(other),
            }
        }
        let outcome = outcomes.into_iter().reduce(together).context("nothing was run")?;
        Ok(Ending::Done(Box::new(outcome)))
    }

    fn place(&self, args: &Args, cores: Vec<usize>, interface: Option<String>) -> Place {
        let udp_payload = u16::try_from(args.mtu.saturating_sub(HEADER_BYTES)).unwrap_or(0);
        Place { cores, interface, udp_payload }
    }

    /// The link of the `index`th pair of ends, and its server, listening, unless it is elsewhere.
    fn serve(
        &mut self,
        args: &Args,
        task: &Task,
        stack: &Stack,
        cores: Vec<usize>,
        index: usize,
    ) -> anyhow::Result<(Field, Option<Program>)> {
        let way = Way {
            mtu: args.mtu,
            queues: cores.len() as u32,
            per_packet: stack.is_af_xdp(),
            wire: args.wire,
        };
        let field = Field::open(&self.link, &way, index)?;
        if matches!(self.link, LinkKind::Nic { .. }) {
            return Ok((field, None));
        }
        let place = self.place(args, cores, field.interfaces()[1].clone());
        let command = field.server_side(stack.server(task, field.server_addr(), &place)?);
        let server = self.listening(command, task, stack)?;
        Ok((field, Some(server)))
    }

    /// Starts a server, waits until it listens, keeps what it says about itself.
    fn listening(
        &mut self,
        command: Command,
        task: &Task,
        stack: &Stack,
    ) -> anyhow::Result<Program> {
        let mut server = Program::start(command, format!("{} server", stack.name))?;
        let told = server.event(&["listening"], LISTEN_TIMEOUT)?;
        if task.what == What::Raw {
            return Ok(server);
        }
        let settings = told["settings"].as_str().map_or_else(
            || {
                let word = |key: &str| told[key].as_str().unwrap_or("").to_owned();
                format!(
                    "defaults (BBRv2, windows of 16 MiB); {} ({})",
                    word("datapath"),
                    word("mode")
                )
            },
            str::to_owned,
        );
        self.settings.insert(stack.name.clone(), settings);
        Ok(server)
    }
}

impl Ends {
    /// What the client reports, once it has; then both processes end.
    fn finish(&mut self, task: &Task) -> anyhow::Result<Ending> {
        let limit = CLIENT_TIMEOUT + Duration::from_secs_f64(task.seconds + task.warm_up);
        let told = self.client.event(&["done", "unsupported"], limit)?;
        if told["event"] == "unsupported" {
            return Ok(Ending::Unsupported(told["why"].as_str().unwrap_or("").to_owned()));
        }
        let mut outcome = outcome(told)?;
        if let (What::Raw, Some(receiver)) = (task.what, &mut self.server) {
            let told = receiver.event(&["done"], LISTEN_TIMEOUT)?;
            outcome = carried(&outcome, told)?;
        }
        self.client.stop()?;
        if let Some(server) = &mut self.server {
            server.stop()?;
        }
        Ok(Ending::Done(Box::new(outcome)))
    }
}

fn outcome(told: Value) -> anyhow::Result<Outcome> {
    serde_json::from_value(told).context("a program's report")
}

/// The cores of the clients and the servers that run at the same time.
fn ends(cores: &[[usize; 2]], sides: Sides) -> Vec<(Vec<usize>, Vec<usize>)> {
    match (sides, cores) {
        (Sides::Two, [first, second, ..]) => {
            vec![(vec![first[0], second[0]], vec![first[1], second[1]])]
        }
        (Sides::TwiceOne, [first, second, ..]) => {
            [first, second].map(|pair| (vec![pair[0]], vec![pair[1]])).into()
        }
        _ => cores.iter().take(1).map(|pair| (vec![pair[0]], vec![pair[1]])).collect(),
    }
}

/// Of `raw`: what the receiver received is what the path carried.
fn carried(sent: &Outcome, received: Value) -> anyhow::Result<Outcome> {
    let received = outcome(received)?;
    let gigabytes = received.bytes as f64 / 1e9;
    let per_gb = |end: EndUse| EndUse {
        cpu_s_per_gb: (received.bytes > 0).then(|| (end.cpu_user_s + end.cpu_sys_s) / gigabytes),
        ..end
    };
    Ok(Outcome {
        packets_lost: Some(sent.ops.saturating_sub(received.ops)),
        link: sent.link.clone(),
        mtu: sent.mtu,
        client: per_gb(sent.client),
        server: Some(per_gb(received.client)),
        ..received
    })
}

/// Two runs at the same time as one: sums. Latencies have no sum and are left out.
fn together(a: Outcome, b: Outcome) -> Outcome {
    let bytes = a.bytes + b.bytes;
    let end = |a: EndUse, b: EndUse| {
        let (cpu_user_s, cpu_sys_s) = (a.cpu_user_s + b.cpu_user_s, a.cpu_sys_s + b.cpu_sys_s);
        let cpu_s_per_gb = (bytes > 0).then(|| (cpu_user_s + cpu_sys_s) * 1e9 / bytes as f64);
        EndUse { cpu_user_s, cpu_sys_s, cpu_s_per_gb, rss_bytes: a.rss_bytes + b.rss_bytes }
    };
    Outcome {
        seconds: a.seconds.max(b.seconds),
        bytes,
        goodput_bps: a.goodput_bps + b.goodput_bps,
        ops: a.ops + b.ops,
        ops_per_s: a.ops_per_s + b.ops_per_s,
        latency_us: None,
        latency_curve_us: Vec::new(),
        packets_lost: a.packets_lost.zip(b.packets_lost).map(|(a, b)| a + b),
        client: end(a.client, b.client),
        server: a.server.zip(b.server).map(|(a, b)| end(a, b)),
        ..a
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::tests::outcome_json;
    use super::*;

    #[test]
    fn two_at_a_time_add_up() {
        let one = || outcome(outcome_json(8e9)).expect("an outcome");
        let both = together(one(), Outcome { seconds: 1.5, packets_lost: Some(3), ..one() });
        assert_eq!((both.goodput_bps, both.bytes, both.seconds), (16e9, 8_000_000_000, 1.5));
        // 2 s for 4 GB at each of four ends.
        assert_eq!(both.cpu_s_per_gb(), Some(1.0));
        assert_eq!((both.packets_lost, both.latency_us), (None, None));
    }

    #[test]
    fn raw_is_what_was_received() {
        let sent = Outcome { ops: 10, ..outcome(outcome_json(9e9)).expect("an outcome") };
        let mut received = outcome_json(6e9);
        (received["ops"], received["bytes"]) = (7.into(), 2_000_000_000u64.into());
        let carried = carried(&sent, received).expect("an outcome");
        assert_eq!((carried.goodput_bps, carried.packets_lost), (6e9, Some(3)));
        // 2 s at each end for 2 GB.
        assert_eq!(carried.cpu_s_per_gb(), Some(2.0));
    }

    #[test]
    fn cores_of_each_end() {
        let cores = [[3, 2], [1, 0]];
        assert_eq!(ends(&cores, Sides::One), [(vec![3], vec![2])]);
        assert_eq!(ends(&cores, Sides::Two), [(vec![3, 1], vec![2, 0])]);
        assert_eq!(ends(&cores, Sides::TwiceOne), [(vec![3], vec![2]), (vec![1], vec![0])]);
    }
}
