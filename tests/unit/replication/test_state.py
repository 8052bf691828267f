"""Roles and disk states: every event, who serves, who is promoted, and what the words of an operator lift."""

from __future__ import annotations

from typing import Any

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.facts import Disk, Ending, Facts
from tcmu_replication.replication.identity import BLANK, Identity, Marks
from tcmu_replication.replication.stages import Mode
from tcmu_replication.replication.state import (
    EVENTS,
    PLANS,
    REFUSALS,
    SERVE,
    AfterCrash,
    Answer,
    Event,
    Part,
    Plan,
    Seen,
    State,
    To,
    Word,
    check_choice,
    check_force,
    check_switch,
    opened,
    plan,
    promote,
    serve,
    step,
    takes_over,
)
from tcmu_replication.replication.verdict import Found, Side, Verdict, compare
from tests.unit.replication.generations import A, B, C, D

PRIMARY, SECONDARY = Mode.PRIMARY, Mode.SECONDARY
UPTODATE, OUTDATED, INCONSISTENT = Disk.UPTODATE, Disk.OUTDATED, Disk.INCONSISTENT
SERVES = State(PRIMARY, UPTODATE, Identity(A))
FOLLOWS = State(SECONDARY, UPTODATE, Identity(A))
MIX = State(SECONDARY, INCONSISTENT, Identity(A, becoming=B))
FORCE, FENCED = frozenset((Word.FORCE,)), frozenset((Word.FENCED,))


def facts(state: State, **changes: Any) -> Facts:
    said = Facts((1, 1), "disk0", 1 << 30, state.role, state.disk, state.identity, ending=state.ending)
    return said._replace(promoted=state.promoted, handing_over=state.handing_over)._replace(**changes)


def met(
    mine: State, theirs: State, *, hot: int = 0, their_facts: dict[str, Any] | None = None, **seen: Any
) -> Seen:
    """What a host in state `mine` knows after a handshake with one in state `theirs`."""
    here, there = facts(mine, hot_bytes=hot), facts(theirs, **their_facts or {})
    return Seen(there, compare(here, there), **{"alive": True, "hot_bytes": hot} | seen)


