#!/bin/sh
# Every performance figure beside the best peer and the machine's own floor, in one run: one JSON object on stdout,
# progress on stderr. Needs root (network namespaces). benches/side-by-side/README.md tells how to read it.
#
#   scripts/bench.sh [--quick] [--peers hyperswarm,lattica,…|none] [--only NAME,…]
#
# BENCH_BUILD=0 measures what is in target/release already.
set -eu
cd "$(dirname "$0")/.."
for argument; do
    case $argument in -h | --help) exec python3 benches/side-by-side/bench.py --help ;; esac
done
if [ "${BENCH_BUILD:-1}" != 0 ]; then
    echo "bench: building the release (link-time optimisation takes minutes)" >&2
    # Apart: what examples may use (features of development) would be built into the programs.
    cargo build --release --locked --bins >&2
    cargo build --release --locked --example opengatewayd-perf >&2
fi
exec python3 benches/side-by-side/bench.py "$@"
