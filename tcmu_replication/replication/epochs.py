"""The overlay files of each epoch, in the secondary's overlay directory.

An epoch's pair is two overlays, `epoch-<n>.hidden` and `epoch-<n>.active`
(each a data file and a map, see `block.overlay`). Which epoch counts is said by
the manifest and by nothing else; pairs of other epochs are left-overs of a
checkpoint that did not happen or of one whose old pair was not yet removed, and
are swept away at the next open.

The data files of a pair whose epoch is over are kept as `spare.hidden.data` and
`spare.active.data`, and serve the epoch after next: finding new space for every
block of every epoch, and freeing it again, costs more than the copying. What is
kept is never in anybody's way: it is no more than the filesystem has left, and
when the filesystem is full all of it is given back before a write fails. Full means
that the overlays would use the last part of it, see `block.reserve`; an open pair
needs no space that it does not have.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tcmu_replication.block import space
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.reserve import Reserve
from tcmu_replication.errors import Error, from_os
from tcmu_replication.units import BLOCK

_FILE = re.compile(r"epoch-(\d+)\.(hidden|active)\.(data|map)\Z")


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
    """Makes, opens, retires and removes pairs over `disk`."""

    def __init__(
        self, directory: Path, disk: Node, *, offload: Offload | None = None, limit: int | None = None
    ) -> None:
        self.directory = directory
        self._disk = disk
        self._offload = offload
        self._limit = limit
        self._reserve = Reserve(directory)
        self._reclaimable: list[Overlay] = []

    def _path(self, epoch: int, role: str) -> Path:
        return self.directory / f"epoch-{epoch:08d}.{role}"

    def _spare(self, role: str) -> Path:
        return self.directory / f"spare.{role}.data"

    def create(self, epoch: int) -> Pair:
        """A new, empty pair, in the spare data files if there are any. Raises `Error` and leaves nothing behind."""
        self._remove_files(epoch)
        hidden = self._create(epoch, "hidden", self._disk)
        try:
            return Pair(hidden, self._create(epoch, "active", hidden))
        except Error:
            hidden.destroy()
            raise

    def _create(self, epoch: int, role: str, backing: Node) -> Overlay:
        overlay = Overlay.create(
            role,
            self._path(epoch, role),
            backing,
            offload=self._offload,
            limit=self._limit,
            make_space=self._make_space,
            reserve=self._reserve,
            recycled=self._spare(role),
        )
        return self._note(overlay)

    def open(self, epoch: int) -> Pair:
        """The pair of an epoch that the manifest names. Raises `Error`."""
        hidden = self._open(epoch, "hidden", self._disk)
        try:
            return Pair(hidden, self._open(epoch, "active", hidden))
        except Error:
            hidden.release()
            raise

    def _open(self, epoch: int, role: str, backing: Node) -> Overlay:
        overlay = Overlay(
            role,
            self._path(epoch, role),
            backing,
            offload=self._offload,
            limit=self._limit,
            make_space=self._make_space,
            reserve=self._reserve,
        )
        return self._note(overlay)

    def _note(self, overlay: Overlay) -> Overlay:
        """An overlay whose data file may occupy more than it uses."""
        self._reclaimable = [*(other for other in self._reclaimable if not other.ejected), overlay]
        return overlay

    def _make_space(self) -> bool:
        """Give back all that is kept for later; False if there is nothing."""
        overlays, self._reclaimable = self._reclaimable, []
        for overlay in overlays:
            if not overlay.ejected:
                with contextlib.suppress(Error):
                    overlay.trim()
        return self._remove_spares() or bool(overlays)

    def retire(self, pair: Pair) -> Callable[[], None]:
        """An epoch is over: its pair's data files are kept, or removed where space is short.

        From now on nothing may use the pair. The work itself is the returned call, which may be made
        in a thread, and raises `Error`.
        """
        self._let_go(pair)
        return partial(self._put_aside, pair)

    def remove(self, pair: Pair) -> Callable[[], None]:
        """As `retire`, but no epoch follows: the pair's files go, and the spare ones."""
        self._let_go(pair)
        return partial(self._put_away, pair)

    def _let_go(self, pair: Pair) -> None:
        """Its files are closed in another thread now, so this one must not give back their space."""
        self._reclaimable = [overlay for overlay in self._reclaimable if overlay not in pair]

    def _put_aside(self, pair: Pair) -> None:
        for role, overlay in zip(Pair._fields, pair, strict=True):
            overlay.trim()  # so that what is kept follows what the last epochs needed
            if _can_keep(overlay):
                overlay.retire(self._spare(role))
            else:
                overlay.destroy()

    def _put_away(self, pair: Pair) -> None:
        pair.destroy()
        self._remove_spares()

    def sweep(self, keep: int | None) -> None:
        """Remove the files of every epoch but `keep`; with None of all, and the spare ones. Raises `Error`."""
        for path in self.directory.iterdir():
            match = _FILE.match(path.name)
            if match is not None and int(match[1]) != keep:
                _unlink(path)
        if keep is None:
            self._remove_spares()

    def _remove_spares(self) -> bool:
        """Whether there was one. Raises `Error`."""
        found = [path for role in Pair._fields if (path := self._spare(role)).exists()]
        for path in found:
            _unlink(path)
        return bool(found)

    def _remove_files(self, epoch: int) -> None:
        """Left-overs of an epoch that is about to be made anew."""
        for path in self.directory.glob(f"epoch-{epoch:08d}.*"):
            if _FILE.match(path.name):
                _unlink(path)


def _can_keep(overlay: Overlay) -> bool:
    """Whether the filesystem has as much left as the data file occupies, and takes space back. Raises `Error`."""
    path = f"{overlay.path}.data"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found, whole = os.fstat(fd), os.fstatvfs(fd)
            room = whole.f_bavail * whole.f_frsize
            return found.st_blocks * 512 <= room and space.fallocate(
                fd, space.PUNCH_HOLE, found.st_size, BLOCK
            )
        finally:
            os.close(fd)
    except OSError as e:
        raise from_os(e, f"look at {path}") from e


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise from_os(e, f"remove {path}") from e
