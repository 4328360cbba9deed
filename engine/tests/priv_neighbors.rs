//! Neighbour resolution and link events on veth pairs in fresh namespaces. Needs root.

mod common;

use std::net::UdpSocket;

use common::netns::{Netns, veth};

#[test]
fn namespaces_are_connected_and_deleted() {
    let name;
    {
        let (left, right) = (Netns::new("left"), Netns::new("right"));
        name = left.name().to_owned();
        veth((&left, "veth0"), (&right, "veth0"));
        left.add_address("veth0", "fd00::1/64");
        right.add_address("veth0", "fd00::2/64");
        let server =
            right.run(|| UdpSocket::bind("[fd00::2]:4433")).expect("the address is usable at once");
        let client =
            left.run(|| UdpSocket::bind("[fd00::1]:0")).expect("the namespaces are connected");
        client.send_to(b"hello", "[fd00::2]:4433").expect("the namespaces are connected");
        let mut buffer = [0; 16];
        let (len, from) = server.recv_from(&mut buffer).expect("the namespaces are connected");
        assert_eq!(&buffer[..len], b"hello");
        assert_eq!(from, client.local_addr().unwrap());
        assert_ne!(left.mac("veth0"), right.mac("veth0"));
        assert!(left.ifindex("veth0") > 1);
    }
    assert!(!std::path::Path::new("/run/netns").join(name).exists());
}
