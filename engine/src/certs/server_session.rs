//! A server's TLS session that keeps, once the handshake is over, only what QUIC still needs.
//!
//! rustls's connection holds about 6 kB that a QUIC server never looks at again: the transcript's
//! buffers, the record layer's keys (QUIC has none of its records), the ClientHello. A client
//! may send nothing in TLS after its Finished (RFC 9001 §4.1, §6: key updates are QUIC's own), so
//! the connection is dropped when the last ticket has been written. What stays are the secrets of
//! the next keys, the names that the handshake settled, and the client's certificates.
//!
//! The exporter's secret (RFC 8446 §7.5) goes with it: the engine offers no exported keying material.

use std::any::Any;
use std::io::Cursor;
use std::sync::Arc;

use quinn_proto::crypto::rustls::HandshakeData;
use quinn_proto::crypto::{
    ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, Session,
};
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{ConnectionId, Side, TransportError, TransportErrorCode};
use rustls::quic::{KeyChange, Secrets, ServerConnection, Suite, Version};
use rustls_pki_types::CertificateDer;

/// RFC 8446 §6.2.
const UNEXPECTED_MESSAGE: u8 = 10;

/// What a handshake settled.
struct Settled {
    protocol: Option<Vec<u8>>,
    server_name: Option<String>,
    client_chain: Option<Vec<CertificateDer<'static>>>,
}

enum State {
    Handshake(Box<ServerConnection>),
    Over(Box<Settled>),
}

/// See the [module documentation](self).
pub(super) struct ServerSession {
    state: State,
    initial: Suite,
    version: Version,
    got_handshake_data: bool,
    next_secrets: Option<Secrets>,
}

fn chain_of(connection: &ServerConnection) -> Option<Vec<CertificateDer<'static>>> {
    let chain = connection.peer_certificates()?;
    Some(chain.iter().map(|certificate| certificate.clone().into_owned()).collect())
}

fn keys(keys: rustls::quic::Keys) -> Keys {
    Keys {
        header: KeyPair {
            local: Box::new(keys.local.header),
            remote: Box::new(keys.remote.header),
        },
        packet: KeyPair {
            local: Box::new(keys.local.packet),
            remote: Box::new(keys.remote.packet),
        },
    }
}

impl ServerSession {
    /// # Panics
    /// If `config` cannot serve QUIC: that was checked when it was built.
    pub(super) fn new(
        config: Arc<rustls::ServerConfig>,
        initial: Suite,
        version: Version,
        params: &TransportParameters,
    ) -> Self {
        let mut encoded = Vec::new();
        params.write(&mut encoded);
        let connection = ServerConnection::new(config, version, encoded)
            .expect("the configuration has TLS 1.3 and a cipher suite for QUIC");
        Self {
            state: State::Handshake(Box::new(connection)),
            initial,
            version,
            got_handshake_data: false,
            next_secrets: None,
        }
    }

    fn settled(&self) -> Settled {
        match &self.state {
            State::Handshake(connection) => Settled {
                protocol: connection.alpn_protocol().map(<[u8]>::to_vec),
                server_name: connection.server_name().map(str::to_owned),
                client_chain: chain_of(connection),
            },
            State::Over(settled) => Settled {
                protocol: settled.protocol.clone(),
                server_name: settled.server_name.clone(),
                client_chain: settled.client_chain.clone(),
            },
        }
    }
}

