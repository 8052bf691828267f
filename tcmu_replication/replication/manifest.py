"""What one end of a pair remembers: one small file with two places, written in turn and in place.

    byte 0        a place: the manifest's checksum, a newline, the manifest as JSON, a newline, zeroes
    byte 16384    the other place

The manifest is the only thing that says which epoch's overlays count, so
saving it *is* the checkpoint. A save with an odd number goes to the second place
first, one with an even number to the first; when that place is on stable storage
the save has happened, and the other place gets the same behind it. So at every
instant one place is whole and stable, and each is there twice between saves: a
torn write leaves the other, and so does a flipped bit. Of two that are whole the
one with the higher number counts. A file without a whole place is refused; it is
never guessed at.

The file is written once, in its full length, and later only in place: a file
system that is full forbids no save, and so no failover and no restart. (File
systems that write nothing in place, btrfs and ZFS, need room for it.)

Its format is that of the whole directory: a change to any file there raises it, so
an older version refuses the directory before it looks at anything else, and says
which version wrote it. An older format is read, and becomes this one in one save
(`upgrade`). docs/on-disk.md has the rule and every file.

    format 1    one place in a file of its own, `manifest.json`, replaced by rename
    format 2    two places, as above
    format 3    says which `version` of the software wrote it
    format 4    knows of a resync, and of a controller
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tcmu_replication import __version__
from tcmu_replication.errors import Error, Kind, from_os, one_line
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import KiB

log = logging.getLogger(__name__)

FORMAT = 4
"""Raised with every change of a member, and of any other file of the directory."""

NAME = "manifest"
NAME_OF_FORMAT_1 = "manifest.json"

PLACE = 16 * KiB
"""Bytes of a place. A manifest with a long error in it has about 2000."""
LENGTH = 2 * PLACE
"""Bytes of the file."""

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Manifest(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """The state that outlives a process. Times are ISO 8601 in UTC, or "" for never.

    `sequence` counts the saves. `disk` is what the kernel calls the disk ("" if it
    says nothing of the kind). `generation` names one start of one pair (both ends
    hold the same), `epoch` counts its checkpoints, and `checkpoint_id` is the name
    that whoever asked for the last one gave it. `boot` is the kernel's boot id
    under which the disks were last written, and `clean` says that they were flushed
    and closed since: together they tell a restarted worker from a host that lost
    its page cache. `whole` says of a failover that its checkpoint is on stable
    storage. `format` is the file's, and `version` the software that wrote it, "" if it did not say.

    What makes this host's data less than the pair's last word, or the pair less
    than a pair, is here before anything relies on it:

    `error`, `error_at`   the recorded error, and since when
    `paired`              of a secondary: its primary has been connected in this generation
    `verified`            both disks were compared, or vouched for, since start
    `suspect`             why the checkpoint may not be exact any more
    `disk_error`          why this host's disk may lack what was acknowledged, it is not known where
    `peer_disk_error`     of a secondary: the same of the primary's disk, as that has told
    `outdated_at`         of a secondary: since when the primary goes on without it
    `detached_at`         of a primary: since when only the peer has all that is written
    `map_complete`        whether the map of missed writes names every block that may differ
    `superseded_at`       of a primary: when it heard that its peer was promoted
    `promoted_at`         of a secondary: when it was promoted
    `written_alone`       its LUN was written while nothing was replicated
    `resync_since`        of a secondary: since when its disk is a mix, a resync having begun and not ended
    `controlled`          of a primary: a controller started it, and it alone says when there is a checkpoint
    `last_forwarded`      of a secondary: about when the last forwarded write came
    """

    resource: str
    mode: Mode
    stage: Stage
    length: Count
    disk: str = ""
    generation: str = ""
    epoch: Count = 0
    checkpoint_id: str = ""
    checkpoint_at: str = ""
    checkpoint_pause_ms: float = 0.0
    error: str | None = None
    error_at: str = ""
    boot: str = ""
    clean: bool = False
    whole: bool = False
    paired: bool = False
    verified: bool = True
    suspect: str | None = None
    disk_error: str | None = None
    peer_disk_error: str | None = None
    outdated_at: str = ""
    detached_at: str = ""
    map_complete: bool = True
    superseded_at: str = ""
    promoted_at: str = ""
    written_alone: bool = False
    resync_since: str = ""
    controlled: bool = False
    last_forwarded: str = ""
    sequence: Count = 0
    version: str = __version__
    format: int = FORMAT


class _Head(msgspec.Struct):
    """What every format has, whatever else it has."""

    format: Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
    version: str = ""


def _from_1(found: dict[str, Any]) -> dict[str, Any]:
    """It knew nothing of the members that it lacks, and a pair that ran was one."""
    found = {name: value for name, value in found.items() if name != "peer-boot"}
    return found | {"paired": found.get("stage") != Stage.NONE.value}


def _from_2(found: dict[str, Any]) -> dict[str, Any]:
    return found | {"version": ""}


def _from_3(found: dict[str, Any]) -> dict[str, Any]:
    return found | {"resync-since": "", "controlled": False}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2, 3: _from_3}
"""By format: the members as the next format has them."""


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def encode(manifest: Manifest) -> bytes:
    """Two lines: the checksum of the second, and the manifest as JSON, in this version's format.

    Raises `Error` if it fits no place.
    """
    body = msgspec.json.encode(msgspec.structs.replace(manifest, version=__version__, format=FORMAT))
    data = _checksum(body).encode() + b"\n" + body + b"\n"
    if len(data) > PLACE:
        raise Error(Kind.BAD_REQUEST, f"a manifest of {len(data)} bytes does not fit its place of {PLACE}")
    return data


def decode(data: bytes, path: Path) -> Manifest:
    """The manifest that a place, or a file of format 1, holds; `path` is named in errors.

    Its `format` is the one that was found. Raises `Error(BAD_CONFIG)` for anything but a whole manifest of
    a format that is read here.
    """
    if not _is_whole(data):
        raise _not_whole(path)
    body = data.split(b"\n", 2)[1]
    try:
        head = msgspec.json.decode(body, type=_Head)
        if head.format > FORMAT:
            raise _too_new(head, path)
        found = msgspec.json.decode(body, type=dict)
        for number in range(head.format, FORMAT):
            found = UPGRADES[number](found)
        return msgspec.convert(found, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise Error(
            Kind.BAD_CONFIG,
            f"{path}: {one_line(str(e))}; expected a manifest of format 1 to {FORMAT}. Its checksum is right: it was "
            "written so, and not damaged. Nothing was changed; run the version of tcmu-replication that wrote it",
        ) from e


def _too_new(head: _Head, path: Path) -> Error:
    writer = one_line(head.version, 40)
    return Error(
        Kind.BAD_CONFIG,
        f"{path}: found format {head.format}, written by tcmu-replication {writer or 'of a newer version'}; this is "
        f"version {__version__}, which reads format 1 to {FORMAT}. Nothing was changed; run "
        f"{f'version {writer}' if writer else 'that version'} or a newer one on this host",
    )


def _is_whole(data: bytes) -> bool:
    """Whether the checksum is that of the line behind it, and nothing but zeroes follows."""
    checksum, _, rest = data.partition(b"\n")
    body, _, tail = rest.partition(b"\n")
    return bool(body) and not tail.strip(b"\0") and checksum == _checksum(body).encode()


def _not_whole(path: Path) -> Error:
    return Error(
        Kind.BAD_CONFIG,
        f"{path}: found no whole manifest in it (no checksum matches); it was damaged outside of "
        "tcmu-replication. The disk itself was not touched. Restore the file from a backup of the same day; "
        "or, if the other host can serve, fail over there",
    )


def load(directory: Path) -> Manifest | None:
    """The directory's manifest, or None if it has none; nothing is changed. Raises `Error`."""
    path = directory / NAME
    data = _read(path)
    if data is None:
        old = directory / NAME_OF_FORMAT_1
        data = _read(old)
        return None if data is None else decode(data, old)
    if len(data) != LENGTH:
        raise _not_whole(path)
    found = [decode(place, path) for place in (data[:PLACE], data[PLACE:]) if _is_whole(place)]
    if not found:
        raise _not_whole(path)
    return max(found, key=lambda manifest: manifest.sequence)


