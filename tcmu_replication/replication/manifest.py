"""What one end of a pair remembers: one small file, written whole and renamed into place.

The manifest is the only thing that says which epoch's overlays count, so
replacing it *is* the checkpoint. A reader finds the old one or the new one and
never a mix: the new one is written beside it, synced, renamed over it, and the
directory synced. A manifest that does not carry its own checksum is refused; it
is never guessed at.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import msgspec

from tcmu_replication.errors import Error, Kind, from_os, one_line
from tcmu_replication.replication.stages import Mode, Stage

FORMAT = 1
"""Raised when a reader of the old format would misunderstand the new one."""

NAME = "manifest.json"

MAX_LENGTH = 1 << 20
"""Bytes of a file that can be a manifest; one with an error in it has about 500."""

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Manifest(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """The state that outlives a process.

    `generation` names one start of one pair (both ends hold the same), `epoch`
    counts its checkpoints. `boot` is the kernel's boot id under which the disks
    were last written, and `clean` says that they were flushed and closed since:
    together they tell a restarted worker from a host that lost its page cache.
    """

    resource: str
    mode: Mode
    stage: Stage
    length: Count
    generation: str = ""
    epoch: Count = 0
    error: str | None = None
    boot: str = ""
    clean: bool = False
    peer_boot: str = ""
    checkpoint_at: str = ""
    checkpoint_pause_ms: float = 0.0
    format: int = FORMAT


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def encode(manifest: Manifest) -> bytes:
    """Two lines: the checksum of the second, and the manifest as JSON."""
    body = msgspec.json.encode(manifest)
    return _checksum(body).encode() + b"\n" + body + b"\n"


def decode(data: bytes, path: Path) -> Manifest:
    """The manifest in `data`; `path` is named in errors.

    Raises `Error(BAD_CONFIG)` for anything but a whole manifest of this format.
    """
    checksum, _, rest = data.partition(b"\n")
    body, _, tail = rest.partition(b"\n")
    if not body or tail or checksum != _checksum(body).encode():
        raise Error(
            Kind.BAD_CONFIG,
            f"{path}: not a whole manifest (its checksum does not match); it was damaged outside of "
            "tcmu-replication. The disk itself was not touched; restore the file, or move the overlay "
            "directory away to begin anew",
        )
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise Error(
            Kind.BAD_CONFIG,
            f"{path}: {one_line(str(e))}; was it written by another version of tcmu-replication?",
        ) from e
    if manifest.format != FORMAT:
        raise Error(
            Kind.BAD_CONFIG, f"{path}: format {manifest.format}, this version reads format {FORMAT} only"
        )
    return manifest


def load(directory: Path) -> Manifest | None:
    """The directory's manifest, or None if it has none. Raises `Error`."""
    path = directory / NAME
    try:
        with open(path, "rb") as file:
            return decode(file.read(MAX_LENGTH), path)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise from_os(e, f"read {path}") from e


def save(directory: Path, manifest: Manifest) -> None:
    """Replace the directory's manifest; when this returns it is on stable storage.

    Raises `Error` with the old manifest still in place and whole.
    """
    path = directory / NAME
    new = directory / (NAME + ".new")
    try:
        before = path.read_bytes() if path.exists() else None
        _write(new, encode(manifest))
        os.replace(new, path)
        try:
            sync_directory(directory)
        except OSError:
            # It is in place and the caller will be told that it is not: put back what it goes on with.
            _put_back(path, new, before)
            raise
    except OSError as e:
        new.unlink(missing_ok=True)
        raise from_os(e, f"write {path}") from e


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_back(path: Path, new: Path, before: bytes | None) -> None:
    if before is None:
        path.unlink()
    else:
        _write(new, before)
        os.replace(new, path)


def sync_directory(directory: Path) -> None:
    """Make the directory's entries stable. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def boot_id() -> str:
    """This boot's name (random(4), /proc/sys/kernel/random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
