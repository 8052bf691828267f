"""Logging to standard error, as the journal reads it: one line an event, the priority in front (sd-daemon(3))."""

from __future__ import annotations

import logging
import os
import sys

from tcmu_replication.host.log_limit import LogLimit

PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class NamedFormatter(logging.Formatter):
    """Says the program's `name` in front of each message that does not say it itself, and the time."""

    def __init__(self, name: str, form: str = "%(asctime)s %(levelname)-7s %(message)s") -> None:
        super().__init__(form)
        self._prefix = f"{name}: "

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        if not record.message.startswith(self._prefix):
            record.message = self._prefix + record.message
        return super().formatMessage(record)


class JournalFormatter(NamedFormatter):
    """Each line of a message begins with its priority, so that a trace keeps it; the journal adds the time."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(mark + line for line in super().format(record).splitlines())


def log_to_stderr(name: str) -> LogLimit:
    """Send the whole program's log to standard error, every message named `name`; not too many of a kind.

    Close what is returned in the end.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((JournalFormatter if "JOURNAL_STREAM" in os.environ else NamedFormatter)(name))
    limit = LogLimit(handler)
    handler.addFilter(limit)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return limit
