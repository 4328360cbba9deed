#!/usr/bin/env bash
# Tunes a NIC for AF_XDP, prints every change, and writes a file from which
# restore-nic.sh puts everything back.
#
#   setup-nic.sh IFACE [--queues N] [--shards N [--first-queue N]] [--ring N] [--shard-cores LIST] [--dry-run]
#
#   --queues N          combined queues, one per shard      (default: leave as is)
#   --shards N          RSS spreads packets over N queues only, those that have a shard
#                                                       (default: leave as is)
#   --first-queue N     the first of them, STOQ's first_queue (default: 0)
#   --ring N            descriptors of the RX and TX rings  (default: 4096, or the most there is)
#   --shard-cores LIST  cores of the shards, such as 2-5,8  (default: none)
#                       interrupts of the NIC are kept off them
#   --dry-run           print what would be done, change nothing
#
# It changes all or nothing: when it ends early, by an error or a signal, it puts back what it had changed.
# What a driver refuses is told and left as it was; that is no error.
# Run it before STOQ starts: changing queues or rings resets the link on many drivers.
set -euo pipefail

usage() {
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

die() {
    echo "setup-nic: $*" >&2
    exit 1
}

interface="" queues="" shard_queues="" first_queue=0 ring=4096 shard_cores="" dry_run=""
while (($#)); do
    case $1 in
        --queues) queues=${2:?--queues needs a number}; shift ;;
        --shards) shard_queues=${2:?--shards needs a number}; shift ;;
        --first-queue) first_queue=${2:?--first-queue needs a number}; shift ;;
        --ring) ring=${2:?--ring needs a number}; shift ;;
        --shard-cores) shard_cores=${2:?--shard-cores needs a list}; shift ;;
        --dry-run) dry_run=1 ;;
        -h | --help | -*) usage ;;
        *) [[ -z $interface ]] || usage; interface=$1 ;;
    esac
    shift
done
[[ -n $interface ]] || usage
[[ $interface =~ ^[A-Za-z0-9_.@-]+$ ]] || die "$interface is no interface name"
[[ -z $queues || $queues =~ ^[1-9][0-9]*$ ]] || die "--queues $queues is no number"
[[ -z $shard_queues || $shard_queues =~ ^[1-9][0-9]*$ ]] || die "--shards $shard_queues is no number"
[[ $first_queue =~ ^[0-9]+$ ]] || die "--first-queue $first_queue is no number"
[[ $ring =~ ^[1-9][0-9]*$ ]] || die "--ring $ring is no number"
[[ -z $shard_cores || $shard_cores =~ ^[0-9,-]+$ ]] || die "--shard-cores $shard_cores is no list"
((EUID == 0)) || die "needs root"
command -v ethtool >/dev/null || die "ethtool is not installed (cargo xtask setup)"
[[ -e /sys/class/net/$interface ]] || die "there is no interface $interface"

