#!/usr/bin/env python3
"""Every figure of OpenGateway's performance beside the best peer and the machine's own floor, in one run. See README.md."""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback

import lab
from contestants import Gateway, GatewayMdns, HERE, Hyperswarm, Lattica, LatticaMdns
from install import Missing, Tools, say
from lab import Lan, Proc, summary

MIB = 1024 * 1024


class Bench:
    """One run: the contestants that are up, and the figures so far."""

    def __init__(self, options, tools):
        self.options, self.tools = options, tools
        self.rounds = 3 if options.quick else 12
        self.figures, self.also = [], {}
        self.up, self.servers = {}, []

    # ---- contestants -------------------------------------------------------------------------------------------------

    def has(self, name):
        base = "lattica" if name.startswith("lattica") else name
        return name.startswith("opengateway") or (name in self.options.peers and getattr(self.tools, base) is not None)

    def contestants(self, *classes):
        """Those of `classes` that can be measured, up and running with A and B. They stay up for the whole run."""
        found = []
        for kind in classes:
            if not self.has(kind.name):
                continue
            if kind.name not in self.up:
                say(f"starting {kind.name}: A and B")
                contestant = kind(self.tools)
                self.up[kind.name] = contestant
                contestant.start()
            found.append(self.up[kind.name])
        return found

    def close(self):
        for server in self.servers:
            server.kill(signal.SIGKILL)
        for contestant in self.up.values():
            contestant.close()

    # ---- results -----------------------------------------------------------------------------------------------------

    def add(self, name, figure, unit, ours, beside=None, *, against=None, field="median", reach=None, aim=None, higher=False, limit=False):
        """One row. `ours` and each of `beside` is a summary or a number. With `limit`, `reach` and `aim` are in units; else
        they are the ratio to `against`, and `higher` tells that more is better."""
        value = ours.get(field) if isinstance(ours, dict) else ours
        other = (beside or {}).get(against)
        other = other.get(field) if isinstance(other, dict) else other
        ratio = round(value / other, 3) if value is not None and other else None
        compared = value if limit else ratio

        def met(bound):
            if bound is None or compared is None:
                return None
            return compared >= bound if higher else compared <= bound

        row = {
            "name": name, "figure": figure, "unit": unit, "field": field, "ours": ours, "beside": beside or {}, "against": against,
            "ratio": ratio, "reach": reach, "reach_met": met(reach), "aim": aim, "aim_met": met(aim), "bound": "value" if limit else "ratio",
        }
        self.figures.append(row)
        say(f"  {figure}: {value} {unit}" + (f", {against} {other}, ratio {ratio}" if other else "") + f" (reach {reach}: {row['reach_met']})")

    # ---- figures -----------------------------------------------------------------------------------------------------

    def cold(self, ours, others, name, figure, against, reach, aim, member_rows):
        """Cold processes of C, one contestant after the other, round after round."""
        everybody = self.contestants(ours, *others)
        gateway = everybody[0]
        asked = {contestant.name: [] for contestant in everybody}
        ogctl, swarm = [], []
        for at in range(self.rounds):
            for contestant in everybody:
                asked[contestant.name].append(contestant.ask())
                time.sleep(0.3)
            ogctl.append(gateway.ask_ogctl())
            time.sleep(0.3)
            swarm.append(gateway.ask(role="swarm"))
            time.sleep(0.3)
        column = lambda key: {peer: summary([ask[key] for ask in asks]) for peer, asks in asked.items()}
        answers, both = column("answer"), column("both")
        mine = answers.pop(gateway.name)
        ways = {"ogctl": summary(ogctl), "own_client": mine, "library_alone": summary([ask["answer"] for ask in swarm])}
        self.also[f"{name}_answer_ms_by_way"] = ways
        self.also[f"{name}_unanswered"] = sum(value is None for value in ogctl)
        self.add(name, figure, "ms", ways["ogctl"], answers, against=against, reach=reach, aim=aim)
        if against == "lattica-mdns":
            self.add(name, f"{figure}, p99", "ms", ways["ogctl"], answers, against=against, field="p99", reach=reach, aim=aim)
        seen = both.pop(gateway.name)
        self.also[f"{name}_not_both_seen"] = self.rounds - seen["n"]
        for field, reach, aim in member_rows:
            what = f"C start → lists A and B as members ({'mDNS' if gateway.mdns else 'Kademlia'}), {field}"
            self.add("members", what, "ms", seen, both, against=against, field=field, reach=reach, aim=aim)

    def cold_lan(self):
        self.cold(
            GatewayMdns, (LatticaMdns,), "cold-lan", "cold process start of C → answer printed, LAN by mDNS",
            "lattica-mdns", 0.9, 0.6, [("median", 0.9, 0.6), ("p99", 0.5, None)],
        )

    def cold_dht(self):
        self.cold(
            Gateway, (Hyperswarm, Lattica), "cold-dht", "cold process start of C → answer printed, bootstrap + Kademlia",
            "hyperswarm", 0.5, 0.3, [],
        )

    def joined(self):
        """Serving nodes that come and go in C's place."""
        everybody = self.contestants(GatewayMdns, LatticaMdns)
        times = {contestant.name: [] for contestant in everybody}
        for _ in range(self.rounds):
            for contestant in everybody:
                process = contestant.serve("c", "X")
                times[contestant.name].append(process.ms(process.wait("joined", 20)))
                process.kill()
                time.sleep(0.3)
        rows = {name: summary(values) for name, values in times.items()}
        ours = rows.pop(GatewayMdns.name)
        self.add("joined", "daemon start → joined and announced, mDNS", "ms", ours, rows, against="lattica-mdns", reach=0.9, aim=0.5)

    def resident(self):
        """A whole `ogctl prompt` beside a whole `busctl call` to the same daemon."""
        (gateway,) = self.contestants(GatewayMdns)
        node = gateway.resident()
        try:
            self.ask_resident(gateway)
        finally:
            node.kill()

    def ask_resident(self, gateway):
        bus = gateway.buses["c"]
        commands = {
            "ogctl": [self.tools.ogctl, "--bus", bus, "prompt", "-c", gateway.cluster, "a" * 64],
            "busctl": ["busctl", f"--address={bus}", "call", "org.opengateway.Gateway1", "/org/opengateway/Gateway1", "org.freedesktop.DBus.Peer", "Ping"],
            "true": ["true"],
        }
        times = {name: [] for name in commands}
        for _ in range(self.rounds * 3):
            for name, argv in commands.items():
                begun = time.monotonic()
                done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
                times[name].append((time.monotonic() - begun) * 1000)
                if done.returncode:
                    raise RuntimeError(f"{argv} failed: {done.stderr.decode()}")
        rows = {name: summary(values) for name, values in times.items()}
        ours = rows.pop("ogctl")
        self.add("resident", "ogctl prompt to a resident daemon, echo on another node, whole process", "ms", ours, rows, against="busctl", reach=1.5, aim=0.8)
        client = gateway.beside("c", "bench", "-n", "2000", "-m", "4000", "--in-flight", "16")
        event = client.wait("bench", 120)
        client.kill()
        self.also["prompt_over_the_bus"] = event and {key: event[key] for key in ("rtt", "flight")}

    def floors(self, scale=1.0):
        """Bare TCP and QUIC echo between two namespaces of their own."""
        if "floors" not in self.up:
            lan = self.up["floors"] = Lan(["a", "b"])
            for kind, port in (("tcp", 4001), ("quic", 4002)):
                server = Proc([self.tools.floors, f"{kind}-serve", f"{lan.ip['a']}:{port}"], ns=lan.ns["a"])
                self.servers.append(server)
                server.wait("ready", 10)
        lan = self.up["floors"]
        result = {}
        for name, mode, port in (("tcp", "tcp", 4001), ("quic", "quic-streams", 4002), ("quic-one-stream", "quic", 4002)):
            for key, n, in_flight in (("rtt", 2000, 1), ("flight", 20000, 64)):
                argv = [self.tools.floors, mode, f"{lan.ip['a']}:{port}", str(int(n * scale)), "64", str(in_flight)]
                client = Proc(argv, ns=lan.ns["b"])
                result.setdefault(name, {})[key] = client.wait("floor", 120)
                client.kill()
        return result

    def rtt(self):
        """Prompts of 64 bytes over an open connection: one after the other, and 64 in flight; floors in the same rounds."""
        everybody = self.contestants(GatewayMdns, Hyperswarm, LatticaMdns)
        columns = {}

        def note(name, result):
            for key, field in (("rtt", "p50_us"), ("rtt", "p99_us"), ("flight", "per_s")):
                columns.setdefault(field, {}).setdefault(name, []).append(result[key][field])

        for _ in range(max(self.rounds, 3)):
            for name, result in self.floors().items():
                note(name, result)
            for contestant in everybody:
                result = contestant.bench()
                if result is not None:
                    note(contestant.name, result)
                elif contestant.name == GatewayMdns.name:
                    raise RuntimeError(f"{contestant.name}: no bench; see {contestant.log}")
                else:
                    # A peer that fails a round is compared by its other rounds, and it is told.
                    key = f"{contestant.name}_rounds_without_bench"
                    self.also[key] = self.also.get(key, 0) + 1
        rows = {field: {name: summary(values, 1) for name, values in column.items()} for field, column in columns.items()}
        p50, p99, per_s = rows["p50_us"], rows["p99_us"], rows["per_s"]
        ours = p50.pop(GatewayMdns.name)
        text = "prompt round trip between daemons, 64 bytes, p50"
        self.add("rtt", text, "µs", ours, p50, against="tcp", reach=1.35, aim=1.15)
        self.add("rtt", f"{text}, below Hyperswarm", "µs", ours, p50, against="hyperswarm", reach=1.0)
        self.add("rtt", f"{text}, beside the QUIC floor", "µs", ours, p50, against="quic")
        self.also["prompt_round_trip_p99_us"] = p99
        ours = per_s.pop(GatewayMdns.name)
        self.add("throughput", "prompts per second, 64 in flight", "1/s", ours, per_s, against="hyperswarm", reach=0.8, aim=1.5, higher=True)

    def idle(self):
        """Three nodes that nobody asks; all contestants at the same time."""
        everybody = self.contestants(GatewayMdns, Hyperswarm, LatticaMdns)
        resident = self.up[GatewayMdns.name].resident()
        # The client that told us of the answer must not count as load.
        resident.told.kill(signal.SIGKILL)
        # Their client stays after its answer, and asks nothing more.
        clients = [contestant.client("ask") for contestant in everybody[1:]]
        # A node announces itself again half a minute after it joined; then it is at rest.
        settle, seconds = (5, 20) if self.options.quick else (45, 60)
        time.sleep(settle)
        say(f"idle for {seconds} s")
        owners, pids = [], []
        for contestant in everybody:
            for process in contestant.serving.values():
                owners.append(contestant.name)
                pids.append(process.pid)
        owners.append(GatewayMdns.name)
        pids.append(resident.pid)
        samples = {}
        for owner, row in zip(owners, lab.idle(pids, seconds)):
            for key, value in row.items():
                samples.setdefault(key, {}).setdefault(owner, []).append(value)
        for process in [resident, *clients]:
            process.kill()
        for key, unit, reach, aim in (
            ("rss_mib", "MiB", 20, 15), ("pss_mib", "MiB", 14, 11), ("cpu_ms_per_s", "ms/s", 0.3, 0.1), ("wakeups_per_s", "1/s", 3, 1),
        ):
            rows = {owner: summary(values, 3) for owner, values in samples[key].items()}
            ours = rows.pop(GatewayMdns.name)
            self.add("idle", f"idle node in a cluster of three, {key}", unit, ours, rows, against="lattica-mdns", reach=reach, aim=aim, limit=True)
        self.also["idle_threads"] = {owner: values for owner, values in samples["threads"].items()}

    def crash(self):
        """Serving nodes that are killed, and others whose cable is pulled, until C no longer lists them."""
        count = 3 if self.options.quick else 10
        kinds = [kind for kind in (GatewayMdns, Hyperswarm, Lattica) if self.has(kind.name)]
        results = {"killed": {}, "pulled": {}}
        for kind in kinds:
            contestant = kind(self.tools, spare=count)
            try:
                contestant.rendezvous()
                for how in results:
                    results[how][kind.name] = summary(self.vanish(contestant, count, how))
                    say(f"  {kind.name} {how}: {results[how][kind.name]}")
            finally:
                contestant.close()
        for how, aim, text in (("killed", 1, "serving node killed with -9 → gone from C's peers"), ("pulled", 10, "cable pulled → gone from C's peers")):
            rows = results[how]
            ours = rows.pop(GatewayMdns.name)
            self.add("crash", text, "s", ours, rows, against="lattica", reach=15, aim=aim, limit=True)

    def vanish(self, contestant, count, how):
        names = {f"x{at}": f"X{at}" for at in range(count)}
        servers = {node: contestant.serve(node, name) for node, name in names.items()}
        for server in servers.values():
            if server.wait("joined", 30) is None:
                raise RuntimeError(f"{contestant.name} did not join; see {contestant.log}")
        watcher = contestant.client("watch", members=count)
        seen = set()
        deadline = time.monotonic() + 60
        while len(seen) < count and time.monotonic() < deadline:
            event = watcher.wait("peer", deadline - time.monotonic())
            if event:
                seen.add(event["name"])
        time.sleep(6)
        gone_at = {}
        for node, server in servers.items():
            gone_at[names[node]] = time.monotonic()
            if how == "killed":
                server.kill(signal.SIGKILL)
            else:
                contestant.lan.cable(node, False)
            time.sleep(0.2)
        waits = {}
        deadline = time.monotonic() + 60
        while len(waits) < count and time.monotonic() < deadline:
            event = watcher.wait("gone", deadline - time.monotonic())
            if event and event["name"] in gone_at:
                waits.setdefault(event["name"], event["at"] - gone_at[event["name"]])
        if len(waits) < count:
            self.also[f"{contestant.name}_{how}_not_noticed_in_60_s"] = count - len(waits)
        watcher.kill(signal.SIGKILL)
        for node, server in servers.items():
            server.kill(signal.SIGKILL)
            if how == "pulled":
                contestant.lan.cable(node, True)
        # A node that comes back has a new identity; the old ones must be forgotten before the next count.
        time.sleep(1)
        return list(waits.values())

    def binary(self):
        size = lambda path: round(os.path.getsize(path) / 1e6, 2)
        rows = {}
        if self.tools.lattica:
            packages = os.path.dirname(os.path.dirname(self.tools.lattica))
            sizes = [
                os.path.getsize(os.path.join(at, file))
                for at, _, files in os.walk(packages) for file in files if "lattica" in at and file.endswith(".so")
            ]
            rows["lattica"] = round(sum(sizes) / 1e6, 2)
        syncthing = self.tools.syncthing() if self.options.peers else None
        if syncthing:
            rows["syncthing"] = size(syncthing)
        self.add("binary", "stripped daemon binary (LTO)", "MB", size(self.tools.daemon), rows, against="syncthing", reach=20, aim=12, limit=True)
        self.also["ogctl_mb"] = size(self.tools.ogctl)

    def memory(self):
        """Resident memory of a serving daemon and of the asking one while prompts pass: the slope after a warm-up."""
        (gateway,) = self.contestants(GatewayMdns)
        prompts = 2000 if self.options.quick else 10000

        def slope(samples):
            # The median of the slopes between any two samples, in KiB for 1,000 prompts: growth shows, one step of the
            # allocator does not.
            return round(1000 * statistics.median((b - a) / (m - n) for n, a in samples for m, b in samples if m > n), 2)

        pids = {"asking": None, "A": gateway.serving["a"].pid, "B": gateway.serving["b"].pid}
        # What is bounded by a number of prompts is full after the warm-up.
        client = gateway.swarm("flood", "-n", str(prompts), "-m", str(10 * prompts))
        pids["asking"] = client.pid
        samples = {name: [] for name in pids}
        while (event := client.wait("done", 120)) is not None:
            for name, pid in pids.items():
                samples[name].append((event["n"], lab.rss_kib(pid)))
            if event["n"] >= prompts:
                break
        client.kill()
        slopes = {name: slope(rows) for name, rows in samples.items()}
        self.also["rss_mib_of_serving_nodes_after_all_that"] = [round(lab.rss_kib(pids[name]) / 1024, 1) for name in ("A", "B")]
        self.also["memory_rss_kib"] = {name: [kib for _, kib in rows] for name, rows in samples.items()}
        worst = max(slopes.values())
        self.add("memory", f"growth of memory over {prompts} prompts, worst node", "KiB per 1000", worst, slopes, reach=16, aim=1, limit=True)

    def flight256(self):
        """256 prompts at once: how far resident memory rises at the asker and at the serving nodes."""
        (gateway,) = self.contestants(GatewayMdns)
        pids = {"A": gateway.serving["a"].pid, "B": gateway.serving["b"].pid}
        before = {name: lab.rss_kib(pid) for name, pid in pids.items()}
        client = gateway.swarm("bench", "-n", "200", "-m", "20000", "--in-flight", "256")
        event = client.wait("bench", 120)
        after = {name: lab.rss_kib(pid) for name, pid in pids.items()}
        client.kill()
        rise = {name: round((after[name] - before[name]) / 1024, 2) for name in pids}
        self.also["flight256"] = event and event["flight"]
        self.add("flight256", "256 prompts in flight: rise of resident memory, worst serving node", "MiB", max(rise.values()), rise, reach=16, aim=4, limit=True)

    def sizes(self):
        """Prompts of 64 KiB through the echo, and answers of 1 MiB from an OpenAI-compatible server, by whole `ogctl prompt`s."""
        contestant = GatewayMdns(self.tools, spare=1)
        try:
            stub = contestant.spawn("x0", [sys.executable, os.path.join(HERE, "stub.py"), "9999"])
            stub.wait("ready", 10)
            config = '[[backend]]\nkind = "openai"\nurl = "http://127.0.0.1:9999/v1"\n\n[[backend]]\nkind = "echo"\n'
            server = contestant.serve("x0", "X0", config=config)
            server.wait("joined", 20)
            resident = contestant.client("watch", members=1)
            if resident.wait("peer", 20) is None:
                raise RuntimeError(f"X0 was not seen; see {contestant.log}")
            models = lambda: contestant.ogctl("c", "models", contestant.cluster).stdout
            deadline = time.monotonic() + 20
            while "mebibyte" not in models() and time.monotonic() < deadline:
                time.sleep(0.1)
            for text, model, prompt, answer in (("64 KiB prompt, echoed", "echo", 64 * 1024, 64 * 1024), ("1 MiB answer", "mebibyte", 2, MIB)):
                times = []
                before = [lab.rss_kib(process.pid) for process in (server, resident)]
                for _ in range(self.rounds):
                    begun = time.monotonic()
                    done = contestant.ogctl("c", "prompt", "-c", contestant.cluster, "-m", model, "--raw", "-", input="a" * prompt)
                    times.append((time.monotonic() - begun) * 1000)
                    if done.returncode or len(done.stdout.rstrip("\n")) != answer:
                        raise RuntimeError(f"{text}: {len(done.stdout)} bytes, {done.stderr}")
                after = [lab.rss_kib(process.pid) for process in (server, resident)]
                rise = {name: round((b - a) / 1024, 2) for name, a, b in zip(("serving_mib", "asking_mib"), before, after)}
                self.add("sizes", f"{text}, whole ogctl prompt", "ms", summary(times), {"rss_rise": rise})
        finally:
            contestant.close()

    NAMES = {
        "binary": binary, "idle": idle, "cold-lan": cold_lan, "cold-dht": cold_dht, "joined": joined, "resident": resident, "rtt": rtt,
        "memory": memory, "flight256": flight256, "sizes": sizes, "crash": crash,
    }


