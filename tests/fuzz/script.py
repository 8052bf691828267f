"""How a target reads its input: some bytes decide what happens, the rest is what a peer says."""

from __future__ import annotations

from collections.abc import Iterator

from tcmu_replication.errors import Error, Kind

LONGEST_DETAIL = 20_000
"""Characters of an error's sentence. It may quote what came in, not repeat all of it many times."""


class Script:
    """Takes bytes from the front of `data`; behind its end there are zeroes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, width: int = 1) -> int:
        """The next `width` bytes as a big-endian number."""
        return int.from_bytes(self.take(width).ljust(width, b"\0"))

    def take(self, length: int) -> bytes:
        """The next bytes, fewer at the end."""
        self._at += length
        return self._data[self._at - length : self._at]

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    @property
    def left(self) -> bool:
        """Whether there is any more."""
        return self._at < len(self._data)


def pieces(data: bytes, length: int) -> Iterator[bytes]:
    """`data` as it may arrive: in pieces of `length` bytes, in one piece if that is 0."""
    step = length or max(len(data), 1)
    return (data[at : at + step] for at in range(0, len(data), step))


def told(error: Error, *kinds: Kind) -> None:
    """An error of outside bytes has an expected kind and one printable sentence of bounded length."""
    assert error.kind in kinds, f"{error.kind}: {error}"
    text = str(error)
    assert 0 < len(text) <= LONGEST_DETAIL, f"a sentence of {len(text)} characters"
    assert text.isprintable(), f"a sentence that no log line can hold: {text!r}"
