"""QMP as bytes: a stream of JSON objects, the greeting, requests, replies, events and errors. No I/O.

Source: QEMU's docs/interop/qmp-spec.rst. What is not a JSON object, or too
long, is the end of its connection (QEMU answers it with an error and goes on;
here only root and the peer can write, and neither sends garbage). We send one
object per line, as QEMU does. Only the standard library is imported, since every command of
an operator passes here.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

from tcmu_replication import __version__
from tcmu_replication.control.quotes import double_quoted
from tcmu_replication.errors import Error, Kind

MAX_LENGTH = 64 << 10
"""Bytes of a message: the status of one resource is about 2 KiB, the manager's list 200 bytes a worker."""
MAX_DEPTH = 64
"""Ours need 6, and deep nesting exhausts the stack of JSON's readers and writers."""

_OUTSIDE = re.compile(rb"[\"'{}\[\]]")
_IN_STRING = {quote: re.compile(quote + rb"|\\.", re.DOTALL) for quote in (b'"', b"'")}

GENERIC, NO_COMMAND = "GenericError", "CommandNotFound"
NOT_ACTIVE, NO_DEVICE = "DeviceNotActive", "DeviceNotFound"

CLASS_OF_KIND: dict[Kind, str] = {
    Kind.IO: GENERIC,
    Kind.NO_SPACE: GENERIC,
    Kind.OUT_OF_RANGE: GENERIC,
    Kind.UNALIGNED: GENERIC,
    Kind.UNSUPPORTED: GENERIC,
    Kind.INVALID_STATE: GENERIC,
    Kind.BAD_REQUEST: GENERIC,
    Kind.BAD_CONFIG: GENERIC,
    Kind.NOT_FOUND: GENERIC,
    Kind.READ_ONLY: GENERIC,
    Kind.MISCOMPARE: GENERIC,
    Kind.CONFLICT: GENERIC,
    Kind.PERMISSION: GENERIC,
    Kind.PEER_LOST: NOT_ACTIVE,
    Kind.PEER_LIED: GENERIC,
    Kind.TIMED_OUT: GENERIC,
    Kind.CANCELLED: GENERIC,
    Kind.NOT_READY: GENERIC,
    Kind.BECOMING_READY: GENERIC,
}
"""QEMU's ErrorClass (qapi/error.json) for each kind; its replication answers GenericError, so do we."""


class ClassError(Error):
    """An error to which QEMU gives another class than its kind has here."""

    def __init__(self, error_class: str, kind: Kind, detail: str) -> None:
        super().__init__(kind, detail)
        self.error_class = error_class


def kind_name(kind: Kind) -> str:
    """A kind as it travels in an error's data and in JSON: "invalid-state"."""
    return kind.name.lower().replace("_", "-")


KIND_OF_NAME = {kind_name(kind): kind for kind in Kind}


class Request(NamedTuple):
    """One command of a client; `id` is sent back if `has_id`. `oob`: do it before those that wait."""

    command: str
    arguments: dict[str, Any]
    id: Any = None
    has_id: bool = False
    oob: bool = False


class Objects:
    """Bytes in, JSON objects out, each as its bytes; keeps at most one unfinished object of MAX_LENGTH.

    Like QEMU's json-streamer it counts brackets, since clients need not end
    their requests with a line end (QEMU's own library does not).
    """

    def __init__(self) -> None:
        self._rest = b""
        self._at = 0
        self._depth = 0
        self._quote = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The objects that `data` ends. Raises BAD_REQUEST at anything else, too long or nested too deep."""
        self._rest += data
        found = []
        while (message := self._next()) is not None:
            found.append(message)
        if len(self._rest) > MAX_LENGTH or any(len(message) > MAX_LENGTH for message in found):
            raise Error(Kind.BAD_REQUEST, f"a message of more than {MAX_LENGTH} bytes")
        return found

    def _next(self) -> bytes | None:
        if self._depth == 0:
            self._rest, self._at = self._rest.lstrip(b" \t\r\n"), 0
            if self._rest and not self._rest.startswith(b"{"):
                raise Error(Kind.BAD_REQUEST, f"not a JSON object: {self._rest[:80]!r}")
        while match := _IN_STRING.get(self._quote, _OUTSIDE).search(self._rest, self._at):
            self._at = match.end()
            mark = match[0]
            if mark in _IN_STRING:
                self._quote = b"" if self._quote else mark
            elif mark in b"{[":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise Error(Kind.BAD_REQUEST, f"a message nested deeper than {MAX_DEPTH}")
            elif mark in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    message, self._rest = self._rest[: self._at], self._rest[self._at :]
                    return message
        # What is left ends nothing; but a lone backslash at the end still escapes the next byte.
        self._at = max(self._at, len(self._rest) - self._rest.endswith(b"\\"))
        return None


def encode(message: dict[str, Any]) -> bytes:
    """A message as one line, as QEMU ends its lines."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\r\n"


