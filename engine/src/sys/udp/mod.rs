//! Kernel UDP sockets: options, message arrays, control messages.
//!
//! [`SendSlots`] and [`ReceiveArray`] own every byte whose address the kernel
//! is given, at fixed addresses; they are the only users of `unsafe` here.

mod buffer;
mod control;
mod receive;
mod send;

pub(crate) use buffer::ReceiveBuffers;
pub(crate) use control::{CONTROL_BYTES, ControlReader};
pub(crate) use receive::{Message, ReceiveArray, socket_addr};
pub(crate) use send::{MessageAddressing, SendSlots};

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SO_RXQ_OVFL` of `asm-generic/socket.h`: the count of drops rides with each message.
pub(crate) const SO_RXQ_OVFL: libc::c_int = 40;

/// Sets an integer socket option.
///
/// # Errors
/// The system call's error.
#[allow(unsafe_code)]
pub(crate) fn set_option(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads an integer socket option.
///
/// # Errors
/// The system call's error.
#[allow(unsafe_code)]
pub(crate) fn option(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both pointers are to locals that outlive the call, `len` is the
    // size of what the first points to.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}
