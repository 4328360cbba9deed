//! quiche as a peer to compare with: its state machine in one loop over a socket with GSO and GRO.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser as _;
use quiche::ConnectionId;
use stoq_measure::idle::Idle;
use stoq_measure::peer::{self, Cli, Command, Common, Run, Serve, Workload};
use stoq_measure::window::Window;
use stoq_measure::wire::{
    ALPN, DatagramSink, ECHO_EVERY, WINDOW_BYTES, read_head, request, write_head,
};
use stoq_peers::CertificateFiles;
use stoq_peers::streams::{ClientStreams, ServerStreams, Streams};
use stoq_peers::udp::Udp;

const STACK: &str = "quiche";
/// Bytes of our connection IDs.
const CID_BYTES: usize = 16;
/// Streams that a client may have open at once.
const STREAMS_MAX: u64 = 1000;
/// Datagrams that wait on either side.
const DATAGRAM_QUEUE: usize = 1000;
/// The longest sleep.
const TICK: Duration = Duration::from_millis(50);

fn main() -> anyhow::Result<()> {
    peer::tie_to_parent()?;
    match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Run(args) => run(&args),
    }
}

/// quiche's own copy of the largest payload it may send.
fn udp_payload(common: &Common) -> usize {
    usize::from(common.udp_payload).min(65_000)
}

fn config(common: &Common) -> anyhow::Result<quiche::Config> {
    let window = u64::from(WINDOW_BYTES);
    let mut config = quiche::Config::new(quiche::PROTOCOL_VERSION)?;
    config.set_application_protos(&[ALPN])?;
    config.set_max_idle_timeout(15_000);
    config.set_max_recv_udp_payload_size(65_527);
    config.set_max_send_udp_payload_size(udp_payload(common));
    config.set_initial_max_data(window);
    config.set_initial_max_stream_data_bidi_local(window);
    config.set_initial_max_stream_data_bidi_remote(window);
    config.set_max_connection_window(window);
    config.set_max_stream_window(window);
    config.set_initial_max_streams_bidi(STREAMS_MAX);
    config.enable_dgram(true, DATAGRAM_QUEUE, DATAGRAM_QUEUE);
    config.enable_pacing(false);
    config.verify_peer(false);
    Ok(config)
}

/// 16 bytes that no other connection has.
fn connection_id() -> ConnectionId<'static> {
    use std::hash::{BuildHasher, Hasher};
    let word = || std::hash::RandomState::new().build_hasher().finish().to_be_bytes();
    ConnectionId::from_vec([word(), word()].concat())
}

/// quiche's streams as [`Streams`].
struct Io<'a>(&'a mut quiche::Connection);

impl Streams for Io<'_> {
    fn read(&mut self, stream: u64, buffer: &mut [u8]) -> Option<(usize, bool)> {
        self.0.stream_recv(stream, buffer).ok()
    }

    fn write(&mut self, stream: u64, data: &[u8], fin: bool) -> Option<usize> {
        match self.0.stream_send(stream, data, fin) {
            Ok(taken) => Some(taken),
            Err(quiche::Error::Done | quiche::Error::StreamLimit) => Some(0),
            Err(_gone) => None,
        }
    }
}

/// Sends all that a connection has to send now.
fn transmit(
    connection: &mut quiche::Connection,
    udp: &mut Udp,
    out: &mut [u8],
) -> anyhow::Result<()> {
    loop {
        match connection.send(out) {
            Ok((len, info)) => udp.send(&out[..len], info.to)?,
            Err(quiche::Error::Done) => return udp.flush(),
            Err(error) => {
                // Fatal for this connection only; it says so itself when asked.
                eprintln!("peer-quiche: {error}");
                return udp.flush();
            }
        }
    }
}

struct Client {
    connection: quiche::Connection,
    streams: ServerStreams,
    sink: DatagramSink,
}

