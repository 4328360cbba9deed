//! BBR under a real quinn-proto connection, in memory and in virtual time: what
//! the controller believes of the interface (one send time per packet, loss after
//! the ACK, the sum of lost bytes) must be what quinn-proto does.

use std::any::Any;
use std::cell::Cell;
use std::collections::VecDeque;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig,
    Event, RttEstimator, ServerConfig, StreamId, TransportConfig, VarInt,
};
use stoq::proto::bbr::{Bbr, BbrConfig, BbrProbe, Params, State};

const RATE_BPS: u64 = 20_000_000;
const DELAY: Duration = Duration::from_millis(20);
const QUEUE: Duration = Duration::from_millis(60);
const UDP_IP_BYTES: u64 = 48;
const TOTAL_BYTES: usize = 6_000_000;

/// What the shard's wrapper does: hides the window from quinn-proto's pacer and
/// opens or closes a gate instead.
#[derive(Debug)]
struct Gated {
    bbr: Bbr,
    open: Arc<AtomicBool>,
}

impl Controller for Gated {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.bbr.on_sent(now, bytes, last_packet_number);
    }
    fn on_ack(&mut self, now: Instant, sent: Instant, n: u64, limited: bool, rtt: &RttEstimator) {
        self.bbr.on_ack(now, sent, n, limited, rtt);
    }
    fn on_end_acks(&mut self, now: Instant, in_flight: u64, limited: bool, largest: Option<u64>) {
        self.bbr.on_end_acks(now, in_flight, limited, largest);
    }
    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost: u64) {
        self.bbr.on_congestion_event(now, sent, persistent, lost);
    }
    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.bbr.on_mtu_update(new_mtu);
    }
    fn window(&self) -> u64 {
        // Large enough that the pacer's bucket never empties, small enough not to overflow it.
        if self.open.load(Relaxed) { 1 << 40 } else { 0 }
    }
    fn metrics(&self) -> ControllerMetrics {
        self.bbr.metrics()
    }
    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { bbr: self.bbr.clone(), open: Arc::clone(&self.open) })
    }
    fn initial_window(&self) -> u64 {
        self.bbr.initial_window()
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[derive(Debug)]
struct GatedFactory {
    config: BbrConfig,
    open: Arc<AtomicBool>,
    probe: std::sync::Mutex<Option<BbrProbe>>,
}

impl ControllerFactory for GatedFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let bbr = self.config.build_bbr(now, current_mtu);
        *self.probe.lock().expect("not poisoned") = Some(bbr.probe());
        Box::new(Gated { bbr, open: Arc::clone(&self.open) })
    }
}

struct Host {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    address: SocketAddr,
    inbox: VecDeque<(Instant, BytesMut)>,
    received: usize,
}

impl Host {
    fn deliver(&mut self, now: Instant, from: SocketAddr) {
        let mut scratch = Vec::new();
        while self.inbox.front().is_some_and(|(at, _)| *at <= now) {
            let (_, data) = self.inbox.pop_front().expect("looked at");
            match self.endpoint.handle(now, from, None, None, data, &mut scratch) {
                Some(DatagramEvent::NewConnection(incoming)) => {
                    let accepted = self.endpoint.accept(incoming, now, &mut scratch, None);
                    self.connection = Some(accepted.expect("accepted"));
                }
                Some(DatagramEvent::ConnectionEvent(_, event)) => {
                    let (_, connection) = self.connection.as_mut().expect("a connection");
                    connection.handle_event(event);
                }
                Some(DatagramEvent::Response(_)) | None => {}
            }
        }
        self.pump(now);
    }

    fn pump(&mut self, now: Instant) {
        let Some((handle, connection)) = &mut self.connection else { return };
        if connection.poll_timeout().is_some_and(|at| at <= now) {
            connection.handle_timeout(now);
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
    }

    /// One datagram, if there is one to send.
    fn transmit(&mut self, now: Instant) -> Option<Vec<u8>> {
        let (_, connection) = self.connection.as_mut()?;
        let mut buffer = Vec::with_capacity(2000);
        let transmit = connection.poll_transmit(now, 1, &mut buffer)?;
        assert_eq!(transmit.size, buffer.len());
        Some(buffer)
    }

    fn read_all(&mut self) {
        let Some((_, connection)) = &mut self.connection else { return };
        while connection.poll().is_some() {}
        while connection.streams().accept(Dir::Uni).is_some() {}
        let id = StreamId::new(quinn_proto::Side::Client, Dir::Uni, 0);
        let mut stream = connection.recv_stream(id);
        if let Ok(mut chunks) = stream.read(true) {
            while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
                self.received += chunk.bytes.len();
            }
            let _must_transmit = chunks.finalize();
        }
    }
}

fn configs(factory: Arc<GatedFactory>) -> (ClientConfig, ServerConfig) {
    let made = rcgen::generate_simple_self_signed(["localhost".into()]).expect("a certificate");
    let certificate = made.cert.der().clone();
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut server =
        ServerConfig::with_single_cert(vec![certificate.clone()], key.into()).expect("valid");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).expect("a root");
    let mut client = ClientConfig::with_root_certificates(Arc::new(roots)).expect("valid");
    let mut transport = TransportConfig::default();
    transport.congestion_controller_factory(factory);
    transport.send_window(64 << 20);
    client.transport_config(Arc::new(transport));
    let mut transport = TransportConfig::default();
    transport.receive_window(VarInt::from_u32(64 << 20));
    transport.stream_receive_window(VarInt::from_u32(64 << 20));
    server.transport_config(Arc::new(transport));
    (client, server)
}

