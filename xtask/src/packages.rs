//! The system's package manager, and what the commands need from it.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::terminal::Terminal;
use crate::workspace::Workspace;
use crate::{machine::Machine, proc};

/// A package manager that is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Installer {
    Apt,
    Dnf,
    Pacman,
    Zypper,
    Apk,
}

impl Installer {
    const ALL: [(&'static str, Self); 5] = [
        ("apt-get", Self::Apt),
        ("dnf", Self::Dnf),
        ("pacman", Self::Pacman),
        ("zypper", Self::Zypper),
        ("apk", Self::Apk),
    ];

    fn detect() -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|(program, _)| proc::find_program(program).is_some())
            .map(|(_, installer)| installer)
    }

    /// The command that refreshes the package lists, where one is needed.
    fn refresh(self) -> Option<Command> {
        let words: &[&str] = match self {
            Self::Apt => &["apt-get", "-o", "DPkg::Lock::Timeout=120", "update"],
            Self::Pacman => &["pacman", "-Sy", "--noconfirm"],
            Self::Zypper => &["zypper", "--non-interactive", "refresh"],
            Self::Dnf | Self::Apk => return None,
        };
        Some(command(words))
    }

    fn install(self, packages: &[&str]) -> Command {
        let words: &[&str] = match self {
            Self::Apt => &[
                "apt-get",
                "-o",
                "DPkg::Lock::Timeout=120",
                "install",
                "--yes",
                "--no-install-recommends",
            ],
            Self::Dnf => &["dnf", "install", "--assumeyes"],
            Self::Pacman => &["pacman", "-S", "--needed", "--noconfirm"],
            Self::Zypper => &["zypper", "--non-interactive", "install"],
            Self::Apk => &["apk", "add"],
        };
        let mut command = command(words);
        command.args(packages);
        command
    }
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// How to see whether something is there.
#[derive(Debug, Clone, Copy)]
enum Probe {
    /// A program on the PATH.
    Program(&'static str),
    /// A library that pkg-config knows.
    Library(&'static str),
    /// A library that the dynamic linker knows.
    SharedLibrary(&'static str),
    /// libclang, as bindgen looks for it: with or without a version in its name, and in LLVM's own
    /// directories, which the dynamic linker may not know.
    Libclang,
}

impl Probe {
    fn name(self) -> &'static str {
        match self {
            Self::Program(name) | Self::Library(name) | Self::SharedLibrary(name) => name,
            Self::Libclang => "libclang",
        }
    }

    fn is_present(self) -> bool {
        match self {
            Self::Program(name) => proc::find_program(name).is_some(),
            // ldconfig lives where only root's PATH may lead.
            Self::SharedLibrary(name) => ["ldconfig", "/sbin/ldconfig"].iter().any(|program| {
                proc::output(Command::new(program).arg("-p"))
                    .is_ok_and(|listed| listed.contains(name))
            }),
            Self::Libclang => {
                std::env::var_os("LIBCLANG_PATH").is_some()
                    || library_directories().iter().any(|directory| holds_libclang(directory))
            }
            Self::Library(name) => ["pkg-config", "pkgconf"].iter().any(|program| {
                proc::find_program(program).is_some_and(|path| {
                    proc::output(Command::new(path).args(["--exists", name])).is_ok()
                })
            }),
        }
    }
}

/// Where distributions keep shared libraries, one level of subdirectories included:
/// `/usr/lib/x86_64-linux-gnu`, `/usr/lib/llvm-14/lib`.
fn library_directories() -> Vec<PathBuf> {
    let mut directories = Vec::new();
    for root in ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64"].map(Path::new) {
        directories.push(root.to_owned());
        for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
            directories.push(entry.path());
            directories.push(entry.path().join("lib"));
        }
    }
    directories
}

fn holds_libclang(directory: &Path) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).any(|name| is_libclang(&name.to_string_lossy()))
}

