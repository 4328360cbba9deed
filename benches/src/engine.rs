//! The flags that every command shares, and the engine that they describe.

use std::net::SocketAddrV6;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use serde_json::json;
use stoq::certs::{CertificateFault, FaultCounters, RotationStatus};
use stoq::config::{BusyPoll, CongestionControl, CryptoProviderChoice, TransportConfig};
use stoq::datapath::choice::DatapathChoice;
use stoq::engine::{Engine, ShardStats};
use stoq::metrics::TransportStats;

/// Flags of the transport.
#[derive(Args, Clone, Debug)]
pub struct TransportArgs {
    /// Datapath: auto (the default), af_xdp, io_uring or socket.
    #[arg(long)]
    pub datapath: Option<DatapathChoice>,
    /// Interface, for AF_XDP.
    #[arg(long)]
    pub iface: Option<String>,
    /// Shards, 1 by default; with AF_XDP one per device queue.
    #[arg(long)]
    pub queues: Option<usize>,
    /// First device queue, 0 by default.
    #[arg(long)]
    pub first_queue: Option<u32>,
    /// Cores for the shards, comma-separated.
    #[arg(long, value_delimiter = ',')]
    pub cores: Vec<usize>,
    /// Congestion control: bbr2 (the default), bbr3, cubic or newreno.
    #[arg(long)]
    pub cc: Option<CongestionControl>,
    /// Start from what earlier connections saw of a peer's path (RFC 9959); bbr2 and bbr3 only.
    #[arg(long)]
    pub careful_resume: bool,
    /// Who seals packets: auto (ipsec-mb where installed, the default), aws-lc-rs or ipsec-mb.
    #[arg(long)]
    pub crypto_provider: Option<CryptoProviderChoice>,
    /// Largest UDP payload, bytes; 0: what the interface carries, the default.
    #[arg(long)]
    pub udp_payload: Option<u16>,
    /// What a shard without work does: off, adaptive or always spin.
    #[arg(long)]
    pub busy_poll: Option<BusyPoll>,
    /// Time to spin without work before sleeping, µs.
    #[arg(long)]
    pub spin_us: Option<u64>,
    /// Allow AF_XDP in generic (SKB) mode.
    #[arg(long)]
    pub allow_skb: bool,
    /// Refuse AF_XDP without zero-copy.
    #[arg(long)]
    pub zero_copy: bool,
    /// Write one qlog file per connection into this directory.
    #[arg(long)]
    pub qlog_dir: Option<PathBuf>,
    /// A TOML file with the engine's settings; a flag that is given wins.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// One JSON object a line on stdout.
    #[arg(long)]
    pub json: bool,
    /// End when the parent process ends.
    #[arg(long, hide = true)]
    pub die_with_parent: bool,
}

impl TransportArgs {
    /// The engine's settings, bound to `bind`: the file's, or the defaults, with the flags that were
    /// given.
    pub fn transport(&self, bind: SocketAddrV6) -> anyhow::Result<TransportConfig> {
        let mut config = match &self.config {
            None => TransportConfig::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("reading {}", path.display()))?;
                TransportConfig::from_toml(&text)
                    .map_err(anyhow::Error::msg)
                    .with_context(|| path.display().to_string())?
            }
        };
        config.bind = bind;
        self.override_settings(&mut config);
        Ok(config)
    }

    fn override_settings(&self, config: &mut TransportConfig) {
        fn set<T: Copy>(setting: &mut T, flag: Option<T>) {
            *setting = flag.unwrap_or(*setting);
        }
        set(&mut config.datapath, self.datapath);
        set(&mut config.shards, self.queues);
        set(&mut config.first_queue, self.first_queue);
        set(&mut config.congestion_control, self.cc);
        set(&mut config.crypto_provider, self.crypto_provider);
        set(&mut config.mtu_upper_bound_bytes, self.udp_payload);
        set(&mut config.busy_poll, self.busy_poll);
        set(&mut config.spin_us, self.spin_us);
        if !self.cores.is_empty() {
            config.cores.clone_from(&self.cores);
        }
        if self.iface.is_some() {
            config.interface.clone_from(&self.iface);
        }
        config.careful_resume |= self.careful_resume;
        config.allow_skb_mode |= self.allow_skb;
        config.require_zero_copy |= self.zero_copy;
        if self.qlog_dir.is_some() {
            config.qlog_dir.clone_from(&self.qlog_dir);
        }
    }

    /// Who seals packets: the flag, else the file, else `auto`.
    pub fn packet_crypto(&self) -> anyhow::Result<CryptoProviderChoice> {
        let anywhere = SocketAddrV6::new(std::net::Ipv6Addr::UNSPECIFIED, 0, 0, 0);
        Ok(self.transport(anywhere)?.crypto_provider)
    }

    /// Ends this process with its parent, when asked to.
    pub fn tie_to_parent(&self) -> anyhow::Result<()> {
        if self.die_with_parent {
            let signal = rustix::process::Signal::TERM;
            rustix::process::set_parent_process_death_signal(Some(signal))
                .context("prctl(PR_SET_PDEATHSIG)")?;
        }
        Ok(())
    }
}

/// The words for what carries an engine: datapath and mode of its first shard.
pub fn datapath_words(engine: &Engine) -> (String, String) {
    engine.datapaths().first().map_or_else(Default::default, |capabilities| {
        (capabilities.kind.name().to_owned(), capabilities.mode.clone())
    })
}

