//! A server and its clients, from start to end: what the demo and the benchmark share.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

use crate::cpu::CpuMeter;
use crate::machine::Machine;
use crate::stoq_cli::{self, Datapath, Done, Event, Progress, Running, Side};
use crate::{interrupt, netns};

/// How long a server may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long a transfer may stand still before it counts as broken.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How often the wait loops look at signals and children.
const TICK: Duration = Duration::from_millis(100);
/// Threaded NAPI takes a core per end: below this it would take it from the shards.
const CORES_FOR_THREADED_NAPI: usize = 3;

/// What all processes of one run share.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    /// The binary.
    pub(crate) stoq: PathBuf,
    /// Where clients run.
    pub(crate) client: Side,
    /// Where the server runs.
    pub(crate) server: Side,
    /// Datapath to ask for, at both ends.
    pub(crate) datapath: Datapath,
    /// Queues of the server.
    pub(crate) queues: u32,
    /// Directory for the certificate and the logs.
    pub(crate) directory: PathBuf,
}

impl Session {
    fn certificate(&self) -> PathBuf {
        self.directory.join("server.pem")
    }

    fn log(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    /// Starts the server over `www` and waits until it listens.
    pub(crate) fn start_server(&self, www: &Path) -> Result<Server> {
        let arguments = stoq_cli::serve_arguments(
            &self.server,
            self.datapath,
            self.queues,
            www,
            &self.certificate(),
        );
        let command = self.server.command(&self.stoq, arguments);
        let mut running = Running::spawn("server", command, self.log("server"))?;
        let (address, datapath, mode) = wait_listening(&mut running)?;
        Ok(Server { running, address, datapath, mode })
    }

    /// Starts to fetch one file of the server.
    pub(crate) fn start_get(&self, server: &Server, name: &str, out: &Path) -> Result<Running> {
        let arguments = stoq_cli::get_arguments(
            &self.client,
            self.datapath,
            server.address,
            name,
            out,
            &self.certificate(),
        );
        self.start_client(arguments)
    }

    /// Starts a bulk download.
    pub(crate) fn start_download(&self, server: &Server, seconds: u32) -> Result<Running> {
        let arguments = stoq_cli::download_arguments(
            &self.client,
            self.datapath,
            server.address,
            seconds,
            &self.certificate(),
        );
        self.start_client(arguments)
    }

    fn start_client(&self, arguments: Vec<std::ffi::OsString>) -> Result<Running> {
        let command = self.client.command(&self.stoq, arguments);
        Running::spawn("client", command, self.log("client"))
    }

    /// What AF_XDP alone carries over the same pair, in bits per second as
    /// counted by the receiver. Nothing else may hold the queues meanwhile.
    /// Both sides must be ends of a veth pair.
    pub(crate) fn measure_raw(&self, seconds: u32, payload_bytes: u32) -> Result<f64> {
        let (sender, receiver) = (&self.server, &self.client);
        let command = receiver.command(&self.stoq, stoq_cli::raw_receive_arguments(receiver));
        let mut receiving = Running::spawn("raw receiver", command, self.log("raw-receiver"))?;
        wait_listening(&mut receiving)?;
        let arguments =
            stoq_cli::raw_send_arguments(sender, receiver.address(), seconds, payload_bytes);
        let command = sender.command(&self.stoq, arguments);
        let mut sending = Running::spawn("raw sender", command, self.log("raw-sender"))?;
        let limit = Duration::from_secs(u64::from(seconds)) + STALL_LIMIT;
        wait_done(&mut sending, limit)?;
        let received = wait_done(&mut receiving, limit)?;
        if received.packets == 0 && received.bytes == 0 {
            bail!("the raw receiver saw no packet");
        }
        Ok(received.goodput_bps)
    }
}

/// Waits until a process listens: its address, datapath and mode.
fn wait_listening(running: &mut Running) -> Result<(SocketAddr, String, String)> {
    let deadline = Instant::now() + READY_LIMIT;
    loop {
        interrupt::check()?;
        if let Some(Event::Listening { addr, datapath, mode }) = running.next(TICK)? {
            return Ok((addr, datapath, mode));
        }
        if Instant::now() >= deadline {
            bail!("the {} was not ready within {} s", running.name(), READY_LIMIT.as_secs());
        }
    }
}

fn wait_done(running: &mut Running, limit: Duration) -> Result<Done> {
    let deadline = Instant::now() + limit;
    loop {
        interrupt::check()?;
        if let Some(Event::Done(done)) = running.next(TICK)? {
            running.finish()?;
            return Ok(*done);
        }
        if Instant::now() >= deadline {
            bail!("perf raw did not end within {} s", limit.as_secs());
        }
    }
}

/// A server that listens.
#[derive(Debug)]
pub(crate) struct Server {
    running: Running,
    /// Where.
    pub(crate) address: SocketAddr,
    /// Datapath that it chose.
    pub(crate) datapath: String,
    /// How that runs.
    pub(crate) mode: String,
}

impl Server {
    /// Process ID.
    pub(crate) fn id(&self) -> u32 {
        self.running.id()
    }

