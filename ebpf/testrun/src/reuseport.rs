//! The `SO_REUSEPORT` object in the kernel, by way of either loader, on real
//! sockets: `BPF_PROG_TEST_RUN` does not know this kind of program.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, MapData, PerCpuArray, ReusePortSockArray};
use aya::programs::SkReuseport;
use aya::{Ebpf, EbpfLoader};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, Object, ObjectBuilder};
use rustix::net::{AddressFamily, SocketAddrV6, SocketType, bind, socket, sockopt};
use stoq_ebpf::siphash::SipKey;
use stoq_ebpf::steer::{
    CID_TAG_BYTES, CidWords, ROTATIONS, STEER_TABLE_BYTES, SteerConfiguration, SteerTable, cid_tag,
    first_bytes, steer,
};
use stoq_ebpf::{SteerCounter, maps};

/// Sockets of the group.
const SHARDS: u8 = 5;
const CID_BYTES: usize = 12;
/// What arrives anywhere arrives at once on the loopback device.
const PATIENCE: Duration = Duration::from_secs(5);

/// One packet and where it must arrive.
struct Fixture {
    name: String,
    packet: Vec<u8>,
    /// The socket; none: any.
    shard: Option<u32>,
    counter: SteerCounter,
}

/// Runs every fixture; the number of them.
///
/// # Errors
/// The first that went astray, or what loader or kernel have against the object.
pub fn run(object: &[u8]) -> Result<usize> {
    let mut passed = 0;
    for loader in ["aya", "libbpf"] {
        let sockets = group()?;
        let table = table();
        let mut loaded: Box<dyn Loaded> = match loader {
            "aya" => Box::new(ByAya::load(object, &table, &sockets)?),
            _ => Box::new(ByLibbpf::load(object, &table, &sockets)?),
        };
        let sender = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
        for fixture in fixtures(&table) {
            run_one(&mut *loaded, &sender, &sockets, &fixture)
                .with_context(|| format!("{loader}: {}", fixture.name))?;
            passed += 1;
        }
    }
    Ok(passed)
}

fn run_one(
    loaded: &mut dyn Loaded,
    sender: &UdpSocket,
    sockets: &[UdpSocket],
    fixture: &Fixture,
) -> Result<()> {
    let before = loaded.counters()?;
    sender.send_to(&fixture.packet, sockets[0].local_addr()?)?;
    let arrived = match fixture.shard {
        Some(shard) => receive(&sockets[shard as usize]).context("it went elsewhere")?,
        None => anywhere(sockets)?,
    };
    ensure!(arrived == fixture.packet, "it was changed on the way");
    let after = loaded.counters()?;
    for (counter, (before, after)) in SteerCounter::ALL.iter().zip(before.iter().zip(&after)) {
        let expected = u64::from(*counter == fixture.counter);
        let name = counter.name();
        ensure!(
            after - before == expected,
            "{name} grew by {} instead of {expected}",
            after - before
        );
    }
    Ok(())
}

fn receive(socket: &UdpSocket) -> Result<Vec<u8>> {
    let mut buffer = [0; 2048];
    let (len, _) = socket.recv_from(&mut buffer)?;
    Ok(buffer[..len].to_vec())
}

fn anywhere(sockets: &[UdpSocket]) -> Result<Vec<u8>> {
    for socket in sockets {
        socket.set_nonblocking(true)?;
        let received = receive(socket);
        socket.set_nonblocking(false)?;
        if let Ok(packet) = received {
            return Ok(packet);
        }
    }
    bail!("no socket received it")
}

/// The group of sockets, in the order of their shards.
fn group() -> Result<Vec<UdpSocket>> {
    let mut sockets: Vec<UdpSocket> = Vec::new();
    for _ in 0..SHARDS {
        let port = match sockets.first() {
            Some(first) => first.local_addr()?.port(),
            None => 0,
        };
        let fd: OwnedFd = socket(AddressFamily::INET6, SocketType::DGRAM, None)?;
        sockopt::set_socket_reuseport(&fd, true)?;
        bind(&fd, &SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0))?;
        let socket = UdpSocket::from(fd);
        socket.set_read_timeout(Some(PATIENCE))?;
        sockets.push(socket);
    }
    ensure!(matches!(sockets[0].local_addr()?, SocketAddr::V6(_)), "bound to IPv6");
    Ok(sockets)
}

