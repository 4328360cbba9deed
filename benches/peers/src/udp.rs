//! A UDP socket with GSO and GRO for stacks that bring none, by quinn-udp.

use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Context;
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stoq_measure::wire::SOCKET_BUFFER_BYTES;

/// The kernel's largest GSO batch, less the headers' room.
const BATCH_BYTES: usize = 65_000;
/// Receive calls in one go.
const RECEIVES: usize = 64;

/// The socket, and the batch that is being filled.
pub struct Udp {
    socket: UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
    buffer: Vec<u8>,
    batch: Vec<u8>,
    segment: usize,
    destination: SocketAddr,
    largest: usize,
}

impl Udp {
    /// Binds.
    ///
    /// # Errors
    /// The address is taken or not ours.
    pub fn bind(local: SocketAddr) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind(local).with_context(|| format!("binding {local}"))?;
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
            .is_err()
        {
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
        }
        rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
        let state = UdpSocketState::new((&socket).into())?;
        let local = socket.local_addr()?;
        Ok(Self {
            socket,
            state,
            local,
            buffer: vec![0; 65_536],
            batch: Vec::with_capacity(2 * BATCH_BYTES),
            segment: 0,
            destination: local,
            largest: 0,
        })
    }

    /// The address that the route to `peer` gives, and a port.
    ///
    /// # Errors
    /// There is no route.
    pub fn towards(peer: SocketAddr) -> anyhow::Result<Self> {
        let probe = UdpSocket::bind("[::]:0")?;
        probe.connect(peer).with_context(|| format!("routing to {peer}"))?;
        Self::bind(SocketAddr::new(probe.local_addr()?.ip(), 0))
    }

    /// The address bound.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// The largest UDP payload that was sent or received.
    #[must_use]
    pub fn largest(&self) -> usize {
        self.largest
    }

    /// Hands over what has arrived, datagram by datagram.
    ///
    /// # Errors
    /// The socket fails.
    pub fn receive(&mut self, mut handle: impl FnMut(&mut [u8], SocketAddr)) -> anyhow::Result<()> {
        for _ in 0..RECEIVES {
            let mut meta = [RecvMeta::default()];
            let mut slices = [IoSliceMut::new(&mut self.buffer)];
            match self.state.recv((&self.socket).into(), &mut slices, &mut meta) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("receiving"),
            }
            let [meta] = meta;
            if meta.len == 0 {
                continue;
            }
            self.largest = self.largest.max(meta.stride.min(meta.len));
            for datagram in self.buffer[..meta.len].chunks_mut(meta.stride.max(1)) {
                handle(datagram, meta.addr);
            }
        }
        Ok(())
    }

    /// Adds a datagram to the batch, which is sent when the next one does not fit it.
    ///
    /// # Errors
    /// The socket fails.
    pub fn send(&mut self, datagram: &[u8], destination: SocketAddr) -> anyhow::Result<()> {
        let segments = self.batch.len().checked_div(self.segment).unwrap_or(0);
        let fits = self.batch.is_empty()
            || (destination == self.destination
                && datagram.len() <= self.segment
                && self.batch.len().is_multiple_of(self.segment)
                && self.batch.len() + datagram.len() <= BATCH_BYTES
                && segments < self.state.max_gso_segments());
        if !fits {
            self.flush()?;
        }
        if self.batch.is_empty() {
            (self.segment, self.destination) = (datagram.len(), destination);
        }
        self.batch.extend_from_slice(datagram);
        self.largest = self.largest.max(datagram.len());
        Ok(())
    }

    /// Sends the batch.
    ///
    /// # Errors
    /// The socket fails otherwise than by being full.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let transmit = Transmit {
            destination: self.destination,
            ecn: None,
            contents: &self.batch,
            segment_size: (self.batch.len() > self.segment).then_some(self.segment),
            src_ip: None,
        };
        loop {
            match self.state.try_send((&self.socket).into(), &transmit) {
                Ok(()) => break,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.wait_for(PollFlags::OUT, Some(Duration::from_millis(10)))?;
                }
                // What the route cannot carry now is lost, as on any path; the stack notices.
                Err(error) => {
                    eprintln!("warning: sending {} bytes: {error}", self.batch.len());
                    break;
                }
            }
        }
        self.batch.clear();
        Ok(())
    }

    /// Sleeps until something arrives, at most `timeout`.
    ///
    /// # Errors
    /// poll fails.
    pub fn wait(&self, timeout: Option<Duration>) -> anyhow::Result<()> {
        self.wait_for(PollFlags::IN, timeout)
    }

    fn wait_for(&self, flags: PollFlags, timeout: Option<Duration>) -> anyhow::Result<()> {
        let timeout = timeout.map(Timespec::try_from).transpose()?;
        match poll(&mut [PollFd::new(&self.socket, flags)], timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("poll"),
        }
    }
}
