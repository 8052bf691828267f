"""What one end of a pair remembers: one small file, written whole and renamed into place.

The manifest is the only thing that says which epoch's overlays count, so
replacing it *is* the checkpoint. A reader finds the old one or the new one and
never a mix: the new one is written beside it, synced, renamed over it, and the
directory synced. A manifest that does not carry its own checksum is refused; it
is never guessed at.
"""

from __future__ import annotations

import contextlib
import errno
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
    `whole` says of a failover that its checkpoint is on stable storage.
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
    whole: bool = False
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
    path, new = f"{directory}/{NAME}", f"{directory}/{NAME}.new"
    before = None
    try:
        with contextlib.suppress(FileNotFoundError):
            before = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _write(new, encode(manifest))
            os.replace(new, path)
            try:
                sync_directory(directory)
            except OSError:
                # It is in place and the caller will be told that it is not: put back what it goes on with.
                _put_back(path, new, before)
                raise
        finally:
            if before is not None:
                os.close(before)
    except OSError as e:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        raise from_os(e, f"write {path}") from e


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    finally:
        os.close(fd)


def _put_back(path: str, new: str, before: int | None) -> None:
    if before is None:
        os.unlink(path)
    else:
        _write(new, os.pread(before, MAX_LENGTH, 0))
        os.replace(new, path)


def sync_directory(directory: Path) -> None:
    """Make the directory's entries stable. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
