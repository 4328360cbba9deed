//! Packet memory: one UMEM per AF_XDP socket, cut into frames of equal size.
//!
//! ```text
//!            take                give_to_tx
//!  ┌──────┐ ──────▶ ┌───────────┐ ─────────▶ ┌────┐
//!  │ free │         │ held:     │            │ tx │ TX ring → device →
//!  └──────┘         │ a `Frame` │            └────┘ completion ring
//!      ▲            └───────────┘               │
//!      │  take_from_rx ▲     │ give_to_fill     │ complete
//!      │               │     ▼                  │
//!      │            ┌───────────┐               │
//!      │            │ fill      │ fill ring → device → RX ring
//!      │            └───────────┘               │
//!      └────────────────────────────────────────┘
//! ```
//! Every frame is in exactly one place. A ledger with one byte per frame records
//! which; each arrow above checks and moves it. The ledger is what makes a token
//! trustworthy: an address that comes back from the kernel becomes a [`Frame`]
//! only if the ledger says that the kernel had that frame, so two tokens for one
//! frame cannot exist and references to frame bytes never meet the kernel's
//! writes. An address that the ledger contradicts is a broken invariant, and
//! the program stops.
#![allow(unsafe_code)]

mod frame;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::mmap::Mmap;
use crate::sys::xsk::Xsk;

pub(crate) use frame::Frame;

/// Who has a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Place {
    /// The free list.
    Free,
    /// Userspace, as a [`Frame`].
    Held,
    /// The kernel, to receive into: fill ring, device or RX ring.
    Fill,
    /// The kernel, to send: TX ring, device or completion ring.
    Tx,
}

const PLACES: usize = 4;

/// How many frames are where; the sum is the number of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Census {
    /// In the free list.
    pub(crate) free: u32,
    /// In userspace's hands.
    pub(crate) held: u32,
    /// With the kernel for receiving.
    pub(crate) fill: u32,
    /// With the kernel for sending.
    pub(crate) tx: u32,
}

/// Memory for packets, shared with the kernel frame by frame.
#[derive(Debug)]
pub(crate) struct Umem {
    memory: Mmap,
    id: u32,
    frame_size_bytes: u32,
    /// Where each frame is.
    ledger: Box<[Place]>,
    /// Frames per place: the ledger, counted.
    counts: [u32; PLACES],
    /// The free frames, last in first out: the warmest in cache leaves first.
    free: Vec<u32>,
}

impl Umem {
    /// Allocates `frame_count` frames of `frame_size_bytes`, all free.
    ///
    /// # Panics
    /// If the frame size is not a power of two: the kernel's aligned mode wants that.
    pub(crate) fn new(frame_size_bytes: u32, frame_count: u32) -> io::Result<Self> {
        static NEXT_ID: AtomicU32 = AtomicU32::new(0);
        assert!(frame_size_bytes.is_power_of_two(), "frames of {frame_size_bytes} bytes");
        let memory = Mmap::anonymous(frame_size_bytes as usize * frame_count as usize)?;
        let mut counts = [0; PLACES];
        counts[Place::Free as usize] = frame_count;
        Ok(Self {
            memory,
            // Relaxed: only distinctness matters.
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            frame_size_bytes,
            ledger: vec![Place::Free; frame_count as usize].into_boxed_slice(),
            counts,
            free: (0..frame_count).rev().collect(),
        })
    }

    /// Gives the memory to the kernel (`XDP_UMEM_REG`).
    pub(crate) fn register(&self, socket: &Xsk, tx_metadata_bytes: u32) -> io::Result<()> {
        // SAFETY: references to a frame come from its token only (`bytes`,
        // `bytes_mut`), and no token exists while the kernel has the frame: see the ledger.
        unsafe { socket.register_umem(&self.memory, self.frame_size_bytes, tx_metadata_bytes) }
    }

    /// Size of a frame in bytes.
    pub(crate) fn frame_size_bytes(&self) -> u32 {
        self.frame_size_bytes
    }

    /// Number of free frames.
    pub(crate) fn free_count(&self) -> u32 {
        self.free.len() as u32
    }

