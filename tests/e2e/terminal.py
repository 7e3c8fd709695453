#!/usr/bin/env python3
"""terminal.py COMMAND PASSWORD - runs a command of the shell on a terminal of its own and types the password when it is asked
for one. Prints what was shown and ends as the command did."""
import os
import pty
import select
import sys
import termios
import time

command, password = sys.argv[1:]
child, terminal = pty.fork()
if child == 0:
    os.execvp("sh", ["sh", "-c", command])
shown, typed, deadline = b"", 0, time.monotonic() + 60
while time.monotonic() < deadline:
    if not select.select([terminal], [], [], 0.2)[0]:
        continue
    try:
        piece = os.read(terminal, 4096)
    except OSError:  # the other end is closed
        break
    shown += piece
    if shown.count(b"assword:") > typed:
        typed += 1
        # The agent turns off the echo, and throws away what was typed before.
        while termios.tcgetattr(terminal)[3] & termios.ECHO and time.monotonic() < deadline:
            time.sleep(0.005)
        os.write(terminal, password.encode() + b"\n")
sys.stdout.write(shown.decode(errors="replace"))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
