//! quiche's side: its state machine over one non-blocking socket.

use std::collections::HashMap;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Context;

use crate::{ALPN, Get, Serve, destination, requested};

/// UDP payload that quiche sends at most.
const PAYLOAD_BYTES: usize = 1350;
/// Windows that do not bound the test's transfers.
const WINDOW_BYTES: u64 = 16 << 20;
/// Stream error code for a file that does not exist.
const NOT_FOUND: u64 = 4;
/// How long one of our sleeps may last.
const TICK: Duration = Duration::from_millis(5);

fn config() -> anyhow::Result<quiche::Config> {
    let mut config = quiche::Config::new(quiche::PROTOCOL_VERSION)?;
    config.set_application_protos(&[ALPN.as_bytes()])?;
    config.set_max_idle_timeout(15_000);
    config.set_max_recv_udp_payload_size(65_527);
    config.set_max_send_udp_payload_size(PAYLOAD_BYTES);
    config.set_initial_max_data(WINDOW_BYTES);
    config.set_initial_max_stream_data_bidi_local(WINDOW_BYTES);
    config.set_initial_max_stream_data_bidi_remote(WINDOW_BYTES);
    config.set_initial_max_streams_bidi(100);
    config.log_keys();
    Ok(config)
}

/// 16 bytes that no other connection of a test has.
fn connection_id() -> Vec<u8> {
    use std::hash::{BuildHasher, Hasher};
    let word = || std::hash::RandomState::new().build_hasher().finish().to_be_bytes();
    [word(), word()].concat()
}

/// A connection on its socket.
struct Driver {
    socket: UdpSocket,
    local: SocketAddr,
    connection: quiche::Connection,
    buffer: Vec<u8>,
}

impl Driver {
    /// Sends what is due, sleeps until something arrives or a timer is due, receives.
    fn turn(&mut self) -> anyhow::Result<()> {
        self.flush()?;
        let timeout =
            self.connection.timeout().unwrap_or(TICK).clamp(Duration::from_micros(1), TICK);
        self.socket.set_read_timeout(Some(timeout))?;
        match self.socket.recv_from(&mut self.buffer) {
            Ok((len, from)) => self.handle(len, from),
            Err(error) if is_timeout(&error) => self.connection.on_timeout(),
            Err(error) => return Err(error).context("receiving"),
        }
        Ok(())
    }