fn table() -> SteerTable {
    let mut configurations = [SteerConfiguration::DEAD; ROTATIONS];
    for rotation in [1, 6] {
        let key = SipKey::new(&[rotation as u8; 16]);
        configurations[rotation] = SteerConfiguration { key, is_alive: 1 };
    }
    SteerTable {
        hash_key: SipKey::new(&[9; 16]),
        cid_len_bytes: CID_BYTES as u32,
        shards: u32::from(SHARDS),
        configurations,
    }
}

fn cid(table: &SteerTable, rotation: u8, shard: u8, seed: u8) -> Vec<u8> {
    let mut cid: Vec<u8> = (0..(CID_BYTES - CID_TAG_BYTES) as u8)
        .map(|index| index.wrapping_mul(37).wrapping_add(seed.wrapping_mul(91)))
        .collect();
    cid[0] = rotation << 5 | cid[0] & 31;
    let tag = cid_tag(&table.configurations[usize::from(rotation)].key, &cid, shard);
    cid.extend_from_slice(&tag);
    cid
}

fn short(cid: &[u8]) -> Vec<u8> {
    [&[0x40], cid, &[0; 21]].concat()
}

fn long(first: u8, cid: &[u8], rest: usize) -> Vec<u8> {
    [&[first, 0, 0, 0, 1, cid.len() as u8], cid, &vec![0; rest]].concat()
}

fn fixtures(table: &SteerTable) -> Vec<Fixture> {
    let mut all = Vec::new();
    let mut add = |name: String, packet: Vec<u8>, shard: Option<u32>, counter| {
        all.push(Fixture { name, packet, shard, counter });
    };
    for rotation in [1, 6] {
        for shard in 0..SHARDS {
            let cid = cid(table, rotation, shard, shard);
            let owner = Some(u32::from(shard));
            let name = format!("of shard {shard}, rotation {rotation}");
            add(format!("short header {name}"), short(&cid), owner, SteerCounter::SteeredById);
            for (kind, first) in [("Initial", 0xc0), ("0-RTT", 0xd0), ("Handshake", 0xe0)] {
                let packet = long(first, &cid, 40);
                add(format!("{kind} {name}"), packet, owner, SteerCounter::SteeredById);
            }
        }
    }
    for len in (0..=20_usize).chain([21, 255]) {
        let cid: Vec<u8> = (0..len).map(|index| index as u8 ^ 0x5a).collect();
        let words = CidWords::new(&first_bytes(&cid), len as u32);
        let owner = steer(table, words, true).shard();
        let name = format!("Initial with a client's ID of {len} bytes");
        add(name, long(0xc3, &cid, 1200), owner, SteerCounter::SteeredByHash);
    }
    let mut changed = cid(table, 1, 2, 7);
    changed[CID_BYTES - 1] ^= 1;
    add("changed check".into(), short(&changed), None, SteerCounter::PassForeign);
    let mut elsewhere = cid(table, 1, 2, 7);
    elsewhere[0] ^= 2 << 5;
    add("dead rotation".into(), short(&elsewhere), None, SteerCounter::PassForeign);
    add("no such shard".into(), short(&cid(table, 1, SHARDS, 3)), None, SteerCounter::PassForeign);
    for len in [0, 1, 5, 20] {
        let packet = short(&cid(table, 1, 0, 1))[..len].to_vec();
        add(format!("short header of {len} bytes"), packet, None, SteerCounter::PassTruncated);
    }
    let packet = long(0xc0, &cid(table, 1, 0, 1), 0)[..17].to_vec();
    add("long header that ends in the ID".into(), packet, None, SteerCounter::PassTruncated);
    all
}

/// A loaded object, attached to the group.
trait Loaded {
    /// In the order of [`SteerCounter::ALL`], summed over the CPUs.
    fn counters(&self) -> Result<Vec<u64>>;
}

