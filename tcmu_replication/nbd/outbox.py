"""Replies on their way out, laid out where they arise, so that a batch leaves in one call.

    data  [ queued earlier | run of finished replies | laid ... ]

A reply reserves its bytes behind the last one; the data of a read is read
straight into them. Finished replies side by side are one run and one buffer of
the send. A reply that must wait is detached from the run and queued when it is
ready, in whatever order that is.
"""

from __future__ import annotations

import itertools
from collections import deque

from tcmu_replication.nbd.stream import CAPACITY, KEEP, Memory, capacity_for
from tcmu_replication.nbd.tls_socket import Socket

MAX_BUFFERS = 1024
"""Buffers in one sendmsg (UIO_MAXIOV of Linux)."""

Queue = deque[bytes | memoryview]


class Outbox:
    """`size` is how many bytes are reserved or queued and not yet sent."""

    def __init__(self) -> None:
        self.memory = Memory(CAPACITY)
        self.size = 0
        self._capacity = CAPACITY
        self._laid = 0
        self._run = 0
        self._queue: Queue = deque()

    def reserve(self, length: int) -> int:
        """Room for a reply of `length` bytes: its place in `memory.data`, which this call may replace."""
        at = self._laid
        if at + length > self._capacity:
            self._close_run()
            self._capacity = capacity_for(length)
            self.memory = Memory(self._capacity)
            self._run = at = 0
        self._laid = at + length
        self.size += length
        return at

    def cancel(self, at: int) -> None:
        """Take back the last reservation, which begins at `at`."""
        self.size -= self._laid - at
        self._laid = at

    def detach(self, at: int) -> memoryview:
        """Keep the last reservation out of the run; `queue` or `drop` it, and `memory.held -= 1`, later."""
        segment = self.memory.view[at : self._laid]
        end, self._laid = self._laid, at
        self._close_run()
        self._run = self._laid = end
        self.memory.held += 1
        return segment

    def queue(self, segment: memoryview) -> None:
        """A detached reply is ready."""
        self._close_run()
        self._queue.append(segment)

    def drop(self, segment: memoryview) -> None:
        """A detached reply will not be sent."""
        self.size -= len(segment)

    def _close_run(self) -> None:
        if self._laid > self._run:
            self._queue.append(self.memory.view[self._run : self._laid])
            self._run = self._laid

    def send(self, sock: Socket) -> bool:
        """Send what is ready; True if all of it is gone. Raises OSError if the connection is."""
        self._close_run()
        queue = self._queue
        while queue:
            try:
                sent = (
                    sock.send(queue[0])
                    if len(queue) == 1
                    else sock.sendmsg(itertools.islice(queue, MAX_BUFFERS))
                )
            except (BlockingIOError, InterruptedError):
                return False
            self.size -= sent
            drop_first(queue, sent)
        if not self.memory.held:
            self._run = self._laid = 0
            if self._capacity > KEEP:
                self.memory = Memory(CAPACITY)
                self._capacity = CAPACITY
        return True


def drop_first(queue: Queue | deque[memoryview], count: int) -> None:
    """Remove the first `count` bytes of a queue of buffers."""
    while count:
        first = queue[0]
        if count < len(first):
            queue[0] = first[count:]  # type: ignore[assignment]
            return
        count -= len(first)
        queue.popleft()
