//! Where a CA keeps its keys and state: a private, locked directory, or memory.
//!
//! A directory write replaces the file as a whole: temporary file, fsync, rename, fsync of the
//! directory. A crash or a full disk at any point leaves the old content or the new, never a mix;
//! the temporary file of a killed writer is removed at the next open. Writers in one directory, of this
//! process and of others, take turns.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::error::CertsError;
use super::pem;

/// File that carries the lock of a directory; it stays behind, empty.
const LOCK_FILE: &str = "lock";
/// Ending of files that are being written.
const TEMPORARY_ENDING: &str = ".tmp";

/// How long a writer waits for others in its directory: a write takes milliseconds.
const TURN_WAIT_MAX: Duration = Duration::from_secs(5);
/// How often it looks whether it is its turn.
const TURN_INTERVAL: Duration = Duration::from_millis(5);

/// Small named files that are replaced as a whole.
pub(super) trait Storage: Send + Sync {
    /// The content of `name`, or `None` if it was never written. A file for the owner that others
    /// can read is refused.
    fn read(&self, name: &str, access: Access) -> Result<Option<Vec<u8>>, CertsError>;
    /// Replaces `name`. After an error the old content stands.
    fn replace(&self, name: &str, content: &[u8], access: Access) -> Result<(), CertsError>;
}

/// Who may read a stored file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Mode 0600: private keys.
    Owner,
    /// Mode 0644: certificates, revocation lists.
    Everyone,
}

impl Access {
    fn mode(self) -> u32 {
        match self {
            Self::Owner => 0o600,
            Self::Everyone => 0o644,
        }
    }
}

/// A directory that this process alone uses while the value lives.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Holds the `flock(2)`; the kernel releases it with the descriptor, whatever ends the process.
    lock: File,
}

impl Drop for Directory {
    /// Closing is not enough: a process that another thread is starting holds a copy of the descriptor
    /// from its fork to its exec, and the lock lives as long as any copy.
    fn drop(&mut self) {
        if let Err(errno) = flock(&self.lock, FlockOperation::Unlock) {
            tracing::warn!(path = %self.path.display(), %errno, "cannot unlock the directory");
        }
    }
}

impl Directory {
    /// Opens `path`, creating it with mode 0700 if it is missing, and locks it.
    ///
    /// # Errors
    /// Another process (or another value of this process) holds it; others can write to it; a
    /// system call failed.
    pub(super) fn open(path: &Path) -> Result<Self, CertsError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => sync_parent(path)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(CertsError::file("create directory", path, error)),
        }
        let mode =
            fs::metadata(path).map_err(|error| CertsError::file("stat", path, error))?.mode()
                & 0o7777;
        if mode & 0o022 != 0 {
            return Err(CertsError::DirectoryWritableByOthers { path: path.to_owned(), mode });
        }
        let lock_path = path.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|error| CertsError::file("open", &lock_path, error))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(CertsError::DirectoryLocked { path: path.to_owned() });
            }
            Err(errno) => return Err(CertsError::file("flock", &lock_path, errno.into())),
        }
        let directory = Self { path: path.to_owned(), lock };
        directory.remove_leftovers()?;
        Ok(directory)
    }

    /// Removes what a killed writer left. Only called with the lock held.
    fn remove_leftovers(&self) -> Result<(), CertsError> {
        let entries = fs::read_dir(&self.path)
            .map_err(|error| CertsError::file("list directory", &self.path, error))?;
        for entry in entries {
            let path = entry
                .map_err(|error| CertsError::file("list directory", &self.path, error))?
                .path();
            if path.to_string_lossy().ends_with(TEMPORARY_ENDING) {
                tracing::info!(path = %path.display(), "removing an unfinished file");
                fs::remove_file(&path).map_err(|error| CertsError::file("remove", &path, error))?;
            }
        }
        Ok(())
    }
}

