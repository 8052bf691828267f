"""Random sequences on QEMU's secondary and on ours at the same time: every byte, every error, every stage.

TCMU_REPLICATION_SEED=123 pytest tests/interop/test_qemu_differential.py     one sequence again
make soak N=500                                                              any number of new ones
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from tcmu_replication.units import BLOCK, KiB
from tests.interop.differential.process import ProcessSide
from tests.interop.differential.run import Run, differ
from tests.interop.differential.sides import EngineSide, QemuSide
from tests.interop.differential.steps import (
    LENGTH,
    Command,
    Fault,
    Request,
    Requests,
    Sequence,
    Verb,
    sequence,
)
from tests.support import qemu
from tests.support.tools import requires

pytestmark = [pytest.mark.interop, requires("qemu-system-x86_64", "qemu-img")]

STEPS = 150
IN_MAKE_TEST = 24
UNIT = 64 * KiB
SCATTERED = [(0, 512), (UNIT - 512, 1024), (5 * UNIT + 4096, 512), (9 * UNIT, 3 * UNIT), (LENGTH - 512, 512)]
"""Forwarded writes: offset, length."""


def seeds() -> list[int]:
    """One that is asked for; or as many new ones as are asked for; or the same few every time."""
    if seed := os.environ.get("TCMU_REPLICATION_SEED"):
        return [int(seed)]
    if count := os.environ.get("TCMU_REPLICATION_SOAK"):
        return [random.getrandbits(32) for _ in range(int(count))]
    return list(range(IN_MAKE_TEST))


@pytest.mark.parametrize("seed", seeds())
def test_random_sequence_is_the_same_on_both(seed: int) -> None:
    with qemu.images() as directory:
        differ(sequence(seed, STEPS), directory)


@pytest.mark.parametrize("seed", seeds()[::8])
def test_random_sequence_is_the_same_on_a_real_process(seed: int) -> None:
    whole = sequence(seed, STEPS // 2)
    steps = tuple(step for step in whole.steps if step is not Command.START_WRONG)
    with qemu.images() as directory:
        differ(whole._replace(fault=Fault.NONE, steps=steps), directory, ProcessSide)


def test_grain_shows_in_the_allocation_alone() -> None:
    """QEMU saves whole units of 64 KiB, ours blocks of 4 KiB: rounded up they are the same."""
    writes = [Request(Verb.FORWARD, offset, length, offset) for offset, length in SCATTERED]
    steps = (Command.START, *(Requests((write,)) for write in writes))
    whole = Sequence(0, 64 * KiB, True, Fault.NONE, steps)

    async def story(directory: Path) -> None:
        for name in ("qemu", "ours"):
            (directory / name).mkdir()
        theirs, ours = QemuSide(directory / "qemu", whole), EngineSide(directory / "ours", whole)
        try:
            await ours.open()
            await Run(whole, theirs, ours).run()
            assert ours.engine.overlay_bytes[1] < sum(length + 2 * BLOCK for _, length in SCATTERED)
            units = {
                unit
                for offset, length, _ in ours.engine.receiver.pair.hidden.allocated_runs()
                for unit in range(offset // UNIT, -(-(offset + length) // UNIT))
            }
            theirs.qemu.quit()
            held = qemu.allocated(directory / "qemu/hidden.qcow2")
            assert units == {
                unit
                for offset, length in held
                for unit in range(offset // UNIT, -(-(offset + length) // UNIT))
            }
        finally:
            await ours.close()
            theirs.close()

    with qemu.images() as directory:
        asyncio.run(story(directory))
