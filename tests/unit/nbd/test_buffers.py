"""What is received and what is to be sent: the stream and the outbox."""

from __future__ import annotations

import socket
from collections import deque

from tcmu_replication.nbd import stream
from tcmu_replication.nbd.outbox import Outbox, Queue, drop_first
from tcmu_replication.nbd.stream import CAPACITY, KEEP, Stream


def receive(into: Stream, data: bytes, message: int = 1) -> None:
    room = into.room(message)
    room[: len(data)] = data
    into.end += len(data)


def test_stream_starts_with_what_came_early() -> None:
    early = Stream(b"early")
    receive(early, b" late")
    assert early.memory.data[: early.end] == b"early late"


def test_stream_that_was_consumed_starts_again_at_the_front() -> None:
    one = Stream(b"abc")
    one.start = 3
    memory = one.memory
    assert len(one.room()) == CAPACITY
    assert one.memory is memory


def test_stream_moves_an_incomplete_message_to_the_front() -> None:
    one = Stream()
    one.start, one.end = CAPACITY - 3, CAPACITY
    one.memory.data[-3:] = b"abc"
    assert len(one.room(28)) == CAPACITY - 3
    assert (one.start, one.memory.data[:3]) == (0, b"abc")


def test_stream_that_is_held_goes_on_behind() -> None:
    one = Stream(b"abc")
    one.start = 3
    one.memory.held = 1
    memory = one.memory
    receive(one, b"def")
    assert one.memory is memory
    assert memory.data[:6] == b"abcdef"


def test_stream_that_is_held_and_full_takes_fresh_memory() -> None:
    one = Stream()
    one.start, one.end = CAPACITY - 3, CAPACITY
    one.memory.data[-3:] = b"abc"
    one.memory.held = 1
    old = one.memory
    one.room(28)
    assert one.memory is not old
    assert one.memory.held == 0
    assert one.memory.data[:3] == b"abc"
    assert old.data[-3:] == b"abc"


def test_stream_grows_for_a_long_message_and_gives_back() -> None:
    one = Stream(b"head")
    long = KEEP + 28
    assert len(one.room(long)) >= long - 4
    assert one.memory.data[:4] == b"head"
    one.start = one.end
    one.room(28)
    assert len(one.memory.data) == CAPACITY


def test_stream_grows_where_few_messages_of_a_length_fit() -> None:
    one = Stream()
    long = CAPACITY // 2
    receive(one, b"a" * CAPACITY, long)
    one.start = long + 10
    assert len(one.room(long)) > 2 * CAPACITY
    assert one.memory.data[: one.end] == b"a" * (long - 10)
    memory = one.memory
    one.start = one.end = len(memory.data) - 10
    one.room(long)
    assert one.memory is memory  # large enough for good


def test_stream_that_is_full_of_short_messages_does_not_grow() -> None:
    one = Stream()
    receive(one, b"a" * CAPACITY, 28)
    one.start = CAPACITY // 2
    one.room(28)
    assert len(one.memory.data) == CAPACITY


def test_capacity_holds_several_messages() -> None:
    assert stream.capacity_for(28) == CAPACITY
    assert stream.capacity_for(1 << 18) == 4 << 20
    assert stream.capacity_for(1 << 20) == 9 << 20
    assert stream.capacity_for(32 << 20) == 40 << 20


def put(box: Outbox, data: bytes) -> None:
    at = box.reserve(len(data))
    box.memory.data[at : at + len(data)] = data


def sent_by(box: Outbox) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert box.send(ours)
        theirs.setblocking(False)
        try:
            return theirs.recv(1 << 20)
        except BlockingIOError:
            return b""


def test_outbox_sends_a_run_and_starts_again() -> None:
    box = Outbox()
    put(box, b"one ")
    put(box, b"two")
    assert box.size == 7
    assert sent_by(box) == b"one two"
    assert box.size == 0
    assert box.reserve(4) == 0


def test_outbox_forgets_what_was_cancelled() -> None:
    box = Outbox()
    put(box, b"one ")
    box.cancel(box.reserve(100))
    put(box, b"two")
    assert box.size == 7
    assert sent_by(box) == b"one two"


def test_outbox_sends_detached_replies_when_they_are_ready() -> None:
    box = Outbox()
    put(box, b"one ")
    at = box.reserve(5)
    box.memory.data[at : at + 5] = b"late "
    memory = box.memory
    late = box.detach(at)
    put(box, b"two ")
    assert sent_by(box) == b"one two "
    assert box.size == 5
    put(box, b"three ")
    box.queue(late)
    memory.held -= 1
    put(box, b"four")
    assert sent_by(box) == b"three late four"
    assert box.size == 0


def test_outbox_memory_is_not_used_again_while_a_reply_is_detached() -> None:
    box = Outbox()
    box.detach(box.reserve(5))
    assert sent_by(box) == b""
    assert box.reserve(1) == 5


def test_outbox_drops_a_detached_reply() -> None:
    box = Outbox()
    late = box.detach(box.reserve(5))
    box.drop(late)
    assert box.size == 0


def test_outbox_takes_fresh_memory_when_full() -> None:
    box = Outbox()
    put(box, b"a" * 100)
    put(box, b"b" * CAPACITY)
    put(box, b"c")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        got = bytearray()
        while not box.send(ours):
            got += theirs.recv(1 << 20)
        ours.close()
        while piece := theirs.recv(1 << 20):
            got += piece
    assert got == b"a" * 100 + b"b" * CAPACITY + b"c"


def test_drop_first_cuts_within_a_buffer() -> None:
    queue: Queue = deque([b"abc", memoryview(b"defg"), b"h"])
    drop_first(queue, 5)
    assert [bytes(piece) for piece in queue] == [b"fg", b"h"]
    drop_first(queue, 3)
    assert not queue
