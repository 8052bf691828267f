"""The rules of a pair, explored: every order of events to a stated depth, and for each rule what it is there for.

`TCMU_REPLICATION_MODEL=4` explores four events deeper, for hours if asked to.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tcmu_replication.replication.state import EVENTS, PLANS, REFUSALS, SERVE, Event, Part
from tcmu_replication.replication.verdict import TABLE, Found
from tests.model import rules
from tests.model.explorer import explore
from tests.model.handshake import new, pair, strangers
from tests.model.happenings import events
from tests.model.world import Budget, World
from tests.unit.replication.test_verdict import MIRRORS

DEEPER = int(os.environ.get("TCMU_REPLICATION_MODEL", "0"))
MOST = 60_000
"""States within which a rule's absence must be found."""

EXPLORED: list[tuple[Callable[[Budget], World], Budget, int]] = [
    (new, Budget(writes=1, deaths=1, cuts=1, commands=1), 10),
    (strangers, Budget(writes=1, deaths=1, cuts=1, commands=1), 10),
    (pair, Budget(writes=1, deaths=1, cuts=1, commands=1), 11),
    (pair, Budget(writes=2, deaths=0, cuts=2, commands=1), 10),
    (pair, Budget(writes=1, deaths=2, cuts=0, commands=1), 7),
    (pair, Budget(writes=0, deaths=1, cuts=1, commands=3), 7),
    (pair, Budget(writes=2, deaths=1, cuts=1, commands=2), 5),
]
"""From where, how often each kind of event can happen, and how many events in all. What a pair does by itself, and
going back to a pair from every state, counts against no budget. `TCMU_REPLICATION_MODEL=30` leaves nothing out."""


@pytest.mark.parametrize(("start", "budget", "depth"), EXPLORED)
def test_every_order_of_events(start: Callable[[Budget], World], budget: Budget, depth: int) -> None:
    found = explore(start(budget), depth + DEEPER)
    assert found.violation is None, "\n".join(("the shortest history:", *found.history, found.violation))
    assert found.complete or found.depth == depth + DEEPER


class Rule(NamedTuple):
    """A rule that is taken out, where the search begins, and how the violation that is found begins."""

    without: rules.Mutation
    budget: Budget
    finds: str
    history: tuple[str, ...] = ()
    start: Callable[[Budget], World] = pair


def after(world: World, *history: str) -> World:
    """The world after these events. Raises KeyError if one of them cannot happen."""
    for name in history:
        world = dict(events(world))[name]
    return world


