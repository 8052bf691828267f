"""The frontend between the kernel's half of a ring and a chain."""

from __future__ import annotations

import asyncio
import functools
import random
import struct

import pytest

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.pending import Pending, settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.tcmu import TcmuFrontend
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.tcmu import layout
from tcmu_replication.tcmu.layout import Capability
from tests.support.fake_kernel import ALL, BLOCK, FakeKernel

GOOD, CHECK_CONDITION, BUSY = 0, 2, 8
SIZE = 8 << 20
FOREVER_S = 3600.0
INQUIRY = bytes((0x12, 0, 0, 0, 0xFF, 0))
TEST_UNIT_READY = bytes(6)
SYNCHRONIZE_CACHE = bytes((0x35, *bytes(9)))


def read_16(offset, length):
    return struct.pack(">BBQIH", 0x88, 0, offset // 512, length // 512, 0)


def write_16(offset, length):
    return struct.pack(">BBQIH", 0x8A, 0, offset // 512, length // 512, 0)


def write_same_16(offset, length):
    return struct.pack(">BBQIH", 0x93, 0, offset // 512, length // 512, 0)


def compare_and_write(offset):
    return struct.pack(">BBQIH", 0x89, 0, offset // 512, 1, 0)


class Slow(Memory):
    """A disk whose requests end when the test says so."""

    def __init__(self, length):
        super().__init__(length)
        self.waiting = []
        self.unplugged = 0

    def _later(self, call, *args):
        pending = Pending()
        self.waiting.append((pending, call, args))
        return pending

    def read(self, offset, buffers):
        return self._later(super().read, offset, buffers)

    def write(self, offset, buffers, fua=False):
        return self._later(super().write, offset, buffers)

    def flush(self):
        return self._later(super().flush)

    def unplug(self):
        self.unplugged += 1

    def end(self, which=0, error=None):
        pending, call, args = self.waiting.pop(which)
        if error is None:
            call(*args)
        pending.complete(error)


class Host:
    """A frontend on a fake kernel, both on the running loop."""

    def __init__(self, node=None, kernel=None, **options):
        self.loop = asyncio.get_running_loop()
        self.kernel = kernel or FakeKernel()
        self.node = node or Memory(SIZE)
        self.unit = LogicalUnit(SIZE, 512, Identity)
        self.closed = self.loop.create_future()
        self.frontend = TcmuFrontend(
            self.kernel.open(),
            self.kernel,
            self.unit,
            self.node if isinstance(self.node, Gate) else Gate(self.node),
            self.loop,
            on_closed=self.closed.set_result,
            **options,
        )
        self._ended = asyncio.Event()
        self.kernel.on_result = lambda _: self._ended.set()
        self.kernel.attach(self.loop)
        self.defects = []
        self.loop.set_exception_handler(lambda _, context: self.defects.append(context))

    async def __aenter__(self):
        await self.frontend.start()
        return self

    async def __aexit__(self, *_):
        while getattr(self.node, "waiting", None):
            self.node.end()
        await self.frontend.stop()
        self.kernel.close()
        assert self.defects == []

    async def until(self, condition):
        while not condition():
            await asyncio.sleep(0)

    async def turns(self):
        """Whatever the frontend wants to do next, of configfs too, has happened when this ends."""
        for _ in range(3):
            await settle(self.frontend._switches(lambda: None, "nothing"))

    async def results(self, *tokens):
        while not all(token in self.kernel.results for token in tokens):
            self._ended.clear()
            await self._ended.wait()
        return [self.kernel.results[token] for token in tokens]

    async def run(self, cdb, data_out=b"", in_length=0, **options):
        token = self.kernel.queue(cdb, data_out, in_length, **options)
        self.kernel.kick()
        (result,) = await self.results(token)
        return result


def on_loop(test):
    """Run a coroutine test to its end, within a limit."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


@on_loop
async def test_what_is_written_is_read_back():
    data = bytes(range(256)) * 16
    async with Host() as host:
        assert (await host.run(write_16(BLOCK, BLOCK), data)).status == GOOD
        result = await host.run(read_16(BLOCK, BLOCK), in_length=BLOCK)
        assert result == (GOOD, b"", data)
        assert host.node.data[BLOCK : 2 * BLOCK] == data


@on_loop
async def test_a_mebibyte_each_way():
    data = bytes(range(256)) * 4096
    async with Host() as host:
        assert (await host.run(write_16(0, 1 << 20), data)).status == GOOD
        assert (await host.run(read_16(0, 1 << 20), in_length=1 << 20)).data == data


@on_loop
async def test_inquiry_is_shortened_to_what_it_has():
    async with Host() as host:
        result = await host.run(INQUIRY, in_length=255)
        assert result.status == GOOD
        assert 36 <= len(result.data) < 255
        assert b"LIO-ORG" in result.data


@on_loop
async def test_command_without_data():
    async with Host() as host:
        assert await host.run(TEST_UNIT_READY) == (GOOD, b"", b"")


@on_loop
async def test_check_condition_brings_sense_and_no_data():
    async with Host() as host:
        result = await host.run(read_16(SIZE, BLOCK), in_length=BLOCK)
        assert (result.status, result.sense[2] & 0xF, result.sense[12], result.data) == (
            CHECK_CONDITION,
            5,
            0x21,
            b"",
        )
        assert host.frontend.counters.failed == 1


SECRET = 0xEE


async def fill_pages_with_secrets(host):
    """Every page of the data area has held what another initiator wrote."""
    size = host.kernel.free_blocks * BLOCK
    assert size <= SIZE
    assert (await host.run(write_16(0, size), bytes((SECRET,)) * size)).status == GOOD


@pytest.mark.parametrize(
    ("cdb", "in_length"),
    [
        pytest.param(INQUIRY, 4096, id="short answer"),
        pytest.param(bytes((0x12, 0, 0, 0, 5, 0)), 4096, id="shorter than a word"),
        pytest.param(bytes((0x12, 0, 0, 0, 0, 0)), 4096, id="answer of no bytes"),
        pytest.param(read_16(1 << 20, 512), 8192, id="read shorter than its area"),
        pytest.param(read_16(1 << 20, 0), 8192, id="read of nothing"),
        pytest.param(TEST_UNIT_READY, 8192, id="command that has no data"),
        pytest.param(SYNCHRONIZE_CACHE, 8192, id="task that has no data"),
        pytest.param(write_16(0, 0), 8192, id="write in the wrong direction"),
        pytest.param(read_16(SIZE, 512), 8192, id="failed read"),
        pytest.param(bytes((0xFF, *bytes(9))), 8192, id="unknown command"),
    ],
)
@on_loop
async def test_no_initiator_sees_what_was_in_the_pages_before(cdb, in_length):
    async with Host(kernel=FakeKernel(data_size=256 << 10)) as host:
        await fill_pages_with_secrets(host)
        result = await host.run(cdb, in_length=in_length)
        assert SECRET not in result.data
        assert len(result.data) < in_length


@on_loop
async def test_busy_does_not_show_what_was_in_the_pages_before():
    """S6."""
    async with Host(kernel=FakeKernel(data_size=256 << 10, scatter=random.Random(1))) as host:
        await fill_pages_with_secrets(host)

        def busy(offset, buffers):
            raise Error(Kind.CANCELLED)

        host.node.read = busy
        result = await host.run(read_16(0, 8192), in_length=8192)
        assert result == (BUSY, b"", b"\0")


@pytest.mark.parametrize("cdb", [read_16(0, 8192), SYNCHRONIZE_CACHE], ids=["read", "task that has no data"])
@on_loop
async def test_a_late_command_does_not_show_what_was_in_the_pages_before(cdb):
    """S6."""
    async with Host(
        Slow(SIZE), FakeKernel(data_size=256 << 10, scatter=random.Random(1)), deadline_s=0.01
    ) as host:
        size = host.kernel.free_blocks * BLOCK
        write = host.kernel.queue(write_16(0, size), bytes((SECRET,)) * size)
        host.kernel.kick()
        await host.until(lambda: host.node.waiting)
        host.node.end()
        await host.results(write)
        await host.until(lambda: host.kernel.free_blocks == size // BLOCK)
        result = await host.run(cdb, in_length=8192)
        assert result == (BUSY, b"", b"\0")


@on_loop
async def test_a_late_write_keeps_every_byte_of_its_data():
    async with Host(Slow(SIZE), deadline_s=0.01) as host:
        assert (await host.run(write_16(0, BLOCK), b"w" * BLOCK)).status == BUSY
        host.node.end()
        assert host.node.data[:BLOCK] == b"w" * BLOCK


@on_loop
async def test_malformed_entry_fails_and_the_device_goes_on():
    def spoil(entry):
        struct.pack_into("=Q", entry, layout.IOVECS, 0)

    async with Host() as host:
        result = await host.run(read_16(0, BLOCK), in_length=BLOCK, spoil=spoil)
        assert (result.status, result.sense[2] & 0xF, result.sense[12]) == (CHECK_CONDITION, 4, 0x44)
        assert (await host.run(read_16(0, BLOCK), in_length=BLOCK)).status == GOOD
        assert host.frontend.counters.malformed == 1


@on_loop
async def test_bidirectional_command_is_refused():
    async with Host() as host:
        result = await host.run(read_16(0, BLOCK), b"o" * BLOCK, in_length=BLOCK, bidi=True)
        assert result.status == CHECK_CONDITION


@on_loop
async def test_a_batch_is_unplugged_and_answered_once():
    async with Host(Slow(SIZE)) as host:
        tokens = [host.kernel.queue(read_16(n * BLOCK, BLOCK), in_length=BLOCK) for n in range(10)]
        host.kernel.kick()
        await host.until(lambda: len(host.node.waiting) == 10)
        assert host.node.unplugged == 1
        assert host.frontend.counters.batches == 1
        assert host.frontend.in_flight == 10
        wakes = []
        wake = host.frontend.device.wake
        host.frontend.device.wake = lambda: (wakes.append(1), wake())
        for _ in range(10):
            host.node.end(-1)
        assert all(result.status == GOOD for result in await host.results(*tokens))
        assert len(wakes) == 1


@on_loop
async def test_ring_that_never_gets_empty_lets_others_have_their_turn():
    async with Host() as host:
        kernel, left, turns = host.kernel, 200, []
        first = kernel.queue(TEST_UNIT_READY)

        def queue_another(_):
            nonlocal left
            left -= 1
            if left:
                kernel.queue(TEST_UNIT_READY)  # found without an event: the frontend is looking

        kernel.on_result = queue_another
        host.frontend.device.wake = kernel.reap
        kernel.kick()
        while left:
            turns.append(left)
            await asyncio.sleep(0)
        assert len(turns) > 3
        assert len(kernel.results) == 200 + first - 1


@on_loop
async def test_commands_beyond_the_room_follow():
    async with Host(kernel=FakeKernel(ring_size=1024, data_size=64 << 10)) as host:
        tokens = [host.kernel.queue(write_16(n * BLOCK, BLOCK), bytes((n,)) * BLOCK) for n in range(200)]
        host.kernel.kick()
        await host.results(*tokens)
        assert [host.node.data[n * BLOCK] for n in range(200)] == list(range(200))


@on_loop
async def test_what_an_earlier_handler_left_ends_busy_and_then_all_goes_on():
    kernel = FakeKernel()
    left = kernel.queue(read_16(0, BLOCK), in_length=BLOCK)
    async with Host(kernel=kernel) as host:
        assert kernel.results[left].status == BUSY
        assert kernel.actions[:2] == ["block", "reset_ring"]
        assert not kernel.blocked
        assert (await host.run(TEST_UNIT_READY)).status == GOOD


@on_loop
async def test_command_that_comes_before_the_event_is_listened_for():
    kernel = FakeKernel()
    tokens = []
    unblock = kernel.unblock

    def unblock_and_queue():
        unblock()
        tokens.append(kernel.queue(TEST_UNIT_READY))

    kernel.unblock = unblock_and_queue
    async with Host(kernel=kernel) as host:
        assert (await host.results(*tokens))[0].status == GOOD


@on_loop
async def test_start_waits_until_the_backstore_is_enabled():
    kernel = FakeKernel()
    answers = iter((False, False, True))
    kernel.ready = lambda: next(answers)
    async with Host(kernel=kernel) as host:
        assert next(answers, None) is None
        assert (await host.run(TEST_UNIT_READY)).status == GOOD


@on_loop
async def test_late_write_is_answered_busy_and_keeps_its_pages_until_the_chain_lets_go():
    async with Host(Slow(SIZE), deadline_s=0.01) as host:
        kernel, free = host.kernel, host.kernel.free_blocks
        result = await host.run(write_16(0, BLOCK), b"w" * BLOCK)
        assert result.status == BUSY
        assert (kernel.kept, kernel.free_blocks, host.frontend.kept) == (1, free - 1, 1)
        assert host.frontend.counters.late == 1
        host.node.end()
        await host.until(lambda: not kernel.kept)
        assert host.node.data[:BLOCK] == b"w" * BLOCK
        assert (kernel.free_blocks, host.frontend.kept, kernel.in_ring) == (free, 0, 0)


@on_loop
async def test_a_write_same_that_was_answered_busy_does_not_undo_a_newer_write():
    """D10."""
    async with Host(Slow(SIZE), deadline_s=0.01) as host:
        assert (await host.run(write_same_16(0, 4 << 20), b"O" * 512)).status == BUSY
        newer = host.kernel.queue(write_16(2 << 20, BLOCK), b"N" * BLOCK)
        host.kernel.kick()
        await host.until(lambda: len(host.node.waiting) == 2)
        host.node.end(1)
        assert (await host.results(newer))[0].status == GOOD
        while host.node.waiting:
            host.node.end()
        assert host.node.data[2 << 20 : (2 << 20) + BLOCK] == b"N" * BLOCK
        assert host.node.data[1 << 20 : 4 << 20].count(b"O") == 0
        await host.until(lambda: not host.kernel.kept)


@on_loop
async def test_an_aborted_compare_and_write_does_not_write_afterwards():
    """D10."""
    async with Host(Slow(SIZE), deadline_s=FOREVER_S) as host:
        kernel = host.kernel
        first = kernel.queue(compare_and_write(0), bytes(512) + b"1" * 512)
        kernel.kick()
        await host.until(lambda: host.node.waiting)
        kernel.abort([first])
        kernel.kick()
        await host.results(first)
        again = kernel.queue(compare_and_write(0), bytes(512) + b"2" * 512)
        kernel.kick()
        while again not in kernel.results:
            if host.node.waiting:
                host.node.end()
            await asyncio.sleep(0)
        assert kernel.results[again].status == GOOD
        assert host.node.data[:512] == b"2" * 512
        await host.until(lambda: not kernel.kept)


@on_loop
async def test_two_devices_of_one_chain_compare_one_after_the_other():
    """A8."""
    node = Slow(SIZE)
    gate = Gate(node)
    async with Host(gate) as one, Host(gate) as other:
        first = one.kernel.queue(compare_and_write(0), bytes(512) + b"1" * 512)
        one.kernel.kick()
        await one.until(lambda: node.waiting)
        second = other.kernel.queue(compare_and_write(0), bytes(512) + b"2" * 512)
        other.kernel.kick()
        await other.until(lambda: other.frontend.in_flight)
        while second not in other.kernel.results:
            if node.waiting:
                node.end()
            await asyncio.sleep(0)
        assert one.kernel.results[first].status == GOOD
        assert other.kernel.results[second].sense[2] & 0xF == 0xE
        assert node.data[:512] == b"1" * 512


@on_loop
async def test_each_command_has_its_own_deadline():
    async with Host(Slow(SIZE), FakeKernel(time_out_s=0), deadline_s=FOREVER_S) as host:
        tokens = [host.kernel.queue(write_16(n * BLOCK, BLOCK), b"w" * BLOCK) for n in range(4)]
        host.kernel.kick()
        await host.until(lambda: len(host.node.waiting) == 4)
        now_s = host.loop.time()
        for n, command in enumerate(host.frontend._ring.outstanding.values()):
            command.deadline_s = now_s + (0, 0.02, 0.04, FOREVER_S)[n]
        host.frontend._overdue()
        assert [result.status for result in await host.results(*tokens[:3])] == [BUSY] * 3
        assert host.frontend.in_flight == 1


@on_loop
async def test_late_command_of_a_kernel_that_cannot_keep_waits_for_the_chain():
    kernel = FakeKernel(capabilities=ALL & ~Capability.KEEP_BUFFERS)
    async with Host(Slow(SIZE), kernel, deadline_s=0.01) as host:
        first = kernel.queue(read_16(0, BLOCK), in_length=BLOCK)
        kernel.kick()
        await host.until(lambda: host.frontend.counters.late == 1)
        await host.turns()
        assert first not in kernel.results
        assert host.frontend.counters.late == 1
        host.node.end()
        assert (await host.results(first))[0].status == GOOD


@on_loop
async def test_command_that_the_kernel_gave_up_is_still_completed_once():
    async with Host(Slow(SIZE)) as host:
        token = host.kernel.queue(write_16(0, BLOCK), b"w" * BLOCK)
        host.kernel.kick()
        await host.until(lambda: host.node.waiting)
        host.kernel.expire(token)
        host.node.end()
        await host.until(lambda: not host.kernel.in_ring)
        assert host.kernel.results[token].status == CHECK_CONDITION


@pytest.mark.parametrize(("kernel_s", "deadline_s"), [(30, 20.0), (6, 4.0), (0, 20.0)])
@on_loop
async def test_deadline_is_below_the_time_out_of_the_kernel(kernel_s, deadline_s):
    async with Host(Slow(SIZE), FakeKernel(time_out_s=kernel_s)) as host:
        began = host.loop.time()
        host.kernel.queue(write_16(0, BLOCK), b"w" * BLOCK)
        host.kernel.kick()
        await host.until(lambda: host.node.waiting)
        (command,) = host.frontend._ring.outstanding.values()
        assert began <= command.deadline_s - deadline_s <= host.loop.time()


@on_loop
async def test_aborted_commands_are_answered_at_once_and_others_are_not():
    async with Host(Slow(SIZE), deadline_s=FOREVER_S) as host:
        tokens = [host.kernel.queue(write_16(n * BLOCK, BLOCK), b"w" * BLOCK) for n in range(3)]
        host.kernel.kick()
        await host.until(lambda: len(host.node.waiting) == 3)
        host.kernel.abort(tokens[:2])
        host.kernel.kick()
        await host.results(*tokens[:2])
        assert tokens[2] not in host.kernel.results
        assert (host.kernel.kept, host.frontend.counters.aborted) == (2, 2)
        host.node.end()
        host.node.end()
        await host.until(lambda: not host.kernel.kept)


@on_loop
async def test_abort_concerns_no_later_command_of_the_same_number():
    async with Host(Slow(SIZE), deadline_s=FOREVER_S) as host:
        kernel = host.kernel
        for _ in range(2):
            token = kernel.queue(write_16(0, BLOCK), b"w" * BLOCK)
            kernel.kick()
            await host.until(lambda: host.node.waiting)
            (command,) = host.frontend._ring.outstanding.values()
            if token == 1:
                aborted = command
                kernel.abort([token])
                kernel.kick()
                await host.results(token)
                host.node.end()
                await host.until(lambda: not kernel.kept)
        assert command.cmd_id == aborted.cmd_id
        await host.turns()
        assert token not in kernel.results
        assert host.frontend.counters.aborted == 1


@on_loop
async def test_task_management_is_asked_for():
    async with Host() as host:
        assert "notify_task_management" in host.kernel.actions


@on_loop
async def test_unknown_entry_is_answered_as_such():
    async with Host() as host:
        host.kernel.unknown()
        host.kernel.kick()
        await host.until(lambda: host.kernel.unknown_answers)
        assert host.kernel.unknown_answers == [True]


@on_loop
async def test_broken_ring_is_reset_when_the_chain_has_let_go():
    def spoil(entry):
        struct.pack_into("=I", entry, 0, 1)

    async with Host(Slow(SIZE), deadline_s=FOREVER_S) as host:
        kernel = host.kernel
        sound = kernel.queue(write_16(0, BLOCK), b"w" * BLOCK)
        broken = kernel.queue(write_16(0, BLOCK), b"x" * BLOCK, spoil=spoil)
        kernel.kick()
        await host.until(lambda: host.frontend.counters.resets)
        await host.until(lambda: kernel.blocked)
        await host.turns()
        assert kernel.actions.count("reset_ring") == 1
        host.node.end()
        results = await host.results(sound, broken)
        assert [result.status for result in results] == [GOOD, BUSY]
        await host.until(lambda: kernel.actions[-1] == "unblock" and kernel.actions.count("reset_ring") == 2)
        assert (await host.run(TEST_UNIT_READY)).status == GOOD


@on_loop
async def test_ring_that_cannot_be_reset_ends_the_frontend():
    def refuse():
        raise Error(Kind.INVALID_STATE, "not enabled")

    host = Host()
    await host.frontend.start()
    host.kernel.reset_ring = refuse
    host.kernel.queue(TEST_UNIT_READY, spoil=lambda entry: struct.pack_into("=I", entry, 0, 1))
    host.kernel.kick()
    assert (await host.closed).kind is Kind.INVALID_STATE
    assert await host.frontend.stop() == 0


@on_loop
async def test_removal_while_a_broken_ring_waits_for_the_chain_leaves_configfs_alone():
    host = Host(Slow(SIZE))
    await host.frontend.start()
    host.kernel.queue(read_16(0, BLOCK), in_length=BLOCK)
    host.kernel.queue(TEST_UNIT_READY, spoil=lambda entry: struct.pack_into("=I", entry, 0, 1))
    host.kernel.kick()
    await host.until(lambda: host.kernel.actions.count("block") == 2)
    before = list(host.kernel.actions)
    host.kernel.remove()
    host.node.end()
    assert await host.closed is None
    await host.turns()
    assert host.kernel.actions == before
    await host.frontend.stop()
    assert host.defects == []


@on_loop
async def test_stop_of_a_backstore_that_has_gone_closes_all_the_same():
    def gone():
        raise Error(Kind.NOT_FOUND, "gone")

    host = Host()
    await host.frontend.start()
    host.kernel.block = gone
    with pytest.raises(Error, match="gone"):
        await host.frontend.stop()
    assert await host.frontend.stop() == 0


@on_loop
async def test_removal_closes_without_touching_configfs():
    host = Host()
    await host.frontend.start()
    done = list(host.kernel.actions)
    host.kernel.remove()
    assert await host.closed is None
    assert host.kernel.actions == done
    assert await host.frontend.stop() == 0
    assert host.kernel.actions == done


@on_loop
async def test_command_that_ends_after_the_removal_is_forgotten():
    host = Host(Slow(SIZE))
    await host.frontend.start()
    host.kernel.queue(read_16(0, BLOCK), in_length=BLOCK)
    host.kernel.kick()
    await host.until(lambda: host.node.waiting)
    host.kernel.remove()
    await host.closed
    host.node.end()
    assert host.frontend.in_flight == 0
    await host.frontend.stop()


@on_loop
async def test_removal_that_shows_when_the_kernel_is_woken():
    def gone():
        raise Error(Kind.NOT_FOUND, "gone")

    host = Host()
    await host.frontend.start()
    host.frontend.device.wake = gone
    host.kernel.queue(TEST_UNIT_READY)
    host.kernel.kick()
    assert await host.closed is None
    await host.frontend.stop()
    assert host.defects == []


@on_loop
async def test_removal_ends_the_wait_of_stop():
    host = Host(Slow(SIZE))
    await host.frontend.start()
    host.kernel.queue(write_16(0, BLOCK), b"w" * BLOCK)
    host.kernel.kick()
    await host.until(lambda: host.node.waiting)
    stopping = asyncio.ensure_future(host.frontend.stop(limit_s=FOREVER_S))
    await host.until(lambda: host.kernel.blocked)
    await host.turns()
    host.kernel.remove()
    assert await stopping == 0
    assert host.defects == []


@on_loop
async def test_stop_waits_for_what_is_under_way_and_leaves_the_device_blocked():
    host = Host(Slow(SIZE))
    await host.frontend.start()
    token = host.kernel.queue(write_16(0, BLOCK), b"w" * BLOCK)
    host.kernel.kick()
    await host.until(lambda: host.node.waiting)
    stopping = asyncio.ensure_future(host.frontend.stop())
    await host.until(lambda: host.kernel.blocked)
    assert not stopping.done()
    host.node.end()
    assert await stopping == 0
    host.kernel.pump()
    assert host.kernel.results[token].status == GOOD
    assert host.kernel.blocked
    assert await host.frontend.stop() == 0


@on_loop
async def test_stop_with_a_chain_that_does_not_end_answers_busy():
    host = Host(Slow(SIZE))
    await host.frontend.start()
    token = host.kernel.queue(write_16(0, BLOCK), b"w" * BLOCK)
    host.kernel.kick()
    await host.until(lambda: host.node.waiting)
    assert await host.frontend.stop(limit_s=0.01) == 1
    host.kernel.pump()
    assert host.kernel.results[token].status == BUSY
    host.node.end()


@on_loop
async def test_next_handler_takes_over_after_stop():
    kernel = FakeKernel()
    first = Host(kernel=kernel)
    await first.frontend.start()
    await first.run(write_16(0, BLOCK), b"w" * BLOCK)
    await first.frontend.stop()
    async with Host(node=first.node, kernel=kernel) as second:
        assert (await second.run(read_16(0, BLOCK), in_length=BLOCK)).data == b"w" * BLOCK


@on_loop
async def test_failed_write_of_the_chain_is_a_check_condition():
    async with Host(Slow(SIZE)) as host:
        token = host.kernel.queue(write_16(0, BLOCK), b"w" * BLOCK)
        host.kernel.kick()
        await host.until(lambda: host.node.waiting)
        host.node.end(error=Error(Kind.IO, "broken"))
        (result,) = await host.results(token)
        assert (result.status, result.sense[2] & 0xF) == (CHECK_CONDITION, 3)


@on_loop
async def test_resize_is_told_once():
    async with Host() as host:
        host.frontend.resize(SIZE * 2)
        first, second = await host.run(TEST_UNIT_READY), await host.run(TEST_UNIT_READY)
        assert (first.status, first.sense[2] & 0xF, first.sense[12]) == (CHECK_CONDITION, 6, 0x2A)
        assert second.status == GOOD
