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
# ROUNDS 0 leaves out the first part.
#
# A virtual machine gives a core back late that has slept, which costs every sender of bursts some of a
# shaped rate: for the second part loops at idle priority keep both cores awake (AWAKE=0: they sleep).
#
# Needs root and two free cores; deletes its namespaces at the end. Environment: BIN (directory of the
# binary), RATE_MBIT (of the bucket), CC (what is measured, default bbr2), CORES (server's and client's),
# BUSY_POLL (what a shard without work does, default adaptive).
set -euo pipefail

rounds=${1:-5}
seconds=${2:-3}
rate_mbit=${RATE_MBIT:-1000}
cc=${CC:-bbr2}
busy_poll=${BUSY_POLL:-adaptive}
read -ra cores <<<"${CORES:-2 3}"
# shellcheck source-path=SCRIPTDIR source=two-hosts.sh
source "$(dirname "$0")/two-hosts.sh"
make_hosts 1 fd00:58 1500
echo 'initial_window_packets = 1000' >"$work/wide.toml"
# Less than the receiver's socket buffer holds, so that a window without bounds loses nothing there.
echo 'receive_buffer_size = 2097152' >"$work/client.toml"

both=(--datapath socket --udp-payload 1452 --busy-poll "$busy_poll")

# serve_with OPTIONS...
serve_with() {
    serve server --listen '[fd00:58:0::1]:4455' --cores "${cores[0]}" "${both[@]}" "$@"
    server=${children[-1]}
}

stop() {
    kill "$server"
    wait "$server" 2>/dev/null || true
    unset 'children[-1]'
}

# download SECONDS OPTIONS...: its result on stdout, one JSON object
download() {
    local length=$1
    shift
    ip netns exec "$far" "$bin/stoq" perf download --connect '[fd00:58:0::1]:4455' \
        --seconds "$length" --danger-insecure --cores "${cores[1]}" "${both[@]}" \
        --json "$@" 2>"$work/client.log" | tail -n 1 ||
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
        window) serve_with --cc newreno --config "$work/wide.toml" ;;
        "$cc") serve_with --cc "$cc" ;;
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
((rounds == 0)) || paste -d' ' <(grep "^$cc " "$work/readings" | cut -d' ' -f2) \
    <(grep '^window ' "$work/readings" | cut -d' ' -f2) |
    awk '{ print $1 / $2 }' | sort -n |
    awk -v cc="$cc" '{ v[NR] = $1 } END {
        printf "%s / window: %.3f (%.3f to %.3f)\n", cc, v[int((NR + 1) / 2)], v[1], v[NR] }'

# --- shaped -----------------------------------------------------------------------------------

if [ "${AWAKE:-1}" = 1 ]; then
    for core in "${cores[@]}"; do
        taskset -c "$core" chrt --idle 0 sh -c 'while :; do :; done' &
        children+=($!)
    done
fi
tc -n "$near" qdisc add dev veth0 root tbf rate "${rate_mbit}mbit" burst 64kb limit 4000000

# shaper FIELD: bytes that the bucket has sent, or that wait in it
shaper() {
    tc -n "$near" -s -j qdisc show dev veth0 | number "$1"
}

serve_with --cc "$cc"
# The path's own round trip, µs: a request of 64 bytes and its answer.
rtt_us=$(ip netns exec "$far" "$bin/stoq" perf requests --connect '[fd00:58:0::1]:4455' --seconds 1 \
    --danger-insecure --cores "${cores[1]}" "${both[@]}" --json \
    2>/dev/null | tail -n 1 | number p50)
download 10 --config "$work/client.toml" >"$work/shaped" &
client=$!
sleep 3
start=$(date +%s%N) sent=$(shaper bytes) before=$(ticks)
for _ in $(seq 200); do
    shaper backlog
    sleep 0.01
done >"$work/backlog"
passed=$(($(shaper bytes) - sent)) took_ns=$(($(date +%s%N) - start)) after=$(ticks)
wait "$client"
stop
result=$(<"$work/shaped")
sort -n "$work/backlog" |
    awk -v rate="$rate_mbit" -v passed="$passed" -v ns="$took_ns" -v rtt="$rtt_us" \
        -v t="$before $after" -v lost="$(number packets_lost <<<"$result")" -v quic="$(number rtt_us_p50 <<<"$result")" '
        { v[NR] = $1 }
        END {
            split(t, ticks, " ")
            printf "tbf %d Mbit/s: %.1f %% of the rate passed, %s packets lost, RTT %d µs with data, %d without; steal %.0f %%\n",
                rate, 100 * passed * 8e9 / ns / (rate * 1e6), lost, quic, rtt,
                100 * (ticks[4] - ticks[2]) / (ticks[3] - ticks[1])
            printf "bytes waiting: p10 %d, p50 %d, p90 %d; the path without its queue holds %d (BDP)\n",
                v[int(NR * 0.1) + 1], v[int(NR * 0.5) + 1], v[int(NR * 0.9)], rate * rtt / 8
        }'
