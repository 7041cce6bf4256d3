"""Carries frames between an interface and a new tap, late, and loses some of them.

python slow_cable.py INTERFACE TAP DELAY_S LOSS
"""

from __future__ import annotations

import collections
import fcntl
import os
import random
import select
import socket
import struct
import sys
import time

ETH_P_ALL = 3
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, PACKET_OUTGOING = 263, 1, 1, 4
MOST_BYTES = 65536


def main(interface: str, tap_name: str, delay_s: float, loss: float) -> None:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    raw.bind((interface, 0))
    index = socket.if_nametoindex(interface)
    member = struct.pack("iHH8s", index, PACKET_MR_PROMISC, 0, b"")
    raw.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, member)
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", tap_name.encode(), IFF_TAP | IFF_NO_PI))
    print("ready", flush=True)
    waiting: collections.deque[tuple[float, bool, bytes]] = collections.deque()
    chance = random.Random(0)
    while True:
        while waiting and waiting[0][0] <= time.monotonic():
            _, to_tap, frame = waiting.popleft()
            try:
                os.write(tap, frame) if to_tap else raw.send(frame)
            except OSError:  # an end that is down loses frames, as a cable does
                continue
        patience = max(waiting[0][0] - time.monotonic(), 0) if waiting else 1.0
        for source in select.select([raw, tap], [], [], patience)[0]:
            if source is raw:
                frame, (_, _, kind, *_) = raw.recvfrom(MOST_BYTES)
                if kind == PACKET_OUTGOING:
                    continue
            else:
                frame = os.read(tap, MOST_BYTES)
            if chance.random() >= loss:
                waiting.append((time.monotonic() + delay_s, source is raw, frame))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
