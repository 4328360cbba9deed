//! TCP, plain or under TLS 1.3 by rustls: blocking calls, one thread a connection.
//!
//! A connection begins with one byte that says what it is for, and a big-endian count of the
//! bytes of a request; requests are answered in order with as many bytes.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser as _;
use stoq_measure::peer::{self, Cli, Command, Run, Serve, Workload};
use stoq_measure::window::Window;
use stoq_measure::wire::CHUNK_BYTES;

/// The head of a connection.
const HEAD_BYTES: usize = 5;

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Run(args) => run(&args),
    }
}

fn stack(is_tls: bool) -> &'static str {
    if is_tls { "tls" } else { "tcp" }
}

/// A connection's bytes.
trait Io: Read + Write + Send {}

impl<T: Read + Write + Send> Io for T {}

const fn mode(workload: Workload) -> u8 {
    match workload {
        Workload::Upload => b'u',
        Workload::Download => b'd',
        Workload::Bidi => b'b',
        _ => b'r',
    }
}

fn serve(args: &Serve) -> anyhow::Result<()> {
    peer::tie_to_parent()?;
    args.common.pin()?;
    let is_tls = args.common.tls;
    let tls = is_tls.then(stoq_peers::server_tls).transpose()?.map(Arc::new);
    let listener =
        TcpListener::bind(args.listen).with_context(|| format!("binding {}", args.listen))?;
    let settings = if is_tls {
        format!(
            "{}; TCP_NODELAY, buffers by the kernel; kTLS not used",
            stoq_peers::RUSTLS_SETTINGS
        )
    } else {
        "TCP_NODELAY, buffers by the kernel".to_owned()
    };
    peer::announce(stack(is_tls), listener.local_addr()?, &settings);
    loop {
        let (socket, from) = listener.accept().context("accepting")?;
        let tls = tls.clone();
        std::thread::spawn(move || {
            if let Err(error) = answer(socket, tls)
                && !is_end(&error)
            {
                eprintln!("peer-tcp: {from}: {error:#}");
            }
        });
    }
}

/// The client closes without ceremony: that is how its connections end.
fn is_end(error: &anyhow::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    error.downcast_ref::<std::io::Error>().is_some_and(|error| {
        matches!(error.kind(), BrokenPipe | ConnectionReset | ConnectionAborted | UnexpectedEof)
    })
}

fn answer(socket: TcpStream, tls: Option<Arc<rustls::ServerConfig>>) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    let second = socket.try_clone()?;
    let mut io: Box<dyn Io> = match tls {
        None => Box::new(socket),
        Some(tls) => {
            Box::new(rustls::StreamOwned::new(rustls::ServerConnection::new(tls)?, socket))
        }
    };
    let mut head = [0; HEAD_BYTES];
    io.read_exact(&mut head)?;
    let size = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    match head[0] {
        b'u' => discard(&mut io),
        b'd' => fill(&mut io),
        b'b' => {
            let filler = std::thread::spawn(move || fill(&mut { second }));
            discard(&mut io)?;
            filler.join().map_err(|_panic| anyhow::anyhow!("the writing thread panicked"))?
        }
        _ => echo(&mut io, size.max(1)),
    }
}

fn discard(io: &mut impl Read) -> anyhow::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    while io.read(&mut buffer)? > 0 {}
    Ok(())
}

fn fill(io: &mut impl Write) -> anyhow::Result<()> {
    let filler = vec![0x5a; CHUNK_BYTES];
    loop {
        io.write_all(&filler)?;
    }
}

fn echo(io: &mut (impl Read + Write), size: usize) -> anyhow::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES.max(size)];
    let mut held = 0;
    loop {
        let more = io.read(&mut buffer[held..])?;
        if more == 0 {
            return Ok(());
        }
        held += more;
        let whole = held - held % size;
        io.write_all(&buffer[..whole])?;
        buffer.copy_within(whole..held, 0);
        held -= whole;
    }
}

/// Opens connections.
#[derive(Clone)]
struct Client {
    tls: Option<Arc<rustls::ClientConfig>>,
    run: Run,
}

impl Client {
    fn socket(&self) -> anyhow::Result<TcpStream> {
        let socket = TcpStream::connect(SocketAddr::V6(self.run.connect))
            .with_context(|| format!("connecting to {}", self.run.connect))?;
        socket.set_nodelay(true)?;
        Ok(socket)
    }

    /// A connection whose handshake is complete.
    fn connect(&self) -> anyhow::Result<Box<dyn Io>> {
        let mut socket = self.socket()?;
        let Some(tls) = &self.tls else { return Ok(Box::new(socket)) };
        // No TIME_WAIT: the ports would run out.
        rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
        let name = "localhost".try_into().expect("a name");
        let mut session = rustls::ClientConnection::new(tls.clone(), name)?;
        while session.is_handshaking() {
            session.complete_io(&mut socket)?;
        }
        Ok(Box::new(rustls::StreamOwned::new(session, socket)))
    }