# expand 2-5,8 -> 2 3 4 5 8
expand() {
    local part first last
    for part in ${1//,/ }; do
        first=${part%-*} last=${part#*-}
        [[ $first =~ ^[0-9]+$ && $last =~ ^[0-9]+$ && $first -le $last ]] || die "$part is no range of cores"
        seq "$first" "$last"
    done
}

others=()
if [[ -n $shard_cores ]]; then
    expanded=$(expand "$shard_cores")
    mapfile -t shards <<<"$expanded"
    expanded=$(expand "$(cat /sys/devices/system/cpu/online)")
    mapfile -t online <<<"$expanded"
    for core in "${online[@]}"; do
        [[ " ${shards[*]} " == *" $core "* ]] || others+=("$core")
    done
    ((${#others[@]} > 0)) || die "--shard-cores $shard_cores leaves no core for the interrupts"
fi

state_directory=${STOQ_STATE_DIR:-/var/lib/stoq}
restore_file=$state_directory/nic-$interface.restore
if [[ -z $dry_run && -e $restore_file ]]; then
    die "$restore_file exists: run restore-nic.sh $interface first, or its values would be lost"
fi

restore_commands=()
changes=0

# At every exit before the last line: what was changed until then goes back.
finished=""
put_back() {
    local status=$?
    if [[ -z $finished && ${#restore_commands[@]} -gt 0 ]]; then
        echo "setup-nic: ended early; putting $interface back" >&2
        "$(dirname "$0")/restore-nic.sh" "$interface" >&2 || status=1
        # An early end is no success, whatever the last command said.
        ((status != 0)) || status=1
    fi
    exit "$status"
}
trap put_back EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# change WHAT OLD NEW RESTORE-COMMAND COMMAND...
# The restore command is recorded before the change is made.
change() {
    local what=$1 old=$2 new=$3 restore=$4
    shift 4
    if [[ $old == "$new" ]]; then
        echo "  $what: $old (as it should be)"
        return
    fi
    echo "  $what: $old -> $new"
    [[ -z $dry_run ]] || return 0
    restore_commands=("$restore" "${restore_commands[@]}")
    write_restore_file
    if ! "$@"; then
        echo "  $what: REFUSED by the driver or the kernel; left at $old" >&2
        restore_commands=("${restore_commands[@]:1}")
        write_restore_file
        return 0
    fi
    changes=$((changes + 1))
}

# One command a line, last change first; words are quoted for the shell.
write_restore_file() {
    mkdir -p "$state_directory"
    {
        echo "# Written by setup-nic.sh for $interface; read by restore-nic.sh."
        ((${#restore_commands[@]} == 0)) || printf '%s\n' "${restore_commands[@]}"
    } >"$restore_file.new"
    mv "$restore_file.new" "$restore_file"
}

# ethtool_value OPTION SECTION KEY: a value of `ethtool -g` or `-l`, empty when unknown.
ethtool_value() {
    { ethtool "$1" "$interface" 2>/dev/null || true; } | awk -v section="$2" -v key="$3" '
        /^[A-Z].*:$/ { inside = index($0, section) == 1 }
        inside && index($0, key ":") == 1 { print $2; exit }'
}

write_value() {
    echo "$2" >"$1"
}

echo "queues of $interface"
combined=$(ethtool_value -l "Current" "Combined")
receive=$(ethtool_value -l "Current" "RX")
transmit=$(ethtool_value -l "Current" "TX")
# Some drivers count receive and transmit queues apart.
if [[ $combined =~ ^[1-9][0-9]*$ ]]; then
    now=$combined most=$(ethtool_value -l "Pre-set" "Combined")
    set_queues=(combined "${queues:-$now}") old_queues="combined $combined"
elif [[ $receive =~ ^[0-9]+$ && $transmit =~ ^[0-9]+$ ]]; then
    now=$receive most=$(ethtool_value -l "Pre-set" "RX")
    set_queues=(rx "${queues:-$now}" tx "${queues:-$now}") old_queues="rx $receive tx $transmit"
else
    now=""
fi
if [[ -z $now ]]; then
    [[ -z $queues ]] || die "--queues $queues: the driver of $interface does not tell its queues"
    echo "  the driver does not tell; left alone"
elif [[ -z $queues ]]; then
    echo "  $now of $most (choose with --queues)"
elif ((queues > most)); then
    die "--queues $queues: $interface has at most $most"
else
    change "queues" "$old_queues" "${set_queues[*]}" \
        "ethtool -L $interface $old_queues" ethtool -L "$interface" "${set_queues[@]}"
fi

echo "rings of $interface"
for direction in RX TX; do
    now=$(ethtool_value -g "Current" "$direction")
    most=$(ethtool_value -g "Pre-set" "$direction")
    if [[ ! $now =~ ^[0-9]+$ || ! $most =~ ^[0-9]+$ ]]; then
        echo "  $direction: the driver does not tell; left alone"
        continue
    fi
    wanted=$((ring < most ? ring : most))
    change "$direction descriptors" "$now" "$wanted" \
        "ethtool -G $interface ${direction,,} $now" ethtool -G "$interface" "${direction,,}" "$wanted"
done

echo "receive hashing of $interface"
# UDP over IPv6 by addresses and ports, so that connections spread over all queues.
if fields=$(ethtool -n "$interface" rx-flow-hash udp6 2>/dev/null); then
    now=""
    [[ $fields != *"IP SA"* ]] || now+=s
    [[ $fields != *"IP DA"* ]] || now+=d
    [[ $fields != *"bytes 0 and 1"* ]] || now+=f
    [[ $fields != *"bytes 2 and 3"* ]] || now+=n
    if [[ -z $now ]]; then
        echo "  UDP over IPv6: the present fields cannot be read; left alone"
    else
        change "UDP over IPv6 hash fields" "$now" sdfn \
            "ethtool -N $interface rx-flow-hash udp6 $now" ethtool -N "$interface" rx-flow-hash udp6 sdfn
    fi
else
    echo "  UDP over IPv6: not configurable here"
fi

echo "RSS of $interface"
# A shard receives from its own queue only; what another queue gets takes the kernel's slow way.
table=$({ ethtool -x "$interface" 2>/dev/null || true; } | awk '$1 ~ /^[0-9]+:$/ { for (i = 2; i <= NF; i++) print $i }')
if [[ -z $table ]]; then
    echo "  the driver does not tell its table; left alone"
elif [[ -z $shard_queues ]]; then
    echo "  queues $(sort -nu <<<"$table" | paste -sd' ') (choose with --shards)"
else
    # The old table comes back as weights, one for each queue from 0 on.
    most=$(sort -n <<<"$table" | tail -n 1)
    weights=$(for ((queue = 0; queue <= most; queue++)); do grep -cx "$queue" <<<"$table" || true; done | paste -sd' ')
    wanted=$(seq -s' ' "$first_queue" $((first_queue + shard_queues - 1)))
    change "queues that packets are spread over" "$(sort -nu <<<"$table" | paste -sd' ')" "$wanted" \
        "ethtool -X $interface weight $weights" \
        ethtool -X "$interface" start "$first_queue" equal "$shard_queues"
fi

echo "offloads of $interface"
# Coalescing several packets into one hides their boundaries from XDP; VLAN tags
# taken off by the NIC are invisible to the program.
features=$(ethtool -k "$interface")
for feature in generic-receive-offload large-receive-offload rx-gro-hw rx-udp-gro-forwarding rx-vlan-offload; do
    line=$(grep -E "^ *$feature: " <<<"$features" || true)
    now=$(awk '{ print $2 }' <<<"$line")
    if [[ -z $now || $line == *"[fixed]"* ]]; then
        echo "  $feature: ${now:-unknown} (cannot be changed)"
        continue
    fi
    change "$feature" "$now" off \
        "ethtool -K $interface $feature $now" ethtool -K "$interface" "$feature" off
done

echo "interrupts of $interface"
if [[ -z $shard_cores ]]; then
    echo "  left alone (keep them off the shards with --shard-cores)"
else
    if pgrep -x irqbalance >/dev/null 2>&1; then
        echo "  WARNING: irqbalance runs and will move them again: stop it, or set IRQBALANCE_BANNED_CPULIST" >&2
    fi
    shopt -s nullglob
    index=0
    for path in /sys/class/net/"$interface"/device/msi_irqs/*; do
        irq=${path##*/}
        file=/proc/irq/$irq/smp_affinity_list
        [[ -e $file ]] || continue
        core=${others[index % ${#others[@]}]}
        index=$((index + 1))
        now=$(<"$file")
        change "interrupt $irq on core" "$now" "$core" "write $file $now" write_value "$file" "$core"
    done
    ((index > 0)) || echo "  $interface has no interrupts of its own (a virtual device)"
fi

if [[ -n $dry_run ]]; then
    echo "nothing was changed (--dry-run)"
elif ((changes > 0)); then
    echo "$changes change(s); scripts/restore-nic.sh $interface puts them back ($restore_file)"
else
    rm -f "$restore_file"
    echo "nothing to change"
fi
finished=1
