//! Memory that the kernel writes messages into, and that can be given away without a copy.
#![allow(unsafe_code)]

use std::collections::VecDeque;

use bytes::{BufMut as _, BytesMut};

/// Memory given away that is asked whether it is free again, when a slot needs some, at most.
/// The oldest is asked first: applications read in order.
const ASKED_MAX: usize = 2;

/// Slots with memory for one message each.
///
/// ```text
///   prepare ─► pointer to the kernel ─► filled ─► bytes, or take: the message owns the memory
///      ▲                                               │
///      └───────────────────────────────────────────────┘ the memory again, if nobody holds it;
///                                                         else what another slot gave away, or new
/// ```
#[derive(Debug)]
pub(crate) struct ReceiveBuffers {
    slots: Vec<BytesMut>,
    /// Memory that messages were given away in and that was still held when its slot needed some,
    /// oldest first; as many as there are slots at most. Without it each message that is held beyond
    /// a turn would cost an allocation, and the page faults of what the allocator returns to the system.
    lent: VecDeque<BytesMut>,
    size: usize,
}

impl ReceiveBuffers {
    /// `count` slots for messages of at most `size` bytes.
    pub(crate) fn new(count: usize, size: usize) -> Self {
        let slots = (0..count).map(|_| BytesMut::with_capacity(size)).collect();
        Self { slots, lent: VecDeque::with_capacity(count), size }
    }

    /// Forgets the slot's message and makes `size` bytes writable. The pointer is good until this or
    /// [`take`](Self::take) is called for the slot again, wherever the structure moves meanwhile.
    pub(crate) fn prepare(&mut self, slot: usize) -> *mut u8 {
        let Self { slots, lent, size } = self;
        let memory = &mut slots[slot];
        memory.clear();
        if !memory.try_reclaim(*size) {
            let held = std::mem::replace(memory, returned(lent, *size));
            if lent.len() < slots.len() {
                lent.push_back(held);
            }
        }
        slots[slot].chunk_mut().as_mut_ptr()
    }

    /// The kernel has written `len` bytes since [`prepare`](Self::prepare).
    ///
    /// # Safety
    /// It has.
    ///
    /// # Panics
    /// If that is more than there is room for.
    pub(crate) unsafe fn filled(&mut self, slot: usize, len: usize) {
        assert!(len <= self.size, "{len} bytes in a buffer of {}", self.size);
        // SAFETY: `prepare` left no bytes in it and room for `size`; the caller vouches for the
        // first `len` of them.
        unsafe { self.slots[slot].set_len(len) };
    }

    /// The slot's message.
    pub(crate) fn bytes(&self, slot: usize) -> &[u8] {
        &self.slots[slot]
    }

    /// Gives the slot's message away, together with its memory.
    pub(crate) fn take(&mut self, slot: usize) -> BytesMut {
        self.slots[slot].split()
    }
}

/// `size` writable bytes: of `lent`, if nobody holds them any more, or new ones.
fn returned(lent: &mut VecDeque<BytesMut>, size: usize) -> BytesMut {
    for _ in 0..ASKED_MAX.min(lent.len()) {
        let Some(mut memory) = lent.pop_front() else { break };
        if memory.try_reclaim(size) {
            return memory;
        }
        lent.push_back(memory);
    }
    BytesMut::with_capacity(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(buffers: &mut ReceiveBuffers, slot: usize, message: &[u8]) -> *mut u8 {
        let pointer = buffers.prepare(slot);
        // SAFETY: `prepare` made room for `size` bytes there, which the messages do not exceed.
        unsafe { pointer.copy_from_nonoverlapping(message.as_ptr(), message.len()) };
        // SAFETY: just written.
        unsafe { buffers.filled(slot, message.len()) };
        assert_eq!(buffers.bytes(slot), message);
        pointer
    }

    #[test]
    fn memory_comes_back_once_nobody_holds_it() {
        let mut buffers = ReceiveBuffers::new(2, 64);
        let first = receive(&mut buffers, 0, &[1; 64]);
        let mut message = buffers.take(0);
        assert!(buffers.bytes(0).is_empty());
        let part = message.split_to(10).freeze();
        drop(message);
        let second = receive(&mut buffers, 0, &[2; 30]);
        assert_ne!(second, first, "a part is still held");
        assert_eq!(part, [1; 10].as_slice(), "and stays as it was");
        drop(buffers.take(0));
        assert_eq!(receive(&mut buffers, 0, &[3; 64]), second, "nobody holds it");
        assert_eq!(receive(&mut buffers, 0, &[4; 1]), second, "nor after a message that stayed");
        // What one slot gave away serves the other.
        let _held = buffers.take(0);
        let _other = receive(&mut buffers, 1, &[5; 64]);
        let _other_held = buffers.take(1);
        drop(part);
        assert_eq!(receive(&mut buffers, 1, &[6; 64]), first, "the oldest is free again");
    }

    #[test]
    fn what_is_lent_is_bounded_and_never_written_to() {
        let mut buffers = ReceiveBuffers::new(3, 64);
        let mut held = Vec::new();
        for round in 0..50_u8 {
            for slot in 0..3 {
                receive(&mut buffers, slot, &[round; 64]);
                held.push((round, buffers.take(slot)));
            }
        }
        assert_eq!(buffers.lent.len(), 3);
        assert!(held.iter().all(|(round, message)| **message == [*round; 64]));
        held.clear();
        for slot in 0..3 {
            receive(&mut buffers, slot, &[0; 64]);
        }
    }

    #[test]
    #[should_panic(expected = "65 bytes in a buffer of 64")]
    fn more_than_the_room_is_refused() {
        let mut buffers = ReceiveBuffers::new(1, 64);
        buffers.prepare(0);
        // SAFETY: it panics before it believes.
        unsafe { buffers.filled(0, 65) };
    }
}
