"""How a pair agrees: events carried out, the handshake, and who serves after it."""

from __future__ import annotations

from tcmu_replication.replication import state as rules
from tcmu_replication.replication.facts import Disk, Ending
from tcmu_replication.replication.identity import Identity, Marks
from tcmu_replication.replication.state import Answer, Event, State
from tcmu_replication.replication.verdict import Found, Side, Span
from tests.model.decisions import decide, facts, seen, spoken, step, verdict_of
from tests.model.world import (
    EVERY,
    NAMES,
    NONE,
    PRIMARY,
    SECONDARY,
    Budget,
    Host,
    Session,
    Violation,
    World,
    abandon,
    checkpoint,
    flush,
    generation,
    has,
    lost_cache,
    put,
)

CHECKPOINTS = (
    Event.LEFT_BEHIND,
    Event.FIRST_TARGET,
    Event.RESYNC_BEGINS,
    Event.TARGET_DONE,
    Event.HANDED_OVER,
    Event.TOOK_OVER,
)
"""Events at which a host closes its epoch: the data at the gap, at the end of a resync, at a switch."""


def carry_out(w: World, h: int, event: Event, spans: tuple[Span, ...] = ()) -> World:
    """One row of the event table: flush, clear, mark, save; and what the event does to disk and checkpoint."""
    me, peer = w.hosts[h], w.hosts[1 - h]
    new = generation(w.drawn)
    row = rules.EVENTS[event]
    result = step(me.state, event, new=new, theirs=peer.state.identity)
    if new in (result.state.identity.current,):
        w = w._replace(drawn=w.drawn + 1)
    if result.flush:
        me = flush(me)
    dirty = NONE if result.clear else me.dirty
    dirty |= {
        Marks.NOTHING: NONE,
        Marks.OVERLAYS: me.saved,
        Marks.THEIRS: me.old | peer.old | (peer.dirty if Span.THEIR_DIRTY in spans else NONE),
        Marks.ALL: EVERY,
    }[result.marks]
    if row.ending is Ending.CLEAN:
        me = me._replace(old=NONE)
    me = me._replace(state=result.state, dirty=dirty)
    if me.state.role is SECONDARY:
        me = abandon(me)._replace(serving=False)
    is_mix = event is Event.LEFT_BEHIND and me.state.disk is Disk.INCONSISTENT
    if event in CHECKPOINTS and not lost_cache(me) and not is_mix:
        me = checkpoint(me)
    hosts = (me, peer) if h == 0 else (peer, me)
    return w._replace(hosts=hosts)


def handshake(w: World) -> World:
    """Both compare, and hold what follows for agreed. Without a link, or a host, there is no session."""
    w = w._replace(session=None)
    if not (w.link and w.hosts[0].up and w.hosts[1].up):
        return refresh(w)
    said = (facts(w.hosts[0]), facts(w.hosts[1]))
    for h in (0, 1):
        if (flight := w.hosts[h].flight) is not None:
            w = put(w, h, flight=(flight[0], flight[1], False))  # what was not answered is sent again
        other = w.hosts[1 - h]
        heard = other.need if other.state.role is PRIMARY else w.hosts[h].heard or w.hosts[h].cache
        w = put(w, h, answered=spoken(said[h], said[1 - h]), heard=heard)
    verdict = verdict_of(w.hosts[0])
    assert verdict is not None
    source = None if verdict.source is None else 0 if verdict.source is Side.MINE else 1
    saves: list[tuple[int, Event]] = []
    for h in (source, 1 - source) if source is not None else (0, 1):
        me = w.hosts[h]
        mine = verdict_of(me)
        assert mine is not None
        plan = rules.plan(me.state, mine, said[1 - h])
        if plan.at_once is Event.LEFT_BEHIND:
            w = put(w, h, left_behind=not is_behind(me.state))
        elif plan.at_once is not None and changes(w, h, plan.at_once):
            saves.append((h, plan.at_once))
        if rules.takes_over(me.state, seen(w, h)):
            saves.append((h, Event.TOOK_OVER))
        if me.state.handing_over and said[1 - h].role is PRIMARY and not w.hosts[h].left_behind:
            saves.append((h, Event.SWITCHED))
    todo = NONE
    if verdict.found is Found.HOT and source is not None:
        todo = w.hosts[0].old | w.hosts[1].old
    return refresh(w._replace(session=Session(verdict.found, source, tuple(saves), todo=todo)))


