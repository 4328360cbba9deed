//! The file as it is written, every key optional, and the way from there to a
//! checked [`Scenario`].
//!
//! Numbers are read signed, so that a negative one is refused by name and range
//! like any other wrong value.

use serde::Deserialize;

use super::{
    AccessConfig, BURST_BYTES_MAX, CHUNKS_MAX, CongestionControlName, FLOW_BYTES_MAX, FLOWS_MAX,
    FlowDirection, FlowSpec, ResumeSpec, SEED_DEFAULT, STREAMS_MAX, Scenario, ScenarioError,
    TIME_LIMIT_MS_DEFAULT, TIME_LIMIT_MS_MAX,
};
use crate::datapath::sim::link::{
    LinkConfig, LinkPlan, LinkStep, QueueLimit, TIME_US_MAX, range_of,
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawScenario {
    name: String,
    seed: Option<i64>,
    time_limit_ms: Option<i64>,
    link: RawLink,
    access: Option<RawAccess>,
    #[serde(default)]
    flow: Vec<RawFlow>,
}

/// The keys of `[link]`, `[link.reverse]` and their steps: one type, so that
/// what a later table gives can be laid over an earlier one.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLink {
    rate_bps: Option<i64>,
    delay_us: Option<i64>,
    jitter_us: Option<i64>,
    queue_us: Option<i64>,
    queue_bytes: Option<i64>,
    mtu: Option<i64>,
    loss: Option<f64>,
    loss_every: Option<i64>,
    reorder: Option<f64>,
    reorder_us: Option<i64>,
    duplicate: Option<f64>,
    corrupt: Option<f64>,
    ecn_threshold_us: Option<i64>,
    aggregation_bytes: Option<i64>,
    aggregation_us: Option<i64>,
    policer_rate_bps: Option<i64>,
    policer_bucket_bytes: Option<i64>,
    policer_initial_bytes: Option<i64>,
    down: Option<bool>,
    /// Steps only.
    at_ms: Option<i64>,
    /// `[link]` only.
    reverse: Option<Box<RawLink>>,
    /// `[link]` and `[link.reverse]` only.
    step: Vec<RawLink>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAccess {
    rate_bps: Option<i64>,
    delay_us: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawFlow {
    cc: Option<String>,
    start_ms: Option<i64>,
    bytes: Option<i64>,
    direction: Option<String>,
    streams: Option<i64>,
    chunk_bytes: Option<i64>,
    chunk_every_ms: Option<i64>,
    chunks: Option<i64>,
    resume_rate_bps: Option<i64>,
    resume_rtt_us: Option<i64>,
}

impl RawScenario {
    pub(super) fn parse(text: &str) -> Result<Self, ScenarioError> {
        Ok(toml::from_str(text)?)
    }

    pub(super) fn check(self) -> Result<Scenario, ScenarioError> {
        if self.name.trim().is_empty() {
            return Err(ScenarioError::value("name".to_owned(), "\"\"", "a name"));
        }
        let seed = unsigned("seed", self.seed, SEED_DEFAULT, 0, i64::MAX as u64)?;
        let time_limit_ms = unsigned(
            "time_limit_ms",
            self.time_limit_ms,
            TIME_LIMIT_MS_DEFAULT,
            1,
            TIME_LIMIT_MS_MAX,
        )?;
        let (forward, reverse) = self.link.plans()?;
        let access = self.access.map(|access| access.check()).transpose()?;
        let count = self.flow.len();
        if count == 0 || count > FLOWS_MAX {
            let expected = format!("1 to {FLOWS_MAX} [[flow]] tables");
            return Err(ScenarioError::value("flow".to_owned(), count, expected));
        }
        let flows = self.flow.iter().enumerate();
        let flows: Vec<_> = flows
            .map(|(index, flow)| flow.check(index, time_limit_ms))
            .collect::<Result<_, _>>()?;
        Ok(Scenario { name: self.name, seed, time_limit_ms, forward, reverse, access, flows })
    }
}

impl RawLink {
    /// Both directions with all their steps.
    fn plans(self) -> Result<(LinkPlan, LinkPlan), ScenarioError> {
        self.refuse_misplaced("link", Place::Link)?;
        if self.rate_bps.is_none() {
            let key = "link.rate_bps".to_owned();
            let (min, max) = range_of("rate_bps");
            return Err(ScenarioError::value(key, "nothing", format!("{min} to {max}")));
        }
        let reverse = self.reverse.clone().map(|reverse| *reverse).unwrap_or_default();
        reverse.refuse_misplaced("link.reverse", Place::Reverse)?;
        let steps = checked_steps("link.step", &self.step)?;
        let reverse_steps = checked_steps("link.reverse.step", &reverse.step)?;

        let forward_plan = plan("link", &self, &RawLink::default(), &steps, &[])?;
        let reverse_plan = plan("link.reverse", &self, &reverse, &steps, &reverse_steps)?;
        Ok((forward_plan, reverse_plan))
    }

    fn refuse_misplaced(&self, table: &str, place: Place) -> Result<(), ScenarioError> {
        let misplaced = [
            ("at_ms", self.at_ms.is_some() && place != Place::Step, "only in a step"),
            ("reverse", self.reverse.is_some() && place != Place::Link, "only in [link]"),
            (
                "step",
                !self.step.is_empty() && place == Place::Step,
                "only in [link] and [link.reverse]",
            ),
        ];
        for (key, wrong, expected) in misplaced {
            if wrong {
                return Err(ScenarioError::value(format!("{table}.{key}"), "given", expected));
            }
        }
        if self.queue_us.is_some() && self.queue_bytes.is_some() {
            let key = format!("{table}.queue_bytes");
            return Err(ScenarioError::value(key, "given", "queue_us or queue_bytes, not both"));
        }
        Ok(())
    }

    /// Takes over the keys that `over` gives.
    fn lay_over(&mut self, over: &Self) {
        macro_rules! take_over {
            ($($key:ident)*) => { $( if over.$key.is_some() { self.$key = over.$key; } )* };
        }
        take_over! {
            rate_bps delay_us jitter_us mtu loss loss_every reorder reorder_us duplicate corrupt
            ecn_threshold_us aggregation_bytes aggregation_us policer_rate_bps
            policer_bucket_bytes policer_initial_bytes down
        }
        if over.queue_us.is_some() || over.queue_bytes.is_some() {
            (self.queue_us, self.queue_bytes) = (over.queue_us, over.queue_bytes);
        }
    }

    fn config(&self, table: &str) -> Result<LinkConfig, ScenarioError> {
        let number = |key: &str, value: Option<i64>, default: u64| {
            let (min, max) = range_of(key);
            unsigned(&format!("{table}.{key}"), value, default, min, max)
        };
        let default = LinkConfig::default();
        let queue = match (self.queue_us, self.queue_bytes) {
            (Some(_), _) => QueueLimit::TimeUs(number("queue_us", self.queue_us, 0)?),
            (None, Some(_)) => QueueLimit::Bytes(number("queue_bytes", self.queue_bytes, 0)?),
            (None, None) => QueueLimit::Unlimited,
        };
        let config = LinkConfig {
            rate_bps: number("rate_bps", self.rate_bps, default.rate_bps)?,
            delay_us: number("delay_us", self.delay_us, default.delay_us)?,
            jitter_us: number("jitter_us", self.jitter_us, default.jitter_us)?,
            queue,
            mtu: number("mtu", self.mtu, default.mtu)?,
            loss: self.loss.unwrap_or(default.loss),
            loss_every: number("loss_every", self.loss_every, default.loss_every)?,
            reorder: self.reorder.unwrap_or(default.reorder),
            reorder_us: number("reorder_us", self.reorder_us, default.reorder_us)?,
            duplicate: self.duplicate.unwrap_or(default.duplicate),
            corrupt: self.corrupt.unwrap_or(default.corrupt),
            ecn_threshold_us: number("ecn_threshold_us", self.ecn_threshold_us, 0)?,
            aggregation_bytes: number("aggregation_bytes", self.aggregation_bytes, 0)?,
            aggregation_us: number("aggregation_us", self.aggregation_us, 0)?,
            policer_rate_bps: number("policer_rate_bps", self.policer_rate_bps, 0)?,
            policer_bucket_bytes: number("policer_bucket_bytes", self.policer_bucket_bytes, 0)?,
            policer_initial_bytes: number("policer_initial_bytes", self.policer_initial_bytes, 0)?,
            down: self.down.unwrap_or(default.down),
        };
        config.check().map_err(|error| ScenarioError::of_link(table, error))?;
        Ok(config)
    }
}

/// Which table a [`RawLink`] was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Link,
    Reverse,
    Step,
}

/// A step whose time has been checked, with its name in messages.
struct TimedStep<'a> {
    at_ms: u64,
    table: String,
    keys: &'a RawLink,
}

