//! `stoq_xdp`: redirects our UDP datagrams to AF_XDP, passes everything else.
//!
//! All judgement is in the crate `stoq-ebpf` ([`stoq_ebpf::judge`]); here are
//! only the kernel's side of it: packet memory, maps, the return code.
//!
//! Invariants:
//! * The only return codes are `XDP_PASS` and `XDP_REDIRECT`.
//! * Only the linear part of a packet is read: section `xdp.frags` (Linux
//!   ≥ 5.18) lets multi-buffer packets in, and their headers are in the first
//!   buffer. Where they are not, the kernel gets the packet.
//! * Each packet moves exactly one packet counter of its CPU.
#![no_std]
#![no_main]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action;
use aya_ebpf::btf_maps::{HashMap, PerCpuArray, XskMap};
use aya_ebpf::helpers::bpf_xdp_get_buff_len;
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use stoq_ebpf::{
    Counter, PORTS_MAX, Packet, PortKey, PortValue, QUEUES_MAX, Tables, Verdict, judge,
};

/// Whose packets are ours.
#[btf_map]
static STOQ_PORTS: HashMap<PortKey, PortValue, PORTS_MAX> = HashMap::new();

/// One AF_XDP socket per receive queue.
#[btf_map]
static STOQ_XSKS: XskMap<QUEUES_MAX> = XskMap::new();

/// One counter per verdict, per CPU.
#[btf_map]
static STOQ_COUNTERS: PerCpuArray<u64, { Counter::COUNT }> = PerCpuArray::new();

/// Bytes that may be loaded two at a time: without the alignment the compiler
/// loads and stores every byte of an address alone.
#[repr(C, align(2))]
#[derive(Clone, Copy)]
struct Even<const N: usize>([u8; N]);

/// The packet at hand.
struct XdpPacket<'a>(&'a XdpContext);

impl Packet for XdpPacket<'_> {
    /// `offset_bytes` and `N` must be even, as all of the decoder's are.
    #[inline(always)]
    fn read<const N: usize>(&self, offset_bytes: usize) -> Option<[u8; N]> {
        const { assert!(N.is_multiple_of(2)) };
        let start = self.0.data() + offset_bytes;
        if start + N > self.0.data_end() {
            return None;
        }
        // SAFETY: the kernel keeps [data, data_end) readable while the program
        // runs, and the comparison above (which the verifier demands as well)
        // puts all N bytes inside; Even<N> has no invalid values, and N even
        // means no padding. Packet data begins at an even address (NET_IP_ALIGN
        // is 0 or 2), which the verifier relies on too.
        Some(unsafe { (*(start as *const Even<N>)).0 })
    }

    #[inline(always)]
    fn len_bytes(&self) -> usize {
        // SAFETY: the context is the one that the kernel called us with.
        unsafe { bpf_xdp_get_buff_len(self.0.as_ptr().cast()) as usize }
    }
}

/// The maps, seen from the queue that the packet came in by.
struct Maps {
    queue: u32,
}

impl Tables for Maps {
    #[inline(always)]
    fn is_port_registered(&self, key: &PortKey) -> bool {
        STOQ_PORTS.get_ptr(key).is_some()
    }

    #[inline(always)]
    fn redirect(&self) -> bool {
        // An empty slot answers with the action given here (Linux ≥ 5.3), so
        // that the judgement learns of it; the packet is passed either way.
        STOQ_XSKS.redirect(self.queue, u64::from(xdp_action::XDP_PASS)).is_ok()
    }
}

/// Entry point.
#[xdp(frags)]
pub fn stoq_xdp(ctx: XdpContext) -> u32 {
    match judge(&XdpPacket(&ctx), &Maps { queue: ctx.rx_queue_index() }) {
        Verdict::Redirect { packet_bytes } => {
            count(Counter::RedirectedPackets, 1);
            count(Counter::RedirectedBytes, packet_bytes as u64);
            xdp_action::XDP_REDIRECT
        }
        Verdict::Pass(counter) => {
            count(counter, 1);
            xdp_action::XDP_PASS
        }
    }
}

#[inline(always)]
fn count(counter: Counter, increment: u64) {
    if let Some(value) = STOQ_COUNTERS.get_ptr_mut(counter.index()) {
        // SAFETY: the map's slot of this CPU, aligned and valid while the
        // program runs; nothing else on this CPU runs the program meanwhile.
        unsafe { *value = (*value).wrapping_add(increment) };
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
