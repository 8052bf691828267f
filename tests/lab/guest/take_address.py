"""Moves a service address to this lab host: `take_address.py ADDRESS/PREFIX`, as a cluster manager does.

The others are told by a gratuitous ARP (RFC 826; RFC 5227, 3), or they would
go on sending to the host that had the address before.
"""

import pathlib
import socket
import struct
import subprocess
import sys

CARD = "vec0"
ETHERTYPE_ARP = 0x0806
REQUEST = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
"""Ethernet, IPv4, their address lengths, request."""


def main(address: str) -> None:
    subprocess.run(["ip", "address", "add", address, "dev", CARD], check=True)
    ours = bytes.fromhex(pathlib.Path(f"/sys/class/net/{CARD}/address").read_text().strip().replace(":", ""))
    ip = socket.inet_aton(address.partition("/")[0])
    everyone = b"\xff" * 6
    frame = everyone + ours + struct.pack("!H", ETHERTYPE_ARP) + REQUEST + ours + ip + bytes(6) + ip
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as card:
        card.bind((CARD, ETHERTYPE_ARP))
        card.send(frame)


if __name__ == "__main__":
    main(sys.argv[1])
