"""Who is measured. Each contestant starts serving nodes and asking clients; all print the same events:

    {"ev":"joined"}                  a serving node: announced, and answering
    {"ev":"peer","name":…}           a client sees a member
    {"ev":"response"}                the first prompt is answered
    {"ev":"gone","name":…}           a watching client lost a member
    {"ev":"bench","rtt":…,"flight":…}
"""
import itertools
import os
import shutil
import signal
import subprocess
import time

from lab import Lan, Proc

HERE = os.path.dirname(os.path.abspath(__file__))


class Contestant:
    """A cluster of its own in namespaces of its own: A and B serve, C comes and asks."""

    name = ""
    # A prompt's round trips and prompts in flight, per round: a slow contestant gets fewer.
    prompts = (2000, 10000)

    def __init__(self, tools, spare=0):
        self.tools = tools
        self.lan = Lan(["boot", "a", "b", "c", *(f"x{at}" for at in range(spare))])
        self.cluster = f"bench-{os.getpid()}-{Lan.count}"
        self.log = os.path.join(tools.logs, f"{self.name}.log")
        self.live = []
        self.serving = {}
        self.boot = None
        self.numbers = itertools.count()

    def spawn(self, node, argv, **options):
        process = Proc(argv, ns=self.lan.ns[node], log=self.log, **options)
        self.live.append(process)
        return process

    def start(self):
        """Brings the rendezvous, A and B up."""
        self.rendezvous()
        for node in ("a", "b"):
            process, joined = self.joined(node)
            if joined is None:
                raise RuntimeError(f"{self.name}: {node} did not join; see {self.log}")
        time.sleep(2)

    def joined(self, node):
        """Starts a serving node; gives its process and the milliseconds until it had joined."""
        process = self.serve(node, node.upper())
        event = process.wait("joined", 30)
        self.serving[node] = process
        return process, process.ms(event)

    def rendezvous(self):
        pass

    def serve(self, node, name):
        raise NotImplementedError

    def client(self, role, members=2, n=0, m=0):
        raise NotImplementedError

    def ask(self, limit=20, role="ask"):
        """A cold client: milliseconds until it saw the first member, both, and an answer."""
        client = self.client(role)
        first = both = answer = None
        seen = set()
        end = time.monotonic() + limit
        while both is None or answer is None:
            event = client.wait(lambda event: event["ev"] in ("peer", "response"), end - time.monotonic())
            if event is None:
                break
            if event["ev"] == "response":
                answer = answer or client.ms(event)
            else:
                seen.add(event["name"])
                first = first or client.ms(event)
                both = both or (client.ms(event) if len(seen) == 2 else None)
        client.kill()
        return {"first": first, "both": both, "answer": answer}

    def bench(self, scale=1.0):
        n, m = (max(100, int(count * scale)) for count in self.prompts)
        client = self.client("bench", n=n, m=m)
        event = client.wait("bench", 180)
        client.kill()
        return event

    def close(self):
        for process in self.live:
            process.kill(signal.SIGKILL)
        self.lan.close()


class Hyperswarm(Contestant):
    """Hyperswarm told that it is not behind a NAT: its best case. Its default waits 15 s for a half-open connection here."""

    name = "hyperswarm"

    def node(self, node, role, *arguments):
        script = os.path.join(self.tools.hyperswarm, "node.js")
        where = [f"host={self.lan.ip[node]}", "port=4001"] if role == "bootstrap" else [f"bootstrap={self.boot}"]
        argv = ["node", script, role, *where, f"cluster={self.cluster}", *arguments, "firewalled=0"]
        return self.spawn(node, argv, cwd=self.tools.hyperswarm)

    def rendezvous(self):
        event = self.node("boot", "bootstrap").wait("ready", 30)
        self.boot = event["addr"]

    def serve(self, node, name):
        return self.node(node, "serve", f"name={name}")

    def client(self, role, members=2, n=0, m=0):
        return self.node("c", role, f"n={n}", f"m={m}")


class Lattica(Contestant):
    """Lattica (rust-libp2p under Python, the network of Parallax), found by bootstrap node and Kademlia."""

    name = "lattica"
    mdns = "0"
    prompts = (1000, 2000)

    def node(self, node, role, *arguments):
        # A directory for each process: its database is not shared.
        state = os.path.join(self.tools.scratch, f"{self.name}-{next(self.numbers)}")
        argv = [
            *(self.tools.lattica, os.path.join(HERE, "peers", "lattica", "node.py"), role, f"ip={self.lan.ip[node]}"),
            *("port=4001", f"cluster={self.cluster}", f"state={state}", f"mdns={self.mdns}", *arguments),
        ]
        if self.boot:
            argv.append(f"bootstrap={self.boot}")
        return self.spawn(node, argv, env={"RUST_LOG": "error"})

    def rendezvous(self):
        event = self.node("boot", "bootstrap", "name=boot").wait("ready", 30)
        self.boot = event["addr"]

    def serve(self, node, name):
        return self.node(node, "serve", f"name={name}")

    def client(self, role, members=2, n=0, m=0):
        # Its list of peers keeps the dead for more than 90 s; that a prompt to them fails is noticed earlier.
        probe = ["probe=rpc"] if role == "watch" else []
        return self.node("c", role, f"members={members}", f"n={n}", f"m={m}", *probe)


class LatticaMdns(Lattica):
    """Lattica by mDNS alone."""

    name = "lattica-mdns"
    mdns = "1"

    def rendezvous(self):
        pass


