//! Which implementation seals and opens packets.

use std::str::FromStr;

use serde::Deserialize;

/// Which implementation of AES-GCM protects packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CryptoProviderChoice {
    /// ipsec-mb where it is installed, runs on this processor and passes its self-test; else
    /// aws-lc-rs.
    #[default]
    Auto,
    /// aws-lc-rs, which is compiled in.
    AwsLcRs,
    /// Intel's ipsec-mb: refuse to start without it.
    IpsecMb,
}

impl CryptoProviderChoice {
    /// The name used in configurations and outputs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::AwsLcRs => "aws-lc-rs",
            Self::IpsecMb => "ipsec-mb",
        }
    }
}

impl FromStr for CryptoProviderChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Auto, Self::AwsLcRs, Self::IpsecMb]
            .into_iter()
            .find(|choice| choice.name() == name)
            .ok_or_else(|| format!("`{name}` is not one of auto, aws-lc-rs, ipsec-mb"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TransportConfig;

    #[test]
    fn names_are_the_same_in_files_and_flags() {
        for choice in [
            CryptoProviderChoice::Auto,
            CryptoProviderChoice::AwsLcRs,
            CryptoProviderChoice::IpsecMb,
        ] {
            assert_eq!(choice.name().parse(), Ok(choice));
            let text = format!("crypto_provider = '{}'", choice.name());
            let config = TransportConfig::from_toml(&text).expect("valid");
            assert_eq!(config.crypto_provider, choice);
        }
        let error = "ring".parse::<CryptoProviderChoice>().expect_err("unknown");
        assert!(error.contains("ipsec-mb"), "{error}");
        assert!(TransportConfig::from_toml("crypto_provider = 'ring'").is_err());
    }
}
