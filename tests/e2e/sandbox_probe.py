#!/usr/bin/env python3
"""sandbox_probe.py - what a process of the service really can open and call. Started in the unit's place, it prints what it
found as JSON: of each attempt "ok" or the name of the error."""
import ctypes
import errno
import json
import mmap
import os
import pathlib
import resource
import socket
import sys

libc = ctypes.CDLL(None, use_errno=True)
STATE = pathlib.Path(os.environ["STATE_DIRECTORY"])
NAMESPACES = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
FAMILIES = {"unix": 1, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "can": 29, "bluetooth": 31, "alg": 38, "vsock": 40, "xdp": 44}


def tried(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"


def called(name, *arguments):
    """A function of the C library that tells errors by -1."""

    def call():
        if getattr(libc, name)(*arguments) == -1:
            raise OSError(ctypes.get_errno(), name)

    return tried(call)


def create(folder):
    path = pathlib.Path(folder) / "probe"
    return tried(lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL)))


def opened(path, flags=os.O_RDONLY):
    return tried(lambda: os.close(os.open(path, flags)))


def family(number):
    return tried(lambda: socket.socket(number, socket.SOCK_RAW if number == 16 else socket.SOCK_DGRAM if number != 38 else socket.SOCK_SEQPACKET).close())


def status():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def mode(path):
    return oct(os.stat(path).st_mode & 0o7777)


def credentials():
    folder = pathlib.Path(os.environ["CREDENTIALS_DIRECTORY"])
    return {path.name: path.read_text() for path in folder.iterdir()}


def others():
    """Processes that are seen and belong to somebody else."""
    pids = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if os.stat(f"/proc/{pid}").st_uid != os.getuid()]


def special_bits():
    own = STATE / "special"
    own.touch()
    return {"setuid": tried(lambda: os.chmod(own, 0o4755)), "setgid": tried(lambda: os.chmod(own, 0o2755)), "plain": tried(lambda: os.chmod(own, 0o755))}


def made_mode():
    path = STATE / "made"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
    return mode(path)


def writable_code():
    mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def reach_bus():
    with socket.socket(socket.AF_UNIX) as bus:
        bus.connect("/run/dbus/system_bus_socket")


def serve():
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("0.0.0.0", 4001))
        tcp.listen()
        udp.bind(("0.0.0.0", 4001))


found = {
    "user": os.getuid(),
    "status": {key: status()[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")},
    "create": {folder: create(folder) for folder in ("/", "/etc", "/etc/opengateway", "/usr", "/usr/bin", "/opt", "/srv", "/var", "/var/log", "/run", "/dev", "/sys/fs/cgroup", "/proc/sys/kernel")},
    "own": {name: create(os.environ[name]) for name in ("STATE_DIRECTORY", "CACHE_DIRECTORY", "RUNTIME_DIRECTORY")},
    "state_mode": mode(STATE),
    "made_mode": made_mode(),
    "list": {folder: tried(lambda folder=folder: os.listdir(folder)) for folder in ("/home", "/root", "/run/user", "/etc/opengateway/credentials")},
    "read": {path: opened(path) for path in ("/etc/shadow", "/etc/opengateway/opengatewayd.toml", "/etc/opengateway/credentials/upstream", "/proc/meminfo", "/proc/cpuinfo", "/proc/loadavg", "/proc/kmsg", "/proc/kcore", "/sys/class/net")},
    "credentials": credentials(),
    "others": others(),
    "tmp": os.listdir("/tmp"),
    "unshare": {name: called("unshare", flag) for name, flag in NAMESPACES.items()},
    "socket": {name: family(number) for name, number in FAMILIES.items()},
    "bus": tried(reach_bus),
    "serve": tried(serve),
    "special_bits": special_bits(),
    "device": {path: opened(path, os.O_RDWR) for path in ("/dev/null", "/dev/urandom", "/dev/probe-fuse", "/dev/dri/renderD128", "/dev/nvidia0")},
    "seen": {path: tried(lambda path=path: os.stat(path)) for path in ("/dev/probe-fuse", "/dev/dri/renderD128", "/dev/nvidia0")},
    "call": {
        "mount": called("mount", b"none", b"/tmp", b"tmpfs", 0, None),
        "chroot": called("chroot", b"/tmp"),
        "ptrace": called("ptrace", 0, 0, None, None),
        "sethostname": called("sethostname", b"x", 1),
        "reboot": called("reboot", 0),
        "swapon": called("swapon", b"/x", 0),
        "personality": called("personality", 8),
        "klogctl": called("klogctl", 3, None, 0),
        "settimeofday": tried(lambda: __import__("time").clock_settime(0, 1)),
        "realtime": tried(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
        "setuid": called("setuid", 0),
        "writable_code": tried(writable_code),
        # What an engine shuts itself in with: the version of Landlock is asked, and whether seccomp can refuse.
        "landlock": called("syscall", 444, None, 0, 1),
        "seccomp": called("syscall", 317 if os.uname().machine == "x86_64" else 277, 2, 0, ctypes.byref(ctypes.c_uint32(0x50000))),
        "affinity": tried(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0))),
        "priority": tried(lambda: os.setpriority(os.PRIO_PROCESS, 0, 10)),
    },
    "cgroup": pathlib.Path("/proc/self/cgroup").read_text(),
    "oom": pathlib.Path("/proc/self/oom_score_adj").read_text().strip(),
    "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
}
json.dump(found, sys.stdout)
sys.exit(0)
