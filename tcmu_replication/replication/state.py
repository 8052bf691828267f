"""Roles and disk states: what may happen to a host, who may serve, and who may be promoted. Tables, and no I/O.

`State` is the part of a host's record that decides. Every change of it is one `Event`: `step` answers with
the new state and with what has to be done before it is saved, so that an engine carries out a row by
flushing, marking and *one* save of the record. What both hosts do after a handshake is in `PLANS`;
who may serve in `SERVE`; who may be promoted in `REFUSALS`. docs/pair.md shows all of them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import identity as names
from tcmu_replication.replication.facts import Disk, Ending, Facts
from tcmu_replication.replication.identity import BLANK, Change, Identity, Marks
from tcmu_replication.replication.stages import Mode
from tcmu_replication.replication.verdict import Found, Side, Verdict
from tcmu_replication.units import format_size

PRIMARY, SECONDARY = Mode.PRIMARY, Mode.SECONDARY


class State(NamedTuple):
    """What a host has written down of its part in the pair. The members are those of `Facts`."""

    role: Mode
    disk: Disk
    identity: Identity = BLANK
    ending: Ending = Ending.CLEAN
    promoted: bool = False
    handing_over: bool = False


class Event(enum.Enum):
    """All that changes a `State`."""

    BEGUN = "start gives the data its first identity"
    VOUCHED = "the operator vouches that this disk is equal to the peer's"
    MISSED = "the first write that the peer will not get"
    LEFT_BEHIND = "the peer goes on without this host, or was promoted, or the operator keeps the peer's data"
    PROMOTED = "promoted to the latest that this host has"
    PROMOTED_TO_CHECKPOINT = "promoted to a checkpoint"
    PROMOTED_AS_IT_IS = "promoted by force with a disk that is a mix"
    FIRST_SOURCE = "the operator names this host as the source of a first synchronisation"
    FIRST_TARGET = "the operator names the peer as that source; saved before the source's part"
    RESOLVED = "the operator keeps this host's data, and gives the peer's up"
    DELTA_SOURCE = "the handshake makes this host the source of a resync"
    FULL_SOURCE = "the handshake makes this host the source of a full comparison"
    RESYNC_BEGINS = "the target is about to write the first block of a resync"
    SOURCE_DONE = "the target has acknowledged all of a resync"
    TARGET_DONE = "the source has written down that the resync is done"
    SETTLED = "both hosts found that they are in sync, or have copied the hot extents"
    HANDED_OVER = "a switch: the primary gives up its role"
    TOOK_OVER = "a switch: the secondary takes the role that was given up"
    SWITCHED = "a switch: the old primary hears that the role was taken"
    MAP_LOST = "the dirty map cannot be read, or has another size"


class Transition(NamedTuple):
    """One row: when an event may happen, and what it makes of each member (None: it stays).

    `flush`: the disk is flushed before the record is saved; where `ending` becomes clean, the extents that were hot
    when a life ended are forgotten then, and never before. `identity(mine, new, theirs)` is the event's
    operation; `new` is a generation that was drawn for it.
    """

    may: Callable[[State], bool]
    must_be: str
    identity: Callable[[Identity, str, Identity], Change]
    role: Mode | None = None
    disk: Disk | None = None
    ending: Ending | None = None
    promoted: bool | None = None
    handing_over: bool | None = None
    flush: bool = False


class Step(NamedTuple):
    """What an event comes to. In this order: flush the disk, clear the map, set the marks, save `state`."""

    state: State
    flush: bool
    clear: bool
    marks: Marks


def _whole(s: State) -> bool:
    return s.identity != BLANK and s.disk is not Disk.INCONSISTENT


def _keeps(mine: Identity, new: str, theirs: Identity) -> Change:
    return names.unchanged(mine)


EVENTS: dict[Event, Transition] = {
    Event.BEGUN: Transition(
        lambda s: s.identity == BLANK, "without an identity", lambda mine, new, theirs: names.begun(mine, new)
    ),
    Event.VOUCHED: Transition(
        lambda s: s.role is SECONDARY,
        "secondary",
        lambda mine, new, theirs: names.vouched(mine, theirs),
        disk=Disk.UPTODATE,
        ending=Ending.CLEAN,
        handing_over=False,
        flush=True,
    ),
    Event.MISSED: Transition(
        lambda s: s.role is PRIMARY and not s.identity.base,
        "primary, and its map must not count yet",
        lambda mine, new, theirs: names.missed(mine, new),
        flush=True,
    ),
    Event.LEFT_BEHIND: Transition(
        lambda s: s.identity != BLANK,
        "of a pair",
        _keeps,
        role=SECONDARY,
        disk=Disk.OUTDATED,
        promoted=False,
        handing_over=False,
    ),
    Event.PROMOTED: Transition(
        lambda s: s.role is SECONDARY and _whole(s),
        "secondary, and its disk whole",
        lambda mine, new, theirs: names.promoted(mine, new),
        role=PRIMARY,
        disk=Disk.UPTODATE,
        promoted=True,
        handing_over=False,
        flush=True,
    ),
    Event.PROMOTED_TO_CHECKPOINT: Transition(
        lambda s: s.role is SECONDARY,
        "secondary",
        lambda mine, new, theirs: names.promoted_to_checkpoint(mine, new),
        role=PRIMARY,
        disk=Disk.UPTODATE,
        promoted=True,
        handing_over=False,
        flush=True,
    ),
    Event.PROMOTED_AS_IT_IS: Transition(
        lambda s: s.role is SECONDARY and s.disk is Disk.INCONSISTENT,
        "secondary, and its disk inconsistent",
        lambda mine, new, theirs: names.promoted_to_checkpoint(mine, new),
        role=PRIMARY,
        disk=Disk.UPTODATE,
        promoted=True,
        handing_over=False,
        flush=True,
    ),
    Event.FIRST_SOURCE: Transition(
        lambda s: s.disk is not Disk.INCONSISTENT,
        "whole",
        lambda mine, new, theirs: names.first_source(mine, new, theirs),
        role=PRIMARY,
        disk=Disk.UPTODATE,
        handing_over=False,
    ),
    Event.FIRST_TARGET: Transition(
        lambda s: True,
        "any",
        lambda mine, new, theirs: names.first_target(mine, new),
        role=SECONDARY,
        disk=Disk.OUTDATED,
        promoted=False,
        handing_over=False,
    ),
    Event.RESOLVED: Transition(
        _whole,
        "whole",
        lambda mine, new, theirs: names.resolved(mine, theirs),
        role=PRIMARY,
        disk=Disk.UPTODATE,
        handing_over=False,
    ),
    Event.DELTA_SOURCE: Transition(
        _whole, "whole", lambda mine, new, theirs: names.delta_source(mine, theirs)
    ),
    Event.FULL_SOURCE: Transition(_whole, "whole", lambda mine, new, theirs: names.full_source(mine, theirs)),
    Event.RESYNC_BEGINS: Transition(
        lambda s: s.role is SECONDARY,
        "secondary",
        lambda mine, new, theirs: names.resync_begins(mine, theirs),
        disk=Disk.INCONSISTENT,
    ),
    Event.SOURCE_DONE: Transition(
        _whole,
        "whole",
        lambda mine, new, theirs: names.resync_ended_at_source(mine),
        ending=Ending.CLEAN,
        flush=True,
    ),
    Event.TARGET_DONE: Transition(
        lambda s: s.disk is Disk.INCONSISTENT,
        "inconsistent",
        lambda mine, new, theirs: names.resync_ended_at_target(mine, theirs),
        disk=Disk.UPTODATE,
        ending=Ending.CLEAN,
        flush=True,
    ),
    Event.SETTLED: Transition(
        lambda s: _whole(s) and not s.identity.base,
        "whole, and its map must not count",
        _keeps,
        disk=Disk.UPTODATE,
        ending=Ending.CLEAN,
        promoted=False,
        flush=True,
    ),
    Event.HANDED_OVER: Transition(
        lambda s: s.role is PRIMARY and not s.identity.base,
        "primary and in sync",
        _keeps,
        role=SECONDARY,
        promoted=False,
        handing_over=True,
    ),
    Event.TOOK_OVER: Transition(
        lambda s: s.role is SECONDARY and s.disk is Disk.UPTODATE and not s.handing_over,
        "secondary and uptodate",
        _keeps,
        role=PRIMARY,
    ),
    Event.SWITCHED: Transition(lambda s: s.handing_over, "handing over its role", _keeps, handing_over=False),
    Event.MAP_LOST: Transition(
        lambda s: s.identity != BLANK,
        "of a pair",
        lambda mine, new, theirs: names.map_lost(mine, new),
    ),
}
_ENDINGS = list(Ending)


def step(state: State, event: Event, *, new: str = "", theirs: Identity = BLANK) -> Step:
    """What `event` comes to in `state`. `new` is a fresh generation, `theirs` the peer's identity, where it needs them.

    Raises `Error(INVALID_STATE)` if it cannot happen, and what the operation on the identity raises.
    """
    row = EVENTS[event]
    if not row.may(state):
        raise Error(
            Kind.INVALID_STATE,
            f"{event.value}: for that this host must be {row.must_be}; it is {state.role.value} and its disk "
            f"{state.disk.value}",
        )
    change = row.identity(state.identity, new, theirs)
    # A mix stays a mix, whatever happens to its role, until a resync ends or a promotion makes it what counts.
    disk = Disk.INCONSISTENT if change.identity.becoming else row.disk
    after = State(
        row.role or state.role,
        disk or state.disk,
        change.identity,
        row.ending or state.ending,
        state.promoted if row.promoted is None else row.promoted,
        state.handing_over if row.handing_over is None else row.handing_over,
    )
    return Step(after, row.flush, change.clear, change.marks)


def opened(state: State, found: Ending) -> State:
    """The state when a worker opens it, whose last life ended as `found`: the worst end counts until it is settled."""
    return state._replace(ending=max(state.ending, found, key=_ENDINGS.index))


class Part(enum.Enum):
    """What a verdict makes of one host."""

    SOURCE = "source"
    TARGET = "target"
    NEITHER = "neither"


class Plan(NamedTuple):
    """What one host writes down after a handshake, and when.

    `at_once`, before anything flows. `begins`, before the first block, when the source has saved its
    `at_once`. `ends`, when all was acknowledged; the target's after the source's. None: nothing then.
    """

    at_once: Event | None = None
    begins: Event | None = None
    ends: Event | None = None


PLANS: dict[tuple[Found, Part], Plan] = {
    (Found.IN_SYNC, Part.NEITHER): Plan(at_once=Event.SETTLED),
    (Found.HOT, Part.SOURCE): Plan(ends=Event.SETTLED),
    (Found.HOT, Part.TARGET): Plan(ends=Event.SETTLED),
    (Found.HOT, Part.NEITHER): Plan(),
    (Found.DELTA, Part.SOURCE): Plan(at_once=Event.DELTA_SOURCE, ends=Event.SOURCE_DONE),
    (Found.DELTA, Part.TARGET): Plan(Event.LEFT_BEHIND, Event.RESYNC_BEGINS, Event.TARGET_DONE),
    (Found.FULL, Part.SOURCE): Plan(at_once=Event.FULL_SOURCE, ends=Event.SOURCE_DONE),
    (Found.FULL, Part.TARGET): Plan(Event.LEFT_BEHIND, Event.RESYNC_BEGINS, Event.TARGET_DONE),
}
"""After any other verdict nothing is copied. A host then writes down only that it was left behind, if `displaced`."""


def part(verdict: Verdict) -> Part:
    """What `verdict` makes of the host that asked for it."""
    if verdict.source is None:
        return Part.NEITHER
    return Part.SOURCE if verdict.source is Side.MINE else Part.TARGET


def displaced(state: State, verdict: Verdict | None, peer: Facts | None) -> bool:
    """Whether both have gone their own way, and somebody has promoted the peer and not this host."""
    return (
        verdict is not None
        and peer is not None
        and verdict.found is Found.SPLIT_BRAIN
        and peer.promoted
        and not state.promoted
    )


def plan(state: State, verdict: Verdict, peer: Facts) -> Plan:
    """What this host does after the handshake that found `verdict`.

    All but LEFT_BEHIND holds only while that connection lasts and neither record has changed: after that the hosts
    compare again. SOURCE_DONE and SETTLED need an empty map at the moment of the save, with no write waiting.
    """
    if displaced(state, verdict, peer):
        return Plan(at_once=Event.LEFT_BEHIND)
    return PLANS.get((verdict.found, part(verdict)), Plan())


class Seen(NamedTuple):
    """What a host knows of its peer and of its own life, besides its record.

    `peer` and `verdict` are of the last handshake of this life, None if there was none since this host was
    promoted. `alive`: the peer was
    heard within the last seconds. `away`: this host does not serve, and the peer may have been promoted since it
    last did; true at every start but that of a worker that served when it died, in the same boot, and was gone for
    less than the peer would wait before it lets itself be promoted; and false from the moment it serves or
    `start --force` is given. `waited_out`: the time to wait for the peer, that the operator has set, is over.
    `hot_bytes`: see `Facts`. `suspect`: the checkpoint may be damaged. `since` says in words since when the peer was
    not heard.
    """

    peer: Facts | None = None
    verdict: Verdict | None = None
    alive: bool = False
    away: bool = True
    waited_out: bool = False
    hot_bytes: int = 0
    suspect: bool = False
    since: str = "an unknown time"


class Answer(enum.Enum):
    """What the LUN does."""

    SERVE = "serve"
    WAIT = "NOT READY: it becomes ready"
    REFUSE = "NOT READY: not this host"


class AfterCrash(enum.Enum):
    """The resource file's `after-crash`: what a primary does that cannot ask its peer."""

    WAIT = "wait"
    SERVE = "serve"


