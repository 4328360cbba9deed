//! A small rtnetlink client: requests, dumps and notifications over a
//! `NETLINK_ROUTE` socket (netlink(7), rtnetlink(7)).
//!
//! ```text
//!  datagram: ┌─────────────────────┬───────────────────────────────┬──── next message
//!            │ nlmsghdr (16 bytes) │ body: fixed part │ attributes │ (4-byte aligned)
//!            └─────────────────────┴───────────────────────────────┴────
//!  attribute: u16 length (its own 4 bytes included) │ u16 kind │ value │ padding to 4
//! ```
//!
//! All integers are in host byte order. What the kernel says is still parsed
//! with every length checked. A request is answered while it is sent (rtnetlink
//! works in the sender's context), so waiting for answers has a short limit. Only
//! messages that come from the kernel (port 0) are read.

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{
    Timeout, set_socket_recv_buffer_size, set_socket_recv_buffer_size_force, set_socket_timeout,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Largest datagram read: the kernel fills dumps to at most 32 KiB, and a link
/// with many virtual functions may take more.
const DATAGRAM_BYTES_MAX: usize = 64 * 1024;
/// Kernel memory for unread notifications: some thousands of route changes
/// between two polls before a full re-read becomes necessary.
const NOTIFICATION_BUFFER_BYTES: usize = 1 << 20;
/// How long an answer may take: it is ready when the request has been sent, unless
/// the kernel's configuration lock is held for long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a dump is tried that a concurrent change interrupted.
const DUMP_ATTEMPTS_MAX: u32 = 5;
/// Datagrams thrown away in one go: more than the buffer holds.
const DISCARDED_DATAGRAMS_MAX: u32 = 1 << 16;

const HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// The two high bits of an attribute's kind are flags (nested, byte order).
const ATTRIBUTE_KIND_MASK: u16 = 0x3fff;

/// Why a question to the kernel about links, addresses, routes or neighbours failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetlinkError {
    /// A system call on the netlink socket failed.
    #[error(
        "{call} on a netlink socket: {source}; check that the process may open AF_NETLINK \
         sockets (seccomp, RestrictAddressFamilies) and has descriptors left"
    )]
    System {
        /// The system call.
        call: &'static str,
        /// What it answered.
        source: io::Error,
    },
    /// The kernel answered a request with an error.
    #[error("the kernel refused {request}: {source}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The kernel did not answer in time.
    #[error(
        "no answer to {request} within 2 s; another process holds the kernel's network \
         configuration lock: try again"
    )]
    NoAnswer {
        /// What was asked.
        request: &'static str,
    },
    /// The answer is not a well-formed netlink message.
    #[error("malformed answer to {request}; please report this with the kernel's version")]
    Malformed {
        /// What was asked.
        request: &'static str,
    },
    /// Changes kept interrupting a dump.
    #[error("{request} was interrupted by changes again and again; try again when they settle")]
    Interrupted {
        /// What was asked.
        request: &'static str,
    },
    /// The interface does not exist.
    #[error("there is no interface named {name}; those that exist: {existing}")]
    NoSuchInterface {
        /// The name asked for.
        name: String,
        /// The names that exist.
        existing: String,
    },
    /// The interface's index does not exist (any more) in this network namespace.
    #[error(
        "interface {name} (index {ifindex}) does not exist (any more) in this network namespace"
    )]
    Gone {
        /// Its name.
        name: String,
        /// Its index.
        ifindex: u32,
    },
    /// The interface cannot carry an AF_XDP datapath.
    #[error("interface {name} cannot be attached to: {reason}")]
    Unsuitable {
        /// Its name.
        name: String,
        /// Why, and what to do instead.
        reason: String,
    },
    /// The kernel has no route to the peer.
    #[error("no route to {remote}: {source}; see `ip -6 route get {remote}`")]
    NoRoute {
        /// The peer.
        remote: Ipv6Addr,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl NetlinkError {
    /// The kernel's error, if it refused the request.
    pub(super) fn refusal(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// A request under construction.
#[derive(Debug, Clone)]
pub(super) struct Request {
    name: &'static str,
    bytes: Vec<u8>,
}

impl Request {
    /// A request of a message type with its fixed part. `name` says in errors what was asked.
    pub(super) fn new(name: &'static str, kind: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(fixed);
        pad(&mut bytes);
        Self { name, bytes }
    }

    /// Appends an attribute.
    ///
    /// # Panics
    /// If the value does not fit into an attribute (64 KiB).
    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let len = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len())
            .expect("attributes of requests are a few bytes long");
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        pad(&mut self.bytes);
        self
    }

    fn finish(&mut self, flags: u16, sequence: u32) -> &[u8] {
        let len = u32::try_from(self.bytes.len()).expect("requests are some hundred bytes long");
        self.bytes[0..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        &self.bytes
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// A length field in a datagram does not fit what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// One message of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message<'a> {
    /// Message type: `RTM_NEWLINK` …
    pub(super) kind: u16,
    flags: u16,
    sequence: u32,
    /// Fixed part and attributes.
    pub(super) body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The fixed part of `N` bytes and the attributes behind it, or `None` if the body is shorter.
    pub(super) fn split<const N: usize>(&self) -> Option<(&'a [u8; N], Attributes<'a>)> {
        let (fixed, rest) = self.body.split_first_chunk()?;
        let padding = N.next_multiple_of(4) - N;
        Some((fixed, Attributes(rest.get(padding..).unwrap_or_default())))
    }
}

/// The messages of a datagram; after a malformed one it ends.
#[derive(Debug, Clone)]
pub(super) struct Messages<'a>(&'a [u8]);

impl<'a> Messages<'a> {
    /// Reads a received datagram.
    pub(super) fn new(datagram: &'a [u8]) -> Self {
        Self(datagram)
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = std::mem::take(&mut self.0);
        if bytes.is_empty() {
            return None;
        }
        let (Some(len), Some(kind), Some(flags), Some(sequence)) =
            (u32_at(bytes, 0), u16_at(bytes, 4), u16_at(bytes, 6), u32_at(bytes, 8))
        else {
            return Some(Err(Malformed));
        };
        let len = len as usize;
        let Some(body) = bytes.get(HEADER_BYTES..len) else { return Some(Err(Malformed)) };
        self.0 = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Message { kind, flags, sequence, body }))
    }
}

