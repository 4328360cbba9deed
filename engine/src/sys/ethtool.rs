//! The one question to the driver that netlink attributes of a link do not answer: its active queues.

use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `ETHTOOL_GCHANNELS` of `linux/ethtool.h`.
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// `struct ethtool_channels`.
#[derive(Default)]
#[repr(C)]
struct Channels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx_count: u32,
    tx_count: u32,
    other_count: u32,
    combined_count: u32,
}

/// Number of queues of the named interface that can be bound: the larger of its
/// active receive and transmit queues. `EOPNOTSUPP` if the driver does not say.
pub(crate) fn queue_count(interface: &str) -> io::Result<u32> {
    let socket = socket_with(AddressFamily::INET6, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut channels = Channels { cmd: ETHTOOL_GCHANNELS, ..Channels::default() };
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = interface.as_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(name) {
        *target = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut channels).cast();
    // SAFETY: `request` and the `channels` that it points to are whole
    // structures of the shape that this command reads and writes.
    let result = unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, &raw mut request)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(channels.combined_count + channels.rx_count.max(channels.tx_count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_that_do_not_exist_are_an_error() {
        let error = queue_count("stoq-none").expect_err("no such interface");
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        let error = queue_count("a-name-longer-than-any").expect_err("too long");
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn loopback_has_no_channels() {
        let error = queue_count("lo").expect_err("loopback has no driver");
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    }
}
