//! What a function's time is spent on.

use serde::Serialize;

/// Where time goes, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Category {
    /// AES-GCM and header masks.
    Protection,
    /// The state machine, its B-trees and hash tables included.
    QuinnProto,
    /// Reference counts and slices of `Bytes`.
    Bytes,
    /// memmove, memset and their like.
    Copies,
    /// malloc and free.
    Allocator,
    /// The engine and the command around it.
    Engine,
    /// Reading the clock.
    Clock,
    /// What is spread thin in the process.
    OtherUser,
    /// The kernel copies packets.
    KernelCopies,
    /// The kernel's AF_XDP sockets and BPF programs.
    KernelXdp,
    /// Socket buffers and pages, made and given back.
    KernelMemory,
    /// UDP, IPv6 and the link.
    KernelNetwork,
    /// Locks, wake-ups and the scheduler.
    KernelLocks,
    /// Entering and leaving the kernel, and what is spread thin in it.
    KernelRest,
}

impl Category {
    pub(crate) const ALL: [Self; 14] = [
        Self::Protection,
        Self::QuinnProto,
        Self::Bytes,
        Self::Copies,
        Self::Allocator,
        Self::Engine,
        Self::Clock,
        Self::OtherUser,
        Self::KernelCopies,
        Self::KernelXdp,
        Self::KernelMemory,
        Self::KernelNetwork,
        Self::KernelLocks,
        Self::KernelRest,
    ];

    /// The row's name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Protection => "AES-GCM, header masks",
            Self::QuinnProto => "quinn-proto",
            Self::Bytes => "`Bytes`",
            Self::Copies => "memmove, memset",
            Self::Allocator => "malloc, free",
            Self::Engine => "engine",
            Self::Clock => "clock",
            Self::OtherUser => "other user code",
            Self::KernelCopies => "kernel: copies",
            Self::KernelXdp => "kernel: AF_XDP, BPF",
            Self::KernelMemory => "kernel: buffers, pages",
            Self::KernelNetwork => "kernel: UDP, IPv6, link",
            Self::KernelLocks => "kernel: locks, scheduler",
            Self::KernelRest => "kernel: entry, rest",
        }
    }

    /// The category of a function. A name that fits no rule is `OtherUser` or `KernelRest`.
    pub(crate) fn of(symbol: &str, is_kernel: bool) -> Self {
        if is_kernel { Self::of_kernel(symbol) } else { Self::of_user(symbol) }
    }

    fn of_user(symbol: &str) -> Self {
        // Packet protection is called by quinn-proto through our provider, whose name holds both.
        if symbol.contains("proto::crypto") || has_word(symbol, &PROTECTION) {
            return Self::Protection;
        }
        // `<quinn_proto::X as bytes::Y>::z` and generics name several crates: the first one wrote it.
        let first = CRATES
            .iter()
            .filter_map(|(name, category)| Some((symbol.find(name)?, *category)))
            .min_by_key(|(at, _)| *at);
        if let Some((_, category)) = first {
            return category;
        }
        [(&COPIES[..], Self::Copies), (&ALLOCATOR[..], Self::Allocator), (&CLOCK[..], Self::Clock)]
            .into_iter()
            .find(|(words, _)| has_word(symbol, words))
            .map_or(Self::OtherUser, |(_, category)| category)
    }

    fn of_kernel(symbol: &str) -> Self {
        [
            (&KERNEL_COPIES[..], Self::KernelCopies),
            (&KERNEL_XDP[..], Self::KernelXdp),
            (&KERNEL_LOCKS[..], Self::KernelLocks),
            (&KERNEL_MEMORY[..], Self::KernelMemory),
            (&KERNEL_NETWORK[..], Self::KernelNetwork),
        ]
        .into_iter()
        .find(|(words, _)| has_word(symbol, words))
        .map_or(Self::KernelRest, |(_, category)| category)
    }
}

fn has_word(symbol: &str, words: &[&str]) -> bool {
    words.iter().any(|word| symbol.contains(word))
}

