"""Sizes and rounding. Everything is bytes unless a name says otherwise."""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

BLOCK = 4 * KiB
"""The grain of overlays, of the copy-before-write and of dirty maps."""

_SUFFIXES = {"": 1, "B": 1}
for _letter, _factor in (("K", KiB), ("M", MiB), ("G", GiB), ("T", TiB)):
    _SUFFIXES |= {_letter: _factor, _letter + "IB": _factor}
_SIZE = re.compile(r"\s*(\d+)\s*([A-Za-z]*)\s*\Z")


def round_down(value: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def blocks_of(length: int) -> int:
    """Blocks of a disk of `length` bytes; the last may be a part."""
    return -(-length // BLOCK)


def parse_size(text: str) -> int:
    """Bytes of "512", "64K", "256 MiB", "16TiB" (powers of 1024, as qemu-img reads them).

    Raises ValueError that says what was expected.
    """
    match = _SIZE.match(text)
    factor = _SUFFIXES.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"{text!r} is not a size; expected a whole number and K, M, G or T, as in 256M or 1 TiB"
        )
    return int(match[1]) * factor


def format_size(value: int) -> str:
    """A size for people: "4 KiB", "1.5 GiB", "0 B"."""
    if value < KiB:
        return f"{value} B"
    for factor, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if value >= factor:
            return f"{value / factor:.1f}".removesuffix(".0") + f" {name}"
    raise AssertionError("unreachable")
