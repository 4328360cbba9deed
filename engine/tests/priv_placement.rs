//! Cores that the cgroup takes away: named, they are refused with the file that says so; otherwise
//! shards run on what is left. Needs root, and a cpuset controller (cgroup v1 or v2).

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pair::{Watchdog, config, identity};
use stoq::config::TransportConfig;
use stoq::engine::Engine;

/// The cgroup of the child process; see [`child`].
const CHILD_CGROUP: &str = "STOQ_PLACEMENT_TEST_CGROUP";
/// The core that the child asks for; empty: whichever.
const CHILD_CORE: &str = "STOQ_PLACEMENT_TEST_CORE";

/// A cpuset of our own, gone with the test.
struct Cpuset(PathBuf);

impl Cpuset {
    /// Below the root, with core 0 alone.
    fn new() -> Self {
        let name = format!("stoq-test-{}", std::process::id());
        let unified = Path::new("/sys/fs/cgroup");
        if unified.join("cgroup.controllers").exists() {
            // Enabled already, or refused here: then the cpuset's files are missing below.
            let _refused = fs::write(unified.join("cgroup.subtree_control"), "+cpuset");
            let cpuset = Self(unified.join(name));
            cpuset.make();
            return cpuset;
        }
        let cpuset = Self(unified.join("cpuset").join(name));
        cpuset.make();
        // Version 1 takes no process before it has memory nodes.
        cpuset.write("cpuset.mems", "0");
        cpuset
    }

    fn make(&self) {
        fs::create_dir(&self.0).unwrap_or_else(|error| panic!("{}: {error}", self.0.display()));
        self.write("cpuset.cpus", "0");
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.0.join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// What a server says that starts in here with this core.
    fn start_server(&self, core: &str) -> String {
        let output = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child", "--nocapture"])
            .env(CHILD_CGROUP, &self.0)
            .env(CHILD_CORE, core)
            .output()
            .expect("this test can be started");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        // The kernel lets the child go in its own time.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} could not be removed", self.0.display());
    }
}

#[test]
fn a_core_outside_the_cgroups_cpuset_is_refused_with_its_file() {
    let _watchdog = Watchdog::new("a_core_outside_the_cgroups_cpuset_is_refused_with_its_file");
    let online = fs::read_to_string("/sys/devices/system/cpu/online").expect("sysfs");
    assert!(online.trim() != "0", "this machine has one core: there is none outside of the cpuset");
    let cpuset = Cpuset::new();
    let text = cpuset.start_server("1");
    assert!(text.contains("refused: "), "{text}");
    assert!(text.contains("the cgroup's cpuset allows the cores 0 only"), "{text}");
    let file = cpuset.0.join("cpuset.");
    assert!(text.contains(&file.display().to_string()), "{text}");
    for core in ["0", ""] {
        let text = cpuset.start_server(core);
        assert!(text.contains("runs on: 0\n"), "asked for core `{core}`: {text}");
    }
}

/// Not a test: a server in a process of its own, in the cpuset.
#[test]
fn child() {
    let Ok(cgroup) = std::env::var(CHILD_CGROUP) else { return };
    let core = std::env::var(CHILD_CORE).expect("set with the cgroup");
    fs::write(Path::new(&cgroup).join("cgroup.procs"), std::process::id().to_string())
        .expect("a process may be moved");
    let cores = core.parse().into_iter().collect();
    let (server_tls, _) = identity();
    let config = TransportConfig { cores, ..config() };
    match Engine::builder().config(config).server(server_tls).start() {
        Ok(_engine) => {
            // A thread takes its name itself.
            pair::wait_for("the shard's thread", || core_of_shard().is_some());
            println!("runs on: {}", core_of_shard().expect("it runs"));
        }
        Err(error) => println!("refused: {error}"),
    }
}

fn core_of_shard() -> Option<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("procfs");
    let status = tasks.filter_map(|task| {
        let path = task.ok()?.path();
        let name = fs::read_to_string(path.join("comm")).ok()?;
        name.starts_with("stoq-shard-").then(|| fs::read_to_string(path.join("status")).ok())?
    });
    let status: String = status.collect();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    Some(list.trim().to_owned())
}
