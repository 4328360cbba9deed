//! Every limit of an AF_XDP datapath, named, with its default's reason, checked once.

/// Bytes that the kernel leaves free in front of a received packet (`XDP_PACKET_HEADROOM`).
pub(super) const RX_HEADROOM_BYTES: u32 = 256;

/// Most frames that one packet may span. The kernel's copy mode turns each frame
/// into a fragment of an skb, of which there are 17 (`MAX_SKB_FRAGS`): 17 frames
/// of 4096 bytes hold the largest IPv6 packet.
pub(super) const FRAMES_PER_PACKET_MAX: usize = 17;

/// Sizes and bounds of one AF_XDP datapath (one per queue).
///
/// Memory per queue: (`rx_frames` + `tx_frames`) × `frame_size_bytes`, by
/// default 6144 × 4096 = 24 MiB, plus about 150 KiB for the rings, plus the slow
/// path's buffers: `slow_path_batch` × 64 KiB and 8 MiB for sending without the device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AfXdpLimits {
    /// Size of a frame in bytes: 2048 or 4096. Default 4096: an MTU of up to
    /// 3506 needs no second frame, and 65535 fits 17.
    pub frame_size_bytes: u32,
    /// Frames for receiving. Default 4096: enough to fill the RX ring while as
    /// many lie with the device.
    pub rx_frames: u32,
    /// Frames for sending. Default 2048: one for each entry of the TX ring.
    pub tx_frames: u32,
    /// Entries of the fill ring: at least twice `rx_frames`, so that a frame can
    /// always go back. Twice, because the kernel publishes received packets before
    /// it gives back the fill ring entries that it took for them: for a moment a
    /// frame that we return has two entries.
    pub fill_ring_entries: u32,
    /// Entries of the completion ring: at least `tx_frames`, so that sending never waits for us to read it.
    pub completion_ring_entries: u32,
    /// Entries of the RX ring. Default 2048: 1.7 ms of 1.2 million packets a second.
    pub rx_ring_entries: u32,
    /// Entries of the TX ring. Default 2048: 31 packets of 65 kB, or 1.7 ms as above.
    pub tx_ring_entries: u32,
    /// Frames that one kick may process in copy mode, where the kernel lets it be
    /// set (Linux ≥ 6.17; 32 otherwise). Default 256: a whole turn's batch in one
    /// system call, yet bounded.
    pub tx_budget_frames: u32,
    /// Datagrams that may wait for neighbour resolution. Default 64: a first
    /// flight of a handshake for each of some dozens of peers.
    pub pending_datagrams: usize,
    /// How long such a datagram may wait, in milliseconds. Default 1000: the
    /// kernel gives up on a neighbour after three solicitations a second apart, and
    /// QUIC's retransmissions are worth more than a stale packet.
    pub pending_ms_max: u64,
    /// Receive buffers of the slow-path socket, 64 KiB each, touched only when used. Default
    /// 32, as of any socket: it carries everything while the device is gone.
    pub slow_path_batch: usize,
    /// Times that binding is tried again when the queue is busy, 10 ms apart.
    /// Default 100: the kernel closes a socket's queue asynchronously, within
    /// milliseconds, seconds under load.
    pub bind_retries: u32,
}

impl Default for AfXdpLimits {
    fn default() -> Self {
        Self {
            frame_size_bytes: 4096,
            rx_frames: 4096,
            tx_frames: 2048,
            fill_ring_entries: 8192,
            completion_ring_entries: 2048,
            rx_ring_entries: 2048,
            tx_ring_entries: 2048,
            tx_budget_frames: 256,
            pending_datagrams: 64,
            pending_ms_max: 1000,
            slow_path_batch: 32,
            bind_retries: 100,
        }
    }
}

/// A limit that contradicts the kernel's rules or another limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("af_xdp limit {name} = {value} is invalid: {rule}")]
pub struct LimitsError {
    /// Name of the field.
    pub name: &'static str,
    /// Its value.
    pub value: u64,
    /// What it must satisfy.
    pub rule: &'static str,
}

impl AfXdpLimits {
    /// Checks every limit.
    ///
    /// # Errors
    /// The first limit that breaks its rule.
    pub fn validate(&self) -> Result<(), LimitsError> {
        let rule = |holds: bool, name, value: u64, rule| {
            if holds { Ok(()) } else { Err(LimitsError { name, value, rule }) }
        };
        let frame_size = self.frame_size_bytes;
        rule(
            matches!(frame_size, 2048 | 4096),
            "frame_size_bytes",
            frame_size.into(),
            "use 2048 or 4096: the kernel takes powers of two up to a page",
        )?;
        for (name, entries) in [
            ("fill_ring_entries", self.fill_ring_entries),
            ("completion_ring_entries", self.completion_ring_entries),
            ("rx_ring_entries", self.rx_ring_entries),
            ("tx_ring_entries", self.tx_ring_entries),
        ] {
            let holds = entries.is_power_of_two() && (64..=1 << 20).contains(&entries);
            rule(holds, name, entries.into(), "use a power of two between 64 and 1048576")?;
        }
        let span = FRAMES_PER_PACKET_MAX as u32;
        rule(
            (span..=self.fill_ring_entries / 2).contains(&self.rx_frames),
            "rx_frames",
            self.rx_frames.into(),
            "use at least 17 (one multi-buffer packet) and at most half of fill_ring_entries",
        )?;
        rule(
            (span..=self.completion_ring_entries).contains(&self.tx_frames),
            "tx_frames",
            self.tx_frames.into(),
            "use at least 17 (one multi-buffer packet) and at most completion_ring_entries",
        )?;
        rule(
            (32..=self.tx_ring_entries).contains(&self.tx_budget_frames),
            "tx_budget_frames",
            self.tx_budget_frames.into(),
            "use at least 32 (the kernel's default) and at most tx_ring_entries",
        )?;
        rule(
            (1..=1024).contains(&self.slow_path_batch),
            "slow_path_batch",
            self.slow_path_batch as u64,
            "use 1 to 1024: each takes 64 KiB of memory",
        )?;
        rule(
            self.pending_datagrams <= 65_536,
            "pending_datagrams",
            self.pending_datagrams as u64,
            "use at most 65536",
        )
    }

    /// Bytes of a received packet that fit one frame.
    pub(super) fn rx_room_bytes(&self) -> u32 {
        self.frame_size_bytes - RX_HEADROOM_BYTES
    }

    /// All frames.
    pub(super) fn frames(&self) -> u32 {
        self.rx_frames + self.tx_frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        AfXdpLimits::default().validate().expect("valid");
    }

    #[test]
    fn each_rule_is_checked_and_named() {
        type Change = fn(&mut AfXdpLimits);
        let cases: [(&str, Change); 9] = [
            ("frame_size_bytes", |limits| limits.frame_size_bytes = 8192),
            ("fill_ring_entries", |limits| limits.fill_ring_entries = 3000),
            ("completion_ring_entries", |limits| limits.completion_ring_entries = 0),
            ("rx_ring_entries", |limits| limits.rx_ring_entries = 1 << 21),
            ("tx_ring_entries", |limits| limits.tx_ring_entries = 33),
            ("rx_frames", |limits| limits.rx_frames = 4097),
            ("tx_frames", |limits| limits.tx_frames = 16),
            ("tx_budget_frames", |limits| limits.tx_budget_frames = 4096),
            ("slow_path_batch", |limits| limits.slow_path_batch = 0),
        ];
        for (name, change) in cases {
            let mut limits = AfXdpLimits::default();
            change(&mut limits);
            assert_eq!(limits.validate().expect_err(name).name, name);
        }
    }
}
