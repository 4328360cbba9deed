//! `cargo xtask ebpf build|check`: the eBPF objects, from source to commit.
//!
//! `build` compiles `ebpf/programs` into one `ebpf/objects/*.bpf.o` per program and
//! writes `ebpf/objects/SOURCES.sha256` beside it: the hash of the sources, the
//! hash of each object, and the toolchain that made them. `check` proves that the
//! committed files belong to the sources and runs the packet fixtures; where
//! a toolchain is present it rebuilds and runs them on the fresh object too.
//!
//! The object is reproducible: paths are remapped, dependencies locked, DWARF
//! (which is only the raw material of BTF) removed. Another compiler or linker
//! version may give another, equally valid object.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use sha2::{Digest as _, Sha256};

const PROGRAMS: &str = "ebpf/programs";
/// The programs, each a binary of its own, and the variable by which the fixtures take its object.
const PROGRAM_NAMES: [&str; 2] = ["stoq_xdp", "stoq_reuseport"];
const OBJECT_VARIABLES: [&str; 2] = ["STOQ_XDP_OBJECT", "STOQ_REUSEPORT_OBJECT"];
const OBJECTS: &str = "ebpf/objects";
const HASHES: &str = "ebpf/objects/SOURCES.sha256";
/// Everything that the object is compiled from, relative to the root.
const SOURCES: &[&str] = &[
    "ebpf/Cargo.toml",
    "ebpf/programs/Cargo.lock",
    "ebpf/programs/Cargo.toml",
    "ebpf/programs/src",
    "ebpf/src",
];
const TARGET: &str = "bpfel-unknown-none";
/// The release that is installed; any that fits the compiler's LLVM serves.
const BPF_LINKER_VERSION: &str = "0.13.0";
/// The LLVM of Debian's compiler, which `bpf-linker` has to match.
const LLVM_VERSION: &str = "22";

/// `cargo xtask ebpf …`
#[derive(Debug, Subcommand)]
pub(crate) enum EbpfCmd {
    /// Compiles the programs and writes the objects to be committed.
    Build(BuildArgs),
    /// Proves that the committed objects come from the sources, and runs the packet fixtures (root).
    Check(CheckArgs),
}

/// Options of `cargo xtask ebpf build`.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Compiler to use.
    #[arg(long, value_enum, default_value_t)]
    toolchain: ToolchainChoice,
    /// Install what is missing, printing each command (apt-get or rustup, and cargo install).
    #[arg(long)]
    install: bool,
}

/// Options of `cargo xtask ebpf check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Compiler to rebuild with.
    #[arg(long, value_enum, default_value_t)]
    toolchain: ToolchainChoice,
    /// Fail where no eBPF toolchain is installed, instead of leaving out the rebuild.
    #[arg(long)]
    require_toolchain: bool,
}

/// Which compiler builds the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum ToolchainChoice {
    /// Debian's packages where they are installed, else rustup's nightly.
    #[default]
    Auto,
    /// `rustc-web`, `cargo-web`, `libstd-rust-web-dev-bpf` in /usr/bin: has a compiled core for eBPF.
    Debian,
    /// rustup's nightly with rust-src: compiles core itself.
    Nightly,
}

/// Runs one of the commands from anywhere inside the repository.
pub(crate) fn run(command: EbpfCmd) -> Result<()> {
    let root = root();
    match command {
        EbpfCmd::Build(args) => build(&root, &args),
        EbpfCmd::Check(args) => check(&root, &args),
    }
}

fn build(root: &Path, args: &BuildArgs) -> Result<()> {
    let toolchain = match Toolchain::find(args.toolchain) {
        Ok(toolchain) => toolchain,
        Err(missing) if args.install => {
            println!("{missing:#}");
            install(args.toolchain)?;
            Toolchain::find(args.toolchain).context("the installation did not help")?
        }
        Err(missing) => return Err(missing),
    };
    let objects = toolchain.compile(root)?;
    let hashes = Hashes {
        sources: hash_sources(root)?,
        objects: objects.each_ref().map(|object| hash(object)),
        built_by: toolchain.description()?,
    };
    for (path, object) in object_paths(root).iter().zip(&objects) {
        write(path, object)?;
        println!("wrote {} ({} bytes)", path.display(), object.len());
    }
    write(&root.join(HASHES), hashes.to_text().as_bytes())?;
    println!("wrote {HASHES}");
    println!("built by {}", hashes.built_by);
    Ok(())
}

