"""The frame of a long-running program: its log, and its last words if it cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tcmu_replication.errors import Error
from tcmu_replication.host import journal, systemd


@contextmanager
def running(name: str) -> Iterator[None]:
    """Around a program's whole life: log as `name`; an `Error` that ends it is told to the service manager."""
    limit = journal.log_to_stderr(name)
    try:
        yield
    except Error as error:
        systemd.notify(STATUS=str(error))
        raise
    finally:
        limit.close()
