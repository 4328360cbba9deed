#!/usr/bin/env bash
# Stands in for the `stoq` binary in the tests of the demo: it speaks the same
# command line and the same JSON lines, and moves files by copying them.
# FAKE_STOQ selects a fault: corrupt, short, die-server, die-client, hang.
set -euo pipefail

command=$1
shift
www="" cert="" ca="" out="" listen="" url="" seconds=1 receive=""
if [[ $command == perf ]]; then
    command="perf-$1"
    shift
fi
while (($#)); do
    case $1 in
        --www) www=$2; shift ;;
        --cert-out) cert=$2; shift ;;
        --ca) ca=$2; shift ;;
        --out) out=$2; shift ;;
        --listen) listen=$2; shift ;;
        --seconds) seconds=$2; shift ;;
        --receive) receive=1 ;;
        --json | --die-with-parent) ;;
        --*) shift ;;
        *) url=$1 ;;
    esac
    shift
done

progress() {
    echo "{\"event\":\"progress\",\"bytes\":$1,\"seconds\":$2,\"goodput_bps\":8e9,\"rtt_us\":120,\"packets_lost\":0}"
}

case $command in
    serve)
        echo "$www" >"$cert"
        trap 'echo "{\"event\":\"stopped\",\"stats\":{\"xdp\":{\"redirected\":7}}}"; exit 0' TERM
        [[ $listen != *:0 ]] || listen=${listen%:0}:4433
        echo "{\"event\":\"listening\",\"addr\":\"$listen\",\"datapath\":\"socket\",\"mode\":\"fake\",\"queues\":1}"
        if [[ ${FAKE_STOQ:-} == die-server ]]; then
            sleep 0.5
            echo "fake server fails" >&2
            exit 9
        fi
        while :; do sleep 0.05; done
        ;;
    get)
        source=$(cat "$ca")/${url##*/}
        progress 1 0.5
        if [[ ${FAKE_STOQ:-} == die-client ]]; then
            echo "fake client fails" >&2
            exit 8
        fi
        if [[ ${FAKE_STOQ:-} == hang || ${FAKE_STOQ:-} == die-server ]]; then
            while :; do sleep 0.05; done
        fi
        cp "$source" "$out/${url##*/}"
        [[ ${FAKE_STOQ:-} != corrupt ]] || printf X | dd of="$out/${url##*/}" conv=notrunc bs=1 seek=100 status=none
        [[ ${FAKE_STOQ:-} != short ]] || truncate -s -1 "$out/${url##*/}"
        bytes=$(stat -c %s "$source")
        sha=$(sha256sum "$source" | cut -d ' ' -f 1)
        progress "$bytes" 1
        echo "{\"event\":\"done\",\"files\":[{\"url\":\"$url\",\"bytes\":$bytes,\"sha256\":\"$sha\"}],\"seconds\":1,\"goodput_bps\":8e9,\"rtt_us_p50\":120,\"packets_lost\":2,\"datapath\":\"socket\",\"mode\":\"fake\",\"xdp\":{\"redirected\":3}}"
        ;;
    perf-download)
        progress 1000 1
        echo "{\"event\":\"done\",\"workload\":\"download\",\"bytes\":5000,\"seconds\":$seconds,\"goodput_bps\":9e9,\"rtt_us_p50\":130,\"packets_lost\":1,\"datapath\":\"socket\",\"mode\":\"fake\",\"xdp\":{\"redirected\":4},\"cpu_user_s\":0.1,\"cpu_sys_s\":0.1}"
        ;;
    perf-raw)
        [[ -z $receive ]] || echo '{"event":"listening","addr":"[::]:1","datapath":"af_xdp","mode":"copy"}'
        sleep "$([[ -n $receive ]] && echo 0.4 || echo 0.2)"
        echo '{"event":"done","bytes":1000,"goodput_bps":1e10,"packets":10}'
        ;;
    *)
        echo "fake stoq: unknown command $command" >&2
        exit 2
        ;;
esac
