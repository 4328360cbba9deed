//! Intel's ipsec-mb (`libIPSec_MB.so.1`), bound at run time: AES-GCM in one call per packet, in
//! place or out of place, and the AES block of header protection.
//!
//! Only exported functions are called: the implementations themselves, each for one instruction
//! set, chosen here by what the processor has. The manager structure, whose layout changes from
//! version to version, is not touched. The one layout that is relied upon is the size of an expanded
//! key, and [`IpsecMb::load`] proves it before it hands the library out.
//!
//! Invariants: the library is never unloaded; a [`GcmKey`] is written once, at construction, and
//! wiped when dropped; every buffer that a call writes is exclusively borrowed for it.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use zeroize::Zeroize;

/// Bytes of an AEAD tag.
pub(crate) const TAG_BYTES: usize = 16;
/// Bytes of an AEAD nonce.
pub(crate) const NONCE_BYTES: usize = 12;
/// What the loader looks for: the name carries the binary interface's number.
const LIBRARY: &CStr = c"libIPSec_MB.so.1";
/// `IMB_VERSION_NUM` from which on the exported functions have these arguments: 1.0.0.
const VERSION_MIN: c_uint = 0x1_00_00;
/// `struct gcm_key_data`: 15 round keys and 48 powers of the hash key, aligned to 64 bytes.
const GCM_KEY_BYTES: usize = 1024;
/// More than `struct gcm_context_data` has (96 bytes).
const GCM_CONTEXT_BYTES: usize = 256;
/// Round keys of AES-128.
const AES_128_SCHEDULE_BYTES: usize = 176;

/// `struct gcm_key_data`.
#[derive(Clone)]
#[repr(C, align(64))]
struct GcmKeyData([u8; GCM_KEY_BYTES]);

/// `struct gcm_context_data`: scratch of one call.
#[repr(C, align(64))]
struct GcmContext([u8; GCM_CONTEXT_BYTES]);

/// Expands a key: key, expanded key.
type GcmExpand = unsafe extern "C" fn(*const c_void, *mut c_void);
/// Key, context, output, input, bytes, IV, AAD, bytes, tag, bytes.
type GcmCrypt = unsafe extern "C" fn(
    *const GcmKeyData,
    *mut GcmContext,
    *mut u8,
    *const u8,
    u64,
    *const u8,
    *const u8,
    u64,
    *mut u8,
    u64,
);
/// Expands an AES key for encryption: key, round keys.
type AesExpand = unsafe extern "C" fn(*const c_void, *mut c_void);
/// One block in cipher feedback mode: output, input, IV, round keys, bytes.
type AesCfbOne =
    unsafe extern "C" fn(*mut c_void, *const c_void, *const c_void, *const c_void, u64);

/// Why the library is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unavailable {
    /// The loader's words.
    NotFound(String),
    /// The processor lacks what the fast code needs.
    Processor,
    /// Version, and the function that it does not export.
    MissingSymbol(String, String),
    /// Version below 1.0, or keys of another size.
    Version(String),
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(text) => write!(f, "not found ({text})"),
            Self::Processor => {
                write!(f, "this processor has no AVX-512 with VAES and VPCLMULQDQ")
            }
            Self::MissingSymbol(version, symbol) => {
                write!(f, "version {version} does not export {symbol} (1.0 to 1.3 do)")
            }
            Self::Version(version) => {
                write!(f, "version {version} has another binary interface (1.0 to 1.3 are known)")
            }
        }
    }
}

/// The calls of one key length.
#[derive(Clone, Copy)]
struct GcmCalls {
    expand: GcmExpand,
    seal: GcmCrypt,
    open: GcmCrypt,
}

/// The library, loaded and found to have what is needed.
pub(crate) struct IpsecMb {
    version: String,
    aes_128: GcmCalls,
    aes_256: GcmCalls,
    block_expand: AesExpand,
    block: AesCfbOne,
}

impl fmt::Debug for IpsecMb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IpsecMb").field("version", &self.version).finish_non_exhaustive()
    }
}

