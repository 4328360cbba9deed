//! Child processes: each in a process group of its own, so that a Ctrl-C at the
//! terminal reaches only this command, which then ends its children in order.
//!
//! Invariant: a [`Group`] never outlives its value; dropping it ends every
//! process of the group, the ones that the child started included.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::interrupt;

/// How often waiting loops look at their child and at the signal flag.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How long a child may take to end in order before it is killed.
pub(crate) const GRACE: Duration = Duration::from_secs(8);

/// The same for a child that is dropped, after an error or a signal: the user waits.
const GRACE_ON_DROP: Duration = Duration::from_secs(1);

/// The command line as a user would type it.
pub(crate) fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| {
            let word = word.to_string_lossy();
            let plain = !word.is_empty()
                && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c));
            if plain { word.into_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a short command and returns what it printed.
///
/// # Errors
/// When it cannot be started or ends with a failure; the message holds the
/// command line and what it wrote to its standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let text = describe(command);
    let output = command
        .stdin(Stdio::null())
        .process_group(0)
        .output()
        .with_context(|| format!("cannot start `{text}`"))?;
    if !output.status.success() {
        bail!("`{text}`: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a program of this name is on the PATH (or in the usual sbin directories).
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// How to say that a process ended.
pub(crate) fn explain(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "ended normally".into(),
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

/// A child process and everything that it starts.
#[derive(Debug)]
pub(crate) struct Group {
    child: Child,
    status: Option<ExitStatus>,
    text: String,
}

impl Group {
    /// Starts the command as leader of a new process group, with no standard input.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let text = describe(command);
        let child = command
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start `{text}`"))?;
        Ok(Self { child, status: None, text })
    }

    /// The process ID, which is also the group's.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, to take its pipes.
    pub(crate) fn child_mut(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The exit status, if the child has ended.
    pub(crate) fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self
                .child
                .try_wait()
                .with_context(|| format!("cannot wait for `{}` (waitpid)", self.text))?;
        }
        Ok(self.status)
    }

    /// Waits for the end of the child, at most until `deadline`; does not look at signals.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> Result<Option<ExitStatus>> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(POLL_INTERVAL.min(deadline - Instant::now()));
        }
    }

    /// Asks the child to end (SIGTERM), and kills the group when it has not within `grace`.
    pub(crate) fn terminate(&mut self, grace: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::TERM)?;
        if let Some(status) = self.wait_until(Instant::now() + grace)? {
            return Ok(status);
        }
        self.kill()
    }

    /// Kills the whole group and waits for the child.
    pub(crate) fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::KILL)?;
        let status = self
            .child
            .wait()
            .with_context(|| format!("cannot wait for `{}` (waitpid)", self.text))?;
        self.status = Some(status);
        Ok(status)
    }

    /// Sends a signal to the group. Only while the leader is not reaped: its ID
    /// cannot belong to anyone else until then.
    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        match kill_process_group(pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("cannot signal `{}` (kill)", self.text))
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = self.terminate(GRACE_ON_DROP) {
            eprintln!("warning: {error:#}");
        }
    }
}

/// How a command that wrote to a log ended.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Exit status; `None` when it was stopped because its time was over.
    pub(crate) status: Option<ExitStatus>,
}

impl Finished {
    /// Whether it ended by itself with success.
    pub(crate) fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// How it ended, in words.
    pub(crate) fn explain(&self, limit: Duration) -> String {
        self.status.map_or_else(
            || format!("was stopped after its limit of {} s", limit.as_secs()),
            explain,
        )
    }
}

/// Runs a command to its end with all its output appended to `log`.
///
/// # Errors
/// When it cannot be started, and with `Interrupted` after a signal; the
/// command is ended before that returns.
pub(crate) fn run_to_log(command: &mut Command, log: &Path, limit: Duration) -> Result<Finished> {
    let stdout = append(log)?;
    run_logged(command, stdout, log, limit)
}

/// Like [`run_to_log`], with standard output in a file of its own, which is emptied first.
pub(crate) fn run_to_files(
    command: &mut Command,
    stdout: &Path,
    log: &Path,
    limit: Duration,
) -> Result<Finished> {
    let stdout =
        File::create(stdout).with_context(|| format!("cannot create {}", stdout.display()))?;
    run_logged(command, stdout, log, limit)
}