    /// A free frame, if there is one.
    pub(crate) fn take(&mut self) -> Option<Frame> {
        let index = self.free.pop()?;
        self.move_frame(index, Place::Free, Place::Held);
        Some(Frame::new(index, self.id))
    }

    /// Makes a frame free again.
    #[cfg(test)]
    pub(crate) fn put(&mut self, frame: Frame) {
        let index = self.own_index(&frame);
        self.move_frame(index, Place::Held, Place::Free);
        self.free.push(index);
    }

    /// Gives a frame to the kernel to receive into; the address is for the fill ring.
    pub(crate) fn give_to_fill(&mut self, frame: Frame) -> u64 {
        let index = self.own_index(&frame);
        self.move_frame(index, Place::Held, Place::Fill);
        self.address_of(index)
    }

    /// Takes a frame out of the RX ring: its token, and the offset of `address` within the frame.
    ///
    /// # Panics
    /// If the kernel did not have that frame for receiving.
    pub(crate) fn take_from_rx(&mut self, address: u64) -> (Frame, u32) {
        let (index, offset) = self.locate(address);
        self.move_frame(index, Place::Fill, Place::Held);
        (Frame::new(index, self.id), offset)
    }

    /// Gives a frame to the kernel to send; the address of its first byte is for the TX ring.
    pub(crate) fn give_to_tx(&mut self, frame: Frame) -> u64 {
        let index = self.own_index(&frame);
        self.move_frame(index, Place::Held, Place::Tx);
        self.address_of(index)
    }

    /// Takes a sent frame out of the completion ring and makes it free.
    ///
    /// # Panics
    /// If the kernel did not have that frame for sending.
    pub(crate) fn complete(&mut self, address: u64) {
        let (index, _) = self.locate(address);
        self.move_frame(index, Place::Tx, Place::Free);
        self.free.push(index);
    }

    /// The bytes of a held frame.
    pub(crate) fn bytes(&self, frame: &Frame) -> &[u8] {
        let start = self.start_of(self.own_index(frame));
        // SAFETY: inside the mapping, initialised (zeroed by the kernel), and not
        // written meanwhile: the token says that the kernel does not have the
        // frame, and `&self` excludes `bytes_mut`.
        unsafe { std::slice::from_raw_parts(start, self.frame_size_bytes as usize) }
    }

    /// The bytes of a held frame, to write.
    pub(crate) fn bytes_mut(&mut self, frame: &mut Frame) -> &mut [u8] {
        let start = self.start_of(self.own_index(frame));
        // SAFETY: as for `bytes`; `&mut self` excludes every other reference.
        unsafe { std::slice::from_raw_parts_mut(start, self.frame_size_bytes as usize) }
    }

    /// Where the frames are.
    pub(crate) fn census(&self) -> Census {
        let at = |place: Place| self.counts[place as usize];
        Census {
            free: at(Place::Free),
            held: at(Place::Held),
            fill: at(Place::Fill),
            tx: at(Place::Tx),
        }
    }

