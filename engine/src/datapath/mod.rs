//! The seam between a shard and the wire.
//!
//! A [`Datapath`] moves whole UDP datagrams over IPv6 for exactly one shard: it
//! is driven from the shard's thread only, never blocks except in
//! [`wait`](Datapath::wait), and knows nothing of QUIC. Implementations:
//! AF_XDP rings ([`af_xdp`]), kernel sockets ([`io_uring`], [`socket`]), the pair of
//! both that outlives its device (`failover`), and in-memory links in virtual time ([`sim`]).
//!
//! Ownership: received bytes are copied once into the turn's [`RxBatch`] slab,
//! so that a ring's frame returns to the kernel at once; sent bytes are copied
//! into the datapath's own TX memory by [`transmit`](Datapath::transmit), or
//! change owners whole with [`transmit_batch`](Datapath::transmit_batch), so that
//! the caller's buffer is free again when the call returns.

pub mod af_xdp;
pub mod choice;
pub(crate) mod failover;
pub mod io_uring;
pub mod open;
pub mod sim;
pub mod socket;
pub mod steering;
pub mod udp_socket;

use std::any::Any;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};

/// Explicit congestion notification: the two low bits of the IPv6 traffic class (RFC 3168 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Ecn {
    /// The sender does not take part.
    #[default]
    NotEct = 0b00,
    /// ECT(1), RFC 8311.
    Ect1 = 0b01,
    /// ECT(0): what STOQ sends.
    Ect0 = 0b10,
    /// Congestion experienced: set by a router.
    Ce = 0b11,
}

impl Ecn {
    /// The codepoint in the two low bits of a traffic class byte.
    #[must_use]
    pub const fn from_traffic_class(traffic_class: u8) -> Self {
        match traffic_class & 0b11 {
            0b00 => Self::NotEct,
            0b01 => Self::Ect1,
            0b10 => Self::Ect0,
            _ => Self::Ce,
        }
    }
}

/// Where a datagram goes and how it is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxMeta {
    /// The peer's address and port; a link-local one needs its scope.
    pub remote: SocketAddrV6,
    /// The source address, or `None` to let the datapath choose by route.
    pub local: Option<Ipv6Addr>,
    /// The mark to set.
    pub ecn: Ecn,
}

/// What became of a datagram given to [`Datapath::transmit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum TxVerdict {
    /// In the TX memory (or waiting for its neighbour in the bounded queue); it leaves with the next flush.
    Accepted,
    /// No room now: the datagram was not taken, try again next turn. Does not
    /// happen while [`transmit_capacity`](Datapath::transmit_capacity) is above zero.
    Full,
    /// Not taken and not worth trying again: counted under its reason. QUIC's
    /// loss recovery deals with it as with a packet lost on the way.
    Dropped(TxDrop),
}

/// Why a datagram could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TxDrop {
    /// Larger than the interface's MTU allows.
    TooLarge,
    /// The kernel has no route to the peer.
    NoRoute,
    /// The next hop's link-layer address is unknown and too many packets wait for it already.
    NeighborQueueFull,
    /// The interface is down.
    LinkDown,
    /// The kernel refused it.
    Io,
}

/// One received datagram.
#[derive(Debug)]
pub struct RxDatagram {
    /// Sender.
    pub remote: SocketAddrV6,
    /// The address that it was sent to.
    pub local: Ipv6Addr,
    /// The mark it arrived with.
    pub ecn: Ecn,
    /// UDP payload.
    pub data: BytesMut,
}

/// The datagrams of one turn, in one slab.
///
/// The slab is recycled once every `Bytes` that was split off it is gone, so in
/// the steady state a turn does not allocate.
#[derive(Debug)]
pub struct RxBatch {
    datagrams: Vec<RxDatagram>,
    limit: usize,
    slab: BytesMut,
    slab_bytes: usize,
}

impl RxBatch {
    /// A batch of at most `limit` datagrams over slabs of `slab_bytes`.
    #[must_use]
    pub fn new(limit: usize, slab_bytes: usize) -> Self {
        Self {
            datagrams: Vec::with_capacity(limit),
            limit,
            slab: BytesMut::with_capacity(slab_bytes),
            slab_bytes,
        }
    }

