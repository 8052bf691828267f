"""What both ends of a pair have: a stage, a manifest that says it, and one command at a time."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import settle
from tcmu_replication.errors import Error, Kind, one_line
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.stages import Machine, Mode, Stage

log = logging.getLogger(__name__)

LONGEST = 1000
"""Characters of a recorded error: with all else it fits a place of the manifest."""


class End:
    """The base of `Primary` and `Secondary`. `directory` holds the manifest of resource `name` over `disk`.

    `disk_name` is what the kernel calls the disk, or "". `checkpoint_since`: when the
    checkpoint under way began.
    """

    mode: Mode
    top: Gate

    def __init__(self, name: str, disk: Node, directory: Path, disk_name: str = "") -> None:
        self.name = name
        self.disk = disk
        self.machine = Machine(self.mode)
        self.manifest = Manifest(name, self.mode, Stage.NONE, disk.length)
        self._disk_name = disk_name
        self._directory = directory
        self.checkpoint_since: str | None = None
        self._unwritten = False  # the manifest in memory knows more than the file
        self._opened = False
        self._ended = False
        self._lock = asyncio.Lock()
        self._holding = asyncio.Lock()

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
        """Within it no other command runs. Raises `Error(CANCELLED)` for one that comes, or waited, too long.

        One that meets a defect may have done half of what it does: the loop's exception handler hears of it.
        """
        async with self._lock:
            if self._ended:
                raise Error(
                    Kind.CANCELLED,
                    f"the worker of {self.name} is shutting down; the command was not carried out",
                )
            try:
                yield
            except Error:
                raise
            except Exception as defect:
                context = {"message": f"a command of {self.name} met a defect", "exception": defect}
                asyncio.get_running_loop().call_exception_handler(context)
                raise

    @contextmanager
    def _showing_a_checkpoint(self) -> Iterator[None]:
        """Within it `status` says that one is under way, and since when."""
        self.checkpoint_since = now()
        try:
            yield
        finally:
            self.checkpoint_since = None

    @asynccontextmanager
    async def _quiet(self) -> AsyncIterator[None]:
        """Within it nothing is under way in the LUN, and new requests wait. One at a time."""
        async with self._holding, self.top.quiet():
            yield

    async def _install(self, node: Node) -> None:
        """Serve `node` from now on."""
        async with self._holding:
            self.top.hold()
            try:
                await settle(self.top.drained())
                self.top.swap(node)
            finally:
                self.top.release()

    def _load(self) -> Manifest | None:
        """The directory's manifest, or None. Raises `Error` if it is damaged, or another resource's or disk's."""
        found = manifests.load(self._directory)
        if found is None:
            return None
        if found.resource != self.name or found.length != self.disk.length:
            raise Error(
                Kind.BAD_CONFIG,
                f"{self._directory} belongs to resource {found.resource!r} of {found.length} bytes, not to "
                f"{self.name!r} of {self.disk.length} bytes; give each resource an overlay directory of its own",
            )
        if found.disk and self._disk_name and found.disk != self._disk_name:
            raise Error(
                Kind.BAD_CONFIG,
                f"{self._directory} was written for the disk {found.disk!r}, but the resource file names the disk "
                f"{self._disk_name!r}. If a path now leads to another disk, mend that. If the disk was replaced or "
                "restored on purpose, what this directory says is not true of it: move the directory's files away, "
                f"then start {self.name} anew, which compares both disks",
            )
        return found

    def _exchange_role(self, found: Manifest) -> None:
        """The directory's manifest is of the other role, which has ended: what stays true of the disk."""
        self.manifest = msgspec.structs.replace(
            self.manifest,
            sequence=found.sequence,
            written_alone=found.written_alone or bool(found.outdated_at or found.disk_error),
        )

    def _record(self, reason: str) -> None:
        """Make the error sticky, in memory; the first reason is kept, since the rest follows from it."""
        if self.machine.error is None:
            self.machine.record(one_line(reason, LONGEST))
            self.manifest = msgspec.structs.replace(self.manifest, error_at=now())

    def _save(self, **changes: object) -> None:
        """Replace the manifest; only then is the change true. Raises `Error` with the old one in force.

        The recorded error goes along, unless `changes` says otherwise.
        """
        carried: dict[str, object] = {"error": self.machine.error, "disk": self._disk_name}
        if changes.get("error", self.machine.error) is None:
            carried["error_at"] = ""
        new = msgspec.structs.replace(
            self.manifest, **(carried | changes), sequence=self.manifest.sequence + 1
        )
        manifests.save(self._directory, new, self.manifest)
        self.manifest = new
        self._unwritten = False

    def _write_down(self, **changes: object) -> bool:
        """As `_save`, where the event that is noted has happened whether it can be noted or not; whether it could.

        What could not is true all the same, and goes along with the next save.
        """
        try:
            self._save(**changes)
        except Error as error:
            if not self._unwritten:
                log.error("%s: and that could not be written down: %s", self.name, error)
            # Who asks hears of it, and the next save has it.
            self.manifest = msgspec.structs.replace(self.manifest, **changes)
            self._unwritten = True
            return False
        return True


def now() -> str:
    """The time as a manifest has it: UTC, ISO 8601, milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
