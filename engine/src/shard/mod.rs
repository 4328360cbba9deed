//! One shard: the whole way of a packet, in both directions, top to bottom.
//!
//! ```text
//!            NIC queue                                     application
//!               │ XDP redirect / GRO                            ▲ Bytes, no copy
//!   receive ────▼──── RX ring ── wire checks ── slab ──┐        │
//!                                   owner by DCID? ────┼──▶ another shard's mailbox
//!                                                      ▼        │
//!   service ─────────────── Endpoint ▶ Connection (whole batch) ┘ events, then
//!                                                      │
//!   transmit ── gate + pacer ── poll_transmit ── one batch ── TX frames / GSO message
//!               │
//!   flush ──────▼──── one kick per turn
//! ```
//!
//! [`Shard::turn`] is one lap. Every step is bounded by a named limit
//! ([`crate::config`]), so no flood of one kind starves the others. The shard owns
//! everything it touches; other threads reach it through its mailbox only. It runs
//! the same over rings, sockets and the simulator.

pub(crate) mod mailbox;
mod overdue;
mod panics;
mod pool;
mod sealing;
pub(crate) mod spin;
pub(crate) mod worker;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::{Event, StreamEvent, VarInt};

use crate::app::{ConnId, Incoming, ShardApp, ShardCx};
use crate::clock::Clock;
use crate::config::{
    APP_TIMERS_PER_TURN_MAX, CLOSES_PER_TURN_MAX, MAILBOX_COMMANDS_PER_TURN_MAX,
    POOL_CONNECTS_PER_TURN_MAX, RX_BATCH_DATAGRAMS_MAX, RX_SLAB_BYTES, SPIN_UNTIL_PACED_US_MAX,
    TX_PACKETS_PER_VISIT_MAX, TX_VISITS_PER_TURN_MAX,
};
use crate::datapath::{Datapath, DatapathEvent, RxBatch, RxDatagram, TxVerdict};
use crate::error::ConnectionError;
use crate::handles::HandleApp;
use crate::metrics::ShardMetrics;
use crate::proto::balance::Loads;
use crate::proto::cid::{CidTable, Cids};
use crate::proto::paths::PathMemory;
use crate::proto::{AppEvent, Gate, Owner, Protocol, tx_meta};
use mailbox::{Command, Mailbox, ShutdownOrder};

/// What a turn found, so that the worker knows whether to spin, park or stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Something was received, sent or done.
    pub worked: bool,
    /// More can be done at once, without waiting for anything.
    pub more: bool,
    /// When the shard must turn again if nothing arrives before.
    pub deadline: Option<Instant>,
    /// After a turn without work: the round trip of a connection that has data and waits for its
    /// pacer, which lets it go within [`SPIN_UNTIL_PACED_US_MAX`].
    pub paced_rtt: Option<Duration>,
    /// The shard has ended: everything is closed and flushed.
    pub ended: bool,
}

/// A shutdown under way.
struct Ending {
    order: ShutdownOrder,
    /// Streams may go on until then.
    close_at: Instant,
    /// Draining is given up then.
    end_at: Instant,
    closed: bool,
    /// Connections that are not yet told.
    to_close: Vec<ConnId>,
}

/// The other shards of the engine, for packets that arrived at the wrong one.
#[derive(Clone)]
pub(crate) struct Siblings {
    pub(crate) mailboxes: Arc<[Mailbox]>,
    pub(crate) cids: Cids,
    pub(crate) loads: Loads,
    pub(crate) paths: Option<Arc<PathMemory>>,
}

/// One core's share of the engine. See the [module documentation](self).
pub struct Shard<D: Datapath, C: Clock> {
    datapath: D,
    clock: C,
    proto: Protocol,
    handles: HandleApp,
    app: Option<Box<dyn ShardApp>>,
    mailbox: Mailbox,
    siblings: Siblings,
    woken: Vec<usize>,
    rx: RxBatch,
    /// The rest of a batch that took its share of the turn; at most one batch.
    unhandled: VecDeque<RxDatagram>,
    /// What `poll_transmit` builds; datapaths that can, send from it.
    batch: Vec<u8>,
    /// Datagrams that a provider seals meanwhile; `None` where packets are sealed when built.
    sealing: Option<sealing::Sealing>,
    /// Distinct per batch: congestion control tells packets apart by it.
    stamp: Instant,
    /// Until when the pacer holds back a connection, and its round trip; may lie in the past.
    paced: Option<(Instant, Duration)>,
    overdue: Vec<ConnId>,
    ending: Option<Ending>,
    failed: Option<String>,
    /// Attempts that the pools may still start in this turn.
    pool_connects_left: usize,
    /// Packets sent on connections.
    tx_packets: u64,
    metrics: Arc<ShardMetrics>,
}

