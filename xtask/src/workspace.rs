//! The workspace as cargo sees it, and cargo itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::proc;

/// `cargo metadata --no-deps`, as far as the commands need it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Workspace {
    /// Root of the repository.
    #[serde(rename = "workspace_root")]
    pub(crate) root: PathBuf,
    /// Where cargo builds.
    #[serde(rename = "target_directory")]
    pub(crate) target: PathBuf,
    /// The workspace's members.
    pub(crate) packages: Vec<Package>,
}

/// A member of the workspace.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: String,
    /// Its Cargo.toml.
    pub(crate) manifest_path: PathBuf,
    /// Its features.
    pub(crate) features: BTreeMap<String, Vec<String>>,
    /// Its libraries, binaries, tests and examples.
    pub(crate) targets: Vec<Target>,
    /// `[package.metadata]`.
    #[serde(default)]
    pub(crate) metadata: serde_json::Value,
}

/// Something that cargo builds.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Target {
    /// Its name.
    pub(crate) name: String,
    /// `lib`, `bin`, `test`, `example`, `bench` …
    pub(crate) kind: Vec<String>,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn load() -> Result<Self> {
        let mut command = cargo(&repository_root()?);
        command.args(["metadata", "--no-deps", "--format-version", "1"]);
        Self::parse(&proc::output(&mut command)?)
    }

    /// Reads what `cargo metadata` printed.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        serde_json::from_str(text).context("cannot read what `cargo metadata` printed")
    }

    /// Cargo, run at the root of the workspace.
    pub(crate) fn cargo(&self) -> Command {
        cargo(&self.root)
    }

    /// The member of this name.
    pub(crate) fn package(&self, name: &str) -> Option<&Package> {
        self.packages.iter().find(|package| package.name == name)
    }

    /// Where the commands keep their logs.
    pub(crate) fn logs(&self) -> PathBuf {
        self.target.join("xtask-logs")
    }
}

impl Package {
    /// The directory of its Cargo.toml.
    pub(crate) fn directory(&self) -> &Path {
        self.manifest_path.parent().expect("a manifest lies in a directory")
    }

    /// Names of its targets of one kind.
    pub(crate) fn target_names(&self, kind: &str) -> impl Iterator<Item = &str> {
        self.targets
            .iter()
            .filter(move |target| target.kind.iter().any(|own| own == kind))
            .map(|target| target.name.as_str())
    }
}

/// The directory that holds the workspace's Cargo.toml: the one above this crate
/// as it was compiled, or the present directory when the sources have moved.
fn repository_root() -> Result<PathBuf> {
    let compiled = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    match compiled {
        Some(root) if root.join("Cargo.toml").is_file() => Ok(root.to_path_buf()),
        _ => std::env::current_dir().context("cannot read the current directory"),
    }
}

/// Cargo without what the outer `cargo run` put into the environment: build
/// scripts that watch those variables would otherwise run again and again.
fn cargo(root: &Path) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root);
    for (name, _) in std::env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let set_by_cargo_run = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|prefix| text.starts_with(prefix));
        if set_by_cargo_run || text == "LD_LIBRARY_PATH" || text == "RUST_RECURSION_COUNT" {
            command.env_remove(&name);
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_read() {
        let workspace = Workspace::parse(
            r#"{"workspace_root":"/w","target_directory":"/w/target","packages":[
                {"name":"stoq","manifest_path":"/w/engine/Cargo.toml","features":{"privileged-tests":[]},
                 "targets":[{"name":"stoq","kind":["lib"]},{"name":"priv_veth","kind":["test"]}],
                 "metadata":null}]}"#,
        )
        .unwrap();
        let package = workspace.package("stoq").unwrap();
        assert_eq!(package.directory(), Path::new("/w/engine"));
        assert_eq!(package.target_names("test").collect::<Vec<_>>(), ["priv_veth"]);
        assert!(workspace.package("other").is_none());
        assert!(Workspace::parse("{}").is_err());
    }

    #[test]
    fn this_workspace_is_found() {
        let workspace = Workspace::load().unwrap();
        assert!(workspace.package("xtask").is_some());
        assert!(workspace.root.join("Cargo.toml").is_file());
    }
}