def main():
    parser = argparse.ArgumentParser(prog="bench.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 12: to see that it works, not to compare")
    parser.add_argument("--peers", default="hyperswarm,lattica,lattica-mdns", help="who is measured beside OpenGateway; none for nobody")
    parser.add_argument("--only", default="", help=f"figures: {', '.join(Bench.NAMES)} (members comes with cold-lan, throughput with rtt)")
    parser.add_argument("--cache", default=os.environ.get("BENCH_CACHE", os.path.join(HERE, "..", "..", "target", "bench")))
    options = parser.parse_args()
    options.peers = [] if options.peers == "none" else options.peers.split(",")
    if "lattica" in options.peers and "lattica-mdns" not in options.peers:
        options.peers.append("lattica-mdns")
    same = {"members": "cold-lan", "throughput": "rtt"}
    wanted = [same.get(name, name) for name in options.only.split(",") if name] or list(Bench.NAMES)
    unknown = [name for name in wanted if name not in Bench.NAMES] + [
        peer for peer in options.peers if peer not in ("hyperswarm", "lattica", "lattica-mdns")
    ]
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}")
    if os.geteuid():
        parser.error("network namespaces need root: run it with sudo")
    try:
        tools = Tools(options.cache, options.peers)
    except Missing as missing:
        parser.error(str(missing))
    if lab.NICE:
        os.setpriority(os.PRIO_PROCESS, 0, lab.NICE)
    bench, begun, failed = Bench(options, tools), lab.machine(), {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name in Bench.NAMES:
            if name not in wanted:
                continue
            say(f"{name} …")
            try:
                Bench.NAMES[name](bench)
            except Exception as error:  # one figure that cannot be had must not cost the others
                traceback.print_exc()
                failed[name] = str(error)
    finally:
        bench.close()
        tools.close()
    missed = [row["figure"] for row in bench.figures if row["reach_met"] is False]
    result = {
        "schema": 1, "machine": begun, "load_after": os.getloadavg(), "quick": options.quick, "rounds": bench.rounds, "installed": tools.installed,
        "figures": bench.figures, "also": bench.also, "reach_missed": missed, "failed": failed,
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
