//! The steps of `cargo xtask test`, in the order in which they run: the cheap
//! and telling ones first.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::executables::{self, BUILD_LIMIT, Executable, PROFILE, common_arguments, run_libtest};
use super::tally::Tally;
use super::{Context, Outcome, demos};
use crate::instructions::{self, Verdict};
use crate::workspace::Workspace;
use crate::{packages, proc, stoq_cli};

/// The licence checker's version: one that the pinned compiler can build.
const CARGO_DENY_VERSION: &str = "0.18.3";
/// How long an example may take.
const EXAMPLE_LIMIT: Duration = Duration::from_secs(60);

/// One step.
pub(crate) struct Step {
    /// Its name, and that of its log.
    pub(crate) name: &'static str,
    /// What it checks.
    pub(crate) what: &'static str,
    /// Needs root.
    pub(crate) privileged: bool,
    /// Left out with `--quick`.
    pub(crate) slow: bool,
    /// Why this tree has nothing for it, if so.
    pub(crate) absent: fn(&Workspace) -> Option<String>,
    /// Runs it.
    pub(crate) run: fn(&mut Context, &Path) -> Result<Outcome>,
}

const fn step(
    name: &'static str,
    what: &'static str,
    absent: fn(&Workspace) -> Option<String>,
    run: fn(&mut Context, &Path) -> Result<Outcome>,
) -> Step {
    Step { name, what, privileged: false, slow: false, absent, run }
}

impl Step {
    const fn root(mut self) -> Self {
        self.privileged = true;
        self
    }

    const fn slow(mut self) -> Self {
        self.slow = true;
        self
    }
}

/// All steps.
pub(crate) const STEPS: &[Step] = &[
    step("setup", "packages that the other steps need", |_| None, setup),
    step("fmt", "cargo fmt --check", |_| None, fmt),
    step("clippy", "cargo clippy, all targets, warnings denied", |_| None, clippy),
    step("build", "all tests and examples, one profile", |_| None, build),
    step("unit", "unit, simulator and loopback tests", |_| None, unit),
    step("doc-tests", "examples in the documentation", |_| None, doc_tests),
    step("ebpf-fixtures", "packets through BPF_PROG_TEST_RUN", no_testrun, ebpf_fixtures).root(),
    step("ebpf-check", "the committed objects come from the sources", no_ebpf_command, ebpf_check),
    step("privileged", "tests over veth pairs and XDP", no_privileged, privileged).root(),
    step("scripts", "bash -n, and shellcheck where installed", no_scripts, scripts),
    step("doc", "cargo doc, warnings denied", |_| None, doc).slow(),
    step("loom", "every interleaving of the ring cursors", no_loom, loom).slow(),
    step("miri", "undefined behaviour in the unsafe modules", |_| None, miri).slow(),
    step("interop", "other QUIC implementations", no_interop, interop).slow(),
    step("instructions", "instruction counts against their baselines", no_scenarios, instructions)
        .slow(),
    step("examples", "every example runs to its end", no_examples, examples).slow(),
    step("demo-loopback", "the demo without root", no_stoq, demos::loopback).slow(),
    step("demo-1500", "the demo over AF_XDP, MTU 1500", no_stoq, demos::mtu_1500).root().slow(),
    step("demo-9000", "the demo over AF_XDP, MTU 9000", no_stoq, demos::mtu_9000).root().slow(),
    step("demo-kill", "kill -9 of server and demo leaves nothing", no_stoq, demos::kill)
        .root()
        .slow(),
    step("deny", "licences, bans and sources of the dependencies", no_deny, deny).slow(),
];

fn no_crate(workspace: &Workspace, name: &str) -> Option<String> {
    workspace.package(name).is_none().then(|| format!("no crate {name}"))
}

fn no_testrun(workspace: &Workspace) -> Option<String> {
    no_crate(workspace, "stoq-ebpf-testrun")
}

fn no_interop(workspace: &Workspace) -> Option<String> {
    no_crate(workspace, "stoq-interop")
}

fn no_scenarios(workspace: &Workspace) -> Option<String> {
    no_crate(workspace, instructions::PACKAGE)
}

fn no_stoq(workspace: &Workspace) -> Option<String> {
    no_crate(workspace, "stoq-bench")
}

fn no_ebpf_command(_: &Workspace) -> Option<String> {
    let command = <crate::Cli as clap::CommandFactory>::command();
    command.find_subcommand("ebpf").is_none().then(|| "no `cargo xtask ebpf`".into())
}

