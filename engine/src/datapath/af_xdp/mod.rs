//! The AF_XDP datapath: one socket on one device queue, for one shard.
//!
//! ```text
//!            ┌── receive ──┐                          ┌── transmit ─┐
//!  RX ring → fragments, headers, checksum → RxBatch   route, frames → TX ring
//!            └ fill ring ←─┘                          └─ completion ring ←┘
//!  slow path: kernel UDP socket → RxBatch     neighbours: netlink → next hop
//! ```
//! * [`open_interface`] opens one [`AfXdp`] per queue; all share one attached
//!   [`XdpProgram`], which leaves the interface with the last of them.
//! * `rings` says who owns which frame when; `receive` and `transmit` move
//!   packets; `socket` binds; `slow_path` holds the port; `reopen` opens one queue
//!   again for a shard that went on with its slow path alone.
//! * Nothing on the packet path allocates, locks or logs; the exceptions are
//!   datagrams that wait for a neighbour (`pending`).
//!
//! Lowest kernel: 5.18, for the program (`xdp.frags`). Multi-buffer packets 6.6, checksum offload 6.8.

mod error;
mod limits;
pub mod link;
mod neighbor_table;
pub mod neighbors;
mod netlink;
mod open;
mod pending;
pub mod program;
mod receive;
mod rings;
mod routes;
mod slow_path;
mod socket;
mod solicit;
mod source_ports;
mod transmit;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddrV6;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::neighbors::{LinkEvent, Neighbors, Resolution};
use self::pending::{PendingQueue, Waiting};
use self::program::{AttachMode, ProgramError, XdpCounters, XdpProgram};
use self::receive::Receiver;
use self::socket::XskSocket;
use self::transmit::{Flushed, Transmitter};
use super::failover::Primary;
use super::socket::SocketDatapath;
use super::{
    Capabilities, Datapath, DatapathCounters, DatapathEvent, RxBatch, TxDrop, TxMeta, TxVerdict,
};
use crate::sys::xsk::Statistics;
use crate::wire::IP_OVERHEAD_BYTES;

pub use self::error::AfXdpError;
pub use self::limits::{AfXdpLimits, LimitsError};
pub(crate) use self::open::reopen;
pub use self::open::{AfXdpConfig, open_interface};
pub use self::socket::ZeroCopy;
pub use self::source_ports::ReceiveHash;

/// A shard that never sleeps looks at the slow-path socket once in so many turns.
const SLOW_PATH_TURNS: u32 = 64;

/// Upkeep that needs system calls (neighbours, statistics) is done that often when nothing asks for it.
const UPKEEP_INTERVAL: Duration = Duration::from_millis(20);

/// Longest sleep while the TX ring waits for the kernel: nothing may wake us then.
const TX_WAIT_MAX: Duration = Duration::from_micros(150);

/// Longest sleep while datagrams wait for a neighbour, so that they expire in time.
const PENDING_WAIT_MAX: Duration = Duration::from_millis(20);

/// Counters of one socket's rings, beyond the [`DatapathCounters`]; monotonic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RingCounters {
    /// Packets that the kernel dropped for other reasons than a full ring: no frame, too long.
    pub rx_dropped: u64,
    /// Packets that the kernel dropped because the RX ring was full.
    pub rx_ring_full: u64,
    /// Times that the kernel found the fill ring empty.
    pub fill_ring_empty: u64,
    /// Times that the kernel found the TX ring empty.
    pub tx_ring_empty: u64,
    /// Fill ring entries that the kernel refused: always zero, unless there is a bug.
    pub rx_invalid_descriptors: u64,
    /// TX ring entries that the kernel refused: always zero, unless there is a bug.
    pub tx_invalid_descriptors: u64,
    /// Datagrams accepted with only the pseudo-header summed (from a local peer over veth).
    pub rx_partial_checksums: u64,
    /// System calls made to make the kernel send.
    pub tx_kicks: u64,
    /// Frames that are with the kernel for receiving.
    pub frames_fill: u64,
    /// Frames that are with the kernel for sending.
    pub frames_tx: u64,
    /// Frames that are free.
    pub frames_free: u64,
}

