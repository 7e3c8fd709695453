"""A Lattica node for the side-by-side measurement; same events as peers/hyperswarm/node.js. Roles: bootstrap, serve, ask,
bench, watch; arguments are key=value."""
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from lattica import ConnectionHandler, Lattica, rpc_method

role = sys.argv[1]
opt = dict(argument.split("=", 1) for argument in sys.argv[2:])
mdns = opt.get("mdns") == "1"
key = "bench/" + opt.get("cluster", "x")


def say(**event):
    os.write(1, (json.dumps(event) + "\n").encode())


class Echo(ConnectionHandler):
    @rpc_method
    def hello(self, x: int) -> str:
        return opt.get("name", "C")

    @rpc_method
    def echo(self, b: bytes) -> bytes:
        return b


address = f"/ip4/{opt['ip']}/tcp/{opt.get('port', '0')}"
state = opt["state"]
os.makedirs(state, exist_ok=True)
builder = Lattica.builder().with_listen_addrs([address]).with_mdns(mdns).with_upnp(False)
builder = builder.with_storage_path(state).with_dht_db_path(state + "/dht").with_key_path(state)
if opt.get("bootstrap"):
    builder = builder.with_bootstraps([opt["bootstrap"]])
node = builder.build()
service = Echo(node)
me = node.peer_id()

if role == "bootstrap":
    say(ev="ready", addr=f"{address}/p2p/{me}")
    threading.Event().wait()

if role == "serve":
    while not mdns:
        try:
            node.start_providing(key)
            break
        except Exception:
            time.sleep(0.02)
    say(ev="joined")
    threading.Event().wait()

names = {}
first = None


def found(peer):
    global first
    if peer in names or peer == me:
        return
    try:
        name = service.get_stub(peer).hello(1).result(5)
    except Exception as error:
        say(ev="retry", error=str(error)[:100])
        return
    names[peer] = name
    if name == "boot":
        return
    say(ev="peer", name=name)
    if first is None:
        first = peer
        service.get_stub(peer).echo(b"a" * 64).result(5)
        say(ev="response")


wanted = int(opt.get("members", 2))
end = time.monotonic() + 30
while time.monotonic() < end and sum(name != "boot" for name in names.values()) < wanted:
    try:
        peers = node.get_all_peers() if mdns else node.get_providers(key)
    except Exception:
        peers = []
    for peer in peers:
        found(peer)
    time.sleep(0.01)


def quantile(values, share):
    return values[round((len(values) - 1) * share)]


def figures(times, seconds):
    times = sorted(times)
    marks = {f"p{mark}_us": quantile(times, mark / 100) for mark in (50, 90, 99)}
    return {"n": len(times), **marks, "per_s": len(times) / seconds}


if role == "bench":
    stub = service.get_stub(first)
    prompt = b"a" * 64

    def once(_=None):
        begun = time.perf_counter_ns()
        stub.echo(prompt).result(30)
        return (time.perf_counter_ns() - begun) / 1000

    for _ in range(200):
        once()
    begun = time.perf_counter()
    rtt = figures([once() for _ in range(int(opt["n"]))], time.perf_counter() - begun)
    begun = time.perf_counter()
    with ThreadPoolExecutor(64) as pool:
        times = list(pool.map(once, range(int(opt["m"]))))
    say(ev="bench", rtt=rtt, flight=figures(times, time.perf_counter() - begun))

if role == "watch":
    # Its list of peers keeps the dead for more than 90 s. A prompt to them fails earlier: that counts as noticed.
    def probe(peer, name):
        while True:
            try:
                service.get_stub(peer).echo(b"x").result(120)
            except Exception:
                say(ev="gone", name=name)
                return
            time.sleep(0.05)

    for peer, name in names.items():
        threading.Thread(target=probe, args=(peer, name), daemon=True).start()

threading.Event().wait()
