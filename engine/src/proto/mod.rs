//! The protocol of one shard: quinn-proto's `Endpoint` and its connections.
//!
//! Sans-I/O: datagrams and times come in, datagrams and events go out, and the
//! shard ([`crate::shard`]) decides when. Per connection the order is: every
//! `handle_*` of a batch first, then endpoint events, then application events,
//! then `poll_transmit` until it is blocked, then the timeout.

pub(crate) mod balance;
pub mod bbr;
pub(crate) mod cid;
pub(crate) mod congestion;
mod connection;
pub(crate) mod credit;
pub mod crypto;
mod incoming;
pub(crate) mod pacing;
pub(crate) mod paths;
mod pooling;
mod qlog;
pub(crate) mod timers;
pub(crate) mod tokens;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, EcnCodepoint, Endpoint,
    EndpointConfig, Event, ServerConfig, Side, Transmit, ValidationTokenConfig,
};

use self::bbr::ResumeSeed;
use crate::app::{ConnId, Incoming};
use crate::config::{
    CONNECTIONS_PER_SHARE_MAX, HANDSHAKE_STEPS_MAX, MIGRATIONS_PER_TURN_MAX, TRANSPORTS_MAX,
    TX_RESPONSES_QUEUED_MAX, TransportConfig,
};
use crate::datapath::{Ecn, RxDatagram, TxMeta};
use crate::error::ConnectError;
use crate::metrics::{ShardCounters, ShardMetrics};
use crate::pool::{EntryId, Pool};

pub use connection::ConnectionStats;
pub(crate) use connection::{Conn, Gate, STATS_NUMBERS};

/// Who is told what happens on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    /// The async handles.
    Handles,
    /// The application on the shard.
    App,
}

/// The server's and client's cryptographic set-up, shared by all shards.
#[derive(Clone, Default)]
pub(crate) struct QuicIdentity {
    pub(crate) server: Option<Arc<dyn quinn_proto::crypto::ServerConfig>>,
    pub(crate) client: Option<Arc<dyn quinn_proto::crypto::ClientConfig>>,
    pub(crate) token_key: Option<Arc<dyn quinn_proto::crypto::HandshakeTokenKey>>,
    pub(crate) reset_key: Option<Arc<dyn quinn_proto::crypto::HmacKey>>,
    pub(crate) tokens: tokens::Tokens,
}

/// What the shard must do for one connection after its events were handled.
pub(crate) enum AppEvent {
    /// quinn-proto's own.
    Quic(Event),
    /// The connection is gone; its slot was freed.
    Drained {
        /// Whether the application was told before.
        reported: bool,
        /// Its place in the owner's pool, where the pool was not told before.
        pool_entry: Option<EntryId>,
    },
}

/// Stateless reply that waits for room in the TX ring.
pub(crate) struct Response {
    pub(crate) meta: TxMeta,
    pub(crate) payload: Vec<u8>,
}

/// Endpoint, connections, timers and queues of one shard.
pub(crate) struct Protocol {
    endpoint: Endpoint,
    conns: Vec<Option<Box<Conn>>>,
    generation: u32,
    live: usize,
    handshaking: usize,
    /// Of `live`, those that are closed and only drain.
    closing: usize,
    /// Handshake steps that may still be taken now.
    handshake_steps_left: usize,
    /// Connections that may be touched in this part of the turn.
    touched_max: usize,
    /// Something waits for the next turn's shares.
    held_back: bool,
    /// After a change of our address the first slot that was not told of it; else `usize::MAX`.
    migrate_next: usize,
    touched: Vec<u32>,
    tx_queue: VecDeque<u32>,
    pub(crate) responses: VecDeque<Response>,
    timers: timers::TimerWheel,
    app_timers: BinaryHeap<Reverse<(Instant, Owner, u64)>>,
    expired: Vec<u32>,
    response_buffer: Vec<u8>,
    config: Arc<TransportConfig>,
    /// One per largest UDP payload that a path was seen to carry.
    transports: Vec<(u16, Arc<quinn_proto::TransportConfig>)>,
    cc_seed: u64,
    balance: balance::Balance,
    server: Option<Arc<ServerConfig>>,
    client: Option<ClientConfig>,
    shard: usize,
    pub(crate) mailbox: crate::shard::mailbox::Mailbox,
    accepting: bool,
    /// The client that was accepted last, for whoever must undo it.
    pub(crate) accepted_last: Option<ConnId>,
    /// By owner.
    pools: [Pool; 2],
    qlog: Option<qlog::QlogFiles>,
    paths: Option<Arc<paths::PathMemory>>,
    metrics: Arc<ShardMetrics>,
    pub(crate) counters: ShardCounters,
}

