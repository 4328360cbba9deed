//! Send slots: one message each (one datagram, or a GSO batch of equal ones), at
//! fixed addresses, so that `sendmmsg(2)` and io_uring read the same structures.
//!
//! A slot belongs to userspace until it is handed to io_uring with
//! [`lend`](SendSlots::lend), and again after [`take_back`](SendSlots::take_back),
//! which follows its completion. Writing to a lent slot panics.
#![allow(unsafe_code)]

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::control::{CONTROL_BYTES, ControlWriter};
use crate::sys::raw_array::RawArray;

/// Payload room of one slot, in bytes: the largest UDP payload, rounded up.
pub(crate) const SEND_BUFFER_BYTES: usize = 64 * 1024;

/// Where a slot's message goes, and how it is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MessageAddressing {
    /// Receiver.
    pub(crate) remote: SocketAddrV6,
    /// Source address, `None` for the kernel's choice.
    pub(crate) local: Option<Ipv6Addr>,
    /// Traffic class byte; the two low bits are ECN.
    pub(crate) traffic_class: u8,
    /// Size at which the kernel cuts the payload into datagrams, in bytes.
    pub(crate) segment_bytes: Option<u16>,
}

/// Fixed memory for messages on their way out.
#[derive(Debug)]
pub(crate) struct SendSlots {
    headers: RawArray<libc::mmsghdr>,
    iovecs: RawArray<libc::iovec>,
    names: RawArray<libc::sockaddr_in6>,
    controls: RawArray<u8>,
    memory: RawArray<u8>,
    /// Control bytes without the segment size, which comes last.
    plain_control_bytes: Box<[usize]>,
    lent: Box<[bool]>,
}

impl SendSlots {
    /// `count` slots of [`SEND_BUFFER_BYTES`]; pages are touched only when used.
    pub(crate) fn new(count: usize) -> Self {
        let mut slots = Self {
            headers: RawArray::new(count),
            iovecs: RawArray::new(count),
            names: RawArray::new(count),
            controls: RawArray::new(count * CONTROL_BYTES),
            memory: RawArray::new(count * SEND_BUFFER_BYTES),
            plain_control_bytes: vec![0; count].into_boxed_slice(),
            lent: vec![false; count].into_boxed_slice(),
        };
        for slot in 0..count {
            let (name, iovec) = (slots.names.pointer(slot), slots.iovecs.pointer(slot));
            let control = slots.controls.pointer(slot * CONTROL_BYTES);
            let header = &mut slots.headers.at_mut(slot).msg_hdr;
            header.msg_name = name.cast();
            header.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
            header.msg_iov = iovec;
            header.msg_iovlen = 1;
            header.msg_control = control.cast();
        }
        slots
    }

    /// Number of slots.
    pub(crate) const fn count(&self) -> usize {
        self.headers.len()
    }

    /// The bytes of `slot` in `range`, to fill.
    ///
    /// # Panics
    /// If the slot is lent to the kernel, or the range exceeds it.
    pub(crate) fn payload_mut(&mut self, slot: usize, range: Range<usize>) -> &mut [u8] {
        assert!(!self.lent[slot], "slot {slot} is in the kernel's hands");
        assert!(range.end <= SEND_BUFFER_BYTES, "{range:?} exceeds a send slot");
        let base = slot * SEND_BUFFER_BYTES;
        self.memory.range_mut(base + range.start..base + range.end)
    }

