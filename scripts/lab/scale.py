#!/usr/bin/env python3
"""Starts N real daemons, each in a network namespace of its own on one switch, and prints what a node costs.

    sudo scripts/lab/scale.py [--nodes 50,100,200] [--daemon target/release/opengatewayd] [--rest 60] [--settle 60]
                                [--log LEVEL] [--keep DIRECTORY]

For each N twice: once with its bootstrap, once with the bootstrap killed five seconds after the last start. How many a node
lists is read from its log, which costs the machine nothing; what a node costs at rest is read from /proc over --rest
seconds, after --settle seconds of quiet. --keep leaves the logs in DIRECTORY. Needs root, ip and dbus-daemon; leaves nothing behind.
"""

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

PREFIX = "ogscale"
CLUSTER = "scale-lab"
BOOTSTRAP = "000-boot"
PEERS = re.compile(rb"peers: ([^\n]*)")
TICK = os.sysconf("SC_CLK_TCK")
# The kernel keeps all neighbours of all namespaces in one table; 200 nodes that talk to 64 others each need more than 1,024.
NEIGHBOURS = pathlib.Path("/proc/sys/net/ipv4/neigh/default")


def ip(batch):
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True, stdout=subprocess.DEVNULL)


def inside(namespace, batch):
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input=batch, text=True, check=True, stdout=subprocess.DEVNULL)


def address(number):
    return f"10.90.{number // 250}.{number % 250 + 1}"


class Node:
    """A daemon, its bus, its namespace."""

    def __init__(self, number, directory):
        self.number, self.namespace = number, f"{PREFIX}-{number}"
        self.name = BOOTSTRAP if number == 0 else f"n{number:03}"
        self.directory = directory / self.name
        self.directory.mkdir()
        self.log = self.directory / "daemon.log"
        self.read, self.tail, self.listed, self.lists_bootstrap = 0, b"", 0, False
        self.bus = self.daemon = None

    def start_bus(self):
        config = self.directory / "bus.conf"
        config.write_text(
            '<busconfig><type>session</type>'
            f'<listen>unix:path={self.directory}/socket</listen><policy context="default"><allow user="*"/>'
            '<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>')
        self.bus = subprocess.Popen(["dbus-daemon", "--nofork", f"--config-file={config}"], stderr=subprocess.DEVNULL)

    def start(self, program, level, mdns):
        bootstrap = [] if self.number == 0 or mdns else ["--bootstrap", f"/ip4/{address(0)}/udp/4001/quic-v1"]
        # Everywhere else the node that all others ask at once has a CPU of its own.
        command = ["nice", "-n", "-15" if self.number == 0 else "0", "ip", "netns", "exec", self.namespace, program, "--bus", f"unix:path={self.directory}/socket", "--node-name", self.name,
                   "--state-dir", self.directory / "state", "--listen", f"/ip4/{address(self.number)}/udp/4001/quic-v1",
                   "--log", level, *([] if mdns else ["--no-mdns"]), "--no-discover", "--serve", "--connect", CLUSTER, *bootstrap]
        environment = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "JOURNAL_STREAM")}
        self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(self.log, "ab"),
                                       env=environment)

    def look(self):
        """Reads what the log has more, and takes the last list of members from it."""
        try:
            with open(self.log, "rb") as log:
                log.seek(self.read)
                new = log.read()
        except FileNotFoundError:
            return
        self.read += len(new)
        text = self.tail + new
        self.tail = text[text.rfind(b"\n") + 1:]
        found = PEERS.findall(text[:len(text) - len(self.tail)])
        if found:
            line = re.sub(rb"\x1b\[[0-9;]*m", b"", found[-1])
            line, _, more = line.partition(b" and ")
            names = [] if line.strip() == b"none" else line.split(b", ")
            self.lists_bootstrap = BOOTSTRAP.encode() in names
            self.listed = len(names) + (int(more.split()[0]) if more else 0)

    def proc(self, name):
        return pathlib.Path(f"/proc/{self.daemon.pid}/{name}").read_text()

    def ticks(self):
        fields = self.proc("stat").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def memory(self):
        found = dict(re.findall(r"(\w+): +(\d+) kB", self.proc("smaps_rollup")))
        return int(found["Rss"]), int(found["Pss"])

    def traffic(self):
        fields = next(line for line in self.proc("net/dev").splitlines() if "eth0:" in line).split(":")[1].split()
        return int(fields[0]) + int(fields[8]), int(fields[1]) + int(fields[9])

    def liveness(self, ogctl):
        """How many members are connected, and how many are only known."""
        environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={self.directory}/socket"}
        said = subprocess.run([ogctl, "peers", "--json"], env=environment, capture_output=True, text=True, check=False).stdout
        return len(re.findall(r'"liveness": ?"alive"', said)), len(re.findall(r'"liveness": ?"known"', said))


def build(count):
    batch = f"netns add {PREFIX}-sw\n"
    for number in range(count):
        batch += f"netns add {PREFIX}-{number}\nlink add eth0 netns {PREFIX}-{number} type veth peer name p{number} netns {PREFIX}-sw\n"
    ip(batch)
    inside(f"{PREFIX}-sw", "link add br0 type bridge stp_state 0 forward_delay 0\nlink set br0 up\n"
           + "".join(f"link set p{number} master br0 up\n" for number in range(count)))
    for number in range(count):
        inside(f"{PREFIX}-{number}", f"link set lo up\naddr add {address(number)}/16 dev eth0\nlink set eth0 up\n")


def remove():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.startswith(f"{PREFIX}-")]
    if names:
        ip("".join(f"netns del {name}\n" for name in names))