fn check(root: &Path, args: &CheckArgs) -> Result<()> {
    let paths = object_paths(root);
    let committed = [read(&paths[0])?, read(&paths[1])?];
    let hashes = Hashes::parse(&String::from_utf8(read(&root.join(HASHES))?)?)?;
    ensure!(
        hashes.sources == hash_sources(root)?,
        "the sources of the eBPF programs have changed since {OBJECTS} was built: \
         run `cargo xtask ebpf build` and commit {OBJECTS}"
    );
    ensure!(
        hashes.objects == committed.each_ref().map(|object| hash(object)),
        "an object is not the file that {HASHES} was written for: \
         run `cargo xtask ebpf build` and commit {OBJECTS}"
    );
    println!("hashes: {OBJECTS} belongs to the sources");
    run_fixtures(root, &paths)?;

    let toolchain = match Toolchain::find(args.toolchain) {
        Ok(toolchain) => toolchain,
        Err(missing) if args.require_toolchain => return Err(missing),
        Err(missing) => {
            println!("rebuild: NOT DONE, there is no eBPF toolchain: {missing:#}");
            return Ok(());
        }
    };
    let rebuilt = toolchain.compile(root)?;
    let built_by = toolchain.description()?;
    if rebuilt == committed {
        println!("rebuild: identical, by {built_by}");
    } else {
        ensure!(
            built_by != hashes.built_by,
            "the same toolchain ({built_by}) built another object than the committed one: \
             the build is not reproducible, or {HASHES} was edited"
        );
        println!("rebuild: differs, by {built_by}; committed: by {}", hashes.built_by);
    }
    let fresh = PROGRAM_NAMES.map(|name| root.join(format!("target/ebpf/rebuilt-{name}.bpf.o")));
    for (path, object) in fresh.iter().zip(&rebuilt) {
        write(path, object)?;
    }
    run_fixtures(root, &fresh)
}

fn object_paths(root: &Path) -> [PathBuf; 2] {
    PROGRAM_NAMES.map(|name| root.join(OBJECTS).join(format!("{name}.bpf.o")))
}

/// Runs the packet fixtures on the objects, with both loaders.
fn run_fixtures(root: &Path, objects: &[PathBuf; 2]) -> Result<()> {
    println!("fixtures: {}, {}", objects[0].display(), objects[1].display());
    let mut cargo = Command::new(env_or("CARGO", "cargo"));
    cargo.current_dir(root).args(["test", "--quiet", "--package", "stoq-ebpf-testrun"]);
    cargo.envs(OBJECT_VARIABLES.iter().zip(objects));
    run_command(&mut cargo).context(
        "the fixtures need root (or CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN) \
         and the packages libelf-dev, zlib1g-dev, pkgconf",
    )
}

/// A compiler that can make eBPF objects.
#[derive(Debug)]
enum Toolchain {
    Debian,
    Nightly,
}

impl Toolchain {
    /// Finds an installed toolchain; the error says what is missing.
    fn find(choice: ToolchainChoice) -> Result<Self> {
        let toolchain = match choice {
            ToolchainChoice::Debian => Self::find_debian()?,
            ToolchainChoice::Nightly => Self::find_nightly()?,
            ToolchainChoice::Auto => Self::find_debian().or_else(|debian| {
                Self::find_nightly().map_err(|nightly| {
                    anyhow::anyhow!(
                        "{debian:#}; {nightly:#} (either will do; \
                         `cargo xtask ebpf build --install` installs one)"
                    )
                })
            })?,
        };
        output(Command::new("bpf-linker").arg("--version")).with_context(|| {
            format!(
                "bpf-linker is missing: `cargo xtask ebpf build --install`, or `cargo install \
                 bpf-linker --version {BPF_LINKER_VERSION}` with the LLVM of your compiler"
            )
        })?;
        Ok(toolchain)
    }

