//! The two socket datapaths over `lo`, from one source: whatever holds for one holds for the other.

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use stoq::datapath::io_uring::IoUringDatapath;
use stoq::datapath::socket::SocketDatapath;
use stoq::datapath::udp_socket::{SocketConfig, SocketError};
use stoq::datapath::{Datapath, DatapathKind, Ecn, RxBatch, TxDrop, TxMeta, TxVerdict};

/// Longest that anything on `lo` may take.
const PATIENCE: Duration = Duration::from_secs(20);

fn config() -> SocketConfig {
    SocketConfig::new(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0))
}

fn to(remote: SocketAddrV6) -> TxMeta {
    TxMeta { remote, local: None, ecn: Ecn::Ect0 }
}

fn batch(limit: usize) -> RxBatch {
    RxBatch::new(limit, 1 << 20)
}

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    remote: SocketAddrV6,
    local: Ipv6Addr,
    ecn: Ecn,
    data: Vec<u8>,
}

/// Receives until `count` datagrams are there, in batches of `limit`.
fn collect<D: Datapath>(datapath: &mut D, count: usize, limit: usize) -> Vec<Seen> {
    let mut batch = batch(limit);
    let mut seen = Vec::new();
    let start = Instant::now();
    while seen.len() < count {
        datapath.receive(Instant::now(), &mut batch);
        assert!(batch.len() <= limit);
        seen.extend(batch.drain().map(|datagram| Seen {
            remote: datagram.remote,
            local: datagram.local,
            ecn: datagram.ecn,
            data: datagram.data.to_vec(),
        }));
        assert!(start.elapsed() < PATIENCE, "{} of {count} datagrams arrived", seen.len());
    }
    seen
}

fn flush_all<D: Datapath>(datapath: &mut D) {
    datapath.flush(Instant::now());
}

fn send<D: Datapath>(datapath: &mut D, meta: &TxMeta, payload: &[u8]) {
    let start = Instant::now();
    while datapath.transmit(meta, payload) == TxVerdict::Full {
        flush_all(datapath);
        // Completions are collected by receiving.
        datapath.receive(Instant::now(), &mut batch(1));
        assert!(start.elapsed() < PATIENCE, "the send slots never came back");
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 + seed * 7 + len) as u8).collect()
}

/// Every size from the smallest to the largest that `lo` carries, there and back.
fn echoes_every_size<D: Datapath>(mut near: D, mut far: D) {
    let largest = usize::from(near.max_udp_payload(&far.local_addr()));
    assert!((1200..=65_527).contains(&largest), "{largest}");
    let mut sizes: Vec<usize> = (1..=130).chain([1199, 1200, 1201, 1452, 8952, 16_384]).collect();
    sizes.extend([32_767, 32_768, 65_486, 65_487, 65_488].into_iter().filter(|s| *s <= largest));
    sizes.push(largest);
    for size in sizes {
        let payload = pattern(size, 1);
        let far_addr = far.local_addr();
        send(&mut near, &to(far_addr), &payload);
        flush_all(&mut near);
        let there = collect(&mut far, 1, 4).remove(0);
        assert_eq!(there.data, payload, "{size} bytes there");
        assert_eq!((there.remote, there.local), (near.local_addr(), Ipv6Addr::LOCALHOST));
        let near_addr = near.local_addr();
        send(&mut far, &to(near_addr), &there.data);
        flush_all(&mut far);
        assert_eq!(collect(&mut near, 1, 4).remove(0).data, payload, "{size} bytes back");
    }
    for size in [largest + 1, 65_527] {
        if size <= largest {
            continue;
        }
        let before = near.counters().tx_drop_too_large;
        let far_addr = far.local_addr();
        send(&mut near, &to(far_addr), &vec![0; size]);
        flush_all(&mut near);
        near.receive(Instant::now(), &mut batch(1));
        assert_eq!(near.counters().tx_drop_too_large, before + 1, "{size} exceeds the MTU");
    }
    let far_addr = far.local_addr();
    let verdict = near.transmit(&to(far_addr), &vec![0; 65_528]);
    assert_eq!(verdict, TxVerdict::Dropped(TxDrop::TooLarge));
}

