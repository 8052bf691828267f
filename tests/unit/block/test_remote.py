"""The remote disk: over our own server, and over one that follows a script, right or wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block.faults import Faults
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers, Extent
from tcmu_replication.block.pending import Pending
from tcmu_replication.block.remote import Remote, State
from tcmu_replication.block.remote_queue import SPAN, Ranges, extents_of
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.nbd import protocol, transmission
from tcmu_replication.nbd.handshake import Offer, ServerHandshake
from tcmu_replication.nbd.protocol import Chunk, Command, CommandFlag
from tcmu_replication.nbd.protocol import TransmissionFlag as Flag
from tcmu_replication.nbd.uri import Tcp, Unix
from tcmu_replication.units import KiB, MiB
from tests.support.tools import PATIENCE_S

LENGTH = 1 * MiB
ALL = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES


def view(data: bytes) -> list[memoryview]:
    return [memoryview(data)]


def room(length: int) -> tuple[bytearray, list[memoryview]]:
    data = bytearray(length)
    return data, [memoryview(data)]


def failure(pending: Pending | None) -> Error:
    assert pending is not None
    assert pending.done
    assert pending.error is not None
    return pending.error


async def ended(*pendings: Pending | None) -> None:
    for pending in pendings:
        if pending is not None:
            with contextlib.suppress(Error):
                await pending.wait()


class States:
    """What a Remote said about its connection."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[tuple[State, str]] = asyncio.Queue()

    def __call__(self, state: State, reason: str) -> None:
        self.heard.put_nowait((state, reason))

    async def until(self, wanted: State, text: str = "") -> str:
        while True:
            state, reason = await self.heard.get()
            if state is wanted and text in reason:
                return reason


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await body()

    asyncio.run(main())


@contextlib.asynccontextmanager
async def connected(remote: Remote) -> AsyncIterator[Remote]:
    await remote.open()
    try:
        yield remote
    finally:
        remote.close()
        await remote.wait_closed()


@contextlib.asynccontextmanager
async def served(path: Path) -> AsyncIterator[tuple[Server, Faults, Memory, Unix]]:
    memory = Memory(LENGTH)
    node = Faults(memory)
    server = Server([Export("disk0", node)])
    where = str(path / "nbd.sock")
    await server.listen_unix(where)
    try:
        yield server, node, memory, Unix(where)
    finally:
        await server.close()


# Over our own server


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_remote_does_what_a_disk_does(tmp_path: Path, tcp: bool) -> None:
    async def body() -> None:
        async with served(tmp_path) as (server, _, memory, unix):
            address = Tcp("127.0.0.1", await server.listen_tcp("127.0.0.1", 0)) if tcp else unix
            async with connected(Remote("r", address, "disk0", length=LENGTH)) as remote:
                assert remote.state is State.CONNECTED
                data = os.urandom(300 * KiB)
                scattered = [memoryview(data[:1]), memoryview(data[1:5000]), memoryview(data[5000:])]
                write = remote.write(4096, scattered, True)
                assert (remote.in_flight, remote.in_flight_bytes) == (1, 300 * KiB)
                remote.unplug()
                assert write is not None
                await write.wait()
                assert memory.data[4096 : 4096 + len(data)] == data
                first, rest = bytearray(10), bytearray(300 * KiB - 10)
                read = remote.read(4096, [memoryview(first), memoryview(rest)])
                hole, holes = room(128 * KiB)
                hole[:] = b"x" * len(hole)
                zeroes = remote.read(512 * KiB, holes)
                remote.unplug()
                await ended(read, zeroes)
                assert first + rest == data
                assert not any(hole)
                calls = [
                    remote.zero(4096, 512, True, False),
                    remote.discard(8192, 512),
                    remote.flush(),
                    remote.block_status(0, LENGTH),
                ]
                remote.unplug()
                for call in calls:
                    assert call is not None
                    await call.wait()
                assert not any(memory.data[4096:4608])
                assert not any(memory.data[8192:8704])
                assert calls[3] is not None
                assert calls[3].value == [Extent(LENGTH, True, False)]
                assert (remote.in_flight, remote.in_flight_bytes) == (0, 0)

    run(body)


def test_nothing_is_sent_before_unplug(tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            served(tmp_path) as (_, _, memory, address),
            connected(Remote("r", address, "disk0")) as remote,
        ):
            first = remote.write(0, view(b"one"))
            second = remote.write(3, view(b"two"))
            for _ in range(10):
                await asyncio.sleep(0)
            assert memory.data[:6] == bytes(6)
            remote.unplug()
            await ended(first, second)
            assert memory.data[:6] == b"onetwo"

    run(body)


def test_error_of_the_server_has_its_kind_and_sentence(tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            served(tmp_path) as (_, node, _, address),
            connected(Remote("r", address, "disk0")) as remote,
        ):
            node.fail("write", Kind.NO_SPACE)
            node.fail("read", Kind.IO)
            write, read = remote.write(512, view(b"data")), remote.read(0, room(4)[1])
            remote.unplug()
            await ended(write, read)
            assert failure(write).kind is Kind.NO_SPACE
            assert "WRITE with ENOSPC: " in failure(write).detail
            assert (failure(write).offset, failure(write).length) == (512, 4)
            assert failure(read).kind is Kind.IO
            assert remote.state is State.CONNECTED

    run(body)


