//! The report as one HTML file: tables and inline SVG, nothing to load.

use std::fmt::Write as _;

use super::Report;
use super::goals::{Goal, Mark};
use super::summary::{Row, Spread};
use super::table;
use super::workload::Unit;

/// Width of a plot, pixels.
const WIDTH: f64 = 760.0;
/// Width of the labels beside the bars.
const LABELS: f64 = 140.0;
/// Height of a bar and its gap.
const BAR: f64 = 26.0;
/// Height of a latency plot.
const CURVE_HEIGHT: f64 = 320.0;
/// Colours of curves, told apart by most eyes.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933"];
const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;\
    padding:0 1rem}table{border-collapse:collapse;width:100%;font-size:14px}td,th{border-bottom:\
    1px solid #ccc;padding:.2rem .5rem;text-align:right}td:first-child,th:first-child,td:last-child{text-align:\
    left}td{white-space:nowrap}td:last-child,.goals td{white-space:normal}.goals th{text-align:left}svg{max-width:100%;height:auto}text{font:13px system-ui,sans-serif}.stoq{font-weight:600}\
    .goals td{text-align:left;vertical-align:top}.reached{color:#006b4e}.missed{color:#b04a00;font-weight:\
    600}.not-measured{color:#666}";

/// Text as HTML shows it.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The whole file.
#[must_use]
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    let title = format!("STOQ compared over {}", report.link);
    let head = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{0}</title><style>{STYLE}</style></head><body>\n\
         <h1>{0}</h1>\n<p>{1}.</p>\n<p>{2}</p>\n<p><code>{3}</code></p>\n",
        escape(&title),
        escape(&report.machine.to_string()),
        escape(&report.conditions()),
        escape(&report.command),
    );
    out.push_str(&head);
    let mut workloads: Vec<&str> = report.rows.iter().map(|row| row.workload.as_str()).collect();
    workloads.dedup();
    for workload in workloads {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.workload == workload).collect();
        section(&mut out, workload, &rows);
    }
    out.push_str("<h2>Settings</h2><ul>");
    for (stack, settings) in &report.settings {
        add(&mut out, format_args!("<li><b>{}</b>: {}</li>", escape(stack), escape(settings)));
    }
    for absent in &report.absent {
        add(&mut out, format_args!("<li>{}</li>", escape(absent)));
    }
    out.push_str("</ul>\n");
    if let Some(doctor) = &report.doctor {
        let pretty = serde_json::to_string_pretty(doctor).unwrap_or_else(|error| error.to_string());
        add(&mut out, format_args!("<h2>Doctor</h2><pre>{}</pre>\n", escape(&pretty)));
    }
    goals(&mut out, &report.goals);
    out.push_str("</body></html>\n");
    out
}

fn add(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _infallible = out.write_fmt(text);
}

/// Text whose words between backticks are code.
fn with_code(text: &str) -> String {
    let parts = text.split('`').map(escape).enumerate();
    parts
        .map(|(at, part)| if at % 2 == 1 { format!("<code>{part}</code>") } else { part })
        .collect()
}

/// What is to be reached, row by row.
fn goals(out: &mut String, goals: &[Goal]) {
    out.push_str(
        "<h2>Goals</h2>\n<table class=\"goals\"><tr><th>workload</th><th>STOQ here</th>\
         <th>must reach</th><th>aim</th></tr>\n",
    );
    for goal in goals {
        let marks = |marks: &[Mark]| {
            let cells: Vec<String> = marks
                .iter()
                .map(|mark| {
                    let (class, text) = (mark.verdict.word(), escape(&mark.to_string()));
                    format!("<span class=\"{}\">{text}</span>", class.replace(' ', "-"))
                })
                .collect();
            cells.join("<br>")
        };
        let note = goal
            .note()
            .map_or_else(String::new, |note| format!("<br><small>{}</small>", with_code(&note)));
        add(
            out,
            format_args!(
                "<tr><td>{}</td><td>{}{note}</td><td>{}</td><td>{}</td></tr>\n",
                escape(goal.what),
                escape(goal.measured.as_deref().unwrap_or("–")),
                marks(&goal.must),
                marks(&goal.aim),
            ),
        );
    }
    out.push_str("</table>\n");
}

