//! The `stoq` binary as these commands use it: its arguments and the JSON lines
//! that it prints. This is the whole contract between xtask and stoq-bench.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::netns::End;
use crate::proc::{self, Group};
use crate::workspace::Workspace;

/// Which datapath to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Datapath {
    /// AF_XDP rings fed by the XDP program.
    AfXdp,
    /// io_uring over a kernel UDP socket.
    IoUring,
    /// Plain calls on a kernel UDP socket.
    Socket,
    /// What the engine thinks best.
    Auto,
}

impl Datapath {
    /// The name on the command line and in JSON.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::AfXdp => "af_xdp",
            Self::IoUring => "io_uring",
            Self::Socket => "socket",
            Self::Auto => "auto",
        }
    }
}

/// A JSON line of the `stoq` binary. Fields that are not used here are not listed.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// The server is ready.
    Listening {
        /// Address and port.
        addr: SocketAddr,
        /// Datapath that it runs on.
        datapath: String,
        /// How that runs.
        mode: String,
    },
    /// Once a second.
    Progress(Progress),
    /// The last line of a client.
    Done(Box<Done>),
    /// The last line of a server.
    Stopped {
        /// Its statistics.
        stats: Value,
    },
    /// A line that later versions may print.
    #[serde(other)]
    Other,
}

/// How a transfer goes.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(crate) struct Progress {
    /// Bytes so far.
    pub(crate) bytes: u64,
    /// Seconds so far.
    pub(crate) seconds: f64,
    /// Present rate.
    pub(crate) goodput_bps: f64,
    /// Present round-trip time.
    #[serde(default)]
    pub(crate) rtt_us: f64,
    /// Packets lost so far.
    #[serde(default)]
    pub(crate) packets_lost: u64,
}

/// How a transfer went.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Done {
    /// Files fetched, by `get`.
    pub(crate) files: Vec<FetchedFile>,
    /// Bytes moved, by `perf`.
    pub(crate) bytes: u64,
    /// Time that it took.
    pub(crate) seconds: f64,
    /// Mean rate.
    pub(crate) goodput_bps: f64,
    /// Median round-trip time.
    pub(crate) rtt_us_p50: f64,
    /// Packets lost; null where nobody counts them (`perf raw`).
    #[serde(deserialize_with = "null_is_zero")]
    pub(crate) packets_lost: u64,
    /// Packets received, by `perf raw`.
    pub(crate) packets: u64,
    /// Datapath of this end.
    pub(crate) datapath: String,
    /// How that ran.
    pub(crate) mode: String,
    /// Counters of the XDP program, or null.
    pub(crate) xdp: Value,
}

/// A count that is null where nobody counts.
fn null_is_zero<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A file that `get` has written.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct FetchedFile {
    /// Length.
    pub(crate) bytes: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub(crate) sha256: String,
}

/// Where one end runs: in a namespace of a pair, or here over loopback.
#[derive(Debug, Clone)]
pub(crate) enum Side {
    /// In a namespace, on its interface.
    Netns(End),
    /// In this namespace, over `lo`.
    Loopback,
}

impl Side {
    /// The address of this side.
    pub(crate) fn address(&self) -> Ipv6Addr {
        match self {
            Self::Netns(end) => end.address,
            Self::Loopback => Ipv6Addr::LOCALHOST,
        }
    }

    /// The port that a server here listens on; 0 lets the kernel choose.
    fn port(&self) -> u16 {
        match self {
            Self::Netns(_) => 4433,
            Self::Loopback => 0,
        }
    }

    fn interface(&self) -> Option<&str> {
        match self {
            Self::Netns(end) => Some(&end.interface),
            Self::Loopback => None,
        }
    }