fn serve(args: &Serve) -> anyhow::Result<()> {
    args.common.pin()?;
    let files = CertificateFiles::create()?;
    let mut config = config(&args.common)?;
    config.load_cert_chain_from_pem_file(&files.certificate())?;
    config.load_priv_key_from_pem_file(&files.key())?;
    drop(files);
    let mut udp = Udp::bind(args.listen.into())?;
    let settings = format!(
        "UDP GSO and GRO by quinn-udp, windows of {} MiB, UDP payload up to {}, Cubic without pacing, \
         one thread; BoringSSL, AES-128-GCM",
        WINDOW_BYTES >> 20,
        udp_payload(&args.common)
    );
    peer::announce(STACK, udp.local(), &settings);
    let local = udp.local();
    let mut clients: HashMap<ConnectionId<'static>, Client> = HashMap::new();
    let mut aliases: HashMap<ConnectionId<'static>, ConnectionId<'static>> = HashMap::new();
    let mut out = vec![0; 65_536];
    loop {
        let timeout = clients.values().filter_map(|client| client.connection.timeout()).min();
        udp.wait(Some(timeout.unwrap_or(TICK).min(TICK)))?;
        udp.receive(|datagram, from| {
            let key = route(datagram, from, local, &mut config, &mut clients, &mut aliases);
            if let Some(client) = key.and_then(|key| clients.get_mut(&key)) {
                let info = quiche::RecvInfo { from, to: local };
                // A packet that quiche refuses is dropped, as it should be.
                let _refused = client.connection.recv(datagram, info);
            }
        })?;
        for client in clients.values_mut() {
            client.turn();
            transmit(&mut client.connection, &mut udp, &mut out)?;
        }
        clients.retain(|_, client| !client.connection.is_closed());
        aliases.retain(|_, own| clients.contains_key(own));
    }
}

/// The key of the connection that a datagram belongs to; a new one for a new client.
fn route(
    datagram: &mut [u8],
    from: SocketAddr,
    local: SocketAddr,
    config: &mut quiche::Config,
    clients: &mut HashMap<ConnectionId<'static>, Client>,
    aliases: &mut HashMap<ConnectionId<'static>, ConnectionId<'static>>,
) -> Option<ConnectionId<'static>> {
    let header = quiche::Header::from_slice(datagram, CID_BYTES).ok()?;
    let dcid = header.dcid.into_owned();
    if clients.contains_key(&dcid) {
        return Some(dcid);
    }
    if let Some(own) = aliases.get(&dcid) {
        return Some(own.clone());
    }
    if header.ty != quiche::Type::Initial {
        return None;
    }
    let own = connection_id();
    let connection = quiche::accept(&own, None, local, from, config).ok()?;
    let client =
        Client { connection, streams: ServerStreams::default(), sink: DatagramSink::default() };
    clients.insert(own.clone(), client);
    aliases.insert(dcid, own.clone());
    Some(own)
}

impl Client {
    fn turn(&mut self) {
        if self.connection.timeout() == Some(Duration::ZERO) {
            self.connection.on_timeout();
        }
        if !self.connection.is_established() {
            return;
        }
        for stream in self.connection.readable() {
            self.streams.handle_readable(&mut Io(&mut self.connection), stream);
        }
        for stream in self.connection.writable() {
            self.streams.handle_writable(&mut Io(&mut self.connection), stream);
        }
        let mut datagram = [0; 2048];
        while let Ok(len) = self.connection.dgram_recv(&mut datagram) {
            if let Some(echo) = self.sink.handle(&datagram[..len]) {
                // Echoes may be lost like any datagram.
                let _may_be_lost = self.connection.dgram_send(&echo);
            }
        }
    }
}

/// A connection of many.
struct UnderWay {
    connection: quiche::Connection,
    /// When its handshake was to start; `None` once it has been counted, or if it does not count.
    start: Option<Instant>,
    /// Whether its request has been made.
    has_asked: bool,
    /// Whether it has been answered.
    is_answered: bool,
}

impl UnderWay {
    fn new(connection: quiche::Connection, start: Option<Instant>) -> Self {
        Self { connection, start, has_asked: false, is_answered: false }
    }

    /// Makes one empty request; the ticket, once that is answered and a ticket has come.
    fn ticket(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        if !self.has_asked {
            self.connection.stream_send(0, &request(0, 0), true)?;
            self.has_asked = true;
        }
        let mut answer = [0; 64];
        if let Ok((_, true)) = self.connection.stream_recv(0, &mut answer) {
            self.is_answered = true;
        }
        let ticket = self.connection.session().filter(|_| self.is_answered);
        Ok(ticket.map(<[u8]>::to_vec))
    }
}

