//! `hq-interop`: `GET /path\r\n`, answered with the bytes of the file.
//!
//! Files are read by a few threads of their own, so that a slow disk never holds a
//! shard: a thread reads ahead a bounded number of chunks and sends each to the
//! shard as a message.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::Context;
use bytes::{Bytes, BytesMut};
use stoq::StreamId;
use stoq::app::{AppSender, ConnId, ReadOutcome, ShardCx, WriteOutcome};

/// Longest request line, bytes.
const REQUEST_BYTES_MAX: usize = 4096;
/// Bytes of one chunk of a file.
const CHUNK_BYTES: usize = 256 * 1024;
/// Chunks of one stream that are read ahead.
const CHUNKS_AHEAD_MAX: usize = 16;
/// Threads that read files.
const READERS: usize = 2;
/// Reads that wait for a thread at most; beyond, requests are refused.
const READS_QUEUED_MAX: usize = 4096;
/// Stream error code for a file that does not exist or a malformed request.
pub const NOT_FOUND: u32 = 0x4;
/// Stream error code for a file that could not be read to its end.
pub const READ_FAILED: u32 = 0x5;

/// A part of a file for a stream, as a message to the shard.
pub struct FileChunk {
    conn: ConnId,
    stream: StreamId,
    offset: u64,
    data: Result<Bytes, std::io::Error>,
}

struct ReadRequest {
    file: Arc<File>,
    offset: u64,
    len: usize,
    conn: ConnId,
    stream: StreamId,
    shard: AppSender,
}

/// The threads that read files.
#[derive(Clone)]
pub struct FileReaders {
    requests: SyncSender<ReadRequest>,
    root: Arc<PathBuf>,
}

impl FileReaders {
    /// Starts the threads, serving files beneath `root`.
    pub fn start(root: &Path) -> anyhow::Result<Self> {
        let root = root
            .canonicalize()
            .with_context(|| format!("--www {}: no such directory", root.display()))?;
        let (requests, queue) = sync_channel(READS_QUEUED_MAX);
        let queue = Arc::new(std::sync::Mutex::new(queue));
        for number in 0..READERS {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("stoq-files-{number}"))
                .spawn(move || read_files(&queue))
                .context("starting a file reader")?;
        }
        Ok(Self { requests, root: Arc::new(root) })
    }

    /// The file behind a request path, if it is a regular file beneath the root.
    fn open(&self, path: &str) -> Option<(Arc<File>, u64)> {
        let relative = Path::new(path.strip_prefix('/')?);
        if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
            return None;
        }
        // Resolved, so that a symbolic link cannot lead out of the root.
        let full = self.root.join(relative).canonicalize().ok()?;
        if !full.starts_with(&*self.root) {
            return None;
        }
        let file = File::open(full).ok()?;
        let metadata = file.metadata().ok()?;
        metadata.is_file().then(|| (Arc::new(file), metadata.len()))
    }
}

