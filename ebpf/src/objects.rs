//! The compiled objects, so that building the engine needs no eBPF toolchain.

/// Bytes at an alignment that ELF parsers may rely on.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

static XDP_OBJECT_ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!("../objects/stoq_xdp.bpf.o"));

/// The ELF object with the program [`stoq_xdp`](crate::maps::XDP_PROGRAM) in
/// section `xdp.frags` and its BTF-defined maps; 8-byte aligned. Needs Linux
/// ≥ 5.18.
pub const XDP_OBJECT: &[u8] = &XDP_OBJECT_ALIGNED.0;

static REUSEPORT_OBJECT_ALIGNED: &Aligned<[u8]> =
    &Aligned(*include_bytes!("../objects/stoq_reuseport.bpf.o"));

/// The ELF object with the program [`stoq_reuseport`](crate::maps::REUSEPORT_PROGRAM) in section
/// `sk_reuseport` and its BTF-defined maps; 8-byte aligned. Needs Linux ≥ 4.19.
pub const REUSEPORT_OBJECT: &[u8] = &REUSEPORT_OBJECT_ALIGNED.0;

/// SHA-256 over the sources that the objects were built from, in lower-case
/// hexadecimal with a newline at the end.
pub const SOURCES_SHA256: &str = include_str!("../objects/SOURCES.sha256");
