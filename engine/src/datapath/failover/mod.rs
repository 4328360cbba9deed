//! A shard's datapath that outlives its device.
//!
//! ```text
//!   device gone, program detached, socket broken        opened again
//!   Primary ───────────────────────────────▶ Standby ───────────────▶ Primary
//!      │ remains: rings, packet memory          ▲                        │
//!      ▼                                        └── same socket ◀────────┘
//!   Coordinator (a thread of its own): drops the remains, opens again with
//!   back-off, hands the result to the shard through its mailbox
//! ```
//! * The standby is the kernel's socket that held the port all along, so a packet that arrives
//!   between two turns is read by one or the other. What lay in the rings is lost, as on a wire;
//!   QUIC sends it again.
//! * The swap happens on the shard's thread and costs it nothing but a few moves: closing rings
//!   and opening them takes milliseconds, which are the [coordinator](coordinator)'s.
//! * One coordinator per engine, hence per interface: all queues share one XDP program.
//! * A standby that fails too is the shard's failure, as for any datapath.

mod backoff;
mod coordinator;
mod reopen;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::net::SocketAddrV6;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::{Capabilities, Datapath, DatapathCounters, DatapathEvent, RxBatch, TxMeta, TxVerdict};

pub(crate) use reopen::AfXdpReopen;

/// A datapath on a device, which has with it one that can do without.
pub(crate) trait Primary: Datapath + Sized + 'static {
    /// What goes on when the device is gone.
    type Standby: Datapath;

    /// Takes the standby out of a datapath that has failed; `None`: it is what failed.
    fn take_standby(&mut self) -> Option<Self::Standby>;

    /// Gives it to a datapath that was opened without one.
    fn give_standby(&mut self, standby: Self::Standby);
}

/// What a shard tells the coordinator when it has gone over to its standby.
#[derive(Debug)]
pub(crate) struct GivenUp<P> {
    pub(crate) shard: usize,
    /// Dropped by the coordinator: that closes rings and may take a while.
    pub(crate) remains: Box<P>,
}

enum Carrier<P: Primary> {
    Primary(Box<P>),
    Standby(P::Standby),
}

/// See the [module documentation](self).
pub(crate) struct Failover<P: Primary> {
    carrier: Carrier<P>,
    shard: usize,
    coordinator: SyncSender<GivenUp<P>>,
    capabilities: Capabilities,
    event: Option<DatapathEvent>,
    /// Of primaries that are gone.
    retired: DatapathCounters,
}

/// One call on whichever carries the shard.
macro_rules! carrier {
    ($carrier:expr, $path:ident => $call:expr) => {
        match $carrier {
            Carrier::Primary($path) => $call,
            Carrier::Standby($path) => $call,
        }
    };
}

impl<P: Primary> Failover<P> {
    /// Wraps an open datapath of `shard`. The coordinator's queue must have room for one message
    /// per shard, which is never blocked on.
    pub(crate) fn new(shard: usize, primary: P, coordinator: SyncSender<GivenUp<P>>) -> Self {
        Self {
            capabilities: primary.capabilities().clone(),
            carrier: Carrier::Primary(Box::new(primary)),
            shard,
            coordinator,
            event: None,
            retired: DatapathCounters::default(),
        }
    }

    /// From the primary to its standby, if it still has it.
    #[cold]
    fn fail_over(&mut self, reason: String) -> DatapathEvent {
        let Carrier::Primary(primary) = &mut self.carrier else {
            return DatapathEvent::Failed(reason);
        };
        let Some(standby) = primary.take_standby() else { return DatapathEvent::Failed(reason) };
        // Its frames go with it.
        let last = primary.counters();
        self.retired.add(&DatapathCounters {
            frames_free: 0,
            frames_fill: 0,
            frames_tx: 0,
            ..last
        });
        self.retired.failovers += 1;
        self.capabilities =
            Capabilities { standby_reason: Some(reason.clone()), ..standby.capabilities().clone() };
        let old = std::mem::replace(&mut self.carrier, Carrier::Standby(standby));
        if let Carrier::Primary(remains) = old {
            let notice = GivenUp { shard: self.shard, remains };
            if self.coordinator.try_send(notice).is_err() {
                tracing::error!(shard = self.shard, "nobody is left to open the device again");
            }
        }
        DatapathEvent::Changed(reason)
    }
}

impl<P: Primary> Datapath for Failover<P> {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn local_addr(&self) -> SocketAddrV6 {
        carrier!(&self.carrier, path => path.local_addr())
    }

    fn receive(&mut self, now: Instant, batch: &mut RxBatch) {
        carrier!(&mut self.carrier, path => path.receive(now, batch));
    }

    fn transmit_capacity(&self) -> usize {
        carrier!(&self.carrier, path => path.transmit_capacity())
    }

    fn transmit(&mut self, meta: &TxMeta, payload: &[u8]) -> TxVerdict {
        carrier!(&mut self.carrier, path => path.transmit(meta, payload))
    }

    fn batch_datagrams_max(&self, segment_bytes: usize) -> usize {
        carrier!(&self.carrier, path => path.batch_datagrams_max(segment_bytes))
    }

    fn transmit_batch(
        &mut self,
        meta: &TxMeta,
        segment_bytes: usize,
        buffer: &mut Vec<u8>,
    ) -> usize {
        carrier!(&mut self.carrier, path => path.transmit_batch(meta, segment_bytes, buffer))
    }

    fn flush(&mut self, now: Instant) {
        carrier!(&mut self.carrier, path => path.flush(now));
    }

    fn poll_event(&mut self) -> Option<DatapathEvent> {
        if let Some(event) = self.event.take() {
            return Some(event);
        }
        match carrier!(&mut self.carrier, path => path.poll_event())? {
            DatapathEvent::Failed(reason) => Some(self.fail_over(reason)),
            event => Some(event),
        }
    }

    fn max_udp_payload(&self, remote: &SocketAddrV6) -> u16 {
        carrier!(&self.carrier, path => path.max_udp_payload(remote))
    }

    fn wait(&mut self, wake: BorrowedFd<'_>, timeout: Option<Duration>) -> std::io::Result<()> {
        if self.event.is_some() {
            return Ok(());
        }
        carrier!(&mut self.carrier, path => path.wait(wake, timeout))
    }

    fn counters(&self) -> DatapathCounters {
        let mut counters = carrier!(&self.carrier, path => path.counters());
        counters.add(&self.retired);
        counters
    }

    /// From the standby back to a primary. A primary that nobody waits for is dropped.
    fn adopt(&mut self, now: Instant, offer: Box<dyn Any>) {
        let (Ok(primary), Carrier::Standby(standby)) = (offer.downcast::<P>(), &mut self.carrier)
        else {
            return;
        };
        standby.flush(now);
        self.retired.returns += 1;
        self.capabilities = primary.capabilities().clone();
        let old = std::mem::replace(&mut self.carrier, Carrier::Primary(primary));
        if let (Carrier::Standby(standby), Carrier::Primary(primary)) = (old, &mut self.carrier) {
            primary.give_standby(standby);
        }
        self.event = Some(DatapathEvent::Changed("the device is there again".to_owned()));
    }
}
