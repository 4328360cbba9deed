//! Every limit of the engine, named, with its default and its allowed range.
//!
//! A [`TransportConfig`] is validated whole before anything starts; each error
//! names the key, the value and the range. Sizes are in bytes, times in the
//! unit that ends the name.

mod cid;
mod crypto;
mod pool;
mod tls;

use std::fmt;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;
use std::time::Duration;

use quinn_proto::congestion::{ControllerFactory, CubicConfig, NewRenoConfig};
use quinn_proto::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, VarInt};
use serde::Deserialize;

use crate::datapath::choice::DatapathChoice;
use crate::metrics::ShardMetrics;
use crate::proto::bbr::{AckHold, BbrConfig, Params, ResumeSeed};
use crate::proto::congestion::GatedFactory;
use crate::proto::credit::streams_allowed_initial;

#[cfg(test)]
pub(crate) use cid::unhex;
pub use cid::{
    CID_BYTES_MAX, CID_NONCE_BYTES_MIN, CID_ROTATION_MAX, CID_SERVER_ID_BYTES_MAX, CID_SHARD_BYTES,
    CidConfig, CidKey, ServerId,
};
pub use crypto::CryptoProviderChoice;
pub use pool::PoolConfig;
pub use tls::TlsConfig;

/// Largest UDP payload that QUIC over IPv6 can carry: 65535 less the UDP header (RFC 8200 §4.5 jumbograms excluded).
pub const UDP_PAYLOAD_BYTES_MAX: u16 = 65_527;
/// quinn-proto panics when `min_mtu` exceeds this.
pub const MIN_MTU_BYTES_MAX: u16 = 16_383;
/// Smallest UDP payload that every QUIC path must carry (RFC 9000 §14).
pub const UDP_PAYLOAD_BYTES_MIN: u16 = 1_200;
/// UDP payload on the loopback, whose MTU is 65536 (no other device's exceeds 65535).
pub const LOOPBACK_PAYLOAD_BYTES: u16 = 65_488;
/// Largest UDP payload of a link between machines: jumbo frames, with room to spare.
pub const LINK_PAYLOAD_BYTES_MAX: u16 = 16_384;
/// Datagrams that one turn receives at most, so that a flood cannot starve transmission.
pub const RX_BATCH_DATAGRAMS_MAX: usize = 256;
/// Bytes of one receive slab: below the allocator's mmap threshold, above what a turn needs at MTU 1500.
pub const RX_SLAB_BYTES: usize = 120 * 1024;
/// Resident bytes of a connection without buffered data and stream tables (measured: 26 kB).
pub const IDLE_CONNECTION_BYTES_MAX: u64 = 34 << 10;
/// Streams of each kind that a new connection's peer may open; more as it uses them, up to
/// `max_concurrent_streams`, because quinn-proto keeps table entries for all that it allows. Its
/// tables are used to 7/8: 28 and 2 × 28 entries fill 32 and 64 slots, 32 would take twice these.
pub const STREAMS_ALLOWED_INITIAL: u64 = 28;
/// Received datagrams that wait for the application, bytes per connection, where any are taken.
pub const DATAGRAM_RECEIVE_BUFFER_BYTES_MIN: u64 = 1 << 20;
/// Commands that one turn takes from its mailbox at most.
pub const MAILBOX_COMMANDS_PER_TURN_MAX: usize = 256;
/// Steps of handshakes, up to 150 µs each, that received datagrams cause in one turn at most, and
/// likewise datagrams of other shards and commands of either kind; what came behind them waits.
pub const HANDSHAKE_STEPS_MAX: usize = 3;
/// Connections that received datagrams wake up in one turn at most, and likewise datagrams of other
/// shards and commands of either kind: with 100 000 of them each is cold, and costs several µs.
pub const CONNECTIONS_PER_SHARE_MAX: usize = 64;
/// Connections whose statistics one turn publishes for handles at most.
pub const STATS_PUBLISHED_PER_TURN_MAX: usize = 64;
/// Connections that a shutdown closes in one turn at most.
pub const CLOSES_PER_TURN_MAX: usize = 128;
/// Entries of the timer wheel that one turn expires or moves at most.
pub const TIMERS_PER_TURN_MAX: usize = 64;
/// Connections that one turn looks at after a change of our address, to move them.
pub const MIGRATIONS_PER_TURN_MAX: usize = 64;
/// Timers of applications that fire in one turn at most, those set meanwhile included.
pub const APP_TIMERS_PER_TURN_MAX: usize = 64;
/// Packets that one connection sends before the next connection has its turn.
pub const TX_PACKETS_PER_VISIT_MAX: usize = 64;
/// Connections that send in one turn at most.
pub const TX_VISITS_PER_TURN_MAX: usize = 64;
/// Stateless replies (version negotiation, retry, refusals, resets) kept for a full TX ring.
pub const TX_RESPONSES_QUEUED_MAX: usize = 256;
/// Distinct largest UDP payloads that a shard keeps settings for: one per interface or path MTU.
pub const TRANSPORTS_MAX: usize = 16;
/// Datagrams from other shards that wait in a shard's mailbox.
pub const HANDOFF_DATAGRAMS_MAX: usize = 4096;
/// A shard sends new clients elsewhere by a Retry when it has so many connections more than twice the
/// least busy shard's.
pub const BALANCE_IMBALANCE_CONNECTIONS: usize = 64;
/// 64-bit words of each of the two filters of used address tokens: 1 MiB, taken with the first token.
/// 300 000 tokens in one lifetime are told apart but for one in 1000.
pub const USED_TOKENS_FILTER_WORDS: usize = 1 << 17;
/// Largest number of shards of one engine: a connection ID carries the shard in one byte.
pub const SHARDS_MAX: usize = 256;
/// Connection attempts that one turn starts for a shard's pool at most.
pub const POOL_CONNECTS_PER_TURN_MAX: usize = 3;
/// Pool events that wait for async readers at most; the oldest go first and are counted.
pub const POOL_EVENTS_QUEUED_MAX: usize = 1024;
/// Packets after which the peer is asked to acknowledge at once, plus one: sparse ACKs at high rates.
/// A window of 44 packets still sees four in a round trip, which bandwidth probing wants.
pub const ACK_ELICITING_THRESHOLD: u32 = 10;
/// After this long the peer is asked to acknowledge fewer: at low rates the packets of a round trip
/// are few, and four ACKs in it need a delay of a fourth. The least that quinn-proto can ask for.
pub const ACK_DELAY_MAX: Duration = Duration::from_millis(1);
/// Paths that an engine with `careful_resume` remembers at most; the oldest makes room.
pub const RESUME_PATHS_MAX: usize = 4096;
/// How long a path is remembered, s: an hour, as networks change.
pub const RESUME_LIFETIME_S: u64 = 3600;
/// A connection uses what is remembered within so many seconds of its start, or not at all.
pub const RESUME_WITHIN_S: u64 = 30;
/// Most bytes that a connection sends at once because of what is remembered.
pub const RESUME_JUMP_BYTES_MAX: u64 = 16 << 20;
/// How often an engine with `failover` looks whether its XDP program is still attached, ms.
pub const FAILOVER_CHECK_INTERVAL_MS: u64 = 500;
/// Batches of datagrams that a shard has given to a [`SealQueue`](crate::proto::crypto::offload::SealQueue) at most.
pub const SEAL_JOBS_IN_FLIGHT_MAX: usize = 64;
/// A batch that is not sealed after this long ends its connection, µs.
pub const SEAL_JOB_TIMEOUT_US: u64 = 100_000;
/// How often a shard asks for sealed batches while some are under way, µs.
pub const SEAL_POLL_INTERVAL_US: u64 = 5;
/// A deadline nearer than this is waited for by spinning: parking wakes up too late.
pub const SPIN_UNTIL_DEADLINE_US: u64 = 60;
/// The same for a pacing deadline, at most, where wake-ups turn out to be late (virtual machines
/// whose cores are halted while they sleep), µs. A quantum is a millisecond long at most.
pub const SPIN_UNTIL_PACED_US_MAX: u64 = 1000;
/// A connection with a longer round trip than this makes up for a late wake-up by itself, µs.
pub const SPIN_PACED_RTT_US_MAX: u64 = 2000;

