//! Enrolment tokens that wait for their use: in memory, or as files that outlive the service.
//!
//! ```text
//! <SHA-256 of the token>.token   what it entitles to; taken by rename(2), which one taker wins
//! <SHA-256 of the token>.spent   the same after its use, kept until it would have expired
//! ```
//!
//! Stored is the hash alone: neither the files nor the time of a look-up tell a token. A token is
//! taken before the CA is asked, so a crash in between spends it; it never certifies twice.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::net::Ipv6Addr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use crate::certs::error::CertsError;
use crate::certs::fault::{CertificateFault, count_start};
use crate::certs::names::IdentityNames;
use crate::certs::pem;
use crate::certs::storage::{Access, replace_file, sync_parent};
use crate::certs::wall_clock::unix_seconds;

/// Most tokens that are remembered, spent ones included.
pub const TOKENS_MAX: usize = 16_384;
/// Random bytes in a token.
const TOKEN_SIZE_BYTES: usize = 32;
const WAITING: &str = "token";
const SPENT: &str = "spent";

/// What a token entitles to.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    pub(super) names: IdentityNames,
    pub(super) expires: SystemTime,
}

/// Why a token certifies nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenRefusal {
    Unknown,
    Expired,
    Spent,
}

/// A key of the tables: SHA-256 of the token.
pub(super) type TokenHash = [u8; 32];

