"""The overlay files of epochs: who gets them next, and what happens to them when space is short."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.reserve import reserve_of
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.commit import Commit
from tcmu_replication.replication.epochs import Epochs, Pair
from tcmu_replication.units import BLOCK, MiB

LENGTH = 64 * BLOCK
DATA = b"d" * BLOCK


@pytest.fixture
def disk() -> Memory:
    memory = Memory(LENGTH)
    memory.data[:] = b"o" * LENGTH
    return memory


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 40 blocks."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine mounts no tmpfs ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(pair: Pair, blocks: int) -> None:
    for block in range(blocks):
        pair.active.write(block * BLOCK, [memoryview(DATA)])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def of_epoch(epoch: int) -> set[str]:
    return {f"epoch-{epoch:08d}.{role}.{kind}" for role in Pair._fields for kind in ("data", "map")}


SPARES = {"spare.active.data", "spare.hidden.data"}


def occupied(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def test_retired_data_serves_the_epoch_after_next_and_shows_nothing_of_it(
    tmp_path: Path, disk: Memory
) -> None:
    epochs = Epochs(tmp_path, disk)
    first, second = epochs.create(1), epochs.create(2)
    fill(first, 10)
    inode = os.stat(f"{first.active.path}.data").st_ino
    epochs.retire(first)()
    assert files(tmp_path) == of_epoch(2) | SPARES
    third = epochs.create(3)
    assert files(tmp_path) == of_epoch(2) | of_epoch(3)
    assert os.stat(f"{third.active.path}.data").st_ino == inode
    assert occupied(Path(f"{third.active.path}.data")) == 10 * BLOCK
    assert bytes(third.active.fetch(0, LENGTH)) == b"o" * LENGTH
    third.active.write(50 * BLOCK, [memoryview(DATA)])
    assert occupied(Path(f"{third.active.path}.data")) == 10 * BLOCK
    assert bytes(third.active.fetch(49 * BLOCK, 2 * BLOCK)) == b"o" * BLOCK + DATA
    third.close()
    second.close()


def test_retired_data_keeps_only_what_its_last_epoch_used(tmp_path: Path, disk: Memory) -> None:
    epochs = Epochs(tmp_path, disk)
    pair = epochs.create(1)
    fill(pair, 10)
    epochs.retire(pair)()
    pair = epochs.create(2)
    fill(pair, 3)
    epochs.retire(pair)()
    assert occupied(tmp_path / "spare.active.data") == 3 * BLOCK


def test_retired_where_less_is_free_than_it_occupies_is_removed(small: Path, disk: Memory) -> None:
    epochs = Epochs(small, disk)
    pair = epochs.create(1)
    fill(pair, 30)
    epochs.retire(pair)()
    assert files(small) == {"spare.hidden.data"}


@pytest.mark.parametrize("later", ["spare", "in use", "reopened"])
def test_full_filesystem_gives_back_what_is_kept_before_a_write_fails(
    small: Path, disk: Memory, later: str
) -> None:
    epochs = Epochs(small, disk)
    old = epochs.create(1)
    pair = epochs.create(2)
    fill(old, 16)
    epochs.retire(old)()
    if later != "spare":
        pair.destroy()
        pair = epochs.create(3)
    if later == "reopened":
        pair.close()
        epochs = Epochs(small, disk)
        pair = epochs.open(3)
    kept = Path(f"{pair.active.path}.data") if later != "spare" else small / "spare.active.data"
    assert occupied(kept) == 16 * BLOCK
    room = os.statvfs(small)
    blocks = (room.f_bavail * room.f_frsize - reserve_of(room.f_blocks * room.f_frsize)) // BLOCK
    # Only hidden is written to, which has no use for what active's file holds.
    written, error = fill_up(pair.hidden)
    assert error.kind is Kind.NO_SPACE
    assert written >= blocks + 16 - 2, "all but the map's page"
    assert bytes(pair.hidden.fetch(0, written * BLOCK)) == DATA * written


def fill_up(overlay: Overlay) -> tuple[int, Error]:
    """Save blocks until one fails: how many were saved, and the error."""
    for block in range(LENGTH // BLOCK):
        try:
            overlay.save(block * BLOCK, memoryview(DATA))
        except Error as error:
            return block, error
    raise AssertionError("the filesystem is not full")


def test_removed_pair_leaves_no_spare_files(tmp_path: Path, disk: Memory) -> None:
    epochs = Epochs(tmp_path, disk)
    first, second = epochs.create(1), epochs.create(2)
    epochs.retire(first)()
    epochs.remove(second)()
    assert files(tmp_path) == set()


@pytest.mark.parametrize(("keep", "left"), [(2, of_epoch(2) | SPARES), (None, set())])
def test_sweep_keeps_the_epoch_and_what_the_next_can_use(
    tmp_path: Path, disk: Memory, keep: int | None, left: set[str]
) -> None:
    epochs = Epochs(tmp_path, disk)
    first, second = epochs.create(1), epochs.create(2)
    epochs.retire(first)()
    second.close()
    (tmp_path / "epoch-00000007.hidden.map").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    epochs.sweep(keep)
    assert files(tmp_path) == left | {"notes.txt"}


@pytest.mark.parametrize("call", ["unlink", "replace"])
def test_death_while_a_pair_is_retired_leaves_nothing_in_the_way(
    tmp_path: Path, disk: Memory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    class DeathError(BaseException):
        """Nothing in the product handles it."""

    def dies(*_: object) -> None:
        raise DeathError

    epochs = Epochs(tmp_path, disk)
    first, second = epochs.create(1), epochs.create(2)
    fill(first, 5)
    fill(second, 2)
    put_aside = epochs.retire(first)
    monkeypatch.setattr(os, call, dies)
    with pytest.raises(DeathError):
        put_aside()
    monkeypatch.undo()
    second.close()
    first.close()
    epochs = Epochs(tmp_path, disk)
    second = epochs.open(2)
    epochs.sweep(2)
    third = epochs.create(3)
    assert bytes(second.active.fetch(0, 3 * BLOCK)) == DATA * 2 + b"o" * BLOCK
    assert bytes(third.active.fetch(0, 3 * BLOCK)) == b"o" * 3 * BLOCK
    assert files(tmp_path) - SPARES == of_epoch(2) | of_epoch(3)


def test_pair_being_retired_is_not_touched_to_make_space(tmp_path: Path, disk: Memory) -> None:
    """Its files are closed in a thread; a descriptor that is closed may be another file's already."""
    epochs = Epochs(tmp_path, disk)
    pair = epochs.create(1)
    epochs.retire(pair)
    assert not epochs._make_space()
    pair.close()


