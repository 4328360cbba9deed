//! A certificate runs out because its CA is away: at a third and a tenth of its life, and at its end, each
//! alarm is raised once, and is seen as an event, in the statistics of a handle, in Prometheus and in
//! the log. A renewal ends all of it.
#![allow(clippy::unwrap_used)]

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use pair::{Watchdog, config};
use rustls_pki_types::CertificateDer;
use stoq::certs::{
    Alarm, CaError, CertificateAuthority, CertificateFault, CertificateRequest, IdentityNames,
    LocalCa, LocalCaConfig, Periodic, RotatingIdentity, RotationEvent, ServerTls, SimWallClock,
    WallClock,
};
use stoq::engine::Engine;

/// A CA that can be away.
struct Distant {
    ca: LocalCa,
    away: AtomicBool,
}

impl CertificateAuthority for Distant {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        if self.away.load(Ordering::SeqCst) {
            return Err(CaError::Unreachable { reason: "no \"route\"".to_owned() });
        }
        self.ca.issue(request)
    }
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Error lines about a certificate that runs out.
    fn alarms(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let is_alarm = |line: &&str| line.contains("ERROR") && line.contains("runs out");
        text.lines().filter(is_alarm).map(str::to_owned).collect()
    }
}

/// The value of a sample, if it is there.
fn sample(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    Some(line.parse().unwrap())
}

#[test]
fn each_alarm_is_an_event_a_metric_and_a_log_line() {
    let _watchdog = Watchdog::new("each_alarm_is_an_event_a_metric_and_a_log_line");
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone());
    subscriber.try_init().unwrap();
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let clock = Arc::new(SimWallClock::new(start));
    let ca = LocalCa::in_memory(LocalCaConfig::default(), clock.clone()).unwrap();
    let ca = Arc::new(Distant { ca, away: AtomicBool::new(false) });
    let (events, names) =
        (Arc::new(Mutex::new(Vec::new())), IdentityNames::new().with_dns("a.example").unwrap());
    let seen = events.clone();
    let identity = RotatingIdentity::with_authority(ca.clone(), names)
        .clock(clock.clone())
        .jitter_seed(7)
        .on_event(move |event| seen.lock().unwrap().push(event.clone()))
        .start()
        .unwrap();
    let tls = ServerTls::builder().identity(identity.clone()).clock(clock.clone()).alpn(["t"]);
    let tls = tls.build().unwrap();
    let engine = Engine::builder().config(config()).server(tls.crypto());
    let engine = engine.rotation(identity.clone()).start().unwrap();
    let status = engine.transport_stats().rotation.unwrap();
    let (not_before, not_after) = (status.not_before.unwrap(), status.not_after.unwrap());
    let life = not_after.duration_since(not_before).unwrap();
    ca.away.store(true, Ordering::SeqCst);
    let raised = || -> Vec<Alarm> {
        let events = events.lock().unwrap();
        let alarm = |event: &RotationEvent| match event {
            RotationEvent::Alarm { alarm, not_after: end } => {
                assert_eq!(*end, not_after);
                Some(*alarm)
            }
            _ => None,
        };
        events.iter().filter_map(alarm).collect()
    };
    let check = |expected: &[Alarm]| {
        identity.poll(clock.now());
        let text = engine.prometheus();
        assert_eq!(raised(), expected);
        let count = expected.len() as u64;
        assert_eq!(engine.transport_stats().rotation.unwrap().alarms, count);
        assert_eq!(sample(&text, "stoq_certificate_alarms_total"), Some(count));
        let lines = log.alarms();
        assert_eq!(lines.len(), expected.len(), "{lines:?}");
        for (line, alarm) in lines.iter().zip(expected) {
            assert!(line.contains(&format!("{alarm:?}")), "{line}");
            assert!(line.contains("cannot be reached"), "the cause is told, too: {line}");
        }
        text
    };
    let due = [
        (Alarm::ThirdLeft, not_after - life / 3),
        (Alarm::TenthLeft, not_after - life / 10),
        (Alarm::Expired, not_after + Duration::from_secs(1)),
    ];
    for (index, (_, at)) in due.iter().enumerate() {
        let raised = [Alarm::ThirdLeft, Alarm::TenthLeft, Alarm::Expired];
        clock.set(*at - Duration::from_secs(1));
        check(&raised[..index]);
        clock.set(*at);
        check(&raised[..=index]);
        // Not again and again.
        clock.advance(Duration::from_secs(2));
        let text = check(&raised[..=index]);
        let error = "stoq_certificate_last_error{error=\"the certificate authority cannot be reached: \
                     no \\\"route\\\"; will try again\"}";
        assert_eq!(sample(&text, error), Some(1), "{text}");
        assert_eq!(
            sample(&text, "stoq_certificate_not_after_seconds"),
            Some(not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs())
        );
    }
    assert_eq!(identity.faults().count(CertificateFault::Expired), 1);
    ca.away.store(false, Ordering::SeqCst);
    clock.set(identity.status().next_renewal.unwrap());
    let text = check(&[Alarm::ThirdLeft, Alarm::TenthLeft, Alarm::Expired]);
    let status = engine.transport_stats().rotation.unwrap();
    assert_eq!((status.renewals, &status.last_error), (1, &None));
    assert!(status.not_after.unwrap() > clock.now());
    assert!(!text.contains("stoq_certificate_last_error"), "{text}");
    let serial = format!("stoq_certificate_info{{serial=\"{}\"}}", status.serial.unwrap());
    assert_eq!(sample(&text, &serial), Some(1), "{text}");
}
