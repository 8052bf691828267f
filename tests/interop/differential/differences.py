"""What may differ between QEMU and ours in a run, and nothing else.

Each is a row of the table in docs/replication.md, named by the beginning of its
first cell; `tests/interop/test_qemu_differential.py` checks that it stands there.
"""

from __future__ import annotations

import enum


class Difference(enum.Enum):
    """The beginning of the row's first cell in docs/replication.md."""

    STOP = "stop without failover on a secondary fails"
    FAILOVER_ERRORS = "the errors of a failover are thrown away"
    COMMIT_SHOWS_AN_ERROR = "while its commit runs, status says"
    SECONDARY_STATUS = "the secondary's status stays clean"
    TRIM_FORWARDED = "trim is not replicated"
    TRIM_OWN = "trim on the secondary's own LUN does nothing"
    GRAIN = "pre-images are saved in units of 64 KiB or more"
    FAILED_COMMIT = "a failed commit leaves the disk copied in part"