def test_pairs_destroyed_are_not_remembered(tmp_path: Path, disk: Memory) -> None:
    epochs = Epochs(tmp_path, disk)
    for _ in range(5):
        pair = epochs.create(1)
        pair.destroy()
    pair = epochs.create(1)
    assert epochs._reclaimable == [*pair]
    pair.close()


def room(folder: Path) -> tuple[int, int]:
    """Bytes that are left of a file system, and those that overlays leave."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, reserve_of(found.f_blocks * found.f_frsize)


def save_all(overlay: Overlay) -> None:
    for block in range(LENGTH // BLOCK):
        overlay.save(block * BLOCK, memoryview(DATA))


@pytest.mark.parametrize("how", ["save", "write"])
def test_overlays_leave_the_last_part_of_the_filesystem(small: Path, disk: Memory, how: str) -> None:
    """A1."""
    pair = Epochs(small, disk).create(1)
    with pytest.raises(Error) as caught:
        save_all(pair.hidden) if how == "save" else fill(pair, LENGTH // BLOCK)
    assert caught.value.kind is Kind.NO_SPACE
    assert "make room there" in str(caught.value)
    left, reserve = room(small)
    assert reserve <= left < reserve + 2 * BLOCK
    (small / "record").write_bytes(bytes(reserve))


def test_marks_of_zeroes_leave_the_last_part_too(small: Path) -> None:
    """A1: a trim of a whole LUN stores nothing but the map's pages."""
    disk = Memory(512 * MiB)
    pair = Epochs(small, disk).create(1)
    with pytest.raises(Error) as caught:
        pair.active.zero(0, disk.length)
    assert caught.value.kind is Kind.NO_SPACE
    left, reserve = room(small)
    assert left >= reserve


def test_pair_is_opened_read_and_committed_with_no_byte_left(small: Path, disk: Memory) -> None:
    """A1: neither a restart nor a failover, to the latest or to the checkpoint, needs space that is not there."""

    async def story() -> None:
        epochs = Epochs(small, disk)
        before = epochs.create(1)
        for block in range(4):
            before.hidden.save(block * BLOCK, memoryview(DATA))
            before.active.write((block + 2) * BLOCK, [memoryview(b"a" * BLOCK)])
        before.active.zero(8 * BLOCK, BLOCK)
        before.active.flush()
        before.close()
        with open(small / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(BLOCK)):
                pass
        assert room(small)[0] == 0
        pair = Epochs(small, disk).open(1)
        expected = bytes(pair.active.fetch(0, LENGTH))
        assert expected[: 9 * BLOCK] == DATA * 2 + b"a" * 4 * BLOCK + b"o" * 2 * BLOCK + bytes(BLOCK)
        pair.active.write(2 * BLOCK, [memoryview(b"b" * BLOCK)])
        offload = Offload(threads=2)
        commit = Commit("commit", pair.active, pair.hidden, disk, Gate(pair.active), offload)
        await commit.run()
        offload.close()
        assert disk.data == expected.replace(b"a" * BLOCK, b"b" * BLOCK, 1)
        assert pair.active.allocated_bytes == pair.hidden.allocated_bytes == 0
        Epochs(small, disk).remove(pair)()
        assert files(small) == {"filler"}

    asyncio.run(asyncio.wait_for(story(), 30))
