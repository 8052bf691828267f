"""The numbers of the NBD protocol: magics, options, commands, flags, errors and limits.

Source of every value: the protocol's specification, doc/proto.md of the NBD
project, in the sections that the headings below name. All integers on the wire
are big-endian. No I/O and no behaviour here.
"""

from __future__ import annotations

import enum
from struct import Struct

from tcmu_replication.errors import Kind, one_line
from tcmu_replication.units import KiB, MiB

# Handshake phase

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9

GREETING = Struct(">QQH")
"""NBD_MAGIC, OPTION_MAGIC, handshake flags."""
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")
"""OPTION_MAGIC, option, length of its data."""
OPTION_REPLY = Struct(">QIII")
"""OPTION_REPLY_MAGIC, option, reply type, length of its data."""
EXPORT_NAME_REPLY = Struct(">QH")
"""Length of the export, transmission flags; ZEROES more bytes unless NO_ZEROES was agreed."""
EXPORT_NAME_ZEROES = 124

U16 = Struct(">H")
U32 = Struct(">I")


class HandshakeFlag(enum.IntFlag):
    """Both the server's (16 bits) and the client's (32 bits) handshake flags."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    """Option types."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(enum.IntEnum):
    """Option reply types; errors have the top bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009


OPTION_ERROR_BIT = 0x80000000


class Info(enum.IntEnum):
    """What NBD_REP_INFO carries."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


INFO_EXPORT = Struct(">HQH")
"""Info.EXPORT, length, transmission flags."""
INFO_BLOCK_SIZE = Struct(">HIII")
"""Info.BLOCK_SIZE, minimum, preferred, maximum."""

BASE_ALLOCATION = "base:allocation"


class TransmissionFlag(enum.IntFlag):
    """What the server says about an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


# Transmission phase

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

REQUEST = Struct(">IHHQQI")
"""REQUEST_MAGIC, command flags, command, cookie, offset, length."""
SIMPLE_REPLY = Struct(">IIQ")
"""SIMPLE_REPLY_MAGIC, error, cookie."""
STRUCTURED_REPLY = Struct(">IHHQI")
"""STRUCTURED_REPLY_MAGIC, flags, type, cookie, length of the chunk's payload."""
CHUNK_OFFSET = Struct(">Q")
"""What precedes the data of an OFFSET_DATA chunk."""
DATA_HEAD = Struct(">IHHQIQ")
"""A STRUCTURED_REPLY and the CHUNK_OFFSET behind it."""
CHUNK_HOLE = Struct(">QI")
"""Offset and length of an OFFSET_HOLE chunk."""
CHUNK_ERROR = Struct(">IH")
"""Error and length of the text of an ERROR chunk; ERROR_OFFSET has a CHUNK_OFFSET behind the text."""
CHUNK_EXTENT = Struct(">II")
"""Length and state of one descriptor of a BLOCK_STATUS chunk."""


class Command(enum.IntEnum):
    """Request types."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(enum.IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Chunk(enum.IntEnum):
    """Structured reply types; errors have the top bit set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_DONE = 1
"""The flag of the last chunk of a structured reply."""
CHUNK_ERROR_BIT = 0x8000


class ExtentState(enum.IntFlag):
    """The states of base:allocation."""

    HOLE = 1
    ZERO = 2


class NbdError(enum.IntEnum):
    """Error values."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# Limits

MAX_REQUEST = 32 * MiB
"""The longest read or write, as QEMU's and nbdkit's; also our advertised maximum block size."""
MAX_STRING = 4 * KiB
"""The longest string, which the specification gives."""
MAX_STATUS = 8 * MiB + 4
"""The longest block status that is received: nbdkit's, of a million extents."""
MAX_EXTENTS = 64 * KiB
"""So many extents of a block status are kept; who wants to know of the rest asks for it."""
MAX_OPTION = 64 * KiB
"""The longest option and option reply that is read. Real ones stay below 8 KiB and a few queries."""
MIN_BLOCK = 1
PREFERRED_BLOCK = 4 * KiB

# Errors

ERROR_OF_KIND: dict[Kind, NbdError] = {
    Kind.IO: NbdError.EIO,
    Kind.NO_SPACE: NbdError.ENOSPC,
    Kind.OUT_OF_RANGE: NbdError.EINVAL,
    Kind.UNALIGNED: NbdError.EINVAL,
    Kind.UNSUPPORTED: NbdError.ENOTSUP,
    Kind.INVALID_STATE: NbdError.EIO,
    Kind.BAD_REQUEST: NbdError.EINVAL,
    Kind.BAD_CONFIG: NbdError.EIO,
    Kind.NOT_FOUND: NbdError.EIO,
    Kind.READ_ONLY: NbdError.EPERM,
    Kind.MISCOMPARE: NbdError.EIO,
    Kind.CONFLICT: NbdError.EIO,
    Kind.PERMISSION: NbdError.EPERM,
    Kind.PEER_LOST: NbdError.EIO,
    Kind.PEER_LIED: NbdError.EIO,
    Kind.TIMED_OUT: NbdError.EIO,
    Kind.CANCELLED: NbdError.ESHUTDOWN,
    Kind.NOT_READY: NbdError.ESHUTDOWN,
    Kind.BECOMING_READY: NbdError.ESHUTDOWN,
}

KIND_OF_ERROR: dict[int, Kind] = {
    NbdError.EPERM: Kind.PERMISSION,
    NbdError.EIO: Kind.IO,
    NbdError.ENOMEM: Kind.IO,
    NbdError.EINVAL: Kind.BAD_REQUEST,
    NbdError.ENOSPC: Kind.NO_SPACE,
    NbdError.EOVERFLOW: Kind.BAD_REQUEST,
    NbdError.ENOTSUP: Kind.UNSUPPORTED,
    NbdError.ESHUTDOWN: Kind.IO,
}


def kind_of_error(error: int) -> Kind:
    """The kind of an NBD error value; a value that the specification does not know is an I/O error."""
    return KIND_OF_ERROR.get(error, Kind.IO)


def sentence(data: bytes) -> str:
    """What a peer says to people."""
    return one_line(data.decode(errors="replace"))


def error_name(error: int) -> str:
    """ "EIO" for 5; "error 999" for a value without a name."""
    try:
        return NbdError(error).name
    except ValueError:
        return f"error {error}"
