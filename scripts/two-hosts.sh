#!/usr/bin/env bash
# Sourced by the measure-*.sh scripts: two hosts (network namespaces) with one or more veth pairs
# between them, the servers that run on one of them, and their end. Gives $near, $far, $work (a
# directory) and $bin; whatever happens, all of it is gone when the script ends.
set -euo pipefail

bin=${BIN:-$(dirname "${BASH_SOURCE[0]}")/../target/release}
near=stoq-near-$$
far=stoq-far-$$
work=$(mktemp -d)
# Processes that end with the script.
children=()

end() {
    ((${#children[@]} == 0)) || kill "${children[@]}" 2>/dev/null || true
    ip netns del "$near" 2>/dev/null || true
    ip netns del "$far" 2>/dev/null || true
    rm -rf "$work"
}
trap end EXIT

# make_hosts PAIRS PREFIX MTU [QUEUES]: veth0, veth1, ... with the addresses PREFIX:N::1 near, ::2 far
make_hosts() {
    local pairs=$1 prefix=$2 mtu=$3 queues=${4:-1} pair netns
    ip netns add "$near"
    ip netns add "$far"
    for pair in $(seq 0 $((pairs - 1))); do
        ip -n "$near" link add "veth$pair" numrxqueues "$queues" numtxqueues "$queues" type veth \
            peer name "veth$pair" netns "$far" numrxqueues "$queues" numtxqueues "$queues"
        ip -n "$near" addr add "$prefix:$pair::1/64" dev "veth$pair" nodad
        ip -n "$far" addr add "$prefix:$pair::2/64" dev "veth$pair" nodad
        for netns in "$near" "$far"; do
            ip -n "$netns" link set lo up
            ip -n "$netns" link set "veth$pair" mtu "$mtu" up
        done
    done
    sleep 0.5
}

# serve NAME OPTIONS...: starts a server and waits until it listens; statistics in $work/NAME, what
# it says in $work/NAME.log
serve() {
    local name=$1
    shift
    ip netns exec "$near" "$bin/stoq" serve --json "$@" >"$work/$name" 2>"$work/$name.log" &
    children+=($!)
    for _ in $(seq 200); do
        ! grep -q listening "$work/$name" "$work/$name.log" || return 0
        sleep 0.1
    done
    cat "$work/$name.log" >&2
    exit 1
}

# ticks: jiffies of all cores together, and those that were stolen
ticks() {
    awk '/^cpu / { for (i = 2; i <= 9; i++) all += $i; print all, $9 }' /proc/stat
}