fn checked_steps<'a>(
    table: &str,
    steps: &'a [RawLink],
) -> Result<Vec<TimedStep<'a>>, ScenarioError> {
    let mut checked: Vec<TimedStep<'a>> = Vec::with_capacity(steps.len());
    for (index, keys) in steps.iter().enumerate() {
        let table = format!("{table}[{index}]");
        keys.refuse_misplaced(&table, Place::Step)?;
        let key = format!("{table}.at_ms");
        if keys.at_ms.is_none() {
            let expected = format!("0 to {TIME_LIMIT_MS_MAX}");
            return Err(ScenarioError::value(key, "nothing", expected));
        }
        let earliest = checked.last().map_or(0, |step| step.at_ms);
        let at_ms = unsigned(&key, keys.at_ms, 0, earliest, TIME_LIMIT_MS_MAX)?;
        checked.push(TimedStep { at_ms, table, keys });
    }
    Ok(checked)
}

/// One direction: `base` and `steps` of the link, with `fixed` and its
/// `own_steps` laid over them.
fn plan(
    table: &str,
    base: &RawLink,
    fixed: &RawLink,
    steps: &[TimedStep<'_>],
    own_steps: &[TimedStep<'_>],
) -> Result<LinkPlan, ScenarioError> {
    let resolve = |base: &RawLink, fixed: &RawLink, table: &str| {
        let mut keys = base.clone();
        keys.lay_over(fixed);
        keys.config(table)
    };
    let mut plan = LinkPlan::constant(resolve(base, fixed, table)?);
    let (mut base, mut fixed) = (base.clone(), fixed.clone());
    let mut all: Vec<_> = steps.iter().map(|step| (step, false)).collect();
    all.extend(own_steps.iter().map(|step| (step, true)));
    all.sort_by_key(|(step, _)| step.at_ms);
    for (step, own) in all {
        if own { &mut fixed } else { &mut base }.lay_over(step.keys);
        let config = resolve(&base, &fixed, &step.table)?;
        plan.steps.push(LinkStep { at_ms: step.at_ms, config });
    }
    Ok(plan)
}

impl RawAccess {
    fn check(&self) -> Result<AccessConfig, ScenarioError> {
        let (min, max) = range_of("rate_bps");
        // An access without a rate only delays.
        let rate_bps = unsigned("access.rate_bps", self.rate_bps, max, min, max)?;
        let delay_us = unsigned("access.delay_us", self.delay_us, 0, 0, TIME_US_MAX)?;
        Ok(AccessConfig { rate_bps, delay_us })
    }
}

impl RawFlow {
    fn check(&self, index: usize, time_limit_ms: u64) -> Result<FlowSpec, ScenarioError> {
        let name = |key: &str| format!("flow[{index}].{key}");
        let number =
            |key: &str, value, default, min, max| unsigned(&name(key), value, default, min, max);
        let (bursts, chunks) = (self.chunk_bytes.unwrap_or(0) > 0, self.chunks.unwrap_or(0) > 0);
        let bytes_min = u64::from(!chunks);
        let wants_bursts = bursts || chunks || self.chunk_every_ms.unwrap_or(0) > 0;
        let burst_min = u64::from(wants_bursts);
        let spec = FlowSpec {
            cc: choice(&name("cc"), self.cc.as_deref(), &CongestionControlName::ALL, |cc| {
                cc.name()
            })?,
            start_ms: number("start_ms", self.start_ms, 0, 0, time_limit_ms)?,
            bytes: number("bytes", self.bytes, 0, bytes_min, FLOW_BYTES_MAX)?,
            direction: choice(
                &name("direction"),
                self.direction.as_deref(),
                &FlowDirection::ALL,
                |direction| direction.name(),
            )?,
            streams: number("streams", self.streams, 1, 1, STREAMS_MAX)?,
            chunk_bytes: number("chunk_bytes", self.chunk_bytes, 0, burst_min, BURST_BYTES_MAX)?,
            chunk_every_ms: number(
                "chunk_every_ms",
                self.chunk_every_ms,
                0,
                burst_min,
                TIME_LIMIT_MS_MAX,
            )?,
            chunks: number("chunks", self.chunks, 0, 0, CHUNKS_MAX)?,
            resume: self.resume(&name)?,
        };
        if spec.total_bytes() > FLOW_BYTES_MAX {
            let expected = format!("at most {FLOW_BYTES_MAX} bytes over all bursts");
            return Err(ScenarioError::value(name("chunks"), spec.chunks, expected));
        }
        Ok(spec)
    }

    /// Both keys or none.
    fn resume(&self, name: &dyn Fn(&str) -> String) -> Result<Option<ResumeSpec>, ScenarioError> {
        if self.resume_rate_bps.is_none() && self.resume_rtt_us.is_none() {
            return Ok(None);
        }
        let (min, max) = range_of("rate_bps");
        let rate_bps = unsigned(&name("resume_rate_bps"), self.resume_rate_bps, 0, min, max)?;
        let rtt_us = unsigned(&name("resume_rtt_us"), self.resume_rtt_us, 0, 1, TIME_US_MAX)?;
        Ok(Some(ResumeSpec { rate_bps, rtt_us }))
    }
}

/// The number given, or `default`; both must be within the range.
fn unsigned(
    key: &str,
    value: Option<i64>,
    default: u64,
    min: u64,
    max: u64,
) -> Result<u64, ScenarioError> {
    let number = value.map_or(Ok(default), u64::try_from);
    match number {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => {
            let shown = value.map_or_else(|| default.to_string(), |value| value.to_string());
            Err(ScenarioError::value(key.to_owned(), shown, format!("{min} to {max}")))
        }
    }
}

/// The choice of this name, or the default when none was given.
fn choice<T: Copy + Default>(
    key: &str,
    given: Option<&str>,
    all: &[T],
    name_of: impl Fn(T) -> &'static str,
) -> Result<T, ScenarioError> {
    let Some(given) = given else {
        return Ok(T::default());
    };
    all.iter().copied().find(|choice| name_of(*choice) == given).ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|choice| name_of(*choice)).collect();
        ScenarioError::value(key.to_owned(), format!("{given:?}"), names.join(" | "))
    })
}