fn run_logged(
    command: &mut Command,
    stdout: File,
    log: &Path,
    limit: Duration,
) -> Result<Finished> {
    let mut stderr = append(log)?;
    writeln!(stderr, "$ {}", describe(command))
        .with_context(|| format!("cannot write {}", log.display()))?;
    command.env("CARGO_TERM_COLOR", "never").stdout(stdout).stderr(stderr);
    let mut group = Group::spawn(command)?;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = group.try_wait()? {
            return Ok(Finished { status: Some(status) });
        }
        interrupt::check()?;
        if Instant::now() >= deadline {
            group.kill()?;
            return Ok(Finished { status: None });
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Runs a command with its output on this command's standard error, so that the
/// user sees it at once.
///
/// # Errors
/// When it cannot be started or fails, and with `Interrupted` after a signal.
pub(crate) fn run_visibly(command: &mut Command) -> Result<()> {
    let text = describe(command);
    let errors = std::io::stderr();
    let stdout = rustix::io::dup(&errors).context("cannot duplicate standard error")?;
    let mut group = Group::spawn(command.stdout(stdout).stderr(Stdio::inherit()))?;
    loop {
        if let Some(status) = group.try_wait()? {
            if status.success() {
                return Ok(());
            }
            bail!("`{text}` {}", explain(status));
        }
        interrupt::check()?;
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Opens a log for appending, its directory included.
pub(crate) fn append(log: &Path) -> Result<File> {
    if let Some(directory) = log.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open {}", log.display()))
}

/// The last `lines` lines of a log; at most 64 KiB are read.
pub(crate) fn tail(log: &Path, lines: usize) -> Result<String> {
    const BYTES_MAX: u64 = 64 * 1024;
    let context = || format!("cannot read {}", log.display());
    let mut file = File::open(log).with_context(context)?;
    let length = file.metadata().with_context(context)?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(BYTES_MAX))).with_context(context)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).with_context(context)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    Ok(all[all.len().saturating_sub(lines)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn is_alive(pid: &str) -> bool {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
    }

    #[test]
    fn a_command_line_is_quoted_where_a_shell_needs_it() {
        let mut command = Command::new("stoq");
        command.args(["serve", "--listen", "[::1]:0", "it's", ""]);
        assert_eq!(describe(&command), r"stoq serve --listen '[::1]:0' 'it'\''s' ''");
    }

    #[test]
    fn a_failure_names_command_and_message() {
        let error = output(&mut shell("echo broken >&2; exit 3")).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("broken"), "{error}");
        let error = output(&mut Command::new("/nonexistent/program")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/program"), "{error}");
    }

    #[test]
    fn dropping_a_group_ends_the_grandchildren_too() {
        let directory = std::env::temp_dir().join(format!("stoq-proc-test-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join("pid");
        let script = format!("sleep 300 & echo $! > {}; wait", file.display());
        let group = Group::spawn(&mut shell(&script)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let pid = loop {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if text.ends_with('\n') {
                break text.trim().to_owned();
            }
            assert!(Instant::now() < deadline, "the shell wrote no process ID");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(is_alive(&pid));
        drop(group);
        std::fs::remove_dir_all(&directory).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while is_alive(&pid) {
            assert!(Instant::now() < deadline, "process {pid} survived its group");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_group_that_ignores_sigterm_is_killed() {
        let mut group =
            Group::spawn(&mut shell("trap '' TERM; while :; do sleep 0.1; done")).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let status = group.terminate(Duration::from_millis(300)).unwrap();
        assert_eq!(status.signal(), Some(9));
    }

    #[test]
    fn a_log_keeps_output_and_a_limit_stops_the_command() {
        let log = std::env::temp_dir().join(format!("stoq-log-test-{}.log", std::process::id()));
        let limit = Duration::from_millis(400);
        let finished =
            run_to_log(&mut shell("echo one; echo two >&2; sleep 60"), &log, limit).unwrap();
        assert!(finished.status.is_none() && !finished.success());
        assert_eq!(tail(&log, 2).unwrap(), "one\ntwo");
        let finished = run_to_log(&mut shell("exit 7"), &log, limit).unwrap();
        assert!(finished.explain(limit).contains("exit code 7"));
        std::fs::remove_file(&log).unwrap();
    }
}