impl IpsecMb {
    /// Finds the library; the first answer holds for the life of the process.
    ///
    /// # Errors
    /// The library, a function or an instruction set is missing.
    pub(crate) fn load() -> Result<&'static Self, Unavailable> {
        static LOADED: OnceLock<Result<IpsecMb, Unavailable>> = OnceLock::new();
        LOADED.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    /// The version as the library words it.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    fn open() -> Result<Self, Unavailable> {
        if !processor_suffices() {
            return Err(Unavailable::Processor);
        }
        let library = Library::open(LIBRARY).map_err(Unavailable::NotFound)?;
        let unknown = || "unknown".to_owned();
        let version_symbol = |name| library.symbol(name).map_err(|name| (unknown(), name));
        let missing = |(version, name)| Unavailable::MissingSymbol(version, name);
        let number = version_symbol(c"imb_get_version").map_err(missing)?;
        let text = version_symbol(c"imb_get_version_str").map_err(missing)?;
        // SAFETY: the header declares `unsigned imb_get_version(void)`.
        let number: unsafe extern "C" fn() -> c_uint = unsafe { std::mem::transmute(number) };
        // SAFETY: the header declares `const char *imb_get_version_str(void)`.
        let text: unsafe extern "C" fn() -> *const c_char = unsafe { std::mem::transmute(text) };
        // SAFETY: both only read constants; the text is a terminated string that lives as long as
        // the library, which is never unloaded.
        let (number, version) =
            unsafe { (number(), CStr::from_ptr(text()).to_string_lossy().into_owned()) };
        if number < VERSION_MIN {
            return Err(Unavailable::Version(version));
        }
        let find = |name: &CStr| {
            library.symbol(name).map_err(|name| Unavailable::MissingSymbol(version.clone(), name))
        };
        // SAFETY: the headers of versions 1.0 to 1.3 declare these functions with these types;
        // they are what `init_mb_mgr_avx512` installs on a processor like this one.
        let this = unsafe {
            Self {
                aes_128: GcmCalls {
                    expand: as_expand(find(c"aes_gcm_pre_128_vaes_avx512")?),
                    seal: as_crypt(find(c"aes_gcm_enc_128_vaes_avx512")?),
                    open: as_crypt(find(c"aes_gcm_dec_128_vaes_avx512")?),
                },
                aes_256: GcmCalls {
                    expand: as_expand(find(c"aes_gcm_pre_256_vaes_avx512")?),
                    seal: as_crypt(find(c"aes_gcm_enc_256_vaes_avx512")?),
                    open: as_crypt(find(c"aes_gcm_dec_256_vaes_avx512")?),
                },
                block_expand: as_expand(find(c"aes_keyexp_128_enc_avx512")?),
                block: std::mem::transmute::<*mut c_void, AesCfbOne>(find(
                    c"aes_cfb_128_one_avx512",
                )?),
                version: version.clone(),
            }
        };
        if this.aes_128.keys_fit(16) && this.aes_256.keys_fit(32) {
            Ok(this)
        } else {
            Err(Unavailable::Version(version))
        }
    }
}

/// # Safety
/// `symbol` is a function with two pointers as arguments that returns nothing.
unsafe fn as_expand(symbol: *mut c_void) -> GcmExpand {
    // SAFETY: the caller's promise.
    unsafe { std::mem::transmute::<*mut c_void, GcmExpand>(symbol) }
}

/// # Safety
/// `symbol` is one of the library's functions that encrypt or decrypt with AES-GCM in one call.
unsafe fn as_crypt(symbol: *mut c_void) -> GcmCrypt {
    // SAFETY: the caller's promise.
    unsafe { std::mem::transmute::<*mut c_void, GcmCrypt>(symbol) }
}

impl GcmCalls {
    /// Whether an expanded key stays within [`GCM_KEY_BYTES`]: expanded into four times the room,
    /// the rest is untouched.
    fn keys_fit(&self, key_bytes: usize) -> bool {
        #[repr(C, align(64))]
        struct Room([u8; 4 * GCM_KEY_BYTES]);
        let key = [0x5a; 32];
        [0x00, 0xff].into_iter().all(|fill| {
            let mut room = Room([fill; 4 * GCM_KEY_BYTES]);
            debug_assert!(key_bytes <= key.len());
            // SAFETY: the key has `key_bytes` bytes, the room more than an expanded key of any version.
            unsafe { (self.expand)(key.as_ptr().cast(), room.0.as_mut_ptr().cast()) };
            room.0[GCM_KEY_BYTES..].iter().all(|byte| *byte == fill)
        })
    }
}

#[cfg(target_arch = "x86_64")]
fn processor_suffices() -> bool {
    // What the library asks of a processor before it installs these functions.
    is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512ifma")
        && is_x86_feature_detected!("gfni")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
}

#[cfg(not(target_arch = "x86_64"))]
fn processor_suffices() -> bool {
    false
}

/// A shared library that stays loaded.
struct Library(*mut c_void);

impl Library {
    fn open(name: &CStr) -> Result<Self, String> {
        // SAFETY: the name is a terminated string; the library's initialisers only look at the
        // processor.
        let handle =
            unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL as c_int) };
        if !handle.is_null() {
            return Ok(Self(handle));
        }
        // SAFETY: after a failure dlerror answers with a terminated string of this thread, or null.
        let text = unsafe { libc::dlerror() };
        if text.is_null() {
            return Err(format!("dlopen of {} failed", name.to_string_lossy()));
        }
        // SAFETY: not null, terminated, and copied before any other call of the loader.
        Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }

    /// The function's address, or its name if the library does not export it.
    fn symbol(&self, name: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: the handle is of a loaded library, the name a terminated string.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if address.is_null() {
            return Err(CString::from(name).to_string_lossy().into_owned());
        }
        Ok(address)
    }
}

/// An AES-GCM key of 16 or 32 bytes, expanded.
pub(crate) struct GcmKey {
    data: GcmKeyData,
    seal: GcmCrypt,
    open: GcmCrypt,
}