/// Longest age that `connection_age_ms_max` takes, ms.
const YEAR_MS: u64 = 365 * 24 * 60 * 60 * 1000;
/// Application error code of a connection that reached `connection_age_ms_max`; its reason is
/// `connection age limit reached`. The peer connects again.
pub const CONNECTION_AGE_CODE: VarInt = VarInt::from_u32(0x61_67_65);

/// Which algorithm decides how much may be in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum CongestionControl {
    /// BBR with the parameters of draft-cardwell-iccrg-bbr-congestion-control-02.
    #[default]
    Bbr2,
    /// BBR with the parameters of draft-ietf-ccwg-bbr-06.
    Bbr3,
    /// RFC 9438.
    Cubic,
    /// RFC 9002 §7.
    NewReno,
}

impl CongestionControl {
    /// The name used in configurations and outputs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bbr2 => "bbr2",
            Self::Bbr3 => "bbr3",
            Self::Cubic => "cubic",
            Self::NewReno => "newreno",
        }
    }

    fn factory(
        self,
        initial_window_bytes: u64,
        seed: u64,
        resume: Option<ResumeSeed>,
        ack_hold: AckHold,
    ) -> Arc<dyn ControllerFactory + Send + Sync> {
        let bbr = |params| {
            let mut config = BbrConfig::new(params, seed);
            config.initial_window_bytes = Some(initial_window_bytes);
            config.resume = resume;
            config.ack_hold = ack_hold;
            Arc::new(config)
        };
        match self {
            Self::Bbr2 => bbr(Params::BBR2),
            Self::Bbr3 => bbr(Params::BBR3),
            Self::Cubic => {
                let mut config = CubicConfig::default();
                config.initial_window(initial_window_bytes);
                Arc::new(config)
            }
            Self::NewReno => {
                let mut config = NewRenoConfig::default();
                config.initial_window(initial_window_bytes);
                Arc::new(config)
            }
        }
    }
}

