//! What an engine remembers of its peers' paths, for careful resume (RFC 9959).
//!
//! Shared by the shards; asked when a connection begins and told when it ends, never while
//! packets go. A peer is an IPv6 address (and the link, where the address is of the link);
//! everything is forgotten when the engine's own address changes, also what connections from before
//! have seen, and what they have not tried yet.
//!
//! * What is remembered is what the path carried at last: BBR's bandwidth and `min_rtt`, if a new
//!   connection gains by it (four initial windows). A connection that ended in Startup has not seen
//!   the path's limit: it can only tell of more than is known.
//! * One connection to a peer at a time tries it. Its outcome decides what the next one finds: after
//!   a retreat nothing, until an end of a connection has told anew.
//! * At most [`RESUME_PATHS_MAX`] paths, each for [`RESUME_LIFETIME_S`].

use std::collections::HashMap;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn_proto::Connection;

use super::bbr::{BbrProbe, ResumePhase, ResumeSeed, Snapshot, State};
use super::congestion::Gated;
use super::{Protocol, v6};
use crate::config::{RESUME_JUMP_BYTES_MAX, RESUME_LIFETIME_S, RESUME_PATHS_MAX, RESUME_WITHIN_S};

/// A path is worth remembering whose window is this many initial windows.
const INITIAL_WINDOWS_MIN: u64 = 4;

/// Who is at the other end: an address, and its link where it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Peer(Ipv6Addr, u32);

impl Peer {
    fn of(remote: &SocketAddrV6) -> Self {
        Self(*remote.ip(), remote.scope_id())
    }
}

#[derive(Debug)]
struct Path {
    bandwidth_bytes_per_s: u64,
    min_rtt: Duration,
    is_limit: bool,
    saved_at: Instant,
    trial: Option<Trial>,
}

/// A connection that was told.
#[derive(Debug)]
struct Trial {
    since: Instant,
    /// `None` until the connection is made.
    probe: Option<BbrProbe>,
}

impl Trial {
    fn is_under_way(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) <= Duration::from_secs(RESUME_WITHIN_S)
            && self.probe.as_ref().is_none_or(|probe| probe.resume_phase().is_under_way())
    }

    fn has_retreated(&self) -> bool {
        self.probe.as_ref().is_some_and(|probe| probe.resume_phase() == ResumePhase::Retreated)
    }
}

/// The paths of an engine. See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct PathMemory(Mutex<Paths>);

#[derive(Debug, Default)]
struct Paths {
    by_peer: HashMap<Peer, Path>,
    /// When our own address changed last.
    forgotten_at: Option<Instant>,
}

impl Protocol {
    /// What a connection that begins starts from: what the configuration says of all paths, else
    /// what is remembered of its own.
    pub(super) fn remembered(&mut self, now: Instant, remote: &SocketAddrV6) -> Option<ResumeSeed> {
        if self.config.resume.is_some() {
            return self.config.resume;
        }
        let known = self.paths.as_ref().map_or(Known::Nothing, |paths| paths.ask(now, remote));
        match known {
            Known::Path(seed) => return Some(seed),
            Known::Expired => self.counters.resume_expired += 1,
            Known::Nothing | Known::Taken => {}
        }
        None
    }

    /// The connection of [`remembered`](Self::remembered) exists, or will not.
    pub(super) fn tries_remembered(
        &self,
        remote: &SocketAddrV6,
        resume: Option<ResumeSeed>,
        made: Option<&Connection>,
    ) {
        let Some(paths) = &self.paths else { return };
        if resume.is_none() || self.config.resume.is_some() {
            return;
        }
        match made.and_then(|made| Gated::state_of(made).bbr().cloned()) {
            Some(probe) => paths.begin(remote, probe),
            None => paths.forgo(remote),
        }
    }

    /// The connection in this slot is over: what it saw of its path is kept, what came of what was
    /// known is counted.
    pub(super) fn remember_path(&mut self, now: Instant, slot: u32) {
        let Some(conn) = self.conns[slot as usize].as_deref() else { return };
        let Some(probe) = conn.bbr() else { return };
        let counters = &mut self.counters;
        match probe.resume_phase() {
            ResumePhase::Off => {}
            ResumePhase::Validated => counters.resume_validated += 1,
            ResumePhase::Retreated => counters.resume_retreated += 1,
            // Who ends in the middle has not used it to an end.
            _ => counters.resume_declined += 1,
        }
        if let Some(paths) = &self.paths {
            let packet = u64::from(conn.inner.current_mtu());
            let initial_window = self.config.initial_window_packets * packet;
            let remote = v6(conn.inner.remote_address());
            paths.tell(now, conn.begun, &remote, &probe.snapshot(), initial_window);
        }
    }

