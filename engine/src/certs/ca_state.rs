//! What a CA remembers: unexpired certificates and revocations, bounded.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::error::{CaError, CertsError};
use super::fault::CertificateFault;
use super::names::{CertificateSummary, IdentityNames, unhex};
use super::wall_clock::unix_seconds;

/// Most certificates that one embedded CA tracks, unexpired or revoked; more nodes deserve a CA of
/// their own. Bounds the revocation list, too.
pub(super) const ISSUED_MAX: usize = 16_384;
/// A revocation stays listed this long after the certificate's end, for verifiers with slow clocks.
const REVOKED_KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// The state file, rewritten as a whole with each change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CaState {
    /// Sequence number of the last revocation list (RFC 5280, section 5.2.3).
    #[serde(default)]
    pub(super) crl_number: u64,
    #[serde(default)]
    pub(super) issued: Vec<Issued>,
    #[serde(default)]
    pub(super) revoked: Vec<Revoked>,
}

/// A certificate that has not expired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Issued {
    serial: String,
    not_after_unix_s: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    dns: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ipv6: Vec<std::net::Ipv6Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_id: Option<String>,
}

/// A certificate that must not be trusted any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Revoked {
    serial: String,
    revoked_unix_s: u64,
    not_after_unix_s: u64,
}

impl CaState {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, CertsError> {
        let damaged = |reason: String| CertsError::Parse {
            fault: CertificateFault::Malformed,
            what: "CA state file".to_owned(),
            reason,
        };
        let text = std::str::from_utf8(bytes).map_err(|error| damaged(error.to_string()))?;
        toml::from_str(text).map_err(|error| damaged(error.to_string()))
    }

    pub(super) fn to_toml(&self) -> Result<String, CertsError> {
        toml::to_string(self).map_err(|error| CertsError::crypto("CA state encoding", error))
    }

    /// Remembers a new certificate and forgets expired ones.
    pub(super) fn record(
        &mut self,
        certificate: &CertificateSummary,
        now: SystemTime,
    ) -> Result<(), CaError> {
        let now_s = unix_seconds(now);
        self.issued.retain(|issued| issued.not_after_unix_s >= now_s);
        self.revoked.retain(|revoked| revoked.not_after_unix_s + REVOKED_KEPT.as_secs() >= now_s);
        if self.issued.len() + self.revoked.len() >= ISSUED_MAX {
            return Err(CaError::refused(format!(
                "{ISSUED_MAX} certificates are valid or revoked already; wait for some to expire"
            )));
        }
        self.issued.push(Issued {
            serial: certificate.serial.clone(),
            not_after_unix_s: unix_seconds(certificate.not_after),
            dns: certificate.names.dns().to_vec(),
            ipv6: certificate.names.ipv6().to_vec(),
            client_id: certificate.names.client_id().map(str::to_owned),
        });
        Ok(())
    }

    /// Moves every certificate that carries exactly `names` to the revoked ones.
    pub(super) fn revoke(&mut self, names: &IdentityNames, now: SystemTime) -> Vec<String> {
        let mut serials = Vec::new();
        let revoked_unix_s = unix_seconds(now);
        self.issued.retain(|issued| {
            let same = issued.dns == names.dns()
                && issued.ipv6 == names.ipv6()
                && issued.client_id.as_deref() == names.client_id();
            if same {
                serials.push(issued.serial.clone());
                self.revoked.push(Revoked {
                    serial: issued.serial.clone(),
                    revoked_unix_s,
                    not_after_unix_s: issued.not_after_unix_s,
                });
            }
            !same
        });
        serials
    }

    /// Whether the certificate with this serial number is revoked.
    pub(super) fn is_revoked(&self, serial: &str) -> bool {
        self.revoked.iter().any(|revoked| revoked.serial == serial)
    }

    pub(super) fn revoked_params(&self) -> Result<Vec<rcgen::RevokedCertParams>, CertsError> {
        self.revoked
            .iter()
            .map(|revoked| {
                Ok(rcgen::RevokedCertParams {
                    serial_number: rcgen::SerialNumber::from_slice(&serial_bytes(&revoked.serial)?),
                    revocation_time: (UNIX_EPOCH + Duration::from_secs(revoked.revoked_unix_s))
                        .into(),
                    reason_code: Some(rcgen::RevocationReason::Superseded),
                    invalidity_date: None,
                })
            })
            .collect()
    }
}

fn serial_bytes(text: &str) -> Result<Vec<u8>, CertsError> {
    unhex(text).ok_or_else(|| CertsError::Parse {
        fault: CertificateFault::Malformed,
        what: "CA state file".to_owned(),
        reason: format!("serial `{text}` is not hexadecimal"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(serial: &str, names: IdentityNames, end_s: u64) -> CertificateSummary {
        CertificateSummary {
            serial: serial.to_owned(),
            not_before: UNIX_EPOCH,
            not_after: UNIX_EPOCH + Duration::from_secs(end_s),
            names,
            is_ca: false,
        }
    }

    #[test]
    fn expired_entries_are_forgotten_and_the_table_is_bounded() {
        let names = IdentityNames::new().with_client_id("a").unwrap();
        let mut state = CaState::default();
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for index in 0..ISSUED_MAX {
            let serial = format!("{index:08x}");
            state.record(&summary(&serial, names.clone(), 100), at(0)).unwrap();
        }
        let error = state.record(&summary("ff", names.clone(), 200), at(100)).unwrap_err();
        assert!(matches!(error, CaError::Refused { .. }));
        state.record(&summary("ff", names, 200), at(101)).unwrap();
        assert_eq!(state.issued.len(), 1);
    }

    #[test]
    fn state_survives_its_file() {
        let names = IdentityNames::new()
            .with_dns("n.example")
            .unwrap()
            .with_ipv6("2001:db8::1".parse().unwrap())
            .with_client_id("c")
            .unwrap();
        let mut state = CaState { crl_number: 7, ..CaState::default() };
        state.record(&summary("0a", names.clone(), 100), UNIX_EPOCH).unwrap();
        let other = IdentityNames::new().with_dns("m.example").unwrap();
        state.record(&summary("0b", other.clone(), 100), UNIX_EPOCH).unwrap();
        assert_eq!(state.revoke(&names, UNIX_EPOCH), ["0a"]);
        assert!(state.revoke(&names, UNIX_EPOCH).is_empty());
        assert!(state.is_revoked("0a") && !state.is_revoked("0b"));
        let parsed = CaState::parse(state.to_toml().unwrap().as_bytes()).unwrap();
        assert_eq!(parsed, state);
        assert_eq!(parsed.revoked_params().unwrap().len(), 1);
    }

    #[test]
    fn damaged_state_is_reported() {
        for bytes in [&b"\xff\xfe"[..], b"issued = 3", b"crl_number = -1"] {
            assert_eq!(CaState::parse(bytes).unwrap_err().fault(), CertificateFault::Malformed);
        }
        serial_bytes("zz").unwrap_err();
    }
}