fn no_privileged(workspace: &Workspace) -> Option<String> {
    let any = workspace
        .packages
        .iter()
        .any(|package| package.target_names("test").any(|name| name.starts_with("priv_")));
    (!any).then(|| "no tests/priv_*.rs".into())
}

fn no_examples(workspace: &Workspace) -> Option<String> {
    let any =
        workspace.packages.iter().any(|package| package.target_names("example").next().is_some());
    (!any).then(|| "no examples".into())
}

fn no_deny(workspace: &Workspace) -> Option<String> {
    (!workspace.root.join("deny.toml").is_file()).then(|| "no deny.toml".into())
}

fn no_scripts(workspace: &Workspace) -> Option<String> {
    shell_scripts(workspace).is_empty().then(|| "no scripts/*.sh".into())
}

fn no_loom(workspace: &Workspace) -> Option<String> {
    let Some(engine) = workspace.package("stoq") else { return Some("no crate stoq".into()) };
    let found = rust_sources(&engine.directory().join("src"))
        .iter()
        .any(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("fn loom_")));
    (!found).then(|| "no loom_* tests in crate stoq".into())
}

/// All Rust files below a directory; nothing when it is not there.
pub(crate) fn rust_sources(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.is_dir() {
            found.extend(rust_sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn shell_scripts(workspace: &Workspace) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(workspace.root.join("scripts")) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "sh"))
        .collect();
    found.sort();
    found
}

impl Context {
    /// All tests and examples, built once.
    pub(crate) fn executables(&mut self, log: &Path) -> Result<Vec<Executable>> {
        if self.executables.is_none() {
            self.executables = Some(executables::build(&self.workspace, log)?);
        }
        Ok(self.executables.clone().unwrap_or_default())
    }

    /// The `stoq` binary as the demo uses it, built once.
    pub(crate) fn stoq(&mut self) -> Result<PathBuf> {
        if let Some(path) = &self.stoq {
            return Ok(path.clone());
        }
        let path = stoq_cli::build(&self.workspace)?;
        self.stoq = Some(path.clone());
        Ok(path)
    }

    /// Runs the executables that `wanted` picks.
    fn run_executables(
        &mut self,
        log: &Path,
        arguments: &[&str],
        wanted: impl Fn(&Executable) -> bool,
    ) -> Result<Outcome> {
        let mut tally = Tally::default();
        for executable in self.executables(log)? {
            if executable.kind != "example" && wanted(&executable) {
                tally.add(executable.run(&self.workspace, arguments, log)?);
            }
        }
        Ok(Outcome::Ran(tally))
    }
}

/// Runs one command that passes or fails as a whole.
fn one_case(command: &mut Command, log: &Path) -> Result<Outcome> {
    let finished = proc::run_to_log(command, log, BUILD_LIMIT)?;
    Ok(Outcome::Ran(Tally::one(finished.success())))
}

fn setup(context: &mut Context, _: &Path) -> Result<Outcome> {
    let needs = packages::test_needs(&context.workspace);
    let (terminal, machine) = (&mut context.terminal, &context.machine);
    packages::install_missing(terminal, machine, &needs, context.yes)?;
    let optional = packages::optional_needs();
    packages::install_optional(terminal, machine, &optional, context.yes)?;
    for line in packages::explain(&packages::missing(&optional)) {
        terminal.warn(&format!("NOT TESTED, for it is missing: {line}"));
    }
    Ok(Outcome::Ran(Tally::default()))
}

fn fmt(context: &mut Context, log: &Path) -> Result<Outcome> {
    one_case(
        context.workspace.cargo().args(["fmt", "--all", "--check", "--", "--color", "never"]),
        log,
    )
}

fn clippy(context: &mut Context, log: &Path) -> Result<Outcome> {
    let mut command = context.workspace.cargo();
    command.args(["clippy", "--all-targets"]).args(common_arguments(&context.workspace));
    one_case(command.args(["--", "-D", "warnings"]), log)
}

fn build(context: &mut Context, log: &Path) -> Result<Outcome> {
    context.executables(log)?;
    Ok(Outcome::Ran(Tally::one(true)))
}

/// Crates whose tests are steps of their own.
const OWN_STEP: [&str; 2] = ["stoq-ebpf-testrun", "stoq-interop"];

fn unit(context: &mut Context, log: &Path) -> Result<Outcome> {
    context.run_executables(log, &[], |executable| {
        !executable.is_privileged() && !OWN_STEP.contains(&executable.package.as_str())
    })
}

