"""What follows from what two hosts say of themselves: one table, of which the first row that applies counts.

`compare(mine, theirs)` is asked on both hosts with the same two `Facts`, and answers on each with
the mirror of the other's answer, so both do their part without another word. A row that has
a source is drawn once and stands in the table twice, seen from either end.

Where the facts contradict each other nothing is overwritten: that is a split brain, and the operator's to decide.
docs/pair.md shows the table.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from tcmu_replication.replication.facts import Disk, Ending, Facts
from tcmu_replication.replication.identity import BLANK
from tcmu_replication.replication.stages import Mode
from tcmu_replication.units import format_size


class Side(enum.Enum):
    """Which of the two hosts, seen from the one that asks."""

    MINE = "this host"
    THEIRS = "the peer"

    @property
    def other(self) -> Side:
        return Side.THEIRS if self is Side.MINE else Side.MINE


class Found(enum.Enum):
    """What the two data are to each other, and so what comes next."""

    IN_SYNC = "in sync"
    HOT = "resync of the hot extents"
    DELTA = "resync"
    FULL = "resync with a full comparison"
    FIRST_SYNC = "first synchronisation needed"
    SPLIT_BRAIN = "split brain"
    UNRELATED = "unrelated data"
    REFUSED = "refused"

    @property
    def proceeds(self) -> bool:
        """Whether both hosts act on it by themselves. The others wait for the operator."""
        return self in (Found.IN_SYNC, Found.HOT, Found.DELTA, Found.FULL)


class Span(enum.Enum):
    """What a resync looks at. The union of all that a verdict names is copied from the source to the target."""

    MY_DIRTY = "my dirty"
    THEIR_DIRTY = "their dirty"
    MY_HOT = "my hot"
    THEIR_HOT = "their hot"
    ALL = "all, by hash"


class Verdict(NamedTuple):
    """`row` names the row. `source` is where a resync reads; None: there is none, or nobody knows which.

    `may_be_source` is who can be named by the operator where the hosts do not decide. `words` say what it
    means and `advice` what to do, None if nothing.
    """

    found: Found
    row: str
    source: Side | None
    may_be_source: frozenset[Side]
    spans: tuple[Span, ...]
    words: str
    advice: str | None


class Row(NamedTuple):
    """One verdict. `applies(mine, theirs)`; `words` and `advice` are templates, see `_values`."""

    name: str
    applies: Callable[[Facts, Facts], bool]
    found: Found
    words: str
    advice: str | None = None
    source: Side | None = None
    may_be_source: frozenset[Side] = frozenset()
    spans: tuple[Span, ...] = ()


NOBODY: frozenset[Side] = frozenset()
EITHER = frozenset(Side)
HOTS = (Span.MY_HOT, Span.THEIR_HOT)
MAP = (Span.MY_DIRTY, *HOTS)
MAPS = (Span.MY_DIRTY, Span.THEIR_DIRTY, *HOTS)
ALL = (Span.ALL,)
_SPANS = {
    Span.MY_DIRTY: Span.THEIR_DIRTY,
    Span.THEIR_DIRTY: Span.MY_DIRTY,
    Span.MY_HOT: Span.THEIR_HOT,
    Span.THEIR_HOT: Span.MY_HOT,
    Span.ALL: Span.ALL,
}


def mirror_spans(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """The same spans seen from the other host, in the order of `Span`."""
    turned = {_SPANS[span] for span in spans}
    return tuple(span for span in Span if span in turned)


def _same(m: Facts, t: Facts) -> bool:
    return m.identity.current == t.identity.current


def _descends(m: Facts, t: Facts) -> bool:
    """Mine has passed through what they are."""
    return t.identity.current in (m.identity.base, *m.identity.history)


def _both(condition: Callable[[Facts, Facts], bool], m: Facts, t: Facts) -> bool:
    return condition(m, t) and condition(t, m)


def _blank(f: Facts) -> bool:
    return f.identity == BLANK


def _lost_cache(f: Facts) -> bool:
    """Its host died, and what was not flushed may be gone. One that serves does so by an operator's word: it counts."""
    return f.ending is Ending.CRASHED and f.hot_bytes > 0 and not f.serving


def _hot(m: Facts, t: Facts) -> bool:
    return m.hot_bytes > 0 or t.hot_bytes > 0


def _share(m: Facts, t: Facts) -> bool:
    return bool(
        (m.identity.known | {m.identity.becoming} - {""}) & (t.identity.known | {t.identity.becoming} - {""})
    )


def _facing(
    name: str,
    applies: Callable[[Facts, Facts], bool],
    found: Found,
    words: str,
    mirror: str,
    mirror_words: str,
    advice: str | None = None,
    spans: tuple[Span, ...] = (),
) -> Iterator[Row]:
    """A row that looks different from either end, and its mirror. If both hosts act on it, this host is the source."""
    if found.proceeds:
        source, turned, may = Side.MINE, Side.THEIRS, NOBODY
    else:
        source, turned, may = None, None, EITHER
    yield Row(name, applies, found, words, advice, source, may, spans)
    yield Row(
        mirror, lambda m, t: applies(t, m), found, mirror_words, advice, turned, may, mirror_spans(spans)
    )


