//! From runs to rows: medians, spread, ratios; near, far and disturbed runs told apart.

use serde::Serialize;
use stoq_measure::latency::LatencyUs;
use stoq_measure::outcome::Outcome;

use super::steal;
use super::workload::Unit;

/// What became of a run.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// It was measured.
    Done(Box<Outcome>),
    /// The stack cannot do this: why.
    Unsupported(String),
    /// It went wrong: how.
    Failed(String),
}

/// A run.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// The workload's name in tables.
    pub workload: String,
    /// What of it is compared.
    pub unit: Unit,
    /// The stack's name in tables.
    pub stack: String,
    /// Whether it is STOQ.
    pub is_stoq: bool,
    /// The round, from 1.
    pub round: u32,
    /// Core-to-core latency before and after, ns; `None`: others held a core all the time.
    pub probe_ns: [Option<f64>; 2],
    /// Whether the cores were near each other before and after.
    pub near: bool,
    /// The largest share of the run that one of its cores was taken away for; `None`: not known.
    pub stolen_share: Option<f64>,
    /// How it ended.
    pub ending: Ending,
}

impl Record {
    /// Whether its cores were taken away for longer than a measurement bears.
    #[must_use]
    pub fn is_disturbed(&self) -> bool {
        steal::is_disturbed(self.stolen_share)
    }

    /// The higher, the sooner it counts: near before far, both before disturbed.
    fn rank(&self) -> u8 {
        match (self.is_disturbed(), self.near) {
            (false, true) => 2,
            (false, false) => 1,
            (true, _) => 0,
        }
    }
}

/// Median and extremes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

/// A stack's runs of a workload.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The workload.
    pub workload: String,
    /// What of it is compared.
    pub unit: Unit,
    /// The stack.
    pub stack: String,
    /// Whether it is STOQ.
    pub is_stoq: bool,
    /// Runs that count.
    pub runs: usize,
    /// Whether they are near runs; else there were none, and the far ones count.
    pub near: bool,
    /// Measured runs that were set aside because a core was taken away.
    pub disturbed: usize,
    /// Whether every measured run was disturbed, so that those count.
    pub all_disturbed: bool,
    /// Values in the row's unit; `None` when no run was measured.
    pub rate: Option<Spread>,
    /// CPU seconds of both ends for each 10⁹ bytes.
    pub cpu_s_per_gb: Option<f64>,
    /// Share of a core that the server took, 0 to 1 for each core that it had.
    pub server_cpu_share: Option<f64>,
    /// Medians of the latency quantiles, µs.
    pub latency_us: Option<LatencyUs>,
    /// Medians of further quantiles: quantile and µs.
    pub latency_curve_us: Vec<(f64, f64)>,
    /// Median of the largest UDP payload used.
    pub udp_payload: Option<f64>,
    /// How many times better the best STOQ row is than this one: above 1, STOQ is ahead.
    pub stoq_is: Option<f64>,
    /// Runs that failed, and what the last one said; or why the stack cannot do this.
    pub note: Option<String>,
}

/// Median and extremes of the values; `None` without any.
#[must_use]
pub fn spread(values: &[f64]) -> Option<Spread> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    };
    Some(Spread { median, min, max })
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    spread(&values.collect::<Vec<_>>()).map(|spread| spread.median)
}

