"""The ring against the kernel's half, command by command."""

from __future__ import annotations

import random
import struct

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.tcmu import layout
from tcmu_replication.tcmu.layout import Capability
from tcmu_replication.tcmu.ring import Ring
from tests.support.fake_kernel import ALL, BLOCK, BrokenRingError, FakeKernel, Result

INQUIRY = bytes((0x12, 0, 0, 0, 96, 0))
READ_10 = bytes((0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0))
WRITE_16 = bytes((0x8A, *range(15)))
GOOD, CHECK_CONDITION, BUSY = 0, 2, 8


@pytest.fixture
def kernel():
    kernel = FakeKernel(ring_size=4096, data_size=1 << 20)
    yield kernel
    kernel.close()


@pytest.fixture
def ring(kernel):
    ring = Ring(kernel.memory)
    yield ring
    ring.release()


def finish(kernel, ring, *commands, status=GOOD):
    for command in commands:
        ring.complete(command.cmd_id, status)
    assert ring.publish()
    kernel.reap()


def put(field, value, fields=layout.REQUEST_FIELDS):
    """A spoiler that writes `value` into a field of the entry."""
    row = next(row for row in fields if row.name == field)
    return lambda entry: struct.pack_into("=" + row.code, entry, row.offset, value)


@pytest.mark.parametrize("cdb", [INQUIRY, READ_10, WRITE_16, bytes((0x7F, *range(6), 8, *range(8)))])
def test_command_arrives_with_its_exact_cdb(kernel, ring, cdb):
    kernel.queue(cdb, in_length=BLOCK)
    (command,) = ring.fetch()
    assert (command.cdb, command.fault, command.length) == (cdb, None, BLOCK)


def test_variable_length_cdb_of_more_than_16_bytes(kernel, ring):
    cdb = bytes((0x7F, *range(6), 24, *range(24)))
    kernel.queue(cdb, in_length=BLOCK)
    assert ring.fetch()[0].cdb == cdb


def test_nothing_queued_is_nothing_fetched_nor_published(ring):
    assert ring.fetch() == []
    assert not ring.publish()


def test_command_without_data(kernel, ring):
    token = kernel.queue(bytes(6))
    (command,) = ring.fetch()
    assert (command.buffers, command.length) == ([], 0)
    finish(kernel, ring, command)
    assert kernel.results[token] == Result(GOOD, b"", b"")


def test_data_out_is_seen_in_place(kernel, ring):
    data = bytes(range(256)) * 16
    kernel.queue(WRITE_16, data_out=data)
    (command,) = ring.fetch()
    assert [bytes(view) for view in command.buffers] == [data]


def test_data_in_is_written_in_place(kernel, ring):
    token = kernel.queue(READ_10, in_length=BLOCK)
    (command,) = ring.fetch()
    command.buffers[0][:] = b"x" * BLOCK
    finish(kernel, ring, command)
    assert kernel.results[token].data == b"x" * BLOCK


@pytest.mark.parametrize("length", [1, 512, BLOCK, BLOCK + 1, 64 * BLOCK])
def test_data_of_any_length(kernel, ring, length):
    kernel.queue(READ_10, in_length=length)
    (command,) = ring.fetch()
    assert sum(map(len, command.buffers)) == command.length == length


def test_a_mebibyte_in_iovecs_that_are_not_adjacent():
    kernel = FakeKernel(ring_size=64 * 1024, data_size=4 << 20, scatter=random.Random(3))
    ring = Ring(kernel.memory)
    data = random.Random(4).randbytes(1 << 20)
    first = kernel.queue(READ_10, in_length=BLOCK)
    finish(kernel, ring, *ring.fetch())  # recycled: the blocks are now in random order
    token = kernel.queue(WRITE_16, data_out=data)
    (command,) = ring.fetch()
    assert len(command.buffers) > 100
    assert b"".join(command.buffers) == data
    finish(kernel, ring, command)
    assert kernel.results.keys() == {first, token}
    ring.release()