class GatewayNode:
    """An opengatewayd, its bus, and the client that tells what happens there. Time starts before the first fork."""

    def __init__(self, daemon, client, t0):
        self.daemon, self.told, self.t0 = daemon, client, t0
        self.pid = daemon.pid

    def wait(self, wanted, seconds):
        return self.told.wait(wanted, seconds)

    def ms(self, event):
        return None if event is None else (event["at"] - self.t0) * 1000

    def kill(self, sig=signal.SIGTERM, grace=5):
        self.told.kill(signal.SIGKILL)
        self.daemon.kill(sig, grace)


class Gateway(Contestant):
    """OpenGateway: the installed programs, each daemon on a bus of its own, found by bootstrap node and Kademlia."""

    name = "opengateway"
    mdns = False

    def __init__(self, tools, spare=0):
        super().__init__(tools, spare)
        self.buses = {}
        for node in self.lan.ns:
            self.bus(node)

    def bus(self, node):
        """The bus of a node: it is there before the daemon, as the system's is."""
        path = os.path.join(self.tools.scratch, f"{self.cluster}-{node}.bus")
        config = f"{path}.conf"
        with open(config, "w") as out:
            out.write(
                f"<busconfig><type>system</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>"
                '<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>'
                '<allow own="*"/></policy></busconfig>'
            )
        bus = self.spawn(node, ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"])
        if bus.wait(lambda _: True, 10) is None:
            raise RuntimeError("dbus-daemon did not start")
        self.buses[node] = f"unix:path={path}"

    def daemon(self, node, name, *arguments, config=""):
        """A daemon that starts for the first time: no identity on disk, the default configuration."""
        state = os.path.join(self.tools.scratch, f"{self.cluster}-{next(self.numbers)}")
        file = f"{state}.toml"
        with open(file, "w") as out:
            out.write(config)
        argv = [
            *(self.tools.daemon, "--config", file, "--bus", self.buses[node], "--state-dir", state, "--node-name", name),
            *("--log", "warn", *arguments),
        ]
        if not self.mdns:
            argv.append("--no-mdns")
        if self.boot:
            argv += ["--bootstrap", self.boot]
        return self.spawn(node, argv)

    def beside(self, node, role, *arguments):
        argv = [self.tools.client, "bus", role, "--bus", self.buses[node], "--cluster", self.cluster, *arguments]
        return self.spawn(node, argv)

    def rendezvous(self):
        if self.mdns:
            return
        # In no cluster: it only knows the way. Its identity must be known before the others start.
        self.daemon("boot", "boot")
        deadline = time.monotonic() + 10
        while self.boot is None and time.monotonic() < deadline:
            status = self.ogctl("boot", "status", "--json")
            if status.returncode in (0, 1) and '"schema"' in status.stdout:
                import json

                told = json.loads(status.stdout)
                quic = [address for address in told.get("addresses", []) if self.lan.ip["boot"] in address and "quic" in address]
                if quic:
                    peer = told["peer_id"]
                    self.boot = quic[0] if "/p2p/" in quic[0] else f"{quic[0]}/p2p/{peer}"
            time.sleep(0.02)

    def ogctl(self, node, *arguments, **options):
        argv = [self.tools.ogctl, "--bus", self.buses[node], *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, **options)

    def serve(self, node, name, config=""):
        t0 = time.monotonic()
        client = self.beside(node, "joined")
        daemon = self.daemon(node, name, "--connect", self.cluster, "--serve", config=config)
        return GatewayNode(daemon, client, t0)

    def resident(self):
        """C as a daemon that stays; its bus has no client."""
        t0 = time.monotonic()
        client = self.beside("c", "ask")
        node = GatewayNode(self.daemon("c", "C", "--connect", self.cluster, "--consume"), client, t0)
        if node.wait("response", 20) is None:
            raise RuntimeError(f"no answer; see {self.log}")
        return node

    def client(self, role, members=2, n=0, m=0):
        if role in ("bench", "flood", "swarm"):
            role = "ask" if role == "swarm" else role
            # The time on the bus is not a daemon's: the asking daemon without its bus, against the real ones.
            return self.swarm(role, "--members", str(members), "-n", str(n), "-m", str(m))
        t0 = time.monotonic()
        told = ["--", self.tools.ogctl, "--bus", self.buses["c"], "prompt", "-c", self.cluster, "answer"]
        arguments = ["--members", str(members), *(told if role == "exec" else [])]
        client = self.beside("c", role, *arguments)
        return GatewayNode(self.daemon("c", "C", "--connect", self.cluster, "--consume"), client, t0)

    def swarm(self, role, *arguments):
        state = os.path.join(self.tools.scratch, f"{self.cluster}-{next(self.numbers)}")
        argv = [self.tools.client, "swarm", role, "--cluster", self.cluster, "--state", state, *arguments]
        argv += ["--mdns"] if self.mdns else ["--bootstrap", self.boot]
        return self.spawn("c", argv)

    def ask_ogctl(self, limit=20):
        """Milliseconds from the start of the daemon until `ogctl prompt` printed the answer on its standard output."""
        client = self.client("exec")
        event = client.wait("answer", limit)
        client.kill()
        return client.ms(event)


class GatewayMdns(Gateway):
    """OpenGateway by mDNS alone."""

    name = "opengateway-mdns"
    mdns = True


def clear(path):
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
