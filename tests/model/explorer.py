"""Breadth first through all that can happen: the first violation that is found has the shortest history."""

from __future__ import annotations

from typing import NamedTuple

from tcmu_replication.errors import Error
from tests.model.happenings import events
from tests.model.invariants import check_invariants, heal, healthy
from tests.model.world import Violation, World

LONGEST_HEALING = 80
"""Steps after which a pair that is left alone, and helped by the named commands, must be one again."""


class Explored(NamedTuple):
    """What was looked at. `violation` is None if every invariant held; `history` leads to it."""

    states: int
    depth: int
    complete: bool
    violation: str | None = None
    history: tuple[str, ...] = ()


def explore(start: World, depth: int, most: int = 10_000_000) -> Explored:
    """All states within `depth` events of `start`, and from each of them the way back to a pair."""
    came_from: dict[World, tuple[World, str] | None] = {start: None}
    heals: set[World] = set()
    layer, level = [start], 0
    while layer and level < depth and len(came_from) < most:
        level += 1
        after: list[World] = []
        for world in layer:
            name = ""
            try:
                check_heals(world, heals)
                for name, next_world in events(world):
                    if next_world in came_from:
                        continue
                    came_from[next_world] = (world, name)
                    check_invariants(next_world)
                    after.append(next_world)
            except (Violation, Error) as violation:
                history = (*_history(came_from, world), name) if name else _history(came_from, world)
                return Explored(len(came_from), level, False, str(violation), history)
        layer = after
    return Explored(len(came_from), level, not layer)


def check_heals(world: World, heals: set[World]) -> None:
    """7: some event or named command leads on, and in the end to a pair. `heals` are worlds that are known to."""
    path: list[World] = []
    names: list[str] = []
    while world not in heals and not healthy(world):
        path.append(world)
        if len(path) > LONGEST_HEALING:
            raise Violation("7: no way back to a pair: " + ", then ".join(names[-6:]))
        try:
            step = next(iter(heal(world)), None)
            if step is None:
                raise Violation("7: nothing leads on")
            name, world = step
            names.append(name)
            check_invariants(world)
        except (Violation, Error) as violation:
            raise Violation(f"{violation} (after: {', then '.join(names)})") from None
    heals.update(path)


def _history(came_from: dict[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    history: list[str] = []
    step = came_from[world]
    while step is not None:
        world, name = step
        history.append(name)
        step = came_from[world]
    return tuple(reversed(history))
