//! Memory safety of the calls: nothing outside of the given ranges is read or written.
//!
//! What the calls compute is tested in [`crate::proto::crypto`].

use std::io::Write as _;

use rustix::mm::{MprotectFlags, mprotect};

use super::super::mmap::Mmap;
use super::*;

const PAGE_BYTES: usize = 4096;

/// The library, or `None` after saying so where the test harness cannot hide it.
fn library() -> Option<&'static IpsecMb> {
    match IpsecMb::load() {
        Ok(library) => Some(library),
        Err(reason) => {
            writeln!(
                std::io::stderr(),
                "NOT TESTED, ipsec-mb cannot be used here: {reason}; `apt install libipsec-mb1`"
            )
            .expect("stderr");
            None
        }
    }
}

/// Memory that ends, and begins, where touching one byte more ends the process.
struct Guarded(Mmap);

impl Guarded {
    fn new() -> Self {
        let map = Mmap::anonymous(6 * PAGE_BYTES).expect("memory");
        for page in [0, 5] {
            // SAFETY: the page is within the mapping, and no reference to it exists.
            unsafe {
                mprotect(
                    map.start().as_ptr().add(page * PAGE_BYTES).cast(),
                    PAGE_BYTES,
                    MprotectFlags::empty(),
                )
            }
            .expect("mprotect");
        }
        Self(map)
    }

    /// The last `bytes` before the guard, or the first behind the other one.
    fn slice(&mut self, bytes: usize, at_end: bool) -> &mut [u8] {
        let offset = if at_end { 5 * PAGE_BYTES - bytes } else { PAGE_BYTES };
        // SAFETY: the range is mapped, between the guards, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.0.start().as_ptr().add(offset), bytes) }
    }
}

#[test]
fn nothing_beyond_the_buffers_is_touched() {
    let Some(library) = library() else { return };
    let (mut data, mut target, mut aad) = (Guarded::new(), Guarded::new(), Guarded::new());
    for key in [&[1u8; 16][..], &[2; 32]] {
        let key = GcmKey::new(library, key);
        for at_end in [true, false] {
            for bytes in (0..=300).chain([1412, 4095, 4096, 9000, 4 * PAGE_BYTES]) {
                let aad = aad.slice(bytes % 67, at_end);
                let plain = data.slice(bytes, at_end);
                plain.fill(0x33);
                let sealed = target.slice(bytes, at_end);
                let tag = key.seal(&[9; 12], aad, plain, sealed);
                assert_eq!(key.seal_in_place(&[9; 12], aad, plain), tag, "{bytes}");
                assert_eq!(plain, sealed, "{bytes}");
                assert_eq!(key.open_in_place(&[9; 12], aad, plain), tag, "{bytes}");
                assert!(plain.iter().all(|byte| *byte == 0x33), "{bytes}");
            }
        }
    }
}

#[test]
fn a_missing_library_or_function_is_named() {
    let error = Library::open(c"libno-such-library-anywhere.so").err().expect("missing");
    assert!(error.contains("libno-such-library-anywhere.so"), "{error}");
    let libc = Library::open(c"libc.so.6").expect("every process has it");
    assert_eq!(
        libc.symbol(c"no_such_function_anywhere").expect_err("missing"),
        "no_such_function_anywhere"
    );
    let text = Unavailable::MissingSymbol("1.5.0".into(), "aes_gcm_pre_128".into()).to_string();
    assert!(text.contains("1.5.0") && text.contains("aes_gcm_pre_128"), "{text}");
}

#[test]
#[should_panic(expected = "keys of 24 bytes")]
fn other_key_lengths_are_refused() {
    match library() {
        Some(library) => drop(GcmKey::new(library, &[0; 24])),
        None => panic!("not tested, in place of: keys of 24 bytes"),
    }
}
