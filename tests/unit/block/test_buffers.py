"""Runs of buffers: sizes, parts and zeroes at every boundary."""

from __future__ import annotations

import pytest

from tcmu_replication.block.buffers import clear, part, size, zeroes

PIECES = [b"ab", b"", b"cde", b"f"]
WHOLE = b"".join(PIECES)


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("length", range(8))
def test_buffers_part_is_the_slice_of_the_whole(start: int, length: int) -> None:
    views = part([memoryview(piece) for piece in PIECES], start, length)
    assert b"".join(views) == WHOLE[start : start + length]
    assert size(views) == len(WHOLE[start : start + length])


def test_buffers_part_is_the_same_memory() -> None:
    memory = [bytearray(3), bytearray(3)]
    part([memoryview(memory[0]), memoryview(memory[1])], 2, 2)[1][:] = b"x"
    assert memory == [b"\0\0\0", b"x\0\0"]


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 20) + 1])
def test_buffers_zeroes_and_clear(length: int) -> None:
    assert b"".join(zeroes(length)) == bytes(length)
    memory = bytearray(b"x" * length)
    clear([memoryview(memory)])
    assert memory == bytes(length)
