//! noq, a fork of quinn, as a peer to compare with.

#[path = "quinn_family.rs"]
mod quinn_family;

use bytes::Bytes;
use noq as q;

const STACK: &str = "noq";

/// The next bytes of a stream.
async fn chunk(recv: &mut q::RecvStream) -> anyhow::Result<Option<Bytes>> {
    Ok(recv.read_chunk(usize::MAX).await?)
}

/// The UDP payload and the packets lost on the path.
fn path(connection: &q::Connection) -> (Option<u64>, Option<u64>) {
    match connection.path_stats(q::PathId::ZERO) {
        Some(path) => (Some(path.current_mtu.into()), Some(path.lost_packets)),
        None => (None, None),
    }
}

fn main() -> anyhow::Result<()> {
    quinn_family::main()
}
