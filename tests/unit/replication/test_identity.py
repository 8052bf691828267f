"""How the name of data changes: every event, and what hostile or torn names meet."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import identity as i
from tcmu_replication.replication.identity import BLANK, HISTORY, Identity, Marks
from tests.unit.replication.generations import A, B, C, D, E, generation


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 32,
        A.upper(),
        A + "0",
        A[:-1],
        A + "\n",
        " " + A[1:],
        A.replace("a", "\u0661"),
        "g" + A[1:],
        "a" * 1_000_000,
        7,
        None,
        b"a" * 36,
    ],
)
def test_generation_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(Error) as refused:
        i.generation(text)
    assert refused.value.kind is Kind.BAD_REQUEST
    assert len(str(refused.value)) < 300


def test_generation_is_what_uuid4_makes() -> None:
    text = str(uuid.uuid4())
    assert i.generation(text) == text


MANY = tuple(str(uuid.UUID(int=number)) for number in range(1, 100))


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        (Identity(A, A), "twice"),
        (Identity(A, B, (B,)), "twice"),
        (Identity(A, B, (C, D, C)), "twice"),
        (Identity(A, "", (A,)), "twice"),
        (Identity("", B), "no current"),
        (Identity("", "", (B,)), "no current"),
        (Identity("", becoming=B), "no current"),
        (Identity(A, "", MANY[: HISTORY + 1]), "at most"),
        (Identity(A, "", ("x",)), "UUID"),
        (Identity("x"), "UUID"),
        (Identity(A, "x"), "UUID"),
        (Identity(A, becoming="x"), "UUID"),
    ],
)
def test_identity_that_no_event_makes_is_refused(identity: Identity, says: str) -> None:
    with pytest.raises(Error, match=says):
        i.check(identity)


@pytest.mark.parametrize("identity", [BLANK, Identity(A), Identity(A, B, (C,), D), Identity(A, becoming=A)])
def test_identity_that_events_make_is_let_pass(identity: Identity) -> None:
    assert i.check(identity) is identity


def test_begun() -> None:
    assert i.begun(BLANK, A) == i.Change(Identity(A))
    with pytest.raises(Error, match="has an identity already"):
        i.begun(Identity(A), B)


@pytest.mark.parametrize("event", [i.missed, i.promoted])
def test_draw_makes_the_old_current_the_base_and_the_map_starts_empty(event: Any) -> None:
    change = event(Identity(A, "", (C,)), B)
    assert change == i.Change(Identity(B, A, (C,)), clear=True)


@pytest.mark.parametrize("event", [i.missed, i.promoted])
def test_second_draw_keeps_the_base_and_the_map_goes_on(event: Any) -> None:
    """The map counts since A: to start it anew would forget what is in it."""
    change = event(Identity(B, A, (C,)), D)
    assert change == i.Change(Identity(D, A, (B, C)), clear=False)


def test_promoted_to_a_checkpoint_differs_by_the_overlays() -> None:
    change = i.promoted_to_checkpoint(Identity(A), B)
    assert change == i.Change(Identity(B, A), clear=True, marks=Marks.OVERLAYS)


def test_promotion_ends_the_resync_that_was_under_way() -> None:
    """It is of the lineage that it had, not of the one that it was becoming."""
    change = i.promoted_to_checkpoint(Identity(A, becoming=C), B)
    assert change.identity == Identity(B, A)
    again = i.promoted_to_checkpoint(Identity(B, A, becoming=C), D)
    assert again.identity == Identity(D, A, (B,))


@pytest.mark.parametrize("event", [i.missed, i.promoted, i.promoted_to_checkpoint, i.map_lost])
@pytest.mark.parametrize("used", [A, B, C, D])
def test_generation_that_is_drawn_must_be_new(event: Any, used: str) -> None:
    with pytest.raises(Error, match="not new"):
        event(Identity(A, B, (C,), D), used)


@pytest.mark.parametrize("event", [i.missed, i.promoted, i.promoted_to_checkpoint])
def test_data_without_identity_draws_nothing(event: Any) -> None:
    with pytest.raises(Error, match="no identity yet"):
        event(BLANK, A)


def test_first_source_draws_and_the_target_misses_everything() -> None:
    change = i.first_source(Identity(A), B, Identity(C))
    assert change == i.Change(Identity(B, C, (A,)), clear=True, marks=Marks.ALL)
    assert i.first_source(BLANK, B, Identity(C)).identity == Identity(B, C)


def test_first_target_gets_a_name_if_it_has_none() -> None:
    assert i.first_target(BLANK, A) == i.Change(Identity(A))
    assert i.first_target(Identity(B, A), C) == i.Change(Identity(B, A))


def test_full_source_counts_since_the_target_and_marks_everything() -> None:
    change = i.full_source(Identity(A, B, (C,)), Identity(D))
    assert change == i.Change(Identity(A, D, (B, C)), clear=True, marks=Marks.ALL)


def test_full_source_whose_target_is_in_its_history_has_no_name_twice() -> None:
    assert i.full_source(Identity(A, "", (B, C)), Identity(B)).identity == Identity(A, B, (C,))


@pytest.mark.parametrize("event", [i.full_source, i.resolved])
def test_source_of_everything_needs_another_generation(event: Any) -> None:
    with pytest.raises(Error, match="both hosts have generation"):
        event(Identity(A), Identity(A))
    with pytest.raises(Error, match="no identity yet"):
        event(Identity(A), BLANK)


@pytest.mark.parametrize("event", [i.full_source, i.resolved, i.delta_source])
def test_mix_is_never_a_source(event: Any) -> None:
    with pytest.raises(Error, match="is a mix"):
        event(Identity(A, becoming=B), Identity(C))


def test_resolved_by_both_maps_where_both_count_since_the_same() -> None:
    change = i.resolved(Identity(B, A), Identity(C, A))
    assert change == i.Change(Identity(B, C, (A,)), clear=False, marks=Marks.THEIRS)


@pytest.mark.parametrize("theirs", [Identity(C, D, (A,)), Identity(C), Identity(C, A, becoming=E)])
def test_resolved_by_a_full_comparison_where_they_do_not(theirs: Identity) -> None:
    change = i.resolved(Identity(B, A), theirs)
    assert change == i.Change(Identity(B, C, (A,)), clear=True, marks=Marks.ALL)


def test_resync_begins_and_ends() -> None:
    source, target = Identity(B, A, (D,)), Identity(A, "", (E,))
    assert i.delta_source(source, target) == i.Change(source, marks=Marks.THEIRS)
    mix = i.resync_begins(target, source).identity
    assert mix == Identity(A, "", (E,), B)
    settled = i.resync_ended_at_source(source).identity
    assert settled == Identity(B, "", (A, D))
    assert i.resync_ended_at_target(mix, settled).identity == Identity(B, "", (A, D, E))


def test_resync_does_not_end_at_the_target_before_the_source_has_saved() -> None:
    with pytest.raises(Error, match="cannot end"):
        i.resync_ended_at_target(Identity(A, becoming=B), Identity(B, A))


@pytest.mark.parametrize("mix", [Identity(A), Identity(A, becoming=C)])
def test_resync_does_not_end_with_another_source(mix: Identity) -> None:
    with pytest.raises(Error, match="cannot end"):
        i.resync_ended_at_target(mix, Identity(B))


def test_lost_map_counts_for_nothing() -> None:
    """A map of another size, or torn: the next resync compares everything, by the history."""
    assert i.map_lost(Identity(B, A, (C,)), D) == i.Change(Identity(D, "", (B, A, C)), clear=True)


def test_switch_changes_no_name() -> None:
    assert i.unchanged(Identity(A, "", (B,))) == i.Change(Identity(A, "", (B,)))


def test_history_is_bounded_and_newest_first() -> None:
    identity = Identity(MANY[0])
    for new in MANY[1:60]:
        identity = i.missed(identity, new).identity
    assert identity.base == MANY[0]
    assert identity.history == tuple(reversed(MANY[58 - HISTORY + 1 : 59]))
    i.check(identity)


IDENTITIES = st.builds(
    lambda names, counts, mix: i.Identity(
        names[0], names[1] if counts else "", tuple(names[2:]), names[1] if mix and not counts else ""
    ),
    st.lists(st.sampled_from("0123456789abcdef"), min_size=2, max_size=6, unique=True).map(
        lambda letters: [generation(letter) for letter in letters]
    ),
    st.booleans(),
    st.booleans(),
)


@given(IDENTITIES, IDENTITIES, st.sampled_from([*"0123456789abcdef"]).map(generation))
def test_every_event_makes_an_identity_that_is_let_pass(mine: Identity, theirs: Identity, new: str) -> None:
    events: list[tuple[Any, ...]] = [
        (i.missed, new),
        (i.promoted, new),
        (i.promoted_to_checkpoint, new),
        (i.map_lost, new),
        (i.first_source, new, theirs),
        (i.full_source, theirs),
        (i.resolved, theirs),
        (i.delta_source, theirs),
        (i.resync_begins, theirs),
        (i.resync_ended_at_source,),
        (i.resync_ended_at_target, theirs),
        (i.unchanged,),
    ]
    for event, *arguments in events:
        try:
            change = event(mine, *arguments)
        except Error:
            continue
        i.check(change.identity)
        assert change.identity.current
