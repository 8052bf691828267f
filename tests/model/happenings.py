"""What can happen to a pair, one step at a time: by itself, by an initiator, by bad luck, by an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tcmu_replication.errors import Error
from tcmu_replication.replication import state as rules
from tcmu_replication.replication.facts import Disk, Ending
from tcmu_replication.replication.state import Event, Part, Seen, State, To, Word
from tcmu_replication.replication.verdict import Found, Side
from tests.model.decisions import SPOKEN, promotion, seen, verdict_of
from tests.model.handshake import (
    carry_out,
    changes,
    handshake,
    leave_behind,
    on_its_own,
    overwriting,
    refresh,
    replicates,
)
from tests.model.world import (
    BLOCKS,
    NAMES,
    NONE,
    PRIMARY,
    SECONDARY,
    Violation,
    World,
    flush,
    has,
    has_all,
    lost_cache,
    put,
    still_there,
    write_block,
)

SOURCE_FIRST = True
"""A resync ends at the source first; false only where a test shows why."""


def events(w: World) -> Iterator[tuple[str, World]]:
    """Everything that can happen next, each with what it leads to."""
    yield from free(w)
    budget = w.budget
    if budget.writes:
        yield from writes(w)
    if budget.deaths:
        for h in (0, 1):
            if w.hosts[h].up:
                yield from deaths(w, h)
    if budget.cuts and w.link:
        yield "the link is cut", cut(w)
        if w.session and w.session.todo and replicating_target(w) is not None:
            yield (
                "a block is copied, and the link is cut before that is acknowledged",
                cut(copied(w, acknowledged=False)),
            )
    if budget.commands:
        yield from commands(w)


def cut(w: World) -> World:
    budget = w.budget._replace(cuts=w.budget.cuts - 1)
    return refresh(w._replace(link=False, session=None, budget=budget))


def free(w: World) -> Iterator[tuple[str, World]]:
    """What happens by itself, sooner or later."""
    for h in (0, 1):
        if not w.hosts[h].up:
            yield f"{NAMES[h]} starts", boot(w, h)
    if not w.link:
        yield "the link is back", handshake(w._replace(link=True))
    yield from session_steps(w)
    yield from flights(w)


def boot(w: World, h: int) -> World:
    host = w.hosts[h]
    state = rules.opened(host.state, host.died)
    w = put(w, h, up=True, state=state, died=Ending.CLEAN, away=True, answered=None, heard=None)
    return handshake(w)


def session_steps(w: World) -> Iterator[tuple[str, World]]:
    s = w.session
    for h in (0, 1):
        if w.hosts[h].left_behind:
            yield f"{NAMES[h]} saves: LEFT_BEHIND", leave_behind(w, h)
            return
    if s is None:
        return
    if s.saves:
        h, event = s.saves[0]
        yield f"{NAMES[h]} saves: {event.name}", saved(w)
        return
    if s.compare_again:
        yield "both compare again", handshake(w)
        return
    if s.source is None:
        return
    source, target = s.source, 1 - s.source
    mine, theirs = rules.PLANS[s.found, Part.SOURCE], rules.PLANS[s.found, Part.TARGET]
    if s.found in (Found.DELTA, Found.FULL):
        if not s.begun:
            after = carry_out(w, target, theirs.begins) if theirs.begins else w
            todo = w.hosts[source].dirty
            yield (
                f"{NAMES[target]} saves: RESYNC_BEGINS",
                refresh(after._replace(session=s._replace(begun=True, todo=todo))),
            )
        elif s.todo:
            yield "a block is copied", copied(w)
        elif not w.hosts[source].flight or s.half_done:
            order = ((source, mine.ends), (target, theirs.ends))
            h, event = order[s.half_done] if SOURCE_FIRST else order[not s.half_done]
            if event is not None:
                yield f"{NAMES[h]} saves: {event.name}", ended(w, h, event)
    elif s.found is Found.HOT:
        if s.todo:
            yield "a block is copied", copied(w)
        elif not w.hosts[source].flight:
            ends = ((target, theirs.ends), (source, mine.ends))
            both = tuple((h, event) for h, event in ends if event and changes(w, h, event))
            again = s._replace(saves=both, compare_again=True)
            yield "the hot extents are copied", w._replace(session=again)


def ended(w: World, h: int, event: Event) -> World:
    """One of the two saves that end a resync."""
    s = w.session
    assert s is not None
    w = put(carry_out(w, h, event), h, alone=(None,) * BLOCKS, waived=False)
    if event is Event.TARGET_DONE:
        w = put(w, h, need=w.hosts[1 - h].need, heard=w.hosts[1 - h].need)
    return refresh(w._replace(session=s._replace(half_done=True, compare_again=s.half_done)))


def saved(w: World) -> World:
    """The next save that was agreed on. What changes an identity or a role is compared anew."""
    s = w.session
    assert s is not None
    (h, event), *rest = s.saves
    verdict = verdict_of(w.hosts[h])
    before = w.hosts[h].state
    w = carry_out(w, h, event, verdict.spans if verdict else ())
    if event is Event.SETTLED:
        peer = w.hosts[1 - h]
        w = put(w, h, alone=(None,) * BLOCKS, waived=False)
        if peer.state.role is PRIMARY:
            w = put(w, h, need=peer.need, heard=peer.need)
    if event is Event.TOOK_OVER:
        w = put(w, h, need=w.hosts[1 - h].need)
    if event in (Event.LEFT_BEHIND, Event.FIRST_TARGET, Event.RESOLVED, Event.FIRST_SOURCE):
        loser = h if event in (Event.LEFT_BEHIND, Event.FIRST_TARGET) else 1 - h
        w = put(w, loser, need=w.hosts[1 - loser].need, alone=(None,) * BLOCKS, waived=True)
    again = s.compare_again or event in (Event.TOOK_OVER, Event.SWITCHED, Event.RESOLVED, Event.FIRST_SOURCE)
    s = s._replace(saves=tuple(rest), compare_again=again)
    after = w.hosts[h].state
    if again and not rest and (before.identity, before.role) != (after.identity, after.role):
        return handshake(w)
    return refresh(w._replace(session=s))


def replicating_target(w: World) -> int | None:
    s = w.session
    if s is None or s.source is None or s.saves or not (s.begun or s.found is Found.HOT):
        return None
    return 1 - s.source


def copied(w: World, acknowledged: bool = True) -> World:
    """One block goes from the source to the target; its mark goes when that is acknowledged."""
    s = w.session
    assert s is not None
    assert s.source is not None
    block = min(s.todo)
    source, target = s.source, 1 - s.source
    overwriting(w, source, target, frozenset((block,)))
    hosts = list(w.hosts)
    if (
        hosts[target].cache[block] != hosts[source].cache[block]
    ):  # what is equal, by hash, is not written again
        hosts[target] = write_block(hosts[target], block, hosts[source].cache[block])
    if acknowledged:
        hosts[source] = hosts[source]._replace(dirty=hosts[source].dirty - {block})
        s = s._replace(todo=s.todo - {block})
    return refresh(w._replace(hosts=(hosts[0], hosts[1]), session=s))


def flights(w: World) -> Iterator[tuple[str, World]]:
    for h in (0, 1):
        host = w.hosts[h]
        if host.flight is None:
            continue
        block, number, arrived = host.flight
        if replicates(w, h):
            if not arrived:
                there = write_block(w.hosts[1 - h], block, number)
                after = put(w, h, flight=(block, number, True))
                hosts = (there, after.hosts[1]) if h == 1 else (after.hosts[0], there)
                yield f"write {number} reaches {NAMES[1 - h]}", after._replace(hosts=hosts)
            else:
                yield f"write {number} is acknowledged", acknowledged(w, h, together=True)
        elif on_its_own(w, h):
            if not host.state.identity.base:
                after = handshake(carry_out(w, h, Event.MISSED))
                yield f"{NAMES[h]} saves: MISSED", after
            else:
                yield (
                    f"write {number} is acknowledged by {NAMES[h]} alone",
                    acknowledged(w, h, together=False),
                )


def acknowledged(w: World, h: int, together: bool) -> World:
    me = w.hosts[h]
    assert me.flight is not None
    block, number, _ = me.flight
    need = (*me.need[:block], number, *me.need[block + 1 :])
    me = me._replace(need=need, flight=None)
    if not together:
        alone = (*me.alone[:block], number, *me.alone[block + 1 :])
        return put(w, h, **me._replace(dirty=me.dirty | {block}, alone=alone)._asdict())
    w = put(w, h, **me._replace(dirty=me.dirty - {block})._asdict())
    s = w.session
    assert s is not None
    peer = w.hosts[1 - h]
    theirs = (*peer.need[:block], number, *peer.need[block + 1 :])
    w = put(w, 1 - h, need=theirs, heard=need)
    return w._replace(session=s._replace(todo=s.todo - {block}))


def writes(w: World) -> Iterator[tuple[str, World]]:
    number = len(w.parents)
    for h in (0, 1):
        host = w.hosts[h]
        if not host.serving or host.flight:
            continue
        for block in range(BLOCKS):
            after = w._replace(
                parents=(*w.parents, host.cache[block]), budget=w.budget._replace(writes=w.budget.writes - 1)
            )
            wrote = write_block(host, block, number)._replace(flight=(block, number, False))
            yield f"{NAMES[h]} is given write {number} of block {block}", put(after, h, **wrote._asdict())


def deaths(w: World, h: int) -> Iterator[tuple[str, World]]:
    host = w.hosts[h]
    w = w._replace(budget=w.budget._replace(deaths=w.budget.deaths - 1), session=None)
    gone = host._replace(
        old=host.old | host.hot,
        hot=NONE,
        up=False,
        flight=None,
        answered=None,
        heard=None,
        serving=False,
        left_behind=False,
    )
    killed = gone._replace(died=Ending.KILLED)
    yield f"the worker of {NAMES[h]} is killed", refresh(put(w, h, **killed._asdict()))
    back = killed._replace(
        up=True,
        state=rules.opened(host.state, Ending.KILLED),
        died=Ending.CLEAN,
        serving=host.serving,
        away=not host.serving,
    )
    again = handshake(put(w, h, **back._asdict()))
    if host.serving and not w.link and not again.hosts[h].serving:
        raise Violation(f"7: the worker of {NAMES[h]} died alone, and does not go on")
    yield f"the worker of {NAMES[h]} is killed, and back at once", again
    if host.state.identity.base:
        torn = carry_out(put(w, h, **back._asdict()), h, Event.MAP_LOST)
        yield (
            f"the worker of {NAMES[h]} is back at once, and its map is torn",
            handshake(torn._replace(torn=True)),
        )
    lost = power_lost(put(w, h, **gone._replace(cache=host.disk, died=Ending.CRASHED)._asdict()))
    yield f"{NAMES[h]} loses power", refresh(lost)


def power_lost(w: World) -> World:
    """What a loss of power may take is excused: what was never flushed, and was not safe on the peer.

    It was safe there if the peer had it, was uptodate with the same data, and kept its own page cache. Else
    the write was as safe as one disk is.
    """
    for h in (0, 1):
        me, peer = w.hosts[h], w.hosts[1 - h]
        same = peer.state.identity.current == me.state.identity.current and not me.state.identity.base
        safe = same and peer.state.disk is Disk.UPTODATE and not lost_cache(peer)
        if me.state.role is PRIMARY and lost_cache(me) and not safe:
            need = still_there(w, me)
            w = put(w, h, need=need)
            if peer.state.role is SECONDARY:
                shared = zip(need, me.need, peer.need, strict=True)
                excused = tuple(now if theirs == was else theirs for now, was, theirs in shared)
                w = put(w, 1 - h, need=excused)
    return forget_lost(w)


def forget_lost(w: World) -> World:
    """Nobody can be asked for a write that no disk and no page cache has any more."""
    contents = [host.cache for host in w.hosts] + [host.point for host in w.hosts]

    def held(block: int, want: int) -> int:
        while not any(has(w, content[block], want) for content in contents):
            want = w.parents[want]
        return want

    for h in (0, 1):
        host = w.hosts[h]
        w = put(
            w,
            h,
            need=tuple(held(block, want) for block, want in enumerate(host.need)),
            heard=host.heard and tuple(held(block, want) for block, want in enumerate(host.heard)),
            alone=tuple(
                None if want is None or not has(w, host.cache[block], want) else want
                for block, want in enumerate(host.alone)
            ),
        )
    return w


def commands(w: World) -> Iterator[tuple[str, World]]:
    spent = w._replace(budget=w.budget._replace(commands=w.budget.commands - 1))
    for h in (0, 1):
        host = w.hosts[h]
        if not host.up or host.left_behind:
            continue
        me = NAMES[h]
        if not host.flight:
            gone = flush(host)._replace(up=False, hot=NONE, answered=None, heard=None, serving=False)
            yield f"stop on {me}", refresh(put(spent, h, **gone._asdict())._replace(session=None))
        if not host.serving and allowed(rules.check_force, host.state, seen(w, h)):
            yield f"start --force on {me}", started_by_force(spent, h)
        yield from promotions(spent, h)
        yield from choices(spent, h)
        if not w.session or w.session.saves or host.flight:
            continue
        if allowed(rules.check_switch, host.state, seen(w, h)):
            given_up = put(carry_out(spent, h, Event.HANDED_OVER), h, heard=host.need)
            yield f"switch on {me}", handshake(given_up)


def allowed(check: Callable[[State, Seen], None], state: State, seen: Seen) -> bool:
    try:
        check(state, seen)
    except Error:
        return False
    return True


def started_by_force(w: World, h: int) -> World:
    forced = put(w, h, away=False, answered=None)
    after = refresh(forced)
    if after.hosts[h].serving:
        me = after.hosts[h]
        after = put(after, 1 - h, waived=True)._replace(parted=True)
        after = put(after, h, need=still_there(after, me))._replace(second=after.hosts[1 - h].serving)
    return after


def promotions(w: World, h: int) -> Iterator[tuple[str, World]]:
    host = w.hosts[h]
    for to in To:
        asked = promotion(host.state, seen(w, h), to)
        if asked.event is not None:
            yield (
                f"failover --to {to.value} on {NAMES[h]}",
                promoted(w, h, to, asked.event, told=to is To.CHECKPOINT),
            )
            continue
        forced = promotion(host.state, seen(w, h), to, frozenset((Word.FORCE,)))
        if forced.event is not None:
            yield (
                f"failover --to {to.value} --force on {NAMES[h]}",
                promoted(w, h, to, forced.event, told=True),
            )


def promoted(w: World, h: int, to: To, event: Event, told: bool) -> World:
    """A promotion. One that says what it loses is taken at its word; any other loses nothing that was heard of."""
    me, peer = w.hosts[h], w.hosts[1 - h]
    if to is To.CHECKPOINT:
        back = tuple(me.point[b] if b in me.saved else me.cache[b] for b in range(BLOCKS))
        w = put(w, h, cache=back, disk=back)
    w = carry_out(w, h, event)
    wanted = peer.need if me.heard is None else me.heard
    content = w.hosts[h].cache
    if not told and not has_all(w, content, wanted):
        raise Violation(
            f"1: {NAMES[h]} is promoted without a word of what it lacks: it has {content} of {wanted}"
        )
    w = put(w, h, need=still_there(w, w.hosts[h]), alone=(None,) * BLOCKS, answered=None, away=False)
    if told:
        w = put(w, 1 - h, waived=True)
    if peer.serving:
        w = w._replace(second=True)
    w = w._replace(session=None, parted=True)
    return handshake(w) if w.link else refresh(w)


def choices(w: World, h: int) -> Iterator[tuple[str, World]]:
    """`resolve --keep local` and `start --sync-from`: first the loser gives up, then the winner saves."""
    s, host = w.session, w.hosts[h]
    if s is None or s.saves or host.answered is None or s.found.proceeds or not w.hosts[1 - h].up:
        return
    if Side.MINE not in SPOKEN[host.answered].verdict.may_be_source:
        return
    event = Event.RESOLVED if s.found is Found.SPLIT_BRAIN else Event.FIRST_SOURCE
    loser = 1 - h
    gives_up = Event.LEFT_BEHIND if event is Event.RESOLVED else Event.FIRST_TARGET
    saves = ((loser, gives_up), (h, event))
    word = "resolve --keep local" if event is Event.RESOLVED else "start --sync-from this host"
    yield f"{word} on {NAMES[h]}", w._replace(session=s._replace(saves=saves))
