"""The laboratory: network namespaces on a bridge, processes with JSON events, what /proc says of them, statistics."""
import contextlib
import ctypes
import datetime
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import threading
import time

# This program and all that it measures run at this niceness, because the machine may be shared; 0 leaves it alone.
NICE = int(os.environ.get("BENCH_NICE", "-20"))
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


def machine():
    with open("/proc/cpuinfo") as info:
        cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "kernel": platform.release(), "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg(), "niceness": NICE,
    }


def sh(*argv):
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def percentile(values, share):
    values = sorted(values)
    return values[round((len(values) - 1) * share)] if values else None


def summary(values, digits=2):
    """Median and p99 of the values that there are."""
    values = [value for value in values if value is not None]
    if not values:
        return {"n": 0, "median": None, "p99": None}
    return {
        "n": len(values),
        "median": round(statistics.median(values), digits),
        "p99": round(percentile(values, 0.99), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


class Lan:
    """Namespaces on one bridge: Lan("og", ["a", "b"]) gives a 10.77.0.1, b 10.77.0.2. There is no way out."""

    count = 0

    def __init__(self, names):
        Lan.count += 1
        self.prefix = f"ogb{os.getpid() % 100000}-{Lan.count}"
        self.bridge = f"{self.prefix}-br"
        self.ns, self.ip = {}, {}
        sh("ip", "netns", "add", self.bridge)
        sh("ip", "-n", self.bridge, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        sh("ip", "-n", self.bridge, "link", "set", "br0", "up")
        for at, name in enumerate(names, 1):
            ns, port = f"{self.prefix}-{name}", f"v{at}"
            sh("ip", "netns", "add", ns)
            self.ns[name], self.ip[name] = ns, f"10.77.0.{at}"
            sh("ip", "-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self.bridge)
            sh("ip", "-n", self.bridge, "link", "set", port, "master", "br0", "up")
            sh("ip", "-n", ns, "link", "set", "lo", "up")
            sh("ip", "-n", ns, "link", "set", "eth0", "up")
            sh("ip", "-n", ns, "addr", "add", f"10.77.0.{at}/24", "dev", "eth0")
            sh("ip", "-n", ns, "route", "add", "default", "dev", "eth0")
        deadline = time.monotonic() + 10
        for ns in self.ns.values():
            while "tentative" in sh("ip", "-n", ns, "-6", "addr") and time.monotonic() < deadline:
                time.sleep(0.05)

    def cable(self, name, plugged):
        sh("ip", "-n", self.ns[name], "link", "set", "eth0", "up" if plugged else "down")

    def close(self):
        for ns in [*self.ns.values(), self.bridge]:
            subprocess.run(["ip", "netns", "del", ns], capture_output=True)


@contextlib.contextmanager
def inside(ns):
    """This thread in a namespace, so that a child is born there: no helper program and no slow fork count as start-up."""
    if ns is None:
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{ns}", os.O_RDONLY)
    try:
        enter(there)
        yield
    finally:
        enter(home)
        os.close(home)
        os.close(there)


def enter(fd):
    if LIBC.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Proc:
    """A child whose lines on stdout become events, stamped when they arrive here. A line that is no JSON object is an
    event named by its text. `t0` is the moment before the fork."""

    def __init__(self, argv, ns=None, log=None, env=None, cwd=None, stdin=subprocess.DEVNULL):
        out = open(log, "ab") if log else subprocess.DEVNULL
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **(env or {})}
        self.events = queue.Queue()
        with inside(ns):
            self.t0 = time.monotonic()
            self.child = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=out, stdin=stdin, env=environment, cwd=cwd, start_new_session=True
            )
        if log:
            out.close()
        self.pid = self.child.pid
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.child.stdout:
            at = time.monotonic()
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                event = {"ev": line.decode(errors="replace").strip()}
            event["at"] = at
            self.events.put(event)
        self.events.put(None)

    def wait(self, wanted, seconds):
        """The first event that `wanted` accepts (a function, or the name of the event); None at the end of time or output."""
        accepts = wanted if callable(wanted) else lambda event: event["ev"] == wanted
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                event = self.events.get(timeout=left)
            except queue.Empty:
                return None
            if event is None:
                self.events.put(None)
                return None
            if event["ev"] == "error":
                raise RuntimeError(f"{self.child.args[0]}: {event.get('error')}")
            if accepts(event):
                return event
        return None

    def ms(self, event):
        return None if event is None else (event["at"] - self.t0) * 1000

    def kill(self, sig=signal.SIGTERM, grace=5):
        if self.child.poll() is None:
            self.child.send_signal(sig)
            try:
                self.child.wait(grace)
            except subprocess.TimeoutExpired:
                self.child.kill()
        self.child.wait()


def tree(pid):
    """The process and its descendants."""
    found, todo = [], [pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as children:
                    todo += map(int, children.read().split())
        except OSError:
            pass
    return found


def rss_kib(pid):
    return usage(pid)["rss_kib"]


def usage(pid):
    """CPU time of the scheduler's own accounting, wake-ups, and memory, over the process and its descendants."""
    total = {"rss_kib": 0, "pss_kib": 0, "threads": {}}
    for process in tree(pid):
        try:
            for task in sorted(os.listdir(f"/proc/{process}/task")):
                with open(f"/proc/{process}/task/{task}/schedstat") as stat:
                    cpu_ns = int(stat.read().split()[0])
                with open(f"/proc/{process}/task/{task}/status") as status:
                    # A switch that the process wanted ends in a wake-up; one that it did not tells how busy the machine is.
                    wakeups = sum(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))
                total["threads"][task] = (cpu_ns, wakeups)
            with open(f"/proc/{process}/smaps_rollup") as rollup:
                for line in rollup:
                    if line.startswith("Rss:"):
                        total["rss_kib"] += int(line.split()[1])
                    elif line.startswith("Pss:"):
                        total["pss_kib"] += int(line.split()[1])
        except OSError:
            pass
    return total


def idle(pids, seconds):
    """What each of the processes used while nobody asked it anything. Threads that end meanwhile take their share along:
    then CPU and wake-ups are a lower bound, and `threads_changed` says so. A new thread counts from its birth."""
    before, begun = [usage(pid) for pid in pids], time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - begun
    rows = []
    for pid, then in zip(pids, before):
        now = usage(pid)
        born = (0, 0)
        cpu_ns, wakeups = (
            sum(count[at] - then["threads"].get(task, born)[at] for task, count in now["threads"].items()) for at in (0, 1)
        )
        rows.append(
            {
                "rss_mib": now["rss_kib"] / 1024,
                "pss_mib": now["pss_kib"] / 1024,
                "cpu_ms_per_s": cpu_ns / 1e6 / elapsed,
                "wakeups_per_s": wakeups / elapsed,
                "threads": len(now["threads"]),
                "threads_changed": now["threads"].keys() != then["threads"].keys(),
            }
        )
    return rows
