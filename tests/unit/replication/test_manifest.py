import errno

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
