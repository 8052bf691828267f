"""The overlay files of each epoch, in the secondary's overlay directory.

An epoch's pair is two overlays, `epoch-<n>.hidden` and `epoch-<n>.active`
(each a data file and a map, see `block.overlay`). Which epoch counts is said by
the manifest and by nothing else; pairs of other epochs are left-overs of a
checkpoint that did not happen or of one whose old pair was not yet removed, and
are swept away at the next open.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.errors import Error, from_os

_FILE = re.compile(r"epoch-(\d+)\.(hidden|active)\.(data|map)(\.new)?\Z")


class Pair(NamedTuple):
    """One epoch's overlays: active lies on hidden, hidden on the disk."""

    hidden: Overlay
    active: Overlay

    def close(self) -> None:
        """Close both, not what lies below."""
        self.active.release()
        self.hidden.release()

    def destroy(self) -> None:
        """Close both and remove their files."""
        self.active.destroy()
        self.hidden.destroy()


class Epochs:
    """Makes, opens and removes pairs over `disk`."""

    def __init__(
        self, directory: Path, disk: Node, *, offload: Offload | None = None, limit: int | None = None
    ) -> None:
        self.directory = directory
        self._disk = disk
        self._offload = offload
        self._limit = limit

    def _path(self, epoch: int, role: str) -> Path:
        return self.directory / f"epoch-{epoch:08d}.{role}"

    def create(self, epoch: int) -> Pair:
        """A new, empty pair. Raises `Error` and leaves nothing behind."""
        self._remove_files(epoch)
        hidden = Overlay.create(
            "hidden", self._path(epoch, "hidden"), self._disk, offload=self._offload, limit=self._limit
        )
        try:
            active = Overlay.create(
                "active", self._path(epoch, "active"), hidden, offload=self._offload, limit=self._limit
            )
        except Error:
            hidden.destroy()
            raise
        return Pair(hidden, active)

    def open(self, epoch: int) -> Pair:
        """The pair of an epoch that the manifest names. Raises `Error`."""
        hidden = Overlay(
            "hidden", self._path(epoch, "hidden"), self._disk, offload=self._offload, limit=self._limit
        )
        try:
            active = Overlay(
                "active", self._path(epoch, "active"), hidden, offload=self._offload, limit=self._limit
            )
        except Error:
            hidden.release()
            raise
        return Pair(hidden, active)

    def sweep(self, keep: int | None) -> None:
        """Remove the files of every epoch but `keep` (None: of all). Raises `Error`."""
        for path in self.directory.iterdir():
            match = _FILE.match(path.name)
            if match is not None and int(match[1]) != keep:
                _unlink(path)

    def _remove_files(self, epoch: int) -> None:
        """Left-overs of an epoch that is about to be made anew."""
        for path in self.directory.glob(f"epoch-{epoch:08d}.*"):
            if _FILE.match(path.name):
                _unlink(path)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise from_os(e, f"remove {path}") from e