class ServeRow(NamedTuple):
    """One answer. `words` say why, and how it goes on; templates over `name`."""

    name: str
    applies: Callable[[State, Seen, AfterCrash], bool]
    answer: Answer
    words: str


class Serving(NamedTuple):
    """Whether this host may serve writes of initiators now, by which row, and why."""

    answer: Answer
    row: str
    words: str


def _behind(s: State, seen: Seen) -> bool:
    return (
        seen.verdict is not None
        and seen.verdict.source is Side.THEIRS
        and seen.verdict.found in (Found.DELTA, Found.FULL)
    )


def _answered(seen: Seen) -> bool:
    """Whether the peer has said something of this pair that can be relied on."""
    strangers = (Found.REFUSED, Found.FIRST_SYNC, Found.UNRELATED)
    return seen.verdict is not None and seen.verdict.found not in strangers


def _split(s: State, seen: Seen) -> bool:
    """Both have gone their own way, and the peer will not be the one that is left behind."""
    return (
        seen.verdict is not None
        and seen.peer is not None
        and seen.verdict.found is Found.SPLIT_BRAIN
        and seen.peer.role is PRIMARY
        and (seen.peer.promoted or not s.promoted)
    )


SERVE: tuple[ServeRow, ...] = (
    ServeRow(
        "blank",
        lambda s, seen, policy: s.identity == BLANK,
        Answer.REFUSE,
        "this host knows nothing of its data: `tcmu-replication start {name}` begins",
    ),
    ServeRow(
        "handing-over",
        lambda s, seen, policy: s.handing_over,
        Answer.REFUSE,
        "a switch was begun, and the peer may have the role already: it ends when the peer is heard. If the peer stays "
        "away: `tcmu-replication failover {name} --to latest`",
    ),
    ServeRow(
        "secondary",
        lambda s, seen, policy: s.role is SECONDARY,
        Answer.REFUSE,
        "this host is secondary: the peer serves. `tcmu-replication switch {name}` exchanges the roles, "
        "`tcmu-replication failover {name}` promotes this host if the peer is gone",
    ),
    ServeRow(
        "behind",
        lambda s, seen, policy: _behind(s, seen),
        Answer.REFUSE,
        "the peer was promoted and has the data that counts: this host becomes secondary and is resynced, by itself",
    ),
    ServeRow(
        "displaced",
        lambda s, seen, policy: displaced(s, seen.verdict, seen.peer),
        Answer.REFUSE,
        "split brain: the peer was promoted, and this host has writes that it lacks. Let initiators use the peer; "
        "`tcmu-replication resolve {name} --keep local` or `--keep peer` says whose data counts",
    ),
    ServeRow(
        "split-brain",
        lambda s, seen, policy: seen.away and _split(s, seen),
        Answer.REFUSE,
        "split brain: the peer is primary too, and was it while this host was down. `tcmu-replication resolve {name} "
        "--keep local` or `--keep peer` says whose data counts",
    ),
    ServeRow(
        "catching-up",
        lambda s, seen, policy: (
            seen.verdict is not None
            and seen.verdict.found is Found.HOT
            and seen.verdict.source is Side.THEIRS
        ),
        Answer.WAIT,
        "this host was down, and what it had not flushed is copied back from the peer; it serves when that is done",
    ),
    ServeRow(
        "peer-answered",
        lambda s, seen, policy: _answered(seen),
        Answer.SERVE,
        "the peer was asked, and was not promoted",
    ),
    ServeRow(
        "not-away",
        lambda s, seen, policy: not seen.away,
        Answer.SERVE,
        "the peer cannot have been promoted meanwhile without the word of an operator",
    ),
    ServeRow(
        "after-crash-serve",
        lambda s, seen, policy: policy is AfterCrash.SERVE,
        Answer.SERVE,
        'the peer does not answer, and the resource file says after-crash = "serve"',
    ),
    ServeRow(
        "waited-out",
        lambda s, seen, policy: seen.waited_out,
        Answer.SERVE,
        "the peer does not answer, and the time to wait for it, that the resource file sets, is over",
    ),
    ServeRow(
        "away",
        lambda s, seen, policy: True,
        Answer.WAIT,
        "this host was down, and the peer may have been promoted: it waits until the peer has answered. If the peer "
        "cannot answer, and was surely not promoted: `tcmu-replication start {name} --force`",
    ),
)


