//! The committed scenarios over many seeds, for both versions of BBR, as one table.
//!
//! A file whose name ends in the congestion control of all its flows runs as it is; in the others every flow
//! of BBR becomes the one, then the other version. Each cell says what held for all seeds: the
//! least and the most.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use stoq::datapath::sim::{CongestionControlName, Scenario, ScenarioResult};
use stoq::sim::run_scenario;

use super::on_all_cores;

const VERSIONS: [CongestionControlName; 2] =
    [CongestionControlName::Bbr2, CongestionControlName::Bbr3];

/// One row: a file and who sends in it.
struct Row {
    name: String,
    controls: String,
    scenario: Scenario,
}

/// The table in Markdown, of every `*.toml` in `folder`.
pub(super) fn markdown(folder: &Path, seeds: u64) -> anyhow::Result<String> {
    ensure!(seeds > 0, "--seeds must be at least 1");
    let mut rows = Vec::new();
    for path in files(folder)? {
        rows.extend(rows_of(&path)?);
    }
    let jobs: Vec<_> =
        rows.iter().flat_map(|row| (1..=seeds).map(move |seed| (&row.scenario, seed))).collect();
    let results =
        on_all_cores(&jobs, |(scenario, seed)| Ok(run_scenario(scenario, *seed)?.result))?;
    let mut text = format!(
        "{seeds} seeds each; one figure where all seeds agree, else the least and the most.\n\n\
         | scenario | flows | complete | last flow done, s | goodput, Mbit/s | lost, % | median RTT, ms | Jain |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    );
    for (row, runs) in rows.iter().zip(results.chunks(seeds as usize)) {
        writeln!(text, "{}", cells(row, runs)).expect("a string takes everything");
    }
    text.push('\n');
    Ok(text)
}

fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    ensure!(!files.is_empty(), "{} has no *.toml", folder.display());
    Ok(files)
}

fn rows_of(path: &Path) -> anyhow::Result<Vec<Row>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {shown}"))?;
    let scenario = Scenario::parse(&text).with_context(|| shown.to_string())?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let is_fixed =
        scenario.flows.iter().all(|flow| name.ends_with(&format!("-{}", flow.cc.name())));
    let row = |scenario: Scenario| {
        let mut controls: Vec<_> = scenario.flows.iter().map(|flow| flow.cc.name()).collect();
        let flows = controls.len();
        controls.dedup();
        let many = if flows > controls.len() { format!("{flows} × ") } else { String::new() };
        Row { name: name.clone(), controls: many + &controls.join(", "), scenario }
    };
    if is_fixed {
        return Ok(vec![row(scenario)]);
    }
    let as_version = |&version: &CongestionControlName| {
        let mut scenario = scenario.clone();
        for flow in scenario.flows.iter_mut().filter(|flow| VERSIONS.contains(&flow.cc)) {
            flow.cc = version;
        }
        row(scenario)
    };
    Ok(VERSIONS.iter().map(as_version).collect())
}

fn cells(row: &Row, runs: &[ScenarioResult]) -> String {
    let complete = |run: &&ScenarioResult| run.flows.iter().all(|flow| flow.completed_ms.is_some());
    let done = runs.iter().filter(complete).count();
    let range = |decimals: usize, measure: &dyn Fn(&ScenarioResult) -> Option<f64>| {
        let values = || runs.iter().filter_map(measure).map(|value| format!("{value:.decimals$}"));
        let number = |text: &String| text.parse::<f64>().unwrap_or(f64::NAN);
        let order = |a: &String, b: &String| number(a).total_cmp(&number(b));
        match (values().min_by(order), values().max_by(order)) {
            (Some(least), Some(most)) if least == most => least,
            (Some(least), Some(most)) => format!("{least}–{most}"),
            _ => "–".to_owned(),
        }
    };
    let flows = |run: &ScenarioResult, measure: fn(&stoq::datapath::sim::FlowResult) -> f64| {
        run.flows.iter().map(measure).sum::<f64>()
    };
    let count = row.scenario.flows.len() as f64;
    format!(
        "| {} | {} | {done} of {} | {} | {} | {} | {} | {} |",
        row.name,
        row.controls,
        runs.len(),
        range(1, &|run| {
            let last = run.flows.iter().map(|flow| flow.completed_ms).max().flatten();
            let all = run.flows.iter().all(|flow| flow.completed_ms.is_some());
            last.filter(|_| all).map(|ms| ms as f64 / 1e3)
        }),
        range(1, &|run| Some(flows(run, |flow| flow.goodput_bps as f64) / 1e6)),
        range(1, &|run| {
            let sent = flows(run, |flow| flow.packets_sent as f64);
            Some(100.0 * flows(run, |flow| flow.packets_lost as f64) / sent.max(1.0))
        }),
        range(1, &|run| Some(flows(run, |flow| flow.srtt_us_p50 as f64) / count / 1e3)),
        if count > 1.0 { range(2, &|run| Some(run.jain)) } else { "–".to_owned() },
    )
}
