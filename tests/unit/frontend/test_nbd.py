"""The NBD server: a raw client at one end of the socket, a node in memory behind the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tcmu_replication.block.faults import Faults
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend import nbd_connection
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.nbd import protocol, transmission
from tcmu_replication.nbd.connect import connect
from tcmu_replication.nbd.protocol import Command, CommandFlag, NbdError
from tcmu_replication.nbd.uri import Tcp, Unix
from tcmu_replication.units import KiB, MiB
from tests.support.tools import PATIENCE_S

LENGTH = 4 * MiB
FUA = int(CommandFlag.FUA)


class Raw:
    """A client that says what it is told to, right or wrong."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()

    async def say(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    async def ask(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 7
    ) -> None:
        head = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, cookie, offset, length)
        await self.say(head)

    async def hear(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = await self.loop.sock_recv(self.sock, length - len(data))
            assert piece, f"hung up after {data!r}"
            data += piece
        return data

    async def simple(self) -> tuple[int, int]:
        """Cookie and error of the next reply, which must be simple."""
        magic, error, cookie = protocol.SIMPLE_REPLY.unpack(await self.hear(16))
        assert magic == protocol.SIMPLE_REPLY_MAGIC
        return cookie, error

    async def chunk(self) -> tuple[int, int, bytes]:
        """Flags, type and payload of the next chunk."""
        magic, flags, kind, _, length = protocol.STRUCTURED_REPLY.unpack(await self.hear(20))
        assert magic == protocol.STRUCTURED_REPLY_MAGIC
        return flags, kind, await self.hear(length)

    async def error(self) -> tuple[int, str]:
        """The error of the next reply, which must be an error chunk."""
        _, kind, payload = await self.chunk()
        return transmission.parse_error_chunk(kind, memoryview(payload))

    async def hung_up(self) -> bool:
        try:
            return await self.loop.sock_recv(self.sock, 1) == b""
        except ConnectionResetError:
            return True


class House:
    """A server on a unix socket, its node and its clients."""

    def __init__(self, path: Path) -> None:
        self.memory = Memory(LENGTH)
        self.failing = Faults(self.memory)
        self.node = Faults(self.failing)
        self.server = Server([Export("disk0", self.node)])
        self.path = str(path / "nbd.sock")
        self.stack = contextlib.ExitStack()

    async def client(self, export: str = "disk0") -> Raw:
        sock, _, _ = await connect(Unix(self.path), export, timeout_s=20)
        return Raw(self.stack.enter_context(sock))

    async def plain_client(self) -> Raw:
        """A client without structured replies."""
        sock = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.setblocking(False)
        raw = Raw(sock)
        await raw.loop.sock_connect(sock, self.path)
        await raw.hear(18)
        await raw.say(b"\0\0\0\x03IHAVEOPT" + struct.pack(">II", 1, 5) + b"disk0")
        await raw.hear(10)
        return raw


@contextlib.asynccontextmanager
async def house(path: Path) -> AsyncIterator[House]:
    it = House(path)
    await it.server.listen_unix(it.path)
    try:
        with it.stack:
            yield it
    finally:
        await it.server.close()


def live(path: Path, body: Callable[[House], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S), house(path) as it:
            await body(it)

    asyncio.run(main())


def test_write_then_read(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        await raw.ask(Command.WRITE, 3, 5)
        await raw.say(b"hello")
        assert await raw.simple() == (7, 0)
        assert it.memory.data[:9] == b"\0\0\0hello\0"
        await raw.ask(Command.READ, 2, 7)
        flags, kind, payload = await raw.chunk()
        assert (flags, kind, payload) == (1, 1, (2).to_bytes(8) + b"\0hello\0")

    live(tmp_path, body)


def test_simple_replies_where_structured_ones_were_not_agreed(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.plain_client()
        it.memory.data[:4] = b"data"
        await raw.ask(Command.READ, 0, 4, cookie=1)
        assert await raw.simple() == (1, 0)
        assert await raw.hear(4) == b"data"
        await raw.ask(Command.READ, LENGTH, 1, cookie=2)
        assert await raw.simple() == (2, NbdError.EINVAL)
        await raw.ask(Command.BLOCK_STATUS, 0, 512, cookie=3)
        assert await raw.simple() == (3, NbdError.EINVAL)

    live(tmp_path, body)


def test_request_byte_by_byte(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        message = transmission.request(Command.WRITE, 9, 0, 3) + b"abc"
        for at in range(len(message)):
            await raw.say(message[at : at + 1])
            await asyncio.sleep(0)
        assert await raw.simple() == (9, 0)
        assert it.memory.data[:3] == b"abc"

    live(tmp_path, body)


def test_many_requests_at_once_are_answered_in_order(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        count = 1000
        blocks = [struct.pack(">I", n) * 16 for n in range(count)]
        writes = [transmission.request(Command.WRITE, n, n * 64, 64) + blocks[n] for n in range(count)]
        sender = asyncio.ensure_future(raw.say(b"".join(writes)))
        assert [await raw.simple() for _ in range(count)] == [(n, 0) for n in range(count)]
        await sender
        assert it.memory.data[: count * 64] == b"".join(blocks)

    live(tmp_path, body)


class Arrivals:
    """In place of a poll: when the server looks again, the client has said the next thing."""

    def __init__(self, raw: Raw, sayings: list[bytes]) -> None:
        self.raw = raw
        self.sayings = sayings
        self.looks = 0

    def poll(self, timeout: int) -> bool:
        assert timeout == 0, "the loop must not be kept waiting"
        self.looks += 1
        if self.looks % 3 or not self.sayings:
            return False
        self.raw.sock.sendall(self.sayings.pop(0))
        return True


@pytest.mark.parametrize(
    ("at_once", "served"), [(nbd_connection.BUSY, True), (nbd_connection.BUSY - 1, False)]
)
def test_busy_client_is_served_again_before_the_loop_sleeps(
    tmp_path: Path, at_once: int, served: bool
) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        (connection,) = it.server._connections
        sayings = [transmission.request(Command.WRITE, n, 0, 64) + bytes([n]) * 64 for n in (101, 102)]
        connection._arrived = arrivals = Arrivals(raw, sayings)
        raw.sock.sendall(b"".join(transmission.request(Command.READ, n, 0, 64) for n in range(at_once)))
        connection._readable()
        assert it.memory.data[:64] == (bytes([102]) if served else bytes(1)) * 64
        assert arrivals.looks <= 6 + nbd_connection.LOOKS
        assert len(arrivals.sayings) == (0 if served else 2)

    live(tmp_path, body)


def test_client_that_never_stops_lets_others_have_their_turn(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        (connection,) = it.server._connections
        count = 4 * nbd_connection.ROUNDS
        again = transmission.request(Command.WRITE, 7, 0, 64) + b"x" * 64
        connection._arrived = arrivals = Arrivals(raw, [again] * count)
        raw.sock.sendall(again * nbd_connection.BUSY)
        connection._readable()
        assert count - len(arrivals.sayings) == nbd_connection.ROUNDS

    live(tmp_path, body)


class Watching(Memory):
    """A disk that notes with each request whether its client has an answer to read."""

    def __init__(self) -> None:
        super().__init__(LENGTH)
        self.answered: list[bool] = []
        self.client: socket.socket | None = None

    def look(self) -> None:
        assert self.client is not None
        try:
            self.answered.append(bool(self.client.recv(1, socket.MSG_PEEK)))
        except BlockingIOError:
            self.answered.append(False)

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        self.look()
        return super().read(offset, buffers)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        self.look()
        return super().write(offset, buffers, fua)


@pytest.mark.parametrize(
    ("command", "length"),
    [(Command.READ, 4 * KiB), (Command.WRITE, 4 * KiB), (Command.READ, nbd_connection.SPARSE_FROM)],
)
def test_answers_to_a_large_batch_leave_before_it_is_done(
    tmp_path: Path, command: Command, length: int
) -> None:
    async def body(it: House) -> None:
        disk = Watching()
        disk.data[:] = b"x" * LENGTH
        it.server.add(Export("watching", disk))
        raw = await it.client("watching")
        disk.client = raw.sock
        (connection,) = it.server._connections
        before = nbd_connection.EARLY // length
        data = bytes(length) if command == Command.WRITE else b""
        for n in range(before + 2):
            raw.sock.sendall(transmission.request(command, n, 0, length) + data)
        connection._readable()
        assert disk.answered == [False] * before + [True] * 2

    live(tmp_path, body)


def test_longest_write_and_read_in_one_piece(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        it.memory = Memory(protocol.MAX_REQUEST)
        it.server.add(Export("big", it.memory))
        raw = await it.client("big")
        data = os.urandom(MiB) * 32
        await raw.ask(Command.WRITE, 0, len(data))
        await raw.say(data)
        assert await raw.simple() == (7, 0)
        assert it.memory.data == data
        await raw.ask(Command.READ, 0, len(data))
        _, _, payload = await raw.chunk()
        assert payload[8:] == data

    live(tmp_path, body)


def test_zeroes_trim_and_flush(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        it.memory.data[:] = b"x" * LENGTH
        for cookie, (command, flags) in enumerate(
            [
                (Command.WRITE_ZEROES, FUA | CommandFlag.NO_HOLE),
                (Command.WRITE_ZEROES, 0),
                (Command.TRIM, FUA),
                (Command.FLUSH, 0),
            ]
        ):
            length = 0 if command == Command.FLUSH else 512
            await raw.ask(command, cookie * 1024, length, flags, cookie)
            assert await raw.simple() == (cookie, 0)
        for cookie in range(3):
            at = cookie * 1024
            assert it.memory.data[at : at + 513] == bytes(512) + b"x"

    live(tmp_path, body)


REFUSED = {
    "read beyond the end": (Command.READ, LENGTH - 1, 2, 0, NbdError.EINVAL),
    "read far beyond the end": (Command.READ, 2**64 - 1, 2**32 - 1, 0, NbdError.EINVAL),
    "read of nothing": (Command.READ, 0, 0, 0, NbdError.EINVAL),
    "zeroes beyond the end": (Command.WRITE_ZEROES, LENGTH - 1, 2, 0, NbdError.ENOSPC),
    "trim beyond the end": (Command.TRIM, LENGTH, 1, 0, NbdError.ENOSPC),
    "status beyond the end": (Command.BLOCK_STATUS, LENGTH, 1, 0, NbdError.EINVAL),
    "cache, which is not offered": (Command.CACHE, 0, 1, 0, NbdError.EINVAL),
    "resize, which is not offered": (Command.RESIZE, 0, 1, 0, NbdError.EINVAL),
    "unknown command": (999, 0, 1, 0, NbdError.EINVAL),
    "unknown flag": (Command.READ, 0, 1, 0x100, NbdError.EINVAL),
    "flag of another command": (Command.READ, 0, 1, CommandFlag.REQ_ONE, NbdError.EINVAL),
    "fast zero, which is not offered": (Command.WRITE_ZEROES, 0, 1, CommandFlag.FAST_ZERO, NbdError.EINVAL),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refused_request_leaves_the_connection(tmp_path: Path, row: str) -> None:
    command, offset, length, flags, expected = REFUSED[row]

    async def body(it: House) -> None:
        raw = await it.client()
        await raw.ask(command, offset, length, int(flags))
        number, text = await raw.error()
        assert number == expected
        assert text
        await raw.ask(Command.FLUSH)
        assert await raw.simple() == (7, 0)

    live(tmp_path, body)


@pytest.mark.parametrize(("offset", "flags", "expected"), [(LENGTH - 1, 0, "ENOSPC"), (0, 0x80, "EINVAL")])
def test_refused_write_is_taken_off_the_wire(tmp_path: Path, offset: int, flags: int, expected: str) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        await raw.ask(Command.WRITE, offset, 2, flags)
        await raw.say(b"ab")
        assert (await raw.error())[0] == NbdError[expected]
        await raw.ask(Command.FLUSH)
        assert await raw.simple() == (7, 0)
        assert not any(it.memory.data)

    live(tmp_path, body)


@pytest.mark.parametrize("command", [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM])
def test_read_only_export_refuses_changes(tmp_path: Path, command: Command) -> None:
    async def body(it: House) -> None:
        it.server.add(Export("view", it.memory, read_only=True))
        raw = await it.client("view")
        it.memory.data[:1] = b"x"
        await raw.ask(command, 0, 1)
        if command == Command.WRITE:
            await raw.say(b"y")
        assert await raw.error() == (NbdError.EPERM, "the export is read-only")
        assert it.memory.data[:1] == b"x"

    live(tmp_path, body)


def test_read_of_zeroes_is_a_hole(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        it.memory.data[MiB + 100 * KiB] = 1
        for offset, flags, is_hole in ((0, 0, True), (0, CommandFlag.DF, False), (MiB, 0, False)):
            await raw.ask(Command.READ, offset, 128 * KiB + 1, int(flags))
            done, kind, payload = await raw.chunk()
            assert done == 1
            if is_hole:
                assert (kind, payload) == (2, struct.pack(">QI", offset, 128 * KiB + 1))
            else:
                assert kind == 1
                assert payload[8:] == it.memory.data[offset : offset + 128 * KiB + 1]

    live(tmp_path, body)


def test_block_status_of_one_extent_and_of_all(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        for flags in (0, CommandFlag.REQ_ONE):
            await raw.ask(Command.BLOCK_STATUS, 512, 4096, int(flags))
            done, kind, payload = await raw.chunk()
            assert (done, kind) == (1, 5)
            assert payload == struct.pack(">III", 1, 4096, 0)

    live(tmp_path, body)


@pytest.mark.parametrize("operation", ["read", "write", "zero", "discard", "flush"])
def test_error_of_the_node_reaches_the_client_with_its_sentence(tmp_path: Path, operation: str) -> None:
    commands = {
        "read": Command.READ,
        "write": Command.WRITE,
        "zero": Command.WRITE_ZEROES,
        "discard": Command.TRIM,
        "flush": Command.FLUSH,
    }

    async def body(it: House) -> None:
        raw = await it.client()
        it.node.fail(operation, Kind.NO_SPACE)
        await raw.ask(commands[operation], 0, 4)
        if operation == "write":
            await raw.say(b"data")
        number, text = await raw.error()
        assert number == NbdError.ENOSPC
        assert operation in text

    live(tmp_path, body)


def test_slow_requests_are_overtaken_and_answered_later(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        slow_write = it.node.delay("write", offset=0, length=4)
        slow_read = it.node.delay("read", offset=0, length=4)
        await raw.ask(Command.WRITE, 0, 4, cookie=1)
        await raw.say(b"slow")
        await raw.ask(Command.READ, 0, 4, cookie=2)
        await raw.ask(Command.WRITE, 8, 4, cookie=3)
        await raw.say(b"fast")
        assert await raw.simple() == (3, 0)
        assert it.server.in_flight == 2
        # Many more requests go through the same buffer meanwhile.
        for n in range(2000):
            await raw.ask(Command.WRITE, 4096, 4096, cookie=100 + n)
            await raw.say(bytes([n & 255]) * 4096)
            assert await raw.simple() == (100 + n, 0)
        slow_write.release()
        assert await raw.simple() == (1, 0)
        assert it.memory.data[:4] == b"slow"
        slow_read.release()
        _, kind, payload = await raw.chunk()
        assert (kind, payload[8:]) == (1, b"slow")
        assert it.server.in_flight == 0

    live(tmp_path, body)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_slow_request_that_fails_in_the_end(tmp_path: Path, operation: str) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        slow = it.node.delay(operation)
        await raw.ask(Command[operation.upper()], 0, 4)
        if operation == "write":
            await raw.say(b"data")
        while not it.server.in_flight:
            await asyncio.sleep(0)
        it.failing.fail(operation, Kind.IO)
        slow.release()
        assert (await raw.error())[0] == NbdError.EIO
        await raw.ask(Command.FLUSH)
        assert await raw.simple() == (7, 0)

    live(tmp_path, body)


def test_slow_trim_with_fua_flushes_behind(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        trim, flush = it.node.delay("discard"), it.node.delay("flush")
        await raw.ask(Command.TRIM, 0, 512, FUA)
        while not trim.met:
            await asyncio.sleep(0)
        assert not flush.met
        trim.release()
        while not flush.met:
            await asyncio.sleep(0)
        assert it.server.in_flight == 1
        flush.release()
        assert await raw.simple() == (7, 0)

    live(tmp_path, body)


def test_client_that_does_not_read_is_not_read_from(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        it.memory.data[:] = b"x" * LENGTH
        raw = await it.client()
        count = 200
        asks = b"".join(transmission.request(Command.READ, n, 0, MiB) for n in range(count))
        await raw.say(asks)
        (connection,) = it.server._connections
        owed = 0
        for _ in range(50):
            await asyncio.sleep(0)
            owed = max(owed, connection._out.size)
        assert nbd_connection.MAX_OWED <= owed <= nbd_connection.MAX_OWED + 2 * MiB
        for _ in range(count):
            _, kind, payload = await raw.chunk()
            assert (kind, len(payload)) == (1, MiB + 8)

    live(tmp_path, body)


def test_client_with_too_many_slow_requests_is_not_read_from(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        slow = it.node.delay("flush")
        raw = await it.client()
        count = nbd_connection.MAX_IN_FLIGHT + 100
        await raw.say(b"".join(transmission.request(Command.FLUSH, n) for n in range(count)))
        while it.server.in_flight < nbd_connection.MAX_IN_FLIGHT:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert it.server.in_flight == nbd_connection.MAX_IN_FLIGHT
        slow.cancel()
        slow.release()
        heard = [await raw.simple() for _ in range(count)]
        assert sorted(heard) == [(n, 0) for n in range(count)]

    live(tmp_path, body)


@pytest.mark.parametrize(("command", "operation"), [(Command.WRITE_ZEROES, "zero"), (Command.READ, "read")])
def test_client_that_asks_for_much_in_few_bytes_lets_others_have_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, operation: str
) -> None:
    """What is read here is a hole, so the replies are short too."""
    monkeypatch.setattr(nbd_connection, "TURN", MiB)
    count = 50

    async def body(it: House) -> None:
        done: list[str] = []

        def noted(name: str) -> None:
            call = getattr(it.memory, name)
            setattr(it.memory, name, lambda *args: done.append(name) or call(*args))

        noted(operation)
        noted("flush")
        greedy, other = await it.client(), await it.client()
        await greedy.say(b"".join(transmission.request(command, n, 0, MiB) for n in range(count)))
        await other.ask(Command.FLUSH)
        assert await other.simple() == (7, 0)
        for _ in range(count):
            await (greedy.chunk() if command == Command.READ else greedy.simple())
        assert done.index("flush") < 3
        assert done.count(operation) == count

    live(tmp_path, body)


def test_half_closed_client_gets_its_answers(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        slow = it.node.delay("flush")
        raw = await it.client()
        await raw.ask(Command.FLUSH)
        await raw.ask(Command.READ, 0, 4, cookie=8)
        raw.sock.shutdown(socket.SHUT_WR)
        assert (await raw.chunk())[1] == 1
        slow.release()
        assert await raw.simple() == (7, 0)
        assert await raw.hung_up()

    live(tmp_path, body)


@pytest.mark.parametrize("saying", [b"", transmission.request(Command.DISC, 0)])
def test_client_that_leaves_behind_a_large_batch_gets_all_answers(tmp_path: Path, saying: bytes) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        it.memory.data[:] = os.urandom(LENGTH)
        count = 4 * nbd_connection.EARLY // (4 * KiB)
        batch = [transmission.request(Command.READ, n, n * 4 * KiB, 4 * KiB) for n in range(count)]
        raw.sock.sendall(b"".join(batch) + saying)
        raw.sock.shutdown(socket.SHUT_WR)
        for n in range(count):
            _, kind, payload = await raw.chunk()
            assert (kind, payload[8:]) == (1, it.memory.data[n * 4 * KiB : (n + 1) * 4 * KiB])
        assert await raw.hung_up()

    live(tmp_path, body)


def test_disconnect_ends_after_the_answers(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        await raw.say(transmission.request(Command.FLUSH, 1) + transmission.request(Command.DISC, 2))
        assert await raw.simple() == (1, 0)
        assert await raw.hung_up()
        assert it.server.connections == 0

    live(tmp_path, body)


LIES = {
    "no request": bytes(28),
    "a write beyond the limit": transmission.request(Command.WRITE, 1, 0, protocol.MAX_REQUEST + 1),
    "an option": b"IHAVEOPT" + struct.pack(">II", 7, 12) + bytes(12),
    "a reply": transmission.simple_reply(1) + bytes(12),
    "a good request before it": transmission.request(Command.FLUSH, 1) + b"garbage" * 4,
}


@pytest.mark.parametrize("row", LIES)
def test_lying_client_is_hung_up_on_with_one_line(
    tmp_path: Path, row: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(it: House) -> None:
        other = await it.client()
        raw = await it.client()
        await raw.say(LIES[row])
        assert await raw.hung_up()
        (line,) = caplog.records
        assert line.levelno == logging.WARNING
        assert "hung up" in line.getMessage()
        await other.ask(Command.FLUSH)
        assert await other.simple() == (7, 0)

    live(tmp_path, body)


_FIXED = b"\0\0\0\3"
HANDSHAKE_LIES = {
    "unknown flags": b"\0\0\0\x83",
    "no option": _FIXED + bytes(16),
    "a request": _FIXED + transmission.request(Command.READ, 1, 0, 512),
    "an option too long": _FIXED + b"IHAVEOPT" + struct.pack(">II", 7, protocol.MAX_OPTION + 1),
    "an option of an old client": b"\0\0\0\0IHAVEOPT" + struct.pack(">II", 3, 0),
    "an unknown export": _FIXED + b"IHAVEOPT" + struct.pack(">II", 1, 5) + b"disk9",
    "a name that is no text": _FIXED + b"IHAVEOPT" + struct.pack(">IIIH", 7, 7, 1, 0) + b"\xff",
    "a name too long": _FIXED + b"IHAVEOPT" + struct.pack(">II", 1, 5000) + b"x" * 5000,
    "garbage behind an option": _FIXED + b"IHAVEOPT" + struct.pack(">II", 3, 0) + b"garbage " * 2,
}


@pytest.mark.parametrize("row", HANDSHAKE_LIES)
def test_lie_in_the_handshake_is_hung_up_on_with_one_line(
    tmp_path: Path, row: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(it: House) -> None:
        other = await it.client()
        raw = Raw(it.stack.enter_context(socket.socket(socket.AF_UNIX)))
        raw.sock.setblocking(False)
        raw.sock.connect(it.path)
        await raw.hear(18)
        await raw.say(HANDSHAKE_LIES[row])
        with contextlib.suppress(ConnectionResetError):  # if it closed with our bytes unread
            while await raw.loop.sock_recv(raw.sock, 4096):
                pass
        (line,) = caplog.records
        assert line.levelno == logging.WARNING
        assert line.getMessage().endswith("hung up")
        assert line.getMessage().isprintable()
        await other.ask(Command.FLUSH)
        assert await other.simple() == (7, 0)
        assert it.server.connections == 1

    live(tmp_path, body)


@pytest.mark.parametrize("defect", [MemoryError, AssertionError, KeyError, OSError])
def test_defect_of_a_node_goes_to_the_loop(tmp_path: Path, defect: type[Exception]) -> None:
    """A3: the worker ends, as it does for the ring's frontend; to hang up and live on leaves requests half done."""

    async def body(it: House) -> None:
        loop = asyncio.get_running_loop()
        met: asyncio.Future[object] = loop.create_future()
        loop.set_exception_handler(lambda _, what: met.done() or met.set_result(what.get("exception")))

        def raises(*_: object) -> None:
            raise defect("a defect")

        it.memory.write = raises  # type: ignore[method-assign]
        raw = await it.client()
        await raw.say(protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, Command.WRITE, 7, 0, 4) + b"data")
        assert type(await met) is defect
        raw.sock.close()

    live(tmp_path, body)


def test_silent_client_is_hung_up_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(it: House) -> None:
        it.server._handshake_limit_s = 0.01
        raw = Raw(it.stack.enter_context(socket.socket(socket.AF_UNIX)))
        raw.sock.setblocking(False)
        raw.sock.connect(it.path)
        await raw.hear(18)
        assert await raw.hung_up()
        assert "no handshake in 0.01 s" in caplog.text

    live(tmp_path, body)


def test_one_client_too_many_is_hung_up_on(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        it.server._max_connections = 1
        raw = await it.client()
        assert it.server.connections == 1
        with pytest.raises(Error, match=r"hung up in the handshake|reset"):
            await it.client()
        await raw.ask(Command.DISC)
        assert await raw.hung_up()
        await it.client()

    live(tmp_path, body)


def test_tcp_client_must_be_allowed(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        asked: list[str] = []
        memory = Memory(LENGTH)
        server = Server([Export("disk0", memory)], allow=lambda host: bool(asked.append(host)))
        port = await server.listen_tcp("127.0.0.1", 0)
        with pytest.raises(Error) as caught:
            await connect(Tcp("127.0.0.1", port), "disk0", timeout_s=20)
        assert caught.value.kind is Kind.PEER_LOST
        assert asked == ["127.0.0.1"]
        await server.close()

    asyncio.run(main())
    assert "127.0.0.1 is not allowed" in caplog.text


def test_tcp_on_every_address_of_a_host() -> None:
    async def main() -> None:
        server = Server([Export("disk0", Memory(LENGTH))])
        port = await server.listen_tcp("", 0)
        sock, agreement, _ = await connect(Tcp("127.0.0.1", port), "disk0", timeout_s=20)
        assert agreement.length == LENGTH
        sock.close()
        with pytest.raises(Error, match="in use") as caught:
            await server.listen_tcp("127.0.0.1", port)
        assert caught.value.kind is Kind.CONFLICT
        await server.close()

    asyncio.run(main())


def test_removed_export_hangs_up_and_waits_for_the_node(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        it.server.add(Export("other", it.memory))
        slow = it.node.delay("write")
        other, raw = await it.client("other"), await it.client()
        await raw.ask(Command.WRITE, 0, 4)
        await raw.say(b"late")
        while not slow.met:
            await asyncio.sleep(0)
        removal = asyncio.ensure_future(it.server.remove("disk0"))
        assert await raw.hung_up()
        assert not removal.done()
        with pytest.raises(Error) as caught:
            await it.client()
        assert caught.value.kind is Kind.NOT_FOUND
        slow.release()
        await removal
        await other.ask(Command.FLUSH)
        assert await other.simple() == (7, 0)

    live(tmp_path, body)


def test_removal_waits_for_a_client_that_is_already_gone(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        slow = it.node.delay("flush")
        raw = await it.client()
        await raw.say(transmission.request(Command.FLUSH, 1) + bytes(28))
        assert await raw.hung_up()
        assert (it.server.connections, it.server.in_flight) == (0, 1)
        removal = asyncio.ensure_future(it.server.remove("disk0"))
        await asyncio.sleep(0)
        assert not removal.done()
        slow.release()
        await removal

    live(tmp_path, body)


def test_new_client_of_an_exclusive_export_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        it.server.add(Export("link", it.node, exclusive=True))
        slow = it.node.delay("write", count=1)
        old = await it.client("link")
        await old.ask(Command.WRITE, 0, 4)
        await old.say(b"old ")
        while not slow.met:
            await asyncio.sleep(0)
        new = await it.client("link")
        await new.ask(Command.WRITE, 0, 4, cookie=8)
        await new.say(b"new ")
        assert await old.hung_up()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not any(it.memory.data[:4])
        slow.release()
        assert await new.simple() == (8, 0)
        assert it.memory.data[:4] == b"new "
        await new.ask(Command.FLUSH)
        assert await new.simple() == (7, 0)

    live(tmp_path, body)


def test_clients_of_an_exclusive_export_come_one_after_the_other(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        it.server.add(Export("link", it.node, exclusive=True))
        clients = await asyncio.gather(*(it.client("link") for _ in range(5)))
        for _ in range(50):
            await asyncio.sleep(0)
        assert it.server.connections == 1
        alive = 0
        for raw in clients:
            with contextlib.suppress(AssertionError, OSError):
                await raw.ask(Command.FLUSH)
                alive += await raw.simple() == (7, 0)
        assert alive == 1

    live(tmp_path, body)


def test_safe_removal_waits_for_its_clients(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = await it.client()
        removal = asyncio.ensure_future(it.server.remove("disk0", hard=False))
        await raw.ask(Command.FLUSH)
        assert await raw.simple() == (7, 0)
        assert not removal.done()
        await raw.ask(Command.DISC)
        await removal

    live(tmp_path, body)


def test_exports_are_added_once_and_removed_once(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        with pytest.raises(Error) as taken:
            it.server.add(Export("disk0", it.memory))
        assert taken.value.kind is Kind.CONFLICT
        with pytest.raises(Error) as too_long:
            it.server.add(Export("n" * 4097, it.memory))
        assert too_long.value.kind is Kind.BAD_CONFIG
        await it.server.remove("disk0")
        with pytest.raises(Error) as gone:
            await it.server.remove("disk0")
        assert gone.value.kind is Kind.NOT_FOUND

    live(tmp_path, body)


def test_export_removed_in_the_handshake_is_not_served(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        raw = Raw(it.stack.enter_context(socket.socket(socket.AF_UNIX)))
        raw.sock.setblocking(False)
        raw.sock.connect(it.path)
        await raw.hear(18)
        await it.server.remove("disk0")
        await raw.say(b"\0\0\0\x03IHAVEOPT" + struct.pack(">II", 1, 5) + b"disk0")
        assert await raw.hung_up()

    live(tmp_path, body)


def test_unix_socket_is_for_its_owner_and_removed_at_the_end(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        assert stat.S_IMODE(os.stat(it.path).st_mode) == 0o600
        second = Server()
        with pytest.raises(Error) as caught:
            await second.listen_unix(it.path)
        assert caught.value.kind is Kind.CONFLICT

    live(tmp_path, body)
    assert not (tmp_path / "nbd.sock").exists()


def test_dead_unix_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def body(it: House) -> None:
        await it.client()

    live(tmp_path, body)
    path.write_text("precious")
    with pytest.raises(Error):
        live(tmp_path, body)
    assert path.read_text() == "precious"
