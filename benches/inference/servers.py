"""What is measured, each on loopback ports and private buses of its own: the stub, nginx and LiteLLM in front of it, and
daemons of OpenGateway. Nothing needs root, and nothing outside the scratch directory is touched."""
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "side-by-side"))

from lab import Proc  # noqa: E402

CLUSTER = "bench-inference"


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Missing(Exception):
    """Something that cannot be measured here."""


def until(condition, seconds, what):
    """The first true value of `condition`, which is asked again and again until the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


def free_port(kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(port, path):
    """The JSON at a path, or None when nobody answers 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return json.loads(body) if response.status == 200 else None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


class Server:
    """A child with an HTTP port; `url` ends in /v1."""

    name = ""

    def __init__(self, tools):
        self.tools = tools
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = os.path.join(tools.logs, f"{self.name}.log")
        self.process = None

    def close(self):
        if self.process:
            self.process.kill(signal.SIGTERM)


class Stub(Server):
    name = "stub"

    def __init__(self, tools):
        super().__init__(tools)
        self.process = Proc([tools.client, "stub", f"127.0.0.1:{self.port}"], log=self.log)
        if self.process.wait("ready", 10) is None:
            raise RuntimeError(f"the stub did not start; see {self.log}")

    def open(self):
        """Prompts that it is answering now."""
        return get(self.port, "/open")["open"]


