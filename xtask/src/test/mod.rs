//! `cargo xtask test`: every check of the repository as a named step.
//!
//! The last line of standard output is `N passed, M failed` (and `, K skipped`),
//! counting test cases; continuous integration reads it. A step that this tree
//! has nothing for is listed as absent and never counted as passed.

mod demos;
pub(crate) mod executables;
mod failures;
mod matrix;
mod steps;
pub(crate) mod tally;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use self::executables::Executable;
use self::failures::Failure;
use self::matrix::Matrix;
pub(crate) use self::steps::rust_sources;
use self::steps::{STEPS, Step};
use self::tally::Tally;
use crate::machine::Machine;
use crate::terminal::{Terminal, Tone};
use crate::workspace::Workspace;
use crate::{interrupt, proc};

/// Lines of a failed step's log that are shown.
const TAIL_LINES: usize = 40;

/// Options of `cargo xtask test`.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct TestArgs {
    /// Leave out what needs root, and say so.
    #[arg(long)]
    unprivileged: bool,
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
    /// Leave out the slow steps (documentation, loom, Miri, interop, demos, licences).
    #[arg(long)]
    quick: bool,
    /// Run only these steps.
    #[arg(long, value_name = "STEP", num_args = 1..)]
    only: Vec<String>,
    /// List the steps and what this tree holds for them.
    #[arg(long)]
    list: bool,
}

impl TestArgs {
    /// What continuous integration asks for: all steps, no questions.
    pub(crate) fn ci() -> Self {
        Self { yes: true, ..Self::default() }
    }
}

/// What the steps share.
pub(crate) struct Context {
    pub(crate) workspace: Workspace,
    pub(crate) machine: Machine,
    pub(crate) terminal: Terminal,
    pub(crate) yes: bool,
    executables: Option<Vec<Executable>>,
    stoq: Option<PathBuf>,
}

/// What a step found to do.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It ran.
    Ran(Tally),
    /// It could not run here, and why; counted as skipped.
    Unavailable(String),
}

/// A line of the table.
struct Row {
    name: &'static str,
    tally: Tally,
    verdict: Verdict,
    time: Duration,
    failures: Vec<Failure>,
}

enum Verdict {
    Passed,
    Failed,
    /// Not run here, with the reason.
    LeftOut(String),
    /// This tree has nothing for it.
    Absent(String),
}

/// Runs the steps.
///
/// # Errors
/// When root is missing, when a step's name is unknown. A failed step is no
/// error but an exit code, so that nothing is printed after the last line.
pub(crate) fn run(args: &TestArgs) -> Result<ExitCode> {
    interrupt::install()?;
    for name in &args.only {
        if !STEPS.iter().any(|step| step.name == name) {
            let known: Vec<_> = STEPS.iter().map(|step| step.name).collect();
            bail!("--only {name}: no such step; there are: {}", known.join(", "));
        }
    }
    let mut context = Context {
        workspace: Workspace::load()?,
        machine: Machine::inspect()?,
        terminal: Terminal::new(false),
        yes: args.yes,
        executables: None,
        stoq: None,
    };
    if args.list {
        list(&mut context);
        return Ok(ExitCode::SUCCESS);
    }
    let selected: Vec<&Step> = STEPS
        .iter()
        .filter(|step| args.only.is_empty() || args.only.iter().any(|name| name == step.name))
        .collect();
    let needs_root = selected.iter().any(|step| step.privileged);
    if needs_root && !context.machine.is_root && !args.unprivileged {
        bail!(
            "the veth and eBPF tests need root: run `sudo env \"PATH=$PATH\" cargo xtask test`, or \
             leave them out with --unprivileged"
        );
    }
    let (mut rows, mut matrix) = (Vec::new(), Matrix::default());
    for step in selected {
        let row = run_step(&mut context, step, args)?;
        if matches!(row.verdict, Verdict::Passed | Verdict::Failed) {
            matrix.add_log(&read_log(&step_log(&context.workspace, step))?);
        }
        let stop = step.name == "setup" && matches!(row.verdict, Verdict::Failed);
        rows.push(row);
        if stop {
            context.terminal.warn("without its set-up nothing else can run");
            break;
        }
    }
    Ok(finish(&mut context.terminal, &rows, &matrix, args))
}

/// What a step wrote; nothing where it had no occasion to.
fn read_log(log: &std::path::Path) -> Result<String> {
    match std::fs::read(log) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", log.display())),
    }
}

fn step_log(workspace: &Workspace, step: &Step) -> PathBuf {
    workspace.logs().join(format!("{}.log", step.name))
}

