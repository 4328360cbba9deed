//! An io_uring that moves datagrams of one UDP socket.
//!
//! ```text
//!             userspace                      kernel
//!   send slot ── lend, SQE ───────────────► reads header, control, payload
//!             ◄─ take_back ──────────────── CQE (however it ended)
//!   buffer    ◄───── CQE of the multishot ─ written: header, name, control, payload
//!             ── give_back, ring tail ────► free to be written
//! ```
//! A slot or buffer is with exactly one side. The completion queue holds every
//! completion that can be outstanding at once (one per buffer, one per slot, one
//! for the end of the multishot), so it never overflows.
//!
//! The ring is created disabled and enabled on first use: with
//! `IORING_SETUP_SINGLE_ISSUER` that binds it to the thread that drives it, which
//! need not be the one that opened it.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU16, Ordering};

use bytes::{Buf as _, BytesMut};
use io_uring::types::{BufRingEntry, CancelBuilder, Fixed, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::raw_array::{RawArray, Zeroed};
use super::udp::{CONTROL_BYTES, Message, ReceiveBuffers, SendSlots, socket_addr};

/// The layout of a completed multishot `recvmsg` buffer: this header (four `u32`:
/// name, control and payload length, flags), then name, control and payload.
const OUT_HEADER_BYTES: usize = 16;
const NAME_BYTES: usize = size_of::<libc::sockaddr_in6>();
/// Bytes before the payload in a receive buffer.
const PREFIX_BYTES: usize = OUT_HEADER_BYTES + NAME_BYTES + CONTROL_BYTES;
/// Size of a receive buffer: the prefix, and the largest GRO batch.
const BUFFER_BYTES: usize = (PREFIX_BYTES + 64 * 1024).next_multiple_of(64);

const BUFFER_GROUP: u16 = 0;
/// Index of the socket in the table of registered files.
const SOCKET: Fixed = Fixed(0);
const RECEIVE_TOKEN: u64 = u64::MAX;
/// How long a dropped ring waits for its operations to end.
const CANCEL_TIMEOUT_S: u64 = 1;

// SAFETY: C structure of integers.
unsafe impl Zeroed for BufRingEntry {}

/// How task work reaches us, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TaskRun {
    /// Only inside our own calls (`DEFER_TASKRUN`, kernel 6.1).
    Deferred,
    /// At any of our transitions to the kernel (`COOP_TASKRUN`, kernel 5.19).
    Cooperative,
    /// By interrupting us.
    Interrupting,
}

/// A completed operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Completion {
    /// A message is in `buffer`.
    Received {
        /// Buffer, to be given back.
        buffer: u16,
    },
    /// The multishot ended without a message; `errno` may be `ENOBUFS`.
    ReceiveEnded {
        /// Positive error number.
        errno: i32,
    },
    /// The message in `slot` left (`Ok`) or not; the slot is ours again.
    Sent {
        /// Send slot.
        slot: usize,
        /// The send's result.
        result: Result<(), i32>,
    },
}

/// Ring, receive buffers and send slots of one socket.
pub(crate) struct DatagramRing {
    ring: ManuallyDrop<IoUring>,
    memory: ManuallyDrop<Memory>,
    task_run: TaskRun,
    enabled: bool,
    receive_armed: bool,
}

/// What the kernel holds addresses of.
struct Memory {
    entries: RawArray<BufRingEntry>,
    buffers: ReceiveBuffers,
    template: RawArray<libc::msghdr>,
    slots: SendSlots,
    buffer_count: u16,
    /// Our copy of the buffer ring's tail, which only we write.
    tail: u16,
}

impl std::fmt::Debug for DatagramRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DatagramRing")
            .field("task_run", &self.task_run)
            .field("enabled", &self.enabled)
            .field("receive_armed", &self.receive_armed)
            .finish_non_exhaustive()
    }
}

/// The step of setting a ring up that failed.
#[derive(Debug)]
pub(crate) struct SetupError {
    /// System call, with its operation.
    pub(crate) call: &'static str,
    /// The kernel's answer.
    pub(crate) source: io::Error,
}

fn at(call: &'static str) -> impl FnOnce(io::Error) -> SetupError {
    move |source| SetupError { call, source }
}

