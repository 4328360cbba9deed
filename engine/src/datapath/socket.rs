//! Datagrams through a kernel UDP socket with `recvmmsg`/`sendmmsg`, GRO and GSO.
//!
//! Send slots form a queue: `[head, tail)` waits to leave, in order; when it is
//! empty both return to zero. Receive buffers are filled by one call and handed
//! out completely before the next call.

use std::io;
use std::net::SocketAddrV6;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::udp_socket::{
    Batcher, BufferShortfall, MessageCursor, MessageInfo, MtuProbe, OverrunCounter, PlainOutcome,
    SocketConfig, SocketError, UNCOPIED_BYTES_MIN, UdpSocket, count_drop, mode_name,
    transmit_verdict_for,
};
use super::{
    Capabilities, Datapath, DatapathCounters, DatapathEvent, DatapathKind, RxBatch, TxMeta,
    TxVerdict,
};
use crate::sys::udp::{ReceiveArray, SendSlots};

/// Size of a receive buffer, in bytes: the largest GRO batch.
const RX_BUFFER_BYTES: usize = 64 * 1024;

/// Messages received and not yet handed out completely.
#[derive(Debug, Default)]
struct Backlog {
    next: usize,
    received: usize,
    /// The message at `next`, if part of it is in an earlier batch.
    cursor: Option<MessageCursor>,
}

/// A shard's way to the wire over plain socket calls.
#[derive(Debug)]
pub struct SocketDatapath {
    socket: UdpSocket,
    capabilities: Capabilities,
    rx: ReceiveArray,
    backlog: Backlog,
    overrun: OverrunCounter,
    slots: SendSlots,
    batcher: Batcher,
    head: usize,
    tail: usize,
    mtu: MtuProbe,
    event: Option<DatapathEvent>,
    counters: DatapathCounters,
}

impl SocketDatapath {
    /// Opens and binds the socket.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn open(config: SocketConfig) -> Result<Self, SocketError> {
        let socket = UdpSocket::open(&config)?;
        let capabilities = Capabilities {
            kind: DatapathKind::Socket,
            mode: mode_name(socket.gso(), socket.gro()).to_owned(),
            interface: None,
            queue: None,
            standby_reason: None,
        };
        Ok(Self {
            capabilities,
            rx: ReceiveArray::new(config.rx_buffers, RX_BUFFER_BYTES),
            backlog: Backlog::default(),
            overrun: OverrunCounter::default(),
            slots: SendSlots::new(config.tx_batches),
            batcher: Batcher::new(config.tx_batches, socket.gso()),
            head: 0,
            tail: 0,
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

    /// Drops what could not leave yet: it is stale when another datapath has taken over.
    pub(crate) fn discard_unsent(&mut self) {
        self.counters.tx_drop_io += (self.tail - self.head) as u64;
        (self.head, self.tail) = (0, 0);
    }

    /// Hands out what an earlier call received; true when nothing is left of it.
    fn deliver_backlog(&mut self, batch: &mut RxBatch) -> bool {
        let bound = *self.socket.local().ip();
        let Self { rx, backlog, overrun, counters, .. } = self;
        while backlog.next < backlog.received {
            if batch.is_full() {
                return false;
            }
            let started = backlog.cursor.take().or_else(|| {
                let message = rx.message(backlog.next);
                let info = MessageInfo::read(&message, bound, overrun, counters)?;
                Some(if message.payload.len() >= UNCOPIED_BYTES_MIN {
                    MessageCursor::owning(info, rx.take(backlog.next))
                } else {
                    MessageCursor::copying(info)
                })
            });
            if let Some(mut cursor) = started
                && !cursor.deliver(rx.message(backlog.next).payload, batch, counters)
            {
                backlog.cursor = Some(cursor);
                return false;
            }
            backlog.next += 1;
        }
        true
    }

    /// Sends `[head, tail)` as far as the socket buffer allows.
    fn drain(&mut self) {
        while self.head < self.tail {
            if self.batcher.is_plain(self.head) {
                let Self { batcher, slots, socket, head, counters, .. } = self;
                match batcher.send_rest(slots, socket.as_fd(), *head, counters) {
                    PlainOutcome::Done => self.head += 1,
                    PlainOutcome::WouldBlock => return,
                }
                continue;
            }
            self.counters.system_calls += 1;
            match self.slots.send(self.socket.as_fd(), self.head..self.tail) {
                Ok(sent) => self.head += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    let Self { batcher, slots, socket, head, counters, .. } = self;
                    match batcher.refused(slots, socket.as_fd(), *head, &error, counters) {
                        PlainOutcome::Done => self.head += 1,
                        PlainOutcome::WouldBlock => return,
                    }
                }
            }
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

impl Datapath for SocketDatapath {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn local_addr(&self) -> SocketAddrV6 {
        self.socket.local()
    }

    fn receive(&mut self, _now: Instant, batch: &mut RxBatch) {
        while self.deliver_backlog(batch) && !batch.is_full() {
            // A short answer means that the socket was empty: asking again would
            // cost a call to learn nothing.
            let drained = self.backlog.received > 0 && self.backlog.received < self.rx.capacity();
            self.backlog = Backlog::default();
            if drained {
                return;
            }
            self.counters.system_calls += 1;
            match self.rx.receive(self.socket.as_fd()) {
                Ok(received) => self.backlog.received = received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.event =
                        Some(DatapathEvent::Failed(format!("recvmmsg on the UDP socket: {error}")));
                    return;
                }
            }
        }
    }

    fn transmit_capacity(&self) -> usize {
        self.slots.count() - self.tail
    }

    fn transmit(&mut self, meta: &TxMeta, payload: &[u8]) -> TxVerdict {
        if let Some(drop) = transmit_verdict_for(meta, payload) {
            count_drop(&mut self.counters, drop);
            return TxVerdict::Dropped(drop);
        }
        let Self { slots, batcher, .. } = self;
        let last = self.tail.checked_sub(1).filter(|last| *last >= self.head);
        if !last.is_some_and(|last| batcher.try_append(slots, last, meta, payload)) {
            if self.tail == slots.count() {
                return TxVerdict::Full;
            }
            if let Some(last) = last {
                batcher.seal(slots, last);
            }
            batcher.begin(slots, self.tail, meta, payload);
            self.tail += 1;
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
        if self.tail == self.slots.count() {
            buffer.clear();
            return datagrams;
        }
        let Self { slots, batcher, .. } = self;
        if let Some(last) = self.tail.checked_sub(1).filter(|last| *last >= self.head) {
            batcher.seal(slots, last);
        }
        self.counters.tx_datagrams += datagrams as u64;
        self.counters.tx_bytes += buffer.len() as u64;
        batcher.begin_with(slots, self.tail, meta, segment_bytes, buffer);
        self.tail += 1;
        0
    }

    fn flush(&mut self, now: Instant) {
        self.mtu.expire(now);
        if self.head == self.tail {
            return;
        }
        self.batcher.seal(&mut self.slots, self.tail - 1);
        self.drain();
        if self.head == self.tail {
            (self.head, self.tail) = (0, 0);
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
        if self.backlog.next < self.backlog.received {
            return Ok(());
        }
        let mut interest = PollFlags::IN;
        if self.head < self.tail {
            interest |= PollFlags::OUT;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(self.socket.as_fd(), interest),
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
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

/// `ppoll(2)`; a signal ends it early, which [`Datapath::wait`] allows.
pub(super) fn poll_until(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    // A timeout beyond what the kernel can express is no limit.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
