"""How much work a run does: a full run, a quick one, and one that only shows that the code runs."""

from __future__ import annotations

from typing import NamedTuple

from tcmu_replication.units import GiB, KiB, MiB


class Scale(NamedTuple):
    """Lengths in bytes; `small` and `large` are changes before the pauses that are compared.

    `durable` is written to a disk of `durable_disk`, on a real file system, `activity` with
    the activity log and without.
    """

    rounds: int
    disk: int
    random: int
    sequential: int
    changes: int
    small: int
    large: int
    half: int
    starts: int
    ring: int
    durable: int
    durable_disk: int
    activity: int


FULL = Scale(
    rounds=5, disk=2 * GiB, random=96 * MiB, sequential=768 * MiB, changes=1 * GiB,
    small=16 * MiB, large=4 * GiB, half=512 * MiB, starts=5, ring=64 * MiB,
    durable=16 * MiB, durable_disk=256 * MiB, activity=512 * MiB,
)  # fmt: skip
QUICK = FULL._replace(
    rounds=2,
    disk=1 * GiB,
    random=32 * MiB,
    sequential=512 * MiB,
    large=1 * GiB,
    starts=2,
    ring=32 * MiB,
    activity=256 * MiB,
)
TINY = Scale(
    rounds=1, disk=8 * MiB, random=512 * KiB, sequential=4 * MiB, changes=4 * MiB,
    small=1 * MiB, large=6 * MiB, half=2 * MiB, starts=1, ring=1 * MiB,
    durable=512 * KiB, durable_disk=8 * MiB, activity=512 * KiB,
)  # fmt: skip