# What each event makes of a host: before, arguments, after; whether it flushes, clears the map, and what it marks.
NO = Marks.NOTHING
CASES: dict[Event, tuple[State, dict[str, Any], State, tuple[bool, bool, Marks]]] = {
    Event.BEGUN: (
        State(PRIMARY, UPTODATE),
        {"new": A},
        SERVES,
        (False, False, NO),
    ),
    Event.VOUCHED: (
        State(SECONDARY, OUTDATED),
        {"theirs": Identity(A)},
        FOLLOWS,
        (True, False, NO),
    ),
    Event.MISSED: (
        SERVES,
        {"new": B},
        State(PRIMARY, UPTODATE, Identity(B, A)),
        (True, True, NO),
    ),
    Event.LEFT_BEHIND: (
        State(PRIMARY, UPTODATE, Identity(B, A), promoted=True),
        {},
        State(SECONDARY, OUTDATED, Identity(B, A)),
        (False, False, NO),
    ),
    Event.PROMOTED: (
        State(SECONDARY, OUTDATED, Identity(A), handing_over=True),
        {"new": B},
        State(PRIMARY, UPTODATE, Identity(B, A), promoted=True),
        (True, True, NO),
    ),
    Event.PROMOTED_TO_CHECKPOINT: (
        MIX,
        {"new": C},
        State(PRIMARY, UPTODATE, Identity(C, A), promoted=True),
        (True, True, Marks.OVERLAYS),
    ),
    Event.PROMOTED_AS_IT_IS: (
        MIX,
        {"new": C},
        State(PRIMARY, UPTODATE, Identity(C, A), promoted=True),
        (True, True, Marks.OVERLAYS),
    ),
    Event.FIRST_SOURCE: (
        State(SECONDARY, OUTDATED, Identity(A)),
        {"new": B, "theirs": Identity(C)},
        State(PRIMARY, UPTODATE, Identity(B, C, (A,))),
        (False, True, Marks.ALL),
    ),
    Event.FIRST_TARGET: (
        State(PRIMARY, UPTODATE),
        {"new": C},
        State(SECONDARY, OUTDATED, Identity(C)),
        (False, False, NO),
    ),
    Event.RESOLVED: (
        State(PRIMARY, UPTODATE, Identity(B, A), promoted=True),
        {"theirs": Identity(C, A)},
        State(PRIMARY, UPTODATE, Identity(B, C, (A,)), promoted=True),
        (False, False, Marks.THEIRS),
    ),
    Event.DELTA_SOURCE: (
        State(PRIMARY, UPTODATE, Identity(B, A)),
        {"theirs": Identity(A)},
        State(PRIMARY, UPTODATE, Identity(B, A)),
        (False, False, Marks.THEIRS),
    ),
    Event.FULL_SOURCE: (
        State(PRIMARY, UPTODATE, Identity(B, "", (A,))),
        {"theirs": Identity(A)},
        State(PRIMARY, UPTODATE, Identity(B, A)),
        (False, True, Marks.ALL),
    ),
    Event.RESYNC_BEGINS: (
        State(SECONDARY, OUTDATED, Identity(A)),
        {"theirs": Identity(B, A)},
        MIX,
        (False, False, NO),
    ),
    Event.SOURCE_DONE: (
        State(PRIMARY, UPTODATE, Identity(B, A), Ending.CRASHED, promoted=True),
        {},
        State(PRIMARY, UPTODATE, Identity(B, "", (A,)), promoted=True),
        (True, False, NO),
    ),
    Event.TARGET_DONE: (
        MIX._replace(ending=Ending.CRASHED),
        {"theirs": Identity(B, "", (A,))},
        State(SECONDARY, UPTODATE, Identity(B, "", (A,))),
        (True, False, NO),
    ),
    Event.SETTLED: (
        State(SECONDARY, OUTDATED, Identity(A), Ending.KILLED),
        {},
        FOLLOWS,
        (True, False, NO),
    ),
    Event.HANDED_OVER: (SERVES, {}, FOLLOWS._replace(handing_over=True), (False, False, NO)),
    Event.TOOK_OVER: (FOLLOWS, {}, SERVES, (False, False, NO)),
    Event.SWITCHED: (FOLLOWS._replace(handing_over=True), {}, FOLLOWS, (False, False, NO)),
    Event.MAP_LOST: (
        State(PRIMARY, UPTODATE, Identity(B, A)),
        {"new": C},
        State(PRIMARY, UPTODATE, Identity(C, "", (B, A))),
        (False, True, NO),
    ),
}


def test_every_event_has_a_row_and_a_case() -> None:
    assert set(EVENTS) == set(Event) == set(CASES)


@pytest.mark.parametrize("event", Event)
def test_event(event: Event) -> None:
    before, arguments, after, work = CASES[event]
    result = step(before, event, **arguments)
    assert result.state == after
    assert (result.flush, result.clear, result.marks) == work


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (Event.BEGUN, SERVES),
        (Event.VOUCHED, SERVES),
        (Event.MISSED, FOLLOWS),
        (Event.MISSED, State(PRIMARY, UPTODATE, Identity(B, A))),
        (Event.LEFT_BEHIND, State(SECONDARY, OUTDATED)),
        (Event.PROMOTED, SERVES),
        (Event.PROMOTED, MIX),
        (Event.PROMOTED_TO_CHECKPOINT, SERVES),
        (Event.PROMOTED_AS_IT_IS, FOLLOWS),
        (Event.FIRST_SOURCE, MIX),
        (Event.RESOLVED, MIX),
        (Event.DELTA_SOURCE, MIX),
        (Event.FULL_SOURCE, MIX),
        (Event.RESYNC_BEGINS, SERVES),
        (Event.SOURCE_DONE, MIX),
        (Event.TARGET_DONE, FOLLOWS),
        (Event.SETTLED, MIX),
        (Event.SETTLED, State(PRIMARY, UPTODATE, Identity(B, A))),
        (Event.HANDED_OVER, FOLLOWS),
        (Event.HANDED_OVER, State(PRIMARY, UPTODATE, Identity(B, A))),
        (Event.TOOK_OVER, SERVES),
        (Event.TOOK_OVER, FOLLOWS._replace(disk=OUTDATED)),
        (Event.TOOK_OVER, FOLLOWS._replace(handing_over=True)),
        (Event.SWITCHED, FOLLOWS),
        (Event.MAP_LOST, State(PRIMARY, UPTODATE)),
    ],
)
def test_event_that_cannot_happen_says_what_the_host_is(event: Event, state: State) -> None:
    with pytest.raises(Error, match="this host must be") as refused:
        step(state, event, new=D, theirs=Identity(C))
    assert refused.value.kind is Kind.INVALID_STATE
    assert state.role.value in str(refused.value)


