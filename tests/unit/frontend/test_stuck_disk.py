"""A disk whose system calls do not return: the loop's thread is stuck, and another stands in at the ring (A2)."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from tcmu_replication.block.memory import Memory
from tcmu_replication.frontend.baton import Baton
from tcmu_replication.tcmu import layout
from tests.support.fake_kernel import ALL, BLOCK, FakeKernel
from tests.unit.frontend.test_tcmu import BUSY, FOREVER_S, GOOD, SIZE, Host, on_loop, write_16

CANNOT_KEEP = ALL & ~layout.Capability.KEEP_BUFFERS


class Frozen(Memory):
    """A disk whose writes, from the `first` on, do not return before `thaw`: a read of an empty pipe, in the kernel."""

    def __init__(self, first: int = 0) -> None:
        super().__init__(SIZE)
        self.frozen = threading.Event()
        self.left = first
        self.written: list[int] = []
        self._wait, self._go = os.pipe()

    def write(self, offset, buffers, fua=False):
        if self.left == 0:
            self.frozen.set()
            os.read(self._wait, 1)
        self.left -= 1
        self.written.append(offset)
        return super().write(offset, buffers, fua)

    def thaw(self) -> None:
        os.write(self._go, b"x")

    def close(self) -> None:
        for fd in (self._wait, self._go):
            os.close(fd)


class Bystander(threading.Thread):
    """What others do while the loop's thread is stuck: `story`, and then the disk goes on. Re-raises in `end`."""

    def __init__(self, disk: Frozen, story) -> None:
        super().__init__()
        self._disk, self._story = disk, story
        self._raised: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            assert self._disk.frozen.wait(30)
            self._story()
        except BaseException as raised:
            self._raised = raised
        finally:
            self._disk.thaw()

    def end(self) -> None:
        self.join()
        if self._raised is not None:
            raise self._raised


def stand_in(host) -> int:
    """One step; the kernel takes completions within the call that wakes it."""
    answered = host.frontend.stand_in()
    host.kernel.reap()
    return answered


async def story_of(kernel, disk, deadline_s, meanwhile):
    """Two writes, the first of which hangs; `meanwhile(host, tokens)` runs in another thread until it goes on."""
    async with Host(disk, kernel, deadline_s=deadline_s) as host:
        tokens = [kernel.queue(write_16(n * BLOCK, BLOCK), bytes((n + 1,)) * BLOCK) for n in range(2)]
        bystander = Bystander(disk, lambda: meanwhile(host, tokens))
        kernel.kick()
        results = await host.results(*tokens)
        bystander.end()
        await host.until(lambda: not kernel.kept and not host.frontend.in_flight)
        return host, [result.status for result in results]


@on_loop
async def test_overdue_commands_are_answered_busy_while_the_loop_is_stuck():
    kernel, disk = FakeKernel(time_out_s=0), Frozen()

    def meanwhile(host, tokens):
        assert stand_in(host) == 2
        assert [kernel.results[token].status for token in tokens] == [BUSY, BUSY]
        assert kernel.kept == 2

    host, statuses = await story_of(kernel, disk, 0.0, meanwhile)
    assert statuses == [BUSY, BUSY]
    assert host.frontend.counters.late == 2
    # The one that had begun ends late, and in its place; the one behind it was never begun.
    assert disk.written == [0]


@on_loop
async def test_commands_that_have_time_are_left_alone_and_carried_out():
    kernel, disk = FakeKernel(time_out_s=0), Frozen()

    def meanwhile(host, tokens):
        assert stand_in(host) == 0
        assert kernel.results == {}

    _, statuses = await story_of(kernel, disk, FOREVER_S, meanwhile)
    assert statuses == [GOOD, GOOD]
    assert disk.written == [0, BLOCK]


@on_loop
async def test_what_ended_before_the_call_that_hangs_is_shown_to_the_kernel():
    kernel, disk = FakeKernel(time_out_s=0), Frozen(first=1)

    def meanwhile(host, tokens):
        assert kernel.results == {}
        assert stand_in(host) == 0
        assert kernel.results[tokens[0]].status == GOOD

    _, statuses = await story_of(kernel, disk, FOREVER_S, meanwhile)
    assert statuses == [GOOD, GOOD]