/// The attributes of a message, or those nested in one; ends at a malformed one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes inside a nested attribute's value.
    pub(super) fn nested(value: &'a [u8]) -> Self {
        Self(value)
    }

    /// The value of the first attribute of a kind.
    pub(super) fn find(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// The `u32` in an attribute.
    pub(super) fn find_u32(self, kind: u16) -> Option<u32> {
        u32_at(self.find(kind)?, 0)
    }

    /// The IPv6 address in an attribute.
    pub(super) fn find_ipv6(self, kind: u16) -> Option<Ipv6Addr> {
        let octets: [u8; 16] = self.find(kind)?.try_into().ok()?;
        Some(octets.into())
    }

    /// The text in an attribute, without its terminating zero.
    pub(super) fn find_text(self, kind: u16) -> Option<String> {
        let bytes = self.find(kind)?;
        let bytes = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        Some(String::from_utf8_lossy(bytes).into_owned())
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = std::mem::take(&mut self.0);
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & ATTRIBUTE_KIND_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER_BYTES..len)?;
        self.0 = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

pub(super) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

pub(super) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// How a look at the notifications ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notifications {
    /// All read.
    Drained,
    /// The limit was reached: more may wait.
    More,
    /// Some were lost (the buffer overflowed, or one was longer than ours):
    /// [`discard`](NetlinkSocket::discard) the rest, and read everything anew.
    Lost,
}

/// A `NETLINK_ROUTE` socket.
#[derive(Debug)]
pub(super) struct NetlinkSocket {
    fd: OwnedFd,
    datagram: Box<[u8]>,
    sequence: u32,
}

impl NetlinkSocket {
    /// A socket to ask questions with. It lives in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetlinkError::System`].
    pub(super) fn for_requests() -> Result<Self, NetlinkError> {
        let socket = Self::open(0, SocketFlags::CLOEXEC)?;
        set_socket_timeout(&socket.fd, Timeout::Recv, Some(ANSWER_TIMEOUT))
            .map_err(system("setsockopt(SO_RCVTIMEO)"))?;
        Ok(socket)
    }