/// Everything that a shard's protocol is made of.
pub(crate) struct ProtocolSetup {
    pub(crate) config: Arc<TransportConfig>,
    pub(crate) identity: QuicIdentity,
    pub(crate) cids: cid::Cids,
    pub(crate) loads: balance::Loads,
    /// What is remembered of paths, where that is wanted.
    pub(crate) paths: Option<Arc<paths::PathMemory>>,
    pub(crate) shard: usize,
    /// Shards of the engine.
    pub(crate) shards: usize,
    /// Where samples and the pools' counters go.
    pub(crate) metrics: Arc<ShardMetrics>,
    /// The shard's mailbox, for applications that send to themselves.
    pub(crate) mailbox: crate::shard::mailbox::Mailbox,
    /// Largest UDP payload that the datapath carries.
    pub(crate) mtu_bytes: u16,
    /// Seed of this shard's randomness; fixed in simulations.
    pub(crate) seed: [u8; 32],
}

impl Protocol {
    pub(crate) fn new(setup: ProtocolSetup, now: Instant) -> Self {
        let pools = pooling::pools(&setup);
        let ProtocolSetup {
            config,
            identity,
            cids,
            loads,
            paths,
            shard,
            metrics,
            mailbox,
            mtu_bytes,
            seed,
            ..
        } = setup;
        let cc_seed = u64::from_le_bytes(seed[..8].try_into().expect("eight bytes"));
        let transport = Arc::new(config.quic(mtu_bytes, cc_seed, metrics.clone(), None));
        let transports = vec![(mtu_bytes, transport.clone())];
        let reset_key = identity.reset_key.unwrap_or_else(|| random_reset_key(&seed));
        let aim = balance::Aim::default();
        let generator_aim = aim.clone();
        let mut endpoint_config = EndpointConfig::new(reset_key);
        // A limit set for this side holds for what the peer sends, too (RFC 9000 §18.2).
        let payload_bytes_max = match config.mtu_upper_bound_bytes {
            0 => crate::config::UDP_PAYLOAD_BYTES_MAX,
            bytes => bytes,
        };
        endpoint_config
            .max_udp_payload_size(payload_bytes_max)
            .expect("validated: 1200 to 65527")
            .rng_seed(Some(seed))
            .cid_generator(move || {
                let mut cid_seed = seed;
                cid_seed[0] ^= 0x5a;
                let (cids, aim) = (cids.clone(), generator_aim.clone());
                Box::new(cid::ShardCidGenerator::new(cids, shard as u8, aim, cid_seed))
            });
        let server = identity.server.map(|crypto| {
            let token_key = identity.token_key.clone().unwrap_or_else(|| random_token_key(&seed));
            let (inner, used) = (token_key, identity.tokens.retries.clone());
            let token_key = Arc::new(tokens::OnceKey { inner, used });
            let mut server = ServerConfig::new(crypto, token_key);
            let mut new_tokens = ValidationTokenConfig::default();
            new_tokens
                .sent(config.new_tokens)
                .lifetime(Duration::from_secs(config.new_token_lifetime_s))
                .log(identity.tokens.log.clone());
            server
                .validation_token_config(new_tokens)
                .retry_token_lifetime(tokens::RETRY_TOKEN_LIFETIME);
            server.transport_config(transport.clone()).max_incoming(config.incoming_max);
            Arc::new(server)
        });
        let client = identity.client.map(|crypto| {
            let mut client = ClientConfig::new(crypto);
            client.transport_config(transport.clone()).token_store(identity.tokens.store.clone());
            client
        });
        Self {
            accepting: server.is_some(),
            accepted_last: None,
            endpoint: Endpoint::new(Arc::new(endpoint_config), server.clone(), true, Some(seed)),
            server,
            conns: Vec::new(),
            generation: 0,
            live: 0,
            handshaking: 0,
            closing: 0,
            handshake_steps_left: HANDSHAKE_STEPS_MAX,
            held_back: false,
            migrate_next: usize::MAX,
            touched_max: CONNECTIONS_PER_SHARE_MAX,
            touched: Vec::new(),
            tx_queue: VecDeque::new(),
            responses: VecDeque::with_capacity(TX_RESPONSES_QUEUED_MAX),
            timers: timers::TimerWheel::new(now),
            app_timers: BinaryHeap::new(),
            expired: Vec::new(),
            response_buffer: Vec::with_capacity(2048),
            qlog: config.qlog_dir.clone().map(|directory| qlog::QlogFiles::new(directory, shard)),
            pools,
            paths,
            metrics,
            config,
            transports,
            balance: balance::Balance::new(loads, shard, aim.clone(), cc_seed),
            cc_seed,
            client,
            shard,
            mailbox,
            counters: ShardCounters::default(),
        }
    }

