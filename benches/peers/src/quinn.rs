//! quinn as a peer to compare with.

#[path = "quinn_family.rs"]
mod quinn_family;

use bytes::Bytes;
use quinn as q;

const STACK: &str = "quinn";

/// The next bytes of a stream.
async fn chunk(recv: &mut q::RecvStream) -> anyhow::Result<Option<Bytes>> {
    Ok(recv.read_chunk(usize::MAX, true).await?.map(|chunk| chunk.bytes))
}

/// The UDP payload and the packets lost on the path.
fn path(connection: &q::Connection) -> (Option<u64>, Option<u64>) {
    let path = connection.stats().path;
    (Some(path.current_mtu.into()), Some(path.lost_packets))
}

fn main() -> anyhow::Result<()> {
    quinn_family::main()
}
