//! The rows as text, in Markdown's form, so that they can be put into a document as they are.

use std::fmt::Write as _;

use super::summary::{Row, Spread};
use super::workload::Unit;

/// A rate with its unit.
#[must_use]
pub fn rate(unit: Unit, value: f64) -> String {
    match unit {
        Unit::GoodputBps => format!("{:.2} Gbit/s", value / 1e9),
        Unit::OpsPerS if value >= 1e6 => format!("{:.2} M/s", value / 1e6),
        Unit::OpsPerS if value >= 1e4 => format!("{:.0} k/s", value / 1e3),
        Unit::OpsPerS => format!("{value:.0} /s"),
        Unit::BytesPerConnection => format!("{:.1} kB", value / 1e3),
    }
}

/// Smallest and largest, in the unit of [`rate`].
#[must_use]
pub fn extremes(unit: Unit, spread: Spread) -> String {
    let number = |value: f64| match unit {
        Unit::GoodputBps => format!("{:.2}", value / 1e9),
        Unit::OpsPerS if spread.median >= 1e6 => format!("{:.2}", value / 1e6),
        Unit::OpsPerS if spread.median >= 1e4 => format!("{:.0}", value / 1e3),
        Unit::OpsPerS => format!("{value:.0}"),
        Unit::BytesPerConnection => format!("{:.1}", value / 1e3),
    };
    format!("{} – {}", number(spread.min), number(spread.max))
}

/// A table for each workload.
#[must_use]
pub fn markdown(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut workload = "";
    for row in rows {
        if row.workload != workload {
            workload = &row.workload;
            let head = "| stack | median | min – max | STOQ is | CPU s/GB | p50 / p99 / p99.9 µs | UDP payload | runs |";
            // Writing to a String cannot fail.
            let _infallible =
                writeln!(text, "\n**{workload}**\n\n{head}\n|---|---|---|---|---|---|---|---|");
        }
        let _infallible = writeln!(text, "{}", line(row));
    }
    text
}

/// What the CPU time of a row is told in: seconds a gigabyte of both ends, or, where connections do
/// nothing, the server's share of a core.
#[must_use]
pub fn cpu(row: &Row) -> Option<String> {
    match row.unit {
        Unit::GoodputBps => Some(format!("{:.2}", row.cpu_s_per_gb?)),
        Unit::BytesPerConnection => {
            Some(format!("{:.2} % of a core", 100.0 * row.server_cpu_share?))
        }
        Unit::OpsPerS => None,
    }
}

/// The latency quantiles, µs.
#[must_use]
pub fn latency(row: &Row) -> Option<String> {
    row.latency_us.map(|us| format!("{:.0} / {:.0} / {:.0}", us.p50, us.p99, us.p999))
}

/// What kind of runs a row counts, and how many it does not.
#[must_use]
pub fn kind(row: &Row) -> String {
    let kind = match row {
        Row { runs: 0, .. } => "",
        Row { all_disturbed: true, .. } => " stolen",
        Row { near: true, .. } => "",
        _ => " far",
    };
    match row.disturbed {
        0 => kind.to_owned(),
        disturbed => format!("{kind}, {disturbed} stolen set aside"),
    }
}

fn line(row: &Row) -> String {
    let dash = || "–".to_owned();
    let note = row.note.as_ref().map_or_else(String::new, |note| format!(" {note}"));
    let far = kind(row);
    format!(
        "| {} | {} | {} | {} | {} | {} | {} | {}{far}{note} |",
        row.stack,
        row.rate.map_or_else(dash, |spread| rate(row.unit, spread.median)),
        row.rate.map_or_else(dash, |spread| extremes(row.unit, spread)),
        row.stoq_is.map_or_else(dash, |ratio| format!("{ratio:.2} ×")),
        cpu(row).unwrap_or_else(dash),
        latency(row).unwrap_or_else(dash),
        row.udp_payload.map_or_else(dash, |bytes| format!("{bytes:.0}")),
        row.runs,
    )
}

#[cfg(test)]
mod tests {
    use super::super::summary::{
        rows,
        tests::{idle_record, record},
    };
    use super::*;

    #[test]
    fn a_table_of_two() {
        let records = [
            record("stoq socket", 1, 10e9, true),
            record("stoq socket", 2, 12e9, true),
            record("quinn", 1, 5.5e9, false),
        ];
        let text = markdown(&rows(&records));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "**download**");
        assert_eq!(
            lines[5],
            "| stoq socket | 11.00 Gbit/s | 10.00 – 12.00 | 1.00 × | 1.00 | 1 / 2 / 3 | 1452 | 2 |"
        );
        assert!(lines[6].contains("| 2.00 × |") && lines[6].ends_with("| 1 far |"), "{}", lines[6]);
    }

    #[test]
    fn memory_and_the_idle_servers_share() {
        let text = markdown(&rows(&[idle_record("stoq socket", 20_400)]));
        assert!(text.contains("| 20.4 kB | 20.4 – 20.4 | 1.00 × | 200.00 % of a core |"), "{text}");
    }

    #[test]
    fn stolen_runs_are_told() {
        let mut stolen = record("quinn", 1, 1e6, true);
        stolen.stolen_share = Some(0.5);
        let text = markdown(&rows(&[stolen.clone(), record("quinn", 2, 5e9, true)]));
        assert!(text.trim_end().ends_with("| 1, 1 stolen set aside |"), "{text}");
        assert!(markdown(&rows(&[stolen])).trim_end().ends_with("| 1 stolen |"));
    }

    #[test]
    fn rates_in_their_units() {
        assert_eq!(rate(Unit::OpsPerS, 1.25e6), "1.25 M/s");
        assert_eq!(rate(Unit::OpsPerS, 25_400.0), "25 k/s");
        assert_eq!(rate(Unit::OpsPerS, 999.6), "1000 /s");
        assert_eq!(rate(Unit::GoodputBps, 9.876e9), "9.88 Gbit/s");
    }
}
