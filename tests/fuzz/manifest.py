"""A manifest file.

byte 0      bit 0: what follows gets the checksum that it should have
the rest    the file, or with a checksum the JSON in it
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.manifest import FORMAT, Manifest, decode, encode
from tests.fuzz.script import Script, told

WORDS = tuple(b'"%s":' % name.encode() for name in Manifest.__struct_encode_fields__)
MAX_LENGTH = 2048


def check(data: bytes) -> None:
    """It is read as what writes it again, or refused."""
    script = Script(data)
    signed = script.number() & 1
    content = script.rest()
    if signed:
        content = hashlib.sha256(content).hexdigest().encode() + b"\n" + content + b"\n"
    try:
        found = decode(content, Path("manifest.json"))
    except Error as error:
        told(error, Kind.BAD_CONFIG)
        return
    assert found.length >= 0
    assert found.epoch >= 0
    again = decode(encode(found), Path("manifest"))
    assert again == msgspec.structs.replace(found, version=again.version, format=FORMAT)