    /// `stoq` with `arguments`, run on this side.
    pub(crate) fn command(&self, stoq: &Path, arguments: Vec<OsString>) -> Command {
        let mut command = match self {
            Self::Netns(end) => end.command(stoq),
            Self::Loopback => Command::new(stoq),
        };
        command.args(arguments);
        command
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn common(arguments: &mut Vec<OsString>, side: &Side, datapath: Datapath) {
    arguments.extend(words(&["--datapath", datapath.name()]));
    if let Some(interface) = side.interface() {
        arguments.extend(words(&["--iface", interface]));
    }
    arguments.extend(words(&["--json", "--die-with-parent"]));
}

/// `stoq serve`: files of `www` over hq-interop, and the perf protocol.
pub(crate) fn serve_arguments(
    side: &Side,
    datapath: Datapath,
    queues: u32,
    www: &Path,
    certificate: &Path,
) -> Vec<OsString> {
    let listen = SocketAddr::new(IpAddr::V6(side.address()), side.port()).to_string();
    let mut arguments = words(&["serve", "--listen", &listen, "--www"]);
    arguments.push(www.into());
    arguments.extend(words(&["--alpn", "hq-interop,perf", "--queues", &queues.to_string()]));
    arguments.push("--cert-out".into());
    arguments.push(certificate.into());
    common(&mut arguments, side, datapath);
    arguments
}

/// `stoq get`: one file into `out`.
pub(crate) fn get_arguments(
    side: &Side,
    datapath: Datapath,
    server: SocketAddr,
    file_name: &str,
    out: &Path,
    certificate: &Path,
) -> Vec<OsString> {
    let mut arguments = words(&["get", &format!("https://{server}/{file_name}"), "--out"]);
    arguments.push(out.into());
    arguments.push("--ca".into());
    arguments.push(certificate.into());
    common(&mut arguments, side, datapath);
    arguments
}

/// `stoq perf download`: bulk from the server for `seconds`.
pub(crate) fn download_arguments(
    side: &Side,
    datapath: Datapath,
    server: SocketAddr,
    seconds: u32,
    certificate: &Path,
) -> Vec<OsString> {
    let (server, seconds) = (server.to_string(), seconds.to_string());
    let mut arguments =
        words(&["perf", "download", "--connect", &server, "--seconds", &seconds, "--ca"]);
    arguments.push(certificate.into());
    common(&mut arguments, side, datapath);
    arguments
}

/// Port of the raw receiver.
const RAW_PORT: u16 = 4434;

/// `stoq perf raw --receive`: takes what comes over AF_XDP alone, no QUIC, until it stops.
pub(crate) fn raw_receive_arguments(side: &Side) -> Vec<OsString> {
    let listen = SocketAddr::new(IpAddr::V6(side.address()), RAW_PORT).to_string();
    let mut arguments = words(&["perf", "raw", "--receive", "--listen", &listen]);
    common(&mut arguments, side, Datapath::AfXdp);
    arguments
}

/// `stoq perf raw`: sends to the raw receiver at `peer`.
pub(crate) fn raw_send_arguments(
    side: &Side,
    peer: Ipv6Addr,
    seconds: u32,
    payload_bytes: u32,
) -> Vec<OsString> {
    let peer = SocketAddr::new(IpAddr::V6(peer), RAW_PORT).to_string();
    let mut arguments = words(&["perf", "raw", "--peer", &peer]);
    arguments.extend(words(&["--seconds", &seconds.to_string()]));
    arguments.extend(words(&["--payload", &payload_bytes.to_string()]));
    common(&mut arguments, side, Datapath::AfXdp);
    arguments
}

/// The binary, built for release. Cargo's own progress goes to standard error.
pub(crate) fn build(workspace: &Workspace) -> Result<PathBuf> {
    let mut command = workspace.cargo();
    command.args(["build", "--release", "--package", "stoq-bench", "--bin", "stoq"]);
    proc::run_visibly(&mut command).context("cannot build the stoq binary")?;
    let binary = workspace.target.join("release/stoq");
    if !binary.is_file() {
        bail!("cargo succeeded, but {} is not there", binary.display());
    }
    Ok(binary)
}

/// A running `stoq` and the events that it prints.
#[derive(Debug)]
pub(crate) struct Running {
    name: &'static str,
    group: Group,
    events: Receiver<Result<Event, String>>,
    log: PathBuf,
}

impl Running {
    /// Starts it; its standard error goes to `log`.
    pub(crate) fn spawn(name: &'static str, mut command: Command, log: PathBuf) -> Result<Self> {
        use std::io::Write as _;
        let mut file = proc::append(&log)?;
        writeln!(file, "$ {}", proc::describe(&command))
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut group = Group::spawn(command.stdout(Stdio::piped()).stderr(file))
            .with_context(|| format!("cannot start the {name}"))?;
        let stdout = group.child_mut().stdout.take().expect("stdout is a pipe");
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let event = line.map_err(|error| error.to_string()).and_then(|line| parse(&line));
                let broken = event.is_err();
                if sender.send(event).is_err() || broken {
                    return;
                }
            }
        });
        Ok(Self { name, group, events, log })
    }

    /// What it is, in messages.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Process ID.
    pub(crate) fn id(&self) -> u32 {
        self.group.id()
    }

    /// The next event, or `None` when there is none within `timeout`.
    ///
    /// # Errors
    /// When the process has ended or printed something else than events.
    pub(crate) fn next(&mut self, timeout: Duration) -> Result<Option<Event>> {
        match self.events.recv_timeout(timeout) {
            Ok(Ok(event)) => Ok(Some(event)),
            Ok(Err(text)) => bail!("the {} printed no JSON event: {text}", self.name),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.group.wait_until(Instant::now() + proc::GRACE)?;
                bail!(self.death(status));
            }
        }
    }

    /// Fails when the process has ended.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        match self.group.try_wait()? {
            None => Ok(()),
            status => bail!(self.death(status)),
        }
    }

    /// Waits until the process has ended by itself, and fails when that was no success.
    pub(crate) fn finish(&mut self) -> Result<()> {
        match self.group.wait_until(Instant::now() + proc::GRACE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!(self.death(Some(status))),
            None => bail!("the {} is done but does not end", self.name),
        }
    }

    /// Asks it to end and returns the statistics of its last line.
    ///
    /// # Errors
    /// When it ends without the `stopped` event, or not within the grace time.
    pub(crate) fn stop(&mut self) -> Result<Value> {
        let status = self.group.terminate(proc::GRACE)?;
        while let Ok(event) = self.events.recv_timeout(proc::GRACE) {
            if let Ok(Event::Stopped { stats }) = event {
                return Ok(stats);
            }
        }
        bail!("no statistics at its end; {}", self.death(Some(status)));
    }

    /// Kills it, as a crash would.
    pub(crate) fn kill(&mut self) -> Result<ExitStatus> {
        self.group.kill()
    }

    fn death(&self, status: Option<ExitStatus>) -> String {
        let how = status.map_or_else(|| "closed its output".into(), proc::explain);
        let tail = proc::tail(&self.log, 20).unwrap_or_else(|error| format!("{error:#}"));
        format!("the {} {how}; the end of its log:\n{tail}", self.name)
    }
}

