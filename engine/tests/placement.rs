//! Where shards run: on the cores that a process has, be it a single one, and on no other.

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pair::{Pair, Watchdog, config, identity};
use pollster::block_on;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use stoq::config::{BusyPoll, TransportConfig};
use stoq::connection::Connection;
use stoq::engine::Engine;

/// Tests look at the threads of their process: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The cores of the calling thread.
fn cores() -> Vec<usize> {
    let allowed = sched_getaffinity(None).expect("a thread has cores");
    (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect()
}

/// Runs `test` in a thread that has this one core, as all that it starts.
fn on_core<T: Send>(core: usize, test: impl FnOnce() -> T + Send) -> T {
    let confined = || {
        let mut only = CpuSet::new();
        only.set(core);
        sched_setaffinity(None, &only).expect("one of our cores");
        test()
    };
    std::thread::scope(|scope| scope.spawn(confined).join().expect("the test passed"))
}

/// The cores of each thread of this process that is a shard, as the kernel lists them.
fn cores_of_shards() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("procfs");
    let cores = tasks.filter_map(|task| {
        let path = task.ok()?.path();
        let name = fs::read_to_string(path.join("comm")).ok()?;
        let status = fs::read_to_string(path.join("status")).ok()?;
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        name.starts_with("stoq-shard-").then(|| list.trim().to_owned())
    });
    cores.collect()
}

/// A request of 100 kB and its echo.
async fn exchange(client: &Connection, server: &Connection) {
    let data = vec![7; 100_000];
    let there = async {
        let (mut send, mut recv) = client.open_bi().await.expect("a stream");
        send.write_all(&data).await.expect("written");
        send.finish().expect("finished");
        recv.read_to_end(data.len() + 1).await.expect("echoed")
    };
    let back = async {
        let (mut send, mut recv) = server.accept_bi().await.expect("a stream");
        let data = recv.read_to_end(data.len() + 1).await.expect("received");
        send.write_all(&data).await.expect("written");
        send.finish().expect("finished");
    };
    assert_eq!(futures_util::future::join(there, back).await.0, data);
}

/// Shards that never sleep, those of both ends, share the one core that there is.
#[test]
fn a_single_core_carries_everything() {
    let _alone = alone();
    let _watchdog = Watchdog::new("a_single_core_carries_everything");
    let core = cores()[0];
    on_core(core, || {
        for (shards, busy_poll) in
            [(1, BusyPoll::Always), (1, BusyPoll::Adaptive), (3, BusyPoll::Always)]
        {
            let config = TransportConfig { shards, busy_poll, spin_us: 50, ..config() };
            let pair = Pair::with(config.clone(), config);
            block_on(async {
                for _ in 0..3 {
                    let (client, server) = pair.connect().await;
                    for _ in 0..3 {
                        exchange(&client, &server).await;
                    }
                }
            });
            // Threads that have ended are listed a moment longer.
            pair::wait_for("all shards", || cores_of_shards().len() == 2 * shards);
            let shards_at = cores_of_shards();
            assert!(shards_at.iter().all(|at| *at == core.to_string()), "{shards_at:?}");
        }
    });
}

#[test]
fn a_named_core_is_taken() {
    let _alone = alone();
    let (server_tls, _) = identity();
    let core = *cores().last().expect("a core");
    let config = TransportConfig { cores: vec![core], ..config() };
    let engine = Engine::builder().config(config).server(server_tls).start();
    let _engine = engine.expect("the server starts");
    pair::wait_for("the shard is on its core", || cores_of_shards() == [core.to_string()]);
}

/// What a process may not use is refused before anything is opened, and the text says why.
#[test]
fn a_core_outside_the_affinity_mask_is_refused() {
    let _alone = alone();
    let cores = cores();
    let (own, last) = (cores[0], *cores.last().expect("a core"));
    // On a machine of one core the other one is not there at all.
    let other = if last == own { own + 1 } else { last };
    let (server_tls, _) = identity();
    let error = on_core(own, || {
        let config = TransportConfig { shards: 2, cores: vec![own, other], ..config() };
        Engine::builder().config(config).server(server_tls).start().map(drop)
    });
    let text = error.expect_err("not our core").to_string();
    assert!(text.contains(&format!("core {other}")) && text.contains("shard 1"), "{text}");
    let reason = if last == own {
        "this machine has the cores".to_owned()
    } else {
        format!("this process may run on the cores [{own}] only")
    };
    assert!(text.contains(&reason), "{text}");
    pair::wait_for("no shard is left", || cores_of_shards().is_empty());
}
