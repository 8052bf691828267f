"""Whatever comes from outside: nothing raises, nothing leaves its area or the disk."""

from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.pending import Pending
from tcmu_replication.scsi.command import Command
from tcmu_replication.scsi.commands import COMMANDS
from tcmu_replication.units import KiB

from .disk import Disk, sense_of

LENGTH = 64 * KiB


class Watched(Memory):
    """Memory that fails a test that goes beyond it."""

    def _check(self, offset: int, length: int) -> None:
        assert offset >= 0
        assert length > 0
        assert offset + length <= self.length

    def read(self, offset: int, buffers: Sequence[memoryview]) -> Pending | None:
        self._check(offset, sum(map(len, buffers)))
        return super().read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[memoryview], fua: bool = False) -> Pending | None:
        self._check(offset, sum(map(len, buffers)))
        return super().write(offset, buffers, fua)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        self._check(offset, length)
        return super().zero(offset, length, fua, unmap)


@st.composite
def _known(draw: st.DrawFn) -> bytes:
    """A command of the table with likely and unlikely values in its fields."""
    command: Command = draw(st.sampled_from(COMMANDS))
    values = {
        f.name: draw(
            st.one_of(st.integers(0, min(9, (1 << f.width) - 1)), st.integers(0, (1 << f.width) - 1))
        )
        for f in command.fields
    }
    return command.encode(**values)


cdbs = st.one_of(_known(), st.binary(max_size=32))
areas = st.one_of(st.binary(max_size=64), st.sampled_from([0, 1, 511, 512, 1024, 4096, 65536]).map(bytes))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(cdbs, areas, st.integers(0, 70000)), max_size=6), st.sampled_from([512, 4096]))
def test_any_command_ends_well_formed(commands: list[tuple[bytes, bytes, int]], block_size: int) -> None:
    disk = Disk(LENGTH, block_size, node=Watched(LENGTH))
    for cdb, data_out, in_length in commands:
        result = disk.send(cdb, data_out, in_length)
        assert len(result.data) <= in_length
        assert len(disk.node.data) == LENGTH
        if result.answer.status:
            assert not result.data
            assert sense_of(result.answer).key in (0x05, 0x06, 0x0E)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([c for c in COMMANDS if c.name.startswith("WRITE (")]),
    st.sampled_from([c for c in COMMANDS if c.name.startswith("READ (")]),
    st.integers(0, 127),
    st.integers(1, 128),
    st.integers(0, 1 << 32),
)
def test_what_was_written_is_read(
    writing: Command, reading: Command, lba: int, blocks: int, seed: int
) -> None:
    blocks = min(blocks, LENGTH // 512 - lba)
    disk = Disk(LENGTH)
    data = Random(seed).randbytes(blocks * 512)
    assert disk.send(writing.encode(lba=lba, blocks=blocks), data).good
    assert disk.send(reading.encode(lba=lba, blocks=blocks), b"", len(data)).data == data
    assert disk.node.data == bytes(lba * 512) + data + bytes(LENGTH - (lba + blocks) * 512)
