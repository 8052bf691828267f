"""What the data of one host is called, and how that name changes: DRBD's generation identifiers, as values.

A *generation* names data. Hosts whose data has the same name have the same data,
but for what was in flight, or not yet flushed, when one of them died: its hot extents. A
new one is drawn whenever this host's data begins to go where the peer's does not:

    draw        current --> base --> history      the map begins to count, empty
    draw again  current ------------> history     the map counts since the same base as before

Nothing here does anything, and nothing is random: who draws brings the new generation. Each
event answers with a `Change`: the new identity, and what has to happen to the dirty
map *before* the record with that identity is saved. The order matters, since a host can
die between the two: blocks marked too many cost a little, a block that is missed is lost.
docs/pair.md says which event happens when; `state` ties each to roles and disk states.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind, one_line

HISTORY = 16
"""Generations that a host remembers besides its current and its base. What falls out costs a full comparison."""

_GENERATION = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


class Marks(enum.Enum):
    """Blocks that are marked in the dirty map before the record is saved."""

    NOTHING = "nothing"
    OVERLAYS = "what hidden or active holds"
    THEIRS = "the peer's dirty blocks, and the hot extents of both"
    ALL = "every block"


class Identity(NamedTuple):
    """The name of one host's data. `history` is newest first; "" is none.

    `base` is the generation since which the dirty map counts: the map has every block in which this data
    differs from it. `becoming` is set exactly while the disk is inconsistent: the generation
    that a resync is making of it. `current` then still names what it was before.
    """

    current: str = ""
    base: str = ""
    history: tuple[str, ...] = ()
    becoming: str = ""

    @property
    def known(self) -> frozenset[str]:
        """Every generation that this data is, or has passed through. Not what it is only becoming."""
        return frozenset((self.current, self.base, *self.history)) - {""}


class Change(NamedTuple):
    """What an event makes of an identity.

    First, if `clear`, the dirty map is emptied: nothing counts in it until then. Then `marks` are
    set and the map is made stable. Then the record is saved with `identity`.
    """

    identity: Identity
    clear: bool = False
    marks: Marks = Marks.NOTHING


BLANK = Identity()
"""A host that has never been of a pair, or has lost its record: nothing is known of its data."""


def generation(text: str) -> str:
    """`text`, if it is a UUID as str(uuid.uuid4()) writes it, in lower case. Raises `Error(BAD_REQUEST)`."""
    if not isinstance(text, str) or not _GENERATION.fullmatch(text):
        raise Error(
            Kind.BAD_REQUEST,
            f"a generation is a UUID such as 123e4567-e89b-42d3-a456-426614174000, found {one_line(repr(text), 60)}",
        )
    return text


def check(identity: Identity) -> Identity:
    """`identity`, if it is one that these events can make. Raises `Error(BAD_REQUEST)` and says what is wrong."""
    named = [text for text in (identity.current, identity.base, identity.becoming) if text]
    for text in (*named, *identity.history[: HISTORY + 1]):
        generation(text)
    if len(identity.history) > HISTORY:
        raise _contradiction(
            f"its history has {len(identity.history)} generations, at most {HISTORY} are kept"
        )
    if not identity.current and identity != BLANK:
        raise _contradiction("it has a past and no current generation")
    names = [text for text in (identity.current, identity.base) if text] + list(identity.history)
    if len(set(names)) != len(names):
        raise _contradiction("one generation stands in it twice")
    return identity


def _contradiction(text: str) -> Error:
    return Error(Kind.BAD_REQUEST, f"the identity of the data contradicts itself: {text}")


def begun(identity: Identity, new: str) -> Change:
    """A host without an identity gives its data a name: the first step of `start` on it."""
    if identity != BLANK:
        raise Error(Kind.INVALID_STATE, f"this data has an identity already: {identity.current}")
    return Change(Identity(_fresh(identity, new)))


def missed(identity: Identity, new: str) -> Change:
    """The first write that the peer will not get: from here on this data is another, and the map starts empty.

    The disk was flushed before, so that all that both had is stable here. What a death has left hot stays in its
    log until a resync has ended; every resync looks there too.
    """
    return _drawn(identity, new, Marks.NOTHING)


def promoted(identity: Identity, new: str) -> Change:
    """Promoted without the peer, to the latest that this host has."""
    return _drawn(identity, new, Marks.NOTHING)


def promoted_to_checkpoint(identity: Identity, new: str) -> Change:
    """Promoted to a checkpoint; or, by force, to the mix that an interrupted resync has left.

    The overlays name exactly what differs from the data that had this identity.
    """
    return _drawn(identity, new, Marks.OVERLAYS)


def first_target(identity: Identity, new: str) -> Change:
    """The operator names the peer as the source of a first synchronisation: data without a name gets one."""
    return Change(identity) if identity.current else begun(identity, new)


def first_source(identity: Identity, new: str, theirs: Identity) -> Change:
    """This host is the source of a first synchronisation: a new name, and the peer misses every block."""
    drawn = (
        _drawn(identity, new, Marks.NOTHING).identity if identity.current else Identity(_fresh(identity, new))
    )
    return full_source(drawn, theirs)


def full_source(identity: Identity, theirs: Identity) -> Change:
    """This host is the source of a full comparison: it counts since the peer's data, and all may differ.

    Saved before the target begins. From then on the comparison is a resync like any other, and
    goes on where it was after a restart.
    """
    _needs_current(theirs)
    if theirs.current == identity.current:
        raise Error(
            Kind.INVALID_STATE, f"both hosts have generation {identity.current}; draw a new one first"
        )
    return Change(_counting_since(identity, theirs.current), clear=True, marks=Marks.ALL)


def resolved(identity: Identity, theirs: Identity) -> Change:
    """The operator keeps this host's data, and gives the peer's up.

    If both count since the same generation, what differs is what either has written since;
    else all may differ.
    """
    _needs_current(theirs)
    if theirs.current == identity.current:
        raise Error(Kind.INVALID_STATE, f"both hosts have generation {identity.current}: nothing to resolve")
    if identity.base and identity.base == theirs.base and not theirs.becoming:
        return Change(_counting_since(identity, theirs.current), marks=Marks.THEIRS)
    return Change(_counting_since(identity, theirs.current), clear=True, marks=Marks.ALL)


def delta_source(identity: Identity, theirs: Identity) -> Change:
    """This host is the source of a resync by map: what only the peer knows of is marked here too, before it begins."""
    _needs_current(theirs)
    return Change(_whole(identity), marks=Marks.THEIRS)


def resync_begins(identity: Identity, source: Identity) -> Change:
    """The target, before the first write of a resync: a mix from here on. The source has saved its part."""
    _needs_current(identity)
    return Change(identity._replace(becoming=_whole(source).current))


def resync_ended_at_source(identity: Identity) -> Change:
    """Nothing is dirty any more, and the target has acknowledged all: the map counts for nothing.

    Saved *before* the target takes its name. Else a write that the target missed in between would
    be marked under a name that the target has too, and a promotion there would hide it.
    """
    settled = _whole(identity)._replace(base="")
    return Change(settled._replace(history=_history(settled, identity.base)))


def resync_ended_at_target(identity: Identity, source: Identity) -> Change:
    """The target takes the source's name. Everything is flushed, and the source has saved its part."""
    if not identity.becoming or source.current != identity.becoming or source.base:
        raise Error(
            Kind.INVALID_STATE,
            f"a resync towards generation {identity.becoming or 'none'} cannot end with a source that has "
            f"{source.current or 'none'} and counts since {source.base or 'nothing'}",
        )
    taken = Identity(source.current, history=source.history)
    return Change(taken._replace(history=_history(taken, *source.history, *_past(identity))))