    /// Ends it in order and returns its statistics.
    pub(crate) fn stop(&mut self) -> Result<Value> {
        self.running.stop()
    }

    /// Kills it, as a crash would.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.running.kill().map(drop)
    }
}

/// What is shown while a transfer runs.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// As the client reports it.
    pub(crate) progress: Progress,
    /// Percent of a core, per shard of the server.
    pub(crate) server_cpu: Vec<u32>,
    /// Percent of a core, per shard of the client.
    pub(crate) client_cpu: Vec<u32>,
}

/// Follows a client to its end; `draw` is called for each of its reports.
///
/// # Errors
/// When either end dies, when nothing moves for 30 s, and after a signal.
pub(crate) fn follow(
    client: &mut Running,
    server: &mut Server,
    napi: &mut ThreadedNapi,
    mut draw: impl FnMut(&View),
) -> Result<Done> {
    let mut server_cpu = CpuMeter::new(server.id());
    let mut client_cpu = CpuMeter::new(client.id());
    let (mut moved_bytes, mut moved_at) = (0, Instant::now());
    loop {
        interrupt::check()?;
        server.running.check_alive()?;
        napi.enable(server.id(), client.id());
        match client.next(TICK)? {
            Some(Event::Progress(progress)) => {
                if progress.bytes > moved_bytes {
                    (moved_bytes, moved_at) = (progress.bytes, Instant::now());
                }
                draw(&View {
                    progress,
                    server_cpu: server_cpu.sample(),
                    client_cpu: client_cpu.sample(),
                });
            }
            Some(Event::Done(done)) => {
                client.finish()?;
                return Ok(*done);
            }
            _ => {}
        }
        if moved_at.elapsed() > STALL_LIMIT {
            bail!("the transfer has stood still for {} s", STALL_LIMIT.as_secs());
        }
    }
}

/// Kernel threads for the NAPI of both ends: they take the receive work off the
/// sender's core. They end with their interfaces, which end with the run.
#[derive(Debug)]
pub(crate) struct ThreadedNapi {
    server_interface: Option<String>,
    client_interface: Option<String>,
    enabled: bool,
}

impl ThreadedNapi {
    /// To be switched on as soon as the XDP programs are attached; never where
    /// there are too few cores, no pair, or no XDP.
    pub(crate) fn new(machine: &Machine, session: &Session) -> Self {
        let useful =
            machine.cores >= CORES_FOR_THREADED_NAPI && session.datapath == Datapath::AfXdp;
        let interface = |side: &Side| match side {
            Side::Netns(end) if useful => Some(end.interface.clone()),
            _ => None,
        };
        Self {
            server_interface: interface(&session.server),
            client_interface: interface(&session.client),
            enabled: false,
        }
    }

    /// Whether both ends have theirs.
    pub(crate) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Tries at both ends; refusals are normal until XDP is attached.
    fn enable(&mut self, server: u32, client: u32) {
        for (pid, interface) in
            [(server, &mut self.server_interface), (client, &mut self.client_interface)]
        {
            if let Some(name) = interface
                && netns::enable_threaded_napi(pid, name).is_ok()
            {
                *interface = None;
                self.enabled = true;
            }
        }
        self.enabled &= self.server_interface.is_none() && self.client_interface.is_none();
    }
}
