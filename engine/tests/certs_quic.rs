//! The identity module under quinn-proto: two endpoints in memory, no network.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn_proto::{
    ClientConfig, Connection, ConnectionError, ConnectionHandle, DatagramEvent, Endpoint,
    EndpointConfig, Event, ServerConfig, Transmit,
};
use stoq::certs::{
    ClientAuth, ClientTls, HandshakeInfo, IdentityNames, PeerIdentity, RotatingIdentity, ServerTls,
    SharedKeys, TrustStore, explain_peer_alert,
};

const NAME: &str = "node.example.net";
const CLIENT: &str = "[2001:db8::c]:4000";
const SERVER: &str = "[2001:db8::5]:4433";

struct Side {
    endpoint: Endpoint,
    address: SocketAddr,
    connection: Option<(ConnectionHandle, Connection)>,
    connected: bool,
    lost: Option<ConnectionError>,
}

impl Side {
    fn new(endpoint: Endpoint, address: &str) -> Self {
        let address = address.parse().unwrap();
        Self { endpoint, address, connection: None, connected: false, lost: None }
    }

    fn receive(&mut self, now: Instant, from: SocketAddr, packet: &[u8]) {
        let mut buf = Vec::new();
        let data = BytesMut::from(packet);
        match self.endpoint.handle(now, from, None, None, data, &mut buf) {
            Some(DatagramEvent::NewConnection(incoming)) => {
                let accepted = self.endpoint.accept(incoming, now, &mut buf, None);
                self.connection = Some(accepted.map_err(|error| error.cause).unwrap());
            }
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                self.connection.as_mut().unwrap().1.handle_event(event);
            }
            Some(DatagramEvent::Response(_)) | None => {}
        }
    }

    /// What the connection sends now; reports what happened to it.
    fn turn(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let Some((handle, connection)) = self.connection.as_mut() else { return Vec::new() };
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        while let Some(event) = connection.poll() {
            match event {
                Event::Connected => self.connected = true,
                Event::ConnectionLost { reason } => self.lost = Some(reason),
                _ => {}
            }
        }
        let mut packets = Vec::new();
        loop {
            let mut buf = Vec::new();
            let Some(Transmit { size, .. }) = connection.poll_transmit(now, 1, &mut buf) else {
                return packets;
            };
            packets.push(buf[..size].to_vec());
        }
    }
}

fn connect(server: &ServerTls, client: &ClientTls) -> [Side; 2] {
    let keys = SharedKeys::generate().unwrap();
    let config = || Arc::new(EndpointConfig::new(keys.reset_key()));
    let server_config = ServerConfig::new(server.crypto(), keys.token_key());
    let server = Endpoint::new(config(), Some(Arc::new(server_config)), true, None);
    let mut client_endpoint = Endpoint::new(config(), None, true, None);
    let mut now = Instant::now();
    let connection = client_endpoint
        .connect(now, ClientConfig::new(client.crypto()), SERVER.parse().unwrap(), NAME)
        .unwrap();
    let mut sides = [Side::new(client_endpoint, CLIENT), Side::new(server, SERVER)];
    sides[0].connection = Some(connection);
    for _ in 0..50 {
        for from in [0, 1] {
            let address = sides[from].address;
            for packet in sides[from].turn(now) {
                now += Duration::from_millis(1);
                sides[1 - from].receive(now, address, &packet);
            }
        }
    }
    sides
}

fn names() -> IdentityNames {
    IdentityNames::new().with_dns(NAME).unwrap()
}

#[test]
fn a_mutual_handshake_tells_group_protocol_and_peer() {
    let client_names = IdentityNames::new().with_client_id("probe-7").unwrap();
    let client_identity = RotatingIdentity::self_signed(client_names).start().unwrap();
    let trust = TrustStore::builder().roots(client_identity.roots().to_vec()).build().unwrap();
    let server = ServerTls::builder()
        .identity_self_signed(names())
        .alpn(["stoq-test"])
        .client_auth(ClientAuth::Required(trust))
        .build()
        .unwrap();
    let client = ClientTls::builder()
        .roots(server.identity().roots().to_vec())
        .identity(client_identity)
        .alpn(["stoq-test"])
        .build()
        .unwrap();
    let sides = connect(&server, &client);
    for side in &sides {
        assert!(side.connected, "{:?}", side.lost);
        let session = side.connection.as_ref().unwrap().1.crypto_session();
        let info = HandshakeInfo::of_session(session).unwrap();
        assert!(info.is_post_quantum());
        assert_eq!(info.alpn.as_deref(), Some(&b"stoq-test"[..]));
    }
    let session = sides[1].connection.as_ref().unwrap().1.crypto_session();
    let peer = PeerIdentity::of_session(session).unwrap().unwrap();
    assert_eq!(peer.certificate.names.client_id(), Some("probe-7"));
}

#[test]
fn the_cause_of_a_refusal_reaches_both_ends() {
    let server =
        ServerTls::builder().identity_self_signed(names()).alpn(["stoq-test"]).build().unwrap();
    let stranger = RotatingIdentity::self_signed(names()).start().unwrap();
    let client =
        ClientTls::builder().roots(stranger.roots().to_vec()).alpn(["stoq-test"]).build().unwrap();
    let sides = connect(&server, &client);
    let Some(ConnectionError::TransportError(error)) = &sides[0].lost else {
        panic!("{:?}", sides[0].lost)
    };
    assert!(error.reason.starts_with("unknown_root"), "{error}");
    let Some(ConnectionError::ConnectionClosed(close)) = &sides[1].lost else {
        panic!("{:?}", sides[1].lost)
    };
    let reason = String::from_utf8_lossy(&close.reason);
    let text = explain_peer_alert(u64::from(close.error_code), &reason).unwrap();
    assert!(text.contains("unknown_root"), "{text}");
}