E, F, B = Event, Found, Budget
ALONE = (
    "the link is cut",
    "alpha is given write 1 of block 0",
    "alpha saves: MISSED",
    "write 1 is acknowledged by alpha alone",
    "the link is back",
    "beta saves: LEFT_BEHIND",
    "alpha saves: DELTA_SOURCE",
    "beta saves: RESYNC_BEGINS",
)
RULES: dict[str, Rule] = {
    "verdict both-blank": Rule(rules.without_verdict("both-blank"), B(0, 0, 0, 0), "7", (), new),
    "verdict they-become-ours": Rule(
        rules.without_verdict("they-become-ours", "we-become-theirs"), B(1, 1, 1, 0), "7: split brain"
    ),
    "verdict they-become-our-base": Rule(
        rules.without_verdict("they-become-our-base", "we-become-their-base"), B(2, 0, 2, 0), "7: split brain"
    ),
    "verdict they-become-our-past": Rule(
        rules.without_verdict("they-become-our-past", "we-become-their-past"), B(1, 1, 1, 0), "7: split brain"
    ),
    "verdict same-and-they-crashed": Rule(
        rules.without_verdict("same-and-they-crashed", "same-and-we-crashed"), B(1, 1, 0, 0), "1"
    ),
    "verdict same-and-hot": Rule(
        rules.without_verdict("same-and-hot", "same-and-hot-there"), B(1, 1, 0, 0), "7"
    ),
    "verdict in-sync": Rule(rules.without_verdict("in-sync"), B(0, 0, 0, 0), "7: split brain"),
    "verdict they-are-behind": Rule(
        rules.without_verdict("they-are-behind", "we-are-behind"), B(1, 0, 1, 0), "7: split brain"
    ),
    "verdict they-are-far-behind": Rule(
        rules.without_verdict("they-are-far-behind", "we-are-far-behind"), B(1, 1, 1, 0), "7: split brain"
    ),
    "verdict parted": Rule(rules.without_verdict("parted"), B(1, 0, 1, 1), "7: unrelated"),
    "event MISSED: a new name": Rule(
        rules.event(E.MISSED, identity=rules.same_generation), B(1, 0, 1, 1), "7"
    ),
    "event MISSED: flushes": Rule(rules.event(E.MISSED, flush=False), B(2, 1, 1, 0), "1: write 1"),
    "event LEFT_BEHIND: secondary": Rule(rules.event(E.LEFT_BEHIND, role=None), B(0, 0, 1, 1), ""),
    "event LEFT_BEHIND: outdated": Rule(
        rules.event(E.LEFT_BEHIND, disk=None), B(1, 0, 2, 1), "1: beta is promoted"
    ),
    "event LEFT_BEHIND: promoted no more": Rule(rules.event(E.LEFT_BEHIND, promoted=None), B(0, 0, 0, 2), ""),
    "event PROMOTED: a new name": Rule(rules.same_name(E.PROMOTED), B(0, 0, 0, 1), ""),
    "event PROMOTED: flushes": Rule(rules.event(E.PROMOTED, flush=False), B(1, 1, 1, 1), "1: write 1"),
    "event PROMOTED: hands over no more": Rule(rules.event(E.PROMOTED, handing_over=None), B(0, 0, 1, 2), ""),
    "event PROMOTED_TO_CHECKPOINT: marks the overlays": Rule(
        rules.without_marks(E.PROMOTED_TO_CHECKPOINT), B(1, 0, 1, 1), "5"
    ),
    "event FIRST_SOURCE: marks everything": Rule(
        rules.without_marks(E.FIRST_SOURCE), B(1, 0, 0, 1), "5", (), strangers
    ),
    "event FIRST_TARGET: secondary": Rule(
        rules.event(E.FIRST_TARGET, role=None), B(0, 0, 0, 1), "", (), strangers
    ),
    "event RESOLVED: marks the peer's blocks": Rule(rules.without_marks(E.RESOLVED), B(1, 0, 1, 1), "5"),
    "event RESOLVED: counts since the peer's data": Rule(rules.same_name(E.RESOLVED), B(1, 0, 1, 1), "7"),
    "event DELTA_SOURCE: marks what only the peer knows of": Rule(
        rules.without_marks(E.DELTA_SOURCE), B(2, 1, 1, 0), "5"
    ),
    "event FULL_SOURCE: marks everything": Rule(rules.without_marks(E.FULL_SOURCE), B(1, 1, 1, 0), "5"),
    "event RESYNC_BEGINS: a mix from here on": Rule(rules.same_name(E.RESYNC_BEGINS), B(1, 0, 1, 0), ""),
    "event SOURCE_DONE: the map counts no more": Rule(rules.same_name(E.SOURCE_DONE), B(1, 0, 1, 0), ""),
    "event SOURCE_DONE: flushes": Rule(
        rules.event(E.SOURCE_DONE, flush=False),
        B(1, 2, 1, 1),
        "5",
        (
            "failover --to latest --force on beta",
            "alpha saves: LEFT_BEHIND",
            "beta is given write 1 of block 0",
            "the worker of beta is killed, and back at once",
            "beta saves: DELTA_SOURCE",
            "alpha saves: RESYNC_BEGINS",
            "a block is copied",
        ),
    ),
    "event TARGET_DONE: flushes": Rule(
        rules.event(E.TARGET_DONE, flush=False),
        B(1, 2, 1, 0),
        "",
        (*ALONE, "a block is copied", "the worker of beta is killed, and back at once"),
    ),
    "event TARGET_DONE: uptodate": Rule(rules.event(E.TARGET_DONE, disk=None), B(1, 0, 1, 0), ""),
    "event SETTLED: what was hot is settled": Rule(rules.event(E.SETTLED, ending=None), B(1, 1, 0, 0), "7"),
    "event SETTLED: flushes": Rule(rules.event(E.SETTLED, flush=False), B(1, 2, 0, 0), "6"),
    "event HANDED_OVER: secondary": Rule(rules.event(E.HANDED_OVER, role=None), B(0, 0, 0, 1), ""),
    "event HANDED_OVER: says so": Rule(rules.event(E.HANDED_OVER, handing_over=None), B(0, 0, 0, 1), "7"),
    "event TOOK_OVER: primary": Rule(rules.event(E.TOOK_OVER, role=None), B(0, 0, 0, 1), "7"),
    "event SWITCHED: the switch is over": Rule(
        rules.event(E.SWITCHED, handing_over=None), B(0, 0, 0, 1), "7"
    ),
    "event MAP_LOST: counts no more": Rule(
        rules.identity(E.MAP_LOST, lambda change, before: change._replace(identity=before)),
        B(1, 1, 1, 1),
        "",
        (*ALONE[:4], "stop on alpha", "alpha starts"),
    ),
    "the source ends a resync first": Rule(
        rules.target_first,
        B(2, 0, 2, 1),
        "2: write 2",
        (*ALONE, "a block is copied"),
    ),
    "plan hot source": Rule(rules.without_plan(F.HOT, Part.SOURCE), B(1, 1, 0, 0), "7"),
    "plan hot target": Rule(rules.without_plan(F.HOT, Part.TARGET), B(1, 1, 0, 0), "7"),
    "plan delta source": Rule(rules.plan(F.DELTA, Part.SOURCE, at_once=None), B(2, 1, 1, 0), "5"),
    "plan delta target": Rule(rules.plan(F.DELTA, Part.TARGET, at_once=None), B(1, 0, 2, 1), ""),
    "plan full source": Rule(rules.plan(F.FULL, Part.SOURCE, at_once=None), B(1, 1, 1, 0), "5"),
    "plan full target": Rule(rules.plan(F.FULL, Part.TARGET, begins=None), B(1, 1, 1, 0), ""),
    "serve blank": Rule(rules.without_serve("blank"), B(0, 0, 1, 0), "", (), new),
    "serve secondary": Rule(rules.without_serve("secondary"), B(0, 0, 0, 0), ""),
    "serve behind": Rule(rules.without_serve("behind"), B(1, 1, 1, 1), "2"),
    "serve displaced": Rule(rules.without_serve("displaced"), B(1, 1, 1, 1), "2"),
    "serve split-brain": Rule(rules.without_serve("split-brain"), B(0, 1, 1, 2), "2"),
    "serve catching-up": Rule(rules.without_serve("catching-up"), B(1, 1, 0, 0), "1"),
    "serve peer-answered": Rule(rules.without_serve("peer-answered"), B(0, 1, 0, 0), "7"),
    "serve not-away": Rule(rules.without_serve("not-away"), B(0, 1, 1, 0), "7"),
    "serve away": Rule(rules.without_serve("away"), B(0, 1, 1, 1), "2"),
    "refusal primary": Rule(rules.without_refusal("primary"), B(0, 0, 0, 1), ""),
    "refusal blank": Rule(rules.without_refusal("blank"), B(0, 0, 0, 1), "", (), new),
    "refusal inconsistent": Rule(rules.without_refusal("inconsistent"), B(1, 0, 2, 1), "1", ALONE),
    "refusal outdated": Rule(rules.without_refusal("outdated"), B(1, 0, 2, 1), "1"),
    "refusal crashed": Rule(rules.without_refusal("crashed"), B(1, 1, 1, 1), "1"),
    "refusal not-heard": Rule(rules.without_refusal("not-heard"), B(1, 1, 1, 1), "1"),
}
"""Each with the budget in which its absence is found, and the invariant; "": a step, or a peer, that cannot be."""