    /// A non-blocking socket that receives the notifications of multicast groups
    /// (a mask with bit `group - 1` for each `RTNLGRP_*`).
    ///
    /// # Errors
    /// [`NetlinkError::System`].
    pub(super) fn for_notifications(groups: u32) -> Result<Self, NetlinkError> {
        let socket = Self::open(groups, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        // Beyond net.core.rmem_max with CAP_NET_ADMIN; otherwise as much as is allowed.
        set_socket_recv_buffer_size_force(&socket.fd, NOTIFICATION_BUFFER_BYTES)
            .or_else(|_| set_socket_recv_buffer_size(&socket.fd, NOTIFICATION_BUFFER_BYTES))
            .map_err(system("setsockopt(SO_RCVBUF)"))?;
        Ok(socket)
    }

    fn open(groups: u32, flags: SocketFlags) -> Result<Self, NetlinkError> {
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
            .map_err(system("socket(AF_NETLINK, NETLINK_ROUTE)"))?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups)).map_err(system("bind"))?;
        Ok(Self { fd, datagram: vec![0; DATAGRAM_BYTES_MAX].into_boxed_slice(), sequence: 0 })
    }

    /// Sends a request for one object or one change, and hands every message of the answer to `on_message`.
    ///
    /// # Errors
    /// What the kernel answers, and failures of the socket.
    pub(super) fn request(
        &mut self,
        mut request: Request,
        flags: i32,
        mut on_message: impl FnMut(&Message<'_>),
    ) -> Result<(), NetlinkError> {
        let flags = (flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        self.exchange(&mut request, flags, &mut on_message).map(|_consistent| ())
    }

    /// Asks for all objects of a kind; `parse` picks what is of interest.
    ///
    /// # Errors
    /// What the kernel answers, and failures of the socket.
    pub(super) fn dump<T>(
        &mut self,
        mut request: Request,
        mut parse: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        for _ in 0..DUMP_ATTEMPTS_MAX {
            let mut found = Vec::new();
            if self.exchange(&mut request, flags, &mut |message| found.extend(parse(message)))? {
                return Ok(found);
            }
        }
        Err(NetlinkError::Interrupted { request: request.name })
    }

    /// Sends, and reads until the acknowledgement or the end of the dump. Says
    /// whether the dump was consistent.
    fn exchange(
        &mut self,
        request: &mut Request,
        flags: u16,
        on_message: &mut dyn FnMut(&Message<'_>),
    ) -> Result<bool, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let name = request.name;
        let bytes = request.finish(flags, self.sequence);
        retry(|| rustix::net::send(&self.fd, bytes, SendFlags::empty())).map_err(system("send"))?;
        let mut consistent = true;
        loop {
            let len = match receive(&self.fd, &mut self.datagram) {
                Ok(len) => len,
                Err(Errno::AGAIN) => return Err(NetlinkError::NoAnswer { request: name }),
                Err(errno) => return Err(system("recvfrom")(errno)),
            };
            let datagram =
                self.datagram.get(..len).ok_or(NetlinkError::Malformed { request: name })?;
            for message in Messages::new(datagram) {
                let message =
                    message.map_err(|Malformed| NetlinkError::Malformed { request: name })?;
                if message.sequence != self.sequence {
                    continue; // the late answer to a request that timed out
                }
                consistent &= i32::from(message.flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(message.kind) {
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                        return status(&message, name).map(|()| consistent);
                    }
                    libc::NLMSG_NOOP => {}
                    _ => on_message(&message),
                }
            }
        }
    }

    /// Hands the waiting notifications to `on_message`, at most `datagrams_max` datagrams of them.
    ///
    /// # Errors
    /// [`NetlinkError::System`] if the socket is broken.
    pub(super) fn notifications(
        &mut self,
        datagrams_max: u32,
        mut on_message: impl FnMut(&Message<'_>),
    ) -> Result<Notifications, NetlinkError> {
        for _ in 0..datagrams_max {
            let len = match receive(&self.fd, &mut self.datagram) {
                Ok(len) => len,
                Err(Errno::AGAIN) => return Ok(Notifications::Drained),
                Err(Errno::NOBUFS) => return Ok(Notifications::Lost),
                Err(errno) => return Err(system("recvfrom")(errno)),
            };
            let Some(datagram) = self.datagram.get(..len) else { return Ok(Notifications::Lost) };
            for message in Messages::new(datagram) {
                match message {
                    Ok(message) => on_message(&message),
                    Err(Malformed) => return Ok(Notifications::Lost),
                }
            }
        }
        Ok(Notifications::More)
    }

    /// Throws away the notifications that wait, because what they say is about to
    /// be read anew. Says whether all are gone; under a flood some may be left.
    ///
    /// # Errors
    /// [`NetlinkError::System`] if the socket is broken.
    pub(super) fn discard(&mut self) -> Result<bool, NetlinkError> {
        for _ in 0..DISCARDED_DATAGRAMS_MAX {
            match receive(&self.fd, &mut self.datagram) {
                Ok(_) | Err(Errno::NOBUFS) => {}
                Err(Errno::AGAIN) => return Ok(true),
                Err(errno) => return Err(system("recvfrom")(errno)),
            }
        }
        Ok(false)
    }
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Receives one datagram of the kernel. Its length may exceed the buffer's: it was truncated then.
fn receive(fd: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    loop {
        let (_, len, sender) = retry(|| rustix::net::recvfrom(fd, &mut *buffer, RecvFlags::TRUNC))?;
        let sender = sender.map(SocketAddrNetlink::try_from).transpose()?;
        if sender.is_none_or(|sender| sender.pid() == 0) {
            return Ok(len);
        }
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The status that ends an answer: zero, or a negative error number.
fn status(message: &Message<'_>, request: &'static str) -> Result<(), NetlinkError> {
    let status = u32_at(message.body, 0).ok_or(NetlinkError::Malformed { request })?;
    match (status as i32).checked_neg() {
        Some(0) => Ok(()),
        Some(errno) if errno > 0 => {
            Err(NetlinkError::Refused { request, source: io::Error::from_raw_os_error(errno) })
        }
        // A dump may end with a positive count.
        _ => Ok(()),
    }
}

fn system(call: &'static str) -> impl Fn(Errno) -> NetlinkError {
    move |errno| NetlinkError::System { call, source: errno.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn two_messages() -> Vec<u8> {
        let mut bytes = Request::new("a", 16, &[1, 2, 3, 4, 5, 6])
            .attribute(3, b"veth0\0")
            .attribute(4 | 0x8000, &1500_u32.to_ne_bytes())
            .finish(0x301, 7)
            .to_vec();
        let second = Request::new("b", 17, &[9; 12]).attribute(5, &[]).finish(0, 8).to_vec();
        bytes.extend_from_slice(&second);
        bytes
    }

    #[test]
    fn what_is_built_is_read() {
        let bytes = two_messages();
        let messages: Vec<_> =
            Messages::new(&bytes).collect::<Result<_, _>>().expect("well-formed");
        assert_eq!(messages.len(), 2);
        let first = messages[0];
        assert_eq!((first.kind, first.flags, first.sequence), (16, 0x301, 7));
        let (fixed, attributes) = first.split::<6>().expect("long enough");
        assert_eq!(fixed, &[1, 2, 3, 4, 5, 6]);
        assert_eq!(attributes.find_text(3).as_deref(), Some("veth0"));
        assert_eq!(attributes.find_u32(4), Some(1500), "flags of the kind are masked");
        assert_eq!(attributes.find(9), None);
        assert_eq!(attributes.find_ipv6(3), None, "wrong length");
        let (_, attributes) = messages[1].split::<12>().expect("long enough");
        assert_eq!(attributes.find(5), Some(&[][..]));
        assert!(messages[1].split::<17>().is_none());
    }

    #[test]
    fn truncation_is_noticed_at_every_length() {
        let bytes = two_messages();
        let first_len = u32_at(&bytes, 0).expect("header") as usize;
        for len in 1..bytes.len() {
            let results: Vec<_> = Messages::new(&bytes[..len]).collect();
            let complete = usize::from(len >= first_len);
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), complete, "{len}");
            assert_eq!(results.iter().any(Result::is_err), len != first_len, "{len}");
        }
    }

    #[test]
    fn lengths_that_cannot_be_end_the_iteration() {
        for len in [0_u32, 15, 17, u32::MAX] {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            let results: Vec<_> = Messages::new(&bytes).collect();
            assert_eq!(results, [Err(Malformed)], "message of {len} bytes");
        }
        for len in [0_u16, 3, 9, u16::MAX] {
            let mut bytes = [0; 8];
            bytes[..2].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(Attributes::nested(&bytes).count(), 0, "attribute of {len} bytes");
        }
    }

    #[test]
    fn status_of_an_answer() {
        let message = |status: i32| {
            let bytes = status.to_ne_bytes();
            status_of(&bytes)
        };
        assert_eq!(message(0), Ok(()));
        assert_eq!(message(5), Ok(()));
        assert_eq!(message(-libc::ENOENT), Err(Some(libc::ENOENT)));
        assert_eq!(message(i32::MIN), Ok(()), "no error number");
        assert_eq!(status_of(&[0; 3]), Err(None));
    }

    fn status_of(body: &[u8]) -> Result<(), Option<i32>> {
        let message = Message { kind: 2, flags: 0, sequence: 0, body };
        status(&message, "a test").map_err(|error| error.refusal())
    }

    #[test]
    fn the_kernel_refuses_with_its_reason() {
        let mut socket = NetlinkSocket::for_requests().expect("needs no privilege");
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
        let request = Request::new("the link", libc::RTM_GETLINK, &fixed);
        let error = socket.request(request, 0, |_| ()).expect_err("no such link");
        assert_eq!(error.refusal(), Some(libc::ENODEV));
        assert!(error.to_string().contains("the kernel refused the link"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in Messages::new(&bytes).flatten() {
                if let Some((_, attributes)) = message.split::<4>() {
                    attributes.for_each(drop);
                }
            }
            Attributes::nested(&bytes).for_each(drop);
        }
    }
}