impl Session for ServerSession {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        let side = match side {
            Side::Client => rustls::Side::Client,
            Side::Server => rustls::Side::Server,
        };
        keys(self.initial.keys(dst_cid, side, self.version))
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        if !self.got_handshake_data {
            return None;
        }
        let Settled { protocol, server_name, .. } = self.settled();
        Some(Box::new(HandshakeData { protocol, server_name }))
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        Some(Box::new(self.settled().client_chain?))
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        let State::Handshake(connection) = &self.state else { return None };
        let keys = connection.zero_rtt_keys()?;
        Some((Box::new(keys.header), Box::new(keys.packet)))
    }

    fn early_data_accepted(&self) -> Option<bool> {
        // Only clients are told.
        None
    }

    fn is_handshaking(&self) -> bool {
        match &self.state {
            State::Handshake(connection) => connection.is_handshaking(),
            State::Over(_) => false,
        }
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        let State::Handshake(connection) = &mut self.state else {
            return Err(TransportError {
                code: TransportErrorCode::crypto(UNEXPECTED_MESSAGE),
                frame: None,
                reason: "a TLS message after the client's Finished".into(),
            });
        };
        connection.read_hs(buf).map_err(|error| match connection.alert() {
            Some(alert) => TransportError {
                code: TransportErrorCode::crypto(alert.into()),
                frame: None,
                reason: error.to_string(),
            },
            None => TransportError {
                code: TransportErrorCode::PROTOCOL_VIOLATION,
                frame: None,
                reason: format!("TLS error: {error}"),
            },
        })?;
        // rustls does not say when the ClientHello has been read: its results do.
        let is_known = connection.alpn_protocol().is_some()
            || connection.server_name().is_some()
            || !connection.is_handshaking();
        let is_new = is_known && !self.got_handshake_data;
        self.got_handshake_data |= is_known;
        Ok(is_new)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let State::Handshake(connection) = &self.state else { return Ok(None) };
        let Some(encoded) = connection.quic_transport_parameters() else { return Ok(None) };
        // What a server reads are a client's.
        Ok(Some(TransportParameters::read(Side::Server, &mut Cursor::new(encoded))?))
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let State::Handshake(connection) = &mut self.state else { return None };
        let before = buf.len();
        match connection.write_hs(buf) {
            Some(KeyChange::Handshake { keys: new }) => Some(keys(new)),
            Some(KeyChange::OneRtt { keys: new, next }) => {
                self.next_secrets = Some(next);
                Some(keys(new))
            }
            None => {
                // Asked until nothing is left to write: the tickets have gone, too.
                let is_over = !connection.is_handshaking() && self.next_secrets.is_some();
                if is_over && buf.len() == before {
                    self.state = State::Over(Box::new(self.settled()));
                }
                None
            }
        }
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.next_secrets.as_mut()?.next_packet_keys();
        Some(KeyPair { local: Box::new(keys.local), remote: Box::new(keys.remote) })
    }

    fn is_valid_retry(&self, _dcid: &ConnectionId, _header: &[u8], _payload: &[u8]) -> bool {
        // Only servers send Retry packets.
        false
    }

    fn export_keying_material(
        &self,
        _output: &mut [u8],
        _label: &[u8],
        _context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        Err(ExportKeyingMaterialError)
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::certs::names::IdentityNames;
    use crate::certs::session::HandshakeInfo;
    use crate::certs::test_handshake::{Done, handshake};
    use crate::certs::tls::{ClientTls, ServerTls};

    const NAME: &str = "node.example.net";

    fn done() -> Done {
        let names = IdentityNames::new().with_dns(NAME).expect("a name");
        let server = ServerTls::builder().identity_self_signed(names).alpn(["stoq-test"]);
        let server = server.build().expect("a server");
        let roots = server.identity().roots().to_vec();
        let client = ClientTls::builder().alpn(["stoq-test"]).roots(roots).build();
        handshake(&client.expect("a client"), &server, NAME).expect("a handshake")
    }

    #[test]
    fn keys_change_and_names_stay_after_the_handshake() {
        let Done { mut client, mut server } = done();
        for packet in 0..5u64 {
            let ours = server.next_1rtt_keys().expect("keys of the next generation");
            let theirs = client.next_1rtt_keys().expect("keys of the next generation");
            let mut sealed = b"header, then payload".to_vec();
            sealed.resize(sealed.len() + ours.local.tag_len(), 0);
            ours.local.encrypt(packet, &mut sealed, 7);
            let mut payload = BytesMut::from(&sealed[7..]);
            theirs.remote.decrypt(packet, b"header,", &mut payload).expect("the same keys");
            assert_eq!(&payload[..], b" then payload");
        }
        let info = HandshakeInfo::of_session(&*server).expect("settled");
        assert_eq!(info.alpn.as_deref(), Some(&b"stoq-test"[..]));
        assert_eq!(info.server_name.as_deref(), Some(NAME));
        assert!(server.peer_identity().is_none() && !server.is_handshaking());
    }

    #[test]
    fn a_message_after_the_last_is_refused() {
        let Done { mut server, .. } = done();
        // A KeyUpdate, which QUIC forbids (RFC 9001 §6).
        let error = server.read_handshake(&[24, 0, 0, 1, 0]).expect_err("nothing may follow");
        assert_eq!(error.code, TransportErrorCode::crypto(UNEXPECTED_MESSAGE));
        assert!(server.write_handshake(&mut Vec::new()).is_none());
    }
}
