"""The engine beside plain llama.cpp, the same engine asked from another node, and the daemon's memory meanwhile."""
import json
import os
import statistics
import subprocess

import lab
from servers import Node, say

LARGE, DEMO = "smollm-360m", "opengateway-demo"

CONFIG = """
[engine]
program = "{program}"
keep = [{keep}]
slots = {slots}
context = 1024
threads = {threads}

[models]
directory = "{directory}"
"""


class Engine:
    """A node with the two models, and one that has none and asks it."""

    def __init__(self, tools, options):
        self.tools, self.options = tools, options
        self.live = []
        self.folder, self.demo, self.large = tools.models()

    def start(self, slots=8):
        config = CONFIG.format(
            program=self.options.engine, slots=slots, threads=self.options.threads, directory=self.folder, keep=f'"{LARGE}", "{DEMO}"',
        )
        self.a = self.add(Node(self.tools, f"E{slots}", config))
        self.c = self.add(Node(self.tools, f"F{slots}", bootstrap=self.a.address))
        for node in (self.a, self.c):
            node.wait_for(LARGE, DEMO)

    def add(self, server):
        self.live.append(server)
        return server

    def close(self):
        for server in reversed(self.live):
            server.close()

    def run(self, argv):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=540)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv[:2])}: {done.stdout.strip() or done.stderr.strip()}")
        return json.loads(done.stdout)

    def alone(self, model, streams, rounds, generate=64, prompt=128):
        """One run of `engine-bench`: the engine over its socket, and plain llama.cpp, in turns."""
        argv = [os.path.join(os.path.dirname(self.options.engine), "examples", "engine-bench"), model, "--engine", self.options.engine]
        argv += ["--streams", str(streams), "--rounds", str(rounds), "--threads", str(self.options.threads)]
        argv += ["--generate", str(generate), "--prompt", str(prompt)]
        (row,) = self.run(argv)["streams"]
        return row

    def asked(self, model, streams, rounds, generate=64, prompt=128):
        """The same prompts at the endpoint of the node itself and of the other one, in turns."""
        argv = [self.tools.client, "tokens", f"here={self.a.url}", f"peer={self.c.url}", "--model", model]
        argv += ["--streams", str(streams), "--rounds", str(rounds), "--generate", str(generate), "--prompt", str(prompt)]
        return self.run(argv)

    def speed(self, figures):
        """Tokens a second: engine, plain llama.cpp, endpoint here, endpoint of another node; blocks of rounds in turns."""
        blocks, rounds = (1, 1) if self.options.quick else (3, 3)
        for streams in (1, 8):
            say(f"tokens a second of {LARGE}, {streams} at once …")
            rows, by_cpu = {}, []
            for _ in range(blocks):
                row = self.alone(self.large, streams, rounds)
                by_cpu.append(row.get("ratio_cpu"))
                for who, key in (("engine", "engine"), ("llama.cpp", "reference")):
                    rows.setdefault(who, []).append(row[key])
                for who, measured in self.asked(LARGE, streams, rounds).items():
                    rows.setdefault(who, []).extend(measured)
            # By processor time: what is left of the comparison on a machine that has other work.
            figures.also[f"engine beside llama.cpp, tokens per CPU second, {streams} streams, by block"] = by_cpu
            for key, what in (("prompt_tps", "prompt"), ("generate_tps", "generation")):
                of = {who: [row[key] for row in measured] for who, measured in rows.items()}
                figures.compare(
                    "engine-speed", f"engine's tokens/s, {what}, {streams} streams, beside plain llama.cpp", "1/s", of["engine"],
                    {"llama.cpp": of["llama.cpp"]}, against="llama.cpp", reach=0.97, higher=True,
                )
                figures.compare(
                    "peer-speed", f"tokens/s asked from another node, {what}, {streams} streams, beside the engine alone", "1/s", of["peer"],
                    {"engine": of["engine"], "here": of["here"]}, against="engine", reach=0.97, higher=True,
                )

    def first_token(self, figures):
        """The demo model over a peer, beside its engine's own socket."""
        blocks, rounds = (1, 5) if self.options.quick else (5, 20)
        rows = {"engine": [], "peer": [], "here": []}
        for _ in range(blocks):
            rows["engine"].append(self.alone(self.demo, 1, rounds, 8, 8)["engine"]["first_token_ms"])
            for who, measured in self.asked(DEMO, 1, rounds, 8, 8).items():
                rows[who].append(statistics.median(row["first_token_ms"] for row in measured))
        more = [there - own for there, own in zip(rows["peer"], rows["engine"])]
        beside = {who: lab.summary(times, 3) for who, times in rows.items()}
        figures.limit("first-token", "time to first token of the demo model over a peer, above the engine's own", "ms", more, beside, reach=5)

    def memory(self, figures):
        """The daemon's own memory, idle with a loaded engine and while it answers eight at once; the child's apart."""
        samples = {"idle": own(self.a.process.pid)}
        argv = [self.tools.client, "tokens", f"peer={self.c.url}", "--model", LARGE, "--streams", "8", "--rounds", "1", "--generate", "48"]
        asking = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        peak = {"rss_mib": 0, "pss_mib": 0}
        while asking.poll() is None:
            peak = {key: max(value, peak[key]) for key, value in own(self.a.process.pid).items()}
            try:
                asking.wait(0.2)
            except subprocess.TimeoutExpired:
                pass
        samples["eight streams, at most"] = peak
        children = [pid for pid in lab.tree(self.a.process.pid) if pid != self.a.process.pid]
        samples["engines"] = {pid: own(pid) for pid in children}
        samples["asking node"] = own(self.c.process.pid)
        figures.limit("memory", "daemon's RSS with an engine serving", "MiB", [samples["idle"]["rss_mib"], peak["rss_mib"]], samples, reach=30)


def own(pid):
    """Memory of one process without its children."""
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        kib = {line.split()[0]: int(line.split()[1]) for line in rollup if line.startswith(("Rss:", "Pss:"))}
    return {"rss_mib": round(kib["Rss:"] / 1024, 2), "pss_mib": round(kib["Pss:"] / 1024, 2)}