fn carries_ecn<D: Datapath>(mut near: D, mut far: D) {
    let marks = [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce];
    let remote = far.local_addr();
    // Equal sizes back to back: batches must not mix marks.
    for ecn in marks.into_iter().cycle().take(12).chain([Ecn::Ce; 5]) {
        send(&mut near, &TxMeta { remote, local: None, ecn }, &[ecn as u8; 64]);
    }
    flush_all(&mut near);
    for seen in collect(&mut far, 17, 32) {
        assert_eq!(seen.data, [seen.ecn as u8; 64]);
    }
}

fn packs_and_splits<D: Datapath>(mut near: D, mut far: D) {
    let remote = far.local_addr();
    let gso = near.capabilities().mode.contains("gso");
    assert!(gso, "this kernel has UDP GSO");
    let sizes: Vec<usize> = [1200; 70]
        .into_iter()
        .chain([700, 1200, 1200, 1201, 5, 5, 6, 1])
        .chain([8952; 20])
        .chain([1452; 64])
        .chain([30_000; 3])
        .chain([32_767; 4])
        .collect();
    for (index, size) in sizes.iter().enumerate() {
        send(&mut near, &to(remote), &pattern(*size, index));
    }
    let calls = near.counters().system_calls;
    flush_all(&mut near);
    let spent = near.counters().system_calls - calls;
    assert!(spent <= 2, "one kick for {} datagrams, not {spent}", sizes.len());
    // A batch limit that falls into the middle of coalesced buffers.
    let seen = collect(&mut far, sizes.len(), 7);
    for (index, (seen, size)) in seen.iter().zip(&sizes).enumerate() {
        assert_eq!(seen.data, pattern(*size, index), "datagram {index} of {size} bytes");
    }
    let (sent, received) = (near.counters(), far.counters());
    assert_eq!(sent.tx_datagrams, sizes.len() as u64);
    assert_eq!(received.rx_datagrams, sizes.len() as u64);
    assert_eq!(sent.tx_bytes, sizes.iter().sum::<usize>() as u64);
    assert_eq!(received.rx_bytes, sent.tx_bytes);
    assert!(near.capabilities().mode.contains("gso"), "no batch was refused");
}

/// Large messages stay where the kernel wrote them for as long as somebody holds them, however many;
/// small ones are copied, so that holding one does not hold a receive buffer.
fn gives_large_messages_away<D: Datapath>(mut near: D, mut far: D) {
    let remote = far.local_addr();
    let mut batch = batch(7);
    let mut held = Vec::new();
    let (mut sent, mut copied_bytes) = (Vec::new(), 0);
    // Alone, and many in a message: 33 of 1452 bytes are the first that are not copied.
    for round in 0..20 {
        for (size, count) in [(60_000, 1), (1452, 33), (1452, 32), (40_000, 1), (9, 1)] {
            if size * count < 48 * 1024 {
                copied_bytes += size * count;
            }
            for _ in 0..count {
                sent.push(pattern(size, round));
                send(&mut near, &to(remote), sent.last().expect("just pushed"));
            }
            flush_all(&mut near);
            let start = Instant::now();
            while held.len() < sent.len() {
                far.receive(Instant::now(), &mut batch);
                held.extend(batch.drain().map(|datagram| datagram.data));
                assert!(start.elapsed() < PATIENCE, "{} of {}", held.len(), sent.len());
            }
        }
    }
    assert!(held.iter().eq(&sent), "nothing was written over while it was held");
    let counters = far.counters();
    assert_eq!(counters.copied_bytes, copied_bytes as u64);
    assert_eq!(counters.rx_bytes, sent.iter().map(|sent| sent.len() as u64).sum::<u64>());
}

fn honours_batch_limit<D: Datapath>(mut near: D, mut far: D) {
    let remote = far.local_addr();
    for index in 0..10 {
        send(&mut near, &to(remote), &pattern(1000, index));
    }
    flush_all(&mut near);
    let first = collect(&mut far, 3, 3);
    assert_eq!(first.len(), 3);
    // What is left lies in the datapath: waiting returns at once.
    let wake = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let start = Instant::now();
    far.wait(wake.as_fd(), Some(PATIENCE)).expect("wait works");
    assert!(start.elapsed() < PATIENCE / 2, "woken by the rest of the buffer");
    let rest = collect(&mut far, 7, 3);
    for (index, seen) in first.iter().chain(&rest).enumerate() {
        assert_eq!(seen.data, pattern(1000, index));
    }
}

