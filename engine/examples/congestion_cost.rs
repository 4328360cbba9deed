//! What BBR costs per packet: steady state of a long path, an ACK every ten packets.
//!
//! `PACKETS=100000 valgrind --tool=callgrind target/release/examples/congestion_cost` counts the
//! instructions (`BBR=3` for the third version); the difference to a run with `PACKETS=200000`
//! is the cost of 100000 packets.

use std::time::{Duration, Instant};

use stoq::proto::bbr::{BbrConfig, Params};

const PACKET_BYTES: u64 = 1452;
const PACKETS_PER_ACK: u64 = 10;
const PACKETS_IN_FLIGHT: u64 = 400;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// Sends packets and acknowledges them, without a network.
pub(crate) fn main() {
    let version = number("BBR", 2);
    let packets = number("PACKETS", 10_000);
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
