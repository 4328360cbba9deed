//! `cargo xtask instructions`: instruction counts of fixed scenarios against committed baselines.
//!
//! Seconds on a shared machine say little; instructions of the same work in virtual time are
//! nearly the same everywhere. What differs between processors is left out: only instructions
//! whose source line is Rust count, for the C and assembly of the cryptography and the C library
//! choose their code by what the processor has (and valgrind shows it another one). Baselines
//! belong to a compiler version: with another one the counts are not compared.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::terminal::Terminal;
use crate::workspace::Workspace;
use crate::{interrupt, proc};

/// The package of the scenarios; its baselines lie beside its manifest.
pub(crate) const PACKAGE: &str = "stoq-instructions";
/// The scenarios, as the program names them.
const SCENARIOS: [&str; 4] = ["send1000", "receive1000", "handshake", "request"];
/// How much more than the baseline is too much, percent.
const MARGIN_PERCENT: u64 = 3;
/// How long valgrind may take for one scenario.
const LIMIT: Duration = Duration::from_secs(300);

/// Options of `cargo xtask instructions`.
#[derive(Debug, clap::Args)]
pub(crate) struct InstructionsArgs {
    /// Write the counts as the new baselines; say why in the commit.
    #[arg(long)]
    update: bool,
}

/// The committed counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Baselines {
    /// `rustc --version` that they were counted with.
    rustc: String,
    /// Instructions of each scenario.
    instructions: BTreeMap<String, u64>,
}

/// What a comparison found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Scenarios within and beyond the margin.
    Compared { within: u64, beyond: u64 },
    /// The baselines are of another compiler.
    OtherCompiler(String),
}

/// Counts and compares, or updates.
pub(crate) fn run(args: &InstructionsArgs) -> Result<()> {
    interrupt::install()?;
    let mut terminal = Terminal::new(false);
    let workspace = Workspace::load()?;
    if args.update {
        let counted = Baselines { rustc: rustc()?, instructions: count(&workspace)? };
        let mut text = serde_json::to_string_pretty(&counted).context("cannot write JSON")?;
        text.push('\n');
        let path = path(&workspace)?;
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        for (scenario, instructions) in &counted.instructions {
            terminal.line(&format!("{scenario:<12} {instructions}"));
        }
        return Ok(());
    }
    match check(&workspace, &mut |line| terminal.line(line))? {
        Verdict::Compared { beyond: 0, .. } => Ok(()),
        Verdict::Compared { beyond, .. } => bail!(
            "{beyond} scenario(s) take more than {MARGIN_PERCENT} % more instructions; if that is \
             meant, `cargo xtask instructions --update` and say why in the commit"
        ),
        Verdict::OtherCompiler(why) => bail!("{why}"),
    }
}

/// Counts and compares with the baselines; tells each line to `tell`.
pub(crate) fn check(workspace: &Workspace, tell: &mut dyn FnMut(&str)) -> Result<Verdict> {
    let path = path(workspace)?;
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{}: cargo xtask instructions --update", path.display()))?;
    let baselines: Baselines =
        serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let rustc = rustc()?;
    if rustc != baselines.rustc {
        return Ok(Verdict::OtherCompiler(format!(
            "the baselines are of {}, this is {rustc}",
            baselines.rustc
        )));
    }
    Ok(compare(&baselines.instructions, &count(workspace)?, tell))
}

fn compare(
    baselines: &BTreeMap<String, u64>,
    counted: &BTreeMap<String, u64>,
    tell: &mut dyn FnMut(&str),
) -> Verdict {
    let (mut within, mut beyond) = (0, 0);
    for (scenario, now) in counted {
        // A scenario without a baseline was forgotten in the update.
        let Some(before) = baselines.get(scenario) else {
            tell(&format!("{scenario:<12} {now:>12}  has no baseline"));
            beyond += 1;
            continue;
        };
        let percent = (*now as f64 / *before as f64 - 1.0) * 100.0;
        // In integers: 1030 against 1000 is within 3 %, whatever floats make of it.
        let is_beyond =
            u128::from(*now) * 100 > u128::from(*before) * u128::from(100 + MARGIN_PERCENT);
        let word = if is_beyond { "TOO MUCH" } else { "" };
        tell(&format!("{scenario:<12} {now:>12}  {percent:+.1} % of {before}  {word}"));
        if is_beyond {
            beyond += 1;
        } else {
            within += 1;
        }
    }
    Verdict::Compared { within, beyond }
}

fn path(workspace: &Workspace) -> Result<PathBuf> {
    let package = workspace.package(PACKAGE).with_context(|| format!("no crate {PACKAGE}"))?;
    Ok(package.directory().join("baselines.json"))
}

fn rustc() -> Result<String> {
    let program = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    Ok(proc::output(Command::new(program).arg("--version"))?.trim().to_owned())
}

