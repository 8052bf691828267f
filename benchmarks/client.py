"""A client that costs less than any server: for rows where fio would be what is measured.

fio's NBD engine makes several system calls for every request and reaches about
100,000 requests a second with a server that does nothing. This one sends as
many requests as have ended in one call and only counts the replies. It speaks
simple replies, keeps a fixed number of requests in flight, and runs as a
process of its own:

    python -m benchmarks.client URI write|read BLOCK DEPTH COUNT SPAN SEED

It prints the seconds that the requests took.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import time
from urllib.parse import parse_qs, urlsplit

from tests.support.nbd import READ, WRITE, Nbd

_REQUEST = struct.Struct(">IHHQQI")
_MAGIC = 0x25609513
_GOOD = bytes.fromhex("6744669800000000")
REPLY = 16


def address_of(uri: str) -> tuple[str | tuple[str, int], str]:
    """The address and the export of an NBD URI, as tests.support.nbd takes them."""
    parts = urlsplit(uri)
    export = parts.path.lstrip("/")
    if parts.scheme == "nbd+unix":
        return parse_qs(parts.query)["socket"][0], export
    assert parts.hostname is not None
    assert parts.port is not None
    return (parts.hostname, parts.port), export


def requests(command: int, block: int, count: int, span: int, seed: int) -> list[bytes]:
    """The headers: `count` different blocks of the first `span` bytes, at random."""
    blocks = random.Random(seed).sample(range(span // block), count)
    return [_REQUEST.pack(_MAGIC, 0, command, number, at * block, block) for number, at in enumerate(blocks)]


def check(replies: bytes | bytearray, count: int, reply: int = REPLY) -> None:
    """Raises OSError if one of the first `count` replies, `reply` bytes each, says that its request failed."""
    for at in range(0, count * reply, reply):
        if not replies.startswith(_GOOD, at):
            raise OSError(f"a request failed: {replies[at : at + REPLY].hex()}")


def run(sock: socket.socket, headers: list[bytes], data: bytes, reply: int, depth: int) -> float:
    """Keep `depth` requests in flight until all have been answered; the seconds. Raises OSError if one failed."""
    count = len(headers)
    sent = ended = in_reply = 0
    buffer = bytearray(depth * reply)
    view = memoryview(buffer)
    began = time.perf_counter()
    while ended < count:
        until = min(count, ended + depth)
        if sent < until:
            sock.sendall(data.join(headers[sent:until]) + data)
            sent = until
        # Replies are taken whole: what is cut off is completed by the next call.
        got = sock.recv_into(view[in_reply:])
        if not got:
            raise ConnectionError("the server hung up")
        whole, rest = divmod(in_reply + got, reply)
        check(buffer, whole, reply)
        buffer[:rest] = buffer[whole * reply : whole * reply + rest]
        in_reply = rest
        ended += whole
    return time.perf_counter() - began


def main() -> None:
    """Run what the arguments say."""
    uri, kind = sys.argv[1:3]
    block, depth, count, span, seed = map(int, sys.argv[3:])
    command = {"read": READ, "write": WRITE}[kind]
    with Nbd(*address_of(uri)) as nbd:
        sock = nbd._sock
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * depth * block)
        data = random.Random(seed).randbytes(block) if command == WRITE else b""
        reply = REPLY + (block if command == READ else 0)
        print(run(sock, requests(command, block, count, span, seed), data, reply, depth))


if __name__ == "__main__":
    main()