    /// Our own address changed.
    pub(super) fn forget_paths(&self, now: Instant) {
        if let Some(paths) = &self.paths {
            paths.forget_all(now);
        }
    }
}

/// What is known of the path that a connection is about to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Nothing,
    /// It was, too long ago.
    Expired,
    /// Another connection finds out whether it still holds.
    Taken,
    Path(ResumeSeed),
}

impl PathMemory {
    fn lock(&self) -> MutexGuard<'_, Paths> {
        // A panic elsewhere leaves whole entries behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a connection that begins may start from. It then says so
    /// ([`begin`](Self::begin), or [`forgo`](Self::forgo)).
    pub(crate) fn ask(&self, now: Instant, remote: &SocketAddrV6) -> Known {
        let paths = &mut self.lock().by_peer;
        let peer = Peer::of(remote);
        let Some(path) = paths.get_mut(&peer) else { return Known::Nothing };
        if now.saturating_duration_since(path.saved_at) > Duration::from_secs(RESUME_LIFETIME_S) {
            paths.remove(&peer);
            return Known::Expired;
        }
        if path.trial.as_ref().is_some_and(Trial::has_retreated) {
            paths.remove(&peer);
            return Known::Nothing;
        }
        if path.trial.as_ref().is_some_and(|trial| trial.is_under_way(now)) {
            return Known::Taken;
        }
        path.trial = Some(Trial { since: now, probe: None });
        Known::Path(ResumeSeed {
            bandwidth_bytes_per_s: path.bandwidth_bytes_per_s,
            min_rtt: path.min_rtt,
            is_limit: path.is_limit,
            jump_bytes_max: RESUME_JUMP_BYTES_MAX,
        })
    }

    /// The connection that [`ask`](Self::ask)ed exists.
    pub(crate) fn begin(&self, remote: &SocketAddrV6, probe: BbrProbe) {
        let paths = &mut self.lock().by_peer;
        if let Some(trial) = paths.get_mut(&Peer::of(remote)).and_then(|path| path.trial.as_mut()) {
            trial.probe = Some(probe);
        }
    }

    /// The connection that [`ask`](Self::ask)ed will not exist.
    pub(crate) fn forgo(&self, remote: &SocketAddrV6) {
        if let Some(path) = self.lock().by_peer.get_mut(&Peer::of(remote)) {
            path.trial = None;
        }
    }

    /// A connection has ended that began at `begun`: what it saw of its path, and the initial window
    /// it had. Nothing is taken from one that has seen our address change: it is not known which of
    /// the paths its estimate is of.
    pub(crate) fn tell(
        &self,
        now: Instant,
        begun: Instant,
        remote: &SocketAddrV6,
        seen: &Snapshot,
        initial_window_bytes: u64,
    ) {
        let Some(min_rtt) = seen.min_rtt else { return };
        let bandwidth_bytes_per_s = seen.bw_bytes_per_s;
        let bdp = u128::from(bandwidth_bytes_per_s) * min_rtt.as_nanos() / 1_000_000_000;
        let least = INITIAL_WINDOWS_MIN * initial_window_bytes;
        if seen.delivered_bytes < least || bdp < u128::from(least) {
            return;
        }
        let is_limit = seen.state != State::Startup;
        let mut locked = self.lock();
        if locked.forgotten_at.is_some_and(|at| begun <= at) {
            return;
        }
        let paths = &mut locked.by_peer;
        let peer = Peer::of(remote);
        let knows_more = |path: &Path| path.bandwidth_bytes_per_s >= bandwidth_bytes_per_s;
        if !is_limit && paths.get(&peer).is_some_and(knows_more) {
            return;
        }
        if !paths.contains_key(&peer) && paths.len() >= RESUME_PATHS_MAX {
            let oldest = paths.iter().min_by_key(|(_, path)| path.saved_at).map(|(peer, _)| *peer);
            paths.remove(&oldest.expect("not empty"));
        }
        // A trial of another connection goes on; one that is over has been answered by this.
        let trial = paths.get_mut(&peer).and_then(|path| path.trial.take());
        let trial = trial.filter(|trial| trial.is_under_way(now));
        paths.insert(peer, Path { bandwidth_bytes_per_s, min_rtt, is_limit, saved_at: now, trial });
    }