fn wakes_and_times_out<D: Datapath>(mut near: D, mut far: D) {
    let wake = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    // Armed and idle.
    assert!(collect(&mut far, 0, 1).is_empty());
    far.receive(Instant::now(), &mut batch(1));
    let waits = |far: &mut D, timeout| {
        let start = Instant::now();
        far.wait(wake.as_fd(), timeout).expect("wait works");
        start.elapsed()
    };
    let mut slept = Duration::ZERO;
    for _ in 0..10 {
        slept = waits(&mut far, Some(Duration::from_millis(30)));
    }
    assert!(slept >= Duration::from_millis(29) && slept < PATIENCE, "timeout: {slept:?}");

    let remote = far.local_addr();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            rustix::io::write(&wake, &1_u64.to_ne_bytes()).expect("the eventfd takes it");
        });
        assert!(waits(&mut far, Some(PATIENCE)) < PATIENCE / 2, "woken by the eventfd");
    });
    assert!(waits(&mut far, Some(PATIENCE)) < PATIENCE / 2, "still readable: not read by wait");
    rustix::io::read(&wake, &mut [0_u8; 8]).expect("the eventfd is readable");

    send(&mut near, &to(remote), b"ping");
    flush_all(&mut near);
    assert!(waits(&mut far, None) < PATIENCE / 2, "woken by a datagram");
    assert_eq!(collect(&mut far, 1, 1)[0].data, b"ping");
}

/// A datagram that arrives during the very first sleep, after turns that found nothing.
fn wakes_from_its_first_sleep<D: Datapath>(_near: D, mut far: D) {
    let wake = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let remote = far.local_addr();
    for _ in 0..100 {
        far.receive(Instant::now(), &mut batch(1));
        far.flush(Instant::now());
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            let socket = std::net::UdpSocket::bind("[::1]:0").expect("a socket");
            socket.send_to(b"first", remote).expect("sent");
        });
        let start = Instant::now();
        far.wait(wake.as_fd(), Some(PATIENCE)).expect("wait works");
        assert!(start.elapsed() < PATIENCE / 2, "slept through a datagram");
        assert!(start.elapsed() > Duration::from_millis(50), "did not sleep at all");
    });
    assert_eq!(collect(&mut far, 1, 1)[0].data, b"first");
}

fn counts_overruns<D: Datapath>(mut near: D, mut far: D) {
    let remote = far.local_addr();
    let sent = 3000;
    for index in 0..sent {
        send(&mut near, &to(remote), &pattern(1452, index));
        if index % 50 == 0 {
            flush_all(&mut near);
        }
    }
    flush_all(&mut near);
    let mut received = 0;
    let mut empty = 0;
    let mut batch = batch(64);
    while empty < 100 {
        far.receive(Instant::now(), &mut batch);
        empty = if batch.is_empty() { empty + 1 } else { 0 };
        received += batch.drain().count();
    }
    assert!(received < sent, "a small buffer cannot hold {sent}");
    // The next datagram that finds room reports what was lost.
    send(&mut near, &to(remote), b"after");
    flush_all(&mut near);
    let last = collect(&mut far, 1, 1);
    assert_eq!(last[0].data, b"after");
    let lost = far.counters().rx_drop_overrun;
    // The kernel counts packets of a GSO batch as it queued them: at least one each.
    assert!(lost > 0 && lost <= (sent - received) as u64, "{lost} of {}", sent - received);
}

fn refuses_ipv4<D: Datapath>(mut near: D, far: D) {
    let mapped = SocketAddrV6::new("::ffff:127.0.0.1".parse().expect("address"), 9, 0, 0);
    assert_eq!(near.transmit(&to(mapped), b"x"), TxVerdict::Dropped(TxDrop::NoRoute));
    assert_eq!(near.counters().tx_drop_no_route, 1);
    let ipv4 = UdpSocket::bind("127.0.0.1:0").expect("127.0.0.1 can be bound");
    let port = far.local_addr().port();
    ipv4.send_to(b"x", ("127.0.0.1", port)).expect("sending over lo works");
    let mut far = far;
    for _ in 0..20 {
        far.receive(Instant::now(), &mut batch(1));
    }
    assert_eq!(far.counters().rx_datagrams, 0);
}

