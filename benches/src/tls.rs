//! Certificates of the commands.

use std::net::SocketAddrV6;
use std::path::Path;
use std::sync::Arc;

use stoq::quic::{QuicClientConfig, QuicServerConfig};

/// What a server shows.
pub struct ServerOptions<'a> {
    /// Its address; part of a self-made certificate.
    pub listen: SocketAddrV6,
    /// Further names.
    pub names: &'a [String],
    /// Application protocols.
    pub alpn: &'a [String],
    /// Chain and key, PEM.
    pub cert: Option<&'a Path>,
    /// The key.
    pub key: Option<&'a Path>,
    /// Where to write what clients shall trust.
    pub cert_out: Option<&'a Path>,
}