    pub(crate) fn shard_index(&self) -> usize {
        self.shard
    }

    pub(crate) fn config(&self) -> &TransportConfig {
        &self.config
    }

    /// Connections that exist, draining ones included.
    pub(crate) fn live_connections(&self) -> usize {
        self.live
    }

    /// Connections that are neither closed nor draining.
    pub(crate) fn open_connections(&self) -> usize {
        self.live - self.closing
    }

    /// A turn begins: nothing is held back yet.
    pub(crate) fn begin_turn(&mut self) {
        self.held_back = false;
        self.begin_share();
    }

    /// A part of the turn begins that may take [`HANDSHAKE_STEPS_MAX`] steps of handshakes and wake
    /// up [`CONNECTIONS_PER_SHARE_MAX`] connections.
    pub(crate) fn begin_share(&mut self) {
        self.handshake_steps_left = HANDSHAKE_STEPS_MAX;
        self.touched_max = self.touched.len() + CONNECTIONS_PER_SHARE_MAX;
    }

    /// Whether this part of the turn may take on what can be a step of a handshake or wake up
    /// another connection; where it may not, more is left for the next turn.
    pub(crate) fn may_go_on(&mut self) -> bool {
        let may = self.handshake_steps_left > 0 && self.touched.len() < self.touched_max;
        self.held_back |= !may;
        may
    }

    /// Whether something waits for the next turn's shares.
    pub(crate) fn is_held_back(&self) -> bool {
        self.held_back
    }

    /// Stops accepting clients.
    pub(crate) fn stop_accepting(&mut self) {
        self.accepting = false;
    }

    // --- datagrams in -------------------------------------------------------------

