"""docs/on-disk.md says what the code writes: every file by its name, every offset, every member, every format."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import msgspec
import pytest
from msgspec import inspect

from tcmu_replication.block import bitmap, boot, hot_extents, in_flight, map_format
from tcmu_replication.block.hot_extents import HotExtents
from tcmu_replication.block.in_flight import InFlight
from tcmu_replication.block.memory import Memory
from tcmu_replication.control import lock
from tcmu_replication.daemon import places
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.epochs import Epochs
from tcmu_replication.replication.manifest import FORMAT, UPGRADES, Manifest
from tcmu_replication.replication.missed import Missed
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import BLOCK, MiB

TEXT = (Path(__file__).parents[3] / "docs/on-disk.md").read_text()
LENGTH = 2 * MiB


def rows(title: str, head: str) -> list[list[str]]:
    """The cells of the table whose first column is called `head`, in the section called `title` ("" for the first)."""
    section = TEXT if not title else TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert section, f"no section {title}"
    lines = iter(section.splitlines())
    for line in lines:
        if line.startswith(f"| {head} |"):
            break
    next(lines, None)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def names() -> list[str]:
    return [cells[0].strip("`") for cells in rows("", "file")]


def test_every_file_that_is_written_has_a_row_and_every_row_a_file(tmp_path: Path) -> None:
    """A file of a temporary name, and those of the daemon, are not made here: their names are the code's."""
    before = Manifest("disk0", Mode.PRIMARY, Stage.NONE, LENGTH)
    manifests.save(tmp_path, msgspec.structs.replace(before, sequence=1), before)
    missed = Missed(tmp_path / "out-of-sync.map", LENGTH)
    missed.open()
    missed.close()
    epochs = Epochs(tmp_path, Memory(LENGTH))
    first, second = epochs.create(1), epochs.create(12)
    epochs.retire(first)()
    HotExtents(tmp_path / "activity-log", LENGTH).close()
    run = tmp_path / "run"
    InFlight(run / "disk0.in-flight", LENGTH).close()
    socket = places.socket_path(run, "disk0")
    made = {re.sub(r"\d{8}", "NNNNNNNN", path.name) for path in tmp_path.iterdir() if path.is_file()}
    made |= {path.name.replace("disk0", "NAME") for path in run.iterdir()}
    made |= {socket.name.replace("disk0", "NAME"), lock.lock_path(socket).name.replace("disk0", "NAME")}
    second.destroy()
    temporary = {f"{manifests.NAME}.new", "out-of-sync.map.new", "activity-log.new"}
    assert set(names()) == made | temporary | {manifests.NAME_OF_FORMAT_1, f"{places.MANAGER}.notify"}
    assert len(names()) == len(set(names()))


LAYOUTS = {
    # section: the header's struct, its checksum, what else has a place, the magic, the format, the file's bytes
    "Overlay map": (
        map_format.HEADER,
        map_format.CHECKSUM,
        [(map_format.PAGE, str(map_format.ENTRY))],
        map_format.MAGIC,
        map_format.VERSION,
        map_format.header(LENGTH),
    ),
    "`out-of-sync.map`": (
        bitmap.HEADER,
        bitmap.CHECKSUM,
        [(bitmap.PAGE, "a bit")],
        bitmap.MAGIC,
        bitmap.FORMAT,
        bitmap.header(LENGTH),
    ),
    "`activity-log`": (
        hot_extents.HEADER,
        hot_extents.CHECKSUM,
        [(hot_extents.PAGE, f"{hot_extents.SECTOR} for each {hot_extents.PER_SECTOR} extents")],
        hot_extents.MAGIC,
        hot_extents.VERSION,
        b"",
    ),
    "`NAME.in-flight`": (
        in_flight.HEADER,
        struct.Struct("<I"),
        [
            (in_flight.PAGE - 16, "8"),
            (in_flight.PAGE - 8, "8"),
            (in_flight.PAGE, f"16 for each of {in_flight.SLOTS} places"),
        ],
        in_flight.MAGIC,
        in_flight.VERSION,
        b"",
    ),
}


def fields(header: struct.Struct) -> list[tuple[int, int]]:
    """The offset and the bytes of each field of a packed struct."""
    assert header.format.startswith("<")
    found, at = [], 0
    for code in re.findall(r"\d*[a-zA-Z]", header.format):
        size = struct.calcsize(f"<{code}")
        found.append((at, size))
        at += size
    return found


@pytest.mark.parametrize("title", LAYOUTS)
def test_offsets_and_sizes_are_those_of_the_structs(title: str) -> None:
    header, checksum, rest, magic, number, head = LAYOUTS[title]
    expected = [*fields(header), (header.size, checksum.size)]
    table = rows(title, "offset")
    assert [(int(at), int(size)) for at, size, _ in table[: len(expected)]] == expected
    for (at, size, _), (offset, begins) in zip(table[len(expected) :], rest, strict=True):
        assert int(at) == offset
        assert size.startswith(begins)
    assert table[0][2] == f"`{magic.decode()}`"
    assert table[1][2] == f"format, {number}"
    assert not head or len(head) == header.size + checksum.size
    if "bytes per block" in table[2][2]:
        assert table[2][2].endswith(str(BLOCK))
    if "bytes per extent" in table[2][2]:
        assert table[2][2].endswith(str(hot_extents.EXTENT))
    assert boot.LENGTH in [size for _, size in expected] or "boot" not in str(table)


def test_places_of_the_manifest() -> None:
    assert [(int(at), int(size)) for at, size, _ in rows("`manifest`", "offset")] == [
        (0, manifests.PLACE),
        (manifests.PLACE, manifests.PLACE),
    ]
    assert manifests.LENGTH == 2 * manifests.PLACE


def words(type: inspect.Type) -> str:
    match type:
        case inspect.BoolType():
            return "boolean"
        case inspect.FloatType():
            return "number"
        case inspect.IntType():
            return "integer"
        case inspect.StrType() | inspect.EnumType():
            return "text"
        case inspect.UnionType():
            return " or ".join(
                "null" if isinstance(one, inspect.NoneType) else words(one) for one in type.types
            )
    raise AssertionError(f"the page has no words for {type}")


def test_members_of_the_manifest() -> None:
    found = inspect.type_info(Manifest)
    assert isinstance(found, inspect.StructType)
    expected = [(f"`{field.encode_name}`", words(field.type)) for field in found.fields]
    assert [(name, type) for name, type, _ in rows("`manifest`", "member")] == expected
    table = {name: meaning for name, _, meaning in rows("`manifest`", "member")}
    assert set(re.findall(r"`([a-z-]+)`", table["`mode`"])) == {mode.value for mode in Mode}
    assert set(re.findall(r"`([a-z-]+)`", table["`stage`"])) == {stage.value for stage in Stage}


def test_formats_of_all_files_have_a_row_for_each_format_of_the_directory() -> None:
    """Who changes the format of any file raises the manifest's: its last row has the numbers of the code."""
    table = rows("The rule for every change", "manifest")
    assert [int(cells[0]) for cells in table] == [*UPGRADES, FORMAT] == list(range(1, FORMAT + 1))
    _, overlay, missed, flight = table[-1]
    assert int(overlay) == map_format.VERSION
    assert missed.startswith(f"bitmap {bitmap.FORMAT}, or overlay map {map_format.VERSION}")
    assert int(flight) == in_flight.VERSION