/// What all datapaths of one interface share: the attached program.
struct Interface {
    name: String,
    ifindex: u32,
    /// The program was seen to have left the interface without us. Relaxed: it guards nothing.
    detached: AtomicBool,
    /// Locked when a datapath opens or closes and when counters are read; never per packet.
    program: Mutex<XdpProgram>,
}

impl fmt::Debug for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interface").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Interface {
    fn program(&self) -> std::sync::MutexGuard<'_, XdpProgram> {
        self.program.lock().expect("no holder of the program's lock panics")
    }
}

/// A way to the shared parts of an interface, from any thread. It does not keep
/// the program attached: that ends with the last [`AfXdp`].
#[derive(Debug, Clone)]
pub struct InterfaceHandle(Weak<Interface>);

impl InterfaceHandle {
    /// The XDP program's counters, or `None` after the last datapath of the interface is gone.
    ///
    /// # Errors
    /// If the program's counter map cannot be read.
    pub fn xdp_counters(&self) -> Option<Result<XdpCounters, ProgramError>> {
        self.0.upgrade().map(|interface| interface.program().counters())
    }

    /// Asks the kernel whether the program is still attached, and lets the interface's datapaths
    /// know, within their upkeep's interval, when it is not.
    pub(crate) fn check_attached(&self) {
        let Some(interface) = self.0.upgrade() else { return };
        let attached = interface.program().is_attached();
        match attached {
            Ok(true) => {}
            Ok(false) => interface.detached.store(true, Relaxed),
            Err(error) => {
                tracing::debug!(interface = interface.name, %error, "the XDP link does not answer");
            }
        }
    }

    /// How the XDP program is attached, or `None` after the last datapath of the interface is gone.
    #[must_use]
    pub fn attach_mode(&self) -> Option<AttachMode> {
        self.0.upgrade().map(|interface| interface.program().mode())
    }
}

/// The AF_XDP datapath of one queue. See the [module documentation](self).
#[derive(Debug)]
pub struct AfXdp {
    socket: XskSocket,
    receiver: Receiver,
    transmitter: Transmitter,
    neighbors: Neighbors,
    /// `None`: it carries the shard alone, or will be given back soon, or has failed.
    slow_path: Option<SocketDatapath>,
    local: SocketAddrV6,
    pending: PendingQueue,
    interface: Arc<Interface>,
    queue: u32,
    capabilities: Capabilities,
    counters: DatapathCounters,
    statistics: Statistics,
    events: VecDeque<DatapathEvent>,
    /// The turn's time, of the last `receive` or `flush`.
    now: Instant,
    next_upkeep: Instant,
    /// Generation of the neighbours' answers when waiting datagrams were last tried.
    pending_generation: u64,
    turns_since_slow_path: u32,
    slow_path_ready: bool,
    netlink_ready: bool,
    link_up: bool,
    failed: bool,
    /// UDP payload bytes that fit MTU and frames.
    payload_max: usize,
}

impl AfXdp {
    /// A handle to the interface's program, for any thread.
    #[must_use]
    pub fn interface(&self) -> InterfaceHandle {
        InterfaceHandle(Arc::downgrade(&self.interface))
    }

    /// The counters of this socket's rings, read from the kernel (one system call).
    ///
    /// # Errors
    /// If the kernel does not give its statistics.
    pub fn ring_counters(&self) -> io::Result<RingCounters> {
        let statistics = self.socket.statistics()?;
        let census = self.socket.umem.census();
        Ok(RingCounters {
            rx_dropped: statistics.rx_dropped,
            rx_ring_full: statistics.rx_ring_full,
            fill_ring_empty: statistics.fill_ring_empty,
            tx_ring_empty: statistics.tx_ring_empty,
            rx_invalid_descriptors: statistics.rx_invalid_descriptors,
            tx_invalid_descriptors: statistics.tx_invalid_descriptors,
            rx_partial_checksums: self.receiver.partial_checksums(),
            tx_kicks: self.transmitter.kicks(),
            frames_fill: census.fill.into(),
            frames_tx: census.tx.into(),
            frames_free: census.free.into(),
        })
    }