impl DatagramRing {
    /// Sets a ring up for `socket` with `buffers` receive buffers (rounded up to a
    /// power of two) and `slots` send slots. Needs kernel 6.0.
    ///
    /// # Errors
    /// The step that failed, with the kernel's answer.
    pub(crate) fn open(
        socket: BorrowedFd<'_>,
        buffers: usize,
        slots: usize,
    ) -> Result<Self, SetupError> {
        let buffer_count = u16::try_from(buffers.next_power_of_two()).expect("validated: ≤ 1024");
        let submissions = u32::try_from((slots + 2).next_power_of_two()).expect("validated");
        let completions =
            u32::try_from((usize::from(buffer_count) + slots + 2).next_power_of_two())
                .expect("validated")
                .max(submissions * 2);
        let (ring, task_run) = build(submissions, completions).map_err(at("io_uring_setup"))?;
        let memory = Memory::new(buffer_count, slots);
        let mut this = Self {
            ring: ManuallyDrop::new(ring),
            memory: ManuallyDrop::new(memory),
            task_run,
            enabled: false,
            receive_armed: false,
        };
        this.ring
            .submitter()
            .register_files(&[socket.as_raw_fd()])
            .map_err(at("io_uring_register(REGISTER_FILES)"))?;
        // SAFETY: the entries live in a page-aligned array of `buffer_count`
        // entries, freed only after the ring is closed (see `Drop`).
        unsafe {
            this.ring.submitter().register_buf_ring_with_flags(
                this.memory.entries.pointer(0) as u64,
                buffer_count,
                BUFFER_GROUP,
                0,
            )
        }
        .map_err(at("io_uring_register(REGISTER_PBUF_RING)"))?;
        for buffer in 0..buffer_count {
            this.memory.give_back(buffer);
        }
        Ok(this)
    }

    /// How task work reaches us.
    pub(crate) const fn task_run(&self) -> TaskRun {
        self.task_run
    }

    /// The send slots.
    pub(crate) fn slots_mut(&mut self) -> &mut SendSlots {
        &mut self.memory.slots
    }

    /// Whether the multishot receive is (about to be) active.
    pub(crate) const fn receive_armed(&self) -> bool {
        self.receive_armed
    }

    /// Queues the multishot receive.
    pub(crate) fn arm_receive(&mut self) {
        assert!(!self.receive_armed, "the multishot receive is armed once");
        let entry =
            opcode::RecvMsgMulti::new(SOCKET, self.memory.template.pointer(0), BUFFER_GROUP)
                .build()
                .user_data(RECEIVE_TOKEN);
        self.push(&entry);
        self.receive_armed = true;
    }

    /// Queues the message of `slot`, which is lent to the kernel until its completion.
    pub(crate) fn queue_send(&mut self, slot: usize) {
        let message = self.memory.slots.lend(slot);
        let entry = opcode::SendMsg::new(SOCKET, message).build().user_data(slot as u64);
        self.push(&entry);
    }

