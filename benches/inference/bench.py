#!/usr/bin/env python3
"""What the endpoint and the engine cost, beside nginx, LiteLLM and plain llama.cpp in the same run. One JSON object on stdout."""
import argparse
import contextlib
import json
import os
import signal
import sys
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, HERE)
sys.path.insert(0, os.path.join(ROOT, "benches", "side-by-side"))

import lab  # noqa: E402
from cancel import Cancel  # noqa: E402
from endpoint import Endpoint  # noqa: E402
from engine import LARGE, Engine  # noqa: E402
from figures import Figures  # noqa: E402
from servers import Missing, Tools, say  # noqa: E402

ENDPOINT = ("latency", "peer-hop", "throughput", "cancel-upstream")
ENGINE = ("speed", "first-token", "memory", "cancel-engine")


def arguments():
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    parser = argparse.ArgumentParser(prog="bench.sh --inference", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to compare")
    parser.add_argument("--rounds", type=int, default=20, help="of latency and throughput, one second for everybody in each")
    parser.add_argument("--only", default="", help=f"figures: {', '.join(ENDPOINT + ENGINE)}")
    parser.add_argument("--litellm", action="store_true", help="LiteLLM's proxy beside it (750 MB by pip into the cache)")
    parser.add_argument("--threads", type=int, default=0, help="of the engine and of llama.cpp; 0: as the engine chooses")
    parser.add_argument("--programs", default=os.path.join(target, "release"), help="folder of opengatewayd, ogctl and examples/")
    parser.add_argument("--engine", default=os.path.join(target, f"{os.uname().machine}-unknown-linux-gnu", "release", "opengateway-engine"))
    parser.add_argument("--cache", default=os.environ.get("BENCH_CACHE", os.path.join(target, "bench")))
    options = parser.parse_args()
    options.root = ROOT
    options.engine, options.programs = os.path.abspath(options.engine), os.path.abspath(options.programs)
    options.wanted = [name for name in options.only.split(",") if name] or [*ENDPOINT, *ENGINE]
    unknown = [name for name in options.wanted if name not in ENDPOINT + ENGINE]
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}; there are: {', '.join(ENDPOINT + ENGINE)}")
    return options


class Run:
    """The figures that were asked for; one that cannot be had must not cost the others."""

    def __init__(self, options, tools):
        self.options, self.tools = options, tools
        self.figures, self.failed = Figures(), {}

    @contextlib.contextmanager
    def step(self, name):
        say(f"{name} …")
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed[name] = str(error)

    def group(self, names, make, steps):
        """What shares its servers: these are up only while it is measured."""
        wanted = [name for name in names if name in self.options.wanted]
        if not wanted:
            return
        with self.step(f"start for {', '.join(wanted)}"), contextlib.closing(make(self.tools, self.options)) as servers:
            servers.start(**({"slots": 1} if wanted == ["cancel-engine"] else {}))
            for name in wanted:
                with self.step(name):
                    steps[name](servers)

    def all(self):
        cancel, figures = Cancel(self.options), self.figures
        self.group(ENDPOINT, Endpoint, {
            "latency": lambda servers: servers.latency(figures),
            "peer-hop": lambda servers: servers.hop(figures),
            "throughput": lambda servers: servers.throughput(figures),
            "cancel-upstream": lambda servers: cancel.upstream(servers, figures),
        })
        self.group(ENGINE[:3], Engine, {
            "speed": lambda servers: servers.speed(figures),
            "first-token": lambda servers: servers.first_token(figures),
            "memory": lambda servers: servers.memory(figures),
        })
        self.group(ENGINE[3:], Engine, {"cancel-engine": lambda servers: cancel.engine(servers, LARGE, figures)})


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if lab.NICE and not os.geteuid():
        os.setpriority(os.PRIO_PROCESS, 0, lab.NICE)
    begun = lab.machine()
    try:
        tools = Tools(options)
    except Missing as missing:
        sys.exit(f"bench: {missing}")
    run = Run(options, tools)
    try:
        run.all()
    finally:
        tools.close()
    rows = run.figures.rows
    print(json.dumps({
        "schema": 1, "machine": begun, "load_after": os.getloadavg(), "quick": options.quick, "installed": tools.installed,
        "figures": rows, "also": run.figures.also, "failed": run.failed,
        "reach_missed": [row["text"] for row in rows if row["reach_met"] is False],
    }, indent=1, ensure_ascii=False))
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
