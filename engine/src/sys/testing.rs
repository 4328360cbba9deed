//! Kernel calls that only the tests with root need: faults that a machine or container brings.
//!
//! Compiled with the feature `privileged-tests` alone and no part of the public interface; here
//! because `unsafe` stays in this directory. Every call changes the calling thread for good, or
//! nothing but what it names; each returns the error of its system call.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// Makes `io_uring_setup` fail with `errno` in the calling thread, for good; threads that it
/// starts inherit that. Containers forbid system calls in this way (seccomp).
///
/// # Errors
/// `prctl` refuses.
pub fn forbid_io_uring(errno: u32) -> io::Result<()> {
    let statement =
        |code: u32, value: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k: value };
    let mut filter = [
        // The system call's number is the first word of struct seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: libc::SYS_io_uring_setup as u32,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: plain flags; no memory is passed.
    checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // SAFETY: `program` points to `filter`, and both outlive the call, which copies them.
    let result =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    checked(result.into())
}

/// Gives the calling thread (and those that it starts) a mount namespace of its own in which
/// `/sys` shows its network namespace, as `ip netns exec` does.
///
/// # Errors
/// `unshare` or `mount` refuse: they need root.
pub fn mount_own_sysfs() -> io::Result<()> {
    // SAFETY: plain flags; no memory is passed.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into())?;
    // What is mounted here must not show outside.
    mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE)?;
    mount(Some(c"sysfs"), c"/sys", Some(c"sysfs"), 0)
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: every pointer is null where the call allows it, or a C string that outlives the call.
    let result =
        unsafe { libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, ptr::null()) };
    checked(result.into())
}

/// Detaches a BPF link from its interface while its owner still holds it, as `bpftool link
/// detach` does: what a driver does that drops its XDP programs.
///
/// # Errors
/// The descriptor is no link, or the kernel is older than 5.9.
pub fn detach_bpf_link(link: RawFd) -> io::Result<()> {
    const BPF_LINK_DETACH: libc::c_int = 34;
    let attr = link as u32;
    let size = size_of_val(&attr);
    // SAFETY: union bpf_attr begins with the link's descriptor for this command; `size` bytes are
    // read, and a descriptor that is no link is refused.
    checked(unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const attr, size) })
}

/// A socket that writes whole Ethernet frames onto one interface (packet(7)).
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    ifindex: u32,
}

impl PacketSocket {
    /// Opens it in the calling thread's network namespace; it receives nothing.
    ///
    /// # Errors
    /// `socket` refuses: it needs `CAP_NET_RAW`.
    pub fn open(ifindex: u32) -> io::Result<Self> {
        // SAFETY: plain numbers; no memory is passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        checked(fd.into())?;
        // SAFETY: the call succeeded, so the descriptor is new and nobody else's.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, ifindex })
    }

    /// Writes one frame, its Ethernet header included.
    ///
    /// # Errors
    /// Of `sendto`: `EMSGSIZE` beyond the link's MTU, `ENOBUFS` where its queue is full.
    ///
    /// # Panics
    /// On a frame without a destination.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let mut address = [0; 8];
        address[..6].copy_from_slice(&frame[..6]);
        let to = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: 0,
            sll_ifindex: self.ifindex as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: address,
        };
        // SAFETY: both pointers are valid for the lengths given, for the call.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as libc::socklen_t,
            )
        };
        checked(sent as libc::c_long)
    }
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
