//! How connection IDs are made: the `[cid]` table.
//!
//! The layout is that of draft-ietf-quic-load-balancers, with the shard in octets that the draft
//! leaves to the server. Everything here may be changed while the engine runs
//! ([`Engine::rotate_cids`](crate::Engine::rotate_cids)), except the length: a short header does
//! not say how long its ID is.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

use super::{ConfigError, check};

/// Longest connection ID, bytes (RFC 9000 §17.2).
pub const CID_BYTES_MAX: usize = 20;
/// Bytes of a connection ID that carry the shard and its check.
pub const CID_SHARD_BYTES: usize = 2;
/// Shortest nonce, bytes: of 2^40 random ones, two are the same after about 2^20 IDs.
pub const CID_NONCE_BYTES_MIN: usize = 5;
/// Longest server ID, bytes: what the first octet, the nonce and the shard leave of an ID.
pub const CID_SERVER_ID_BYTES_MAX: usize =
    CID_BYTES_MAX - 1 - CID_NONCE_BYTES_MIN - CID_SHARD_BYTES;
/// Largest value of the rotation bits; all ones mean "not routable" (draft §3.2).
pub const CID_ROTATION_MAX: u8 = 6;

/// The bytes of hexadecimal `text`; `None` if it is odd or something else.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pair = |pair: &[u8]| u8::try_from(digit(pair[0])? * 16 + digit(*pair.get(1)?)?).ok();
    text.as_bytes().chunks(2).map(pair).collect()
}

/// The secret that hides server and shard in connection IDs. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct CidKey([u8; 16]);

impl CidKey {
    /// A key of 16 secret bytes: the balancer's AES-128 key.
    #[must_use]
    pub const fn new(secret: &[u8; 16]) -> Self {
        Self(*secret)
    }

    /// A key from the system's randomness.
    ///
    /// # Panics
    /// If the system has no randomness.
    #[must_use]
    pub fn random() -> Self {
        let mut secret = [0; 16];
        aws_lc_rs::rand::fill(&mut secret).expect("the system gives randomness");
        Self(secret)
    }

    pub(crate) const fn secret(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for CidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CidKey(..)")
    }
}

impl<'de> Deserialize<'de> for CidKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KeyVisitor)
    }
}

/// Reads hexadecimal digits; its errors never repeat what was read.
struct KeyVisitor;

impl KeyVisitor {
    fn refuse<E: de::Error>() -> E {
        E::custom("the key of connection IDs must be a string of 32 hexadecimal digits")
    }
}

impl Visitor<'_> for KeyVisitor {
    type Value = CidKey;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string of 32 hexadecimal digits")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<CidKey, E> {
        let secret = unhex(text).and_then(|bytes| bytes.try_into().ok());
        secret.map(CidKey).ok_or_else(Self::refuse)
    }

    fn visit_i64<E: de::Error>(self, _secret: i64) -> Result<CidKey, E> {
        Err(Self::refuse())
    }

    fn visit_u64<E: de::Error>(self, _secret: u64) -> Result<CidKey, E> {
        Err(Self::refuse())
    }

    fn visit_f64<E: de::Error>(self, _secret: f64) -> Result<CidKey, E> {
        Err(Self::refuse())
    }
}

/// This machine's name towards an outside balancer: 0 to [`CID_SERVER_ID_BYTES_MAX`] bytes, in
/// configurations as hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerId(Vec<u8>);

impl ServerId {
    /// A server ID of these bytes.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    /// Its bytes; none: no balancer stands before the engine.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<String> for ServerId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let bytes = unhex(&text)
            .ok_or_else(|| format!("the server ID `{text}` is not an even number of hex digits"));
        bytes.map(Self)
    }
}