fn read_files(queue: &std::sync::Mutex<Receiver<ReadRequest>>) {
    loop {
        let request = {
            let queue = queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            queue.recv()
        };
        let Ok(ReadRequest { file, offset, len, conn, stream, shard }) = request else { return };
        let mut buffer = BytesMut::zeroed(len);
        let data = file.read_exact_at(&mut buffer, offset).map(|()| buffer.freeze());
        let mut message: Box<dyn std::any::Any + Send> =
            Box::new(FileChunk { conn, stream, offset, data });
        while let Err(back) = shard.send(message) {
            if shard.is_closed() {
                break;
            }
            message = back;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// One request on its stream.
#[derive(Default)]
pub struct HqStream {
    request: Vec<u8>,
    file: Option<Arc<File>>,
    size: u64,
    /// Bytes asked of the readers.
    asked: u64,
    /// Bytes given to the stream.
    sent: u64,
    under_way: usize,
    /// Chunks that arrived, in order: they wait for the stream's credit.
    ready: std::collections::VecDeque<Bytes>,
    /// Chunks that arrived before an earlier one (several threads read), by offset.
    early: std::collections::BTreeMap<u64, Bytes>,
    /// Offset behind the last chunk in `ready`.
    in_order: u64,
}

impl HqStream {
    /// Reads the request; `false` when the stream is over.
    pub fn handle_readable(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
        readers: &FileReaders,
    ) -> bool {
        if self.file.is_some() {
            return true;
        }
        loop {
            let request = &mut self.request;
            let outcome = cx.read(conn, stream, REQUEST_BYTES_MAX + 1, |data| {
                request.extend_from_slice(&data);
            });
            match outcome {
                ReadOutcome::Finished => break,
                _ if self.request.len() > REQUEST_BYTES_MAX => return refuse(cx, conn, stream),
                ReadOutcome::Blocked => return true,
                ReadOutcome::MayHaveMore => {}
                ReadOutcome::Reset(_) | ReadOutcome::Unknown => {
                    return refuse(cx, conn, stream);
                }
            }
        }
        let Some((file, size)) = parse(&self.request).and_then(|path| readers.open(path)) else {
            return refuse(cx, conn, stream);
        };
        (self.file, self.size) = (Some(file), size);
        self.ask(cx, conn, stream, readers) && self.send(cx, conn, stream)
    }

    /// Keeps the readers ahead of the stream; `false` when the stream is over.
    fn ask(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
        readers: &FileReaders,
    ) -> bool {
        let Some(file) = &self.file else { return true };
        while self.asked < self.size
            && self.under_way + self.early.len() + self.ready.len() < CHUNKS_AHEAD_MAX
        {
            let len = (self.size - self.asked).min(CHUNK_BYTES as u64) as usize;
            let request = ReadRequest {
                file: file.clone(),
                offset: self.asked,
                len,
                conn,
                stream,
                shard: cx.sender(),
            };
            if readers.requests.try_send(request).is_err() {
                cx.reset(conn, stream, READ_FAILED.into());
                return false;
            }
            self.asked += len as u64;
            self.under_way += 1;
        }
        true
    }

    /// A chunk arrived; `false` when the stream is over.
    pub fn handle_chunk(
        &mut self,
        cx: &mut ShardCx<'_>,
        chunk: FileChunk,
        readers: &FileReaders,
    ) -> bool {
        let FileChunk { conn, stream, offset, data } = chunk;
        self.under_way -= 1;
        let Ok(data) = data else {
            cx.reset(conn, stream, READ_FAILED.into());
            return false;
        };
        self.early.insert(offset, data);
        while let Some(data) = self.early.remove(&self.in_order) {
            self.in_order += data.len() as u64;
            self.ready.push_back(data);
        }
        self.send(cx, conn, stream) && self.ask(cx, conn, stream, readers)
    }

    /// Writes what is ready; `false` when the stream is over.
    fn send(&mut self, cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) -> bool {
        while let Some(chunk) = self.ready.pop_front() {
            let mut chunks = [chunk];
            let outcome = cx.write(conn, stream, &mut chunks);
            let [rest] = chunks;
            match outcome {
                WriteOutcome::Written(bytes) => self.sent += bytes as u64,
                WriteOutcome::Blocked => {}
                WriteOutcome::Stopped(_) => {
                    cx.reset(conn, stream, 0u32.into());
                    return false;
                }
                WriteOutcome::Unknown => return false,
            }
            if !rest.is_empty() {
                self.ready.push_front(rest);
                return true;
            }
        }
        if self.sent == self.size {
            cx.finish(conn, stream);
            return false;
        }
        true
    }

    /// The stream has credit again; `false` when the stream is over.
    pub fn handle_writable(
        &mut self,
        cx: &mut ShardCx<'_>,
        conn: ConnId,
        stream: StreamId,
        readers: &FileReaders,
    ) -> bool {
        self.file.is_none() || (self.send(cx, conn, stream) && self.ask(cx, conn, stream, readers))
    }
}

impl FileChunk {
    /// The stream that it is for.
    pub fn stream(&self) -> (ConnId, StreamId) {
        (self.conn, self.stream)
    }
}

fn refuse(cx: &mut ShardCx<'_>, conn: ConnId, stream: StreamId) -> bool {
    cx.stop(conn, stream, NOT_FOUND.into());
    cx.reset(conn, stream, NOT_FOUND.into());
    false
}

/// The path of a request line; the line break is optional because the FIN ends it too.
fn parse(request: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(request).ok()?;
    let line = line.strip_suffix("\r\n").or_else(|| line.strip_suffix('\n')).unwrap_or(line);
    let path = line.strip_prefix("GET ")?;
    (path.starts_with('/') && !path.contains(['\r', '\n'])).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_lines() {
        assert_eq!(parse(b"GET /a/b.bin\r\n"), Some("/a/b.bin"));
        assert_eq!(parse(b"GET /a"), Some("/a"));
        for bad in [&b"PUT /a\r\n"[..], b"GET a\r\n", b"", b"GET /a\r\nGET /b\r\n", b"GET /\xff"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn files_outside_the_root_do_not_exist() {
        let root = std::env::temp_dir().join(format!("stoq-hq-{}", std::process::id()));
        std::fs::create_dir_all(root.join("www")).expect("temp dir");
        std::fs::write(root.join("secret"), b"s").expect("write");
        std::fs::write(root.join("www/public"), b"p").expect("write");
        std::os::unix::fs::symlink(root.join("secret"), root.join("www/link")).expect("link");
        let readers = FileReaders::start(&root.join("www")).expect("start");
        assert!(readers.open("/public").is_some());
        for path in ["/../secret", "/link", "/", "/missing", "//etc/passwd", "/public/x"] {
            assert!(readers.open(path).is_none(), "{path}");
        }
        std::fs::remove_dir_all(root).expect("clean up");
    }
}