def test_answers_out_of_order_reach_their_commands(kernel, ring):
    tokens = [kernel.queue(READ_10, in_length=BLOCK) for _ in range(5)]
    commands = ring.fetch()
    for n, command in enumerate(commands):
        command.buffers[0][:] = bytes((n,)) * BLOCK
    for n in (3, 1, 4, 0, 2):
        finish(kernel, ring, commands[n])
    assert [kernel.results[token].data[0] for token in tokens] == list(range(5))
    assert ring.outstanding == {}


def test_answer_with_sense(kernel, ring):
    token = kernel.queue(READ_10, in_length=BLOCK)
    (command,) = ring.fetch()
    ring.complete(command.cmd_id, CHECK_CONDITION, b"\x70sense")
    ring.publish()
    kernel.reap()
    assert kernel.results[token] == Result(CHECK_CONDITION, b"\x70sense".ljust(96, b"\0"), b"")


def test_short_data_in(kernel, ring):
    token = kernel.queue(INQUIRY, in_length=96)
    (command,) = ring.fetch()
    command.buffers[0][:36] = b"i" * 36
    ring.complete(command.cmd_id, GOOD, read_len=36)
    ring.publish()
    kernel.reap()
    assert kernel.results[token].data == b"i" * 36


def test_second_answer_is_refused_before_the_kernel_sees_it(kernel, ring):
    kernel.queue(READ_10, in_length=BLOCK)
    (command,) = ring.fetch()
    finish(kernel, ring, command)
    with pytest.raises(KeyError):
        ring.complete(command.cmd_id, GOOD)
    assert not ring.publish()


def test_the_kernel_sees_nothing_before_publish(kernel, ring):
    token = kernel.queue(READ_10, in_length=BLOCK)
    (command,) = ring.fetch()
    ring.complete(command.cmd_id, GOOD)
    kernel.reap()
    assert token not in kernel.results


def test_full_ring_lets_commands_in_as_others_end(kernel, ring):
    tokens = [kernel.queue(READ_10, in_length=512) for _ in range(100)]
    assert kernel.waiting == 100 - 31  # 4096 / 128, and one byte is never used
    while commands := ring.fetch():
        finish(kernel, ring, *commands[::-1])
    assert kernel.results.keys() == set(tokens)


def test_full_data_area_lets_commands_in_as_others_end(kernel, ring):
    tokens = [kernel.queue(WRITE_16, data_out=bytes((n,)) * (512 << 10)) for n in range(5)]
    assert (kernel.in_ring, kernel.waiting) == (2, 3)
    seen = []
    while commands := ring.fetch():
        seen += [command.buffers[0][0] for command in commands]
        finish(kernel, ring, *commands)
    assert seen == list(range(5))
    assert kernel.results.keys() == set(tokens)


def test_padding_at_the_end_of_the_ring_is_stepped_over():
    kernel = FakeKernel(ring_size=1000, data_size=1 << 20)
    ring = Ring(kernel.memory)
    for n in range(100):
        token = kernel.queue(READ_10 if n % 3 else INQUIRY, in_length=BLOCK)
        (command,) = ring.fetch()
        finish(kernel, ring, command)
        assert token in kernel.results
    ring.release()


def test_short_entry_at_the_very_end_is_read_without_looking_past_the_ring():
    """A 6-byte CDB makes an entry of 120 bytes; what follows the ring may be a page that does not exist."""
    kernel = FakeKernel(ring_size=240, data_size=0)
    ring = Ring(kernel.memory)
    tokens = []
    for _ in range(3):
        tokens.append(kernel.queue(bytes(6)))
        finish(kernel, ring, *ring.fetch())
    assert kernel.results.keys() == set(tokens)
    ring.release()


def test_task_management_names_the_commands_and_its_slot_is_given_back(kernel, ring):
    tokens = [kernel.queue(READ_10, in_length=BLOCK) for _ in range(3)]
    commands = ring.fetch()
    kernel.abort(tokens[1:])
    assert ring.fetch() == []
    (abort,) = ring.aborts
    assert abort.cmd_ids == (commands[1].cmd_id, commands[2].cmd_id)
    assert abort.kind == layout.TaskManagement.ABORT_TASK
    finish(kernel, ring, *commands)
    assert kernel.results.keys() == set(tokens)


