"""Who is let in by a listener: address and count before a byte is read, strangers make way, exhaustion pauses."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tcmu_replication import listener as listener_module
from tcmu_replication.listener import MAX_STRANGERS, UNIX, Listener, plain_host
from tests.support.tools import PATIENCE_S


class House:
    """A listener whose clients are known by a byte "k", and are answered what they say. `met` are their names."""

    def __init__(self, allow: Callable[[str], bool] | None = None) -> None:
        self.met: list[str] = []
        self.clients: list[socket.socket] = []
        self.listener = Listener("test", self._meet, allow=allow)
        self.address: str | tuple[str, int] = ""

    async def _meet(self, sock: socket.socket, name: str) -> None:
        self.met.append(name)
        loop = asyncio.get_running_loop()
        with sock:
            while said := await loop.sock_recv(sock, 1):
                if said == b"k":
                    self.listener.known()
                await loop.sock_sendall(sock, said)

    async def client(self, source: str = "127.0.0.1") -> socket.socket:
        tcp = isinstance(self.address, tuple)
        sock = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        sock.setblocking(False)
        if tcp:
            sock.bind((source, 0))
        self.clients.append(sock)
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        return sock

    async def ask(self, sock: socket.socket, word: bytes) -> bytes:
        """What it is answered, b"" if it is hung up on."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(sock, word)
            return await loop.sock_recv(sock, 1)
        except (ConnectionResetError, BrokenPipeError):
            return b""


def live(body: Callable[[House], Awaitable[None]], house: House, path: Path | None = None) -> None:
    async def main() -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                if path is None:
                    house.address = ("127.0.0.1", await house.listener.listen_tcp("127.0.0.1", 0))
                else:
                    await house.listener.listen_unix(str(path))
                    house.address = str(path)
                await body(house)
        finally:
            for sock in house.clients:
                sock.close()
            await house.listener.close()

    asyncio.run(main())


def test_stranger_of_a_full_house_gets_in_and_the_oldest_makes_way(tmp_path: Path) -> None:
    """A7: silent clients lock nobody out."""

    async def body(it: House) -> None:
        silent = [await it.client() for _ in range(MAX_STRANGERS)]
        while it.listener.strangers < MAX_STRANGERS:
            await asyncio.sleep(0)
        newest = await it.client()
        assert await it.ask(newest, b"x") == b"x"
        assert await it.ask(silent[0], b"x") == b""
        assert await it.ask(silent[1], b"x") == b"x"
        assert it.listener.strangers == MAX_STRANGERS
        assert it.met == [UNIX] * (MAX_STRANGERS + 1)

    live(body, House(), tmp_path / "sock")


def test_known_client_never_makes_way(tmp_path: Path) -> None:
    async def body(it: House) -> None:
        known = await it.client()
        assert await it.ask(known, b"k") == b"k"
        for _ in range(2 * MAX_STRANGERS):
            await it.ask(await it.client(), b"x")
        assert await it.ask(known, b"x") == b"x"
        assert it.listener.strangers == MAX_STRANGERS

    live(body, House(), tmp_path / "sock")


def test_strangers_of_one_address_do_not_push_out_another() -> None:
    async def body(it: House) -> None:
        lonely = await it.client("127.0.0.2")
        assert await it.ask(lonely, b"x") == b"x"
        for _ in range(2 * MAX_STRANGERS):
            await it.ask(await it.client("127.0.0.3"), b"x")
        assert await it.ask(lonely, b"x") == b"x"

    live(body, House())


def test_address_is_looked_at_before_anything_is_done(caplog: pytest.LogCaptureFixture) -> None:
    async def body(it: House) -> None:
        assert await it.ask(await it.client("127.0.0.3"), b"x") == b""
        assert await it.ask(await it.client("127.0.0.2"), b"x") == b"x"
        assert it.met == ["127.0.0.2"]

    live(body, House(allow=lambda host: host == "127.0.0.2"))
    assert "test client 127.0.0.3 is not allowed here; hung up" in caplog.text


def test_end_hangs_up_on_everybody_those_included_whose_turn_never_came(tmp_path: Path) -> None:
    async def main() -> None:
        house = House()
        await house.listener.listen_unix(str(tmp_path / "sock"))
        house.address = str(tmp_path / "sock")
        served = await house.client()
        assert await house.ask(served, b"k") == b"k"
        before = len(os.listdir("/proc/self/fd"))
        await house.listener.close()
        assert len(os.listdir("/proc/self/fd")) == before - 2  # the listener, and our end of that client
        assert await house.ask(served, b"x") == b""
        assert not (tmp_path / "sock").exists()
        served.close()

    asyncio.run(main())


def test_without_descriptors_there_is_a_pause_one_line_and_then_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A5: the loop does not spin, and the log does not fill."""

    async def body(it: House) -> None:
        waiting = await it.client()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(waiting.fileno())  # the lowest number that is free
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            for _ in range(1000):
                await asyncio.sleep(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert it.met == []
        lines = [record.getMessage() for record in caplog.records]
        assert lines == ["test: accept: Too many open files; no new clients for 1 s"]
        assert await it.ask(waiting, b"x") == b"x"

    live(body, House(), tmp_path / "sock")


def test_pause_ends_with_the_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "PAUSE_S", 0.0)

    async def main() -> None:
        house = House()
        await house.listener.listen_unix(str(tmp_path / "sock"))
        house.address = str(tmp_path / "sock")
        waiting = await house.client()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(waiting.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            house.listener.stop()
            await asyncio.sleep(0.01)  # the pause would have ended
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert await house.ask(waiting, b"x") == b""
        waiting.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "plain"),
    [
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("192.0.2.1", "192.0.2.1"),
    ],
)
def test_plain_host(host: str, plain: str) -> None:
    assert plain_host(host) == plain
