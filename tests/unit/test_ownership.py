"""Who else could change what a worker relies on (S5): each row of the table, and the walk through a path."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tcmu_replication import ownership
from tcmu_replication.errors import Error, Kind
from tcmu_replication.ownership import DEVICE, DIRECTORY, FILE, SECRET, Use

OURS, STRANGER = 4_000_001, 4_000_002
"""Users that no machine has."""
TRUSTED = (0, OURS)
D, F, B = stat.S_IFDIR, stat.S_IFREG, stat.S_IFBLK


@pytest.mark.parametrize(
    ("use", "mode", "owner"),
    [
        (DIRECTORY, D | 0o755, 0),
        (DIRECTORY, D | 0o700, OURS),
        (FILE, F | 0o644, 0),
        (FILE, F | 0o644, OURS),
        (SECRET, F | 0o600, 0),
        (SECRET, F | 0o400, OURS),
        (SECRET, F | 0o640, 0),
        (DEVICE, B | 0o660, 0),
        (DEVICE, B | 0o600, OURS),
        (DEVICE, B | 0o664, 0),
    ],
)
def test_what_others_cannot_change_passes(use: Use, mode: int, owner: int) -> None:
    assert ownership.judge("/x", mode, owner, use, TRUSTED) is None


@pytest.mark.parametrize(
    ("use", "mode", "owner", "found", "mended"),
    [
        (DIRECTORY, D | 0o775, 0, "mode 0775, so that its group may write it", "0755 or less: `chmod go-w /x`"),
        (DIRECTORY, D | 0o757, OURS, "mode 0757, so that others may write it", "0755 or less: `chmod go-w /x`"),
        (DIRECTORY, D | 0o1777, 0, "mode 1777, so that others may write it", "1755 or less: `chmod go-w /x`"),
        (DIRECTORY, D | 0o755, STRANGER, f"belongs to user {STRANGER}", "then `chown root /x`"),
        (FILE, F | 0o664, 0, "mode 0664, so that its group may write it", "0644 or less: `chmod go-w /x`"),
        (FILE, F | 0o646, OURS, "mode 0646, so that others may write it", "0644 or less: `chmod go-w /x`"),
        (FILE, F | 0o600, STRANGER, f"belongs to user {STRANGER}", "then `chown root /x`"),
        (SECRET, F | 0o640, OURS, "so that its group may read it", "0600 or less: `chmod go= /x`"),
        (SECRET, F | 0o644, 0, "so that others may read it", "0640 or less: `chmod g-wx,o= /x`"),
        (SECRET, F | 0o660, 0, "so that its group may write it", "0640 or less: `chmod g-wx,o= /x`"),
        (SECRET, F | 0o666, OURS, "so that others may read and write it", "0600 or less: `chmod go= /x`"),
        (SECRET, F | 0o601, OURS, "so that others may execute it", "0600 or less: `chmod go= /x`"),
        (SECRET, F | 0o400, STRANGER, f"belongs to user {STRANGER}", "then `chown root /x`"),
        (DEVICE, B | 0o666, 0, "so that others may write it", "0664 or less: `chmod o-w /x`, and change the udev"),
        (DEVICE, B | 0o660, STRANGER, f"belongs to user {STRANGER}", "then `chown root /x`"),
    ],
)  # fmt: skip
def test_what_others_could_change_is_refused(
    use: Use, mode: int, owner: int, found: str, mended: str
) -> None:
    wrong = ownership.judge("/x", mode, owner, use, TRUSTED)
    assert wrong is not None
    assert found in wrong.found
    assert mended in wrong.expected


def test_the_command_that_mends_it_names_the_path_for_a_shell() -> None:
    wrong = ownership.judge("/a b; c", F | 0o666, 0, FILE, TRUSTED)
    assert wrong is not None
    assert wrong.expected.endswith("`chmod go-w '/a b; c'`")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory below what pytest made, with `file` in it."""
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    (place / "file").touch(mode=0o644)
    return place


def test_a_good_path_passes(place: Path) -> None:
    ownership.check(place, DIRECTORY)
    ownership.check(place / "file", FILE)


def test_a_relative_path_is_looked_at_from_the_root_directory_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.chmod(0o777)
    monkeypatch.chdir(place)
    with pytest.raises(Error, match=f"found {place} with mode 0777"):
        ownership.check("file", FILE)


def test_a_directory_on_the_way_that_others_may_write_is_refused(place: Path) -> None:
    place.chmod(0o775)
    with pytest.raises(Error) as caught:
        ownership.check(place / "file", FILE)
    assert caught.value.kind is Kind.BAD_CONFIG
    assert f"{place} with mode 0775" in str(caught.value)


def test_a_sticky_directory_on_the_way_passes_and_is_no_overlay_directory(place: Path) -> None:
    place.chmod(0o1777)
    ownership.check(place / "file", FILE)
    with pytest.raises(Error, match="with mode 1777"):
        ownership.check(place, DIRECTORY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_strangers_entry_of_a_sticky_directory_is_refused(place: Path) -> None:
    place.chmod(0o1777)
    os.chown(place / "file", STRANGER, STRANGER)
    with pytest.raises(Error, match=f"belongs to user {STRANGER}"):
        ownership.check(place / "file", FILE)


def test_a_link_is_followed_to_what_it_names(place: Path) -> None:
    (place / "link").symlink_to("../place/./file")
    ownership.check(place / "link", FILE)
    (place / "file").chmod(0o666)
    with pytest.raises(Error, match=f"found {place / 'file'} with mode 0666"):
        ownership.check(place / "link", FILE)


def test_the_place_of_a_link_counts_and_not_only_where_it_leads(place: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "link").symlink_to(place / "file")
    loose.chmod(0o777)
    with pytest.raises(Error, match=f"found {loose} with mode 0777"):
        ownership.check(loose / "link", FILE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
def test_a_strangers_link_is_refused(place: Path) -> None:
    place.chmod(0o1777)
    (place / "link").symlink_to(place / "file")
    os.chown(place / "link", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(Error, match=f"chown -h root {place / 'link'}"):
        ownership.check(place / "link", FILE)


def test_links_without_an_end_are_refused(place: Path) -> None:
    (place / "one").symlink_to("two")
    (place / "two").symlink_to("one")
    with pytest.raises(Error, match=r"Too many levels of symbolic links"):
        ownership.check(place / "one", FILE)


def test_a_path_that_leads_nowhere_is_told(place: Path) -> None:
    with pytest.raises(Error) as caught:
        ownership.check(place / "nothing", FILE)
    assert caught.value.kind is Kind.NOT_FOUND
