//! `/sys` of the calling thread's network namespace, as `ip netns exec` mounts it.

use std::ffi::CStr;
use std::io;
use std::ptr;

/// Gives the calling thread (and those that it starts) a mount namespace of its own in
/// which `/sys` shows its network namespace.
///
/// # Panics
/// If the system refuses; it needs root.
pub fn mount_own_sysfs() {
    // SAFETY: plain flags; no memory is passed.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(result, 0, "unshare(CLONE_NEWNS): {}", io::Error::last_os_error());
    // What is mounted here must not show outside.
    mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE);
    mount(Some(c"sysfs"), c"/sys", Some(c"sysfs"), 0);
}

fn mount(source: Option<&CStr>, target: &CStr, kind: Option<&CStr>, flags: libc::c_ulong) {
    let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: every pointer is null where the call allows it, or a C string that outlives the call.
    let result =
        unsafe { libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, ptr::null()) };
    assert_eq!(result, 0, "mount on {target:?}: {}", io::Error::last_os_error());
}
