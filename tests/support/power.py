"""A host whose power fails: of each part of a file any state since its last sync may be what is found."""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block import boot
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind, from_os

SECTOR = 512
ENTRY = 4
PAGE = 4096


class Power:
    """Follows the files of a folder. What the page cache wrote back is chosen for each part on its own.

    A part is a sector, and in a map an entry: the blocks of a large disk have theirs in different pages.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.fails = 0
        self._states: dict[str, list[bytes]] = {}
        self._syncing: list[tuple[str, bytes]] = []
        self._boots = 0
        self._sync = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)
        monkeypatch.setattr(boot, "boot_id", lambda: f"boot {self._boots}")

    def look(self) -> None:
        """Whatever the files hold now may be written back."""
        for path in self.folder.iterdir():
            content = path.read_bytes()
            states = self._states.setdefault(path.name, [])
            if not states or (states[-1] is not content and states[-1] != content):
                states.append(content)

    def _fdatasync(self, fd: int) -> None:
        self.look()
        if self.fails:
            self.fails -= 1
            raise OSError(5, "sync fails on cue")
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        self._syncing.append((name, self._states[name][-1]))

    def take_syncing(self) -> list[tuple[str, bytes]]:
        """The syncs that have begun and of which nobody has been told the end."""
        syncing, self._syncing = self._syncing, []
        return syncing

    def synced(self, syncing: list[tuple[str, bytes]]) -> None:
        """These syncs have ended: nothing older than what they began with is found any more."""
        self.look()
        for name, content in syncing:
            states = self._states[name]
            at = next((at for at, state in enumerate(states) if state is content), 0)
            del states[:at]

    def forget(self) -> None:
        """All that there is now is on stable storage."""
        self._states.clear()
        self._syncing.clear()
        self.look()

    def states(self, name: str) -> list[bytes]:
        """What each sector of a file may be found as: as in one of these, each on its own."""
        return self._states[name]

    def lose(self, dice: random.Random) -> Callable[[], None]:
        """It fails now. The answer, to be called once the files are closed, puts there what the next boot finds."""
        self.look()
        found = {}
        for name, states in self._states.items():
            found[name] = bytearray(states[-1])
            for start, end in _parts(name, len(found[name])):
                found[name][start:end] = dice.choice(states)[start:end]

        def next_boot() -> None:
            for name, content in found.items():
                (self.folder / name).write_bytes(content)
            self._boots += 1
            self.forget()

        return next_boot


def _parts(name: str, length: int) -> list[tuple[int, int]]:
    if not name.endswith(".map"):
        return [(at, min(length, at + SECTOR)) for at in range(0, length, SECTOR)]
    return [(0, PAGE), *((at, at + ENTRY) for at in range(PAGE, length, ENTRY) if at < PAGE + 256)]


class Slow(Offload):
    """Calls begin and end when somebody says so: what is written in between is of neither."""

    def __init__(self, power: Power) -> None:
        self._power = power
        self._dead: Error | None = None
        self.waiting: list[tuple[Callable[[], Any], Pending]] = []
        self.under_way: list[tuple[Pending, Error | None, list[tuple[str, bytes]]]] = []

    def __call__(self, call: Callable[[], Any], doing: str) -> Pending:
        if self._dead is not None:
            raise self._dead
        self.waiting.append((call, Pending()))
        return self.waiting[-1][1]

    def begin(self, at: int = 0) -> None:
        """The call begins; it sees what is there now."""
        call, pending = self.waiting.pop(at)
        error = None
        try:
            call()
        except Error as met:
            error = met
        except OSError as met:
            error = from_os(met, "test")
        self.under_way.append((pending, error, self._power.take_syncing()))

    def end(self, at: int = 0) -> None:
        """The call ends, and whoever waits is told."""
        pending, error, syncing = self.under_way.pop(at)
        self._power.synced(syncing)
        pending.complete(error)

    def die(self) -> None:
        """Nothing ends any more: whoever waits is told that it failed, so that nobody waits for ever."""
        self._dead = Error(Kind.CANCELLED, "dead")
        while self.waiting or self.under_way:
            pending = self.waiting.pop()[1] if self.waiting else self.under_way.pop()[0]
            pending.complete(self._dead)

    def all(self) -> None:
        """Until nothing is under way."""
        while self.waiting or self.under_way:
            if self.waiting:
                self.begin()
            else:
                self.end()


class Disk:
    """The sectors of a LUN: what each may read as after a loss of power. A value is a number, zero is zeroes."""

    def __init__(self, values: list[int]) -> None:
        self._written = [[(0, value)] for value in values]
        self._time = 0

    def now(self) -> list[int]:
        """What is read while the host runs."""
        return [written[-1][1] for written in self._written]

    def write(self, first: int, last: int, value: int) -> None:
        """A write of these sectors."""
        self._time += 1
        for written in self._written[first:last]:
            written.append((self._time, value))

    def asked_to_flush(self) -> int:
        """What `flushed` needs to be told."""
        return self._time

    def flushed(self, asked: int) -> None:
        """A flush that was asked for then has succeeded."""
        for written in self._written:
            del written[: bisect_right(written, (asked, 1 << 62)) - 1]

    def check(self, found: list[int]) -> None:
        """What is there after a loss of power."""
        for sector, (value, written) in enumerate(zip(found, self._written, strict=True)):
            may = [value for _, value in written]
            assert value in may, f"sector {sector} reads as {value}, not as one of {may}"

    def settle(self, found: list[int]) -> None:
        """It is, and stays so."""
        self.check(found)
        self._written = [[(self._time, value)] for value in found]


def stamped(value: int, length: int) -> bytes:
    """What a sector of this value holds."""
    return value.to_bytes(4, "little") * (length // 4)


def values(content: bytes) -> list[int]:
    """The values of sectors; -1 for one that no write has ever made."""
    return [
        int.from_bytes(sector[:4], "little") if sector == sector[:4] * (SECTOR // 4) else -1
        for sector in (content[at : at + SECTOR] for at in range(0, len(content), SECTOR))
    ]