impl Storage for Directory {
    fn read(&self, name: &str, access: Access) -> Result<Option<Vec<u8>>, CertsError> {
        let path = self.path.join(name);
        if !path.try_exists().map_err(|error| CertsError::file("stat", &path, error))? {
            return Ok(None);
        }
        match access {
            Access::Owner => pem::read_private(&path).map(Some),
            Access::Everyone => pem::read_public(&path).map(Some),
        }
    }

    fn replace(&self, name: &str, content: &[u8], access: Access) -> Result<(), CertsError> {
        replace_file(&self.path.join(name), content, access)
    }
}

/// Replaces the file at `path` as a whole and durably.
///
/// # Errors
/// A system call failed; the old file stands and the temporary one is gone. (Only if the very last step
/// failed, the directory's fsync, the new file stands and may not survive a crash.)
pub(super) fn replace_file(path: &Path, content: &[u8], access: Access) -> Result<(), CertsError> {
    let turn = Turn::wait(path)?;
    replace_in_turn(&turn, path, content, access)
}

/// Makes the file at `path` unless it is there. Of many who do so at once, in whatever process, one
/// makes it.
///
/// # Errors
/// As [`replace_file`], or those of `make`.
pub(super) fn create_file_if_missing(
    path: &Path,
    make: impl FnOnce() -> Result<Vec<u8>, CertsError>,
    access: Access,
) -> Result<(), CertsError> {
    let is_there = || path.try_exists().map_err(|error| CertsError::file("stat", path, error));
    // The common case needs no turn, and no right to write.
    if is_there()? {
        return Ok(());
    }
    let turn = Turn::wait(path)?;
    if is_there()? {
        return Ok(());
    }
    replace_in_turn(&turn, path, &make()?, access)
}

/// The right to write in a directory: all writers of a file share the temporary one's name.
struct Turn {
    /// Holds the `flock(2)`, where the file system has locks.
    directory: File,
}

impl Turn {
    fn wait(path: &Path) -> Result<Self, CertsError> {
        let parent = parent(path);
        let failed = |operation, error| CertsError::file(operation, parent, error);
        let directory = File::open(parent).map_err(|error| failed("open directory", error))?;
        let start = Instant::now();
        loop {
            match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self { directory }),
                Err(Errno::WOULDBLOCK) if start.elapsed() < TURN_WAIT_MAX => {
                    std::thread::sleep(TURN_INTERVAL);
                }
                Err(Errno::WOULDBLOCK) => {
                    let held = io::Error::other("another process keeps it locked (flock)");
                    return Err(failed("lock directory", held));
                }
                // NFS locks no directories: there, writers of one file must not meet.
                Err(Errno::BADF | Errno::NOLCK | Errno::OPNOTSUPP) => {
                    return Ok(Self { directory });
                }
                Err(errno) => return Err(failed("lock directory", errno.into())),
            }
        }
    }
}

impl Drop for Turn {
    /// As [`Directory`]'s: a copy of the descriptor may live on elsewhere for a moment.
    fn drop(&mut self) {
        if let Err(errno) = flock(&self.directory, FlockOperation::Unlock) {
            tracing::debug!(%errno, "a directory that could not be locked");
        }
    }
}

fn replace_in_turn(
    _turn: &Turn,
    path: &Path,
    content: &[u8],
    access: Access,
) -> Result<(), CertsError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(TEMPORARY_ENDING);
    let temporary = PathBuf::from(temporary);
    let written = write_and_rename(&temporary, path, content, access);
    if written.is_err() {
        match fs::remove_file(&temporary) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(
                path = %temporary.display(), %error,
                "cannot remove an unfinished file; the next start will try again"
            ),
        }
    }
    written
}

fn write_and_rename(
    temporary: &Path,
    path: &Path,
    content: &[u8],
    access: Access,
) -> Result<(), CertsError> {
    // A leftover may carry another mode, which `open` would keep: start from nothing.
    match fs::remove_file(temporary) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(CertsError::file("remove", temporary, error)),
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(access.mode())
        .open(temporary)
        .map_err(|error| CertsError::file("create", temporary, error))?;
    file.write_all(content).map_err(|error| CertsError::file("write", temporary, error))?;
    file.sync_all().map_err(|error| CertsError::file("fsync", temporary, error))?;
    fs::rename(temporary, path).map_err(|error| CertsError::file("rename into", path, error))?;
    sync_parent(path)
}

