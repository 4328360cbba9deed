#!/usr/bin/env bash
# Bulk download, one connection, one stream, one core a side, UDP payload 1452: stoq over
# io_uring against quinn, interleaved, over lo and over a veth pair between two namespaces.
#
#   cargo build --release -p stoq-bench -p stoq-peers-quinn
#   scripts/compare-quinn.sh [ROUNDS [SECONDS]]
#
# Needs root for the namespaces, which it deletes at the end. Environment: BIN (directory of
# the binaries), SERVER_CORE, CLIENT_CORE, DATAPATH. Prints every reading and the medians.
set -euo pipefail

rounds=${1:-5}
seconds=${2:-4}
bin=${BIN:-$(dirname "$0")/../target/release}
server_core=${SERVER_CORE:-2}
client_core=${CLIENT_CORE:-3}
datapath=${DATAPATH:-io_uring}
payload=1452
near=stoq-cmp-near-$$
far=stoq-cmp-far-$$
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
ip -n "$near" link add veth0 type veth peer name veth0 netns "$far"
ip -n "$near" addr add fd00:57::1/64 dev veth0 nodad
ip -n "$far" addr add fd00:57::2/64 dev veth0 nodad
for netns in "$near" "$far"; do
    ip -n "$netns" link set lo up
    ip -n "$netns" link set veth0 up
done
sleep 0.5

# measure STACK LINK ROUND
measure() {
    local stack=$1 link=$2 round=$3 client_netns=$near address='[::1]:4455' line
    [ "$link" = lo ] || { client_netns=$far address='[fd00:57::1]:4455'; }
    case $stack in
    stoq)
        ip netns exec "$near" "$bin/stoq" serve --listen "$address" --datapath "$datapath" \
            --cores "$server_core" --udp-payload "$payload" &
        ;;
    quinn)
        ip netns exec "$near" "$bin/quinn-peer" serve --listen "$address" \
            --core "$server_core" --udp-payload "$payload" &
        ;;
    esac 2>"$log"
    server=$!
    for _ in $(seq 100); do
        ! grep -q 'listening on' "$log" || break
        sleep 0.1
    done
    grep -q 'listening on' "$log" || { cat "$log" >&2; exit 1; }
    case $stack in
    stoq)
        line=$(ip netns exec "$client_netns" "$bin/stoq" perf download --connect "$address" \
            --seconds "$seconds" --danger-insecure --datapath "$datapath" \
            --cores "$client_core" --udp-payload "$payload" --json 2>/dev/null | tail -n 1)
        ;;
    quinn)
        line=$(ip netns exec "$client_netns" "$bin/quinn-peer" download --connect "$address" \
            --seconds "$seconds" --core "$client_core" --udp-payload "$payload")
        ;;
    esac
    kill "$server"
    wait "$server" 2>/dev/null || true
    server=
    local bps used
    bps=$(sed -E 's/.*"goodput_bps":([0-9]+).*/\1/' <<<"$line")
    used=$(sed -E 's/.*"udp_payload":([0-9]+).*/\1/' <<<"$line")
    [ "$used" = "$payload" ] || echo "warning: $stack used UDP payload $used" >&2
    awk -v s="$stack" -v l="$link" -v r="$round" -v b="$bps" \
        'BEGIN { printf "round %d  %-4s  %-5s  %6.2f Gbit/s\n", r, l, s, b / 1e9 }'
    echo "$link $stack $bps" >>"$readings"
}

for round in $(seq "$rounds"); do
    for link in lo veth; do
        measure stoq "$link" "$round"
        measure quinn "$link" "$round"
    done
done

median() {
    grep "^$1 $2 " "$readings" | cut -d' ' -f3 | sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}
for link in lo veth; do
    awk -v l="$link" -v s="$(median "$link" stoq)" -v q="$(median "$link" quinn)" 'BEGIN {
        printf "median  %-4s  stoq %.2f  quinn %.2f Gbit/s  ratio %.2f\n", l, s / 1e9, q / 1e9, s / q }'
done
