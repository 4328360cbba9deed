//! Packets that the XDP program leaves to the kernel reach a live AF_XDP connection. Needs root.
//!
//! A relay between client and server puts a VLAN tag (802.1Q, VID 0: the priority tag, which every
//! kernel takes) or a hop-by-hop options header (RFC 8200 §4.3) into every packet of the client,
//! from the handshake on or in mid-connection; the server's acknowledgements depend on them.

mod common;

use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::netns::{Netns, veth, wait_until};
use common::transfer::{Transfer, Watchdog, assert_interface_clean, start_client, start_server};
use stoq::config::TransportConfig;
use stoq::datapath::choice::DatapathChoice;
use stoq::engine::Engine;
use stoq::testing::PacketSocket;
use stoq::wire::checksum::udp_checksum;

const LEFT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const RIGHT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const DEVICE: &str = "veth0";
/// A little of a transfer, bytes.
const SOME: u64 = 2 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const HANG: Duration = Duration::from_secs(120);

/// How the client's packets travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Form {
    Plain = 0,
    PriorityTag = 1,
    HopByHop = 2,
}

/// What the relay writes its frames from.
struct Wire {
    packets: PacketSocket,
    macs: [[u8; 6]; 2],
    source_port: u16,
    server: SocketAddrV6,
}

impl Wire {
    fn frame(&self, form: Form, payload: &[u8]) -> Vec<u8> {
        let [own, peer] = self.macs;
        let mut frame = [peer, own].concat();
        if form == Form::PriorityTag {
            frame.extend([0x81, 0x00, 0x60, 0x00]);
        }
        let udp_bytes = 8 + payload.len() as u16;
        // Option PadN over six bytes, and the type of what follows.
        let options: &[u8] = if form == Form::HopByHop { &[17, 0, 1, 4, 0, 0, 0, 0] } else { &[] };
        let next_header = if options.is_empty() { 17 } else { 0 };
        let ipv6_bytes = udp_bytes + options.len() as u16;
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(ipv6_bytes.to_be_bytes());
        frame.extend([next_header, 64]);
        frame.extend(LEFT.octets());
        frame.extend(RIGHT.octets());
        frame.extend(options);
        let mut header = Vec::new();
        for field in [self.source_port, self.server.port(), udp_bytes, 0] {
            header.extend(field.to_be_bytes());
        }
        let checksum = udp_checksum(&LEFT, &RIGHT, &[&header, payload]);
        header[6..].copy_from_slice(&checksum.to_be_bytes());
        frame.extend(header);
        frame.extend(payload);
        frame
    }

    fn send(&self, form: Form, payload: &[u8]) {
        let frame = self.frame(form, payload);
        let Err(error) = self.packets.send(&frame) else { return };
        // A path MTU probe beyond the link, or a full queue: lost as on a wire.
        let lost = matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::ENOBUFS));
        assert!(lost, "sendto: {error}");
    }
}

/// Carries datagrams between the client and the server; its thread ends with it.
struct Relay {
    address: SocketAddrV6,
    form: Arc<AtomicU8>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    fn start(left: &Netns, right: &Netns, server: SocketAddrV6, first: Form) -> Self {
        let (ifindex, macs) = (left.ifindex(DEVICE), [left.mac(DEVICE), right.mac(DEVICE)]);
        let [front, back] = left.run(|| [(); 2].map(|()| bind()));
        let packets = left.run(|| PacketSocket::open(ifindex).expect("root"));
        let source_port = back.local_addr().expect("bound").port();
        let SocketAddr::V6(address) = front.local_addr().expect("bound") else {
            panic!("bound to IPv6")
        };
        let (form, stop) = (Arc::new(AtomicU8::new(first as u8)), Arc::new(AtomicBool::new(false)));
        let wire = Wire { packets, macs, source_port, server };
        let thread = thread::spawn({
            let (form, stop) = (form.clone(), stop.clone());
            move || carry(&front, &back, &wire, &form, &stop)
        });
        Self { address, form, stop, thread: Some(thread) }
    }

    fn switch_to(&self, form: Form) {
        self.form.store(form as u8, Relaxed);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the relay's thread panicked");
        }
    }
}

fn bind() -> UdpSocket {
    let socket = UdpSocket::bind((LEFT, 0)).expect("a free port");
    socket.set_read_timeout(Some(Duration::from_millis(1))).expect("a timeout");
    socket
}

