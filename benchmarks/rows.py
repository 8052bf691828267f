"""What is measured: a row is one kind of work, with what ours must reach against QEMU."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table.

    `title` may name the lengths of the `Scale`. `better` says how a ratio is
    formed: "more" is ours/QEMU, "less" is QEMU/ours; QEMU stands for the side `against`.
    `target` is the least ratio, None where there is nothing to compare with or nothing was asked.
    `beside` names another row of ours to compare with, instead of QEMU.
    """

    title: str
    unit: str
    better: str = "more"
    target: float | None = None
    beside: str | None = None
    against: str = "QEMU"

    @property
    def with_qemu(self) -> bool:
        """Whether it is compared with QEMU."""
        return self.beside is None and self.against == "QEMU"


_SENT = 1 / 1.1
"""For each byte that differs at most 1.1 are sent."""

ROWS: dict[str, Row] = {
    "forwarded-4k-first": Row("forwarded 4 KiB random writes, first touch", "IOPS", target=4),
    "forwarded-4k-saved": Row("the same, blocks already saved", "IOPS", target=3),
    "forwarded-1m-first": Row("forwarded 1 MiB sequential writes, first touch", "MiB/s", target=5),
    "lun-4k-write": Row("secondary's LUN, 4 KiB random writes", "IOPS", target=8),
    "lun-4k-read": Row("secondary's LUN, 4 KiB random reads", "IOPS", target=3),
    "lun-1m-write": Row("secondary's LUN, 1 MiB writes", "MiB/s", target=1.5),
    "lun-1m-read": Row("secondary's LUN, 1 MiB reads", "MiB/s", target=1.2),
    "pause": Row("checkpoint pause after {changes} of changes, under load", "ms", "less", 20),
    "failover": Row("failover to the checkpoint: command to first accepted write", "ms", "less", 10),
    "commit": Row("commit behind it", "MiB/s", target=2),
    "primary-4k": Row("primary, 4 KiB random writes through mirror and filter", "IOPS", target=3),
    "pause-small": Row("checkpoint pause after {small} of changes, under load", "ms", "less"),
    "pause-large": Row("checkpoint pause after {large} of changes, under load", "ms", "less"),
    "durable-on": Row("forwarded 4 KiB random writes on a disk, first touch, durable = true", "IOPS"),
    "durable-off": Row("the same with durable = false", "IOPS"),
    "activity-off": Row(
        "primary's chain, 4 KiB random writes over the whole disk, without an activity log", "IOPS"
    ),
    "activity-on": Row(
        "the same with one that covers a quarter of the disk", "IOPS", target=0.9, beside="activity-off"
    ),
    "start-small": Row("worker start with a 1 GiB disk", "ms", "less"),
    "start-large": Row("worker start with a 16 TiB sparse disk", "ms", "less"),
    "memory-small": Row("its memory with a 1 GiB disk", "MiB", "less"),
    "memory-large": Row("its memory with a 16 TiB sparse disk", "MiB", "less"),
    "resync-dense": Row(
        "resync of {sequential}, all dirty (in QEMU's place: nbdcopy)", "MiB/s", target=0.8, against="nbdcopy"
    ),
    "resync-checkerboard": Row("resync, every other 4 KiB block dirty", "MiB/s", target=2),
    "resync-sent-dense": Row(
        "bytes sent / bytes that differ, all dirty", "", "less", target=_SENT, against="limit"
    ),
    "resync-sent-checkerboard": Row(
        "the same, every other 4 KiB block", "", "less", target=_SENT, against="limit"
    ),
    "resync-sent-random": Row("the same, random 1 %", "", "less", target=_SENT, against="limit"),
    "ring-4k-write": Row("ring, 4 KiB writes", "commands/s"),
    "ring-4k-read": Row("ring, 4 KiB reads", "commands/s"),
    "ring-256k-write": Row("ring, 256 KiB writes", "commands/s"),
    "ring-256k-read": Row("ring, 256 KiB reads", "commands/s"),
}
"""By the name that the JSON and `--only` use. QEMU has no counterpart of those without a ratio to it."""


class Sample(NamedTuple):
    """One measurement of a row. `cpu_us` is what the servers used per request, in microseconds."""

    row: str
    side: str
    value: float
    cpu_us: float | None = None
