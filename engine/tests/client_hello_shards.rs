//! A ClientHello of two Initials against a server of four shards, over a path that loses, swaps or
//! doubles either part, with and without Retry: real sockets on `::1`.

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::join;
use pair::{NAME, Pair, Watchdog, config};
use pollster::block_on;
use stoq::VarInt;
use stoq::config::{RetryPolicy, TransportConfig};

const SHARDS: usize = 4;
/// Connections of each case: their first connection IDs, and so their shards, differ.
const ROUNDS: usize = 8;

/// What becomes of a datagram from the client, in the order in which they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Pass,
    Lose,
    /// Passes after the next one.
    Swap,
    Double,
}

/// Carries datagrams between one client and the server; ends when dropped.
struct Path {
    addr: SocketAddrV6,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Path {
    fn start(server: SocketAddrV6, fates: &'static [Fate]) -> Self {
        let bind = || {
            let socket = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("bound");
            socket.set_read_timeout(Some(Duration::from_millis(10))).expect("set");
            Arc::new(socket)
        };
        let (front, back) = (bind(), bind());
        let SocketAddr::V6(addr) = front.local_addr().expect("bound") else { panic!("IPv6") };
        let stop = Arc::new(AtomicBool::new(false));
        let client = Arc::new(Mutex::new(None));
        let mut fates: VecDeque<Fate> = fates.iter().copied().collect();
        let mut held: Option<Vec<u8>> = None;
        let (from, to, seen) = (front.clone(), back.clone(), client.clone());
        let up = carry(from, stop.clone(), move |data, source| {
            *seen.lock().expect("not poisoned") = Some(source);
            let send = |data: &[u8]| to.send_to(data, server).map(drop).expect("sent");
            match fates.pop_front().unwrap_or(Fate::Pass) {
                Fate::Lose => return,
                Fate::Swap => {
                    held = Some(data.to_vec());
                    return;
                }
                Fate::Double => {
                    send(data);
                    send(data);
                }
                Fate::Pass => send(data),
            }
            if let Some(late) = held.take() {
                send(&late);
            }
        });
        let down = carry(back, stop.clone(), move |data, _server| {
            let client = *client.lock().expect("not poisoned");
            front.send_to(data, client.expect("spoke first")).map(drop).expect("sent");
        });
        Self { addr, stop, threads: vec![up, down] }
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.expect("the path did not panic");
            }
        }
    }
}

fn carry(
    from: Arc<UdpSocket>,
    stop: Arc<AtomicBool>,
    mut handle: impl FnMut(&[u8], SocketAddr) + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_535];
        while !stop.load(Ordering::Relaxed) {
            match from.recv_from(&mut buffer) {
                Ok((len, source)) => handle(&buffer[..len], source),
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {}
                Err(error) => panic!("receiving: {error}"),
            }
        }
    })
}

#[test]
fn either_part_may_go_astray_on_its_way_to_any_shard() {
    use Fate::{Double, Lose, Pass, Swap};
    const CASES: [&[Fate]; 7] = [
        &[Pass],
        &[Lose],
        &[Pass, Lose],
        &[Swap],
        &[Double, Double],
        &[Pass, Pass, Swap],
        &[Pass, Pass, Lose, Double],
    ];
    let _watchdog = Watchdog::new("either_part_may_go_astray_on_its_way_to_any_shard");
    for retry in [RetryPolicy::Never, RetryPolicy::Always] {
        let server = TransportConfig { shards: SHARDS, retry, ..config() };
        let pair = Pair::with(server, config());
        for fates in CASES {
            for round in 0..ROUNDS {
                let path = Path::start(pair.server.local_addr(), fates);
                let (client, server) = block_on(async {
                    let accept = async {
                        let incoming = pair.server.accept().await.expect("a client knocks");
                        incoming.accept().await
                    };
                    join(pair.client.connect(path.addr, NAME), accept).await
                });
                let case = format!("{retry:?}, {fates:?}, round {round}");
                let client = client.unwrap_or_else(|error| panic!("{case}: client: {error}"));
                let server = server.unwrap_or_else(|error| panic!("{case}: server: {error}"));
                assert!(client.handshake().is_some_and(|settled| settled.is_post_quantum()));
                client.close(VarInt::from_u32(0), b"made");
                block_on(server.closed());
            }
        }
        let accepted: Vec<u64> =
            pair.server.stats().iter().map(|shard| shard.shard.accepted).collect();
        assert_eq!(accepted.iter().sum::<u64>(), (CASES.len() * ROUNDS) as u64, "{accepted:?}");
        assert!(accepted.iter().filter(|count| **count > 0).count() > 1, "{accepted:?}");
    }
}
