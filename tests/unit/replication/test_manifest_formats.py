"""Manifests of other versions: an older one becomes this one's in one step, a newer one is refused by name.

What the versions before wrote and how they read is written down here, so that nothing that changes in the
project changes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tcmu_replication import __version__
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.manifest import FORMAT, LENGTH, NAME, NAME_OF_FORMAT_1, PLACE, Manifest

FORMAT_1 = (
    b'{"resource":"disk0","mode":"secondary","stage":"running","length":1048576,"generation":"g","epoch":7,'
    b'"error":"e","boot":"b","clean":true,"whole":false,"peer-boot":"","checkpoint-at":"t",'
    b'"checkpoint-pause-ms":1.5,"format":1}'
)
FORMAT_2 = (
    b'{"resource":"disk0","mode":"primary","stage":"running","length":1048576,"disk":"","generation":"g","epoch":7,'
    b'"checkpoint-id":"c","checkpoint-at":"t","checkpoint-pause-ms":1.5,"error":"e","error-at":"t","boot":"b",'
    b'"clean":false,"whole":false,"paired":true,"verified":true,"suspect":null,"disk-error":null,'
    b'"peer-disk-error":null,"outdated-at":"t","detached-at":"","map-complete":true,"superseded-at":"",'
    b'"promoted-at":"","written-alone":false,"last-forwarded":"","sequence":%d,"format":2}'
)
MEMBERS_OF_2 = frozenset(json.loads(FORMAT_2 % 0))


def checked(body: bytes) -> bytes:
    """A body with its checksum, as every format has it."""
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n"


def place(body: bytes) -> bytes:
    return checked(body).ljust(PLACE, b"\0")


def of_format_1() -> dict[str, bytes]:
    return {NAME_OF_FORMAT_1: checked(FORMAT_1)}


def of_format_2() -> dict[str, bytes]:
    """After its save number 5, which went to the second place first."""
    return {NAME: place(FORMAT_2 % 5) * 2}


def of_format_2_that_died() -> dict[str, bytes]:
    """In its save number 5, between the two places."""
    return {NAME: place(FORMAT_2 % 4) + place(FORMAT_2 % 5)}


OLD = {"1": of_format_1, "2": of_format_2, "2, of which a save died": of_format_2_that_died}


def put(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def newer(version: str = "0.9.0", **members: Any) -> bytes:
    return json.dumps({"format": FORMAT + 1, "version": version, "what": [1, 2], **members}).encode()


# --- an older one


@pytest.mark.parametrize("old", OLD)
def test_older_format_is_read_without_a_change_and_upgraded_with_the_same_content(
    tmp_path: Path, old: str
) -> None:
    put(tmp_path, OLD[old]())
    found = manifests.load(tmp_path)
    assert found is not None
    assert (found.epoch, found.error, found.paired, found.version) == (7, "e", True, "")
    assert found.format == int(old[0])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == OLD[old]()
    now = manifests.upgrade(tmp_path, found)
    assert now == msgspec.structs.replace(
        found, sequence=found.sequence + 1, version=__version__, format=FORMAT
    )
    assert manifests.load(tmp_path) == now
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_this_format_is_not_written_again(tmp_path: Path) -> None:
    put(tmp_path, of_format_2())
    now = manifests.upgrade(tmp_path, _loaded(tmp_path))
    before = (tmp_path / NAME).read_bytes()
    assert manifests.upgrade(tmp_path, _loaded(tmp_path)) == now
    assert (tmp_path / NAME).read_bytes() == before


@pytest.mark.parametrize("number", range(1, FORMAT))
def test_every_older_format_has_a_step_to_the_next(number: int) -> None:
    assert number in manifests.UPGRADES


def test_formats_are_what_they_were() -> None:
    """A member more, or less, is another format: raise FORMAT and give UPGRADES a row. See docs/on-disk.md."""
    since = {"version": 3, "resync-since": 4, "controlled": 4}
    assert {*MEMBERS_OF_2, *since} == set(Manifest.__struct_encode_fields__), (
        "the members are not those of format 4: raise FORMAT, give UPGRADES a row, keep what 4 was here"
    )


def test_save_says_which_version_has_written_it(tmp_path: Path) -> None:
    put(tmp_path, of_format_2())
    manifests.upgrade(tmp_path, _loaded(tmp_path))
    whole = (tmp_path / NAME).read_bytes()[:PLACE].split(b"\n")[1]
    put(tmp_path, {NAME: place(whole.replace(__version__.encode(), b"0.0.1")) * 2})
    found = _loaded(tmp_path)
    assert found.version == "0.0.1"
    manifests.save(tmp_path, msgspec.structs.replace(found, sequence=found.sequence + 1), found)
    assert _loaded(tmp_path).version == __version__


# --- death, and loss of power, at every step of an upgrade


class DeathError(BaseException):
    """Not an Exception: nothing in the product handles it."""


class Host:
    """Dies at its call number `at` of those that change a file: before it, after it, or in the middle of a write.

    `images` are the directories that may be found then: of a process that died the page cache's; of a host that
    lost power any mix of what was synced of contents and of names, and what was not.
    """

    CALLS = ("pwrite", "fsync", "fdatasync", "replace", "unlink")

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, at: int, when: str) -> None:
        self._directory = directory
        self._left = at
        self._when = when
        self._contents: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._sync_all()
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._dying(name, getattr(os, name)))

    def _dying(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*arguments: Any) -> Any:
            self._left -= 1
            if self._left == -1 and self._when == "torn" and name == "pwrite":
                fd, data, offset = arguments
                call(fd, data[: len(data) // 32], offset)
            if self._left == -1 and self._when != "after":
                raise DeathError
            try:
                done = call(*arguments)
                if name in ("fsync", "fdatasync"):
                    self._synced(arguments[0])
            finally:
                if self._left == -1:
                    raise DeathError
            return done

        return dying

    def _synced(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path == self._directory:
            self._names = self._now()
        else:
            self._contents[path.stat().st_ino] = path.read_bytes()

    def _now(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self._directory.iterdir()}

    def _sync_all(self) -> None:
        self._names = self._now()
        self._contents = {path.stat().st_ino: path.read_bytes() for path in self._directory.iterdir()}

    def images(self) -> Iterator[dict[str, bytes]]:
        cached = self._contents | {
            path.stat().st_ino: path.read_bytes() for path in self._directory.iterdir()
        }
        now, synced = self._now(), self._names
        gone_first = {name: inode for name, inode in synced.items() if name in now}
        for names in (now, synced, gone_first, synced | now):
            for contents in (cached, self._contents):
                yield {name: contents.get(inode, b"") for name, inode in names.items()}


def _loaded(directory: Path) -> Manifest:
    found = manifests.load(directory)
    assert found is not None
    return found


def version_before_reads(files: dict[str, bytes]) -> int | None:
    """What a version that knows format 2 alone makes of a directory: the sequence, or None if it refuses."""
    data = files[NAME]
    found = []
    for part in (data[:PLACE], data[PLACE:]):
        checksum, _, rest = part.partition(b"\n")
        body, _, tail = rest.partition(b"\n")
        whole = bool(body) and not tail.strip(b"\0") and checksum == hashlib.sha256(body).hexdigest().encode()
        if whole and len(data) == LENGTH:
            found.append(json.loads(body))
    if not found or any(set(members) != MEMBERS_OF_2 or members["format"] != 2 for members in found):
        return None
    return max(int(members["sequence"]) for members in found)


@pytest.mark.parametrize("when", ["before", "torn", "after"])
@pytest.mark.parametrize("old", OLD)
def test_death_at_every_step_of_an_upgrade_leaves_the_old_or_the_new_and_nothing_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, when: str
) -> None:
    at, died, images = 0, True, 0
    while died:
        directory = tmp_path / f"{at}"
        put(directory, OLD[old]())
        found = _loaded(directory)
        expected = msgspec.structs.replace(
            found, sequence=found.sequence + 1, version=__version__, format=FORMAT
        )
        with monkeypatch.context() as patch:
            host = Host(directory, patch, at, when)
            try:
                manifests.upgrade(directory, found)
                died = False
            except DeathError:
                pass
        for files in host.images():
            images += 1
            after = tmp_path / f"{at}-{images}"
            put(after, files)
            assert _loaded(after) in (found, expected)
            if not died:
                assert _loaded(after) == expected
                assert NAME_OF_FORMAT_1 not in files
            if NAME in files:
                # A version before refuses it, or reads what was there before; it never reads half of it.
                seen = version_before_reads(files)
                assert seen in (None, found.sequence)
                assert died or seen is None
            now = manifests.upgrade(after, _loaded(after))
            assert now == expected
            manifests.save(after, last := msgspec.structs.replace(now, sequence=now.sequence + 1), now)
            assert _loaded(after) == last
            assert [path.name for path in after.iterdir()] == [NAME]
        at += 1
    assert at > 3


@pytest.mark.parametrize("old", ["2", "2, of which a save died"])
def test_upgrade_that_cannot_be_synced_leaves_every_byte_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    put(tmp_path, OLD[old]())

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(Error) as refused:
            manifests.upgrade(tmp_path, _loaded(tmp_path))
    assert refused.value.kind is Kind.IO
    assert (tmp_path / NAME).read_bytes() == OLD[old]()[NAME]


def test_format_1_that_cannot_be_removed_is_removed_by_a_later_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save has happened all the same, and whoever asked for it is not told otherwise."""
    put(tmp_path, of_format_1())

    unlink = os.unlink

    def broken(path: Any) -> None:
        if Path(path).name == NAME_OF_FORMAT_1:
            raise OSError(5, "Input/output error")
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", broken)
        now = manifests.upgrade(tmp_path, _loaded(tmp_path))
    assert _loaded(tmp_path) == now
    manifests.save(tmp_path, last := msgspec.structs.replace(now, sequence=now.sequence + 1), now)
    assert _loaded(tmp_path) == last
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


