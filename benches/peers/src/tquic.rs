//! TQUIC as a peer to compare with: its endpoint in one loop over a socket with GSO and GRO.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use clap::Parser as _;
use stoq_measure::idle::Idle;
use stoq_measure::peer::{self, Cli, Command, Common, Run, Serve, Workload};
use stoq_measure::window::Window;
use stoq_measure::wire::{ALPN, COUNT_BYTES, WINDOW_BYTES, request};
use stoq_peers::CertificateFiles;
use stoq_peers::streams::{ClientStreams, ServerStreams, Streams};
use stoq_peers::udp::Udp;
use tquic::{
    Config, CongestionControlAlgorithm, Connection, Endpoint, PacketInfo, PacketSendHandler,
    TlsConfig, TransportHandler,
};

const STACK: &str = "tquic";
/// Streams that a client may have open at once.
const STREAMS_MAX: u64 = 1000;
/// Packets that TQUIC hands over at once.
const SEND_BATCH: usize = 64;
/// The longest sleep.
const TICK: Duration = Duration::from_millis(50);

fn main() -> anyhow::Result<()> {
    peer::tie_to_parent()?;
    match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Run(args) => run(&args),
    }
}

fn udp_payload(common: &Common) -> usize {
    usize::from(common.udp_payload).min(65_000)
}

fn config(common: &Common) -> anyhow::Result<Config> {
    let window = u64::from(WINDOW_BYTES);
    let mut config = Config::new()?;
    config.set_max_idle_timeout(15_000);
    config.set_recv_udp_payload_size(65_527);
    config.set_send_udp_payload_size(udp_payload(common));
    config.enable_dplpmtud(true);
    config.set_initial_max_data(window);
    config.set_initial_max_stream_data_bidi_local(window);
    config.set_initial_max_stream_data_bidi_remote(window);
    config.set_max_connection_window(window);
    config.set_max_stream_window(window);
    config.set_initial_max_streams_bidi(STREAMS_MAX);
    config.set_congestion_control_algorithm(CongestionControlAlgorithm::Cubic);
    config.enable_pacing(false);
    config.set_send_batch_size(SEND_BATCH);
    config.set_max_concurrent_conns(100_000);
    Ok(config)
}

/// TQUIC's streams as [`Streams`].
struct Io<'a>(&'a mut Connection);

impl Streams for Io<'_> {
    fn read(&mut self, stream: u64, buffer: &mut [u8]) -> Option<(usize, bool)> {
        self.0.stream_read(stream, buffer).ok()
    }

    fn write(&mut self, stream: u64, data: &[u8], fin: bool) -> Option<usize> {
        match self.0.stream_write(stream, Bytes::copy_from_slice(data), fin) {
            Ok(taken) => Some(taken),
            Err(tquic::Error::Done | tquic::Error::StreamLimitError) => Some(0),
            Err(_gone) => None,
        }
    }
}

/// Tells TQUIC whether to call when a stream has room.
fn want_write(connection: &mut Connection, stream: u64, want: bool) {
    // A stream that has gone wants nothing.
    let _gone = connection.stream_want_write(stream, want);
}

struct Sender(Rc<RefCell<Udp>>);

impl PacketSendHandler for Sender {
    fn on_packets_send(&self, packets: &[(Vec<u8>, PacketInfo)]) -> tquic::Result<usize> {
        let mut udp = self.0.borrow_mut();
        for (packet, info) in packets {
            udp.send(packet, info.dst).map_err(|error| tquic::Error::IoError(error.to_string()))?;
        }
        udp.flush().map_err(|error| tquic::Error::IoError(error.to_string()))?;
        Ok(packets.len())
    }
}

/// The server's connections.
#[derive(Default)]
struct Service {
    connections: HashMap<u64, ServerStreams>,
}

impl Service {
    fn streams(&mut self, connection: &Connection) -> &mut ServerStreams {
        self.connections.entry(connection.index().unwrap_or(u64::MAX)).or_default()
    }
}

impl TransportHandler for Service {
    fn on_conn_created(&mut self, _: &mut Connection) {}

    fn on_conn_established(&mut self, _: &mut Connection) {}

    fn on_conn_closed(&mut self, connection: &mut Connection) {
        self.connections.remove(&connection.index().unwrap_or(u64::MAX));
    }

    fn on_stream_created(&mut self, _: &mut Connection, _: u64) {}

    fn on_stream_readable(&mut self, connection: &mut Connection, stream: u64) {
        let writing = self.streams(connection).handle_readable(&mut Io(connection), stream);
        want_write(connection, stream, writing);
    }

