//! The token of one frame.

use std::fmt;

/// The right to read and write one frame of a [`Umem`](super::Umem), and the duty to bring it back.
///
/// A token exists exactly while userspace holds the frame: handing the frame to
/// the kernel ([`give_to_fill`](super::Umem::give_to_fill), [`give_to_tx`](super::Umem::give_to_tx))
/// consumes it, and it can be neither cloned nor made up, so a frame submitted
/// twice does not compile. A
/// token that is dropped instead is a frame lost; the conservation check
/// ([`assert_conserved`](super::Umem::assert_conserved)) finds that.
#[must_use = "a dropped token is a lost frame"]
pub(crate) struct Frame {
    index: u32,
    umem: u32,
}

impl Frame {
    /// Only the UMEM makes tokens, and only from its ledger.
    pub(super) fn new(index: u32, umem: u32) -> Self {
        Self { index, umem }
    }

    /// Number of the frame within its UMEM.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// The UMEM that it belongs to.
    pub(super) fn umem(&self) -> u32 {
        self.umem
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({} of umem {})", self.index, self.umem)
    }
}
