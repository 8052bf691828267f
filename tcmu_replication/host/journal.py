"""Logging to standard error, as the journal reads it: one line an event, the priority in front (sd-daemon(3))."""

from __future__ import annotations

import logging
import os
import sys

PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class JournalFormatter(logging.Formatter):
    """Each line of a message begins with its priority, so that a trace keeps it; the journal adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(mark + line for line in super().format(record).splitlines())


def log_to_stderr(name: str) -> None:
    """Send the whole program's log to standard error, every line named `name`."""
    handler = logging.StreamHandler(sys.stderr)
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(JournalFormatter(f"{name}: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {name}: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
