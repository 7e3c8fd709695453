#!/usr/bin/env python3
"""nspawn-wait.py DIR COMMAND... - runs systemd-nspawn and writes down what it says on its notify socket.

DIR/leader is the PID of the host's PID 1, DIR/ready the milliseconds until its systemd had booted, DIR/supervisor the PID of
nspawn, DIR/exit its exit status once it has ended. So a script learns all this without systemd-machined.
"""
import os
import pathlib
import socket
import subprocess
import sys
import time

folder, command = pathlib.Path(sys.argv[1]), sys.argv[2:]


def write_down(name, value):
    """Readers see all of it or nothing."""
    unfinished = folder / (name + ".new")
    unfinished.write_text(f"{value}\n")
    unfinished.rename(folder / name)


for name in ("notify", "leader", "ready", "supervisor", "exit"):
    (folder / name).unlink(missing_ok=True)
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.bind(str(folder / "notify"))
notify.settimeout(0.2)
begun = time.monotonic()
nspawn = subprocess.Popen(command, env=os.environ | {"NOTIFY_SOCKET": str(folder / "notify")})
write_down("supervisor", nspawn.pid)
while nspawn.poll() is None:
    try:
        message = notify.recv(65536).decode(errors="replace")
    except TimeoutError:
        continue
    for line in message.splitlines():
        if line.startswith("X_NSPAWN_LEADER_PID="):
            write_down("leader", line.split("=", 1)[1])
        elif line == "READY=1":
            write_down("ready", round((time.monotonic() - begun) * 1000))
write_down("exit", nspawn.returncode)