FAILOVER_FIRST = (
    "say which host counts by `tcmu-replication failover {name} --to checkpoint`, there; then on the same host "
    "`tcmu-replication resolve {name} --keep local`"
)
SYNC_FROM = (
    "on either host `tcmu-replication start {name} --sync-from HOST`, HOST being the one whose data counts; the disk "
    "of the other is overwritten"
)
RESOLVE = (
    "look at both hosts (`tcmu-replication status {name}` shows when they parted and what each has written since), "
    "then `tcmu-replication resolve {name} --keep local` on the host whose data counts, or `--keep peer` on the "
    "other. What is given up stays there as an epoch until it is removed"
)
PROMOTE = "`tcmu-replication failover {name} --to latest` on the host that the initiators use"
MEND = "nothing is replicated until that is mended"

TABLE: tuple[Row, ...] = (
    Row(
        "versions",
        lambda m, t: m.protocol[0] > t.protocol[1] or t.protocol[0] > m.protocol[1],
        Found.REFUSED,
        "the hosts have no version of their protocol in common: this one speaks {my_protocol}, the peer "
        "{their_protocol} (software {my_software} and {their_software})",
        f"upgrade the older one; {MEND}",
    ),
    Row(
        "names",
        lambda m, t: m.name != t.name,
        Found.REFUSED,
        "this host has the resource {name}, the peer says {their_name}",
        f"one of the resource files names the wrong port or the wrong address; {MEND}",
    ),
    Row(
        "sizes",
        lambda m, t: m.size != t.size,
        Found.REFUSED,
        "{name} has {my_size} bytes here and {their_size} bytes on the peer",
        "both disks must be as large as the resource file says; `tcmu-replication resize {name}` grows it on both; "
        + MEND,
    ),
    Row(
        "both-blank",
        lambda m, t: _blank(m) and _blank(t),
        Found.FIRST_SYNC,
        "neither host knows anything of its data yet",
        SYNC_FROM,
        may_be_source=EITHER,
    ),
    Row(
        "nobody-whole",
        lambda m, t: not m.whole and not t.whole,
        Found.REFUSED,
        "neither disk is a state that a primary had: no resync can have either as its source",
        FAILOVER_FIRST,
    ),
    *_facing(
        "they-are-blank",
        lambda m, t: _blank(t),
        Found.FIRST_SYNC,
        "the peer knows nothing of its data: it is new, or has lost its record",
        "we-are-blank",
        "this host knows nothing of its data: it is new, or has lost its record",
        SYNC_FROM,
    ),
    Row(
        "both-primary",
        lambda m, t: _same(m, t) and m.role is Mode.PRIMARY and t.role is Mode.PRIMARY,
        Found.SPLIT_BRAIN,
        "both hosts are primary of one generation of data: one of them has the record of another time",
        RESOLVE,
        may_be_source=EITHER,
    ),
    Row(
        "contradiction",
        lambda m, t: _both(_descends, m, t),
        Found.SPLIT_BRAIN,
        "each host says that its data comes from the other's: one of them has the record of another time",
        RESOLVE,
        may_be_source=EITHER,
    ),
    *_facing(
        "they-become-ours",
        lambda m, t: t.identity.becoming == m.identity.current,
        Found.DELTA,
        "the resync from here to the peer goes on; {to_copy} are left",
        "we-become-theirs",
        "the resync from the peer to here goes on; {to_copy} are left",
        spans=MAP,
    ),
    *_facing(
        "they-become-our-base",
        lambda m, t: bool(m.identity.base) and t.identity.becoming == m.identity.base,
        Found.DELTA,
        "the peer had all but the end of a resync from here; {to_copy} are left",
        "we-become-their-base",
        "this host had all but the end of a resync from the peer; {to_copy} are left",
        spans=MAP,
    ),
    *_facing(
        "they-become-our-past",
        lambda m, t: t.identity.becoming in m.identity.history,
        Found.FULL,
        "a resync to the peer was cut off long ago, and what it lacks since then is not known",
        "we-become-their-past",
        "a resync to this host was cut off long ago, and what it lacks since then is not known",
        spans=ALL,
    ),
    *_facing(
        "they-are-a-mix",
        lambda m, t: bool(t.identity.becoming) and _share(m, t),
        Found.SPLIT_BRAIN,
        "the disk of the peer is a mix, of data that this host does not have",
        "we-are-a-mix",
        "the disk of this host is a mix, of data that the peer does not have",
        RESOLVE,
    ),
    *_facing(
        "same-and-primary-counts",
        lambda m, t: _same(m, t) and m.role is Mode.PRIMARY and bool(m.identity.base) and not t.identity.base,
        Found.DELTA,
        "both have the same generation, and yet this primary counts {to_copy} as different",
        "same-and-their-primary-counts",
        "both have the same generation, and yet the primary counts {to_copy} as different",
        spans=MAP,
    ),
    Row(
        "same-and-counted",
        lambda m, t: _same(m, t) and bool(m.identity.base or t.identity.base),
        Found.SPLIT_BRAIN,
        "both have the same generation, and yet {my_dirty} count as different here and {their_dirty} on the peer",
        RESOLVE,
        may_be_source=EITHER,
    ),
    *_facing(
        "same-and-they-are-outdated",
        lambda m, t: _same(m, t) and _hot(m, t) and m.disk is Disk.UPTODATE and t.disk is Disk.OUTDATED,
        Found.HOT,
        "a host has died; {to_copy} may differ, and the peer was outdated",
        "same-and-we-are-outdated",
        "a host has died; {to_copy} may differ, and this host was outdated",
        spans=HOTS,
    ),
    *_facing(
        "same-and-they-crashed",
        lambda m, t: _same(m, t) and _lost_cache(t) and not _lost_cache(m),
        Found.HOT,
        "the peer was down; {to_copy} may be missing there, and are here",
        "same-and-we-crashed",
        "this host was down; {to_copy} may be missing here, and are on the peer",
        spans=HOTS,
    ),
    *_facing(
        "same-and-hot",
        lambda m, t: _same(m, t) and _hot(m, t) and m.role is Mode.PRIMARY,
        Found.HOT,
        "a worker or both hosts have died; {to_copy} may differ, and this primary's count",
        "same-and-hot-there",
        "a worker or both hosts have died; {to_copy} may differ, and the primary's count",
        spans=HOTS,
    ),
    Row(
        "same-and-nobody-primary",
        lambda m, t: _same(m, t) and _hot(m, t),
        Found.HOT,
        "{to_copy} may differ after a death, and neither host is primary",
        PROMOTE,
        spans=HOTS,
    ),
    Row(
        "in-sync",
        _same,
        Found.IN_SYNC,
        "both hosts have the same data",
    ),
    *_facing(
        "behind-and-written",
        lambda m, t: _descends(m, t) and t.role is Mode.PRIMARY and t.dirty_bytes > 0,
        Found.SPLIT_BRAIN,
        "this host's data comes from the peer's, and yet the peer is primary and has written {their_dirty} since",
        "ahead-and-written",
        "the peer's data comes from this host's, and yet this host is primary and has written {my_dirty} since",
        RESOLVE,
    ),
    *_facing(
        "they-are-behind",
        lambda m, t: m.identity.base == t.identity.current,
        Found.DELTA,
        "the peer is behind: {to_copy} are missing there",
        "we-are-behind",
        "this host is behind: {to_copy} are missing here",
        spans=MAPS,
    ),
    *_facing(
        "they-are-far-behind",
        lambda m, t: t.identity.current in m.identity.history,
        Found.FULL,
        "the peer is behind, and what it lacks is not known",
        "we-are-far-behind",
        "this host is behind, and what it lacks is not known",
        spans=ALL,
    ),
    Row(
        "parted",
        _share,
        Found.SPLIT_BRAIN,
        "both hosts have written on their own since they parted: here {my_dirty}, there {their_dirty}",
        RESOLVE,
        may_be_source=EITHER,
    ),
    Row(
        "unrelated",
        lambda m, t: True,
        Found.UNRELATED,
        "the data of the two hosts has nothing in common",
        SYNC_FROM,
        may_be_source=EITHER,
    ),
)