# --- a newer one


def test_newer_format_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    files = {NAME: place(newer()) * 2}
    put(tmp_path, files)
    with pytest.raises(Error) as refused:
        manifests.load(tmp_path)
    assert refused.value.kind is Kind.BAD_CONFIG
    said = str(refused.value)
    assert f"{tmp_path / NAME}: found format {FORMAT + 1}, written by tcmu-replication 0.9.0" in said
    assert f"this is version {__version__}, which reads format 1 to {FORMAT}" in said
    assert said.endswith("run version 0.9.0 or a newer one on this host")
    assert (tmp_path / NAME).read_bytes() == files[NAME]


def test_newer_format_in_one_place_is_not_passed_over(tmp_path: Path) -> None:
    for places in ((newer(), FORMAT_2 % 5), (FORMAT_2 % 5, newer())):
        put(tmp_path, {NAME: b"".join(place(body) for body in places)})
        with pytest.raises(Error, match=r"replication 0[.]9[.]0"):
            manifests.load(tmp_path)


def test_newer_format_whose_save_was_torn_did_not_happen(tmp_path: Path) -> None:
    torn = place(newer())[:40].ljust(PLACE, b"\0")
    put(tmp_path, {NAME: place(FORMAT_2 % 5) + torn})
    assert _loaded(tmp_path).sequence == 5


@pytest.mark.parametrize("version", ["", "\x1b[2J\n" * 99, "9" * 5000])
def test_newer_format_of_a_strange_version_is_refused_in_one_short_line(tmp_path: Path, version: str) -> None:
    put(tmp_path, {NAME: place(newer(version)) * 2})
    with pytest.raises(Error, match=f"found format {FORMAT + 1}") as refused:
        manifests.load(tmp_path)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


def test_member_that_this_format_does_not_have_is_no_damage(tmp_path: Path) -> None:
    """Whoever adds one without another format has made a mistake; it is told as what it is."""
    body = (FORMAT_2 % 5).replace(b'"format":2', b'"more":1,"format":2')
    put(tmp_path, {NAME: place(body) * 2})
    with pytest.raises(Error, match=r"unknown field `more`.*not damaged") as refused:
        manifests.load(tmp_path)
    assert refused.value.kind is Kind.BAD_CONFIG