fn privileged(context: &mut Context, log: &Path) -> Result<Outcome> {
    // One at a time: they compete for cores, and some measure.
    context.run_executables(log, &["--test-threads=1"], |executable| {
        executable.is_privileged() && !OWN_STEP.contains(&executable.package.as_str())
    })
}

fn ebpf_fixtures(context: &mut Context, log: &Path) -> Result<Outcome> {
    context.run_executables(log, &[], |each| each.package == "stoq-ebpf-testrun")
}

fn interop(context: &mut Context, log: &Path) -> Result<Outcome> {
    context.run_executables(log, &["--test-threads=1"], |each| each.package == "stoq-interop")
}

fn ebpf_check(_: &mut Context, log: &Path) -> Result<Outcome> {
    one_case(this_command()?.args(["ebpf", "check"]), log)
}

/// This program itself.
pub(crate) fn this_command() -> Result<Command> {
    Ok(Command::new(std::env::current_exe().context("cannot find this program")?))
}

fn doc_tests(context: &mut Context, log: &Path) -> Result<Outcome> {
    let mut command = context.workspace.cargo();
    command.args(["test", "--doc", "--no-fail-fast"]).args(common_arguments(&context.workspace));
    Ok(Outcome::Ran(run_libtest(&mut command, log, BUILD_LIMIT)?))
}

fn doc(context: &mut Context, log: &Path) -> Result<Outcome> {
    let mut command = context.workspace.cargo();
    command.env("RUSTDOCFLAGS", "-D warnings").args(["doc", "--no-deps", "--lib"]);
    one_case(command.args(common_arguments(&context.workspace)), log)
}

fn loom(context: &mut Context, log: &Path) -> Result<Outcome> {
    let mut command = context.workspace.cargo();
    // The flag reaches every crate, so it needs a target directory of its own.
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    command.env("RUSTFLAGS", format!("{flags} --cfg stoq_loom").trim());
    command.env("CARGO_TARGET_DIR", context.workspace.target.join("loom"));
    command.args(["test", "--package", "stoq", "--lib", "--profile", PROFILE, "loom_"]);
    Ok(Outcome::Ran(run_libtest(&mut command, log, BUILD_LIMIT)?))
}

fn miri(context: &mut Context, log: &Path) -> Result<Outcome> {
    let nightly = |arguments: &[&str]| {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo", "miri"]).args(arguments);
        command.current_dir(&context.workspace.root);
        for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH"] {
            command.env_remove(name);
        }
        command
    };
    if proc::find_program("rustup").is_none() || proc::output(&mut nightly(&["--version"])).is_err()
    {
        let why = "no nightly toolchain with Miri; loom and the ring tests cover these modules";
        return Ok(Outcome::Unavailable(why.into()));
    }
    let filters = miri_filters(&context.workspace);
    let mut command = nightly(&["test", "--package", "stoq", "--lib", "--"]);
    command.env("MIRIFLAGS", "-Zmiri-disable-isolation");
    command.env("CARGO_TARGET_DIR", context.workspace.target.join("miri")).args(filters);
    Ok(Outcome::Ran(run_libtest(&mut command, log, BUILD_LIMIT)?))
}

/// Test names for Miri: `[package.metadata.xtask] miri = ["…"]` in engine/Cargo.toml.
fn miri_filters(workspace: &Workspace) -> Vec<String> {
    let named = workspace
        .package("stoq")
        .and_then(|package| package.metadata.pointer("/xtask/miri")?.as_array())
        .map(|names| names.iter().filter_map(Value::as_str).map(str::to_owned).collect());
    named.unwrap_or_else(|| ["umem::", "sys::cursor"].map(str::to_owned).to_vec())
}

fn instructions(context: &mut Context, _: &Path) -> Result<Outcome> {
    let Context { workspace, terminal, .. } = context;
    Ok(match instructions::check(workspace, &mut |line| terminal.line(line))? {
        Verdict::Compared { within, beyond } => {
            Outcome::Ran(Tally { passed: within, failed: beyond, skipped: 0 })
        }
        Verdict::OtherCompiler(why) => Outcome::Unavailable(why),
    })
}

