"""A socket inside of TLS: the calls of a plain one, whatever the sizes of records, rooms and socket buffers."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.tls_socket import PIECE, TlsSocket
from tcmu_replication.tls import Context
from tcmu_replication.units import KiB, MiB
from tests.support.certificates import Authority
from tests.support.tools import PATIENCE_S, requires

pytestmark = requires("openssl")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tls")
    return Authority(base).issue(base / "host", "host")


Ends = tuple[TlsSocket, TlsSocket]


async def connected(directory: Path, buffer: int | None = None) -> Ends:
    """A client's and a server's end; `buffer` is the socket's, in bytes."""
    pair = socket.socketpair()
    for sock in pair:
        sock.setblocking(False)
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    wraps = (
        TlsSocket.wrap(sock, Context(str(directory), server_side=side), server_side=side)
        for sock, side in zip(pair, (False, True), strict=True)
    )
    client, server = await asyncio.gather(*wraps)
    return client, server


def run(directory: Path, body: Callable[[Ends], Awaitable[None]], buffer: int | None = None) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S):
            ends = await connected(directory, buffer)
            try:
                await body(ends)
            finally:
                for end in ends:
                    end.close()

    asyncio.run(main())


async def readable(end: TlsSocket) -> None:
    """Wait for the event."""
    event = asyncio.Event()
    end.add_reader(end, event.set)
    await event.wait()
    end.remove_reader(end)


async def take(end: TlsSocket, length: int, rooms: Callable[[], list[int]]) -> bytes:
    """`length` bytes, received by events into rooms of these sizes."""
    received = bytearray()
    while len(received) < length:
        await readable(end)
        views = [memoryview(bytearray(size)) for size in rooms()]
        try:
            count = end.recvmsg_into(views)[0]
        except BlockingIOError:
            continue
        assert count, "ended too early"
        received += b"".join(views)[:count]
    return bytes(received)


async def put(end: TlsSocket, data: bytes, cut: Callable[[], int]) -> None:
    """Send all, in buffers of these sizes, waiting where the socket is full."""
    view = memoryview(data)
    buffers: list[memoryview] = []
    while view:
        size = cut()
        buffers.append(view[:size])
        view = view[size:]
    while buffers:
        try:
            sent = end.sendmsg(buffers)
        except BlockingIOError:
            event = asyncio.Event()
            end.add_writer(end, event.set)
            await event.wait()
            end.remove_writer(end)
            continue
        while sent:
            first = buffers[0]
            if sent < len(first):
                buffers[0], sent = first[sent:], 0
            else:
                sent -= len(first)
                buffers.pop(0)


@pytest.mark.parametrize("room", [1, 100, 16 * KiB - 1, 16 * KiB, MiB], ids=str)
@pytest.mark.parametrize("buffer", [None, 4 * KiB], ids=["usual buffers", "small buffers"])
def test_any_room_gets_every_byte_though_no_event_of_the_socket_tells_of_it(
    directory: Path, room: int, buffer: int | None
) -> None:
    data = os.urandom(40 * room if room < 1000 else 3 * MiB)

    async def body(ends: Ends) -> None:
        sending = asyncio.create_task(put(ends[0], data, lambda: 70000))
        assert await take(ends[1], len(data), lambda: [room]) == data
        await sending

    run(directory, body, buffer)


@pytest.mark.parametrize("seed", range(5))
def test_random_sizes_both_ways_at_once(directory: Path, seed: int) -> None:
    rng = random.Random(seed)
    there, back = rng.randbytes(2 * MiB), rng.randbytes(2 * MiB)

    def rooms() -> list[int]:
        return [rng.choice([1, 27, 4096, 100_000]) for _ in range(rng.randrange(1, 5))]

    async def body(ends: Ends) -> None:
        client, server = ends
        done = await asyncio.gather(
            put(client, there, lambda: rng.choice([1, 28, 4124, 400_000])),
            put(server, back, lambda: rng.choice([1, 28, 4124, 400_000])),
            take(server, len(there), rooms),
            take(client, len(back), rooms),
        )
        assert done[2:] == [there, back]

    run(directory, body, rng.choice([None, 8 * KiB]))


def test_what_was_taken_to_send_is_sent_without_the_caller(directory: Path) -> None:
    async def body(ends: Ends) -> None:
        client, server = ends
        data = os.urandom(PIECE)
        assert client.send(data) == PIECE
        with pytest.raises(BlockingIOError):
            client.send(b"more")
        assert await take(server, PIECE, lambda: [MiB]) == data

    run(directory, body, 4 * KiB)


def test_a_send_takes_a_piece_at_most(directory: Path) -> None:
    async def body(ends: Ends) -> None:
        assert ends[0].sendmsg([bytes(PIECE - 10), bytes(100)]) == PIECE

    run(directory, body)


@pytest.mark.parametrize("goodbye", [True, False], ids=["with a goodbye", "cut off"])
def test_end_of_the_peer_comes_behind_its_last_bytes(directory: Path, goodbye: bool) -> None:
    async def body(ends: Ends) -> None:
        client, server = ends
        client.send(b"last words")
        if goodbye:
            client.close()
        else:
            client._sock.close()
        assert await take(server, 10, lambda: [4]) == b"last words"
        await readable(server)
        assert server.recv_into(memoryview(bytearray(4))) == 0

    run(directory, body)


def test_cipher_text_that_was_changed_is_an_error_of_the_connection(directory: Path) -> None:
    async def body(ends: Ends) -> None:
        client, server = ends
        client._encrypt(memoryview(b"data"))
        text = bytearray(client._outgoing.read())
        text[-1] ^= 1
        client._sock.send(text)
        await readable(server)
        with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
            server.recv_into(memoryview(bytearray(100)))

    run(directory, body)


def test_peer_that_is_gone_is_an_error_of_the_next_call(directory: Path) -> None:
    async def body(ends: Ends) -> None:
        client, server = ends
        assert client.send(bytes(PIECE)) == PIECE  # more than the socket takes
        server._sock.close()
        await readable(client)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            await put(client, bytes(4 * PIECE), lambda: PIECE)

    run(directory, body, 4 * KiB)


@pytest.mark.parametrize(
    "garbage", [b"\x25\x60\x95\x13" * 7, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff"]
)
def test_garbage_instead_of_a_handshake_is_refused(directory: Path, garbage: bytes) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.send(garbage)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(Error) as caught:
                await TlsSocket.wrap(ours, Context(str(directory), server_side=True), server_side=True)
            assert caught.value.kind is Kind.PERMISSION

    asyncio.run(main())


def test_peer_that_hangs_up_in_the_handshake(directory: Path) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.close()
        with ours, pytest.raises(Error, match="hung up in the TLS handshake"):
            await TlsSocket.wrap(ours, Context(str(directory), server_side=True), server_side=True)

    asyncio.run(main())