/// The XDP program's counters as a JSON object, `null` where no program runs.
pub fn xdp_json(engine: &Engine) -> anyhow::Result<serde_json::Value> {
    let Some(counters) = engine.xdp_counters() else { return Ok(serde_json::Value::Null) };
    let counters = counters.map_err(anyhow::Error::msg).context("reading the XDP counters")?;
    let counters = counters.into_iter().map(|(name, value)| (name.to_owned(), json!(value)));
    Ok(serde_json::Value::Object(counters.collect()))
}

/// Shard and datapath counters summed over the shards, as a JSON object.
pub fn stats_json(stats: &[ShardStats]) -> serde_json::Value {
    let mut sum = serde_json::Map::new();
    for stats in stats {
        for (name, value) in stats.shard.iter().chain(stats.datapath.iter()) {
            let entry = sum.entry(name).or_insert_with(|| 0u64.into());
            *entry = (entry.as_u64().unwrap_or(0) + value).into();
        }
    }
    sum.into()
}

/// How a certificate fares; dates as Unix time, s.
pub fn rotation_json(status: &RotationStatus) -> serde_json::Value {
    let unix_s = |date: Option<SystemTime>| {
        date.and_then(|date| date.duration_since(UNIX_EPOCH).ok()).map(|since| since.as_secs())
    };
    json!({
        "serial": status.serial, "not_before_unix_s": unix_s(status.not_before),
        "not_after_unix_s": unix_s(status.not_after),
        "next_renewal_unix_s": unix_s(status.next_renewal), "last_error": status.last_error,
        "renewals": status.renewals, "failures": status.failures, "alarms": status.alarms,
    })
}

/// What was refused, by kind; kinds that never were are left out.
pub fn faults_json(counters: &FaultCounters) -> serde_json::Value {
    let counts = CertificateFault::ALL.iter().map(|fault| (fault.label(), counters.count(*fault)));
    let met = counts.filter(|(_, count)| *count > 0);
    serde_json::Value::Object(met.map(|(name, count)| (name.to_owned(), count.into())).collect())
}

/// Turn times of the shard whose 99.9th percentile is the longest, µs.
pub fn turns_json(stats: &TransportStats) -> serde_json::Value {
    let worst = stats.shards.iter().map(|shard| shard.turns).max_by_key(|turns| turns.p999);
    let turns = worst.unwrap_or_default();
    let us = |time: std::time::Duration| time.as_micros() as u64;
    json!({
        "turns": turns.samples, "p50": us(turns.p50), "p99": us(turns.p99),
        "p999": us(turns.p999), "max": us(turns.max),
    })
}

/// Share of the time since `before` that each shard was busy, 0 to 1.
pub fn busy_shares(before: &[ShardStats], now: &[ShardStats], seconds: f64) -> Vec<f64> {
    before
        .iter()
        .zip(now)
        .map(|(before, now)| {
            let busy_ns = now.shard.busy_ns - before.shard.busy_ns;
            (busy_ns as f64 / 1e9 / seconds).min(1.0)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        transport: TransportArgs,
    }

    fn transport(flags: &[&str], file: Option<&str>) -> TransportConfig {
        static FILES: AtomicU32 = AtomicU32::new(0);
        // Relaxed: only uniqueness matters.
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let name = format!("stoq-flags-{}-{number}.toml", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut line: Vec<String> = vec!["stoq".into()];
        line.extend(flags.iter().map(ToString::to_string));
        if let Some(text) = file {
            std::fs::write(&path, text).expect("written");
            line.extend(["--config".into(), path.display().to_string()]);
        }
        let bind = "[::1]:4433".parse().expect("an address");
        let config = Cli::parse_from(line).transport.transport(bind);
        if file.is_some() {
            std::fs::remove_file(&path).expect("just written");
        }
        config.expect("valid")
    }

    const FILE: &str = "datapath = 'socket'\nshards = 3\nfirst_queue = 2\ncores = [5, 6, 7]\n\
                        congestion_control = 'cubic'\nmtu_upper_bound_bytes = 1400\nspin_us = 7\n\
                        interface = 'eth7'\nallow_skb_mode = true\nrequire_zero_copy = true\n\
                        failover = false\n";

    #[test]
    fn without_flags_the_file_stands() {
        let mut expected = TransportConfig::from_toml(FILE).expect("valid");
        expected.bind = "[::1]:4433".parse().expect("an address");
        assert_eq!(transport(&[], Some(FILE)), expected);
        let defaults = TransportConfig { bind: expected.bind, ..TransportConfig::default() };
        assert_eq!(transport(&[], None), defaults);
    }

    #[test]
    fn a_flag_that_is_given_wins() {
        let flags = [
            "--datapath",
            "io_uring",
            "--queues",
            "2",
            "--first-queue",
            "1",
            "--cores",
            "8,9",
            "--cc",
            "bbr3",
            "--udp-payload",
            "1300",
            "--spin-us",
            "0",
            "--iface",
            "eth8",
            "--careful-resume",
        ];
        let config = transport(&flags, Some(FILE));
        assert_eq!(config.datapath, DatapathChoice::IoUring);
        assert_eq!((config.shards, config.first_queue, config.spin_us), (2, 1, 0));
        assert_eq!(config.cores, [8, 9]);
        assert_eq!(config.congestion_control, CongestionControl::Bbr3);
        assert_eq!(
            (config.mtu_upper_bound_bytes, config.interface.as_deref()),
            (1300, Some("eth8"))
        );
        assert!(config.careful_resume && !transport(&[], Some(FILE)).careful_resume);
        assert!(!config.failover, "what has no flag is the file's");
        let one = transport(&["--cc", "newreno"], Some(FILE));
        assert_eq!((one.congestion_control, one.shards), (CongestionControl::NewReno, 3));
    }
}
