//! The demo's scratch directory and the file that it transfers.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::machine::{self, Machine};
use crate::{interrupt, netns};

/// Size of the generated file when nothing is short.
pub(crate) const GENERATED_BYTES: u64 = 2 << 30;
/// Below this a transfer shows nothing.
const GENERATED_BYTES_MIN: u64 = 16 << 20;
/// Generated sizes are multiples of this.
const GRANULE_BYTES: u64 = 1 << 20;
/// Left free on the disk.
const DISK_MARGIN_BYTES: u64 = 256 << 20;
/// Seed of the generator: every run transfers the same content.
const SEED: u64 = 0x53_54_4f_51;
/// Unit of reading, writing and hashing.
const BLOCK_BYTES: usize = 1 << 20;
/// Name under which the server offers the file.
pub(crate) const FILE_NAME: &str = "payload.bin";

/// A directory that is removed when this value is dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes `stoq-demo-PID` in the temporary directory, or in `fallback` when
    /// only that one has room for `wanted_bytes`.
    pub(crate) fn create(fallback: &Path, wanted_bytes: u64) -> Result<Self> {
        let temporary = std::env::temp_dir();
        let has_room = machine::free_bytes(&temporary)? >= wanted_bytes;
        let has_more = machine::free_bytes(fallback)? > machine::free_bytes(&temporary)?;
        let parent = if has_room || !has_more { &temporary } else { fallback };
        let path = parent.join(format!("stoq-demo-{}", std::process::id()));
        if path.exists() {
            remove(&path)?; // Left by a dead process that had our ID.
        }
        std::fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let scratch = Self { path };
        for name in ["www", "out"] {
            std::fs::create_dir(scratch.path.join(name)).context("cannot create a directory")?;
        }
        Ok(scratch)
    }

    /// A path within.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Removes what killed runs have left in the temporary directory and in `fallback`.
    pub(crate) fn remove_stale(fallback: &Path) -> Result<Vec<PathBuf>> {
        let mut removed = Vec::new();
        for parent in [std::env::temp_dir(), fallback.to_path_buf()] {
            let entries = std::fs::read_dir(&parent)
                .with_context(|| format!("cannot list {}", parent.display()))?;
            for entry in entries {
                let path = entry.context("cannot list a directory")?.path();
                let owner = path
                    .file_name()
                    .and_then(|name| name.to_str()?.strip_prefix("stoq-demo-")?.parse().ok());
                if owner.is_some_and(|pid| !netns::is_xtask(pid)) {
                    remove(&path)?;
                    removed.push(path);
                }
            }
        }
        Ok(removed)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("warning: {error:#}");
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// The file as the server offers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Payload {
    /// Length.
    pub(crate) bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub(crate) sha256: String,
}

/// How large a generated file may be, and why it is not larger.
pub(crate) fn generated_bytes(
    machine: &Machine,
    free_bytes: u64,
    wanted_bytes: u64,
) -> Result<(u64, Option<String>)> {
    // Two copies lie on the disk: the server's and the client's. In memory they
    // lie in the page cache, beside what the two processes need.
    let by_disk = free_bytes.saturating_sub(DISK_MARGIN_BYTES) / 2;
    let by_memory = machine.memory_available_bytes / 3;
    let bytes = wanted_bytes.min(by_disk).min(by_memory) / GRANULE_BYTES * GRANULE_BYTES;
    if bytes == wanted_bytes {
        return Ok((bytes, None));
    }
    let short = if by_disk <= by_memory { "disk space" } else { "memory" };
    if bytes < GENERATED_BYTES_MIN {
        bail!(
            "too little {short} for a file of {GENERATED_BYTES_MIN} bytes: free some, or set TMPDIR"
        );
    }
    Ok((bytes, Some(format!("{short} is short"))))
}

/// Writes `bytes` of reproducible noise to `path`, hashing on the way.
pub(crate) fn generate(path: &Path, bytes: u64) -> Result<Payload> {
    let context = || format!("cannot write {}", path.display());
    let mut file = File::create(path).with_context(context)?;
    let mut noise = Noise { state: SEED };
    let mut hash = Sha256::new();
    let mut block = vec![0u8; BLOCK_BYTES];
    let mut left = bytes;
    while left > 0 {
        interrupt::check()?;
        let length = usize::try_from(left).map_or(BLOCK_BYTES, |left| left.min(BLOCK_BYTES));
        noise.fill(&mut block[..length]);
        hash.update(&block[..length]);
        file.write_all(&block[..length]).with_context(context)?;
        left -= length as u64;
    }
    Ok(Payload { bytes, sha256: hex(&hash.finalize()) })
}