fn survives_churn<D: Datapath>(mut near: D, mut far: D) {
    // Many times around every ring and free list, with sizes that never batch.
    let remote = far.local_addr();
    for round in 0..300 {
        for index in 0..20 {
            send(&mut near, &to(remote), &pattern(100 + index * 3, round));
        }
        flush_all(&mut near);
        let seen = collect(&mut far, 20, 8);
        for (index, seen) in seen.iter().enumerate() {
            assert_eq!(seen.data, pattern(100 + index * 3, round));
        }
    }
}

fn keeps_going_when_slots_run_out<D: Datapath>(mut near: D, mut far: D) {
    let remote = far.local_addr();
    let capacity = near.transmit_capacity();
    assert!(capacity > 0);
    for index in 0..capacity {
        // Descending sizes end a batch each: one slot a datagram.
        let size = if index % 2 == 0 { 50 } else { 60 };
        assert_eq!(near.transmit(&to(remote), &vec![0; size + index * 2]), TxVerdict::Accepted);
    }
    while near.transmit_capacity() > 0 {
        assert_eq!(near.transmit(&to(remote), &pattern(9000, 1)), TxVerdict::Accepted);
    }
    let accepted = near.counters().tx_datagrams as usize;
    assert_eq!(near.transmit(&to(remote), &pattern(9500, 1)), TxVerdict::Full);
    assert_eq!(near.counters().tx_datagrams as usize, accepted, "Full takes nothing");
    flush_all(&mut near);
    near.receive(Instant::now(), &mut batch(1));
    assert_eq!(near.transmit_capacity(), capacity, "all slots are back");
    let _ = collect(&mut far, accepted, 64);
}

macro_rules! over_both {
    ($($name:ident($config:expr);)*) => {
        mod socket {
            use super::*;
            $(#[test] fn $name() {
                let open = || SocketDatapath::open($config).expect("the socket opens");
                super::$name(open(), open());
            })*
        }
        mod io_uring {
            use super::*;
            $(#[test] fn $name() {
                let open = || IoUringDatapath::open($config).expect("io_uring is available");
                super::$name(open(), open());
            })*
        }
    };
}

fn small_receive_buffer() -> SocketConfig {
    let mut config = config();
    config.receive_buffer_bytes = 64 * 1024;
    config.rx_buffers = 4;
    config
}

fn few_buffers() -> SocketConfig {
    let mut config = config();
    config.rx_buffers = 4;
    config.tx_batches = 32;
    config
}

over_both! {
    echoes_every_size(config());
    carries_ecn(config());
    packs_and_splits(config());
    honours_batch_limit(config());
    wakes_and_times_out(config());
    wakes_from_its_first_sleep(config());
    counts_overruns(small_receive_buffer());
    refuses_ipv4(config());
    survives_churn(few_buffers());
    keeps_going_when_slots_run_out(few_buffers());
    frees_its_port_at_once(config());
    gives_large_messages_away(few_buffers());
}

#[test]
fn without_offloads_everything_still_arrives() {
    let mut config = config();
    config.gso = false;
    config.gro = false;
    let open = || SocketDatapath::open(config.clone()).expect("the socket opens");
    assert_eq!(open().capabilities().mode, "plain");
    echoes_every_size(open(), open());
    carries_ecn(open(), open());
    let open = || IoUringDatapath::open(config.clone()).expect("io_uring is available");
    assert_eq!(open().capabilities().mode, "plain");
    echoes_every_size(open(), open());
    survives_churn(open(), open());
}

#[test]
fn the_datapaths_talk_to_each_other() {
    let mut ring = IoUringDatapath::open(config()).expect("io_uring is available");
    let mut socket = SocketDatapath::open(config()).expect("the socket opens");
    assert_eq!(ring.capabilities().kind, DatapathKind::IoUring);
    assert_eq!(socket.capabilities().kind, DatapathKind::Socket);
    let (ring_addr, socket_addr) = (ring.local_addr(), socket.local_addr());
    for index in 0..100 {
        send(&mut ring, &to(socket_addr), &pattern(1452, index));
        send(&mut socket, &to(ring_addr), &pattern(1452, index));
    }
    flush_all(&mut ring);
    flush_all(&mut socket);
    for datagrams in [collect(&mut ring, 100, 64), collect(&mut socket, 100, 64)] {
        for (index, seen) in datagrams.iter().enumerate() {
            assert_eq!(seen.data, pattern(1452, index));
        }
    }
}