    /// The kernel's socket that holds the port, where it is not another datapath's now.
    pub(crate) fn slow_path_socket(&self) -> Option<BorrowedFd<'_>> {
        self.slow_path.as_ref().map(SocketDatapath::udp_socket)
    }

    /// Whether the device works on our frames without copying.
    #[must_use]
    pub fn is_zero_copy(&self) -> bool {
        self.socket.zero_copy
    }

    fn upkeep(&mut self, now: Instant) {
        let due = now >= self.next_upkeep;
        if due || std::mem::take(&mut self.netlink_ready) {
            self.counters.system_calls += 1;
            self.neighbors.poll(now);
            while let Some(event) = self.neighbors.poll_event() {
                self.handle_link_event(event);
            }
        }
        if due {
            self.next_upkeep = now + UPKEEP_INTERVAL;
            self.read_statistics();
            if self.interface.detached.load(Relaxed) {
                self.fail("XDP program", &io::Error::other("somebody else has detached it"));
            }
        }
        let generation = self.neighbors.generation();
        if !self.pending.is_empty() && (due || generation != self.pending_generation) {
            self.pending_generation = generation;
            self.retry_pending(now);
        }
        #[cfg(debug_assertions)]
        self.socket.umem.assert_conserved(self.receiver.held_fragments());
    }

    fn read_statistics(&mut self) {
        self.counters.system_calls += 1;
        match self.socket.statistics() {
            Ok(statistics) => self.statistics = statistics,
            Err(error) => self.fail("getsockopt(XDP_STATISTICS)", &error),
        }
    }

    fn handle_link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::MtuChanged(mtu) => {
                self.payload_max = payload_max(mtu, &self.transmitter);
                self.events.push_back(DatapathEvent::MaxUdpPayload(self.payload_max as u16));
            }
            LinkEvent::Up => self.set_link(true),
            LinkEvent::Down => self.set_link(false),
            LinkEvent::AddressesChanged => {
                self.events.push_back(DatapathEvent::AddressesChanged);
            }
            LinkEvent::Gone => {
                self.fail("netlink", &io::Error::from_raw_os_error(libc::ENODEV));
            }
        }
    }

    fn set_link(&mut self, up: bool) {
        if self.link_up != up {
            self.link_up = up;
            let event = if up { DatapathEvent::LinkUp } else { DatapathEvent::LinkDown };
            self.events.push_back(event);
        }
    }

    /// Tells once that the datapath cannot go on.
    fn fail(&mut self, call: &str, error: &io::Error) {
        if !std::mem::replace(&mut self.failed, true) {
            self.events.push_back(DatapathEvent::Failed(format!(
                "AF_XDP on queue {} of interface {}: {call}: {error}; the device or the binding \
                 is gone: open it again, or use another datapath",
                self.queue, self.interface.name
            )));
        }
    }

    fn receive_slow_path(&mut self, batch: &mut RxBatch) {
        self.turns_since_slow_path += 1;
        if !self.slow_path_ready && self.turns_since_slow_path < SLOW_PATH_TURNS {
            return;
        }
        let Some(slow_path) = &mut self.slow_path else { return };
        self.turns_since_slow_path = 0;
        let before = slow_path.counters().rx_datagrams;
        slow_path.receive(self.now, batch);
        self.slow_path_ready = batch.is_full();
        self.counters.rx_slow_path += slow_path.counters().rx_datagrams - before;
        if let Some(DatapathEvent::Failed(reason)) = slow_path.poll_event() {
            self.slow_path = None;
            self.fail("slow path", &io::Error::other(reason));
        }
    }

    fn retry_pending(&mut self, now: Instant) {
        let Self { pending, neighbors, transmitter, socket, counters, .. } = self;
        let expired = pending.retry(now, |meta, payload| {
            match neighbors.resolve(now, &meta.remote, meta.local) {
                Resolution::Ready(hop) => {
                    let XskSocket { rings, umem, .. } = socket;
                    // The MTU, and with it the frames of a packet, do not grow while it waits.
                    if transmitter.place(rings, umem, &hop, meta, payload, counters) {
                        Waiting::Done
                    } else {
                        Waiting::Still
                    }
                }
                Resolution::Pending => Waiting::Still,
                Resolution::NoRoute => {
                    counters.tx_drop_no_route += 1;
                    Waiting::Done
                }
                Resolution::LinkDown => {
                    counters.tx_drop_link_down += 1;
                    Waiting::Done
                }
            }
        });
        counters.tx_drop_neighbor += expired;
    }

    fn drop_tx(&mut self, reason: TxDrop) -> TxVerdict {
        let counters = &mut self.counters;
        let counter = match reason {
            TxDrop::TooLarge => &mut counters.tx_drop_too_large,
            TxDrop::NoRoute => &mut counters.tx_drop_no_route,
            TxDrop::NeighborQueueFull => &mut counters.tx_drop_neighbor,
            TxDrop::LinkDown => &mut counters.tx_drop_link_down,
            TxDrop::Io => &mut counters.tx_drop_io,
        };
        *counter += 1;
        TxVerdict::Dropped(reason)
    }

    /// How long `wait` may sleep: nothing wakes us when the kernel could take more from the TX ring.
    fn wait_bound(&mut self, timeout: Option<Duration>) -> Option<Duration> {
        let mut bound = timeout;
        let mut at_most = |limit: Duration| bound = Some(bound.map_or(limit, |b| b.min(limit)));
        let waiting = self.transmitter.is_waiting(&mut self.socket.rings);
        if waiting || self.transmit_capacity() == 0 {
            at_most(TX_WAIT_MAX);
        }
        if !self.pending.is_empty() {
            at_most(PENDING_WAIT_MAX);
        }
        bound
    }
}

