#!/usr/bin/env bash
# Removes the pair that veth-up.sh made; see `cargo xtask veth down --help`.
set -euo pipefail
cd "$(dirname "$0")/.."
exec cargo xtask veth down "$@"
