"""What a differential run does: steps, and random sequences of them.

A sequence is made whole from its seed before anything runs, so a seed names it
for ever. The generator follows the stage, to make commands that are refused
rare but never absent.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from typing import NamedTuple

from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import KiB, MiB

SECTOR = 512
"""QEMU's grain."""
LENGTH = 3 * MiB + 37 * SECTOR
"""Ends inside a block of 4 KiB, inside a cluster of 64 KiB and inside one of 1 MiB."""
CLUSTERS = (512, 4 * KiB, 64 * KiB, 64 * KiB, 1 * MiB)
"""Cluster sizes of QEMU's overlays."""
BAD = range(1 * MiB, 1 * MiB + 64 * KiB)
"""Where the disk fails, in sequences with a fault: one unit of QEMU's copy and of its merge."""


class Verb(enum.Enum):
    """What a request does, and through which door."""

    FORWARD = "forwarded write"
    FORWARD_ZERO = "forwarded zeroes"
    FORWARD_TRIM = "forwarded trim"
    FORWARD_READ = "read of the disk"
    OWN = "own write"
    OWN_ZERO = "own zeroes"
    OWN_TRIM = "own trim"
    READ = "read"

    @property
    def forwarded(self) -> bool:
        """Whether it comes from the primary."""
        return self in (Verb.FORWARD, Verb.FORWARD_ZERO, Verb.FORWARD_TRIM, Verb.FORWARD_READ)

    @property
    def trims(self) -> bool:
        """Whether it is a trim."""
        return self in (Verb.FORWARD_TRIM, Verb.OWN_TRIM)


