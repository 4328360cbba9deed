//! Ctrl-C, SIGTERM and SIGHUP become an error that unwinds the command.
//!
//! Nothing exits from a signal handler: the handler stores the signal's number,
//! every wait loop asks [`check`], and the error that it returns runs all drop
//! guards (children, namespaces, temporary files) on its way to `main`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static RECEIVED: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// The signal that ended the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupted {
    signal: usize,
}

impl Interrupted {
    /// The exit code that shells use for a death by this signal.
    pub(crate) fn exit_code(self) -> u8 {
        128u8.saturating_add(u8::try_from(self.signal).unwrap_or(u8::MAX))
    }
}

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match i32::try_from(self.signal) {
            Ok(SIGINT) => "Ctrl-C",
            Ok(SIGTERM) => "SIGTERM",
            Ok(SIGHUP) => "SIGHUP",
            _ => "a signal",
        };
        write!(f, "stopped by {name}")
    }
}

impl std::error::Error for Interrupted {}

/// Starts to listen for the signals. Call once, before the first child is spawned.
pub(crate) fn install() -> Result<()> {
    let received = RECEIVED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        let number = usize::try_from(signal).context("signal number")?;
        signal_hook::flag::register_usize(signal, Arc::clone(received), number)
            .with_context(|| format!("cannot install a handler for signal {signal}"))?;
    }
    Ok(())
}

/// Fails with [`Interrupted`] once a signal has arrived.
pub(crate) fn check() -> Result<()> {
    // Relaxed: the number is the whole message, nothing else is published with it.
    match RECEIVED.get().map_or(0, |received| received.load(Ordering::Relaxed)) {
        0 => Ok(()),
        signal => Err(Interrupted { signal }.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(Interrupted { signal: 2 }.exit_code(), 130);
        assert_eq!(Interrupted { signal: 15 }.exit_code(), 143);
        assert_eq!(Interrupted { signal: 4000 }.exit_code(), 255);
    }
}