pub(super) fn hash(token: &[u8]) -> TokenHash {
    digest::digest(&digest::SHA256, token).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Where tokens wait.
#[derive(Debug)]
pub(super) enum TokenStore {
    Memory(Mutex<HashMap<TokenHash, Entry>>),
    Directory(TokenDirectory),
}

/// A token in memory.
#[derive(Debug)]
pub(super) struct Entry {
    grant: Grant,
    spent: bool,
}

impl TokenStore {
    pub(super) fn create(
        &self,
        names: &IdentityNames,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<String, CertsError> {
        match self {
            Self::Directory(directory) => directory.create(names, lifetime, now),
            Self::Memory(entries) => {
                names.validate()?;
                let token = random_token()?;
                let mut entries = entries.lock().expect("no panic while locked");
                entries.retain(|_, entry| entry.grant.expires >= now);
                check_room(entries.len())?;
                let grant = Grant { names: names.clone(), expires: now + lifetime };
                entries.insert(hash(&token), Entry { grant, spent: false });
                Ok(hex_of(&token))
            }
        }
    }

    /// Spends a token.
    pub(super) fn take(
        &self,
        key: &TokenHash,
        now: SystemTime,
    ) -> Result<Result<Grant, TokenRefusal>, CertsError> {
        match self {
            Self::Directory(directory) => directory.take(key, now),
            Self::Memory(entries) => {
                let mut entries = entries.lock().expect("no panic while locked");
                Ok(match entries.get_mut(key) {
                    None => Err(TokenRefusal::Unknown),
                    Some(entry) if entry.spent => Err(TokenRefusal::Spent),
                    Some(entry) if entry.grant.expires < now => Err(TokenRefusal::Expired),
                    Some(entry) => {
                        entry.spent = true;
                        Ok(entry.grant.clone())
                    }
                })
            }
        }
    }

    /// Makes a spent token good again: the CA said "later".
    pub(super) fn put_back(&self, key: &TokenHash) -> Result<(), CertsError> {
        match self {
            Self::Directory(directory) => directory.rename(key, SPENT, WAITING).map(|_| ()),
            Self::Memory(entries) => {
                if let Some(entry) = entries.lock().expect("no panic while locked").get_mut(key) {
                    entry.spent = false;
                }
                Ok(())
            }
        }
    }
}

/// Tokens as files, so that one process makes them while another serves, and a restart loses none.
#[derive(Debug)]
pub struct TokenDirectory {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantFile {
    expires_unix_s: u64,
    #[serde(default)]
    dns: Vec<String>,
    #[serde(default)]
    ipv6: Vec<Ipv6Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_id: Option<String>,
}

impl TokenDirectory {
    /// Uses `path`, which is made with mode 0700 if it is missing.
    ///
    /// # Errors
    /// Others can write to it, or a system call failed.
    pub fn open(path: &Path) -> Result<Self, CertsError> {
        count_start(Self::open_directory(path))
    }

    fn open_directory(path: &Path) -> Result<Self, CertsError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => sync_parent(path)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(CertsError::file("create directory", path, error)),
        }
        let metadata = fs::metadata(path).map_err(|error| CertsError::file("stat", path, error))?;
        let mode = metadata.mode() & 0o7777;
        if mode & 0o022 != 0 {
            return Err(CertsError::DirectoryWritableByOthers { path: path.to_owned(), mode });
        }
        Ok(Self { path: path.to_owned() })
    }

    /// Makes a token that certifies `names` once within `lifetime` from `now`; hexadecimal text.
    ///
    /// # Errors
    /// The names are invalid, too many tokens wait, or the file could not be written.
    pub fn create(
        &self,
        names: &IdentityNames,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<String, CertsError> {
        names.validate()?;
        check_room(self.forget_expired(now)?)?;
        let token = random_token()?;
        let file = GrantFile {
            expires_unix_s: unix_seconds(now + lifetime),
            dns: names.dns().to_vec(),
            ipv6: names.ipv6().to_vec(),
            client_id: names.client_id().map(str::to_owned),
        };
        let text = toml::to_string(&file)
            .map_err(|error| CertsError::crypto("writing a token as TOML", error))?;
        replace_file(&self.file(&hash(&token), WAITING), text.as_bytes(), Access::Owner)?;
        Ok(hex_of(&token))
    }

    fn take(
        &self,
        key: &TokenHash,
        now: SystemTime,
    ) -> Result<Result<Grant, TokenRefusal>, CertsError> {
        if !self.rename(key, WAITING, SPENT)? {
            let spent = self.file(key, SPENT);
            let known =
                spent.try_exists().map_err(|error| CertsError::file("stat", &spent, error))?;
            return Ok(Err(if known { TokenRefusal::Spent } else { TokenRefusal::Unknown }));
        }
        let grant = read_grant(&self.file(key, SPENT))?;
        Ok(if grant.expires < now { Err(TokenRefusal::Expired) } else { Ok(grant) })
    }

    /// Renames a token's file, durably; `false` if there is none.
    fn rename(&self, key: &TokenHash, from: &str, to: &str) -> Result<bool, CertsError> {
        let path = self.file(key, to);
        match fs::rename(self.file(key, from), &path) {
            Ok(()) => sync_parent(&path).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(CertsError::file("rename into", &path, error)),
        }
    }

    fn file(&self, key: &TokenHash, state: &str) -> PathBuf {
        self.path.join(format!("{}.{state}", hex_of(key)))
    }

    /// Removes what has expired and returns how many are left.
    fn forget_expired(&self, now: SystemTime) -> Result<usize, CertsError> {
        let listing = |error| CertsError::file("list directory", &self.path, error);
        let mut left = 0;
        for entry in fs::read_dir(&self.path).map_err(listing)? {
            let path = entry.map_err(listing)?.path();
            let is_token =
                path.extension().is_some_and(|ending| ending == WAITING || ending == SPENT);
            if !is_token {
                continue;
            }
            let grant = match read_grant(&path) {
                Ok(grant) => grant,
                // Taken or put back between the listing and the reading.
                Err(CertsError::File { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    continue;
                }
                // One bad file must not stop all others.
                Err(error) => {
                    tracing::warn!(%error, "a token file is of no use; remove it");
                    left += 1;
                    continue;
                }
            };
            if grant.expires >= now {
                left += 1;
                continue;
            }
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(CertsError::file("remove", &path, error)),
            }
        }
        Ok(left)
    }
}

fn read_grant(path: &Path) -> Result<Grant, CertsError> {
    let bytes = pem::read_private(path)?;
    let damaged = |reason: String| CertsError::Parse {
        fault: CertificateFault::Malformed,
        what: path.display().to_string(),
        reason,
    };
    let text = std::str::from_utf8(&bytes).map_err(|error| damaged(error.to_string()))?;
    let file: GrantFile = toml::from_str(text).map_err(|error| damaged(error.to_string()))?;
    let mut names = IdentityNames::new();
    for name in &file.dns {
        names = names.with_dns(name)?;
    }
    for address in &file.ipv6 {
        names = names.with_ipv6(*address);
    }
    if let Some(id) = &file.client_id {
        names = names.with_client_id(id)?;
    }
    Ok(Grant { names, expires: UNIX_EPOCH + Duration::from_secs(file.expires_unix_s) })
}

fn check_room(remembered: usize) -> Result<(), CertsError> {
    if remembered < TOKENS_MAX {
        return Ok(());
    }
    Err(CertsError::Configuration(format!(
        "{TOKENS_MAX} enrolment tokens are remembered; let some expire"
    )))
}

fn random_token() -> Result<[u8; TOKEN_SIZE_BYTES], CertsError> {
    let mut token = [0; TOKEN_SIZE_BYTES];
    aws_lc_rs::rand::fill(&mut token)
        .map_err(|_| CertsError::crypto("token generation", "no entropy"))?;
    Ok(token)
}

/// Two digits a byte.
fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::names::unhex;
    use crate::certs::test_dir::TestDir;

    const HOUR: Duration = Duration::from_secs(3600);

    fn names() -> IdentityNames {
        let names = IdentityNames::new().with_dns("node.example.net").unwrap();
        names.with_ipv6("2001:db8::1".parse().unwrap()).with_client_id("probe-7").unwrap()
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn key_of(token: &str) -> TokenHash {
        hash(&unhex(token).unwrap())
    }

    #[test]
    fn a_token_survives_restarts_and_is_taken_once() {
        let dir = TestDir::new();
        let path = dir.path().join("tokens");
        let token = TokenDirectory::open(&path).unwrap().create(&names(), HOUR, now()).unwrap();
        let store = TokenStore::Directory(TokenDirectory::open(&path).unwrap());
        let grant = store.take(&key_of(&token), now()).unwrap().unwrap();
        assert_eq!(grant.names, names());
        let again = TokenStore::Directory(TokenDirectory::open(&path).unwrap());
        assert_eq!(again.take(&key_of(&token), now()).unwrap().unwrap_err(), TokenRefusal::Spent);
        again.put_back(&key_of(&token)).unwrap();
        store.take(&key_of(&token), now()).unwrap().unwrap();
        assert_eq!(store.take(&[0; 32], now()).unwrap().unwrap_err(), TokenRefusal::Unknown);
        for entry in fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            assert!(!entry.file_name().to_string_lossy().contains(&token), "the token is on disk");
            assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn of_many_takers_one_wins() {
        let dir = TestDir::new();
        let directory = TokenDirectory::open(dir.path()).unwrap();
        let key = key_of(&directory.create(&names(), HOUR, now()).unwrap());
        let stores: Vec<_> = (0..8)
            .map(|_| TokenStore::Directory(TokenDirectory::open(dir.path()).unwrap()))
            .collect();
        let won = std::thread::scope(|scope| {
            let takers: Vec<_> = stores
                .iter()
                .map(|store| scope.spawn(move || store.take(&key, now()).unwrap().is_ok()))
                .collect();
            takers.into_iter().map(|taker| taker.join().unwrap()).filter(|won| *won).count()
        });
        assert_eq!(won, 1);
    }

    #[test]
    fn expired_tokens_are_refused_and_forgotten() {
        let dir = TestDir::new();
        let directory = TokenDirectory::open(dir.path()).unwrap();
        let key = key_of(&directory.create(&names(), HOUR, now()).unwrap());
        let late = now() + HOUR + Duration::from_secs(1);
        let store = TokenStore::Directory(TokenDirectory::open(dir.path()).unwrap());
        assert_eq!(store.take(&key, late).unwrap().unwrap_err(), TokenRefusal::Expired);
        assert_eq!(directory.forget_expired(late).unwrap(), 0);
        assert_eq!(store.take(&key, late).unwrap().unwrap_err(), TokenRefusal::Unknown);
    }

    #[test]
    fn damaged_and_exposed_token_files_are_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = TestDir::new();
        let directory = TokenDirectory::open(dir.path()).unwrap();
        let key = key_of(&directory.create(&names(), HOUR, now()).unwrap());
        let file = directory.file(&key, WAITING);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        let error = directory.take(&key, now()).unwrap_err();
        assert_eq!(error.fault(), CertificateFault::KeyReadableByOthers);
        let key = key_of(&directory.create(&names(), HOUR, now() + 2 * HOUR).unwrap());
        fs::write(directory.file(&key, WAITING), "names = 3").unwrap();
        assert_eq!(directory.take(&key, now()).unwrap_err().fault(), CertificateFault::Malformed);
    }
}
