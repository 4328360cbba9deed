//! A NAT in a thread: carries datagrams between one client and a server, and changes the source
//! port (and address) that the server sees whenever it is told to.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bindings that still carry replies after they were left.
const OLD_BINDINGS_MAX: usize = 4;
const DATAGRAM_BYTES_MAX: usize = 65_535;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    rebindings_wanted: AtomicU64,
    rebindings: AtomicU64,
    /// Destination connection IDs of short headers that the client sent.
    from_client: Mutex<BTreeSet<Vec<u8>>>,
    /// The client's Initial packets (RFC 9000 §17.2.2).
    initials: Mutex<Vec<Vec<u8>>>,
    replay: AtomicU64,
    replayed: AtomicU64,
    /// Another server, from the next datagram on.
    retarget: Mutex<Option<SocketAddrV6>>,
    /// Those that the server sent.
    from_server: Mutex<BTreeSet<Vec<u8>>>,
}

/// The relay; its thread ends with it.
pub struct Relay {
    pub addr: SocketAddrV6,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Listens at `front` and forwards to `server`, from one of `sources` after the other. Connection
    /// IDs of `cid_bytes` are noted.
    pub fn start(
        front: Ipv6Addr,
        server: SocketAddrV6,
        sources: Vec<Ipv6Addr>,
        cid_bytes: usize,
    ) -> Self {
        let socket = bind(front);
        let SocketAddr::V6(addr) = socket.local_addr().expect("bound") else {
            panic!("bound to IPv6")
        };
        let shared = Arc::new(Shared::default());
        let mut worker = Worker {
            front: socket,
            server,
            client: None,
            bindings: vec![bind(sources[0])],
            sources,
            cid_bytes,
            shared: shared.clone(),
        };
        let thread = std::thread::spawn(move || worker.run());
        Self { addr, shared, thread: Some(thread) }
    }

    /// The next datagram of the client leaves by a new port, and by the next address.
    pub fn rebind(&self) {
        self.shared.rebindings_wanted.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it has done so.
    pub fn rebindings(&self) -> u64 {
        self.shared.rebindings.load(Ordering::Relaxed)
    }

    /// Sends every Initial of the client so far once more, from the address in use; their number.
    pub fn replay_initials(&self) -> usize {
        let wanted = self.shared.replay.fetch_add(1, Ordering::Relaxed) + 1;
        while self.shared.replayed.load(Ordering::Relaxed) < wanted {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.shared.initials.lock().expect("not poisoned").len()
    }

    /// The client's Initial packets so far.
    pub fn initials(&self) -> Vec<Vec<u8>> {
        self.shared.initials.lock().expect("not poisoned").clone()
    }

    /// From the next datagram on the client's packets go to `server`, and nothing of the one before
    /// reaches it any more.
    pub fn retarget(&self, server: SocketAddrV6) {
        *self.shared.retarget.lock().expect("not poisoned") = Some(server);
        while self.shared.retarget.lock().expect("not poisoned").is_some() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Destination connection IDs of the client's 1-RTT packets so far.
    pub fn cids(&self) -> BTreeSet<Vec<u8>> {
        self.shared.from_client.lock().expect("not poisoned").clone()
    }

    /// Those of the server's 1-RTT packets.
    pub fn cids_of_server(&self) -> BTreeSet<Vec<u8>> {
        self.shared.from_server.lock().expect("not poisoned").clone()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the relay's thread panicked");
        }
    }
}

struct Worker {
    front: UdpSocket,
    server: SocketAddrV6,
    client: Option<SocketAddr>,
    /// The last one is in use.
    bindings: Vec<UdpSocket>,
    sources: Vec<Ipv6Addr>,
    cid_bytes: usize,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(&mut self) {
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        while !self.shared.stop.load(Ordering::Relaxed) {
            if let Some(server) = self.shared.retarget.lock().expect("not poisoned").take() {
                self.server = server;
                self.bindings = vec![bind(self.sources[0])];
            }
            let mut worked = self.forward(&mut buffer);
            worked |= self.back(&mut buffer);
            self.replay_if_told();
            if !worked {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    fn forward(&mut self, buffer: &mut [u8]) -> bool {
        let mut worked = false;
        for _ in 0..64 {
            let Some((len, from)) = receive(&self.front, buffer) else { break };
            worked = true;
            self.client = Some(from);
            self.note(&buffer[..len], &self.shared.from_client);
            if buffer[0] & 0b1011_0000 == 0b1000_0000 {
                let mut initials = self.shared.initials.lock().expect("not poisoned");
                initials.push(buffer[..len].to_vec());
            }
            self.rebind_if_told();
            let binding = self.bindings.last().expect("one is in use");
            // A full socket buffer loses the datagram, as a NAT would.
            let _lost = binding.send_to(&buffer[..len], self.server);
        }
        worked
    }

    fn back(&self, buffer: &mut [u8]) -> bool {
        let mut worked = false;
        for binding in &self.bindings {
            for _ in 0..64 {
                let Some((len, _)) = receive(binding, buffer) else { break };
                worked = true;
                self.note(&buffer[..len], &self.shared.from_server);
                if let Some(client) = self.client {
                    let _lost = self.front.send_to(&buffer[..len], client);
                }
            }
        }
        worked
    }

    fn note(&self, datagram: &[u8], seen: &Mutex<BTreeSet<Vec<u8>>>) {
        if datagram.first().is_some_and(|first| first & 0x80 == 0)
            && let Some(cid) = datagram.get(1..1 + self.cid_bytes)
        {
            let mut seen = seen.lock().expect("not poisoned");
            if !seen.contains(cid) {
                seen.insert(cid.to_vec());
            }
        }
    }

    fn replay_if_told(&self) {
        if self.shared.replayed.load(Ordering::Relaxed)
            == self.shared.replay.load(Ordering::Relaxed)
        {
            return;
        }
        let binding = self.bindings.last().expect("one is in use");
        for initial in self.shared.initials.lock().expect("not poisoned").iter() {
            binding.send_to(initial, self.server).expect("sent");
        }
        self.shared.replayed.fetch_add(1, Ordering::Relaxed);
    }

    fn rebind_if_told(&mut self) {
        let done = self.shared.rebindings.load(Ordering::Relaxed);
        if done == self.shared.rebindings_wanted.load(Ordering::Relaxed) {
            return;
        }
        let source = self.sources[(done as usize + 1) % self.sources.len()];
        self.bindings.push(bind(source));
        if self.bindings.len() > OLD_BINDINGS_MAX {
            self.bindings.remove(0);
        }
        self.shared.rebindings.store(done + 1, Ordering::Relaxed);
    }
}

fn bind(address: Ipv6Addr) -> UdpSocket {
    let socket = UdpSocket::bind((address, 0)).expect("a free port");
    socket.set_nonblocking(true).expect("non-blocking");
    socket
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
    match socket.recv_from(buffer) {
        Ok(received) => Some(received),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        // An ICMP answer to something sent before: a NAT has none of it.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => None,
        Err(error) => panic!("the relay cannot receive: {error}"),
    }
}
