#!/bin/sh
# Every performance figure beside the best peer and the machine's own floor, in one run: one JSON object on stdout,
# progress on stderr. benches/side-by-side/README.md and benches/inference/README.md tell how to read it.
#
#   scripts/bench.sh [--quick] [--peers hyperswarm,lattica,…|none] [--only NAME,…]      discovery, prompts, size (needs root)
#   scripts/bench.sh --inference [--quick] [--only NAME,…] [--litellm]                  the OpenAI endpoint and the engine
#
# BENCH_BUILD=0 measures what is in target/release already.
set -eu
cd "$(dirname "$0")/.."
bench=benches/side-by-side/bench.py example=opengatewayd-perf
if [ "${1:-}" = --inference ]; then
    shift
    bench=benches/inference/bench.py example=inference-bench
fi
for argument; do
    case $argument in -h | --help) exec python3 "$bench" --help ;; esac
done
if [ "${BENCH_BUILD:-1}" != 0 ]; then
    echo "bench: building the release (link-time optimisation takes minutes)" >&2
    # Apart: what examples may use (features of development) would be built into the programs.
    cargo build --release --locked --bins >&2
    cargo build --release --locked --example opengatewayd-perf --example "$example" >&2
    if [ "$example" = inference-bench ]; then
        scripts/engine.sh build >&2
        scripts/engine.sh cargo build --example engine-bench >&2
    fi
fi
exec python3 "$bench" "$@"