def test_slots_without_a_command_are_given_back_by_publish_alone(kernel, ring):
    kernel.unknown()
    kernel.abort([])
    assert ring.fetch() == []
    assert ring.publish()
    kernel.reap()
    assert kernel.unknown_answers == [True]


def test_task_management_that_promises_more_ids_than_it_holds(kernel, ring):
    kernel.queue(READ_10, in_length=BLOCK)
    (command,) = ring.fetch()
    kernel.abort([1])
    at = layout.MAILBOX_SIZE + 128
    struct.pack_into("=I", kernel.memory, at + 12, 1 << 30)
    assert ring.fetch() == []
    assert ring.aborts[0].cmd_ids[0] == command.cmd_id
    assert len(ring.aborts[0].cmd_ids) == 4


FAULTS = {
    "data before the data area": put("base", 4096, layout.USUAL_FIELDS),
    "data in the mailbox": put("base", 0, layout.USUAL_FIELDS),
    "data behind the area": put("base", 1 << 40, layout.USUAL_FIELDS),
    "data across the end": put("length", 2 << 20, layout.USUAL_FIELDS),
    "data that wraps": put("length", (1 << 64) - 1, layout.USUAL_FIELDS),
    "cdb before the entry": put("cdb_off", 0),
    "cdb behind the entry": put("cdb_off", 1 << 30),
    "cdb beyond the memory": put("cdb_off", 1 << 63),
    "cdb across the end of the entry": put("cdb_off", 128 + 128 - 4),
    "more iovecs than the entry holds": put("iov_cnt", 1 << 31),
    "bidirectional": put("iov_bidi_cnt", 1),
}


@pytest.mark.parametrize("spoil", FAULTS.values(), ids=FAULTS.keys())
def test_malformed_command_fails_alone(kernel, ring, spoil):
    bad = kernel.queue(READ_10, in_length=BLOCK, spoil=spoil)
    good = kernel.queue(READ_10, in_length=BLOCK)
    faulty, sound = ring.fetch()
    assert faulty.fault
    assert (faulty.buffers, faulty.length) == ([], 0)
    assert sound.fault is None
    ring.complete(faulty.cmd_id, CHECK_CONDITION, b"\x70")
    finish(kernel, ring, sound)
    assert (kernel.results[bad].status, kernel.results[good].status) == (CHECK_CONDITION, GOOD)


BROKEN = {
    "length 0": put("len_op", 0 | 1),
    "longer than the ring": put("len_op", 8192 | 1),
    "beyond the head": put("len_op", 256 | 1),
    "too short for an answer": put("len_op", 64 | 1),
    "endless padding": put("len_op", 0),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN.keys())
def test_entry_after_which_the_ring_is_lost(kernel, ring, spoil):
    kernel.queue(READ_10, in_length=BLOCK)
    kernel.queue(READ_10, in_length=BLOCK, spoil=spoil)
    (before,) = ring.fetch()
    assert before.fault is None
    for _ in range(2):
        with pytest.raises(Error, match="ring offset 128") as caught:
            ring.fetch()
        assert caught.value.kind is Kind.PEER_LIED


def test_cmd_id_that_is_in_use_is_a_broken_ring(kernel, ring):
    kernel.queue(READ_10, in_length=BLOCK)
    (first,) = ring.fetch()
    kernel.queue(READ_10, in_length=BLOCK, spoil=put("cmd_id", first.cmd_id))
    with pytest.raises(Error, match="in use"):
        ring.fetch()


@pytest.mark.parametrize("head", [4096, 12, 0xFFFFFFFF])
def test_head_outside_the_ring(kernel, ring, head):
    kernel.memory.cast("I")[layout.HEAD_WORD] = head
    with pytest.raises(Error, match="start at"):
        ring.fetch()