/// UDP payload bytes that fit the MTU and the frames of one packet.
fn payload_max(mtu_bytes: u32, transmitter: &Transmitter) -> usize {
    let by_mtu = (mtu_bytes as usize).saturating_sub(IP_OVERHEAD_BYTES);
    by_mtu.min(transmitter.payload_max())
}

impl Datapath for AfXdp {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn local_addr(&self) -> SocketAddrV6 {
        self.local
    }

    fn receive(&mut self, now: Instant, batch: &mut RxBatch) {
        self.now = now;
        self.upkeep(now);
        let XskSocket { rings, umem, xsk, .. } = &mut self.socket;
        self.transmitter.drain_completions(rings, umem, now);
        let addresses = self.neighbors.addresses();
        let wake = self.receiver.receive(rings, umem, addresses, batch, &mut self.counters);
        if wake {
            self.counters.system_calls += 1;
            match xsk.wake_rx() {
                Ok(()) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => self.fail("recvfrom to wake the receive side", &error),
            }
        }
        self.receive_slow_path(batch);
    }

    fn transmit_capacity(&self) -> usize {
        let XskSocket { rings, umem, .. } = &self.socket;
        self.transmitter.capacity(rings, umem, self.payload_max)
    }

    fn transmit(&mut self, meta: &TxMeta, payload: &[u8]) -> TxVerdict {
        if payload.len() > self.payload_max {
            return self.drop_tx(TxDrop::TooLarge);
        }
        if self.failed {
            return self.drop_tx(TxDrop::Io);
        }
        if !self.link_up {
            return self.drop_tx(TxDrop::LinkDown);
        }
        match self.neighbors.resolve(self.now, &meta.remote, meta.local) {
            Resolution::Ready(hop) => {
                let XskSocket { rings, umem, .. } = &mut self.socket;
                let counters = &mut self.counters;
                if self.transmitter.place(rings, umem, &hop, meta, payload, counters) {
                    TxVerdict::Accepted
                } else {
                    TxVerdict::Full
                }
            }
            Resolution::Pending => {
                if self.pending.push(self.now, meta, payload) {
                    TxVerdict::Accepted
                } else {
                    self.drop_tx(TxDrop::NeighborQueueFull)
                }
            }
            Resolution::NoRoute => self.drop_tx(TxDrop::NoRoute),
            Resolution::LinkDown => self.drop_tx(TxDrop::LinkDown),
        }
    }

