#!/usr/bin/env bash
# Bulk download over 16 connections with one core a side and with two, in turns, over a veth pair
# with two queues: what a second shard on each side is worth, for each datapath.
#
#   cargo build --release -p stoq-bench
#   scripts/measure-cores.sh [ROUNDS [SECONDS]]
#
# Needs root and 4 cores; deletes its namespaces at the end. Environment: BIN (directory of the
# binary), DATAPATHS, CONNECTIONS, UDP_PAYLOAD. Prints every reading, then for each datapath the median
# rates and the ratio of each round's two readings: its median, smallest and largest. Readings of one
# round follow each other at once, so that other load on the machine meets both alike.
set -euo pipefail

rounds=${1:-5}
seconds=${2:-3}
bin=${BIN:-$(dirname "$0")/../target/release}
connections=${CONNECTIONS:-16}
payload=${UDP_PAYLOAD:-1452}
read -ra datapaths <<<"${DATAPATHS:-socket io_uring af_xdp}"
near=stoq-cores-near-$$
far=stoq-cores-far-$$
readings=$(mktemp)
log=$(mktemp)
server=

end() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    ip netns del "$near" 2>/dev/null || true
    ip netns del "$far" 2>/dev/null || true
    rm -f "$readings" "$log"
}
trap end EXIT

ip netns add "$near"
ip netns add "$far"
ip -n "$near" link add veth0 numrxqueues 2 numtxqueues 2 type veth \
    peer name veth0 netns "$far" numrxqueues 2 numtxqueues 2
ip -n "$near" addr add fd00:57::1/64 dev veth0 nodad
ip -n "$far" addr add fd00:57::2/64 dev veth0 nodad
for netns in "$near" "$far"; do
    ip -n "$netns" link set lo up
    ip -n "$netns" link set veth0 up
done
sleep 0.5

# measure DATAPATH SHARDS ROUND
measure() {
    local datapath=$1 shards=$2 round=$3 server_cores=2 client_cores=0 line bps handed
    [ "$shards" = 1 ] || { server_cores=2,3 client_cores=0,1; }
    ip netns exec "$near" "$bin/stoq" serve --listen '[fd00:57::1]:4455' --datapath "$datapath" \
        --iface veth0 --queues "$shards" --cores "$server_cores" --udp-payload "$payload" 2>"$log" &
    server=$!
    for _ in $(seq 200); do
        ! grep -q 'listening on' "$log" || break
        sleep 0.1
    done
    grep -q 'listening on' "$log" || { cat "$log" >&2; exit 1; }
    line=$(ip netns exec "$far" "$bin/stoq" perf download --connect '[fd00:57::1]:4455' \
        --connections "$connections" --seconds "$seconds" --danger-insecure --datapath "$datapath" \
        --iface veth0 --queues "$shards" --cores "$client_cores" --udp-payload "$payload" \
        --json 2>"$log" | tail -n 1) || { cat "$log" >&2; exit 1; }
    kill "$server"
    wait "$server" 2>/dev/null || true
    server=
    bps=$(sed -E 's/.*"goodput_bps":([0-9]+).*/\1/' <<<"$line")
    handed=$(sed -E 's/.*"rx_handed_over":([0-9]+).*/\1/' <<<"$line")
    [[ $handed =~ ^[0-9]+$ ]] || handed=unknown
    awk -v d="$datapath" -v n="$shards" -v r="$round" -v b="$bps" -v h="$handed" 'BEGIN {
        printf "round %d  %-8s  %d+%d cores  %6.2f Gbit/s  handed over at the client %s\n", r, d, n, n, b / 1e9, h }'
    echo "$datapath $shards $bps" >>"$readings"
}

for round in $(seq "$rounds"); do
    for datapath in "${datapaths[@]}"; do
        # Which one comes first changes, so that neither always has the warmer machine.
        if ((round % 2)); then order=(1 2); else order=(2 1); fi
        for shards in "${order[@]}"; do
            measure "$datapath" "$shards" "$round"
        done
    done
done

for datapath in "${datapaths[@]}"; do
    paste <(grep "^$datapath 1 " "$readings" | cut -d' ' -f3) \
        <(grep "^$datapath 2 " "$readings" | cut -d' ' -f3) |
        awk -v d="$datapath" '
            function median(v, n,    i, j, t) {
                for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++)
                    if (v[j] < v[i]) { t = v[i]; v[i] = v[j]; v[j] = t }
                return v[int((n + 1) / 2)]
            }
            { one[NR] = $1; two[NR] = $2; ratio[NR] = $2 / $1 }
            END {
                r = median(ratio, NR)
                printf "median  %-8s  1+1 %.2f  2+2 %.2f Gbit/s  ratio %.2f (%.2f to %.2f)\n", d,
                    median(one, NR) / 1e9, median(two, NR) / 1e9, r, ratio[1], ratio[NR]
            }'
done
