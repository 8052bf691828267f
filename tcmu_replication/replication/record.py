"""What one host remembers of its pair: the manifest, and with it QEMU's stage and error.

Stage, identity and all else are written together, by `save` and what is made of it: `move`
for what the table of stages decides, `write_down` for what has happened whether it can be
written or not.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from tcmu_replication.errors import Error, Kind, one_line
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.clock import now
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.stages import Machine, Mode, Operation, Stage

log = logging.getLogger(__name__)

LONGEST = 1000
"""Characters of a recorded error: with all else it fits a place of the manifest."""


class Record:
    """The record of resource `name` in `directory`, for a disk of `length` bytes.

    `disk_name` is what the kernel calls the disk, or "". `mode` is the first one: what is
    found on the disk may say another. `unwritten`: memory knows more than the file.
    """

    def __init__(self, name: str, mode: Mode, length: int, directory: Path, disk_name: str = "") -> None:
        self.name = name
        self.directory = directory
        self.machine = Machine(mode)
        self.manifest = Manifest(name, mode, Stage.NONE, length)
        self.unwritten = False
        self._disk_name = disk_name

    @property
    def stage(self) -> Stage:
        """Where replication is."""
        return self.machine.stage

    @property
    def error(self) -> str | None:
        """The recorded error."""
        return self.machine.error

    def load(self) -> Manifest | None:
        """The directory's manifest, or None. Raises `Error` if it is damaged, or another resource's or disk's."""
        found = manifests.load(self.directory)
        if found is None:
            return None
        mine = self.manifest
        if found.resource != self.name or found.length != mine.length:
            raise Error(
                Kind.BAD_CONFIG,
                f"{self.directory} belongs to resource {found.resource!r} of {found.length} bytes, not to "
                f"{self.name!r} of {mine.length} bytes; give each resource an overlay directory of its own",
            )
        if found.disk and self._disk_name and found.disk != self._disk_name:
            raise Error(
                Kind.BAD_CONFIG,
                f"{self.directory} was written for the disk {found.disk!r}, but the resource file names the disk "
                f"{self._disk_name!r}. If a path now leads to another disk, mend that. If the disk was replaced or "
                "restored on purpose, what this directory says is not true of it: move the directory's files away, "
                f"then start {self.name} anew, which compares both disks",
            )
        return manifests.upgrade(self.directory, found)

    def take_up(self, found: Manifest, error: str | None = None) -> None:
        """Go on with what was found; with `error` instead of its own, if there is one."""
        self.manifest = found
        self.machine = Machine(found.mode, found.stage, error or found.error)

    def exchange_role(self, found: Manifest) -> None:
        """What was found is of the other role, which has ended: what stays true of the disk."""
        self.manifest = msgspec.structs.replace(
            self.manifest,
            sequence=found.sequence,
            written_alone=found.written_alone or bool(found.outdated_at or found.disk_error),
        )

    def note(self, reason: str) -> None:
        """Make an error sticky, in memory; the first reason is kept, since the rest follows from it."""
        if self.machine.error is None:
            self.machine.record(one_line(reason, LONGEST))
            self.manifest = msgspec.structs.replace(self.manifest, error_at=now())

    def learn(self, **changes: object) -> None:
        """Know it from now on, and write it with the next save: what costs nothing if it is forgotten."""
        self.manifest = msgspec.structs.replace(self.manifest, **changes)

    def save(self, **changes: object) -> None:
        """Replace the manifest; only then is the change true. Raises `Error` with the old one in force.

        The recorded error goes along, unless `changes` says otherwise.
        """
        carried: dict[str, object] = {"error": self.machine.error, "disk": self._disk_name}
        if changes.get("error", self.machine.error) is None:
            carried["error_at"] = ""
        new = msgspec.structs.replace(
            self.manifest, **(carried | changes), sequence=self.manifest.sequence + 1
        )
        manifests.save(self.directory, new, self.manifest)
        self.manifest = new
        self.unwritten = False

    def write_down(self, **changes: object) -> bool:
        """As `save`, where the event that is noted has happened whether it can be noted or not; whether it could.

        What could not is true all the same, and goes along with the next save.
        """
        try:
            self.save(**changes)
        except Error as error:
            if not self.unwritten:
                log.error("%s: and that could not be written down: %s", self.name, error)
            # Who asks hears of it, and the next save has it.
            self.learn(**changes)
            self.unwritten = True
            return False
        return True

    def move(self, operation: Operation, **changes: object) -> None:
        """Go where the table says that `operation` leads, and write it with `changes`.

        Raises `Error` with the old stage in force. `error=None` among the changes forgets the error.
        """
        self.save(stage=self._next(operation), **changes)
        self._moved(operation, changes)

    def moved(self, operation: Operation, **changes: object) -> None:
        """As `move`, where `operation` has happened whether it can be written or not."""
        self.write_down(stage=self._next(operation), **changes)
        self._moved(operation, changes)

    def _next(self, operation: Operation) -> Stage:
        return self.machine.row(operation).next or self.machine.stage

    def _moved(self, operation: Operation, changes: dict[str, object]) -> None:
        if changes.get("error", "") is None:
            self.machine.forget_error()
        self.machine.move(operation)