    fn flush(&mut self, now: Instant) {
        self.now = now;
        if self.failed {
            return;
        }
        let XskSocket { rings, umem, xsk, .. } = &mut self.socket;
        match self.transmitter.flush(xsk, rings, umem, &mut self.counters, now) {
            Flushed::Fine => {}
            // The kernel takes packets again before its notification reaches us.
            Flushed::Kicked => self.set_link(self.link_up || self.neighbors.link_up()),
            Flushed::LinkDown => self.set_link(false),
            Flushed::Gone(error) => self.fail("sendto", &error),
        }
    }

    fn poll_event(&mut self) -> Option<DatapathEvent> {
        self.events.pop_front()
    }

    fn max_udp_payload(&self, _remote: &SocketAddrV6) -> u16 {
        self.payload_max as u16
    }

    fn wait(&mut self, wake: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<()> {
        if !self.events.is_empty() {
            return Ok(());
        }
        let bound = self.wait_bound(timeout);
        // Without a slow path its place is taken by a descriptor that is watched anyway.
        let slow_path = self.slow_path.as_ref().map(SocketDatapath::udp_socket);
        let slow_path = slow_path.unwrap_or_else(|| self.neighbors.fd());
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::from_borrowed_fd(slow_path, PollFlags::IN),
            PollFd::from_borrowed_fd(self.neighbors.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
        ];
        let bound = bound.map(|bound| Timespec {
            tv_sec: bound.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: bound.subsec_nanos().into(),
        });
        // The error of a socket that has failed stays pending and would end every wait at once.
        let watched = if self.failed { &mut fds[3..] } else { &mut fds[..] };
        self.counters.system_calls += 1;
        match poll(watched, bound.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let [rings, slow_path, netlink, _] = fds.map(|fd| fd.revents());
        self.slow_path_ready |= !slow_path.is_empty();
        self.netlink_ready |= !netlink.is_empty();
        if rings.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            self.handle_socket_error()?;
        }
        Ok(())
    }

    fn counters(&self) -> DatapathCounters {
        let census = self.socket.umem.census();
        let mut counters = DatapathCounters {
            frames_free: census.free.into(),
            frames_fill: census.fill.into(),
            frames_tx: census.tx.into(),
            rx_drop_overrun: self.statistics.rx_dropped + self.statistics.rx_ring_full,
            ..self.counters
        };
        if let Some(slow_path) = &self.slow_path {
            counters.add(&slow_path.counters());
        }
        counters
    }
}

impl Primary for AfXdp {
    type Standby = SocketDatapath;

    fn take_standby(&mut self) -> Option<SocketDatapath> {
        self.slow_path.take()
    }

    fn give_standby(&mut self, mut standby: SocketDatapath) {
        standby.discard_unsent();
        self.slow_path = Some(standby);
        self.slow_path_ready = true;
    }
}

impl AfXdp {
    /// `poll` reported an error on the socket: find out which, and tell.
    fn handle_socket_error(&mut self) -> io::Result<()> {
        match rustix::net::sockopt::socket_error(&self.socket)? {
            Ok(()) => {}
            // ENETDOWN here means that the device was unregistered; a link that
            // is merely down is not an error of the socket.
            Err(error) => self.fail("poll", &error.into()),
        }
        Ok(())
    }
}

impl Drop for AfXdp {
    fn drop(&mut self) {
        // Takes the queue out of the redirect map, so that packets go to the
        // kernel from now on instead of to a closed socket.
        if let Err(error) = self.interface.program().clear_socket(self.queue) {
            tracing::warn!(interface = self.interface.name, queue = self.queue, %error,
                "cannot take the socket out of the XDP program's map");
        }
    }
}

/// Answers of a wake-up call that mean "later", not "never".
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR | libc::ENETDOWN)
    )
}
