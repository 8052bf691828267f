"""The tables with one rule taken out or weakened, for the time of a test: what each rule is there for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tcmu_replication.replication import state, verdict
from tcmu_replication.replication.identity import Change, Identity
from tcmu_replication.replication.state import Event, Plan
from tests.model import decisions, happenings

Mutation = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _set(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    decisions.forget_decisions()
    try:
        yield
    finally:
        setattr(place, name, before)
        decisions.forget_decisions()


def without_verdict(*names: str) -> Mutation:
    """The verdicts without these rows."""
    return lambda: _set(verdict, "TABLE", tuple(row for row in verdict.TABLE if row.name not in names))


def without_serve(name: str) -> Mutation:
    """Who serves, without this row. Without the last one a host serves if no other row says otherwise."""
    rows = tuple(row for row in state.SERVE if row.name != name)
    if name == state.SERVE[-1].name:
        rows += (state.SERVE[-1]._replace(answer=state.Answer.SERVE),)
    return lambda: _set(state, "SERVE", rows)


def without_refusal(name: str) -> Mutation:
    """Promotions that are not refused for this reason."""
    return lambda: _set(state, "REFUSALS", tuple(row for row in state.REFUSALS if row.name != name))


def event(name: Event, **changes: Any) -> Mutation:
    """One event with other members."""
    row = state.EVENTS[name]._replace(**changes)
    return lambda: _set(state, "EVENTS", state.EVENTS | {name: row})


def identity(name: Event, operation: Callable[[Change, Identity], Change]) -> Mutation:
    """One event whose operation on the identity does something else: `operation(what it does, what was there)`."""
    right = state.EVENTS[name].identity
    return event(name, identity=lambda mine, new, theirs: operation(right(mine, new, theirs), mine))


def without_marks(name: Event) -> Mutation:
    """One event that marks nothing in the dirty map."""
    return identity(name, lambda change, before: change._replace(marks=state.Marks.NOTHING))


def same_name(name: Event) -> Mutation:
    """One event that keeps the identity, and the map, as they were."""
    return identity(name, lambda change, before: Change(before))


def same_generation(mine: Identity, new: str, theirs: Identity) -> Change:
    """A map that counts, and data that goes by the name that the peer's has too."""
    return Change(mine._replace(base=new), clear=True)


def plan(found: verdict.Found, part: state.Part, **changes: Any) -> Mutation:
    """What one end does after one verdict, with other members."""
    row = state.PLANS[found, part]._replace(**changes)
    return lambda: _set(state, "PLANS", state.PLANS | {(found, part): row})


def without_plan(found: verdict.Found, part: state.Part) -> Mutation:
    """One end does nothing after one verdict."""
    return lambda: _set(state, "PLANS", state.PLANS | {(found, part): Plan()})


def target_first() -> contextlib.AbstractContextManager[None]:
    """A resync that ends at the target first, as it does in DRBD."""
    right = state.EVENTS[Event.TARGET_DONE].identity

    def hasty(mine: Identity, new: str, theirs: Identity) -> Change:
        return right(mine, new, theirs._replace(base=""))

    row = state.EVENTS[Event.TARGET_DONE]._replace(identity=hasty)
    stack = contextlib.ExitStack()
    stack.enter_context(_set(happenings, "SOURCE_FIRST", False))
    stack.enter_context(_set(state, "EVENTS", state.EVENTS | {Event.TARGET_DONE: row}))
    return stack
