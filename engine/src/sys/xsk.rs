//! The system calls of an AF_XDP socket (Linux `Documentation/networking/af_xdp.rst`).
//!
//! Lowest kernels: AF_XDP itself 4.18, need-wakeup 5.4, full statistics 5.9,
//! multi-buffer (`XDP_USE_SG`) 6.6, TX metadata 6.8, `XDP_MAX_TX_SKB_BUDGET` 6.17.
//! Every function returns the bare error of its one system call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::cursor::{Consumer, Producer, RingOffsets};
use super::mmap::Mmap;

/// `XDP_MAX_TX_SKB_BUDGET`: frames that one kick may process in copy mode.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// An entry of the RX and TX rings: `struct xdp_desc`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Descriptor {
    /// Byte offset into the UMEM.
    pub(crate) addr: u64,
    /// Length in bytes.
    pub(crate) len: u32,
    /// [`PACKET_CONTINUES`], [`TX_METADATA`].
    pub(crate) options: u32,
}

const _: () = assert!(size_of::<Descriptor>() == size_of::<libc::xdp_desc>());

/// Descriptor option: the packet goes on in the next descriptor (Linux ≥ 6.6).
pub(crate) const PACKET_CONTINUES: u32 = libc::XDP_PKT_CONTD;
/// Descriptor option: a [`TxMetadata`] lies in front of the packet (Linux ≥ 6.8).
pub(crate) const TX_METADATA: u32 = libc::XDP_TX_METADATA;

/// `struct xsk_tx_metadata` as a request for a checksum, in the bytes that the kernel reads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TxMetadata {
    /// Offset in bytes from the start of the packet at which the sum starts.
    pub(crate) checksum_start: u16,
    /// Offset in bytes of the checksum field from `checksum_start`.
    pub(crate) checksum_offset: u16,
}

impl TxMetadata {
    /// Bytes in front of the packet that hold it: flags, request, launch time.
    pub(crate) const LEN: usize = 24;

    /// The bytes that the kernel reads.
    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&u64::from(libc::XDP_TXMD_FLAGS_CHECKSUM).to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.checksum_start.to_ne_bytes());
        bytes[10..12].copy_from_slice(&self.checksum_offset.to_ne_bytes());
        bytes
    }
}

/// How a socket is bound: see `XDP_COPY` and `XDP_ZEROCOPY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BindOptions {
    /// Ask for zero-copy, and fail without; otherwise ask for copy mode, and never get zero-copy.
    pub(crate) zero_copy: bool,
    /// Packets may span several frames (Linux ≥ 6.6).
    pub(crate) multi_buffer: bool,
}

/// Numbers of entries of the four rings; each a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingSizes {
    pub(crate) fill: u32,
    pub(crate) completion: u32,
    pub(crate) rx: u32,
    pub(crate) tx: u32,
}

/// The ends of the four rings that belong to userspace.
#[derive(Debug)]
pub(crate) struct MappedRings {
    pub(crate) fill: Producer<u64>,
    pub(crate) completion: Consumer<u64>,
    pub(crate) rx: Consumer<Descriptor>,
    pub(crate) tx: Producer<Descriptor>,
}

/// `struct xdp_statistics`: what the kernel counted on a socket (Linux ≥ 5.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Statistics {
    pub(crate) rx_dropped: u64,
    pub(crate) rx_invalid_descriptors: u64,
    pub(crate) tx_invalid_descriptors: u64,
    pub(crate) rx_ring_full: u64,
    pub(crate) fill_ring_empty: u64,
    pub(crate) tx_ring_empty: u64,
}

/// An AF_XDP socket.
#[derive(Debug)]
pub(crate) struct Xsk {
    fd: OwnedFd,
    rings_mapped: bool,
}