def serve(state: State, seen: Seen, policy: AfterCrash = AfterCrash.WAIT, *, name: str = "NAME") -> Serving:
    """Whether this host may serve: the first row of `SERVE` that applies. `start --force` makes `away` false."""
    row = next(row for row in SERVE if row.applies(state, seen, policy))
    return Serving(row.answer, row.name, row.words.format(name=name))


class To(enum.Enum):
    """What a host is promoted to."""

    LATEST = "latest"
    CHECKPOINT = "checkpoint"


class Word(enum.Enum):
    """What an operator, or a cluster manager, can say with a promotion."""

    FENCED = "--fenced"
    FORCE = "--force"


class Refusal(NamedTuple):
    """Why a host is not promoted. `lifted_by`: what lifts it; `gives_up`: what is then given up."""

    name: str
    applies: Callable[[State, Seen, To], bool]
    lifted_by: frozenset[Word]
    words: str
    gives_up: str = ""


class Promotion(NamedTuple):
    """`event` is what to carry out, None if it is refused. `row` names what refuses, "" if nothing does.

    `gives_up` says what is, or may be, lost: to be shown, and confirmed, before the promotion. `lifted` names
    the refusals that the operator's words lift.
    """

    event: Event | None
    row: str
    words: str
    gives_up: tuple[str, ...]
    lifted: tuple[str, ...] = ()


