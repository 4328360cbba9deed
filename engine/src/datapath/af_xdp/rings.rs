//! The four rings of one AF_XDP socket, in terms of frames.
//!
//! ```text
//!              userspace                         kernel and device
//!   ┌──────────────────────────┐  fill ring   ┌────────────────────────┐
//!   │ empty frames for receive │ ───────────▶ │ device writes packets  │
//!   │                          │   RX ring    │          │             │
//!   │ packets to read          │ ◀─────────── │ ◀────────┘             │
//!   ├──────────────────────────┤              ├────────────────────────┤
//!   │ packets to send          │ ───────────▶ │ device reads packets   │
//!   │                          │   TX ring    │          │             │
//!   │ frames free again        │ ◀─────────── │ ◀────────┘             │
//!   └──────────────────────────┘  completion  └────────────────────────┘
//! ```
//! Who owns a frame when:
//!
//! | frame is in | owner | ledger |
//! |---|---|---|
//! | the free list | userspace | free |
//! | a token: RX packet being read, TX packet being written | userspace | held |
//! | the fill ring, the device's receive ring, the RX ring until popped | kernel | fill |
//! | the TX ring, the device's transmit ring, the completion ring until popped | kernel | tx |
//!
//! A frame changes hands in the ledger when it is written to or read from a ring;
//! the kernel learns of it at the next `commit`, which is later and therefore safe.
//! Fill and TX are ours to produce, RX and completion ours to consume.
//!
//! The fill ring has two entries for every frame of the receive side, so it can
//! never be full when a frame goes back. One would not do: the kernel's copy mode
//! publishes a batch of packets on the RX ring first and gives back the fill
//! entries of that batch after (`xsk_flush`), and a fast receiver is in between.

use crate::sys::cursor::{Consumer, Producer};
use crate::sys::xsk::{Descriptor, MappedRings, PACKET_CONTINUES};
use crate::umem::{Frame, Umem};

/// Part of a received packet: a whole one, unless the packet spans several frames.
#[derive(Debug)]
pub(super) struct RxFragment {
    /// The frame, now userspace's.
    pub(super) frame: Frame,
    /// First byte of the packet in the frame.
    pub(super) offset: u32,
    /// Length in bytes.
    pub(super) len: u32,
    /// Whether the packet goes on in the next fragment.
    pub(super) continues: bool,
}

/// The userspace ends of a socket's rings.
#[derive(Debug)]
pub(super) struct Rings {
    fill: Producer<u64>,
    completion: Consumer<u64>,
    rx: Consumer<Descriptor>,
    tx: Producer<Descriptor>,
}

impl Rings {
    /// The rings of a socket, all empty.
    pub(super) fn new(mapped: MappedRings) -> Self {
        Self { fill: mapped.fill, completion: mapped.completion, rx: mapped.rx, tx: mapped.tx }
    }

    /// Gives a frame to the kernel to receive into, with the next [`commit_fill`](Self::commit_fill).
    ///
    /// # Panics
    /// If the fill ring is full: it has two entries for every receive frame.
    pub(super) fn push_fill(&mut self, umem: &mut Umem, frame: Frame) {
        assert!(self.fill.room(1) > 0, "the fill ring has two entries for every receive frame");
        self.fill.push(umem.give_to_fill(frame));
    }

    /// Publishes the frames given; whether the kernel must be woken to see them.
    pub(super) fn commit_fill(&mut self) -> bool {
        self.fill.commit() && self.fill.needs_wakeup()
    }

    /// The next fragment received.
    pub(super) fn pop_rx(&mut self, umem: &mut Umem) -> Option<RxFragment> {
        let descriptor = self.rx.pop()?;
        let (frame, offset) = umem.take_from_rx(descriptor.addr);
        assert!(
            offset.checked_add(descriptor.len).is_some_and(|end| end <= umem.frame_size_bytes()),
            "received packet exceeds its frame: {descriptor:?}"
        );
        Some(RxFragment {
            frame,
            offset,
            len: descriptor.len,
            continues: descriptor.options & PACKET_CONTINUES != 0,
        })
    }

    /// Gives the RX ring's entries that were popped back to the kernel.
    pub(super) fn release_rx(&mut self) {
        self.rx.release();
    }

    /// Makes the frames of all completed packets free; how many those were.
    pub(super) fn drain_completions(&mut self, umem: &mut Umem) -> u32 {
        let mut count = 0;
        while let Some(address) = self.completion.pop() {
            umem.complete(address);
            count += 1;
        }
        self.completion.release();
        count
    }

    /// Number of descriptors that can be pushed to the TX ring; looks at the
    /// shared index only if fewer than `wanted` are known to be free.
    pub(super) fn tx_room(&mut self, wanted: u32) -> u32 {
        self.tx.room(wanted)
    }