impl Xsk {
    /// Opens the socket; needs `CAP_NET_RAW`.
    pub(crate) fn open() -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        check(fd)?;
        // SAFETY: a descriptor that the kernel has just given to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, rings_mapped: false })
    }

    /// Registers packet memory, `tx_metadata_bytes` of it reserved in front of each sent packet.
    ///
    /// # Safety
    /// From now on the kernel writes to `memory` where the fill ring says so and
    /// reads where the TX ring says so: no reference may exist to a frame that
    /// the kernel owns.
    pub(crate) unsafe fn register_umem(
        &self,
        memory: &Mmap,
        frame_size_bytes: u32,
        tx_metadata_bytes: u32,
    ) -> io::Result<()> {
        let flags = if tx_metadata_bytes > 0 { libc::XDP_UMEM_TX_METADATA_LEN } else { 0 };
        let registration = libc::xdp_umem_reg {
            addr: memory.start().as_ptr() as u64,
            len: memory.len() as u64,
            chunk_size: frame_size_bytes,
            headroom: 0,
            flags,
            tx_metadata_len: tx_metadata_bytes,
        };
        self.set_option(libc::XDP_UMEM_REG, &registration)
    }

    /// Sets the sizes of the four rings and maps them.
    ///
    /// # Panics
    /// When called a second time: each ring has one userspace end.
    pub(crate) fn map_rings(&mut self, sizes: &RingSizes) -> io::Result<MappedRings> {
        assert!(!self.rings_mapped, "the rings of a socket are mapped once");
        self.rings_mapped = true;
        self.set_option(libc::XDP_UMEM_FILL_RING, &sizes.fill)?;
        self.set_option(libc::XDP_UMEM_COMPLETION_RING, &sizes.completion)?;
        self.set_option(libc::XDP_RX_RING, &sizes.rx)?;
        self.set_option(libc::XDP_TX_RING, &sizes.tx)?;
        let offsets = self.mmap_offsets()?;
        let fill = self.map_ring::<u64>(&offsets.fr, sizes.fill, libc::XDP_UMEM_PGOFF_FILL_RING)?;
        let completion = self.map_ring::<u64>(
            &offsets.cr,
            sizes.completion,
            libc::XDP_UMEM_PGOFF_COMPLETION_RING,
        )?;
        let rx =
            self.map_ring::<Descriptor>(&offsets.rx, sizes.rx, libc::XDP_PGOFF_RX_RING as u64)?;
        let tx =
            self.map_ring::<Descriptor>(&offsets.tx, sizes.tx, libc::XDP_PGOFF_TX_RING as u64)?;
        // SAFETY: each mapping is the kernel's ring of that name with the offsets and
        // size that it reported, and the flag above makes these ends the only ones.
        unsafe {
            Ok(MappedRings {
                fill: Producer::from_kernel(fill.0, &fill.1, sizes.fill),
                completion: Consumer::from_kernel(completion.0, &completion.1, sizes.completion),
                rx: Consumer::from_kernel(rx.0, &rx.1, sizes.rx),
                tx: Producer::from_kernel(tx.0, &tx.1, sizes.tx),
            })
        }
    }

    /// Binds to a device queue.
    pub(crate) fn bind(&self, ifindex: u32, queue: u32, options: BindOptions) -> io::Result<()> {
        let mut flags = libc::XDP_USE_NEED_WAKEUP;
        flags |= if options.zero_copy { libc::XDP_ZEROCOPY } else { libc::XDP_COPY };
        if options.multi_buffer {
            flags |= libc::XDP_USE_SG;
        }
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: flags,
            sxdp_ifindex: ifindex,
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: 0,
        };
        // SAFETY: `address` is a whole `sockaddr_xdp` and outlives the call.
        check(unsafe {
            libc::bind(
                self.fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        })
    }

    /// Whether the bound socket really works without copies (`XDP_OPTIONS`).
    pub(crate) fn is_zero_copy(&self) -> io::Result<bool> {
        let mut options = libc::xdp_options { flags: 0 };
        // SAFETY: plain integers, any content is valid.
        unsafe { self.option(libc::XDP_OPTIONS, &mut options) }?;
        Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
    }

    /// Lets one kick process up to `frames` in copy mode (Linux ≥ 6.17; `ENOPROTOOPT` before).
    pub(crate) fn set_tx_budget(&self, frames: u32) -> io::Result<()> {
        self.set_option(XDP_MAX_TX_SKB_BUDGET, &frames)
    }

    /// What the kernel counted so far.
    pub(crate) fn statistics(&self) -> io::Result<Statistics> {
        let mut raw = libc::xdp_statistics {
            rx_dropped: 0,
            rx_invalid_descs: 0,
            tx_invalid_descs: 0,
            rx_ring_full: 0,
            rx_fill_ring_empty_descs: 0,
            tx_ring_empty_descs: 0,
        };
        // SAFETY: plain integers, any content is valid.
        unsafe { self.option(libc::XDP_STATISTICS, &mut raw) }?;
        Ok(Statistics {
            rx_dropped: raw.rx_dropped,
            rx_invalid_descriptors: raw.rx_invalid_descs,
            tx_invalid_descriptors: raw.tx_invalid_descs,
            rx_ring_full: raw.rx_ring_full,
            fill_ring_empty: raw.rx_fill_ring_empty_descs,
            tx_ring_empty: raw.tx_ring_empty_descs,
        })
    }

    /// Makes the kernel look at the TX ring.
    pub(crate) fn kick_tx(&self) -> io::Result<()> {
        // SAFETY: no buffer and no address are passed.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null(),
                0,
            )
        };
        check(sent as libc::c_int)
    }

    /// Makes the kernel look at the fill ring.
    pub(crate) fn wake_rx(&self) -> io::Result<()> {
        // SAFETY: no buffer and no address are passed.
        let received = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                std::ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
        };
        check(received as libc::c_int)
    }

    fn map_ring<T>(
        &self,
        raw: &libc::xdp_ring_offset,
        size: u32,
        page_offset: u64,
    ) -> io::Result<(Mmap, RingOffsets)> {
        let offsets = RingOffsets {
            producer: raw.producer,
            consumer: raw.consumer,
            flags: raw.flags,
            entries: raw.desc,
        };
        let map =
            Mmap::of_descriptor(self.fd.as_fd(), offsets.mapping_bytes::<T>(size), page_offset)?;
        Ok((map, offsets))
    }

    fn mmap_offsets(&self) -> io::Result<libc::xdp_mmap_offsets> {
        let ring = || libc::xdp_ring_offset { producer: 0, consumer: 0, desc: 0, flags: 0 };
        let mut offsets = libc::xdp_mmap_offsets { rx: ring(), tx: ring(), fr: ring(), cr: ring() };
        // SAFETY: plain integers, any content is valid.
        unsafe { self.option(libc::XDP_MMAP_OFFSETS, &mut offsets) }?;
        Ok(offsets)
    }

    fn set_option<T>(&self, name: libc::c_int, value: &T) -> io::Result<()> {
        // SAFETY: `value` is readable for its whole size during the call.
        check(unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_XDP,
                name,
                std::ptr::from_ref(value).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        })
    }

    /// # Safety
    /// Any bytes that the kernel writes must be a valid `T`.
    unsafe fn option<T>(&self, name: libc::c_int, value: &mut T) -> io::Result<()> {
        let mut len = size_of::<T>() as libc::socklen_t;
        // SAFETY: `value` is writable for `len` bytes, and the caller vouches for the content.
        check(unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_XDP,
                name,
                std::ptr::from_mut(value).cast(),
                &raw mut len,
            )
        })?;
        if len as usize != size_of::<T>() {
            // A kernel older than the structure filled in less of it.
            return Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT));
        }
        Ok(())
    }
}

impl AsFd for Xsk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_asks_for_the_checksum_where_the_kernel_looks() {
        let bytes = TxMetadata { checksum_start: 54, checksum_offset: 6 }.to_bytes();
        assert_eq!(bytes[..8], 2_u64.to_ne_bytes(), "XDP_TXMD_FLAGS_CHECKSUM");
        assert_eq!(bytes[8..10], 54_u16.to_ne_bytes());
        assert_eq!(bytes[10..12], 6_u16.to_ne_bytes());
        assert_eq!(bytes[12..], [0; 12], "no launch time");
        assert_eq!(TxMetadata::LEN % 8, 0, "the kernel wants multiples of 8");
    }
}
