//! A small generic netlink client: one request, one reply, attributes as bytes.
//!
//! Kernel: `Documentation/userspace-api/netlink/intro.rst`. All integers are in
//! host order; attributes are padded to four bytes.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

const NLMSG_HEADER_BYTES: usize = 16;
const GENL_HEADER_BYTES: usize = 4;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// Marks an attribute that contains attributes.
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// The kernel keeps replies to single requests below this.
const REPLY_BYTES_MAX: usize = 64 * 1024;

/// Appends one attribute.
pub(super) fn put(request: &mut Vec<u8>, kind: u16, data: &[u8]) {
    let len = u16::try_from(4 + data.len()).expect("requests hold names and numbers");
    request.extend_from_slice(&len.to_ne_bytes());
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(data);
    request.resize(request.len().next_multiple_of(4), 0);
}

/// Appends an attribute that holds those in `inner`.
pub(super) fn put_nested(request: &mut Vec<u8>, kind: u16, inner: &[u8]) {
    put(request, kind | NLA_F_NESTED, inner);
}

/// Iterates over attributes: type and data. Ends at the first malformed one.
#[derive(Debug, Clone)]
pub(super) struct Attributes<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let header = self.0.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & NLA_TYPE_MASK;
        let data = self.0.get(4..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, data))
    }
}

/// The attribute of type `kind`.
pub(super) fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    Attributes(attributes).find(|(found, _)| *found == kind).map(|(_, data)| data)
}

/// The attribute of type `kind` as an unsigned number of whatever width.
pub(super) fn number(attributes: &[u8], kind: u16) -> Option<u64> {
    let data = find(attributes, kind)?;
    match data.len() {
        1 => Some(u64::from(data[0])),
        2 => data.try_into().ok().map(u16::from_ne_bytes).map(u64::from),
        4 => data.try_into().ok().map(u32::from_ne_bytes).map(u64::from),
        8 => data.try_into().ok().map(u64::from_ne_bytes),
        _ => None,
    }
}

/// The attribute of type `kind` as text.
pub(super) fn text(attributes: &[u8], kind: u16) -> Option<String> {
    let data = find(attributes, kind)?;
    let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    Some(String::from_utf8_lossy(&data[..end]).into_owned())
}

/// A generic netlink family, opened by name.
#[derive(Debug)]
pub(super) struct Family {
    socket: OwnedFd,
    id: u16,
}

impl Family {
    /// Looks the family `name` up.
    ///
    /// # Errors
    /// `NotFound` when the kernel has no such family; else the system call's error.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let socket = net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::GENERIC),
        )?;
        let control = Self { socket, id: GENL_ID_CTRL };
        let mut request = Vec::new();
        put(&mut request, CTRL_ATTR_FAMILY_NAME, &[name.as_bytes(), b"\0"].concat());
        let reply = control.request(CTRL_CMD_GETFAMILY, 2, &request)?;
        let id = number(&reply, CTRL_ATTR_FAMILY_ID)
            .and_then(|id| u16::try_from(id).ok())
            .ok_or_else(|| malformed("the reply names no family"))?;
        Ok(Self { socket: control.socket, id })
    }

    /// Sends one request and returns the attributes of its reply.
    ///
    /// # Errors
    /// The kernel's answer, or `InvalidData` for a malformed reply.
    pub(super) fn request(
        &self,
        command: u8,
        version: u8,
        attributes: &[u8],
    ) -> io::Result<Vec<u8>> {
        let len = NLMSG_HEADER_BYTES + GENL_HEADER_BYTES + attributes.len();
        let mut message = Vec::with_capacity(len);
        let len = u32::try_from(len).expect("requests are small");
        message.extend_from_slice(&len.to_ne_bytes());
        message.extend_from_slice(&self.id.to_ne_bytes());
        message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
        // Sequence 0 and port 0: one request at a time, the kernel fills the port in.
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[command, version, 0, 0]);
        message.extend_from_slice(attributes);
        net::send(&self.socket, &message, SendFlags::empty())?;
        let mut reply = vec![0_u8; REPLY_BYTES_MAX];
        let (received, _) = net::recv(&self.socket, reply.as_mut_slice(), RecvFlags::empty())?;
        reply.truncate(received);
        payload(&reply).map(<[u8]>::to_vec)
    }
}

/// The attributes of a reply.
fn payload(reply: &[u8]) -> io::Result<&[u8]> {
    let header =
        reply.first_chunk::<NLMSG_HEADER_BYTES>().ok_or_else(|| malformed("short reply"))?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let len = word(0) as usize;
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    let body = reply.get(NLMSG_HEADER_BYTES..len).ok_or_else(|| malformed("cut reply"))?;
    if kind == NLMSG_ERROR {
        let code = body.first_chunk::<4>().ok_or_else(|| malformed("cut error"))?;
        return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(*code).saturating_neg()));
    }
    body.get(GENL_HEADER_BYTES..).ok_or_else(|| malformed("no generic header"))
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_go_there_and_back() {
        let mut inner = Vec::new();
        put(&mut inner, 1, b"abc\0");
        put(&mut inner, 2, &7_u32.to_ne_bytes());
        put(&mut inner, 3, &[9]);
        let mut outer = Vec::new();
        put(&mut outer, 5, &(1_u64 << 40).to_ne_bytes());
        put_nested(&mut outer, 6, &inner);
        assert_eq!(number(&outer, 5), Some(1 << 40));
        let nested = find(&outer, 6).expect("the nest, its flag masked");
        assert_eq!(text(nested, 1).as_deref(), Some("abc"));
        assert_eq!((number(nested, 2), number(nested, 3)), (Some(7), Some(9)));
        assert_eq!(number(nested, 4), None);
    }

    #[test]
    fn truncated_attributes_end_the_walk() {
        let mut bytes = Vec::new();
        put(&mut bytes, 1, &7_u32.to_ne_bytes());
        for cut in 0..bytes.len() {
            assert_eq!(Attributes(&bytes[..cut]).count(), 0, "cut to {cut}");
        }
        bytes[..2].copy_from_slice(&3_u16.to_ne_bytes());
        assert_eq!(Attributes(&bytes).count(), 0, "shorter than its header");
    }

    #[test]
    fn errors_and_short_replies_are_errors() {
        assert!(payload(&[0; 15]).is_err());
        let mut reply = 20_u32.to_ne_bytes().to_vec();
        reply.extend_from_slice(&NLMSG_ERROR.to_ne_bytes());
        reply.extend_from_slice(&[0; 10]);
        assert!(payload(&reply).is_err(), "claims more than there is");
        reply.extend_from_slice(&(-libc::ENOENT).to_ne_bytes());
        let error = payload(&reply).expect_err("the kernel said no");
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn the_kernel_answers() {
        let control = Family::open("nlctrl").expect("every kernel has it");
        assert_eq!(control.id, GENL_ID_CTRL);
        let error = Family::open("no-such-family").expect_err("there is none");
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
