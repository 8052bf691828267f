"""The ring under any order of events, and under any bytes."""

from __future__ import annotations

import contextlib
import random
import struct

from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.errors import Error
from tcmu_replication.tcmu import layout
from tcmu_replication.tcmu.ring import Ring
from tests.support.fake_kernel import ALL, BLOCK, FakeKernel

CDBS = (bytes(6), bytes((0x28, *bytes(9))), bytes((0xA8, *bytes(11))), bytes((0x88, *bytes(15))))
LONG_CDB = bytes((0x7F, *bytes(6), 24, *bytes(24)))


class Initiator:
    """Queues commands whose data follows from their token, and knows what each must get."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.expected = {}
        self.data_out = {}

    def queue(self, cdb, out, length):
        token = self.kernel._tokens + 1
        data = random.Random(token).randbytes(length)
        token = self.kernel.queue(cdb, data) if out else self.kernel.queue(cdb, in_length=length)
        self.expected[token] = b"" if out else data
        if out:
            self.data_out[token] = data


def token_of(kernel, command):
    return kernel._commands[command.cmd_id].token


def answer(kernel, ring, initiator, command):
    """What a handler does: take or fill the data, complete."""
    token = token_of(kernel, command)
    if token in initiator.data_out:
        assert b"".join(command.buffers) == initiator.data_out[token]
    else:
        data, at = initiator.expected[token], 0
        for view in command.buffers:
            view[:] = data[at : at + len(view)]
            at += len(view)
    ring.complete(command.cmd_id, 0)


QUEUE = st.tuples(
    st.just("queue"),
    st.sampled_from((*CDBS, LONG_CDB)),
    st.booleans(),
    st.one_of(st.sampled_from((0, 1, 512, BLOCK, BLOCK + 1)), st.integers(0, 6 * BLOCK)),
)
STEP = st.one_of(
    QUEUE,
    QUEUE,
    st.tuples(st.just("fetch")),
    st.tuples(st.just("answer"), st.integers(0, 1 << 16)),
    st.tuples(st.just("answer"), st.integers(0, 1 << 16)),
    st.tuples(st.just("publish")),
    st.tuples(st.just("abort"), st.integers(0, 3)),
    st.tuples(st.just("unknown")),
)


@given(
    steps=st.lists(STEP, max_size=80),
    ring_size=st.integers(80, 300).map(lambda words: words * 8),
    blocks=st.integers(6, 24),
    seed=st.integers(0, 99),
)
def test_every_command_ends_once_with_its_data_in_any_order(steps, ring_size, blocks, seed):
    kernel = FakeKernel(ring_size, blocks * BLOCK, scatter=random.Random(seed))
    ring = Ring(kernel.memory)
    initiator = Initiator(kernel)
    taken = []
    for name, *args in steps:
        if name == "queue":
            initiator.queue(*args)
        elif name == "fetch":
            taken += ring.fetch()
        elif name == "answer" and taken:
            answer(kernel, ring, initiator, taken.pop(args[0] % len(taken)))
        elif name == "publish" and ring.publish():
            kernel.reap()
        elif name == "abort" and kernel._room(256):
            kernel.abort(list(initiator.expected)[-args[0] :])
        elif name == "unknown" and kernel._room(256):
            kernel.unknown()
    while True:
        taken += ring.fetch()
        while taken:
            answer(kernel, ring, initiator, taken.pop())
        if not ring.publish():
            break
        kernel.reap()
    assert {token: result.data for token, result in kernel.results.items()} == initiator.expected
    assert all(kernel.unknown_answers)
    assert (ring.outstanding, kernel.in_ring, kernel.waiting, kernel.free_blocks) == ({}, 0, 0, blocks)
    ring.release()
    kernel.close()


@given(
    changes=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=8),
    wide=st.lists(st.tuples(st.sampled_from((8, 12, 24, 48, 56)), st.integers(0, (1 << 64) - 1)), max_size=3),
    cdb=st.sampled_from((*CDBS, LONG_CDB)),
)
def test_entry_with_any_bytes_is_a_command_a_fault_or_a_broken_ring(changes, wide, cdb):
    def spoil(entry):
        for at, value in changes:
            entry[at] = value
        for at, value in wide:
            struct.pack_into("=Q", entry, at, value)

    kernel = FakeKernel(2048, 4 * BLOCK)
    ring = Ring(kernel.memory)
    kernel.queue(cdb, in_length=BLOCK, spoil=spoil)
    kernel.queue(cdb, in_length=BLOCK)
    with contextlib.suppress(Error):
        while ring.fetch():
            pass
    for command in list(ring.outstanding.values()):
        assert command.length == sum(map(len, command.buffers))
        ring.complete(command.cmd_id, 2, b"\x70")
    ring.publish()
    ring.release()
    kernel.close()


@given(content=st.binary(max_size=600), head=st.integers(0, 75).map(lambda n: n * 8), tail=st.integers(0, 75))
def test_ring_of_any_bytes_ends_in_commands_or_an_error(content, head, tail):
    size = 608
    memory = bytearray(layout.MAILBOX_SIZE + size)  # no data area: whatever looks past the ring raises
    layout.MAILBOX.pack_into(
        memory, 0, layout.MAILBOX_VERSION, ALL, layout.MAILBOX_SIZE, size, head, tail * 8
    )
    memory[layout.MAILBOX_SIZE : layout.MAILBOX_SIZE + len(content)] = content
    ring = Ring(memoryview(memory))
    with contextlib.suppress(Error):
        while ring.fetch():
            pass
