//! Receiving from an IPv6 UDP socket in batches, with destination address and traffic class.
//!
//! [`UdpReceiver`] owns its buffers: one `recvmmsg` fills up to a fixed number
//! of them, and [`UdpReceiver::datagrams`] walks what came. Nothing is allocated
//! after construction.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Largest UDP payload over IPv6 without a jumbo payload option, in bytes.
const DATAGRAM_BYTES_MAX: usize = 65_527;

/// Room for the control messages of one datagram, in bytes: packet info (40) and traffic class (24), rounded up.
const CONTROL_BYTES: usize = 128;

/// Control message memory, aligned as `cmsghdr` wants.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// One received datagram.
#[derive(Debug)]
pub(crate) struct Received<'a> {
    /// Sender.
    pub(crate) remote: SocketAddrV6,
    /// Destination, where the kernel said it.
    pub(crate) local: Option<Ipv6Addr>,
    /// Traffic class, where the kernel said it.
    pub(crate) traffic_class: u8,
    /// Whether the datagram was longer than the buffer.
    pub(crate) truncated: bool,
    /// Payload.
    pub(crate) payload: &'a [u8],
}

/// Buffers for a batch of datagrams.
pub(crate) struct UdpReceiver {
    payloads: Box<[u8]>,
    controls: Box<[Control]>,
    names: Box<[libc::sockaddr_in6]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    received: usize,
}

// SAFETY: the raw pointers in `vectors` and `headers` point into boxes of the
// same value, are rewritten before each use, and are used under `&mut self` only.
unsafe impl Send for UdpReceiver {}

impl UdpReceiver {
    /// Buffers for `batch` datagrams of any size.
    pub(crate) fn new(batch: usize) -> Self {
        // SAFETY: these are plain C structures for which all zeroes is a valid value.
        let (name, header) = unsafe {
            (std::mem::zeroed::<libc::sockaddr_in6>(), std::mem::zeroed::<libc::mmsghdr>())
        };
        let vector = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self {
            payloads: vec![0; batch * DATAGRAM_BYTES_MAX].into_boxed_slice(),
            controls: vec![Control([0; CONTROL_BYTES]); batch].into_boxed_slice(),
            names: vec![name; batch].into_boxed_slice(),
            vectors: vec![vector; batch].into_boxed_slice(),
            headers: vec![header; batch].into_boxed_slice(),
            received: 0,
        }
    }

    /// Receives up to `limit` datagrams without blocking: how many came. `EAGAIN` is zero.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        self.received = 0;
        let limit = limit.min(self.headers.len());
        if limit == 0 {
            return Ok(0);
        }
        self.point_headers_at_buffers();
        // SAFETY: the first `limit` headers were just pointed at buffers of this
        // value, which stay in place during the call.
        let count = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.headers.as_mut_ptr(),
                limit as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if count < 0 {
            let error = io::Error::last_os_error();
            let quiet =
                matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if quiet { Ok(0) } else { Err(error) };
        }
        self.received = count as usize;
        Ok(self.received)
    }

    /// The datagrams of the last [`receive`](Self::receive).
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = Received<'_>> {
        (0..self.received).map(|index| self.datagram(index))
    }

    fn datagram(&self, index: usize) -> Received<'_> {
        let header = &self.headers[index];
        let len = (header.msg_len as usize).min(DATAGRAM_BYTES_MAX);
        let start = index * DATAGRAM_BYTES_MAX;
        let name = &self.names[index];
        let (local, traffic_class) = control_messages(&header.msg_hdr);
        Received {
            remote: SocketAddrV6::new(
                Ipv6Addr::from(name.sin6_addr.s6_addr),
                u16::from_be(name.sin6_port),
                0,
                name.sin6_scope_id,
            ),
            local,
            traffic_class,
            truncated: header.msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
            payload: &self.payloads[start..start + len],
        }
    }

    fn point_headers_at_buffers(&mut self) {
        let payloads = self.payloads.chunks_exact_mut(DATAGRAM_BYTES_MAX);
        for (vector, payload) in self.vectors.iter_mut().zip(payloads) {
            vector.iov_base = payload.as_mut_ptr().cast();
            vector.iov_len = payload.len();
        }
        for (index, header) in self.headers.iter_mut().enumerate() {
            header.msg_len = 0;
            let message = &mut header.msg_hdr;
            message.msg_name = (&raw mut self.names[index]).cast();
            message.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
            message.msg_iov = &raw mut self.vectors[index];
            message.msg_iovlen = 1;
            message.msg_control = (&raw mut self.controls[index]).cast();
            message.msg_controllen = CONTROL_BYTES;
            message.msg_flags = 0;
        }
    }
}