def test_mix_that_is_left_behind_stays_a_mix() -> None:
    """Neither a demotion nor a handshake makes whole what a resync has left half done."""
    assert step(MIX, Event.LEFT_BEHIND).state == MIX


def test_worst_end_of_a_life_counts_until_it_is_settled() -> None:
    """A loss of power, and then a worker that is killed: the page cache is still lost."""
    crashed = opened(FOLLOWS, Ending.CRASHED)
    assert opened(crashed, Ending.KILLED).ending is Ending.CRASHED
    assert opened(crashed, Ending.CLEAN).ending is Ending.CRASHED
    assert opened(FOLLOWS, Ending.KILLED).ending is Ending.KILLED
    assert step(crashed, Event.SETTLED).state.ending is Ending.CLEAN


# --- after a handshake ---


def test_both_ends_of_every_verdict_that_proceeds_have_a_plan() -> None:
    for found in Found:
        parts = {part for plan_of, part in PLANS if plan_of is found}
        if not found.proceeds:
            assert not parts
        elif found is Found.IN_SYNC:
            assert parts == {Part.NEITHER}
        else:
            assert {Part.SOURCE, Part.TARGET} <= parts


def test_plans_of_a_pair_whose_secondary_was_away() -> None:
    ahead, behind = State(PRIMARY, UPTODATE, Identity(B, A)), FOLLOWS
    there = facts(behind)
    assert plan(ahead, compare(facts(ahead), there), there) == Plan(
        Event.DELTA_SOURCE, None, Event.SOURCE_DONE
    )
    there = facts(ahead)
    target = plan(behind, compare(facts(behind), there), there)
    assert target == Plan(Event.LEFT_BEHIND, Event.RESYNC_BEGINS, Event.TARGET_DONE)


def test_of_a_split_brain_the_host_that_nobody_promoted_is_left_behind() -> None:
    old, new = (
        State(PRIMARY, UPTODATE, Identity(B, A)),
        State(PRIMARY, UPTODATE, Identity(C, A), promoted=True),
    )
    assert plan(old, compare(facts(old), facts(new)), facts(new)).at_once is Event.LEFT_BEHIND
    assert plan(new, compare(facts(new), facts(old)), facts(old)) == Plan()
    also = old._replace(promoted=True)
    assert plan(also, compare(facts(also), facts(new)), facts(new)) == Plan()


# --- who serves ---

AHEAD = State(PRIMARY, UPTODATE, Identity(B, A), promoted=True)
OTHER = State(PRIMARY, UPTODATE, Identity(C, A))
CRASHED = SERVES._replace(ending=Ending.CRASHED)
SERVE_CASES: dict[str, tuple[State, Seen, AfterCrash]] = {
    "blank": (State(PRIMARY, UPTODATE), Seen(away=False), AfterCrash.SERVE),
    "handing-over": (FOLLOWS._replace(handing_over=True), Seen(), AfterCrash.SERVE),
    "secondary": (FOLLOWS, Seen(away=False), AfterCrash.SERVE),
    "behind": (SERVES, met(SERVES, AHEAD, away=False), AfterCrash.SERVE),
    "displaced": (OTHER, met(OTHER, AHEAD, away=False), AfterCrash.SERVE),
    "split-brain": (AHEAD, met(AHEAD, OTHER._replace(promoted=True)), AfterCrash.SERVE),
    "catching-up": (CRASHED, met(CRASHED, FOLLOWS, hot=4096), AfterCrash.SERVE),
    "peer-answered": (SERVES, met(SERVES, FOLLOWS), AfterCrash.WAIT),
    "not-away": (SERVES, Seen(away=False), AfterCrash.WAIT),
    "after-crash-serve": (SERVES, Seen(), AfterCrash.SERVE),
    "waited-out": (SERVES, Seen(waited_out=True), AfterCrash.WAIT),
    "away": (SERVES, Seen(), AfterCrash.WAIT),
}


