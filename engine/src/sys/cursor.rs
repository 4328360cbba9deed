//! The two cursors of a single-producer, single-consumer ring in shared memory.
//!
//! ```text
//!             consumer            producer
//!                │                   │
//!   ┌───┬───┬───┬▼──┬───┬───┬───┬───┬▼──┬───┐   entry of index i: i & (size − 1)
//!   │   │   │   │███│███│███│███│███│   │   │   size: a power of two
//!   └───┴───┴───┴───┴───┴───┴───┴───┴───┴───┘
//!    free       published            free
//! ```
//! Both indices run freely through `u32` and wrap; `producer − consumer` is the
//! number of published entries and never exceeds the size. Each index has one
//! writer. A [`Producer`] writes entries ahead of its published index and
//! publishes them together ([`Producer::commit`]); a [`Consumer`] reads entries
//! behind the producer's index and gives them back together
//! ([`Consumer::release`]). Each end keeps a copy of the other's index and looks
//! at the shared one only when the copy says "not enough", so a batch costs one
//! cache-line transfer, not one per entry.
//!
//! Orderings, which are those of the kernel's `net/xdp/xsk_queue.h`:
//! * `commit` stores the producer index with **release**: entries become
//!   visible before the index that covers them.
//! * the consumer loads the producer index with **acquire**: it reads entries
//!   only after it has seen the index.
//! * `release` stores the consumer index with **release**: all reads of an
//!   entry are over before the producer may write it again.
//! * the producer loads the consumer index with **acquire**: its writes do not
//!   move ahead of that.
//!
//! With `--cfg stoq_loom` the atomics and cells are loom's and the tests named
//! `loom_*` try every interleaving.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

#[cfg(stoq_loom)]
use loom::cell::UnsafeCell;
#[cfg(stoq_loom)]
use loom::sync::atomic::{AtomicU32, Ordering, fence};
#[cfg(not(stoq_loom))]
use std::cell::UnsafeCell;
#[cfg(not(stoq_loom))]
use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::mmap::Mmap;

/// `XDP_RING_NEED_WAKEUP`: the kernel sleeps until a system call wakes it (Linux ≥ 5.4).
const NEED_WAKEUP: u32 = libc::XDP_RING_NEED_WAKEUP;

/// One entry of a ring: written by the producer's side, read by the consumer's.
#[repr(transparent)]
struct Slot<T>(UnsafeCell<T>);

impl<T: Copy> Slot<T> {
    /// # Safety
    /// The entry must be published and not yet released.
    unsafe fn read(&self) -> T {
        #[cfg(not(stoq_loom))]
        // SAFETY: the producer does not write a published entry.
        let value = unsafe { *self.0.get() };
        #[cfg(stoq_loom)]
        // SAFETY: as above; loom checks it.
        let value = self.0.with(|entry| unsafe { *entry });
        value
    }

    /// # Safety
    /// The entry must be free: released, and not yet published again.
    unsafe fn write(&self, value: T) {
        #[cfg(not(stoq_loom))]
        // SAFETY: the consumer does not read a free entry.
        unsafe {
            *self.0.get() = value;
        }
        #[cfg(stoq_loom)]
        // SAFETY: as above; loom checks it.
        self.0.with_mut(|entry| unsafe { *entry = value });
    }
}

/// What keeps a ring's memory alive. The pointers of [`Shared`] point into it.
enum Backing<T> {
    Kernel(#[expect(dead_code, reason = "held for its Drop")] Mmap),
    #[cfg(any(test, stoq_loom))]
    Memory(Box<MemoryRing<T>>),
    #[cfg(not(any(test, stoq_loom)))]
    #[expect(dead_code, reason = "names T where there is no ring in memory")]
    Never(std::convert::Infallible, std::marker::PhantomData<T>),
}

/// A ring in plain memory, for tests in which both ends are ours.
#[cfg(any(test, stoq_loom))]
struct MemoryRing<T> {
    producer: AtomicU32,
    consumer: AtomicU32,
    flags: AtomicU32,
    slots: Box<[Slot<T>]>,
}

/// Where the parts of a ring lie.
struct Shared<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    slots: NonNull<Slot<T>>,
    size: u32,
    _backing: Arc<Backing<T>>,
}