NEVER: frozenset[Word] = frozenset()
FORCE = frozenset((Word.FORCE,))
FENCED_OR_FORCE = frozenset(Word)
ELSE = "or `--to checkpoint`; `--force` gives up what is missing"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("primary", lambda s, seen, to: s.role is PRIMARY, NEVER, "this host is primary already"),
    Refusal(
        "blank",
        lambda s, seen, to: s.identity == BLANK,
        NEVER,
        "this host knows nothing of its data: `tcmu-replication start {name}` begins",
    ),
    Refusal(
        "taking-over",
        lambda s, seen, to: seen.alive and s.handing_over,
        FENCED_OR_FORCE,
        "a switch is under way, and the peer is about to take the role, or has it",
        "what the peer acknowledges meanwhile",
    ),
    Refusal(
        "primary-heard",
        lambda s, seen, to: seen.alive and seen.peer is not None and seen.peer.role is PRIMARY,
        FENCED_OR_FORCE,
        "the primary is alive: it was heard within the last seconds. `tcmu-replication switch {name}` exchanges the "
        "roles without loss; `--fenced` says that somebody has made sure that it is off",
        "what the primary acknowledges from now until it hears of this",
    ),
    Refusal(
        "suspect",
        lambda s, seen, to: to is To.CHECKPOINT and seen.suspect,
        FORCE,
        "the checkpoint may be damaged: bring back the primary, or `--to latest`",
        "the checkpoint's exactness: it may be damaged",
    ),
    Refusal(
        "inconsistent",
        lambda s, seen, to: to is To.LATEST and s.disk is Disk.INCONSISTENT,
        FORCE,
        "a resync of this disk has not ended: it is a mix of old and new blocks. Bring back its source, "
        + ELSE,
        "any order among writes: the disk is a mix of old and new blocks",
    ),
    Refusal(
        "outdated",
        lambda s, seen, to: to is To.LATEST and s.disk is Disk.OUTDATED,
        FORCE,
        "this disk is outdated: the primary went on without it. Bring back the primary, " + ELSE,
        "what the primary has written since it went on without this host",
    ),
    Refusal(
        "disagreed",
        lambda s, seen, to: to is To.LATEST and seen.verdict is not None and not seen.verdict.found.proceeds,
        FORCE,
        "the data of this host and of its peer are not one. See `tcmu-replication status {name}`; the way out is "
        "named there. `--force` serves what is here",
        "what the peer has and this host has not",
    ),
    Refusal(
        "crashed",
        lambda s, seen, to: to is To.LATEST and s.ending is Ending.CRASHED and seen.hot_bytes > 0,
        FORCE,
        "this host was down, and up to {hot} of what it had not flushed may be missing. Bring back the primary, "
        + ELSE,
        "up to {hot} of what was acknowledged and not flushed when this host went down",
    ),
    Refusal(
        "not-heard",
        lambda s, seen, to: to is To.LATEST and seen.peer is None,
        FORCE,
        "this host has not heard its primary since it was started, and does not know what that has written since. "
        "Bring back the primary, " + ELSE,
        "what the primary has written since this host was last connected",
    ),
)


