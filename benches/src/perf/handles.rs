//! The perf server once more, with the async handles: what [`super::server`] does on the shard,
//! done by other threads. `stoq serve --handles` runs it, so that both can be measured.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use futures_channel::oneshot;
use futures_util::future::{Either, join, select};
use futures_util::stream::{self, FuturesUnordered, Stream, StreamExt};
use stoq::VarInt;
use stoq::connection::Connection;
use stoq::engine::{Engine, Incoming};
use stoq::error::{ReadError, WriteError};
use stoq::stream::{RecvStream, SendStream};
use stoq_measure::wire::CountReader;

use super::server::filler;

/// The thread that accepts; ends when dropped.
pub struct HandleServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl HandleServer {
    /// Serves every client of `engine`, each by a thread of its own.
    pub fn start(engine: Arc<Engine>) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let accept = move || pollster::block_on(accept(&engine, stopped));
        let thread = std::thread::Builder::new().name("stoq-accept".into()).spawn(accept)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for HandleServer {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the accepting thread panicked");
        }
    }
}

async fn accept(engine: &Engine, mut stopped: oneshot::Receiver<()>) {
    loop {
        let accepting = std::pin::pin!(engine.accept());
        let Either::Left((Some(incoming), _)) = select(accepting, &mut stopped).await else {
            return;
        };
        let serve = move || pollster::block_on(serve(incoming));
        if let Err(error) = std::thread::Builder::new().name("stoq-client".into()).spawn(serve) {
            // The client was dropped with its closure, which refuses it.
            tracing::warn!(%error, "no thread for a client");
        }
    }
}

async fn serve(incoming: Incoming) {
    // A handshake that fails is the client's affair; the shard has counted it.
    let Ok(connection) = incoming.accept().await else { return };
    let mut streams = FuturesUnordered::new();
    let mut opened = std::pin::pin!(accept_streams(&connection));
    loop {
        let next = std::pin::pin!(opened.next());
        if streams.is_empty() {
            match next.await {
                Some((send, recv)) => streams.push(answer(send, recv)),
                None => return,
            }
            continue;
        }
        match select(next, streams.next()).await {
            Either::Left((Some((send, recv)), _)) => streams.push(answer(send, recv)),
            Either::Left((None, _)) => return,
            Either::Right(_one_is_done) => {}
        }
    }
}

/// The streams that the client opens, until the connection ends.
fn accept_streams(connection: &Connection) -> impl Stream<Item = (Option<SendStream>, RecvStream)> {
    let both_ways = stream::unfold(connection, |connection| async move {
        let (send, recv) = connection.accept_bi().await.ok()?;
        Some(((Some(send), recv), connection))
    });
    let one_way = stream::unfold(connection, |connection| async move {
        Some(((None, connection.accept_uni().await.ok()?), connection))
    });
    stream::select(both_ways, one_way)
}

/// Reads the count, discards the rest, sends what was asked for.
async fn answer(send: Option<SendStream>, mut recv: RecvStream) {
    let Some(mut send) = send else {
        if let Err(error) = discard(&mut recv).await {
            tracing::debug!(%error, "a stream was not read to its end");
        }
        return;
    };
    let mut count = CountReader::default();
    let owed = loop {
        if let Some(owed) = count.count() {
            break owed;
        }
        match recv.read_chunk(usize::MAX).await {
            Ok(Some(chunk)) => count.take(&chunk),
            // The draft's request is 8 bytes: fewer are no request.
            Ok(None) | Err(_) => {
                let _ended_before = send.reset(VarInt::from_u32(1));
                return;
            }
        }
    };
    // Both directions at once: neither side may wait for the other to finish.
    let (read, written) = join(discard(&mut recv), fill(&mut send, owed)).await;
    if let Err(error) = read {
        tracing::debug!(%error, "a request was not read to its end");
    }
    if let Err(error) = written {
        tracing::debug!(%error, "an answer was not taken");
    }
}

async fn discard(recv: &mut RecvStream) -> Result<(), ReadError> {
    while recv.read_chunk(usize::MAX).await?.is_some() {}
    Ok(())
}

async fn fill(send: &mut SendStream, mut owed: u64) -> Result<(), WriteError> {
    let filler = filler();
    while owed > 0 {
        let len = owed.min(filler.len() as u64) as usize;
        send.write_chunk(filler.slice(..len)).await?;
        owed -= len as u64;
    }
    send.finish()
}
