#!/usr/bin/env bash
# Puts back what setup-nic.sh changed:  restore-nic.sh IFACE
set -euo pipefail

die() {
    echo "restore-nic: $*" >&2
    exit 1
}

(($# == 1)) || die "usage: restore-nic.sh IFACE"
interface=$1
[[ $interface =~ ^[A-Za-z0-9_.@-]+$ ]] || die "$interface is no interface name"
((EUID == 0)) || die "needs root"
restore_file=${STOQ_STATE_DIR:-/var/lib/stoq}/nic-$interface.restore
[[ -f $restore_file ]] || die "$restore_file is not there: nothing was changed"

failed=0
while read -r -a words || ((${#words[@]} > 0)); do
    case ${words[0]:-} in
        "" | "#"*) continue ;;
        ethtool)
            [[ ${words[1]} =~ ^-[LGNKX]$ && ${words[2]} == "$interface" ]] || die "unexpected line: ${words[*]}"
            echo "  ${words[*]}"
            "${words[@]}" || failed=$((failed + 1))
            ;;
        write)
            [[ ${words[1]} =~ ^/proc/irq/[0-9]+/smp_affinity_list$ ]] || die "unexpected line: ${words[*]}"
            echo "  ${words[2]} > ${words[1]}"
            echo "${words[2]}" >"${words[1]}" || failed=$((failed + 1))
            ;;
        *) die "unexpected line in $restore_file: ${words[*]}" ;;
    esac
done <"$restore_file"

((failed == 0)) || die "$failed step(s) failed; $restore_file is kept"
rm -f "$restore_file"
echo "$interface is as it was"
