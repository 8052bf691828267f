"""qemu-storage-daemon on both sides of ours, in plain text and inside of TLS."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.remote import Remote
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.nbd.uri import Tcp
from tcmu_replication.tls import Context
from tests.interop.test_nbd_remote import LENGTH, exercise
from tests.support import tools
from tests.support.certificates import Authority
from tests.support.processes import free_port
from tests.support.tools import PATIENCE_S, requires

pytestmark = [pytest.mark.interop, requires("qemu-storage-daemon", "nbdcopy", "openssl")]


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def certificates(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    if not request.param:
        return None
    return Authority(tmp_path).issue(tmp_path / "host", "localhost", "127.0.0.1")


def context(certificates: Path | None, *, server_side: bool) -> Context | None:
    if certificates is None:
        return None
    return Context(str(certificates), server_side=server_side, names=["localhost"])


def credentials(certificates: Path | None, endpoint: str) -> tuple[list[str], str]:
    """The object, and the option that names it."""
    if certificates is None:
        return [], ""
    return ["--object", f"tls-creds-x509,id=tls0,endpoint={endpoint},dir={certificates}"], ",tls-creds=tls0"


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await body()

    asyncio.run(main())


def test_it_opens_our_export_and_serves_it_again(tmp_path: Path, certificates: Path | None) -> None:
    async def body() -> None:
        node = Memory(LENGTH)
        server = Server([Export("disk0", node)], tls=context(certificates, server_side=True))
        port = await server.listen_tcp("127.0.0.1", 0)
        where, original, copy = (tmp_path / name for name in ("again.sock", "original.img", "copy.img"))
        original.write_bytes(os.urandom(LENGTH // 2) + bytes(LENGTH // 2))
        known, option = credentials(certificates, "client")
        disk = (
            f"driver=nbd,node-name=d,server.type=inet,server.host=127.0.0.1,server.port={port},export=disk0"
        )
        command = ["qemu-storage-daemon", *known, "--blockdev", disk + option]
        command += ["--nbd-server", f"addr.type=unix,addr.path={where}"]
        command += ["--export", "nbd,id=e,node-name=d,name=again,writable=on"]
        async with tools.server(*command, socket=where):
            await tools.run("nbdcopy", str(original), f"nbd+unix:///again?socket={where}")
            assert node.data == original.read_bytes()
            await tools.run("nbdcopy", f"nbd+unix:///again?socket={where}", str(copy))
            assert copy.read_bytes() == original.read_bytes()
        await server.close()

    run(body)


def test_our_remote_opens_its_export(tmp_path: Path, certificates: Path | None) -> None:
    async def body() -> None:
        image, pid, port = tmp_path / "disk.img", tmp_path / "pid", free_port()
        image.write_bytes(bytes(LENGTH))
        known, option = credentials(certificates, "server")
        command = ["qemu-storage-daemon", *known, "--blockdev", f"driver=file,node-name=d,filename={image}"]
        command += ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}{option}"]
        command += ["--export", "nbd,id=e,node-name=d,name=disk0,writable=on", "--pidfile", str(pid)]
        async with tools.server(*command, socket=pid):
            tls = context(certificates, server_side=False)
            remote = Remote(
                "r", Tcp("127.0.0.1", port), "disk0", length=LENGTH, open_timeout=PATIENCE_S, tls=tls
            )
            await remote.open()
            await exercise(remote, 50)
            remote.close()
            await remote.wait_closed()

    run(body)
