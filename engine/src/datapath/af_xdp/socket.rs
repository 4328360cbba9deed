//! One AF_XDP socket: packet memory, rings and the binding to a device queue.
//!
//! What is asked of the kernel is always explicit: `XDP_ZEROCOPY` or `XDP_COPY`,
//! never the default flags, under which a driver without zero-copy silently
//! copies. What was got is read back (`XDP_OPTIONS`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use super::error::{AfXdpError, advice};
use super::limits::AfXdpLimits;
use super::rings::Rings;
use crate::sys::xsk::{BindOptions, RingSizes, Statistics, TxMetadata, Xsk};
use crate::umem::Umem;

/// Pause between attempts to bind a busy queue.
const BIND_RETRY_PAUSE: Duration = Duration::from_millis(10);

/// What to do about zero-copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZeroCopy {
    /// The device reads and writes our frames itself, or opening fails.
    Require,
    /// Zero-copy where the driver has it, copy mode otherwise; which one, is logged and reported.
    #[default]
    Prefer,
    /// Copy mode, even where the driver could do better.
    Never,
}

/// What to bind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Binding<'a> {
    pub(super) interface: &'a str,
    pub(super) ifindex: u32,
    pub(super) queue: u32,
    pub(super) mtu_bytes: u32,
    pub(super) zero_copy: ZeroCopy,
    pub(super) limits: &'a AfXdpLimits,
}

/// A bound socket.
#[derive(Debug)]
pub(super) struct XskSocket {
    pub(super) xsk: Xsk,
    pub(super) rings: Rings,
    pub(super) umem: Umem,
    /// Whether the device works on our frames directly.
    pub(super) zero_copy: bool,
    /// Whether packets may span several frames.
    pub(super) multi_buffer: bool,
    /// Whether sent packets may carry a checksum request (TX metadata).
    pub(super) tx_metadata: bool,
}

impl XskSocket {
    /// Opens a socket, gives it its frames, and binds it.
    pub(super) fn bind(binding: &Binding<'_>) -> Result<Self, AfXdpError> {
        let limits = binding.limits;
        let (mut xsk, mut umem, tx_metadata) = open_with_memory(binding)?;
        let mapped = xsk
            .map_rings(&RingSizes {
                fill: limits.fill_ring_entries,
                completion: limits.completion_ring_entries,
                rx: limits.rx_ring_entries,
                tx: limits.tx_ring_entries,
            })
            .map_err(|source| failed(binding, "setsockopt/mmap of the four rings", source))?;
        let mut rings = Rings::new(mapped);
        for _ in 0..limits.rx_frames {
            let frame = umem.take().expect("rx_frames of rx_frames + tx_frames are free");
            rings.push_fill(&mut umem, frame);
        }
        rings.commit_fill();
        let options = bind_as_wanted(&xsk, binding)?;
        let zero_copy = xsk
            .is_zero_copy()
            .map_err(|source| failed(binding, "getsockopt(XDP_OPTIONS)", source))?;
        assert_eq!(zero_copy, options.zero_copy, "the kernel keeps to explicit bind flags");
        if !zero_copy && let Err(error) = xsk.set_tx_budget(limits.tx_budget_frames) {
            tracing::debug!(interface = binding.interface, queue = binding.queue, %error,
                "XDP_MAX_TX_SKB_BUDGET is not available (Linux 6.17): 32 frames a kick");
        }
        let multi_buffer = options.multi_buffer;
        Ok(Self { xsk, rings, umem, zero_copy, multi_buffer, tx_metadata })
    }

    /// What the kernel counted on this socket.
    pub(super) fn statistics(&self) -> io::Result<Statistics> {
        self.xsk.statistics()
    }
}

impl AsFd for XskSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.xsk.as_fd()
    }
}

/// Opens the socket and registers its packet memory, with TX metadata if the kernel knows it.
fn open_with_memory(binding: &Binding<'_>) -> Result<(Xsk, Umem, bool), AfXdpError> {
    let limits = binding.limits;
    let xsk = Xsk::open().map_err(|source| failed(binding, "socket(AF_XDP)", source))?;
    let umem = Umem::new(limits.frame_size_bytes, limits.frames())
        .map_err(|source| failed(binding, "mmap of the packet memory", source))?;
    match umem.register(&xsk, TxMetadata::LEN as u32) {
        Ok(()) => return Ok((xsk, umem, true)),
        // Before Linux 6.8 the flag, or the length, is unknown.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        Err(source) => return Err(failed(binding, "setsockopt(XDP_UMEM_REG)", source)),
    }
    umem.register(&xsk, 0).map_err(|source| failed(binding, "setsockopt(XDP_UMEM_REG)", source))?;
    Ok((xsk, umem, false))
}

