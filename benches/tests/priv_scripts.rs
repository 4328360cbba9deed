//! `scripts/setup-nic.sh` and `scripts/restore-nic.sh` on a veth pair: what is changed comes back, however
//! the script ends. Needs root.

#[path = "../../engine/tests/common/netns.rs"]
#[allow(dead_code, unreachable_pub)] // each test file uses its own part
mod netns;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use netns::{Netns, veth_with_queues};

/// A veth with four queues, a directory for what the scripts remember, and one for stand-ins of programs.
struct Stage {
    net: Netns,
    _far: Netns,
    state: PathBuf,
    programs: PathBuf,
}

impl Stage {
    fn new(label: &str) -> Self {
        let (net, far) = (Netns::new(label), Netns::new(label));
        veth_with_queues((&net, "nic0"), (&far, "nic1"), 4);
        let directory = std::env::temp_dir().join(format!("stoq-scripts-{}", net.name()));
        let (state, programs) = (directory.join("state"), directory.join("bin"));
        std::fs::create_dir_all(&programs).expect("a directory");
        Self { net, _far: far, state, programs }
    }

    fn run(&self, script: &str, arguments: &[&str]) -> Output {
        let scripts = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts");
        let path = std::env::var("PATH").expect("a PATH");
        Command::new("ip")
            .args(["netns", "exec", self.net.name(), "bash", &format!("{scripts}/{script}")])
            .args(arguments)
            .env("STOQ_STATE_DIR", &self.state)
            .env("PATH", format!("{}:{path}", self.programs.display()))
            .output()
            .expect("ip starts")
    }

    /// Everything that the scripts may change on this device.
    fn settings(&self) -> String {
        let channels = self.net.exec("ethtool -l nic0");
        format!("{channels}{}", self.net.exec("ethtool -k nic0"))
    }

    fn restore_file(&self) -> PathBuf {
        self.state.join("nic-nic0.restore")
    }

    /// An `ethtool` that does `first` when it is to switch an offload off.
    fn stand_in(&self, first: &str) {
        let real = netns::shell("sh", &["-c", "command -v ethtool"]);
        let text = format!(
            "#!/bin/sh\ncase \"$1 $4\" in '-K off') {first};; esac\nexec {} \"$@\"\n",
            real.trim()
        );
        let path = self.programs.join("ethtool");
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("executable");
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A directory left behind is the system's to clean.
        let _left = std::fs::remove_dir_all(self.state.parent().expect("made with one"));
    }
}

fn told(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

#[test]
fn what_is_changed_comes_back() {
    let stage = Stage::new("sa");
    let before = stage.settings();
    let dry = stage.run("setup-nic.sh", &["nic0", "--queues", "2", "--dry-run"]);
    assert!(dry.status.success() && told(&dry).contains("nothing was changed"), "{}", told(&dry));
    assert_eq!(stage.settings(), before);
    assert!(!stage.state.exists());

    let set = stage.run("setup-nic.sh", &["nic0", "--queues", "2"]);
    assert!(set.status.success(), "{}", told(&set));
    assert_ne!(stage.settings(), before);
    assert!(stage.restore_file().exists());
    // A second run would remember the first one's values as the machine's own.
    let again = stage.run("setup-nic.sh", &["nic0", "--queues", "1"]);
    assert!(!again.status.success() && told(&again).contains("restore-nic.sh"), "{}", told(&again));
    assert!(stage.restore_file().exists());

    let restored = stage.run("restore-nic.sh", &["nic0"]);
    assert!(restored.status.success(), "{}", told(&restored));
    assert_eq!(stage.settings(), before);
    assert!(!stage.restore_file().exists());
    let nothing = stage.run("restore-nic.sh", &["nic0"]);
    assert!(!nothing.status.success() && told(&nothing).contains("nothing was changed"));
}

#[test]
fn an_early_end_puts_back_what_was_changed() {
    for (signal, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        let stage = Stage::new("sb");
        let before = stage.settings();
        // The queues are changed by then, and the offload is changed just after the signal.
        stage.stand_in(&format!("kill -{signal} $PPID"));
        let ended = stage.run("setup-nic.sh", &["nic0", "--queues", "2"]);
        assert_eq!(ended.status.code(), Some(code), "{}", told(&ended));
        assert!(told(&ended).contains("putting nic0 back"), "{}", told(&ended));
        assert!(told(&ended).contains("queues: rx 4 tx 4 -> rx 2 tx 2"), "{}", told(&ended));
        assert_eq!(stage.settings(), before, "{}", told(&ended));
        assert!(!stage.restore_file().exists());
    }
}

#[test]
fn what_the_driver_refuses_is_told_and_the_rest_is_done() {
    let stage = Stage::new("sc");
    let before = stage.settings();
    stage.stand_in("exit 1");
    let set = stage.run("setup-nic.sh", &["nic0", "--queues", "2"]);
    assert!(set.status.success() && told(&set).contains("REFUSED"), "{}", told(&set));
    assert_ne!(stage.settings(), before, "the queues are set");
    let remembered = std::fs::read_to_string(stage.restore_file()).expect("remembered");
    assert!(remembered.contains("-L nic0") && !remembered.contains("-K"), "{remembered}");
    assert!(stage.run("restore-nic.sh", &["nic0"]).status.success());
    assert_eq!(stage.settings(), before);
}

#[test]
fn wrong_words_change_nothing() {
    let stage = Stage::new("sd");
    let before = stage.settings();
    for (arguments, word) in [
        (&["nosuch0"][..], "no interface"),
        (&["nic0", "--queues", "9"], "at most 4"),
        (&["nic0", "--queues", "two"], "no number"),
        (&["nic0", "--shard-cores", "3-1"], "no range"),
        (&["nic0; reboot"], "no interface name"),
    ] {
        let refused = stage.run("setup-nic.sh", arguments);
        assert!(!refused.status.success() && told(&refused).contains(word), "{}", told(&refused));
    }
    assert_eq!(stage.settings(), before);
    assert!(!stage.restore_file().exists());

    // A file that somebody else wrote is not obeyed.
    std::fs::create_dir_all(&stage.state).expect("a directory");
    let victim = stage.state.join("victim");
    for line in [
        format!("write {} 1", victim.display()),
        format!("touch {}", victim.display()),
        "ethtool -K other0 gro off".to_owned(),
        "ethtool --reset nic0".to_owned(),
    ] {
        std::fs::write(stage.restore_file(), line).expect("written");
        let refused = stage.run("restore-nic.sh", &["nic0"]);
        assert!(
            !refused.status.success() && told(&refused).contains("unexpected"),
            "{}",
            told(&refused)
        );
    }
    assert!(!victim.exists());
    assert_eq!(stage.settings(), before);
}
