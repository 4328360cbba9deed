//! What becomes of a client that knocks: accepted, refused, forgotten (`retry`: [`balance`](super::balance)).

use std::sync::Arc;
use std::time::Instant;

use quinn_proto::{EndpointEvent, Event, ServerConfig, Side};

use super::{Owner, Protocol, congestion, v6};
use crate::app::ConnId;
use crate::error::ConnectionError;

impl Protocol {
    /// `mtu_bytes`: the largest UDP payload that can leave towards the client.
    pub(crate) fn accept(
        &mut self,
        now: Instant,
        incoming: quinn_proto::Incoming,
        mtu_bytes: u16,
        owner: Owner,
    ) -> Result<ConnId, ConnectionError> {
        self.response_buffer.clear();
        let remote = v6(incoming.remote_address());
        let resume = self.remembered(now, &remote);
        let transport = self.transport(now, mtu_bytes, Side::Server, resume);
        let server = self.server.as_ref().map(|server| {
            if Arc::ptr_eq(&server.transport, &transport) {
                return server.clone();
            }
            let mut server = ServerConfig::clone(server);
            server.transport_config(transport);
            Arc::new(server)
        });
        let accepted = self.endpoint.accept(incoming, now, &mut self.response_buffer, server);
        let made = accepted.as_ref().ok().map(|(_, made)| made);
        self.tries_remembered(&remote, resume, made.filter(|made| !made.is_closed()));
        match accepted {
            Ok((handle, mut connection)) => {
                if connection.is_closed() {
                    // Closed by a packet that waited behind the first: the client gave up, or the
                    // second half of its ClientHello brought the refusal, which it is told here. Such a
                    // connection has no closing timer, and would stay until it idles out.
                    congestion::Gated::state_of(&connection).set_gate(true);
                    let close = connection.poll_transmit(now, 1, &mut self.response_buffer);
                    if let Some(close) = close {
                        self.push_response(&close);
                    }
                    self.endpoint.handle_event(handle, EndpointEvent::drained());
                    self.counters.incoming_failed += 1;
                    return Err(match connection.poll() {
                        Some(Event::ConnectionLost { reason }) => reason.into(),
                        _ => ConnectionError::TimedOut,
                    });
                }
                self.counters.accepted += 1;
                let conn = self.insert(now, handle, connection, owner);
                self.accepted_last = Some(conn);
                Ok(conn)
            }
            Err(error) => {
                self.counters.incoming_failed += 1;
                if let Some(response) = error.response {
                    self.push_response(&response);
                }
                Err(error.cause.into())
            }
        }
    }

    pub(crate) fn refuse(&mut self, incoming: quinn_proto::Incoming) {
        self.response_buffer.clear();
        let transmit = self.endpoint.refuse(incoming, &mut self.response_buffer);
        self.push_response(&transmit);
    }

    pub(crate) fn ignore(&mut self, incoming: quinn_proto::Incoming) {
        self.endpoint.ignore(incoming);
    }
}