// SAFETY: an end is used by one thread at a time (`&mut self`), the other end
// runs elsewhere by design, and all they share is synchronised by the indices.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T: Copy> Shared<T> {
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: points into `_backing`, which lives as long as `self`; only ever accessed atomically.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as for `producer`.
        unsafe { self.consumer.as_ref() }
    }

    fn flags(&self) -> &AtomicU32 {
        // SAFETY: as for `producer`.
        unsafe { self.flags.as_ref() }
    }

    fn slot(&self, index: u32) -> &Slot<T> {
        let position = (index & (self.size - 1)) as usize;
        // SAFETY: `position` < `size`, and `slots` points to `size` entries inside `_backing`.
        unsafe { self.slots.add(position).as_ref() }
    }

    fn needs_wakeup(&self) -> bool {
        // The publication of our entries must be visible before we look at the
        // flag: the kernel sets the flag and then looks at the index once more.
        // Release alone lets the load pass the store, and both sides would wait.
        fence(Ordering::SeqCst);
        // Relaxed: the flag carries no data, only the advice to make a system call.
        self.flags().load(Ordering::Relaxed) & NEED_WAKEUP != 0
    }
}

/// Where the kernel put the parts of a ring, in bytes from the start of its mapping.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RingOffsets {
    /// The producer index.
    pub(crate) producer: u64,
    /// The consumer index.
    pub(crate) consumer: u64,
    /// The flags word.
    pub(crate) flags: u64,
    /// The first entry.
    pub(crate) entries: u64,
}

impl RingOffsets {
    /// Length in bytes of a mapping that holds a ring of `size` entries of type `T`.
    pub(crate) fn mapping_bytes<T>(&self, size: u32) -> usize {
        self.entries as usize + size as usize * size_of::<T>()
    }
}

fn shared_with_kernel<T>(map: Mmap, offsets: &RingOffsets, size: u32) -> Shared<T> {
    if cfg!(stoq_loom) {
        unreachable!("loom models rings in memory only: its atomics are not plain integers");
    }
    assert!(size.is_power_of_two(), "a ring of {size} entries: not a power of two");
    assert!(offsets.mapping_bytes::<T>(size) <= map.len(), "the ring exceeds its mapping");
    let index_end = map.len() - size_of::<u32>();
    let at = |offset: u64| {
        assert!(offset as usize <= index_end && offset.is_multiple_of(4), "ring offset {offset}");
        // SAFETY: inside the mapping, as just checked.
        unsafe { map.start().add(offset as usize) }
    };
    assert!(offsets.entries.is_multiple_of(align_of::<T>() as u64), "entries out of alignment");
    Shared {
        producer: at(offsets.producer).cast(),
        consumer: at(offsets.consumer).cast(),
        flags: at(offsets.flags).cast(),
        slots: at(offsets.entries).cast(),
        size,
        _backing: Arc::new(Backing::Kernel(map)),
    }
}

/// Both ends of a ring in plain memory whose indices start at `start`.
#[cfg(any(test, stoq_loom))]
pub(crate) fn ring_in_memory<T: Copy + Default>(
    size: u32,
    start: u32,
) -> (Producer<T>, Consumer<T>) {
    assert!(size.is_power_of_two());
    let ring = Arc::new(Backing::Memory(Box::new(MemoryRing {
        producer: AtomicU32::new(start),
        consumer: AtomicU32::new(start),
        flags: AtomicU32::new(0),
        slots: (0..size).map(|_| Slot(UnsafeCell::new(T::default()))).collect(),
    })));
    let share = || {
        let Backing::Memory(memory) = &*ring else { unreachable!("made above") };
        Shared {
            producer: NonNull::from(&memory.producer),
            consumer: NonNull::from(&memory.consumer),
            flags: NonNull::from(&memory.flags),
            slots: NonNull::from(&memory.slots[..]).cast(),
            size,
            _backing: Arc::clone(&ring),
        }
    };
    (Producer::over(share()), Consumer::over(share()))
}

/// The end that writes entries.
pub(crate) struct Producer<T> {
    shared: Shared<T>,
    /// Index of the next entry to write.
    next: u32,
    /// Index up to which entries are published.
    published: u32,
    /// The consumer index when we last looked: the true one may be further.
    consumer_seen: u32,
}

impl<T: Copy> Producer<T> {
    /// The producing end of a ring that the kernel consumes.
    ///
    /// # Safety
    /// `map` must be a kernel ring of `size` entries of type `T` with its parts
    /// at `offsets`, and no other producer may exist for it.
    pub(crate) unsafe fn from_kernel(map: Mmap, offsets: &RingOffsets, size: u32) -> Self {
        Self::over(shared_with_kernel(map, offsets, size))
    }

    fn over(shared: Shared<T>) -> Self {
        // Relaxed: nobody has used the ring yet; the producer index is ours.
        let next = shared.producer().load(Ordering::Relaxed);
        // Acquire: as in `look_at_consumer`.
        let consumer_seen = shared.consumer().load(Ordering::Acquire);
        Self { shared, next, published: next, consumer_seen }
    }

    /// Number of entries that can be written now. Looks at the shared index
    /// only if fewer than `wanted` are known to be free.
    pub(crate) fn room(&mut self, wanted: u32) -> u32 {
        let room = self.room_known();
        if room >= wanted {
            return room;
        }
        self.look_at_consumer();
        self.room_known()
    }