/// What the peer is asked to hold ACKs back for.
fn ack_hold(ack_frequency: bool) -> AckHold {
    if !ack_frequency {
        return AckHold::default();
    }
    AckHold {
        // The one after the threshold sends the ACK.
        packets: u64::from(ACK_ELICITING_THRESHOLD) + 1,
        time_ns: ACK_DELAY_MAX.as_nanos() as u64,
    }
}

impl std::str::FromStr for CongestionControl {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Bbr2, Self::Bbr3, Self::Cubic, Self::NewReno]
            .into_iter()
            .find(|algorithm| algorithm.name() == name)
            .ok_or_else(|| format!("`{name}` is not one of bbr2, bbr3, cubic, newreno"))
    }
}

/// When a server asks a client to prove its address with a Retry (RFC 9000 §8.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryPolicy {
    /// Never.
    Never,
    /// When more than a quarter of `incoming_max` handshakes are under way, and when this shard has far
    /// more connections than another: the Retry sends the client there.
    #[default]
    UnderLoad,
    /// Always: costs each client one round trip, unless it brings a token of an earlier
    /// connection that shows its address (NEW_TOKEN, RFC 9000 8.1.3).
    Always,
}

/// What a shard does that has no work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BusyPoll {
    /// It sleeps at once.
    Off,
    /// It spins for `spin_us` where that has ended in work of late, and else sleeps at once.
    #[default]
    Adaptive,
    /// It never sleeps: it takes a whole core, and no packet waits for a wake-up.
    Always,
}

impl std::str::FromStr for BusyPoll {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "off" => Ok(Self::Off),
            "adaptive" => Ok(Self::Adaptive),
            "always" => Ok(Self::Always),
            _ => Err(format!("`{name}` is not one of off, adaptive, always")),
        }
    }
}

/// A value that the engine refuses to start with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The configuration key.
    pub key: &'static str,
    /// The value it had.
    pub value: String,
    /// What is allowed.
    pub allowed: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "configuration key `{}` is {}; allowed: {}", self.key, self.value, self.allowed)
    }
}

impl std::error::Error for ConfigError {}

