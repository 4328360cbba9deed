#!/usr/bin/env bash
# Makes a veth pair between two namespaces to play with; see `cargo xtask veth up --help`.
set -euo pipefail
cd "$(dirname "$0")/.."
exec cargo xtask veth up "$@"