def changes(w: World, h: int, event: Event) -> bool:
    """Whether a save would change anything: of a record that is as it should be there is none."""
    me = w.hosts[h]
    if event is Event.SETTLED and not rules.EVENTS[event].may(me.state):
        return False
    if event is not Event.SETTLED:
        return True
    return (
        step(me.state, event, new=generation(w.drawn), theirs=w.hosts[1 - h].state.identity).state != me.state
    )


def is_behind(state: State) -> bool:
    """Whether the record says already that this host was left behind."""
    return state.role is SECONDARY and state.disk is not Disk.UPTODATE and not state.handing_over


def leave_behind(w: World, h: int) -> World:
    """A primary gives way, or a secondary learns that it is outdated; an operator's choice is not needed for that."""
    verdict, peer = verdict_of(w.hosts[h]), w.hosts[1 - h]
    if verdict is not None and verdict.found is not Found.SPLIT_BRAIN:
        overwriting(w, 1 - h, h, EVERY)
    w = put(carry_out(w, h, Event.LEFT_BEHIND), h, left_behind=False)
    if peer.state.role is PRIMARY:
        w = put(w, h, heard=peer.need)
    return refresh(w)


def overwriting(w: World, source: int, target: int, blocks: frozenset[int]) -> None:
    """Nothing that was acknowledged is overwritten by what has not passed through it, without an operator's word."""
    have, lose = w.hosts[source], w.hosts[target]
    for block in blocks:
        alone = lose.alone[block]
        if alone is not None and not has(w, have.cache[block], alone):
            raise Violation(f"2: write {alone}, acknowledged by {NAMES[target]} alone, is overwritten")
        if (
            not lose.waived
            and not has(w, have.cache[block], lose.need[block])
            and has(w, lose.cache[block], lose.need[block])
        ):
            raise Violation(f"1: write {lose.need[block]} is on {NAMES[target]}, and is overwritten")


def refresh(w: World) -> World:
    """Who serves follows from the table, at once. A host that does not serve drops what is under way."""
    for h in (0, 1):
        host = w.hosts[h]
        serving = host.up and decide(w, h) is Answer.SERVE
        if serving != host.serving or (serving and host.away):
            w = put(w, h, serving=serving, away=host.away and not serving)
        if not serving and host.flight:
            w = put(w, h, **abandon(w.hosts[h])._asdict())
    if w.second and not (w.hosts[0].serving and w.hosts[1].serving):
        w = w._replace(second=False)
    return w


def replicates(w: World, h: int) -> bool:
    """Whether what host `h` writes is forwarded now."""
    s = w.session
    if s is None or s.saves or w.hosts[0].left_behind or w.hosts[1].left_behind:
        return False
    if s.found is Found.IN_SYNC:
        return w.hosts[1 - h].state.role is SECONDARY
    return s.source == h and (s.begun or s.found is Found.HOT) and not s.half_done


def on_its_own(w: World, h: int) -> bool:
    """Whether host `h` goes on without its peer: a write waits for a session that is being made."""
    return w.session is None or not w.session.found.proceeds


def pair(budget: Budget) -> World:
    """Two hosts in sync, alpha serves."""
    one = Identity(generation(0))
    alpha = Host(State(PRIMARY, Disk.UPTODATE, one))
    beta = Host(State(SECONDARY, Disk.UPTODATE, one))
    return handshake(World((alpha, beta), budget, drawn=1))


def strangers(budget: Budget) -> World:
    """Two hosts of which one is new."""
    alpha = Host(State(PRIMARY, Disk.UPTODATE))
    beta = Host(State(SECONDARY, Disk.UPTODATE, Identity(generation(0))))
    return handshake(World((alpha, beta), budget, drawn=1, parted=True, strangers=True))


def new(budget: Budget) -> World:
    """Two hosts that have never been a pair."""
    hosts = (Host(State(PRIMARY, Disk.UPTODATE)), Host(State(SECONDARY, Disk.UPTODATE)))
    return handshake(World(hosts, budget, parted=True, strangers=True))