/// Tries the ways of binding that the policy allows, best first.
fn bind_as_wanted(xsk: &Xsk, binding: &Binding<'_>) -> Result<BindOptions, AfXdpError> {
    let multi_buffer = needs_multi_buffer(binding.mtu_bytes, binding.limits);
    if binding.zero_copy != ZeroCopy::Never {
        let options = BindOptions { zero_copy: true, multi_buffer };
        match bind_with_retries(xsk, binding, options) {
            Ok(()) => return Ok(options),
            Err(source) if is_refusal(&source) => match binding.zero_copy {
                ZeroCopy::Require => {
                    return Err(AfXdpError::NoZeroCopy {
                        interface: binding.interface.into(),
                        queue: binding.queue,
                        source,
                    });
                }
                ZeroCopy::Prefer | ZeroCopy::Never => {
                    tracing::info!(interface = binding.interface, queue = binding.queue,
                        error = %source, "no zero-copy: using copy mode");
                }
            },
            Err(source) => return Err(bind_failed(binding, source)),
        }
    }
    let options = BindOptions { zero_copy: false, multi_buffer };
    match bind_with_retries(xsk, binding, options) {
        Ok(()) => Ok(options),
        Err(source) if multi_buffer && is_refusal(&source) => Err(AfXdpError::MtuTooLarge {
            interface: binding.interface.into(),
            mtu: binding.mtu_bytes,
            frame_size_bytes: binding.limits.frame_size_bytes,
            mtu_max: binding.limits.rx_room_bytes() - ETHERNET_HEADER_BYTES,
            source,
        }),
        Err(source) => Err(bind_failed(binding, source)),
    }
}

/// Ethernet header without VLAN tag.
const ETHERNET_HEADER_BYTES: u32 = 14;

/// Whether packets of that MTU may need more than one frame, in either direction.
fn needs_multi_buffer(mtu_bytes: u32, limits: &AfXdpLimits) -> bool {
    // The receive side loses more of a frame to headroom than the send side to metadata.
    mtu_bytes + ETHERNET_HEADER_BYTES > limits.rx_room_bytes()
}

/// The kernel frees the queue of a closed socket asynchronously: a busy queue may
/// be free in a moment.
fn bind_with_retries(xsk: &Xsk, binding: &Binding<'_>, options: BindOptions) -> io::Result<()> {
    let mut retries_left = binding.limits.bind_retries;
    loop {
        match xsk.bind(binding.ifindex, binding.queue, options) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && retries_left > 0 => {
                retries_left -= 1;
                thread::sleep(BIND_RETRY_PAUSE);
            }
            result => return result,
        }
    }
}

/// Whether the kernel or driver refused the mode, as opposed to the request.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL))
}

fn bind_failed(binding: &Binding<'_>, source: io::Error) -> AfXdpError {
    match source.raw_os_error() {
        Some(libc::EBUSY) => {
            AfXdpError::QueueInUse { interface: binding.interface.into(), queue: binding.queue }
        }
        _ => failed(binding, "bind(AF_XDP)", source),
    }
}

fn failed(binding: &Binding<'_>, call: &'static str, source: io::Error) -> AfXdpError {
    let advice = advice(&source, binding.interface, binding.mtu_bytes, binding.limits.frames());
    AfXdpError::Socket {
        call,
        interface: binding.interface.into(),
        queue: binding.queue,
        source,
        advice,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_frames_are_used_only_when_one_is_too_small() {
        let limits = AfXdpLimits::default();
        assert!(!needs_multi_buffer(1500, &limits));
        assert!(!needs_multi_buffer(3506, &limits));
        assert!(!needs_multi_buffer(3826, &limits), "4096 − 256 − 14");
        assert!(needs_multi_buffer(3827, &limits));
        let small = AfXdpLimits { frame_size_bytes: 2048, ..AfXdpLimits::default() };
        assert!(!needs_multi_buffer(1500, &small));
        assert!(needs_multi_buffer(1779, &small));
    }

    #[test]
    fn only_refusals_of_the_mode_lead_to_another_mode() {
        let error = io::Error::from_raw_os_error;
        assert!(is_refusal(&error(libc::EOPNOTSUPP)));
        assert!(!is_refusal(&error(libc::EBUSY)));
        assert!(!is_refusal(&error(libc::EPERM)));
        assert!(!is_refusal(&error(libc::ENODEV)));
    }
}
