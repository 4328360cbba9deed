//! Serves the metrics over HTTP/1.1 to a scraper: one thread, one request per connection.
//!
//! It is no web server: `GET /metrics` and nothing else, bounded in size and time, so that a slow
//! or hostile client costs it two seconds and no memory. It never touches a shard.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// A request that is larger is refused.
const REQUEST_BYTES_MAX: usize = 8 * 1024;
/// A client that takes longer, all in all, is dropped.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(2);
/// Clients that wait to be accepted.
const BACKLOG: i32 = 16;
/// After a failed accept (descriptors used up, for one) the thread rests so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Render = Arc<dyn Fn() -> String + Send + Sync>;

/// A running exporter. Dropped, it ends.
pub struct MetricsServer {
    address: SocketAddrV6,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl MetricsServer {
    /// Listens on `address` and serves what `render` writes.
    ///
    /// # Errors
    /// The address cannot be bound, or the system gives no thread or descriptor.
    pub(crate) fn start(address: SocketAddrV6, render: Render) -> io::Result<Self> {
        let listener = listen(address)?;
        let SocketAddr::V6(address) = listener.local_addr()? else {
            unreachable!("the socket was made for IPv6");
        };
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("stoq-metrics".into())
            .spawn(move || serve(&listener, &stopped, &render))?;
        tracing::info!(%address, "metrics are served under /metrics");
        Ok(Self { address, stop, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddrV6 {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        // A counter that is too high to add to wakes the thread as well.
        let _wakes_anyway = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the metrics thread panicked");
        }
    }
}

/// IPv6 only, as all of STOQ.
fn listen(address: SocketAddrV6) -> io::Result<TcpListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET6, SocketType::STREAM, flags, None)?;
    sockopt::set_ipv6_v6only(&socket, true)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

fn serve(listener: &TcpListener, stop: &OwnedFd, render: &Render) {
    loop {
        let mut ready = [
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                tracing::error!(%error, "metrics are served no more: poll() failed");
                return;
            }
            Ok(_) => {}
        }
        if !ready[0].revents().is_empty() {
            return;
        }
        match listener.accept() {
            Ok((client, _)) => {
                if let Err(error) = answer(client, render) {
                    tracing::debug!(%error, "a scraper was not answered");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(%error, "no scraper could be accepted");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn answer(mut client: TcpStream, render: &Render) -> io::Result<()> {
    client.set_nonblocking(false)?;
    let deadline = Instant::now() + REQUEST_TIME_MAX;
    let mut request = Vec::with_capacity(1024);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut part = [0; 1024];
        client.set_read_timeout(Some(left(deadline)?))?;
        match client.read(&mut part)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => request.extend_from_slice(&part[..bytes]),
        }
        if request.len() > REQUEST_BYTES_MAX {
            return respond(client, deadline, "431 Request Header Fields Too Large", "", true);
        }
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    match (method, path) {
        (b"GET", b"/metrics") => respond(client, deadline, "200 OK", &render(), true),
        (b"HEAD", b"/metrics") => respond(client, deadline, "200 OK", &render(), false),
        (b"GET" | b"HEAD", _) => {
            respond(client, deadline, "404 Not Found", "try /metrics\n", method == b"GET")
        }
        _ => respond(client, deadline, "405 Method Not Allowed", "", true),
    }
}

fn respond(
    mut client: TcpStream,
    deadline: Instant,
    status: &str,
    body: &str,
    with_body: bool,
) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let text = if with_body { head + body } else { head };
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        client.set_write_timeout(Some(left(deadline)?))?;
        let written = client.write(rest)?;
        rest = &rest[written..];
    }
    client.shutdown(std::net::Shutdown::Write)
}

/// The time until `deadline`; an error when it is over.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn server() -> MetricsServer {
        let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0);
        MetricsServer::start(address, Arc::new(|| "stoq_x 1\n".repeat(3))).expect("server")
    }

    fn ask(server: &MetricsServer, request: &[u8]) -> String {
        let mut client = TcpStream::connect(server.local_addr()).expect("connect");
        client.write_all(request).expect("request");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("answer");
        answer
    }

    #[test]
    fn metrics_are_served_and_nothing_else() {
        let server = server();
        let answer = ask(&server, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("Content-Length: 27\r\n"));
        assert!(answer.ends_with("\r\n\r\nstoq_x 1\nstoq_x 1\nstoq_x 1\n"));
        let head = ask(&server, b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n");
        assert!(head.contains("Content-Length: 27\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        assert!(ask(&server, b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(&server, b"POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    }

    #[test]
    fn a_silent_client_does_not_keep_the_others_out() {
        let server = server();
        let _silent = TcpStream::connect(server.local_addr()).expect("connect");
        let start = Instant::now();
        let answer = ask(&server, b"GET /metrics HTTP/1.1\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(start.elapsed() < REQUEST_TIME_MAX + Duration::from_secs(3));
    }

    #[test]
    fn an_endless_request_is_cut_off() {
        let server = server();
        let mut client = TcpStream::connect(server.local_addr()).expect("connect");
        // The server may reset the connection while we still write; that ends it as well.
        let _cut_off = client.write_all(&vec![b'a'; 4 * REQUEST_BYTES_MAX]);
        let mut answer = Vec::new();
        let read = client.read_to_end(&mut answer);
        assert!(read.is_err() || answer.starts_with(b"HTTP/1.1 431"));
        assert!(ask(&server, b"GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn it_ends_when_dropped() {
        let server = server();
        let address = server.local_addr();
        drop(server);
        assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
    }
}
