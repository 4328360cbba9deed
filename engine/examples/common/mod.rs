//! What every example needs: a certificate made on the spot, and clients that trust it.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;

use quinn_proto::crypto::{ClientConfig, ServerConfig};
use stoq::certs::{CertsError, ClientTls, IdentityNames, RotatingIdentity, ServerTls};
use stoq::config::TransportConfig;

pub(crate) const NAME: &str = "example.test";
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The server's side and the client's.
pub(crate) type Tls = (Arc<dyn ServerConfig>, Arc<dyn ClientConfig>);

/// A self-signed server and a client that trusts exactly this server.
pub(crate) fn tls() -> Result<Tls, CertsError> {
    let identity = RotatingIdentity::self_signed(IdentityNames::new().with_dns(NAME)?).start()?;
    let client = ClientTls::builder().alpn(["example"]).roots(identity.roots().to_vec()).build()?;
    let server = ServerTls::builder().identity(identity).alpn(["example"]).build()?;
    Ok((server.crypto(), client.crypto()))
}

/// `::1`, any port. The datapath is chosen by the engine.
pub(crate) fn config() -> TransportConfig {
    TransportConfig { bind: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0), ..Default::default() }
}
