//! What BBR costs per packet: steady state of a long path, an ACK every ten packets.
//!
//! `valgrind --tool=callgrind target/release/examples/congestion_cost 2 100000` counts the
//! instructions; the difference to a run with 200000 packets is the cost of 100000.

use std::time::{Duration, Instant};

use stoq::proto::bbr::{BbrConfig, Params};

const PACKET_BYTES: u64 = 1452;
const PACKETS_PER_ACK: u64 = 10;
const PACKETS_IN_FLIGHT: u64 = 400;

fn main() {
    let mut numbers = std::env::args().skip(1).map(|arg| arg.parse::<u64>().expect("a number"));
    let version = numbers.next().expect("BBR's version, 2 or 3");
    let packets = numbers.next().expect("how many packets");
    let params = if version == 2 { Params::BBR2 } else { Params::BBR3 };
    let start = Instant::now();
    let mut controller = BbrConfig::new(params, 1).build_bbr(start, PACKET_BYTES as u16);
    // A packet every 10 us: 1.16 Gbit/s, a round trip of 4 ms.
    let sent_at = |packet: u64| start + Duration::from_micros(10 * packet);
    for packet in 0..packets {
        let now = sent_at(packet);
        controller.handle_sent(now, PACKET_BYTES, packet);
        if packet >= PACKETS_IN_FLIGHT && packet % PACKETS_PER_ACK == 0 {
            let newest = packet - PACKETS_IN_FLIGHT;
            for acked in (newest + 1).saturating_sub(PACKETS_PER_ACK)..=newest {
                controller.handle_acked(now, sent_at(acked), PACKET_BYTES, false);
            }
            controller.handle_ack_end(now, PACKETS_IN_FLIGHT * PACKET_BYTES);
        }
    }
    println!("{:?}", controller.probe().snapshot());
}