impl std::fmt::Debug for UdpReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UdpReceiver")
            .field("batch", &self.headers.len())
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

/// Asks for the destination address and the traffic class of each datagram
/// (`IPV6_RECVPKTINFO`, `IPV6_RECVTCLASS`, RFC 3542), and for no fragments of
/// what is sent (`IPV6_DONTFRAG`).
pub(crate) fn set_ipv6_options(fd: BorrowedFd<'_>) -> io::Result<()> {
    for name in [libc::IPV6_RECVPKTINFO, libc::IPV6_RECVTCLASS, libc::IPV6_DONTFRAG] {
        let on: libc::c_int = 1;
        // SAFETY: `on` is readable for its whole size during the call.
        let result = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::IPPROTO_IPV6,
                name,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn control_messages(message: &libc::msghdr) -> (Option<Ipv6Addr>, u8) {
    let (mut local, mut traffic_class) = (None, 0);
    // SAFETY: `msg_control` points to our buffer, of which the kernel filled in
    // `msg_controllen` bytes; the macros stay inside that.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !next.is_null() {
        // SAFETY: not null, so a whole, aligned header inside the buffer.
        let header = unsafe { &*next };
        // SAFETY: as above.
        let data = unsafe { libc::CMSG_DATA(next) };
        if header.cmsg_level == libc::IPPROTO_IPV6 {
            match header.cmsg_type {
                libc::IPV6_PKTINFO => {
                    // SAFETY: the kernel puts a whole `in6_pktinfo` there, perhaps unaligned.
                    let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                    local = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr));
                }
                libc::IPV6_TCLASS => {
                    // SAFETY: the kernel puts a whole `int` there, perhaps unaligned.
                    traffic_class = unsafe { data.cast::<libc::c_int>().read_unaligned() } as u8;
                }
                _ => {}
            }
        }
        // SAFETY: `next` came from this message.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
    (local, traffic_class)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    fn pair() -> (UdpSocket, UdpSocket) {
        let receiver = UdpSocket::bind("[::1]:0").expect("loopback");
        set_ipv6_options(receiver.as_fd()).expect("options");
        let sender = UdpSocket::bind("[::1]:0").expect("loopback");
        sender.connect(receiver.local_addr().expect("bound")).expect("connect");
        (receiver, sender)
    }

    #[test]
    fn an_empty_socket_gives_nothing() {
        let (socket, _sender) = pair();
        let mut receiver = UdpReceiver::new(2);
        assert_eq!(receiver.receive(socket.as_fd(), 2).expect("no error"), 0);
        assert_eq!(receiver.datagrams().count(), 0);
    }

    #[test]
    fn batches_carry_addresses_and_are_bounded() {
        let (socket, sender) = pair();
        for len in [0, 1, 1452] {
            sender.send(&vec![9; len]).expect("sent");
        }
        let mut receiver = UdpReceiver::new(2);
        assert_eq!(receiver.receive(socket.as_fd(), 8).expect("received"), 2, "two buffers");
        let first = receiver.datagrams().next().expect("a datagram");
        assert_eq!(std::net::SocketAddr::V6(first.remote), sender.local_addr().expect("bound"));
        assert_eq!(first.local, Some(Ipv6Addr::LOCALHOST));
        assert_eq!((first.payload.len(), first.truncated, first.traffic_class), (0, false, 0));
        assert_eq!(receiver.receive(socket.as_fd(), 8).expect("received"), 1);
        assert_eq!(receiver.datagrams().next().expect("a datagram").payload, [9; 1452]);
    }

    #[test]
    fn the_largest_datagram_fits() {
        let (socket, sender) = pair();
        sender.send(&vec![7; 65_488]).expect("loopback takes 65536 bytes");
        let mut receiver = UdpReceiver::new(1);
        assert_eq!(receiver.receive(socket.as_fd(), 1).expect("received"), 1);
        let received = receiver.datagrams().next().expect("a datagram");
        assert_eq!((received.payload.len(), received.truncated), (65_488, false));
    }
}