impl GcmKey {
    /// Expands `key`.
    ///
    /// # Panics
    /// The key has neither 16 nor 32 bytes.
    pub(crate) fn new(library: &'static IpsecMb, key: &[u8]) -> Self {
        let calls = match key.len() {
            16 => library.aes_128,
            32 => library.aes_256,
            bytes => panic!("AES-128-GCM and AES-256-GCM have no keys of {bytes} bytes"),
        };
        let mut this =
            Self { data: GcmKeyData([0; GCM_KEY_BYTES]), seal: calls.seal, open: calls.open };
        // SAFETY: the key has as many bytes as the function reads, and an expanded key fits
        // (`keys_fit` proved it before the library was handed out).
        unsafe { (calls.expand)(key.as_ptr().cast(), this.data.0.as_mut_ptr().cast()) };
        this
    }

    /// Encrypts `data` where it is; the tag covers `aad` and the ciphertext.
    #[inline]
    pub(crate) fn seal_in_place(
        &self,
        nonce: &[u8; NONCE_BYTES],
        aad: &[u8],
        data: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        let at = data.as_mut_ptr();
        // SAFETY: input and output are the same exclusively borrowed bytes, which the library
        // allows.
        unsafe { self.call(self.seal, nonce, aad, at, at, data.len()) }
    }

    /// Encrypts `plain` into `sealed`.
    ///
    /// # Panics
    /// The two differ in length.
    #[inline]
    pub(crate) fn seal(
        &self,
        nonce: &[u8; NONCE_BYTES],
        aad: &[u8],
        plain: &[u8],
        sealed: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        assert_eq!(plain.len(), sealed.len(), "a ciphertext is as long as its plaintext");
        // SAFETY: both have that many bytes, and an exclusive borrow overlaps with no other.
        unsafe {
            self.call(self.seal, nonce, aad, sealed.as_mut_ptr(), plain.as_ptr(), plain.len())
        }
    }

    /// Decrypts `data` where it is and answers with the tag that it should have had. The caller
    /// compares, and wipes `data` if they differ.
    #[inline]
    pub(crate) fn open_in_place(
        &self,
        nonce: &[u8; NONCE_BYTES],
        aad: &[u8],
        data: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        let at = data.as_mut_ptr();
        // SAFETY: as in `seal_in_place`.
        unsafe { self.call(self.open, nonce, aad, at, at, data.len()) }
    }

    /// # Safety
    /// `output` can be written and `input` read for `bytes` bytes; they are the same or disjoint.
    #[inline]
    unsafe fn call(
        &self,
        function: GcmCrypt,
        nonce: &[u8; NONCE_BYTES],
        aad: &[u8],
        output: *mut u8,
        input: *const u8,
        bytes: usize,
    ) -> [u8; TAG_BYTES] {
        // Four bytes more than the nonce: an implementation may load a whole block.
        let mut iv = [0; 16];
        iv[..NONCE_BYTES].copy_from_slice(nonce);
        let mut context = MaybeUninit::<GcmContext>::uninit();
        let mut tag = [0; TAG_BYTES];
        // SAFETY: the caller's promise for output and input; the key was expanded by the same
        // instruction set's function; the context has room and is initialised by the call; IV, AAD
        // and tag have the lengths that are passed.
        unsafe {
            function(
                &raw const self.data,
                context.as_mut_ptr(),
                output,
                input,
                bytes as u64,
                iv.as_ptr(),
                aad.as_ptr(),
                aad.len() as u64,
                tag.as_mut_ptr(),
                TAG_BYTES as u64,
            );
        }
        tag
    }
}

impl Drop for GcmKey {
    fn drop(&mut self) {
        self.data.0.zeroize();
    }
}

/// An AES-128 key for single blocks, expanded.
pub(crate) struct BlockKey {
    schedule: BlockSchedule,
    block: AesCfbOne,
}

/// Round keys, aligned as the library's own.
#[repr(C, align(16))]
struct BlockSchedule([u8; AES_128_SCHEDULE_BYTES]);

impl BlockKey {
    /// Expands `key`.
    pub(crate) fn new(library: &'static IpsecMb, key: &[u8; 16]) -> Self {
        let mut schedule = BlockSchedule([0; AES_128_SCHEDULE_BYTES]);
        // SAFETY: AES-128 has 16 bytes of key and 11 round keys of 16 bytes.
        unsafe { (library.block_expand)(key.as_ptr().cast(), schedule.0.as_mut_ptr().cast()) };
        Self { schedule, block: library.block }
    }

    /// The block encrypted: cipher feedback of zeroes, with the block as its IV.
    #[inline]
    pub(crate) fn encrypt(&self, block: &[u8; 16]) -> [u8; 16] {
        let zeroes = [0u8; 16];
        let mut encrypted = [0u8; 16];
        // SAFETY: output, input and IV have 16 bytes, the schedule was expanded for this function.
        unsafe {
            (self.block)(
                encrypted.as_mut_ptr().cast(),
                zeroes.as_ptr().cast(),
                block.as_ptr().cast(),
                self.schedule.0.as_ptr().cast(),
                16,
            );
        }
        encrypted
    }
}

impl Drop for BlockKey {
    fn drop(&mut self) {
        self.schedule.0.zeroize();
    }
}

#[cfg(test)]
#[path = "ipsec_mb_tests.rs"]
mod tests;