def vouched(identity: Identity, theirs: Identity) -> Change:
    """The operator vouches that this disk is equal to the peer's: it takes the peer's name, without a resync."""
    if _whole(theirs).base:
        raise Error(
            Kind.INVALID_STATE, f"the peer's map counts since {theirs.base}: the disks are known to differ"
        )
    taken = Identity(theirs.current, history=theirs.history)
    return Change(taken._replace(history=_history(taken, *theirs.history, *_past(identity))))


def map_lost(identity: Identity, new: str) -> Change:
    """The dirty map is torn, or of another size: nothing counts, and the next resync compares everything."""
    fresh = identity._replace(current=_fresh(identity, new), base="")
    return Change(fresh._replace(history=_history(fresh, *_past(identity))), clear=True)


def unchanged(identity: Identity) -> Change:
    """The data keeps its name: a switch of the roles, a demotion."""
    return Change(identity)


def _drawn(identity: Identity, new: str, marks: Marks) -> Change:
    """A new current. What it was becomes base, if nothing counts yet; else the map goes on counting."""
    _needs_current(identity)
    fresh = _fresh(identity, new)
    if identity.base:
        drawn = identity._replace(current=fresh, becoming="")
        return Change(drawn._replace(history=_history(drawn, identity.current)), marks=marks)
    return Change(Identity(fresh, identity.current, identity.history), clear=True, marks=marks)


def _counting_since(identity: Identity, base: str) -> Identity:
    counting = _whole(identity)._replace(base=base)
    return counting._replace(history=_history(counting, identity.base))


def _past(identity: Identity) -> tuple[str, ...]:
    return (identity.current, identity.base, *identity.history)


def _history(identity: Identity, *newer: str) -> tuple[str, ...]:
    """The history with `newer` before it: no name twice, none that is current or base, bounded."""
    names = dict.fromkeys((*newer, *identity.history))
    kept = [name for name in names if name not in ("", identity.current, identity.base)]
    return tuple(kept[:HISTORY])


def _fresh(identity: Identity, new: str) -> str:
    if generation(new) in identity.known | {identity.becoming}:
        raise Error(Kind.BAD_REQUEST, f"generation {new} is not new: this data had it before")
    return new


def _whole(identity: Identity) -> Identity:
    """`identity`, if its data is no mix: only such data is a source."""
    _needs_current(identity)
    if identity.becoming:
        raise Error(Kind.INVALID_STATE, "this data is a mix, its resync has not ended: it cannot be a source")
    return identity


def _needs_current(identity: Identity) -> None:
    if not identity.current:
        raise Error(Kind.INVALID_STATE, "this data has no identity yet; start gives it one")
