//! TEMPORARY until the doctor lands
use serde::Deserialize;
/// Datapath.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatapathChoice { #[default] Auto, AfXdp, IoUring, Socket }
impl std::fmt::Display for DatapathChoice { fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(match self { Self::Auto => "auto", Self::AfXdp => "af_xdp", Self::IoUring => "io_uring", Self::Socket => "socket" }) } }
impl std::str::FromStr for DatapathChoice { type Err = String; fn from_str(s: &str) -> Result<Self, String> { [Self::Auto, Self::AfXdp, Self::IoUring, Self::Socket].into_iter().find(|c| c.to_string() == s).ok_or_else(|| format!("`{s}` is not one of auto, af_xdp, io_uring, socket")) } }