    /// Writes the header of `slot` over its first `payload_bytes`.
    ///
    /// # Panics
    /// If the slot is lent to the kernel, or `payload_bytes` exceeds it.
    pub(crate) fn prepare(
        &mut self,
        slot: usize,
        payload_bytes: usize,
        addressing: &MessageAddressing,
    ) {
        assert!(!self.lent[slot], "slot {slot} is in the kernel's hands");
        let remote = &addressing.remote;
        let name = self.names.at_mut(slot);
        name.sin6_family = libc::AF_INET6 as libc::sa_family_t;
        name.sin6_port = remote.port().to_be();
        name.sin6_addr.s6_addr = remote.ip().octets();
        name.sin6_scope_id = remote.scope_id();

        let control = slot * CONTROL_BYTES..(slot + 1) * CONTROL_BYTES;
        let mut writer = ControlWriter::new(self.controls.range_mut(control));
        let traffic_class = libc::c_int::from(addressing.traffic_class);
        writer.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &traffic_class.to_ne_bytes());
        if let Some(local) = addressing.local {
            // struct in6_pktinfo: address, then interface index (0: by route).
            let mut info = [0_u8; 20];
            info[..16].copy_from_slice(&local.octets());
            writer.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
        }
        self.plain_control_bytes[slot] = writer.len();
        if let Some(segment_bytes) = addressing.segment_bytes {
            writer.push(libc::SOL_UDP, libc::UDP_SEGMENT, &segment_bytes.to_ne_bytes());
        }
        let control_bytes = writer.len();
        self.headers.at_mut(slot).msg_hdr.msg_controllen = control_bytes as _;
        self.point_at(slot, 0..payload_bytes);
    }

    /// Sends the messages of `slots` in order without blocking; returns how many left.
    ///
    /// # Errors
    /// The first one's error, if not even that could be sent.
    ///
    /// # Panics
    /// If the range is empty or exceeds the slots.
    pub(crate) fn send(&mut self, fd: BorrowedFd<'_>, slots: Range<usize>) -> io::Result<usize> {
        assert!(slots.start < slots.end && slots.end <= self.count(), "send slots {slots:?}");
        // SAFETY: `prepare` made each header point to our own arrays with sizes
        // inside their bounds; they stay put and unchanged during the call.
        let sent = unsafe {
            libc::sendmmsg(
                fd.as_raw_fd(),
                self.headers.pointer(slots.start),
                slots.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Sends the bytes `range` of `slot` as one datagram, without segmentation and
    /// without blocking.
    ///
    /// # Errors
    /// The system call's error.
    ///
    /// # Panics
    /// If the slot is lent to the kernel, or the range exceeds it.
    pub(crate) fn send_plain(
        &mut self,
        fd: BorrowedFd<'_>,
        slot: usize,
        range: Range<usize>,
    ) -> io::Result<()> {
        assert!(!self.lent[slot], "slot {slot} is in the kernel's hands");
        self.point_at(slot, range);
        let control_bytes = self.plain_control_bytes[slot];
        self.headers.at_mut(slot).msg_hdr.msg_controllen = control_bytes as _;
        self.send(fd, slot..slot + 1).map(drop)
    }

    /// Gives `slot` to the kernel until [`take_back`](Self::take_back): returns
    /// the address of its header.
    ///
    /// # Panics
    /// If it is lent already.
    pub(crate) fn lend(&mut self, slot: usize) -> *const libc::msghdr {
        assert!(!self.lent[slot], "slot {slot} is lent twice");
        self.lent[slot] = true;
        &raw const self.headers.at(slot).msg_hdr
    }

    /// Takes `slot` back after its completion.
    ///
    /// # Panics
    /// If it was not lent.
    pub(crate) fn take_back(&mut self, slot: usize) {
        assert!(self.lent[slot], "completion for slot {slot}, which was not lent");
        self.lent[slot] = false;
    }

    /// Whether any slot is in the kernel's hands.
    pub(crate) fn any_lent(&self) -> bool {
        self.lent.contains(&true)
    }

    fn point_at(&mut self, slot: usize, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= SEND_BUFFER_BYTES, "{range:?}");
        let base = self.memory.pointer(slot * SEND_BUFFER_BYTES + range.start);
        *self.iovecs.at_mut(slot) = libc::iovec { iov_base: base.cast(), iov_len: range.len() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "in the kernel's hands")]
    fn a_lent_slot_cannot_be_written() {
        let mut slots = SendSlots::new(2);
        let _ = slots.lend(1);
        let _ = slots.payload_mut(1, 0..1);
    }

    #[test]
    #[should_panic(expected = "not lent")]
    fn a_stale_completion_is_noticed() {
        SendSlots::new(2).take_back(0);
    }

    #[test]
    fn lending_ends_with_the_completion() {
        let mut slots = SendSlots::new(2);
        let header = slots.lend(0);
        assert!(!header.is_null() && slots.any_lent());
        slots.take_back(0);
        assert!(!slots.any_lent());
        slots.payload_mut(0, 0..SEND_BUFFER_BYTES).fill(1);
    }
}