    /// Whether queued operations wait for [`enter`](Self::enter).
    pub(crate) fn has_queued(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Whether the kernel holds work or completions back until we call it.
    pub(crate) fn kernel_has_work(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Whether a completion lies in memory.
    pub(crate) fn has_completion(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// One `io_uring_enter`: submits what is queued and runs what the kernel deferred.
    ///
    /// # Errors
    /// The kernel's answer; an interrupted call is repeated by the next turn.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        match self.ring.submit() {
            Ok(_) => Ok(()),
            // EAGAIN and EBUSY: the kernel is short of memory or wants completions
            // to be consumed first; the entries stay queued.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The next completion in memory; no system call.
    pub(crate) fn next_completion(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            if entry.user_data() != RECEIVE_TOKEN {
                let slot = entry.user_data() as usize;
                self.memory.slots.take_back(slot);
                let result = if entry.result() < 0 { Err(-entry.result()) } else { Ok(()) };
                return Some(Completion::Sent { slot, result });
            }
            if !cqueue::more(entry.flags()) {
                self.receive_armed = false;
            }
            let buffer = cqueue::buffer_select(entry.flags());
            match (usize::try_from(entry.result()), buffer) {
                (Ok(bytes), Some(buffer)) => {
                    // SAFETY: the kernel says that it wrote so many bytes where `prepare`, called
                    // when it got the buffer, pointed to.
                    unsafe {
                        self.memory.buffers.filled(usize::from(buffer), bytes.min(BUFFER_BYTES))
                    };
                    return Some(Completion::Received { buffer });
                }
                (Ok(_), None) => {}
                (Err(_), buffer) => {
                    if let Some(buffer) = buffer {
                        self.memory.give_back(buffer);
                    }
                    return Some(Completion::ReceiveEnded { errno: -entry.result() });
                }
            }
        }
    }

    /// The message of a [`Completion::Received`]; `None` if it is not well formed.
    pub(crate) fn message(&self, buffer: u16) -> Option<Message<'_>> {
        parse(self.memory.buffers.bytes(usize::from(buffer)))
    }

    /// Takes the payload of a [`Completion::Received`] out, together with its memory; the buffer
    /// has to be given back none the less. `None` where [`message`](Self::message) has none.
    pub(crate) fn take(&mut self, buffer: u16) -> Option<BytesMut> {
        let payload_bytes = self.message(buffer)?.payload.len();
        let mut payload = self.memory.buffers.take(usize::from(buffer));
        payload.advance(PREFIX_BYTES);
        payload.truncate(payload_bytes);
        Some(payload)
    }

    /// Returns a buffer to the kernel.
    pub(crate) fn give_back(&mut self, buffer: u16) {
        self.memory.give_back(buffer);
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the entry refers to the registered socket, and to a header, a
        // control buffer and a payload in `self.memory`, which stay put and
        // unchanged until the completion and are freed only after the ring is closed.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the submission queue holds every slot and the receive at once");
    }

    /// Ends every operation; true when none is left.
    fn quiesce(&mut self) -> bool {
        if !self.enabled {
            return true;
        }
        let deadline = Timespec::new().sec(CANCEL_TIMEOUT_S);
        let cancelled =
            self.ring.submitter().register_sync_cancel(Some(deadline), CancelBuilder::any().all());
        match cancelled {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(_) => return false,
        }
        // Two rounds: one runs the deferred cancellations, one collects them.
        for _ in 0..2 {
            if self.enter().is_err() {
                return false;
            }
            while let Some(completion) = self.next_completion() {
                if let Completion::Received { buffer } = completion {
                    self.give_back(buffer);
                }
            }
        }
        !self.receive_armed && !self.memory.slots.any_lent()
    }
}

impl Drop for DatagramRing {
    fn drop(&mut self) {
        let quiet = self.quiesce();
        // The ring's teardown goes on after its descriptor is closed, and would hold the
        // socket, and with it the port, until then.
        if let Err(error) = self.ring.submitter().unregister_files() {
            tracing::warn!(%error, "io_uring keeps the socket; its port is free a moment later");
        }
        // SAFETY: dropped once, here, and not used afterwards; this closes the ring.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
        // A deferring ring touches user memory only inside our own calls, of which
        // there will be none; the others may until the kernel has torn them down.
        if quiet || self.task_run == TaskRun::Deferred {
            // SAFETY: dropped once, here; the kernel no longer uses it, see above.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        } else {
            tracing::error!("io_uring operations did not end in time: leaking their memory");
        }
    }
}

impl AsFd for DatagramRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Memory {
    fn new(buffer_count: u16, slots: usize) -> Self {
        let count = usize::from(buffer_count);
        let mut template = RawArray::<libc::msghdr>::new(1);
        template.at_mut(0).msg_namelen = NAME_BYTES as libc::socklen_t;
        template.at_mut(0).msg_controllen = CONTROL_BYTES as _;
        Self {
            entries: RawArray::new(count),
            buffers: ReceiveBuffers::new(count, BUFFER_BYTES),
            template,
            slots: SendSlots::new(slots),
            buffer_count,
            tail: 0,
        }
    }