    fn on_stream_writable(&mut self, connection: &mut Connection, stream: u64) {
        let writing = self.streams(connection).handle_writable(&mut Io(connection), stream);
        want_write(connection, stream, writing);
    }

    fn on_stream_closed(&mut self, _: &mut Connection, _: u64) {}

    fn on_new_token(&mut self, _: &mut Connection, _: Vec<u8>) {}
}

/// An endpoint and its socket.
struct Loop {
    endpoint: Endpoint,
    udp: Rc<RefCell<Udp>>,
    local: SocketAddr,
}

impl Loop {
    fn new(config: Config, is_server: bool, handler: Box<dyn TransportHandler>, udp: Udp) -> Self {
        let local = udp.local();
        let udp = Rc::new(RefCell::new(udp));
        let sender = Rc::new(Sender(udp.clone()));
        let endpoint = Endpoint::new(Box::new(config), is_server, handler, sender);
        Self { endpoint, udp, local }
    }

    /// Works off what is there, sleeps until more comes, takes it.
    fn turn(&mut self) -> anyhow::Result<()> {
        self.endpoint.process_connections().map_err(|error| anyhow::anyhow!("{error}"))?;
        let timeout = self.endpoint.timeout().unwrap_or(TICK).min(TICK);
        self.udp.borrow().wait(Some(timeout))?;
        let (endpoint, local) = (&mut self.endpoint, self.local);
        let time = Instant::now();
        // TQUIC sends from `process_connections` alone: the socket is free here.
        self.udp.borrow_mut().receive(|datagram, src| {
            // A packet that TQUIC refuses is dropped, as it should be.
            let _refused = endpoint.recv(datagram, &PacketInfo { src, dst: local, time });
        })?;
        if self.endpoint.timeout() == Some(Duration::ZERO) {
            self.endpoint.on_timeout(Instant::now());
        }
        Ok(())
    }
}

fn serve(args: &Serve) -> anyhow::Result<()> {
    args.common.pin()?;
    let files = CertificateFiles::create()?;
    let tls = TlsConfig::new_server_config(
        &files.certificate(),
        &files.key(),
        vec![ALPN.to_vec()],
        false,
    )?;
    drop(files);
    let mut config = config(&args.common)?;
    config.set_tls_config(tls);
    let udp = Udp::bind(args.listen.into())?;
    let settings = format!(
        "UDP GSO and GRO by quinn-udp, windows of {} MiB, UDP payload up to {}, Cubic without pacing, \
         one thread; BoringSSL, AES-128-GCM",
        WINDOW_BYTES >> 20,
        udp_payload(&args.common)
    );
    peer::announce(STACK, udp.local(), &settings);
    let mut server = Loop::new(config, true, Box::<Service>::default(), udp);
    loop {
        server.turn()?;
    }
}

/// What the client's callbacks share with its loop.
struct Shared {
    run: Run,
    window: Window,
    streams: ClientStreams,
    started: HashMap<u64, Instant>,
    /// Handshakes completed.
    established: usize,
    /// Connections whose request for a ticket is not answered.
    asking: usize,
    /// The newest ticket, for handshakes that resume.
    session: Option<Vec<u8>>,
    closed: Option<String>,
}

#[derive(Clone)]
struct Handler(Rc<RefCell<Shared>>);

impl Handler {
    fn start(shared: &mut Shared, connection: &mut Connection) {
        for stream in shared.streams.start(&mut Io(connection)) {
            let more =
                shared.streams.handle_writable(&mut Io(connection), stream, &mut shared.window);
            want_write(connection, stream, more);
        }
    }
}

impl TransportHandler for Handler {
    fn on_conn_created(&mut self, _: &mut Connection) {}

    fn on_conn_established(&mut self, connection: &mut Connection) {
        let shared = &mut *self.0.borrow_mut();
        shared.established += 1;
        let start = connection.index().and_then(|index| shared.started.remove(&index));
        if let Some(start) = start.filter(|_| shared.run.workload.is_handshakes()) {
            shared.window.add_op(start.elapsed());
        }
        match shared.run.workload {
            Workload::Idle => {}
            Workload::Handshakes => {
                // Closed already is as good.
                let _closed = connection.close(true, 0, b"");
            }
            Workload::HandshakesResumed => {
                if start.is_some() && !connection.is_resumed() {
                    shared.closed = Some("a handshake was not resumed".to_owned());
                }
                shared.asking += 1;
                if Io(connection).write(0, &request(0, 0), true) != Some(COUNT_BYTES) {
                    shared.closed = Some("no request could be made".to_owned());
                }
            }
            _ => Self::start(shared, connection),
        }
    }