fn carry(front: &UdpSocket, back: &UdpSocket, wire: &Wire, form: &AtomicU8, stop: &AtomicBool) {
    let mut buffer = vec![0; 65_535];
    let mut client = None;
    while !stop.load(Relaxed) {
        for socket in [front, back] {
            for _ in 0..256 {
                let (bytes, from) = match socket.recv_from(&mut buffer) {
                    Ok(received) => received,
                    Err(error) => {
                        let nothing = [ErrorKind::WouldBlock, ErrorKind::TimedOut];
                        assert!(nothing.contains(&error.kind()), "recv_from: {error}");
                        break;
                    }
                };
                if std::ptr::eq(socket, front) {
                    client = Some(from);
                    let form = [Form::Plain, Form::PriorityTag, Form::HopByHop]
                        [usize::from(form.load(Relaxed))];
                    wire.send(form, &buffer[..bytes]);
                } else if let Some(client) = client {
                    // Refused only when the client has gone, which the test notices.
                    let _gone = front.send_to(&buffer[..bytes], client);
                }
            }
        }
    }
}

fn config(address: Ipv6Addr, datapath: DatapathChoice) -> TransportConfig {
    TransportConfig {
        bind: SocketAddrV6::new(address, 0, 0, 0),
        datapath,
        interface: Some(DEVICE.to_owned()),
        spin_us: 20,
        ..TransportConfig::default()
    }
}

/// A transfer whose client's packets first travel in one form and then in the other; how many came
/// by the kernel's socket in each half.
fn transfer(what: &'static str, forms: [Form; 2]) -> [u64; 2] {
    let _watchdog = Watchdog::new(what, HANG);
    let (left, right) = (Netns::new("left"), Netns::new("right"));
    veth((&left, DEVICE), (&right, DEVICE));
    left.add_address(DEVICE, &format!("{LEFT}/64"));
    right.add_address(DEVICE, &format!("{RIGHT}/64"));
    let builder = Engine::builder().config(config(RIGHT, DatapathChoice::AfXdp));
    let server = right.run(|| start_server(RIGHT, builder));
    let server = server.unwrap_or_else(|error| panic!("server: {error}"));
    let relay = Relay::start(&left, &right, server.local_addr(), forms[0]);
    let builder = Engine::builder().config(config(LEFT, DatapathChoice::Socket));
    let client = left.run(|| start_client(builder));
    let client = client.unwrap_or_else(|error| panic!("client: {error}"));
    let transfer = Transfer::start_to(relay.address, server, client);
    let mut before = 0;
    let by_socket = forms.map(|form| {
        relay.switch_to(form);
        // What is under way in the form before.
        transfer.advance(SOME, PATIENCE);
        before = transfer_slow(&transfer);
        transfer.advance(SOME, PATIENCE);
        if form != Form::Plain {
            wait_until("packets by the kernel's socket", PATIENCE, || {
                transfer_slow(&transfer) > before
            });
        }
        transfer_slow(&transfer) - before
    });
    assert_eq!(transfer.server.stats()[0].datapath.failovers, 0);
    transfer.finish_intact();
    drop(relay);
    assert_interface_clean(&right, DEVICE);
    by_socket
}

fn transfer_slow(transfer: &Transfer) -> u64 {
    transfer.server.stats()[0].datapath.rx_slow_path
}

#[test]
fn plain_packets_come_by_the_rings() {
    assert_eq!(transfer("plain", [Form::Plain; 2]), [0, 0]);
}

#[test]
fn tagged_packets_from_the_handshake_on() {
    let [first, second] = transfer("tagged", [Form::PriorityTag, Form::Plain]);
    assert!(first > 0 && second == 0, "{first}, {second}");
}

#[test]
fn hop_by_hop_options_from_the_handshake_on() {
    let [first, second] = transfer("hop-by-hop", [Form::HopByHop, Form::PriorityTag]);
    assert!(first > 0 && second > 0, "{first}, {second}");
}

#[test]
fn hop_by_hop_options_in_mid_connection() {
    let [first, second] = transfer("hop-by-hop later", [Form::Plain, Form::HopByHop]);
    assert!(first == 0 && second > 0, "{first}, {second}");
}