NGINX = """daemon off;
worker_processes 1;
pid {scratch}/nginx.pid;
error_log {log};
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {scratch}/body;
    proxy_temp_path {scratch}/proxy;
    fastcgi_temp_path {scratch}/fastcgi;
    uwsgi_temp_path {scratch}/uwsgi;
    scgi_temp_path {scratch}/scgi;
    keepalive_requests 100000000;
    upstream stub {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://stub;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


class Nginx(Server):
    """nginx as everybody would put it in front of a model server: connections kept on both sides, nothing buffered."""

    name = "nginx"

    def __init__(self, tools, stub):
        super().__init__(tools)
        scratch = tools.made_scratch("nginx")
        config = os.path.join(scratch, "nginx.conf")
        with open(config, "w") as out:
            out.write(NGINX.format(scratch=scratch, log=self.log, upstream=stub.port, port=self.port))
        self.process = Proc([tools.nginx, "-p", scratch, "-e", self.log, "-c", config], log=self.log)
        until(lambda: get(self.port, "/v1/models"), 10, f"nginx answers; see {self.log}")


class LiteLlm(Server):
    """The proxy of LiteLLM, one worker, no database."""

    name = "litellm"
    KEY = "sk-a-key-that-it-insists-on"

    def __init__(self, tools, stub):
        super().__init__(tools)
        config = os.path.join(tools.made_scratch("litellm"), "config.json")
        model = {"model": "openai/instant", "api_base": stub.url, "api_key": "none"}
        with open(config, "w") as out:
            json.dump({"model_list": [{"model_name": "instant", "litellm_params": model}], "litellm_settings": {"telemetry": False}}, out)
        self.process = Proc(
            [tools.litellm, "--config", config, "--host", "127.0.0.1", "--port", str(self.port), "--num_workers", "1"],
            log=self.log, env={"HOME": tools.scratch},
        )
        until(lambda: get(self.port, "/health/liveliness"), 90, f"LiteLLM answers; see {self.log}")


BUS = """<busconfig><type>custom</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
"""


class Node(Server):
    """A daemon on a bus of its own, with the endpoint on TCP and no key, as nginx has none."""

    def __init__(self, tools, name, config="", bootstrap=None):
        self.name = name
        super().__init__(tools)
        self.home = tools.made_scratch(name)
        path = os.path.join(self.home, "bus")
        with open(f"{path}.conf", "w") as out:
            out.write(BUS.format(path=path))
        self.bus_process = Proc(["dbus-daemon", f"--config-file={path}.conf", "--nofork", "--print-address=1"], log=self.log)
        if self.bus_process.wait(lambda _: True, 10) is None:
            raise RuntimeError("dbus-daemon did not start")
        self.bus = f"unix:path={path}"
        file = os.path.join(self.home, "opengatewayd.toml")
        with open(file, "w") as out:
            out.write(f'[http]\nlisten = "127.0.0.1:{self.port}"\nkey = "none"\nmax_connections = 1024\n{config}')
        udp = free_port(socket.SOCK_DGRAM)
        argv = [tools.daemon, "--config", file, "--bus", self.bus, "--state-dir", os.path.join(self.home, "state"), "--node-name", name]
        argv += ["--listen", f"/ip4/127.0.0.1/udp/{udp}/quic-v1", "--no-mdns", "--log", os.environ.get("BENCH_LOG", "warn"), "--connect", CLUSTER]
        argv += ["--consume", "--bootstrap", bootstrap] if bootstrap else ["--serve"]
        self.process = Proc(argv, log=self.log)
        status = until(lambda: self.status() if self.process.child.poll() is None else self.died(), 20, f"{name} starts; see {self.log}")
        self.address = f"/ip4/127.0.0.1/udp/{udp}/quic-v1/p2p/{status['peer_id']}"

    def died(self):
        raise RuntimeError(f"{self.name} ended; see {self.log}")

    def argv(self, *arguments):
        return [self.tools.ogctl, "--bus", self.bus, *arguments]

    def ogctl(self, *arguments):
        return subprocess.run(self.argv(*arguments), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)

    def status(self):
        told = self.ogctl("status", "--json")
        return json.loads(told.stdout) if '"running":true' in told.stdout else None

    def wait_for(self, *models):
        """Until its endpoint lists the models."""

        def listed():
            told = get(self.port, "/v1/models")
            return told and set(models) <= {model["id"] for model in told["data"]}

        until(listed, 60, f"{self.name} lists {', '.join(models)}; see {self.log}")

    def close(self):
        super().close()
        self.bus_process.kill(signal.SIGTERM)


PACKAGES = {"nginx": "nginx-light", "dbus-daemon": "dbus-daemon"}


class Tools:
    """Paths of everything that is run; what is missing is installed."""

    def __init__(self, options):
        self.options = options
        self.installed = []
        self.cache = os.path.abspath(options.cache)
        self.logs = self.made("logs")
        # Short: a socket's path has at most 107 bytes.
        self.scratch = f"/tmp/ogi-{os.getpid()}"
        os.makedirs(self.scratch)
        self.daemon, self.ogctl = (os.path.join(options.programs, name) for name in ("opengatewayd", "ogctl"))
        self.client = os.path.join(options.programs, "examples", "inference-bench")
        self.perf = os.path.join(options.programs, "examples", "opengatewayd-perf")
        self.need("dbus-daemon")
        self.nginx = self.need("nginx")
        self.litellm = self.install_litellm() if options.litellm else None

    def made(self, *parts):
        path = os.path.join(self.cache, *parts)
        os.makedirs(path, exist_ok=True)
        return path

    def made_scratch(self, name):
        path = os.path.join(self.scratch, name)
        os.makedirs(path)
        return path

    def run(self, *argv, **options):
        log = os.path.join(self.logs, "install.log")
        with open(log, "ab") as out:
            done = subprocess.run(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, **options)
        if done.returncode:
            raise Missing(f"{' '.join(argv)} failed; see {log}")

    def need(self, tool):
        # Debian has nginx in /usr/sbin, which is not on the path of everybody.
        places = f"{os.environ['PATH']}:/usr/sbin"
        if not shutil.which(tool, path=places):
            package = PACKAGES[tool]
            say(f"{tool} is missing: installing the package {package} by apt")
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            self.run("apt-get", "install", "-y", "--no-install-recommends", package, env=environment)
            self.installed.append(f"apt: {package}")
        return shutil.which(tool, path=places)

    def python(self, name, *packages):
        """A Python of its own with these packages."""
        folder = self.made(name)
        python = os.path.join(folder, "bin", "python")
        if not os.path.exists(os.path.join(folder, "bin", "pip")):
            self.run(sys.executable, "-m", "venv", folder)
        if not os.path.exists(os.path.join(folder, "complete")):
            say(f"installing {', '.join(packages)} by pip into {folder}")
            self.run(python, "-m", "pip", "install", "-q", *packages)
            self.installed.append(f"pip: {', '.join(packages)}")
            open(os.path.join(folder, "complete"), "w").close()
        return python

    def install_litellm(self):
        try:
            return os.path.join(os.path.dirname(self.python("litellm", "litellm[proxy]==1.106.0")), "litellm")
        except Missing as missing:
            say(f"LiteLLM is left out: {missing}")
            return None

    def models(self):
        """A folder with the demo model, and one of the shape of SmolLM-360M with random weights (386 MB, made once)."""
        root = self.options.root
        folder = self.made("models")
        demo, large = (os.path.join(folder, f"{name}.gguf") for name in ("opengateway-demo", "smollm-360m"))
        shutil.copyfile(os.path.join(root, "models", "opengateway-demo.gguf"), demo)
        if not os.path.exists(large):
            say("making a model of the shape of SmolLM-360M")
            python = self.python("numpy", "numpy")
            part = f"{large}.part"
            self.run(python, "random_gguf.py", part, "smollm360m", "Q8_0", cwd=os.path.join(root, "models", "demo"))
            os.rename(part, large)
        return folder, demo, large

    def close(self):
        shutil.rmtree(self.scratch, ignore_errors=True)
