//! On which NUMA node the calling thread's new memory lies: set_mempolicy(2), Linux 2.6.7.

use std::io;

const MPOL_DEFAULT: libc::c_int = 0;
const MPOL_PREFERRED: libc::c_int = 1;
/// Bits of a node mask: more nodes than any kernel is built for (CONFIG_NODES_SHIFT ≤ 10).
const NODES_MAX: usize = 1024;

/// While it lives, memory that this thread touches first is taken from one node, if it has any left.
#[derive(Debug)]
pub(crate) struct PreferredNode {
    /// The policy is the thread's: this must not go to another one.
    _not_send: std::marker::PhantomData<*mut ()>,
}

impl PreferredNode {
    /// Prefers `node` until dropped; one that does not exist leaves memory where the thread runs.
    ///
    /// # Errors
    /// EINVAL: a number that no kernel has. EPERM or ENOSYS: a sandbox forbids it, or the kernel has no NUMA.
    pub(crate) fn set(node: usize) -> io::Result<Self> {
        if node >= NODES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut mask = [0u64; NODES_MAX / 64];
        mask[node / 64] |= 1 << (node % 64);
        // SAFETY: the mask is `NODES_MAX` bits long and outlives the call; the kernel reads it only,
        // and one bit less than it is told (set_mempolicy(2), "Bugs").
        unsafe { set_mempolicy(MPOL_PREFERRED, mask.as_ptr(), NODES_MAX + 1) }?;
        Ok(Self { _not_send: std::marker::PhantomData })
    }
}

impl Drop for PreferredNode {
    fn drop(&mut self) {
        // SAFETY: the default policy takes no mask.
        let reset = unsafe { set_mempolicy(MPOL_DEFAULT, std::ptr::null(), 0) };
        debug_assert!(reset.is_ok(), "the default policy is always allowed: {reset:?}");
    }
}

/// # Safety
/// `mask` is null, or points to `nodes - 1` readable bits.
unsafe fn set_mempolicy(mode: libc::c_int, mask: *const u64, nodes: usize) -> io::Result<()> {
    // SAFETY: the caller vouches for the mask; the kernel keeps no pointer to it.
    match unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, nodes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> String {
        // A mapping without a policy of its own shows the thread's: "7f.. default ..".
        std::fs::read_to_string("/proc/thread-self/numa_maps").unwrap_or_default()
    }

    #[test]
    fn a_node_is_preferred_until_dropped() {
        let before = policy();
        match PreferredNode::set(0) {
            Ok(preferred) => {
                if !before.is_empty() {
                    assert!(policy().contains("prefer:0"), "{}", policy());
                }
                drop(preferred);
                assert!(!policy().contains("prefer:0"));
            }
            // A sandbox or a kernel without NUMA: said by the error, and nothing has changed.
            Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS))),
        }
        let error = PreferredNode::set(NODES_MAX).expect_err("beyond the mask");
        assert!(error.raw_os_error().is_some());
    }
}
