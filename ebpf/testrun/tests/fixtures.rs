//! Every packet fixture through the kernel, with both loaders.
//!
//! Needs root, works in a network namespace of its own, prints
//! `N passed, M failed`. `STOQ_XDP_OBJECT` and `STOQ_REUSEPORT_OBJECT` name other
//! objects to test than those that are compiled in.

use std::os::fd::AsFd as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use aya::util::KernelVersion;
use rustix::thread::UnshareFlags;
use stoq_ebpf::{Counter, REUSEPORT_OBJECT, XDP_OBJECT};
use stoq_ebpf_fixtures::xsk::SinkSocket;
use stoq_ebpf_fixtures::{Fixture, TEST_RUN_BYTES_MIN, all, port_keys};
use stoq_ebpf_testrun::{AyaObject, LibbpfObject, LoadedObject};

const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
/// The loopback device has this index in every network namespace.
const LOOPBACK_IFINDEX: u32 = 1;

fn main() -> ExitCode {
    match run() {
        Ok(Tally { passed, failed, beyond_kernel }) => {
            if beyond_kernel > 0 {
                println!("{beyond_kernel} NOT RUN: they split packets, which needs Linux 6.18");
            }
            println!("{passed} passed, {failed} failed");
            if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("the fixtures could not run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    beyond_kernel: usize,
}

fn run() -> Result<Tally> {
    let object = object_of("STOQ_XDP_OBJECT", XDP_OBJECT)?;
    let reuseport = object_of("STOQ_REUSEPORT_OBJECT", REUSEPORT_OBJECT)?;
    enter_network_namespace()?;
    let socket = SinkSocket::bind(LOOPBACK_IFINDEX, 0).context("bind an AF_XDP socket to lo")?;
    let mut tally = Tally::default();
    let aya = AyaObject::load(&object).context("load with aya")?;
    run_all("aya", aya, &socket, &mut tally)?;
    let libbpf = LibbpfObject::load(&object).context("load with libbpf")?;
    run_all("libbpf", libbpf, &socket, &mut tally)?;
    match stoq_ebpf_testrun::reuseport::run(&reuseport) {
        Ok(passed) => tally.passed += passed,
        Err(error) => {
            tally.failed += 1;
            println!("FAILED stoq_reuseport: {error:#}");
        }
    }
    Ok(tally)
}

/// The object to test: the one that a variable names, or the one that is compiled in.
fn object_of(variable: &str, compiled_in: &[u8]) -> Result<Vec<u8>> {
    match std::env::var_os(variable) {
        Some(path) => std::fs::read(&path).with_context(|| format!("read {}", path.display())),
        None => Ok(compiled_in.to_vec()),
    }
}

/// Leaves for a network namespace that goes away with this process.
#[allow(unsafe_code)]
fn enter_network_namespace() -> Result<()> {
    // SAFETY: the process has one thread, and no descriptor or memory of it
    // changes meaning with the network namespace.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
        .context("make a network namespace: this test needs root")?;
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    ensure!(status.success(), "ip link set lo up: {status}");
    Ok(())
}

fn run_all(
    loader: &str,
    mut object: impl LoadedObject,
    socket: &SinkSocket,
    tally: &mut Tally,
) -> Result<()> {
    let kernel = KernelVersion::current().context("read the kernel's version")?;
    let splits_packets = kernel >= KernelVersion::new(6, 18, 0);
    for key in port_keys() {
        object.register(&key)?;
    }
    object.set_socket(Some(socket.as_fd())).context("put the socket into the map")?;
    for fixture in all() {
        if fixture.linear_bytes.is_some() && !splits_packets {
            tally.beyond_kernel += 1;
            continue;
        }
        if !fixture.socket {
            object.set_socket(None)?;
        }
        let outcome = run_one(&mut object, &fixture);
        if !fixture.socket {
            object.set_socket(Some(socket.as_fd()))?;
        }
        match outcome {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                tally.failed += 1;
                println!("FAILED {loader}: {}: {error:#}", fixture.name);
            }
        }
    }
    Ok(())
}

fn run_one(object: &mut impl LoadedObject, fixture: &Fixture) -> Result<()> {
    let before = object.counters()?;
    let action = object.run(&fixture.bytes, fixture.linear_bytes);
    if fixture.bytes.len() < TEST_RUN_BYTES_MIN {
        // No driver hands over less than an Ethernet header, nor does the
        // kernel's test; only the decoder in userspace sees these.
        return match action {
            Ok(action) => bail!("ran ({action}), although shorter than an Ethernet header"),
            Err(_) => Ok(()),
        };
    }
    let action = action?;
    let expected = if fixture.is_redirected() { XDP_REDIRECT } else { XDP_PASS };
    ensure!(action == expected, "action {action} instead of {expected}");
    let after = object.counters()?;
    let expected = fixture.expected_increments();
    for (index, counter) in Counter::ALL.iter().enumerate() {
        let increment = after[index] - before[index];
        let expected = expected[index];
        let name = counter.name();
        ensure!(increment == expected, "{name} grew by {increment} instead of {expected}");
    }
    Ok(())
}