def compare(mine: Facts, theirs: Facts) -> Verdict:
    """The one verdict for two facts that `facts.check` let pass. The peer's answer is the mirror of it."""
    row = row_of(mine, theirs)
    values = _values(mine, theirs, row)
    sources = {Side.MINE: mine, Side.THEIRS: theirs}
    return Verdict(
        row.found,
        row.name,
        row.source,
        frozenset(s for s in row.may_be_source if sources[s].whole) or row.may_be_source,
        row.spans,
        row.words.format_map(values),
        None if row.advice is None else row.advice.format_map(values),
    )


def row_of(mine: Facts, theirs: Facts) -> Row:
    """The first row that applies; the last always does."""
    return next(row for row in TABLE if row.applies(mine, theirs))


@cache
def row_named(name: str) -> Row:
    """The row of that name. Raises StopIteration if there is none."""
    return next(row for row in TABLE if row.name == name)


def _values(m: Facts, t: Facts, row: Row) -> dict[str, str]:
    """What stands in the templates. `to_copy` is at most what a resync looks at: the spans may overlap."""
    sizes = {
        Span.MY_DIRTY: m.dirty_bytes,
        Span.THEIR_DIRTY: t.dirty_bytes,
        Span.MY_HOT: m.hot_bytes,
        Span.THEIR_HOT: t.hot_bytes,
        Span.ALL: m.size,
    }
    return {
        "name": m.name,
        "their_name": t.name,
        "my_size": str(m.size),
        "their_size": str(t.size),
        "my_protocol": f"{m.protocol[0]} to {m.protocol[1]}",
        "their_protocol": f"{t.protocol[0]} to {t.protocol[1]}",
        "my_software": m.software or "unknown",
        "their_software": t.software or "unknown",
        "my_dirty": format_size(m.dirty_bytes),
        "their_dirty": format_size(t.dirty_bytes),
        "to_copy": format_size(min(m.size, sum(sizes[span] for span in row.spans))),
    }
