"""One request of an NBD client: what is asked, what has come of the answer, and whether that makes sense."""

from __future__ import annotations

from collections.abc import Sequence

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.protocol import Command


class Call:
    """A request of one connection, to be sent again on another if that one is lost.

    `buffers` are what a WRITE sends, or what a READ fills. `place` says where
    a part of the read data goes, `ended` is called once with the outcome, and
    a BLOCK_STATUS finds its (length, state) pairs in `extents`.
    """

    __slots__ = (
        "_left",
        "_parts",
        "batch",
        "buffers",
        "command",
        "error",
        "extents",
        "flags",
        "length",
        "offset",
    )

    def __init__(
        self, command: Command, offset: int, length: int, buffers: Sequence[memoryview] = (), flags: int = 0
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.buffers = buffers
        self.flags = flags
        self.reset()

    def reset(self) -> None:
        """Forget a reply that was cut off."""
        self.batch: Batch | None = None
        self.extents: list[tuple[int, int]] = []
        self.error: Error | None = None
        self._parts: list[tuple[int, int]] | None = None
        self._left = self.length

    def place(self, start: int, length: int) -> list[memoryview]:
        """The parts of `buffers` for `length` bytes, `start` bytes into the call."""
        raise NotImplementedError

    def ended(self, error: Error | None) -> None:
        """The reply is complete."""
        raise NotImplementedError

    # What a session tells a call

    def failed(self, error: Error) -> None:
        """The server says that the call failed; its first reason counts."""
        self.error = self.error or error

    def take(self, offset: int, length: int) -> list[memoryview]:
        """Where a data chunk goes. Raises Error PEER_LIED if it lies outside the call, or is more than was asked."""
        start = offset - self.offset
        if self.command != Command.READ or start < 0 or length <= 0 or start + length > self.length:
            raise Error(Kind.PEER_LIED, "data for what was not asked", offset=offset, length=length)
        self._left -= length
        if self._left < 0:  # a server that never ends would fill the memory, or keep us busy with zeroes
            raise Error(Kind.PEER_LIED, "data that came twice", offset=offset, length=length)
        self._parts = self._parts or []
        self._parts.append((start, start + length))
        return self.place(start, length)

    def check(self) -> None:
        """The last chunk is in. Raises Error PEER_LIED if parts are missing or came twice."""
        if self.error is not None:
            return
        if self.command == Command.READ:
            end = 0
            for start, stop in sorted(self._parts or ()):
                if start != end:
                    raise Error(Kind.PEER_LIED, "a reply with a gap", offset=self.offset, length=self.length)
                end = stop
            if end != self.length:
                raise Error(Kind.PEER_LIED, "a reply too short", offset=self.offset, length=self.length)
        if self.command == Command.BLOCK_STATUS and not self.extents:
            raise Error(Kind.PEER_LIED, "a block status without any", offset=self.offset, length=self.length)


class Batch:
    """Calls that were sent together: the stream's position behind them and when that was reached."""

    __slots__ = ("end", "sent_at")

    def __init__(self, end: int) -> None:
        self.end = end
        self.sent_at: float | None = None
