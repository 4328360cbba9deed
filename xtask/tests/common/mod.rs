//! Runs `xtask demo` over the fake `stoq` binary.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A demo over the fake binary, with a temporary directory of its own.
pub(crate) struct Demo {
    /// The directory, removed at the end.
    pub(crate) directory: PathBuf,
    /// The command, to add options to.
    pub(crate) command: Command,
}

impl Demo {
    pub(crate) fn new(name: &str, fault: &str) -> Self {
        let directory =
            std::env::temp_dir().join(format!("xtask-test-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let fake = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_stoq.sh");
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(["demo", "--json", "--yes", "--seconds", "1", "--file-mib", "16", "--stoq"]);
        command.arg(fake).env("TMPDIR", &directory).env("FAKE_STOQ", fault);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { directory, command }
    }

    pub(crate) fn run(&mut self) -> Output {
        self.command.output().unwrap()
    }

    /// What the demo left in its temporary directory.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        std::fs::read_dir(&self.directory).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

/// Waits until `condition` holds, and fails with `what` when it does not.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Process IDs of the fake binaries that `parent` has started.
pub(crate) fn children(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let Ok(stat) = std::fs::read_to_string(path.join("stat")) else { continue };
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        if rest.split_whitespace().nth(1) == Some(&parent.to_string()) {
            found.push(path.file_name().unwrap().to_str().unwrap().parse().unwrap());
        }
    }
    found
}

/// Sends a signal with `kill`.
pub(crate) fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &pid.to_string()]).status().unwrap().success());
}

/// Waits for the end, at most 30 s.
pub(crate) fn finish(mut child: Child) -> Output {
    wait_until("the demo does not end", || child.try_wait().unwrap().is_some());
    child.wait_with_output().unwrap()
}
