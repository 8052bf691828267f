"""A task that nobody awaits: what it raises is a defect, and is heard of at once.

asyncio tells of such an exception when the task's last reference goes, which for one that its owner keeps is never.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Begin `work`; keep the task that is returned. The loop's exception handler hears of what it raises."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(_tell)
    return task


def _tell(task: asyncio.Task[None]) -> None:
    if task.cancelled() or (defect := task.exception()) is None:
        return
    context = {"message": f"a task failed: {task.get_coro()}", "exception": defect, "task": task}
    task.get_loop().call_exception_handler(context)