/// The transport's settings and limits. Every field has a default; unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TransportConfig {
    /// Address and port to bind; `[::]:0` lets the system choose.
    pub bind: SocketAddrV6,
    /// Which datapath carries the packets.
    pub datapath: DatapathChoice,
    /// Interface for AF_XDP (and for link-local addresses).
    pub interface: Option<String>,
    /// Threads that own connections; with AF_XDP each takes one device queue. 1 to 256.
    pub shards: usize,
    /// First AF_XDP device queue; shard `n` binds queue `first_queue + n`.
    pub first_queue: u32,
    /// Cores for the shards, in order; empty: the engine chooses.
    pub cores: Vec<usize>,
    /// How connection IDs are made.
    pub cid: CidConfig,
    /// Congestion control of new connections.
    pub congestion_control: CongestionControl,
    /// Streams of each kind that a peer may have open. 0 to 2^60.
    pub max_concurrent_streams: u64,
    /// Bytes that a connection may hold unacknowledged.
    pub send_buffer_size: u64,
    /// Bytes that a peer may send on a connection before the application read them.
    pub receive_buffer_size: u64,
    /// Bytes that a peer may send on one stream before the application read them.
    pub stream_receive_buffer_size: u64,
    /// Largest unreliable datagram accepted from a peer, bytes; 0 switches datagrams off. At most 65507.
    pub max_datagram_size: u32,
    /// Bytes of unreliable datagrams that wait for sending on a connection.
    pub datagram_send_buffer_size: usize,
    /// Silence after which a connection is given up, ms; 0: never. At most 2^62 − 1.
    pub idle_timeout_ms: u64,
    /// A handshake that takes longer fails, ms. 1 to 600000.
    pub handshake_timeout_ms: u64,
    /// Age at which a connection is closed with [`CONNECTION_AGE_CODE`], ms; 0: never. It bounds for how
    /// long a certificate revoked or expired meanwhile is still good for a connection made before. Each
    /// connection ends within the last tenth of the time, so that they do not end together. 0 or 1000
    /// to 31 536 000 000 (a year).
    pub connection_age_ms_max: u64,
    /// Interval of keep-alive packets, ms; 0: none.
    pub keep_alive_interval_ms: u64,
    /// Connections that one shard holds at most.
    pub connections_per_shard_max: usize,
    /// Handshakes under way per shard at most; further ones are refused.
    pub incoming_max: usize,
    /// When a server asks for a Retry.
    pub retry: RetryPolicy,
    /// Address tokens that a client gets for its next connections (NEW_TOKEN, RFC 9000 §8.1.3); each
    /// is good once, on any shard. 0 to 16.
    pub new_tokens: u32,
    /// How long such a token is good, s. 1 to 1209600.
    pub new_token_lifetime_s: u64,
    /// Accept data before the handshake ends; replayable, therefore off by default (RFC 9001 §9.2).
    pub zero_rtt: bool,
    /// First assumption about the path, UDP payload bytes. 1200 to 16383.
    pub initial_mtu_bytes: u16,
    /// Upper bound of path MTU discovery, UDP payload bytes; 0: the interface's MTU. At most 65527.
    pub mtu_upper_bound_bytes: u16,
    /// Round trip assumed before the first sample, µs.
    pub initial_rtt_us: u64,
    /// Congestion window at the start, packets of the initial MTU. 2 to 1000.
    pub initial_window_packets: u64,
    /// Ask the peer for sparse ACKs (draft-ietf-quic-ack-frequency).
    pub ack_frequency: bool,
    /// Whether a shard without work spins or sleeps.
    pub busy_poll: BusyPoll,
    /// Time a shard spins without work before it sleeps, µs, where `busy_poll` is adaptive.
    /// 0 to 1000000.
    pub spin_us: u64,
    /// Commands that wait in a shard's mailbox at most.
    pub mailbox_capacity: usize,
    /// Bytes that a stream handle may queue towards its shard.
    pub stream_send_queue_bytes: usize,
    /// Bytes that wait in a stream handle for its reader.
    pub stream_receive_queue_bytes: usize,
    /// Idle pooled connections kept at most, over all shards.
    pub connection_pool_size: usize,
    /// How the connection pool behaves.
    pub pool: PoolConfig,
    /// Hand `Bytes` over by reference instead of copying.
    pub enable_zero_copy: bool,
    /// [`StoqTransport::send`](crate::transport::StoqTransport::send) prefers an unreliable
    /// datagram where the data fits one.
    pub send_datagrams: bool,
    /// Largest message that [`StoqTransport::receive`](crate::transport::StoqTransport::receive)
    /// takes, bytes. 1 to 2^34.
    pub message_size_max: usize,
    /// How long [`StoqTransport::shutdown`](crate::transport::StoqTransport::shutdown) lets
    /// streams go on, ms. 0 to 600000.
    pub shutdown_grace_ms: u64,
    /// Where Prometheus text is served over HTTP (`/metrics`); none: nowhere. It is not
    /// authenticated: a loopback address unless the network is trusted.
    pub metrics_address: Option<SocketAddrV6>,
    /// Which implementation of AES-GCM protects packets where the engine makes the TLS
    /// configuration ([`Self::tls`]); programs that make their own say it to
    /// [`ServerTlsBuilder`](crate::certs::ServerTlsBuilder::packet_crypto).
    pub crypto_provider: CryptoProviderChoice,
    /// TLS of [`StoqTransport::new`](crate::transport::StoqTransport::new).
    pub tls: Option<TlsConfig>,
    /// Demand zero-copy AF_XDP: refuse to start in copy mode.
    pub require_zero_copy: bool,
    /// Allow AF_XDP in generic (SKB) mode where the driver has no native one.
    pub allow_skb_mode: bool,
    /// Go on over the kernel's socket when an AF_XDP device fails while connections run, also where
    /// `datapath` is `af_xdp`, and back when it is there again; otherwise they end with
    /// [`DatapathFailed`](crate::error::ConnectionError::DatapathFailed).
    pub failover: bool,
    /// First wait before a failed AF_XDP device is opened again, ms; doubled with every attempt. 10 to 60000.
    pub failover_backoff_ms_min: u64,
    /// Longest wait, ms. `failover_backoff_ms_min` to 3600000.
    pub failover_backoff_ms_max: u64,
    /// Directory for one qlog file per connection; none: off.
    pub qlog_dir: Option<std::path::PathBuf>,
    /// Remember rate and round trip of each peer's path, and start later connections to it at half of
    /// that (RFC 9959), clients' and servers' alike; for `bbr2` and `bbr3`.
    pub careful_resume: bool,
    /// What an earlier connection knew of the path, for BBR's careful resume (RFC 9959);
    /// not read from files: it holds for one path.
    #[serde(skip)]
    pub resume: Option<ResumeSeed>,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            bind: SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0),
            datapath: DatapathChoice::Auto,
            interface: None,
            shards: 1,
            first_queue: 0,
            cores: Vec::new(),
            cid: CidConfig::default(),
            congestion_control: CongestionControl::Bbr2,
            max_concurrent_streams: 1000,
            send_buffer_size: 16 << 20,
            receive_buffer_size: 16 << 20,
            stream_receive_buffer_size: 16 << 20,
            max_datagram_size: 65_507,
            datagram_send_buffer_size: 1 << 20,
            idle_timeout_ms: 30_000,
            handshake_timeout_ms: 10_000,
            connection_age_ms_max: 0,
            keep_alive_interval_ms: 0,
            connections_per_shard_max: 1 << 17,
            incoming_max: 4096,
            retry: RetryPolicy::UnderLoad,
            new_tokens: 2,
            new_token_lifetime_s: 86_400,
            zero_rtt: false,
            initial_mtu_bytes: UDP_PAYLOAD_BYTES_MIN,
            mtu_upper_bound_bytes: 0,
            initial_rtt_us: 100_000,
            initial_window_packets: 10,
            ack_frequency: true,
            busy_poll: BusyPoll::Adaptive,
            spin_us: 50,
            mailbox_capacity: 4096,
            stream_send_queue_bytes: 1 << 20,
            stream_receive_queue_bytes: 256 << 10,
            connection_pool_size: 100,
            pool: PoolConfig::default(),
            enable_zero_copy: true,
            send_datagrams: false,
            message_size_max: 64 << 20,
            shutdown_grace_ms: 5_000,
            metrics_address: None,
            crypto_provider: CryptoProviderChoice::Auto,
            tls: None,
            require_zero_copy: false,
            allow_skb_mode: false,
            failover: true,
            failover_backoff_ms_min: 100,
            failover_backoff_ms_max: 5_000,
            qlog_dir: None,
            careful_resume: false,
            resume: None,
        }
    }
}

