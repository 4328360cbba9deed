//! probe
use super::Params;
use super::testlink::{Link, MBIT, MS, Sim};
#[test]
fn explore() {
    for params in [Params::BBR2, Params::BBR3] {
        let mut link = Link::new(4 * MBIT, 30 * MS, 64_000);
        link.access = (10 * MBIT, 2 * MS);
        let mut sim = Sim::single(link, params, 1452, 12 << 20, 1);
        sim.finish(100_000 * MS);
        let f = &sim.flows[0];
        println!(
            "{} done {} ms lost {} sent {} est {} qpeak {} {:?}",
            params.name,
            f.done.unwrap() / MS,
            f.lost_packets,
            f.sent_packets,
            sim.estimate(0),
            sim.queue_peak,
            sim.snapshot(0)
        );
        println!("{:?}", f.states.iter().map(|s| (s.0 / MS, s.1.name())).collect::<Vec<_>>());
    }
}
