"""Who else could change what a worker relies on: owner and mode of a path, and of all that leads to it.

A worker runs as root, or as a user of its own. It believes its resource file, its
keys and what it has written down, and writes where they tell it to. Whoever else
may write one of these, or put another in its place, decides for it. So each entry
of the path, from the root directory on and through every link, belongs to root or
to the worker's user, and others may do no more than its row allows:

    what leads there   directories: others may write in one that is sticky, as /tmp is, for there
                       nobody renames or removes what is not his, and the owner of the next entry is
                       looked at too. Links: the mode says nothing (symlink(7)); owner and place do
    WAY                the same, for a directory in which one entry of ours is made
    DIRECTORY          others may not write in it, sticky or not: what is made in it is ours alone
    FILE               others may not write it
    SECRET             nor read it; root may let a group read what is root's, so that a worker that
                       is not root can be given a key (as PostgreSQL has it)
    DEVICE             a group may write it: every disk is root's and the group's `disk`

Access lists are covered: the group's bits are the mask of an access list (acl(5)).
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Collection, Iterator
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind, from_os

MAX_LINKS = 40
"""In one path, as for the kernel (MAXSYMLINKS, include/linux/namei.h)."""

_ROOT = 0
_READ = stat.S_IRGRP | stat.S_IROTH
_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Use(NamedTuple):
    """What a path is for: the mode bits that it must not have, and chmod(1)'s words for taking them away.

    `if_roots` is the row of what belongs to root, where that is another; what is
    `sticky` may have the bits; `advice` is what else has to be done.
    """

    refused: int
    chmod: str
    if_roots: Use | None = None
    sticky: bool = False
    advice: str = ""


DIRECTORY = Use(_WRITE, "go-w")
FILE = Use(_WRITE, "go-w")
SECRET = Use(0o077, "go=", if_roots=Use(0o037, "g-wx,o="))
DEVICE = Use(
    stat.S_IWOTH, "o-w", advice=", and change the udev rule that gave this mode, or it is back after a boot"
)
WAY = Use(_WRITE, "go-w", sticky=True)
_LINK = Use(0, "")


class Fault(NamedTuple):
    """What is wrong with a path: what was found, and what is expected, with the command that mends it."""

    found: str
    expected: str


def users() -> frozenset[int]:
    """Who is trusted: root and the user of this process."""
    return frozenset((_ROOT, os.geteuid()))


def check(path: str | os.PathLike[str], use: Use) -> None:
    """Raise BAD_CONFIG if others than `users` could change what is at `path`, or read a SECRET.

    Raises as `from_os` does if the path leads nowhere.
    """
    try:
        found = fault(path, use, users())
    except OSError as error:
        raise from_os(error, f"look at {os.fspath(path)}") from error
    if found is not None:
        raise Error(Kind.BAD_CONFIG, f"found {found.found}; expected {found.expected}")


def fault(path: str | os.PathLike[str], use: Use, trusted: Collection[int]) -> Fault | None:
    """The first thing on the way to `path`, or there, that others than the users `trusted` could change.

    Raises OSError if it cannot be followed to its end.
    """
    entries = list(_entries(os.fspath(path)))
    for entry, found in entries[:-1]:
        row = _LINK if stat.S_ISLNK(found.st_mode) else WAY
        if (wrong := judge(entry, found.st_mode, found.st_uid, row, trusted)) is not None:
            return wrong
    entry, found = entries[-1]
    return judge(entry, found.st_mode, found.st_uid, use, trusted)


def judge(entry: str, mode: int, owner: int, use: Use, trusted: Collection[int]) -> Fault | None:
    """One entry of a path, by its mode and owner."""
    name = shlex.quote(entry)
    if owner not in trusted:
        chown = "chown -h" if stat.S_ISLNK(mode) else "chown"
        return Fault(
            f"{entry}, which belongs to {_user(owner)}",
            f"{' or '.join(_user(user) for user in sorted(trusted))} as its owner: see what was made of it, "
            f"then `{chown} root {name}`. Or, of a worker that runs as {_user(owner)}, ask as that user",
        )
    row = use.if_roots if owner == _ROOT and use.if_roots is not None else use
    extra = mode & row.refused
    if not extra or (row.sticky and mode & stat.S_ISVTX):
        return None
    who = "others" if extra & stat.S_IRWXO else "its group"
    return Fault(
        f"{entry} with mode {stat.S_IMODE(mode):04o}, so that {who} may {_doing(extra)} it",
        f"{stat.S_IMODE(mode) & ~row.refused:04o} or less: `chmod {row.chmod} {name}`{row.advice}",
    )


def _entries(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Each entry that has a say in where `path` leads, by lstat(2), from the root on; the last is its end."""
    rest = os.path.join(os.getcwd(), path).split("/")[::-1]
    here, links = "/", 0
    yield here, os.lstat(here)
    while rest:
        name = rest.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)
            yield here, os.lstat(here)
            continue
        entry = os.path.join(here, name)
        found = os.lstat(entry)
        yield entry, found
        if not stat.S_ISLNK(found.st_mode):
            here = entry
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(entry)
        here = "/" if target.startswith("/") else here
        rest += target.split("/")[::-1]
        yield here, os.lstat(here)


def _user(uid: int) -> str:
    """A user's name, and the number where there is none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _doing(bits: int) -> str:
    """What the bits allow, in words."""
    doing = [word for word, bit in (("read", _READ), ("write", _WRITE)) if bits & bit]
    return " and ".join(doing) or "execute"
