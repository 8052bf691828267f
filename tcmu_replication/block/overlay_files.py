"""The two files of an overlay: making them, giving them up, and taking over what an earlier overlay left.

`<path>.data` holds blocks, `<path>.map` says which (see `map_format`). Without
its map the data is nobody's, so the map is made last and goes first.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tcmu_replication.block import map_format
from tcmu_replication.block.space import create_sparse
from tcmu_replication.errors import from_os
from tcmu_replication.units import BLOCK, round_up


def data_path(path: str | Path) -> str:
    """Where the data of the overlay at `path` is."""
    return f"{path}.data"


def map_path(path: str | Path) -> str:
    """Where its map is."""
    return f"{path}.map"


def create(path: str | Path, length: int, recycled: str | Path | None) -> None:
    """Make the files of an empty overlay of `length` bytes.

    `recycled` is the data file of an overlay that is no more; if it exists, it becomes this one's.

    Raises `Error` and leaves nothing behind: CONFLICT if one of the files exists, NO_SPACE, also if the
    filesystem holds no file of this length.
    """
    data = data_path(path)
    if recycled is None or os.path.lexists(data) or not _take_over(recycled, data):
        create_sparse(data, round_up(length, BLOCK), b"")
    try:
        # The header comes last of all: a map without it was not finished.
        create_sparse(map_path(path), map_format.file_size(length), map_format.header(length))
    except BaseException:
        os.unlink(data)
        raise


def remove(path: str | Path) -> None:
    """Remove both. Files that are gone already are fine. Raises `Error`."""
    try:
        for file in (map_path(path), data_path(path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
    except OSError as error:
        raise from_os(error, f"remove the overlay {path}") from error


def retire(path: str | Path, to: str | Path) -> None:
    """Remove the map, and make the data file `to`: `create` may recycle it. Raises `Error`."""
    try:
        os.unlink(map_path(path))
        os.replace(data_path(path), to)
    except OSError as error:
        raise from_os(error, f"put the overlay {path} aside") from error


def _take_over(recycled: str | Path, data: str) -> bool:
    """Make an existing file the data of an overlay; False if it does not exist. Raises `Error`."""
    try:
        os.rename(recycled, data)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise from_os(error, f"rename {recycled}") from error
    return True