    /// Checks that no frame is lost: `held` tokens are out, and all other frames are accounted for.
    ///
    /// # Panics
    /// If a token was dropped, or the books do not add up.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn assert_conserved(&self, held: u32) {
        let census = self.census();
        let sum = census.free + census.held + census.fill + census.tx;
        assert_eq!(sum as usize, self.ledger.len(), "frames do not add up: {census:?}");
        assert_eq!(census.free, self.free_count(), "free list and ledger differ: {census:?}");
        assert_eq!(census.held, held, "frame tokens were lost or leaked: {census:?}");
    }

    fn move_frame(&mut self, index: u32, from: Place, to: Place) {
        let place = &mut self.ledger[index as usize];
        assert_eq!(*place, from, "frame {index} was to move from {from:?} to {to:?}");
        *place = to;
        self.counts[from as usize] -= 1;
        self.counts[to as usize] += 1;
    }

    fn own_index(&self, frame: &Frame) -> u32 {
        assert_eq!(frame.umem(), self.id, "{frame:?} belongs to another UMEM");
        frame.index()
    }

    fn locate(&self, address: u64) -> (u32, u32) {
        let size = u64::from(self.frame_size_bytes);
        let index = address / size;
        assert!(index < self.ledger.len() as u64, "address {address:#x} outside the UMEM");
        (index as u32, (address % size) as u32)
    }

    fn address_of(&self, index: u32) -> u64 {
        u64::from(index) * u64::from(self.frame_size_bytes)
    }

    fn start_of(&self, index: u32) -> *mut u8 {
        let offset = self.address_of(index) as usize;
        debug_assert!(offset + self.frame_size_bytes as usize <= self.memory.len());
        // SAFETY: tokens carry indices below the frame count, so the frame lies inside the mapping.
        unsafe { self.memory.start().add(offset) }.as_ptr()
    }

    /// What a device does: writes into a frame that the kernel has.
    #[cfg(test)]
    pub(crate) fn write_as_kernel(&mut self, address: u64, bytes: &[u8]) {
        let (index, offset) = self.locate(address);
        assert_eq!(self.ledger[index as usize], Place::Fill, "the kernel writes to its own frames");
        assert!(offset as usize + bytes.len() <= self.frame_size_bytes as usize);
        // SAFETY: inside the frame; `&mut self`, so no reference to frame bytes exists.
        unsafe {
            let target = self.start_of(index).add(offset as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
    }

    /// What a device does: reads from a frame that the kernel sends.
    #[cfg(test)]
    pub(crate) fn read_as_kernel(&self, address: u64, len: usize) -> Vec<u8> {
        let (index, offset) = self.locate(address);
        assert_eq!(self.ledger[index as usize], Place::Tx, "the kernel reads its own frames");
        assert!(offset as usize + len <= self.frame_size_bytes as usize);
        // SAFETY: inside the frame, which nobody writes: no token for it exists.
        unsafe {
            std::slice::from_raw_parts(self.start_of(index).add(offset as usize), len).to_vec()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn umem() -> Umem {
        Umem::new(2048, 4).expect("8 kB of memory")
    }

    #[test]
    fn frames_run_out_and_come_back() {
        let mut umem = umem();
        let frames: Vec<_> = std::iter::from_fn(|| umem.take()).collect();
        assert_eq!(frames.len(), 4);
        assert_eq!(umem.census(), Census { held: 4, ..Census::default() });
        for frame in frames {
            umem.put(frame);
        }
        assert_eq!(umem.free_count(), 4);
        umem.assert_conserved(0);
    }

    #[test]
    fn a_frame_goes_round_by_both_ways() {
        let mut umem = umem();
        let frame = umem.take().expect("free");
        let address = umem.give_to_fill(frame);
        assert_eq!(umem.census().fill, 1);
        umem.write_as_kernel(address + 256, b"packet");
        let (frame, offset) = umem.take_from_rx(address + 256);
        assert_eq!(offset, 256);
        assert_eq!(&umem.bytes(&frame)[256..262], b"packet");
        umem.put(frame);

        let mut frame = umem.take().expect("free");
        umem.bytes_mut(&mut frame)[..5].copy_from_slice(b"reply");
        let address = umem.give_to_tx(frame);
        assert_eq!(umem.read_as_kernel(address, 5), b"reply");
        umem.complete(address + 24);
        umem.assert_conserved(0);
    }

    #[test]
    #[should_panic(expected = "from Fill to Held")]
    fn an_address_that_the_kernel_never_had_stops_the_program() {
        let _ = umem().take_from_rx(2048);
    }

    #[test]
    #[should_panic(expected = "from Tx to Free")]
    fn a_second_completion_of_one_frame_stops_the_program() {
        let mut umem = umem();
        let frame = umem.take().expect("free");
        let address = umem.give_to_tx(frame);
        umem.complete(address);
        umem.complete(address);
    }

    #[test]
    #[should_panic(expected = "outside the UMEM")]
    fn an_address_outside_stops_the_program() {
        umem().complete(4 * 2048);
    }

    #[test]
    #[should_panic(expected = "another UMEM")]
    fn a_foreign_frame_is_refused() {
        let frame = umem().take().expect("free");
        umem().put(frame);
    }

    #[test]
    #[should_panic(expected = "lost or leaked")]
    fn a_dropped_token_is_found() {
        let mut umem = umem();
        let _lost = umem.take();
        umem.assert_conserved(0);
    }
}
