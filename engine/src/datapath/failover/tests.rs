//! The swap and the coordinator, without a device.

use std::net::Ipv6Addr;
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::sync::{Arc, Mutex};

use super::backoff::Backoff;
use super::coordinator::{Coordinator, Reopen};
use super::*;
use crate::datapath::DatapathKind;

/// A device, or its standby, that does what a test says.
#[derive(Debug)]
struct Mock {
    capabilities: Capabilities,
    events: Vec<DatapathEvent>,
    counters: DatapathCounters,
    payload_max: u16,
    standby: Option<Box<Self>>,
    /// Told when it is dropped: by which thread.
    dropped: Option<std::sync::mpsc::Sender<std::thread::ThreadId>>,
}

impl Mock {
    fn new(kind: DatapathKind, payload_max: u16) -> Self {
        let capabilities = Capabilities {
            kind,
            mode: String::new(),
            interface: None,
            queue: None,
            standby_reason: None,
        };
        let counters = DatapathCounters::default();
        Self {
            capabilities,
            events: Vec::new(),
            counters,
            payload_max,
            standby: None,
            dropped: None,
        }
    }

    fn device() -> Self {
        let standby = Some(Box::new(Self::new(DatapathKind::Socket, 1452)));
        Self { standby, ..Self::new(DatapathKind::AfXdp, 3000) }
    }
}

/// Tells of the drop; a field's type of its own, so that `Mock` itself can be taken apart.
#[derive(Debug)]
struct Device(Mock);

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(dropped) = &self.0.dropped {
            dropped.send(std::thread::current().id()).expect("the test listens");
        }
    }
}

macro_rules! mock_datapath {
    ($type:ty, $self:ident => $mock:expr, $mutable:expr) => {
        impl Datapath for $type {
            fn capabilities(&$self) -> &Capabilities {
                &$mock.capabilities
            }
            fn local_addr(&self) -> SocketAddrV6 {
                SocketAddrV6::new(Ipv6Addr::LOCALHOST, 4433, 0, 0)
            }
            fn receive(&mut $self, _now: Instant, _batch: &mut RxBatch) {
                $mutable.counters.rx_datagrams += 1;
            }
            fn transmit_capacity(&self) -> usize {
                1
            }
            fn transmit(&mut $self, _meta: &TxMeta, payload: &[u8]) -> TxVerdict {
                if payload.len() > usize::from($mock.payload_max) {
                    return TxVerdict::Dropped(crate::datapath::TxDrop::TooLarge);
                }
                $mutable.counters.tx_datagrams += 1;
                TxVerdict::Accepted
            }
            fn flush(&mut self, _now: Instant) {}
            fn poll_event(&mut $self) -> Option<DatapathEvent> {
                $mutable.events.pop()
            }
            fn max_udp_payload(&$self, _remote: &SocketAddrV6) -> u16 {
                $mock.payload_max
            }
            fn wait(&mut self, _: BorrowedFd<'_>, _: Option<Duration>) -> std::io::Result<()> {
                Ok(())
            }
            fn counters(&$self) -> DatapathCounters {
                $mock.counters
            }
        }
    };
}

mock_datapath!(Mock, self => self, self);
mock_datapath!(Device, self => self.0, self.0);

impl Primary for Device {
    type Standby = Mock;

    fn take_standby(&mut self) -> Option<Mock> {
        self.0.standby.take().map(|standby| *standby)
    }

    fn give_standby(&mut self, standby: Mock) {
        self.0.standby = Some(Box::new(standby));
    }
}

fn fail(failover: &mut Failover<Device>, why: &str) -> DatapathEvent {
    match &mut failover.carrier {
        Carrier::Primary(primary) => primary.0.events.push(failed(why)),
        Carrier::Standby(standby) => standby.events.push(failed(why)),
    }
    failover.poll_event().expect("an event")
}

fn failed(why: &str) -> DatapathEvent {
    DatapathEvent::Failed(why.to_owned())
}

fn wrapped() -> (Failover<Device>, Receiver<GivenUp<Device>>) {
    let (sender, receiver) = sync_channel(1);
    (Failover::new(3, Device(Mock::device()), sender), receiver)
}

fn meta() -> TxMeta {
    let remote = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 1, 0, 0);
    TxMeta { remote, local: None, ecn: crate::datapath::Ecn::NotEct }
}

#[test]
fn the_standby_takes_over_and_the_remains_go_to_the_coordinator() {
    let (mut failover, coordinator) = wrapped();
    assert_eq!(failover.capabilities().kind, DatapathKind::AfXdp);
    assert_eq!(failover.poll_event(), None);
    assert_eq!(fail(&mut failover, "gone"), DatapathEvent::Changed("gone".to_owned()));
    let path = failover.capabilities();
    assert_eq!((path.kind, path.standby_reason.as_deref()), (DatapathKind::Socket, Some("gone")));
    let notice = coordinator.try_recv().expect("told");
    assert_eq!(notice.shard, 3);
    assert!(notice.remains.0.standby.is_none(), "the socket stays with the shard");
    assert_eq!(failover.poll_event(), None, "told once");
}