/// The instructions of every scenario.
fn count(workspace: &Workspace) -> Result<BTreeMap<String, u64>> {
    let mut build = workspace.cargo();
    build.args(["build", "--release", "--package", PACKAGE]);
    proc::run_visibly(&mut build)?;
    let program = workspace.target.join("release").join(PACKAGE);
    let directory = workspace.logs();
    std::fs::create_dir_all(&directory).context("cannot create the directory of the logs")?;
    SCENARIOS
        .iter()
        .map(|scenario| {
            let instructions = callgrind(&program, scenario, &directory)
                .with_context(|| format!("scenario {scenario}"))?;
            Ok(((*scenario).to_owned(), instructions))
        })
        .collect()
}

fn callgrind(program: &Path, scenario: &str, directory: &Path) -> Result<u64> {
    let out = directory.join(format!("callgrind.{scenario}"));
    let log = directory.join(format!("callgrind.{scenario}.log"));
    let valgrind = proc::find_program("valgrind")
        .context("valgrind is not installed: cargo xtask setup installs it")?;
    let mut command = Command::new(valgrind);
    command
        .args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*measured_turn*"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .arg(scenario);
    let finished = proc::run_to_log(&mut command, &log, LIMIT)?;
    if !finished.success() {
        bail!("valgrind {}: see {}", finished.explain(LIMIT), log.display());
    }
    let text =
        std::fs::read_to_string(&out).with_context(|| format!("cannot read {}", out.display()))?;
    let instructions = rust_instructions(&text)?;
    if instructions == 0 {
        bail!("nothing was counted in Rust code: is the program built without line tables?");
    }
    Ok(instructions)
}

/// The self cost of all lines of Rust sources in a profile of callgrind's format.
fn rust_instructions(profile: &str) -> Result<u64> {
    let mut files: HashMap<&str, bool> = HashMap::new();
    let (mut is_rust, mut after_calls, mut sum) = (false, false, 0u64);
    for line in profile.lines() {
        if let Some((key, value)) = line.split_once('=') {
            match key {
                "fl" | "fi" | "fe" => is_rust = is_rust_file(&mut files, value),
                // A file may get its number where it is only called into.
                "cfi" | "cfl" => {
                    is_rust_file(&mut files, value);
                }
                "calls" => after_calls = true,
                _ => {}
            }
            continue;
        }
        let is_cost = line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c));
        if !is_cost {
            continue;
        }
        // The line behind `calls=` is the callee's inclusive cost: counted where it belongs.
        if std::mem::take(&mut after_calls) || !is_rust {
            continue;
        }
        let cost = line.split_whitespace().nth(1).context("a cost line without a cost")?;
        sum += cost.parse::<u64>().with_context(|| format!("not a cost line: {line}"))?;
    }
    Ok(sum)
}

/// Whether `(number) name` or `(number)` is a Rust source.
fn is_rust_file<'a>(files: &mut HashMap<&'a str, bool>, value: &'a str) -> bool {
    match value.split_once(' ') {
        Some((number, name)) => {
            let is_rust = name.trim().ends_with(".rs");
            files.insert(number, is_rust);
            is_rust
        }
        None => files.get(value).copied().unwrap_or_else(|| value.ends_with(".rs")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = "version: 1\nevents: Ir\n\
        ob=(1) /t/stoq-instructions\n\
        fl=(1) /w/engine/src/shard/mod.rs\n\
        fn=(1) stoq::shard::turn\n\
        10 5\n+2 7\n* 1\n\
        cfi=(2) /c/aws-lc/aes.c\ncfn=(2) aws_lc_seal\ncalls=3 20\n12 9000\n\
        fi=(3) /rustc/x/library/core/src/slice.rs\n13 4\n\
        fe=(1)\n14 2\n\
        fl=(2)\nfn=(2)\n20 9000\n\
        fl=(4) ???\nfn=(3) memcpy\n0 300\n\
        totals: 9319\n";

    #[test]
    fn rust_lines_count_once_and_others_not() {
        assert_eq!(rust_instructions(PROFILE).unwrap(), 5 + 7 + 1 + 4 + 2);
        assert_eq!(rust_instructions("events: Ir\n").unwrap(), 0);
        assert!(rust_instructions("fl=(1) a.rs\n7\n").is_err());
    }

    #[test]
    fn more_than_the_margin_is_too_much() {
        let counts = |send: u64| BTreeMap::from([("send1000".to_owned(), send)]);
        let verdict = |now| compare(&counts(1000), &counts(now), &mut |_| {});
        assert_eq!(verdict(1030), Verdict::Compared { within: 1, beyond: 0 });
        assert_eq!(verdict(1031), Verdict::Compared { within: 0, beyond: 1 });
        assert_eq!(verdict(500), Verdict::Compared { within: 1, beyond: 0 });
        let forgotten = compare(&BTreeMap::new(), &counts(1), &mut |_| {});
        assert_eq!(forgotten, Verdict::Compared { within: 0, beyond: 1 });
    }
}
