"""The kinds of value in a resource file that TOML has no type for.

Each has `parse(value)`, which returns itself or raises ValueError, and
`expected`, the words for the message when it does.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any

from tcmu_replication import units


class Size(int):
    """Bytes, written as 4096, "256 MiB" or "16T"."""

    MAX = 1 << 62
    expected = 'a size, as in 4096, "256 MiB" or "1 TiB"'

    @classmethod
    def parse(cls, value: Any) -> Size:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        size = value if isinstance(value, int) else units.parse_size(value)
        if not 0 < size <= cls.MAX:
            raise ValueError
        return cls(size)


class Name(str):
    """The name of a resource: it travels in LIO's dev_config and in file names, so no comma or slash."""

    PATTERN = re.compile(r"(?!uio\d+\Z)[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
    expected = (
        "1 to 64 letters, digits, '_', '.' and '-', the first a letter or a digit, and not a device's (uioN)"
    )

    @classmethod
    def parse(cls, value: Any) -> Name:
        if not isinstance(value, str) or not cls.PATTERN.match(value):
            raise ValueError
        return cls(value)


class Serial(str):
    """The unit serial number that initiators see (VPD page 80h), the same on both hosts."""

    PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
    expected = "1 to 64 letters, digits, '.', '_' and '-'"

    @classmethod
    def parse(cls, value: Any) -> Serial:
        if not isinstance(value, str) or not cls.PATTERN.match(value):
            raise ValueError
        return cls(value)


class Address(str):
    """An IPv4 or IPv6 address, in its shortest form."""

    expected = "an IPv4 or IPv6 address, as in 192.0.2.1 (a name would have to be resolved in an outage)"

    @classmethod
    def parse(cls, value: Any) -> Address:
        if not isinstance(value, str) or not value.isprintable():  # the scope behind a % may be anything
            raise ValueError
        return cls(ipaddress.ip_address(value))


class AbsolutePath(str):
    """A path that means the same from every working directory."""

    expected = "an absolute path, as in /dev/vg0/disk0"

    @classmethod
    def parse(cls, value: Any) -> AbsolutePath:
        if not isinstance(value, str) or not value.startswith("/") or not value.isprintable():
            raise ValueError
        return cls(os.path.normpath(value))


class Listen(str):
    """Where the LUN itself is offered over NBD; `unix` is the path, or None and (host, port) is `tcp`."""

    expected = '"unix:/path/of/a/socket" or "address:port", as in "127.0.0.1:10809" or "[::1]:10809"'

    @property
    def unix(self) -> Path | None:
        return Path(self.removeprefix("unix:")) if self.startswith("unix:") else None

    @property
    def tcp(self) -> tuple[str, int]:
        host, _, port = self.rpartition(":")
        return host.strip("[]"), int(port)

    @classmethod
    def parse(cls, value: Any) -> Listen:
        if not isinstance(value, str):
            raise ValueError
        listen = cls(value)
        if listen.unix is not None:
            AbsolutePath.parse(str(listen.unix))
            return listen
        host, port = listen.tcp
        bracketed = value.startswith("[")
        if (ipaddress.ip_address(host).version == 6) != bracketed or not 1 <= port <= 65535:
            raise ValueError
        return listen