    /// Whether the batch holds as many datagrams as a turn may take.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.datagrams.len() >= self.limit
    }

    /// Number of datagrams held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.datagrams.len()
    }

    /// Whether no datagram is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// How many more datagrams fit this turn.
    #[must_use]
    pub fn room(&self) -> usize {
        self.limit - self.datagrams.len()
    }

    /// Copies one datagram, given as consecutive fragments (the buffers of a
    /// multi-buffer AF_XDP packet, or one GRO segment), into the slab.
    ///
    /// # Panics
    /// If the batch is full: ask [`is_full`](Self::is_full) first.
    pub fn push(&mut self, remote: SocketAddrV6, local: Ipv6Addr, ecn: Ecn, parts: &[&[u8]]) {
        assert!(!self.is_full(), "RxBatch::push on a full batch");
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.reserve(len);
        for part in parts {
            self.slab.put_slice(part);
        }
        let data = self.slab.split_to(len);
        self.datagrams.push(RxDatagram { remote, local, ecn, data });
    }

    /// Copies the datagrams of one kernel message, `segment_bytes` each and the last one shorter,
    /// as many as the batch has room for; returns how many bytes of `message` they are.
    ///
    /// They are copied together: each split of a slab is an atomic operation, which waits until all
    /// that was written before has left the store buffer. A split after each datagram would wait for
    /// the cache misses of that datagram alone.
    ///
    /// # Panics
    /// If the batch is full: ask [`is_full`](Self::is_full) first; or `segment_bytes` is 0.
    pub fn push_segments(
        &mut self,
        remote: SocketAddrV6,
        local: Ipv6Addr,
        ecn: Ecn,
        message: &[u8],
        segment_bytes: usize,
    ) -> usize {
        assert!(!self.is_full(), "RxBatch::push_segments on a full batch");
        let mut taken = 0;
        loop {
            let rest = &message[taken..];
            self.reserve(rest.len().min(segment_bytes));
            let fit = (self.slab.capacity() - self.slab.len()) / segment_bytes;
            let part = &rest[..rest.len().min(self.room().min(fit.max(1)) * segment_bytes)];
            self.slab.put_slice(part);
            taken += part.len();
            loop {
                let data = self.slab.split_to(self.slab.len().min(segment_bytes));
                self.datagrams.push(RxDatagram { remote, local, ecn, data });
                if self.slab.is_empty() {
                    break;
                }
            }
            if taken == message.len() || self.is_full() {
                return taken;
            }
        }
    }

    /// Adds a datagram that already owns its bytes.
    ///
    /// # Panics
    /// If the batch is full: ask [`is_full`](Self::is_full) first.
    pub fn push_owned(&mut self, datagram: RxDatagram) {
        assert!(!self.is_full(), "RxBatch::push_owned on a full batch");
        self.datagrams.push(datagram);
    }

    /// Takes the datagrams out in order of arrival.
    pub fn drain(&mut self) -> std::vec::Drain<'_, RxDatagram> {
        self.datagrams.drain(..)
    }

    fn reserve(&mut self, len: usize) {
        if self.slab.capacity() - self.slab.len() >= len {
            return;
        }
        debug_assert!(self.slab.is_empty());
        if !self.slab.try_reclaim(len.max(self.slab_bytes)) {
            self.slab = BytesMut::with_capacity(len.max(self.slab_bytes));
        }
    }
}

/// Which kind of datapath carries a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DatapathKind {
    /// AF_XDP rings fed by our XDP program.
    AfXdp,
    /// io_uring over a kernel UDP socket.
    IoUring,
    /// `recvmmsg`/`sendmmsg` over a kernel UDP socket.
    Socket,
    /// In-memory links in virtual time.
    Sim,
}

impl DatapathKind {
    /// The name used in configurations, logs and `--json` outputs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AfXdp => "af_xdp",
            Self::IoUring => "io_uring",
            Self::Socket => "socket",
            Self::Sim => "sim",
        }
    }
}

/// What a datapath is and can do. It changes when another one takes over for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Kind of datapath.
    pub kind: DatapathKind,
    /// How it runs, in the words of its documentation: `"zero-copy"`, `"copy"`,
    /// `"copy, multi-buffer"`, `"gso+gro"`, `"plain"` …
    pub mode: String,
    /// Interface that it is bound to, where there is one.
    pub interface: Option<String>,
    /// Receive and transmit queue that it owns, where there is one.
    pub queue: Option<u32>,
    /// Why it stands in for the datapath that was opened, while it does.
    pub standby_reason: Option<String>,
}

/// Something that the shard must know about the link beneath it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DatapathEvent {
    /// The interface's MTU changed: the largest UDP payload that can now leave, in bytes.
    MaxUdpPayload(u16),
    /// The interface went down. Datagrams are dropped and counted until it is up again.
    LinkDown,
    /// The interface is up again.
    LinkUp,
    /// The local addresses changed: paths may have to migrate.
    AddressesChanged,
    /// Another datapath carries the shard from now on, which
    /// [`capabilities`](Datapath::capabilities) describes; the text says why.
    Changed(String),
    /// The datapath cannot continue; the text says what happened and what to do.
    Failed(String),
}