fn parse(line: &str) -> Result<Event, String> {
    serde_json::from_str(line).map_err(|error| format!("{error} in {line:?}"))
}

/// Adds the numbers of `counters` to those of `sum`, field by field; null adds nothing.
pub(crate) fn add_counters(sum: &mut Value, counters: &Value) {
    match (sum, counters) {
        (_, Value::Null) => {}
        (sum @ Value::Null, counters) => *sum = counters.clone(),
        (Value::Object(sum), Value::Object(counters)) => {
            for (name, value) in counters {
                add_counters(sum.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (Value::Number(sum), Value::Number(more)) => {
            if let (Some(a), Some(b)) = (sum.as_u64(), more.as_u64()) {
                *sum = a.saturating_add(b).into();
            }
        }
        (sum, counters) => *sum = counters.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::netns::VethPair;

    fn text(arguments: &[OsString]) -> String {
        arguments.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn arguments_over_loopback() {
        let (www, pem) = (Path::new("/w"), Path::new("/c.pem"));
        let arguments = serve_arguments(&Side::Loopback, Datapath::Auto, 2, www, pem);
        assert_eq!(
            text(&arguments),
            "serve --listen [::1]:0 --www /w --alpn hq-interop,perf --queues 2 \
             --cert-out /c.pem --datapath auto --json --die-with-parent"
        );
        let server = "[::1]:4433".parse().unwrap();
        let out = Path::new("/o");
        let arguments = get_arguments(&Side::Loopback, Datapath::Socket, server, "f", out, pem);
        assert_eq!(
            text(&arguments),
            "get https://[::1]:4433/f --out /o --ca /c.pem --datapath socket --json --die-with-parent"
        );
    }

    #[test]
    fn arguments_in_a_namespace() {
        let (client, server) = VethPair::ends("1");
        let peer = server.address;
        let address = "[fd53:746f:71::b]:4433".parse().unwrap();
        let side = Side::Netns(client.clone());
        let pem = Path::new("/c");
        assert_eq!(
            text(&download_arguments(&side, Datapath::AfXdp, address, 5, pem)),
            "perf download --connect [fd53:746f:71::b]:4433 --seconds 5 --ca /c \
             --datapath af_xdp --iface stoqa --json --die-with-parent"
        );
        assert_eq!(
            text(&raw_receive_arguments(&side)),
            "perf raw --receive --listen [fd53:746f:71::a]:4434 --datapath af_xdp --iface stoqa \
             --json --die-with-parent"
        );
        assert_eq!(
            text(&raw_send_arguments(&side, peer, 3, 1452)),
            "perf raw --peer [fd53:746f:71::b]:4434 --seconds 3 --payload 1452 \
             --datapath af_xdp --iface stoqa --json --die-with-parent"
        );
        let command = proc::describe(&side.command(Path::new("/stoq"), vec!["x".into()]));
        assert!(command.ends_with("netns exec stoq-1-a /stoq x"), "{command}");
    }

    #[test]
    fn events() {
        let line = r#"{"event":"listening","addr":"[::1]:4433","datapath":"af_xdp","mode":"copy","queues":1}"#;
        assert!(matches!(parse(line), Ok(Event::Listening { addr, .. }) if addr.port() == 4433));
        let line = r#"{"event":"progress","bytes":9,"seconds":1.0,"goodput_bps":72.5,"rtt_us":80,"packets_lost":0}"#;
        assert!(matches!(parse(line), Ok(Event::Progress(progress)) if progress.bytes == 9));
        let line = r#"{"event":"done","files":[{"url":"u","bytes":1,"sha256":"ab"}],"seconds":2,
            "goodput_bps":3,"rtt_us_p50":4,"packets_lost":5,"datapath":"socket","mode":"gso+gro","xdp":null}"#;
        let Ok(Event::Done(done)) = parse(line) else { panic!("no done event") };
        assert_eq!((done.files[0].bytes, done.packets_lost), (1, 5));
        let line =
            r#"{"event":"done","workload":"raw","bytes":7,"packets":4900812,"packets_lost":null}"#;
        let Ok(Event::Done(done)) = parse(line) else { panic!("no done event of raw") };
        assert_eq!((done.packets, done.packets_lost), (4_900_812, 0));
        assert!(matches!(parse(r#"{"event":"new"}"#), Ok(Event::Other)));
        assert!(parse("ready").unwrap_err().contains("ready"));
        assert!(parse(r#"{"event":"progress"}"#).is_err());
    }

    #[test]
    fn counters_add_up() {
        let mut sum = Value::Null;
        add_counters(&mut sum, &json!({"redirected": 3, "passed": {"arp": 1}}));
        add_counters(&mut sum, &Value::Null);
        add_counters(&mut sum, &json!({"redirected": 4, "passed": {"arp": 1}, "new": 1}));
        assert_eq!(sum, json!({"redirected": 7, "passed": {"arp": 2}, "new": 1}));
    }

    #[test]
    fn the_end_of_a_process_is_reported_with_its_log() {
        let log = std::env::temp_dir().join(format!("stoq-running-{}.log", std::process::id()));
        let mut command = Command::new("sh");
        command.args(["-c", "echo 'no such interface' >&2; exit 4"]);
        let mut running = Running::spawn("server", command, log.clone()).unwrap();
        let error = running.next(Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("exit code 4") && error.contains("no such interface"), "{error}");
        std::fs::remove_file(log).unwrap();
    }
}
