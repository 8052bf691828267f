"""A task that nobody awaits, and that is kept. (A3)"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from tcmu_replication.background import background


def told(work: Coroutine[Any, Any, None], *, cancel: bool = False) -> list[type[BaseException]]:
    """What the loop's exception handler hears while the task is still kept."""
    seen: list[type[BaseException]] = []

    async def play() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: seen.append(type(what["exception"])))
        kept = background(work)
        if cancel:
            kept.cancel()
        await asyncio.wait([kept])
        await asyncio.sleep(0)

    asyncio.run(play())
    return seen


async def broken() -> None:
    raise KeyError("nobody foresaw this")


async def whole() -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("work", "cancel", "expected"), [(broken, False, [KeyError]), (whole, False, []), (whole, True, [])]
)
def test_exception_of_a_task_that_is_kept_is_told(work: Any, cancel: bool, expected: list[Any]) -> None:
    assert told(work(), cancel=cancel) == expected