    fn find_debian() -> Result<Self> {
        let libdir = output(clean_environment(&mut Command::new("/usr/bin/rustc")).args([
            "--print",
            "target-libdir",
            "--target",
            TARGET,
        ]))
        .context("no /usr/bin/rustc that knows eBPF (Debian's rustc-web)")?;
        let has_core = fs::read_dir(libdir.trim()).is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
            })
        });
        ensure!(has_core, "no core library for {TARGET} (Debian's libstd-rust-web-dev-bpf)");
        ensure!(Path::new("/usr/bin/cargo").exists(), "no /usr/bin/cargo (Debian's cargo-web)");
        Ok(Self::Debian)
    }

    fn find_nightly() -> Result<Self> {
        let sysroot = output(Self::Nightly.command("rustc").args(["--print", "sysroot"]))
            .context("no rustup nightly toolchain")?;
        let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
        ensure!(source.exists(), "the nightly toolchain has no rust-src component");
        Ok(Self::Nightly)
    }

    /// `program` (`rustc` or `cargo`) of this toolchain, free of what the cargo around us set.
    fn command(&self, program: &str) -> Command {
        let mut command = match self {
            Self::Debian => Command::new(format!("/usr/bin/{program}")),
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", program]);
                command
            }
        };
        clean_environment(&mut command);
        if matches!(self, Self::Debian) {
            command.env("RUSTC", "/usr/bin/rustc");
            // aya-ebpf alone may use unstable features: inline assembly for eBPF.
            command.env("RUSTC_BOOTSTRAP", "aya_ebpf");
        }
        command
    }

    /// Compiler and linker versions, for comparison and for the record.
    fn description(&self) -> Result<String> {
        let rustc = output(self.command("rustc").arg("--version"))?;
        let linker = output(Command::new("bpf-linker").arg("--version"))?;
        let name = match self {
            Self::Debian => "debian",
            Self::Nightly => "nightly",
        };
        Ok(format!("{name}: {}, {}", rustc.trim(), linker.trim()))
    }

    /// Compiles the programs under `target/ebpf` and returns the objects' bytes.
    fn compile(&self, root: &Path) -> Result<[Vec<u8>; 2]> {
        let target_dir = root.join("target/ebpf").join(match self {
            Self::Debian => "debian",
            Self::Nightly => "nightly",
        });
        let mut cargo = self.command("cargo");
        cargo.current_dir(root.join(PROGRAMS));
        cargo.args(["build", "--release", "--locked", "--target", TARGET, "--bins"]);
        cargo.arg("--target-dir").arg(&target_dir);
        if matches!(self, Self::Nightly) {
            cargo.args(["-Z", "build-std=core"]);
        }
        cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags(root));
        run_command(&mut cargo)?;
        let built = target_dir.join(TARGET).join("release");
        let object = |name| {
            without_dwarf(&read(&built.join(name))?).with_context(|| format!("strip {name}"))
        };
        Ok([object(PROGRAM_NAMES[0])?, object(PROGRAM_NAMES[1])?])
    }
}

/// Flags of the compilation, in cargo's encoding.
fn rustflags(root: &Path) -> OsString {
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map_or_else(|| PathBuf::from(env_or("HOME", "/")).join(".cargo"), PathBuf::from);
    let mut flags: Vec<OsString> = [
        // Picks register layouts for tracing programs; XDP has none, and one
        // value for all makes one object for all little-endian machines.
        "--cfg=bpf_target_arch=\"x86_64\"",
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        // Clearing and copying a few words becomes stores, not a call to a loop.
        "-Clink-arg=--disable-expand-memcpy-in-order",
    ]
    .map(OsString::from)
    .to_vec();
    for (from, to) in [(root, "stoq"), (cargo_home.as_path(), "cargo")] {
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(from);
        flag.push("=");
        flag.push(to);
        flags.push(flag);
    }
    flags.join(OsStr::new("\u{1f}"))
}

/// The object without DWARF; BTF, code, maps and their relocations stay.
fn without_dwarf(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = object::build::elf::Builder::read(object)?;
    for section in &mut builder.sections {
        let name = section.name.to_string();
        if name.starts_with(".debug") || name.starts_with(".rel.debug") {
            section.delete = true;
        }
    }
    // LLVM keeps section names in .strtab; the writer wants a table of their own.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = object::build::elf::SectionData::SectionString;
    builder.delete_orphans();
    builder.set_section_sizes();
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}