def upgrade(directory: Path, found: Manifest) -> Manifest:
    """Make what `load` has found one of this version's format, before any other file there is touched.

    It is one save. Raises `Error` with the directory as it was.
    """
    if found.format == FORMAT:
        return found
    now = msgspec.structs.replace(found, sequence=found.sequence + 1, version=__version__, format=FORMAT)
    save(directory, now, found)
    log.info("%s: the manifest of format %d is one of format %d now", directory, found.format, FORMAT)
    return now


def save(directory: Path, manifest: Manifest, before: Manifest) -> None:
    """Make `manifest` the directory's, after `before`; when this returns it is on stable storage.

    Its `sequence` must be one more than before's. Raises `Error` with `before` still in force.
    """
    assert manifest.sequence == before.sequence + 1, "saves are counted"
    path = directory / NAME
    data = encode(manifest)
    try:
        if path.exists():
            _write_in_place(path, data, manifest.sequence % 2 * PLACE)
        else:
            _create(directory, data, manifest.sequence % 2)
    except OSError as e:
        raise from_os(e, f"write {path}") from e
    with contextlib.suppress(OSError):  # nobody looks at it any more, and the next save tries again
        _remove_format_1(directory)


def _write_in_place(path: Path, data: bytes, first: int) -> None:
    """`data` in both places, and the one at `first` stable before the other is touched. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        before = os.pread(fd, PLACE, first)
        try:
            _write(fd, data, first)
            os.fdatasync(fd)
        except OSError:
            # The caller is told that it did not happen, so it must not be found either.
            with contextlib.suppress(OSError):
                _write(fd, before, first)
            raise
        with contextlib.suppress(OSError):  # the first place is what counts
            _write(fd, data, PLACE - first)
    finally:
        os.close(fd)


def _read(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise from_os(e, f"read {path}") from e
    with open(fd, "rb") as file:
        try:
            return file.read(LENGTH + 1)
        except OSError as e:
            raise from_os(e, f"read {path}") from e


def _create(directory: Path, data: bytes, place: int) -> None:
    """The file in its full length, with `data` in one place and zeroes in the other. Raises OSError."""
    new = directory / f"{NAME}.new"
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write(fd, b"", (1 - place) * PLACE)
            _write(fd, data, place * PLACE)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, directory / NAME)
        try:
            sync_directory(directory)
        except OSError:
            os.unlink(directory / NAME)
            raise
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _remove_format_1(directory: Path) -> None:
    """For good: a version that reads nothing else must not find it. Raises OSError."""
    path = directory / NAME_OF_FORMAT_1
    if path.exists():
        path.unlink()
        sync_directory(directory)


def _write(fd: int, data: bytes, at: int) -> None:
    """A whole place. Raises OSError."""
    if os.pwrite(fd, data.ljust(PLACE, b"\0"), at) != PLACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sync_directory(directory: Path) -> None:
    """Make the directory's entries stable. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