struct Driver {
    udp: Udp,
    config: quiche::Config,
    run: Run,
    out: Vec<u8>,
    /// The newest ticket, for handshakes that resume.
    session: Option<Vec<u8>>,
}

impl Driver {
    fn connect(&mut self) -> anyhow::Result<(ConnectionId<'static>, quiche::Connection)> {
        let id = connection_id();
        let (local, peer) = (self.udp.local(), SocketAddr::V6(self.run.connect));
        let mut connection =
            quiche::connect(Some("localhost"), &id, local, peer, &mut self.config)?;
        if let Some(session) = &self.session {
            connection.set_session(session)?;
        }
        Ok((id, connection))
    }

    /// Receives for many connections, after a sleep; then their timers.
    fn receive(
        &mut self,
        connections: &mut HashMap<ConnectionId<'static>, UnderWay>,
    ) -> anyhow::Result<()> {
        let timeout = connections.values().filter_map(|each| each.connection.timeout()).min();
        self.udp.wait(Some(timeout.unwrap_or(TICK).min(TICK)))?;
        let local = self.udp.local();
        self.udp.receive(|datagram, from| {
            let Ok(header) = quiche::Header::from_slice(datagram, CID_BYTES) else { return };
            if let Some(each) = connections.get_mut(&header.dcid.into_owned()) {
                let info = quiche::RecvInfo { from, to: local };
                let _refused = each.connection.recv(datagram, info);
            }
        })?;
        for UnderWay { connection, .. } in connections.values_mut() {
            if connection.timeout() == Some(Duration::ZERO) {
                connection.on_timeout();
            }
        }
        Ok(())
    }

    /// One round of a single connection: sends, sleeps if there is nothing to do, receives.
    fn turn(&mut self, connection: &mut quiche::Connection, may_sleep: bool) -> anyhow::Result<()> {
        transmit(connection, &mut self.udp, &mut self.out)?;
        let timeout = connection.timeout().unwrap_or(TICK).min(TICK);
        self.udp.wait(Some(if may_sleep { timeout } else { Duration::ZERO }))?;
        let local = self.udp.local();
        self.udp.receive(|datagram, from| {
            let _refused = connection.recv(datagram, quiche::RecvInfo { from, to: local });
        })?;
        if connection.timeout() == Some(Duration::ZERO) {
            connection.on_timeout();
        }
        anyhow::ensure!(!connection.is_closed(), "closed: {:?}", connection.peer_error());
        Ok(())
    }
}

fn run(args: &Run) -> anyhow::Result<()> {
    args.common.pin()?;
    let mut driver = Driver {
        udp: Udp::towards(args.connect.into())?,
        config: config(&args.common)?,
        run: args.clone(),
        out: vec![0; 65_536],
        session: None,
    };
    match args.workload {
        Workload::Idle => return idle(&mut driver),
        Workload::HandshakesResumed => {
            driver.session = Some(first_ticket(&mut driver)?);
            return handshakes(&mut driver)?.finish(STACK);
        }
        Workload::Handshakes => return handshakes(&mut driver)?.finish(STACK),
        _ => {}
    }
    let (_, mut connection) = driver.connect()?;
    while !connection.is_established() {
        driver.turn(&mut connection, true)?;
    }
    let mut window = Window::new(args);
    if args.workload == Workload::Datagrams {
        datagrams(&mut driver, &mut connection, &mut window)?;
    } else {
        let mut streams = ClientStreams::new(args);
        while window.tick()? {
            for stream in connection.readable() {
                streams.handle_readable(&mut Io(&mut connection), stream, &mut window);
            }
            for stream in streams.start(&mut Io(&mut connection)) {
                streams.handle_writable(&mut Io(&mut connection), stream, &mut window);
            }
            driver.turn(&mut connection, true)?;
        }
    }
    let stats = connection.path_stats().next().context("a path")?;
    window.set_path(Some(stats.pmtu as u64), Some(stats.lost as u64));
    window.finish(STACK)?;
    connection.close(true, 0, b"done")?;
    transmit(&mut connection, &mut driver.udp, &mut driver.out)
}

/// The ticket of a first, full handshake.
fn first_ticket(driver: &mut Driver) -> anyhow::Result<Vec<u8>> {
    let (_, connection) = driver.connect()?;
    let mut first = UnderWay::new(connection, None);
    loop {
        driver.turn(&mut first.connection, true)?;
        if first.connection.is_established()
            && let Some(ticket) = first.ticket()?
        {
            first.connection.close(true, 0, b"")?;
            transmit(&mut first.connection, &mut driver.udp, &mut driver.out)?;
            return Ok(ticket);
        }
    }
}

