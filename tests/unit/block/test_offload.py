"""Blocking calls in threads, and how their ends come back to the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 30))


def fails(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def test_offload_passes_the_value_or_the_error_on() -> None:
    async def story() -> None:
        offload = Offload()
        assert await offload(lambda: 7, "count").wait() == 7
        for raised, kind, text in (
            (Error(Kind.NO_SPACE, "full"), Kind.NO_SPACE, "full"),
            (OSError(28, "No space left on device"), Kind.NO_SPACE, "flush the disk"),
        ):
            with pytest.raises(Error, match=text) as caught:
                await offload(fails(raised), "flush the disk").wait()
            assert caught.value.kind is kind
        offload.close()

    run(story)


def test_offload_completes_on_the_loops_thread_and_calls_elsewhere() -> None:
    async def story() -> None:
        offload = Offload()
        here = threading.get_ident()
        told: list[int] = []
        pending = offload(threading.get_ident, "look")
        pending.then(lambda _: told.append(threading.get_ident()))
        assert await pending.wait() != here
        assert told == [here]
        offload.close()

    run(story)


def test_offload_takes_as_many_threads_as_calls_wait_and_no_more_than_its_limit() -> None:
    async def story() -> None:
        offload = Offload(threads=3)
        for _ in range(5):
            await offload(lambda: None, "step").wait()
        assert len(offload._threads) == 1
        go = threading.Event()
        together = threading.Barrier(4)

        def meet() -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait()
                go.wait()

        calls = [offload(meet, "meet") for _ in range(6)]
        assert len(offload._threads) == 3
        await asyncio.to_thread(together.wait)
        assert not any(call.done for call in calls)
        together.abort()
        go.set()
        await asyncio.gather(*(call.wait() for call in calls), return_exceptions=True)
        offload.close()

    run(story)


def test_offload_loses_no_end_of_thousands() -> None:
    async def story() -> None:
        offload = Offload()
        for _ in range(40):
            assert await asyncio.gather(
                *(offload(lambda n=n: n, "count").wait() for n in range(200))
            ) == list(range(200))
        offload.close()

    run(story)


def test_offload_completes_the_others_when_a_completion_raises() -> None:
    async def story() -> None:
        seen: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: seen.append(str(what["exception"])))
        offload = Offload(threads=1)
        go = threading.Event()
        calls = [offload(go.wait, "wait") for _ in range(20)]

        def broken(_: Pending) -> None:
            raise ValueError("a defect")

        for call in calls[::3]:
            call.then(broken)
        go.set()
        await asyncio.gather(*(call.wait() for number, call in enumerate(calls) if number % 3))
        assert all(call.done for call in calls)
        assert seen == ["a defect"] * 7
        offload.close()

    run(story)


def test_offload_gives_a_defect_of_a_call_to_the_loop() -> None:
    """A3: the request does not end, for what it has changed is not known; the others do."""

    async def story() -> None:
        seen: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: seen.append(what["exception"]))
        offload = Offload(threads=1)
        calls = [
            offload(fails(MemoryError()), "copy"),
            offload(lambda: 7, "count"),
            offload(fails(KeyError("slot")), "copy"),
            offload(lambda: 8, "count"),
        ]
        assert await calls[1].wait() == 7
        assert await calls[3].wait() == 8
        assert [type(error) for error in seen] == [MemoryError, KeyError]
        assert "copy" in seen[0].__notes__[0]
        assert not calls[0].done
        offload.close()

    run(story)


def test_offload_closed_has_ended_what_it_was_given_and_takes_no_more() -> None:
    async def story() -> None:
        offload = Offload(threads=1)
        done: list[int] = []
        calls = [offload(lambda n=n: done.append(n), "count") for n in range(50)]
        offload.close()
        offload.close()
        assert done == list(range(50))
        assert not any(call.done for call in calls), "completions are the loop's"
        await asyncio.gather(*(call.wait() for call in calls))
        with pytest.raises(Error, match="flush x: this process is shutting down") as caught:
            offload(lambda: None, "flush x")
        assert caught.value.kind is Kind.CANCELLED

    run(story)


def test_offload_niceness_is_the_threads_alone() -> None:
    async def story() -> None:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        offload = Offload(threads=1, niceness=5)
        nice = await offload(
            lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), "look"
        ).wait()
        assert nice == min(19, before + 5)
        assert os.getpriority(os.PRIO_PROCESS, 0) == before
        offload.close()

    run(story)
