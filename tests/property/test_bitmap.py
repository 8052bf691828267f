"""The map of dirty blocks against a set of numbers, reopened and killed at any time."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tcmu_replication.block.bitmap import PER_PAGE, Bitmap
from tcmu_replication.units import BLOCK
from tests.property.killed_marker import BLOCKS, LENGTH, changes

PROJECT = Path(__file__).parents[2]

EDGES = [0, 1, 7, 8, PER_PAGE - 1, PER_PAGE, PER_PAGE + 1, 2 * PER_PAGE, BLOCKS - 9, BLOCKS - 1]
PLACES = st.one_of(st.sampled_from(EDGES), st.integers(0, BLOCKS - 1))
COUNTS = st.one_of(st.integers(0, 40), st.sampled_from([PER_PAGE - 1, PER_PAGE, BLOCKS]))


def runs_of(blocks: Iterable[int], first: int, last: int, longest: int) -> list[tuple[int, int]]:
    """What a model's runs are."""
    found: list[tuple[int, int]] = []
    for block in sorted(block for block in blocks if first <= block < last):
        if found and found[-1][1] == block and block - found[-1][0] < longest:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return found


class Chain(RuleBasedStateMachine):
    @initialize()
    def make(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.dirty = Bitmap.create(Path(self.folder.name) / "map", LENGTH)
        self.model: set[int] = set()

    @rule(first=PLACES, count=COUNTS)
    def mark(self, first: int, count: int) -> None:
        last = min(BLOCKS, first + count)
        self.dirty.mark(first, last)
        self.model |= set(range(first, last))

    @rule(first=PLACES, count=COUNTS)
    def clear(self, first: int, count: int) -> None:
        last = min(BLOCKS, first + count)
        self.dirty.clear(first, last)
        self.model -= set(range(first, last))

    @rule()
    def reopen(self) -> None:
        self.dirty.close()
        self.dirty = Bitmap(self.dirty.path, LENGTH)

    @rule()
    def flush(self) -> None:
        self.dirty.flush()

    @rule(first=PLACES, count=COUNTS, longest=st.one_of(st.none(), st.integers(1, 9)))
    def runs(self, first: int, count: int, longest: int | None) -> None:
        last = min(BLOCKS, first + count)
        found = list(self.dirty.runs(first, last, longest=longest))
        assert found == runs_of(self.model, first, last, longest or BLOCKS)

    @rule(first=PLACES, changes=st.lists(st.tuples(st.booleans(), PLACES, st.integers(0, 40)), max_size=20))
    def runs_among_changes(self, first: int, changes: list[tuple[bool, int, int]]) -> None:
        """Each run is one of the moment at which it is found, and nothing ahead is left out."""
        found, at = self.dirty.runs(first), first
        for mark, start, count in changes:
            run = next(found, None)
            expected = runs_of(self.model, at, BLOCKS, BLOCKS)[:1]
            assert run == (expected[0] if expected else None)
            if run is None:
                return
            at = run[1]
            (self.mark if mark else self.clear)(start, count)

    @rule(block=PLACES)
    def test(self, block: int) -> None:
        assert self.dirty.test(block) is (block in self.model)

    @invariant()
    def count(self) -> None:
        assert self.dirty.count == len(self.model)
        assert self.dirty.bytes == sum(min(BLOCK, LENGTH - block * BLOCK) for block in self.model)

    def teardown(self) -> None:
        assert list(self.dirty.runs()) == runs_of(self.model, 0, BLOCKS, BLOCKS)
        self.dirty.close()
        self.folder.cleanup()


Chain.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestBitmap = Chain.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_bitmap_of_a_process_that_was_killed_has_what_it_had_done(tmp_path: Path, seed: int) -> None:
    lines = random.Random(seed).randrange(1, 400)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.property.killed_marker", str(tmp_path / "map"), str(seed)],
        stdout=subprocess.PIPE,
        cwd=PROJECT,
    ) as marker:
        assert marker.stdout is not None
        for _ in range(lines):
            assert marker.stdout.readline(), "the marker did not start"
        marker.kill()
        lines += marker.stdout.read().count(b"\n")
    model: set[int] = set()
    said = [model.copy()]
    for at, (mark, first, last) in zip(range(lines + 1), changes(seed)):  # noqa: B905 - `changes` does not end
        blocks = set(range(first, last))
        model = model | blocks if mark else model - blocks
        if at >= lines - 1:
            said.append(model)
    dirty = Bitmap(tmp_path / "map", LENGTH)
    found = {block for first, last in dirty.runs() for block in range(first, last)}
    assert dirty.count == len(found)
    # The last call had begun, and each page of it is done or not.
    done, begun = said[-2:]
    assert done & begun <= found <= done | begun
    dirty.close()
