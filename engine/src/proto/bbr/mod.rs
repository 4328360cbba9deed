use quinn_proto::congestion::*;
use std::sync::Arc;
pub struct BbrConfig;
impl BbrConfig {
    pub fn bbr2(_: u64) -> CubicConfig {
        CubicConfig::default()
    }
    pub fn bbr3(_: u64) -> CubicConfig {
        CubicConfig::default()
    }
}