@on_loop
async def test_commands_that_come_while_the_loop_is_stuck_are_carried_out_in_their_order():
    kernel, disk = FakeKernel(time_out_s=0), Frozen()
    later: list[int] = []

    def meanwhile(host, tokens):
        for n in (5, 6):
            later.append(kernel.queue(write_16(n * BLOCK, BLOCK), bytes(BLOCK)))
            stand_in(host)
        later.append(kernel.queue(write_16(7 * BLOCK, BLOCK), bytes(BLOCK)))  # nobody has looked at it yet

    _, statuses = await story_of(kernel, disk, FOREVER_S, meanwhile)
    assert statuses == [GOOD, GOOD]
    assert [kernel.results[token].status for token in later] == [GOOD] * 3
    assert disk.written == [n * BLOCK for n in (0, 1, 5, 6, 7)]


@pytest.mark.parametrize("capabilities", [ALL, CANNOT_KEEP])
@on_loop
async def test_commands_that_come_while_the_loop_is_stuck_are_answered_busy_in_time(capabilities):
    kernel, disk = FakeKernel(time_out_s=0, capabilities=capabilities), Frozen()

    def meanwhile(host, tokens):
        token = kernel.queue(write_16(5 * BLOCK, BLOCK), bytes(BLOCK))
        stand_in(host)
        assert kernel.results[token].status == BUSY

    await story_of(kernel, disk, 0.0, meanwhile)
    assert 5 * BLOCK not in disk.written


@on_loop
async def test_aborted_commands_are_answered_while_the_loop_is_stuck():
    kernel, disk = FakeKernel(time_out_s=0), Frozen()

    def meanwhile(host, tokens):
        kernel.abort(tokens[1:])
        assert stand_in(host) == 1
        assert kernel.results[tokens[1]].status == BUSY

    host, statuses = await story_of(kernel, disk, FOREVER_S, meanwhile)
    assert statuses == [GOOD, BUSY]
    assert host.frontend.counters.aborted == 1
    assert disk.written == [0]


@on_loop
async def test_repetition_of_a_late_write_comes_after_it():
    kernel, disk = FakeKernel(time_out_s=0), Frozen()
    repeated: list[int] = []

    def meanwhile(host, tokens):
        stand_in(host)
        repeated.append(kernel.queue(write_16(0, BLOCK), b"\xee" * BLOCK))

    await story_of(kernel, disk, 0.0, meanwhile)
    assert disk.written[0] == 0
    assert bytes(disk.data[:BLOCK]) == (b"\xee" if disk.written.count(0) == 2 else b"\1") * BLOCK


@on_loop
async def test_ring_that_is_gone_is_nobodys():
    async with Host() as host:
        await host.frontend.stop()
        assert host.frontend.stand_in() == 0


def test_baton_that_is_held_is_not_taken():
    baton = Baton()
    with baton:
        assert not baton.take()
    assert baton.take()
    baton.give_back()
    assert not baton.lent


def test_loop_waits_for_the_end_of_the_others_step():
    baton, steps = Baton(), []
    assert baton.take()

    def loop() -> None:
        with baton:
            steps.append("loop")

    thread = threading.Thread(target=loop)
    thread.start()
    while not baton.held:
        pass
    steps.append("other")
    baton.give_back()
    thread.join()
    assert steps == ["other", "loop"]


@on_loop
async def test_two_threads_at_one_ring_answer_every_command_once():
    """The fake kernel raises where a command is answered twice or a completion is torn."""
    kernel = FakeKernel(time_out_s=0)
    async with Host(Memory(SIZE), kernel, deadline_s=FOREVER_S) as host:
        over = threading.Event()

        def other() -> None:
            while not over.is_set():
                host.frontend.stand_in()

        thread = threading.Thread(target=other)
        thread.start()
        try:
            for turn in range(200):
                tokens = [kernel.queue(write_16(n * BLOCK, BLOCK), bytes((turn,)) * BLOCK) for n in range(32)]
                kernel.kick()
                assert {result.status for result in await host.results(*tokens)} == {GOOD}
                await asyncio.sleep(0)
        finally:
            over.set()
            thread.join()
        assert not host.frontend.in_flight
