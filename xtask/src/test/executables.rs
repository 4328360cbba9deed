//! Test executables: all built by one cargo call, with one profile and one set of
//! features, so that nothing is compiled twice; then run one by one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::tally::Tally;
use crate::proc;
use crate::workspace::{Target, Workspace};

/// The profile of everything that tests run.
pub(crate) const PROFILE: &str = "test-fast";
/// Features under test: that which switches on tests that need root, tokio's traits, ACME.
const TESTED_FEATURES: [&str; 3] = ["privileged-tests", "tokio", "acme"];
/// How long compiling may take.
pub(crate) const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);
/// How long one test executable may take.
const RUN_LIMIT: Duration = Duration::from_secs(10 * 60);

/// A test or example that cargo has built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Executable {
    /// Its package.
    pub(crate) package: String,
    /// Its target.
    pub(crate) target: String,
    /// `lib`, `bin`, `test` or `example`.
    pub(crate) kind: String,
    /// The file to run.
    path: PathBuf,
    /// Where cargo would run it.
    directory: PathBuf,
}

#[derive(Deserialize)]
struct Artifact {
    manifest_path: PathBuf,
    target: Target,
    profile: ArtifactProfile,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct ArtifactProfile {
    test: bool,
}

/// `--workspace`, the profile and the features: the same for clippy, tests and
/// documentation, for they share what is built.
pub(crate) fn common_arguments(workspace: &Workspace) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["--workspace", "--profile", PROFILE].map(str::to_owned).to_vec();
    let features: Vec<String> = workspace
        .packages
        .iter()
        .flat_map(|package| {
            TESTED_FEATURES
                .into_iter()
                .filter(|feature| package.features.contains_key(*feature))
                .map(|feature| format!("{}/{feature}", package.name))
        })
        .collect();
    if !features.is_empty() {
        arguments.push("--features".into());
        arguments.push(features.join(","));
    }
    arguments
}

/// Builds all tests and examples of the workspace.
pub(crate) fn build(workspace: &Workspace, log: &Path) -> Result<Vec<Executable>> {
    let messages = workspace.logs().join("build-messages.json");
    std::fs::create_dir_all(workspace.logs()).context("cannot create the directory of the logs")?;
    let mut command = workspace.cargo();
    command.args(["test", "--no-run", "--message-format=json-render-diagnostics"]);
    command.args(common_arguments(workspace));
    let finished = proc::run_to_files(&mut command, &messages, log, BUILD_LIMIT)?;
    if !finished.success() {
        bail!("the tests do not compile: cargo {}", finished.explain(BUILD_LIMIT));
    }
    let text = std::fs::read_to_string(&messages).context("cannot read cargo's messages")?;
    parse(workspace, &text)
}