/// Runs every example with the arguments that its package gives it:
/// `[package.metadata.xtask.examples] NAME = ["--option"]`, none by default.
fn examples(context: &mut Context, log: &Path) -> Result<Outcome> {
    let mut tally = Tally::default();
    for example in context.executables(log)?.iter().filter(|each| each.kind == "example") {
        let package = context.workspace.package(&example.package);
        let arguments = package.map_or_else(Vec::new, |package| {
            let path = format!("/xtask/examples/{}", example.target);
            let list = package.metadata.pointer(&path).and_then(Value::as_array);
            list.map_or_else(Vec::new, |list| list.iter().filter_map(Value::as_str).collect())
        });
        let mut command = example.command(&context.workspace);
        let finished = proc::run_to_log(command.args(arguments), log, EXAMPLE_LIMIT)?;
        if !finished.success() {
            use std::io::Write as _;
            let how = finished.explain(EXAMPLE_LIMIT);
            writeln!(proc::append(log)?, "xtask: example {} {how}", example.target)?;
        }
        tally.add(Tally::one(finished.success()));
    }
    Ok(Outcome::Ran(tally))
}

fn scripts(context: &mut Context, log: &Path) -> Result<Outcome> {
    let shellcheck = proc::find_program("shellcheck");
    let limit = Duration::from_secs(60);
    let mut tally = Tally::default();
    for script in shell_scripts(&context.workspace) {
        let syntax = proc::run_to_log(Command::new("bash").arg("-n").arg(&script), log, limit)?;
        let style = match &shellcheck {
            Some(program) => {
                let check =
                    proc::run_to_log(Command::new(program).arg("-x").arg(&script), log, limit);
                check?.success()
            }
            None => true,
        };
        tally.add(Tally::one(syntax.success() && style));
    }
    Ok(Outcome::Ran(tally))
}

/// Advisories are left out: their database needs the network at every run.
fn deny(context: &mut Context, log: &Path) -> Result<Outcome> {
    let tools = context.workspace.target.join("xtask-tools");
    let own = tools.join("bin/cargo-deny");
    let program = match proc::find_program("cargo-deny") {
        Some(program) => program,
        None if own.is_file() => own,
        None => {
            let mut install = context.workspace.cargo();
            install.args(["install", "cargo-deny", "--locked", "--version", CARGO_DENY_VERSION]);
            install.arg("--root").arg(&tools);
            install.env("CARGO_TARGET_DIR", tools.join("build"));
            // Built once and run for a second: compile fast.
            install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0");
            install.env("CARGO_PROFILE_RELEASE_LTO", "off");
            install.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
            if !proc::run_to_log(&mut install, log, BUILD_LIMIT)?.success() {
                let why = "cargo-deny is not installed and cannot be (see the log)";
                return Ok(Outcome::Unavailable(why.into()));
            }
            own
        }
    };
    // The licences of optional and foreign-platform crates are read, too: a build has not fetched them.
    let mut fetch = context.workspace.cargo();
    fetch.args(["fetch", "--locked"]);
    if !proc::run_to_log(&mut fetch, log, BUILD_LIMIT)?.success() {
        return Ok(Outcome::Unavailable("the dependencies cannot be fetched (see the log)".into()));
    }
    let mut command = Command::new(program);
    command.current_dir(&context.workspace.root);
    command.args(["--offline", "--workspace", "check", "licenses", "bans", "sources"]);
    let outcome = one_case(&mut command, log)?;
    context.terminal.line("deny: advisories are not checked: their database needs the network");
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_the_table() {
        for (index, step) in STEPS.iter().enumerate() {
            assert!(step.name.len() <= 14, "{}", step.name);
            assert!(STEPS[..index].iter().all(|other| other.name != step.name), "{}", step.name);
        }
    }

    #[test]
    fn an_empty_tree_has_nothing_for_the_optional_steps() {
        let empty = Workspace::parse(
            r#"{"workspace_root":"/nonexistent","target_directory":"/nonexistent/target","packages":[]}"#,
        )
        .unwrap();
        let absent =
            STEPS.iter().filter(|step| (step.absent)(&empty).is_some()).map(|step| step.name);
        let absent: Vec<_> = absent.collect();
        for name in
            ["ebpf-fixtures", "privileged", "scripts", "loom", "interop", "examples", "deny"]
        {
            assert!(absent.contains(&name), "{name}");
        }
        assert_eq!(miri_filters(&empty), ["umem::", "sys::cursor"]);
    }

    #[test]
    fn miri_filters_come_from_the_manifest() {
        let workspace = Workspace::parse(
            r#"{"workspace_root":"/w","target_directory":"/t","packages":[{"name":"stoq",
                "manifest_path":"/w/engine/Cargo.toml","features":{},"targets":[],
                "metadata":{"xtask":{"miri":["wire::"]}}}]}"#,
        )
        .unwrap();
        assert_eq!(miri_filters(&workspace), ["wire::"]);
    }
}
