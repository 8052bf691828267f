"""Which boot of this host it is: what the page cache held in another one is gone."""

from __future__ import annotations

from pathlib import Path

from tcmu_replication.errors import from_os

LENGTH = 36
"""Bytes of a boot's name: a UUID as text."""

_SOURCE = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """This boot's name (random(4)). Raises `Error`."""
    try:
        return _SOURCE.read_text().strip()
    except OSError as error:
        raise from_os(error, f"read {_SOURCE}") from error
