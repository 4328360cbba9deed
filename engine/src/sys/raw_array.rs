//! Zeroed heap arrays that the kernel reads and writes through raw pointers.
//!
//! A `Box<[T]>` asserts unique access whenever it is moved or borrowed, which is
//! untrue of memory whose address the kernel holds. A [`RawArray`] never hands
//! out a reference to more than one element or one named range, and its address
//! stays the same for its whole life.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;

/// Marks types for which all-zero bytes are a valid value and that need no drop.
///
/// # Safety
/// Both must hold for the implementing type.
pub(crate) unsafe trait Zeroed: Sized {}

// SAFETY: an integer; zero is valid, nothing to drop.
unsafe impl Zeroed for u8 {}
// SAFETY: C structure of integers and nullable pointers.
unsafe impl Zeroed for libc::msghdr {}
// SAFETY: C structure of integers and nullable pointers.
unsafe impl Zeroed for libc::mmsghdr {}
// SAFETY: C structure of an integer and a nullable pointer.
unsafe impl Zeroed for libc::iovec {}
// SAFETY: C structure of integers.
unsafe impl Zeroed for libc::sockaddr_in6 {}

/// A fixed, zeroed, page-aligned allocation of `len` elements.
#[derive(Debug)]
pub(crate) struct RawArray<T: Zeroed> {
    base: NonNull<T>,
    len: usize,
    layout: Layout,
}

// SAFETY: the array owns its allocation; the elements are plain data, and access
// goes through `&self`/`&mut self` like that of any owned collection.
unsafe impl<T: Zeroed> Send for RawArray<T> {}

/// Page size that the kernel wants for shared rings, in bytes.
const ALIGN_BYTES: usize = 4096;

impl<T: Zeroed> RawArray<T> {
    /// Allocates `len` zeroed elements.
    ///
    /// # Panics
    /// If `len` is zero or the size overflows: limits are validated before.
    pub(crate) fn new(len: usize) -> Self {
        assert!(len > 0 && size_of::<T>() > 0, "a RawArray holds something");
        let layout = Layout::array::<T>(len)
            .and_then(|layout| layout.align_to(ALIGN_BYTES))
            .expect("validated limits keep the size in range");
        // SAFETY: the layout's size is not zero, asserted above.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(memory.cast::<T>()) else { handle_alloc_error(layout) };
        Self { base, len, layout }
    }

    /// Number of elements.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Address of element `index`, for the kernel.
    pub(crate) fn pointer(&self, index: usize) -> *mut T {
        assert!(index < self.len, "RawArray index {index} of {}", self.len);
        // SAFETY: inside the allocation, asserted above.
        unsafe { self.base.as_ptr().add(index) }
    }

    /// Element `index`.
    pub(crate) fn at(&self, index: usize) -> &T {
        // SAFETY: in bounds (checked by `pointer`), aligned, initialised to zero;
        // writers other than the kernel need `&mut self`, and callers read only
        // elements that the kernel has finished with.
        unsafe { &*self.pointer(index) }
    }

    /// Element `index`, to change.
    pub(crate) fn at_mut(&mut self, index: usize) -> &mut T {
        // SAFETY: as for `at`; `&mut self` excludes other references.
        unsafe { &mut *self.pointer(index) }
    }

    /// The elements of `range`.
    pub(crate) fn range(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len, "RawArray range {range:?}");
        // SAFETY: inside the allocation, asserted above; initialised; see `at`.
        unsafe {
            std::slice::from_raw_parts(self.base.as_ptr().add(range.start), range.end - range.start)
        }
    }

    /// The elements of `range`, to change.
    pub(crate) fn range_mut(&mut self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "RawArray range {range:?}");
        // SAFETY: as for `range`; `&mut self` excludes other references.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.as_ptr().add(range.start),
                range.end - range.start,
            )
        }
    }
}

impl<T: Zeroed> Drop for RawArray<T> {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, freed once.
        unsafe { dealloc(self.base.as_ptr().cast(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_aligned_and_writable() {
        let mut array = RawArray::<u8>::new(10_000);
        assert_eq!(array.pointer(0) as usize % ALIGN_BYTES, 0);
        assert!(array.range(0..10_000).iter().all(|byte| *byte == 0));
        array.range_mut(9_990..10_000).fill(7);
        *array.at_mut(0) = 3;
        assert_eq!((*array.at(0), *array.at(9_989), *array.at(9_999)), (3, 0, 7));
        assert_eq!(array.len(), 10_000);
    }

    #[test]
    #[should_panic(expected = "RawArray range")]
    fn ranges_are_checked() {
        let _ = RawArray::<u8>::new(4).range(2..5);
    }

    #[test]
    #[should_panic(expected = "RawArray index")]
    fn indices_are_checked() {
        let _ = RawArray::<u8>::new(4).pointer(4);
    }
}