    /// Gives one datagram to its connection, which is touched, or answers it
    /// statelessly, or returns the client that knocks.
    pub(crate) fn handle_datagram(
        &mut self,
        now: Instant,
        datagram: RxDatagram,
    ) -> Option<Incoming> {
        let RxDatagram { remote, local, ecn, data } = datagram;
        self.response_buffer.clear();
        let event = self.endpoint.handle(
            now,
            SocketAddr::V6(remote),
            Some(IpAddr::V6(local)),
            ecn_to_quic(ecn),
            data,
            &mut self.response_buffer,
        );
        match event {
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                let slot = handle.0;
                match self.conns.get_mut(slot).and_then(Option::as_mut) {
                    Some(conn) => {
                        conn.inner.handle_event(event);
                        conn.rx_since_ack_check = true;
                        if conn.handshake_deadline.is_some() {
                            self.handshake_steps_left = self.handshake_steps_left.saturating_sub(1);
                        }
                        self.mark_touched(slot as u32);
                    }
                    None => self.counters.rx_drop_unknown_connection += 1,
                }
                None
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                self.counters.incoming += 1;
                self.screen(incoming)
            }
            Some(DatagramEvent::Response(transmit)) => {
                self.counters.tx_stateless += 1;
                self.push_response(&transmit);
                None
            }
            None => {
                self.counters.rx_drop_protocol += 1;
                None
            }
        }
    }

    /// The settings for paths whose UDP payload is at most `mtu_bytes`, and what is known of this one.
    fn transport(
        &mut self,
        now: Instant,
        mtu_bytes: u16,
        side: Side,
        resume: Option<ResumeSeed>,
    ) -> Arc<quinn_proto::TransportConfig> {
        let stream = self.qlog.as_mut().and_then(|files| files.open(now, side));
        if stream.is_some() || resume.is_some() {
            // Both are part of the settings, which are this connection's own. Connections with
            // settings of their own draw their random waits from seeds of their own, too.
            let number = u64::from(self.generation);
            let seed = self.cc_seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut transport = self.config.quic(mtu_bytes, seed, self.metrics.clone(), resume);
            if stream.is_some() {
                transport.qlog_stream(stream);
            }
            return Arc::new(transport);
        }
        if let Some((_, transport)) = self.transports.iter().find(|(mtu, _)| *mtu == mtu_bytes) {
            return transport.clone();
        }
        let settings = self.config.quic(mtu_bytes, self.cc_seed, self.metrics.clone(), None);
        let transport = Arc::new(settings);
        // A handful of interfaces and path MTUs; a flood of odd ones replaces the youngest.
        self.transports.truncate(TRANSPORTS_MAX - 1);
        self.transports.push((mtu_bytes, transport.clone()));
        transport
    }

    fn push_response(&mut self, transmit: &Transmit) {
        if self.responses.len() >= TX_RESPONSES_QUEUED_MAX {
            self.counters.tx_drop_responses += 1;
            return;
        }
        let payload = self.response_buffer[..transmit.size].to_vec();
        self.responses.push_back(Response { meta: tx_meta(transmit), payload });
    }

    // --- connections --------------------------------------------------------------

    /// `mtu_bytes`: the largest UDP payload that can leave towards `remote`.
    pub(crate) fn connect(
        &mut self,
        now: Instant,
        remote: SocketAddrV6,
        mtu_bytes: u16,
        server_name: &str,
        config: Option<ClientConfig>,
        owner: Owner,
    ) -> Result<ConnId, ConnectError> {
        let ip = remote.ip();
        if remote.port() == 0
            || ip.is_unspecified()
            || ip.is_multicast()
            || ip.to_ipv4_mapped().is_some()
        {
            return Err(ConnectError::InvalidRemoteAddress(remote));
        }
        if self.live >= self.config.connections_per_shard_max {
            return Err(ConnectError::TooManyConnections);
        }
        let mut config =
            config.or_else(|| self.client.clone()).ok_or(ConnectError::NoClientConfig)?;
        let resume = self.remembered(now, &remote);
        config.transport_config(self.transport(now, mtu_bytes, Side::Client, resume));
        let made = self.endpoint.connect(now, config, SocketAddr::V6(remote), server_name);
        self.tries_remembered(&remote, resume, made.as_ref().ok().map(|(_, made)| made));
        let (handle, connection) = made.map_err(|error| match error {
            quinn_proto::ConnectError::InvalidServerName(name) => {
                ConnectError::InvalidServerName(name)
            }
            quinn_proto::ConnectError::InvalidRemoteAddress(_) => {
                ConnectError::InvalidRemoteAddress(remote)
            }
            other => ConnectError::Protocol(other.to_string()),
        })?;
        self.counters.connects += 1;
        Ok(self.insert(now, handle, connection, owner))
    }

    fn insert(
        &mut self,
        now: Instant,
        handle: ConnectionHandle,
        connection: Connection,
        owner: Owner,
    ) -> ConnId {
        let slot = handle.0;
        self.generation = self.generation.wrapping_add(1);
        let id = ConnId { slot: slot as u32, generation: self.generation };
        let deadline = now + Duration::from_millis(self.config.handshake_timeout_ms);
        if slot >= self.conns.len() {
            self.conns.resize_with(slot + 1, || None);
        }
        debug_assert!(self.conns[slot].is_none(), "quinn-proto reuses a slot only when drained");
        let span = self.span(&connection);
        let credit = credit::Credit::new(&self.config, now);
        let mut conn = Box::new(Conn::new(connection, id, owner, now, deadline, span, credit));
        conn.age_deadline = self.config.connection_age_max(id.generation).map(|age| now + age);
        self.conns[slot] = Some(conn);
        self.live += 1;
        self.balance.note(self.live);
        self.handshaking += 1;
        self.handshake_steps_left = self.handshake_steps_left.saturating_sub(1);
        self.mark_touched(slot as u32);
        id
    }

    /// One span for a connection's life; nothing per packet is ever logged in it.
    fn span(&self, connection: &Connection) -> tracing::Span {
        let side = match connection.side() {
            Side::Client => "client",
            Side::Server => "server",
        };
        let remote = connection.remote_address();
        let span = tracing::debug_span!("connection", shard = self.shard, %remote, side);
        tracing::debug!(parent: &span, "handshake starts");
        span
    }

    pub(crate) fn connection(&self, id: ConnId) -> Option<&Connection> {
        Some(&self.conn(id)?.inner)
    }

    pub(crate) fn conn(&self, id: ConnId) -> Option<&Conn> {
        self.conns.get(id.slot as usize)?.as_deref().filter(|conn| conn.id == id)
    }

    /// The connection in a slot, whatever its generation.
    pub(crate) fn conn_in_slot(&mut self, slot: u32) -> Option<&mut Conn> {
        self.conns.get_mut(slot as usize)?.as_deref_mut()
    }

    /// The connection for a change by the application: its events are looked at
    /// and it is polled for transmission in this turn.
    pub(crate) fn touch(&mut self, id: ConnId) -> Option<&mut Connection> {
        self.conn(id)?;
        self.mark_touched(id.slot);
        Some(&mut self.conns[id.slot as usize].as_mut()?.inner)
    }

    /// The connection for reading: polled for transmission only when credit must be sent.
    pub(crate) fn touch_for_read(&mut self, id: ConnId) -> Option<&mut Connection> {
        self.conn(id)?;
        Some(&mut self.conns[id.slot as usize].as_mut()?.inner)
    }

    /// Polls the connection for transmission in this turn.
    pub(crate) fn queue_transmit(&mut self, id: ConnId) {
        if self.conn(id).is_some() {
            self.queue_slot(id.slot);
        }
    }

    pub(crate) fn stats(&self, id: ConnId) -> Option<ConnectionStats> {
        self.conn(id).map(Conn::stats)
    }

    pub(crate) fn handshake_data(&self, id: ConnId) -> Option<crate::certs::HandshakeInfo> {
        crate::certs::HandshakeInfo::of_session(self.connection(id)?.crypto_session())
    }

    pub(crate) fn peer_certificates(
        &self,
        id: ConnId,
    ) -> Option<Vec<rustls_pki_types::CertificateDer<'static>>> {
        let identity = self.connection(id)?.crypto_session().peer_identity()?;
        identity.downcast().ok().map(|certificates| *certificates)
    }

    /// All live connection ids.
    pub(crate) fn ids(&self) -> impl Iterator<Item = ConnId> + '_ {
        self.conns.iter().flatten().map(|conn| conn.id)
    }

    /// Our address changed: every client connection validates its path anew, in this turn and the
    /// next ones.
    pub(crate) fn local_addresses_changed(&mut self, now: Instant) {
        self.forget_paths(now);
        self.migrate_next = 0;
    }

    /// Moves some of the connections that a change of address has left, with a fresh ID of the peer
    /// each (RFC 9000 §9.5).
    pub(crate) fn migrate_some(&mut self) {
        if self.migrate_next == usize::MAX {
            return;
        }
        let end = self.conns.len().min(self.migrate_next + MIGRATIONS_PER_TURN_MAX);
        for slot in self.migrate_next..end {
            if let Some(conn) = &mut self.conns[slot]
                && conn.inner.side().is_client()
                && !conn.inner.is_handshaking()
            {
                conn.inner.local_address_changed();
                self.mark_touched(slot as u32);
            }
        }
        let is_over = end == self.conns.len();
        self.migrate_next = if is_over { usize::MAX } else { end };
        self.held_back |= !is_over;
    }

    // --- what is touched ----------------------------------------------------------

    fn mark_touched(&mut self, slot: u32) {
        if let Some(conn) = &mut self.conns[slot as usize]
            && !conn.touched
        {
            conn.touched = true;
            self.touched.push(slot);
        }
    }

    fn queue_slot(&mut self, slot: u32) {
        if let Some(conn) = &mut self.conns[slot as usize]
            && !conn.tx_queued
        {
            conn.tx_queued = true;
            self.tx_queue.push_back(slot);
        }
    }

    /// The next connection whose events must be handled.
    pub(crate) fn next_touched(&mut self) -> Option<u32> {
        self.touched.pop()
    }

    /// The next event of a touched connection; after `None` it waits for transmission.
    pub(crate) fn poll_event(
        &mut self,
        now: Instant,
        slot: u32,
    ) -> Option<(ConnId, Owner, AppEvent)> {
        let conn = self.conns[slot as usize].as_mut()?;
        let (id, owner) = (conn.id, conn.owner);
        while let Some(event) = conn.inner.poll_endpoint_events() {
            conn.drained |= event.is_drained();
            if let Some(event) = self.endpoint.handle_event(ConnectionHandle(slot as usize), event)
            {
                conn.inner.handle_event(event);
            }
        }
        if let Some(event) = conn.inner.poll() {
            return Some((id, owner, AppEvent::Quic(event)));
        }
        conn.touched = false;
        let drained = conn.drained;
        // Whatever closes a connection touches it.
        if !conn.closing && (drained || conn.inner.is_closed()) {
            conn.closing = true;
            self.closing += 1;
            self.remember_path(now, slot);
        }
        if drained {
            let conn = self.conns[slot as usize].as_mut()?;
            let (reported, pool_entry) = (conn.closed_reported, conn.pool_entry);
            self.remove(slot);
            return Some((id, owner, AppEvent::Drained { reported, pool_entry }));
        }
        self.queue_slot(slot);
        None
    }

    /// Notes that the handshake is over, so that its deadline no longer counts.
    pub(crate) fn handshake_over(&mut self, id: ConnId) {
        if let Some(conn) = self.conn_in_slot(id.slot).filter(|conn| conn.id == id)
            && conn.handshake_deadline.take().is_some()
        {
            self.handshaking -= 1;
        }
    }

    /// The handshake is complete: what it settled is noted.
    pub(crate) fn note_connected(&mut self, id: ConnId) {
        let key_updates = self.handshake_data(id).map(|data| data.key_updates);
        let Some(conn) = self.conn_in_slot(id.slot).filter(|conn| conn.id == id) else { return };
        conn.key_updates = key_updates;
        tracing::debug!(parent: &conn.span, rtt = ?conn.inner.rtt(), "connected");
    }

    /// Notes that the application was told of the end; `false` when it was before.
    pub(crate) fn report_closed(&mut self, id: ConnId) -> bool {
        match self.conn_in_slot(id.slot).filter(|conn| conn.id == id) {
            Some(conn) => !std::mem::replace(&mut conn.closed_reported, true),
            None => false,
        }
    }

    fn remove(&mut self, slot: u32) {
        if let Some(conn) = self.conns[slot as usize].take() {
            tracing::debug!(parent: &conn.span, "gone");
            self.live -= 1;
            self.balance.note(self.live);
            self.closing -= usize::from(conn.closing);
            if conn.handshake_deadline.is_some() {
                self.handshaking -= 1;
            }
            self.timers.cancel(slot);
        }
    }

    // --- transmission and time ------------------------------------------------------

    /// Connections that wait for transmission.
    pub(crate) fn tx_queue_len(&self) -> usize {
        self.tx_queue.len()
    }

    pub(crate) fn pop_tx(&mut self) -> Option<u32> {
        let slot = self.tx_queue.pop_front()?;
        if let Some(conn) = &mut self.conns[slot as usize] {
            conn.tx_queued = false;
        }
        Some(slot)
    }

    pub(crate) fn requeue_tx(&mut self, slot: u32) {
        self.queue_slot(slot);
    }

    /// Files the connection's next deadline, pacing included.
    pub(crate) fn file_deadline(&mut self, slot: u32) {
        let Some(conn) = &mut self.conns[slot as usize] else { return };
        match conn.next_deadline() {
            Some(deadline) => self.timers.set(slot, deadline),
            None => self.timers.cancel(slot),
        }
    }

    /// Runs every timer that is due; its connections are touched.
    /// Returns the handshakes that took too long and the connections that are too old: the caller
    /// ends them.
    pub(crate) fn expire(&mut self, now: Instant, overdue: &mut Vec<ConnId>) {
        let mut expired = std::mem::take(&mut self.expired);
        self.timers.expire(now, &mut expired, crate::config::TIMERS_PER_TURN_MAX);
        for slot in expired.drain(..) {
            let Some(conn) = &mut self.conns[slot as usize] else { continue };
            conn.inner.handle_timeout(now);
            let ends = [conn.handshake_deadline, conn.age_deadline];
            if ends.into_iter().flatten().any(|deadline| deadline <= now) {
                overdue.push(conn.id);
            }
            self.mark_touched(slot);
        }
        self.expired = expired;
    }

    /// Sets an application timer.
    pub(crate) fn set_app_timer(&mut self, at: Instant, token: u64, owner: Owner) {
        self.app_timers.push(Reverse((at, owner, token)));
    }

    /// The next application timer that is due.
    pub(crate) fn pop_app_timer(&mut self, now: Instant) -> Option<(Owner, u64)> {
        let Reverse((at, owner, token)) = *self.app_timers.peek()?;
        if at > now {
            return None;
        }
        self.app_timers.pop();
        Some((owner, token))
    }

    /// When the shard must turn again, if nothing arrives before.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let app = self.app_timers.peek().map(|Reverse((at, ..))| *at);
        let [handles_pool, app_pool] = &self.pools;
        let pools = [handles_pool.poll_timeout(), app_pool.poll_timeout()];
        [self.timers.next_deadline(), app].into_iter().chain(pools).flatten().min()
    }
}