/// `libclang.so.15`, `libclang-14.so.1`; not `libclang-cpp.so`.
fn is_libclang(name: &str) -> bool {
    name.strip_prefix("libclang").is_some_and(|rest| {
        rest.trim_start_matches(|c: char| c == '-' || c == '.' || c.is_ascii_digit())
            .starts_with("so")
    })
}

/// Something that a command needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    probe: Probe,
    reason: &'static str,
    /// Names in the order of [`Installer::ALL`].
    packages: [&'static str; 5],
}

const fn need(probe: Probe, reason: &'static str, packages: [&'static str; 5]) -> Need {
    Need { probe, reason, packages }
}

const CC: Need = need(
    Probe::Program("cc"),
    "compiles the cryptography library (aws-lc)",
    ["build-essential", "gcc", "gcc", "gcc", "build-base"],
);
const IP: Need = need(
    Probe::Program("ip"),
    "makes network namespaces and veth pairs",
    ["iproute2", "iproute", "iproute2", "iproute2", "iproute2"],
);
const ETHTOOL: Need = need(
    Probe::Program("ethtool"),
    "switches checksum offload of veth pairs",
    ["ethtool", "ethtool", "ethtool", "ethtool", "ethtool"],
);
const MAKE: Need = need(
    Probe::Program("make"),
    "builds libbpf for the eBPF test runner",
    ["make", "make", "make", "make", "make"],
);
const PKG_CONFIG: Need = need(
    Probe::Program("pkg-config"),
    "finds libelf and zlib for the eBPF test runner",
    ["pkgconf", "pkgconf-pkg-config", "pkgconf", "pkgconf-pkg-config", "pkgconf"],
);
const LIBELF: Need = need(
    Probe::Library("libelf"),
    "reads eBPF objects in the eBPF test runner",
    ["libelf-dev", "elfutils-libelf-devel", "libelf", "libelf-devel", "elfutils-dev"],
);
const ZLIB: Need = need(
    Probe::Library("zlib"),
    "is needed by libelf in the eBPF test runner",
    ["zlib1g-dev", "zlib-devel", "zlib", "zlib-devel", "zlib-dev"],
);
const CMAKE: Need = need(
    Probe::Program("cmake"),
    "builds quiche's cryptography for the interop tests",
    ["cmake", "cmake", "cmake", "cmake", "cmake"],
);
const CXX: Need = need(
    Probe::Program("c++"),
    "builds quiche's cryptography for the interop tests",
    ["g++", "gcc-c++", "gcc", "gcc-c++", "build-base"],
);
const LIBCLANG: Need = need(
    Probe::Libclang,
    "reads C headers for quiche's and tquic's cryptography",
    ["clang", "clang", "clang", "clang-devel", "clang-dev"],
);
const PERF: Need = need(
    Probe::Program("perf"),
    "takes the samples of a profile",
    ["linux-perf", "perf", "perf", "perf", "perf"],
);
const VALGRIND: Need = need(
    Probe::Program("valgrind"),
    "counts instructions in the performance gate",
    ["valgrind", "valgrind", "valgrind", "valgrind", "valgrind"],
);
const PEBBLE: Need = need(
    Probe::Program("pebble"),
    "is the CA of the ACME tests",
    ["pebble", "pebble", "pebble", "pebble", "pebble"],
);
const OPENSSL: Need = need(
    Probe::Program("openssl"),
    "verifies our certificates in the tests",
    ["openssl", "openssl", "openssl", "openssl", "openssl"],
);

const IPSEC_MB: Need = need(
    Probe::SharedLibrary("libIPSec_MB.so.1"),
    "seals packets in half the time (optional; aws-lc-rs is built in)",
    ["libipsec-mb1", "intel-ipsec-mb", "intel-ipsec-mb", "libIPSec_MB1", ""],
);

/// What makes the engine faster where the distribution has it; nothing depends on it.
pub(crate) fn optional_needs() -> Vec<Need> {
    // It is written for one processor family.
    if cfg!(target_arch = "x86_64") { vec![IPSEC_MB] } else { Vec::new() }
}

