"""What both ends of a pair have: a stage, a manifest that says it, and one command at a time."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from tcmu_replication.block.node import Node
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.stages import Machine, Mode, Stage

log = logging.getLogger(__name__)


class End:
    """The base of `Primary` and `Secondary`. `directory` holds the manifest of resource `name` over `disk`."""

    mode: Mode

    def __init__(self, name: str, disk: Node, directory: Path) -> None:
        self.name = name
        self.disk = disk
        self.machine = Machine(self.mode)
        self.manifest = Manifest(name, self.mode, Stage.NONE, disk.length)
        self._directory = directory
        self._opened = False
        self._ended = False
        self._lock = asyncio.Lock()

    @property
    def stage(self) -> Stage:
        """Where replication is."""
        return self.machine.stage

    @property
    def epoch(self) -> int:
        """The pair's epoch, from 1, as this end knows it; 0 before the first start."""
        return self.manifest.epoch

    def get_error(self) -> None:
        """Raises QEMU's "not running" or "I/O error occurred"."""
        self.machine.get_error()

    @asynccontextmanager
    async def _command(self) -> AsyncIterator[None]:
        """Within it no other command runs. Raises `Error(CANCELLED)` for one that comes, or waited, too long."""
        async with self._lock:
            if self._ended:
                raise Error(
                    Kind.CANCELLED,
                    f"the worker of {self.name} is shutting down; the command was not carried out",
                )
            yield

    def _load(self) -> Manifest | None:
        """The directory's manifest, or None. Raises `Error` if it is damaged or another resource's."""
        found = manifests.load(self._directory)
        if found is not None and (found.resource != self.name or found.length != self.disk.length):
            raise Error(
                Kind.BAD_CONFIG,
                f"{self._directory} belongs to resource {found.resource!r} of {found.length} bytes, not to "
                f"{self.name!r} of {self.disk.length} bytes; give each resource an overlay directory of its own",
            )
        return found

    def _save(self, **changes: object) -> None:
        """Replace the manifest; only then is the change true. Raises `Error` with the old one in force."""
        new = msgspec.structs.replace(self.manifest, **changes)
        manifests.save(self._directory, new)
        self.manifest = new

    def _write_down(self, **changes: object) -> None:
        """As `_save`, where the event that is noted has happened whether it can be noted or not."""
        try:
            self._save(**changes)
        except Error as error:
            log.error("%s: and that could not be written down: %s", self.name, error)


def now() -> str:
    """The time as a manifest has it: UTC, ISO 8601, milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
