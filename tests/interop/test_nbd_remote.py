"""Our NBD client, the remote disk, with other people's servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block.node import Extent
from tcmu_replication.block.pending import Pending
from tcmu_replication.block.remote import Remote, State
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.uri import Address, Tcp, Unix
from tcmu_replication.units import KiB, MiB
from tests.support import tools
from tests.support.processes import free_port
from tests.support.tools import PATIENCE_S, requires

pytestmark = pytest.mark.interop

LENGTH = 8 * MiB


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await body()

    asyncio.run(main())


def nbdkit(path: Path, *arguments: str) -> contextlib.AbstractAsyncContextManager[Any]:
    """nbdkit on path/nbd.sock."""
    where = path / "nbd.sock"
    return tools.server("nbdkit", "--foreground", "--unix", str(where), *arguments, socket=where)


def qemu_nbd(path: Path) -> contextlib.AbstractAsyncContextManager[Any]:
    """qemu-nbd of path/disk.img on path/nbd.sock; a socket of an earlier one is removed."""
    where, image = path / "nbd.sock", path / "disk.img"
    where.unlink(missing_ok=True)
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(LENGTH)
    return tools.server(
        "qemu-nbd",
        "-t",
        "-f",
        "raw",
        "--discard=unmap",
        "-k",
        str(where),
        "-x",
        "disk0",
        str(image),
        socket=where,
    )


@contextlib.asynccontextmanager
async def opened(address: Address, export: str = "", **options: Any) -> AsyncIterator[Remote]:
    remote = Remote("r", address, export, length=LENGTH, open_timeout=PATIENCE_S, **options)
    await remote.open()
    try:
        yield remote
    finally:
        remote.close()
        await remote.wait_closed()


async def exercise(remote: Remote, rounds: int = 200) -> None:
    """Random writes, zeroes and reads, many at once, against a copy in memory."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    model = bytearray(LENGTH)
    begin = remote.zero(0, LENGTH)
    remote.unplug()
    assert begin is not None
    await begin.wait()
    for _ in range(rounds):
        pendings: list[Pending | None] = []
        for _ in range(rng.randrange(1, 16)):
            length = rng.choice([512, 4096, 64 * KiB, rng.randrange(1, 1000) * 512])
            offset = rng.randrange((LENGTH - length) // 512 + 1) * 512
            if rng.random() < 0.8:
                data = rng.randbytes(length)
                cut = rng.randrange(length)
                views = [memoryview(data)[:cut], memoryview(data)[cut:]]
                pendings.append(remote.write(offset, views, rng.random() < 0.1))
                model[offset : offset + length] = data
            else:
                pendings.append(remote.zero(offset, length, False, rng.random() < 0.5))
                model[offset : offset + length] = bytes(length)
        remote.unplug()
        for pending in pendings:
            if pending is not None:
                await pending.wait()
    got = bytearray(LENGTH)
    reads = [remote.read(at, [memoryview(got)[at : at + 64 * KiB]]) for at in range(0, LENGTH, 64 * KiB)]
    flush = remote.flush()
    remote.unplug()
    for pending in (*reads, flush):
        if pending is not None:
            await pending.wait()
    assert got == model


SERVERS = {
    "nbdkit memory": ("memory", str(LENGTH)),
    "nbdkit without structured replies": ("--no-sr", "memory", str(LENGTH)),
    "nbdkit that answers late": ("--filter=delay", "memory", str(LENGTH), "rdelay=2ms", "wdelay=1ms"),
    "nbdkit without zeroes and FUA": (
        "--filter=nozero",
        "--filter=fua",
        "memory",
        str(LENGTH),
        "fuamode=discard",
    ),
    "nbdkit with small requests": (
        "--filter=blocksize-policy",
        "memory",
        str(LENGTH),
        "blocksize-minimum=512",
        "blocksize-preferred=4096",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
    ),
    "nbdkit of the old newstyle": ("--mask-handshake=0", "memory", str(LENGTH)),
}


@requires("nbdkit")
@pytest.mark.parametrize("row", SERVERS)
def test_remote_over_nbdkit(tmp_path: Path, row: str) -> None:
    async def body() -> None:
        async with (
            nbdkit(tmp_path, *SERVERS[row]),
            opened(Unix(str(tmp_path / "nbd.sock"))) as remote,
        ):
            await exercise(remote, 20 if "late" in row else 100)

    run(body)


@requires("nbdkit")
def test_remote_over_nbdkit_over_tcp(tmp_path: Path) -> None:
    async def body() -> None:
        port = free_port()
        pid = tmp_path / "pid"
        command = (
            "nbdkit",
            "--foreground",
            "-i",
            "127.0.0.1",
            "-p",
            str(port),
            "-P",
            str(pid),
            "memory",
            str(LENGTH),
        )
        async with tools.server(*command, socket=pid), opened(Tcp("127.0.0.1", port)) as remote:
            await exercise(remote)

    run(body)


@requires("nbdkit")
def test_remote_over_an_nbdkit_that_fails(tmp_path: Path) -> None:
    async def body() -> None:
        failing = ("--filter=error", "memory", str(LENGTH), "error=ENOSPC", "error-rate=100%")
        async with nbdkit(tmp_path, *failing), opened(Unix(str(tmp_path / "nbd.sock"))) as remote:
            calls = [
                remote.write(0, [memoryview(bytes(4096))]),
                remote.read(0, [memoryview(bytearray(4096))]),
                remote.zero(0, 4096),
            ]
            remote.unplug()
            for call in calls:
                assert call is not None
                with pytest.raises(Error) as caught:
                    await call.wait()
                assert caught.value.kind is Kind.NO_SPACE
            assert remote.state is State.CONNECTED

    run(body)


@requires("qemu-nbd")
def test_remote_over_qemu_nbd(tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            qemu_nbd(tmp_path),
            opened(Unix(str(tmp_path / "nbd.sock")), "disk0") as remote,
        ):
            await exercise(remote)
            zero = remote.zero(0, LENGTH, False, True)
            write = remote.write(MiB, [memoryview(os.urandom(64 * KiB))])
            remote.unplug()
            assert zero is not None
            assert write is not None
            await zero.wait()
            await write.wait()
            status = remote.block_status(MiB, LENGTH - MiB)
            remote.unplug()
            assert (await status.wait())[0] == Extent(64 * KiB, True, False)

    run(body)


@requires("qemu-nbd")
def test_remote_names_what_qemu_nbd_exports(tmp_path: Path) -> None:
    async def body() -> None:
        async with qemu_nbd(tmp_path):
            with pytest.raises(Error, match="no export 'disk1'; it offers 'disk0'"):
                async with opened(Unix(str(tmp_path / "nbd.sock")), "disk1"):
                    pass

    run(body)


@requires("qemu-nbd")
def test_qemu_nbd_killed_and_back_loses_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        states: asyncio.Queue[State] = asyncio.Queue()
        address = Unix(str(tmp_path / "nbd.sock"))
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(qemu_nbd(tmp_path))
            remote = await stack.enter_async_context(
                opened(
                    address,
                    "disk0",
                    reconnect_delay=PATIENCE_S,
                    on_state=lambda state, _: states.put_nowait(state),
                )
            )
            model = bytearray(LENGTH)
            pendings = []
            for number in range(1, 1500):
                offset = random.randrange(LENGTH // 512 - 8) * 512
                data = bytes([number & 255]) * 4096
                model[offset : offset + 4096] = data
                pendings.append(remote.write(offset, [memoryview(data)]))
                if number % 100 == 0:
                    remote.unplug()
                    await asyncio.sleep(0)
                if number == 700:
                    first.kill()
            remote.unplug()
            while await states.get() is not State.WAITING:
                pass
            await first.wait()
            await stack.enter_async_context(qemu_nbd(tmp_path))
            for pending in pendings:
                assert pending is not None
                await pending.wait()
            assert (tmp_path / "disk.img").read_bytes() == model

    run(body)


@requires("qemu-nbd")
def test_frozen_qemu_nbd_is_lost_and_comes_back(tmp_path: Path) -> None:
    async def body() -> None:
        states: asyncio.Queue[State] = asyncio.Queue()
        async with qemu_nbd(tmp_path) as process:
            address = Unix(str(tmp_path / "nbd.sock"))
            async with opened(
                address, "disk0", timeout=4, on_state=lambda state, _: states.put_nowait(state)
            ) as remote:
                process.send_signal(signal.SIGSTOP)
                write = remote.write(0, [memoryview(b"data")])
                remote.unplug()
                assert write is not None
                with pytest.raises(Error, match="no answer for 4 s") as caught:
                    await write.wait()
                assert caught.value.kind is Kind.PEER_LOST
                assert remote.state is State.LOST
                process.send_signal(signal.SIGCONT)
                while await states.get() is not State.CONNECTED or remote.state is not State.CONNECTED:
                    pass
                write = remote.write(0, [memoryview(b"data")])
                remote.unplug()
                assert write is not None
                await write.wait()

    run(body)
