"""What the measurement needs, installed where it is missing: into a cache directory, never into the system's Python or npm.
The exception are Debian packages of the tools themselves, by apt. Each step says what it does on stderr."""
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PACKAGES = {"ip": "iproute2", "dbus-daemon": "dbus-daemon", "busctl": "systemd", "node": "nodejs", "npm": "npm", "dpkg-deb": "dpkg"}


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Missing(Exception):
    """A tool that cannot be had."""


class Tools:
    """Paths of everything that is run."""

    def __init__(self, cache, peers):
        self.cache = os.path.abspath(cache)
        self.installed = []
        self.logs = self.made("logs")
        # Short: a socket's path has at most 107 bytes.
        self.scratch = f"/tmp/ogb-{os.getpid()}"
        os.makedirs(self.scratch)
        target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
        release = os.path.join(target, "release")
        self.daemon = os.path.join(release, "opengatewayd")
        self.ogctl = os.path.join(release, "ogctl")
        self.client = os.path.join(release, "examples", "opengatewayd-perf")
        for tool in ("ip", "dbus-daemon", "busctl"):
            self.need(tool)
        self.floors = self.build_floors()
        self.hyperswarm = self.try_install("hyperswarm", self.install_hyperswarm) if "hyperswarm" in peers else None
        wants_lattica = any(peer.startswith("lattica") for peer in peers)
        self.lattica = self.try_install("lattica", self.install_lattica) if wants_lattica else None

    def made(self, *parts):
        path = os.path.join(self.cache, *parts)
        os.makedirs(path, exist_ok=True)
        return path

    def run(self, *argv, **options):
        log = open(os.path.join(self.logs, "install.log"), "ab")
        done = subprocess.run(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, **options)
        if done.returncode:
            raise Missing(f"{' '.join(argv)} failed; see {log.name}")

    def try_install(self, what, install):
        """A peer that cannot be had is left out, aloud: the rest is measured without it."""
        try:
            return install()
        except Missing as missing:
            say(f"{what} is left out: {missing}")
            return None

    def need(self, tool):
        if shutil.which(tool):
            return
        package = PACKAGES[tool]
        say(f"{tool} is missing: installing the package {package} by apt")
        if not shutil.which("apt-get"):
            raise Missing(f"{tool} is not installed, and there is no apt-get to install {package} with")
        self.run("apt-get", "install", "-y", "--no-install-recommends", package, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        self.installed.append(f"apt: {package}")

    def build_floors(self):
        target = self.made("floors")
        binary = os.path.join(target, "release", "floors")
        say("building the floors (bare TCP and QUIC echo)")
        manifest = os.path.join(HERE, "floors", "Cargo.toml")
        self.run("cargo", "build", "--release", "--locked", "--manifest-path", manifest, env={**os.environ, "CARGO_TARGET_DIR": target})
        return binary

    def install_hyperswarm(self):
        self.need("node")
        self.need("npm")
        path = self.made("hyperswarm")
        for file in ("package.json", "package-lock.json", "node.js"):
            shutil.copy(os.path.join(HERE, "peers", "hyperswarm", file), path)
        if not os.path.isdir(os.path.join(path, "node_modules", "hyperswarm")):
            say(f"installing Hyperswarm by npm into {path}")
            self.run("npm", "ci", "--no-audit", "--no-fund", cwd=path)
            self.installed.append("npm: hyperswarm")
        return path

    def install_lattica(self):
        path = self.made("lattica")
        python = os.path.join(path, "bin", "python")
        if not os.path.exists(os.path.join(path, "bin", "pip")):
            say(f"making a Python environment in {path}")
            self.run(sys.executable, "-m", "venv", path)
        if subprocess.run([python, "-c", "import lattica"], capture_output=True).returncode:
            say(f"installing Lattica by pip into {path}")
            self.run(python, "-m", "pip", "install", "-q", "-r", os.path.join(HERE, "peers", "lattica", "requirements.txt"))
            self.installed.append("pip: lattica")
        return python

    def syncthing(self):
        """The binary of syncthing, unpacked from its package without installing it; None where that fails."""
        found = shutil.which("syncthing")
        if found:
            return os.path.realpath(found)
        path = self.made("syncthing")
        binary = os.path.join(path, "usr", "bin", "syncthing")
        if not os.path.exists(binary) and shutil.which("apt-get") and shutil.which("dpkg-deb"):
            say(f"unpacking the package syncthing into {path}")
            try:
                # apt drops its rights for a download, and then may not write here.
                self.run("apt-get", "-o", "APT::Sandbox::User=root", "download", "syncthing", cwd=path)
                for package in os.listdir(path):
                    if package.endswith(".deb"):
                        self.run("dpkg-deb", "-x", os.path.join(path, package), path)
                self.installed.append("apt: syncthing (unpacked, not installed)")
            except Missing as missing:
                say(f"syncthing is left out: {missing}")
        return binary if os.path.exists(binary) else None

    def close(self):
        shutil.rmtree(self.scratch, ignore_errors=True)