fn parse(workspace: &Workspace, messages: &str) -> Result<Vec<Executable>> {
    let mut executables = Vec::new();
    for line in messages.lines().filter(|line| line.contains(r#""reason":"compiler-artifact""#)) {
        let artifact: Artifact =
            serde_json::from_str(line).context("cannot read a message of cargo")?;
        let kind = artifact.target.kind.first().map_or("", String::as_str);
        let wanted = artifact.profile.test || kind == "example";
        let package = workspace
            .packages
            .iter()
            .find(|package| package.manifest_path == artifact.manifest_path);
        if let (true, Some(path), Some(package)) = (wanted, artifact.executable, package) {
            executables.push(Executable {
                package: package.name.clone(),
                target: artifact.target.name.clone(),
                kind: if kind.ends_with("lib") { "lib".into() } else { kind.to_owned() },
                path,
                directory: package.directory().to_path_buf(),
            });
        }
    }
    executables
        .sort_by(|a, b| (&a.package, &a.kind, &a.target).cmp(&(&b.package, &b.kind, &b.target)));
    Ok(executables)
}

impl Executable {
    /// Whether it is a test that needs root.
    pub(crate) fn is_privileged(&self) -> bool {
        self.kind == "test" && self.target.starts_with("priv_")
    }

    /// The command that runs it as cargo would.
    pub(crate) fn command(&self, workspace: &Workspace) -> Command {
        let mut command = Command::new(&self.path);
        command
            .current_dir(&self.directory)
            .env("CARGO_MANIFEST_DIR", &self.directory)
            .env("CARGO_TARGET_TMPDIR", workspace.target.join("tmp"));
        command
    }

    /// Runs it as a libtest executable and counts its cases.
    pub(crate) fn run(
        &self,
        workspace: &Workspace,
        arguments: &[&str],
        log: &Path,
    ) -> Result<Tally> {
        run_libtest(self.command(workspace).args(arguments), log, RUN_LIMIT)
    }
}

/// Runs a command that prints libtest's results, and counts them.
pub(crate) fn run_libtest(command: &mut Command, log: &Path, limit: Duration) -> Result<Tally> {
    let start = std::fs::metadata(log).map_or(0, |metadata| metadata.len());
    let finished = proc::run_to_log(command, log, limit)?;
    let bytes = std::fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let own = bytes.get(usize::try_from(start).context("log size")?..).unwrap_or_default();
    let tally = Tally::of_libtest(&String::from_utf8_lossy(own), finished.success());
    if !finished.success() {
        use std::io::Write as _;
        writeln!(
            proc::append(log)?,
            "xtask: {} {}",
            proc::describe(command),
            finished.explain(limit)
        )
        .with_context(|| format!("cannot write {}", log.display()))?;
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace() -> Workspace {
        Workspace::parse(
            r#"{"workspace_root":"/w","target_directory":"/w/target","packages":[
                {"name":"stoq","manifest_path":"/w/engine/Cargo.toml","features":{"privileged-tests":[],"tokio":[]},"targets":[]},
                {"name":"xtask","manifest_path":"/w/xtask/Cargo.toml","features":{},"targets":[]}]}"#,
        )
        .unwrap()
    }

    #[test]
    fn one_set_of_features_for_all() {
        assert_eq!(
            common_arguments(&workspace()).join(" "),
            "--workspace --profile test-fast --features stoq/privileged-tests,stoq/tokio"
        );
    }

    #[test]
    fn tests_and_examples_are_picked_from_the_messages() {
        let artifact = |manifest: &str, kind: &str, name: &str, test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"{manifest}","target":{{"kind":["{kind}"],"name":"{name}"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let messages = [
            r#"{"reason":"build-script-executed","package_id":"x"}"#.to_owned(),
            artifact("/reg/serde/Cargo.toml", "lib", "serde", false, "null"),
            artifact("/w/engine/Cargo.toml", "lib", "stoq", true, "\"/t/stoq-1\""),
            artifact("/w/engine/Cargo.toml", "test", "priv_veth", true, "\"/t/priv-1\""),
            artifact("/w/engine/Cargo.toml", "example", "get", false, "\"/t/get\""),
            artifact("/w/xtask/Cargo.toml", "bin", "xtask", false, "\"/t/xtask\""),
        ]
        .join("\n");
        let executables = parse(&workspace(), &messages).unwrap();
        let names: Vec<_> = executables.iter().map(|each| each.target.as_str()).collect();
        assert_eq!(names, ["get", "stoq", "priv_veth"]);
        assert!(executables[2].is_privileged() && !executables[1].is_privileged());
        assert_eq!(executables[0].directory, Path::new("/w/engine"));
        assert!(parse(&workspace(), r#"{"reason":"compiler-artifact"}"#).is_err());
    }

    #[test]
    fn a_log_that_holds_earlier_results_counts_only_its_own() {
        let log = std::env::temp_dir().join(format!("stoq-libtest-{}.log", std::process::id()));
        let run = |script: &str| {
            let limit = Duration::from_secs(20);
            run_libtest(Command::new("sh").args(["-c", script]), &log, limit).unwrap()
        };
        let ok = run("echo 'test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured'");
        let crash = run("kill -SEGV $$");
        std::fs::remove_file(&log).unwrap();
        assert_eq!(ok, Tally { passed: 5, failed: 0, skipped: 0 });
        assert_eq!(crash, Tally { passed: 0, failed: 1, skipped: 0 });
    }
}