/// Makes a rename or a new entry durable.
pub(super) fn sync_parent(path: &Path) -> Result<(), CertsError> {
    let parent = parent(path);
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| CertsError::file("fsync directory", parent, error))
}

/// The directory that a file is in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Files that vanish with the process: self-signed nodes and tests.
#[derive(Debug, Default)]
pub(super) struct Memory {
    files: Mutex<HashMap<String, Vec<u8>>>,
}

impl Storage for Memory {
    fn read(&self, name: &str, _access: Access) -> Result<Option<Vec<u8>>, CertsError> {
        Ok(self.files.lock().expect("no panic while locked").get(name).cloned())
    }

    fn replace(&self, name: &str, content: &[u8], _access: Access) -> Result<(), CertsError> {
        self.files.lock().expect("no panic while locked").insert(name.to_owned(), content.to_vec());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::fault::CertificateFault;
    use super::super::test_dir::TestDir;
    use super::*;

    #[test]
    fn a_directory_has_one_user() {
        let dir = TestDir::new();
        let path = dir.path().join("ca");
        let first = Directory::open(&path).unwrap();
        let error = Directory::open(&path).unwrap_err();
        assert_eq!(error.fault(), CertificateFault::DirectoryLocked);
        assert!(error.to_string().contains("another process"), "{error}");
        drop(first);
        Directory::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
    }

    /// What a fork in another thread does to the lock's descriptor until its exec.
    #[test]
    fn a_copy_of_the_descriptor_holds_no_lock_beyond_its_owner() {
        let dir = TestDir::new();
        let path = dir.path().join("ca");
        let first = Directory::open(&path).unwrap();
        let copy = first.lock.try_clone().unwrap();
        drop(first);
        Directory::open(&path).unwrap();
        drop(copy);
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let dir = TestDir::new();
        let path = dir.path().join("ca");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let error = Directory::open(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 700"), "{error}");
    }

    #[test]
    fn replacing_keeps_modes_and_leaves_no_rest() {
        let dir = TestDir::new();
        let directory = Directory::open(dir.path()).unwrap();
        assert_eq!(directory.read("key", Access::Owner).unwrap(), None);
        for content in [&b"one"[..], b"", b"three, which is longer"] {
            directory.replace("key", content, Access::Owner).unwrap();
            assert_eq!(directory.read("key", Access::Owner).unwrap().unwrap(), content);
        }
        let mode = fs::metadata(dir.path().join("key")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!dir.path().join("key.tmp").exists());
    }

    #[test]
    fn leftovers_of_a_killed_writer_are_removed() {
        let dir = TestDir::new();
        fs::write(dir.path().join("state.tmp"), b"half").unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        assert!(!dir.path().join("state.tmp").exists());
        directory.replace("state", b"whole", Access::Owner).unwrap();
    }

    #[test]
    fn writers_of_one_file_take_turns() {
        let dir = TestDir::new();
        let path = dir.path().join("state");
        replace_file(&path, b"", Access::Owner).unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..50 {
                        replace_file(path, &vec![writer; 40_000], Access::Owner).unwrap();
                        let found = fs::read(path).unwrap();
                        assert_eq!(found.len(), 40_000, "half a file");
                        assert!(found.iter().all(|byte| *byte == found[0]), "a mix of two");
                    }
                });
            }
        });
        assert!(!dir.path().join("state.tmp").exists());
    }

    #[test]
    fn a_failed_replacement_keeps_the_old_content() {
        let dir = TestDir::new();
        let path = dir.path().join("state");
        replace_file(&path, b"old", Access::Owner).unwrap();
        // A directory in the temporary's place makes the write fail.
        fs::create_dir(dir.path().join("state.tmp")).unwrap();
        replace_file(&path, b"new", Access::Owner).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
}