    /// Number of entries that can certainly be written, by what was last seen.
    pub(crate) fn room_known(&self) -> u32 {
        self.shared.size - self.next.wrapping_sub(self.consumer_seen)
    }

    /// Writes one entry; the other end sees it after [`commit`](Self::commit).
    ///
    /// # Panics
    /// If the ring is full: ask [`room`](Self::room) first.
    pub(crate) fn push(&mut self, value: T) {
        assert!(self.room_known() > 0, "push into a full ring");
        // SAFETY: `next` is at most `size − 1` ahead of the consumer: the entry is free.
        unsafe { self.shared.slot(self.next).write(value) };
        self.next = self.next.wrapping_add(1);
    }

    /// Publishes all entries written since the last call; whether there were any.
    pub(crate) fn commit(&mut self) -> bool {
        if self.next == self.published {
            return false;
        }
        self.published = self.next;
        // Release: the entries become visible before the index that covers them.
        self.shared.producer().store(self.published, Ordering::Release);
        true
    }

    /// Number of published entries that the other end has not taken yet.
    pub(crate) fn unconsumed(&mut self) -> u32 {
        self.look_at_consumer();
        self.published.wrapping_sub(self.consumer_seen)
    }

    /// Whether the kernel asks for a system call before it goes on.
    pub(crate) fn needs_wakeup(&self) -> bool {
        self.shared.needs_wakeup()
    }

    fn look_at_consumer(&mut self) {
        // Acquire: our next writes stay behind the consumer's last reads.
        self.consumer_seen = self.shared.consumer().load(Ordering::Acquire);
        let used = self.next.wrapping_sub(self.consumer_seen);
        assert!(used <= self.shared.size, "the consumer index overtook the producer's");
    }
}

/// The end that reads entries.
pub(crate) struct Consumer<T> {
    shared: Shared<T>,
    /// Index of the next entry to read.
    next: u32,
    /// Index up to which entries were given back.
    released: u32,
    /// The producer index when we last looked: the true one may be further.
    producer_seen: u32,
}

impl<T: Copy> Consumer<T> {
    /// The consuming end of a ring that the kernel produces.
    ///
    /// # Safety
    /// As for [`Producer::from_kernel`], with one consumer.
    pub(crate) unsafe fn from_kernel(map: Mmap, offsets: &RingOffsets, size: u32) -> Self {
        Self::over(shared_with_kernel(map, offsets, size))
    }

    fn over(shared: Shared<T>) -> Self {
        // Relaxed: nobody has used the ring yet; the consumer index is ours.
        let next = shared.consumer().load(Ordering::Relaxed);
        Self { shared, next, released: next, producer_seen: next }
    }

    /// Reads the next entry, if one is published. It stays occupied until [`release`](Self::release).
    pub(crate) fn pop(&mut self) -> Option<T> {
        if self.next == self.producer_seen {
            self.look_at_producer();
            if self.next == self.producer_seen {
                return None;
            }
        }
        // SAFETY: `next` is behind the producer's index and not yet released.
        let value = unsafe { self.shared.slot(self.next).read() };
        self.next = self.next.wrapping_add(1);
        Some(value)
    }

    /// Gives all entries read so far back to the producer.
    pub(crate) fn release(&mut self) {
        if self.next == self.released {
            return;
        }
        self.released = self.next;
        // Release: our reads are over before the producer may write the entries again.
        self.shared.consumer().store(self.released, Ordering::Release);
    }

    fn look_at_producer(&mut self) {
        // Acquire: our reads of entries stay behind the index that covers them.
        self.producer_seen = self.shared.producer().load(Ordering::Acquire);
        let ready = self.producer_seen.wrapping_sub(self.released);
        assert!(ready <= self.shared.size, "the producer index overtook the consumer's");
    }

    /// What the kernel does on the rings that it consumes: asks for a wake-up, or no longer.
    #[cfg(test)]
    pub(crate) fn set_need_wakeup(&self, need: bool) {
        self.shared.flags().store(if need { NEED_WAKEUP } else { 0 }, Ordering::SeqCst);
    }
}

impl<T> fmt::Debug for Producer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("size", &self.shared.size)
            .field("next", &self.next)
            .field("published", &self.published)
            .field("consumer_seen", &self.consumer_seen)
            .finish()
    }
}

impl<T> fmt::Debug for Consumer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("size", &self.shared.size)
            .field("next", &self.next)
            .field("released", &self.released)
            .field("producer_seen", &self.producer_seen)
            .finish()
    }
}