def test_every_answer_has_a_case() -> None:
    assert [row.name for row in SERVE] == list(SERVE_CASES)


@pytest.mark.parametrize("name", SERVE_CASES)
def test_serve(name: str) -> None:
    found = serve(*SERVE_CASES[name], name="disk0")
    assert found.row == name
    assert "{" not in found.words
    if found.answer is Answer.REFUSE and name != "behind":
        assert "`tcmu-replication" in found.words
    if found.answer is Answer.WAIT and name != "catching-up":
        assert "`tcmu-replication start disk0 --force`" in found.words


@pytest.mark.parametrize("stranger", [State(SECONDARY, OUTDATED), State(PRIMARY, UPTODATE, Identity(D))])
def test_answer_of_a_stranger_ends_no_waiting(stranger: State) -> None:
    """It says nothing of this pair: the peer may have been replaced, or restored from a backup."""
    assert serve(SERVES, met(SERVES, stranger)).row == "away"
    assert serve(SERVES, met(SERVES, FOLLOWS, their_facts={"protocol": (2, 2)})).row == "away"


def test_host_that_comes_back_into_a_split_brain_begins_to_serve_only_if_the_peer_gives_way() -> None:
    """Two that were promoted, one that was down: it must not become the second again."""
    assert serve(AHEAD, met(AHEAD, OTHER._replace(promoted=True), away=False)).answer is Answer.SERVE
    assert serve(AHEAD, met(AHEAD, OTHER)).answer is Answer.SERVE
    assert serve(OTHER, met(OTHER, AHEAD._replace(promoted=False))).answer is Answer.REFUSE


# --- who is promoted ---

HANDING = FOLLOWS._replace(handing_over=True)
LOST = FOLLOWS._replace(ending=Ending.CRASHED)
GONE = {"alive": False, "since": "12 s"}
REFUSAL_CASES: dict[str, tuple[State, Seen, To]] = {
    "primary": (SERVES, met(SERVES, FOLLOWS), To.LATEST),
    "blank": (State(SECONDARY, OUTDATED), Seen(), To.CHECKPOINT),
    "taking-over": (HANDING, met(HANDING, FOLLOWS), To.LATEST),
    "primary-heard": (FOLLOWS, met(FOLLOWS, SERVES), To.CHECKPOINT),
    "suspect": (FOLLOWS, met(FOLLOWS, SERVES, suspect=True, **GONE), To.CHECKPOINT),
    "inconsistent": (MIX, met(MIX, AHEAD, **GONE), To.LATEST),
    "outdated": (FOLLOWS._replace(disk=OUTDATED), met(FOLLOWS, AHEAD, **GONE), To.LATEST),
    "disagreed": (FOLLOWS, met(FOLLOWS, State(PRIMARY, UPTODATE, Identity(D)), **GONE), To.LATEST),
    "crashed": (LOST, met(LOST, SERVES, hot=8192, **GONE), To.LATEST),
    "not-heard": (FOLLOWS, Seen(since="12 s"), To.LATEST),
}


def test_every_refusal_has_a_case() -> None:
    assert [row.name for row in REFUSALS] == list(REFUSAL_CASES)


@pytest.mark.parametrize("name", REFUSAL_CASES)
def test_promotion_is_refused_and_says_what_else_there_is(name: str) -> None:
    state, seen, to = REFUSAL_CASES[name]
    asked = promote(state, seen, to, name="disk0")
    assert (asked.event, asked.row) == (None, name)
    assert "{" not in asked.words
    row = next(row for row in REFUSALS if row.name == name)
    if Word.FORCE in row.lifted_by:
        alternatives = ("switch", "--to checkpoint", "--to latest", "`tcmu-replication status", "under way")
        assert any(word in asked.words for word in alternatives)


@pytest.mark.parametrize("name", REFUSAL_CASES)
@pytest.mark.parametrize("words", [FORCE, FENCED])
def test_operators_word_lifts_what_it_is_for_and_says_what_is_lost(name: str, words: frozenset[Word]) -> None:
    state, seen, to = REFUSAL_CASES[name]
    row = next(row for row in REFUSALS if row.name == name)
    asked = promote(state, seen, to, words)
    if row.lifted_by & words:
        assert asked.event is not None
        assert asked.lifted == (name,)
        assert asked.gives_up
        assert "{" not in " ".join(asked.gives_up)
    else:
        assert (asked.event, asked.row) == (None, name)


