//! TEMPORARY
use serde::Deserialize;
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatapathChoice {
    #[default]
    Auto,
    AfXdp,
    IoUring,
    Socket,
}