/// The IPv6 address inside quinn-proto's; IPv4 never gets in.
pub(crate) fn v6(address: SocketAddr) -> SocketAddrV6 {
    match address {
        SocketAddr::V6(address) => address,
        SocketAddr::V4(_) => unreachable!("every address enters the engine as SocketAddrV6"),
    }
}

/// The datapath's terms for one of quinn-proto's datagrams.
pub(crate) fn tx_meta(transmit: &Transmit) -> TxMeta {
    TxMeta {
        remote: v6(transmit.destination),
        local: transmit.src_ip.and_then(|ip| match ip {
            IpAddr::V6(ip) => Some(ip),
            IpAddr::V4(_) => None,
        }),
        ecn: match transmit.ecn {
            None => Ecn::NotEct,
            Some(EcnCodepoint::Ect0) => Ecn::Ect0,
            Some(EcnCodepoint::Ect1) => Ecn::Ect1,
            Some(EcnCodepoint::Ce) => Ecn::Ce,
        },
    }
}

fn ecn_to_quic(ecn: Ecn) -> Option<EcnCodepoint> {
    match ecn {
        Ecn::NotEct => None,
        Ecn::Ect0 => Some(EcnCodepoint::Ect0),
        Ecn::Ect1 => Some(EcnCodepoint::Ect1),
        Ecn::Ce => Some(EcnCodepoint::Ce),
    }
}

/// A reset key from the shard's seed; engines share one over all shards.
fn random_reset_key(seed: &[u8; 32]) -> Arc<dyn quinn_proto::crypto::HmacKey> {
    Arc::new(aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, seed))
}

/// A token key from the shard's seed; engines share one over all shards.
fn random_token_key(seed: &[u8; 32]) -> Arc<dyn quinn_proto::crypto::HandshakeTokenKey> {
    Arc::new(aws_lc_rs::hkdf::Salt::new(aws_lc_rs::hkdf::HKDF_SHA256, &[]).extract(seed))
}