    /// Number of descriptors that can certainly be pushed to the TX ring.
    pub(super) fn tx_room_known(&self) -> u32 {
        self.tx.room_known()
    }

    /// Sends `len` bytes from `offset` of a frame, with the next [`commit_tx`](Self::commit_tx).
    ///
    /// # Panics
    /// If the TX ring is full: ask [`tx_room`](Self::tx_room) first.
    pub(super) fn push_tx(
        &mut self,
        umem: &mut Umem,
        frame: Frame,
        offset: u32,
        len: u32,
        options: u32,
    ) {
        assert!(offset + len <= umem.frame_size_bytes(), "sent packet exceeds its frame");
        let addr = umem.give_to_tx(frame) + u64::from(offset);
        self.tx.push(Descriptor { addr, len, options });
    }

    /// Publishes the descriptors pushed; whether there were any.
    pub(super) fn commit_tx(&mut self) -> bool {
        self.tx.commit()
    }

    /// Number of published descriptors that the kernel has not taken yet.
    pub(super) fn tx_unconsumed(&mut self) -> u32 {
        self.tx.unconsumed()
    }

    /// Whether the kernel takes descriptors only after a kick.
    pub(super) fn tx_needs_wakeup(&self) -> bool {
        self.tx.needs_wakeup()
    }
}

/// The kernel's ends of the four rings, in memory: what the tests use for a device.
#[cfg(all(test, not(stoq_loom)))]
pub(super) mod kernel_end {
    use super::*;
    use crate::sys::cursor::ring_in_memory;
    use crate::sys::xsk::RingSizes;

    /// Bytes that the kernel leaves free in front of a received packet (`XDP_PACKET_HEADROOM`).
    const HEADROOM_BYTES: u64 = 256;

    pub(in super::super) struct KernelEnd {
        pub(in super::super) fill: Consumer<u64>,
        pub(in super::super) completion: Producer<u64>,
        pub(in super::super) rx: Producer<Descriptor>,
        pub(in super::super) tx: Consumer<Descriptor>,
    }

    /// Rings whose indices start at `start`, and the kernel's ends of them.
    pub(in super::super) fn rings(sizes: RingSizes, start: u32) -> (Rings, KernelEnd) {
        let (fill, kernel_fill) = ring_in_memory(sizes.fill, start);
        let (kernel_completion, completion) = ring_in_memory(sizes.completion, start);
        let (kernel_rx, rx) = ring_in_memory(sizes.rx, start);
        let (tx, kernel_tx) = ring_in_memory(sizes.tx, start);
        let kernel = KernelEnd {
            fill: kernel_fill,
            completion: kernel_completion,
            rx: kernel_rx,
            tx: kernel_tx,
        };
        (Rings { fill, completion, rx, tx }, kernel)
    }

    impl KernelEnd {
        /// Receives a packet, given as the contents of consecutive frames; false if a ring had no room.
        pub(in super::super) fn receive(&mut self, umem: &mut Umem, parts: &[&[u8]]) -> bool {
            if (self.rx.room(parts.len() as u32) as usize) < parts.len() {
                return false;
            }
            for (position, part) in parts.iter().enumerate() {
                let Some(base) = self.fill.pop() else { return false };
                let addr = base + HEADROOM_BYTES;
                umem.write_as_kernel(addr, part);
                let options = if position + 1 < parts.len() { PACKET_CONTINUES } else { 0 };
                self.rx.push(Descriptor { addr, len: part.len() as u32, options });
            }
            self.fill.release();
            self.rx.commit();
            true
        }

        /// Sends up to `limit` descriptors: each packet's bytes and options.
        pub(in super::super) fn send(&mut self, umem: &Umem, limit: usize) -> Vec<(Vec<u8>, u32)> {
            let mut sent = Vec::new();
            while sent.len() < limit && self.completion.room(1) > 0 {
                let Some(descriptor) = self.tx.pop() else { break };
                let bytes = umem.read_as_kernel(descriptor.addr, descriptor.len as usize);
                sent.push((bytes, descriptor.options));
                self.completion.push(descriptor.addr);
            }
            self.tx.release();
            self.completion.commit();
            sent
        }
    }
}

#[cfg(all(test, not(stoq_loom)))]
mod tests {
    use super::kernel_end::rings;
    use super::*;
    use crate::sys::xsk::RingSizes;

    const SIZES: RingSizes = RingSizes { fill: 8, completion: 4, rx: 4, tx: 4 };

    fn fill_all(rings: &mut Rings, umem: &mut Umem, count: usize) {
        for _ in 0..count {
            let frame = umem.take().expect("a free frame");
            rings.push_fill(umem, frame);
        }
        rings.commit_fill();
    }

