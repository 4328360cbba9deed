//! Datagrams through a kernel UDP socket driven by io_uring.
//!
//! Receiving: one multishot `recvmsg` fills provided buffers, whose completions
//! lie in memory: while spinning finds work, no call is made. Sending: one
//! `sendmsg` per batch (GSO), all of a turn submitted by one `io_uring_enter`,
//! which also runs what the kernel deferred. A receive buffer returns to the
//! kernel, and a send slot to the free list, however its operation ended.

mod probe;

pub use probe::{Unavailable, UringFeatures};

use std::io;
use std::net::SocketAddrV6;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::socket::poll_until;
use super::udp_socket::{
    Batcher, BufferShortfall, MessageCursor, MessageInfo, MtuProbe, OverrunCounter, PlainOutcome,
    SocketConfig, SocketError, UNCOPIED_BYTES_MIN, UdpSocket, count_drop, mode_name,
    transmit_verdict_for,
};
use super::{
    Capabilities, Datapath, DatapathCounters, DatapathEvent, DatapathKind, RxBatch, TxMeta,
    TxVerdict,
};
use crate::sys::uring::{Completion, DatagramRing};

/// A received message of which part waits for the next turn.
#[derive(Debug)]
struct Unfinished {
    buffer: u16,
    cursor: MessageCursor,
}

/// A shard's way to the wire over io_uring.
#[derive(Debug)]
pub struct IoUringDatapath {
    // Before the socket: the ring's operations end first.
    ring: DatagramRing,
    socket: UdpSocket,
    capabilities: Capabilities,
    unfinished: Option<Unfinished>,
    overrun: OverrunCounter,
    batcher: Batcher,
    /// Free slots; the last one freed is the next one used, while it is in cache.
    free: Vec<usize>,
    /// Slots with a sealed batch, in order; the open one is the last.
    ready: Vec<usize>,
    /// Whether the last of `ready` may still grow.
    open: bool,
    /// Slots that leave datagram by datagram and met a full socket buffer.
    blocked: Vec<usize>,
    mtu: MtuProbe,
    event: Option<DatapathEvent>,
    counters: DatapathCounters,
}

impl IoUringDatapath {
    /// What io_uring can do here, proved by a trial.
    ///
    /// # Errors
    /// Why it cannot be used, in words.
    pub fn probe() -> Result<UringFeatures, Unavailable> {
        probe::probe()
    }

    /// Opens and binds the socket and sets the ring up. Needs kernel 6.0.
    /// The first [`receive`](Datapath::receive), [`flush`](Datapath::flush) or
    /// [`wait`](Datapath::wait) binds it to the calling thread.
    ///
    /// # Errors
    /// See [`SocketError`]; [`SocketError::IoUring`] when io_uring is forbidden or too old.
    pub fn open(config: SocketConfig) -> Result<Self, SocketError> {
        let socket = UdpSocket::open_blocking(&config)?;
        let ring = DatagramRing::open(socket.as_fd(), config.rx_buffers, config.tx_batches)
            .map_err(probe::explain)?;
        let capabilities = Capabilities {
            kind: DatapathKind::IoUring,
            mode: mode_name(socket.gso(), socket.gro()).to_owned(),
            interface: None,
            queue: None,
            standby_reason: None,
        };
        let slots = config.tx_batches;
        Ok(Self {
            ring,
            capabilities,
            unfinished: None,
            overrun: OverrunCounter::default(),
            batcher: Batcher::new(slots, socket.gso()),
            free: (0..slots).rev().collect(),
            ready: Vec::with_capacity(slots),
            open: false,
            blocked: Vec::with_capacity(slots),
            mtu: MtuProbe::open(socket.local())?,
            event: None,
            counters: DatapathCounters::default(),
            socket,
        })
    }

    /// Kernel buffers that came out smaller than configured.
    #[must_use]
    pub fn buffer_shortfalls(&self) -> &[BufferShortfall] {
        self.socket.shortfalls()
    }

    /// The kernel socket, for what concerns all sockets of a port.
    pub(crate) fn udp_socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn enter(&mut self) {
        self.counters.system_calls += 1;
        if let Err(error) = self.ring.enter() {
            self.event = Some(DatapathEvent::Failed(match error.raw_os_error() {
                Some(libc::EEXIST) => "io_uring_enter: this datapath was first used by another \
                                       thread; drive it from one thread only"
                    .to_owned(),
                _ => format!("io_uring_enter on the UDP socket: {error}"),
            }));
        }
    }

