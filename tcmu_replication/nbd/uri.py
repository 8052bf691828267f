"""NBD addresses: nbd://host[:port]/export and nbd+unix:///export?socket=path, with TLS nbds and nbds+unix.

Source: doc/uri.md of the NBD project. Where certificates are is nothing of a URI's here.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tcmu_replication.errors import Error, Kind

DEFAULT_PORT = 10809


class Tcp(NamedTuple):
    """A TCP address; `host` is a name, an IPv4 or an IPv6 address without brackets.

    `local` is the address of ours to call it from; without it the kernel chooses one.
    """

    host: str
    port: int = DEFAULT_PORT
    local: str | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Unix(NamedTuple):
    """The path of a unix socket."""

    path: str

    def __str__(self) -> str:
        return self.path


Address = Tcp | Unix


class Uri(NamedTuple):
    """Where an export is; `tls`: it may be spoken to inside of TLS only."""

    address: Address
    export: str
    tls: bool = False


def parse(text: str) -> Uri:
    """The parts of a URI. Raises Error BAD_CONFIG that says what was expected."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        query = parse_qs(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
    except ValueError as error:
        raise _wrong(text, str(error)) from error
    export = unquote(parts.path.removeprefix("/"))
    tls = parts.scheme.startswith("nbds")
    if parts.scheme in ("nbd", "nbds"):
        if not host:
            raise _wrong(text, "it names no host")
        if parts.query:
            raise _wrong(text, "nbd:// takes no query; a socket belongs to nbd+unix://")
        return Uri(Tcp(host, DEFAULT_PORT if port is None else port), export, tls)
    if parts.scheme in ("nbd+unix", "nbds+unix"):
        if parts.netloc:
            raise _wrong(text, "nbd+unix:/// names no host")
        if list(query) != ["socket"] or len(query["socket"]) != 1 or not query["socket"][0]:
            raise _wrong(text, "it needs ?socket=PATH and nothing else")
        return Uri(Unix(query["socket"][0]), export, tls)
    raise _wrong(text, f"the scheme {parts.scheme!r} is not known")


def format(address: Address, export: str, tls: bool = False) -> str:
    """The URI of an export; `parse` reads it back."""
    scheme = "nbds" if tls else "nbd"
    name = quote(export, safe="")
    if isinstance(address, Unix):
        return f"{scheme}+unix:///{name}?socket={quote(address.path)}"
    return f"{scheme}://{address}/{name}"


def _wrong(text: str, why: str) -> Error:
    return Error(
        Kind.BAD_CONFIG,
        f"{text!r} is not an NBD address: {why}; "
        "expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, with TLS nbds and nbds+unix",
    )
