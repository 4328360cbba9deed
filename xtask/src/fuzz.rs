//! `cargo xtask fuzz`: the property tests, with many more cases than in a test run.
//!
//! The targets are the functions inside `proptest!` blocks, found in the sources
//! and matched with the names that the test executables list.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::terminal::Terminal;
use crate::test::executables::{self, Executable, run_libtest};
use crate::test::tally::Tally;
use crate::workspace::Workspace;
use crate::{interrupt, proc};

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct FuzzArgs {
    /// Run only targets whose name contains this.
    filter: Option<String>,
    /// Random cases per target.
    #[arg(long, default_value_t = 100_000)]
    cases: u32,
    /// Stop a target that takes longer, in seconds.
    #[arg(long, default_value_t = 3600)]
    limit_s: u64,
    /// List the targets only.
    #[arg(long)]
    list: bool,
}

/// Lists or runs the targets.
///
/// # Errors
/// When a target fails (proptest prints and saves the shrunk input), and when
/// none matches.
pub(crate) fn run(args: &FuzzArgs) -> Result<()> {
    interrupt::install()?;
    let workspace = Workspace::load()?;
    let mut terminal = Terminal::new(false);
    let log = workspace.logs().join("fuzz.log");
    if log.exists() {
        std::fs::remove_file(&log)?;
    }
    terminal.live("building the test executables");
    let targets = targets(&workspace, &executables::build(&workspace, &log)?)?;
    let wanted: Vec<_> = targets
        .iter()
        .filter(|(_, name)| args.filter.as_ref().is_none_or(|filter| name.contains(filter)))
        .collect();
    if wanted.is_empty() {
        bail!("no property test matches; `cargo xtask fuzz --list` shows all of them");
    }
    let mut total = Tally::default();
    for (executable, name) in wanted {
        if args.list {
            terminal.line(&format!("{} {name}", executable.package));
            continue;
        }
        terminal.live(&format!("{name}: {} cases", args.cases));
        let mut command = executable.command(&workspace);
        command.args(["--exact", name]).env("PROPTEST_CASES", args.cases.to_string());
        let tally = run_libtest(&mut command, &log, Duration::from_secs(args.limit_s))?;
        terminal.line(&format!("{name}: {tally}"));
        if tally.failed > 0 {
            terminal.line(&proc::tail(&log, 40)?);
        }
        total.add(tally);
    }
    if total.failed > 0 {
        bail!("{total}; whole log: {}", log.display());
    }
    Ok(())
}

/// Every property test, with the executable that holds it.
fn targets(workspace: &Workspace, built: &[Executable]) -> Result<Vec<(Executable, String)>> {
    let mut found = Vec::new();
    for executable in built.iter().filter(|each| each.kind != "example") {
        let Some(package) = workspace.package(&executable.package) else { continue };
        let mut names = BTreeSet::new();
        for directory in ["src", "tests"] {
            for path in crate::test::rust_sources(&package.directory().join(directory)) {
                names.extend(property_names(&std::fs::read_to_string(&path)?));
            }
        }
        if names.is_empty() {
            continue;
        }
        let listing =
            proc::output(executable.command(workspace).args(["--list", "--format", "terse"]))?;
        for test in listing.lines().filter_map(|line| line.strip_suffix(": test")) {
            if test.rsplit("::").next().is_some_and(|last| names.contains(last)) {
                found.push((executable.clone(), test.to_owned()));
            }
        }
    }
    Ok(found)
}

/// Names of the functions directly inside the `proptest!` blocks of a source.
fn property_names(source: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = source;
    while let Some(start) = rest.find("proptest! {").or_else(|| rest.find("proptest!{")) {
        let block = &rest[start..];
        let end = block_end(block);
        names.extend(block[..end].lines().filter_map(|line| {
            let name = line.trim_start().strip_prefix("fn ")?.split(['(', '<']).next()?;
            Some(name.trim().to_owned())
        }));
        rest = &block[end..];
    }
    names
}

/// The end of the first braced block, by counting braces.
fn block_end(text: &str) -> usize {
    let mut depth = 0usize;
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth <= 1 => return index + 1,
            b'}' => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_proptest_blocks_only() {
        let source = "fn outside() {}\nmod tests {\n proptest! {\n  #![proptest_config(x)]\n  #[test]\n  \
            fn parse_never_panics(bytes in any::<Vec<u8>>()) { if true { f(); } }\n  #[test]\n  \
            fn round_trip(x in 0..9) {}\n }\n fn helper() {}\n}\nproptest!{ \n fn second(a in b) {} }";
        assert_eq!(property_names(source), ["parse_never_panics", "round_trip", "second"]);
        assert!(property_names("fn a() {}").is_empty());
        assert_eq!(property_names("proptest! {\n fn open(a in b) {"), ["open"]);
    }
}