    /// Our own address changed: every path is another, also that of who was told and waits.
    pub(crate) fn forget_all(&self, now: Instant) {
        let mut paths = self.lock();
        paths.forgotten_at = paths.forgotten_at.max(Some(now));
        for (_, path) in paths.by_peer.drain() {
            if let Some(probe) = path.trial.and_then(|trial| trial.probe) {
                probe.withdraw_resume();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quinn_proto::congestion::ControllerFactory;

    use super::super::bbr::{BbrConfig, Params};
    use super::*;
    use crate::config::TransportConfig;

    const INITIAL_WINDOW: u64 = 12_000;

    fn peer(number: u16) -> SocketAddrV6 {
        SocketAddrV6::new(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number), 4433, 0, 0)
    }

    /// 100 Mbit/s with 100 ms: a BDP of 1.25 MB.
    fn seen() -> Snapshot {
        let probe = BbrConfig::new(Params::BBR2, 1).build_bbr(Instant::now(), 1200).probe();
        let mut seen = probe.snapshot();
        seen.state = State::ProbeBwCruise;
        seen.bw_bytes_per_s = 12_500_000;
        seen.min_rtt = Some(Duration::from_millis(100));
        seen.delivered_bytes = 10_000_000;
        seen
    }

    fn tell(memory: &PathMemory, now: Instant, remote: SocketAddrV6) {
        memory.tell(now, now, &remote, &seen(), INITIAL_WINDOW);
    }

    /// The probe of a connection that has the seed.
    fn trial(seed: ResumeSeed) -> BbrProbe {
        let mut config = BbrConfig::new(Params::BBR2, 1);
        config.resume = Some(seed);
        config.build_bbr(Instant::now(), 1200).probe()
    }

    #[test]
    fn one_connection_at_a_time_tries_what_another_has_seen() {
        let (memory, now) = (PathMemory::default(), Instant::now());
        assert_eq!(memory.ask(now, &peer(1)), Known::Nothing);
        tell(&memory, now, peer(1));
        let Known::Path(seed) = memory.ask(now, &peer(1)) else { panic!("just told") };
        assert_eq!(seed.bandwidth_bytes_per_s, 12_500_000);
        assert_eq!(seed.min_rtt, Duration::from_millis(100));
        assert_eq!(memory.ask(now, &peer(1)), Known::Taken, "before the first one is made");
        memory.begin(&peer(1), trial(seed));
        assert_eq!(memory.ask(now, &peer(1)), Known::Taken, "and before it knows");
        let late = now + Duration::from_secs(RESUME_WITHIN_S + 1);
        assert!(matches!(memory.ask(late, &peer(1)), Known::Path(_)), "it will not try any more");
        memory.forgo(&peer(1));
        assert!(matches!(memory.ask(late, &peer(1)), Known::Path(_)), "nobody tries");
        let scoped = SocketAddrV6::new(*peer(1).ip(), 4433, 0, 3);
        assert_eq!(memory.ask(now, &scoped), Known::Nothing, "another link");
        let port = SocketAddrV6::new(*peer(1).ip(), 1, 0, 0);
        assert_eq!(memory.ask(late, &port), Known::Taken, "the port is not of the path");
    }

    #[test]
    fn a_retreat_ends_it_until_somebody_tells_anew() {
        let (memory, now) = (PathMemory::default(), Instant::now());
        let retreat = |memory: &PathMemory| {
            let Known::Path(seed) = memory.ask(now, &peer(1)) else { panic!("told") };
            let probe = trial(seed);
            memory.begin(&peer(1), probe.clone());
            probe.set_resume_phase(ResumePhase::Retreated);
        };
        tell(&memory, now, peer(1));
        retreat(&memory);
        assert_eq!(memory.ask(now, &peer(1)), Known::Nothing);
        tell(&memory, now, peer(1));
        retreat(&memory);
        // The one that retreated ends: what it saw is the path as it is now.
        tell(&memory, now, peer(1));
        assert!(matches!(memory.ask(now, &peer(1)), Known::Path(_)));
    }

    #[test]
    fn only_what_helps_is_remembered() {
        let (memory, now) = (PathMemory::default(), Instant::now());
        let changes: [fn(&mut Snapshot); 4] = [
            |seen| seen.min_rtt = None,
            |seen| seen.min_rtt = Some(Duration::from_micros(50)),
            |seen| seen.delivered_bytes = 40_000,
            |seen| seen.bw_bytes_per_s = 400_000,
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut seen = seen();
            change(&mut seen);
            memory.tell(now, now, &peer(1), &seen, INITIAL_WINDOW);
            assert_eq!(memory.ask(now, &peer(1)), Known::Nothing, "change {index}");
        }
        let tell_of_startup = |bandwidth_bytes_per_s| {
            let mut seen = seen();
            (seen.state, seen.bw_bytes_per_s) = (State::Startup, bandwidth_bytes_per_s);
            memory.tell(now, now, &peer(1), &seen, INITIAL_WINDOW);
            let Known::Path(seed) = memory.ask(now, &peer(1)) else { panic!("told") };
            memory.forgo(&peer(1));
            (seed.bandwidth_bytes_per_s, seed.is_limit)
        };
        assert_eq!(tell_of_startup(12_000_000), (12_000_000, false));
        assert_eq!(tell_of_startup(13_000_000), (13_000_000, false));
        tell(&memory, now, peer(1));
        assert_eq!(tell_of_startup(12_000_000), (12_500_000, true), "the limit is known");
    }

    #[test]
    fn paths_are_bounded_in_number_and_time() {
        let (memory, start) = (PathMemory::default(), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        let paths = u16::try_from(RESUME_PATHS_MAX).expect("a few thousand");
        for number in 0..paths + 100 {
            tell(&memory, at(u64::from(number / 1000)), peer(number));
        }
        assert_eq!(memory.lock().by_peer.len(), RESUME_PATHS_MAX);
        let kept = |number| memory.lock().by_peer.contains_key(&Peer::of(&peer(number)));
        assert!(!(0..100).any(|number| kept(number) && !(0..1000).any(|n| !kept(n))));
        assert_eq!((0..1000).filter(|n| kept(*n)).count(), 900, "the oldest made room");
        let last = paths + 99;
        let saved = at(u64::from(last / 1000));
        let end = saved + Duration::from_secs(RESUME_LIFETIME_S);
        assert!(matches!(memory.ask(end, &peer(last)), Known::Path(_)));
        let later = end + Duration::from_secs(1);
        assert_eq!(memory.ask(later, &peer(last)), Known::Expired);
        assert_eq!(memory.ask(later, &peer(last)), Known::Nothing);
        memory.forget_all(later);
        assert!(memory.lock().by_peer.is_empty());
    }

    #[test]
    fn a_change_of_our_address_outlasts_the_connections_from_before() {
        let (memory, start) = (PathMemory::default(), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        tell(&memory, start, peer(1));
        let Known::Path(seed) = memory.ask(start, &peer(1)) else { panic!("told") };
        let waiting = trial(seed);
        memory.begin(&peer(1), waiting.clone());
        tell(&memory, start, peer(2));
        let Known::Path(seed) = memory.ask(start, &peer(2)) else { panic!("told") };
        let jumped = trial(seed);
        jumped.set_resume_phase(ResumePhase::Validated);
        memory.begin(&peer(2), jumped.clone());

        memory.forget_all(at(10));
        assert_eq!(waiting.resume_phase(), ResumePhase::Declined, "what was offered is withdrawn");
        assert_eq!(jumped.resume_phase(), ResumePhase::Validated, "what was done is not");
        for begun in [at(0), at(10)] {
            memory.tell(at(20), begun, &peer(1), &seen(), INITIAL_WINDOW);
            assert_eq!(memory.ask(at(20), &peer(1)), Known::Nothing, "the old address's path");
        }
        memory.tell(at(20), at(11), &peer(1), &seen(), INITIAL_WINDOW);
        assert!(matches!(memory.ask(at(20), &peer(1)), Known::Path(_)), "the new one's");
    }

    #[test]
    fn a_seed_is_for_the_first_path_of_a_connection() {
        let seed = ResumeSeed {
            bandwidth_bytes_per_s: 12_500_000,
            min_rtt: Duration::from_millis(100),
            is_limit: true,
            jump_bytes_max: RESUME_JUMP_BYTES_MAX,
        };
        let mut config = BbrConfig::new(Params::BBR2, 1);
        config.resume = Some(seed);
        let config = Arc::new(config);
        let phase = |config: &Arc<BbrConfig>| {
            let made = config.clone().build(Instant::now(), 1200).into_any();
            made.downcast::<super::super::bbr::Bbr>().expect("BBR").probe().resume_phase()
        };
        assert_eq!(phase(&config), ResumePhase::Reconnaissance);
        assert_eq!(phase(&config), ResumePhase::Off, "it has migrated");
    }

    #[test]
    fn only_bbr_can_resume() {
        for (name, can) in [("bbr2", true), ("bbr3", true), ("cubic", false), ("newreno", false)] {
            let text = format!("careful_resume = true\ncongestion_control = \"{name}\"");
            match TransportConfig::from_toml(&text) {
                Ok(_) => assert!(can, "{name}"),
                Err(error) => assert!(!can && error.contains("careful_resume"), "{name}: {error}"),
            }
        }
    }
}
