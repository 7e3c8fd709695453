"""What the endpoint adds to the server behind it: one at a time, many at once, and over a peer."""
import json
import os
import statistics
import subprocess

from servers import CLUSTER, LiteLlm, Nginx, Node, Stub, say

BACKENDS = """
[[backend]]
kind = "openai"
url = "{url}"
slots = 256
queue = 256
running_per_peer = 256
queued_per_peer = 256

[[backend]]
kind = "echo"
"""
DIRECT, HOP = "opengateway", "opengateway-hop"
# What is asked for, how, and which times count.
KINDS = (
    ("whole", (), "p50_us", "p99_us"),
    ("stream, first text", ("--stream",), "first_p50_us", "first_p99_us"),
)


def added(rounds, name, key):
    """What a contestant added to the stub, in each round: only neighbours in time are compared."""
    return [there[key] - bare[key] for there, bare in zip(rounds[name], rounds["stub"])]


class Endpoint:
    """The stub, and everybody who can stand in front of it, all up at the same time and asked in turn."""

    def __init__(self, tools, options):
        self.tools, self.options = tools, options
        self.live = []

    def start(self):
        stub = self.add(Stub(self.tools))
        self.targets = {"stub": stub, "nginx": self.add(Nginx(self.tools, stub))}
        a = self.add(Node(self.tools, "A", BACKENDS.format(url=stub.url)))
        c = self.add(Node(self.tools, "C", bootstrap=a.address))
        self.serving, self.stub = a, stub
        for node in (a, c):
            node.wait_for("instant")
        self.targets |= {DIRECT: a, HOP: c}
        if self.tools.litellm:
            self.targets["litellm"] = self.add(LiteLlm(self.tools, stub))

    def add(self, server):
        self.live.append(server)
        return server

    def close(self):
        for server in reversed(self.live):
            server.close()

    def load(self, *arguments, without=()):
        rounds, seconds = (3, 0.3) if self.options.quick else (self.options.rounds, 1.0)
        targets = [f"{name}={server.url}" for name, server in self.targets.items() if name not in without]
        argv = [self.tools.client, "load", *targets, "--rounds", str(rounds), "--seconds", str(seconds), *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise RuntimeError(done.stdout.strip() or done.stderr)
        return json.loads(done.stdout)

    def round_trip(self):
        """The prompt round trip of `bench.sh` between two nodes on this loopback: p50 in µs."""
        state = os.path.join(self.tools.scratch, "asker")
        argv = [self.tools.perf, "swarm", "bench", "--cluster", CLUSTER, "--state", state, "--bootstrap", self.serving.address]
        argv += ["--members", "1", "-n", "500" if self.options.quick else "5000", "-m", "100"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        for line in done.stdout.splitlines():
            event = json.loads(line)
            if event["ev"] == "bench":
                return event["rtt"]["p50_us"]
            if event["ev"] == "error":
                raise RuntimeError(event["error"])
        raise RuntimeError(f"no round trip: {done.stderr}")

    def latency(self, figures):
        """Added latency, one request at a time."""
        for what, arguments, p50, p99 in KINDS:
            say(f"added latency, {what} …")
            rounds = self.load(*arguments)
            for key, label in ((p50, "p50"), (p99, "p99")):
                rows = {name: added(rounds, name, key) for name in rounds if name != "stub"}
                figures.compare(
                    "added-latency", f"endpoint's added latency, one at a time, {what}, {label}", "µs", rows.pop(DIRECT), rows,
                    against="nginx", reach=2.0,
                )
                figures.also[f"stub, {what}, {label}, µs"] = round(statistics.median(row[key] for row in rounds["stub"]), 1)

    def hop(self, figures):
        """What one peer hop adds, beside the round trip of a prompt between the same daemons."""
        trips = [self.round_trip()]
        for what, arguments, p50, _ in KINDS:
            say(f"one peer hop, {what} …")
            rounds = self.load(*arguments, without=[name for name in self.targets if name not in (DIRECT, HOP)])
            trips.append(self.round_trip())
            more = [there[p50] - direct[p50] for there, direct in zip(rounds[HOP], rounds[DIRECT])]
            figures.compare(
                "peer-hop", f"one peer hop, {what}, p50, more than the endpoint alone", "µs", more, {"prompt round trip": trips},
                against="prompt round trip", reach=1.5,
            )

    def throughput(self, figures):
        """Requests a second, 32 at once."""
        for what, arguments in (("whole", ()), ("streamed", ("--stream",))):
            say(f"requests a second, {what} …")
            rounds = self.load("--in-flight", "32", *arguments)
            rows = {name: [row["per_s"] for row in rows] for name, rows in rounds.items()}
            figures.compare(
                "throughput", f"requests a second through the endpoint, 32 in flight, {what}", "1/s", rows.pop(DIRECT), rows,
                against="nginx", reach=0.5, higher=True,
            )