#[cfg(all(test, not(stoq_loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_empty_ring_gives_nothing() {
        let (_producer, mut consumer) = ring_in_memory::<u64>(4, 0);
        assert_eq!(consumer.pop(), None);
        consumer.release();
        assert_eq!(consumer.pop(), None);
    }

    #[test]
    fn entries_are_invisible_until_committed() {
        let (mut producer, mut consumer) = ring_in_memory::<u64>(4, 0);
        producer.push(7);
        assert_eq!(consumer.pop(), None);
        assert!(producer.commit());
        assert!(!producer.commit(), "nothing new to publish");
        assert_eq!(consumer.pop(), Some(7));
        assert_eq!(consumer.pop(), None);
    }

    #[test]
    fn a_full_ring_has_room_again_only_after_release() {
        let (mut producer, mut consumer) = ring_in_memory::<u64>(4, 0);
        for value in 0..4 {
            assert!(producer.room(1) > 0);
            producer.push(value);
        }
        producer.commit();
        assert_eq!(producer.room(1), 0);
        assert_eq!(producer.unconsumed(), 4);
        assert_eq!(consumer.pop(), Some(0));
        assert_eq!(producer.room(1), 0, "read, but not given back");
        consumer.release();
        assert_eq!(producer.room_known(), 0, "not looked at yet");
        assert_eq!(producer.room(1), 1);
        assert_eq!(producer.unconsumed(), 3);
    }

    #[test]
    #[should_panic(expected = "full ring")]
    fn pushing_into_a_full_ring_stops_the_program() {
        let (mut producer, _consumer) = ring_in_memory::<u64>(2, 0);
        for value in 0..3 {
            producer.push(value);
        }
    }

    #[test]
    fn indices_wrap_around_u32() {
        let (mut producer, mut consumer) = ring_in_memory::<u64>(8, u32::MAX - 5);
        let mut expected = 0;
        for round in 0..10_u64 {
            assert_eq!(producer.room(8), 8);
            for entry in 0..7 {
                producer.push(round * 7 + entry);
            }
            producer.commit();
            assert_eq!(producer.unconsumed(), 7);
            while let Some(value) = consumer.pop() {
                assert_eq!(value, expected);
                expected += 1;
            }
            consumer.release();
            assert_eq!(producer.unconsumed(), 0);
        }
        assert_eq!(expected, 70);
    }

    #[test]
    fn the_wake_up_flag_is_seen() {
        let (producer, consumer) = ring_in_memory::<u64>(2, 0);
        assert!(!producer.needs_wakeup());
        consumer.set_need_wakeup(true);
        assert!(producer.needs_wakeup());
        consumer.set_need_wakeup(false);
        assert!(!producer.needs_wakeup());
    }

    #[test]
    fn two_threads_pass_every_entry_in_order() {
        const ENTRIES: u64 = 200_000;
        let (mut producer, mut consumer) = ring_in_memory::<u64>(64, u32::MAX - 1000);
        let writer = std::thread::spawn(move || {
            let mut value = 0;
            while value < ENTRIES {
                let room = u64::from(producer.room(1)).min(ENTRIES - value);
                for _ in 0..room {
                    producer.push(value);
                    value += 1;
                }
                if !producer.commit() {
                    std::thread::yield_now();
                }
            }
        });
        let mut expected = 0;
        while expected < ENTRIES {
            match consumer.pop() {
                Some(value) => {
                    assert_eq!(value, expected);
                    expected += 1;
                }
                None => {
                    consumer.release();
                    std::thread::yield_now();
                }
            }
        }
        writer.join().expect("the writer finishes");
    }
}

#[cfg(all(test, stoq_loom))]
mod loom_tests {
    use super::*;

    #[test]
    fn loom_every_interleaving_keeps_order_and_ownership() {
        loom::model(|| {
            let (mut producer, mut consumer) = ring_in_memory::<u64>(2, u32::MAX - 1);
            let writer = loom::thread::spawn(move || {
                let mut value = 1;
                while value <= 3 {
                    if producer.room(1) == 0 {
                        loom::thread::yield_now();
                        continue;
                    }
                    producer.push(value);
                    value += 1;
                    producer.commit();
                }
            });
            let mut expected = 1;
            while expected <= 3 {
                match consumer.pop() {
                    Some(value) => {
                        assert_eq!(value, expected);
                        expected += 1;
                        consumer.release();
                    }
                    None => loom::thread::yield_now(),
                }
            }
            writer.join().expect("the writer finishes");
        });
    }

    #[test]
    fn loom_a_batch_is_published_whole() {
        loom::model(|| {
            let (mut producer, mut consumer) = ring_in_memory::<u64>(4, 0);
            let writer = loom::thread::spawn(move || {
                producer.push(1);
                producer.push(2);
                producer.commit();
            });
            if let Some(first) = consumer.pop() {
                assert_eq!((first, consumer.pop()), (1, Some(2)));
            }
            writer.join().expect("the writer finishes");
        });
    }
}
