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
    /// One per slot, of [`SEND_BUFFER_BYTES`] capacity that is never exceeded: none ever moves.
    payloads: Box<[Vec<u8>]>,
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
            payloads: (0..count).map(|_| Vec::with_capacity(SEND_BUFFER_BYTES)).collect(),
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

    /// Empties the payload of `slot`.
    ///
    /// # Panics
    /// If the slot is lent to the kernel.
    pub(crate) fn clear(&mut self, slot: usize) {
        self.payload_mut(slot).clear();
    }

    /// Copies `bytes` behind the payload of `slot`.
    ///
    /// # Panics
    /// If the slot is lent to the kernel, or they do not fit.
    pub(crate) fn append(&mut self, slot: usize, bytes: &[u8]) {
        let payload = self.payload_mut(slot);
        assert!(payload.len() + bytes.len() <= SEND_BUFFER_BYTES, "beyond send slot {slot}");
        payload.extend_from_slice(bytes);
    }

    /// Exchanges the payload of `slot` for `buffer`, without a copy; `buffer` comes back empty.
    ///
    /// # Panics
    /// If the slot is lent to the kernel, or `buffer` holds more than a slot may, or has not the
    /// capacity of one.
    pub(crate) fn swap(&mut self, slot: usize, buffer: &mut Vec<u8>) {
        assert!(buffer.len() <= SEND_BUFFER_BYTES && buffer.capacity() >= SEND_BUFFER_BYTES);
        let payload = self.payload_mut(slot);
        std::mem::swap(payload, buffer);
        buffer.clear();
    }

    fn payload_mut(&mut self, slot: usize) -> &mut Vec<u8> {
        assert!(!self.lent[slot], "slot {slot} is in the kernel's hands");
        &mut self.payloads[slot]
    }

    /// Writes the header of `slot` over its payload.
    ///
    /// # Panics
    /// If the slot is lent to the kernel.
    pub(crate) fn prepare(&mut self, slot: usize, addressing: &MessageAddressing) {
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
        self.point_at(slot, 0..self.payloads[slot].len());
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
        // SAFETY: `prepare` made each header point to our own arrays and payloads with
        // sizes inside their bounds; they stay put and unchanged during the call.
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
        let bytes = &mut self.payloads[slot][range];
        let iov_base = bytes.as_mut_ptr().cast();
        *self.iovecs.at_mut(slot) = libc::iovec { iov_base, iov_len: bytes.len() };
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
        slots.append(1, &[1]);
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
        slots.append(0, &[1; SEND_BUFFER_BYTES]);
    }

    #[test]
    fn a_buffer_changes_places_with_a_payload() {
        let mut slots = SendSlots::new(1);
        slots.append(0, &[1; 10]);
        let mut buffer = Vec::with_capacity(SEND_BUFFER_BYTES);
        buffer.extend_from_slice(&[2; 20]);
        let built = buffer.as_ptr();
        slots.swap(0, &mut buffer);
        assert_eq!(slots.payloads[0], [2; 20]);
        assert_eq!(slots.payloads[0].as_ptr(), built, "not copied");
        assert!(buffer.is_empty() && buffer.capacity() >= SEND_BUFFER_BYTES);
    }

    #[test]
    #[should_panic(expected = "beyond send slot")]
    fn a_payload_never_outgrows_its_slot() {
        let mut slots = SendSlots::new(1);
        slots.append(0, &[1; SEND_BUFFER_BYTES]);
        slots.append(0, &[1]);
    }
}
