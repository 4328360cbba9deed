//! STOQ: a kernel-bypass QUIC data-plane engine.
//!
//! QUIC (RFC 9000, 9001, 9002, 9221) over IPv6, on pinned threads that each own their packets
//! from the device's ring to the stream. STOQ carries bytes and says how that went; what the
//! bytes mean, where peers are and what is kept is the application's.
//!
//! # Ten-minute tour
//!
//! An [`Engine`](engine::Engine) is a set of shards, one thread each, that carry connections.
//! It accepts, connects, or both; what it may do depends on the TLS configurations given to its
//! builder. The futures need no particular executor: here `pollster` blocks the thread on them.
//!
//! ```
//! use std::net::{Ipv6Addr, SocketAddrV6};
//! use std::time::Duration;
//!
//! use futures_util::future::try_join;
//! use stoq::VarInt;
//! use stoq::certs::{ClientTls, IdentityNames, RotatingIdentity, ServerTls};
//! use stoq::config::TransportConfig;
//! use stoq::engine::Engine;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A certificate made on the spot; `certs` also takes files, a local CA, and rotates them.
//! let names = IdentityNames::new().with_dns("node.example.net")?;
//! let identity = RotatingIdentity::self_signed(names).start()?;
//! let trusting = ClientTls::builder().alpn(["chat"]).roots(identity.roots().to_vec()).build()?;
//! let serving = ServerTls::builder().alpn(["chat"]).identity(identity).build()?;
//!
//! let config = TransportConfig {
//!     bind: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0),
//!     ..Default::default()
//! };
//! let server = Engine::builder().config(config.clone()).server(serving.crypto()).start()?;
//! let client = Engine::builder().config(config).client(trusting.crypto()).start()?;
//!
//! let serve = async {
//!     let incoming = server.accept().await.expect("the engine runs");
//!     let conn = incoming.accept().await?;
//!     let (mut send, mut recv) = conn.accept_bi().await?;
//!     let request = recv.read_to_end(1024).await?;
//!     send.write_all(&request).await?;
//!     send.finish()?;
//!     // Not before the peer has everything may the connection go.
//!     send.stopped().await?;
//!     Ok::<_, Box<dyn std::error::Error>>(())
//! };
//! let ask = async {
//!     let conn = client.connect(server.local_addr(), "node.example.net").await?;
//!     let (mut send, mut recv) = conn.open_bi().await?;
//!     send.write_all(b"hello").await?;
//!     send.finish()?;
//!     let answer = recv.read_to_end(1024).await?;
//!     println!("{} after {:?}", String::from_utf8_lossy(&answer), conn.rtt());
//!     Ok(answer)
//! };
//! let ((), answer) = pollster::block_on(try_join(serve, ask))?;
//! assert_eq!(answer, b"hello");
//!
//! // Streams may go on for the grace; the report says what it cut off.
//! let report = client.shutdown_blocking(Duration::from_secs(1), VarInt::from_u32(0), b"bye");
//! assert_eq!(report.streams_cut_off, 0);
//! # Ok(())
//! # }
//! ```
//!
//! What holds for every handle:
//!
//! * **Dropping** means what it means in quinn: a [`SendStream`](stream::SendStream) finishes,
//!   a [`RecvStream`](stream::RecvStream) tells the peer to stop, the last handle of a
//!   connection closes it with code 0, an undecided [`Incoming`](engine::Incoming) is refused,
//!   a [`Connecting`](engine::Connecting) is abandoned at once, an
//!   [`Engine`](engine::Engine) shuts down without grace.
//! * **Cancelling** a future loses nothing unless its documentation says so (`write_all`,
//!   `read_to_end`). A cancelled `open_bi` gives its stream back, reset.
//! * **0-RTT**: with `zero_rtt` and early data allowed in both TLS configurations,
//!   [`Connecting::into_0rtt`](engine::Connecting::into_0rtt) gives the connection before its
//!   handshake is over. [`ZeroRttAccepted`](engine::ZeroRttAccepted) tells whether the server took
//!   what was sent so far; streams of refused data fail, nothing is sent again by itself. A server's
//!   [`RecvStream::is_0rtt`](stream::RecvStream::is_0rtt) says what an attacker may have repeated.
//! * **Back-pressure** is real: a writer waits once `stream_send_queue_bytes` are under way, and
//!   unread data is never more than `receive_buffer_size` a connection, however many streams it
//!   waits in. A stalled reader does not keep other streams' waiting readers from theirs.
//! * **`Bytes`** given to [`write_chunk`](stream::SendStream::write_chunk) and taken from
//!   [`read_chunk`](stream::RecvStream::read_chunk) are not copied. Chunks of 16 KiB and more
//!   are cheapest; small ones are gathered.
//!
//! # Choosing a datapath
//!
//! [`TransportConfig::datapath`](config::TransportConfig::datapath) is `auto` unless set: AF_XDP
//! where a physical device and its driver make it the fastest, else io_uring, else plain sockets,
//! both with segmentation offload. [`Engine::datapaths`](engine::Engine::datapaths) says what
//! carries each shard now (AF_XDP whose device is gone stands on the kernel's socket until it is
//! back) and [`Engine::datapath_reasons`](engine::Engine::datapath_reasons) why it was chosen;
//! [`doctor`] says what the machine could do and what is missing.
//!
//! ```
//! use stoq::config::TransportConfig;
//!
//! let config = TransportConfig::from_toml(
//!     "bind = '[::]:4433'\n\
//!      datapath = 'af_xdp'\n\
//!      interface = 'eth0'\n\
//!      shards = 4",
//! )?;
//! assert_eq!(config.shards, 4);
//! // Unknown keys and values out of range are refused, by name.
//! let error = TransportConfig::from_toml("shards = 0").unwrap_err();
//! assert!(error.contains("`shards` is 0; allowed: 1 to 256"));
//! # Ok::<(), String>(())
//! ```
//!
//! # Code on the shard
//!
//! Between a packet and a handle lie a queue and a wake-up of another thread. A
//! [`ShardApp`](app::ShardApp) has neither: it is called from inside the shard's turn, with one
//! instance per shard, so its state needs no locks. It must not block.
//!
//! ```
//! use stoq::app::{ConnId, ReadOutcome, ShardApp, ShardCx};
//! use stoq::{Dir, StreamId};
//!
//! /// Counts what it receives, and says so at the end of each stream.
//! #[derive(Default)]
//! struct Count {
//!     bytes: usize,
//! }
//!
//! impl ShardApp for Count {
//!     fn handle_stream_opened(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, dir: Dir) {
//!         while let Some(stream) = cx.accept_stream(conn, dir) {
//!             self.handle_readable(cx, conn, stream);
//!         }
//!     }
//!
//!     fn handle_readable(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) {
//!         let bytes = &mut self.bytes;
//!         let outcome = cx.read(conn, stream, usize::MAX, |chunk| *bytes += chunk.len());
//!         if outcome == ReadOutcome::Finished && stream.dir() == Dir::Bi {
//!             cx.write(conn, stream, &mut [self.bytes.to_string().into()]);
//!             cx.finish(conn, stream);
//!         }
//!     }
//! }
//!
//! let builder = stoq::engine::Engine::builder().app(|_shard| Count::default());
//! # drop(builder);
//! ```
//!
//! Clients that knock then go to the application, while
//! [`Engine::connect`](engine::Engine::connect) still gives handles. If a call panics, the
//! connection that it was about is closed with
//! [`AppPanicked`](error::ConnectionError::AppPanicked), the panic is logged and counted
//! (`app_panics`), and the shard goes on. The examples `echo` and `on_shard_service` show more.
//! `docs/handles.md` of the repository lists what differs from quinn, method by method, and
//! `docs/embedding.md` has both versions of two servers side by side, with what
//! they cost: a 64-byte request takes 5.7 µs against code on the shard, 9.5 µs against handles.
//!
//! # Tuning
//!
//! | when | set |
//! |---|---|
//! | one core does not suffice | `shards`, and `cores` to choose them |
//! | latency matters more than an idle core | `busy_poll`: `always`; `off` for laptops |
//! | the path is long and fat | `receive_buffer_size`, `stream_receive_buffer_size`, `send_buffer_size` to the bandwidth-delay product |
//! | many idle connections | nothing: 30 kB each; stream tables grow with use up to `max_concurrent_streams` |
//! | the path's MTU is known to be large | `initial_mtu_bytes` up, `mtu_upper_bound_bytes` |
//! | losses do not mean congestion | `congestion_control`: `bbr2` (the default) or `bbr3`; else `cubic` |
//!
//! [`Engine::stats`](engine::Engine::stats) and
//! [`Connection::stats`](connection::Connection::stats) cost the shards nothing to read.
//!
//! # Errors
//!
//! One type per operation, in [`error`]: what failed, on what, and what to do.
//! [`ConnectionError`](error::ConnectionError) says whose doing an end was
//! ([`is_peer_fault`](error::ConnectionError::is_peer_fault)). Nothing is resent silently: data
//! is safe with the peer when [`SendStream::stopped`](stream::SendStream::stopped) has answered
//! `None`, and not before. What was received and acknowledged stays readable after the
//! connection has gone.
#![deny(unsafe_code)]

pub mod app;
pub mod ca;
pub mod certs;
pub mod clock;
pub mod config;
pub mod connection;
pub mod datapath;
pub mod doctor;
pub mod engine;
pub mod error;
mod handles;
pub mod metrics;
mod placement;
pub mod pool;
pub mod proto;
pub mod shard;
pub mod sim;
pub mod stream;
mod sys;
pub mod transport;
mod umem;
pub mod wire;

pub use quinn_proto::{Dir, StreamId, VarInt};
#[cfg(feature = "privileged-tests")]
#[doc(hidden)]
pub use sys::testing;

/// Pins the calling thread to a core; `false` when the process may not use that core.
#[must_use]
pub fn pin_current_thread(core: usize) -> bool {
    core_affinity::set_for_current(core_affinity::CoreId { id: core })
}
