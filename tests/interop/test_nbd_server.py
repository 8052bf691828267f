"""Our NBD server with other people's clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tcmu_replication.block.file import File
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.units import KiB, MiB
from tests.support.tools import requires, run

pytestmark = pytest.mark.interop

LENGTH = 32 * MiB


def serve(tmp_path: Path, body: Callable[[str, Server, File], Awaitable[None]]) -> None:
    """Run `body(uri, server, node)` while a file is exported as disk0."""

    async def main() -> None:
        image = tmp_path / "disk.img"
        image.touch()
        with image.open("r+b") as file:
            file.truncate(LENGTH)
        node = File(str(image))
        socket = tmp_path / "nbd.sock"
        server = Server([Export("disk0", node, "the first disk")])
        await server.listen_unix(str(socket))
        try:
            await body(f"nbd+unix:///disk0?socket={socket}", server, node)
        finally:
            await server.close()
            node.close()

    asyncio.run(main())


@requires("nbdinfo")
def test_nbdinfo_describes_the_export(tmp_path: Path) -> None:
    async def body(uri: str, server: Server, node: File) -> None:
        found = json.loads(await run("nbdinfo", "--json", uri))
        assert found["structured"] is True
        (export,) = found["exports"]
        assert export["export-size"] == LENGTH
        assert export["description"] == "the first disk"
        assert export["contexts"] == ["base:allocation"]
        for able in ("can_flush", "can_fua", "can_trim", "can_zero", "can_df", "can_multi_conn"):
            assert export[able] is True, able
        assert export["is_read_only"] is False
        assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, 32 * MiB)

    serve(tmp_path, body)


@requires("nbdinfo")
def test_nbdinfo_lists_every_export(tmp_path: Path) -> None:
    async def body(uri: str, server: Server, node: File) -> None:
        server.add(Export("view", node, read_only=True))
        listing = json.loads(await run("nbdinfo", "--list", "--json", uri))
        found = {export["export-name"]: export["is_read_only"] for export in listing["exports"]}
        assert found == {"disk0": False, "view": True}

    serve(tmp_path, body)


@requires("nbdinfo")
def test_nbdinfo_maps_data_and_holes(tmp_path: Path) -> None:
    async def body(uri: str, server: Server, node: File) -> None:
        node.write(MiB, [memoryview(b"x" * (64 * KiB))])
        extents = json.loads(await run("nbdinfo", "--map", "--json", uri))
        assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
            (0, MiB, 3),
            (MiB, 64 * KiB, 0),
            (MiB + 64 * KiB, LENGTH - MiB - 64 * KiB, 3),
        ]

    serve(tmp_path, body)
