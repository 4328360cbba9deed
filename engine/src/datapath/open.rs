//! From a configuration to open datapaths, one per shard.
//!
//! A datapath that was demanded is opened or refused with the fix; `Auto` takes
//! the best that this machine gives and remembers why.

use std::net::SocketAddrV6;

use super::Datapath;
use super::af_xdp::{AfXdp, AfXdpConfig, InterfaceHandle, ZeroCopy, open_interface};
use super::choice::DatapathChoice;
use super::socket::SocketDatapath;
use super::udp_socket::SocketConfig;
use crate::config::TransportConfig;
use crate::error::StartError;

/// Open datapaths of one kind, in shard order.
pub enum Datapaths {
    /// AF_XDP rings, one device queue each.
    AfXdp(Vec<AfXdp>),
    /// Plain kernel sockets that share the port.
    Socket(Vec<SocketDatapath>),
}

/// The XDP program's counters, readable from any thread while the engine lives.
#[derive(Clone)]
pub struct XdpHandle(InterfaceHandle);

impl XdpHandle {
    /// Every counter with its name.
    ///
    /// # Errors
    /// When the kernel does not answer, or the interface's program is gone.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, String> {
        match self.0.xdp_counters() {
            None => Err("the XDP program is gone".into()),
            Some(Err(error)) => Err(error.to_string()),
            Some(Ok(counters)) => Ok(counters.iter().collect()),
        }
    }
}

/// What was opened and why.
pub struct Opened {
    /// The datapaths.
    pub datapaths: Datapaths,
    /// Why this kind, and why not a better one; one sentence each.
    pub reasons: Vec<String>,
    /// The XDP program, where one runs.
    pub xdp: Option<XdpHandle>,
}

impl Opened {
    /// The address that all of them are bound to.
    ///
    /// # Panics
    /// Never: at least one datapath was opened.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddrV6 {
        match &self.datapaths {
            Datapaths::AfXdp(paths) => paths.first().map(Datapath::local_addr),
            Datapaths::Socket(paths) => paths.first().map(Datapath::local_addr),
        }
        .expect("a configuration has at least one shard")
    }
}

/// Opens the datapaths that `config` asks for.
///
/// # Errors
/// What was demanded cannot be had: the text names it and the fix.
pub fn open(config: &TransportConfig) -> Result<Opened, StartError> {
    match config.datapath {
        DatapathChoice::AfXdp => open_af_xdp(config),
        DatapathChoice::Auto | DatapathChoice::IoUring | DatapathChoice::Socket => {
            open_sockets(config)
        }
    }
}

fn open_af_xdp(config: &TransportConfig) -> Result<Opened, StartError> {
    let interface = config.interface.clone().expect("validated: AF_XDP names an interface");
    let shards = u32::try_from(config.shards).expect("validated: at most 256");
    let mut af_xdp = AfXdpConfig::new(interface, config.bind);
    af_xdp.queues = (config.first_queue..config.first_queue + shards).collect();
    af_xdp.zero_copy =
        if config.require_zero_copy { ZeroCopy::Require } else { ZeroCopy::Prefer };
    af_xdp.allow_skb_mode = config.allow_skb_mode;
    let paths = open_interface(&af_xdp).map_err(|error| refused("af_xdp", &error))?;
    let xdp = paths.first().map(|path| XdpHandle(path.interface()));
    let reasons = vec!["af_xdp: asked for".to_owned()];
    Ok(Opened { datapaths: Datapaths::AfXdp(paths), reasons, xdp })
}

fn open_sockets(config: &TransportConfig) -> Result<Opened, StartError> {
    let mut paths: Vec<SocketDatapath> = Vec::with_capacity(config.shards);
    for _ in 0..config.shards {
        // The first socket chooses the port, the others join it.
        let local = paths.first().map_or(config.bind, Datapath::local_addr);
        let mut socket = SocketConfig::new(local);
        socket.reuse_port = config.shards > 1;
        paths.push(SocketDatapath::open(socket).map_err(|error| refused("socket", &error))?);
    }
    let reasons = vec![format!("socket: chosen for `{}`", config.datapath)];
    Ok(Opened { datapaths: Datapaths::Socket(paths), reasons, xdp: None })
}

fn refused(datapath: &'static str, error: &dyn std::fmt::Display) -> StartError {
    StartError::Datapath { datapath, reason: error.to_string() }
}