    fn on_conn_closed(&mut self, connection: &mut Connection) {
        let shared = &mut *self.0.borrow_mut();
        if !shared.run.workload.is_handshakes() {
            shared.closed = Some(format!("{:?}", connection.peer_error()));
        }
    }

    fn on_stream_created(&mut self, _: &mut Connection, _: u64) {}

    fn on_stream_readable(&mut self, connection: &mut Connection, stream: u64) {
        let shared = &mut *self.0.borrow_mut();
        if shared.run.workload == Workload::HandshakesResumed {
            let mut answer = [0; 64];
            if let Some((_, true)) = Io(connection).read(stream, &mut answer) {
                shared.asking -= 1;
                shared.session = connection.session().map(<[u8]>::to_vec).or(shared.session.take());
                let _closed = connection.close(true, 0, b"");
            }
            return;
        }
        shared.streams.handle_readable(&mut Io(connection), stream, &mut shared.window);
        if shared.run.workload == Workload::Requests {
            Self::start(shared, connection);
        }
    }

    fn on_stream_writable(&mut self, connection: &mut Connection, stream: u64) {
        let shared = &mut *self.0.borrow_mut();
        let more = shared.streams.handle_writable(&mut Io(connection), stream, &mut shared.window);
        want_write(connection, stream, more);
    }

    fn on_stream_closed(&mut self, connection: &mut Connection, _: u64) {
        // Credit for a stream may have come back.
        let shared = &mut *self.0.borrow_mut();
        if shared.run.workload == Workload::Requests {
            Self::start(shared, connection);
        }
    }

    fn on_new_token(&mut self, _: &mut Connection, _: Vec<u8>) {}
}

fn run(args: &Run) -> anyhow::Result<()> {
    args.common.pin()?;
    if args.workload == Workload::Datagrams {
        peer::unsupported(STACK, args.workload, "TQUIC has no datagrams");
        return Ok(());
    }
    let mut config = config(&args.common)?;
    let mut tls = TlsConfig::new_client_config(vec![ALPN.to_vec()], false)?;
    tls.set_verify(false);
    config.set_tls_config(tls);
    let shared = Rc::new(RefCell::new(Shared {
        run: args.clone(),
        window: Window::new(args),
        streams: ClientStreams::new(args),
        started: HashMap::new(),
        established: 0,
        asking: 0,
        session: None,
        closed: None,
    }));
    let udp = Udp::towards(args.connect.into())?;
    let handler = Box::new(Handler(shared.clone()));
    let mut client = Loop::new(config, false, handler, udp);
    let connect = |client: &mut Loop| {
        let local = client.local;
        let session = shared.borrow().session.clone();
        let endpoint = &mut client.endpoint;
        endpoint
            .connect(local, args.connect.into(), Some("localhost"), session.as_deref(), None, None)
            .context("connecting")
    };
    let turn = |client: &mut Loop| {
        client.turn()?;
        match &shared.borrow().closed {
            Some(reason) => Err(anyhow::anyhow!("closed: {reason}")),
            None => Ok(()),
        }
    };
    match args.workload {
        Workload::Idle => {
            let idle = Idle::before(args)?;
            for made in 1..=args.connections {
                connect(&mut client)?;
                while shared.borrow().established < made {
                    turn(&mut client)?;
                }
            }
            let holding = idle.hold()?;
            while !holding.is_over() {
                turn(&mut client)?;
            }
            return holding.finish(STACK);
        }
        Workload::Handshakes => {}
        _ => {
            connect(&mut client)?;
        }
    }
    while args.workload == Workload::HandshakesResumed && shared.borrow().session.is_none() {
        turn(&mut client)?;
    }
    let under_way = || shared.borrow().started.len() + shared.borrow().asking;
    while shared.borrow_mut().window.tick()? {
        while args.workload.is_handshakes() && under_way() < args.outstanding {
            let start = Instant::now();
            let index = connect(&mut client)?;
            shared.borrow_mut().started.insert(index, start);
        }
        turn(&mut client)?;
    }
    let mut shared = shared.borrow_mut();
    anyhow::ensure!(shared.established > 0, "no handshake was completed");
    shared.window.set_path(Some(client.udp.borrow().largest() as u64), None);
    let window = std::mem::replace(&mut shared.window, Window::new(args));
    window.finish(STACK)?;
    drop(shared);
    client.endpoint.close(true);
    client.endpoint.process_connections().map_err(|error| anyhow::anyhow!("{error}"))
}