/// One row for each workload and stack, in the order of their first runs.
#[must_use]
pub fn rows(records: &[Record]) -> Vec<Row> {
    let mut keys: Vec<(&str, &str)> = Vec::new();
    for record in records {
        let key = (record.workload.as_str(), record.stack.as_str());
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    // A workload's rows stand together.
    let mut workloads: Vec<&str> = keys.iter().map(|key| key.0).collect();
    workloads.dedup();
    keys.sort_by_key(|key| workloads.iter().position(|name| *name == key.0));
    let mut rows: Vec<Row> = keys
        .iter()
        .map(|(workload, stack)| {
            let of_row = |record: &&Record| record.workload == *workload && record.stack == *stack;
            row(&records.iter().filter(of_row).collect::<Vec<_>>())
        })
        .collect();
    for index in 0..rows.len() {
        let (unit, workload) = (rows[index].unit, &rows[index].workload);
        let stoq = rows.iter().filter(|row| row.is_stoq && row.workload == *workload);
        let best = unit.best(stoq.filter_map(|row| row.rate.map(|rate| rate.median)));
        rows[index].stoq_is = best.zip(rows[index].rate).map(|(best, rate)| {
            if unit.more_is_better() { best / rate.median } else { rate.median / best }
        });
    }
    rows
}

/// The row of at least one record of the same workload and stack.
fn row(records: &[&Record]) -> Row {
    let done: Vec<(&Outcome, u8)> = records
        .iter()
        .filter_map(|record| match &record.ending {
            Ending::Done(outcome) => Some((outcome.as_ref(), record.rank())),
            _ => None,
        })
        .collect();
    let best = done.iter().map(|(_, rank)| *rank).max();
    let counted: Vec<&Outcome> =
        done.iter().filter(|(_, rank)| Some(*rank) == best).map(|(outcome, _)| *outcome).collect();
    let disturbed = done.iter().filter(|(_, rank)| *rank == 0).count();
    let all_disturbed = best == Some(0);
    let unit = records[0].unit;
    let server_share = |outcome: &&Outcome| {
        let server = outcome.server?;
        Some((server.cpu_user_s + server.cpu_sys_s) / outcome.seconds)
    };
    let latency = |quantile: fn(&LatencyUs) -> f64| {
        median(counted.iter().filter_map(|outcome| outcome.latency_us.as_ref().map(quantile)))
    };
    let latency_us = (|| {
        let (p50, p99, p999) =
            (latency(|us| us.p50)?, latency(|us| us.p99)?, latency(|us| us.p999)?);
        Some(LatencyUs { p50, p99, p999 })
    })();
    Row {
        workload: records[0].workload.clone(),
        unit,
        stack: records[0].stack.clone(),
        is_stoq: records[0].is_stoq,
        runs: counted.len(),
        near: best == Some(2),
        disturbed: if all_disturbed { 0 } else { disturbed },
        all_disturbed,
        rate: spread(&counted.iter().filter_map(|outcome| unit.of(outcome)).collect::<Vec<_>>()),
        cpu_s_per_gb: median(counted.iter().filter_map(|outcome| outcome.cpu_s_per_gb())),
        server_cpu_share: median(counted.iter().filter_map(server_share)),
        latency_us,
        latency_curve_us: curve(&counted),
        udp_payload: median(
            counted.iter().filter_map(|outcome| outcome.udp_payload.map(|bytes| bytes as f64)),
        ),
        stoq_is: None,
        note: note(records),
    }
}

/// The medians, quantile by quantile, of those that every run tells.
fn curve(outcomes: &[&Outcome]) -> Vec<(f64, f64)> {
    let Some(first) = outcomes.first() else { return Vec::new() };
    let point = |at: f64| {
        let values = outcomes.iter().filter_map(|outcome| {
            let found = outcome.latency_curve_us.iter().find(|(quantile, _)| *quantile == at);
            found.map(|(_, us)| *us)
        });
        let values: Vec<f64> = values.collect();
        let all = values.len() == outcomes.len();
        spread(&values).filter(|_| all).map(|spread| (at, spread.median))
    };
    first.latency_curve_us.iter().filter_map(|(quantile, _)| point(*quantile)).collect()
}

fn note(records: &[&Record]) -> Option<String> {
    let failures: Vec<&String> = records
        .iter()
        .filter_map(|record| match &record.ending {
            Ending::Failed(text) => Some(text),
            _ => None,
        })
        .collect();
    if let Some(last) = failures.last() {
        return Some(format!("{} of {} failed: {last}", failures.len(), records.len()));
    }
    records.iter().find_map(|record| match &record.ending {
        Ending::Unsupported(why) => Some(format!("cannot: {why}")),
        _ => None,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use serde_json::json;

    pub fn record(stack: &str, round: u32, bps: f64, near: bool) -> Record {
        Record {
            workload: "download".into(),
            unit: Unit::GoodputBps,
            stack: stack.into(),
            is_stoq: stack.starts_with("stoq"),
            round,
            probe_ns: [Some(40.0), Some(41.0)],
            near,
            stolen_share: Some(0.0),
            ending: Ending::Done(serde_json::from_value(outcome_json(bps)).expect("an outcome")),
        }
    }

    /// What a client tells: 4 GB in 1 s, 2 s of CPU time at each end.
    pub fn outcome_json(bps: f64) -> serde_json::Value {
        let end = json!({
            "cpu_user_s": 1.0, "cpu_sys_s": 1.0, "cpu_s_per_gb": 0.5, "rss_bytes": 1000,
        });
        json!({
            "event": "done", "workload": "download", "stack": "x", "link": "lo", "mtu": 65536,
            "udp_payload": 1452, "seconds": 1.0, "bytes": 4_000_000_000u64, "goodput_bps": bps,
            "ops": 0, "ops_per_s": 0.0, "latency_us": {"p50": 1.0, "p99": 2.0, "p999": 3.0},
            "latency_curve_us": [[0.5, 1.0], [0.99, 2.0], [0.999, bps / 1e9]],
            "packets_lost": null, "client": end, "server": end,
        })
    }

    /// A run of `idle` whose server holds so many bytes for each connection.
    pub fn idle_record(stack: &str, bytes: u64) -> Record {
        let mut outcome = outcome_json(0.0);
        outcome["server_rss_bytes_per_connection"] = bytes.into();
        Record {
            workload: "idle".into(),
            unit: Unit::BytesPerConnection,
            ending: Ending::Done(serde_json::from_value(outcome).expect("an outcome")),
            ..record(stack, 1, 0.0, true)
        }
    }

    #[test]
    fn less_memory_is_better() {
        let records = [
            idle_record("stoq io_uring", 30_000),
            idle_record("stoq socket", 20_000),
            idle_record("quinn", 60_000),
        ];
        let rows = rows(&records);
        let ratios: Vec<_> = rows.iter().map(|row| row.stoq_is.expect("measured")).collect();
        assert_eq!(ratios, [1.5, 1.0, 3.0]);
        assert_eq!(rows[2].server_cpu_share, Some(2.0));
    }

    #[test]
    fn medians_and_extremes() {
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[5.0]), Some(Spread { median: 5.0, min: 5.0, max: 5.0 }));
        let even = spread(&[4.0, 1.0, 3.0, 2.0]).expect("values");
        assert_eq!((even.median, even.min, even.max), (2.5, 1.0, 4.0));
    }

    #[test]
    fn curves_are_medians_of_what_all_runs_tell() {
        let mut short = record("quinn", 2, 7e9, true);
        if let Ending::Done(outcome) = &mut short.ending {
            outcome.latency_curve_us.truncate(2);
            outcome.latency_curve_us[1].1 = 4.0;
        }
        let rows = rows(&[record("quinn", 1, 5e9, true), short]);
        assert_eq!(rows[0].latency_curve_us, [(0.5, 1.0), (0.99, 3.0)]);
    }

    #[test]
    fn ratios_are_to_the_best_datapath() {
        let records = [
            record("stoq io_uring", 1, 8e9, true),
            record("stoq socket", 1, 10e9, true),
            record("quinn", 1, 5e9, true),
        ];
        let rows = rows(&records);
        let ratios: Vec<_> = rows.iter().map(|row| row.stoq_is.expect("measured")).collect();
        assert_eq!(ratios, [1.25, 1.0, 2.0]);
        // 0.5 s at each end.
        assert_eq!(rows[2].cpu_s_per_gb, Some(1.0));
    }

    #[test]
    fn far_runs_count_only_where_there_are_no_near_ones() {
        let records = [
            record("stoq socket", 1, 10e9, true),
            record("stoq socket", 2, 4e9, false),
            record("quinn", 1, 2e9, false),
        ];
        let rows = rows(&records);
        assert_eq!((rows[0].runs, rows[0].near), (1, true));
        assert_eq!(rows[0].rate.expect("measured").median, 10e9);
        assert_eq!((rows[1].runs, rows[1].near), (1, false));
    }

    #[test]
    fn disturbed_runs_count_only_where_there_are_no_others() {
        let stolen =
            |round, bps| Record { stolen_share: Some(0.4), ..record("quinn", round, bps, true) };
        let rows_of = |records: &[Record]| rows(records).remove(0);
        let row = rows_of(&[stolen(1, 1e6), record("quinn", 2, 5e9, false), stolen(3, 2e6)]);
        assert_eq!((row.runs, row.near, row.disturbed, row.all_disturbed), (1, false, 2, false));
        assert_eq!(row.rate.expect("measured").median, 5e9);
        let row = rows_of(&[stolen(1, 1e6), stolen(2, 3e6)]);
        assert_eq!((row.runs, row.near, row.disturbed, row.all_disturbed), (2, false, 0, true));
        assert_eq!(row.rate.expect("measured").median, 2e6);
    }

    #[test]
    fn failures_are_told_and_do_not_count() {
        let mut failed = record("quinn", 2, 0.0, true);
        failed.ending = Ending::Failed("it broke".into());
        let rows = rows(&[record("quinn", 1, 5e9, true), failed.clone()]);
        assert_eq!(rows[0].rate.expect("measured").median, 5e9);
        assert_eq!(rows[0].note.as_deref(), Some("1 of 2 failed: it broke"));
        assert_eq!(rows[0].stoq_is, None, "there is no STOQ to compare with");
        failed.ending = Ending::Unsupported("no datagrams".into());
        let rows = super::rows(&[failed]);
        assert_eq!((rows[0].rate, rows[0].note.as_deref()), (None, Some("cannot: no datagrams")));
    }

    #[test]
    fn rows_of_a_workload_stand_together() {
        let mut other = record("quinn", 1, 1e9, true);
        other.workload = "upload".into();
        let records = [record("a", 1, 1e9, true), other, record("b", 1, 1e9, true)];
        let names: Vec<_> = rows(&records).into_iter().map(|row| row.workload).collect();
        assert_eq!(names, ["download", "download", "upload"]);
    }
}