def stop(nodes):
    for node in nodes:
        for process in (node.daemon, node.bus):
            if process and process.poll() is None:
                process.kill()
    for node in nodes:
        for process in (node.daemon, node.bus):
            if process:
                process.wait()


def middle(values):
    return sorted(values)[len(values) // 2]


def wait_for_all(nodes, alive, count, deadline, bootstrap):
    """Seconds from now until everybody lists everybody that lives; the bootstrap is killed after five when told."""
    begun, killed = time.monotonic(), False
    while True:
        now = time.monotonic() - begun
        if not bootstrap and not killed and now >= 5:
            nodes[0].daemon.send_signal(signal.SIGKILL)
            killed = True
        for node in alive:
            node.look()
        missing = sum(max(0, count - 1 - (node.listed - (not bootstrap and node.lists_bootstrap))) for node in alive)
        if missing == 0 and (bootstrap or killed):
            return f"{now:.1f} s"
        if now > deadline:
            return f"not within {deadline} s: {missing} of {count * (count - 1)} missing"
        time.sleep(0.25)


def measure(count, bootstrap, options, directory):
    nodes = [Node(number, directory) for number in range(count)]
    try:
        build(count)
        for node in nodes:
            node.start_bus()
        nodes[0].start(options.daemon, options.log, options.mdns)
        time.sleep(2)
        begun = time.monotonic()
        for node in nodes[1:]:
            node.start(options.daemon, options.log, options.mdns)
        starting = time.monotonic() - begun
        alive = nodes if bootstrap else nodes[1:]
        seconds = wait_for_all(nodes, alive, len(alive), options.deadline, bootstrap)
        load = os.getloadavg()[0]
        print(f"  {count} nodes, started within {starting:.1f} s: {seconds} after the last start, load {load:.1f}", file=sys.stderr)
        time.sleep(options.settle)
        before = [(node.ticks(), node.traffic()) for node in alive]
        time.sleep(options.rest)
        cost = []
        for node, (ticks, (sent, packets)) in zip(alive, before):
            traffic = node.traffic()
            cpu = (node.ticks() - ticks) * 1000 / TICK / options.rest
            cost.append((cpu, (traffic[0] - sent) / options.rest, (traffic[1] - packets) / options.rest, *node.memory()))
        connected, known = zip(*[node.liveness(options.ogctl) for node in alive[:: max(1, count // 25)]])
        for node in alive:
            node.look()
        missing = sum(max(0, len(alive) - 1 - node.listed) for node in alive)
        cpu, octets, packets, rss, pss = (middle(column) for column in zip(*cost))
        most = max(column[0] for column in cost)
        print(f"| {count} | {'stays' if bootstrap else 'killed after 5 s'} | {starting:.0f} s | {seconds} | {min(connected)} / {middle(connected)} / "
              f"{max(connected)} | {middle(known)} | {rss / 1024:.1f} | {pss / 1024:.1f} | {cpu:.2f} ({most:.2f}) | {octets:.0f} | {packets:.1f} | "
              f"{missing} |", flush=True)
    finally:
        stop(nodes)
        remove()


def main():
    here = pathlib.Path(__file__).resolve().parents[2]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nodes", default="50,100,200")
    options.add_argument("--daemon", default=str(here / "target/release/opengatewayd"))
    options.add_argument("--ogctl")
    options.add_argument("--settle", type=int, default=60)
    options.add_argument("--rest", type=int, default=60)
    options.add_argument("--deadline", type=int, default=120)
    options.add_argument("--log", default="info")
    options.add_argument("--mdns", action="store_true", help="instead of a bootstrap node")
    options.add_argument("--keep", type=pathlib.Path)
    options.add_argument("--bootstrap", choices=["both", "stays", "killed"], default="both")
    options = options.parse_args()
    options.ogctl = options.ogctl or str(pathlib.Path(options.daemon).with_name("ogctl"))
    obstacle = None
    if os.geteuid() != 0:
        obstacle = "only root can make network namespaces"
    elif missing := [tool for tool in ("ip", "dbus-daemon") if not shutil.which(tool)]:
        obstacle = f"not installed: {', '.join(missing)}"
    elif not os.access(options.daemon, os.X_OK):
        obstacle = f"no {options.daemon}: build it with cargo build --release"
    if obstacle:
        print(f"SKIPPED: {obstacle}", file=sys.stderr)
        sys.exit(os.environ.get("CI") == "true")
    old = {name: (NEIGHBOURS / name).read_text() for name in ("gc_thresh1", "gc_thresh2", "gc_thresh3")}
    remove()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended: everything was taken down"))
    try:
        for name in reversed(old):
            (NEIGHBOURS / name).write_text("100000\n")
        print("| nodes | bootstrap | started within | all list all after | connections min / median / max | known | RSS, MiB | PSS, MiB | CPU ms/s "
              "(most) | bytes/s | packets/s | missing at rest |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for count in map(int, options.nodes.split(",")):
            for bootstrap in {"both": (True, False), "stays": (True,), "killed": (False,)}[options.bootstrap]:
                with tempfile.TemporaryDirectory(prefix="og-scale-") as directory:
                    try:
                        measure(count, bootstrap, options, pathlib.Path(directory))
                    finally:
                        if options.keep:
                            run = options.keep / f"{count}-{'stays' if bootstrap else 'killed'}"
                            for log in pathlib.Path(directory).glob("*/daemon.log"):
                                run.mkdir(parents=True, exist_ok=True)
                                shutil.copy(log, run / f"{log.parent.name}.log")
    finally:
        for name, value in old.items():
            (NEIGHBOURS / name).write_text(value)


if __name__ == "__main__":
    main()
