"""What the kinds of marks mean to whoever looks at many."""

from __future__ import annotations

import random
from pathlib import Path

from tcmu_replication.block import map_format
from tcmu_replication.block.allocation_map import AllocationMap, merged
from tcmu_replication.block.map_format import (
    HERE,
    MAX_SLOTS,
    NEW,
    NOWHERE,
    OVER_ZERO,
    PER_PAGE,
    ZERO,
    ZERO_FLAG,
)
from tcmu_replication.units import BLOCK

BLOCKS = 3 * PER_PAGE


def test_states_runs_and_merges_of_all_kinds(tmp_path: Path) -> None:
    dice = random.Random(5)
    maps = []
    length = BLOCKS * BLOCK
    for name in ("upper", "lower"):
        path = tmp_path / name
        path.write_bytes(map_format.header(length).ljust(map_format.file_size(length), b"\0"))
        maps.append(AllocationMap(str(path), length))
        for _ in range(200):
            first = dice.randrange(BLOCKS - 8)
            count = dice.randrange(1, 9)
            kind = dice.choice([0, NEW, OVER_ZERO])
            maps[-1].assign(first, first + count, kind + 1 + dice.choice([0, 0xFF, 0x3FFF00, MAX_SLOTS - 8]))
            if dice.random() < 0.3:
                maps[-1].mark(first, first + count, ZERO)
    for one in maps:
        plain = [0 if not entry else ZERO if entry >= ZERO_FLAG else HERE for entry in one.entries(0, BLOCKS)]
        assert list(one.states(0, BLOCKS)) == plain == [one.state(block) for block in range(BLOCKS)]
        assert (one.here, one.zero) == (plain.count(HERE), plain.count(ZERO))
        assert [state for first, last, state in one.runs(0, BLOCKS) for _ in range(first, last)] == plain
    upper, lower = maps
    over = {b: upper.state(b) or lower.state(b) for b in range(BLOCKS)}
    found = {b: state for first, last, state in merged(upper, lower, 0, BLOCKS) for b in range(first, last)}
    assert found == {block: state for block, state in over.items() if state}
    for one in maps:
        one.close()


def test_greatest_slot_fits_each_kind() -> None:
    for kind, behind in ((0, NEW), (NEW, OVER_ZERO), (OVER_ZERO, ZERO_FLAG), (ZERO_FLAG, 1 << 32)):
        assert kind + MAX_SLOTS < kind + NOWHERE < behind
