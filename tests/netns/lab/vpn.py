#!/usr/bin/env python3
"""A private network over UDP, for hosts behind routers: a point-to-point interface without multicast, as WireGuard makes it.

usage: vpn.py hub PORT                     passes packets on between those who speak to it
       vpn.py client TUN ADDRESS HUB PORT  makes the interface TUN with ADDRESS/24 and sends its packets to the hub

No cryptography: it is the shape of the link that counts here.
"""
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x1, 0x1000
# Room for the headers round a packet of an Ethernet: what WireGuard's own interfaces have.
MTU = 1420


def hub(own_port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("0.0.0.0", own_port))
    print("ready", flush=True)
    clients = {}
    while True:
        packet, sender = s.recvfrom(2048)
        if len(packet) < 20 or packet[0] >> 4 != 4:
            continue
        clients[packet[12:16]] = sender
        target = clients.get(packet[16:20])
        if target:
            s.sendto(packet, target)


def client(name, address, hub_host, hub_port):
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    for words in (
        ["addr", "add", f"{address}/24", "dev", name],
        ["link", "set", name, "mtu", str(MTU), "multicast", "off", "up"],
    ):
        subprocess.run(["ip", *words], check=True)
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect((hub_host, hub_port))
    # The hub learns where this client is.
    own = socket.inet_aton(address)
    hello = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20, 0, 0, 1, 59, 0, own, own)
    s.send(hello)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([tun, s], [], [], 5)
        try:
            if not ready:
                s.send(hello)
            if tun in ready:
                s.send(os.read(tun, 2048))
            if s in ready:
                packet = s.recv(2048)
                if packet[12:16] != own:
                    os.write(tun, packet)
        except OSError:  # The way to the hub is down for a moment.
            pass


if sys.argv[1] == "hub":
    hub(int(sys.argv[2]))
else:
    client(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
