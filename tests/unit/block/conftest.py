"""The leaves that every test of a leaf runs over, and overlays' usual place."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block.file import File
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error

MakeLeaf = Callable[[int], Node]


def make_image(path: Path, length: int) -> str:
    """An empty sparse image; its path."""
    with open(path, "wb") as image:
        image.truncate(length)
    return str(path)


class HeldOffload(Offload):
    """Runs nothing until the test says so, on the test's own thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], str, Pending]] = []

    def __call__(self, call: Callable[[], Any], doing: str) -> Pending:
        self.calls.append((call, doing, Pending()))
        return self.calls[-1][2]

    def run_next(self) -> None:
        call, _, pending = self.calls.pop(0)
        try:
            pending.complete(None, call())
        except Error as error:
            pending.complete(error)

    def run_all(self) -> None:
        """These calls, and those that their ends lead to."""
        while self.calls:
            self.run_next()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that the test runs itself."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[Path]:
    """A folder on tmpfs, which has no ZERO_RANGE and no RWF_NOWAIT."""
    folder = Path("/dev/shm") / f"tcmu-replication-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.fixture(params=["memory", "file", "file-tmpfs"])
def make_leaf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeLeaf]:
    """Makes an empty leaf of some length; closed at the end."""
    made: list[Node] = []
    folder = request.getfixturevalue("shm") if request.param == "file-tmpfs" else tmp_path

    def make(length: int) -> Node:
        if request.param == "memory":
            leaf: Node = Memory(length)
        else:
            leaf = File(make_image(folder / f"leaf{len(made)}", length))
        made.append(leaf)
        return leaf

    yield make
    for leaf in made:
        leaf.close()
