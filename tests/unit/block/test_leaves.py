"""What every leaf does alike: the same tests over memory and files."""

from __future__ import annotations

import pytest

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error
from tests.unit.block.conftest import MakeLeaf

LENGTH = 3 * 4096 + 1000


def filled(make_leaf: MakeLeaf, length: int = LENGTH) -> Node:
    leaf = make_leaf(length)
    assert leaf.write(0, [memoryview(b"\xaa" * length)]) is None
    return leaf


def content(leaf: Node) -> bytes:
    return bytes(leaf.fetch(0, leaf.length))


def test_leaf_is_as_long_as_made_and_empty(make_leaf: MakeLeaf) -> None:
    leaf = make_leaf(LENGTH)
    assert leaf.length == LENGTH
    assert content(leaf) == bytes(LENGTH)


@pytest.mark.parametrize(
    ("offset", "sizes"), [(0, [1]), (4095, [2]), (1, [0, 3, 0, 5000]), (LENGTH - 1, [1])]
)
def test_leaf_reads_what_was_written_scattered(make_leaf: MakeLeaf, offset: int, sizes: list[int]) -> None:
    leaf = make_leaf(LENGTH)
    pieces = [memoryview(bytes([n + 1]) * size) for n, size in enumerate(sizes)]
    leaf.write(offset, pieces)
    into = [memoryview(bytearray(size)) for size in sizes]
    leaf.read(offset, into)
    assert [bytes(view) for view in into] == [bytes(view) for view in pieces]
    whole = b"".join(pieces)
    assert content(leaf) == bytes(offset) + whole + bytes(LENGTH - offset - len(whole))


def test_leaf_more_buffers_than_the_kernel_takes(make_leaf: MakeLeaf) -> None:
    leaf = make_leaf(LENGTH)
    data = bytes(n * 7 & 0xFF for n in range(3000))
    leaf.write(5, [memoryview(data)[n : n + 1] for n in range(3000)])
    into = bytearray(3000)
    leaf.read(5, [memoryview(into)[n : n + 1] for n in range(3000)])
    assert into == data


@pytest.mark.parametrize("unmap", [True, False])
@pytest.mark.parametrize(("offset", "length"), [(0, 4096), (100, 50), (4095, 4098), (0, LENGTH)])
def test_leaf_zero_clears_the_range_alone(make_leaf: MakeLeaf, unmap: bool, offset: int, length: int) -> None:
    leaf = filled(make_leaf)
    leaf.zero(offset, length, False, unmap)
    expected = bytearray(b"\xaa" * LENGTH)
    expected[offset : offset + length] = bytes(length)
    assert content(leaf) == expected


def test_leaf_zero_longer_than_the_shared_zeroes(make_leaf: MakeLeaf) -> None:
    leaf = filled(make_leaf, (2 << 20) + 5000)
    leaf.zero(1, leaf.length - 2, unmap=False)
    assert content(leaf) == b"\xaa" + bytes(leaf.length - 2) + b"\xaa"


def test_leaf_discard_touches_nothing_else(make_leaf: MakeLeaf) -> None:
    leaf = filled(make_leaf)
    leaf.discard(4096, 4096)
    assert content(leaf)[4096:8192] in (bytes(4096), b"\xaa" * 4096)
    assert content(leaf)[:4096] + content(leaf)[8192:] == b"\xaa" * (LENGTH - 4096)


def test_leaf_extents_cover_the_range_and_never_call_data_zero(make_leaf: MakeLeaf) -> None:
    leaf = make_leaf(1 << 20)
    leaf.write(256 * 1024, [memoryview(b"x" * 4096)])
    at = 100
    for extent in leaf.extents(100, leaf.length - 200):
        if extent.zero:
            assert bytes(leaf.fetch(at, extent.length)) == bytes(extent.length)
        at += extent.length
    assert at == leaf.length - 100


def test_leaf_flush_fua_and_closing_twice(make_leaf: MakeLeaf) -> None:
    leaf = make_leaf(LENGTH)
    assert leaf.write(0, [memoryview(b"x")], True) is None
    assert leaf.zero(0, 1, True) is None
    assert leaf.flush() is None
    leaf.unplug()
    leaf.close()
    leaf.close()


def test_node_that_cannot_read_at_once_says_so_and_hands_out_no_empty_buffer() -> None:
    """N: it was an assert, which python -O leaves out."""

    class Late(Memory):
        fetch = Node.fetch

        def read(self, offset: int, buffers: Buffers) -> Pending:
            return Pending()

    with pytest.raises(Error, match="late cannot read at once"):
        Late(LENGTH, name="late").fetch(0, 512)
