"""An account of what a copy-before-write does with its overlay: nothing twice, nothing in the wrong order."""

from __future__ import annotations

from collections.abc import Callable

from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error
from tcmu_replication.units import BLOCK


class Ledger:
    """Listens to `overlay` and asserts: what is stored is marked or abandoned once, as it was stored.

    `stable` are the blocks whose data and then marks have been synced. The next
    sync of the marks fails with `map_fails`.
    """

    def __init__(self, overlay: Overlay) -> None:
        self.outstanding: dict[tuple[int, int], bool] = {}
        self.abandoned: list[tuple[int, int]] = []
        self.stable: set[int] = set()
        self.map_fails: Error | None = None
        self._data: set[int] = set()
        self._marked: set[int] = set()
        self._overlay = overlay
        self._store, self._mark, self._save = overlay.store, overlay.mark, overlay.save
        self._abandon, self._forget = overlay.abandon, overlay.forget
        self._sync_data, self._sync_map = overlay.sync_data, overlay.sync_map
        for name in ("store", "mark", "save", "abandon", "forget", "sync_data", "sync_map"):
            setattr(overlay, name, getattr(self, name))

    def store(self, offset: int, data: memoryview) -> bool:
        self.check_new(offset, len(data))
        self.outstanding[offset, len(data)] = self._store(offset, data)
        return self.outstanding[offset, len(data)]

    def save(self, offset: int, data: memoryview) -> None:
        self.check_new(offset, len(data))
        self._save(offset, data)
        self._marked |= blocks(offset, len(data))

    def mark(self, offset: int, length: int, zero: bool) -> None:
        assert self.outstanding.pop((offset, length)) == zero
        self._mark(offset, length, zero)
        self._marked |= blocks(offset, length)

    def abandon(self, offset: int, length: int) -> None:
        del self.outstanding[offset, length]
        self.abandoned.append((offset, length))
        self._abandon(offset, length)

    def forget(self, offset: int, length: int) -> None:
        self._forget(offset, length)
        for of in (self._data, self._marked, self.stable):
            of -= blocks(offset, length)

    def covers(self, offset: int, length: int) -> bool:
        """Whether the overlay holds every block of the range."""
        return self._overlay.covers(offset, length)

    def check_new(self, offset: int, length: int) -> None:
        """What is stored must not be here, nor be on its way."""
        assert not self._overlay.allocated(offset, length), "it is here"
        for start, run in self.outstanding:
            assert offset + length <= start or start + run <= offset, "stored twice"

    def sync_data(self) -> Pending | None:
        stored = {block for place in self.outstanding for block in blocks(*place)}
        return self._then(self._sync_data(), lambda: self._data.update(stored))

    def sync_map(self) -> Pending | None:
        if self.map_fails is not None:
            error, self.map_fails = self.map_fails, None
            raise error
        marked = self._marked & self._data
        return self._then(self._sync_map(), lambda: self.stable.update(marked))

    def _then(self, pending: Pending | None, call: Callable[[], None]) -> Pending | None:
        if pending is None:
            call()
        else:
            pending.then(lambda ended: None if ended.error else call())
        return pending


def blocks(offset: int, length: int) -> set[int]:
    """The numbers of the blocks that a range touches."""
    return set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