def test_ring_is_followed_again_after_a_reset(kernel, ring):
    lost = kernel.queue(READ_10, in_length=BLOCK, spoil=put("len_op", 1))
    with pytest.raises(Error, match="ring offset 0"):
        ring.fetch()
    kernel.reset_ring()
    again = Ring(kernel.memory)
    token = kernel.queue(READ_10, in_length=BLOCK)
    finish(kernel, again, *again.fetch())
    assert (kernel.results[lost].status, kernel.results[token].status) == (BUSY, GOOD)
    again.release()


def test_ring_of_an_earlier_handler_is_fetched_again(kernel, ring):
    first, second = kernel.queue(READ_10, in_length=BLOCK), kernel.queue(WRITE_16, data_out=b"w" * BLOCK)
    finish(kernel, ring, ring.fetch()[0])
    heir = Ring(kernel.memory)
    (command,) = heir.fetch()
    assert command.cdb == WRITE_16
    finish(kernel, heir, command)
    assert kernel.results.keys() == {first, second}
    heir.release()


def test_kept_buffers_are_not_recycled_until_freed(kernel, ring):
    free = kernel.free_blocks
    kernel.queue(WRITE_16, data_out=b"w" * BLOCK)
    (command,) = ring.fetch()
    ring.complete(command.cmd_id, BUSY, keep=True)
    ring.publish()
    kernel.reap()
    assert (kernel.kept, kernel.free_blocks) == (1, free - 1)
    kernel.free_kept(command.cmd_id)
    assert (kernel.kept, kernel.free_blocks) == (0, free)


def spoiled(**fields):
    memory = bytearray(64 * 1024)
    values = {
        "version": 2,
        "flags": int(ALL),
        "cmdr_off": 128,
        "cmdr_size": 4096,
        "cmd_head": 0,
        "cmd_tail": 0,
    }
    values |= fields
    layout.MAILBOX.pack_into(memory, 0, *values.values())
    return memoryview(memory)


@pytest.mark.parametrize(
    ("memory", "kind"),
    [
        pytest.param(spoiled(version=1), Kind.UNSUPPORTED, id="version 1"),
        pytest.param(spoiled(version=3), Kind.UNSUPPORTED, id="version 3"),
        pytest.param(spoiled(flags=0), Kind.UNSUPPORTED, id="no capability"),
        pytest.param(spoiled(flags=Capability.OUT_OF_ORDER), Kind.UNSUPPORTED, id="no READ_LEN"),
        pytest.param(spoiled(cmdr_off=0), Kind.PEER_LIED, id="ring in the mailbox"),
        pytest.param(spoiled(cmdr_off=1 << 31), Kind.PEER_LIED, id="ring outside"),
        pytest.param(spoiled(cmdr_size=0), Kind.PEER_LIED, id="no ring"),
        pytest.param(spoiled(cmdr_size=64 * 1024), Kind.PEER_LIED, id="ring too large"),
        pytest.param(spoiled(cmd_head=4096), Kind.PEER_LIED, id="head outside"),
        pytest.param(spoiled(cmd_tail=4), Kind.PEER_LIED, id="tail not aligned"),
        pytest.param(memoryview(bytearray(64)), Kind.PEER_LIED, id="no mailbox"),
    ],
)
def test_mailbox_that_cannot_be_used(memory, kind):
    with pytest.raises(Error) as caught:
        Ring(memory)
    assert caught.value.kind is kind


def test_fake_kernel_notices_a_second_answer(kernel, ring):
    kernel.queue(READ_10, in_length=BLOCK)
    kernel.queue(READ_10, in_length=BLOCK)
    first, second = ring.fetch()
    ring.complete(first.cmd_id, GOOD)
    ring.outstanding[first.cmd_id] = ring.outstanding.pop(second.cmd_id)
    ring.complete(first.cmd_id, GOOD)
    ring.publish()
    with pytest.raises(BrokenRingError):
        kernel.reap()