    /// Consumes completions until the batch is full or none lies in memory.
    fn reap(&mut self, batch: &mut RxBatch) {
        if let Some(unfinished) = self.unfinished.take() {
            self.deliver(unfinished.buffer, Some(unfinished.cursor), batch);
        }
        while !batch.is_full() && self.unfinished.is_none() {
            let Some(completion) = self.ring.next_completion() else { return };
            match completion {
                Completion::Received { buffer } => self.deliver(buffer, None, batch),
                // ENOBUFS: all buffers were in use. As after the other passing
                // causes, the receive is armed again once this is consumed.
                Completion::ReceiveEnded {
                    errno:
                        libc::ENOBUFS | libc::ECANCELED | libc::EINTR | libc::EAGAIN | libc::ENOMEM,
                } => {}
                Completion::ReceiveEnded { errno } => self.receive_failed(errno),
                Completion::Sent { slot, result } => self.sent(slot, result),
            }
        }
    }

    fn receive_failed(&mut self, errno: i32) {
        let error = io::Error::from_raw_os_error(errno);
        self.event = Some(DatapathEvent::Failed(format!("io_uring recvmsg: {error}")));
    }

    fn deliver(&mut self, buffer: u16, started: Option<MessageCursor>, batch: &mut RxBatch) {
        let cursor = started.or_else(|| self.start(buffer));
        let Self { ring, counters, .. } = self;
        let payload = ring.message(buffer).map_or(&[][..], |message| message.payload);
        if let Some(mut cursor) = cursor
            && !cursor.deliver(payload, batch, counters)
        {
            self.unfinished = Some(Unfinished { buffer, cursor });
            return;
        }
        ring.give_back(buffer);
    }

    /// A message that has just arrived; `None` (counted) if it must be dropped.
    fn start(&mut self, buffer: u16) -> Option<MessageCursor> {
        let bound = *self.socket.local().ip();
        let Self { ring, overrun, counters, .. } = self;
        let Some(message) = ring.message(buffer) else {
            counters.rx_drop_malformed += 1;
            return None;
        };
        let info = MessageInfo::read(&message, bound, overrun, counters)?;
        if message.payload.len() >= UNCOPIED_BYTES_MIN
            && let Some(payload) = ring.take(buffer)
        {
            return Some(MessageCursor::owning(info, payload));
        }
        Some(MessageCursor::copying(info))
    }

    fn sent(&mut self, slot: usize, result: Result<(), i32>) {
        let outcome = match result {
            Ok(()) => PlainOutcome::Done,
            Err(errno) => {
                let error = io::Error::from_raw_os_error(errno);
                if matches!(errno, libc::EAGAIN | libc::EINTR | libc::ECANCELED) {
                    // Not refused, only not done: it leaves with the next flush.
                    self.ready.insert(0, slot);
                    return;
                }
                let Self { batcher, ring, socket, counters, .. } = self;
                batcher.refused(ring.slots_mut(), socket.as_fd(), slot, &error, counters)
            }
        };
        match outcome {
            PlainOutcome::Done => self.free.push(slot),
            PlainOutcome::WouldBlock => self.blocked.push(slot),
        }
    }

    /// Retries the datagrams that met a full socket buffer.
    fn retry_blocked(&mut self) {
        while let Some(slot) = self.blocked.last().copied() {
            let Self { batcher, ring, socket, counters, .. } = self;
            match batcher.send_rest(ring.slots_mut(), socket.as_fd(), slot, counters) {
                PlainOutcome::WouldBlock => return,
                PlainOutcome::Done => {
                    self.blocked.pop();
                    self.free.push(slot);
                }
            }
        }
    }

    fn rearm(&mut self) {
        let failed = matches!(self.event, Some(DatapathEvent::Failed(_)));
        if !self.ring.receive_armed() && !failed {
            self.ring.arm_receive();
        }
    }

    fn note_changes(&mut self) {
        if let Some(remote) = self.batcher.take_too_large()
            && let Some(payload) = self.mtu.refresh(&remote)
        {
            self.event = Some(DatapathEvent::MaxUdpPayload(payload));
        }
        if self.batcher.gso() != self.capabilities.mode.contains("gso") {
            self.capabilities.mode = mode_name(self.batcher.gso(), self.socket.gro()).to_owned();
        }
    }
}

impl Datapath for IoUringDatapath {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn local_addr(&self) -> SocketAddrV6 {
        self.socket.local()
    }