fn host(server: Option<ServerConfig>, port: u16) -> Host {
    Host {
        endpoint: Endpoint::new(
            Arc::new(EndpointConfig::default()),
            server.map(Arc::new),
            true,
            None,
        ),
        connection: None,
        address: SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port),
        inbox: VecDeque::new(),
        received: 0,
    }
}

/// Uploads, drops every `drop_every`th packet, and returns the probe, the loss
/// that quinn-proto saw, and the virtual time taken.
fn upload(params: Params, drop_every: u64) -> (BbrProbe, u64, Duration) {
    let open = Arc::new(AtomicBool::new(true));
    let factory = Arc::new(GatedFactory {
        config: BbrConfig::new(params, 7),
        open: Arc::clone(&open),
        probe: std::sync::Mutex::new(None),
    });
    let (client_config, server_config) = configs(Arc::clone(&factory));
    let (mut client, mut server) = (host(None, 4001), host(Some(server_config), 4002));
    let start = Instant::now();
    let mut now = start;
    client.connection = Some(
        client.endpoint.connect(now, client_config, server.address, "localhost").expect("connects"),
    );
    let probe = factory.probe.lock().expect("not poisoned").clone().expect("built");
    let data = Bytes::from(vec![7u8; TOTAL_BYTES]);
    let (mut stream, mut written) = (None, 0);
    let (mut link_free, mut next_send, mut sent) = (start, start, 0u64);
    let nanosecond = Cell::new(0u64);
    while server.received < TOTAL_BYTES {
        assert!(now - start < Duration::from_secs(60), "{:?}", probe.snapshot());
        client.deliver(now, server.address);
        server.deliver(now, client.address);
        server.read_all();
        let (_, connection) = client.connection.as_mut().expect("connected");
        while let Some(event) = connection.poll() {
            if matches!(event, Event::Connected) {
                stream = connection.streams().open(Dir::Uni);
            }
        }
        if let Some(id) = stream
            && written < TOTAL_BYTES
        {
            let end = (written + 65_536).min(TOTAL_BYTES);
            let mut chunk = [data.slice(written..end)];
            if let Ok(done) = connection.send_stream(id).write_chunks(&mut chunk) {
                written += done.bytes;
            }
        }
        // The shard's part: window, pacing by quantum, a time of its own per packet.
        let mut quantum = probe.send_quantum_bytes();
        loop {
            let fits = probe.in_flight_bytes() + 1452 <= probe.cwnd_bytes();
            open.store(fits && now >= next_send && quantum > 0, Relaxed);
            nanosecond.set(nanosecond.get() + 1);
            let at = now + Duration::from_nanos(nanosecond.get() % 1000);
            let Some(packet) = client.transmit(at) else {
                if open.load(Relaxed) {
                    probe.set_app_limited(written == TOTAL_BYTES || stream.is_none());
                }
                break;
            };
            probe.set_app_limited(false);
            let bytes = packet.len() as u64;
            quantum = quantum.saturating_sub(bytes);
            let cost =
                Duration::from_nanos(bytes * 1_000_000_000 / probe.pacing_rate_bytes_per_s());
            next_send = if quantum == 0 { next_send.max(now) + cost } else { next_send + cost };
            sent += 1;
            link_free = link_free.max(now);
            if link_free - now > QUEUE || (sent > 50 && sent % drop_every == 0) {
                continue;
            }
            let bits = (bytes + UDP_IP_BYTES) * 8;
            link_free += Duration::from_nanos(bits * 1_000_000_000 / RATE_BPS);
            server.inbox.push_back((link_free + DELAY, BytesMut::from(&packet[..])));
        }
        next_send = next_send.max(now.checked_sub(Duration::from_millis(1)).unwrap_or(now));
        while let Some(packet) = server.transmit(now) {
            client.inbox.push_back((now + DELAY, BytesMut::from(&packet[..])));
        }
        now += Duration::from_micros(100);
    }
    let (_, connection) = client.connection.as_ref().expect("connected");
    (probe, connection.stats().path.lost_bytes, now - start)
}

#[test]
fn estimate_and_loss_agree_with_the_link_and_with_quinn() {
    for params in [Params::BBR2, Params::BBR3] {
        let (probe, lost_bytes, took) = upload(params, u64::MAX);
        let snapshot = probe.snapshot();
        println!("{} clean: {took:?} {snapshot:?}", params.name);
        let link = RATE_BPS / 8 * 1452 / 1500;
        assert!(snapshot.max_bw_bytes_per_s.abs_diff(link) * 100 < 4 * link, "{snapshot:?}");
        assert_ne!(snapshot.state, State::Startup);
        assert_eq!(snapshot.unrecorded_packets, 0);
        assert_eq!(snapshot.lost_bytes, lost_bytes);
        assert!(took < Duration::from_millis(3100), "{took:?}");
        let rtt = snapshot.min_rtt.expect("measured");
        assert!(rtt > 2 * DELAY && rtt < 3 * DELAY, "{rtt:?}");
    }
}

#[test]
fn scattered_loss_is_attributed_byte_for_byte() {
    for params in [Params::BBR2, Params::BBR3] {
        let (probe, lost_bytes, took) = upload(params, 150);
        let snapshot = probe.snapshot();
        println!("{} lossy: {took:?} {snapshot:?}", params.name);
        assert!(lost_bytes > 20 * 1200, "{lost_bytes}");
        assert_eq!(snapshot.lost_bytes, lost_bytes);
        assert!(snapshot.delivered_bytes >= TOTAL_BYTES as u64 * 98 / 100);
        let link = RATE_BPS / 8 * 1452 / 1500;
        assert!(snapshot.max_bw_bytes_per_s.abs_diff(link) * 100 < 5 * link, "{snapshot:?}");
    }
}
