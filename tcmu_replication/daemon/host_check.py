"""Whether a resource fits its host: disk, overlay directory, who else could change them, other resources.

Looks, and touches nothing. What a resource listens at is listeners.py.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from tcmu_replication import ownership, tls, units
from tcmu_replication.daemon.config import Host, Resource, refusal
from tcmu_replication.daemon.guards import check_guards
from tcmu_replication.replication import manifest

LEAST_FREE = 1 * units.MiB
"""Less than this on the overlays' file system is full: not even the first blocks of a new epoch fit."""
RENEW_DAYS = 30
"""A certificate that has less left is worth a word."""
_DAY_S = 24 * 3600


def check_host(resource: Resource, host: str, others: Iterable[Resource] = ()) -> list[str]:
    """Raise BAD_CONFIG for the first thing that would keep `resource` from being served on `host`.

    Returns what does not, and is worth a word. `others` are the resources that
    must not share a disk, an overlay directory or a port with it; itself among
    them is skipped.
    """
    mine = resource.host(host)
    prefix = f"host.{host}"
    _check_disk(resource, mine.disk, f"{prefix}.disk")
    check_guards(resource)
    warnings = _check_overlays(resource, mine.overlays, f"{prefix}.overlays")
    _check_owners(resource, mine, prefix)
    for other in others:
        if other.name != resource.name and other.is_served_on(host):
            _check_apart(resource, other, host)
    return warnings


def check_certificates(resource: Resource, host: str) -> list[str]:
    """Raise BAD_CONFIG if TLS is wanted and the peer will not believe what `host` shows.

    Returns a sentence for each certificate that will expire soon. Apart from
    `check_host`: a LUN whose certificate expires is served all the same.
    """
    if resource.tls is None:
        return []
    ends = tls.rehearse(resource.tls.certificates, [host, resource.host(host).address])
    left = {path: end - time.time() for path, end in ends.items()}
    return [
        f"{path} expires at {_date(ends[path])}, in {int(seconds // _DAY_S)} days: put a new one in its place "
        "by then (docs/tls.md); nothing needs a restart"
        for path, seconds in left.items()
        if seconds < RENEW_DAYS * _DAY_S
    ]


def _check_disk(resource: Resource, disk: str, key: str) -> None:
    expected = f"a block device or an image of {resource.size} bytes ({units.format_size(resource.size)})"
    try:
        mode = os.stat(disk).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
            raise refusal(resource.path, key, f"{disk}, which is neither a block device nor a file", expected)
        descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            length = os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise refusal(resource.path, key, f"{disk} ({error.strerror})", expected) from error
    if length != resource.size:
        raise refusal(
            resource.path,
            key,
            f"{disk} of {length} bytes ({units.format_size(length)})",
            f"the {resource.size} bytes ({units.format_size(resource.size)}) of resource.size",
        )


def _check_overlays(resource: Resource, directory: str, key: str) -> list[str]:
    expected = "a directory that exists, is writable and has free space"
    try:
        if not stat.S_ISDIR(os.stat(directory).st_mode):
            raise refusal(resource.path, key, f"{directory}, which is not a directory", expected)
        room = os.statvfs(directory)
    except OSError as error:
        raise refusal(resource.path, key, f"{directory} ({error.strerror})", expected) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise refusal(resource.path, key, f"{directory}, which is not writable", expected)
    is_in_use = _check_record(resource, Path(directory), key)
    free = room.f_bavail * room.f_frsize
    if free >= LEAST_FREE:
        return []
    full = refusal(
        resource.path,
        key,
        f"{directory} on a file system with {units.format_size(free)} left",
        f"at least {units.format_size(LEAST_FREE)}: make room there",
    )
    if not is_in_use:
        raise full
    # A worker that died is needed again, and what it needs most is there already.
    return [str(full)]


def _check_record(resource: Resource, directory: Path, key: str) -> bool:
    """Whether the directory holds what this resource has written down. Raises `Error` if it is another's."""
    found = manifest.load(directory)
    if found is None:
        return False
    if found.resource != resource.name:
        raise refusal(
            resource.path,
            key,
            f"{directory}, which belongs to resource {found.resource!r}",
            "an overlay directory of its own: name another, empty one",
        )
    if found.length != resource.size:
        raise refusal(
            resource.path,
            key,
            f"{directory} with overlays of {found.length} bytes ({units.format_size(found.length)})",
            f"the {resource.size} bytes ({units.format_size(resource.size)}) of resource.size: mend the size, "
            "or name another, empty directory to begin anew",
        )
    return True


def _check_owners(resource: Resource, mine: Host, prefix: str) -> None:
    """Nobody else may change what is read here, written here, or served."""
    is_device = stat.S_ISBLK(os.stat(mine.disk).st_mode)
    for key, path, use in (
        ("file", str(resource.path), ownership.FILE),
        (f"{prefix}.disk", mine.disk, ownership.DEVICE if is_device else ownership.FILE),
        (f"{prefix}.overlays", mine.overlays, ownership.DIRECTORY),
    ):
        try:
            wrong = ownership.fault(path, use, ownership.users())
        except OSError as error:
            raise refusal(
                resource.path, key, f"{path} ({error.strerror})", "a path that can be followed"
            ) from error
        if wrong is not None:
            raise refusal(resource.path, key, *wrong)


def _check_apart(resource: Resource, other: Resource, host: str) -> None:
    mine, theirs = resource.host(host), other.host(host)
    for key in ("disk", "overlays"):
        path, used = getattr(mine, key), getattr(theirs, key)
        if _identity(path) == _identity(used):
            raise refusal(
                resource.path,
                f"host.{host}.{key}",
                f"{path}, which {other.path} uses too" + ("" if path == used else f" (as {used})"),
                "one of its own",
            )
    if resource.link.socket is not None and resource.link.socket == other.link.socket:
        raise refusal(
            resource.path,
            "link.socket",
            f"{resource.link.socket}, which is link.socket of {other.path}",
            "a socket of its own",
        )
    if mine.address != theirs.address:
        return
    taken = {port: key for key, port in _ports(other).items()}
    for key, port in _ports(resource).items():
        if port in taken:
            raise refusal(
                resource.path,
                f"link.{key}",
                f"{port}, which is link.{taken[port]} of {other.path} on the same address",
                "a port of its own",
            )


def _ports(resource: Resource) -> dict[str, int]:
    """The ports that it uses, by their keys."""
    ports = {}
    if resource.link.socket is None:
        ports["port"] = resource.link.port
    if not any(host.qemu for host in resource.hosts.values()):
        ports["control-port"] = resource.link.control_port
    return ports


def _date(seconds: float) -> str:
    """A time as people write it: UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _identity(path: str) -> object:
    """What makes two paths the same storage: the device behind a device node, else the inode."""
    try:
        found = os.stat(path)
    except OSError:
        return Path(os.path.realpath(path))
    if stat.S_ISBLK(found.st_mode):
        return ("device", found.st_rdev)
    return ("inode", found.st_dev, found.st_ino)