/// Offers the user's file at `path` (a hard link where possible, else a copy) and hashes it.
pub(crate) fn adopt(source: &Path, path: &Path) -> Result<Payload> {
    let source = source
        .canonicalize()
        .with_context(|| format!("cannot open --file {}", source.display()))?;
    let metadata =
        source.metadata().with_context(|| format!("cannot stat {}", source.display()))?;
    if !metadata.is_file() {
        bail!("--file {}: not a regular file", source.display());
    }
    if std::fs::hard_link(&source, path).is_err() {
        // Another file system, or links to foreign files are forbidden.
        std::fs::copy(&source, path)
            .with_context(|| format!("cannot copy {} to {}", source.display(), path.display()))?;
    }
    hash_file(path)
}

/// Length and SHA-256 of a file, read from the beginning.
pub(crate) fn hash_file(path: &Path) -> Result<Payload> {
    let context = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(context)?;
    let mut hash = Sha256::new();
    let mut block = vec![0u8; BLOCK_BYTES];
    let mut bytes = 0;
    loop {
        interrupt::check()?;
        match file.read(&mut block).with_context(context)? {
            0 => return Ok(Payload { bytes, sha256: hex(&hash.finalize()) }),
            length => {
                hash.update(&block[..length]);
                bytes += length as u64;
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SplitMix64: not for secrets, but neither sparse nor compressible.
struct Noise {
    state: u64,
}

impl Noise {
    fn fill(&mut self, block: &mut [u8]) {
        for chunk in block.chunks_mut(8) {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            chunk.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(memory_available_bytes: u64) -> Machine {
        Machine { memory_available_bytes, ..Machine::inspect().unwrap() }
    }

    #[test]
    fn the_size_follows_what_is_short() {
        let roomy = machine(100 << 30);
        assert_eq!(generated_bytes(&roomy, 100 << 30, GENERATED_BYTES).unwrap(), (2 << 30, None));
        let (bytes, why) = generated_bytes(&roomy, 1 << 30, GENERATED_BYTES).unwrap();
        assert_eq!(bytes, (1024 - 256) / 2 * (1 << 20));
        assert!(why.unwrap().contains("disk"));
        let (bytes, why) = generated_bytes(&machine(3 << 30), 100 << 30, GENERATED_BYTES).unwrap();
        assert_eq!(bytes, 1 << 30);
        assert!(why.unwrap().contains("memory"));
        assert!(generated_bytes(&roomy, 1 << 20, GENERATED_BYTES).is_err());
    }

    #[test]
    fn noise_is_reproducible_dense_and_hashed_as_written() {
        let directory = std::env::temp_dir().join(format!("stoq-noise-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (one, two) = (directory.join("one"), directory.join("two"));
        let bytes = BLOCK_BYTES as u64 + 13;
        let payload = generate(&one, bytes).unwrap();
        assert_eq!(payload, generate(&two, bytes).unwrap());
        assert_eq!(payload, hash_file(&one).unwrap());
        let content = std::fs::read(&one).unwrap();
        assert_eq!(content.len() as u64, bytes);
        let zeros = content.iter().filter(|byte| **byte == 0).count();
        assert!((content.len() / 512..content.len() / 128).contains(&zeros), "{zeros} zeros");
        let adopted = adopt(&one, &directory.join("link")).unwrap();
        assert_eq!(adopted, payload);
        assert!(adopt(&directory, &directory.join("x")).is_err());
        assert!(adopt(&directory.join("absent"), &directory.join("x")).is_err());
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_known_hash() {
        let path = std::env::temp_dir().join(format!("stoq-hash-{}", std::process::id()));
        std::fs::write(&path, "abc").unwrap();
        let payload = hash_file(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        assert!(payload.sha256.starts_with("ba7816bf8f01cfea414140de5dae2223"));
    }
}
