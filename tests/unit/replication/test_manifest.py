import errno
import hashlib

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.stages import Mode, Stage

SAMPLE = Manifest("disk0", Mode.SECONDARY, Stage.RUNNING, 1 << 20, generation="g", epoch=7)


def test_round_trip(tmp_path):
    assert manifests.load(tmp_path) is None
    manifests.save(tmp_path, SAMPLE)
    assert manifests.load(tmp_path) == SAMPLE
    assert [p.name for p in tmp_path.iterdir()] == [manifests.NAME]


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


def test_other_format_is_refused(tmp_path):
    import msgspec

    data = manifests.encode(msgspec.structs.replace(SAMPLE, format=99))
    with pytest.raises(Error, match="format 99"):
        manifests.decode(data, tmp_path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "truncated"),
        (b'{"resource":"\xff"}', "utf-8"),
        (b"[]", "Expected `object`"),
        (b'{"a\\nb":1}', "a?b"),
        (b'{"resource":"a","mode":"primary","stage":"none","length":-1}', "length"),
        (b'{"resource":"a","mode":"primary","stage":"none","length":1,"epoch":-1}', "epoch"),
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
    with pytest.raises(Error, match="not a whole manifest"):
        manifests.load(tmp_path)


def test_save_on_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    manifests.save(tmp_path, SAMPLE)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifests.os, "fsync", full)
    with pytest.raises(Error) as refused:
        manifests.save(tmp_path, Manifest("disk0", Mode.SECONDARY, Stage.DONE, 1 << 20))
    assert refused.value.kind is Kind.NO_SPACE
    monkeypatch.undo()
    assert manifests.load(tmp_path) == SAMPLE
    assert [p.name for p in tmp_path.iterdir()] == [manifests.NAME]


def test_save_whose_directory_cannot_be_synced_puts_the_old_one_back(tmp_path, monkeypatch):
    def broken(directory):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifests, "sync_directory", broken)
    with pytest.raises(Error):
        manifests.save(tmp_path, SAMPLE)
    assert manifests.load(tmp_path) is None
    monkeypatch.undo()
    manifests.save(tmp_path, SAMPLE)
    monkeypatch.setattr(manifests, "sync_directory", broken)
    with pytest.raises(Error) as refused:
        manifests.save(tmp_path, Manifest("disk0", Mode.SECONDARY, Stage.DONE, 1 << 20))
    assert refused.value.kind is Kind.IO
    assert manifests.load(tmp_path) == SAMPLE
    assert [p.name for p in tmp_path.iterdir()] == [manifests.NAME]