/// How long closing connections may drain after the last one was told (RFC 9000 §10.2: three PTOs).
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// With this code a peer's connection is closed when the application on the shard panicked.
const APP_PANIC_CODE: VarInt = VarInt::from_u32(0x70_61_6e);

impl<D: Datapath, C: Clock> Shard<D, C> {
    // Every argument is a part with an owner of its own; a struct would only name them twice.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        datapath: D,
        clock: C,
        proto: Protocol,
        handles: HandleApp,
        app: Option<Box<dyn ShardApp>>,
        mailbox: Mailbox,
        siblings: Siblings,
        metrics: Arc<ShardMetrics>,
    ) -> Self {
        let now = clock.now();
        Self {
            datapath,
            clock,
            proto,
            handles,
            app,
            mailbox,
            siblings,
            woken: Vec::new(),
            rx: RxBatch::new(RX_BATCH_DATAGRAMS_MAX, RX_SLAB_BYTES),
            unhandled: VecDeque::with_capacity(RX_BATCH_DATAGRAMS_MAX),
            // Reserved up front: poll_transmit must never move it (ARCHITECTURE, decision 9).
            batch: Vec::with_capacity(usize::from(u16::MAX) + 1),
            sealing: None,
            stamp: now,
            paced: None,
            overdue: Vec::new(),
            ending: None,
            failed: None,
            pool_connects_left: 0,
            tx_packets: 0,
            metrics,
        }
    }

    /// One lap: in, up, out.
    pub fn turn(&mut self) -> Turn {
        let now = self.clock.now();
        self.pool_connects_left = POOL_CONNECTS_PER_TURN_MAX;
        let mut worked = self.receive(now);
        worked |= self.drain_mailbox(now);
        worked |= self.expire_timers(now);
        worked |= self.service(now);
        worked |= self.transmit(now);
        self.flush(now);
        let cx = &mut handle_cx(&mut self.proto, &self.datapath, now);
        self.handles.publish_statistics(cx, !worked);
        self.finish_turn(now, worked)
    }

    // --- in ---------------------------------------------------------------------------

    /// RX ring → slab → the owner's connection. The batch is handled whole before anything is sent.
    /// What a turn's share left of the last batch comes before a new one: packets keep their order.
    fn receive(&mut self, now: Instant) -> bool {
        self.proto.begin_turn();
        let mut worked = !self.unhandled.is_empty();
        let cids = self.siblings.cids.table();
        while self.proto.may_go_on() {
            let Some(datagram) = self.unhandled.pop_front() else { break };
            self.route(now, &cids, datagram);
        }
        if self.unhandled.is_empty() {
            self.datapath.receive(now, &mut self.rx);
        }
        if !self.rx.is_empty() {
            worked = true;
            self.metrics.rx_batch.record(self.rx.len() as u64);
        }
        let mut batch = std::mem::replace(&mut self.rx, RxBatch::new(0, 0));
        for datagram in batch.drain() {
            if self.proto.may_go_on() {
                self.route(now, &cids, datagram);
            } else {
                self.unhandled.push_back(datagram);
            }
        }
        self.rx = batch;
        for shard in self.woken.drain(..) {
            self.siblings.mailboxes[shard].wake();
        }
        while let Some(event) = self.datapath.poll_event() {
            worked = true;
            self.handle_link_event(now, event);
        }
        self.proto.migrate_some();
        worked
    }

    /// Mine, or another shard's by its connection ID.
    fn route(&mut self, now: Instant, cids: &CidTable, datagram: RxDatagram) {
        if self.siblings.mailboxes.len() > 1 {
            match cids.owner(&datagram.data) {
                Some(owner) if owner == self.proto.shard_index() => {}
                Some(owner) => return self.hand_over(owner, datagram),
                None => {
                    self.proto.counters.rx_drop_no_owner += 1;
                    return;
                }
            }
        }
        self.handle_datagram(now, datagram);
    }

    fn hand_over(&mut self, owner: usize, datagram: RxDatagram) {
        match self.siblings.mailboxes[owner].hand_over(datagram) {
            Ok(()) => {
                self.proto.counters.rx_handed_over += 1;
                if !self.woken.contains(&owner) {
                    self.woken.push(owner);
                }
            }
            Err(_dropped) => self.proto.counters.rx_drop_handoff_full += 1,
        }
    }

    fn handle_datagram(&mut self, now: Instant, datagram: RxDatagram) {
        if let Some(incoming) = self.proto.handle_datagram(now, datagram) {
            self.handle_incoming(now, incoming);
        }
    }

    /// Datagrams that arrived at other shards, then commands of other threads.
    fn drain_mailbox(&mut self, now: Instant) -> bool {
        let mut worked = false;
        // A share of its own, too: handshakes of this shard's queue cannot hold back the others'.
        self.proto.begin_share();
        for _ in 0..RX_BATCH_DATAGRAMS_MAX {
            if !self.proto.may_go_on() {
                break;
            }
            let Some(datagram) = self.mailbox.pop_datagram() else { break };
            self.proto.counters.rx_taken_over += 1;
            worked = true;
            self.handle_datagram(now, datagram);
        }
        if let Some(wait) = self.mailbox.take_wait(now) {
            self.metrics.mailbox_wait_ns.record_duration(wait);
        }
        // Each kind has its share of the turn: busy handles cannot hold back a connect or a shutdown.
        self.proto.begin_share();
        for _ in 0..MAILBOX_COMMANDS_PER_TURN_MAX {
            if !self.proto.may_go_on() {
                break;
            }
            let Some(notice) = self.mailbox.pop_notice() else { break };
            self.proto.counters.commands += 1;
            worked = true;
            self.handles
                .handle_command(&mut handle_cx(&mut self.proto, &self.datapath, now), notice);
        }
        self.proto.begin_share();
        for _ in 0..MAILBOX_COMMANDS_PER_TURN_MAX {
            if !self.proto.may_go_on() {
                break;
            }
            let Some(command) = self.mailbox.pop() else { break };
            self.proto.counters.commands += 1;
            worked = true;
            self.handle_command(now, command);
        }
        worked
    }

    /// Loss detection, idle and pacing timers, the application's, the shutdown's.
    fn expire_timers(&mut self, now: Instant) -> bool {
        let mut overdue = std::mem::take(&mut self.overdue);
        self.proto.expire(now, &mut overdue);
        let mut worked = !overdue.is_empty();
        for conn in overdue.drain(..) {
            self.end_overdue(now, conn);
        }
        self.overdue = overdue;
        for _ in 0..APP_TIMERS_PER_TURN_MAX {
            let Some((owner, token)) = self.proto.pop_app_timer(now) else { break };
            worked = true;
            self.call(now, owner, None, |app, cx| app.handle_timer(cx, token));
        }
        self.proto.expire_pools(now);
        self.advance_ending(now);
        worked
    }

    // --- up ---------------------------------------------------------------------------

    /// Events of every touched connection, to whoever owns it.
    fn service(&mut self, now: Instant) -> bool {
        let mut worked = false;
        loop {
            while let Some(slot) = self.proto.next_touched() {
                worked = true;
                while let Some((conn, owner, event)) = self.proto.poll_event(now, slot) {
                    self.dispatch(now, conn, owner, event);
                }
                if let Some(conn) = self.proto.conn_in_slot(slot)
                    && conn.owner == Owner::Handles
                {
                    self.handles.note_touched(conn.id);
                }
            }
            // Handles queue their stream work; one pass serves a whole batch of it.
            let pumped = self.handles.pump(&mut handle_cx(&mut self.proto, &self.datapath, now));
            if !self.drive_pools(now) && !pumped {
                return worked;
            }
            worked = true;
        }
    }

    fn dispatch(&mut self, now: Instant, conn: ConnId, owner: Owner, event: AppEvent) {
        let event = match event {
            AppEvent::Quic(event) => event,
            AppEvent::Drained { reported, pool_entry } => {
                self.proto.counters.closed += 1;
                let reason = ConnectionError::ClosedLocally;
                if let Some(entry) = pool_entry {
                    self.proto.pool(owner).handle_closed(now, entry, &reason);
                }
                if !reported {
                    self.call(now, owner, None, |app, cx| app.handle_closed(cx, conn, &reason));
                }
                return;
            }
        };
        match event {
            Event::HandshakeDataReady => {
                if owner == Owner::Handles {
                    let mut cx = handle_cx(&mut self.proto, &self.datapath, now);
                    self.handles.handle_handshake_data(&mut cx, conn);
                }
            }
            Event::Connected => {
                self.proto.handshake_over(conn);
                self.proto.note_connected(conn);
                self.proto.pool_connected(now, conn);
                self.call(now, owner, Some(conn), |app, cx| app.handle_connected(cx, conn));
            }
            Event::ConnectionLost { reason } => {
                self.proto.handshake_over(conn);
                self.tell_closed(now, conn, owner, &reason.into());
            }
            Event::Stream(event) => {
                if let StreamEvent::Opened { dir } = event {
                    self.proto.note_streams_opened(now, conn, dir);
                }
                self.call(now, owner, Some(conn), |app, cx| match event {
                    StreamEvent::Opened { dir } => app.handle_stream_opened(cx, conn, dir),
                    StreamEvent::Readable { id } => app.handle_readable(cx, conn, id),
                    StreamEvent::Writable { id } => app.handle_writable(cx, conn, id),
                    StreamEvent::Finished { id } => app.handle_finished(cx, conn, id),
                    StreamEvent::Stopped { id, error_code } => {
                        app.handle_stopped(cx, conn, id, error_code);
                    }
                    StreamEvent::Available { dir } => app.handle_streams_available(cx, conn, dir),
                })
            }
            Event::DatagramReceived => {
                self.call(now, owner, Some(conn), |app, cx| app.handle_datagrams(cx, conn));
            }
            Event::DatagramsUnblocked => {
                self.call(now, owner, Some(conn), |app, cx| {
                    app.handle_datagrams_unblocked(cx, conn);
                });
            }
        }
    }

    /// Tells owner and pool of a connection's end, once.
    fn tell_closed(&mut self, now: Instant, conn: ConnId, owner: Owner, reason: &ConnectionError) {
        if self.proto.report_closed(conn) {
            if let Some(conn) = self.proto.conn(conn) {
                tracing::debug!(parent: &conn.span, %reason, "closed");
            }
            self.proto.pool_closed(now, conn, reason);
            self.call(now, owner, None, |app, cx| app.handle_closed(cx, conn, reason));
        }
    }

    /// Calls whoever owns a connection. What a panic of the application ends: `panics.rs`.
    fn call(
        &mut self,
        now: Instant,
        owner: Owner,
        conn: Option<ConnId>,
        f: impl FnOnce(&mut dyn ShardApp, &mut ShardCx<'_>),
    ) {
        let mut cx = ShardCx { proto: &mut self.proto, paths: &self.datapath, now, owner };
        let (Owner::App, Some(app)) = (owner, &mut self.app) else {
            return f(&mut self.handles, &mut cx);
        };
        // What the call left half done is the application's state, which only it sees, and the
        // connection's, which is closed; no engine code on the way back up is skipped.
        let called = catch_unwind(AssertUnwindSafe(|| f(app.as_mut(), &mut cx)));
        if let Err(payload) = called {
            self.handle_app_panic(now, conn, payload.as_ref());
        }
    }

    fn handle_incoming(&mut self, now: Instant, incoming: Incoming) {
        let owner = if self.app.is_some() { Owner::App } else { Owner::Handles };
        self.proto.accepted_last = None;
        let panics_before = self.proto.counters.app_panics;
        self.call(now, owner, None, |app, cx| app.handle_incoming(cx, incoming));
        if self.proto.counters.app_panics != panics_before {
            self.close_accepted(now);
        }
    }

    // --- out --------------------------------------------------------------------------

    /// Gate and pacer → poll_transmit → batch → TX memory, fairly over the connections.
    fn transmit(&mut self, now: Instant) -> bool {
        let mut worked = self.transmit_responses();
        worked |= self.transmit_sealed(now);
        let before = self.tx_packets;
        for _ in 0..self.proto.tx_queue_len().min(TX_VISITS_PER_TURN_MAX) {
            if !self.can_seal() {
                break;
            }
            if self.datapath.transmit_capacity() == 0 {
                self.proto.counters.tx_ring_full += 1;
                break;
            }
            let Some(slot) = self.proto.pop_tx() else { break };
            let (sent, more) = self.transmit_connection(now, slot);
            self.tx_packets += sent as u64;
            worked |= sent > 0;
            if more {
                self.proto.requeue_tx(slot);
            } else {
                self.proto.file_deadline(slot);
            }
        }
        if self.tx_packets != before {
            self.metrics.tx_batch.record(self.tx_packets - before);
        }
        worked
    }

    /// At most one visit's packets of one connection; the second value says whether it has more.
    fn transmit_connection(&mut self, now: Instant, slot: u32) -> (usize, bool) {
        // Real time passes while packets are built, and stamps must not run ahead of it for
        // long: congestion control tells batches apart by a nanosecond, and treats the packets
        // of one batch, which leave together, alike.
        self.stamp = self.stamp.max(now);
        let mut sent = 0;
        while sent < TX_PACKETS_PER_VISIT_MAX {
            if self.datapath.transmit_capacity() == 0 || !self.can_seal() {
                return (sent, true);
            }
            let Some(conn) = self.proto.conn_in_slot(slot) else { return (sent, false) };
            self.stamp += Duration::from_nanos(1);
            // Empty each time: quinn-proto writes garbage behind what is in the buffer.
            self.batch.clear();
            let gate = conn.gate(now);
            let packets = match gate {
                Gate::Open { packets } => packets
                    .min(TX_PACKETS_PER_VISIT_MAX - sent)
                    .min(self.datapath.batch_datagrams_max(conn.inner.current_mtu().into())),
                Gate::Window | Gate::Paced(_) => 1,
            };
            if let Gate::Paced(until) = gate
                && until < now + Duration::from_micros(SPIN_UNTIL_PACED_US_MAX)
            {
                self.paced = Some((until, conn.inner.rtt()));
            }
            let mut polled = sealing::poll(&mut self.sealing, || {
                conn.inner.poll_transmit(self.stamp, packets, &mut self.batch)
            });
            conn.note_attempt(gate, polled.is_some());
            let held = !matches!(gate, Gate::Open { .. });
            if polled.is_none() && held && conn.open_for_owed_ack(now) {
                self.batch.clear();
                polled = sealing::poll(&mut self.sealing, || {
                    conn.inner.poll_transmit(self.stamp, 1, &mut self.batch)
                });
                self.proto.counters.tx_owed_acks += u64::from(polled.is_some());
            }
            let Some(transmit) = polled else { return (sent, false) };
            let segment_bytes = transmit.segment_size.unwrap_or(transmit.size);
            sent += transmit.size.div_ceil(segment_bytes);
            if let Some(conn) = self.proto.conn_in_slot(slot) {
                conn.on_transmit(now, transmit.size as u64, segment_bytes as u64);
            }
            if self.defer(now, slot, &transmit) {
                continue;
            }
            // Drops are counted by the datapath under their reason; QUIC sees lost packets.
            let dropped =
                self.datapath.transmit_batch(&tx_meta(&transmit), segment_bytes, &mut self.batch);
            self.proto.counters.tx_drop_datapath += dropped as u64;
        }
        (sent, true)
    }

    /// Version negotiation, retries, refusals and resets.
    fn transmit_responses(&mut self) -> bool {
        let mut worked = false;
        while self.datapath.transmit_capacity() > 0 {
            let Some(response) = self.proto.responses.pop_front() else { break };
            worked = true;
            match self.datapath.transmit(&response.meta, &response.payload) {
                TxVerdict::Accepted => {}
                TxVerdict::Dropped(_) | TxVerdict::Full => {
                    self.proto.counters.tx_drop_datapath += 1;
                }
            }
        }
        worked
    }

    /// At most one kick.
    fn flush(&mut self, now: Instant) {
        if let Some(sealing) = &mut self.sealing {
            sealing.flush();
        }
        self.datapath.flush(now);
    }

    // --- upkeep -----------------------------------------------------------------------

    fn finish_turn(&mut self, now: Instant, worked: bool) -> Turn {
        let counters = &mut self.proto.counters;
        counters.turns += 1;
        if worked {
            let took = self.clock.now() - now;
            counters.busy_ns += took.as_nanos() as u64;
            self.metrics.turn_ns.record_duration(took);
        } else {
            counters.turns_idle += 1;
        }
        self.proto.counters.connections = self.proto.live_connections() as u64;
        self.proto.counters.streams = self.handles.streams() as u64;
        self.proto.counters.tx_queue_connections = self.proto.tx_queue_len() as u64;
        self.metrics.publish(&self.proto.counters, &self.datapath.counters());
        if worked {
            self.proto.publish_pools();
        }
        let ending_deadline = self
            .ending
            .as_ref()
            .map(|ending| if ending.closed { ending.end_at } else { ending.close_at });
        let sealing_deadline = self.sealing.as_ref().and_then(|sealing| sealing.deadline(now));
        let deadline = [self.proto.next_deadline(), ending_deadline, sealing_deadline]
            .into_iter()
            .flatten()
            .min();
        Turn {
            worked,
            more: (self.proto.tx_queue_len() > 0
                && self.datapath.transmit_capacity() > 0
                && self.can_seal())
                || self.proto.pools_have_connects()
                || self.proto.is_held_back()
                || (!worked && self.handles.has_unpublished())
                || self.ending.as_ref().is_some_and(|ending| !ending.to_close.is_empty()),
            deadline,
            paced_rtt: if worked { None } else { self.paced_rtt(now) },
            ended: self.has_ended(now),
        }
    }

    /// The round trip of a connection that its pacer holds back.
    fn paced_rtt(&self, now: Instant) -> Option<Duration> {
        self.paced.filter(|(until, _)| *until > now).map(|(_, rtt)| rtt)
    }

    fn handle_command(&mut self, now: Instant, command: Command) {
        match command {
            Command::Handles(command) => {
                self.handles
                    .handle_command(&mut handle_cx(&mut self.proto, &self.datapath, now), command);
            }
            Command::App(message) => {
                self.call(now, Owner::App, None, |app, cx| app.handle_message(cx, message));
            }
            // Dropped before its turn came: nobody waits for the connection.
            Command::Connect { reply, .. } if reply.is_canceled() => {
                self.proto.counters.attempts_abandoned += 1;
            }
            Command::Connect { remote, server_name, config, reply } => {
                let mtu_bytes = self.datapath.max_udp_payload(&remote);
                let result = self.proto.connect(
                    now,
                    remote,
                    mtu_bytes,
                    &server_name,
                    config,
                    Owner::Handles,
                );
                let mut cx = handle_cx(&mut self.proto, &self.datapath, now);
                self.handles.handle_connect_result(&mut cx, result, reply);
            }
            Command::Datapath(offer) => self.datapath.adopt(now, offer),
            Command::Shutdown(order) => self.begin_ending(now, order),
        }
    }

    fn handle_link_event(&mut self, now: Instant, event: DatapathEvent) {
        match event {
            DatapathEvent::MaxUdpPayload(bytes) => {
                tracing::info!(shard = self.proto.shard_index(), bytes, "path MTU limit changed");
            }
            DatapathEvent::LinkDown => {
                tracing::warn!(shard = self.proto.shard_index(), "link down");
            }
            DatapathEvent::LinkUp => {
                tracing::info!(shard = self.proto.shard_index(), "link up");
            }
            DatapathEvent::AddressesChanged => self.proto.local_addresses_changed(now),
            DatapathEvent::Changed(reason) => {
                let path = self.datapath.capabilities();
                let (shard, datapath) = (self.proto.shard_index(), path.kind.name());
                tracing::warn!(shard, datapath, path.mode, reason, "the datapath has changed");
                self.metrics.set_path(path.clone());
            }
            DatapathEvent::Failed(reason) => {
                tracing::error!(shard = self.proto.shard_index(), reason, "datapath failed");
                self.failed = Some(reason);
            }
        }
    }

    // --- the end ------------------------------------------------------------------------

    fn begin_ending(&mut self, now: Instant, order: ShutdownOrder) {
        self.proto.stop_accepting();
        self.handles.refuse_waiting(&mut handle_cx(&mut self.proto, &self.datapath, now));
        self.proto.stop_pools();
        let close_at = now + order.grace;
        // A second order may only hurry.
        if let Some(ending) = &mut self.ending {
            ending.close_at = ending.close_at.min(close_at);
            return;
        }
        let end_at = close_at + DRAIN_MAX;
        self.ending = Some(Ending { order, close_at, end_at, closed: false, to_close: Vec::new() });
        self.advance_ending(now);
    }

    fn advance_ending(&mut self, now: Instant) {
        let Some(ending) = &mut self.ending else { return };
        // Connections that only drain (RFC 9000 §10.2) have nothing left to say.
        let idle = self.proto.open_connections() == 0;
        if !ending.closed {
            if now < ending.close_at && !idle {
                return;
            }
            ending.closed = true;
            ending.to_close = self.proto.ids().collect();
        }
        if ending.to_close.is_empty() {
            return;
        }
        ending.end_at = now + DRAIN_MAX;
        let (code, reason) = (ending.order.code, ending.order.reason.clone());
        let kept = ending.to_close.len().saturating_sub(CLOSES_PER_TURN_MAX);
        let ids = ending.to_close.split_off(kept);
        let (mut connections, mut streams) = (0, 0);
        for id in ids {
            if let Some(connection) = self.proto.touch(id).filter(|conn| !conn.is_closed()) {
                connections += 1;
                streams += connection.streams().send_streams() as u64;
                connection.close(now, code, reason.clone());
            }
            let Some(owner) = self.proto.conn(id).map(|conn| conn.owner) else { continue };
            self.tell_closed(now, id, owner, &ConnectionError::EngineStopped);
        }
        self.handles.note_cut_off(connections, streams);
    }

    fn has_ended(&self, now: Instant) -> bool {
        match &self.ending {
            // The close packets were sent by this turn's flush; peers that miss them time out.
            Some(ending) => {
                ending.closed
                    && ending.to_close.is_empty()
                    && ((self.proto.tx_queue_len() == 0 && !self.is_sealing())
                        || now >= ending.end_at)
            }
            None => false,
        }
    }

    /// Why the datapath gave up, if it did.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// The protocol, for observers in virtual time.
    pub(crate) fn protocol(&self) -> &Protocol {
        &self.proto
    }

    pub(crate) fn clock(&self) -> &C {
        &self.clock
    }

    /// The datapath, for waiting and for tests that look at it.
    pub fn datapath(&mut self) -> &mut D {
        &mut self.datapath
    }

    pub(crate) fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    pub(crate) fn count_park(&mut self) {
        self.proto.counters.parks += 1;
    }

    /// Tells every handle that the shard is gone, with the reason.
    pub(crate) fn abandon(&mut self, reason: &ConnectionError) {
        self.mailbox.stop();
        let now = self.clock.now();
        let ids: Vec<ConnId> = self.proto.ids().collect();
        for id in ids {
            let Some(owner) = self.proto.conn(id).map(|conn| conn.owner) else { continue };
            self.tell_closed(now, id, owner, reason);
        }
        self.finish_abandoning(reason);
    }

    /// As [`abandon`](Self::abandon) after a panic of the shard itself: its protocol state may be
    /// broken and is not touched; only handles and waiting callers are told.
    pub(crate) fn abandon_broken(&mut self, reason: &ConnectionError) {
        self.mailbox.stop();
        self.finish_abandoning(reason);
    }

    fn finish_abandoning(&mut self, reason: &ConnectionError) {
        // A dropped notice drops its reply, which ends the future that waits for it.
        while self.mailbox.pop_notice().is_some() {}
        while let Some(command) = self.mailbox.pop() {
            if let Command::Connect { reply, .. } = command {
                reply.fail(crate::error::ConnectError::EngineStopped);
            }
        }
        self.proto.counters.connections = 0;
        self.proto.counters.streams = 0;
        self.metrics.publish(&self.proto.counters, &self.datapath.counters());
        self.handles.end(reason);
    }
}

/// What the handles may do now. A function of the parts, so that the handles themselves stay free.
fn handle_cx<'a>(proto: &'a mut Protocol, paths: &'a dyn Datapath, now: Instant) -> ShardCx<'a> {
    ShardCx { proto, paths, now, owner: Owner::Handles }
}
