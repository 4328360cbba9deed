//! `stoq_reuseport`: gives each QUIC packet to the socket of the shard that owns
//! its connection.
//!
//! The decision is in the crate `stoq-ebpf` ([`stoq_ebpf::steer`]), the same that
//! the shards make for packets that arrive elsewhere; here are only the kernel's
//! side of it: packet memory, maps, the selection.
//!
//! Invariants:
//! * Nothing is dropped: the return code is always `SK_PASS`. Where no socket was
//!   selected the kernel picks one by the hash of addresses and ports, and the
//!   shard behind it hands the packet over or drops and counts it.
//! * Each run moves exactly one counter of its CPU. A run is a packet, or several
//!   that the kernel has coalesced (UDP GRO, or a GSO batch over a virtual device):
//!   then the first one speaks for all, and shards sort out the others.
#![no_std]
#![no_main]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::sk_action::SK_PASS;
use aya_ebpf::btf_maps::{Array, PerCpuArray, ReusePortSockArray};
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::macros::{btf_map, sk_reuseport};
use aya_ebpf::programs::SkReuseportContext;
use stoq_ebpf::steer::{CID_BYTES_MAX, CidWords, SteerTable, Steered, steer};
use stoq_ebpf::{SHARDS_MAX, SteerCounter};

/// What decides about connection IDs.
#[btf_map]
static STOQ_STEER: Array<SteerTable, 1> = Array::new();

/// One UDP socket per shard.
#[btf_map]
static STOQ_SHARDS: ReusePortSockArray<SHARDS_MAX> = ReusePortSockArray::new();

/// One counter per outcome, per CPU.
#[btf_map]
static STOQ_STEERED: PerCpuArray<u64, { SteerCounter::COUNT }> = PerCpuArray::new();

/// The context's data begins with the UDP header.
const UDP_HEADER_BYTES: u32 = 8;
/// First octet, version, DCID length (RFC 8999 §5.1).
const LONG_HEADER_BYTES: u32 = 6;
/// First octet (RFC 8999 §5.2).
const SHORT_HEADER_BYTES: u32 = 1;

/// Entry point.
#[sk_reuseport]
pub fn stoq_reuseport(ctx: SkReuseportContext) -> u32 {
    count(select(&ctx));
    SK_PASS
}

#[inline(always)]
fn select(ctx: &SkReuseportContext) -> SteerCounter {
    let Some(table) = STOQ_STEER.get_ptr(0) else { return SteerCounter::PassNoSocket };
    // SAFETY: an array's element is valid while the program runs. Userspace may write it meanwhile:
    // every value is valid, and one that is half old and half new misleads one packet at most.
    let table: &SteerTable = unsafe { &*table };
    // Packets may lie in fragments, which only the helper reaches.
    let Some([first, _, _, _, _, dcid_len]) = load::<6>(ctx, UDP_HEADER_BYTES) else {
        return SteerCounter::PassTruncated;
    };
    let is_long_header = first & 0x80 != 0;
    let (header_bytes, cid_len_bytes) = if is_long_header {
        (LONG_HEADER_BYTES, dcid_len as u32)
    } else {
        (SHORT_HEADER_BYTES, table.cid_len_bytes)
    };
    // Every packet has 20 bytes there, whatever the length: with an ID of n bytes at least 20 follow
    // it, or header protection could not be applied (RFC 9001 §5.4.2).
    let Some(cid) = load::<CID_BYTES_MAX>(ctx, UDP_HEADER_BYTES + header_bytes) else {
        return SteerCounter::PassTruncated;
    };
    let mut bytes = [0; 24];
    bytes[..CID_BYTES_MAX].copy_from_slice(&cid);
    let (shard, counter) = match steer(table, CidWords::new(&bytes, cid_len_bytes), is_long_header)
    {
        Steered::ById(shard) => (shard, SteerCounter::SteeredById),
        Steered::ByHash(shard) => (shard, SteerCounter::SteeredByHash),
        Steered::Foreign => return SteerCounter::PassForeign,
    };
    match STOQ_SHARDS.select_reuseport(ctx, shard) {
        Ok(()) => counter,
        Err(_) => SteerCounter::PassNoSocket,
    }
}

/// `N` bytes of the packet; `None` where it ends before.
#[inline(always)]
fn load<const N: usize>(ctx: &SkReuseportContext, offset_bytes: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the context is the one that the kernel called us with; the buffer has N bytes.
    let result = unsafe {
        bpf_skb_load_bytes(ctx.as_ptr(), offset_bytes, bytes.as_mut_ptr().cast(), N as u32)
    };
    (result == 0).then_some(bytes)
}

#[inline(always)]
fn count(counter: SteerCounter) {
    if let Some(value) = STOQ_STEERED.get_ptr_mut(counter.index()) {
        // SAFETY: the map's slot of this CPU, aligned and valid while the program runs. An
        // interruption by another run on this CPU may lose one count.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lends its GPL-only helpers to programs that say so.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
