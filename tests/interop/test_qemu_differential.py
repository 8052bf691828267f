"""Random sequences on QEMU's secondary and on ours at the same time: every byte, every error, every stage.

TCMU_REPLICATION_SEED=123 pytest tests/interop/test_qemu_differential.py     one sequence again
make soak N=500                                                              any number of new ones
"""

from __future__ import annotations

import os
import random

import pytest

from tests.interop.differential.run import differ
from tests.interop.differential.steps import sequence
from tests.support import qemu
from tests.support.tools import requires

pytestmark = [pytest.mark.interop, pytest.mark.timeout(60), requires("qemu-system-x86_64", "qemu-img")]

STEPS = 150
IN_MAKE_TEST = 24


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
