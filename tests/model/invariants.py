"""What must hold at every instant, and the way back to a pair that there must be from everywhere."""

from __future__ import annotations

from collections.abc import Iterator

from tcmu_replication.replication.facts import Disk
from tcmu_replication.replication.verdict import Found
from tests.model.decisions import verdict_of
from tests.model.happenings import choices, commands, free
from tests.model.world import EVERY, NAMES, SECONDARY, Session, Violation, World, has_all, lost_cache


def check_invariants(w: World) -> None:
    """1, 2, 4 and 7 of docs/pair.md at one instant, 5 and 6 where the hosts are still. Raises `Violation`."""
    for h in (0, 1):
        _check_host(w, h)
    if w.hosts[0].serving and w.hosts[1].serving:
        if not w.second:
            raise Violation("2: both hosts serve, and no operator has made them")
        if w.session and w.session.found.proceeds:
            raise Violation(f"2: both hosts serve, and think that they are {w.session.found.value}")
    if w.session:
        _check_verdict(w, w.session)
        _check_still(w, w.session)


def _check_host(w: World, h: int) -> None:
    host, verdict = w.hosts[h], verdict_of(w.hosts[h])
    if host.serving and not has_all(w, host.cache, host.need):
        raise Violation(f"1: {NAMES[h]} serves {host.cache}, and its initiators were told {host.need}")
    uptodate = host.state.role is SECONDARY and host.state.disk is Disk.UPTODATE and not lost_cache(host)
    agreed = verdict is None or verdict.found in (Found.IN_SYNC, Found.HOT)
    if uptodate and agreed and host.heard is not None and not has_all(w, host.cache, host.heard):
        raise Violation(f"4: {NAMES[h]} says uptodate with {host.cache}, and heard of {host.heard}")


def _check_verdict(w: World, s: Session) -> None:
    """No false alarm, and no waste."""
    if not w.parted and s.found in (Found.SPLIT_BRAIN, Found.UNRELATED, Found.REFUSED):
        raise Violation(f"7: {s.found.value}, and nobody has promoted anything")
    if not w.strangers and s.found is Found.UNRELATED:
        raise Violation("7: unrelated, and yet both come from one")
    if not w.torn and s.found is Found.FULL:
        raise Violation("cost: a full comparison, and no map was lost")


def _check_still(w: World, s: Session) -> None:
    a, b = w.hosts
    if a.flight or b.flight or s.saves:
        return
    differ = {block for block in EVERY if a.cache[block] != b.cache[block]}
    if s.found is Found.IN_SYNC and differ:
        raise Violation(f"6: in sync and quiet, and {a.cache} is not {b.cache}")
    if s.found in (Found.DELTA, Found.FULL) and s.source is not None and differ - w.hosts[s.source].dirty:
        raise Violation(f"5: {a.cache} is not {b.cache}, and the source would copy less than that")
    if s.found is Found.HOT and s.source is not None and differ - s.todo:
        raise Violation(f"5: {a.cache} is not {b.cache}, and less than that is hot")


def heal(w: World) -> Iterator[tuple[str, World]]:
    """What would be done now to make a pair of it: by itself, or by the command that the tables name. One step."""
    for event in free(w):
        yield event
        return
    w = w._replace(budget=w.budget._replace(commands=1))
    s = w.session
    if s is not None and not s.found.proceeds:
        keep = sorted((0, 1), key=lambda h: not w.hosts[h].serving)
        for h in keep:
            for event in choices(w, h):
                yield event
                return
    in_sync = s is not None and s.found is Found.IN_SYNC
    if not (w.hosts[0].serving or w.hosts[1].serving or in_sync):
        for h in (0, 1):
            for name, after in commands(w):
                if name.startswith(
                    (f"failover --to latest on {NAMES[h]}", f"failover --to checkpoint on {NAMES[h]}")
                ):
                    yield name, after
                    return


def healthy(w: World) -> bool:
    """One host serves, and the other has the same."""
    s = w.session
    return (
        s is not None
        and s.found is Found.IN_SYNC
        and not s.saves
        and w.hosts[0].serving + w.hosts[1].serving == 1
        and not any(host.flight for host in w.hosts)
        and not any(host.state.handing_over for host in w.hosts)
    )
