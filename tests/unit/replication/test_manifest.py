import errno
import hashlib

import msgspec
import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.stages import Mode, Stage

SAMPLE = Manifest("disk0", Mode.SECONDARY, Stage.RUNNING, 1 << 20, generation="g", epoch=7)


def after(manifest, **changes):
    return msgspec.structs.replace(manifest, sequence=manifest.sequence + 1, **changes)


@pytest.fixture
def saved(tmp_path):
    """SAMPLE, saved as a directory's first manifest, and with two more saves behind it."""
    manifests.save(tmp_path, first := after(SAMPLE), SAMPLE)
    manifests.save(tmp_path, second := after(first, epoch=8), first)
    manifests.save(tmp_path, third := after(second, epoch=9), second)
    return third


def test_round_trip(tmp_path):
    assert manifests.load(tmp_path) is None
    last = SAMPLE
    for epoch in range(5):
        manifests.save(tmp_path, now := after(last, epoch=epoch), last)
        assert manifests.load(tmp_path) == now
        last = now
    assert [p.name for p in tmp_path.iterdir()] == [manifests.NAME]
    assert (tmp_path / manifests.NAME).stat().st_size == manifests.LENGTH


def test_manifest_is_readable_by_its_owner_alone(tmp_path, saved):
    assert (tmp_path / manifests.NAME).stat().st_mode & 0o777 == 0o600


def test_link_in_place_of_a_manifest_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"somebody's")
    (tmp_path / manifests.NAME).symlink_to(elsewhere)
    with pytest.raises(Error):
        manifests.load(tmp_path)
    with pytest.raises(Error):
        manifests.save(tmp_path, after(SAMPLE), SAMPLE)
    assert elsewhere.read_bytes() == b"somebody's"


@pytest.mark.parametrize("place", [0, 1])
def test_either_place_may_be_torn_between_saves(tmp_path, saved, place):
    path = tmp_path / manifests.NAME
    data = bytearray(path.read_bytes())
    data[place * manifests.PLACE + 100] ^= 1
    path.write_bytes(data)
    assert manifests.load(tmp_path) == saved


def test_save_torn_anywhere_leaves_the_one_before(tmp_path, saved):
    path = tmp_path / manifests.NAME
    before = path.read_bytes()
    manifests.save(tmp_path, now := after(saved, epoch=10), saved)
    place = now.sequence % 2 * manifests.PLACE
    new = path.read_bytes()[place : place + manifests.PLACE]
    for length in range(0, manifests.PLACE, 512):
        torn = before[:place] + new[:length] + before[place + length :]
        path.write_bytes(torn)
        assert manifests.load(tmp_path) in (saved, now)
        path.write_bytes(before[:place] + b"\xff" * length + before[place + length :])
        assert manifests.load(tmp_path) == saved


def test_file_of_which_no_place_is_whole_is_refused(tmp_path, saved):
    path = tmp_path / manifests.NAME
    for damage in (b"", bytes(manifests.LENGTH), path.read_bytes()[:-1], path.read_bytes() + b"\0"):
        path.write_bytes(damage)
        with pytest.raises(Error, match="no whole manifest") as refused:
            manifests.load(tmp_path)
        assert refused.value.kind is Kind.BAD_CONFIG


def test_manifest_that_fits_no_place_is_refused_and_the_old_one_stays(tmp_path, saved):
    with pytest.raises(Error, match="does not fit"):
        manifests.save(tmp_path, after(saved, error="x" * manifests.PLACE), saved)
    assert manifests.load(tmp_path) == saved


def test_every_torn_length_is_refused(tmp_path):
    whole = manifests.encode(SAMPLE)
    path = tmp_path / manifests.NAME
    for length in range(len(whole)):
        if whole[:length].rstrip(b"\n") == whole.rstrip(b"\n"):
            continue  # only the last line's end is missing: the checksum still proves the rest
        with pytest.raises(Error) as refused:
            manifests.decode(whole[:length], path)
        assert refused.value.kind is Kind.BAD_CONFIG
        assert str(path) in str(refused.value)


def test_every_flipped_byte_is_refused(tmp_path):
    whole = bytearray(manifests.encode(SAMPLE))
    for index in range(len(whole) - 1):
        whole[index] ^= 0x20
        with pytest.raises(Error):
            manifests.decode(bytes(whole), tmp_path)
        whole[index] ^= 0x20


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "truncated"),
        (b'{"format":3,"resource":"\xff"}', "utf-8"),
        (b"[]", "Expected `object`"),
        (b"{}", "format"),
        (b'{"format":0}', "format"),
        (b'{"format":-1}', "format"),
        (b'{"format":"3"}', "format"),
        (b'{"format":%d}' % 10**400, "format"),
        (b'{"format":3,"version":3}', "version"),
        (b'{"format":3,"a\\nb":1}', "a?b"),
        (b'{"format":3,"resource":"a","mode":"primary","stage":"none","length":-1}', "length"),
        (b'{"format":3,"resource":"a","mode":"primary","stage":"none","length":1,"epoch":-1}', "epoch"),
    ],
)
def test_whole_file_that_is_no_manifest_is_refused_in_one_line(tmp_path, body, said):
    checksum = hashlib.sha256(body).hexdigest().encode()
    with pytest.raises(Error) as refused:
        manifests.decode(checksum + b"\n" + body + b"\n", tmp_path)
    assert refused.value.kind is Kind.BAD_CONFIG
    assert said in str(refused.value)
    assert str(refused.value).isprintable()


def test_file_without_an_end_is_not_read_to_it(tmp_path):
    with open(tmp_path / manifests.NAME, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Error, match="no whole manifest"):
        manifests.load(tmp_path)


def test_save_that_cannot_be_synced_did_not_happen(tmp_path, saved, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifests.os, "fdatasync", broken)
    with pytest.raises(Error) as refused:
        manifests.save(tmp_path, after(saved, stage=Stage.DONE), saved)
    assert refused.value.kind is Kind.IO
    monkeypatch.undo()
    assert manifests.load(tmp_path) == saved
    manifests.save(tmp_path, now := after(saved, epoch=11), saved)
    assert manifests.load(tmp_path) == now


def test_first_save_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifests.os, "fsync", full)
    with pytest.raises(Error) as refused:
        manifests.save(tmp_path, after(SAMPLE), SAMPLE)
    assert refused.value.kind is Kind.NO_SPACE
    assert list(tmp_path.iterdir()) == []


def test_full_file_system_forbids_no_save(tmp_path, saved, monkeypatch):
    """A1: in place and in full length, so that no block has to be found."""
    before = (tmp_path / manifests.NAME).stat()
    manifests.save(tmp_path, after(saved, error="x" * 1000), saved)
    now = (tmp_path / manifests.NAME).stat()
    assert (now.st_ino, now.st_blocks, now.st_size) == (before.st_ino, before.st_blocks, before.st_size)
    assert now.st_blocks * 512 >= manifests.LENGTH


def test_first_save_whose_directory_cannot_be_synced_did_not_happen(tmp_path, monkeypatch):
    def broken(directory):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifests, "sync_directory", broken)
    with pytest.raises(Error):
        manifests.save(tmp_path, after(SAMPLE), SAMPLE)
    assert manifests.load(tmp_path) is None