/// What `cargo xtask demo` and `veth` need; building needs the compiler only.
pub(crate) fn demo_needs() -> Vec<Need> {
    vec![CC, IP, ETHTOOL]
}

/// What peers with cryptography in C need to be built: without it they are left out of a comparison.
pub(crate) fn peer_needs() -> Vec<Need> {
    vec![CMAKE, CXX, LIBCLANG]
}

/// What `cargo xtask profile` needs.
pub(crate) fn profile_needs() -> Vec<Need> {
    [demo_needs(), vec![PERF]].concat()
}

/// What `cargo xtask test` needs for the crates that this tree holds.
pub(crate) fn test_needs(workspace: &Workspace) -> Vec<Need> {
    let mut needs = demo_needs();
    if workspace.package("stoq-ebpf-testrun").is_some() {
        needs.extend([MAKE, PKG_CONFIG, LIBELF, ZLIB]);
    }
    if workspace.package("stoq-interop").is_some() {
        needs.extend(peer_needs());
    }
    needs.extend([VALGRIND, OPENSSL, PEBBLE]);
    needs
}

/// Those of `needs` that are not there.
pub(crate) fn missing(needs: &[Need]) -> Vec<Need> {
    needs.iter().copied().filter(|need| !need.probe.is_present()).collect()
}

/// One line for each need: what, why.
pub(crate) fn explain(needs: &[Need]) -> Vec<String> {
    needs.iter().map(|need| format!("{:<12} {}", need.probe.name(), need.reason)).collect()
}

/// Installs what is missing, after saying what and why, and asking unless `yes`.
///
/// # Errors
/// Without root, without a known package manager, when the user refuses, when
/// the installation fails, and when something is still missing afterwards.
pub(crate) fn install_missing(
    terminal: &mut Terminal,
    machine: &Machine,
    needs: &[Need],
    yes: bool,
) -> Result<()> {
    let missing_needs = missing(needs);
    if missing_needs.is_empty() {
        return Ok(());
    }
    terminal.heading("Missing on this machine:");
    for line in explain(&missing_needs) {
        terminal.line(&format!("  {line}"));
    }
    let Some(installer) = Installer::detect() else {
        bail!(
            "no known package manager (apt, dnf, pacman, zypper, apk): install the above by hand"
        );
    };
    let packages = package_names(&missing_needs, installer);
    let mut install = installer.install(&packages);
    let text = proc::describe(&install);
    if !machine.is_root {
        bail!("installing needs root; run `sudo {text}` and try again");
    }
    if !yes && !confirm(terminal, &text)? {
        bail!("not installed; run `{text}` and try again");
    }
    if proc::run_visibly(&mut install).is_err() {
        // The usual reason on a fresh machine: no package lists yet.
        crate::interrupt::check()?;
        if let Some(mut refresh) = installer.refresh() {
            terminal.line("The installation failed; trying again with fresh package lists.");
            proc::run_visibly(&mut refresh)?;
        }
        proc::run_visibly(&mut installer.install(&packages))?;
    }
    let still = missing(&missing_needs);
    if !still.is_empty() {
        bail!("installed, but still not found: {}", explain(&still).join("; "));
    }
    Ok(())
}

/// Installs what is missing of `needs` where that is possible without a question left open; says
/// so, and goes on, where it is not.
pub(crate) fn install_optional(
    terminal: &mut Terminal,
    machine: &Machine,
    needs: &[Need],
    yes: bool,
) -> Result<()> {
    for need in missing(needs) {
        let name = need.probe.name();
        let available = Installer::detect()
            .is_some_and(|installer| !package_names(&[need], installer)[0].is_empty());
        let result = if available {
            install_missing(terminal, machine, &[need], yes)
        } else {
            Err(anyhow::anyhow!("no package of it is known for this system"))
        };
        crate::interrupt::check()?;
        if let Err(error) = result {
            terminal.warn(&format!("goes on without {name}, which {}: {error:#}", need.reason));
        }
    }
    Ok(())
}