fn run_step(context: &mut Context, step: &Step, args: &TestArgs) -> Result<Row> {
    let row =
        |tally, verdict, time| Row { name: step.name, tally, verdict, time, failures: Vec::new() };
    if let Some(why) = (step.absent)(&context.workspace) {
        return Ok(row(Tally::default(), Verdict::Absent(why), Duration::ZERO));
    }
    let left_out = if step.privileged && args.unprivileged {
        Some("needs root (--unprivileged)")
    } else if step.slow && args.quick && args.only.is_empty() {
        Some("slow (--quick)")
    } else {
        None
    };
    if let Some(why) = left_out {
        return Ok(row(Tally::SKIPPED, Verdict::LeftOut(why.into()), Duration::ZERO));
    }
    context.terminal.live(&format!("{:<14} running: {}", step.name, step.what));
    let log = step_log(&context.workspace, step);
    if log.exists() {
        std::fs::remove_file(&log)?;
    }
    let start = Instant::now();
    let outcome = (step.run)(context, &log);
    interrupt::check()?;
    let time = start.elapsed();
    let (tally, verdict) = match outcome {
        Ok(Outcome::Ran(tally)) if tally.failed == 0 => (tally, Verdict::Passed),
        Ok(Outcome::Ran(tally)) => (tally, Verdict::Failed),
        Ok(Outcome::Unavailable(why)) => (Tally::SKIPPED, Verdict::LeftOut(why)),
        Err(error) => {
            use std::io::Write as _;
            writeln!(proc::append(&log)?, "xtask: {error:#}")?;
            (Tally::one(false), Verdict::Failed)
        }
    };
    let mut row = row(tally, verdict, time);
    let line = row.text(&context.terminal);
    context.terminal.line(&line);
    if matches!(row.verdict, Verdict::Failed) {
        row.failures = failures::of_log(&read_log(&log)?);
        show_failure(&mut context.terminal, &row, &log);
    }
    Ok(row)
}

/// What failed in a step: its test cases, and the end of its log where no case says why.
fn show_failure(terminal: &mut Terminal, row: &Row, log: &std::path::Path) {
    for line in failures::lines(row.name, &row.failures) {
        terminal.line(&line);
    }
    if row.failures.iter().all(|failure| failure.said.is_empty()) {
        let tail = proc::tail(log, TAIL_LINES).unwrap_or_else(|error| format!("{error:#}"));
        for line in tail.lines() {
            terminal.line(&format!("    | {line}"));
        }
    }
    terminal.line(&format!("    whole log: {}", log.display()));
}

impl Row {
    fn text(&self, terminal: &Terminal) -> String {
        let (tone, word, detail) = match &self.verdict {
            Verdict::Passed => (Tone::Good, "passed", self.tally.to_string()),
            Verdict::Failed => (Tone::Bad, "FAILED", self.tally.to_string()),
            Verdict::LeftOut(why) => (Tone::Warn, "left out", why.clone()),
            Verdict::Absent(why) => (Tone::Dim, "absent", why.clone()),
        };
        let word = terminal.paint(tone, &format!("{word:<9}"));
        format!("{:<14} {word} {:>7.1} s  {detail}", self.name, self.time.as_secs_f64())
    }
}

fn list(context: &mut Context) {
    for step in STEPS {
        let root = if step.privileged { " [root]" } else { "" };
        let slow = if step.slow { " [slow]" } else { "" };
        let absent = (step.absent)(&context.workspace)
            .map_or_else(String::new, |why| format!("  (absent: {why})"));
        context.terminal.line(&format!("{:<14} {}{root}{slow}{absent}", step.name, step.what));
    }
}

/// Prints the table and, last, the line that continuous integration reads.
fn finish(terminal: &mut Terminal, rows: &[Row], matrix: &Matrix, args: &TestArgs) -> ExitCode {
    let mut total = Tally::default();
    terminal.line("");
    for (index, line) in matrix.lines().iter().enumerate() {
        if index == 0 {
            terminal.heading(line);
        } else {
            terminal.line(line);
        }
    }
    terminal.line("");
    terminal.heading("step           verdict         time  test cases");
    for row in rows {
        total.add(row.tally);
        let line = row.text(terminal);
        terminal.line(&line);
    }
    let time: Duration = rows.iter().map(|row| row.time).sum();
    terminal.line(&format!("{:<24} {:>7.1} s", "total", time.as_secs_f64()));
    if args.unprivileged {
        terminal.warn("run without root: the veth, eBPF and AF_XDP steps did not run");
    }
    let failed: Vec<_> = rows
        .iter()
        .filter(|row| matches!(row.verdict, Verdict::Failed))
        .map(|row| row.name)
        .collect();
    if !failed.is_empty() {
        terminal.line("");
        for row in rows {
            for line in failures::lines(row.name, &row.failures) {
                terminal.line(&line);
            }
        }
        terminal.line(&terminal.paint(Tone::Bad, &format!("failed: {}", failed.join(", "))));
    } else if total.passed == 0 {
        terminal.line(&terminal.paint(Tone::Bad, "no test case ran"));
    }
    terminal.line("");
    terminal.line(&total.to_string());
    if failed.is_empty() && total.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
