"""A resource file, whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from tcmu_replication.daemon import config
from tcmu_replication.errors import Error, Kind
from tests.fuzz.script import told

WORDS = (
    b"[resource]\n",
    b"[link]\n",
    b"[nbd]\n",
    b"[host.beta]\n",
    b'size = "16 TiB"\n',
    b"reconnect-delay = nan\n",
    b'listen = "[::1]:10809"\n',
    b"0xffffffffffffffffffffffffffffffff",
    b"1979-05-27T07:32:00Z",
    b'"""',
)
MAX_LENGTH = 4096

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")
_PATH = Path(_FOLDER.name) / "disk0.toml"


def check(data: bytes) -> None:
    """It is a resource of which every value is in its range, or an error of one line that names the file."""
    _PATH.write_bytes(data)
    try:
        found = config.load(_PATH)
    except Error as error:
        told(error, Kind.BAD_CONFIG)
        if not str(error).startswith(f"{_PATH}: "):
            raise AssertionError("an error that does not name the file") from error
        return
    assert found.name == "disk0"
    assert 0 < found.size < 1 << 63
    assert found.size % found.block_size == 0
    assert 0 <= found.link.reconnect_delay < config.SCSI_DEADLINE_S
    assert 0 < found.link.timeout < config.SCSI_DEADLINE_S
    assert sorted(host.mode for host in found.hosts.values()) == ["primary", "secondary"]
    for name, host in found.hosts.items():
        assert name.isprintable()
        for value in msgspec.structs.asdict(host).values():
            assert str(value).isprintable()