fn package_names(needs: &[Need], installer: Installer) -> Vec<&'static str> {
    let index = Installer::ALL
        .iter()
        .position(|(_, each)| *each == installer)
        .expect("every installer is in ALL");
    let mut names: Vec<&str> = Vec::new();
    for need in needs {
        if !names.contains(&need.packages[index]) {
            names.push(need.packages[index]);
        }
    }
    names
}

fn confirm(terminal: &mut Terminal, text: &str) -> Result<bool> {
    if assume_yes() {
        return Ok(true);
    }
    if !std::io::stdin().is_terminal() {
        bail!("cannot ask whether to run `{text}`: no terminal; pass --yes to allow it");
    }
    terminal.line(&format!("Run `{text}`? [y/N] "));
    std::io::stderr().flush().context("cannot write to the terminal")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    crate::interrupt::check()?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Continuous integration cannot answer questions.
fn assume_yes() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true" || value == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_installer_gets_its_own_names_once() {
        let needs = [CC, CXX, LIBELF];
        assert_eq!(package_names(&needs, Installer::Apt), ["build-essential", "g++", "libelf-dev"]);
        assert_eq!(package_names(&needs, Installer::Apk), ["build-base", "elfutils-dev"]);
        assert_eq!(package_names(&needs, Installer::Pacman), ["gcc", "libelf"]);
    }

    #[test]
    fn install_commands() {
        let text = proc::describe(&Installer::Apt.install(&["a", "b"]));
        assert!(text.starts_with("apt-get") && text.ends_with("--no-install-recommends a b"));
        assert_eq!(proc::describe(&Installer::Dnf.install(&["a"])), "dnf install --assumeyes a");
    }

    #[test]
    fn probes_see_what_is_there_and_what_is_not() {
        assert!(Probe::Program("sh").is_present());
        assert!(!Probe::Program("no-such-program-anywhere").is_present());
        assert!(!Probe::Library("no-such-library-anywhere").is_present());
        assert!(Probe::SharedLibrary("libc.so").is_present());
        assert!(!Probe::SharedLibrary("libno-such-library.so").is_present());
        let absent = need(Probe::Program("no-such-program-anywhere"), "r", ["x"; 5]);
        let present = need(Probe::Program("sh"), "r", ["x"; 5]);
        assert_eq!(missing(&[present, absent]).len(), 1);
    }

    #[test]
    fn libclang_by_its_names() {
        for name in ["libclang.so", "libclang.so.15", "libclang-14.so.1", "libclang-14.so.14.0.6"] {
            assert!(is_libclang(name), "{name}");
        }
        for name in ["libclang-cpp.so", "libclang-cpp14.so.14", "libclang", "libclang.a", "libc.so"]
        {
            assert!(!is_libclang(name), "{name}");
        }
        let directory = std::env::temp_dir().join(format!("stoq-clang-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        assert!(!holds_libclang(&directory));
        std::fs::write(directory.join("libclang-14.so.1"), "").unwrap();
        assert!(holds_libclang(&directory));
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn what_is_optional_never_fails() {
        let mut machine = Machine::inspect().unwrap();
        machine.is_root = false;
        let probe = Probe::SharedLibrary("libno-such-library.so");
        for packages in [["pkg"; 5], [""; 5]] {
            let absent = need(probe, "r", packages);
            install_optional(&mut Terminal::new(true), &machine, &[absent], true).unwrap();
        }
    }

    #[test]
    fn without_root_the_command_to_run_is_named() {
        let mut machine = Machine::inspect().unwrap();
        machine.is_root = false;
        let absent = need(Probe::Program("no-such-program-anywhere"), "r", ["pkg"; 5]);
        let result = install_missing(&mut Terminal::new(true), &machine, &[absent], true);
        if Installer::detect().is_some() {
            assert!(result.unwrap_err().to_string().contains("pkg"));
        } else {
            assert!(result.unwrap_err().to_string().contains("package manager"));
        }
    }
}