#[test]
fn what_the_new_datapath_cannot_carry_is_not_sent() {
    let (mut failover, _coordinator) = wrapped();
    assert_eq!(failover.transmit(&meta(), &[0; 2000]), TxVerdict::Accepted);
    let _changed = fail(&mut failover, "gone");
    assert_eq!(failover.max_udp_payload(&meta().remote), 1452);
    let verdict = failover.transmit(&meta(), &[0; 2000]);
    assert_eq!(verdict, TxVerdict::Dropped(crate::datapath::TxDrop::TooLarge));
}

#[test]
fn a_device_that_is_there_again_is_used_with_the_same_standby() {
    let (mut failover, coordinator) = wrapped();
    let (now, mut batch) = (Instant::now(), RxBatch::new(1, 64));
    failover.receive(now, &mut batch);
    let _changed = fail(&mut failover, "gone");
    failover.receive(now, &mut batch);
    drop(coordinator.try_recv().expect("told"));
    failover.adopt(now, Box::new(Device(Mock::new(DatapathKind::AfXdp, 3000))));
    assert!(matches!(failover.poll_event(), Some(DatapathEvent::Changed(_))));
    assert_eq!(failover.capabilities().standby_reason, None);
    let Carrier::Primary(primary) = &failover.carrier else { panic!("not adopted") };
    let standby = primary.0.standby.as_ref().expect("given");
    assert_eq!(standby.counters.rx_datagrams, 1, "the very same");
    let counters = failover.counters();
    assert_eq!((counters.failovers, counters.returns), (1, 1));
    assert_eq!(counters.rx_datagrams, 1, "what the retired device received is not forgotten");
    // And again.
    assert_eq!(fail(&mut failover, "once more"), DatapathEvent::Changed("once more".to_owned()));
    assert_eq!(failover.counters().failovers, 2);
}

#[test]
fn offers_that_nobody_waits_for_are_dropped() {
    let (mut failover, _coordinator) = wrapped();
    let now = Instant::now();
    failover.adopt(now, Box::new(Device(Mock::new(DatapathKind::AfXdp, 9))));
    assert_eq!((failover.max_udp_payload(&meta().remote), failover.poll_event()), (3000, None));
    let _changed = fail(&mut failover, "gone");
    failover.adopt(now, Box::new("no datapath"));
    assert_eq!(failover.capabilities().kind, DatapathKind::Socket);
    assert_eq!(failover.counters().returns, 0);
}

#[test]
fn a_failure_without_a_standby_is_the_shards() {
    let (mut failover, _coordinator) = wrapped();
    let _changed = fail(&mut failover, "gone");
    assert_eq!(fail(&mut failover, "the socket too"), failed("the socket too"));
    let (sender, _receiver) = sync_channel(1);
    let bare = Device(Mock::new(DatapathKind::AfXdp, 9));
    let mut failover = Failover::new(0, bare, sender);
    assert_eq!(fail(&mut failover, "all gone"), failed("all gone"));
}

/// Refuses so many times.
struct Refusing {
    refusals: u32,
    attempts: Arc<Mutex<Vec<usize>>>,
}

impl Reopen<Device> for Refusing {
    fn reopen(&mut self, shard: usize) -> Result<Device, String> {
        self.attempts.lock().expect("no panic").push(shard);
        match self.refusals.checked_sub(1) {
            Some(left) => {
                self.refusals = left;
                Err("not yet".to_owned())
            }
            None => Ok(Device(Mock::new(DatapathKind::AfXdp, 9))),
        }
    }

    fn check(&mut self) {}
}

#[test]
fn the_coordinator_opens_again_offers_and_ends() {
    let (dropped, drops) = channel();
    let device = || Device(Mock { dropped: Some(dropped.clone()), ..Mock::device() });
    let (offers_in, offers) = channel();
    let mut full = true;
    let offer = Box::new(move |shard: usize, path: Box<Device>| {
        // The mailbox is full once.
        if std::mem::replace(&mut full, false) {
            return false;
        }
        offers_in.send((shard, path)).is_ok()
    });
    let backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(4), 1);
    let attempts = Arc::default();
    let reopen = Refusing { refusals: 2, attempts: Arc::clone(&attempts) };
    let (mut paths, coordinator) =
        Coordinator::start(vec![device(), device()], backoff, reopen, offer).expect("a thread");
    let limit = Duration::from_secs(20);
    let _changed = fail(&mut paths[1], "gone");
    let dropped_by = drops.recv_timeout(limit).expect("the remains are dropped");
    assert_ne!(dropped_by, std::thread::current().id(), "not by the shard's thread");
    let (shard, path) = offers.recv_timeout(limit).expect("offered");
    assert_eq!(shard, 1);
    paths[1].adopt(Instant::now(), path);
    let seen = attempts.lock().expect("no panic").clone();
    assert_eq!(seen, [1; 4], "two refusals, a full mailbox, success; shard 0 is left alone");
    drop(paths);
    coordinator.into_thread().join().expect("it ends with its datapaths");
}