    fn receive(&mut self, _now: Instant, batch: &mut RxBatch) {
        let before = batch.len();
        self.reap(batch);
        if batch.is_full() {
            return;
        }
        self.rearm();
        // Nothing in memory: ask only if the kernel says that it holds something,
        // or if the receive must be armed.
        let found = batch.len() > before;
        if !found && (self.ring.kernel_has_work() || self.ring.has_queued()) {
            self.enter();
            self.reap(batch);
        }
    }

    fn transmit_capacity(&self) -> usize {
        self.free.len()
    }

    fn transmit(&mut self, meta: &TxMeta, payload: &[u8]) -> TxVerdict {
        if let Some(drop) = transmit_verdict_for(meta, payload) {
            count_drop(&mut self.counters, drop);
            return TxVerdict::Dropped(drop);
        }
        let Self { ring, batcher, ready, .. } = self;
        let slots = ring.slots_mut();
        let last = ready.last().copied().filter(|_| self.open);
        if !last.is_some_and(|last| batcher.try_append(slots, last, meta, payload)) {
            let Some(slot) = self.free.pop() else { return TxVerdict::Full };
            if let Some(last) = last {
                batcher.seal(slots, last);
            }
            batcher.begin(slots, slot, meta, payload);
            ready.push(slot);
            self.open = true;
        }
        self.counters.tx_datagrams += 1;
        self.counters.tx_bytes += payload.len() as u64;
        self.counters.copied_bytes += payload.len() as u64;
        TxVerdict::Accepted
    }

    fn batch_datagrams_max(&self, segment_bytes: usize) -> usize {
        self.batcher.datagrams_max(segment_bytes)
    }

    fn transmit_batch(
        &mut self,
        meta: &TxMeta,
        segment_bytes: usize,
        buffer: &mut Vec<u8>,
    ) -> usize {
        let datagrams = buffer.len().div_ceil(segment_bytes);
        // One may share a message with its predecessors; more are one of their own.
        if datagrams == 1 || !self.batcher.gso() {
            let taken = |payload| self.transmit(meta, payload) == TxVerdict::Accepted;
            let dropped = buffer.chunks(segment_bytes).map(taken).filter(|taken| !taken).count();
            buffer.clear();
            return dropped;
        }
        if let Some(drop) = transmit_verdict_for(meta, &buffer[..segment_bytes]) {
            (0..datagrams).for_each(|_| count_drop(&mut self.counters, drop));
            buffer.clear();
            return datagrams;
        }
        let Some(slot) = self.free.pop() else {
            buffer.clear();
            return datagrams;
        };
        let Self { ring, batcher, ready, .. } = self;
        let slots = ring.slots_mut();
        if let Some(last) = ready.last().copied().filter(|_| self.open) {
            batcher.seal(slots, last);
        }
        self.counters.tx_datagrams += datagrams as u64;
        self.counters.tx_bytes += buffer.len() as u64;
        batcher.begin_with(slots, slot, meta, segment_bytes, buffer);
        ready.push(slot);
        self.open = true;
        0
    }

    fn flush(&mut self, now: Instant) {
        self.mtu.expire(now);
        if !self.blocked.is_empty() {
            self.retry_blocked();
        }
        if self.open {
            let last = *self.ready.last().expect("an open batch is in the list");
            self.batcher.seal(self.ring.slots_mut(), last);
            self.open = false;
        }
        for slot in self.ready.drain(..) {
            self.ring.queue_send(slot);
        }
        if self.ring.has_queued() {
            self.enter();
        }
        self.note_changes();
    }

    fn poll_event(&mut self) -> Option<DatapathEvent> {
        self.event.take()
    }

    fn max_udp_payload(&self, remote: &SocketAddrV6) -> u16 {
        self.mtu.max_udp_payload(remote)
    }

    fn wait(&mut self, wake: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<()> {
        self.rearm();
        if self.ring.has_queued() {
            self.enter();
        }
        if self.unfinished.is_some()
            || !self.ready.is_empty()
            || self.ring.has_completion()
            || self.ring.kernel_has_work()
        {
            return Ok(());
        }
        // Polled rather than waited for inside the ring: a wake descriptor armed
        // there would outlive its borrow. The socket is watched besides the ring
        // because deferred task work sets the ring's flag but does not wake a
        // sleeper in ppoll (seen on 6.18).
        let mut interest = PollFlags::IN;
        if !self.blocked.is_empty() {
            interest |= PollFlags::OUT;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
            PollFd::from_borrowed_fd(self.ring.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.socket.as_fd(), interest),
        ];
        self.counters.system_calls += 1;
        poll_until(&mut fds, timeout)
    }

    fn counters(&self) -> DatapathCounters {
        let mut counters = self.counters;
        counters.system_calls += self.mtu.system_calls();
        counters
    }
}