def _finite(text: str) -> float:
    """A number that can be sent back: Python's reader takes NaN and makes infinity of 1e999, JSON has neither."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def decode(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, which is UTF-8; strings may be in single quotes, as QEMU's documents have them.

    Raises BAD_REQUEST if it is anything else.
    """
    try:
        message = _DECODER.decode(double_quoted(data.decode()) if b"'" in data else data.decode())
        if b"\\u" in data:
            json.dumps(
                message, ensure_ascii=False
            ).encode()  # half of a surrogate pair is no text: ValueError
    except (ValueError, RecursionError) as error:
        raise Error(Kind.BAD_REQUEST, f"not JSON: {data[:80]!r}") from error
    if not isinstance(message, dict):
        raise Error(Kind.BAD_REQUEST, f"not a JSON object: {data[:80]!r}")
    return message


def parse_request(message: dict[str, Any], oob: bool = False) -> Request:
    """The request in an object; `oob` if out-of-band execution was negotiated.

    Raises BAD_REQUEST in QEMU's words (monitor/qmp.c, qapi/qmp-dispatch.c).
    """
    execute = None
    for member, value in message.items():
        if member == "execute" or (member == "exec-oob" and oob):
            if execute is not None:
                raise Error(Kind.BAD_REQUEST, f"QMP input member '{member}' clashes with '{execute}'")
            if not isinstance(value, str):
                raise Error(Kind.BAD_REQUEST, f"QMP input member '{member}' must be a string")
            execute = member
        elif member == "arguments" and not isinstance(value, dict):
            raise Error(Kind.BAD_REQUEST, "QMP input member 'arguments' must be an object")
        elif member not in ("arguments", "id"):
            raise Error(Kind.BAD_REQUEST, f"QMP input member '{member}' is unexpected")
    if execute is None:
        raise Error(Kind.BAD_REQUEST, "QMP input lacks member 'execute'")
    return Request(
        message[execute],
        message.get("arguments", {}),
        message.get("id"),
        "id" in message,
        execute == "exec-oob",
    )


def request(command: str, arguments: dict[str, Any], id: int) -> bytes:
    """A client's request."""
    return encode({"execute": command, "arguments": arguments, "id": id})


def version() -> dict[str, Any]:
    """Result of query-version. Clients look for "qemu"; the package says who we are."""
    major, minor, micro = (int(part) for part in __version__.split("."))
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"tcmu-replication {__version__}",
    }


def greeting() -> bytes:
    """The server's first line."""
    return encode({"QMP": {"version": version(), "capabilities": ["oob"]}})


def success(result: Any, to: Request) -> bytes:
    """The reply to a command that succeeded."""
    return encode({"return": result} | _id(to))


def failure(error: Error, to: Request | None) -> bytes:
    """The reply to a command that failed; the kind travels in the error's data."""
    data: dict[str, Any] = {"kind": kind_name(error.kind)}
    if error.offset is not None:
        data["offset"] = error.offset
    if error.length is not None:
        data["length"] = error.length
    error_class = error.error_class if isinstance(error, ClassError) else CLASS_OF_KIND[error.kind]
    body = {"class": error_class, "desc": error.detail, "data": data}
    return encode({"error": body} | (_id(to) if to else {}))


def event(name: str, data: dict[str, Any], seconds: float) -> bytes:
    """An event that happened at `seconds` since 1970."""
    whole = int(seconds)
    stamp = {"seconds": whole, "microseconds": int((seconds - whole) * 1_000_000)}
    return encode({"event": name, "data": data, "timestamp": stamp})


def error_of(body: Any) -> Error:
    """The `Error` in a reply's "error"; without our data (a QEMU sent it) an I/O error."""
    if not isinstance(body, dict) or not isinstance(body.get("desc"), str):
        return Error(Kind.PEER_LIED, f"an error reply that is none: {body!r:.80}")
    data = body.get("data")
    data = data if isinstance(data, dict) else {}
    kind = KIND_OF_NAME.get(str(data.get("kind")), Kind.IO)
    offset, length = data.get("offset"), data.get("length")
    return Error(
        kind,
        body["desc"],
        offset=offset if isinstance(offset, int) else None,
        length=length if isinstance(length, int) else None,
    )


def _id(to: Request) -> dict[str, Any]:
    return {"id": to.id} if to.has_id else {}