    fn head(&self) -> [u8; HEAD_BYTES] {
        let mut head = [mode(self.run.workload); HEAD_BYTES];
        head[1..].copy_from_slice(&(self.run.size as u32).to_be_bytes());
        head
    }
}

fn run(args: &Run) -> anyhow::Result<()> {
    peer::tie_to_parent()?;
    args.common.pin()?;
    let is_tls = args.common.tls;
    let stack = stack(is_tls);
    let tls = is_tls.then(stoq_peers::client_tls).transpose()?.map(Arc::new);
    let client = Client { tls, run: args.clone() };
    let window = Window::new(args);
    let window = match args.workload {
        Workload::Upload => upload(client.connect()?, &client.head(), window)?,
        Workload::Download => download(client.connect()?, &client.head(), window)?,
        Workload::Bidi if is_tls => {
            peer::unsupported(stack, args.workload, "one blocking thread cannot do both");
            return Ok(());
        }
        Workload::Bidi => both(&client, window)?,
        Workload::Requests => requests(client.connect()?, &client, window)?,
        Workload::Handshakes if is_tls => handshakes(&client, window)?,
        Workload::Handshakes => {
            peer::unsupported(stack, args.workload, "TCP alone authenticates nobody");
            return Ok(());
        }
        Workload::Datagrams => {
            peer::unsupported(stack, args.workload, "TCP has no datagrams");
            return Ok(());
        }
    };
    window.finish(stack)
}

fn upload(mut io: impl Write, head: &[u8], mut window: Window) -> anyhow::Result<Window> {
    io.write_all(head)?;
    let filler = vec![0x5a; CHUNK_BYTES];
    while window.tick()? {
        io.write_all(&filler)?;
        window.add_bytes(filler.len() as u64);
    }
    Ok(window)
}

fn download(mut io: impl Read + Write, head: &[u8], mut window: Window) -> anyhow::Result<Window> {
    io.write_all(head)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    while window.tick()? {
        let bytes = io.read(&mut buffer)?;
        anyhow::ensure!(bytes > 0, "the server has ended");
        window.add_bytes(bytes as u64);
    }
    Ok(window)
}

/// Both directions of one plain connection, a thread each.
fn both(client: &Client, window: Window) -> anyhow::Result<Window> {
    let mut socket = client.socket()?;
    socket.write_all(&client.head())?;
    let (mut sender, window) = (socket.try_clone()?, Arc::new(Mutex::new(window)));
    let shared = window.clone();
    let sending = std::thread::spawn(move || -> anyhow::Result<()> {
        let filler = vec![0x5a; CHUNK_BYTES];
        loop {
            sender.write_all(&filler)?;
            let mut window = shared.lock().unwrap_or_else(PoisonError::into_inner);
            window.add_bytes(filler.len() as u64);
        }
    });
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let bytes = socket.read(&mut buffer)?;
        anyhow::ensure!(bytes > 0, "the server has ended");
        let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
        window.add_bytes(bytes as u64);
        if !window.tick()? {
            break;
        }
    }
    socket.shutdown(std::net::Shutdown::Both)?;
    // Our own shutdown is what ends it.
    let _broken_pipe = sending.join();
    unshare(window)
}

fn unshare(window: Arc<Mutex<Window>>) -> anyhow::Result<Window> {
    let window = Arc::into_inner(window).context("a thread still measures")?;
    Ok(window.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn requests(
    mut io: impl Read + Write,
    client: &Client,
    mut window: Window,
) -> anyhow::Result<Window> {
    let (size, outstanding) = (client.run.size.max(1), client.run.outstanding);
    io.write_all(&client.head())?;
    let requests = vec![0x5a; size * outstanding];
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut started: VecDeque<Instant> = vec![Instant::now(); outstanding].into();
    io.write_all(&requests)?;
    let mut held = 0;
    while window.tick()? {
        let bytes = io.read(&mut buffer)?;
        anyhow::ensure!(bytes > 0, "the server has ended");
        held += bytes;
        let answered = held / size;
        held %= size;
        if answered == 0 {
            continue;
        }
        let now = Instant::now();
        for start in started.drain(..answered) {
            window.add_op(now - start);
        }
        window.add_bytes((2 * size * answered) as u64);
        started.extend(std::iter::repeat_n(now, answered));
        io.write_all(&requests[..size * answered])?;
    }
    Ok(window)
}

fn handshakes(client: &Client, window: Window) -> anyhow::Result<Window> {
    let window = Arc::new(Mutex::new(window));
    let threads: Vec<_> = (0..client.run.outstanding)
        .map(|_| {
            let (client, window) = (client.clone(), window.clone());
            std::thread::spawn(move || -> anyhow::Result<()> {
                loop {
                    let start = Instant::now();
                    drop(client.connect()?);
                    let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
                    window.add_op(start.elapsed());
                    if !window.tick()? {
                        return Ok(());
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_panic| anyhow::anyhow!("a client thread panicked"))??;
    }
    unshare(window)
}