    #[test]
    fn received_frames_come_back_and_are_conserved() {
        let mut umem = Umem::new(2048, 8).expect("memory");
        let (mut rings, mut kernel) = rings(SIZES, u32::MAX - 2);
        fill_all(&mut rings, &mut umem, 8);
        for round in 0..20_u8 {
            assert!(kernel.receive(&mut umem, &[&[round; 100]]));
            assert!(kernel.receive(&mut umem, &[&[round; 50], &[round + 1; 20]]));
            let mut lens = Vec::new();
            while let Some(fragment) = rings.pop_rx(&mut umem) {
                lens.push((fragment.len, fragment.continues));
                let start = fragment.offset as usize;
                assert!(umem.bytes(&fragment.frame)[start] >= round);
                rings.push_fill(&mut umem, fragment.frame);
            }
            rings.release_rx();
            rings.commit_fill();
            assert_eq!(lens, [(100, false), (50, true), (20, false)]);
            umem.assert_conserved(0);
        }
        assert_eq!(umem.census().fill, 8);
    }

    #[test]
    fn a_full_rx_ring_stops_the_kernel_not_us() {
        let mut umem = Umem::new(2048, 8).expect("memory");
        let (mut rings, mut kernel) = rings(SIZES, 0);
        fill_all(&mut rings, &mut umem, 8);
        for _ in 0..4 {
            assert!(kernel.receive(&mut umem, &[b"x"]));
        }
        assert!(!kernel.receive(&mut umem, &[b"x"]), "four entries, four packets");
        let fragment = rings.pop_rx(&mut umem).expect("a packet");
        rings.push_fill(&mut umem, fragment.frame);
        rings.release_rx();
        assert!(kernel.receive(&mut umem, &[b"x"]));
    }

    #[test]
    fn sent_frames_are_free_only_after_completion() {
        let mut umem = Umem::new(2048, 4).expect("memory");
        let (mut rings, mut kernel) = rings(SIZES, u32::MAX - 1);
        for round in 0..10_u8 {
            for entry in 0..4 {
                assert!(rings.tx_room(1) > 0);
                let mut frame = umem.take().expect("free");
                umem.bytes_mut(&mut frame)[24..28].copy_from_slice(&[round, entry, 0, 0]);
                rings.push_tx(&mut umem, frame, 24, 4, 0);
            }
            assert!(rings.commit_tx());
            assert_eq!(rings.tx_room(1), 0);
            assert!(umem.take().is_none(), "all four are with the kernel");
            assert_eq!(rings.drain_completions(&mut umem), 0);
            assert_eq!(kernel.send(&umem, 3).len(), 3);
            assert_eq!(rings.tx_unconsumed(), 1);
            assert_eq!(rings.drain_completions(&mut umem), 3);
            assert_eq!(kernel.send(&umem, 3), [(vec![round, 3, 0, 0], 0)]);
            assert_eq!(rings.drain_completions(&mut umem), 1);
            umem.assert_conserved(0);
        }
    }

    #[test]
    fn the_fill_ring_asks_for_a_wake_up_only_when_it_got_something() {
        let mut umem = Umem::new(2048, 8).expect("memory");
        let (mut rings, kernel) = rings(SIZES, 0);
        kernel.fill.set_need_wakeup(true);
        assert!(!rings.commit_fill(), "nothing new");
        let frame = umem.take().expect("free");
        rings.push_fill(&mut umem, frame);
        assert!(rings.commit_fill());
    }

    #[test]
    fn frames_go_back_before_the_kernel_gives_up_their_fill_entries() {
        let mut umem = Umem::new(2048, 4).expect("memory");
        let (mut rings, mut kernel) = rings(SIZES, 0);
        fill_all(&mut rings, &mut umem, 4);
        for _ in 0..10 {
            // A batch of all frames, published before the fill entries are released.
            while let Some(addr) = kernel.fill.pop() {
                kernel.rx.push(Descriptor { addr: addr + 256, len: 1, options: 0 });
            }
            kernel.rx.commit();
            while let Some(fragment) = rings.pop_rx(&mut umem) {
                rings.push_fill(&mut umem, fragment.frame);
            }
            rings.release_rx();
            rings.commit_fill();
            kernel.fill.release();
            assert_eq!(kernel.rx.room(4), 4);
            umem.assert_conserved(0);
        }
    }

    #[test]
    #[should_panic(expected = "exceeds its frame")]
    fn a_descriptor_beyond_its_frame_stops_the_program() {
        let mut umem = Umem::new(2048, 8).expect("memory");
        let (mut rings, mut kernel) = rings(SIZES, 0);
        fill_all(&mut rings, &mut umem, 1);
        let addr = kernel.fill.pop().expect("one frame") + 256;
        kernel.rx.push(Descriptor { addr, len: 2048, options: 0 });
        kernel.rx.commit();
        let _ = rings.pop_rx(&mut umem);
    }
}