def promote(
    state: State, seen: Seen, to: To, words: frozenset[Word] = NEVER, *, name: str = "NAME"
) -> Promotion:
    """Whether this host may be promoted: no if a row of `REFUSALS` applies that none of `words` lifts."""
    values = {"name": name, "hot": format_size(seen.hot_bytes), "since": seen.since}
    lifted = []
    for row in REFUSALS:
        if not row.applies(state, seen, to):
            continue
        if not row.lifted_by & words:
            return Promotion(None, row.name, row.words.format_map(values), (), ())
        lifted.append(row)
    gives_up = [row.gives_up.format_map(values) for row in lifted]
    if to is To.CHECKPOINT:
        gives_up.append("all that was written since the checkpoint")
    elif not lifted and not seen.alive:
        gives_up.append(f"what the primary may have written on its own: it was not heard for {seen.since}")
    return Promotion(
        _promotion(state, to), "", "this host is promoted", tuple(gives_up), tuple(row.name for row in lifted)
    )


def _promotion(state: State, to: To) -> Event:
    if to is To.CHECKPOINT:
        return Event.PROMOTED_TO_CHECKPOINT
    return Event.PROMOTED_AS_IT_IS if state.disk is Disk.INCONSISTENT else Event.PROMOTED


def check_force(state: State, seen: Seen, *, name: str = "NAME") -> None:
    """`start --force` on a primary that waits: after it `away` is false, and the last verdict is forgotten.

    Raises `Error(INVALID_STATE)` while the peer answers: then what both say of their data decides.
    """
    if state.role is not PRIMARY:
        raise Error(
            Kind.INVALID_STATE,
            f"this host is secondary: `tcmu-replication failover {name} --force` promotes it, and says what is lost",
        )
    if seen.alive and _answered(seen):
        words = seen.verdict.words if seen.verdict is not None else ""
        raise Error(Kind.INVALID_STATE, f"the peer answers, so nothing needs to be forced: {words}")


