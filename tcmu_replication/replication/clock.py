"""The time, as a manifest and a status have it."""

from __future__ import annotations

import datetime


def now() -> str:
    """UTC, ISO 8601, milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
