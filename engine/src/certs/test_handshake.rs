//! In-memory handshakes through the same sessions that quinn-proto drives.

use std::sync::Arc;

use quinn_proto::crypto::Session;
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{Side, TransportError};

use super::tls::{ClientTls, ServerTls};

/// Both ends after a handshake that succeeded.
pub(super) struct Done {
    pub(super) client: Box<dyn Session>,
    pub(super) server: Box<dyn Session>,
}

/// Which end gave up, and why.
#[derive(Debug)]
pub(super) enum Failed {
    Client(TransportError),
    Server(TransportError),
}

impl Failed {
    pub(super) fn error(&self) -> &TransportError {
        match self {
            Self::Client(error) | Self::Server(error) => error,
        }
    }
}

pub(super) fn handshake(
    client: &ClientTls,
    server: &ServerTls,
    server_name: &str,
) -> Result<Done, Failed> {
    let params = TransportParameters::read(Side::Server, &mut &[][..])
        .expect("every parameter has a default (RFC 9000, section 18.2)");
    let mut client = client.crypto().start_session(1, server_name, &params).expect("a server name");
    let mut server = Arc::clone(&server.crypto()).start_session(1, &params);
    finish_handshake(&mut *client, &mut *server)?;
    Ok(Done { client, server })
}

/// Carries flights back and forth until nobody has anything to say.
pub(super) fn finish_handshake(
    client: &mut dyn Session,
    server: &mut dyn Session,
) -> Result<(), Failed> {
    // Flights alternate; tickets follow the handshake.
    for _ in 0..8 {
        pass(client, server).map_err(Failed::Server)?;
        pass(server, client).map_err(Failed::Client)?;
    }
    assert!(!client.is_handshaking() && !server.is_handshaking(), "the handshake hangs");
    Ok(())
}

/// Hands over what `from` has to say, one encryption level at a time.
fn pass(from: &mut dyn Session, to: &mut dyn Session) -> Result<(), TransportError> {
    loop {
        let mut flight = Vec::new();
        let new_keys = from.write_handshake(&mut flight).is_some();
        if !flight.is_empty() {
            to.read_handshake(&flight)?;
        }
        if !new_keys && flight.is_empty() {
            return Ok(());
        }
    }
}
