//! Congestion control behind a token bucket (`tbf`), as a shaped uplink has one. Needs root.
//!
//! The path's round trip is some 50 µs and its BDP a few packets, far less than what a receiver
//! holds ACKs back for or what leaves at once: what counts is that the bucket never runs dry and
//! that no queue stands behind it. A Cubic transfer over the same path, in the same run, says what
//! the machine and the bucket let through: Cubic keeps the bucket's queue full.
//!
//! Cores that sleep are given back late on virtual machines, which costs every sender of bursts
//! some of the rate and Cubic none. Loops that run only where nothing else does keep them awake.

mod common;

use std::net::{Ipv6Addr, SocketAddrV6};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use common::netns::{Netns, veth};
use common::transfer::{Transfer, Watchdog, start_client, start_server};
use stoq::config::{CongestionControl, TransportConfig};
use stoq::datapath::choice::DatapathChoice;
use stoq::engine::Engine;

const SENDER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const DEVICE: &str = "veth0";
const RATE_MBIT: u64 = 500;
/// What headers leave of it: 1416 bytes of a frame of 1514.
const PAYLOAD_MBIT: f64 = RATE_MBIT as f64 * 1416.0 / 1514.0;
/// What leaves at once: 64 KiB, about a millisecond.
const QUANTUM_BYTES: u64 = 65_536;
/// Room in the bucket's queue: 64 ms.
const LIMIT_BYTES: u64 = 4_000_000;
const WINDOW: Duration = Duration::from_millis(100);
/// 4 s: Startup and what it queued are over, a ProbeRTT is not due yet.
const WINDOWS: usize = 40;
const START: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(30);
const HANG: Duration = Duration::from_secs(120);

/// A loop at idle priority for each core , ended with the test.
struct Awake(Vec<Child>);

impl Awake {
    fn start() -> Self {
        let cores = core_affinity::get_core_ids().expect("the cores that this process may use");
        let spin = |core: core_affinity::CoreId| {
            Command::new("taskset")
                .args(["-c", &core.id.to_string(), "chrt", "--idle", "0", "sh", "-c"])
                .arg("while :; do :; done")
                .spawn()
                .expect("taskset and chrt (util-linux)")
        };
        Self(cores.into_iter().map(spin).collect())
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        for child in &mut self.0 {
            child.kill().expect("it loops until then");
            child.wait().expect("killed");
        }
    }
}

/// What one transfer got out of the bucket.
#[derive(Debug)]
struct Seen {
    /// Payload that arrived in each window, Mbit/s, the lowest first.
    mbit: Vec<f64>,
    /// Bytes that waited at the end of each window, the lowest first.
    backlog: Vec<u64>,
}

impl Seen {
    fn median_mbit(&self) -> f64 {
        self.mbit[self.mbit.len() / 2]
    }

    /// What waited nine times in ten.
    fn standing_bytes(&self) -> u64 {
        self.backlog[self.backlog.len() / 10]
    }
}

/// Bytes that wait in the bucket of `netns`.
fn backlog(netns: &Netns) -> u64 {
    let text = netns.exec(&format!("tc -s -j qdisc show dev {DEVICE}"));
    let value = text.split("\"backlog\":").nth(1).expect("tc shows the backlog");
    value.chars().take_while(char::is_ascii_digit).collect::<String>().parse().expect("a number")
}

fn transfer(congestion_control: CongestionControl) -> Seen {
    let _hang = Watchdog::new("a shaped transfer", HANG);
    let (receiver, sender) = (Netns::new("receiver"), Netns::new("sender"));
    veth((&receiver, DEVICE), (&sender, DEVICE));
    receiver.add_address(DEVICE, "fd00::1/64");
    sender.add_address(DEVICE, &format!("{SENDER}/64"));
    sender.exec(&format!(
        "tc qdisc add dev {DEVICE} root tbf rate {RATE_MBIT}mbit burst 128kb limit {LIMIT_BYTES}"
    ));
    let builder = || {
        Engine::builder().config(TransportConfig {
            congestion_control,
            datapath: DatapathChoice::Socket,
            shards: 1,
            ..TransportConfig::default()
        })
    };
    let server = sender.run(|| start_server(SENDER, builder()).expect("it starts"));
    let client = receiver.run(|| start_client(builder()).expect("it starts"));
    let remote = SocketAddrV6::new(SENDER, server.local_addr().port(), 0, 0);
    let transfer = Transfer::start_to(remote, server, client);
    transfer.advance(1 << 20, PATIENCE);
    thread::sleep(START);
    let mut seen = Seen { mbit: Vec::new(), backlog: Vec::new() };
    for _ in 0..WINDOWS {
        let (start, before) = (Instant::now(), transfer.received());
        thread::sleep(WINDOW);
        let (bytes, took) = (transfer.received() - before, start.elapsed());
        seen.mbit.push(bytes as f64 * 8e-6 / took.as_secs_f64());
        seen.backlog.push(backlog(&sender));
    }
    seen.mbit.sort_by(f64::total_cmp);
    seen.backlog.sort_unstable();
    transfer.finish_intact();
    seen
}

#[test]
fn a_token_bucket_is_kept_busy_without_a_standing_queue() {
    let _awake = Awake::start();
    let cubic = transfer(CongestionControl::Cubic);
    let bbr2 = transfer(CongestionControl::Bbr2);
    // Cubic's share says that the bucket and the machine let the rate through, and its queue that
    // a standing one is seen.
    assert!(cubic.standing_bytes() > LIMIT_BYTES / 4, "cubic {cubic:?}");
    assert!(cubic.median_mbit() > 0.95 * PAYLOAD_MBIT, "cubic {cubic:?}");
    assert!(bbr2.median_mbit() > 0.95 * PAYLOAD_MBIT, "bbr2 {bbr2:?}");
    assert!(bbr2.standing_bytes() < 3 * QUANTUM_BYTES, "bbr2 {bbr2:?}");
}