/// Counters that every datapath keeps; monotonic but for the frames, in the units of their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct DatapathCounters {
    /// Datagrams handed to the shard.
    pub rx_datagrams: u64,
    /// Their UDP payload bytes.
    pub rx_bytes: u64,
    /// Datagrams that came through the kernel's socket instead of the rings (AF_XDP's slow path).
    pub rx_slow_path: u64,
    /// Dropped: not a well-formed Ethernet/IPv6/UDP packet.
    pub rx_drop_malformed: u64,
    /// Dropped: wrong UDP checksum, or none (RFC 8200 §8.1).
    pub rx_drop_checksum: u64,
    /// Dropped: not addressed to our port or address.
    pub rx_drop_not_ours: u64,
    /// Dropped: longer than any datagram that we accept, or truncated by the kernel.
    pub rx_drop_too_long: u64,
    /// Dropped by the kernel because a ring or a socket buffer was full.
    pub rx_drop_overrun: u64,
    /// Datagrams accepted for sending.
    pub tx_datagrams: u64,
    /// Their UDP payload bytes.
    pub tx_bytes: u64,
    /// Dropped: see [`TxDrop::TooLarge`].
    pub tx_drop_too_large: u64,
    /// Dropped: see [`TxDrop::NoRoute`].
    pub tx_drop_no_route: u64,
    /// Dropped: see [`TxDrop::NeighborQueueFull`], or the neighbour never answered.
    pub tx_drop_neighbor: u64,
    /// Dropped: see [`TxDrop::LinkDown`].
    pub tx_drop_link_down: u64,
    /// Dropped: see [`TxDrop::Io`].
    pub tx_drop_io: u64,
    /// Times that the kernel's socket took over because the device or its driver failed.
    pub failovers: u64,
    /// Times that the device was taken into use again after that.
    pub returns: u64,
    /// System calls made to receive, to kick and to send.
    pub system_calls: u64,
    /// Bytes copied in userspace between packet memory and the engine's buffers.
    pub copied_bytes: u64,
    /// AF_XDP: frames of packet memory that are free now. The three kinds add up to all frames.
    pub frames_free: u64,
    /// AF_XDP: frames that are with the kernel for receiving now.
    pub frames_fill: u64,
    /// AF_XDP: frames that are with the kernel for sending now.
    pub frames_tx: u64,
}

/// Datagrams built at once for a datapath that copies each into a frame: few enough to stay in
/// the first-level cache until then.
const BATCH_DATAGRAMS_MAX: usize = 8;

/// One shard's way to the wire. See the [module documentation](self).
pub trait Datapath {
    /// What this datapath is and can do.
    fn capabilities(&self) -> &Capabilities;

    /// The address that it is bound to (port never zero).
    fn local_addr(&self) -> SocketAddrV6;

    /// Moves arrived datagrams into `batch` until it is full or nothing is left,
    /// and does the datapath's own upkeep (fill ring, completions, neighbours).
    /// `now` is the turn's time.
    fn receive(&mut self, now: Instant, batch: &mut RxBatch);

    /// How many datagrams [`transmit`](Self::transmit) will certainly take before the next flush.
    fn transmit_capacity(&self) -> usize;

    /// Copies one datagram towards the wire. It leaves with the next [`flush`](Self::flush).
    fn transmit(&mut self, meta: &TxMeta, payload: &[u8]) -> TxVerdict;

    /// How many datagrams of `segment_bytes` one [`transmit_batch`](Self::transmit_batch) takes
    /// at best, at least 1.
    fn batch_datagrams_max(&self, segment_bytes: usize) -> usize {
        let _ = segment_bytes;
        self.transmit_capacity().clamp(1, BATCH_DATAGRAMS_MAX)
    }

    /// Takes all of `buffer`: datagrams of `segment_bytes` each, of which the last may be
    /// shorter, at most [`batch_datagrams_max`](Self::batch_datagrams_max). A datapath that sends
    /// from memory of this shape keeps the buffer and gives back another, so that nothing is
    /// copied. `buffer` comes back empty and with the capacity that it had. Returns how many
    /// datagrams were dropped, each counted under its reason.
    fn transmit_batch(
        &mut self,
        meta: &TxMeta,
        segment_bytes: usize,
        buffer: &mut Vec<u8>,
    ) -> usize {
        let taken = |payload| self.transmit(meta, payload) == TxVerdict::Accepted;
        let dropped = buffer.chunks(segment_bytes).map(taken).filter(|taken| !taken).count();
        buffer.clear();
        dropped
    }

    /// Makes everything accepted leave: at most one kick per queue and turn.
    fn flush(&mut self, now: Instant);

    /// The next thing that the shard must know, if any. Cheap when there is none.
    fn poll_event(&mut self) -> Option<DatapathEvent>;

    /// The largest UDP payload that can leave towards `remote` now, in bytes
    /// (interface MTU less 48 bytes of IPv6 and UDP header, capped by the frames).
    fn max_udp_payload(&self, remote: &SocketAddrV6) -> u16;

    /// Sleeps until a datagram can be received, transmission that was `Full` can
    /// go on, `wake` becomes readable, or `timeout` is over (`None`: no limit).
    /// May return early. Does not read from `wake`.
    ///
    /// # Errors
    /// Only when the system call itself is broken; the shard then stops.
    fn wait(&mut self, wake: BorrowedFd<'_>, timeout: Option<Duration>) -> std::io::Result<()>;

    /// Counters so far.
    fn counters(&self) -> DatapathCounters;

    /// Takes a datapath that another thread has opened for this shard, if it can be used now; it
    /// is dropped otherwise. Only a datapath that replaces a failed part of itself takes any.
    fn adopt(&mut self, now: Instant, offer: Box<dyn Any>) {
        let _unused = (now, offer);
    }
}