fn check<T: PartialOrd + fmt::Display>(
    key: &'static str,
    value: T,
    min: T,
    max: T,
) -> Result<(), ConfigError> {
    if value >= min && value <= max {
        return Ok(());
    }
    Err(ConfigError { key, value: value.to_string(), allowed: format!("{min} to {max}") })
}

/// What is wrong with a configuration and on which line, which is not shown: it may hold a key.
fn describe(text: &str, error: &toml::de::Error) -> String {
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {}", 1 + before.matches('\n').count(), error.message()),
        None => error.message().to_owned(),
    }
}

/// Slots of a hash table with so many entries: at most 7 of 8 are used, and their number is a power of two.
const fn table_slots(entries: u64) -> u64 {
    (entries + entries / 7 + 1).next_power_of_two()
}

impl TransportConfig {
    /// Reads a configuration from TOML text and validates it.
    ///
    /// # Errors
    /// Says the line of a syntax error or an unknown key, or the key whose value is out of range.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| describe(text, &error))?;
        config.validate().map_err(|error| error.to_string())?;
        Ok(config)
    }

    /// Resident bytes that a connection without buffered data takes at most, on either side, whose
    /// peer never had more than [`STREAMS_ALLOWED_INITIAL`] / 2 streams of a kind open.
    #[must_use]
    pub const fn idle_connection_bytes_max(&self) -> u64 {
        self.connection_bytes_with(streams_allowed_initial(self.max_concurrent_streams))
    }

    /// quinn-proto keeps a table entry for every stream that the peer may open, used or not: for
    /// 1000 these are 137 kB, most of an idle connection.
    const fn connection_bytes_with(&self, streams: u64) -> u64 {
        // Receiving: both kinds; sending: bidirectional ones.
        let receiving = table_slots(2 * streams).saturating_mul(25);
        let sending = table_slots(streams).saturating_mul(17);
        IDLE_CONNECTION_BYTES_MAX.saturating_add(receiving).saturating_add(sending)
    }

    /// Resident bytes that a connection may take when its peer fills the receive window, nobody
    /// reads, and its own send buffer and datagram queues are full. Stream data sent as `Bytes` is the
    /// application's own memory and counts once, however often it is sent.
    #[must_use]
    pub const fn connection_bytes_max(&self) -> u64 {
        let received = self.receive_buffer_size + self.receive_buffer_size / 2;
        // Each direction's queue, as `quic()` sets them.
        let datagrams_received = match self.max_datagram_size {
            0 => 0,
            size if (size as u64) < DATAGRAM_RECEIVE_BUFFER_BYTES_MIN => {
                DATAGRAM_RECEIVE_BUFFER_BYTES_MIN
            }
            size => size as u64,
        };
        let datagrams = datagrams_received + self.datagram_send_buffer_size as u64;
        let buffered = received + self.send_buffer_size + datagrams;
        self.connection_bytes_with(self.max_concurrent_streams).saturating_add(buffered)
    }

    /// Checks every limit.
    ///
    /// # Errors
    /// The first key that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        const GIB: u64 = 1 << 30;
        check("shards", self.shards, 1, SHARDS_MAX)?;
        self.cid.validate()?;
        check("max_concurrent_streams", self.max_concurrent_streams, 0, 1 << 60)?;
        check("send_buffer_size", self.send_buffer_size, 2 * 1200, 16 * GIB)?;
        check("receive_buffer_size", self.receive_buffer_size, 2 * 1200, 16 * GIB)?;
        check("stream_receive_buffer_size", self.stream_receive_buffer_size, 1200, 16 * GIB)?;
        check("max_datagram_size", self.max_datagram_size, 0, 65_507)?;
        check("datagram_send_buffer_size", self.datagram_send_buffer_size as u64, 0, GIB)?;
        check("idle_timeout_ms", self.idle_timeout_ms, 0, (1 << 62) - 1)?;
        check("handshake_timeout_ms", self.handshake_timeout_ms, 1, 600_000)?;
        if self.connection_age_ms_max != 0 {
            check("connection_age_ms_max", self.connection_age_ms_max, 1_000, YEAR_MS)?;
        }
        check("keep_alive_interval_ms", self.keep_alive_interval_ms, 0, 86_400_000)?;
        check("connections_per_shard_max", self.connections_per_shard_max, 1, 1 << 24)?;
        check("incoming_max", self.incoming_max, 1, 1 << 20)?;
        check("new_tokens", self.new_tokens, 0, 16)?;
        check("new_token_lifetime_s", self.new_token_lifetime_s, 1, 1_209_600)?;
        check(
            "initial_mtu_bytes",
            self.initial_mtu_bytes,
            UDP_PAYLOAD_BYTES_MIN,
            MIN_MTU_BYTES_MAX,
        )?;
        if self.mtu_upper_bound_bytes != 0 {
            let (min, max) = (self.initial_mtu_bytes, UDP_PAYLOAD_BYTES_MAX);
            check("mtu_upper_bound_bytes", self.mtu_upper_bound_bytes, min, max)?;
        }
        check("initial_rtt_us", self.initial_rtt_us, 1, 10_000_000)?;
        check("initial_window_packets", self.initial_window_packets, 2, 1000)?;
        check("spin_us", self.spin_us, 0, 1_000_000)?;
        check("mailbox_capacity", self.mailbox_capacity, 16, 1 << 20)?;
        check("stream_send_queue_bytes", self.stream_send_queue_bytes as u64, 1, GIB)?;
        check("stream_receive_queue_bytes", self.stream_receive_queue_bytes as u64, 1, GIB)?;
        check("connection_pool_size", self.connection_pool_size, 0, 1 << 20)?;
        self.pool.validate()?;
        check("message_size_max", self.message_size_max as u64, 1, 16 * GIB)?;
        check("shutdown_grace_ms", self.shutdown_grace_ms, 0, 600_000)?;
        check("failover_backoff_ms_min", self.failover_backoff_ms_min, 10, 60_000)?;
        let (longest, min) = (self.failover_backoff_ms_max, self.failover_backoff_ms_min);
        check("failover_backoff_ms_max", longest, min, 3_600_000)?;
        if let Some(tls) = &self.tls {
            tls.validate()?;
        }
        if self.cid.lifetime_s != 0
            && (self.idle_timeout_ms == 0 || self.cid.lifetime_s * 500 <= self.idle_timeout_ms)
        {
            return Err(ConfigError {
                key: "cid.lifetime_s",
                value: self.cid.lifetime_s.to_string(),
                allowed: format!(
                    "0, or more than twice idle_timeout_ms ({}), which must not be 0",
                    self.idle_timeout_ms
                ),
            });
        }
        if self.careful_resume
            && !matches!(self.congestion_control, CongestionControl::Bbr2 | CongestionControl::Bbr3)
        {
            return Err(ConfigError {
                key: "careful_resume",
                value: "true".into(),
                allowed: format!(
                    "false, because congestion_control is {} (bbr2 and bbr3 can)",
                    self.congestion_control.name()
                ),
            });
        }
        if !self.cores.is_empty() && self.cores.len() != self.shards {
            return Err(ConfigError {
                key: "cores",
                value: format!("{} cores", self.cores.len()),
                allowed: format!("none, or one for each of the {} shards", self.shards),
            });
        }
        if self.keep_alive_interval_ms != 0
            && self.idle_timeout_ms != 0
            && self.keep_alive_interval_ms >= self.idle_timeout_ms
        {
            return Err(ConfigError {
                key: "keep_alive_interval_ms",
                value: self.keep_alive_interval_ms.to_string(),
                allowed: format!("less than idle_timeout_ms ({})", self.idle_timeout_ms),
            });
        }
        if self.datapath == DatapathChoice::AfXdp && self.interface.is_none() {
            return Err(ConfigError {
                key: "interface",
                value: "unset".into(),
                allowed: "the name of an interface, because datapath is af_xdp (`ip -br link` lists them)"
                    .into(),
            });
        }
        Ok(())
    }

    /// How old the connection with this serial number may become: the configured age less up to a
    /// tenth, spread evenly over successive serial numbers.
    pub(crate) fn connection_age_max(&self, serial: u32) -> Option<Duration> {
        // 2^32 divided by the golden ratio: successive multiples, modulo 2^32, lie far apart.
        const SPREAD: u32 = 0x9e37_79b9;
        if self.connection_age_ms_max == 0 {
            return None;
        }
        let age = Duration::from_millis(self.connection_age_ms_max);
        let share = f64::from(serial.wrapping_mul(SPREAD)) / f64::from(u32::MAX);
        Some(age - (age / 10).mul_f64(share))
    }

    /// Bytes that may wait in all stream handles of one connection: four full streams, at most a
    /// quarter of `receive_buffer_size`, of which it is a part.
    pub(crate) fn handle_receive_queue_bytes(&self) -> u64 {
        (self.stream_receive_queue_bytes as u64 * 4).min(self.receive_buffer_size / 4)
    }

    /// The settings in quinn-proto's terms, for paths whose UDP payload is at most `mtu_bytes`;
    /// `seed` feeds the random waits of congestion control, `metrics` takes its samples. With `resume`
    /// they are for one connection.
    pub(crate) fn quic(
        &self,
        mtu_bytes: u16,
        seed: u64,
        metrics: Arc<ShardMetrics>,
        resume: Option<ResumeSeed>,
    ) -> quinn_proto::TransportConfig {
        let varint = |value: u64| VarInt::from_u64(value).expect("validated below 2^62");
        let upper_bound = match self.mtu_upper_bound_bytes {
            0 => mtu_bytes,
            bytes => bytes.min(mtu_bytes),
        };
        let initial_mtu = self.initial_mtu_bytes.min(upper_bound.max(UDP_PAYLOAD_BYTES_MIN));
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(upper_bound.max(initial_mtu));
        if upper_bound == LOOPBACK_PAYLOAD_BYTES {
            // The route is the whole path: one probe, of the upper bound itself, tells all. (A
            // halving of the range would be less than this change, which ends the search.)
            discovery.minimum_change((upper_bound - initial_mtu) / 4 * 3);
        } else if upper_bound > LINK_PAYLOAD_BYTES_MAX {
            // Only links inside a machine carry so much, and those carry all of what their route
            // says: a coarse search ends at exactly that, with a third of the probes.
            discovery.minimum_change(upper_bound / 16);
        }
        let mut quic = quinn_proto::TransportConfig::default();
        let streams_allowed = varint(streams_allowed_initial(self.max_concurrent_streams));
        let initial_window = self.initial_window_packets * u64::from(initial_mtu);
        quic.max_concurrent_bidi_streams(streams_allowed)
            .max_concurrent_uni_streams(streams_allowed)
            .send_window(self.send_buffer_size)
            // The queues of the stream handles are part of what was promised.
            .receive_window(varint(self.receive_buffer_size - self.handle_receive_queue_bytes()))
            .stream_receive_window(varint(self.stream_receive_buffer_size))
            .datagram_receive_buffer_size(match self.max_datagram_size {
                0 => None,
                size => Some((size as usize).max(DATAGRAM_RECEIVE_BUFFER_BYTES_MIN as usize)),
            })
            .datagram_send_buffer_size(self.datagram_send_buffer_size)
            .initial_mtu(initial_mtu)
            .min_mtu(UDP_PAYLOAD_BYTES_MIN)
            .mtu_discovery_config(Some(discovery))
            .initial_rtt(Duration::from_micros(self.initial_rtt_us))
            .max_idle_timeout(match self.idle_timeout_ms {
                0 => None,
                ms => Some(IdleTimeout::from(varint(ms))),
            })
            .keep_alive_interval(match self.keep_alive_interval_ms {
                0 => None,
                ms => Some(Duration::from_millis(ms)),
            })
            .ack_frequency_config(self.ack_frequency.then(|| {
                let mut frequency = AckFrequencyConfig::default();
                frequency
                    .ack_eliciting_threshold(VarInt::from_u32(ACK_ELICITING_THRESHOLD))
                    .max_ack_delay(Some(ACK_DELAY_MAX));
                frequency
            }))
            // The shard polls whole batches, over every datapath.
            .enable_segmentation_offload(true)
            .congestion_controller_factory(Arc::new(GatedFactory {
                inner: self.congestion_control.factory(
                    initial_window,
                    seed,
                    resume,
                    ack_hold(self.ack_frequency),
                ),
                metrics,
            }));
        quic
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        TransportConfig::default().validate().expect("defaults");
    }

    #[test]
    fn errors_name_key_value_and_range() {
        let config = TransportConfig { initial_mtu_bytes: 20_000, ..Default::default() };
        let text = config.validate().expect_err("too large").to_string();
        assert!(text.contains("initial_mtu_bytes") && text.contains("20000"), "{text}");
        assert!(text.contains("1200 to 16383"), "{text}");
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = TransportConfig::from_toml("max_streams = 3").expect_err("unknown");
        assert!(error.contains("max_streams"), "{error}");
        let config = TransportConfig::from_toml("shards = 2\nbind = '[::1]:4433'").expect("valid");
        assert_eq!((config.shards, config.bind.port()), (2, 4433));
        assert!(TransportConfig::from_toml("bind = '127.0.0.1:1'").is_err(), "IPv4 does not exist");
        let error = TransportConfig::from_toml("shards = 0").expect_err("range");
        assert!(error.contains("1 to 256"), "{error}");
    }

    #[test]
    fn failover_waits_have_a_range() {
        let config = TransportConfig { failover_backoff_ms_max: 50, ..Default::default() };
        let error = config.validate().expect_err("below the first wait");
        assert_eq!(
            (error.key, error.allowed.as_str()),
            ("failover_backoff_ms_max", "100 to 3600000")
        );
        let config = TransportConfig { failover_backoff_ms_min: 9, ..Default::default() };
        assert_eq!(config.validate().expect_err("too short").key, "failover_backoff_ms_min");
        let config = TransportConfig::from_toml("failover = false").expect("valid");
        assert!(!config.failover && TransportConfig::default().failover);
    }

    #[test]
    fn af_xdp_needs_an_interface() {
        let config = TransportConfig { datapath: DatapathChoice::AfXdp, ..Default::default() };
        assert_eq!(config.validate().expect_err("no interface").key, "interface");
    }
}