impl From<ServerId> for String {
    fn from(id: ServerId) -> Self {
        id.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// How connection IDs are made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CidConfig {
    /// Length of every ID, bytes. 8 to 20. The nonce takes what the first octet, the server ID and
    /// two octets for the shard leave of it: 5 bytes at least. 19 makes server ID and nonce one AES
    /// block (the draft's single pass).
    pub length_bytes: usize,
    /// The configuration's name in the first three bits of each ID: 0 to 6.
    pub rotation: u8,
    /// The balancer's key, 32 hexadecimal digits; none: a random one with each start.
    pub key: Option<CidKey>,
    /// This machine's server ID; empty: no balancer reads the IDs. It needs a `key`.
    pub server_id: ServerId,
    /// Write the ID's length into the rest of the first octet (draft §3.3), else random bits.
    pub encode_length: bool,
    /// IDs are replaced by fresh ones after this, s; 0: only when they are used up. With it, IDs of
    /// an old configuration leave the connections. More than twice `idle_timeout_ms`, which must be set:
    /// quinn-proto 0.11.19 repeats a lost NEW_CONNECTION_ID even when its ID has been retired meanwhile,
    /// and peers must close for that (RFC 9000 §19.15). At most 86400.
    pub lifetime_s: u64,
}

impl Default for CidConfig {
    fn default() -> Self {
        Self {
            length_bytes: 10,
            rotation: 0,
            key: None,
            server_id: ServerId::default(),
            encode_length: false,
            lifetime_s: 0,
        }
    }
}

impl CidConfig {
    /// Length of the nonce, bytes, which the balancer's configuration must name.
    #[must_use]
    pub fn nonce_bytes(&self) -> usize {
        self.length_bytes.saturating_sub(1 + self.server_id.0.len() + CID_SHARD_BYTES)
    }

    /// Checks lengths and the key that a server ID needs.
    ///
    /// # Errors
    /// The first value that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check("cid.length_bytes", self.length_bytes, 8, CID_BYTES_MAX)?;
        check("cid.rotation", self.rotation, 0, CID_ROTATION_MAX)?;
        check("cid.lifetime_s", self.lifetime_s, 0, 86_400)?;
        if self.nonce_bytes() < CID_NONCE_BYTES_MIN {
            let room = self.length_bytes.saturating_sub(1 + CID_SHARD_BYTES + CID_NONCE_BYTES_MIN);
            return Err(ConfigError {
                key: "cid.server_id",
                value: format!("{} bytes", self.server_id.0.len()),
                allowed: format!(
                    "0 to {room} bytes with cid.length_bytes = {} (at most {CID_BYTES_MAX})",
                    self.length_bytes
                ),
            });
        }
        if !self.server_id.0.is_empty() && self.key.is_none() {
            return Err(ConfigError {
                key: "cid.key",
                value: "unset".into(),
                allowed: "the balancer's key (32 hexadecimal digits), because cid.server_id is set"
                    .into(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::config::TransportConfig;

    const KEY: &str = "8f95f09245765f80256934e50c66207f";

    #[test]
    fn the_table_is_read_and_the_key_is_never_printed() {
        let text = format!(
            "[cid]\nlength_bytes = 19\nrotation = 2\nkey = '{KEY}'\nserver_id = 'ed793a51d49b8f5f'"
        );
        let config = TransportConfig::from_toml(&text).expect("valid");
        assert_eq!(config.cid.nonce_bytes(), 8);
        assert_eq!(config.cid.server_id.bytes().len(), 8);
        assert!(!format!("{config:?}").contains("8f95"), "the key shows in Debug");
        for wrong in [
            format!("[cid]\nkey = '{KEY}00'"),
            format!("[cid]\nkey = '{}zz'", &KEY[..30]),
            "[cid]\nkey = 8795095".into(),
            format!("[cid]\nkey = {KEY}"),
            format!("[cid]\nkey = ['{KEY}']"),
        ] {
            let error = TransportConfig::from_toml(&wrong).expect_err("no key");
            assert!(!error.contains("8f95") && !error.contains("8795095"), "{error}");
            assert!(error.contains("line 2"), "{error}");
        }
    }

    #[test]
    fn lengths_must_leave_room_for_a_nonce() {
        let error = TransportConfig::from_toml("[cid]\nlength_bytes = 21").expect_err("too long");
        assert!(error.contains("8 to 20"), "{error}");
        let error = TransportConfig::from_toml(&format!("[cid]\nkey='{KEY}'\nserver_id='aabbcc'"))
            .expect_err("no room");
        assert!(error.contains("cid.server_id") && error.contains("0 to 2 bytes"), "{error}");
        let error = TransportConfig::from_toml("[cid]\nserver_id = 'aa'").expect_err("no key");
        assert!(error.contains("cid.key"), "{error}");
        let error = TransportConfig::from_toml("[cid]\nrotation = 7").expect_err("reserved");
        assert!(error.contains("0 to 6"), "{error}");
        let error = TransportConfig::from_toml("[cid]\nlifetime_s = 60").expect_err("too short");
        assert!(error.contains("twice idle_timeout_ms (30000)"), "{error}");
        TransportConfig::from_toml("[cid]\nlifetime_s = 61").expect("long enough");
        let error = TransportConfig::from_toml("[cid]\nserver_id = 'abc'").expect_err("odd");
        assert!(error.contains("abc"), "{error}");
    }
}
