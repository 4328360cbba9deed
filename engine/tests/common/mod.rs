//! Shared by the integration tests; each test binary uses its own part of it.
#![allow(dead_code, unreachable_pub)]

pub mod netns;
pub mod transfer;
