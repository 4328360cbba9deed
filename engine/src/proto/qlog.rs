//! One qlog file per connection, where `qlog_dir` asks for it.
//!
//! A tool for looking into a connection: events are written by the shard's own thread, which costs
//! more than the packets do. A file that cannot be made is logged; its connection goes on without.

use std::fs::OpenOptions;
use std::io::BufWriter;
use std::path::PathBuf;
use std::time::Instant;

use quinn_proto::{QlogConfig, QlogStream, Side};

/// Names and opens the files of one shard.
pub(super) struct QlogFiles {
    directory: PathBuf,
    shard: usize,
    opened: u64,
}

impl QlogFiles {
    pub(super) fn new(directory: PathBuf, shard: usize) -> Self {
        Self { directory, shard, opened: 0 }
    }

    /// A stream into a new file, `stoq-<process>-<shard>-<number>-<side>.sqlog` (JSON text sequences,
    /// draft-ietf-quic-qlog-main-schema, §11.2).
    pub(super) fn open(&mut self, now: Instant, side: Side) -> Option<QlogStream> {
        let side = match side {
            Side::Client => "client",
            Side::Server => "server",
        };
        let (process, shard) = (std::process::id(), self.shard);
        // Another engine of this process may have taken a number.
        let file = loop {
            self.opened += 1;
            let name = format!("stoq-{process}-{shard}-{:06}-{side}.sqlog", self.opened);
            let path = self.directory.join(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break file,
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let path = path.display();
                    tracing::warn!(%path, %error, "no qlog for a connection: check `qlog_dir`");
                    return None;
                }
            }
        };
        let mut config = QlogConfig::default();
        config
            .writer(Box::new(BufWriter::new(file)))
            .title(Some(format!("STOQ {side}, shard {shard}")))
            .start_time(now);
        config.into_stream()
    }
}
