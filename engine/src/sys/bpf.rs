//! XDP links: the three commands of bpf(2) that aya does not give as they are
//! (Linux `Documentation/bpf`, `enum bpf_cmd`; Linux ≥ 5.9).
//!
//! aya attaches by netlink where the kernel refuses a link, and such an
//! attachment outlives a killed process; and it detaches by closing the link,
//! which does nothing while a child between fork and exec still has a copy.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_DETACH: libc::c_int = 34;
/// `enum bpf_attach_type`.
const BPF_XDP: u32 = 37;

/// In which hook the program runs: flags of `IFLA_XDP`, which links share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum XdpHook {
    /// `XDP_FLAGS_SKB_MODE`.
    Skb = 1 << 1,
    /// `XDP_FLAGS_DRV_MODE`.
    Driver = 1 << 2,
}

/// `union bpf_attr` as `BPF_LINK_CREATE` reads it; the rest is zero to the kernel.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// `union bpf_attr` as `BPF_LINK_DETACH` reads it.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// Attaches an XDP program to an interface of the calling thread's network
/// namespace by an unpinned link, which is detached when its last descriptor is
/// closed. The descriptor is close-on-exec.
pub(crate) fn create_xdp_link(
    program: BorrowedFd<'_>,
    ifindex: u32,
    hook: XdpHook,
) -> io::Result<OwnedFd> {
    let attr = LinkCreate {
        prog_fd: attr_fd(program),
        target_ifindex: ifindex,
        attach_type: BPF_XDP,
        flags: hook as u32,
    };
    // SAFETY: LinkCreate is the beginning of union bpf_attr for this command.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &attr) }?;
    // SAFETY: on success the call returns a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Detaches a link from its interface at once, whoever else has a descriptor of it.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let attr = LinkDetach { link_fd: attr_fd(link) };
    // SAFETY: LinkDetach is the beginning of union bpf_attr for this command.
    unsafe { bpf(BPF_LINK_DETACH, &attr) }.map(drop)
}

/// `union bpf_attr` as `BPF_OBJ_GET_INFO_BY_FD` reads it.
#[repr(C)]
struct GetInfo {
    fd: u32,
    info_bytes: u32,
    info_address: u64,
}

/// The beginning of `struct bpf_link_info` for an XDP link.
#[repr(C, align(8))]
#[derive(Default)]
struct XdpLinkInfo {
    kind: u32,
    id: u32,
    program_id: u32,
    _padding: u32,
    ifindex: u32,
    _padding_end: u32,
}

/// The interface that an XDP link is attached to; `None` once it was detached,
/// by whomever, or the interface is gone.
pub(crate) fn xdp_link_ifindex(link: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let mut info = XdpLinkInfo::default();
    let attr = GetInfo {
        fd: attr_fd(link),
        info_bytes: size_of::<XdpLinkInfo>() as u32,
        info_address: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: GetInfo is the beginning of union bpf_attr for this command; the address is that of
    // `info_bytes` writable bytes, which outlive the call, and any bits are a valid XdpLinkInfo.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &attr) }?;
    Ok(Some(info.ifindex).filter(|&ifindex| ifindex != 0))
}

fn attr_fd(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).expect("a valid descriptor is not negative")
}

/// # Safety
/// `T` must be the beginning of `union bpf_attr` as `command` reads it: plain
/// integers without padding, in which every address is valid for the command.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_int> {
    // SAFETY: the pointer and the size describe `attr`, which outlives the call;
    // the kernel takes what lies beyond the size for zero. The rest is the caller's.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::try_from(result).expect("bpf returns an int"))
}
