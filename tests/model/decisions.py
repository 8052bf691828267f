"""What the tables answer, remembered: the same question is asked in many worlds."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from tcmu_replication.replication import state as rules
from tcmu_replication.replication import verdict as verdicts
from tcmu_replication.replication.facts import Facts, check
from tcmu_replication.replication.state import Answer, Seen, State
from tcmu_replication.replication.verdict import Verdict
from tcmu_replication.units import BLOCK
from tests.model.world import BLOCKS, Host, World


@cache
def _facts(s: State, dirty: int, old: int, serving: bool) -> Facts:
    return check(
        Facts(
            (1, 1),
            "disk0",
            BLOCKS * BLOCK,
            s.role,
            s.disk,
            s.identity,
            dirty * BLOCK if s.identity.base else 0,
            old * BLOCK,
            s.ending,
            promoted=s.promoted,
            serving=serving,
            handing_over=s.handing_over,
        )
    )


def facts(host: Host) -> Facts:
    return _facts(host.state, len(host.dirty), len(host.old), host.serving)


class Spoken(NamedTuple):
    """What was said at a handshake, seen from one end."""

    mine: Facts
    theirs: Facts
    verdict: Verdict


SPOKEN: list[Spoken] = []


@cache
def spoken(mine: Facts, theirs: Facts) -> int:
    """The number of what was said, in `SPOKEN`: a world with numbers in it is told from others sooner."""
    SPOKEN.append(Spoken(mine, theirs, verdicts.compare(mine, theirs)))
    return len(SPOKEN) - 1


def verdict_of(host: Host) -> Verdict | None:
    """The verdict of the last handshake of this life."""
    return None if host.answered is None else SPOKEN[host.answered].verdict


def seen(w: World, h: int) -> Seen:
    host = w.hosts[h]
    alive = w.link and w.hosts[1 - h].up
    return _seen(host.answered, alive, host.away, len(host.old))


@cache
def _seen(answered: int | None, alive: bool, away: bool, old: int) -> Seen:
    said = None if answered is None else SPOKEN[answered]
    return Seen(said and said.theirs, said and said.verdict, alive, away, hot_bytes=old * BLOCK)


def decide(w: World, h: int) -> Answer:
    host = w.hosts[h]
    alive = w.link and w.hosts[1 - h].up
    return _decide(host.state, host.answered, alive, host.away, len(host.old))


@cache
def _decide(state: State, answered: int | None, alive: bool, away: bool, old: int) -> Answer:
    return rules.serve(state, _seen(answered, alive, away, old)).answer


promotion = cache(rules.promote)
step = cache(rules.step)


def forget_decisions() -> None:
    """The tables were changed: nothing that was decided by the old ones counts."""
    SPOKEN.clear()
    for function in (_facts, spoken, _seen, _decide, promotion, step):
        function.cache_clear()
