//! A program under comparison: its JSON lines, its end.

use std::io::{BufRead, BufReader, Read, Seek};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::interrupt;
use crate::proc::{self, Group};

/// How often a wait looks at the signal flag.
const TICK: Duration = Duration::from_millis(100);

/// A running program; it and what it started end when this is dropped.
pub struct Program {
    group: Group,
    lines: Receiver<String>,
    errors: std::fs::File,
    what: String,
}

impl Program {
    /// Starts it.
    pub fn start(mut command: Command, what: String) -> anyhow::Result<Self> {
        let mut errors = unnamed_file().context("a file for its errors")?;
        command.stdout(Stdio::piped()).stderr(errors.try_clone()?).env("RUST_BACKTRACE", "0");
        errors.rewind()?;
        let mut group = Group::spawn(&mut command)?;
        let stdout = group.child_mut().stdout.take().expect("stdout is a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // A pipe that breaks is the program's end, which the channel's end tells.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { group, lines, errors, what })
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.group.id()
    }

    /// The next line whose `event` is one of `wanted`.
    ///
    /// # Errors
    /// It ends before, takes longer than `timeout`, or a signal arrived.
    pub fn event(&mut self, wanted: &[&str], timeout: Duration) -> anyhow::Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            interrupt::check()?;
            match self.lines.recv_timeout(TICK) {
                Ok(line) => {
                    let value: Value = serde_json::from_str(&line)
                        .with_context(|| format!("{}: not JSON: {line}", self.what))?;
                    if wanted.iter().any(|event| value["event"] == **event) {
                        return Ok(value);
                    }
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{}: no answer within {} s", self.what, timeout.as_secs())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.group.wait_until(Instant::now() + proc::GRACE)?;
                    let told = self.last_error();
                    bail!("{}: {told}", self.what);
                }
            }
        }
    }

    /// Ends it.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.group.terminate(proc::GRACE)?;
        Ok(())
    }

    /// Its words on standard error, the first that is an error.
    fn last_error(&mut self) -> String {
        let mut text = String::new();
        let read = self.errors.rewind().and_then(|()| self.errors.read_to_string(&mut text));
        if let Err(error) = read {
            return format!("ended; its errors cannot be read: {error}");
        }
        let told: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.contains(" WARN ") && *line != "Caused by:")
            .collect();
        if told.is_empty() { "ended without a word".into() } else { told.join(" ") }
    }
}

/// A file without a name: it vanishes with its last descriptor.
fn unnamed_file() -> std::io::Result<std::fs::File> {
    use rustix::fs::{MemfdFlags, memfd_create};
    Ok(memfd_create("stoq-compare", MemfdFlags::CLOEXEC)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Program::start(command, "sh".into()).expect("starts")
    }

    #[test]
    fn events_are_found_among_others() {
        let mut program =
            shell(r#"echo '{"event":"progress"}'; echo '{"event":"done","ops":3}'; sleep 60"#);
        let done = program.event(&["done"], Duration::from_secs(20)).expect("an event");
        assert_eq!(done["ops"], 3);
        program.stop().expect("ends");
    }

    #[test]
    fn the_error_of_one_that_ends_is_told() {
        let mut program = shell("echo 'x WARN y' >&2; echo 'it broke' >&2; exit 1");
        let error = program.event(&["done"], Duration::from_secs(20)).expect_err("ended");
        assert_eq!(error.to_string(), "sh: it broke");
        let mut silent = shell("sleep 60");
        let error = silent.event(&["done"], Duration::from_millis(200)).expect_err("silent");
        assert!(error.to_string().contains("no answer"), "{error}");
    }
}
