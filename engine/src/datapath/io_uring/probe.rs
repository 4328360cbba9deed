//! Whether io_uring can be used here, and if not, why, in words.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsFd;

use serde::Serialize;

use crate::datapath::udp_socket::{SocketConfig, UdpSocket};
use crate::sys::uring::{Completion, DatagramRing, SetupError, TaskRun};

/// Why io_uring cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unavailable {
    /// The reason, and what would change it.
    pub reason: String,
}

/// What io_uring offers here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct UringFeatures {
    /// Kernel work for us runs only inside our own calls (`DEFER_TASKRUN`, kernel 6.1).
    pub deferred_task_run: bool,
    /// Kernel work for us never interrupts (`COOP_TASKRUN`, kernel 5.19).
    pub cooperative_task_run: bool,
    /// One request receives many messages (kernel 6.0); proved by a trial.
    pub multishot_receive: bool,
}

/// Sets up a small ring over a socket of its own and arms the receive.
pub(super) fn probe() -> Result<UringFeatures, Unavailable> {
    let mut config = SocketConfig::new(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0));
    config.receive_buffer_bytes = 64 * 1024;
    config.send_buffer_bytes = 64 * 1024;
    let socket = UdpSocket::open_blocking(&config).map_err(|error| Unavailable {
        reason: format!("no UDP socket to try it with: {error}"),
    })?;
    let mut ring = DatagramRing::open(socket.as_fd(), 1, 1).map_err(explain)?;
    ring.arm_receive();
    ring.enter().map_err(|source| explain(SetupError { call: "io_uring_enter", source }))?;
    // An unknown request fails at once; a known one waits for a datagram.
    if let Some(Completion::ReceiveEnded { errno }) = ring.next_completion() {
        let error = std::io::Error::from_raw_os_error(errno);
        return Err(Unavailable {
            reason: format!("multishot recvmsg is refused ({error}): it needs kernel 6.0"),
        });
    }
    Ok(UringFeatures {
        deferred_task_run: ring.task_run() == TaskRun::Deferred,
        cooperative_task_run: ring.task_run() != TaskRun::Interrupting,
        multishot_receive: true,
    })
}

/// Turns a failed set-up into the reason behind it.
pub(super) fn explain(error: SetupError) -> Unavailable {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
    reason(&error, disabled.as_deref().map(str::trim))
}

fn reason(error: &SetupError, disabled: Option<&str>) -> Unavailable {
    let SetupError { call, source } = error;
    let reason = match (source.raw_os_error(), disabled) {
        (Some(libc::EPERM | libc::EACCES), Some("2")) => "disabled for every process: `sysctl -w \
             kernel.io_uring_disabled=0` allows it"
            .to_owned(),
        (Some(libc::EPERM | libc::EACCES), Some("1")) => {
            "disabled for unprivileged processes: `sysctl -w kernel.io_uring_disabled=0` allows \
             it, or put this user into the group of kernel.io_uring_group"
                .to_owned()
        }
        (Some(libc::EPERM | libc::EACCES), _) => format!(
            "{call} is forbidden ({source}): a seccomp filter or security module of this \
             container or service blocks it; allow io_uring_setup, io_uring_enter and \
             io_uring_register there"
        ),
        (Some(libc::ENOSYS), _) => format!(
            "{call} does not exist here: the kernel is built without CONFIG_IO_URING, or a \
             sandbox (seccomp, gVisor) hides it"
        ),
        (Some(libc::ENOMEM), _) => {
            format!("{call} found no memory ({source}): raise the locked memory limit (ulimit -l)")
        }
        (Some(libc::EINVAL), _) => {
            format!(
                "{call} is refused ({source}): provided buffer rings need kernel 5.19, STOQ 6.0"
            )
        }
        _ => format!("{call} failed: {source}"),
    };
    Unavailable { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(errno: i32, disabled: Option<&str>) -> String {
        let source = std::io::Error::from_raw_os_error(errno);
        reason(&SetupError { call: "io_uring_setup", source }, disabled).reason
    }

    #[test]
    fn each_cause_has_its_own_words() {
        assert!(of(libc::EPERM, Some("2")).contains("disabled for every process"));
        assert!(of(libc::EPERM, Some("1")).contains("io_uring_group"));
        assert!(of(libc::EPERM, Some("0")).contains("seccomp"));
        assert!(of(libc::EPERM, None).contains("seccomp"));
        assert!(of(libc::ENOSYS, Some("0")).contains("CONFIG_IO_URING"));
        assert!(of(libc::ENOMEM, Some("0")).contains("ulimit -l"));
        assert!(of(libc::EINVAL, None).contains("6.0"));
    }
}
