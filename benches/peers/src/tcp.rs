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
use stoq_measure::peer::{self, Cli, Command, Common, Run, Serve, Workload};
use stoq_measure::sessions::CountingSessions;
use stoq_measure::window::Window;
use stoq_measure::wire::CHUNK_BYTES;
use stoq_peers::ktls;

/// The head of a connection.
const HEAD_BYTES: usize = 5;
/// What a server says first when the kernel has its keys.
const READY: u8 = b'k';

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Run(args) => run(&args),
    }
}

fn stack(common: &Common) -> &'static str {
    match (common.tls, common.ktls) {
        (false, _) => "tcp",
        (true, false) => "tls",
        (true, true) => "tcp-ktls",
    }
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
    let security = Security::server(&args.common)?;
    let listener =
        TcpListener::bind(args.listen).with_context(|| format!("binding {}", args.listen))?;
    let tls = stoq_peers::RUSTLS_SETTINGS;
    let settings = match security {
        Security::None => "TCP_NODELAY, buffers by the kernel".to_owned(),
        Security::Rustls(_) => format!("{tls}; TCP_NODELAY, buffers by the kernel"),
        Security::Kernel(_) => {
            format!("handshake by {tls}; records by the kernel; TCP_NODELAY, buffers by the kernel")
        }
    };
    peer::announce(stack(&args.common), listener.local_addr()?, &settings);
    loop {
        let (socket, from) = listener.accept().context("accepting")?;
        let security = security.clone();
        std::thread::spawn(move || {
            if let Err(error) = answer(socket, security)
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

fn answer(socket: TcpStream, security: Security<rustls::ServerConfig>) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    let second = socket.try_clone()?;
    let mut io: Box<dyn Io> = match security {
        Security::None => Box::new(socket),
        Security::Rustls(tls) => {
            Box::new(rustls::StreamOwned::new(rustls::ServerConnection::new(tls)?, socket))
        }
        Security::Kernel(tls) => Box::new(kernel_server(socket, tls)?),
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

/// A server's socket whose records the kernel handles; the client waits for a first byte.
fn kernel_server(
    mut socket: TcpStream,
    tls: Arc<rustls::ServerConfig>,
) -> anyhow::Result<TcpStream> {
    ktls::attach(&socket)?.map_err(anyhow::Error::msg)?;
    let mut session = rustls::ServerConnection::new(tls)?;
    while session.is_handshaking() {
        session.complete_io(&mut socket)?;
    }
    ktls::set_keys(&socket, session.dangerous_extract_secrets()?)?;
    socket.write_all(&[READY])?;
    Ok(socket)
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

/// Who protects the bytes of a connection.
enum Security<T> {
    /// Nobody.
    None,
    /// rustls.
    Rustls(Arc<T>),
    /// The kernel, after rustls's handshake.
    Kernel(Arc<T>),
}

impl<T> Clone for Security<T> {
    fn clone(&self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Rustls(tls) => Self::Rustls(tls.clone()),
            Self::Kernel(tls) => Self::Kernel(tls.clone()),
        }
    }
}

impl Security<rustls::ServerConfig> {
    fn server(common: &Common) -> anyhow::Result<Self> {
        if !common.tls {
            return Ok(Self::None);
        }
        let mut tls = stoq_peers::server_tls()?;
        if !common.ktls {
            return Ok(Self::Rustls(Arc::new(tls)));
        }
        tls.enable_secret_extraction = true;
        // A ticket would be a record that is no application data.
        tls.send_tls13_tickets = 0;
        Ok(Self::Kernel(Arc::new(tls)))
    }
}

impl Security<rustls::ClientConfig> {
    fn client(run: &Run) -> anyhow::Result<(Self, Option<Arc<CountingSessions>>)> {
        if !run.common.tls {
            return Ok((Self::None, None));
        }
        let (mut tls, sessions) = stoq_peers::client_tls_for(run.workload)?;
        if !run.common.ktls {
            return Ok((Self::Rustls(Arc::new(tls)), sessions));
        }
        tls.enable_secret_extraction = true;
        Ok((Self::Kernel(Arc::new(tls)), sessions))
    }
}

/// Opens connections.
#[derive(Clone)]
struct Client {
    security: Security<rustls::ClientConfig>,
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
        let tls = match &self.security {
            Security::None => return Ok(Box::new(socket)),
            Security::Kernel(tls) => return Ok(Box::new(kernel_client(socket, tls.clone())?)),
            Security::Rustls(tls) => tls,
        };
        // No TIME_WAIT: the ports would run out.
        rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
        let session = handshake(&mut socket, tls.clone())?;
        Ok(Box::new(rustls::StreamOwned::new(session, socket)))
    }

    /// A connection that two threads can use, one a direction.
    fn connect_shared(&self) -> anyhow::Result<TcpStream> {
        match &self.security {
            Security::Kernel(tls) => kernel_client(self.socket()?, tls.clone()),
            _ => self.socket(),
        }
    }

    fn head(&self) -> [u8; HEAD_BYTES] {
        let mut head = [mode(self.run.workload); HEAD_BYTES];
        head[1..].copy_from_slice(&(self.run.size as u32).to_be_bytes());
        head
    }
}

fn handshake(
    socket: &mut TcpStream,
    tls: Arc<rustls::ClientConfig>,
) -> anyhow::Result<rustls::ClientConnection> {
    let name = "localhost".try_into().expect("a name");
    let mut session = rustls::ClientConnection::new(tls, name)?;
    while session.is_handshaking() {
        session.complete_io(socket)?;
    }
    Ok(session)
}

/// A client's socket whose records the kernel handles.
fn kernel_client(
    mut socket: TcpStream,
    tls: Arc<rustls::ClientConfig>,
) -> anyhow::Result<TcpStream> {
    ktls::attach(&socket)?.map_err(anyhow::Error::msg)?;
    let session = handshake(&mut socket, tls)?;
    ktls::set_keys(&socket, session.dangerous_extract_secrets()?)?;
    let mut ready = [0];
    socket.read_exact(&mut ready)?;
    anyhow::ensure!(ready == [READY], "the server does not speak kernel TLS");
    Ok(socket)
}

/// Why this stack has no such workload, or cannot run here.
fn unsupported(args: &Run, client: &Client) -> anyhow::Result<Option<String>> {
    let is_tls = args.common.tls;
    let why = match args.workload {
        Workload::Bidi if is_tls && !args.common.ktls => "one blocking thread cannot do both",
        Workload::Handshakes | Workload::HandshakesResumed if !is_tls => {
            "TCP alone authenticates nobody"
        }
        Workload::Handshakes | Workload::HandshakesResumed if args.common.ktls => {
            "its handshakes are those of `tls`"
        }
        Workload::Datagrams => "TCP has no datagrams",
        Workload::Idle => "the kernel holds its buffers, where no process's memory shows them",
        _ if args.common.ktls => return Ok(ktls::attach(&client.socket()?)?.err()),
        _ => return Ok(None),
    };
    Ok(Some(why.to_owned()))
}

fn run(args: &Run) -> anyhow::Result<()> {
    peer::tie_to_parent()?;
    args.common.pin()?;
    let stack = stack(&args.common);
    let (security, sessions) = Security::client(args)?;
    let client = Client { security, run: args.clone() };
    if let Some(why) = unsupported(args, &client)? {
        peer::unsupported(stack, args.workload, &why);
        return Ok(());
    }
    if sessions.is_some() {
        ask(&mut *client.connect()?, &client)?;
    }
    let window = Window::new(args);
    let window = match args.workload {
        Workload::Upload | Workload::Download if args.connections > 1 => many(&client, window)?,
        Workload::Upload => upload(client.connect()?, &client.head(), window)?,
        Workload::Download => download(client.connect()?, &client.head(), window)?,
        Workload::Bidi => both(&client, window)?,
        Workload::Requests => requests(client.connect()?, &client, window)?,
        Workload::Handshakes | Workload::HandshakesResumed => handshakes(&client, window)?,
        Workload::Datagrams | Workload::Idle => anyhow::bail!("refused above"),
    };
    stoq_peers::check_resumed(sessions.as_deref(), window.ops())?;
    window.finish(stack)
}

/// One request: when it is answered, the tickets have come, too.
fn ask(io: &mut dyn Io, client: &Client) -> anyhow::Result<()> {
    let mut bytes = vec![0x5a; client.run.size.max(1)];
    io.write_all(&client.head())?;
    io.write_all(&bytes)?;
    Ok(io.read_exact(&mut bytes)?)
}

/// Bulk over several connections, a thread each.
fn many(client: &Client, window: Window) -> anyhow::Result<Window> {
    let window = Arc::new(Mutex::new(window));
    let one = |client: &Client, window: &Mutex<Window>| -> anyhow::Result<()> {
        let mut io = client.connect()?;
        io.write_all(&client.head())?;
        let mut buffer = vec![0x5a; CHUNK_BYTES];
        loop {
            let bytes = match client.run.workload {
                Workload::Upload => io.write(&buffer)?,
                _ => io.read(&mut buffer)?,
            };
            anyhow::ensure!(bytes > 0, "the server has ended");
            let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
            window.add_bytes(bytes as u64);
            if !window.tick()? {
                return Ok(());
            }
        }
    };
    let threads: Vec<_> = (0..client.run.connections)
        .map(|_| {
            let (client, window) = (client.clone(), window.clone());
            std::thread::spawn(move || one(&client, &window))
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_panic| anyhow::anyhow!("a client thread panicked"))??;
    }
    unshare(window)
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
    let mut socket = client.connect_shared()?;
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
                    let mut io = client.connect()?;
                    let latency = start.elapsed();
                    if client.run.workload == Workload::HandshakesResumed {
                        ask(&mut *io, &client)?;
                    }
                    drop(io);
                    let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
                    window.add_op(latency);
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