    fn handle(&mut self, len: usize, from: SocketAddr) {
        let info = quiche::RecvInfo { from, to: self.local };
        if let Err(error) = self.connection.recv(&mut self.buffer[..len], info) {
            eprintln!("quiche: packet refused: {error}");
        }
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        let mut out = [0; PAYLOAD_BYTES];
        loop {
            match self.connection.send(&mut out) {
                Ok((len, info)) => {
                    self.socket.send_to(&out[..len], info.to).context("sending")?;
                }
                Err(quiche::Error::Done) => return Ok(()),
                Err(error) => return Err(error).context("building a packet"),
            }
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

pub(crate) fn get(get: &Get) -> anyhow::Result<()> {
    let mut config = config()?;
    config.verify_peer(true);
    config.load_verify_locations_from_file(get.ca.to_str().context("--ca is not UTF-8")?)?;
    // quiche compares addresses: the socket must be bound to the one that the route gives.
    let probe = UdpSocket::bind("[::]:0")?;
    let peer = SocketAddr::V6(get.connect);
    probe.connect(peer)?;
    let socket = UdpSocket::bind((probe.local_addr()?.ip(), 0))?;
    let local = socket.local_addr()?;
    let id = connection_id();
    let id = quiche::ConnectionId::from_ref(&id);
    let connection = quiche::connect(Some(&get.server_name), &id, local, peer, &mut config)?;
    let mut driver = Driver { socket, local, connection, buffer: vec![0; 65_535] };
    if let Some(path) = std::env::var_os("SSLKEYLOGFILE") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path)?;
        driver.connection.set_keylog(Box::new(file));
    }
    while !driver.connection.is_established() {
        driver.turn()?;
        ensure_open(&driver.connection)?;
    }
    for (index, path) in get.paths.iter().enumerate() {
        fetch(&mut driver, 4 * index as u64, path, get)?;
    }
    driver.connection.close(true, 0, b"done")?;
    driver.flush()
}

fn ensure_open(connection: &quiche::Connection) -> anyhow::Result<()> {
    anyhow::ensure!(
        !connection.is_closed(),
        "connection closed: {:?}, timed out: {}",
        connection.peer_error(),
        connection.is_timed_out()
    );
    Ok(())
}

fn fetch(driver: &mut Driver, stream: u64, path: &str, get: &Get) -> anyhow::Result<()> {
    let request = format!("GET {path}\r\n");
    driver.connection.stream_send(stream, request.as_bytes(), true)?;
    let mut file = std::fs::File::create(destination(&get.out, path))?;
    let mut chunk = vec![0; 64 * 1024];
    loop {
        match driver.connection.stream_recv(stream, &mut chunk) {
            Ok((len, fin)) => {
                file.write_all(&chunk[..len])?;
                if fin {
                    return Ok(());
                }
            }
            Err(quiche::Error::Done | quiche::Error::InvalidStreamState(_)) => {
                driver.turn()?;
                ensure_open(&driver.connection)?;
            }
            Err(error) => return Err(error).with_context(|| format!("receiving {path}")),
        }
    }
}

/// What is left to send of a file.
struct Answer {
    data: Vec<u8>,
    sent: usize,
}

/// Serves one client after the other: enough for a test.
pub(crate) fn serve(serve: &Serve) -> anyhow::Result<()> {
    let text = |path: &std::path::Path| path.to_str().map(str::to_owned).context("not UTF-8");
    let socket = UdpSocket::bind(SocketAddr::V6(serve.listen))?;
    let local = socket.local_addr()?;
    println!("listening");
    let mut buffer = vec![0; 65_535];
    loop {
        socket.set_read_timeout(None)?;
        let (len, from) = socket.recv_from(&mut buffer)?;
        let header = quiche::Header::from_slice(&mut buffer[..len], quiche::MAX_CONN_ID_LEN);
        if !header.is_ok_and(|header| header.ty == quiche::Type::Initial) {
            continue; // the rest of an earlier connection
        }
        let mut config = config()?;
        config.load_cert_chain_from_pem_file(&text(&serve.cert)?)?;
        config.load_priv_key_from_pem_file(&text(&serve.key)?)?;
        let id = connection_id();
        let id = quiche::ConnectionId::from_ref(&id);
        let connection = quiche::accept(&id, None, local, from, &mut config)?;
        let socket = socket.try_clone()?;
        let mut driver = Driver { socket, local, connection, buffer: buffer.clone() };
        driver.handle(len, from);
        let mut requests: HashMap<u64, Vec<u8>> = HashMap::new();
        let mut answers: HashMap<u64, Answer> = HashMap::new();
        while !driver.connection.is_closed() {
            driver.turn()?;
            read_requests(&mut driver.connection, &mut requests, &mut answers, &serve.www)?;
            send_answers(&mut driver.connection, &mut answers)?;
        }
    }
}

fn read_requests(
    connection: &mut quiche::Connection,
    requests: &mut HashMap<u64, Vec<u8>>,
    answers: &mut HashMap<u64, Answer>,
    www: &std::path::Path,
) -> anyhow::Result<()> {
    let mut chunk = [0; 4096];
    for stream in connection.readable() {
        while let Ok((len, fin)) = connection.stream_recv(stream, &mut chunk) {
            let request = requests.entry(stream).or_default();
            request.extend_from_slice(&chunk[..len]);
            if !fin {
                continue;
            }
            match requested(request).map(|path| std::fs::read(www.join(path))) {
                Some(Ok(data)) => {
                    answers.insert(stream, Answer { data, sent: 0 });
                }
                _ => connection.stream_shutdown(stream, quiche::Shutdown::Write, NOT_FOUND)?,
            }
        }
    }
    Ok(())
}

fn send_answers(
    connection: &mut quiche::Connection,
    answers: &mut HashMap<u64, Answer>,
) -> anyhow::Result<()> {
    let mut done = Vec::new();
    for (stream, answer) in answers.iter_mut() {
        match connection.stream_send(*stream, &answer.data[answer.sent..], true) {
            Ok(sent) => answer.sent += sent,
            Err(quiche::Error::Done) => {}
            Err(quiche::Error::StreamStopped(_)) => done.push(*stream),
            Err(error) => return Err(error).context("answering"),
        }
        if answer.sent == answer.data.len() {
            done.push(*stream);
        }
    }
    for stream in done {
        answers.remove(&stream);
    }
    Ok(())
}