fn handshakes(driver: &mut Driver) -> anyhow::Result<Window> {
    let mut window = Window::new(&driver.run);
    let resumed = driver.run.workload == Workload::HandshakesResumed;
    let mut under_way: HashMap<ConnectionId<'static>, UnderWay> = HashMap::new();
    while window.tick()? {
        while under_way.len() < driver.run.outstanding {
            let start = Instant::now();
            let (id, connection) = driver.connect()?;
            under_way.insert(id, UnderWay::new(connection, Some(start)));
        }
        for each in under_way.values_mut() {
            transmit(&mut each.connection, &mut driver.udp, &mut driver.out)?;
        }
        driver.receive(&mut under_way)?;
        let mut ended = Vec::new();
        for (id, each) in &mut under_way {
            anyhow::ensure!(!each.connection.is_timed_out(), "a handshake timed out");
            if !each.connection.is_established() {
                continue;
            }
            if let Some(start) = each.start.take() {
                window.add_op(start.elapsed());
                let was_resumed = each.connection.is_resumed();
                anyhow::ensure!(was_resumed == resumed, "resumed: {was_resumed}, not {resumed}");
            }
            if resumed {
                let Some(ticket) = each.ticket()? else { continue };
                driver.session = Some(ticket);
            }
            each.connection.close(true, 0, b"")?;
            transmit(&mut each.connection, &mut driver.udp, &mut driver.out)?;
            ended.push(id.clone());
        }
        for id in ended {
            under_way.remove(&id);
        }
    }
    Ok(window)
}

/// Connections that do nothing.
fn idle(driver: &mut Driver) -> anyhow::Result<()> {
    let idle = Idle::before(&driver.run)?;
    let mut held: HashMap<ConnectionId<'static>, UnderWay> = HashMap::new();
    for _ in 0..driver.run.connections {
        let (id, connection) = driver.connect()?;
        held.insert(id.clone(), UnderWay::new(connection, None));
        loop {
            let connection = &mut held.get_mut(&id).expect("just inserted").connection;
            transmit(connection, &mut driver.udp, &mut driver.out)?;
            if connection.is_established() {
                break;
            }
            anyhow::ensure!(!connection.is_closed(), "closed: {:?}", connection.peer_error());
            driver.receive(&mut held)?;
        }
    }
    let holding = idle.hold()?;
    while !holding.is_over() {
        driver.receive(&mut held)?;
        for UnderWay { connection, .. } in held.values_mut() {
            transmit(connection, &mut driver.udp, &mut driver.out)?;
            anyhow::ensure!(!connection.is_closed(), "closed: {:?}", connection.peer_error());
        }
    }
    holding.finish(STACK)
}

fn datagrams(
    driver: &mut Driver,
    connection: &mut quiche::Connection,
    window: &mut Window,
) -> anyhow::Result<()> {
    let size = driver.run.size;
    let epoch = Instant::now();
    let (mut sent, mut delivered) = (0u64, 0u64);
    let mut datagram = vec![0; size];
    let mut echo = [0; 2048];
    while window.tick()? {
        let mut is_full = false;
        for _ in 0..ECHO_EVERY {
            let time_ns = epoch.elapsed().as_nanos() as u64;
            write_head(&mut datagram, sent.is_multiple_of(ECHO_EVERY), time_ns, 0);
            match connection.dgram_send(&datagram) {
                Ok(()) => sent += 1,
                Err(quiche::Error::Done) => {
                    is_full = true;
                    break;
                }
                Err(error) => anyhow::bail!("datagrams of {size} bytes: {error}"),
            }
        }
        driver.turn(connection, is_full)?;
        while let Ok(len) = connection.dgram_recv(&mut echo) {
            let Some((_, time_ns, received)) = read_head(&echo[..len]) else { continue };
            let more = received.saturating_sub(delivered);
            delivered += more;
            window.add_ops(more);
            window.add_bytes(more * size as u64);
            window.add_latency(epoch.elapsed().saturating_sub(Duration::from_nanos(time_ns)));
        }
    }
    Ok(())
}