const PROTECTION: [&str; 7] = ["aes_", "aesni", "_gcm", "gcm_", "ghash", "EVP_AEAD", "libIPSec_MB"];
const CRATES: [(&str, Category); 10] = [
    ("quinn_proto", Category::QuinnProto),
    ("collections::btree", Category::QuinnProto),
    ("hashbrown", Category::QuinnProto),
    ("bytes::", Category::Bytes),
    ("stoq::", Category::Engine),
    ("stoq_bench", Category::Engine),
    ("hdrhistogram", Category::Engine),
    ("crossbeam", Category::Engine),
    ("rustix", Category::Engine),
    ("io_uring", Category::Engine),
];
const COPIES: [&str; 4] = ["memmove", "memcpy", "memset", "memcmp"];
const ALLOCATOR: [&str; 7] =
    ["malloc", "free", "calloc", "realloc", "_int_", "unlink_chunk", "__rust_alloc"];
const CLOCK: [&str; 3] = ["clock_gettime", "vdso", "Timespec"];

const KERNEL_COPIES: [&str; 8] = [
    "copy_from_iter",
    "copy_to_iter",
    "copy_user",
    "rep_movs",
    "memcpy",
    "memmove",
    "copy_datagram",
    "copy_page_from",
];
const KERNEL_XDP: [&str; 6] = ["xsk", "xdp", "bpf", "xp_", "xskq", "dev_map"];
const KERNEL_LOCKS: [&str; 8] =
    ["spin_", "_lock", "lock_", "wake", "sched", "futex", "mutex", "rcu_"];
const KERNEL_MEMORY: [&str; 11] = [
    "alloc",
    "free",
    "kmem",
    "page",
    "slab",
    "slub",
    "skb_release",
    "consume_skb",
    "memset",
    "clear_",
    "skb_head",
];
const KERNEL_NETWORK: [&str; 19] = [
    "udp", "ip6", "ipv6", "inet", "fib6", "netif", "dev_", "veth", "sock", "skb", "nf_", "gso",
    "gro_", "neigh", "net_rx", "csum", "sendmsg", "recvmsg", "qdisc",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_the_process() {
        for (symbol, category) in [
            ("aes_gcm_enc_128_vaes_avx512", Category::Protection),
            (
                "<stoq::proto::crypto::ipsec_mb::Key as quinn_proto::crypto::PacketKey>::decrypt",
                Category::Protection,
            ),
            ("quinn_proto::connection::Connection::poll_transmit", Category::QuinnProto),
            ("alloc::collections::btree::map::BTreeMap<K,V,A>::insert", Category::QuinnProto),
            ("<bytes::bytes::Bytes as core::ops::drop::Drop>::drop", Category::Bytes),
            ("stoq::shard::Shard<D,C>::turn", Category::Engine),
            ("__memmove_avx512_unaligned_erms", Category::Copies),
            ("_int_free", Category::Allocator),
            ("cfree@GLIBC_2.2.5", Category::Allocator),
            ("__vdso_clock_gettime", Category::Clock),
            ("[unknown]", Category::OtherUser),
        ] {
            assert_eq!(Category::of(symbol, false), category, "{symbol}");
        }
    }

    #[test]
    fn functions_of_the_kernel() {
        for (symbol, category) in [
            ("_copy_from_iter", Category::KernelCopies),
            ("xsk_generic_xmit", Category::KernelXdp),
            ("bpf_prog_c0ffee_redirect", Category::KernelXdp),
            ("page_frag_free", Category::KernelMemory),
            ("kmem_cache_alloc_noprof", Category::KernelMemory),
            ("udpv6_sendmsg", Category::KernelNetwork),
            ("veth_xmit", Category::KernelNetwork),
            ("_raw_spin_lock_irqsave", Category::KernelLocks),
            ("entry_SYSCALL_64_after_hwframe", Category::KernelRest),
        ] {
            assert_eq!(Category::of(symbol, true), category, "{symbol}");
        }
    }

    #[test]
    fn every_category_has_its_row() {
        let mut sorted = Category::ALL;
        sorted.sort();
        assert_eq!(sorted, Category::ALL);
        let mut names: Vec<_> = Category::ALL.iter().map(|category| category.name()).collect();
        names.dedup();
        assert_eq!(names.len(), Category::ALL.len());
    }
}
