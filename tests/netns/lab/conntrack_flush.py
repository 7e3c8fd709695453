#!/usr/bin/env python3
"""Forgets every connection-tracking entry of this network namespace: IPCTNL_MSG_CT_DELETE without a filter."""
import socket
import struct

NETLINK_NETFILTER, NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE = 12, 1, 2
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4

s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
kind = (NFNL_SUBSYS_CTNETLINK << 8) | IPCTNL_MSG_CT_DELETE
s.send(struct.pack("=LHHLL", 20, kind, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + struct.pack("=BBH", socket.AF_INET, 0, 0))
error = struct.unpack_from("=i", s.recv(4096), 16)[0]
raise SystemExit(f"the flush failed: {error}" if error else 0)
