use super::*;
pub struct Null(Capabilities);
impl Datapath for Null {
    fn capabilities(&self) -> &Capabilities {
        &self.0
    }
    fn local_addr(&self) -> SocketAddrV6 {
        unimplemented!()
    }
    fn receive(&mut self, _: Instant, _: &mut RxBatch) {}
    fn transmit_capacity(&self) -> usize {
        0
    }
    fn transmit(&mut self, _: &TxMeta, _: &[u8]) -> TxVerdict {
        TxVerdict::Full
    }
    fn flush(&mut self, _: Instant) {}
    fn poll_event(&mut self) -> Option<DatapathEvent> {
        None
    }
    fn max_udp_payload(&self, _: &SocketAddrV6) -> u16 {
        1200
    }
    fn wait(&mut self, _: BorrowedFd<'_>, _: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }
    fn counters(&self) -> DatapathCounters {
        DatapathCounters::default()
    }
}