#[test]
fn a_ring_opened_here_runs_on_another_thread() {
    let mut far = SocketDatapath::open(config()).expect("the socket opens");
    let remote = far.local_addr();
    let mut ring = IoUringDatapath::open(config()).expect("io_uring is available");
    std::thread::spawn(move || {
        send(&mut ring, &to(remote), b"from another thread");
        flush_all(&mut ring);
        assert_eq!(ring.poll_event(), None);
    })
    .join()
    .expect("the other thread can drive it");
    assert_eq!(collect(&mut far, 1, 1)[0].data, b"from another thread");
}

#[test]
fn io_uring_says_what_it_can() {
    let features = IoUringDatapath::probe().expect("io_uring is available");
    assert!(features.multishot_receive && features.cooperative_task_run);
}

#[test]
fn dropping_with_work_under_way_is_clean() {
    for _ in 0..50 {
        let mut near = IoUringDatapath::open(few_buffers()).expect("io_uring is available");
        let mut far = IoUringDatapath::open(few_buffers()).expect("io_uring is available");
        far.receive(Instant::now(), &mut batch(1));
        let remote = far.local_addr();
        for index in 0..20 {
            send(&mut near, &to(remote), &pattern(50 + index, index));
        }
        flush_all(&mut near);
    }
}

/// A server that ends and starts again must get its port: at once, not when the kernel
/// has torn down a ring.
fn frees_its_port_at_once<D: Datapath>(mut near: D, mut far: D) {
    let remote = far.local_addr();
    send(&mut near, &to(remote), &pattern(1200, 0));
    flush_all(&mut near);
    collect(&mut far, 1, 16);
    drop(far);
    UdpSocket::bind(remote).unwrap_or_else(|error| panic!("{remote} is still taken: {error}"));
}

#[test]
fn a_port_in_use_is_named() {
    let first = IoUringDatapath::open(config()).expect("io_uring is available");
    let mut config = config();
    config.local = first.local_addr();
    let error = SocketDatapath::open(config).expect_err("the port is taken");
    assert!(matches!(error, SocketError::PortInUse { .. }), "{error}");
}

/// Received Gbit/s and datagrams of `payload_bytes` from one thread to another over `lo`.
fn throughput<D: Datapath + Send>(mut near: D, mut far: D, payload_bytes: usize) -> (f64, f64) {
    use std::sync::atomic::{AtomicBool, Ordering};
    let stop = AtomicBool::new(false);
    let remote = far.local_addr();
    let start = Instant::now();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let payload = pattern(payload_bytes, 1);
            let mut sink = batch(16);
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..220 {
                    if near.transmit(&to(remote), &payload) != TxVerdict::Accepted {
                        break;
                    }
                }
                near.flush(Instant::now());
                near.receive(Instant::now(), &mut sink);
            }
            near.counters()
        });
        let receiver = scope.spawn(|| {
            let mut batch = batch(256);
            while !stop.load(Ordering::Relaxed) {
                far.receive(Instant::now(), &mut batch);
                drop(batch.drain());
            }
            far.counters()
        });
        std::thread::sleep(Duration::from_secs(2));
        let duration = start.elapsed();
        stop.store(true, Ordering::Relaxed);
        let (sent, received) =
            (sender.join().expect("the sender ran"), receiver.join().expect("the receiver ran"));
        let gbits = |bytes: u64| bytes as f64 * 8.0 / duration.as_secs_f64() / 1e9;
        println!(
            "  {payload_bytes} B: sent {:.1}, received {:.1} Gbit/s; {} calls to send, {} to receive, \
             {} receive overruns",
            gbits(sent.tx_bytes),
            gbits(received.rx_bytes),
            sent.system_calls,
            received.system_calls,
            received.rx_drop_overrun,
        );
        (gbits(sent.tx_bytes), gbits(received.rx_bytes))
    })
}

#[test]
#[ignore = "a measurement: cargo test --release -p stoq --test sockets -- --ignored --nocapture"]
fn measure_throughput() {
    for payload_bytes in [1200, 1452, 8952] {
        println!("socket:");
        let open = || SocketDatapath::open(config()).expect("the socket opens");
        let _ = throughput(open(), open(), payload_bytes);
        println!("io_uring:");
        let open = || IoUringDatapath::open(config()).expect("io_uring is available");
        let _ = throughput(open(), open(), payload_bytes);
    }
}