def test_secondary_that_was_cut_off_in_sync_is_promoted_and_says_since_when_it_heard_nothing() -> None:
    asked = promote(FOLLOWS, met(FOLLOWS, SERVES, **GONE), To.LATEST)
    assert asked.event is Event.PROMOTED
    assert asked.gives_up == ("what the primary may have written on its own: it was not heard for 12 s",)


def test_fenced_does_not_lift_what_the_disk_lacks() -> None:
    """That the primary is off says nothing of what it has written before."""
    outdated = FOLLOWS._replace(disk=OUTDATED)
    assert promote(outdated, met(FOLLOWS, AHEAD), To.LATEST, FENCED).row == "outdated"


@pytest.mark.parametrize("state", [FOLLOWS._replace(disk=OUTDATED), MIX, LOST])
def test_to_a_checkpoint_a_host_can_always_be_promoted(state: State) -> None:
    asked = promote(state, Seen(), To.CHECKPOINT)
    assert asked.event is Event.PROMOTED_TO_CHECKPOINT
    assert asked.gives_up == ("all that was written since the checkpoint",)


def test_promotion_of_a_mix_keeps_it_as_it_is_and_counts_the_overlays() -> None:
    asked = promote(MIX, met(MIX, AHEAD, **GONE), To.LATEST, FORCE)
    assert asked.event is Event.PROMOTED_AS_IT_IS
    assert any("mix" in text for text in asked.gives_up)


def test_secondary_beside_a_peer_that_is_secondary_too_is_promoted() -> None:
    """Two secondaries, both in sync and heard: nothing but a failover leads on."""
    assert promote(FOLLOWS, met(FOLLOWS, FOLLOWS), To.LATEST).event is Event.PROMOTED


# --- switch, force, choices ---


def test_switch_needs_both_in_sync_and_the_primary() -> None:
    check_switch(SERVES, met(SERVES, FOLLOWS))
    for state, seen in (
        (FOLLOWS, met(FOLLOWS, SERVES)),
        (SERVES, Seen()),
        (SERVES, met(SERVES, FOLLOWS, alive=False)),
        (AHEAD, met(AHEAD, FOLLOWS)),
        (SERVES, met(SERVES, FOLLOWS, hot=4096)),
    ):
        with pytest.raises(Error) as refused:
            check_switch(state, seen)
        assert refused.value.kind is Kind.INVALID_STATE


def test_secondary_takes_over_only_what_was_given_up() -> None:
    assert takes_over(FOLLOWS, met(FOLLOWS, HANDING))
    assert not takes_over(FOLLOWS, met(FOLLOWS, SERVES))
    assert not takes_over(FOLLOWS, met(FOLLOWS, HANDING, alive=False))
    assert not takes_over(HANDING, met(HANDING, HANDING))


def test_waiting_is_ended_by_force_only_while_the_peer_does_not_answer() -> None:
    check_force(SERVES, Seen())
    check_force(SERVES, met(SERVES, FOLLOWS, alive=False))
    check_force(SERVES, met(SERVES, FOLLOWS, their_facts={"protocol": (2, 2)}))
    with pytest.raises(Error, match="the peer answers"):
        check_force(CRASHED, met(CRASHED, FOLLOWS, hot=4096))
    with pytest.raises(Error, match="failover NAME --force"):
        check_force(FOLLOWS, Seen())


def test_choice_is_between_what_can_be_kept() -> None:
    split = met(OTHER, AHEAD).verdict
    check_choice(split, Side.MINE)
    check_choice(split, Side.THEIRS)
    with pytest.raises(Error, match="the peer is not heard"):
        check_choice(None, Side.MINE)
    with pytest.raises(Error, match="nothing to choose"):
        check_choice(met(SERVES, FOLLOWS).verdict, Side.MINE)
    new = met(State(PRIMARY, UPTODATE, BLANK), FOLLOWS).verdict
    assert isinstance(new, Verdict)
    check_choice(new, Side.THEIRS)
    with pytest.raises(Error, match="this host cannot be kept"):
        check_choice(new, Side.MINE)
