"""What both hosts tell each other at every connect, and what of it is believed.

The peer's `Facts` are hostile input: a peer may be broken, an impostor, or restored
from last year's backup. `check` refuses what is out of range, and what no host that follows the rules can
say of itself; what has a safer reading gets that. Nothing here does anything.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind, one_line
from tcmu_replication.replication import identity as identities
from tcmu_replication.replication.identity import BLANK, Identity
from tcmu_replication.replication.stages import Mode
from tcmu_replication.units import BLOCK, format_size, round_up

NAME = 255
"""Characters of a resource's name, and of a software version."""
PROTOCOLS = 1000
"""The highest protocol version that is believed."""
COUNT = (1 << 63) - 1
"""The highest count and size."""


class Disk(enum.Enum):
    """What a host's data is worth, as far as this host can know."""

    UPTODATE = "uptodate"
    """It has all that was acknowledged."""
    OUTDATED = "outdated"
    """A past state that the primary had, whole."""
    INCONSISTENT = "inconsistent"
    """A mix: a resync is under way. The checkpoint in disk and hidden may still be exact."""


class Ending(enum.Enum):
    """The worst end of this host's lives since its data was last known to be in sync."""

    CLEAN = "clean"
    """Flushed and closed, or alive ever since."""
    KILLED = "killed"
    """The process died and the kernel lived on: what was in flight may be here or not."""
    CRASHED = "crashed"
    """The host died and its page cache with it: what was not flushed may be gone too."""


class Facts(NamedTuple):
    """What a host says of itself and one resource.

    `protocol` is the lowest and the highest version that it speaks. `dirty_bytes`: what the map counts since
    `identity.base`. `hot_bytes`: where a life that has ended may have left a difference. Both are at most the size,
    in blocks; a host that has lost its log of hot extents says the whole size. `promoted`: it was promoted
    without its peer, and the two have not agreed since. `serving`: it acknowledges writes of initiators
    now. `handing_over`: it has given up its role in a switch, and has not heard that the peer took it.
    """

    protocol: tuple[int, int]
    name: str
    size: int
    role: Mode
    disk: Disk
    identity: Identity = BLANK
    dirty_bytes: int = 0
    hot_bytes: int = 0
    ending: Ending = Ending.CLEAN
    epoch: int = 0
    software: str = ""
    promoted: bool = False
    serving: bool = False
    handing_over: bool = False

    @property
    def whole(self) -> bool:
        """Whether the data is a state that some primary had, and no mix."""
        return self.identity != BLANK and not self.identity.becoming


class Rule(NamedTuple):
    """One thing that an honest host does not say. `found` is a template over the facts."""

    name: str
    broken: Callable[[Facts], bool]
    found: str


def _count(value: int, most: int = COUNT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _text(value: str) -> bool:
    return isinstance(value, str) and len(value) <= NAME and value.isprintable()


def _versions(protocol: tuple[int, int]) -> bool:
    return all(_count(version, PROTOCOLS) for version in protocol) and 1 <= protocol[0] <= protocol[1]


RANGES: tuple[Rule, ...] = (
    Rule("protocol", lambda f: not _versions(f.protocol), "speaks the protocol versions {protocol}"),
    Rule(
        "name",
        lambda f: not f.name or not _text(f.name),
        "has a name that is empty, too long or not printable",
    ),
    Rule(
        "software",
        lambda f: not _text(f.software),
        "has a software version that is too long or not printable",
    ),
    Rule("size", lambda f: not _count(f.size) or f.size == 0, "has a size of {size} bytes"),
    Rule("epoch", lambda f: not _count(f.epoch), "is in epoch {epoch}"),
    Rule(
        "dirty-bytes",
        lambda f: not _count(f.dirty_bytes, round_up(f.size, BLOCK)),
        "has {dirty_bytes} dirty bytes",
    ),
    Rule(
        "hot-bytes", lambda f: not _count(f.hot_bytes, round_up(f.size, BLOCK)), "has {hot_bytes} hot bytes"
    ),
)
CONTRADICTIONS: tuple[Rule, ...] = (
    Rule(
        "dirty-without-base",
        lambda f: f.dirty_bytes > 0 and not f.identity.base,
        "has {dirty} dirty, and no generation since which that counts",
    ),
    Rule(
        "becoming-and-whole",
        lambda f: bool(f.identity.becoming) != (f.disk is Disk.INCONSISTENT),
        "is {disk}, and a resync of it is {under_way}",
    ),
    Rule(
        "primary-not-uptodate",
        lambda f: f.role is Mode.PRIMARY and f.disk is not Disk.UPTODATE,
        "is primary with a disk that is {disk}",
    ),
    Rule(
        "serving-secondary",
        lambda f: f.role is Mode.SECONDARY and f.serving,
        "is secondary, and serves writes",
    ),
    Rule("serving-blank", lambda f: f.serving and f.identity == BLANK, "serves data that has no identity"),
    Rule(
        "promoted-secondary",
        lambda f: f.role is Mode.SECONDARY and f.promoted,
        "was promoted, and is secondary",
    ),
    Rule(
        "handing-over-primary",
        lambda f: f.role is Mode.PRIMARY and f.handing_over,
        "has given up its role in a switch, and is primary",
    ),
)


def check(facts: Facts) -> Facts:
    """What is believed of the peer's `facts`: the same, or a safer reading.

    Hot extents of a host that says that it ended well are counted as if its process had been killed.
    Raises `Error(PEER_LIED)` for what is out of range or contradicts itself.
    """
    for rule in RANGES:
        _hold(rule, facts)
    try:
        identities.check(facts.identity)
    except Error as e:
        raise Error(Kind.PEER_LIED, f"the peer's identity of its data is not possible: {e}") from e
    for rule in CONTRADICTIONS:
        _hold(rule, facts)
    if facts.hot_bytes and facts.ending is Ending.CLEAN:
        return facts._replace(ending=Ending.KILLED)
    return facts


def _hold(rule: Rule, facts: Facts) -> None:
    if not rule.broken(facts):
        return
    values = facts._asdict() | {
        "disk": facts.disk.value,
        "dirty": format_size(facts.dirty_bytes) if _count(facts.dirty_bytes) else "",
        "under_way": "under way" if facts.identity.becoming else "not under way",
    }
    found = one_line(rule.found.format_map(values))
    raise Error(
        Kind.PEER_LIED,
        f"the peer says of itself that it {found}: that cannot be. Nothing was changed. See to the peer's worker and "
        "its version (`tcmu-replication status`, there)",
    )
