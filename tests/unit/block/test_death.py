"""The process dies before, in the middle of, or after each single write to a file; what is found is whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block.buffers import part
from tcmu_replication.block.copy_before_write import CopyBeforeWrite
from tcmu_replication.block.file import File
from tcmu_replication.block.overlay import Overlay

BLOCK = 4096
LENGTH = 5 * BLOCK + 700
OLD = bytes(n * 37 % 251 + 1 for n in range(LENGTH))


class DeathError(BaseException):
    """Not an `Error`, not an Exception: nothing in the product handles it."""


class Host:
    """Makes the process die at the given file write, after `bytes_done` bytes of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.left = -1
        self.bytes_done = 0
        pwritev = os.pwritev

        def dying(fd: int, buffers: Any, offset: int) -> int:
            if self.left == 0:
                pwritev(fd, part(buffers, 0, self.bytes_done), offset)
                raise DeathError
            self.left -= 1
            return pwritev(fd, buffers, offset)

        monkeypatch.setattr(os, "pwritev", dying)
        (folder / "disk").write_bytes(OLD)
        self.boot(Overlay.create)

    def boot(self, make: Callable[..., Overlay] = Overlay) -> None:
        self.left = -1
        self.disk = File(str(self.folder / "disk"))
        self.hidden = make("hidden", self.folder / "hidden", self.disk)
        self.active = make("active", self.folder / "active", self.hidden)
        self.filter = CopyBeforeWrite(self.disk, self.hidden)

    def dies(self, call: Callable[[], Any], at: int, bytes_done: int) -> bool:
        """Whether `call` dies at its write number `at`; either way what it left is opened again."""
        self.left, self.bytes_done = at, bytes_done
        try:
            call()
            return False
        except DeathError:
            return True
        finally:
            self.active.close()
            self.boot()


def assert_old_or_new(actual: bytes, old: bytes, offset: int, new: bytes) -> None:
    expected = old[:offset] + new + old[offset + len(new) :]
    for start in range(0, LENGTH, BLOCK):
        block = actual[start : start + BLOCK]
        assert block in (old[start : start + BLOCK], expected[start : start + BLOCK]), f"block at {start}"


@pytest.mark.parametrize("bytes_done", [0, BLOCK, 1 << 20])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, BLOCK), (100, 50), (BLOCK - 1, 2 * BLOCK), (LENGTH - 1, 1)]
)
def test_death_at_each_write_of_an_own_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, length: int, bytes_done: int
) -> None:
    host = Host(tmp_path, monkeypatch)
    deaths = 0
    while True:
        before = bytes(host.active.fetch(0, LENGTH))
        new = bytes([200 + deaths]) * length
        died = host.dies(lambda new=new: host.active.write(offset, [memoryview(new)]), deaths, bytes_done)
        assert_old_or_new(bytes(host.active.fetch(0, LENGTH)), before, offset, new)
        if not died:
            break
        deaths += 1
    assert deaths >= 2, "the map's page and the data"
    host.active.close()


@pytest.mark.parametrize("operation", ["write", "zero"])
@pytest.mark.parametrize("bytes_done", [0, 1, BLOCK, 1 << 20])
def test_death_at_each_write_of_a_forwarded_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, bytes_done: int
) -> None:
    host = Host(tmp_path, monkeypatch)
    host.active.write(2 * BLOCK, [memoryview(b"own")])
    top = bytes(host.active.fetch(0, LENGTH))
    offset, length = BLOCK - 1, 3 * BLOCK
    deaths = 0

    def forward() -> None:
        if operation == "write":
            host.filter.write(offset, [memoryview(b"n" * length)])
        else:
            host.filter.zero(offset, length, unmap=False)

    while host.dies(forward, deaths, bytes_done):
        deaths += 1
        assert bytes(host.active.fetch(0, LENGTH)) == top
    assert bytes(host.active.fetch(0, LENGTH)) == top
    assert deaths >= 2
    host.active.close()
