"""A pair in miniature: two hosts, a link, two blocks, and everything that can happen to them, one step at a time.

Only the tables of `identity`, `verdict` and `state` decide. What is here is what those tables talk of: disks with a
page cache, a dirty map, a log of hot extents, a checkpoint; and what initiators were told.
A record is saved in a step of its own, so that a death can fall before or after it.

A block holds the number of the write that it was written by, and each write knows which one it replaced. So
"has it" means: holds that write, or one that came after it.
"""

from __future__ import annotations

import uuid
from functools import cache
from typing import NamedTuple

from tcmu_replication.replication import state as rules
from tcmu_replication.replication.facts import Ending
from tcmu_replication.replication.stages import Mode
from tcmu_replication.replication.state import Event, State
from tcmu_replication.replication.verdict import Found

BLOCKS = 2
EVERY = frozenset(range(BLOCKS))
NONE: frozenset[int] = frozenset()
NAMES = ("alpha", "beta")
PRIMARY, SECONDARY = Mode.PRIMARY, Mode.SECONDARY

Content = tuple[int, ...]


class Violation(Exception):  # noqa: N818 - it is none of ours that failed
    """An invariant does not hold."""


class Host(NamedTuple):
    """One host. `disk` is stable, `cache` what reads find. `point` is the checkpoint, `saved` the blocks of hidden.

    `hot`: in the log, of this life; `old`: of lives that have ended, until that is settled. `died`: how the
    last life ended, told to the next. `answered`: what both said at the last handshake of this life; see `spoken`.
    What the checker alone knows: `need` is what this host's initiators were told is there, `heard` what its
    peer's initiators had been told when the peer was last heard (None: this life has not heard it), `alone` what was
    acknowledged without the peer, `waived` that a promotion of the peer said beforehand what it loses.
    """

    state: State
    disk: Content = (0,) * BLOCKS
    cache: Content = (0,) * BLOCKS
    point: Content = (0,) * BLOCKS
    saved: frozenset[int] = NONE
    dirty: frozenset[int] = NONE
    hot: frozenset[int] = NONE
    old: frozenset[int] = NONE
    up: bool = True
    died: Ending = Ending.CLEAN
    away: bool = False
    serving: bool = False
    answered: int | None = None
    left_behind: bool = False
    """It has found that it is left behind, and has not saved that yet. Nothing but a death comes between."""
    flight: tuple[int, int, bool] | None = None
    """A write under way: block, number, whether the peer has it."""
    need: Content = (0,) * BLOCKS
    heard: Content | None = (0,) * BLOCKS
    alone: tuple[int | None, ...] = (None,) * BLOCKS
    waived: bool = False


class Session(NamedTuple):
    """What both agreed on at a handshake. `saves` are still to be made, in this order; `todo` is still to be copied."""

    found: Found
    source: int | None
    saves: tuple[tuple[int, Event], ...] = ()
    begun: bool = False
    todo: frozenset[int] = NONE
    half_done: bool = False
    compare_again: bool = False


class Budget(NamedTuple):
    """How often each kind of event can still happen."""

    writes: int
    deaths: int
    cuts: int
    commands: int


class World(NamedTuple):
    hosts: tuple[Host, Host]
    budget: Budget
    link: bool = True
    session: Session | None = None
    drawn: int = 0
    parents: tuple[int, ...] = (0,)
    second: bool = False
    """An operator has promoted, or started, a second host while the first was serving."""
    parted: bool = False
    """An operator has promoted or started a host without its peer, so that a split brain is no false alarm."""
    strangers: bool = False
    """The two hosts began with data that has nothing in common."""
    torn: bool = False
    """A dirty map was lost, so that a full comparison is no waste."""


@cache
def generation(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


def put(w: World, h: int, **changes: object) -> World:
    hosts = list(w.hosts)
    hosts[h] = hosts[h]._replace(**changes)
    return w._replace(hosts=(hosts[0], hosts[1]))


def has(w: World, value: int, wanted: int) -> bool:
    """Whether `value` is `wanted`, or was written over it."""
    while value > wanted:
        value = w.parents[value]
    return value == wanted


def has_all(w: World, content: Content, wanted: Content) -> bool:
    return all(has(w, value, want) for value, want in zip(content, wanted, strict=True))


def lost_cache(host: Host) -> bool:
    """Whether a loss of power may have taken what was not flushed, and that is not settled yet."""
    worst = rules.opened(host.state, host.died).ending
    return worst is Ending.CRASHED and bool(host.old)


def still_there(w: World, host: Host) -> Content:
    """What a host's initiators can count on, after they were told that something is lost."""
    pairs = zip(host.cache, host.need, strict=True)
    return tuple(want if has(w, have, want) else have for have, want in pairs)


def write_block(host: Host, block: int, value: int) -> Host:
    """A write of a host's disk: the log first, the pre-image, then the page cache."""
    cached = (*host.cache[:block], value, *host.cache[block + 1 :])
    return host._replace(cache=cached, hot=host.hot | {block}, saved=host.saved | {block})


def flush(host: Host) -> Host:
    """What is stable leaves the log, but for the write that is under way."""
    under_way = frozenset((host.flight[0],)) if host.flight else NONE
    return host._replace(disk=host.cache, hot=host.hot & under_way)


def abandon(host: Host) -> Host:
    """A host that does not serve any more gives up the write under way. One host may have it: it stays hot."""
    return host._replace(flight=None, old=host.old | {host.flight[0]}) if host.flight else host


def checkpoint(host: Host) -> Host:
    return host._replace(point=host.cache, saved=NONE)