class Request(NamedTuple):
    """One request. `tag` makes its data."""

    verb: Verb
    offset: int
    length: int
    tag: int

    @property
    def data(self) -> bytes:
        """What it writes: sectors that name their request and their place."""
        sectors = range(self.length // SECTOR)
        return b"".join(struct_of(self.tag, sector) * (SECTOR // 16) for sector in sectors)

    def __repr__(self) -> str:
        return f"{self.verb.name}({self.offset:#x}, {self.length:#x}, {self.tag})"


def struct_of(tag: int, sector: int) -> bytes:
    """Sixteen bytes that no other request's sector has."""
    return tag.to_bytes(8, "big") + sector.to_bytes(8, "little")


class Requests(NamedTuple):
    """Requests in flight together; those that write through one door do not overlap."""

    requests: tuple[Request, ...]


class Command(enum.Enum):
    """A command of replication, as a controller gives it."""

    START = "start"
    START_WRONG = "start in the other mode"
    CHECKPOINT = "checkpoint"
    GET_ERROR = "get error"
    STOP = "stop"
    FAILOVER = "failover"
    SETTLE = "wait for the end of the commit"
    RESTART = "begin a new pairing"
    REOPEN = "end our process and start it again; QEMU goes on"


Step = Requests | Command


class Fault(enum.Enum):
    """What the disk does not do at `BAD`."""

    NONE = "none"
    WRITE = "write"
    READ = "read"


class Sequence(NamedTuple):
    """All of one run."""

    seed: int
    cluster: int
    durable: bool
    fault: Fault
    steps: tuple[Step, ...]


REFUSED = (Command.START, Command.START_WRONG, Command.CHECKPOINT, Command.STOP, Command.GET_ERROR)

WEIGHTS: dict[Stage, dict[Command | None, int]] = {
    # None: requests
    Stage.NONE: dict.fromkeys(REFUSED, 2)
    | {None: 3, Command.START: 4, Command.FAILOVER: 1, Command.REOPEN: 1},
    Stage.RUNNING: {
        None: 75,
        Command.CHECKPOINT: 10,
        Command.GET_ERROR: 2,
        Command.START: 1,
        Command.START_WRONG: 1,
        Command.FAILOVER: 4,
        Command.STOP: 2,
        Command.RESTART: 2,
        Command.REOPEN: 3,
    },
    Stage.FAILOVER: dict.fromkeys(REFUSED, 1)
    | {None: 8, Command.SETTLE: 4, Command.FAILOVER: 1, Command.REOPEN: 2},
    Stage.DONE: dict.fromkeys(REFUSED, 1)
    | {None: 12, Command.FAILOVER: 1, Command.RESTART: 4, Command.REOPEN: 1},
}
MOVES = {
    (Stage.NONE, Command.START): Stage.RUNNING,
    (Stage.RUNNING, Command.FAILOVER): Stage.FAILOVER,
    (Stage.RUNNING, Command.STOP): Stage.DONE,
    (Stage.FAILOVER, Command.SETTLE): Stage.DONE,
    (Stage.DONE, Command.RESTART): Stage.RUNNING,
}


def sequence(seed: int, count: int) -> Sequence:
    """The sequence that `seed` names, of `count` steps."""
    rng = random.Random(seed)
    fault = rng.choice([Fault.NONE] * 4 + [Fault.WRITE, Fault.READ])
    cluster = rng.choice(CLUSTERS) if fault is Fault.NONE else 64 * KiB
    durable = rng.random() < 0.5
    return Sequence(seed, cluster, durable, fault, tuple(_steps(rng, count, fault)))


def _steps(rng: random.Random, count: int, fault: Fault) -> Iterator[Step]:
    stage, tag = Stage.NONE, 1
    for _ in range(count):
        weights = WEIGHTS[stage]
        command = rng.choices(list(weights), list(weights.values()))[0]
        if command is None:
            requests = tuple(_requests(rng, stage, fault, tag))
            tag += 8
            if requests:
                yield Requests(requests)
            continue
        yield command
        if stage is Stage.RUNNING and command is Command.FAILOVER and fault is not Fault.NONE:
            # The commit may fail, at no known moment: nothing compares before it has ended.
            yield Command.SETTLE
            stage = Stage.DONE
            continue
        if stage is Stage.RUNNING and command is Command.STOP:
            # QEMU's stop always fails and leaves top a mix: nothing but a new pairing compares after it.
            yield Command.RESTART
            continue
        stage = MOVES.get((stage, command), stage)
    if stage is Stage.FAILOVER:
        yield Command.SETTLE


def _requests(rng: random.Random, stage: Stage, fault: Fault, tag: int) -> Iterator[Request]:
    """One request, or several in flight together."""
    taken: dict[bool, list[range]] = {True: [], False: []}
    for number in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if stage is Stage.RUNNING:
            verb = rng.choices(list(Verb), (30, 4, 2, 6, 25, 3, 2, 10))[0]
        else:
            verb = rng.choices((Verb.OWN, Verb.OWN_ZERO, Verb.READ), (6, 1, 4))[0]
        if verb.trims and fault is not Fault.NONE:
            continue
        offset, length = _range(rng)
        place = range(offset, offset + length)
        if verb in (Verb.OWN, Verb.OWN_ZERO) and _meet(place, BAD) and not _may_own_bad(stage, fault):
            continue
        if any(_meet(place, other) for other in taken[verb.forwarded]):
            continue
        taken[verb.forwarded].append(place)
        yield Request(verb, offset, length, tag + number)


def _range(rng: random.Random) -> tuple[int, int]:
    """Any sectors, more often near the edges of blocks and clusters and at the end of the disk."""
    sectors = LENGTH // SECTOR
    longest = rng.choice((1, 8, 16, 130, 600, 2200))
    if rng.random() < 0.5:
        unit = rng.choice((8, 128, 128, 2048))
        first = rng.randrange(sectors // unit + 1) * unit + rng.choice((-1, 0, 0, 0, 1))
    else:
        first = rng.randrange(sectors)
    first = min(max(first, 0), sectors - 1)
    count = rng.choice((longest, rng.randint(1, longest)))
    if rng.random() < 0.03:
        count = sectors
    return first * SECTOR, min(count, sectors - first) * SECTOR


def _may_own_bad(stage: Stage, fault: Fault) -> bool:
    """Where both grains give the same: a bad read meets the larger cluster's filling, a bad write the split."""
    return fault is Fault.NONE or (fault is Fault.WRITE and stage is Stage.RUNNING)


def _meet(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
