#!/usr/bin/env bash
# What congestion control costs where nothing is in the way, and what it does where something is:
#
# 1. Bulk download over a veth pair, sockets, MTU 1500: the default (BBRv2) and, in turns with it, a
#    window that nothing but the receiver's flow control bounds (a first window of 1000 packets that
#    only grows, as nothing is lost). Prints the rates and, for each round, their ratio.
# 2. The same path shaped to 1 Gbit/s by a token bucket (tbf) with room for 4 MB: how much of the rate
#    the bucket passed while data was there for all of the time, and how many bytes waited in it.
#
#   cargo build --release -p stoq-bench
#   scripts/measure-congestion.sh [ROUNDS [SECONDS]]
#
# A virtual machine gives a core back late that has slept, which costs every sender of bursts some of a
# shaped rate: for the second part loops at idle priority keep both cores awake (AWAKE=0: they sleep).
#
# Needs root and two free cores; deletes its namespaces at the end. Environment: BIN (directory of the
# binary), RATE_MBIT (of the bucket), CC (what is measured, default bbr2), CORES (server's and client's).
set -euo pipefail

rounds=${1:-5}
seconds=${2:-3}
bin=${BIN:-$(dirname "$0")/../target/release}
rate_mbit=${RATE_MBIT:-1000}
cc=${CC:-bbr2}
read -ra cores <<<"${CORES:-2 3}"
near=stoq-cc-near-$$
far=stoq-cc-far-$$
work=$(mktemp -d)
server=
loops=()

end() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ ${#loops[@]} = 0 ] || kill "${loops[@]}" 2>/dev/null || true
    ip netns del "$near" 2>/dev/null || true
    ip netns del "$far" 2>/dev/null || true
    rm -rf "$work"
}
trap end EXIT

ip netns add "$near"
ip netns add "$far"
ip -n "$near" link add veth0 type veth peer name veth0 netns "$far"
ip -n "$near" addr add fd00:58::1/64 dev veth0 nodad
ip -n "$far" addr add fd00:58::2/64 dev veth0 nodad
for netns in "$near" "$far"; do
    ip -n "$netns" link set lo up
    ip -n "$netns" link set veth0 up
done
sleep 0.5
echo 'initial_window_packets = 1000' >"$work/wide.toml"
# Less than the receiver's socket buffer holds, so that a window without bounds loses nothing there.
echo 'receive_buffer_size = 2097152' >"$work/client.toml"

# serve NAME OPTIONS...: starts a server and waits until it listens
serve() {
    local name=$1
    shift
    ip netns exec "$near" "$bin/stoq" serve --listen '[fd00:58::1]:4455' --datapath socket \
        --cores "${cores[0]}" --udp-payload 1452 --json "$@" >"$work/$name" 2>"$work/$name.log" &
    server=$!
    for _ in $(seq 200); do
        ! grep -q listening "$work/$name" || return 0
        sleep 0.1
    done
    cat "$work/$name.log" >&2
    exit 1
}

stop() {
    kill "$server"
    wait "$server" 2>/dev/null || true
    server=
}

# download SECONDS OPTIONS...: its result on stdout, one JSON object
download() {
    local length=$1
    shift
    ip netns exec "$far" "$bin/stoq" perf download --connect '[fd00:58::1]:4455' \
        --seconds "$length" --danger-insecure --datapath socket --cores "${cores[1]}" \
        --udp-payload 1452 --json "$@" 2>"$work/client.log" | tail -n 1 ||
        { cat "$work/client.log" >&2; return 1; }
}

# number NAME: of the JSON object on stdin
number() {
    grep -oE "\"$1\":[0-9.]+" | head -n 1 | cut -d: -f2
}

# measure KIND: Gbit/s and lost packets of one download
measure() {
    local result
    case $1 in
        window) serve server --cc newreno --config "$work/wide.toml" ;;
        "$cc") serve server --cc "$cc" ;;
    esac
    result=$(download "$seconds" --config "$work/client.toml")
    stop
    echo "$(number goodput_bps <<<"$result") $(number packets_lost <<<"$result")"
}

for round in $(seq "$rounds"); do
    # Which one comes first changes, so that neither always has the warmer machine.
    if ((round % 2)); then order=("$cc" window); else order=(window "$cc"); fi
    for kind in "${order[@]}"; do
        read -r bps lost <<<"$(measure "$kind")"
        awk -v r="$round" -v k="$kind" -v b="$bps" -v l="$lost" 'BEGIN {
            printf "round %d  %-7s  %6.2f Gbit/s  lost %s\n", r, k, b / 1e9, l }'
        echo "$kind $bps" >>"$work/readings"
    done
done
paste -d' ' <(grep "^$cc " "$work/readings" | cut -d' ' -f2) \
    <(grep '^window ' "$work/readings" | cut -d' ' -f2) |
    awk '{ print $1 / $2 }' | sort -n |
    awk -v cc="$cc" '{ v[NR] = $1 } END {
        printf "%s / window: %.3f (%.3f to %.3f)\n", cc, v[int((NR + 1) / 2)], v[1], v[NR] }'

# --- shaped -----------------------------------------------------------------------------------

if [ "${AWAKE:-1}" = 1 ]; then
    for core in "${cores[@]}"; do
        taskset -c "$core" chrt --idle 0 sh -c 'while :; do :; done' &
        loops+=($!)
    done
fi
tc -n "$near" qdisc add dev veth0 root tbf rate "${rate_mbit}mbit" burst 64kb limit 4000000

# shaper FIELD: bytes that the bucket has sent, or that wait in it
shaper() {
    tc -n "$near" -s -j qdisc show dev veth0 | number "$1"
}

serve server --cc "$cc"
# The path's own round trip, µs: a request of 64 bytes and its answer.
rtt_us=$(ip netns exec "$far" "$bin/stoq" perf requests --connect '[fd00:58::1]:4455' --seconds 1 \
    --danger-insecure --datapath socket --cores "${cores[1]}" --udp-payload 1452 --json \
    2>/dev/null | tail -n 1 | number p50)
download 10 --config "$work/client.toml" >"$work/shaped" &
client=$!
sleep 3
start=$(date +%s%N) sent=$(shaper bytes)
for _ in $(seq 200); do
    shaper backlog
    sleep 0.01
done >"$work/backlog"
passed=$(($(shaper bytes) - sent)) took_ns=$(($(date +%s%N) - start))
wait "$client"
stop
result=$(<"$work/shaped")
sort -n "$work/backlog" |
    awk -v rate="$rate_mbit" -v passed="$passed" -v ns="$took_ns" -v rtt="$rtt_us" \
        -v lost="$(number packets_lost <<<"$result")" -v quic="$(number rtt_us_p50 <<<"$result")" '
        { v[NR] = $1 }
        END {
            printf "tbf %d Mbit/s: %.1f %% of the rate passed, %s packets lost, RTT %d µs with data, %d without\n",
                rate, 100 * passed * 8e9 / ns / (rate * 1e6), lost, quic, rtt
            printf "bytes waiting: p10 %d, p50 %d, p90 %d; the path without its queue holds %d (BDP)\n",
                v[int(NR * 0.1) + 1], v[int(NR * 0.5) + 1], v[int(NR * 0.9)], rate * rtt / 8
        }'
