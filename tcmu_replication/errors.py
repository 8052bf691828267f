"""The one error of this project: a kind to decide on, a context to read, a cause to trace.

Callers choose by `Error.kind` and never by text. Each edge has one table from
kinds to its own words (SCSI sense, NBD error, QMP class, exit status), and a
test asserts that every kind has a row in each of them.
"""

from __future__ import annotations

import enum
import errno


class Kind(enum.Enum):
    """What went wrong, as far as anyone needs to decide on it."""

    IO = "I/O error"
    NO_SPACE = "no space left"
    OUT_OF_RANGE = "out of range"
    UNALIGNED = "not aligned"
    UNSUPPORTED = "not supported"
    INVALID_STATE = "not possible in this state"
    BAD_REQUEST = "malformed request"
    BAD_CONFIG = "wrong configuration"
    NOT_FOUND = "not found"
    READ_ONLY = "read-only"
    MISCOMPARE = "data differs"
    CONFLICT = "in use"
    PERMISSION = "not permitted"
    PEER_LOST = "peer lost"
    PEER_LIED = "peer broke the protocol"
    TIMED_OUT = "timed out"
    CANCELLED = "cancelled"
    NOT_READY = "not ready"
    BECOMING_READY = "not ready yet"


class Error(Exception):
    """A failure with a kind, a sentence for a person, and what it was about.

    `detail` is the whole sentence; `offset` and `length` (bytes) say where on
    the disk, if it was there. The cause is kept in `__cause__` as usual.
    """

    def __init__(self, kind: Kind, detail: str = "", *, offset: int | None = None, length: int | None = None):
        super().__init__(detail or kind.value)
        self.kind = kind
        self.detail = detail or kind.value
        self.offset = offset
        self.length = length

    def __str__(self) -> str:
        if self.offset is None:
            return self.detail
        where = f"at byte {self.offset}"
        if self.length is not None:
            where += f", {self.length} bytes"
        return f"{self.detail} ({where})"


KIND_OF_ERRNO: dict[int, Kind] = {
    errno.ENOSPC: Kind.NO_SPACE,
    errno.EDQUOT: Kind.NO_SPACE,
    errno.EFBIG: Kind.NO_SPACE,
    errno.EROFS: Kind.READ_ONLY,
    errno.EPERM: Kind.PERMISSION,
    errno.EACCES: Kind.PERMISSION,
    errno.ENOENT: Kind.NOT_FOUND,
    errno.ENOTDIR: Kind.NOT_FOUND,
    errno.ENXIO: Kind.NOT_FOUND,
    errno.ENODEV: Kind.NOT_FOUND,
    errno.EBUSY: Kind.CONFLICT,
    errno.EEXIST: Kind.CONFLICT,
    errno.EADDRINUSE: Kind.CONFLICT,
    errno.EOPNOTSUPP: Kind.UNSUPPORTED,
    errno.ENOTTY: Kind.UNSUPPORTED,
    errno.EINVAL: Kind.BAD_REQUEST,
    errno.ETIMEDOUT: Kind.TIMED_OUT,
    errno.ECANCELED: Kind.CANCELLED,
    errno.ECONNREFUSED: Kind.PEER_LOST,
    errno.ECONNRESET: Kind.PEER_LOST,
    errno.EPIPE: Kind.PEER_LOST,
    errno.EHOSTUNREACH: Kind.PEER_LOST,
    errno.ENETUNREACH: Kind.PEER_LOST,
}


LINE = 400
"""Characters of what came from outside that a sentence quotes."""


def one_line(text: str, limit: int = LINE) -> str:
    """What a peer or a file says, fit for one line of a log or a terminal: printable, not longer than `limit`."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def from_os(error: OSError, doing: str, *, offset: int | None = None, length: int | None = None) -> Error:
    """An `Error` for `error`, met while `doing` something ("write /dev/sdb").

    An errno without a row in KIND_OF_ERRNO is an I/O error. Use as
    `raise from_os(e, "…") from e`.
    """
    kind = KIND_OF_ERRNO.get(error.errno or 0, Kind.IO)
    reason = error.strerror or str(error)
    return Error(kind, f"{doing}: {reason}", offset=offset, length=length)
