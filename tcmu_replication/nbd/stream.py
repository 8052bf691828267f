"""A receive buffer whose contents are used in place.

    data  [ consumed | start ... end | room ]

Messages are parsed and their payloads used where they were received. A payload
that must outlive the batch (a write under way) holds the buffer; what comes
next then goes behind it or, when that is full, into a fresh buffer.
"""

from __future__ import annotations

from tcmu_replication.units import MiB

CAPACITY = 1 * MiB
"""The size of a fresh buffer, all of which is memory in use."""
KEEP = 16 * MiB
"""A larger buffer, which a very long request needed, is given back when it is empty."""


class Memory:
    """One piece of memory and how many requests under way refer to it."""

    __slots__ = ("data", "held", "view")

    def __init__(self, capacity: int) -> None:
        self.data = bytearray(capacity)
        self.view = memoryview(self.data)
        self.held = 0


def capacity_for(message: int) -> int:
    """A size that holds several messages of that length, so that moving incomplete ones stays rare."""
    return max(CAPACITY, message + min(15 * message, 8 * MiB))


class Stream:
    """What has been received: the bytes from `start` to `end` of `memory`."""

    def __init__(self, received: bytes = b"") -> None:
        self.memory = Memory(max(CAPACITY, len(received) + 1))
        self.start = 0
        self.end = len(received)
        self.memory.data[: self.end] = received

    def room(self, message: int = 1) -> memoryview:
        """Where to receive into, with room for the whole of a message of `message` bytes at `start`.

        Bytes that are in already move to the front, or into a fresh buffer if a request
        holds this one or it is too small for several messages of that length. Never empty.
        """
        memory = self.memory
        capacity = len(memory.data)
        if self.start == self.end and not memory.held:
            self.start = self.end = 0
            if capacity > KEEP and message <= CAPACITY:
                self.memory = memory = Memory(CAPACITY)
                capacity = CAPACITY
        if self.start + message > capacity or self.end == capacity:
            self._make_room(message)
        return self.memory.view[self.end :]

    def _make_room(self, message: int) -> None:
        old, count = self.memory, self.end - self.start
        needed = max(message, count + 1)
        if old.held or len(old.data) < max(needed, capacity_for(message)):
            self.memory = Memory(capacity_for(needed))
        self.memory.view[:count] = old.view[self.start : self.end]
        self.start, self.end = 0, count