struct ByAya {
    _ebpf: Ebpf,
    counters: PerCpuArray<MapData, u64>,
}

impl ByAya {
    fn load(object: &[u8], table: &SteerTable, sockets: &[UdpSocket]) -> Result<Self> {
        let mut ebpf = EbpfLoader::new().load(object).context("load with aya")?;
        let mut map = |name| ebpf.take_map(name).with_context(|| format!("no map {name}"));
        let mut tables: Array<MapData, [u8; STEER_TABLE_BYTES]> =
            map(maps::STEER_MAP)?.try_into()?;
        tables.set(0, table.to_bytes(), 0)?;
        let mut shards: ReusePortSockArray<MapData> = map(maps::SHARDS_MAP)?.try_into()?;
        for (shard, socket) in (0..).zip(sockets) {
            shards.set(shard, socket, 0)?;
        }
        let counters = map(maps::STEER_COUNTERS_MAP)?.try_into()?;
        let program = ebpf.program_mut(maps::REUSEPORT_PROGRAM).context("no such program")?;
        let program: &mut SkReuseport = program.try_into()?;
        program.load()?;
        program.attach(&sockets[0])?;
        Ok(Self { _ebpf: ebpf, counters })
    }
}

impl Loaded for ByAya {
    fn counters(&self) -> Result<Vec<u64>> {
        let sum = |counter: &SteerCounter| {
            let per_cpu = self.counters.get(&counter.index(), 0)?;
            Ok(per_cpu.iter().sum())
        };
        SteerCounter::ALL.iter().map(sum).collect()
    }
}

struct ByLibbpf {
    _object: Object,
    counters: MapHandle,
}

impl ByLibbpf {
    fn load(object: &[u8], table: &SteerTable, sockets: &[UdpSocket]) -> Result<Self> {
        let object = ObjectBuilder::default().open_memory(object)?.load()?;
        let map = |name: &str| {
            let map = object.maps().find(|map| map.name() == name);
            let map = map.with_context(|| format!("no map {name}"))?;
            Ok::<_, anyhow::Error>(MapHandle::try_from(&map)?)
        };
        let zero = 0_u32.to_ne_bytes();
        map(maps::STEER_MAP)?.update(&zero, &table.to_bytes(), MapFlags::ANY)?;
        let shards = map(maps::SHARDS_MAP)?;
        for (shard, socket) in (0_u32..).zip(sockets) {
            let fd = socket.as_raw_fd().to_ne_bytes();
            shards.update(&shard.to_ne_bytes(), &fd, MapFlags::ANY)?;
        }
        let counters = map(maps::STEER_COUNTERS_MAP)?;
        let program = object.progs().find(|program| program.name() == maps::REUSEPORT_PROGRAM);
        attach(program.context("no such program")?.as_fd(), sockets[0].as_fd())?;
        Ok(Self { _object: object, counters })
    }
}

impl Loaded for ByLibbpf {
    fn counters(&self) -> Result<Vec<u64>> {
        let sum = |counter: &SteerCounter| {
            let key = counter.index().to_ne_bytes();
            let per_cpu = self.counters.lookup_percpu(&key, MapFlags::ANY)?;
            let per_cpu = per_cpu.with_context(|| format!("no counter {}", counter.name()))?;
            per_cpu.iter().try_fold(0, |sum, value| {
                let value = value.first_chunk().context("a counter has eight bytes")?;
                Ok(sum + u64::from_ne_bytes(*value))
            })
        };
        SteerCounter::ALL.iter().map(sum).collect()
    }
}

/// `SO_ATTACH_REUSEPORT_EBPF`, which libbpf leaves to its user.
#[allow(unsafe_code)]
fn attach(program: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> Result<()> {
    let program = program.as_raw_fd();
    // SAFETY: the option takes an int, which outlives the call, of the size that is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_EBPF,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    ensure!(result == 0, "SO_ATTACH_REUSEPORT_EBPF: {}", std::io::Error::last_os_error());
    Ok(())
}
