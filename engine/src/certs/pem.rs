//! Certificates, keys and revocation lists from PEM files, with errors that name the file.
//!
//! A private key is read from the same descriptor whose mode was checked, so the file cannot be
//! swapped in between.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::error::CertsError;
use super::fault::CertificateFault;

/// Largest PEM file that is read; a CRL of 100 000 entries stays below it.
const PEM_SIZE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Reads a chain, leaf first, or a set of roots.
///
/// # Errors
/// The file cannot be read, is cut short, or holds no certificate.
pub fn certificates_from_file(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertsError> {
    certificates(&read_public(path)?, &path.display().to_string())
}

/// Reads revocation lists.
///
/// # Errors
/// The file cannot be read, is cut short, or holds no list.
pub fn revocation_lists_from_file(
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, CertsError> {
    sections(&read_public(path)?, &path.display().to_string(), "certificate revocation list")
}

/// Reads a private key (PKCS#8, SEC1 or PKCS#1) from a file that only its owner can read.
///
/// # Errors
/// The file cannot be read, is open to others, is cut short, or holds no key.
pub fn private_key_from_file(path: &Path) -> Result<PrivateKeyDer<'static>, CertsError> {
    private_key(&read_private(path)?, &path.display().to_string())
}

/// The certificates in `pem`; `what` names the source in errors.
pub(super) fn certificates(
    pem: &[u8],
    what: &str,
) -> Result<Vec<CertificateDer<'static>>, CertsError> {
    sections(pem, what, "certificate")
}

/// The first private key in `pem`; `what` names the source in errors.
pub(super) fn private_key(pem: &[u8], what: &str) -> Result<PrivateKeyDer<'static>, CertsError> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|error| parse_error(&error, pem, what, "private key"))
}

/// All private keys in `pem`; `what` names the source in errors.
pub(super) fn private_keys(
    pem: &[u8],
    what: &str,
) -> Result<Vec<PrivateKeyDer<'static>>, CertsError> {
    sections(pem, what, "private key")
}

fn sections<T: PemObject>(pem: &[u8], what: &str, kind: &str) -> Result<Vec<T>, CertsError> {
    let found: Vec<T> = T::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| parse_error(&error, pem, what, kind))?;
    if found.is_empty() {
        return Err(parse_error(&pem::Error::NoItemsFound, pem, what, kind));
    }
    Ok(found)
}

fn parse_error(error: &pem::Error, text: &[u8], what: &str, kind: &str) -> CertsError {
    let (fault, reason) = match error {
        pem::Error::MissingSectionEnd { end_marker } => (
            CertificateFault::Truncated,
            format!("ends before `{}`", String::from_utf8_lossy(end_marker).trim()),
        ),
        // A section that opens with the last, unfinished line.
        pem::Error::IllegalSectionStart { line } if text.ends_with(line) => {
            (CertificateFault::Truncated, "ends in the line that opens a section".to_owned())
        }
        pem::Error::NoItemsFound => (CertificateFault::Malformed, format!("holds no {kind}")),
        other => (CertificateFault::Malformed, format!("unreadable {kind}: {other}")),
    };
    CertsError::Parse { fault, what: what.to_owned(), reason }
}

/// Reads a file that anyone may read.
pub(super) fn read_public(path: &Path) -> Result<Vec<u8>, CertsError> {
    read_bounded(&open(path)?, path)
}

/// Reads a file that only its owner may read.
pub(super) fn read_private(path: &Path) -> Result<Vec<u8>, CertsError> {
    let file = open(path)?;
    let metadata = file.metadata().map_err(|error| CertsError::file("fstat", path, error))?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(CertsError::KeyReadableByOthers { path: path.to_owned(), mode });
    }
    read_bounded(&file, path)
}

fn open(path: &Path) -> Result<File, CertsError> {
    File::open(path).map_err(|error| CertsError::file("open", path, error))
}

fn read_bounded(file: &File, path: &Path) -> Result<Vec<u8>, CertsError> {
    let mut bytes = Vec::new();
    file.take(PEM_SIZE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| CertsError::file("read", path, error))?;
    if bytes.len() as u64 > PEM_SIZE_BYTES_MAX {
        return Err(CertsError::Parse {
            fault: CertificateFault::Malformed,
            what: path.display().to_string(),
            reason: format!("larger than {PEM_SIZE_BYTES_MAX} bytes"),
        });
    }
    Ok(bytes)
}

/// One PEM section around `der`, lines of 64 characters (RFC 7468).
pub(super) fn encode(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut base64 = String::with_capacity(der.len().div_ceil(3) * 4);
    for chunk in der.chunks(3) {
        let word = (u32::from(chunk[0]) << 16)
            | (u32::from(chunk.get(1).copied().unwrap_or(0)) << 8)
            | u32::from(chunk.get(2).copied().unwrap_or(0));
        for position in 0..4 {
            if position <= chunk.len() {
                let sextet = (word >> (18 - 6 * position)) & 0x3f;
                base64.push(char::from(ALPHABET[sextet as usize]));
            } else {
                base64.push('=');
            }
        }
    }
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in base64.as_bytes().chunks(64) {
        pem.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        pem.push('\n');
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::test_dir::TestDir;
    use super::*;

    #[test]
    fn encoding_round_trips_every_remainder() {
        for length in [0_usize, 1, 2, 3, 47, 48, 49, 500] {
            let der: Vec<u8> = (0..length).map(|index| (index * 7 + 3) as u8).collect();
            let text = encode("CERTIFICATE", &der);
            let parsed = certificates(text.as_bytes(), "test").unwrap();
            assert_eq!(parsed[0].as_ref(), der, "length {length}");
            assert!(text.lines().all(|line| line.len() <= 64));
        }
    }

    #[test]
    fn truncated_and_empty_files_have_their_own_faults() {
        let text = encode("CERTIFICATE", &[7; 300]);
        for cut in [14, 30, text.len() / 2, text.len() - 10] {
            let error = certificates(&text.as_bytes()[..cut], "leaf.pem").unwrap_err();
            assert_eq!(error.fault(), CertificateFault::Truncated, "cut at {cut}: {error}");
            assert!(error.to_string().contains("leaf.pem"));
        }
        let error = certificates(b"", "leaf.pem").unwrap_err();
        assert_eq!(error.fault(), CertificateFault::Malformed);
        let error = private_key(text.as_bytes(), "leaf.pem").unwrap_err();
        assert_eq!(error.fault(), CertificateFault::Malformed);
    }

    #[test]
    fn keys_open_to_others_are_refused_with_the_cure() {
        let dir = TestDir::new();
        let path = dir.path().join("node.key");
        std::fs::write(&path, encode("PRIVATE KEY", &[1; 40])).unwrap();
        for mode in [0o644, 0o640, 0o604, 0o610] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = private_key_from_file(&path).unwrap_err();
            assert_eq!(error.fault(), CertificateFault::KeyReadableByOthers);
            assert!(error.to_string().contains(&format!("chmod 600 {}", path.display())));
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        private_key_from_file(&path).unwrap();
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = certificates_from_file(Path::new("/nonexistent/roots.pem")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/roots.pem"), "{error}");
    }
}