    fn give_back(&mut self, buffer: u16) {
        assert!(buffer < self.buffer_count, "buffer {buffer} of {}", self.buffer_count);
        let address = self.buffers.prepare(usize::from(buffer)) as u64;
        let index = usize::from(self.tail & (self.buffer_count - 1));
        let entry = self.entries.at_mut(index);
        entry.set_addr(address);
        entry.set_len(BUFFER_BYTES as u32);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the ring's tail overlays the reserved field of entry 0, which
        // setting an entry does not touch; it is aligned, lives as long as the
        // array, and is only ever written by us, as an atomic.
        let tail = unsafe { &*BufRingEntry::tail(self.entries.pointer(0)).cast::<AtomicU16>() };
        // Release: the kernel sees the entry before the tail that publishes it.
        tail.store(self.tail, Ordering::Release);
    }
}

/// Takes a completed multishot buffer apart.
fn parse(buffer: &[u8]) -> Option<Message<'_>> {
    let (prefix, payload) = buffer.split_at_checked(PREFIX_BYTES)?;
    let word = |index: usize| {
        let bytes = prefix[index * 4..index * 4 + 4].try_into().expect("four bytes");
        u32::from_ne_bytes(bytes)
    };
    let (name_bytes, control_bytes) = (word(0) as usize, word(1) as usize);
    let (payload_bytes, flags) = (word(2) as usize, word(3) as i32);
    let control = &prefix[OUT_HEADER_BYTES + NAME_BYTES..];
    // SAFETY: the range has the size of the structure, of which every bit pattern
    // is valid; the read is unaligned.
    let name = unsafe {
        prefix[OUT_HEADER_BYTES..OUT_HEADER_BYTES + NAME_BYTES]
            .as_ptr()
            .cast::<libc::sockaddr_in6>()
            .read_unaligned()
    };
    Some(Message {
        remote: socket_addr(&name).filter(|_| name_bytes == NAME_BYTES),
        control: &control[..control_bytes.min(CONTROL_BYTES)],
        payload: &payload[..payload_bytes.min(payload.len())],
        truncated: flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0
            || payload_bytes > payload.len(),
    })
}

/// Creates the ring with the best set-up that the kernel has.
fn build(submissions: u32, completions: u32) -> io::Result<(IoUring, TaskRun)> {
    for task_run in [TaskRun::Deferred, TaskRun::Cooperative, TaskRun::Interrupting] {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(completions).setup_submit_all().setup_r_disabled();
        match task_run {
            TaskRun::Deferred => {
                builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
            }
            TaskRun::Cooperative => {
                builder.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
            }
            TaskRun::Interrupting => {}
        }
        match builder.build(submissions) {
            Ok(ring) => return Ok((ring, task_run)),
            Err(error)
                if error.raw_os_error() == Some(libc::EINVAL)
                    && task_run != TaskRun::Interrupting => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the last set-up returns")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_buffers_are_no_messages() {
        assert!(parse(&[0; PREFIX_BYTES - 1]).is_none());
        let message = parse(&[0; PREFIX_BYTES]).expect("an empty message");
        assert!(message.remote.is_none() && message.payload.is_empty() && !message.truncated);
    }

    #[test]
    fn lengths_beyond_the_buffer_are_truncation() {
        let mut buffer = vec![0; PREFIX_BYTES + 10];
        buffer[8..12].copy_from_slice(&11_u32.to_ne_bytes());
        buffer[4..8].copy_from_slice(&9999_u32.to_ne_bytes());
        let message = parse(&buffer).expect("well formed");
        assert!(message.truncated);
        assert_eq!((message.payload.len(), message.control.len()), (10, CONTROL_BYTES));
    }

    #[test]
    fn every_operation_ends_when_the_ring_is_quiesced() {
        let socket = std::net::UdpSocket::bind("[::1]:0").expect("::1 can be bound");
        let mut ring = DatagramRing::open(socket.as_fd(), 2, 2).expect("io_uring is available");
        assert!(ring.quiesce(), "nothing has begun");
        ring.arm_receive();
        ring.enter().expect("the receive is submitted");
        assert!(ring.receive_armed() && ring.next_completion().is_none());
        assert!(ring.quiesce() && !ring.receive_armed());
    }

    #[test]
    fn the_buffer_ring_wraps() {
        let mut memory = Memory::new(4, 1);
        for round in 0..70_000_u32 {
            memory.give_back((round % 4) as u16);
        }
        assert_eq!(memory.tail, (70_000_u32 % 65_536) as u16);
        let last = usize::from(memory.tail.wrapping_sub(1) & 3);
        assert_eq!(memory.entries.at(last).bid(), (69_999 % 4) as u16);
    }
}
