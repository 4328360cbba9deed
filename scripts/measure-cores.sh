#!/usr/bin/env bash
# Bulk download over 16 connections with one core a side and with two, in turns, over a veth pair
# with two queues: what a second shard on each side is worth, for each datapath. And the control:
# twice one core a side, as two pairs of processes that share nothing (a veth pair and half of the
# connections each), at the same time on the same four cores. Its sum is what the machine gives to
# four busy cores; what two shards lack of it is the engine's fault, the rest is not.
#
#   cargo build --release -p stoq-bench
#   scripts/measure-cores.sh [ROUNDS [SECONDS]]
#
# Needs root and 4 cores; deletes its namespaces at the end. Environment: BIN (directory of the
# binary), DATAPATHS, CONNECTIONS, MTU, UDP_PAYLOAD (default: MTU less 48). Prints every reading with the share of the four cores'
# time that the hypervisor took (steal), then for each datapath the median rates and the ratios of
# each round's readings to that of one core a side: median, smallest and largest. Readings of one round
# follow each other at once, so that other load on the machine meets all alike.
set -euo pipefail

rounds=${1:-5}
seconds=${2:-3}
connections=${CONNECTIONS:-16}
mtu=${MTU:-1500}
payload=${UDP_PAYLOAD:-$((mtu - 48))}
read -ra datapaths <<<"${DATAPATHS:-socket io_uring af_xdp}"
# shellcheck source-path=SCRIPTDIR source=two-hosts.sh
source "$(dirname "$0")/two-hosts.sh"
readings=$work/readings
make_hosts 2 fd00:57 "$mtu" 2

# serve_on DATAPATH SHARDS CORES PAIR
serve_on() {
    serve "stats$4" --listen "[fd00:57:$4::1]:4455" --datapath "$1" --iface "veth$4" \
        --queues "$2" --cores "$3" --udp-payload "$payload"
}

# download DATAPATH SHARDS CORES PAIR CONNECTIONS: its result in $work/client$4
download() {
    ip netns exec "$far" "$bin/stoq" perf download --connect "[fd00:57:$4::1]:4455" \
        --connections "$5" --seconds "$seconds" --danger-insecure --datapath "$1" \
        --iface "veth$4" --queues "$2" --cores "$3" --udp-payload "$payload" \
        --json 2>"$work/log$4" >"$work/client$4" || { cat "$work/log$4" >&2; return 1; }
}

# stop: ends the servers, which tell their counters first
stop() {
    kill -USR1 "${children[@]}"
    sleep 0.3
    kill "${children[@]}"
    wait "${children[@]}" 2>/dev/null || true
    children=()
}

# field NAME FILES...: the sum of a JSON number over the last line of each file, "unknown" without
field() {
    local name=$1 file
    shift
    for file in "$@"; do
        tail -n 1 "$file" | grep -oE "\"$name\":[0-9]+" | head -n 1 | cut -d: -f2 || echo unknown
    done | awk '/unknown/ { bad = 1 } { sum += $1 } END { print bad ? "unknown" : sum }'
}

# measure DATAPATH SETUP ROUND; SETUP is 1, 2 (shards a side) or control
measure() {
    local datapath=$1 setup=$2 round=$3 clients=("$work/client0") stats=("$work/stats0") before after
    case $setup in
        1) serve_on "$datapath" 1 2 0 ;;
        2) serve_on "$datapath" 2 2,3 0 ;;
        control)
            serve_on "$datapath" 1 2 0
            serve_on "$datapath" 1 3 1
            clients+=("$work/client1") stats+=("$work/stats1")
            ;;
    esac
    before=$(ticks)
    case $setup in
        1) download "$datapath" 1 0 0 "$connections" ;;
        2) download "$datapath" 2 0,1 0 "$connections" ;;
        control)
            download "$datapath" 1 1 1 $((connections / 2)) &
            local other=$!
            download "$datapath" 1 0 0 $((connections / 2))
            wait "$other"
            ;;
    esac
    after=$(ticks)
    stop
    local bps
    bps=$(field goodput_bps "${clients[@]}")
    [ "$bps" != unknown ] || { cat "$work"/client* >&2; exit 1; }
    awk -v d="$datapath" -v n="$setup" -v r="$round" -v b="$bps" -v t="$before $after" \
        -v c="$(field rx_handed_over "${clients[@]}")" -v s="$(field rx_handed_over "${stats[@]}")" 'BEGIN {
        split(t, v, " ")
        name = n == "control" ? "2 x 1+1" : n "+" n " cores"
        printf "round %d  %-8s  %-9s  %6.2f Gbit/s  handed over at client %s, server %s  steal %.0f %%\n",
            r, d, name, b / 1e9, c, s, 100 * (v[4] - v[2]) / (v[3] - v[1]) }'
    echo "$datapath $setup $bps" >>"$readings"
}

for round in $(seq "$rounds"); do
    for datapath in "${datapaths[@]}"; do
        # Which one comes first changes, so that neither always has the warmer machine.
        if ((round % 2)); then order=(1 2 control); else order=(control 2 1); fi
        for setup in "${order[@]}"; do
            measure "$datapath" "$setup" "$round"
        done
    done
done

for datapath in "${datapaths[@]}"; do
    paste -d' ' <(grep "^$datapath 1 " "$readings" | cut -d' ' -f3) \
        <(grep "^$datapath 2 " "$readings" | cut -d' ' -f3) \
        <(grep "^$datapath control " "$readings" | cut -d' ' -f3) |
        awk -v d="$datapath" '
            function sort(v, n,    i, j, t) {
                for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++)
                    if (v[j] < v[i]) { t = v[i]; v[i] = v[j]; v[j] = t }
            }
            function median(v, n) { sort(v, n); return v[int((n + 1) / 2)] }
            { one[NR] = $1; two[NR] = $2; both[NR] = $3
              ratio[NR] = $2 / $1; ceiling[NR] = $3 / $1; reached[NR] = $2 / $3 }
            END {
                r = median(ratio, NR); c = median(ceiling, NR); e = median(reached, NR)
                printf "median  %-8s  1+1 %.2f  2+2 %.2f  2 x 1+1 %.2f Gbit/s\n", d,
                    median(one, NR) / 1e9, median(two, NR) / 1e9, median(both, NR) / 1e9
                printf "  2+2 / 1+1          %.2f (%.2f to %.2f)\n", r, ratio[1], ratio[NR]
                printf "  2 x 1+1 / 1+1      %.2f (%.2f to %.2f): the ceiling\n", c, ceiling[1], ceiling[NR]
                printf "  2+2 / 2 x 1+1      %.2f (%.2f to %.2f)\n", e, reached[1], reached[NR]
            }'
done