@pytest.mark.parametrize("name", RULES)
def test_rule_that_is_taken_out_is_missed(name: str) -> None:
    rule = RULES[name]
    with rule.without():
        found = explore(after(rule.start(rule.budget), *rule.history), depth=40, most=MOST)
    assert found.violation is not None, f"nobody misses it in {found.states} states"
    assert found.violation.startswith(rule.finds), (found.violation, found.history)


VERDICTS, STATES = "tests.unit.replication.test_verdict", "tests.unit.replication.test_state"
GUARDED = f"{VERDICTS}:test_guard_that_is_taken_out_is_missed"
ELSEWHERE: dict[str, str] = {
    # Contradictions, and what the miniature does not have.
    "verdict versions": GUARDED,
    "verdict names": GUARDED,
    "verdict sizes": GUARDED,
    "verdict nobody-whole": GUARDED,
    "verdict both-primary": GUARDED,
    "verdict contradiction": GUARDED,
    "verdict they-are-a-mix": GUARDED,
    "verdict same-and-primary-counts": GUARDED,
    "verdict same-and-counted": GUARDED,
    "verdict same-and-they-are-outdated": GUARDED,
    "verdict same-and-nobody-primary": GUARDED,
    "verdict behind-and-written": GUARDED,
    # Words, and what is decided by somebody else.
    "verdict they-are-blank": f"{VERDICTS}:test_blank_host_is_never_the_source_for_one_that_has_an_identity",
    "verdict unrelated": f"{VERDICTS}:test_the_other_end_finds_the_mirror",
    "event BEGUN": f"{STATES}:test_event",
    "event VOUCHED": f"{STATES}:test_event",
    "event PROMOTED_AS_IT_IS": f"{STATES}:test_promotion_of_a_mix_keeps_it_as_it_is_and_counts_the_overlays",
    "plan in-sync neither": f"{STATES}:test_worst_end_of_a_life_counts_until_it_is_settled",
    "plan hot neither": f"{STATES}:test_both_ends_of_every_verdict_that_proceeds_have_a_plan",
    "serve handing-over": f"{STATES}:test_serve",
    "serve after-crash-serve": f"{STATES}:test_serve",
    "serve waited-out": f"{STATES}:test_serve",
    "refusal taking-over": f"{STATES}:test_promotion_is_refused_and_says_what_else_there_is",
    "refusal primary-heard": f"{STATES}:test_promotion_is_refused_and_says_what_else_there_is",
    "refusal suspect": f"{STATES}:test_promotion_is_refused_and_says_what_else_there_is",
    "refusal disagreed": f"{STATES}:test_promotion_is_refused_and_says_what_else_there_is",
}
"""Rules that no history of the miniature needs, and the test that does."""


def test_every_rule_is_missed_by_some_test() -> None:
    every = {f"verdict {row.name}" for row in TABLE if row.name not in MIRRORS}
    every |= {f"event {event.name}" for event in EVENTS}
    every |= {f"plan {found.name.lower().replace('_', '-')} {part.value}" for found, part in PLANS}
    every |= {f"serve {row.name}" for row in SERVE} | {f"refusal {row.name}" for row in REFUSALS}
    missed = {name.split(":")[0] for name in RULES} | set(ELSEWHERE)
    assert every == missed - {"the source ends a resync first"}


def test_tests_that_are_named_are_there() -> None:
    for place in set(ELSEWHERE.values()):
        module, name = place.split(":")
        assert callable(getattr(importlib.import_module(module), name))
