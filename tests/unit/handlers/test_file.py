"""The handler of plain files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tcmu_replication.block.pending import settle
from tcmu_replication.daemon import handler, places
from tcmu_replication.errors import Error, Kind

HERE = places.context()


def test_file_handler_is_found_by_its_entry_point() -> None:
    assert {"file", "replication"} <= handler.subtypes()
    assert handler.load("file").subtype == "file"


def test_unknown_subtype_names_what_is_installed() -> None:
    with pytest.raises(Error, match=r"no handler for 'rbd'; installed are: .*file"):
        handler.load("rbd")


def test_file_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(8192))

    async def main() -> None:
        backstore = await handler.load("file").open(str(path), HERE)
        assert (backstore.top.length, backstore.block_size) == (8192, None)
        await settle(backstore.top.write(512, [memoryview(b"x" * 512)]))
        await settle(backstore.top.flush())
        await backstore.close()
        await backstore.close()

    asyncio.run(main())
    assert path.read_bytes()[512:1024] == b"x" * 512


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("image", Kind.BAD_CONFIG),
        ("", Kind.BAD_CONFIG),
        ("/", Kind.BAD_CONFIG),
        ("/nonexistent", Kind.NOT_FOUND),
    ],
)
def test_config_that_cannot_be_right(config: str, kind: Kind) -> None:
    with pytest.raises(Error) as caught:
        asyncio.run(handler.load("file").open(config, HERE))
    assert caught.value.kind is kind


def test_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """S5."""
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    path.chmod(0o666)
    with pytest.raises(Error, match=f"found {path} with mode 0666, so that others may write it"):
        asyncio.run(handler.load("file").open(str(path), HERE))


def test_file_that_is_in_use_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(512))

    async def main() -> None:
        first = await handler.load("file").open(str(path), HERE)
        with pytest.raises(Error) as caught:
            await handler.load("file").open(str(path), HERE)
        assert caught.value.kind is Kind.CONFLICT
        await first.close()

    asyncio.run(main())
