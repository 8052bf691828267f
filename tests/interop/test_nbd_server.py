"""Our NBD server with other people's clients."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tcmu_replication.block.faults import Faults
from tcmu_replication.block.file import File
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Kind
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


def sparse_image(path: Path) -> bytes:
    """An image with a little data in it, at the end too; its content."""
    content = bytearray(LENGTH)
    content[MiB : MiB + 64 * KiB] = os.urandom(64 * KiB)
    content[-64 * KiB :] = os.urandom(64 * KiB)
    path.write_bytes(content)
    return bytes(content)


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


@requires("nbdcopy")
def test_nbdcopy_both_ways(tmp_path: Path) -> None:
    async def body(uri: str, server: Server, node: File) -> None:
        original = sparse_image(tmp_path / "original.img")
        copy = tmp_path / "copy.img"
        await run("nbdcopy", str(tmp_path / "original.img"), uri)
        assert bytes(node.fetch(0, LENGTH)) == original
        await run("nbdcopy", uri, str(copy))
        assert copy.read_bytes() == original

    serve(tmp_path, body)


@requires("qemu-img")
def test_qemu_img_info_convert_and_map(tmp_path: Path) -> None:
    async def body(uri: str, server: Server, node: File) -> None:
        original = sparse_image(tmp_path / "original.img")
        copy = tmp_path / "copy.img"
        info = json.loads(await run("qemu-img", "info", "--output=json", uri))
        assert info["virtual-size"] == LENGTH
        await run("qemu-img", "convert", "-n", "-O", "raw", str(tmp_path / "original.img"), uri)
        assert bytes(node.fetch(0, LENGTH)) == original
        await run("qemu-img", "convert", "-O", "raw", uri, str(copy))
        assert copy.read_bytes() == original
        extents = json.loads(await run("qemu-img", "map", "--output=json", uri))
        data = [(e["start"], e["length"]) for e in extents if e["data"]]
        assert data == [(MiB, 64 * KiB), (LENGTH - 64 * KiB, 64 * KiB)]

    serve(tmp_path, body)


@requires("qemu-io")
def test_qemu_io_writes_reads_zeroes_and_discards(tmp_path: Path) -> None:
    async def body(uri: str, server: Server, node: File) -> None:
        commands = (
            "write -P 1 511 3000",
            "write -f -P 2 1M 2M",
            "read -P 1 511 3000",
            "write -z 1M 64k",
            "write -z -u 1088k 64k",
            "read -P 0 1M 128k",
            "discard 1152k 64k",
            "read -P 2 1216k 64k",
            "flush",
        )
        said = await run("qemu-io", "-f", "raw", *(word for c in commands for word in ("-c", c)), uri)
        assert "failed" not in said
        assert said.count("ops;") == len(commands) - 1
        assert bytes(node.fetch(511, 3000)) == b"\1" * 3000
        assert bytes(node.fetch(MiB, 192 * KiB)) == bytes(192 * KiB)

    serve(tmp_path, body)


@requires("qemu-io")
def test_qemu_io_is_told_what_failed(tmp_path: Path) -> None:
    async def body(uri: str, server: Server, node: File) -> None:
        await server.remove("disk0")
        faults = Faults(node)
        faults.fail("write", Kind.NO_SPACE, offset=MiB, length=MiB)
        server.add(Export("disk0", faults))
        with pytest.raises(AssertionError, match="No space left on device"):
            await run("qemu-io", "-f", "raw", "-c", "write 1M 4k", uri)
        await run("qemu-io", "-f", "raw", "-c", "write 4M 4k", uri)

    serve(tmp_path, body)


@requires("fio")
@pytest.mark.parametrize("blocks", ["4k-4k", "512-256k"])
def test_fio_verifies_what_it_wrote(tmp_path: Path, blocks: str) -> None:
    async def body(uri: str, server: Server, node: File) -> None:
        await run(
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", f"--bsrange={blocks}",
            "--bs_unaligned", "--iodepth=32", "--size=16M",
            "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
        )  # fmt: skip

    serve(tmp_path, body)


@requires("fio")
def test_fio_verifies_over_slow_and_unordered_answers(tmp_path: Path) -> None:
    """Every request of the node ends in a later turn of the loop, the latest first."""

    class Late(Memory):
        def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending:
            return self._later(lambda: Memory.write(self, offset, buffers, fua))

        def read(self, offset: int, buffers: Buffers) -> Pending:
            return self._later(lambda: Memory.read(self, offset, buffers))

        def _later(self, call: Callable[[], Pending | None]) -> Pending:
            pending = Pending()
            waiting.append((call, pending))
            if len(waiting) == 1:
                asyncio.get_running_loop().call_later(0.001, end)
            return pending

    waiting: list[tuple[Callable[[], Pending | None], Pending]] = []

    def end() -> None:
        late, waiting[:] = waiting[:], []
        for call, pending in reversed(late):
            call()
            pending.complete()

    async def body(uri: str, server: Server, node: File) -> None:
        await server.remove("disk0")
        server.add(Export("disk0", Late(LENGTH)))
        await run(
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=16k",
            "--iodepth=32", "--size=16M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
        )  # fmt: skip
        assert server.in_flight == 0

    serve(tmp_path, body)