fn section(out: &mut String, workload: &str, rows: &[&Row]) {
    add(out, format_args!("<h2>{}</h2>\n", escape(workload)));
    let unit = rows[0].unit;
    let rates = |row: &Row| row.rate.map(|rate| rate.median);
    let what = match unit {
        Unit::GoodputBps => "Goodput",
        Unit::OpsPerS => "Operations a second",
        Unit::BytesPerConnection => "Server's memory for each connection (less is better)",
    };
    bars(out, what, rows, rates, |row| row.rate, |value| table::rate(unit, value));
    if unit == Unit::GoodputBps {
        let what = "CPU seconds of both ends per GB (less is better)";
        bars(out, what, rows, |row| row.cpu_s_per_gb, |_| None, |value| format!("{value:.2}"));
    }
    if rows.iter().any(|row| !points(row).is_empty()) {
        curves(out, rows);
    }
    out.push_str(
        "<table><tr><th>stack</th><th>median</th><th>min – max</th><th>STOQ is</th>\
         <th>CPU s/GB</th><th>p50 / p99 / p99.9 µs</th><th>UDP payload</th><th>runs</th><th></th></tr>\n",
    );
    for row in rows {
        let cell = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
        };
        let dash = || "–".to_owned();
        add(
            out,
            format_args!(
                "<tr class=\"{}\"><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>\
                 <td>{}</td><td>{}{}</td><td>{}</td></tr>\n",
                if row.is_stoq { "stoq" } else { "" },
                escape(&row.stack),
                row.rate.map_or_else(dash, |spread| table::rate(unit, spread.median)),
                row.rate.map_or_else(dash, |spread| table::extremes(unit, spread)),
                cell(row.stoq_is, 2),
                table::cpu(row).unwrap_or_else(dash),
                table::latency(row).unwrap_or_else(dash),
                cell(row.udp_payload, 0),
                row.runs,
                table::kind(row),
                escape(row.note.as_deref().unwrap_or_default()),
            ),
        );
    }
    out.push_str("</table>\n");
}

/// A horizontal bar for each row that has a value, and a line from its smallest to its largest run where
/// `spread` tells them.
fn bars(
    out: &mut String,
    what: &str,
    rows: &[&Row],
    value: impl Fn(&Row) -> Option<f64>,
    spread: impl Fn(&Row) -> Option<Spread>,
    label: impl Fn(f64) -> String,
) {
    let values: Vec<(&Row, f64)> =
        rows.iter().filter_map(|row| Some((*row, value(row)?))).collect();
    let ends = values.iter().map(|(row, value)| spread(row).map_or(*value, |spread| spread.max));
    let Some(largest) = ends.max_by(f64::total_cmp) else { return };
    let height = BAR * values.len() as f64 + 8.0;
    add(
        out,
        format_args!(
            "<h3>{}</h3><svg role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {height}\" \
             width=\"{WIDTH}\" height=\"{height}\">\n",
            escape(what),
            escape(what)
        ),
    );
    let room = WIDTH - LABELS - 110.0;
    for (index, (row, value)) in values.iter().enumerate() {
        let y = BAR * index as f64 + 4.0;
        let x = |value: f64| if largest > 0.0 { room * value / largest } else { 0.0 };
        let length = x(*value);
        let whisker = spread(row).filter(|spread| spread.min < spread.max);
        let end = whisker.map_or(length, |spread| x(spread.max));
        add(
            out,
            format_args!(
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text><rect x=\"{LABELS}\" y=\"{y}\" \
                 width=\"{length:.1}\" height=\"{}\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{}\">{}</text>\n",
                LABELS - 8.0,
                y + 14.0,
                escape(&row.stack),
                BAR - 8.0,
                if row.is_stoq { COLOURS[0] } else { "#999" },
                LABELS + end + 6.0,
                y + 14.0,
                escape(&label(*value)),
            ),
        );
        if let Some(spread) = whisker {
            let (from, to, y) =
                (LABELS + x(spread.min), LABELS + x(spread.max), y + (BAR - 8.0) / 2.0);
            add(
                out,
                format_args!(
                    "<path d=\"M{from:.1} {y}H{to:.1}M{from:.1} {0}v8M{to:.1} {0}v8\" stroke=\"#222\" \
                     fill=\"none\"/>\n",
                    y - 4.0
                ),
            );
        }
    }
    out.push_str("</svg>\n");
}

/// What a latency curve is drawn through: its quantiles, or the three that everybody tells.
fn points(row: &Row) -> Vec<(f64, f64)> {
    if !row.latency_curve_us.is_empty() {
        return row.latency_curve_us.clone();
    }
    let three = row.latency_us.map(|us| [(0.5, us.p50), (0.99, us.p99), (0.999, us.p999)]);
    three.map_or_else(Vec::new, Vec::from)
}

