"""JSON with strings in single quotes, as QEMU's documents write requests, made JSON. No I/O."""

from __future__ import annotations

import re

_STRING = re.compile(r""" "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' """, re.DOTALL | re.VERBOSE)
_PIECE = re.compile(r'\\.|"', re.DOTALL)
_REQUOTED = {"\\'": "'", '"': '\\"'}
"""What is written otherwise inside of double quotes."""


def double_quoted(text: str) -> str:
    """The same text with all its strings in double quotes. What is no JSON otherwise is none afterwards."""
    return _STRING.sub(_string, text)


def _string(match: re.Match[str]) -> str:
    inner = _PIECE.sub(lambda piece: _REQUOTED.get(piece[0], piece[0]), match[0][1:-1])
    return f'"{inner}"'
