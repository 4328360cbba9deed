//! x
/// x
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Unavailable {
    /// x
    pub reason: String,
}