/// Latency over quantiles, both axes logarithmic (quantiles by what is slower than they): a line for each
/// row.
fn curves(out: &mut String, rows: &[&Row]) {
    let lines: Vec<(&Row, Vec<(f64, f64)>)> = rows
        .iter()
        .map(|row| (*row, points(row)))
        .filter(|(_, points)| !points.is_empty())
        .collect();
    let tens = |quantile: f64| -(1.0 - quantile).log10();
    let us = || lines.iter().flat_map(|(_, points)| points.iter().map(|point| point.1.max(0.1)));
    let low = us().fold(f64::INFINITY, f64::min).log10().floor();
    let high = us().fold(f64::NEG_INFINITY, f64::max).log10().ceil().max(low + 1.0);
    let quantiles = || lines.iter().flat_map(|(_, points)| points.iter().map(|point| point.0));
    let first = tens(quantiles().fold(1.0, f64::min));
    let last = tens(quantiles().fold(0.0, f64::max)).max(first + 0.1);
    let (left, right, top, bottom) = (70.0, WIDTH - 150.0, 12.0, CURVE_HEIGHT - 30.0);
    let x = |quantile: f64| left + (right - left) * (tens(quantile) - first) / (last - first);
    let y = |us: f64| bottom - (bottom - top) * (us.max(0.1).log10() - low) / (high - low);
    add(
        out,
        format_args!(
            "<h3>Latency, µs (logarithmic)</h3><svg role=\"img\" aria-label=\"latency\" \
             viewBox=\"0 0 {WIDTH} {CURVE_HEIGHT}\" width=\"{WIDTH}\" height=\"{CURVE_HEIGHT}\">\n"
        ),
    );
    for power in low as i32..=high as i32 {
        let us = 10f64.powi(power);
        add(
            out,
            format_args!(
                "<line x1=\"{left}\" x2=\"{right}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{1}\" y=\"{2:.1}\" text-anchor=\"end\">{us}</text>\n",
                y(us),
                left - 8.0,
                y(us) + 4.0,
            ),
        );
    }
    for quantile in [0.5, 0.9, 0.99, 0.999, 0.9999] {
        let at = x(quantile);
        if at < left - 0.5 || at > right + 0.5 {
            continue;
        }
        let name = format!("p{}", (quantile * 1e6).round() / 1e4);
        add(
            out,
            format_args!(
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"#eee\"/>\
                 <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{name}</text>\n",
                CURVE_HEIGHT - 8.0
            ),
        );
    }
    for (index, (row, points)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        // Colours come round again: the second time the line is dashed.
        let dashes = if index < COLOURS.len() { "" } else { " stroke-dasharray=\"6 3\"" };
        let width = if row.is_stoq { 3.5 } else { 1.5 };
        let path: Vec<String> =
            points.iter().map(|(at, us)| format!("{:.1},{:.1}", x(*at), y(*us))).collect();
        let key = top + 16.0 * index as f64 + 8.0;
        add(
            out,
            format_args!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"{dashes}/>\
                 <line x1=\"{}\" x2=\"{}\" y1=\"{3}\" y2=\"{3}\" stroke=\"{colour}\" \
                 stroke-width=\"{width}\"{dashes}/><text x=\"{4}\" y=\"{key}\">{5}</text>\n",
                path.join(" "),
                right + 12.0,
                right + 28.0,
                key - 4.0,
                right + 34.0,
                escape(&row.stack),
            ),
        );
    }
    out.push_str("</svg>\n");
}

#[cfg(test)]
mod tests {
    use super::super::summary::{rows, tests::record};
    use super::super::tests::report;
    use super::*;

    #[test]
    fn one_file_that_loads_nothing_and_names_its_machine() {
        let records = [record("stoq socket", 1, 10e9, true), record("a<b", 1, 5e9, true)];
        let page = page(&report(rows(&records)));
        assert!(page.contains("<svg") && page.contains("<polyline"), "{page}");
        assert!(page.contains("Linux") && page.contains("10.00 Gbit/s"), "{page}");
        assert!(page.contains("a&lt;b") && !page.contains("a<b"), "{page}");
        assert!(
            page.contains("<h2>Goals</h2>") && page.contains("class=\"not-measured\""),
            "{page}"
        );
        for outside in ["http:", "https:", "src=", "@import", "<script", "<link"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    }

    #[test]
    fn a_spread_is_a_line_across_its_bar() {
        let one = rows(&[record("quinn", 1, 5e9, true)]);
        let two = rows(&[record("quinn", 1, 4e9, true), record("quinn", 2, 8e9, true)]);
        let draw = |rows: &[Row]| {
            let mut out = String::new();
            let rate = |row: &Row| row.rate.map(|rate| rate.median);
            let rows: Vec<&Row> = rows.iter().collect();
            bars(&mut out, "x", &rows, rate, |row| row.rate, |value| value.to_string());
            out
        };
        assert!(!draw(&one).contains("<path"));
        // 4 to 8 of a scale that ends at 8.
        assert!(draw(&two).contains("M395.0 ") && draw(&two).contains("H650.0"), "{}", draw(&two));
    }

    #[test]
    fn longer_bars_are_larger_values() {
        let records = [record("stoq socket", 1, 10e9, true), record("quinn", 1, 5e9, true)];
        let rows = rows(&records);
        let mut out = String::new();
        let rate = |row: &Row| row.rate.map(|rate| rate.median);
        let rows: Vec<&Row> = rows.iter().collect();
        bars(&mut out, "x", &rows, rate, |row| row.rate, |value| value.to_string());
        assert!(out.contains("width=\"510.0\"") && out.contains("width=\"255.0\""), "{out}");
    }
}
