//! `recvmmsg(2)` into a fixed array of buffers, each large enough for one GRO batch.
#![allow(unsafe_code)]

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use bytes::BytesMut;

use super::buffer::ReceiveBuffers;
use super::control::CONTROL_BYTES;
use crate::sys::raw_array::RawArray;

/// One received message, which may hold several datagrams (GRO).
#[derive(Debug)]
pub(crate) struct Message<'a> {
    /// Sender; `None` if the kernel gave anything but an IPv6 address.
    pub(crate) remote: Option<SocketAddrV6>,
    /// Control messages, for a [`ControlReader`](super::ControlReader).
    pub(crate) control: &'a [u8],
    /// UDP payload.
    pub(crate) payload: &'a [u8],
    /// Payload or control messages did not fit their buffer.
    pub(crate) truncated: bool,
}

/// Turns the kernel's address into ours; flow labels are not part of a path's identity.
pub(crate) fn socket_addr(name: &libc::sockaddr_in6) -> Option<SocketAddrV6> {
    (i32::from(name.sin6_family) == libc::AF_INET6).then(|| {
        SocketAddrV6::new(
            Ipv6Addr::from(name.sin6_addr.s6_addr),
            u16::from_be(name.sin6_port),
            0,
            name.sin6_scope_id,
        )
    })
}

/// Buffers for one `recvmmsg`.
#[derive(Debug)]
pub(crate) struct ReceiveArray {
    headers: RawArray<libc::mmsghdr>,
    iovecs: RawArray<libc::iovec>,
    names: RawArray<libc::sockaddr_in6>,
    controls: RawArray<u8>,
    buffers: ReceiveBuffers,
    buffer_bytes: usize,
    filled: usize,
}

impl ReceiveArray {
    /// `count` buffers of `buffer_bytes`.
    pub(crate) fn new(count: usize, buffer_bytes: usize) -> Self {
        let mut array = Self {
            headers: RawArray::new(count),
            iovecs: RawArray::new(count),
            names: RawArray::new(count),
            controls: RawArray::new(count * CONTROL_BYTES),
            buffers: ReceiveBuffers::new(count, buffer_bytes),
            buffer_bytes,
            filled: 0,
        };
        for index in 0..count {
            array.iovecs.at_mut(index).iov_len = buffer_bytes;
            let (name, iovec) = (array.names.pointer(index), array.iovecs.pointer(index));
            let control = array.controls.pointer(index * CONTROL_BYTES);
            let header = &mut array.headers.at_mut(index).msg_hdr;
            header.msg_name = name.cast();
            header.msg_iov = iovec;
            header.msg_iovlen = 1;
            header.msg_control = control.cast();
        }
        array
    }

    /// Number of buffers.
    pub(crate) const fn capacity(&self) -> usize {
        self.headers.len()
    }

    /// Receives without blocking; returns how many messages arrived (at least one).
    ///
    /// # Errors
    /// `WouldBlock` when there is none; else the system call's error.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        for index in 0..self.headers.len() {
            let header = &mut self.headers.at_mut(index).msg_hdr;
            header.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
            header.msg_controllen = CONTROL_BYTES as _;
            header.msg_flags = 0;
            self.iovecs.at_mut(index).iov_base = self.buffers.prepare(index).cast();
        }
        self.filled = 0;
        // SAFETY: every header points to a name, an iovec, a control buffer and a
        // payload buffer of the stated sizes, which are ours and which nothing
        // else refers to during the call; a null timeout is allowed.
        let received = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.headers.pointer(0),
                self.headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        self.filled = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for index in 0..self.filled {
            let bytes = (self.headers.at(index).msg_len as usize).min(self.buffer_bytes);
            // SAFETY: the kernel says that it wrote so many bytes where `prepare` pointed to.
            unsafe { self.buffers.filled(index, bytes) };
        }
        Ok(self.filled)
    }

    /// Message `index` of the last [`receive`](Self::receive).
    ///
    /// # Panics
    /// If that call did not fill it.
    pub(crate) fn message(&self, index: usize) -> Message<'_> {
        assert!(index < self.filled, "message {index} of {} received", self.filled);
        let header = &self.headers.at(index).msg_hdr;
        let control = index * CONTROL_BYTES;
        let control_bytes = header.msg_controllen.min(CONTROL_BYTES);
        Message {
            remote: socket_addr(self.names.at(index)),
            control: self.controls.range(control..control + control_bytes),
            payload: self.buffers.bytes(index),
            truncated: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
        }
    }

    /// Takes the payload of message `index` out, together with its memory; the message has none
    /// from now on.
    ///
    /// # Panics
    /// If the last [`receive`](Self::receive) did not fill it.
    pub(crate) fn take(&mut self, index: usize) -> BytesMut {
        assert!(index < self.filled, "message {index} of {} received", self.filled);
        self.buffers.take(index)
    }
}