def check_switch(state: State, seen: Seen, *, name: str = "NAME") -> None:
    """`switch` on the primary: both hosts must be connected, in sync and agreed. Raises `Error(INVALID_STATE)`."""
    if state.role is not PRIMARY:
        raise Error(
            Kind.INVALID_STATE, f"this host is not the primary: give `tcmu-replication switch {name}` there"
        )
    in_sync = seen.verdict is not None and seen.verdict.found is Found.IN_SYNC
    if not (seen.alive and in_sync and seen.peer is not None and seen.peer.role is SECONDARY):
        found = seen.verdict.words if seen.verdict is not None and not in_sync else "the peer is not heard"
        raise Error(
            Kind.INVALID_STATE, f"a switch needs both hosts in sync: {found}. It can be given when they are"
        )


def takes_over(state: State, seen: Seen) -> bool:
    """Whether this secondary completes a switch now: the peer has given up its role, and both are in sync."""
    return (
        state.role is SECONDARY
        and not state.handing_over
        and seen.alive
        and seen.peer is not None
        and seen.peer.handing_over
        and seen.verdict is not None
        and seen.verdict.found is Found.IN_SYNC
    )


def check_choice(verdict: Verdict | None, keep: Side) -> None:
    """`resolve --keep` and `start --sync-from`: whether the operator may choose, and this one. Raises `Error`."""
    if verdict is None:
        raise Error(
            Kind.PEER_LOST,
            "the peer is not heard: what would be given up is not known. Bring it back, then give it again",
        )
    if not verdict.may_be_source:
        raise Error(Kind.INVALID_STATE, f"there is nothing to choose: {verdict.words}")
    if keep not in verdict.may_be_source:
        raise Error(
            Kind.INVALID_STATE, f"{keep.value} cannot be kept: {verdict.words}. Keep {keep.other.value}"
        )
