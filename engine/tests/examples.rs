//! Runs every example as its header says, in this process.
#![allow(dead_code, clippy::duplicate_mod)]

#[path = "../examples/congestion_cost.rs"]
mod congestion_cost;
#[path = "../examples/datagrams.rs"]
mod datagrams;
#[path = "../examples/echo.rs"]
mod echo;
#[path = "../examples/facade.rs"]
mod facade;
#[path = "../examples/file_transfer.rs"]
mod file_transfer;
#[path = "../examples/on_shard_service.rs"]
mod on_shard_service;
#[path = "../examples/pool.rs"]
mod pool;

#[test]
fn congestion_control_runs_without_a_network() {
    congestion_cost::main();
}

#[test]
fn datagrams_arrive() {
    datagrams::main().expect("the example succeeds");
}

#[test]
fn echo_on_both_sides_of_the_mailbox() {
    echo::main().expect("the example succeeds");
}

#[test]
fn a_file_comes_whole() {
    file_transfer::main().expect("the example succeeds");
}

#[test]
fn the_service_on_the_shard_answers() {
    on_shard_service::main().expect("the example succeeds");
}

#[test]
fn the_pool_finds_its_peer_again() {
    pool::main().expect("the example succeeds");
}

#[test]
fn the_facade_needs_one_type() {
    facade::main().expect("the example succeeds");
}

#[test]
fn none_is_forgotten() {
    let tested = include_str!("examples.rs");
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
    for entry in std::fs::read_dir(directory).expect("the examples") {
        let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
        let example = name.strip_suffix(".rs");
        assert!(
            example.is_none_or(|name| tested.contains(&format!("{name}::main()"))),
            "{name} is not run by this test"
        );
    }
}
