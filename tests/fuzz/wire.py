"""A socket and an event loop without a kernel: what was said is there, turns are taken by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

TURNS = 20_000
"""Whoever is not at rest after so many turns never will be."""


class Handle:
    """What `call_later` returns: its time never comes."""

    def cancel(self) -> None:
        """Nothing to do."""


class Loop:
    """The calls of an event loop that connections make, for one socket."""

    def __init__(self) -> None:
        self._soon: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._reader: Callable[[], object] | None = None
        self._writer: Callable[[], object] | None = None

    def time(self) -> float:
        """It stands still."""
        return 0.0

    def get_debug(self) -> bool:
        """For futures."""
        return False

    def call_soon(self, callback: Callable[..., object], *args: Any, context: object = None) -> None:
        """See `asyncio.loop.call_soon`."""
        self._soon.append((callback, args))

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Handle:
        """See `asyncio.loop.call_later`."""
        return Handle()

    def create_future(self) -> asyncio.Future[Any]:
        """See `asyncio.loop.create_future`."""
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def add_reader(self, sock: object, callback: Callable[[], object]) -> None:
        """See `asyncio.loop.add_reader`."""
        self._reader = callback

    def add_writer(self, sock: object, callback: Callable[[], object]) -> None:
        """See `asyncio.loop.add_writer`."""
        self._writer = callback

    def remove_reader(self, sock: object) -> None:
        """See `asyncio.loop.remove_reader`."""
        self._reader = None

    def remove_writer(self, sock: object) -> None:
        """See `asyncio.loop.remove_writer`."""
        self._writer = None

    def run(self, wire: Wire, when_idle: Callable[[], bool]) -> None:
        """Take turns until nobody has anything to do and `when_idle` finds nothing more either."""
        for _ in range(TURNS):
            before = wire.moved
            busy = bool(self._soon)
            for _ in range(len(self._soon)):
                callback, args = self._soon.popleft()
                callback(*args)
            if self._writer is not None:
                self._writer()
            if self._reader is not None:
                self._reader()
            if not (busy or wire.moved != before or when_idle()):
                return
        raise AssertionError(f"not at rest after {TURNS} turns")


@contextlib.contextmanager
def running(loop: Loop) -> Iterator[Loop]:
    """Make `loop` the running one."""
    asyncio._set_running_loop(loop)  # type: ignore[arg-type]
    try:
        yield loop
    finally:
        asyncio._set_running_loop(None)


class Wire:
    """The near end of a connection whose far end says `incoming`, `step` bytes at a time, and then no more.

    It takes `window` bytes at a time, and every second time none at all; 0 means everything.
    """

    def __init__(self, incoming: bytes, *, step: int = 0, window: int = 0) -> None:
        self.incoming = memoryview(incoming)
        self.sent = bytearray()
        self.moved = 0
        self.closed = False
        self._step = step or len(incoming) or 1
        self._window = window
        self._full = False

    def recv_into(self, room: memoryview) -> int:
        """See `socket.recv_into`."""
        return int(self.recvmsg_into([room])[0])

    def recvmsg_into(self, rooms: Sequence[memoryview]) -> tuple[int, list[object], int, None]:
        """See `socket.recvmsg_into`."""
        assert not self.closed
        assert all(rooms), "no room to receive into looks like the end of the connection"
        left = self._step
        count = 0
        for room in rooms:
            piece = self.incoming[: min(len(room), left)]
            room[: len(piece)] = piece
            self.incoming = self.incoming[len(piece) :]
            count += len(piece)
            left -= len(piece)
        self.moved += 1
        return count, [], 0, None

    def send(self, data: bytes | memoryview) -> int:
        """See `socket.send`."""
        return self.sendmsg([data])

    def sendmsg(self, buffers: Iterable[bytes | memoryview]) -> int:
        """See `socket.sendmsg`."""
        assert not self.closed
        self.moved += 1
        if self._window:
            self._full = not self._full
            if self._full:
                raise BlockingIOError
        data = b"".join(buffers)
        if self._window:
            data = data[: self._window]
        self.sent += data
        return len(data)

    def close(self) -> None:
        """See `socket.close`."""
        self.closed = True
