//! Who seals and opens packets: cipher suites whose packet protection is ours to choose.
//!
//! ```text
//! rustls (key schedule) ─ AeadKey, Iv ─► Algorithm ─┬─ aws-lc-rs: rustls's own keys, always there
//!                                                   └─ ipsec-mb: found at run time, self-tested
//! quinn-proto ─ header, payload, packet number ─► PacketKey, HeaderProtectionKey
//! ```
//!
//! The choice is made when TLS is configured and holds for its connections. Handshake, 0-RTT and
//! 1-RTT packets of the AES suites follow it; Initial packets, whose key anybody can compute, and
//! ChaCha20-Poly1305 stay with aws-lc-rs. Limits on the use of a key are RFC 9001's (§6.6) for
//! either provider. FIPS is not claimed. Sealing by a device, later, is [`offload`]'s.

mod ipsec_mb;
pub mod offload;
mod self_test;

use std::fmt;
use std::sync::{LazyLock, OnceLock};

use rustls::crypto::aws_lc_rs::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::{SupportedCipherSuite, Tls13CipherSuite};

use crate::config::CryptoProviderChoice;
use crate::sys;
use ipsec_mb::IpsecMbAlgorithm;

/// How to get the faster provider.
pub const IPSEC_MB_ADVICE: &str = "install Intel's ipsec-mb 1.0 to 1.3: `apt install libipsec-mb1`";

/// Who protects packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CryptoProvider {
    /// aws-lc-rs, which is compiled in.
    AwsLcRs,
    /// Intel's ipsec-mb, found at run time.
    IpsecMb,
}

impl CryptoProvider {
    /// The name used in configurations and outputs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AwsLcRs => "aws-lc-rs",
            Self::IpsecMb => "ipsec-mb",
        }
    }

    /// The provider that `choice` means on this machine. The first call that may mean ipsec-mb
    /// loads and tests it, which takes some milliseconds; the answer is kept.
    ///
    /// # Errors
    /// ipsec-mb is asked for and cannot be used.
    pub fn choose(choice: CryptoProviderChoice) -> Result<Self, CryptoProviderUnavailable> {
        let must = match choice {
            CryptoProviderChoice::AwsLcRs => return Ok(Self::AwsLcRs),
            CryptoProviderChoice::IpsecMb => true,
            CryptoProviderChoice::Auto => false,
        };
        match ipsec_mb_version() {
            Ok(_) => Ok(Self::IpsecMb),
            Err(reason) if must => Err(CryptoProviderUnavailable { reason: reason.to_owned() }),
            Err(_) => Ok(Self::AwsLcRs),
        }
    }

    /// TLS 1.3 cipher suites (RFC 8446, appendix B.4) that protect packets with this provider, in
    /// order of preference.
    ///
    /// # Panics
    /// The value did not come from [`Self::choose`], and ipsec-mb cannot be used.
    #[must_use]
    pub fn cipher_suites(self) -> Vec<SupportedCipherSuite> {
        match self {
            Self::AwsLcRs => vec![
                TLS13_AES_128_GCM_SHA256,
                TLS13_AES_256_GCM_SHA384,
                TLS13_CHACHA20_POLY1305_SHA256,
            ],
            Self::IpsecMb => vec![
                SupportedCipherSuite::Tls13(&IPSEC_MB_AES_128),
                SupportedCipherSuite::Tls13(&IPSEC_MB_AES_256),
                TLS13_CHACHA20_POLY1305_SHA256,
            ],
        }
    }
}

impl fmt::Display for CryptoProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The provider that a configuration demands cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "crypto_provider is ipsec-mb, which cannot be used: {reason}; {IPSEC_MB_ADVICE}, or set it to auto"
)]
pub struct CryptoProviderUnavailable {
    reason: String,
}

/// The version of ipsec-mb that can be used here, or why none can. The first call loads and tests
/// it.
///
/// # Errors
/// The library is missing, too old or too new, the processor lacks AVX-512 with VAES, or its
/// results are not those of aws-lc-rs.
pub fn ipsec_mb_version() -> Result<&'static str, &'static str> {
    static FOUND: OnceLock<Result<&'static str, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let library = sys::ipsec_mb::IpsecMb::load().map_err(|unavailable| {
            tracing::info!(reason = %unavailable, "packets are sealed by aws-lc-rs, not ipsec-mb");
            unavailable.to_string()
        })?;
        let version = library.version();
        self_test::run(library, self_test::TRIALS_AT_START).map_err(|failure| {
            tracing::error!(version, %failure, "ipsec-mb fails its self-test; aws-lc-rs seals");
            format!("version {version} fails its self-test: {failure}")
        })?;
        tracing::info!(version, "ipsec-mb seals packets");
        Ok(version)
    });
    found.as_ref().copied().map_err(String::as_str)
}

/// ipsec-mb's sealing from one buffer into another: for the benchmark `sealing`, which measures what
/// it saves over sealing in place.
#[doc(hidden)]
pub struct IpsecMbOutOfPlace(sys::ipsec_mb::GcmKey);

impl IpsecMbOutOfPlace {
    /// Expands a key of 16 or 32 bytes; `None` where ipsec-mb cannot be used.
    #[must_use]
    pub fn new(key: &[u8]) -> Option<Self> {
        ipsec_mb_version().ok()?;
        let library = sys::ipsec_mb::IpsecMb::load().ok()?;
        Some(Self(sys::ipsec_mb::GcmKey::new(library, key)))
    }

    /// Encrypts `plain` into `sealed`, which is as long, and returns the tag.
    #[must_use]
    pub fn seal(&self, nonce: &[u8; 12], aad: &[u8], plain: &[u8], sealed: &mut [u8]) -> [u8; 16] {
        self.0.seal(nonce, aad, plain, sealed)
    }
}

/// The AES-128 suite over ipsec-mb.
static IPSEC_MB_AES_128: LazyLock<Tls13CipherSuite> =
    LazyLock::new(|| over_ipsec_mb(TLS13_AES_128_GCM_SHA256, &IPSEC_MB_AES_128_QUIC));
static IPSEC_MB_AES_128_QUIC: LazyLock<IpsecMbAlgorithm> =
    LazyLock::new(|| IpsecMbAlgorithm::new(TLS13_AES_128_GCM_SHA256));
/// The AES-256 suite over ipsec-mb.
static IPSEC_MB_AES_256: LazyLock<Tls13CipherSuite> =
    LazyLock::new(|| over_ipsec_mb(TLS13_AES_256_GCM_SHA384, &IPSEC_MB_AES_256_QUIC));
static IPSEC_MB_AES_256_QUIC: LazyLock<IpsecMbAlgorithm> =
    LazyLock::new(|| IpsecMbAlgorithm::new(TLS13_AES_256_GCM_SHA384));

/// `suite` with other packet protection: hash, key schedule and name stay.
fn over_ipsec_mb(
    suite: SupportedCipherSuite,
    quic: &'static LazyLock<IpsecMbAlgorithm>,
) -> Tls13CipherSuite {
    let suite = suite.tls13().expect("both are TLS 1.3 suites");
    Tls13CipherSuite {
        common: rustls::crypto::CipherSuiteCommon { ..suite.common },
        hkdf_provider: suite.hkdf_provider,
        aead_alg: suite.aead_alg,
        quic: Some(&**quic),
    }
}

#[cfg(test)]
mod tests;