def test_requests_wait_for_a_server_that_comes_back_and_are_sent_again_in_order(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with served(tmp_path) as (server, node, memory, address):
            slow = node.delay("write")
            remote = Remote("r", address, "disk0", reconnect_delay=20, on_state=states)
            async with connected(remote):
                early = [remote.write(n * 512, view(bytes([n + 1]) * 1024)) for n in range(8)]
                remote.unplug()
                while not slow.held:
                    await asyncio.sleep(0)
                removal = asyncio.ensure_future(server.remove("disk0"))
                assert "closed the connection" in await states.until(State.WAITING)
                assert not any(pending.done for pending in early if pending)
                late = remote.write(512, view(b"last"))
                remote.unplug()
                assert remote.in_flight == 9
                slow.cancel()
                slow.release()
                await removal
                memory.data[:] = bytes(LENGTH)
                server.add(Export("disk0", node))
                await states.until(State.CONNECTED)
                await ended(*early, late)
                expected = bytearray(9 * 512)
                for n in range(8):
                    expected[n * 512 : n * 512 + 1024] = bytes([n + 1]) * 1024
                expected[512:516] = b"last"
                assert memory.data[: 9 * 512] == expected

    run(body)


def test_requests_fail_when_the_server_stays_away_and_work_when_it_is_back(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with served(tmp_path) as (server, node, memory, address):
            remote = Remote("r", address, "disk0", reconnect_delay=0.05, on_state=states)
            async with connected(remote):
                slow = node.delay("flush")
                waiting = remote.flush()
                remote.unplug()
                while not slow.held:
                    await asyncio.sleep(0)
                slow.cancel()
                slow.release()
                await server.remove("disk0")
                await states.until(State.WAITING)
                await states.until(State.LOST)
                assert failure(waiting).kind is Kind.PEER_LOST
                with pytest.raises(Error) as caught:
                    remote.write(0, view(b"data"))
                assert caught.value.kind is Kind.PEER_LOST
                assert remote.in_flight == 0
                server.add(Export("disk0", node))
                await states.until(State.CONNECTED)
                write = remote.write(0, view(b"data"))
                remote.unplug()
                await ended(write)
                assert memory.data[:4] == b"data"

    run(body)


def test_without_a_delay_requests_fail_at_once(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with (
            served(tmp_path) as (server, _, _, address),
            connected(Remote("r", address, "disk0", on_state=states)) as remote,
        ):
            await server.remove("disk0")
            await states.until(State.LOST)
            with pytest.raises(Error) as caught:
                remote.flush()
            assert caught.value.kind is Kind.PEER_LOST

    run(body)


def test_connection_counts_only_when_it_is_verified(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        verdicts: list[Exception | None] = [None, Error(Kind.TIMED_OUT, "no answer"), ValueError("?"), None]

        async def verify() -> None:
            verdict = verdicts.pop(0)
            if verdict is not None:
                raise verdict

        async with served(tmp_path) as (server, node, _, address):
            remote = Remote("r", address, "disk0", reconnect_delay=20, verify=verify, on_state=states)
            async with connected(remote):
                await server.remove("disk0")
                await states.until(State.WAITING)
                flush = remote.flush()
                server.add(Export("disk0", node))
                await states.until(State.WAITING, "no answer")
                await states.until(State.WAITING, "could not be verified: ValueError")
                await states.until(State.CONNECTED)
                await ended(flush)
                assert flush is not None
                assert flush.error is None

    run(body)


def test_open_fails_when_it_is_not_verified(tmp_path: Path) -> None:
    async def verify() -> None:
        raise Error(Kind.CONFLICT, "epoch 7, not 6")

    async def body() -> None:
        async with served(tmp_path) as (server, _, _, address):
            remote = Remote("r", address, "disk0", verify=verify)
            with pytest.raises(Error, match="epoch 7") as caught:
                await remote.open()
            assert caught.value.kind is Kind.CONFLICT
            while server.connections:
                await asyncio.sleep(0)

    run(body)


def test_server_that_comes_back_with_another_disk_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with (
            served(tmp_path) as (server, node, _, address),
            connected(Remote("r", address, "disk0", on_state=states)),
        ):
            await server.remove("disk0")
            await states.until(State.LOST)
            server.add(Export("disk0", Memory(LENGTH - 512)))
            await states.until(State.LOST, f"{LENGTH - 512} bytes; it must have {LENGTH}")
            await server.remove("disk0")
            server.add(Export("disk0", node, read_only=True))
            await states.until(State.LOST, "read-only")

    run(body)


def test_close_fails_what_waits(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as (_, node, _, address):
            slow = node.delay("flush")
            remote = Remote("r", address, "disk0", reconnect_delay=20)
            await remote.open()
            flush = remote.flush()
            remote.unplug()
            while not slow.held:
                await asyncio.sleep(0)
            gathered = remote.write(0, view(b"x"))
            remote.close()
            remote.close()
            await remote.wait_closed()
            assert failure(flush).kind is Kind.CANCELLED
            assert failure(gathered).kind is Kind.CANCELLED
            assert remote.in_flight == 0
            with pytest.raises(Error) as caught:
                remote.flush()
            assert caught.value.kind is Kind.INVALID_STATE
            slow.release()

    run(body)


def test_close_while_the_connection_is_lost(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with served(tmp_path) as (server, _, _, address):
            remote = Remote("r", address, "disk0", reconnect_delay=20, on_state=states)
            await remote.open()
            await server.remove("disk0")
            await states.until(State.WAITING)
            flush = remote.flush()
            remote.close()
            await remote.wait_closed()
            assert failure(flush).kind is Kind.CANCELLED
            assert remote.state is State.CLOSED

    run(body)


# Opening what is not there

OPENING: dict[str, tuple[dict[str, Any], str, Kind, str]] = {
    "missing export": ({}, "disk9", Kind.NOT_FOUND, "it offers 'disk0'"),
    "other length": ({"length": 512}, "disk0", Kind.BAD_CONFIG, f"has {LENGTH} bytes; it must have 512"),
    "read-only": ({}, "view", Kind.READ_ONLY, "is read-only"),
}


@pytest.mark.parametrize("row", OPENING)
def test_open_says_what_is_wrong(tmp_path: Path, row: str) -> None:
    options, export, kind, text = OPENING[row]

    async def body() -> None:
        async with served(tmp_path) as (server, _, memory, address):
            if export == "view":
                server.add(Export("view", memory, read_only=True))
            remote = Remote("r", address, export, **options)
            with pytest.raises(Error, match=text) as caught:
                await remote.open()
            assert caught.value.kind is kind
            assert "nbd.sock" in caught.value.detail

    run(body)


def test_read_only_export_will_do_for_a_reader(tmp_path: Path) -> None:
    async def body() -> None:
        async with served(tmp_path) as (server, _, memory, address):
            memory.data[:4] = b"data"
            server.add(Export("view", memory, read_only=True))
            async with connected(Remote("r", address, "view", read_only=True)) as remote:
                data, views = room(4)
                read = remote.read(0, views)
                remote.unplug()
                await ended(read)
                assert data == b"data"

    run(body)


def test_open_without_a_server(tmp_path: Path) -> None:
    async def body() -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            for address in (Unix(str(tmp_path / "none")), Tcp("127.0.0.1", nobody.getsockname()[1])):
                with pytest.raises(Error) as caught:
                    await Remote("r", address, "disk0").open()
                assert caught.value.kind is Kind.PEER_LOST
                assert str(address) in caught.value.detail

    run(body)


def test_open_waits_for_a_server_that_starts_late(tmp_path: Path) -> None:
    async def body() -> None:
        remote = Remote("r", Unix(str(tmp_path / "nbd.sock")), "disk0", open_timeout=20)
        opening = asyncio.ensure_future(remote.open())
        while "No such file" not in remote.reason:
            await asyncio.sleep(0)
        async with served(tmp_path):
            await opening
            assert remote.state is State.CONNECTED
            remote.close()

    run(body)


def test_requests_wait_for_a_server_that_is_opened_later(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        remote = Remote(
            "r", Unix(str(tmp_path / "nbd.sock")), "disk0", length=LENGTH, reconnect_delay=20, on_state=states
        )
        remote.open_later()
        calls = [remote.write(0, view(b"data"), True), remote.zero(2, 1), remote.flush()]
        remote.unplug()
        await states.until(State.WAITING, "No such file")
        async with served(tmp_path) as (_, _, memory, _):
            await states.until(State.CONNECTED)
            for call in calls:
                assert call is not None
                await call.wait()
            assert memory.data[:4] == b"da\0a"
            remote.close()
            await remote.wait_closed()

    run(body)


def test_requests_fail_when_the_server_opened_later_stays_away(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        remote = Remote("r", Unix(str(tmp_path / "none")), "disk0", length=LENGTH, on_state=states)
        remote.open_later()
        await states.until(State.LOST)
        with pytest.raises(Error) as caught:
            remote.flush()
        assert caught.value.kind is Kind.PEER_LOST
        remote.close()
        await remote.wait_closed()

    run(body)


@pytest.mark.parametrize("flags", [ALL, Flag.HAS_FLAGS | Flag.SEND_FLUSH], ids=["all", "only flush"])
def test_requests_before_the_first_connection_become_what_the_server_can_do(
    tmp_path: Path, flags: int
) -> None:
    """Issue section 6: a trim before the link is up was dropped, and a zero was written as data."""

    async def body() -> None:
        script = Script(tmp_path, Offer("disk0", LENGTH, flags))
        async with await asyncio.start_unix_server(script.accept, script.path):
            remote = Remote("r", Unix(script.path), "disk0", length=LENGTH, reconnect_delay=20)
            remote.open_later()
            trim, zero = remote.discard(0, 512), remote.zero(512, 512, True)
            peer = await script.peers.get()
            asked = []
            for _ in range(3):
                found, command, cookie, offset, length = await peer.request()
                if command == Command.WRITE:
                    assert await peer.reader.readexactly(length) == bytes(length)
                asked.append((command, found, offset, length))
                peer.say(transmission.simple_reply(cookie))
            owed = (Command.FLUSH, 0, 0, 0)
            if flags == ALL:
                trims = (Command.TRIM, 0, 0, 512)
                assert asked == [owed, trims, (Command.WRITE_ZEROES, CommandFlag.FUA, 512, 512)]
            else:
                assert asked == [owed, (Command.WRITE, 0, 512, 512), (Command.FLUSH, 0, 0, 0)]
            for call in (trim, zero):
                assert call is not None
                await call.wait()
            remote.close()
            await remote.wait_closed()
            for writer in script.writers:
                writer.close()

    run(body)


# Over a server that follows a script


class Peer:
    """One connection of a scripted server, after the handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> tuple[int, int, int, int, int]:
        """Flags, command, cookie, offset and length of the next request."""
        data = bytearray(await self.reader.readexactly(transmission.REQUEST_SIZE))
        parsed = transmission.parse_request(data, 0, len(data))
        assert parsed is not None
        return parsed

    async def write(self) -> tuple[int, int, bytes]:
        """Cookie, offset and data of the next request, a write."""
        _, command, cookie, offset, length = await self.request()
        assert command == Command.WRITE
        return cookie, offset, await self.reader.readexactly(length)

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def silence(self) -> bool:
        """Whether the client has sent nothing more by now."""
        for _ in range(20):
            await asyncio.sleep(0)
        return not self.reader._buffer  # type: ignore[attr-defined]


class Script:
    """A server that shakes hands with `offer`; connections wait in `peers`."""

    def __init__(self, path: Path, offer: Offer, old: bool = False) -> None:
        self.path = str(path / "script.sock")
        self.offer = offer
        self.old = old
        self.peers: asyncio.Queue[Peer] = asyncio.Queue()
        self.writers: list[asyncio.StreamWriter] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        handshake = ServerHandshake(lambda: {self.offer.name: self.offer})
        # An old server: a newstyle that is not fixed has nothing but EXPORT_NAME.
        writer.write(b"NBDMAGICIHAVEOPT\0\0" if self.old else handshake.greeting())
        while not handshake.over:
            data = await reader.read(4096)
            if not data:
                writer.close()
                return
            writer.write(handshake.receive(data))
        self.peers.put_nowait(Peer(reader, writer))


@contextlib.asynccontextmanager
async def scripted(
    path: Path,
    flags: int = ALL,
    *,
    length: int = LENGTH,
    old: bool = False,
    maximum: int = protocol.MAX_REQUEST,
    minimum: int = 1,
    **options: Any,
) -> AsyncIterator[tuple[Remote, Peer, Script]]:
    script = Script(path, Offer("disk0", length, flags, "", minimum, minimum, maximum), old)
    listener = await asyncio.start_unix_server(script.accept, script.path)
    try:
        async with connected(Remote("r", Unix(script.path), "disk0", **options)) as remote:
            yield remote, await script.peers.get(), script
    finally:
        listener.close()
        for writer in script.writers:
            writer.close()


def data_chunk(cookie: int, offset: int, data: bytes, *, done: bool = True) -> bytes:
    return transmission.chunk(cookie, Chunk.OFFSET_DATA, offset.to_bytes(8) + data, done=done)


def test_replies_in_any_order_and_in_pieces(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path) as (remote, peer, _):
            first, views1 = room(8)
            second, views2 = room(8)
            reads = remote.read(0, views1), remote.read(100, views2)
            remote.unplug()
            one, two = (await peer.request())[2], (await peer.request())[2]
            hole = transmission.chunk(two, Chunk.OFFSET_HOLE, struct.pack(">QI", 102, 2), done=False)
            second[:] = b"x" * 8
            replies = (
                data_chunk(two, 104, b"TWO!", done=False)
                + data_chunk(one, 0, b"all of 1")
                + hole
                + data_chunk(two, 100, b"ab", done=False)
                + transmission.chunk(two, Chunk.NONE)
            )
            for at in range(len(replies)):
                peer.say(replies[at : at + 1])
                await asyncio.sleep(0)
            await ended(*reads)
            assert (first, second) == (b"all of 1", b"ab\0\0TWO!")

    run(body)


@pytest.mark.parametrize("old", [False, True], ids=["structured", "simple"])
def test_long_reads_are_received_where_they_belong(tmp_path: Path, old: bool) -> None:
    async def body() -> None:
        async with scripted(tmp_path, old=old) as (remote, peer, _):
            content = os.urandom(LENGTH)
            parts = [bytearray(LENGTH // 4) for _ in range(4)]
            small, views = room(3)
            reads = remote.read(0, [memoryview(p) for p in parts]), remote.read(0, views)
            remote.unplug()
            one, two = (await peer.request())[2], (await peer.request())[2]
            if old:
                peer.say(transmission.simple_reply(one) + content + transmission.simple_reply(two) + b"abc")
            else:
                peer.say(data_chunk(one, 0, content) + data_chunk(two, 0, b"abc"))
            await ended(*reads)
            assert b"".join(parts) == content
            assert small == b"abc"

    run(body)


def test_long_requests_are_split_at_the_servers_maximum(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, maximum=4096) as (remote, peer, _):
            data = os.urandom(10000)
            write = remote.write(512, view(data))
            remote.unplug()
            for start in (0, 4096, 8192):
                cookie, offset, got = await peer.write()
                assert (offset, got) == (512 + start, data[start : start + 4096])
                assert write is not None
                assert not write.done
                peer.say(transmission.simple_reply(cookie))
            await ended(write)

    run(body)


def test_request_below_the_servers_minimum_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, minimum=512) as (remote, peer, _):
            for offset, length in ((256, 512), (512, 256)):
                with pytest.raises(Error) as caught:
                    remote.write(offset, view(bytes(length)))
                assert caught.value.kind is Kind.UNALIGNED
            assert await peer.silence()

    run(body)


def test_server_with_nothing_but_flush(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, Flag.HAS_FLAGS | Flag.SEND_FLUSH) as (remote, peer, _):
            discard = remote.discard(0, 4096)
            zero = remote.zero(4096, 512, True, True)
            remote.unplug()
            assert discard is not None
            assert discard.done
            cookie, offset, data = await peer.write()
            assert (offset, data) == (4096, bytes(512))
            peer.say(transmission.simple_reply(cookie))
            flags, command, cookie, _, _ = await peer.request()
            assert (flags, command) == (0, Command.FLUSH)
            assert zero is not None
            assert not zero.done
            peer.say(transmission.error_chunk(cookie, 5, "the disk died"))
            await ended(zero)
            assert "the disk died" in failure(zero).detail
            assert remote.in_flight == 0

    run(body)


def test_server_without_flush(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, Flag.HAS_FLAGS) as (remote, peer, _):
            flush = remote.flush()
            write = remote.write(0, view(b"data"), True)
            remote.unplug()
            assert flush is not None
            assert flush.done
            peer.say(transmission.simple_reply((await peer.write())[0]))
            await ended(write)
            assert await peer.silence()

    run(body)


def test_flags_of_zeroes(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path) as (remote, peer, _):
            zero, discard = remote.zero(0, 512, True, False), remote.discard(512, 512)
            remote.unplug()
            flags, command, cookie, *where = await peer.request()
            assert (flags, command) == (CommandFlag.FUA | CommandFlag.NO_HOLE, Command.WRITE_ZEROES)
            assert where == [0, 512]
            peer.say(transmission.simple_reply(cookie))
            flags, command, cookie, *where = await peer.request()
            assert (flags, command, where) == (0, Command.TRIM, [512, 512])
            peer.say(transmission.simple_reply(cookie))
            await ended(zero, discard)

    run(body)


def test_overlapping_writes_are_not_in_flight_together(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path) as (remote, peer, _):
            first = remote.write(0, view(bytes(1024)))
            beside = remote.write(1024, view(bytes(512)))
            over = remote.write(512, view(b"x" * 1024))
            remote.unplug()
            one, two = await peer.write(), await peer.write()
            assert [one[1], two[1]] == [0, 1024]
            assert await peer.silence()
            peer.say(transmission.simple_reply(one[0]))
            await ended(first)
            assert await peer.silence()
            peer.say(transmission.simple_reply(two[0]))
            await ended(beside)
            three = await peer.write()
            assert three[1] == 512
            peer.say(transmission.simple_reply(three[0]))
            await ended(over)

    run(body)


def test_requests_in_flight_are_limited(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, max_in_flight=2) as (remote, peer, _):
            flushes = [remote.flush() for _ in range(3)]
            remote.unplug()
            cookies = [(await peer.request())[2] for _ in range(2)]
            assert await peer.silence()
            peer.say(transmission.simple_reply(cookies[1]))
            cookies.append((await peer.request())[2])
            peer.say(transmission.simple_reply(cookies[2]) + transmission.simple_reply(cookies[0]))
            await ended(*flushes)

    run(body)


TiB = 1 << 40


async def span(peer: Peer, command: Command) -> tuple[int, int, int]:
    """Cookie, offset and length of the next request, a long one."""
    _, asked, cookie, offset, length = await peer.request()
    assert asked == command
    assert length <= SPAN
    return cookie, offset, length


def test_zero_of_a_whole_disk_goes_in_spans_and_others_pass_by(tmp_path: Path) -> None:
    """A4."""

    async def body() -> None:
        async with scripted(tmp_path, length=16 * TiB) as (remote, peer, _):
            zero = remote.zero(0, 16 * TiB - 512)
            beside, over = remote.write(16 * TiB - 512, view(bytes(512))), remote.write(0, view(bytes(512)))
            assert remote.in_flight == 3
            remote.unplug()
            cookie, offset, length = await span(peer, Command.WRITE_ZEROES)
            assert (offset, length) == (0, SPAN)
            passed = await peer.write()
            assert passed[1] == 16 * TiB - 512
            assert await peer.silence()
            peer.say(transmission.simple_reply(passed[0]))
            await ended(beside)
            for number in range(1, 20):
                peer.say(transmission.simple_reply(cookie))
                cookie, offset, length = await span(peer, Command.WRITE_ZEROES)
                assert (offset, length) == (number * SPAN, SPAN)
            assert zero is not None
            assert over is not None
            assert not zero.done
            assert not over.done

    run(body)


def test_many_discards_are_under_way_only_as_far_as_their_bytes_allow(tmp_path: Path) -> None:
    """A4: 32 UNMAPs of 32 MiB were one gibibyte at once."""

    async def body() -> None:
        async with scripted(tmp_path, length=TiB) as (remote, peer, _):
            calls = [remote.discard(n * 2 * SPAN, 2 * SPAN) for n in range(4)]
            calls += [remote.discard((100 + n) * SPAN, 4096) for n in range(10)]
            remote.unplug()
            asked = []
            for _ in range(18):
                cookie, offset, length = await span(peer, Command.TRIM)
                if length == SPAN:
                    assert await peer.silence()
                asked.append((offset, length))
                peer.say(transmission.simple_reply(cookie))
            await ended(*calls)
            expected = [(n * SPAN, SPAN) for n in range(8)] + [((100 + n) * SPAN, 4096) for n in range(10)]
            assert asked == expected
            assert (remote.in_flight, remote.in_flight_bytes) == (0, 0)

    run(body)


def test_span_without_an_answer_is_sent_again_and_those_behind_it_follow(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, length=TiB, reconnect_delay=20) as (remote, peer, script):
            zero = remote.zero(0, 3 * SPAN)
            remote.unplug()
            peer.say(transmission.simple_reply((await span(peer, Command.WRITE_ZEROES))[0]))
            assert (await span(peer, Command.WRITE_ZEROES))[1] == SPAN
            over = remote.write(0, view(b"newer"))
            remote.unplug()
            peer.writer.close()
            peer = await script.peers.get()
            for number in (1, 2):
                cookie, offset, _ = await span(peer, Command.WRITE_ZEROES)
                assert offset == number * SPAN
                assert await peer.silence()
                peer.say(transmission.simple_reply(cookie))
            cookie, _, data = await peer.write()
            assert data == b"newer"
            assert zero is not None
            assert zero.done
            peer.say(transmission.simple_reply(cookie))
            await ended(over)

    run(body)


def test_span_that_fails_is_the_last(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, length=TiB) as (remote, peer, _):
            zero = remote.zero(0, TiB)
            remote.unplug()
            cookie, _, _ = await span(peer, Command.WRITE_ZEROES)
            peer.say(transmission.error_chunk(cookie, 28, "full"))
            await ended(zero)
            assert failure(zero).kind is Kind.NO_SPACE
            assert await peer.silence()
            assert (remote.in_flight, remote.in_flight_bytes) == (0, 0)

    run(body)


def test_long_zero_ends_with_the_connection_that_does_not_come_back(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, length=TiB, on_state=states) as (remote, peer, _):
            zero = remote.zero(0, TiB)
            remote.unplug()
            await peer.request()
            peer.writer.close()
            await states.until(State.LOST)
            assert failure(zero).kind is Kind.PEER_LOST
            assert (remote.in_flight, remote.in_flight_bytes) == (0, 0)

    run(body)


class Slow(Memory):
    """A disk that zeroes at 50 MB/s, one call after the other."""

    def __init__(self) -> None:
        super().__init__(0)
        self.length = 1 << 30
        self.free_at = 0.0

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending:
        loop, pending = asyncio.get_running_loop(), Pending()
        self.free_at = max(self.free_at, loop.time()) + length / 50e6
        loop.call_at(self.free_at, pending.complete)
        return pending


def test_long_zero_on_a_slow_server_is_no_silence(tmp_path: Path) -> None:
    """A4: 100 MiB at 50 MB/s take 2 s, and so did the answer to all of them."""

    async def body() -> None:
        server = Server([Export("disk0", Slow())])
        address = Unix(str(tmp_path / "nbd.sock"))
        await server.listen_unix(address.path)
        async with connected(Remote("r", address, "disk0", timeout=1.5)) as remote:
            zero = remote.zero(0, 100 * MiB)
            remote.unplug()
            assert zero is not None
            await zero.wait()
        await server.close()

    run(body)


def test_server_that_answers_others_is_not_silent(tmp_path: Path) -> None:
    """A4: any sign of life counts; and for a call that is never answered there is an end all the same."""

    async def body() -> None:
        states = States()
        async with scripted(tmp_path, timeout=1, on_state=states) as (remote, peer, _):
            stuck = remote.flush()
            remote.unplug()
            await peer.request()
            answered = 0
            while not stuck or not stuck.done:
                beside = remote.flush()
                remote.unplug()
                try:
                    peer.say(transmission.simple_reply((await peer.request())[2]))
                    answered += 1
                except asyncio.IncompleteReadError:
                    await ended(beside)
                    break
                await ended(beside)
                await asyncio.sleep(0.05)
            assert "no answer for 4 s" in await states.until(State.LOST)
            assert answered > 1

    run(body)


def test_flush_that_the_server_did_not_get_is_the_first_request_when_it_is_back(tmp_path: Path) -> None:
    """Issue section 6: a flush while the link is lost."""

    async def body() -> None:
        states = States()
        async with scripted(tmp_path, on_state=states) as (remote, peer, script):
            peer.writer.close()
            await states.until(State.LOST)
            with pytest.raises(Error):
                remote.flush()
            assert remote.flush_owed
            await states.until(State.CONNECTED)
            write = remote.write(0, view(b"data"))
            remote.unplug()
            peer = await script.peers.get()
            _, command, cookie, _, _ = await peer.request()
            assert command == Command.FLUSH
            peer.say(transmission.simple_reply((await peer.write())[0]))
            await ended(write)
            assert remote.flush_owed
            peer.say(transmission.simple_reply(cookie))
            again = remote.flush()
            remote.unplug()
            peer.say(transmission.simple_reply((await peer.request())[2]))
            await ended(again)
            assert not remote.flush_owed

    run(body)


def test_server_that_fails_the_flush_that_it_was_owed_is_lost_again(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, on_state=states) as (remote, peer, script):
            peer.writer.close()
            await states.until(State.CONNECTED)
            await states.until(State.CONNECTED)
            peer = await script.peers.get()
            peer.say(transmission.error_chunk((await peer.request())[2], 5, "no medium"))
            await states.until(State.LOST, "no medium")
            assert remote.flush_owed

    run(body)


LIES = {
    "reply without magic": lambda cookie: bytes(16),
    "unknown cookie": lambda cookie: transmission.simple_reply(cookie + 1),
    "simple reply to a read": lambda cookie: transmission.simple_reply(cookie) + bytes(512),
    "unknown cookie of a chunk": lambda cookie: data_chunk(cookie + 1, 0, bytes(512)),
    "data before the range": lambda cookie: data_chunk(cookie, 4095, bytes(512)),
    "data behind the range": lambda cookie: data_chunk(cookie, 4096, bytes(513)),
    "data chunk without data": lambda cookie: data_chunk(cookie, 4096, b""),
    "data chunk without an offset": lambda cookie: transmission.chunk(cookie, Chunk.OFFSET_DATA, bytes(4)),
    "data with a gap": lambda cookie: data_chunk(cookie, 4097, bytes(511)),
    "data too short": lambda cookie: data_chunk(cookie, 4096, bytes(511)),
    "data twice": lambda cookie: (
        data_chunk(cookie, 4096, bytes(512), done=False) + data_chunk(cookie, 4096, bytes(512))
    ),
    "data without an end": lambda cookie: data_chunk(cookie, 4096, bytes(512), done=False) * 2,
    "holes without an end": lambda cookie: (
        2 * transmission.chunk(cookie, Chunk.OFFSET_HOLE, struct.pack(">QI", 4096, 512), done=False)
    ),
    "no data": lambda cookie: transmission.chunk(cookie, Chunk.NONE),
    "hole outside": lambda cookie: transmission.chunk(cookie, Chunk.OFFSET_HOLE, struct.pack(">QI", 0, 512)),
    "block status": lambda cookie: transmission.status_chunk(cookie, 1, [(512, 0)]),
    "unknown chunk": lambda cookie: transmission.chunk(cookie, Chunk(5), bytes(4)),
    "none with a payload": lambda cookie: transmission.chunk(cookie, Chunk.NONE, b"x"),
    "error chunk without an error": lambda cookie: transmission.error_chunk(cookie, 0, ""),
}


@pytest.mark.parametrize("row", LIES)
def test_lying_server_is_hung_up_on(tmp_path: Path, row: str) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, on_state=states) as (remote, peer, _):
            read = remote.read(4096, room(512)[1])
            remote.unplug()
            peer.say(LIES[row]((await peer.request())[2]))
            await states.until(State.LOST)
            assert failure(read).kind is Kind.PEER_LIED
            assert remote.in_flight == 0
            assert await peer.reader.read() == b""

    run(body)


@pytest.mark.parametrize("answer", ["data", "hole"])
def test_data_for_a_write_is_a_lie(tmp_path: Path, answer: str) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, on_state=states) as (remote, peer, _):
            write = remote.write(0, view(bytes(512)))
            remote.unplug()
            cookie, _, _ = await peer.write()
            hole = transmission.chunk(cookie, Chunk.OFFSET_HOLE, struct.pack(">QI", 0, 512))
            peer.say(data_chunk(cookie, 0, bytes(512)) if answer == "data" else hole)
            await states.until(State.LOST)
            assert failure(write).kind is Kind.PEER_LIED

    run(body)


def test_structured_reply_that_was_not_agreed_is_a_lie(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, old=True, on_state=states) as (remote, peer, _):
            read = remote.read(0, room(4)[1])
            remote.unplug()
            peer.say(data_chunk((await peer.request())[2], 0, b"data"))
            await states.until(State.LOST)
            assert failure(read).kind is Kind.PEER_LIED

    run(body)


def test_no_server_of_nbd(tmp_path: Path) -> None:
    async def body() -> None:
        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example.org ESMTP\r\n")
            writer.close()

        path = str(tmp_path / "smtp.sock")
        async with await asyncio.start_unix_server(accept, path):
            with pytest.raises(Error, match="no NBD server: it greeted with b'220 mail") as caught:
                await Remote("r", Unix(path), "disk0").open()
            assert caught.value.kind is Kind.PEER_LIED

    run(body)


def test_server_that_is_silent_in_the_handshake(tmp_path: Path) -> None:
    async def body() -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(tmp_path / "silent.sock"))
            silent.listen()
            remote = Remote("r", Unix(str(tmp_path / "silent.sock")), "disk0", timeout=0.05)
            with pytest.raises(Error, match=r"no answer in 0.05 s") as caught:
                await remote.open()
            assert caught.value.kind is Kind.PEER_LOST

    run(body)


def test_frozen_server_is_lost(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, timeout=0.5, on_state=states) as (remote, peer, _):
            flush = remote.flush()
            remote.unplug()
            await peer.request()
            assert "no answer for 0.5 s" in await states.until(State.LOST)
            assert failure(flush).kind is Kind.PEER_LOST

    run(body)


def test_frozen_server_that_does_not_even_receive_is_lost(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, timeout=0.5, on_state=states) as (remote, peer, _):
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            writes = [remote.write(0, view(bytes(MiB))) for _ in range(4)]
            remote.unplug()
            assert "no answer for 0.5 s" in await states.until(State.LOST)
            assert [failure(write).kind for write in writes] == [Kind.PEER_LOST] * 4

    run(body)


def test_idle_connection_is_not_lost(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, timeout=0.5) as (remote, peer, _):
            flush = remote.flush()
            remote.unplug()
            peer.say(transmission.simple_reply((await peer.request())[2]))
            await ended(flush)
            # What is awaited is that nothing happens, for longer than the limit.
            await asyncio.sleep(0.7)
            assert remote.state is State.CONNECTED

    run(body)


def test_server_that_comes_back_and_never_answers_gains_no_new_delay(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        options: dict[str, Any] = {"timeout": 2, "reconnect_delay": 1.9, "on_state": states}
        async with scripted(tmp_path, **options) as (remote, _, _):
            flush = remote.flush()
            remote.unplug()
            await states.until(State.WAITING)
            await states.until(State.CONNECTED)
            await states.until(State.LOST)
            assert failure(flush).kind is Kind.PEER_LOST

    run(body)


def test_reply_that_was_cut_off_is_begun_anew(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, reconnect_delay=20) as (remote, peer, script):
            data, views = room(256 * KiB)
            read = remote.read(0, views)
            remote.unplug()
            cookie = (await peer.request())[2]
            peer.say(data_chunk(cookie, 0, b"a" * 256 * KiB)[: 100 * KiB])
            await peer.writer.drain()
            peer.writer.close()
            peer = await script.peers.get()
            cookie = (await peer.request())[2]
            peer.say(data_chunk(cookie, 0, b"b" * 256 * KiB))
            await ended(read)
            assert data == b"b" * 256 * KiB

    run(body)


def test_what_was_not_answered_is_sent_again_first_and_in_its_order(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, reconnect_delay=20) as (remote, peer, script):
            writes = [remote.write(offset, view(bytes(512))) for offset in (4096, 0, 8192, 1024)]
            remote.unplug()
            cookies = [(await peer.write())[0] for _ in writes]
            writes.append(remote.write(2048, view(bytes(512))))
            peer.say(transmission.simple_reply(cookies[1]))
            await ended(writes[1])
            peer.writer.close()
            peer = await script.peers.get()
            for expected in (4096, 8192, 1024, 2048):
                cookie, offset, _ = await peer.write()
                assert offset == expected
                peer.say(transmission.simple_reply(cookie))
            await ended(*writes)

    run(body)


def test_server_that_comes_back_with_less_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, on_state=states) as (_, peer, script):
            script.offer = script.offer._replace(flags=Flag.HAS_FLAGS)
            peer.writer.close()
            await states.until(State.LOST, "SEND_FLUSH|SEND_FUA|SEND_TRIM|SEND_WRITE_ZEROES")

    run(body)


def test_half_closed_server_is_lost(tmp_path: Path) -> None:
    async def body() -> None:
        states = States()
        async with scripted(tmp_path, on_state=states) as (_, peer, _):
            peer.writer.write_eof()
            await states.until(State.LOST, "closed the connection")

    run(body)


def test_block_status_is_merged_and_cut(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path) as (remote, peer, _):
            status = remote.block_status(0, 4096)
            remote.unplug()
            _, command, cookie, offset, length = await peer.request()
            assert (command, offset, length) == (Command.BLOCK_STATUS, 0, 4096)
            peer.say(transmission.status_chunk(cookie, 1, [(1024, 0), (512, 4), (512, 3), (1 << 20, 2)]))
            assert await status.wait() == [
                Extent(1536, True, False),
                Extent(512, False, True),
                Extent(2048, True, True),
            ]

    run(body)


def test_block_status_of_a_server_without_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with scripted(tmp_path, old=True) as (remote, _, _):
            status = remote.block_status(0, 4096)
            remote.unplug()
            assert status.value == [Extent(4096, True, False)]
            assert remote.extents(0, 4096) == [Extent(4096, True, False)]
            with pytest.raises(Error) as caught:
                remote.fetch(0, 512)
            assert caught.value.kind is Kind.UNSUPPORTED

    run(body)


def test_request_before_open_is_refused() -> None:
    with pytest.raises(Error) as caught:
        Remote("r", Unix("/nowhere"), "disk0").read(0, room(1)[1])
    assert caught.value.kind is Kind.INVALID_STATE


def test_ranges_take_only_what_does_not_overlap() -> None:
    ranges = Ranges()
    assert ranges.add(100, 50)
    assert ranges.add(150, 10)
    assert ranges.add(0, 100)
    for offset, length in ((0, 1), (99, 2), (149, 1), (90, 1000), (159, 10), (120, 5)):
        assert not ranges.add(offset, length)
    ranges.remove(100)
    assert ranges.add(110, 40)
    assert not ranges.add(100, 11)
    assert ranges.add(100, 10)


def test_extents_end_with_the_range() -> None:
    assert extents_of([(512, 0), (512, 0), (4096, 3)], 2048) == [
        Extent(1024, True, False),
        Extent(1024, False, True),
    ]
    assert extents_of([(4096, 0), (4096, 3)], 1024) == [Extent(1024, True, False)]


class Late(Memory):
    """A disk that does its writes some turns of the loop later, in an order of its own."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(LENGTH)
        self.rng = rng
        self.under_way = 0

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending:
        pending = Pending()
        self.under_way += 1

        def turn(left: int) -> None:
            if left:
                asyncio.get_running_loop().call_soon(turn, left - 1)
            else:
                Memory.write(self, offset, buffers, fua)
                self.under_way -= 1
                pending.complete()

        turn(self.rng.choice((1, 5, 20, 300)))
        return pending


@pytest.mark.parametrize("seed", range(6))
def test_overlapping_writes_keep_their_order_over_lost_connections(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)

    async def body() -> None:
        disk = Late(rng)
        model = bytearray(LENGTH)
        server = Server([Export("disk0", disk, exclusive=True)])
        address = Unix(str(tmp_path / "nbd.sock"))
        await server.listen_unix(address.path)
        lost = 0
        async with connected(Remote("r", address, "disk0", reconnect_delay=20)) as remote:
            pendings = []
            for number in range(1500):
                length = rng.randrange(1, 3000)
                offset = rng.randrange(16384)
                data = rng.randbytes(length)
                model[offset : offset + length] = data
                pendings.append(remote.write(offset, view(data)))
                if rng.random() < 0.1:
                    remote.unplug()
                    for _ in range(rng.randrange(20)):
                        await asyncio.sleep(0)
                if number % 250 == 249:
                    for connection in list(server._connections):
                        lost += not connection.closed
                        connection.abort()
            remote.unplug()
            for pending in pendings:
                assert pending is not None
                await pending.wait()
            while disk.under_way:
                await asyncio.sleep(0)
            assert disk.data == model
            assert lost
        await server.close()

    run(body)