/// Installs a toolchain, printing each command before it runs.
fn install(choice: ToolchainChoice) -> Result<()> {
    let has_apt = Path::new("/usr/bin/apt-get").exists();
    if choice == ToolchainChoice::Nightly || !has_apt {
        print_and_run(Command::new("rustup").args(["toolchain", "install", "nightly"]))?;
        let component = ["component", "add", "rust-src", "--toolchain", "nightly"];
        print_and_run(Command::new("rustup").args(component))?;
    }
    if has_apt {
        print_and_run(Command::new("apt-get").arg("update"))?;
        let mut apt = Command::new("apt-get");
        apt.args(["install", "-y", "--no-install-recommends"]);
        apt.args([&format!("llvm-{LLVM_VERSION}-dev"), "libelf-dev", "zlib1g-dev", "pkgconf"]);
        if choice != ToolchainChoice::Nightly {
            apt.args(["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"]);
        }
        print_and_run(&mut apt)?;
    }
    if output(Command::new("bpf-linker").arg("--version")).is_err() {
        let mut cargo = Command::new(env_or("CARGO", "cargo"));
        cargo.args(["install", "bpf-linker", "--locked", "--version", BPF_LINKER_VERSION]);
        cargo.args(["--no-default-features", "--features"]);
        cargo.arg(format!("llvm-{LLVM_VERSION}"));
        if has_apt {
            cargo.env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM_VERSION}"));
        }
        print_and_run(&mut cargo)?;
    }
    Ok(())
}

/// The contents of [`HASHES`].
struct Hashes {
    sources: String,
    /// By program.
    objects: [String; 2],
    built_by: String,
}

impl Hashes {
    fn to_text(&self) -> String {
        let Self { sources, objects: [first, second], built_by } = self;
        let [first_name, second_name] = PROGRAM_NAMES;
        format!(
            "{sources}  sources\n{first}  {first_name}.bpf.o\n{second}  {second_name}.bpf.o\n# {built_by}\n"
        )
    }

    fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines();
        let mut next = || lines.next().with_context(|| format!("{HASHES} is cut short"));
        let sources = next()?.strip_suffix("  sources");
        let [first, second] = PROGRAM_NAMES.map(|name| format!("  {name}.bpf.o"));
        let objects = (next()?.strip_suffix(&first), next()?.strip_suffix(&second));
        let built_by = next()?.strip_prefix("# ");
        match (sources, objects, built_by) {
            (Some(sources), (Some(first), Some(second)), Some(built_by)) => Ok(Self {
                sources: sources.to_owned(),
                objects: [first.to_owned(), second.to_owned()],
                built_by: built_by.to_owned(),
            }),
            _ => bail!("{HASHES} is not what `cargo xtask ebpf build` writes: run it"),
        }
    }
}

/// SHA-256 over name and contents of every source file, in order of their names.
fn hash_sources(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect_files(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut hasher = Sha256::new();
    for file in &files {
        let contents = read(file)?;
        let name = file.strip_prefix(root).expect("collected below the root");
        hasher.update(name.as_os_str().as_encoded_bytes());
        hasher.update([0]);
        hasher.update((contents.len() as u64).to_le_bytes());
        hasher.update(&contents);
    }
    Ok(hex(&hasher.finalize()))
}

fn collect_files(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
        collect_files(&entry?.path(), files)?;
    }
    Ok(())
}

fn hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes everything");
        text
    })
}

/// The repository's root: the directory above this crate's.
fn root() -> PathBuf {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir.parent().expect("xtask lies in the repository").to_owned()
}

/// Takes out what the cargo that runs us has set for its own children.
fn clean_environment(command: &mut Command) -> &mut Command {
    for name in [
        "CARGO",
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
        "RUSTUP_TOOLCHAIN",
        "RUSTC_BOOTSTRAP",
    ] {
        command.env_remove(name);
    }
    command
}

fn env_or(name: &str, default: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| default.into())
}

fn print_and_run(command: &mut Command) -> Result<()> {
    println!("+ {command:?}");
    run_command(command)
}

fn run_command(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn write(path: &Path, contents: &[u8]) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    }
    fs::write(path, contents).with_context(|| format!("write {}", path.display()))
}
