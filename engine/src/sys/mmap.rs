//! Memory mappings: anonymous ones for packet memory, and a descriptor's for the rings.
//!
//! A [`Mmap`] owns its range and unmaps it when dropped. It hands out the
//! address only: who may read or write what, and when, is decided by the ring
//! cursors ([`super::cursor`]) and the frame ledger ([`crate::umem`]).

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// An owned, readable and writable mapping.
#[derive(Debug)]
pub(crate) struct Mmap {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; the type itself never dereferences it.
unsafe impl Send for Mmap {}
// SAFETY: as above: shared access to a `Mmap` yields only its address and length.
unsafe impl Sync for Mmap {}

impl Mmap {
    /// Private zeroed memory of `len` bytes, backed by pages at once so that no fault happens later.
    pub(crate) fn anonymous(len: usize) -> io::Result<Self> {
        // SAFETY: a null hint lets the kernel choose an unused range.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }?;
        Ok(Self::own(start, len))
    }

    /// `len` bytes of the object behind `fd`, from `offset_bytes`, shared with the kernel.
    pub(crate) fn of_descriptor(
        fd: BorrowedFd<'_>,
        len: usize,
        offset_bytes: u64,
    ) -> io::Result<Self> {
        // SAFETY: a null hint lets the kernel choose an unused range.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                fd,
                offset_bytes,
            )
        }?;
        Ok(Self::own(start, len))
    }

    /// First byte of the range.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn own(start: *mut c_void, len: usize) -> Self {
        Self { start: NonNull::new(start.cast()).expect("mmap never answers with null"), len }
    }
}

impl Drop for Mmap {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by us with this length, and its owner is going away.
        let result = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap of an owned range failed: {result:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anonymous_memory_is_zeroed_and_aligned() {
        let map = Mmap::anonymous(8192).expect("8 kB of memory");
        assert_eq!(map.len(), 8192);
        assert_eq!(map.start().as_ptr() as usize % 4096, 0);
        // SAFETY: the range is mapped, initialised by the kernel, and nobody writes to it.
        let bytes = unsafe { std::slice::from_raw_parts(map.start().as_ptr(), map.len()) };
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_empty_mapping_is_refused() {
        assert_eq!(
            Mmap::anonymous(0).expect_err("nothing to map").raw_os_error(),
            Some(libc::EINVAL)
        );
    }
}
