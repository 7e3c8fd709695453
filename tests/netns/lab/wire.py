#!/usr/bin/env python3
"""A cable with faults: frames that come in at one interface leave by the other after a delay.

usage: wire.py IF_A IF_B [--delay MS] [--jitter MS] [--dup PERCENT] [--reorder]

What `tc netem` does, on kernels that have no sch_netem, and the same on all others. Order is kept, as on a real cable, unless
--reorder. Offload state (checksums that veth leaves undone, TCP segmentation) is carried across by the virtio-net header that
PACKET_VNET_HDR puts before each frame, so nothing has to be switched off in the hosts.
"""
import argparse
import heapq
import itertools
import random
import select
import socket
import struct
import time

PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, SOL_PACKET, ETH_P_ALL = 15, 23, 263, 3
PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC = 1, 1
SO_RCVBUFFORCE = 33


def port(name):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    s.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    s.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    s.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    s.bind((name, ETH_P_ALL))
    # Frames are addressed to the hosts, not to this interface.
    membership = struct.pack("IHH8s", socket.if_nametoindex(name), PACKET_MR_PROMISC, 0, b"")
    s.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, membership)
    s.setblocking(False)
    return s


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--delay", type=float, default=0)
    parser.add_argument("--jitter", type=float, default=0)
    parser.add_argument("--dup", type=float, default=0)
    parser.add_argument("--reorder", action="store_true")
    return parser.parse_args()


def main():
    o = options()
    a, b = port(o.a), port(o.b)
    ends = {a.fileno(): (a, b), b.fileno(): (b, a)}
    last = {a: 0.0, b: 0.0}
    poll = select.epoll()
    for fd in ends:
        poll.register(fd, select.EPOLLIN)
    queue, sequence = [], itertools.count()
    print("ready", flush=True)
    while True:
        wait = -1 if not queue else max(0, queue[0][0] - time.monotonic())
        for fd, _ in poll.poll(wait):
            source, target = ends[fd]
            for _ in range(256):
                try:
                    frame = source.recv(70000)
                except OSError:  # Nothing more, or the interface is down for a moment.
                    break
                due = time.monotonic() + max(0, o.delay + random.uniform(-o.jitter, o.jitter)) / 1000
                if not o.reorder:
                    due = last[target] = max(due, last[target])
                for _ in range(2 if random.random() * 100 < o.dup else 1):
                    heapq.heappush(queue, (due, next(sequence), target, frame))
        now = time.monotonic()
        while queue and queue[0][0] <= now:
            _, _, target, frame = heapq.heappop(queue)
            try:
                target.send(frame)
            except OSError:  # The link is down: the frame is lost, as on a cable.
                pass


if __name__ == "__main__":
    main()
